"""Views lie where their matrices say, keep type and range, differ, and still show what is there."""

import math

import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from benchmarks import views as benchmark
from selfsupervised.views import VIEW_PRESETS, VIEWS, ViewMaker, ViewOptions, auto_views

TOPS = {"uint8": 255, "uint16": 65535, "float32": 1.0}


def make(preset="microscopy", *, channels=3, dtype="uint8", **options):
    return ViewMaker(preset, ViewOptions(**options), rgb=channels == 3, value_range=(0, TOPS[dtype]))


def coordinates(height, width, channels=2):
    """A float picture (height, width, channels) whose first channels are the column and the row of each pixel."""
    rows, columns = np.indices((height, width), dtype=np.float32)
    more = [(rows + columns) / 2] * (channels - 2)
    return np.stack([columns, rows, *more], axis=2)


def places_of(matrix, side):
    """Columns and rows (side, side) that a matrix gives for each pixel of a view, one by one."""
    found = np.array([[matrix @ (x, y, 1) for x in range(side)] for y in range(side)])
    return found[..., 0], found[..., 1]


def mirrored(places, length):
    """Where a place outside 0..length - 1 is reflected to."""
    if length == 1:
        return np.zeros_like(places)
    period = 2 * (length - 1)
    inside = np.mod(places, period)
    return np.minimum(inside, period - inside)


def cuts(maker, image, seed, corner=None):
    """Both views before their values are changed, and the matrices."""
    size = image.shape[:2]
    matrices = maker.make_views(image, seed)[2] if corner is None else maker.draw(size, corner, seed)
    return [maker.cut(image, matrix, size) for matrix in matrices], matrices


def scene(dtype="uint8", channels=3, height=150, width=170):
    """Discs of several colours on a soft ground."""
    rng = np.random.default_rng(channels)
    rows, columns = np.indices((height, width))
    image = 0.35 + 0.1 * np.sin(rows / 17)[..., None] * np.cos(columns / 23)[..., None] * np.ones(channels)
    for _ in range(14):
        inside = (rows - rng.uniform(0, height)) ** 2 + (columns - rng.uniform(0, width)) ** 2 < rng.uniform(6, 20) ** 2
        image[inside] = rng.uniform(0.15, 0.85) + rng.uniform(-0.12, 0.12, channels)
    image += rng.normal(0, 0.01, image.shape)
    return (image.clip(0, 1) * TOPS[dtype]).astype(dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Where


@pytest.mark.parametrize("preset", VIEW_PRESETS)
@pytest.mark.parametrize("views_from", ["crop", "neighbours"])
@pytest.mark.parametrize("size", [(140, 180), (40, 200), (23, 17)])
def test_matrices_say_where_each_pixel_comes_from(preset, views_from, size):
    side = 40
    maker, image = make(preset, size=side, views_from=views_from), coordinates(*size, channels=3)
    for seed in range(8):
        views, matrices = cuts(maker, image, seed)
        for view, matrix in zip(views, matrices, strict=True):
            columns, rows = places_of(matrix, side)
            expected = np.stack([mirrored(columns, size[1]), mirrored(rows, size[0])], axis=2)
            turning = np.stack([mirrored(columns, size[1]) != columns, mirrored(rows, size[0]) != rows], axis=2)
            gap = np.abs(view[..., :2] - expected)
            assert gap.max() < 0.6 and gap[~turning].max(initial=0) < 0.1, (seed, gap.max())


@pytest.mark.parametrize("size", [(300, 400), (401, 90)])
def test_views_of_whole_images_are_averaged_and_lie_where_their_matrices_say(size):
    """A view pixel has a side of up to ten pixels of the image here; each is the mean over about as many."""
    side, image = 32, coordinates(*size, channels=3)
    maker, factors = make("natural", size=side, window=0), []
    for seed in range(20):
        views, matrices = cuts(maker, image, seed)
        for view, matrix in zip(views, matrices, strict=True):
            columns, rows = places_of(matrix, side)
            factors.append(math.sqrt(abs(np.linalg.det(matrix[:, :2]))))
            inside = (columns > 5) & (columns < size[1] - 6) & (rows > 5) & (rows < size[0] - 6)
            gap = np.abs(view[..., :2] - np.stack([columns, rows], axis=2))[inside]
            assert gap.max(initial=0) < 0.6
    assert max(factors) > 3.1 and max(factors) > 1.8 * min(factors)
    noise = np.random.default_rng(0).normal(0.5, 0.1, (*size, 3)).astype(np.float32)
    wide = [view.std() for seed in range(20) for view in cuts(maker, noise, seed)[0]]
    assert np.median(wide) < 0.045, "averaged, not picked"


def test_pixels_are_interpolated_as_a_slow_reference_does():
    image = scene("float32", channels=5)
    maker = make("aerial", channels=5, dtype="float32", size=48)
    for seed in range(4):
        views, matrices = cuts(maker, image, seed)
        for view, matrix in zip(views, matrices, strict=True):
            columns, rows = places_of(matrix, 48)
            for band in range(5):
                expected = map_coordinates(image[..., band], [rows, columns], order=1, mode="mirror")
                assert np.abs(view[..., band] - expected).max() < 0.03  # OpenCV's steps are 1/32 of a pixel


def test_all_positions_and_angles_occur_where_nothing_is_up():
    maker = make("microscopy", size=32)
    linear = np.concatenate([maker.draw((200, 200), (60, 60), seed)[:, :, :2] for seed in range(150)])
    signs, angles = np.sign(np.linalg.det(linear)), np.degrees(np.arctan2(linear[:, 1, 0], linear[:, 0, 0]))
    assert 0.4 < (signs > 0).mean() < 0.6
    counts, _ = np.histogram(angles, 8, (-180, 180))
    assert counts.min() > 20
    scales = np.sqrt(abs(np.linalg.det(linear)))
    assert 0.74 < scales.min() < 0.85 and 1.3 < scales.max() <= 1.5


def test_natural_views_stay_upright():
    maker = make("natural", size=32)
    linear = np.concatenate([maker.draw((200, 200), (60, 60), seed)[:, :, :2] for seed in range(100)])
    assert (linear[:, 1, 1] > 0).all() and (linear[:, 0, 1] == 0).all() and (linear[:, 1, 0] == 0).all()
    assert 0.35 < (linear[:, 0, 0] > 0).mean() < 0.65


@pytest.mark.parametrize("preset", VIEWS)
def test_views_lie_in_their_window_when_not_turned_out_of_it(preset):
    maker, corner = make(preset, size=40), (70, 90)
    for seed in range(40):
        for matrix in maker.draw((400, 400), corner, seed):
            columns, rows = places_of(matrix, 40)
            middle = rows.mean() - corner[0], columns.mean() - corner[1]
            assert all(0 < place < 60 for place in middle)
            reach = 0.22 * 60 if VIEW_PRESETS[preset].degrees else 0
            for places, first in ((rows, corner[0]), (columns, corner[1])):
                assert first - 0.5 - reach <= places.min() and places.max() <= first + 59.5 + reach


def test_turned_views_reach_out_of_the_image_only_where_it_is_too_small():
    maker = make("aerial", size=40)
    for seed in range(60):
        for matrix in maker.make_views(np.zeros((90, 120, 3), np.uint8), seed)[2]:
            columns, rows = places_of(matrix, 40)
            assert rows.min() >= -0.5 and rows.max() <= 89.5 and columns.min() >= -0.5 and columns.max() <= 119.5


def test_middles_of_neighbouring_windows_lie_within_half_a_window():
    maker, far = make("none", size=40, views_from="neighbours"), []  # whose views are the middles of the windows
    for seed in range(200):
        matrices = maker.make_views(np.zeros((300, 260, 3), np.uint8), seed)[2]
        first, second = (matrix @ (19.5, 19.5, 1) for matrix in matrices)
        far.append(math.dist(first, second))
    assert max(far) <= 30 and 15 < np.mean(far) < 25  # of a disc the mean is two thirds of the radius
    assert np.std(far) > 4


def test_neighbours_have_their_values_changed_each_for_itself_and_show_another_place():
    image = scene()
    for seed in range(5):
        first, second, matrices = make("microscopy", size=40, views_from="neighbours").make_views(image, seed)
        assert not np.array_equal(first, second) and not np.allclose(matrices[0], matrices[1])


def test_the_second_view_shows_part_of_the_first():
    for preset in VIEWS:
        maker, held = make(preset, size=32), []
        for seed in range(100):
            first, second = maker.draw((200, 200), (70, 70), seed)
            place = np.linalg.solve(first[:, :2], second @ (15.5, 15.5, 1) - first[:, 2])
            held.append(((place >= -0.5) & (place <= 31.5)).all())
        assert np.mean(held) > 0.98 or not VIEW_PRESETS[preset].shared
        assert preset == "natural" or VIEW_PRESETS[preset].shared


def test_what_is_needed_is_enough():
    """A view cut from the needed part alone is the view cut from the whole image, reflections and all."""
    for size in ((300, 280), (50, 260), (30, 25)):
        image = scene("float32", height=size[0], width=size[1])
        for views_from in ("crop", "neighbours"):
            maker = make("histology", dtype="float32", size=40, views_from=views_from)
            for seed in range(8):
                views, matrices = cuts(maker, image, seed)
                top, left, height, width = maker.needed(matrices, size)
                assert 0 <= top < top + height <= size[0] and 0 <= left < left + width <= size[1]
                part = image[top : top + height, left : left + width]
                for view, matrix in zip(views, matrices, strict=True):
                    np.testing.assert_array_equal(maker.cut(part, matrix, size, (top, left)), view)


def test_plain_views_are_the_image_itself():
    image = scene()
    first, second, matrices = make("none", size=64).make_views(image, seed=3)
    left, top = matrices[0][:, 2].round().astype(int)
    assert np.array_equal(first, second) and np.array_equal(matrices[0][:, :2], np.eye(2))
    assert np.array_equal(first, image[top : top + 64, left : left + 64])
    assert make("none", size=64, window=0).make_views(image, seed=3)[0].shape == (64, 64, 3)


# ----------------------------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", TOPS)
@pytest.mark.parametrize("preset", VIEWS)
def test_views_keep_type_and_range_repeat_and_differ(preset, dtype, channels):
    image = scene(dtype, channels)
    kept, maker = image.copy(), make(preset, channels=channels, dtype=dtype, size=48)
    changed = []
    for seed in range(12):
        first, second, matrices = maker.make_views(image, seed)
        for view in (first, second):
            assert view.shape == (48, 48, channels) and view.dtype == image.dtype
            assert np.isfinite(view).all() and 0 <= view.min() and view.max() <= TOPS[dtype]
        again = maker.make_views(image, seed)
        assert all(np.array_equal(one, other) for one, other in zip((first, second, matrices), again, strict=True))
        assert np.abs(first.astype(float) - second).mean() > 0.01 * TOPS[dtype], "the two views differ"
        plain = [maker.cut(image, matrix, image.shape[:2]) for matrix in matrices]
        changed += [
            np.abs(view.astype(float) - cut).mean() / TOPS[dtype]
            for view, cut in zip((first, second), plain, strict=True)
        ]
    assert np.mean(np.array(changed) > 0.01) > 0.6, "values change visibly"
    assert np.median(changed) < 0.25, "and do not drown the picture"
    assert np.array_equal(image, kept)
    assert len({maker.make_views(image, seed)[0].tobytes() for seed in range(12)}) == 12


@pytest.mark.parametrize("preset", [name for name in VIEWS if name != "natural"])
def test_what_is_there_can_still_be_seen(preset):
    """Light and dark stay where they are: nothing is inverted, drowned in noise or blurred away."""
    image, maker, alike = scene(), make(preset, size=64), []
    for seed in range(60):
        views, matrices = cuts(maker, image, seed)
        for cut, view in zip(views, maker.change(views, seed), strict=True):
            alike.append(np.corrcoef(cut.mean(axis=2).ravel(), view.mean(axis=2).ravel())[0, 1])
    assert min(alike) > 0.5 and np.median(alike) > 0.9


def test_colours_change_little_where_they_say_much():
    """A stained nucleus keeps its hue within some degrees under microscopy; natural views turn it further."""
    image = np.full((80, 80, 3), (150, 60, 140), np.uint8)
    reach = {}
    for preset in ("microscopy", "natural"):
        maker, angles = make(preset, size=32), []
        for seed in range(80):
            red, green, blue = maker.make_views(image, seed)[0].reshape(-1, 3).mean(axis=0)
            if np.ptp([red, green, blue]) > 5:
                angles.append(math.degrees(math.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue)))
        reach[preset] = np.ptp(angles)
    assert 5 < reach["microscopy"] < 35 < reach["natural"]


@pytest.mark.parametrize("preset", VIEW_PRESETS)
@pytest.mark.parametrize("dtype", TOPS)
def test_constant_images_give_finite_views(preset, dtype):
    for channels in (1, 3, 5):
        for value in (0, TOPS[dtype]):
            image = np.full((60, 50, channels), value, dtype)
            for seed in range(3):
                for view in make(preset, channels=channels, dtype=dtype, size=24).make_views(image, seed)[:2]:
                    assert np.isfinite(view).all() and 0 <= view.min() and view.max() <= TOPS[dtype]


@pytest.mark.parametrize("preset", VIEW_PRESETS)
@pytest.mark.parametrize("options", [{"window": 1.5}, {"window": 0}, {"window": 4, "views_from": "neighbours"}])
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (200, 1), (2, 3), (31, 33)])
def test_images_smaller_than_a_view_are_enlarged_by_reflection(preset, options, size):
    for dtype in TOPS:
        image = scene(dtype, height=size[0], width=size[1])
        for seed in range(2):
            first, second, matrices = make(preset, dtype=dtype, size=32, **options).make_views(image, seed)
            assert first.shape == second.shape == (32, 32, 3) and np.isfinite(matrices).all()


def test_views_of_one_pixel_are_one_pixel_wide():
    first, second, _ = make(size=1).make_views(scene(), seed=0)
    assert first.shape == second.shape == (1, 1, 3)


def test_very_wide_images_are_cut_before_they_are_warped():
    image = np.zeros((40, 40_000, 3), np.uint8)  # OpenCV warps no more than 32,767 columns
    image[:, :, 0] = np.arange(40_000) // 200
    for window in (1.5, 0):
        view, _, matrices = make("none", size=32, window=window).make_views(image, seed=1)
        columns, _ = places_of(matrices[0], 32)
        assert np.abs(view[16, 1:-1, 0] - columns[16, 1:-1] / 200).max() < 3


# ----------------------------------------------------------------------------------------------------------------------
# Options


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"size": 64, "views_from": "sideways"}, ("'sideways'", "expected crop or neighbours")),
        ({"size": 0}, ("views of 0 pixels", "at least 1")),
        ({"size": 64, "window": -1}, ("windows of -1", "0 (the whole image)")),
        ({"size": 64, "window": math.nan}, ("windows of nan", "expected")),
        ({"size": 64, "window": 0.5}, ("0.5 sides of a view is smaller than the view", "expected 1 or more")),
        ({"size": 64, "window": 0, "views_from": "neighbours"}, ("a whole image has no neighbour", "such as 1.5")),
    ],
)
def test_options_that_cannot_be_are_refused(options, parts):
    with pytest.raises(ValueError) as caught:
        ViewOptions(**options)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_an_unknown_preset_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="unknown view preset 'Natural'; expected one of natural, microscopy"):
        make("Natural")


def test_the_preset_for_unknown_images():
    rgb = ("red", "green", "blue")
    assert auto_views(rgb) == "natural"
    for channels in (("grey",), ("grey", "nir", "depth"), (*rgb, "nir"), [f"band{k}" for k in range(1, 6)]):
        assert auto_views(channels) == "multispectral"


# ----------------------------------------------------------------------------------------------------------------------
# The benchmark


def test_views_are_timed_beside_lightlys(capsys):
    benchmark.main(["--only", "aerial", "multispectral", "--images", "2", "--size", "32", "--source", "64"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["preset", "format", "window", "slowest", "whole", "lightly", "ratio"]
    rows = [line.split() for line in lines[2:]]
    assert [row[:3] for row in rows] == [
        [preset, *kind] for preset in ("aerial", "multispectral") for kind in (("uint8", "x3"), ("uint16", "x5"))
    ]
    assert all(float(number) > 0 for row in rows for number in row[3:6])
    assert [row[6:] == ["-", "-"] for row in rows] == [False, True, False, True]


def test_what_is_timed_are_whole_views():
    picture = benchmark.draw(64, "uint16", 5, seed=0)
    first, second, matrices = benchmark.ours("multispectral", picture, 32, 1.5)(0)
    assert first.shape == second.shape == (5, 32, 32) and first.dtype == np.float32 and matrices.shape == (2, 2, 3)
    assert benchmark.lightlys(picture, 32) is None
    theirs = benchmark.lightlys(benchmark.draw(64, "uint8", 3, seed=0), 32)(0)
    assert len(theirs) == 2 and theirs[0].shape == (3, 32, 32)
