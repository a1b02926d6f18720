import math

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage.measure import perimeter_crofton, regionprops

import regions
from regions import COLUMNS, find_objects, label_bands, object_table
from tables import format_csv

HEIGHTS = (1, 2, 3, 7, 1000)


def random_classes(seed, num_classes, height, width):
    """Speckle, blobs or wide areas, with up to num_classes classes besides the background."""
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.standard_normal((height, width)), rng.choice([0, 0.7, 2]))
    place = noise.ravel().argsort().argsort().reshape(noise.shape) / noise.size
    filled = rng.uniform(0.2, 0.9)
    return np.where(place < filled, 1 + place / filled * num_classes, 0).astype(np.uint8).clip(0, num_classes)


def cut(classes, height):
    """The bands of an array, as often as one asks."""
    return lambda: ((top, classes[top : top + height]) for top in range(0, len(classes), height))


def slow_labels(classes):
    """Label a whole map class by class and number the components by their first pixel."""
    combined, count = np.zeros(classes.shape, np.int64), 0
    for value in range(1, int(classes.max()) + 1):
        labels, found = ndimage.label(classes == value)
        combined[labels > 0] = labels[labels > 0] + count
        count += found
    ids, first = np.unique(combined, return_index=True)
    rank = np.zeros(count + 1, np.int64)
    order = ids[np.argsort(first)]
    rank[order[order > 0]] = np.arange(1, count + 1)
    return rank[combined]


def collect(bands, height, width):
    """Paste bands into an array and check that they follow each other."""
    result, expected = np.zeros((height, width), np.uint32), 0
    for top, band in bands:
        assert top == expected
        result[top : top + len(band)] = band
        expected += len(band)
    assert expected == height
    return result


maps = st.builds(random_classes, st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 40), st.integers(1, 40))


@settings(max_examples=60, deadline=None)
@given(maps, st.sampled_from(HEIGHTS), st.sampled_from((1, 50, 1 << 22)))
def test_numbers_and_measures_equal_the_whole_map_labelled_at_once(classes, height, strip_pixels):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regions, "STRIP_PIXELS", strip_pixels)
        objects = find_objects(cut(classes, height))
        labels = collect(label_bands(cut(classes, height), objects), *classes.shape)
    expected = slow_labels(classes)
    np.testing.assert_array_equal(labels, expected)
    assert len(objects) == expected.max(initial=0)
    for index, prop in enumerate(regionprops(expected)):
        top, left, bottom, right = prop.bbox
        y, x = prop.centroid
        box = (objects.box_left, objects.box_top, objects.box_width, objects.box_height)
        assert [int(values[index]) for values in box] == [left, top, right - left, bottom - top]
        assert objects.area[index] == prop.area
        assert objects.class_index[index] == classes[expected == index + 1][0]
        assert (objects.centroid_x[index], objects.centroid_y[index]) == pytest.approx((x, y), abs=1e-9)
        assert objects.equivalent_diameter[index] == pytest.approx(prop.equivalent_diameter_area)
        alone = perimeter_crofton(expected == index + 1, directions=4)
        assert objects.perimeter[index] == pytest.approx(alone, abs=1e-9)


@pytest.mark.parametrize("height", HEIGHTS)
def test_components_that_meet_far_below_a_seam_are_one_object(height):
    comb = np.zeros((9, 9), np.uint8)
    comb[:, ::2] = 1
    comb[-1] = 1
    comb[0, 4:] = 1
    ring = np.pad(np.pad(np.zeros((5, 5), np.uint8), 1, constant_values=2), 1)
    for classes, count in ((comb, 1), (ring, 1), (np.eye(8, dtype=np.uint8), 8)):
        objects = find_objects(cut(classes, height))
        assert len(objects) == count
        np.testing.assert_array_equal(
            collect(label_bands(cut(classes, height), objects), *classes.shape), slow_labels(classes)
        )


def test_the_number_of_threads_changes_nothing():
    classes = random_classes(3, 1, 600, 700)
    before, seen = cv2.getNumThreads(), []
    try:
        for threads in (1, 2, 4):
            cv2.setNumThreads(threads)
            objects = find_objects(cut(classes, 300))
            seen.append(collect(label_bands(cut(classes, 300), objects), *classes.shape))
    finally:
        cv2.setNumThreads(before)
    np.testing.assert_array_equal(seen[0], slow_labels(classes))
    np.testing.assert_array_equal(seen[1], seen[0])
    np.testing.assert_array_equal(seen[2], seen[0])


@settings(max_examples=30, deadline=None)
@given(maps, st.sampled_from(HEIGHTS), st.integers(0, 100))
@example(np.zeros((3, 4), np.uint8), 2, 0)
def test_keep_drops_objects_and_closes_the_numbers(classes, height, seed):
    objects = find_objects(cut(classes, height))
    kept = np.random.default_rng(seed).random(len(objects)) < 0.5
    some = objects.keep(kept)
    labels = collect(label_bands(cut(classes, height), some), *classes.shape)
    expected = slow_labels(classes)
    numbers = np.flatnonzero(kept) + 1
    np.testing.assert_array_equal(labels > 0, np.isin(expected, numbers))
    np.testing.assert_array_equal(np.unique(labels[labels > 0]), np.arange(1, len(numbers) + 1))
    assert len(some) == len(numbers)
    np.testing.assert_array_equal(np.bincount(labels.ravel(), minlength=len(some) + 1)[1:], some.area)


@settings(max_examples=60, deadline=None)
@given(maps, st.sampled_from(HEIGHTS), st.sampled_from((1, 50, 1 << 22)), st.integers(0, 30))
def test_specks_dropped_as_they_end_leave_what_dropping_them_afterwards_leaves(classes, height, strip_pixels, least):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regions, "STRIP_PIXELS", strip_pixels)
        every = find_objects(cut(classes, height))
        some = find_objects(cut(classes, height), least)
    later = every.keep(every.area >= least)
    np.testing.assert_array_equal(some.measures, later.measures)
    np.testing.assert_array_equal(some.table, later.table)
    np.testing.assert_array_equal(some.counts, np.bincount(every.class_index, minlength=256))
    np.testing.assert_array_equal(some.areas[1:], np.bincount(classes.ravel(), minlength=256)[1:])


def test_keep_refuses_an_array_that_is_not_one_bool_for_each_object():
    objects = find_objects(cut(np.eye(3, dtype=np.uint8), 3))
    with pytest.raises(ValueError, match=r"found int64 \(3,\), expected one bool for each of 3 objects"):
        objects.keep(np.array([0, 1, 2]))


def test_bool_bands_and_arrays_that_are_reused_give_the_same():
    classes = random_classes(5, 1, 40, 30)
    buffer = np.zeros((10, 30), np.uint8)

    def reused():
        for top in range(0, 40, 10):
            buffer[:] = classes[top : top + 10]
            yield top, buffer
        buffer[:] = 7

    expected = collect(label_bands(cut(classes, 10), find_objects(cut(classes, 10))), 40, 30)
    for bands in (reused, cut(classes.astype(bool), 10)):
        np.testing.assert_array_equal(collect(label_bands(bands, find_objects(bands)), 40, 30), expected)


def test_no_bands_hold_no_objects():
    objects = find_objects(lambda: [])
    assert len(objects) == 0
    assert list(label_bands(lambda: [], objects)) == []


def test_object_table_is_the_same_in_portions(monkeypatch):
    objects = find_objects(cut(random_classes(3, 2, 60, 60), 7))
    whole = list(object_table(objects, ("background", "cell", "vessel"), mpp=0.3)[1])
    monkeypatch.setattr("regions.TABLE_ROWS", 3)
    assert len(whole) > 10
    assert list(object_table(objects, ("background", "cell", "vessel"), mpp=0.3)[1]) == whole
    assert [row["id"] for row in whole] == list(range(1, len(whole) + 1))


def test_object_table_speaks_of_pixels_and_of_micrometres():
    classes = np.zeros((6, 8), np.uint8)
    classes[1:4, 2:6] = 2
    classes[5, 0] = 1
    objects = find_objects(cut(classes, 2))
    names = ("background", "cell", "vessel")
    columns, made = object_table(objects, names)
    rows = list(made)
    assert columns == COLUMNS
    assert [row["class"] for row in rows] == ["vessel", "cell"]
    assert rows[0] | {"perimeter": 0} == {
        "id": 1,
        "class": "vessel",
        "area": 12,
        "centroid_x": 3.5,
        "centroid_y": 2.0,
        "box_left": 2,
        "box_top": 1,
        "box_width": 4,
        "box_height": 3,
        "equivalent_diameter": pytest.approx(2 * math.sqrt(12 / math.pi)),
        "perimeter": 0,
    }
    columns, made = object_table(objects, names, mpp=0.5)
    rows = list(made)
    assert columns == (*COLUMNS, "area_um2", "equivalent_diameter_um", "perimeter_um")
    assert rows[0]["area_um2"] == 3.0
    assert rows[0]["perimeter_um"] == rows[0]["perimeter"] / 2
    assert format_csv(columns, rows, "dot").splitlines()[2].startswith("2;cell;1;0.0000;5.0000;0;5;1;1;1.1284;")


@pytest.mark.parametrize(
    ("bands", "message"),
    [
        ([(0, (4, 5)), (5, (4, 5))], "a band starts at row 5, expected row 4, where the last one ended"),
        ([(0, (4, 5)), (3, (4, 5))], "a band starts at row 3, expected row 4"),
        ([(2, (4, 5))], "a band starts at row 2, expected row 0"),
        ([(0, (4, 5)), (4, (4, 6))], "the band at row 4 is 6 pixels wide, expected 5"),
        ([(0, (4, 5, 3))], r"the band at row 0 is uint8 \(4, 5, 3\), expected class indices"),
        ([(0, (0, 5))], r"the band at row 0 is uint8 \(0, 5\), expected .* at least one pixel"),
    ],
)
def test_bands_that_do_not_fit_are_refused(bands, message):
    with pytest.raises(ValueError, match=message):
        find_objects(lambda: [(top, np.ones(shape, np.uint8)) for top, shape in bands])


def test_probabilities_in_place_of_classes_are_refused():
    with pytest.raises(ValueError, match="the band at row 0 is float32 .* convert it first"):
        find_objects(lambda: [(0, np.ones((2, 2), np.float32))])


@pytest.mark.parametrize(
    ("again", "message"),
    [
        (lambda classes: cut(classes, 3), "rows at 0 came as .*0, 3, .*expected .*0, 4, "),
        (
            lambda classes: cut(classes[:8], 4),
            "2 strips of rows came, expected 3 as in the first pass: some are missing",
        ),
        (lambda classes: cut(np.tile(classes, (2, 1)), 4), "rows at 12 came as .* expected None"),
        (
            lambda classes: cut(classes * 0, 4),
            "rows at 0 came as .*0, 4, 0.* the bands must be the very same each time",
        ),
    ],
)
def test_other_bands_in_the_second_pass_are_refused(again, message):
    classes = np.eye(12, dtype=np.uint8)
    objects = find_objects(cut(classes, 4))
    with pytest.raises(ValueError, match=message):
        list(label_bands(again(classes), objects))
