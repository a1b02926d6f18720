"""Training and scoring straight from slides: windows, masks in every form, places, scans, commands, what goes wrong."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from discs import write_dataset
from slides import (
    draw_slide,
    write_geojson,
    write_mask_tiff,
    write_runs,
    write_slide,
    write_slides,
)

import evaluation
import predict
import results
import scan
import slide_index
import slide_windows
import train
import validate
from augmentations import Augmentation
from backends import load_forward
from checkpoint import Geometry, ModelConfig
from classes import ClassMap, ClassOptions
from crops import cut_window
from dataset import EpochSampler, EvaluationSet, Slot, TrainingBatches, TrainingSet
from dataset_utils import check as check_command
from geojson import GeoJsonWriter
from image_io import IGNORE_INDEX, read_mask, write_image, write_mask
from losses import build_loss
from metrics import Scorer
from mixing import KINDS, Mixing
from pairing import DatasetError, FileOptions, Pair, find_splits, list_pairs, read_runs
from polygons import trace_labels
from scan import check_dataset, scan_pairs
from slide_index import SlidePlaces, close_places, draw_corner, draw_tissue
from slide_io import open_slide
from slide_masks import Raster, open_mask
from slide_scoring import predict_slide
from slide_windows import SlideOptions, SlidePair, is_slide
from tissue import Tissue

BINARY = ClassMap((1,), ("background", "object"))
FORMS = ("geojson", "rle", "tiff")


@pytest.fixture(autouse=True)
def closed():
    """No test sees the open slides of another."""
    yield
    close_places()


def write_pair(folder: Path, form: str, image, mask, name="s", suffix=".svs", **how) -> Pair:
    """A slide with its mask in one of FORMS."""
    path = write_slide(folder / "images" / f"{name}{suffix}", image, **how)
    if form == "geojson":
        gt = write_geojson(folder / "gt" / f"{name}.geojson", mask)
    elif form == "rle":
        gt = write_runs(folder / "gt" / "runs.csv", {name: mask})
    else:
        gt = write_mask_tiff(folder / "gt" / f"{name}.tif", mask)
    return Pair(name, path, gt)


def make_config(size=64, tissue="none", reduction=1.0, mpp=0.0, tile=96, names=("background", "object"), labels=(1,)):
    geometry = Geometry("crops", (size, size), tile, tile // 4, tile // 16, reduction, mpp)
    return ModelConfig(
        "plain-unet",
        "plain-8",
        labels,
        names,
        ("red", "green", "blue"),
        (190.0, 150.0, 170.0),
        (50.0, 60.0, 55.0),
        geometry,
        stride=16,
        min_side=16,
        batch=3,
        tissue=tissue,
    )


def augment(preset="light"):
    return Augmentation(preset, rgb=True, value_range=((0.0,) * 3, (255.0,) * 3))


# ----------------------------------------------------------------------------------------------------------------------
# Pairs


def test_slides_pair_with_every_form_of_mask(tmp_path):
    for name in ("a.svs", "b.tif", "c.ome.tif", "d.png", "e.ndpi"):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / name).touch()
    (tmp_path / "gt").mkdir()
    for name in ("a.geojson", "b.json", "c.tif", "other.json", "notes.csv"):
        (tmp_path / "gt" / name).write_text("x;y\n", encoding="utf-8")
    (tmp_path / "gt" / "runs.csv").write_text("id,Encoding\nd.png,1 2\ne,3 4\nfar,5 6\n", encoding="utf-8")
    found = list_pairs(tmp_path)
    assert found.errors == []
    masks = {pair.name: pair.mask.name for pair in found.pairs}
    assert masks == {"a": "a.geojson", "b": "b.json", "c": "c.tif", "d": "runs.csv", "e": "runs.csv"}
    assert all(is_slide(pair, slide_windows.AS_STORED) for pair in found.pairs if pair.name != "c")


def test_json_beside_the_masks_of_images_is_left_alone(tmp_path):
    write_image(tmp_path / "images" / "a.png", np.zeros((8, 8, 3), np.uint8))
    write_mask(tmp_path / "gt" / "a.png", np.zeros((8, 8), np.uint8))
    (tmp_path / "gt" / "a.json").write_text("{}", encoding="utf-8")
    (pair,) = list_pairs(tmp_path).pairs
    assert pair.mask.suffix == ".png" and not is_slide(pair, slide_windows.AS_STORED)


def test_the_region_of_interest_may_be_drawn(tmp_path):
    image, mask = draw_slide(0, (64, 64))
    write_pair(tmp_path, "tiff", image, mask)
    write_geojson(tmp_path / "roi" / "s.geojson", mask)
    (pair,) = list_pairs(tmp_path, roi_dir="roi").pairs
    assert pair.roi.name == "s.geojson" and is_slide(pair, slide_windows.AS_STORED)


def test_two_tables_are_refused(tmp_path):
    write_image(tmp_path / "images" / "a.png", np.zeros((8, 8, 3), np.uint8))
    for name in ("one", "two"):
        write_runs(tmp_path / "gt" / f"{name}.csv", {"a": np.eye(8, dtype=bool)})
    with pytest.raises(DatasetError, match=r"2 tables of run lengths, one\.csv and two\.csv"):
        list_pairs(tmp_path)


def test_a_missing_annotation_is_named(tmp_path):
    write_slides(tmp_path, "rle")
    (tmp_path / "train" / "gt" / "runs.csv").write_text("id;rle\ntrain0;\n", encoding="utf-8")
    (message,) = list_pairs(tmp_path / "train").errors
    assert "1 of 2 files in" in message and "'train1'" in message


def test_tables_with_classes_and_semicolons(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text("\ufeffid;class;predicted\na.svs;vein;1 2\na.svs;artery;\n", encoding="utf-8")
    assert list(read_runs(path)) == [("a", "vein", "1 2"), ("a", "artery", "")]


def test_slides_are_split_by_slide(tmp_path):
    for i in range(6):
        image, mask = draw_slide(i, (64, 64))
        write_pair(tmp_path, "geojson", image, mask, name=f"patient{i // 2}_{i}")
    train_part, val_part, _ = find_splits(tmp_path, FileOptions(val_share=0.3, group_pattern=r"(patient\d)"))
    sides = [{pair.name.split("_")[0] for pair in part.pairs} for part in (train_part, val_part)]
    assert sides[0].isdisjoint(sides[1]) and len(train_part.pairs) + len(val_part.pairs) == 6


def test_what_a_slide_is(tmp_path, monkeypatch):
    image, mask = draw_slide(0, (64, 64))
    pair = write_pair(tmp_path, "tiff", image, mask, suffix=".tif")
    assert not is_slide(pair, slide_windows.AS_STORED)
    drawn = write_pair(tmp_path, "geojson", image, mask, suffix=".tif")
    rule = SlideOptions(tissue="saturation")
    with SlidePair(drawn, rule) as small, SlidePair(write_pair(tmp_path, "rle", image, mask), rule) as slide:
        assert is_slide(drawn, rule) and small.options.tissue == "none", "predict.py would not take it for a slide"
        assert slide.options.tissue == "saturation"
    assert is_slide(pair, SlideOptions(reduction=2)) and is_slide(pair, SlideOptions(mpp=1))
    monkeypatch.setattr(slide_windows, "SLIDE_PIXELS", 64 * 64 - 1)
    assert is_slide(pair, slide_windows.AS_STORED)


# ----------------------------------------------------------------------------------------------------------------------
# Windows


def at_centres(mask, scale, size):
    """What lies under the centre of each pixel of a reduced grid, one by one."""
    places = [
        [min(int((i + 0.5) * scale), full - 1) for i in range(n)] for n, full in zip(size, mask.shape, strict=True)
    ]
    return np.array([[mask[row, column] for column in places[1]] for row in places[0]])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", [1, 2, 3, 4])
def test_masks_are_level_0_under_the_centres(tmp_path, form, reduction):
    image, mask = draw_slide(3, (203, 310), radius=(5, 30))
    with SlidePair(write_pair(tmp_path, form, image, mask), SlideOptions(reduction=reduction)) as slide:
        found = slide.labels(BINARY, 0, 0, slide.height, slide.width)
        assert np.array_equal(found, at_centres(mask, slide.scale, found.shape)) and found.any()
        top, left = slide.height // 3, slide.width // 4
        assert np.array_equal(slide.labels(BINARY, top, left, 20, 30), found[top : top + 20, left : left + 30])


def test_polygons_of_a_reduced_prediction_are_annotations_without_a_finding(tmp_path):
    path = write_slide(tmp_path / "s.svs", draw_slide(0, (300, 407))[0])
    with open_slide(path) as slide:
        grid = slide.grid(reduce=16)  # 19 x 25, so 304 x 400 pixels of level 0
        raster = Raster(grid.height, grid.width, grid.scale)
        with GeoJsonWriter(tmp_path / "s.geojson", scale=grid.scale) as writer:
            writer.write(trace_labels(np.ones((grid.height, grid.width), np.uint8))[0], "a")
        mask = open_mask(tmp_path / "s.geojson", "s", slide, raster)
        assert not mask.findings and mask.read(0, 0, grid.height, grid.width).all()


def test_masks_of_the_size_of_a_level(tmp_path):
    image, mask = draw_slide(3, (256, 384))
    pair = write_pair(tmp_path, "tiff", image, mask[::2, ::2], levels=2)
    with SlidePair(pair, SlideOptions()) as slide:
        assert np.array_equal(slide.labels(BINARY, 0, 0, 256, 384), mask[::2, ::2].repeat(2, 0).repeat(2, 1))
    with SlidePair(pair, SlideOptions(reduction=2)) as slide:
        assert np.array_equal(slide.labels(BINARY, 0, 0, 128, 192), mask[::2, ::2])


@pytest.mark.parametrize("kind", ["bits", "palette", "png", "uint32"])
def test_mask_files_hold_the_values_that_images_of_masks_do(tmp_path, kind):
    image, mask = draw_slide(3, (256, 384))
    pair = write_pair(tmp_path, "geojson", image, mask)
    path = tmp_path / "gt" / ("m.png" if kind == "png" else "m.tif")
    if kind == "bits":
        tifffile.imwrite(path, mask.astype(bool), photometric="minisblack")
    elif kind == "palette":
        tifffile.imwrite(path, mask, photometric="palette", colormap=np.full((3, 256), 700, np.uint16))
    elif kind == "uint32":
        tifffile.imwrite(path, mask.astype(np.uint32) * 70_000, tile=(64, 64))
    else:
        write_mask(path, mask)
    with SlidePair(Pair("s", pair.image, path), SlideOptions()) as slide:
        assert np.array_equal(slide.mask.read(40, 50, 100, 120), read_mask(path)[40:140, 50:170])


@pytest.mark.parametrize("form", FORMS)
def test_windows_are_those_of_the_whole_image(tmp_path, form):
    image, mask = draw_slide(5, (200, 260))
    rng = np.random.default_rng(0)
    with SlidePair(write_pair(tmp_path, form, image, mask), SlideOptions()) as slide:
        for _ in range(40):
            corner, size = tuple(rng.integers(-150, 250, 2).tolist()), tuple(rng.integers(1, 300, 2).tolist())
            expected = cut_window(image, mask, corner, size)
            found = slide.window(BINARY, corner, size)
            assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True)), (corner, size)


def test_what_does_not_count_is_255(tmp_path):
    """Outside a region of interest, where there is no data, and in damaged tiles."""
    image, mask = draw_slide(5, (256, 256))
    image[:30, :40] = 0
    path = tmp_path / "images" / "s.tif"
    path.parent.mkdir()
    nodata = [(42113, "s", 0, "0", True)]
    tifffile.imwrite(path, image, tile=(64, 64), photometric="rgb", compression="deflate", extratags=nodata)
    with tifffile.TiffFile(path) as tif:
        start, count = tif.pages[0].dataoffsets[-1], tif.pages[0].databytecounts[-1]
    content = bytearray(path.read_bytes())
    content[start : start + count] = bytes(count)
    path.write_bytes(content)
    inside = np.zeros_like(mask)
    inside[:, :200] = 1
    pair = Pair(
        "s",
        path,
        write_geojson(tmp_path / "gt" / "s.geojson", mask),
        roi=write_geojson(tmp_path / "roi" / "s.geojson", inside),
    )
    expected = np.where(inside == 1, mask, IGNORE_INDEX)
    expected[:30, :40] = IGNORE_INDEX
    expected[192:, 192:] = IGNORE_INDEX
    with SlidePair(pair, SlideOptions()) as slide:
        assert np.array_equal(slide.window(BINARY, (0, 0), (256, 256))[1], expected)
        kept = SlidePlaces(slide, BINARY).cells[1].pixels
        assert kept == (expected == 1).sum() > 0
        assert len(slide.damage) == 1 and "row 3, column 3" in slide.damage[0]
    (facts,) = scan_pairs([pair])
    assert facts.mask.findings == slide.damage and facts.layers[0].error is None


def test_extra_channels_come_from_their_slides(tmp_path):
    image, mask = draw_slide(5, (200, 260))
    pair = write_pair(tmp_path, "geojson", image, mask)
    near = write_slide(tmp_path / "nir" / "s.tif", 255 - image[:, :, 1])
    with SlidePair(Pair("s", pair.image, pair.mask, (near,)), SlideOptions()) as slide:
        pixels, _ = slide.window(BINARY, (20, 30), (50, 60))
    assert np.array_equal(pixels, np.dstack([image, 255 - image[:, :, 1]])[20:70, 30:90])


def test_classes_by_name(tmp_path):
    image, mask = draw_slide(5, (200, 260), classes=2)
    pair = Pair(
        "s", write_slide(tmp_path / "s.tif", image), write_geojson(tmp_path / "s.json", mask, ("vein", "artery"))
    )
    three = ClassMap((7, 9), ("background", "artery", "vein"))
    with SlidePair(pair, SlideOptions()) as slide:
        assert np.array_equal(slide.labels(three, 0, 0, 200, 260), np.array([0, 2, 1], np.uint8)[mask])
        assert np.array_equal(slide.labels(BINARY, 0, 0, 200, 260), mask > 0), "one class without a name takes all"
        with pytest.raises(DatasetError, match=r"s\.json name 'vein'; expected 'artery'"):
            slide.labels(ClassMap((1,), ("background", "artery")), 0, 0, 9, 9)


# ----------------------------------------------------------------------------------------------------------------------
# Places


class Chosen:
    """A generator that draws what it is told."""

    def __init__(self, number):
        self.number = number

    def integers(self, end):
        assert 0 <= self.number < end
        return self.number


def test_every_pixel_of_a_class_is_drawn_once(tmp_path):
    image, mask = draw_slide(5, (300, 290), discs=4, radius=(4, 12), classes=2)
    pair = write_pair(tmp_path, "tiff", image, mask)
    with SlidePair(pair, SlideOptions()) as slide:
        places = SlidePlaces(slide, ClassMap((1, 2), ("background", "a", "b")))
        for label in (1, 2):
            count = int((mask == label).sum())
            assert places.cells[label].pixels == count > 0
            drawn = {places.draw_class(label, Chosen(number)) for number in range(count)}
            assert drawn == set(zip(*np.nonzero(mask == label), strict=True))
        assert places.draw_class(0, Chosen(0)) is None, "the background is not asked for"


@pytest.mark.parametrize("seed", range(8))
def test_drawn_tissue_is_tissue(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 400, 2).tolist()
    shape = (int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1)))
    tissue = Tissue(rng.random(shape) < 0.2, height, width)
    tissue.mask[-1, -1] = True
    inside = tissue.rows(0, height)
    drawn = [draw_tissue(tissue, rng) for _ in range(300)]
    assert all(inside[place] for place in drawn)
    assert draw_tissue(Tissue(np.zeros((3, 3), bool), 9, 9), rng) is None and draw_tissue(None, rng) is None


@pytest.mark.parametrize("size", [(10, 500), (64, 64), (300, 200)])
def test_corners_hold_their_place_inside_the_slide(size):
    rng = np.random.default_rng(1)
    for _ in range(200):
        place = tuple(int(rng.integers(length)) for length in size)
        for corner, length, at in zip(draw_corner(size, (64, 64), place, rng), size, place, strict=True):
            assert corner <= at < corner + 64 and min(0, length - 64) <= corner <= max(0, length - 64)


def test_places_are_found_once(tmp_path, monkeypatch):
    image, mask = draw_slide(5, (300, 290))
    pair = write_pair(tmp_path, "geojson", image, mask)
    options = SlideOptions(tissue="saturation")
    assert slide_index.prepare_slides([pair], options, BINARY) == []

    def fail(*_):
        raise AssertionError("looked again")

    monkeypatch.setattr(slide_index, "_count_cells", fail)
    monkeypatch.setattr(slide_index, "find_tissue", fail)
    slide_index.prepare_slides([pair], options, BINARY)
    with pytest.raises(AssertionError, match="looked again"):
        slide_index.prepare_slides([pair], SlideOptions(reduction=2, tissue="saturation"), BINARY)
    for path in (scan.cache_dir() / "slides").iterdir():
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(AssertionError, match="looked again"):
        slide_index.prepare_slides([pair], options, BINARY)


def test_glass_without_tissue_is_said(tmp_path):
    image, mask = draw_slide(5, (300, 290))
    pair = write_pair(tmp_path, "geojson", np.full_like(image, 240), mask)
    (message,) = slide_index.prepare_slides([pair], SlideOptions(tissue="saturation"), BINARY)
    assert "shows no tissue by the saturation rule" in message


# ----------------------------------------------------------------------------------------------------------------------
# Samples


def take_samples(pairs, slots, preset="light", **how):
    data = TrainingSet(pairs, BINARY, make_config(**how), augment(preset))
    assert all(data.slides)
    return [sample for slot in slots for sample in data[(slot,)]]


def test_every_form_of_mask_gives_the_same_samples(tmp_path):
    image, mask = draw_slide(5)
    slots = [Slot(0, seed, 1 if seed % 2 else None) for seed in range(12)]
    options = {"tissue": "saturation", "reduction": 2.0}
    found = [take_samples([write_pair(tmp_path / form, form, image, mask)], slots, **options) for form in FORMS]
    for other in found[1:]:
        for (name, pixels, indices), (_, more_pixels, more_indices) in zip(found[0], other, strict=True):
            assert name == "s" and np.array_equal(pixels, more_pixels) and np.array_equal(indices, more_indices)


def test_samples_without_augmentation_are_cuts_of_the_slide(tmp_path):
    image, mask = draw_slide(5)
    pair = write_pair(tmp_path, "geojson", image, mask)
    for slot in [Slot(0, seed, 1 if seed % 2 else None) for seed in range(10)]:
        ((_, pixels, indices),) = take_samples([pair], [slot], "none")
        with SlidePair(pair, SlideOptions()) as slide:
            row, column = SlidePlaces(slide, BINARY).corner((64, 64), slot.wanted, np.random.default_rng(slot.seed))
        config = make_config()
        expected = (image[row : row + 64, column : column + 64] - np.float32(config.mean)) / np.float32(config.std)
        assert np.allclose(pixels, expected.transpose(2, 0, 1), atol=1e-4)
        assert np.array_equal(indices, mask[row : row + 64, column : column + 64])


@pytest.mark.parametrize("preset", ["none", "hard"])
def test_forced_windows_hold_their_class_and_others_tissue(tmp_path, preset):
    image, mask = draw_slide(5, discs=2, radius=(2, 5))
    pair = write_pair(tmp_path, "rle", image, mask)
    forced = take_samples([pair], [Slot(0, seed, 1) for seed in range(25)], preset, tissue="saturation")
    assert all((indices == 1).any() for _, _, indices in forced)
    free = take_samples([pair], [Slot(0, seed) for seed in range(40)], "none", tissue="saturation", size=32)
    glass = ((235 - 190.0) / 50, (235 - 150.0) / 60, (235 - 170.0) / 55)  # of every channel, at its darkest
    on_glass = [all((pixels[c] > glass[c]).all() for c in range(3)) for _, pixels, _ in free]
    assert np.mean(on_glass) < 0.2, "only the margin round tissue"
    anywhere = take_samples([pair], [Slot(0, seed) for seed in range(40)], "none", size=32)
    assert sum(all((pixels[c] > glass[c]).all() for c in range(3)) for _, pixels, _ in anywhere) > 8


def test_slides_smaller_than_a_window(tmp_path):
    image, mask = draw_slide(5, (40, 700))
    pair = write_pair(tmp_path, "geojson", image, mask)
    for _, pixels, indices in take_samples([pair], [Slot(0, seed) for seed in range(5)], "none"):
        assert pixels.shape == (3, 64, 64) and (indices == IGNORE_INDEX).any(axis=1).sum() == 24


def test_slots_of_slides_come_a_few_at_a_time():
    sampler = EpochSampler([(1,), (), (1,)], crops=10, quota=0.5, seed=3, slides=[True] * 3)
    first, again = list(sampler), list(sampler)
    slots = [slot for piece in first for slot in piece]
    assert first == again and len(slots) == 30 and max(map(len, first)) == sampler.together == 4
    assert len({piece[0].image for piece in first[:5]}) > 1, "mixed"
    assert sum(slot.wanted is not None for slot in slots) == 15
    sampler.set_epoch(1)
    assert list(sampler) != first


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_samples(tmp_path, workers):
    drawn = [draw_slide(seed, (300, 400)) for seed in (1, 2)]
    pairs = [write_pair(tmp_path / str(i), FORMS[i], *pair, name=f"s{i}") for i, pair in enumerate(drawn)]

    def batches(workers):
        data = TrainingSet(pairs, BINARY, make_config(size=32, tissue="saturation"), augment())
        sampler = EpochSampler([(1,), (1,)], crops=5, quota=0.5, seed=3, slides=data.slides)
        return list(TrainingBatches(data, sampler, batch=4, workers=workers, pin=False))

    for one, other in zip(batches(0), batches(workers), strict=True):
        assert (
            one.names == other.names and torch.equal(one.images, other.images) and torch.equal(one.masks, other.masks)
        )


@pytest.mark.parametrize("way", KINDS)
def test_windows_of_slides_are_mixed(tmp_path, way):
    drawn = [draw_slide(seed, (300, 400), discs=40, radius=(3, 7)) for seed in (1, 2)]
    pairs = [write_pair(tmp_path / str(i), "geojson", *pair, name=f"s{i}") for i, pair in enumerate(drawn)]
    mixing, changed = Mixing(way, 1.0, [(1,), (1,)], together=True), 0
    plain, mixed = (TrainingSet(pairs, BINARY, make_config(), augment("none"), mix) for mix in (None, mixing))
    for seed in range(12):
        slot = Slot(0, seed, 1 if seed % 3 == 0 else None)
        ((_, before, _),), ((name, pixels, indices),) = plain[(slot,)], mixed[(slot,)]
        assert name == "s0" and pixels.shape == (3, 64, 64) and set(np.unique(indices)) <= {0, 1, IGNORE_INDEX}
        assert slot.wanted is None or (indices == 1).any()
        changed += not np.array_equal(before, pixels)
    assert changed >= (4 if way == "copy-paste" else 9)


def test_resized_images_cannot_be_slides(tmp_path):
    pair = write_pair(tmp_path, "geojson", *draw_slide(5, (64, 64)))
    config = make_config()
    config = ModelConfig(**{**config.__dict__, "geometry": Geometry("resize", (64, 64))})
    with pytest.raises(DatasetError, match=r"s\.svs is a slide: .* take crops, such as --crops 64"):
        TrainingSet([pair], BINARY, config, augment())


# ----------------------------------------------------------------------------------------------------------------------
# Scans


def check(root, slides=slide_windows.AS_STORED, **options):
    train_part, val_part, _ = find_splits(root, FileOptions())
    return check_dataset(train_part, val_part, ClassOptions(**options), slides=slides, workers=2)


@pytest.mark.parametrize("form", FORMS)
def test_labels_are_counted_and_statistics_estimated(tmp_path, form, monkeypatch):
    write_slides(tmp_path, form)
    checked = check(tmp_path)
    assert checked.errors == []
    truth = [draw_slide(i)[1] for i in range(2)]
    pixels = scan.class_pixels(checked.train, checked.raise_errors())
    assert pixels.tolist() == [sum(int((mask == k).sum()) for mask in truth) for k in (0, 1)]
    facts = checked.train[0].layers[0]
    assert facts.pixels == 640 * 900 and np.allclose(facts.means, draw_slide(0)[0].mean(axis=(0, 1)))
    monkeypatch.setattr("slide_scan.SAMPLED_SIDE", 40)
    options = SlideOptions(tissue="saturation")
    first, again = (scan_pairs([item.pair for item in checked.train], slides=options) for _ in range(2))
    assert first == again and first[0].layers[0].pixels == 64 * 40 * 40
    assert first[0].sampled == "64 windows of 40 x 40 pixels of each slide (reduced by 1, tissue saturation)"
    assert first[0].layers[0].means[1] < facts.means[1] - 10, "of tissue, which is darker than glass"


def test_names_of_classes_become_labels(tmp_path):
    for split, seed in (("train", 1), ("val", 2)):
        image, mask = draw_slide(seed, (200, 260), classes=2)
        write_slide(tmp_path / split / "images" / "s.tif", image)
        write_geojson(tmp_path / split / "gt" / "s.geojson", mask, ("vein", "artery"))
    both = check(tmp_path, names=("artery", "vein")).raise_errors()
    assert both.labels == (1, 2) and both.names == ("background", "artery", "vein")
    alone = check(tmp_path)
    assert "annotations of 2 classes are one object; to tell them apart: --class-names artery vein" in alone.notes
    one = alone.raise_errors()
    assert one.labels == (1,) and one.names == ("background", "object")
    (message,) = check(tmp_path, names=("artery",)).errors[:1]
    assert "train/gt/s.geojson name 'vein'; expected 'artery': add the others to --class-names" in message


def only_error(root, slides=slide_windows.AS_STORED, **options):
    checked = check(root, slides, **options)
    assert len(checked.errors) == 1, checked.errors
    return checked.errors[0]


def test_annotations_of_another_image_are_an_error_and_of_the_border_a_warning(tmp_path):
    write_slides(tmp_path)
    mask = draw_slide(0)[1]
    path = tmp_path / "train" / "gt" / "train0.geojson"
    write_geojson(path, mask, origin=(500, 0))
    (message, *_) = check(tmp_path).warnings
    assert str(path) in message and "outside the image" in message and "expected x 0 to 900, y 0 to 640" in message
    write_geojson(path, mask, origin=(5000, 0))
    assert "no annotation lies on the slide" in only_error(tmp_path) and "train0.svs" in only_error(tmp_path)


def test_features_without_geometry_are_named(tmp_path):
    write_slides(tmp_path)
    path = tmp_path / "train" / "gt" / "train0.geojson"
    document = json.loads(path.read_text(encoding="utf-8"))
    document["features"].insert(0, {"type": "Feature", "geometry": None, "properties": {}})
    path.write_text(json.dumps(document), encoding="utf-8")
    checked = check(tmp_path)
    assert checked.errors == [] and f"{path}: feature 1: has the geometry null" in checked.warnings[0]


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ("1 2 3", "3 numbers, expected an even count"),
        ("575999 5", "expected runs within a mask of 640 x 900 pixels"),
        ("1 5 3 4", "overlap"),
        ("one two", "expected whole numbers"),
    ],
)
def test_broken_run_lengths_name_file_and_image(tmp_path, runs, expected):
    write_slides(tmp_path, "rle")
    path = tmp_path / "train" / "gt" / "runs.csv"
    rows = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([rows[0], f"train0,{runs}", rows[2]]), encoding="utf-8")
    message = only_error(tmp_path)
    assert f"{path}, row 'train0'" in message and expected in message


def test_a_name_twice_in_a_table(tmp_path):
    write_slides(tmp_path, "rle")
    path = tmp_path / "train" / "gt" / "runs.csv"
    path.write_text(path.read_text(encoding="utf-8") + "train0,1 2\n", encoding="utf-8")
    assert "two rows for 'train0'" in only_error(tmp_path)


def test_a_mask_of_another_size(tmp_path):
    write_slides(tmp_path, "tiff")
    write_mask_tiff(tmp_path / "train" / "gt" / "train0.tif", np.ones((320, 451), np.uint8))
    message = only_error(tmp_path, SlideOptions(reduction=2))
    assert "train0.tif is 320x451" in message and "has the sizes 640x900, 320x450" in message


def test_a_slide_without_scale_under_mpp(tmp_path):
    write_slides(tmp_path)
    image, _ = draw_slide(0)
    write_slide(tmp_path / "train" / "images" / "train0.svs", image, mpp=None)
    message = only_error(tmp_path, SlideOptions(mpp=1.0))
    assert "train0.svs does not say how many micrometres a pixel is" in message and "--reduce" in message


def test_an_unreadable_slide_is_named(tmp_path):
    write_slides(tmp_path)
    (tmp_path / "val" / "images" / "val0.svs").write_bytes(b"II*\0garbage")
    assert "val/images/val0.svs" in only_error(tmp_path)


def test_preprocessing_needs_whole_images(tmp_path):
    write_slides(tmp_path)
    train_part, val_part, _ = find_splits(tmp_path, FileOptions())
    errors = check_dataset(train_part, val_part, ClassOptions(), steps=["clahe"]).errors
    assert len(errors) == 3 and "--preprocess clahe needs whole images; leave it out" in errors[0]


def test_annotations_outside_the_tissue_are_warned_about(tmp_path):
    write_slides(tmp_path)
    mask = draw_slide(0)[1]
    mask[600:640, :50] = 1
    write_geojson(tmp_path / "train" / "gt" / "train0.geojson", mask)
    (message,) = check(tmp_path, SlideOptions(tissue="saturation")).warnings
    assert "lies outside the tissue (saturation rule)" in message and "train0" in message


# ----------------------------------------------------------------------------------------------------------------------
# Scores


@pytest.mark.parametrize("num_classes", [2, 3])
def test_parts_count_as_the_whole(num_classes):
    rng = np.random.default_rng(0)
    binary = num_classes == 2
    names = ("background", "a", "b")[:num_classes]
    whole, parts = (Scorer(names, binary=binary) for _ in range(2))
    for image in range(3):
        probs = rng.dirichlet(np.ones(num_classes), (50, 40)).transpose(2, 0, 1).astype(np.float32)
        probs = probs[1:] if binary else probs
        mask = rng.integers(0, num_classes, (50, 40)).astype(np.uint8)
        mask[rng.random(mask.shape) < 0.1] = IGNORE_INDEX
        cuts = [0, *sorted(rng.choice(np.arange(1, 50), 4, replace=False).tolist()), 50]
        bands = [(probs[:, a:b], mask[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
        assert whole.update(f"i{image}", probs, mask) == parts.update_parts(f"i{image}", bands)
    assert whole.summary() == parts.summary() and whole.rows() == parts.rows()


def test_nothing_is_counted_of_an_image_that_fails():
    scorer = Scorer(("background", "a"), binary=True)
    good = np.full((1, 4, 4), 0.7, np.float32), np.ones((4, 4), np.uint8)

    def parts():
        yield good
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        scorer.update_parts("i", parts())
    with pytest.raises(ValueError, match="i: no pixel to score"):
        scorer.update_parts("i", [])
    assert scorer.confusion.sum() == scorer.histogram.sum() == len(scorer.names) == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A data set of slides, and the run folder of two epochs on it at half the scale."""
    root, logs = tmp_path_factory.mktemp("slides"), tmp_path_factory.mktemp("logs")
    write_slides(root)
    words = ["-d", root, "-m", "plain-unet", "--encoder", "plain-8", "--crops", 24, "--image-size", 32, "-b", 8]
    words += ["-e", 2, "-a", "light", "-w", 0, "--cpu", "-log", logs, "--exp-name", "run", "--reduce", 2]
    train.main([str(word) for word in [*words, "--loss", "0.5*bce+0.5*dice", "-lr", 1e-2]])
    return root, logs / "run"


def confusion_of(path: Path) -> list[list[int]]:
    return json.loads(path.read_text(encoding="utf-8"))["confusion"]


def test_training_validation_and_predicted_files_count_the_same(trained, tmp_path, monkeypatch):
    root, run = trained
    monkeypatch.chdir(tmp_path)
    validate.main(["-d", f"{root}/val", "-cd", str(run), "--cpu", "-o", "scores", "-log", "logs", "--raw", "--plots"])
    validated = confusion_of(tmp_path / "scores" / "_metrics.json")

    config, forward, _ = load_forward(run / "run.pth", "cpu", backend="torch")
    assert config.geometry.reduction == 2 and config.tissue == "saturation"
    classes, loss = ClassMap.from_config(config), build_loss("0.3*ce+0.7*dice", num_logits=1)
    pairs = list_pairs(root / "val").pairs
    scorer = evaluation.build_scorer(config)
    predictions = evaluation.predict_samples(forward, EvaluationSet(pairs, classes, config), workers=0)
    result = evaluation.evaluate(predictions, scorer, loss=loss, keep_worst=2)
    assert scorer.confusion.tolist() == validated
    epochs = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert max(row["val"][root.name]["iou"] for row in epochs) == pytest.approx(result.summary["iou"], abs=1e-12)

    words = ["-i", str(pairs[0].image), "-cd", str(run), "--cpu", "--backend", "torch", "-o", "out", "-log", "logs"]
    predict.main([*words, "--save", "mask,prob"])
    with SlidePair(pairs[0], SlideOptions.from_config(config)) as slide:
        truth = slide.labels(classes, 0, 0, slide.height, slide.width)
    for folder in ("out", "scores"):
        scored = evaluation.build_scorer(config)
        scored.update_pred("val0", read_mask(tmp_path / folder / "masks" / "val0.png") > 0, truth)
        assert scored.confusion.tolist() == validated, folder
    raw = [(tmp_path / folder / "raw" / "val0.png").read_bytes() for folder in ("out", "scores")]
    assert raw[0] == raw[1] and (tmp_path / "scores" / "overlays" / "val0.png").is_file()

    probs = read_mask(tmp_path / "out" / "raw" / "val0.png")[None].astype(np.float32) / 65535
    assert result.loss == pytest.approx(evaluation.loss_of_probs(loss, probs, truth), abs=2e-4)
    (shown,) = result.worst
    assert shown.image.shape[:2] == shown.mask.shape == shown.probs.shape[1:] and shown.mask.size < truth.size


def run_train(root, logs, *more):
    words = ["-d", root, "-m", "plain-unet", "--encoder", "plain-8", "--crops", 6, "--image-size", 32, "-b", 4]
    words += ["-a", "light", "--cpu", "-log", logs, "-sc", "constant"]
    train.main([str(word) for word in [*words, *more]])


def test_a_resumed_run_on_slides_has_the_weights_of_one_that_went_through(tmp_path):
    root = write_slides(tmp_path / "slides", "rle", size=(200, 300), radius=(8, 16))
    run_train(root, tmp_path / "logs", "-e", 2, "-w", 1, "--exp-name", "through")
    close_places()
    run_train(root, tmp_path / "logs", "-e", 1, "-w", 0, "--exp-name", "halves")
    run_train(root, tmp_path / "logs", "-e", 2, "-w", 0, "--exp-name", "halves")
    weights = [
        torch.load(tmp_path / "logs" / name / "last_checkpoint", weights_only=True)["model_state_dict"]
        for name in ("through", "halves")
    ]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_several_classes_count_the_same_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split, seed in (("train", 1), ("val", 2)):
        image, mask = draw_slide(seed, (260, 320), classes=2, radius=(10, 25))
        write_slide(tmp_path / "data" / split / "images" / "s.svs", image)
        write_geojson(tmp_path / "data" / split / "gt" / "s.geojson", mask, ("vein", "artery"))
    run_train("data", "logs", "-e", 1, "-w", 0, "--exp-name", "run", "--class-names", "artery", "vein", "-lr", 1e-2)
    validate.main(["-d", "data/val", "-cd", "logs/run", "--cpu", "--backend", "torch", "-o", "scores"])
    config, _, _ = load_forward(tmp_path / "logs" / "run" / "run.pth", "cpu", backend="torch")
    assert config.class_names == ("background", "artery", "vein") and config.num_logits == 3
    words = ["-cd", "logs/run", "--cpu", "--backend", "torch", "-o", "out"]
    predict.main(["-i", "data/val/images/s.svs", *words])
    scored = evaluation.build_scorer(config)
    truth = np.array([0, 2, 1], np.uint8)[draw_slide(2, (260, 320), classes=2, radius=(10, 25))[1]]
    scored.update_pred("s", read_mask(tmp_path / "out" / "masks" / "s.png").astype(np.uint8), truth)
    assert scored.confusion.tolist() == confusion_of(tmp_path / "scores" / "_metrics.json")


def test_a_slide_of_nearly_the_resolution_counts_as_predict_writes_it(tmp_path):
    image, mask = draw_slide(3)
    pair = write_pair(tmp_path, "geojson", image, mask, mpp=0.2527)
    config = make_config(mpp=0.25)

    def forward(batch):
        return 1 / (1 + np.exp(-batch[:, :1]))

    with predict_slide(forward, pair, BINARY, config) as prediction:
        tops, probs, masks = zip(*[(top, p.copy(), m) for top, p, m in prediction.bands], strict=True)
    assert tops[0] == 0 and prediction.picture.scale == 1
    np.testing.assert_array_equal(np.concatenate(masks), mask)
    assert np.concatenate(probs, axis=1).shape == (1, *mask.shape)


def test_without_masks_slides_are_predicted(trained, tmp_path, monkeypatch, capsys):
    root, run = trained
    monkeypatch.chdir(tmp_path)
    (tmp_path / "new" / "images").mkdir(parents=True)
    write_slide(tmp_path / "new" / "images" / "x.svs", draw_slide(8)[0])
    validate.main(["-d", "new", "-cd", str(run), "--cpu", "-o", "out", "-log", "logs"])
    assert "predicted without metrics" in capsys.readouterr().out
    assert read_mask(tmp_path / "out" / "masks" / "x.png").shape == (320, 450)


def test_large_results_leave_no_working_folder(trained, tmp_path, monkeypatch):
    root, run = trained
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results, "PNG_PIXELS", 1000)
    validate.main(["-d", f"{root}/val", "-cd", str(run), "--cpu", "-o", "out", "-log", "logs", "--raw"])
    assert (tmp_path / "out" / "masks" / "val0.ome.tif").is_file() and not list((tmp_path / "out").glob(".*"))


def test_validation_goes_on_after_a_broken_slide(trained, tmp_path, monkeypatch, capsys):
    root, run = trained
    monkeypatch.chdir(tmp_path)
    write_slides(tmp_path / "data", val=3)
    (tmp_path / "data" / "val" / "images" / "val1.svs").write_bytes(b"II*\0")
    write_geojson(tmp_path / "data" / "val" / "gt" / "val2.geojson", draw_slide(0)[1], origin=(9000, 0))
    with pytest.raises(SystemExit) as stop:
        validate.main(["-d", "data/val", "-cd", str(run), "--cpu", "-o", "out", "-log", "logs", "--com"])
    said = capsys.readouterr()
    assert stop.value.code == 1 and "val1.svs" in said.out and "no annotation lies on the slide" in said.out
    assert "1 images" in said.out and "2 findings" in said.err


def refused(words, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main([str(word) for word in words])
    said = capsys.readouterr()
    return stop.value.code, said.err + said.out


def test_flags_that_do_not_fit_slides(tmp_path, capsys):
    write_slides(tmp_path)
    base = ["-d", tmp_path, "-m", "plain-unet", "--encoder", "plain-8", "--cpu", "-log", tmp_path / "logs"]
    code, text = refused([*base, "--mpp", 1], capsys)
    assert code == 2 and "give --crops N too" in text
    code, text = refused([*base, "--reduce", 0.5, "--crops", 2], capsys)
    assert code == 2 and "--reduce 0.5 would enlarge the images" in text
    code, text = refused([*base, "--reduce", 2, "--mpp", 1], capsys)
    assert code == 2 and "not allowed with argument" in text
    code, text = refused([*base, "--image-size", 32], capsys)
    assert code == 2 and "train0.svs is a slide, which networks see in windows: give --crops N" in text


def test_ordinary_images_train_at_another_scale(tmp_path, capsys):
    root = write_dataset(tmp_path / "discs", train=3, val=2, sizes=((64, 80),))
    words = ["-d", root, "-m", "plain-unet", "--encoder", "plain-8", "--cpu", "-log", tmp_path / "logs", "-e", 1]
    words += ["--crops", 2, "--image-size", 16, "-b", 2, "-w", 0, "--reduce", 2, "--exp-name", "half"]
    train.main([str(word) for word in words])
    assert "2 images, 2560 pixels" in capsys.readouterr().out
    code, text = refused([*words[:-4], "--mpp", 1, "--exp-name", "um"], capsys)
    assert code == 1 and "does not say how many micrometres a pixel is" in text and text.count(" - ") == 5


def test_the_check_alone_takes_slides(tmp_path, capsys):
    write_slides(tmp_path, "rle")
    check_command.main(["-d", str(tmp_path), "--reduce", "4"])
    text = capsys.readouterr().out
    assert "0 errors, 0 warnings" in text and "160x225" in text and "saturation" in text


@pytest.mark.parametrize(("mpp", "expected"), [(0.5, "saturation"), (None, "none")])
def test_the_tissue_rule_follows_the_slides(tmp_path, mpp, expected):
    image, mask = draw_slide(5)
    pair = write_pair(tmp_path, "geojson", image, mask, mpp=mpp)
    options, said = scan.choose_tissue([pair], SlideOptions(), "auto")
    assert options.tissue == expected and said.startswith("tissue: ")
    assert scan.choose_tissue([], SlideOptions(), "auto") == (SlideOptions(), "")
    assert scan.choose_tissue([pair], SlideOptions(), "otsu")[0].tissue == "otsu"
    small = write_pair(tmp_path, "geojson", image, mask, suffix=".tif")
    assert "not looked for: no image is a slide" in scan.choose_tissue([small], SlideOptions(), "otsu")[1]


# ----------------------------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.slow
def test_a_large_slide_takes_little_memory(tmp_path):
    """12,000 x 12,000 pixels, 432 MB decoded: with 200 MB more to train on it, 400 MB to score it too."""
    side, tile = 12_000, 512
    image, mask = draw_slide(1, (1000, 1000))

    def tiles():
        for row in range(0, side, tile):
            for column in range(0, side, tile):
                yield np.ascontiguousarray(image[(row // 12) % 480 :, (column // 12) % 480 :][:tile, :tile])

    (tmp_path / "images").mkdir()
    path = tmp_path / "images" / "s.tif"
    how = {"tile": (tile, tile), "compression": "jpeg", "photometric": "ycbcr"}
    tifffile.imwrite(path, tiles(), shape=(side, side, 3), dtype=np.uint8, **how)
    big = {"type": "Polygon", "coordinates": [[[900, 800], [9000, 900], [8000, 9500], [700, 9000], [900, 800]]]}
    (tmp_path / "s.geojson").write_text(json.dumps(big), encoding="utf-8")
    program = Path(__file__).parent / "slide_memory.py"
    command = [sys.executable, str(program), str(path), str(tmp_path / "s.geojson")]
    result = subprocess.run(command, cwd=program.parent.parent, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    trained, scored = map(float, result.stdout.split())
    assert trained < 200 and scored < 400, f"{trained:.0f} MB to train, {scored:.0f} MB in all"
