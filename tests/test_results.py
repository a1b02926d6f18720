"""Files of one picture agree with each other: masks, label maps, tables, polygons, run lengths, in every format."""

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
import shapely
import tifffile
from tiny_runs import CLASSES, blobs

from checkpoint import Geometry, ModelConfig
from image_io import ImageError, read_image
from postprocess import Filters, filter_mask
from results import Frame, ResultOptions, Results, choose_form, disk_needed
from rle import decode_rle
from slide_io import Georeference, open_slide

ALL = ("mask", "prob", "overlay", "labels", "geojson", "rle")
FORMS = ("png", "tiff", "ome", "flat")
SIZE = (700, 333)


def config_of(classes, **changes):
    labels = (1,) if classes == 1 else (10, 20, 30)
    channels = ("red", "green", "blue")
    values = ("", "", labels, CLASSES[classes], channels, (0.0,) * 3, (1.0,) * 3, Geometry("crops", (0, 0)))
    return ModelConfig(*values, **changes)


def probabilities(classes, size=SIZE, seed=0):
    values = blobs(*size, seed=seed, channels=classes).astype(np.float32).transpose(2, 0, 1) / 255
    return values if classes == 1 else values / np.maximum(values.sum(axis=0), 1e-6)


def write(folder, probs, *, kinds=ALL, form="auto", frame=None, heights=(97, 200, 403), picture=None, **more):
    """Write the results of probabilities that come in bands."""
    frame = frame or Frame("a", *probs.shape[1:])
    config = more.pop("config", None) or config_of(len(probs) if len(probs) > 1 else 1)
    options = ResultOptions(folder, kinds, form, **more)
    image = np.zeros((*probs.shape[1:], 3), np.uint8) if picture is None else picture
    with Results(frame, config, options, "digest") as results:
        top = 0
        for height in (*heights, probs.shape[1]):
            if top < probs.shape[1]:
                results.add(probs[:, top : top + height])
            top += height
        summary = results.finish(lambda step: image[::step, ::step])
        results.remove()
    assert {path.relative_to(folder).as_posix() for path in summary.files} == files_of(folder)
    return summary


def files_of(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def read(folder, kind):
    """A raster in whatever format it was written."""
    (path,) = (folder / kind).iterdir()
    if path.suffix == ".png":
        return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    with tifffile.TiffFile(path) as tif:
        return tif.series[0].levels[0].asarray()


def rasterise(feature, scale=1):
    """A polygon of whole level-0 pixels drawn on the grid by the centres of its pixels."""
    shape = shapely.geometry.shape(feature["geometry"])
    left, top, right, bottom = (round(value / scale) for value in shape.bounds)
    ys, xs = np.mgrid[top:bottom, left:right]
    inside = shapely.contains_xy(shape, (xs + 0.5) * scale, (ys + 0.5) * scale)
    return np.s_[top:bottom, left:right], inside, shape


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter=";"))


@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize("form", FORMS)
def test_all_kinds_agree(tmp_path, classes, form):
    probs, config = probabilities(classes), config_of(classes)
    filters = Filters(closing=3, fill_holes=40, min_area=15)
    write(tmp_path, probs, form=form, filters=filters, decimal="dot")
    decided = (probs[0] >= 0.5).astype(np.uint8) if classes == 1 else probs.argmax(axis=0).astype(np.uint8)
    expected = filter_mask(decided, filters)
    values = np.array([0, *config.labels], np.uint8)
    mask, labels = read(tmp_path, "masks"), read(tmp_path, "labels").astype(np.int64)
    np.testing.assert_array_equal(mask, values[expected])
    np.testing.assert_array_equal(labels > 0, mask > 0)

    features = json.loads((tmp_path / "geojson" / "a.geojson").read_text())["features"]
    table = rows_of(tmp_path / "objects" / "a.csv")
    assert len(features) == len(table) == labels.max() == len(np.unique(labels)) - 1 > 5
    drawn = np.zeros_like(mask)
    for feature in features:
        where, inside, shape = rasterise(feature)
        assert shape.is_valid and shape.area == inside.sum()
        name = feature["properties"]["classification"]["name"]
        drawn[where][inside] = values[config.class_names.index(name)]
        number = int(feature["properties"]["name"].split()[-1])
        assert (labels[where][inside] == number).all() and (labels == number).sum() == shape.area
        row = table[number - 1]
        assert float(row["area"]) == shape.area and row["class"] == name
    np.testing.assert_array_equal(drawn, mask)

    lines = (tmp_path / "rle" / "a.csv").read_text().splitlines()
    assert lines[0] == "id,predicted" and len(lines) == (2 if classes == 1 else 4)
    for line in lines[1:]:
        key, text = line.split(",")
        index = 1 if classes == 1 else config.class_names.index(key.removeprefix("a_"))
        np.testing.assert_array_equal(decode_rle(text, *SIZE), expected == index)

    written = read(tmp_path, "raw").astype(np.float64)
    top = 255 if form == "flat" and classes == 1 else 65535
    stored = written if classes == 1 else (written if written.shape[0] == classes else written.transpose(2, 0, 1))
    np.testing.assert_allclose(stored.reshape(probs.shape), np.rint(probs * top), atol=1)
    assert read_image(tmp_path / "overlays" / "a.png").shape == (*SIZE, 3)


@pytest.mark.parametrize(
    "kinds", [("mask",), ("labels",), ("rle",), ("geojson",), ("overlay",), ("prob",), ("mask", "rle")]
)
@pytest.mark.parametrize("form", ["png", "ome"])
def test_every_kind_alone(tmp_path, kinds, form):
    write(tmp_path / "alone", probabilities(1), kinds=kinds, form=form)
    write(tmp_path / "all", probabilities(1), form=form)
    for name in files_of(tmp_path / "alone"):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "all" / name).read_bytes(), name


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 2)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_small_empty_and_full_pictures(tmp_path, size, form, value):
    probs = np.full((1, *size), value, np.float32)
    summary = write(tmp_path, probs, form=form, heights=(), filters=Filters(min_area=1))
    assert (read(tmp_path, "masks") == value).all() and read(tmp_path, "labels").max() == value
    assert summary.objects == {"object": int(value)} and summary.shares == {"object": value}
    features = json.loads((tmp_path / "geojson" / "a.geojson").read_text())["features"]
    assert len(features) == value
    line = (tmp_path / "rle" / "a.csv").read_text().splitlines()[1]
    np.testing.assert_array_equal(decode_rle(line.split(",")[1], *size), np.full(size, value, bool))


def test_ome_and_flat_are_read_by_others(tmp_path):
    probs = probabilities(4, (1500, 1200))
    frame = Frame("a", 1500, 1200, mpp=(0.5, 0.25))
    for form in ("ome", "flat"):
        write(tmp_path / form, probs, form=form, frame=frame, kinds=("mask", "prob", "labels"))
    mask = read(tmp_path / "ome", "masks")
    with tifffile.TiffFile(tmp_path / "ome" / "masks" / "a.ome.tif") as tif:
        levels = [level.asarray() for level in tif.series[0].levels]
        assert tif.is_ome and 'PhysicalSizeX="0.5"' in tif.ome_metadata
    assert len(levels) >= 2
    np.testing.assert_array_equal(levels[0], mask)
    np.testing.assert_array_equal(levels[1], mask[1::2, 1::2])
    with tifffile.TiffFile(tmp_path / "flat" / "masks" / "a.tif") as tif:
        pages = [page.asarray() for page in tif.pages]
    with openslide.OpenSlide(str(tmp_path / "flat" / "masks" / "a.tif")) as slide:
        assert slide.level_count == len(pages) == len(levels)
        for level, page in enumerate(pages):
            region = np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level]))
            np.testing.assert_array_equal(region[..., 0], page)
    with open_slide(tmp_path / "ome" / "raw" / "a.ome.tif") as slide:
        assert slide.mpp_xy == pytest.approx((0.5, 0.25)) and slide.channels == 4
        np.testing.assert_array_equal(
            slide.grid().read(0, 0, 1500, 1200).argmax(axis=2), np.searchsorted([0, 10, 20, 30], mask)
        )


MAP = ((33550, 12, 3, (2.0, 3.0, 0.0), True), (33922, 12, 6, (0.0, 0.0, 0.0, 1000.0, 5000.0, 0.0), True))


def test_polygons_and_tags_of_a_reduced_slide(tmp_path):
    frame = Frame("a", *SIZE, scale=4.0, mpp=(2.0, 2.0), geo=Georeference(MAP))
    write(tmp_path / "pixels", probabilities(1), frame=frame, decimal="dot")
    write(tmp_path / "map", probabilities(1), frame=frame, geo=True, decimal="dot")
    mask = read(tmp_path / "pixels", "masks")
    drawn = np.zeros_like(mask)
    pixels = json.loads((tmp_path / "pixels" / "geojson" / "a.geojson").read_text())["features"]
    for feature in pixels:
        where, inside, shape = rasterise(feature, 4)
        assert shape.area == 16 * inside.sum()
        drawn[where][inside] = 1
    np.testing.assert_array_equal(drawn, mask)
    on_map = json.loads((tmp_path / "map" / "geojson" / "a.geojson").read_text())["features"]
    for one, other in zip(pixels, on_map, strict=True):
        moved = shapely.affinity.affine_transform(shapely.geometry.shape(one["geometry"]), (2, 0, 0, -3, 1000, 5000))
        assert moved.normalize().equals_exact(shapely.geometry.shape(other["geometry"]).normalize(), 1e-6)
    with tifffile.TiffFile(tmp_path / "pixels" / "masks" / "a.ome.tif") as tif:
        page = tif.pages[0]
        assert page.tags[33550].value[:2] == (8.0, 12.0) and page.tags[33922].value[3:5] == (1000.0, 5000.0)
        assert page.tags[282].value[0] / page.tags[282].value[1] == pytest.approx(1e4 / 2)


def test_a_map_that_is_missing_is_said_before_anything_is_written(tmp_path):
    points = Georeference(((33922, 12, 12, tuple(range(12)), True),))
    for frame, words in ((Frame("a", 9, 9), "no map coordinates"), (Frame("a", 9, 9, geo=points), "control points")):
        with pytest.raises(ImageError, match=f"a has {words}|{words}.*leave --geo out"):
            write(tmp_path / "out", np.ones((1, 9, 9), np.float32), frame=frame, geo=True)
    assert not (tmp_path / "out").exists()


def test_more_objects_than_sixteen_bits_hold(tmp_path):
    probs = np.zeros((1, 540, 520), np.float32)
    probs[0, ::2, ::2] = 1
    summary = write(tmp_path, probs, kinds=("labels",), form="png")
    assert summary.objects == {"object": 70200}
    labels = read(tmp_path, "labels")
    assert labels.dtype == np.uint32 and labels.max() == 70200 and (tmp_path / "labels" / "a.tif").exists()


def test_formats_are_chosen_by_size_and_map():
    options = ResultOptions(Path())
    assert choose_form(Frame("a", 5000, 5000), options) == "png"
    assert choose_form(Frame("a", 50000, 5000), options) == "ome"
    assert choose_form(Frame("a", 50, 50, geo=Georeference(MAP)), options) == "ome"
    with pytest.raises(ValueError, match="50000 x 5000 pixels is held in memory.*--format ome"):
        choose_form(Frame("a", 50000, 5000), ResultOptions(Path(), form="png"))


@pytest.mark.parametrize("form", FORMS)
def test_the_disk_that_is_needed_is_enough(tmp_path, form):
    probs = np.random.default_rng(0).random((4, 1100, 1300), np.float32)
    frame = Frame("a", 1100, 1300)
    write(tmp_path, probs, form=form, kinds=("mask", "prob"), filters=Filters(min_area=2))
    used = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    options = ResultOptions(tmp_path, ("mask", "prob"), form, filters=Filters(min_area=2))
    _, most = disk_needed(frame, config_of(4), options)
    assert used <= most


def test_damage_is_kept_for_a_run_that_goes_on(tmp_path):
    frame, options = Frame("a", 1100, 50), ResultOptions(tmp_path, ("mask",), "ome")
    probs = np.zeros((1, 600, 50), np.float32)
    with Results(frame, config_of(1), options, "digest") as results:
        results.note_damage(["tile 3 is damaged"])
        results.add(probs)
    with Results(frame, config_of(1), options, "digest") as results:
        assert results.first_row == 512 and results.damage == ["tile 3 is damaged"]
    with Results(frame, config_of(1), options, "another digest") as results:
        assert results.first_row == 0 and results.damage == []


def test_masks_of_nothing_but_a_background_class(tmp_path):
    """Class 0 may be a real class: it is in the table of shares and in the run lengths, but has no objects."""
    config = config_of(
        1,
    )
    config = ModelConfig("", "", (0, 5), ("water", "land"), ("red",), (0.0,), (1.0,), Geometry("crops", (0, 0)))
    probs = probabilities(1, (60, 70))
    both = np.concatenate([1 - probs, probs])
    summary = write(tmp_path, both, config=config, heights=(20,))
    assert set(np.unique(read(tmp_path, "masks"))) == {0, 5} and set(summary.shares) == {"water", "land"}
    assert [line.split(",")[0] for line in (tmp_path / "rle" / "a.csv").read_text().splitlines()] == [
        "id",
        "a_water",
        "a_land",
    ]


def test_a_name_with_commas_and_quotes_stays_one_cell(tmp_path):
    write(tmp_path, probabilities(1, (40, 30)), frame=Frame('x, "y"', 40, 30), heights=())
    with (tmp_path / "rle" / 'x, "y".csv').open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["id"] == 'x, "y"'
