"""Training sets for YOLO from masks and label maps: boxes and outlines against loops, splits, links, going on."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from dataset_utils import make_yolo
from dataset_utils.make_yolo import Rules, object_lines
from image_io import read_image, write_image, write_mask
from pairing import Pair, share_by_name


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Many small files need not reach the disk here."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def label_map(seed, height=40, width=50, count=8, dtype=np.uint16):
    """Discs that lie over each other, under numbers with gaps; some are left in pieces."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((height, width), dtype)
    for number in rng.choice(200, count, replace=False) + 1:
        y, x = rng.uniform(0, height), rng.uniform(0, width)
        rows, columns = np.mgrid[:height, :width]
        labels[(rows - y) ** 2 + (columns - x) ** 2 < rng.uniform(1, 9) ** 2] = number
    return labels


def make_set(root, stems, *, split=True, masks="gt", mask=label_map, suffix=".png"):
    for number, stem in enumerate(stems):
        folder = root / ("val" if number % 3 == 2 else "train") if split else root
        labels = mask(number)
        image = np.random.default_rng(number).integers(0, 256, (*labels.shape, 3)).astype(np.uint8)
        write_image(folder / "images" / f"{stem}{suffix}", image)
        write_mask(folder / masks / f"{stem}.png", labels)
    return root


def run(*words):
    make_yolo.main([str(word) for word in words])


def read_lines(path):
    return [[float(word) for word in line.split()] for line in path.read_text().splitlines()]


def slow_boxes(pixels):
    """Class and box of each object, whose pixels are given, as shares."""
    rows = []
    for kind, inside in pixels:
        y, x = np.nonzero(inside)
        height, width = inside.shape
        box = [(x.min() + x.max() + 1) / 2 / width, (y.min() + y.max() + 1) / 2 / height]
        rows.append([kind, *box, (x.max() + 1 - x.min()) / width, (y.max() + 1 - y.min()) / height])
    return sorted(rows)


@given(st.integers(0, 2**32 - 1), st.integers(0, 30))
@settings(max_examples=30, deadline=None)
def test_boxes_of_label_maps(seed, min_area):
    labels = label_map(seed)
    found = [
        [float(word) for word in line.split()]
        for line in object_lines(labels, Rules("detect", True, (), ("object",), min_area))
    ]
    values = [value for value in np.unique(labels) if value and (labels == value).sum() >= min_area]
    np.testing.assert_allclose(
        np.reshape(sorted(found), (-1, 5)),
        np.reshape(slow_boxes([(0, labels == v) for v in values]), (-1, 5)),
        atol=1e-7,
    )


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_boxes_of_the_pieces_of_classes(seed):
    mask = (label_map(seed, dtype=np.uint8) % 4).astype(np.uint8)
    found = [
        [float(word) for word in line.split()]
        for line in object_lines(mask, Rules("detect", False, (3, 1), ("three", "one"), 0))
    ]
    pieces = []
    for kind, label in enumerate((3, 1)):
        count, components = cv2.connectedComponents((mask == label).view(np.uint8), connectivity=4)
        pieces += [(kind, components == number) for number in range(1, count)]
    np.testing.assert_allclose(np.reshape(sorted(found), (-1, 5)), np.reshape(slow_boxes(pieces), (-1, 5)), atol=1e-7)


@given(st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=30, deadline=None)
def test_outlines_hold_the_pixels_of_the_largest_piece(seed, instances):
    labels = label_map(seed)
    lines = object_lines(labels, Rules("segment", instances, (), ("object",), 0))
    kinds = [labels == value for value in np.unique(labels) if value] if instances else [labels > 0]
    expected = []
    for inside in kinds:
        count, components = cv2.connectedComponents(inside.view(np.uint8), connectivity=4)
        areas = [(components == number).sum() for number in range(1, count)]
        chosen = [int(np.argmax(areas)) + 1] if instances else range(1, count)
        expected += [components == number for number in chosen]
    found = []
    for line in lines:
        kind, *values = (float(word) for word in line.split())
        assert kind == 0
        outline = shapely.Polygon(np.reshape(values, (-1, 2)) * [labels.shape[1], labels.shape[0]])
        y, x = np.mgrid[: labels.shape[0], : labels.shape[1]] + 0.5
        found.append(shapely.contains_xy(outline, x, y))
    assert len(found) == len(expected)
    filled = [ndimage.binary_fill_holes(inside) for inside in expected]
    assert sorted(each.tobytes() for each in found) == sorted(each.tobytes() for each in filled)


def test_a_data_set_with_splits(tmp_path, capsys):
    source = make_set(tmp_path / "set", "abcdef")
    run("-d", source, "-o", tmp_path / "out")
    out = tmp_path / "out"
    assert sorted(path.name for path in (out / "images/train").iterdir()) == ["a.png", "b.png", "d.png", "e.png"]
    assert sorted(path.name for path in (out / "labels/val").iterdir()) == ["c.txt", "f.txt"]
    link = out / "images/train/a.png"
    assert link.is_symlink() and not link.readlink().is_absolute()
    assert np.array_equal(read_image(link), read_image(source / "train/images/a.png"))
    text = (out / "data.yaml").read_text()
    assert text == 'train: images/train\nval: images/val\nnames:\n  0: "object"\n'
    assert len(read_lines(out / "labels/train/a.txt")) == len(np.unique(label_map(0))) - 1
    said = capsys.readouterr().out
    assert "every value of a mask is one object" in said and "val: 2 pictures" in said
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    assert (moved / "images/train/a.png").is_file(), "links hold as long as both lie in one folder"


def test_a_flat_set_is_split_as_training_splits_it(tmp_path):
    stems = [f"p{number % 4}_{number}" for number in range(12)]
    source = make_set(tmp_path / "set", stems, split=False)
    run("-d", source, "-o", tmp_path / "out", "--val-share", "0.3", "--group-pattern", r"^(p\d)", "--copy")
    _, val = share_by_name([Pair(stem, Path(stem)) for stem in stems], 0.3, r"^(p\d)")
    found = {path.stem for path in (tmp_path / "out/images/val").iterdir()}
    assert found == {pair.name for pair in val} and len(found) == 3
    assert not any(path.is_symlink() for path in (tmp_path / "out/images/val").iterdir())


def test_label_maps_of_annotate_go_before_its_masks(tmp_path):
    source = make_set(tmp_path / "set", "abc", split=False, mask=lambda n: (label_map(n) > 0).astype(np.uint8) * 255)
    for number, stem in enumerate("abc"):
        write_mask(source / "labels" / f"{stem}.png", label_map(number, dtype=np.uint8))
    run("-d", source, "-o", tmp_path / "out")
    for number, stem in enumerate("abc"):
        (path,) = (tmp_path / "out/labels").glob(f"*/{stem}.txt")
        assert len(read_lines(path)) == len(np.unique(label_map(number))) - 1


def test_masks_of_classes(tmp_path):
    source = make_set(tmp_path / "set", "abc", mask=lambda n: (label_map(n) % 4).astype(np.uint8))
    with pytest.raises(SystemExit):
        run("-d", source, "-o", tmp_path / "out")
    run("-d", source, "-o", tmp_path / "out", "--class-list", "2 3", "--class-names", "two", "drei: 3")
    assert (tmp_path / "out/data.yaml").read_text().endswith('names:\n  0: "two"\n  1: "drei: 3"\n')
    assert {line[0] for line in read_lines(tmp_path / "out/labels/train/a.txt")} <= {0, 1}
    run("-d", source, "-o", tmp_path / "whole", "--objects", "labels")
    assert len(read_lines(tmp_path / "whole/labels/train/a.txt")) == len(set(np.unique(label_map(0) % 4)) - {0})


def test_binary_masks_are_taken_apart(tmp_path):
    source = make_set(tmp_path / "set", "abc", mask=lambda n: (label_map(n) > 0).astype(np.uint8) * 255)
    run("-d", source, "-o", tmp_path / "out")
    count = cv2.connectedComponents((label_map(0) > 0).view(np.uint8), connectivity=4)[0] - 1
    assert len(read_lines(tmp_path / "out/labels/train/a.txt")) == count


def test_the_same_command_goes_on(tmp_path, monkeypatch):
    source = make_set(tmp_path / "set", "abcdef")
    run("-d", source, "-o", tmp_path / "out")
    out = tmp_path / "out"
    edited = out / "labels/train/a.txt"
    edited.write_text("0 0.5 0.5 0.1 0.1\n")
    (out / "labels/train/b.txt").unlink()
    (out / "images/val/c.png").unlink()
    done = []
    original = make_yolo.object_lines
    monkeypatch.setattr(make_yolo, "object_lines", lambda mask, rules: done.append(1) or original(mask, rules))
    run("-d", source, "-o", out)
    assert len(done) == 2 and edited.read_text() == "0 0.5 0.5 0.1 0.1\n"
    assert (out / "labels/train/b.txt").is_file() and (out / "images/val/c.png").is_file()
    later = edited.stat().st_mtime + 5
    os.utime(source / "train/gt/d.png", (later, later))
    run("-d", source, "-o", out)
    assert len(done) == 3, "a mask that is newer than its labels"


def test_other_flags_and_other_files_are_refused(tmp_path, capsys):
    source = make_set(tmp_path / "set", "abc")
    out = tmp_path / "out"
    run("-d", source, "-o", out)
    with pytest.raises(SystemExit):
        run("-d", source, "-o", out, "--task", "segment")
    assert "was made with other flags; expected the same, another folder, or --overwrite" in capsys.readouterr().err
    run("-d", source, "-o", out, "--task", "segment", "--overwrite")
    assert len(read_lines(out / "labels/train/a.txt")[0]) > 5
    other = make_set(tmp_path / "other", "abx")
    with pytest.raises(SystemExit):
        run("-d", other, "-o", out, "--task", "segment")
    assert "holds 1 files of another set, first: c.png" in capsys.readouterr().err


def test_a_set_that_somebody_else_made_stays(tmp_path, capsys):
    root = make_set(tmp_path / "set", ["a", "b", "c"])
    theirs = tmp_path / "theirs"
    write_image(theirs / "images" / "train" / "a.png", np.zeros((4, 4, 3), np.uint8))
    (theirs / "labels" / "train").mkdir(parents=True)
    (theirs / "labels" / "train" / "a.txt").write_text("7 by hand")
    before = {path: path.read_bytes() for path in theirs.rglob("*") if path.is_file()}
    for words in ([], ["--overwrite"]):
        with pytest.raises(SystemExit):
            run("-d", root, "-o", theirs, *words)
        assert "did not make" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in theirs.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("kind", ["uint16", "float", "rgba", "grey", "five"])
def test_pictures_that_yolo_reads_otherwise_are_converted(tmp_path, kind):
    labels = label_map(0)
    rng = np.random.default_rng(0)
    shape = (*labels.shape, {"rgba": 4, "grey": 1, "five": 5}.get(kind, 3))
    dtype = {"uint16": np.uint16, "float": np.float32}.get(kind, np.uint8)
    image = rng.integers(0, 256, shape).astype(dtype)
    for split in ("train", "val"):
        write_image(tmp_path / f"set/{split}/images/a.tif", image)
        write_mask(tmp_path / f"set/{split}/gt/a.png", labels)
    write_image(
        tmp_path / "set/train/images/b.png", image[..., :1] if dtype == np.uint8 else image[..., :1].astype(np.uint16)
    )
    write_mask(tmp_path / "set/train/gt/b.png", labels)
    run("-d", tmp_path / "set", "-o", tmp_path / "out")
    seen = cv2.imread(str(tmp_path / "out/images/train/a.png"))
    assert seen.shape == (*labels.shape, 3) and seen.dtype == np.uint8
    if kind in ("rgba", "five"):
        assert np.array_equal(seen[..., ::-1], image[..., :3])
    assert (tmp_path / "out/images/train/b.png").is_symlink() == (dtype == np.uint8)


def test_a_turned_picture_is_written_upright(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    image = np.zeros((50, 40, 3), np.uint8)  # stored lying, 40 x 50 upright, as its mask is
    image[:10] = 255
    for split in ("train", "val"):
        (tmp_path / f"set/{split}/images").mkdir(parents=True)
        Image.fromarray(image).save(tmp_path / f"set/{split}/images/a.jpg", exif=exif)
        write_mask(tmp_path / f"set/{split}/gt/a.png", label_map(0))
    run("-d", tmp_path / "set", "-o", tmp_path / "out")
    written = tmp_path / "out/images/train/a.png"
    assert not written.is_symlink() and np.array_equal(
        read_image(written), read_image(tmp_path / "set/train/images/a.jpg")
    )
    assert read_image(written).shape == (40, 50, 3)


def test_one_bad_file_is_named_and_the_rest_is_done(tmp_path, capsys):
    source = make_set(tmp_path / "set", "abcdef")
    (source / "train/images/a.png").write_bytes(b"no picture")
    write_mask(source / "train/gt/b.png", label_map(1, height=7))
    with pytest.raises(SystemExit) as stop:
        run("-d", source, "-o", tmp_path / "out")
    text = capsys.readouterr().err
    assert stop.value.code == 1 and "a.png" in text and "2 findings" in text
    assert "b.png is 7x50, its image" in text and "sizes must agree" in text
    assert (tmp_path / "out/labels/train/d.txt").is_file() and (tmp_path / "out/data.yaml").is_file()
    assert not (tmp_path / "out/labels/train/a.txt").exists()


def test_empty_masks_are_pictures_without_objects(tmp_path):
    source = make_set(tmp_path / "set", "abc", mask=lambda n: np.zeros((1, 1), np.uint16))
    for task in ("detect", "segment"):
        run("-d", source, "-o", tmp_path / task, "--task", task)
        assert (tmp_path / task / "labels/train/a.txt").read_text() == ""


def test_flags_that_do_not_fit(tmp_path, capsys):
    source = make_set(tmp_path / "set", "abc")
    for words, message in (
        (["--objects", "labels", "--class-list", "3"], "--objects labels makes every value an object"),
        (["--class-list", "3", "x"], "--class-list 3 x: expected different labels above 0"),
        (["--class-list", "0"], "expected different labels above 0"),
        (["--class-list", "1", "2", "--class-names", "one"], "--class-names has 1 names for 2 classes"),
    ):
        with pytest.raises(SystemExit) as stop:
            run("-d", source, "-o", tmp_path / "out", *words)
        assert stop.value.code == 2 and message in capsys.readouterr().err
    (tmp_path / "bare/images").mkdir(parents=True)
    write_image(tmp_path / "bare/images/a.png", np.zeros((4, 4), np.uint8))
    write_image(tmp_path / "bare/images/b.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(SystemExit):
        run("-d", tmp_path / "bare", "-o", tmp_path / "out")
    assert "2 pictures have no mask" in capsys.readouterr().err


def test_what_lies_outside_the_region_is_no_object(tmp_path):
    mask = np.zeros((10, 20), np.uint16)
    mask[2:4, 2:4], mask[2:4, 12:18] = 1, 2
    source = make_set(tmp_path / "set", "abc", mask=lambda n: mask)
    for number, stem in enumerate("abc"):
        region = np.zeros((10, 20), np.uint8)
        region[:, 10:15] = 255
        write_mask(source / ("val" if number == 2 else "train") / "fov" / f"{stem}.png", region)
    run("-d", source, "-o", tmp_path / "out", "--roi-dir", "fov")
    assert read_lines(tmp_path / "out/labels/train/a.txt") == [[0, 13.5 / 20, 0.3, 3 / 20, 0.2]]
