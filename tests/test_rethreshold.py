"""Deciding again from saved probabilities gives what predict.py gives with the same threshold and filters."""

import json
import os

import numpy as np
import pytest
import tifffile
from discs import write_split
from tiny_runs import blobs, write_checkpoint, write_slide

import predict
import validate
from dataset_utils import rethreshold
from image_io import read_image, read_mask, write_image

FILTERS = ["--closing", "3", "--fill-holes", "20", "--min-area", "12", "--relative-area", "6"]
KINDS = "mask,labels,geojson,rle"
MAP = [(33550, "d", 3, (2.0, 3.0, 0.0), True), (33922, "d", 6, (0.0, 0.0, 0.0, 1000.0, 5000.0, 0.0), True)]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def predicted(run, images, out, *words):
    given = ["-cd", run, "-i", images, "-o", out, "--backend", "torch", "--cpu", "--thumbnails", 0, *words]
    predict.main([str(word) for word in given])
    return out


def again(results, out, *words):
    rethreshold.main([str(word) for word in ("-r", results, "-o", out, *words)])
    return out


def stopped(code, capsys, *words):
    with pytest.raises(SystemExit) as stop:
        rethreshold.main([str(word) for word in words])
    captured = capsys.readouterr()
    assert stop.value.code == code and "Traceback" not in captured.err, captured
    return captured.err


def content(folder, *without):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("predict.jsonl", "predict.json") and path.parent.name not in without
    }


@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize("form", ["png", "tiff", "ome"])
def test_it_is_what_predict_gives_with_the_same_flags(tmp_path, classes, form):
    """Thresholds lie between two of the 65,536 stored values, so that rounding moves no pixel across."""
    write_checkpoint(tmp_path / "run" / "best.pth", classes=classes)
    for name in "ab":
        write_slide(
            tmp_path / "in" / f"{name}.tif",
            blobs(401, 330, seed=ord(name)),
            resolution=(20000, 20000),
            resolutionunit="CENTIMETER",
        )
    how = ["--save", KINDS, "--format", form, *FILTERS, *(["-t", repr((26000.5) / 65535)] if classes == 1 else [])]
    first = predicted(
        tmp_path / "run", tmp_path / "in", tmp_path / "first", "--reduce", 2, "--save", "prob", "--format", form
    )
    expected = predicted(tmp_path / "run", tmp_path / "in", tmp_path / "expected", "--reduce", 2, *how)
    found = again(first, tmp_path / "found", *how)
    assert content(found) == content(expected)
    assert len(content(found)) == 2 * 5 + 1


def test_eight_bit_probabilities_are_good_to_their_step(tmp_path):
    write_checkpoint(tmp_path / "run" / "best.pth")
    image = write_slide(tmp_path / "a.tif", blobs(300, 200))
    first = predicted(tmp_path / "run", image, tmp_path / "first", "--save", "prob", "--format", "flat")
    t = repr(100.5 / 255)
    expected = predicted(tmp_path / "run", image, tmp_path / "expected", "-t", t, "--format", "flat")
    found = again(first, tmp_path / "found", "-t", t, "--format", "flat")
    assert content(found) == content(expected)


def test_places_on_the_map_are_scaled_once(tmp_path):
    write_checkpoint(tmp_path / "run" / "best.pth")
    image = write_slide(tmp_path / "a.tif", blobs(401, 330), extratags=MAP)
    how = ["--save", "mask,geojson", "--geo", "--format", "ome"]
    first = predicted(tmp_path / "run", image, tmp_path / "first", "--reduce", 2, "--save", "prob")
    expected = predicted(tmp_path / "run", image, tmp_path / "expected", "--reduce", 2, *how)
    found = again(first, tmp_path / "found", *how)
    assert content(found) == content(expected)
    with tifffile.TiffFile(found / "masks" / "a.ome.tif") as tif:
        assert tif.pages[0].tags[33550].value == (4.0, 6.0, 0.0)
    corner = json.loads((found / "geojson" / "a.geojson").read_text())["features"][0]["geometry"]["coordinates"][0][0]
    assert corner[0] >= 1000 and corner[1] <= 5000


def test_the_scale_is_known_when_other_results_were_replaced(tmp_path):
    write_checkpoint(tmp_path / "run" / "best.pth")
    image = write_slide(tmp_path / "a.tif", blobs(401, 330))
    first = predicted(tmp_path / "run", image, tmp_path / "first", "--reduce", 2, "--save", "mask,prob")
    expected = content(again(first, tmp_path / "before", "--save", "geojson"))
    predicted(tmp_path / "run", image, first, "--reduce", 2, "--save", "mask", "-t", 0.4, "--overwrite")
    assert content(again(first, tmp_path / "after", "--save", "geojson")) == expected


def test_probabilities_of_validate(tmp_path, capsys):
    data = write_split(tmp_path / "data", ["a", "b"], sizes=((100, 90),))
    write_checkpoint(tmp_path / "run" / "best.pth", labels=())
    words = [
        "-cd",
        tmp_path / "run",
        "-d",
        data,
        "--cpu",
        "--backend",
        "torch",
        "-w",
        0,
        "--raw",
        "-o",
        tmp_path / "first",
    ]
    validate.main([str(word) for word in words])
    found = again(tmp_path / "first", tmp_path / "found", "--save", "mask")
    for name in "ab":
        np.testing.assert_array_equal(
            read_mask(found / "masks" / f"{name}.png"), read_mask(tmp_path / "first" / "masks" / f"{name}.png")
        )
    write_image(tmp_path / "other" / "raw" / "a.tif", np.zeros((9, 9, 3), np.uint16))
    error = stopped(1, capsys, "-r", tmp_path / "other", "-o", tmp_path / "x")
    assert "has 3 bands and" in error and "predict.py --save prob" in error


def test_the_best_threshold_of_the_checkpoint(tmp_path, capsys):
    write_checkpoint(tmp_path / "run" / "best.pth", thresholds={"default": 0.5, "best": 0.25})
    image = write_slide(tmp_path / "a.tif", blobs(90, 80))
    first = predicted(tmp_path / "run", image, tmp_path / "first", "--save", "prob")
    again(first, tmp_path / "found", "-t", "best")
    assert "threshold 0.25, 1 pictures" in capsys.readouterr().out


def test_what_cannot_be_is_said(tmp_path, capsys):
    write_checkpoint(tmp_path / "run" / "best.pth", classes=4)
    image = write_slide(tmp_path / "a.tif", blobs(90, 80))
    first = predicted(tmp_path / "run", image, tmp_path / "first", "--save", "mask")
    assert "has no raw/ with probabilities" in stopped(1, capsys, "-r", first, "-o", tmp_path / "x")
    predicted(tmp_path / "run", image, first, "--save", "prob")
    assert "give another one" in stopped(2, capsys, "-r", first, "-o", first)
    assert "-t 0.4 is for one class" in stopped(2, capsys, "-r", first, "-o", tmp_path / "x", "-t", "0.4")
    assert "--closing is 4" in stopped(2, capsys, "-r", first, "-o", tmp_path / "x", "--closing", "4")
    assert "a has no map coordinates" in stopped(
        1, capsys, "-r", first, "-o", tmp_path / "x", "--save", "geojson", "--geo"
    )
    write_image(first / "raw" / "b.png", np.zeros((9, 9), np.uint16))
    error = stopped(1, capsys, "-r", first, "-o", tmp_path / "y")
    assert "b.png has 1 bands, the description names 4 classes" in error and "1 finding, the rest is done" in error
    assert (tmp_path / "y" / "masks" / "a.png").exists()


def test_it_goes_on_and_replaces_nothing_of_others(tmp_path, capsys, monkeypatch):
    import results

    write_checkpoint(tmp_path / "run" / "best.pth")
    for name in "ab":
        write_slide(tmp_path / "in" / f"{name}.tif", blobs(1300, 80, seed=ord(name)))
    first = predicted(tmp_path / "run", tmp_path / "in", tmp_path / "first", "--save", "prob", "--format", "ome")
    how = ["--save", KINDS, "--format", "ome", "--min-area", "9"]
    words = ["-r", first, "-o", tmp_path / "found", *how]
    finish, calls = results.Results.finish, []

    def interrupted(self):
        calls.append(self.frame.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return finish(self)

    monkeypatch.setattr(results.Results, "finish", interrupted)
    assert "goes on with the first picture that is not done" in stopped(130, capsys, *words)
    monkeypatch.undo()
    os.chdir(tmp_path)
    rethreshold.main([str(word) for word in words])
    assert "a: already done" in capsys.readouterr().out
    assert content(tmp_path / "found") == content(again(first, tmp_path / "whole", *how))
    assert "in the way" in stopped(1, capsys, *words, "-t", "0.4")
    again(first, tmp_path / "found", *how, "-t", "0.4", "--overwrite")
    (tmp_path / "mine" / "objects").mkdir(parents=True)
    (tmp_path / "mine" / "objects" / "a.csv").write_text("mine")
    assert "objects/a.csv" in stopped(1, capsys, "-r", first, "-o", tmp_path / "mine", *how)


def test_damaged_probabilities_are_named(tmp_path, capsys):
    write_checkpoint(tmp_path / "run" / "best.pth")
    image = write_slide(tmp_path / "a.tif", blobs(1100, 600))
    first = predicted(tmp_path / "run", image, tmp_path / "first", "--save", "prob", "--format", "ome")
    path = first / "raw" / "a.ome.tif"
    with tifffile.TiffFile(path) as tif:
        offset, count = tif.pages[0].dataoffsets[1], tif.pages[0].databytecounts[1]
    data = bytearray(path.read_bytes())
    data[offset : offset + count] = b"\xff" * count
    path.write_bytes(data)
    error = stopped(1, capsys, "-r", first, "-o", tmp_path / "found", "-t", "0.1")
    assert "a.ome.tif" in error and "row 0, column 1" in error
    mask = read_image(tmp_path / "found" / "masks" / "a.png")[..., 0]
    assert (mask[:512, 512:] == 0).all() and mask[:, :512].any()
