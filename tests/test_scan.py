"""The check of a data set: findings and their words, classes, statistics, the cache, and the command."""

import argparse
import os
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from discs import write_dataset
from PIL import Image

import cli
import facts
import image_io
import normalisation
import scan
import train
from checkpoint import Geometry, ModelConfig
from classes import ClassMap, ClassOptions, resolve_classes
from dataset import load_image, load_mask, load_region
from dataset_utils import check
from image_io import preprocess, read_image, write_image, write_mask
from pairing import DatasetError, FileOptions, find_splits, list_pairs
from scan import check_dataset, scan_pairs


@pytest.fixture
def root(tmp_path):
    """A data set that a test may spoil: 4 training and 2 validation images."""
    return write_dataset(tmp_path / "discs", train=4, val=2)


def look(root, files=None, **options):
    train_listing, val_listing, _ = find_splits(root, files or FileOptions())
    return check_dataset(train_listing, val_listing, ClassOptions(**options), workers=2)


def replace_mask(path, change):
    write_mask(path, change(image_io.read_mask(path).copy()))


# ----------------------------------------------------------------------------------------------------------------------
# Findings


def test_a_sound_data_set_has_no_findings(root):
    checked = look(root)
    assert checked.errors == [] and checked.warnings == [] and checked.root == root and checked.val_name == "discs"
    assert checked.raise_errors() == ClassMap((255,), ("background", "object"))
    assert checked.notes == ["no --class-list: the masks hold 0 and 255, so 255 is the object"]


def test_all_findings_come_at_once(root):
    train_dir = root / "train"
    data = (train_dir / "images" / "a0.png").read_bytes()
    (train_dir / "images" / "a0.png").write_bytes(data[: len(data) // 2])
    (train_dir / "images" / "a1.png").write_text("this is no picture")
    replace_mask(train_dir / "gt" / "a2.png", lambda mask: mask[:-1])
    colours = np.zeros((32, 32, 3), np.uint8)
    colours[..., 1] = 255
    write_image(train_dir / "gt" / "a3.png", colours)
    (root / "val" / "gt" / "b0.png").unlink()
    checked = look(root)
    with pytest.raises(DatasetError) as caught:
        checked.raise_errors()
    lines = str(caught.value).splitlines()
    assert lines[0] == "the data set has 5 errors:" and len(lines) == 6
    expected = (
        f"1 of 2 files in {root}/val/images have no partner in {root}/val/gt, first: 'b0'. Files pair by stem.",
        f"{train_dir}/images/a0.png is truncated",
        f"{train_dir}/images/a1.png is not an image Tessera reads: it starts with b'this is no p'",
        f"{train_dir}/gt/a2.png is 31x32, its image {train_dir}/images/a2.png is 32x32; sizes must agree",
        f"{train_dir}/gt/a3.png is an RGB mask",
    )
    for line, words in zip(lines[1:], expected, strict=True):
        assert line.startswith(f"  - {words}"), line


def test_very_many_findings_are_cut(root):
    checked = look(root)
    checked.errors = [f"{i}.png is bad" for i in range(300)]
    with pytest.raises(DatasetError) as caught:
        checked.raise_errors()
    lines = str(caught.value).splitlines()
    assert lines[0] == "the data set has 300 errors:" and len(lines) == 102 and "dataset_utils.check" in lines[-1]


def test_mask_without_image(root):
    write_mask(root / "train" / "gt" / "lost.png", np.zeros((4, 4), np.uint8))
    (error,) = look(root).errors
    assert error.startswith(f"1 of 5 files in {root}/train/gt have no partner in {root}/train/images, first: 'lost'")


def test_masks_are_missing_altogether(root):
    (root / "val" / "gt").rename(root / "val" / "labels")
    assert look(root).errors == [f"{root}/val has no gt/ (or masks/): validation needs a mask for every image"]


def test_channel_counts_that_differ(root):
    write_image(root / "train" / "images" / "a1.png", np.arange(1024, dtype=np.uint8).reshape(32, 32))
    rgba = np.random.default_rng(0).integers(0, 255, (32, 32, 4), np.uint8)
    Image.fromarray(rgba, "RGBA").save(root / "train" / "images" / "a2.png")
    (error,) = look(root).errors
    images = root / "train" / "images"
    assert error == (
        f"images differ in channels: 3 channels: 5 images, such as {images}/a0.png; 1 channels: 1 images, such as "
        f"{images}/a1.png. One data set needs the same number everywhere."
    )


def test_pixel_types_that_differ_and_constant_images_are_warnings(root):
    write_image(root / "train" / "images" / "a1.png", np.full((32, 32, 3), 900, np.uint16))
    checked = look(root)
    assert checked.errors == []
    assert checked.warnings[0] == f"{root}/train/images/a1.png is constant: every pixel is 900"
    assert checked.warnings[1].startswith("images differ in pixel types: uint8: 5 images")


def save_rotated(path, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 24, 3), np.uint8))
    picture.save(path, exif=exif, quality=95)


def test_a_rotated_image_with_an_unrotated_mask_is_refused(root):
    images, masks = root / "train" / "images", root / "train" / "gt"
    (images / "a0.png").unlink()
    save_rotated(images / "a0.jpg", 6)
    object_left = np.zeros((40, 24), np.uint8)
    object_left[:, :5] = 255
    write_mask(masks / "a0.png", np.rot90(object_left, -1))
    (error,) = look(root).errors
    assert error == (
        f"{images}/a0.jpg has EXIF orientation 6, {masks}/a0.png has 1: which way up they belong together is unknown. "
        "Save both with the same orientation, or both without."
    )
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(object_left).save(masks / "a0.png", exif=exif)
    assert look(root).errors == []
    pair = list_pairs(root / "train").pairs[0]
    assert load_image(pair, (), ())[0].shape == (24, 40, 3)
    mask = load_mask(pair, ClassMap((255,), ("background", "object")), load_region(pair))
    assert mask[:5].all() and not mask[5:].any(), "image and mask are turned alike"


def test_nan_in_a_float_tiff(root):
    values = np.zeros((32, 32, 3), np.float32)
    values[3, 4] = np.nan
    (root / "train" / "images" / "a0.png").unlink()
    tifffile.imwrite(root / "train" / "images" / "a0.tif", values, photometric="rgb")
    (error,) = look(root).errors
    assert "a0.tif holds NaN or infinity in 1 pixels; expected finite values: repair it, or declare" in error


def test_groups_in_both_splits_are_said(root):
    words = ["-d", str(root), "--group-pattern"]
    names = [path.stem for part in ("train", "val") for path in sorted((root / part / "images").iterdir())]
    assert {name[0] for name in names} == {"a", "b"}

    def warnings(pattern):
        return scan.check_from_flags(train.build_parser().parse_args([*words, pattern])).warnings

    assert warnings("^([a-z])") == []
    (warning,) = warnings(r"(\d)$")
    assert warning == "2 groups of --group-pattern '(\\\\d)$' in training and validation both, such as '0'"
    (warning,) = warnings("^(patient)")
    assert warning.endswith("does not match the file name 'a0'; groups of training and validation were not compared")


def test_an_image_in_both_splits_is_said(root):
    (root / "val" / "images" / "b1.png").unlink()
    (root / "val" / "images" / "b1.png").symlink_to(root / "train" / "images" / "a2.png")
    (warning,) = look(root).warnings
    assert warning == f"1 images are in training and validation both, such as {root}/train/images/a2.png"


def test_no_image_is_left(root, tmp_path):
    ids = tmp_path / "ids.csv"
    ids.write_text("id\na0\na1\n")
    assert look(root, FileOptions(ids=ids)).errors == [f"no image of {root}/val is left for validation"]


# ----------------------------------------------------------------------------------------------------------------------
# Classes


def make_counts(*labels):
    return Counter({label: 10 for label in labels})


def test_masks_of_zero_and_x_mean_x():
    assert resolve_classes(ClassOptions(), make_counts(0, 64)) == ClassMap((64,), ("background", "object"))
    assert resolve_classes(ClassOptions(ignore_label=255), make_counts(0, 1, 255)).labels == (1,)
    big = resolve_classes(ClassOptions(), make_counts(0, 70_000))
    assert big.labels == () and big.names == ("background", "object")


def test_several_labels_need_a_choice():
    with pytest.raises(DatasetError) as caught:
        resolve_classes(ClassOptions(), make_counts(0, 1, 2, 3, 4, 5))
    assert str(caught.value) == (
        'the masks hold the labels 0 1 2 3 4 5, which needs a choice: --class-list "1 2 3 4 5" (or a part of it) for '
        "classes, --max-mask-val 5 for all up to it, --class-list nonzero for instance maps, --mask-threshold 127 for "
        "grey or JPEG masks"
    )
    with pytest.raises(DatasetError, match=r"0 1 2 .* 20 \.\.\. 300, which needs a choice: --class-list nonzero"):
        resolve_classes(ClassOptions(), make_counts(*range(301)))
    with pytest.raises(DatasetError, match="every mask is empty"):
        resolve_classes(ClassOptions(), make_counts(0))


@pytest.mark.parametrize(
    ("options", "labels", "names"),
    [
        ({"labels": "64 128"}, (64, 128), ("background", "64", "128")),
        ({"labels": "128,64", "names": ("a", "b")}, (128, 64), ("background", "a", "b")),
        ({"labels": "128 64", "names": ("none", "a", "b")}, (128, 64), ("none", "a", "b")),
        ({"labels": "1 0 2"}, (1, 0, 2), ("1", "0", "2")),
        ({"labels": "nonzero"}, (), ("background", "object")),
        ({"labels": "nonzero", "names": ("cell",)}, (), ("background", "cell")),
        ({"max_mask_val": 3, "labels": "9"}, (1, 2, 3), ("background", "1", "2", "3")),
        ({"max_mask_val": 3, "ignore_label": 2}, (1, 3), ("background", "1", "3")),
        ({"mask_threshold": 127.0}, (), ("background", "object")),
    ],
)
def test_flags_choose_classes(options, labels, names):
    classes = resolve_classes(ClassOptions(**options), make_counts(0, 1, 2))
    assert (classes.labels, classes.names) == (labels, names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "a b"}, "must be labels such as"),
        ({"labels": "1 70000"}, "label 70000 out of range, expected 0 to 65535"),
        ({"labels": " "}, "no label in it"),
        ({"labels": "1 1"}, "names a label twice"),
        ({"labels": "1 2", "ignore_label": 2}, "or the one of --ignore-label"),
        ({"labels": "0"}, "leaves nothing to tell it from"),
        ({"labels": "1 2", "names": ("a",)}, "--class-names a: expected 2 different names"),
        ({"labels": "1 2", "names": ("a", "a")}, "expected 2 different names"),
        ({"max_mask_val": 300}, "300 labels to learn, at most 250"),
        ({"ignore_label": 70_000}, "--ignore-label 70000 is out of range"),
    ],
)
def test_flags_that_cannot_be(options, message):
    with pytest.raises(DatasetError, match=message):
        resolve_classes(ClassOptions(**options), make_counts(0, 1, 2))


def test_unlisted_absent_and_wrong_labels(root):
    replace_mask(root / "train" / "gt" / "a3.png", lambda mask: np.where(mask == 255, 7, 0).astype(np.uint8))
    first = root / "train" / "gt" / "a3.png"
    checked = look(root, labels="255 9")
    assert checked.errors == []
    assert checked.warnings == [
        "training: the labels [9] never occur in a mask",
        f"training: the masks also hold the labels 7, first in {first}. They are background; "
        'to learn them: --class-list "7 9 255"',
        "validation: the labels [9] never occur in a mask",
    ]
    assert look(root, labels="3").errors == [
        "training: no mask holds any of the labels 3; the masks hold 0 7 255",
        "validation: no mask holds any of the labels 3; the masks hold 0 255",
    ]
    (error, other) = look(root, labels="0 255").errors[:1] + look(root, max_mask_val=3).errors[:1]
    assert error.startswith(f"training: the masks also hold the labels 7, first in {first}; to learn them:")
    assert error.endswith("a list with 0 has no background to put them in")
    assert other.startswith("training: no mask holds any of the labels 1 2 3")
    assert look(root, max_mask_val=9).errors[0] == (
        f"training: the masks also hold the labels 255, first in {root}/train/gt/a0.png: "
        "out of range, --max-mask-val is 9"
    )


def test_empty_validation_masks_are_only_a_warning(root):
    for path in (root / "val" / "gt").iterdir():
        replace_mask(path, np.zeros_like)
    checked = look(root)
    assert checked.errors == []
    assert checked.warnings == ["validation: no mask holds any of the labels 255; the masks hold 0"]


def test_labels_count_inside_the_region_only(root):
    for split in ("train", "val"):
        for path in (root / split / "gt").iterdir():
            write_mask(root / split / "fov" / path.name, (image_io.read_mask(path) == 0).astype(np.uint8))
    checked = look(root, FileOptions(roi_dir="fov"), labels="255")
    assert checked.errors[0] == "training: no mask holds any of the labels 255; the masks hold 0"
    assert [scan.classes_present(item, checked.classes) for item in checked.train] == [()] * 4
    sound = look(root, labels="255")
    assert [scan.classes_present(item, sound.classes) for item in sound.train] == [(1,)] * 4


def test_present_classes_and_pixels_against_the_masks(root):
    rng = np.random.default_rng(0)
    masks = {path: rng.choice([0, 3, 7, 9], (32, 32)).astype(np.uint8) for path in (root / "train" / "gt").iterdir()}
    for path, mask in masks.items():
        write_mask(path, mask)
        write_mask(root / "val" / "gt" / "b0.png", mask)
        write_mask(root / "val" / "gt" / "b1.png", mask)
    for options in (
        {"labels": "7 3", "ignore_label": 9},
        {"labels": "0 3 7 9"},
        {"mask_threshold": 5, "ignore_label": 9},
    ):
        checked = look(root, **options)
        classes = checked.raise_errors()
        encoded = np.stack([load_mask(item.pair, classes, load_region(item.pair)) for item in checked.train])
        expected = np.bincount(encoded.ravel(), minlength=256)[: len(classes.names)]
        assert scan.class_pixels(checked.train, classes).tolist() == expected.tolist()
        for item, mask in zip(checked.train, encoded, strict=True):
            wanted = set(np.unique(mask).tolist()) - {255} - ({0} if classes.has_background else set())
            assert set(scan.classes_present(item, classes)) == wanted


def test_balanced_weights():
    weights = scan.balanced_weights(np.array([80, 20, 0]))
    np.testing.assert_allclose(weights, [100 / 160, 100 / 40, 0])


def test_maps_of_very_many_objects_keep_their_largest_label():
    values = np.arange(10_000, dtype=np.uint32).reshape(100, 100)
    counted = scan.count_labels(values)
    assert len(counted) == facts.MANY_LABELS and counted[-1] == [9999, 10_000 - 4095] and counted[0] == [0, 1]
    assert scan.count_labels(np.zeros(0, np.uint8)) == []


# ----------------------------------------------------------------------------------------------------------------------
# Statistics


def slow_statistics(pairs, steps=()):
    images = [preprocess(read_image(pair.image), steps).astype(np.float64) for pair in pairs]
    pixels = np.concatenate([image.reshape(-1, image.shape[2]) for image in images])
    return pixels.mean(axis=0), pixels.std(axis=0)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("steps", [(), ("denoise", "stretch")])
def test_statistics_against_all_pixels(tmp_path, dtype, steps):
    rng = np.random.default_rng(0)
    for i, size in enumerate([(9, 12), (5, 5), (30, 7)]):
        image = rng.normal(1000 if dtype != np.uint8 else 100, 20, (*size, 4)) + 10 * i
        write_image(tmp_path / "images" / f"{i}.tif", image.astype(dtype))
    facts = scan_pairs(list_pairs(tmp_path).pairs, steps=steps)
    mean, std = normalisation.statistics(facts)
    expected = slow_statistics([item.pair for item in facts], steps)
    np.testing.assert_allclose(mean, expected[0], rtol=1e-6)
    np.testing.assert_allclose(std, expected[1], rtol=1e-6)


def test_deviations_of_large_values_are_exact(tmp_path):
    values = np.array([16_777_210, 16_777_212] * 8, np.float32).reshape(4, 4)
    write_image(tmp_path / "images" / "a.tif", values)
    mean, std = normalisation.statistics(scan_pairs(list_pairs(tmp_path).pairs))
    assert mean.tolist() == [16_777_211] and std.tolist() == [1]


def test_statistics_leave_out_nodata_and_add_extras(tmp_path):
    values = np.arange(16, dtype=np.float32).reshape(4, 4)
    (tmp_path / "images").mkdir()
    tifffile.imwrite(tmp_path / "images" / "a.tif", values, extratags=[(42113, "s", 0, "15", False)])
    extra = np.arange(16, dtype=np.uint8).reshape(4, 4) * 10
    write_image(tmp_path / "nir" / "a.png", extra)
    facts = scan_pairs(list_pairs(tmp_path, ["nir"]).pairs)
    mean, std = normalisation.statistics(facts)
    np.testing.assert_allclose(mean, [np.arange(15).mean(), extra.mean()])
    np.testing.assert_allclose(std, [np.arange(15).std(), extra.std()])
    assert normalisation.value_range(facts) == ((0.0, 0.0), (14.0, 255.0))
    assert normalisation.channel_names(facts, ["nir"]) == ("grey", "nir")


def test_nothing_but_nodata(tmp_path):
    (tmp_path / "images").mkdir()
    values = np.full((4, 4), 5, np.float32)
    tifffile.imwrite(tmp_path / "images" / "a.tif", values, extratags=[(42113, "s", 0, "5", False)])
    facts = scan_pairs(list_pairs(tmp_path).pairs)
    assert scan.find_problems([], facts)[1] == [f"{tmp_path}/images/a.tif has no pixel with data"]
    with pytest.raises(DatasetError, match="no image has a pixel with data"):
        normalisation.statistics(facts)


def scan_root(root, run_dir, steps=()):
    facts = scan_pairs(list_pairs(root / "train").pairs, steps=steps)
    return facts, normalisation.load_or_compute_statistics(root, run_dir, facts, steps)


def test_mean_vals_round_trip_in_b_g_r(root, tmp_path):
    run_dir = tmp_path / "run"
    facts, first = scan_root(root, run_dir)
    path = root / "mean_vals.txt"
    assert first.source == f"computed, kept in {path}" and not run_dir.exists()
    mean, std = slow_statistics([item.pair for item in facts])
    lines = path.read_text().splitlines()
    np.testing.assert_allclose([float(word) for word in lines[0].split()], mean[::-1], rtol=1e-8)
    np.testing.assert_allclose([float(word) for word in lines[1].split()], std[::-1], rtol=1e-8)
    assert lines[2].startswith(f"# digest {normalisation.digest(facts, ())}") and len(lines) == 3
    np.testing.assert_allclose(first.mean, mean, rtol=1e-8)
    _, again = scan_root(root, run_dir)
    assert again.mean == first.mean and again.std == first.std and again.source == str(path)


def test_a_file_of_other_data_is_left_alone(root, tmp_path):
    path, run_dir = root / "mean_vals.txt", tmp_path / "run"
    _, first = scan_root(root, run_dir)
    before = path.read_bytes()
    (root / "train" / "images" / "a3.png").unlink()
    facts, second = scan_root(root, run_dir)
    assert path.read_bytes() == before and second.source == f"computed, kept in {run_dir / 'mean_vals.txt'}"
    np.testing.assert_allclose(second.mean, slow_statistics([item.pair for item in facts])[0], rtol=1e-8)
    assert second.mean != first.mean
    _, third = scan_root(root, run_dir)
    assert third.source == str(run_dir / "mean_vals.txt") and third.mean == second.mean
    _, other = scan_root(root, run_dir, steps=["stretch"])
    assert path.read_bytes() == before and other.mean != second.mean, "preprocessing belongs to the statistics"


def test_a_file_of_the_user_is_taken_as_given(root, tmp_path):
    path = root / "mean_vals.txt"
    path.write_text("10 20 30\n1 2 3\n")
    _, found = scan_root(root, tmp_path / "run")
    assert found.mean == (30, 20, 10) and found.std == (3, 2, 1) and "taken as given" in found.source
    path.write_text("10 20\n1 2\n")
    _, found = scan_root(root, tmp_path / "run")
    assert found.source.startswith("computed, kept in") and path.read_text() == "10 20\n1 2\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a b c\n1 2 3\n", r"is not a list of numbers \(could not convert"),
        ("1 2 3\n", r"has lines of \[3\] numbers; expected a line of means and a line of deviations"),
        ("1 2 3\n1 2\n", r"has lines of \[3, 2\] numbers"),
        ("1 nan 3\n1 2 3\n", "holds NaN, infinity or a negative deviation"),
        ("1 2 3\n1 -2 3\n", "holds NaN, infinity or a negative deviation; .* delete it to compute it anew"),
    ],
)
def test_a_damaged_mean_vals_is_named(root, tmp_path, text, message):
    (root / "mean_vals.txt").write_text(text)
    with pytest.raises(DatasetError, match=rf"{root}/mean_vals.txt {message}"):
        scan_root(root, tmp_path / "run")
    assert (root / "mean_vals.txt").read_text() == text


def test_a_root_that_cannot_be_written(root, tmp_path, monkeypatch):
    real = image_io.atomic_write

    def refuse(path, *rest):
        if Path(path).parent == root:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *rest)

    monkeypatch.setattr(image_io, "atomic_write", refuse)
    _, found = scan_root(root, tmp_path / "run")
    assert found.source == f"computed, kept in {tmp_path / 'run' / 'mean_vals.txt'}"
    assert not (root / "mean_vals.txt").exists()


def test_images_unlike_those_of_the_training_are_said(root):
    facts = scan_pairs(list_pairs(root / "val").pairs)
    mean, std = normalisation.statistics(facts)
    values = {
        "architecture": "plain-unet",
        "encoder": "plain-8",
        "labels": (255,),
        "class_names": ("background", "object"),
        "channels": ("red", "green", "blue"),
        "geometry": Geometry("resize", (32, 32)),
    }
    same = ModelConfig(**values, mean=tuple(mean), std=tuple(std))
    assert normalisation.scene_warnings(facts, same) == []
    other = ModelConfig(**values, mean=tuple(mean + 2.5 * std), std=tuple(std))
    assert "is 2.5 deviations from the training's" in normalisation.scene_warnings(facts, other)[0]
    deep = ModelConfig(**values, mean=tuple(mean + 3 * std), std=tuple(std), dtype="uint16")
    assert normalisation.scene_warnings(facts, deep) == ["images are uint8, the network was trained on uint16"]
    assert normalisation.scene_warnings(facts, ModelConfig(**values, mean=(1.0,) * 5, std=(1.0,) * 5)) == []


# ----------------------------------------------------------------------------------------------------------------------
# Cache


@pytest.fixture
def reads(monkeypatch):
    """Counts the files that are decoded."""
    seen = []
    for module, name in ((scan, "read_layer"), (scan, "read_mask")):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda path, *a, real=real, **k: (seen.append(Path(path).name), real(path, *a, **k))[1]
        )
    return seen


def test_a_second_scan_reads_nothing_and_a_changed_file_is_read_again(root, reads):
    pairs = list_pairs(root / "train").pairs
    first = scan_pairs(pairs)
    assert len(reads) == 8
    assert scan_pairs(pairs) == first and len(reads) == 8
    replace_mask(root / "train" / "gt" / "a2.png", lambda mask: np.where(mask, 9, 0).astype(np.uint8))
    changed = scan_pairs(pairs)
    assert sorted(reads[8:]) == ["a2.png", "a2.png"], "the pair of the changed file, no other"
    assert [value for value, _ in changed[2].mask.labels] == [0, 9]
    state = (root / "train" / "images" / "a0.png").stat()
    os.utime(root / "train" / "images" / "a0.png", ns=(state.st_atime_ns, state.st_mtime_ns + 10**9))
    scan_pairs(pairs)
    assert len(reads) == 12, "another time is another file"
    scan_pairs(pairs, steps=["stretch"])
    assert len(reads) == 20
    assert scan_pairs(pairs) == changed and len(reads) == 20, "preprocessing does not push out the rest"


def test_what_could_not_be_read_is_tried_again(root, monkeypatch):
    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(scan, "read_layer", refuse)
        assert all("Permission denied" in item.layers[0].error for item in scan_pairs(list_pairs(root / "train").pairs))
    assert all(item.layers[0].error is None for item in scan_pairs(list_pairs(root / "train").pairs))


def test_a_damaged_cache_or_none_is_no_trouble(root, reads, monkeypatch):
    pairs = list_pairs(root / "train").pairs
    first = scan_pairs(pairs)
    (path,) = scan.cache_dir().glob("scan-*.json")
    for text in ("{", "[]", '{"version": 0}'):
        path.write_text(text)
        assert scan_pairs(pairs) == first
    assert len(reads) == 32

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(scan, "write_text", refuse)
    path.unlink()
    assert scan_pairs(pairs) == first


def test_an_interrupted_scan_goes_on(root, reads, monkeypatch):
    pairs = list_pairs(root / "train").pairs
    with monkeypatch.context() as patch:

        def stop_at_third(found, *_, **__):
            for place, facts in enumerate(found):
                if place == 2:
                    raise KeyboardInterrupt
                yield facts

        patch.setattr(scan, "tqdm", stop_at_third)
        with pytest.raises(KeyboardInterrupt):
            scan_pairs(pairs, workers=1)
    reads.clear()
    scan_pairs(pairs)
    assert len(reads) <= 4, "the first two pairs were kept"


# ----------------------------------------------------------------------------------------------------------------------
# python -m dataset_utils.check


def test_the_command_prints_findings_and_tables(root, capsys):
    check.main(["-d", str(root)])
    out = capsys.readouterr().out
    assert f"note: validation on {root}/val\n" in out and "0 errors, 0 warnings\n" in out
    assert (
        "split       images  height x width  channels  type\ntraining    4       32x32           3         uint8" in out
    )
    masks = np.stack([image_io.read_mask(path) for path in (root / "train" / "gt").iterdir()])
    share = f"{100 * (masks == 255).mean():.3g} %"
    assert any(line.split()[:4] == ["255", "object", *share.split()] for line in out.splitlines()), out


def test_the_command_fails_on_errors(root, capsys):
    (root / "train" / "gt" / "a0.png").unlink()
    (root / "train" / "images" / "a1.png").write_text("no picture")
    with pytest.raises(SystemExit) as caught:
        check.main(["-d", str(root), "--ignore-label", "9"])
    out = capsys.readouterr().out
    assert caught.value.code == 1
    assert out.count("error: ") == 2 and "2 errors, 0 warnings" in out and "training    3" in out
    with pytest.raises(SystemExit) as caught:
        check.main(["-d", str(root / "nowhere")])
    assert caught.value.code == 1 and "error: no folder" in capsys.readouterr().err


def test_data_flags_mean_the_same_as_in_training():
    def describe(parser: argparse.ArgumentParser) -> dict:
        return {
            action.dest: (action.option_strings, action.type, action.default, action.choices, action.help)
            for action in parser._actions
        }

    own, others = describe(check.build_parser()), describe(train.build_parser())
    assert {name: others[name] for name in own} == own
    assert {"dataset", "val_dir", "class_list", "add_dirs", "ids", "roi_dir", "preprocess"} <= own.keys()
    assert cli.add_data_args.__module__ == "cli"


def test_extras_and_sizes_in_the_table(tmp_path, capsys):
    root = write_dataset(tmp_path / "five", train=4, val=2, channels=5, dtype=np.uint16, sizes=((32, 32), (40, 24)))
    for split in ("train", "val"):
        for path in (root / split / "images").iterdir():
            size = read_image(path).shape[:2]
            write_image(root / split / "nir" / f"{path.stem}.png", cv2.randu(np.empty(size, np.uint8), 0, 255))
    check.main(["-d", str(root), "--add-dirs", "nir"])
    out = capsys.readouterr().out
    assert "32x32, 40x24" in out and "5+1" in out and "uint16, uint8" in out


def test_a_threshold_and_labels_are_refused():
    for flag, options in (("--class-list", {"labels": "64"}), ("--max-mask-val", {"max_mask_val": 3})):
        with pytest.raises(
            DatasetError, match=f"--mask-threshold makes two classes of any mask, {flag} chooses labels"
        ):
            resolve_classes(ClassOptions(**options, mask_threshold=127), Counter({0: 5, 64: 3}))
