import os
import warnings
from dataclasses import fields, replace
from pathlib import Path

import cv2
import numpy as np
import pytest

import cli
from annotation.watershed import (
    PRESET_NAMES,
    PRESETS,
    SPACE,
    WatershedOptions,
    add_watershed_args,
    choose_options,
    options_from,
    segment,
)
from image_io import read_image, read_mask
from object_metrics import object_scores

COLUMNS, ROWS = np.meshgrid(np.arange(320), np.arange(240))


def draw(centres, radius=14, heights=None, noise=3.0, seed=0):
    """Blurred discs on a dark background: image (240, 320) float32 of about 0..255, and label map."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((240, 320), np.int32)
    image = np.full((240, 320), 12.0, np.float32)
    for number, (y, x) in enumerate(centres, start=1):
        inside = (ROWS - y) ** 2 + (COLUMNS - x) ** 2 <= radius**2
        labels[inside & (labels == 0)] = number
        image[inside] = 12 + (heights[number - 1] if heights else 150)
    image = cv2.GaussianBlur(image, (0, 0), 1.0) + rng.normal(0, noise, image.shape).astype(np.float32)
    return np.clip(image, 0, 255), labels


GRID = [(y, x) for y in range(40, 220, 50) for x in range(40, 300, 55)]


def as_uint8(image):
    return np.rint(image).astype(np.uint8)[..., None]


def f1(found, labels):
    return object_scores(found.labels, labels).summary()["at"][0]["f1"]


# ----------------------------------------------------------------------------------------------------------------------
# What is found


@pytest.mark.parametrize("kind", ["bright", "dark", "uint16", "float", "small range"])
def test_discs_are_found_whatever_the_type_and_polarity(kind):
    image, labels = draw(GRID)
    picture = {
        "bright": as_uint8(image),
        "dark": as_uint8(255 - image),
        "uint16": np.rint(image * 200).astype(np.uint16)[..., None],
        "float": (image * 1e12).astype(np.float32)[..., None],
        "small range": (image * 1e-6 + 1).astype(np.float32)[..., None],
    }[kind]
    found = segment(picture)
    assert len(found) == len(GRID)
    assert object_scores(found.labels, labels).summary()["at"][6]["f1"] > 0.95  # IoU 0.8


def test_touching_discs_are_two_objects():
    image, labels = draw([*GRID[:3], (140, 100), (140, 125), (140, 220), (163, 228)])
    found = segment(as_uint8(image))
    assert f1(found, labels) == 1
    assert found.labels[140, 100] != found.labels[140, 125]


def test_dim_objects_get_the_outline_of_bright_ones():
    heights = [200, 60, 35, 120, 45] * 4
    image, labels = draw(GRID, heights=heights, noise=1.5)
    found = segment(as_uint8(image))
    areas = np.bincount(found.labels.ravel())[1:]
    assert f1(found, labels) == 1
    assert areas.max() < 1.25 * areas.min()


def test_haze_and_slopes_of_light_are_no_objects():
    image, labels = draw(GRID, noise=1.0)
    haze = 60 * np.exp(-((ROWS - 120) ** 2 + (COLUMNS - 160) ** 2) / (2 * 60.0**2)).astype(np.float32)
    found = segment(as_uint8(np.clip(image * 0.6 + haze, 0, 255)))
    assert f1(found, labels) > 0.95


def test_rims_are_filled_and_touching_bubbles_part():
    centres = [*GRID[:8], (150, 100), (150, 131), (150, 220)]
    labels = np.zeros((240, 320), np.int32)
    image = np.full((240, 320), 5.0, np.float32)
    for number, (y, x) in enumerate(centres, start=1):
        distance = np.hypot(ROWS - y, COLUMNS - x)
        labels[(distance <= 16) & (labels == 0)] = number
        image[np.abs(distance - 14) < 2] = 180
    image = np.clip(image + np.random.default_rng(0).normal(0, 2, image.shape), 0, 255)
    options = choose_options(as_uint8(image))
    assert (options.preset, options.objects) == ("bubbles", "rims")
    found = segment(as_uint8(image))
    assert len(found) == len(centres)
    assert f1(found, labels) == 1


def test_stained_nuclei_are_found_in_their_channel():
    image, labels = draw(GRID, noise=2.0)
    share = np.clip((image - 12) / 150, 0, 1)[..., None]
    ground, stain = np.array([225.0, 190, 225]), np.array([90.0, 60, 160])
    picture = ground * (1 - share) + stain * share
    picture[..., 1:] += np.random.default_rng(0).normal(0, 25, (240, 320, 2))
    picture = np.rint(np.clip(picture, 0, 255)).astype(np.uint8)
    options = choose_options(picture)
    assert (options.preset, options.objects) == ("histology", "dark")
    assert options.channel == "red"
    assert f1(segment(picture), labels) == 1


def test_nuclei_are_found_within_grey_cells():
    picture, labels = np.full((240, 320), 230.0), np.zeros((240, 320), np.int32)
    rng = np.random.default_rng(0)
    picture[30:210, 30:230] = 160  # a sheet of cells
    centres = [(y, x) for y in (60, 120, 180) for x in (60, 107, 154, 200)]
    for number, (y, x) in enumerate(centres, start=1):
        labels[(ROWS - y) ** 2 + (COLUMNS - x) ** 2 <= 7**2] = number
    picture[labels > 0] = 50
    picture = cv2.GaussianBlur(picture, (0, 0), 1.0) + rng.normal(0, 3, picture.shape)
    image = as_uint8(np.clip(picture, 0, 255))
    options = choose_options(image)
    assert options.preset == "cytology"
    found = segment(image)
    assert f1(found, labels) == 1
    assert np.array_equal(segment(image, options).labels, found.labels)
    assert choose_options(image, WatershedOptions(core=0.5)).core == 0.5
    assert choose_options(as_uint8(255 - draw(GRID)[0])).preset == "nuclei"


def test_grains_are_told_from_the_gaps_between_them():
    rng = np.random.default_rng(0)
    picture = np.full((240, 320), 40.0)
    for y in range(0, 240, 40):
        for x in range(0, 320, 40):
            picture[y + 2 : y + 38, x + 2 : x + 38] = rng.uniform(150, 190)
    picture = cv2.GaussianBlur(picture, (0, 0), 1.0) + rng.normal(0, 3, picture.shape)
    image = np.repeat(as_uint8(np.clip(picture, 0, 255)), 3, axis=2)
    assert choose_options(image).preset == "grains"
    found = segment(image)
    assert 40 <= len(found) <= 56


def test_froth_is_flooded_from_its_highlights():
    rng = np.random.default_rng(0)
    centres = [(y + int(rng.integers(-4, 5)), x + int(rng.integers(-4, 5))) for y, x in GRID]
    distance = np.min([np.hypot(ROWS - y, COLUMNS - x) for y, x in centres], axis=0)
    picture = np.clip(60 + 190 * np.exp(-((distance / 9) ** 2)) - distance, 20, 255)
    image = np.stack([picture, picture, picture * 0.8], axis=2).astype(np.uint8)
    found = segment(image, WatershedOptions(preset="froth"))
    assert len(found) == len(centres)
    assert len({int(found.labels[y, x]) for y, x in centres}) == len(centres)
    assert (found.labels > 0).mean() > 0.85


def test_the_predecessors_chain_parts_what_it_could_not():
    image, truth = draw([(120, 100), (120, 124), (60, 220)], noise=0.0)
    for preset in ("ctci", "ctci-code"):
        found = segment(as_uint8(image), WatershedOptions(preset=preset))
        assert len(found) == 3
        assert f1(found, truth) == 1


# ----------------------------------------------------------------------------------------------------------------------
# Rules and scores


def test_rules_about_area_border_and_holes():
    image, _ = draw([(60, 60), (60, 160), (150, 2)], radius=18)
    image[(ROWS - 60) ** 2 + (COLUMNS - 160) ** 2 <= 16] = 12
    image[150:156, 200:206] = 160
    picture = as_uint8(image)
    given = WatershedOptions(preset="fluorescence", size=36.0, contrast=0.0, blur=0.7)
    assert len(segment(picture, replace(given, min_area=10))) == 4
    assert len(segment(picture, replace(given, min_area=100))) == 3
    assert len(segment(picture, replace(given, min_area=100, border="drop"))) == 2
    assert len(segment(picture, replace(given, min_area=10, max_area=100))) == 1
    for holes, filled in ((-1, True), (200, True), (0, False)):
        found = segment(picture, replace(given, holes=holes))
        assert bool(found.labels[60, 160]) is filled


def test_scores_rise_with_contrast_and_stay_in_range():
    image, _ = draw(GRID[:2], noise=1.0)
    haze = np.zeros_like(image)
    haze[:, 70:] = 80  # the second disc stands on a bright ground
    image = np.maximum(image, haze + (image - 12) * 0.6)
    found = segment(as_uint8(image), WatershedOptions(preset="fluorescence", contrast=0.0, size=28.0))
    first, second = (found.scores[found.labels[y, x] - 1] for y, x in GRID[:2])
    assert first > second > 0
    assert np.all((found.scores >= 0) & (found.scores <= 1))
    assert set(found.engines) == {"watershed"}


def test_scores_fall_with_a_shape_that_is_no_ellipse():
    image, _ = draw(GRID[:2], noise=1.0)
    image[100:106, 40:120] = image[70:140, 110:118] = 160  # an angle
    found = segment(as_uint8(image), WatershedOptions(preset="fluorescence", neck=0.0))
    disc, angle = (found.scores[found.labels[place] - 1] for place in (GRID[0], (103, 60)))
    assert disc > 0.8
    assert angle < 0.5


# ----------------------------------------------------------------------------------------------------------------------
# Options


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_resolved_options_have_no_gap_and_give_the_same(preset):
    picture = as_uint8(draw(GRID)[0])
    resolved = choose_options(picture, WatershedOptions(preset=preset))
    assert not [field.name for field in fields(resolved) if getattr(resolved, field.name) is None]
    assert resolved.preset in PRESETS
    assert choose_options(picture, resolved) == resolved
    one, other = segment(picture, WatershedOptions(preset=preset)), segment(picture, resolved)
    assert np.array_equal(one.labels, other.labels)
    assert np.array_equal(one.scores, other.scores)


def test_resolved_options_carry_to_other_windows_of_the_picture():
    picture = as_uint8(draw(GRID)[0])
    resolved = choose_options(picture)
    empty = as_uint8(draw([])[0])
    assert len(segment(empty, resolved)) == 0
    assert abs(len(segment(picture[:, :160], resolved)) - len(GRID) / 2) <= 2


def test_flags_are_the_fields():
    parser = cli.make_parser("test")
    add_watershed_args(parser)
    assert options_from(parser.parse_args([])) == WatershedOptions()
    words = "--preset nuclei --ws-objects dark --ws-retinex 15,80 --ws-level 0.3 --ws-holes -1 --ws-border drop"
    options = options_from(parser.parse_args([*words.split(), "--ws-min-area", "7"]))
    given = {"preset": "nuclei", "objects": "dark", "retinex": (15.0, 80.0), "level": 0.3, "holes": -1}
    assert options == WatershedOptions(**given, border="drop", min_area=7)
    names = {action.dest for action in parser._actions}
    assert set(SPACE) <= names
    assert {f"ws_{field.name}" for field in fields(WatershedOptions)} - names == {"ws_preset"}
    assert options_from(parser.parse_args(["--ws-retinex", "0"])).retinex == ()
    parser.format_help()


@pytest.mark.parametrize("words", ["--ws-retinex -3", "--ws-retinex a", "--ws-holes -2", "--ws-neck 2", "--preset x"])
def test_flags_refuse_what_cannot_be(words, capsys):
    parser = cli.make_parser("test")
    add_watershed_args(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(words.split())
    assert words.split()[0] in capsys.readouterr().err


@pytest.mark.parametrize("name", list(SPACE))
def test_every_end_of_the_space_runs(name):
    picture = as_uint8(draw(GRID)[0])
    values = SPACE[name]
    field = name.removeprefix("ws_")
    for value in values[:2] if isinstance(values, tuple) else values:
        found = segment(picture, WatershedOptions(**{field: value}))
        numbers = np.unique(found.labels[found.labels > 0])
        np.testing.assert_array_equal(numbers, np.arange(1, len(found) + 1))
        assert len(found.scores) == len(found) and ((found.scores >= 0) & (found.scores <= 1)).all()


# ----------------------------------------------------------------------------------------------------------------------
# Odd pictures

RANDOM = np.random.default_rng(0)
ODD = {
    "one pixel": np.zeros((1, 1, 1), np.uint8),
    "one row": np.arange(300, dtype=np.uint16).reshape(1, 300, 1),
    "three rows": RANDOM.integers(0, 255, (3, 400, 1), np.uint8),
    "constant": np.full((50, 60, 3), 7, np.uint8),
    "black": np.zeros((64, 64, 1), np.uint8),
    "white float": np.ones((64, 64, 1), np.float32),
    "all nan": np.full((40, 40, 1), np.nan, np.float32),
    "nan and infinity": np.where(RANDOM.random((60, 60, 1)) > 0.9, np.nan, np.inf).astype(np.float32),
    "largest floats": (RANDOM.random((80, 80, 3)) * 3e38).astype(np.float32),
    "two channels": RANDOM.random((60, 60, 2)).astype(np.float32),
    "five channels": RANDOM.random((60, 60, 5)).astype(np.float32),
    "noise": RANDOM.integers(0, 255, (90, 80, 3), np.uint8),
    "checkerboard": (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[..., None],
    "one bright pixel": np.pad(np.full((1, 1, 1), 255, np.uint8), ((30, 30), (30, 30), (0, 0))),
}


@pytest.mark.parametrize("preset", PRESET_NAMES)
@pytest.mark.parametrize("name", list(ODD))
def test_odd_pictures_give_an_answer_without_a_warning(name, preset):
    image = ODD[name]
    before = image.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = segment(image, WatershedOptions(preset=preset))
    assert found.labels.shape == image.shape[:2]
    assert np.array_equal(image, before, equal_nan=image.dtype.kind == "f")
    if name in ("one pixel", "constant", "black", "white float", "all nan"):
        assert len(found) == 0


def test_some_nan_and_alpha_do_not_matter():
    image, labels = draw(GRID)
    holed = image.copy()
    holed[::17, ::13] = np.nan
    assert f1(segment(holed[..., None]), labels) > 0.9
    picture = np.repeat(as_uint8(image), 3, axis=2)
    with_alpha = np.concatenate([picture, np.full((240, 320, 1), 255, np.uint8)], axis=2)
    assert np.array_equal(segment(with_alpha).labels, segment(picture).labels)


def test_a_large_picture_is_judged_by_windows_and_found_whole():
    tile = as_uint8(draw(GRID)[0])
    image = np.tile(tile, (8, 7, 1))
    assert image.shape[0] * image.shape[1] > 9 * 512**2
    found = segment(image)
    assert len(found) == len(GRID) * 56


# ----------------------------------------------------------------------------------------------------------------------
# Real pictures

DATA = Path(os.environ.get("TESSERA_DATA", "/nowhere"))


@pytest.mark.parametrize(("folder", "limit", "min_area"), [("nuclei/val", 0.75, 1), ("bubbles", 0.6, 30)])
def test_real_objects_are_found(folder, limit, min_area):
    if not (DATA / folder / "images").is_dir():
        pytest.skip("TESSERA_DATA names no folder with these pictures")
    total = None
    for path in sorted((DATA / folder / "images").iterdir()):
        pair = [segment(read_image(path)).labels, read_mask(DATA / folder / "gt" / f"{path.stem}.png").astype(np.int64)]
        for labels in pair:
            labels[(np.bincount(labels.ravel()) < min_area)[labels]] = 0
        scores = object_scores(*pair)
        total = scores if total is None else total + scores
    assert total.summary()["at"][0]["f1"] > limit
