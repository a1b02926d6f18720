"""Extra channels in pretraining: which files belong together, what is said of them, and views of all channels."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
import torch
from discs import write_dataset

import pretrain
import train
from image_io import write_image
from normalisation import load_or_compute_statistics, statistics
from pairing import DatasetError, list_pairs
from selfsupervised import run_log
from selfsupervised.images import UnlabelledSet, ViewBatches, check_images, find_images, usual_range
from selfsupervised.views import VIEWS, ViewMaker, ViewOptions
from slide_index import close_places
from slide_windows import SlideOptions
from tests.slides import draw_slide, write_slide

SIZE = (60, 80)


def draw(seed, channels=3, size=SIZE, top=255):
    """Smooth noise (H, W, C) from 0 to top."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0.1, 0.9, (7, 9, channels))
    return cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC).clip(0, 1).reshape(*size, channels) * top


def write(root: Path, names="abcd", extras=("nir",), images="images", dtype=np.uint8, grey=()):
    """Images and extra channels; returns the folder of the images."""
    for number, name in enumerate(names):
        write_image(root / images / f"{name}.png", draw(number, 1 if name in grey else 3).astype(np.uint8))
        for place, extra in enumerate(extras):
            top = 255 if dtype == np.uint8 else 3000
            write_image(root / extra / f"{name}.tif", draw(100 * (place + 1) + number, 1, top=top).astype(dtype))
    return root / images


def build(found, preset="none", **how):
    mean, std = statistics(found.facts)
    maker = ViewMaker(preset, ViewOptions(size=24), rgb=found.rgb, value_range=(0, 255))
    return UnlabelledSet(found.pairs, maker, found.channels, mean, std, **how), mean, std


def views_of(data, count):
    batches = ViewBatches(data, batch=count, crops=-(-count // len(data)), seed=0, workers=0)
    batches.set_epoch(1)
    return next(iter(batches))


def raw(view, mean, std):
    """A view (C, S, S) in raw units, (S, S, C)."""
    return (view.permute(1, 2, 0).numpy() * np.asarray(std) + np.asarray(mean)).round(3)


# ----------------------------------------------------------------------------------------------------------------------
# Files


def test_a_folder_gives_the_channels_that_training_gives(tmp_path):
    write(tmp_path, extras=("nir", "kv"))
    ours = find_images([tmp_path], ("kv", "nir"))
    theirs = list_pairs(tmp_path, ("kv", "nir")).pairs
    assert [(pair.name, pair.layers) for pair in ours] == [(pair.name, pair.layers) for pair in theirs]
    assert all([path.parent.name for path in pair.layers] == ["images", "kv", "nir"] for pair in ours)


@pytest.mark.parametrize("word", ["frames", "frames/../frames", "frames/b.png", "frames/."])
def test_extra_channels_lie_beside_whatever_holds_the_images(tmp_path, word, monkeypatch):
    write(tmp_path, images="frames")
    for pair in find_images([tmp_path / word], ["nir"]):
        assert [path.resolve() for path in pair.extras] == [tmp_path / "nir" / f"{pair.name}.tif"]
    monkeypatch.chdir(tmp_path / "frames")
    (pair,) = (pair for pair in find_images([Path()], ["nir"]) if pair.name == "b")
    assert pair.extras[0].resolve() == tmp_path / "nir" / "b.tif"


def test_a_file_and_its_folder_are_taken_once_with_channels(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.chdir(tmp_path)
    pairs = find_images([Path("images/a.png"), tmp_path, tmp_path / "images" / "b.png"], ["nir"])
    assert [(pair.name, pair.extras[0].name) for pair in pairs] == [(name, f"{name}.tif") for name in "abcd"]


def test_images_of_several_folders_have_channels_of_their_own(tmp_path):
    words = [write(tmp_path / part) for part in ("one", "two")]
    pairs = find_images(words, ["nir"])
    assert len(pairs) == 8 and all(pair.extras[0].parent.parent == pair.image.parent.parent for pair in pairs)


def refused(words, add_dirs, *parts):
    with pytest.raises(DatasetError) as caught:
        find_images(words, add_dirs)
    assert all(str(part) in str(caught.value) for part in parts), str(caught.value)


def test_missing_channels_are_named(tmp_path):
    folder = write(tmp_path)
    refused([tmp_path], ["kv"], f"no folder {tmp_path / 'kv'}", "'kv'", f"expected beside {folder}")
    (tmp_path / "nir" / "c.tif").unlink()
    message = f"1 of 4 files in {folder} have no partner in {tmp_path / 'nir'}, first: 'c'"
    refused([tmp_path], ["nir"], message, "by stem")
    refused([folder / "c.png"], ["nir"], "1 of 1 files", "'c'")
    assert find_images([folder / "a.png"], ["nir"])[0].extras
    write_image(tmp_path / "nir" / "z.png", draw(0, 1).astype(np.uint8))
    refused([tmp_path], ["nir"], message, f"1 of 4 files in {tmp_path / 'nir'} have no partner in {folder}, first: 'z'")


def test_two_images_of_one_stem_have_no_channel_of_their_own(tmp_path):
    folder = write(tmp_path)
    write_image(folder / "a.bmp", draw(5).astype(np.uint8))
    assert len(find_images([tmp_path])) == 5
    refused([tmp_path], ["nir"], folder / "a.png", folder / "a.bmp", "one image for each stem", "rename")


# ----------------------------------------------------------------------------------------------------------------------
# What is in them


def test_names_and_statistics_are_those_of_all_channels(tmp_path):
    write(tmp_path, extras=("nir", "kv"), dtype=np.uint16)
    found = check_images(find_images([tmp_path], ["nir", "kv"]), add_dirs=["nir", "kv"])
    assert found.channels == ("red", "green", "blue", "nir", "kv") and found.rgb
    given = load_or_compute_statistics(tmp_path / "run", tmp_path / "run", found.facts, ())
    pixels = np.concatenate(
        [
            np.dstack([cv2.imread(str(pair.image))[..., ::-1], *(tifffile.imread(path) for path in pair.extras)])
            for pair in found.pairs
        ]
    ).reshape(-1, 5)
    np.testing.assert_allclose(given.mean, pixels.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(given.std, pixels.std(axis=0), rtol=1e-6)
    low, high = usual_range(given)
    assert low == (0,) * 5 and high[:3] == (255,) * 3, "8 bits keep theirs beside 16 bits"
    assert all(1000 < end <= 3000 for end in high[3:])


def test_an_image_without_a_readable_channel_is_left_out(tmp_path):
    write(tmp_path)
    (tmp_path / "nir" / "b.tif").write_bytes(b"no picture")
    write_image(tmp_path / "nir" / "c.tif", draw(1, 3).astype(np.uint8))
    found = check_images(find_images([tmp_path], ["nir"]), add_dirs=["nir"])
    assert [pair.name for pair in found.pairs] == ["a", "d"]
    reasons = {path: why for path, why in found.left_out}
    assert set(reasons) == {tmp_path / "nir" / "b.tif", tmp_path / "nir" / "c.tif"}
    assert "save it as a grey image" in reasons[tmp_path / "nir" / "c.tif"]


def test_channels_of_another_size_or_type_are_refused(tmp_path):
    folder = write(tmp_path)
    write_image(tmp_path / "nir" / "b.tif", draw(1, 1, (20, 30)).astype(np.uint8))
    with pytest.raises(DatasetError, match=f"nir/b.tif is 20x30, its image {folder / 'b.png'} is 60x80; sizes must"):
        check_images(find_images([tmp_path], ["nir"]), add_dirs=["nir"])
    write_image(tmp_path / "nir" / "b.tif", draw(1, 1).astype(np.uint16))
    with pytest.raises(DatasetError, match=r"images differ in pixel types: uint8: 3 images.*nir/b\.tif.*one scale"):
        check_images(find_images([tmp_path], ["nir"]), add_dirs=["nir"])


def test_grey_images_among_rgb_ones_keep_their_channels(tmp_path):
    write(tmp_path, grey="b", extras=("nir", "kv"))
    found = check_images(find_images([tmp_path], ["nir", "kv"]), add_dirs=["nir", "kv"])
    assert found.channels == ("red", "green", "blue", "nir", "kv") and "1 of 4 images are grey" in found.notes[0]
    data, mean, std = build(found)
    views = views_of(data, 4)
    pixels = raw(views.view_a[views.names.index("b")], mean, std)
    assert np.ptp(pixels[..., :3], axis=2).max() < 0.01 < 5 < abs(pixels[..., 0] - pixels[..., 3]).mean()
    row, column = (int(views.places[views.names.index("b"), 0, axis, 2]) for axis in (1, 0))
    window = slice(row, row + 24), slice(column, column + 24)
    np.testing.assert_allclose(pixels[..., 4], tifffile.imread(tmp_path / "kv" / "b.tif")[window], atol=0.01)


def test_grey_images_alone_with_two_channels_are_no_rgb(tmp_path):
    write(tmp_path, grey="abcd", extras=("nir", "kv"))
    found = check_images(find_images([tmp_path], ["nir", "kv"]), add_dirs=["nir", "kv"])
    assert found.channels == ("grey", "nir", "kv") and not found.rgb and not found.notes
    assert views_of(build(found, "natural")[0], 4).view_a.shape == (4, 3, 24, 24)


# ----------------------------------------------------------------------------------------------------------------------
# Views


def maker_of(preset, rgb=True, limits=(0, 255)):
    return ViewMaker(preset, ViewOptions(size=32), rgb=rgb, value_range=limits)


@pytest.mark.parametrize("preset", VIEWS)
def test_channels_move_with_the_image(preset):
    image = draw(0).astype(np.uint8)
    both = np.dstack([image, image])
    maker = maker_of(preset)
    for seed in range(8):
        matrices = maker.draw(SIZE, (0, 0), seed)
        for matrix in matrices:
            view = maker.cut(both, matrix, SIZE)
            assert abs(view[..., :3].astype(int) - view[..., 3:]).max() <= 1


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("preset", [name for name in VIEWS if name != "multispectral"])
def test_a_preset_does_to_rgb_what_it_does_without_more_channels(preset, dtype):
    """So colour transforms touch RGB alone, and what is in the other channels does not leak into it, nor back."""
    top = {"uint8": 255, "uint16": 60000, "float32": 0.9}[dtype]
    image, other, extra = (draw(seed, count, top=top).astype(dtype) for seed, count in ((0, 3), (1, 3), (2, 2)))
    limits = ((0,) * 5, (top,) * 5)
    maker, plain = maker_of(preset, limits=limits), maker_of(preset, limits=tuple(ends[:3] for ends in limits))
    changed = []
    for seed in range(12):
        *views, matrices = maker.make_views(np.dstack([image, extra]), seed)
        alone = plain.make_views(image, seed)[:2]
        swapped = maker.make_views(np.dstack([other, extra]), seed)[:2]
        for view, own, strange, matrix in zip(views, alone, swapped, matrices, strict=True):
            assert view.dtype == dtype and view.shape == (32, 32, 5)
            np.testing.assert_allclose(view[..., :3], own, atol=1 if dtype == "uint8" else 1e-3 * top)
            np.testing.assert_array_equal(view[..., 3:], strange[..., 3:])
            cut = maker.cut(np.dstack([image, extra]), matrix, SIZE)[..., 3:]
            changed.append(abs(view[..., 3:].astype(float) - cut).mean(axis=(0, 1)) / top)
    changed = np.array(changed)  # (views, 2)
    assert (changed > 0.01).mean() > 0.6, "else they would tell which views are of one image"
    assert abs(changed[:, 0] - changed[:, 1]).max() > 0.01, "each has a gain of its own"


def test_views_without_changes_leave_all_channels(tmp_path):
    write(tmp_path)
    data, mean, std = build(check_images(find_images([tmp_path], ["nir"]), add_dirs=["nir"]))
    views = views_of(data, 4)
    for row, name in enumerate(views.names):
        top, left = (int(views.places[row, 0, axis, 2]) for axis in (1, 0))
        expected = np.dstack(
            [
                cv2.imread(str(tmp_path / "images" / f"{name}.png"))[..., ::-1],
                tifffile.imread(tmp_path / f"nir/{name}.tif"),
            ]
        )[top : top + 24, left : left + 24]
        np.testing.assert_allclose(raw(views.view_a[row], mean, std), expected, atol=0.01)


def test_slides_have_their_channels(tmp_path):
    image, mask = draw_slide(0)
    write_slide(tmp_path / "images" / "s.tif", image)
    write_slide(tmp_path / "nir" / "s.tif", 255 - image[..., 1])
    slides = SlideOptions(reduction=2)
    found = check_images(find_images([tmp_path], ["nir"]), add_dirs=["nir"], slides=slides)
    assert found.channels == ("red", "green", "blue", "nir")
    data, mean, std = build(found, slides=slides)
    try:
        for view in views_of(data, 6).view_a:
            pixels = raw(view, mean, std)
            np.testing.assert_allclose(pixels[..., 3], 255 - pixels[..., 1], atol=1.5)
    finally:
        close_places()


# ----------------------------------------------------------------------------------------------------------------------
# The page


def test_training_on_the_same_channels_reports_no_difference(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_log, "pretraining_curves", lambda *_: None)
    monkeypatch.setattr(pretrain, "build_pictures", lambda _: [])
    root = write_dataset(tmp_path / "data", train=4, val=2)
    for split in ("train", "val"):
        for path in (root / split / "images").iterdir():
            write_image(root / split / "nir" / path.name, cv2.imread(str(path))[..., :1])
    common = ["-log", tmp_path, "--encoder", "plain-8", "--cpu", "-w", "0", "-e", "1", "--image-size", "32"]
    words = ["--images", root / "train", "--add-dirs", "nir", "--probe", root, "--exp-name", "p", "-b", "8"]
    words += ["--views", "microscopy", "--projector", "32-32", *common]
    pretrain.main([str(word) for word in words])
    out, run = capsys.readouterr().out, tmp_path / "p"
    assert "4 images of 4 channels (red, green, blue, nir)" in out and "probe IoU" in out
    assert f"--encoder-weights {run / 'p.pth'} --add-dirs nir" in out
    assert torch.load(run / "p.pth", weights_only=True)["channels"] == ["red", "green", "blue", "nir"]
    for file in ("p.pth", "last_checkpoint"):
        for extra in (["--add-dirs", "nir"], []):
            name = f"{file}-{len(extra)}"
            words = ["-d", root, "-m", "plain-unet", "--encoder-weights", run / file, "--exp-name", name, "-b", "4"]
            train.main([str(word) for word in [*words, *common, *extra]])
            out = capsys.readouterr().out
            assert f"encoder weights {run / file}" in out and " 0 missing" in out
            assert ("was pretrained on images with" in out) == (not extra)
            assert extra or "channels red, green, blue, nir, these have red, green, blue: its" in out


def test_a_probe_without_the_channels_is_refused(tmp_path, capsys):
    write(tmp_path / "u")
    root = write_dataset(tmp_path / "data", train=2, val=2)
    words = ["--images", tmp_path / "u", "--add-dirs", "nir", "--probe", root, "-log", tmp_path, "--exp-name", "p"]
    words += ["--encoder", "plain-8", "--cpu", "-w", "0", "-b", "8", "--image-size", "32", "-e", "1"]
    with pytest.raises(SystemExit):
        pretrain.main([str(word) for word in words])
    error = capsys.readouterr().err
    assert f"--probe {root}: no folder {root / 'train' / 'nir'}" in error and "expected beside" in error
