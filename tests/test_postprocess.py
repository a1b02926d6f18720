import math
import tracemalloc

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage.morphology import skeletonize

import postprocess
import regions
from postprocess import Filters, add_margins, filter_bands, filter_mask, filter_objects
from regions import find_objects, label_bands

HEIGHTS = (1, 2, 3, 7, 1000)
SQUARE = np.ones((3, 3), bool)


def random_classes(seed, num_classes, height, width):
    """Speckle, blobs or wide areas, with up to num_classes classes besides the background."""
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.standard_normal((height, width)), rng.choice([0, 0.7, 2]))
    place = noise.ravel().argsort().argsort().reshape(noise.shape) / noise.size
    filled = rng.uniform(0.2, 0.9)
    classes = np.where(place < filled, 1 + place / filled * num_classes, 0).clip(0, num_classes)
    if rng.random() < 0.5:  # classes that do not depend on the place, so that some lie apart
        classes = np.where(classes > 0, 1 + np.indices(classes.shape).sum(axis=0) // 12 % num_classes, 0)
    return classes.astype(np.uint8)


def cut(classes, height):
    """The bands of an array, as often as one asks."""
    return lambda: ((top, classes[top : top + height]) for top in range(0, len(classes), height))


def collect(bands, shape):
    """Paste bands into an array and check that they follow each other."""
    result, expected = np.full(shape, 99, np.uint8), 0
    for top, band in bands:
        assert (top, band.dtype, band.shape[1]) == (expected, np.uint8, shape[1])
        result[top : top + len(band)] = band
        expected += len(band)
    assert expected == shape[0]
    return result


def slow_closing(classes, side):
    element = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side)).astype(bool)
    result = classes.copy()
    for value in range(1, int(classes.max()) + 1):
        grown = ndimage.binary_dilation(classes == value, element)
        closed = ndimage.binary_erosion(grown, element, border_value=1)
        result[closed & (result == 0)] = value
    return result


def slow_holes(classes, limit):
    labels, count = ndimage.label(classes == 0, SQUARE)
    edge = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    result = classes.copy()
    for number in range(1, count + 1):
        hole = labels == number
        around = np.unique(classes[ndimage.binary_dilation(hole, SQUARE) & ~hole])
        if number not in edge and len(around) == 1 and (limit < 0 or hole.sum() <= limit):
            result[hole] = around[0]
    return result


def slow_objects(classes):
    """(class, mask) of each object, sorted by first pixel."""
    found = []
    for value in range(1, int(classes.max(initial=0)) + 1):
        labels, count = ndimage.label(classes == value)
        found += [(value, labels == number) for number in range(1, count + 1)]
    return sorted(found, key=lambda item: int(item[1].ravel().argmax()))


def slow_filter(classes, filters):
    if filters.closing:
        classes = slow_closing(classes, filters.closing)
    if filters.fill_holes:
        classes = slow_holes(classes, filters.fill_holes)
    objects = slow_objects(classes)
    areas = {value: [mask.sum() for other, mask in objects if other == value] for value in range(1, 256)}
    if filters.relative_area:
        objects = [(v, m) for v, m in objects if m.sum() >= np.mean(areas[v]) / filters.relative_area]
    objects = [(v, m) for v, m in objects if m.sum() >= filters.min_area]
    if filters.min_length:
        objects = [(v, m) for v, m in objects if skeletonize(m).sum() >= filters.min_length]
    if filters.keep_largest:
        objects = [
            max((item for item in objects if item[0] == v), key=lambda item: item[1].sum())
            for v in {v for v, _ in objects}
        ]
    result = np.zeros_like(classes)
    for value, mask in objects:
        result[mask] = value
    return result


maps = st.builds(random_classes, st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 30), st.integers(1, 30))
filters = st.builds(
    Filters,
    closing=st.sampled_from((0, 0, 1, 3, 5, 7)),
    fill_holes=st.sampled_from((0, 1, 4, -1, math.inf)),
    min_area=st.sampled_from((0, 0, 2, 9)),
    relative_area=st.sampled_from((0.0, 0.0, 0.5, 1.0, 2.0, 4.0)),
    min_length=st.sampled_from((0, 0, 2, 4, 8)),
    keep_largest=st.booleans(),
)


@settings(max_examples=150, deadline=None)
@given(maps, filters, st.sampled_from(HEIGHTS), st.sampled_from((1, 50, 1 << 22)))
def test_filters_on_bands_equal_plain_ones_on_the_whole_map(classes, chosen, height, strip_pixels):
    expected = slow_filter(classes, chosen)
    np.testing.assert_array_equal(filter_mask(classes, chosen), expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regions, "STRIP_PIXELS", strip_pixels)
        bands = filter_bands(cut(classes, height), chosen)
        np.testing.assert_array_equal(collect(bands(), classes.shape), expected)
        np.testing.assert_array_equal(collect(bands(), classes.shape), expected)


@settings(max_examples=60, deadline=None)
@given(maps, filters, st.sampled_from(HEIGHTS))
def test_filtered_objects_are_the_objects_of_the_filtered_map(classes, chosen, height):
    filtered, objects = filter_objects(cut(classes, height), chosen)
    expected = find_objects(cut(slow_filter(classes, chosen), 1000))
    np.testing.assert_array_equal(objects.measures, expected.measures)
    labels = np.concatenate([band for _, band in label_bands(filtered, objects)])
    whole = np.concatenate([band for _, band in label_bands(cut(slow_filter(classes, chosen), 1000), expected)])
    np.testing.assert_array_equal(labels, whole)


@pytest.mark.parametrize("name", ["closing", "fill_holes", "min_area", "relative_area", "min_length", "keep_largest"])
def test_each_filter_alone_changes_something_and_equals_the_plain_one(name):
    chosen = Filters(**{name: {"closing": 5, "relative_area": 2.0, "keep_largest": True}.get(name, 6)})
    changed = 0
    for seed in range(12):
        classes = random_classes(seed, 1 + seed % 3, 40, 33)
        expected = slow_filter(classes, chosen)
        np.testing.assert_array_equal(collect(filter_bands(cut(classes, 4), chosen)(), classes.shape), expected)
        changed += (expected != classes).any()
    assert changed >= 4


def test_closing_leaves_other_classes_and_gives_conflicts_to_the_lower_one():
    classes = np.array([[2, 0, 2, 1, 3, 1, 1, 0, 1]] * 5, np.uint8)
    classes[2, 1] = 1
    classes[:2, 3:] = [2, 0, 1, 1, 0, 2]
    closed = filter_mask(classes, Filters(closing=3))
    assert (closed[classes > 0] == classes[classes > 0]).all()
    np.testing.assert_array_equal(closed, slow_closing(classes, 3))
    classes = np.random.default_rng(4).choice([0, 0, 1, 2], (30, 30)).astype(np.uint8)
    alone = [filter_mask(classes == value, Filters(closing=5)) for value in (1, 2)]
    conflict = alone[0] & alone[1] & (classes == 0)
    assert conflict.sum() > 10
    assert (filter_mask(classes, Filters(closing=5))[conflict] == 1).all()


def test_a_hole_is_filled_only_inside_one_object():
    ring = np.pad(np.zeros((2, 3), np.uint8), 1, constant_values=1)
    assert filter_mask(ring, Filters(fill_holes=6)).all()
    assert not filter_mask(ring, Filters(fill_holes=5))[1:3, 1:4].any()
    leak = ring.copy()
    leak[0, 0] = 0  # 4-connected objects do not hold the background back at a corner
    np.testing.assert_array_equal(filter_mask(leak, Filters(fill_holes=-1)), leak)
    mixed = ring.copy()
    mixed[0, 0] = 2
    np.testing.assert_array_equal(filter_mask(mixed, Filters(fill_holes=-1)), mixed)
    island = np.pad(np.zeros((5, 5), np.uint8), 1, constant_values=3)
    island[3, 3] = 3
    assert (filter_mask(island, Filters(fill_holes=-1)) == 3).all()
    island[3, 3] = 4
    np.testing.assert_array_equal(filter_mask(island, Filters(fill_holes=-1)), island)


@pytest.mark.parametrize("height", [1, 5, 64])
def test_long_objects_are_measured_part_by_part(height, monkeypatch):
    winding = np.zeros((64, 40), np.uint8)
    for row in range(0, 64, 8):
        winding[row : row + 3, 1:39] = 1
        winding[row : row + 8, (1 if row % 16 else 36) : (4 if row % 16 else 39)] = 1
    winding[10, 20] = 0
    length = int(skeletonize(winding > 0).sum())
    assert length > 250
    monkeypatch.setattr(postprocess, "MARGIN", 6)
    monkeypatch.setattr(postprocess, "HELD_PIXELS", 26 * 40)
    assert filter_mask(winding, Filters(min_length=length)).any()
    for least, stays in ((length, True), (length + 1, False), (10, True)):
        kept = collect(filter_bands(cut(winding, height), Filters(min_length=least))(), winding.shape)
        np.testing.assert_array_equal(kept, winding if stays else 0 * winding)


def test_rows_wait_for_their_margin_and_no_longer():
    classes = random_classes(1, 1, 50, 4)
    read = 0

    def counted():
        nonlocal read
        for top, band in cut(classes, 3)():
            read = top + len(band)
            yield top, band

    for top, window, rows in add_margins(counted(), 5):
        first, last = max(0, top - 5), min(50, top + 3 + 5)
        np.testing.assert_array_equal(window, classes[first:last])
        np.testing.assert_array_equal(window[rows], classes[top : top + 3])
        assert read <= last + 2


def test_memory_does_not_grow_with_the_height():
    tile = np.kron(random_classes(7, 3, 32, 32), np.ones((8, 8), np.uint8))
    chosen = Filters(closing=3, fill_holes=30, min_area=80, relative_area=4, min_length=12, keep_largest=False)

    def peak(height):
        tracemalloc.start()
        filtered, objects = filter_objects(lambda: ((top, tile) for top in range(0, height, len(tile))), chosen)
        for _ in label_bands(filtered, objects):
            pass
        for _ in filter_bands(filtered, chosen)():
            pass
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    peak(512)  # what is imported on the way is not counted
    short, tall = peak(1024), peak(6144)
    assert tall < 1.25 * short, f"{tall} bytes for 6144 rows, {short} for 1024"


def test_no_filter_hands_the_bands_on():
    bands = cut(random_classes(1, 2, 9, 9), 2)
    assert filter_bands(bands, Filters()) is bands


def test_masks_of_bools_stay_bools_and_inputs_stay_as_they_are():
    mask = random_classes(2, 1, 30, 30) > 0
    before, chosen = mask.copy(), Filters(closing=3, fill_holes=-1, min_area=5)
    result = filter_mask(mask, chosen)
    assert result.dtype == bool
    np.testing.assert_array_equal(result, slow_filter(mask.astype(np.uint8), chosen) > 0)
    np.testing.assert_array_equal(mask, before)


def test_class_255_and_arrays_in_any_memory_order_are_taken():
    classes = random_classes(5, 2, 40, 30)
    classes[classes == 2] = 255
    chosen = Filters(closing=3, fill_holes=-1, min_area=4, min_length=3)
    expected = slow_filter(classes, chosen)
    assert (expected == 255).any() and (expected != classes).any()
    for ordered in (classes, np.asfortranarray(classes), np.repeat(classes, 2, axis=1)[:, ::2]):
        np.testing.assert_array_equal(filter_mask(ordered, chosen), expected)
        np.testing.assert_array_equal(collect(filter_bands(cut(ordered, 7), chosen)(), classes.shape), expected)


def test_a_map_without_objects_stays_empty():
    chosen = Filters(closing=3, fill_holes=-1, min_area=2, relative_area=2, min_length=3, keep_largest=True)
    assert not filter_mask(np.zeros((5, 6), np.uint8), chosen).any()
    assert filter_mask(np.ones((5, 6), np.uint8), chosen).all()


def test_the_length_of_a_line_is_its_pixels():
    line = np.zeros((5, 20), np.uint8)
    line[2, 3:15] = 1
    assert filter_mask(line, Filters(min_length=12)).any()
    assert not filter_mask(line, Filters(min_length=13)).any()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"closing": 4}, "closing is 4, expected 0 or an odd side in pixels such as 3"),
        ({"closing": -1}, "closing is -1"),
        ({"fill_holes": -2}, "fill_holes is -2, expected an area in pixels, 0 for none or -1 for all"),
        ({"fill_holes": math.nan}, "fill_holes is nan"),
        ({"min_area": -1}, "min_area is -1, expected 0 for none or a number above it"),
        ({"relative_area": -0.5}, "relative_area is -0.5"),
        ({"relative_area": math.nan}, "relative_area is nan"),
        ({"min_length": math.inf}, "min_length is inf"),
    ],
)
def test_filters_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Filters(**values)


@pytest.mark.parametrize("chosen", [Filters(closing=3), Filters(fill_holes=-1), Filters(min_area=2)])
def test_bands_with_gaps_or_other_widths_are_refused(chosen):
    ones = np.ones((4, 5), np.uint8)
    for second, message in (((5, ones), "a band starts at row 5, expected row 4"), ((4, ones[:, 1:]), "4 pixels wide")):
        with pytest.raises(ValueError, match=message):
            list(filter_bands(lambda second=second: [(0, ones), second], chosen)())


@pytest.mark.parametrize("chosen", [Filters(fill_holes=-1), Filters(min_area=2)])
def test_bands_that_change_between_passes_are_refused(chosen):
    classes = np.eye(12, dtype=np.uint8)
    heights = iter((4, 3))
    with pytest.raises(ValueError, match="the bands must be the very same each time"):
        list(filter_bands(lambda: cut(classes, next(heights))(), chosen)())
