"""Instances against slow references: scipy, skimage and loops over objects."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage
from skimage.measure import regionprops
from skimage.morphology import convex_hull_image

from annotation.instances import (
    Instances,
    clean_instances,
    empty_instances,
    gap_mask,
    number_instances,
    object_rows,
    paste_masks,
)

label_maps = arrays(np.int32, st.tuples(st.integers(1, 12), st.integers(1, 12)), elements=st.integers(-1, 4))


def discs(height, width, centres, radius):
    """Labels 1.. of discs, later ones over earlier ones."""
    y, x = np.mgrid[:height, :width]
    labels = np.zeros((height, width), np.int32)
    for number, (row, column) in enumerate(centres, start=1):
        labels[(y - row) ** 2 + (x - column) ** 2 <= radius**2] = number
    return labels


def crowd(seed, count=60, side=160):
    """Touching objects of many shapes: nearest-centre cells, cut to discs, as Instances."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    centres, radii = rng.integers(0, side, (count, 2)), rng.uniform(2, 18, count)
    distances = np.stack([np.hypot(y - row, x - column) for row, column in centres])
    nearest = distances.argmin(axis=0)
    labels = np.where(distances.min(axis=0) < radii[nearest], nearest + 1, 0).astype(np.int32)
    return number_instances(labels, np.linspace(0, 1, count), [f"e{k}" for k in range(count)])


def pieces_of(mask, connectivity):
    structure = ndimage.generate_binary_structure(2, {4: 1, 8: 2}[connectivity])
    return ndimage.label(mask, structure)


def number_slowly(labels, pieces):
    """(first place, value, mask) of the objects that remain, in the order of their numbers."""
    objects = []
    for value in np.unique(labels[labels > 0]):
        components, count = pieces_of(labels == value, 4)
        masks = [components == k for k in range(1, count + 1)]
        if pieces == "largest":
            masks = [max(masks, key=lambda mask: (mask.sum(), -np.flatnonzero(mask)[0]))]
        objects += [(np.flatnonzero(mask)[0], value, mask) for mask in masks]
    return sorted(objects, key=lambda entry: entry[0])


@settings(max_examples=300, deadline=None)
@given(label_maps, st.sampled_from(["largest", "all"]))
def test_numbering_is_that_of_a_loop_over_values(labels, pieces):
    scores = np.array([0.1, 0.2, 0.3, 0.4], np.float32)
    found = number_instances(labels, scores, ["a", "b", "c", "d"], pieces=pieces)
    expected = number_slowly(labels, pieces)
    assert len(found) == len(expected) == found.labels.max(initial=0)
    assert found.labels.dtype == np.int32 and found.labels.shape == labels.shape
    for number, (_, value, mask) in enumerate(expected, start=1):
        np.testing.assert_array_equal(found.labels == number, mask)
        assert found.scores[number - 1] == scores[value - 1]
        assert found.engines[number - 1] == "abcd"[value - 1]


def test_numbering_takes_huge_values_with_one_score_and_clips_scores():
    labels = np.array([[0, 4_000_000_000, 7]], np.uint32)
    found = number_instances(labels, 1.7, "hand")
    assert found.labels.tolist() == [[0, 1, 2]]
    assert found.scores.tolist() == [1, 1] and found.engines == ("hand", "hand")


def test_numbering_is_idempotent():
    found = crowd(3)
    again = number_instances(found.labels, found.scores, found.engines)
    np.testing.assert_array_equal(again.labels, found.labels)
    np.testing.assert_array_equal(again.scores, found.scores)
    assert again.engines == found.engines


@pytest.mark.parametrize("labels", [np.zeros((2, 2)), np.zeros((2, 2, 2), np.int32)])
def test_numbering_refuses_what_is_no_label_map(labels):
    with pytest.raises(ValueError, match="expected whole numbers"):
        number_instances(labels, 1.0, "x")


def test_numbering_names_the_label_without_score():
    with pytest.raises(ValueError, match="label 3 was found but 2 scores"):
        number_instances(np.array([[3]]), np.ones(2, np.float32), "x")
    with pytest.raises(ValueError, match="label 3 was found but 1 engines"):
        number_instances(np.array([[3]]), 1.0, ["x"])


def test_instances_refuse_what_does_not_fit_together():
    with pytest.raises(ValueError, match="expected \\(H, W\\) as int32"):
        Instances(np.zeros((2, 2), np.int64), np.zeros(0, np.float32), ())
    with pytest.raises(ValueError, match="expected one float32 for each"):
        Instances(np.zeros((2, 2), np.int32), np.zeros(1, np.float32), ())


def test_empty_instances_have_no_rows_and_no_mask():
    found = empty_instances(3, 4)
    assert len(found) == 0 and object_rows(found, np.zeros((3, 4, 1), np.uint8)) == []
    assert gap_mask(found.labels, 2).tolist() == [[0] * 4] * 3
    assert len(clean_instances(found, min_area=3, fill_holes=-1, border="drop")) == 0


# ---- rules about single objects ----


def clean_slowly(found, min_area, max_area, fill_holes, border):
    """Masks of what remains, in order."""
    masks = []
    for number in range(1, len(found) + 1):
        mask = found.labels == number
        components, count = pieces_of(found.labels == 0, 8)
        for hole in range(1, count + 1):
            inside = components == hole
            frame = np.pad(inside, 1)
            around = ndimage.binary_dilation(frame)[1:-1, 1:-1] & ~inside
            on_frame = inside[0].any() or inside[-1].any() or inside[:, 0].any() or inside[:, -1].any()
            limit = found.labels.size if fill_holes < 0 else fill_holes
            if not on_frame and (found.labels[around] == number).all() and inside.sum() <= limit:
                mask = mask | inside
        on_frame = mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any()
        if min_area <= mask.sum() <= max_area and not (border == "drop" and on_frame):
            masks.append(mask)
    return masks


@settings(max_examples=200, deadline=None)
@given(
    arrays(np.int32, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.sampled_from([0, 1, 1, 1, 2])),
    st.integers(0, 4),
    st.integers(5, 90),
    st.integers(-1, 3),
    st.sampled_from(["keep", "drop"]),
)
def test_cleaning_is_that_of_a_loop_over_objects(labels, min_area, max_area, fill_holes, border):
    found = number_instances(labels, 0.5, "x", pieces="all")
    cleaned = clean_instances(found, min_area=min_area, max_area=max_area, fill_holes=fill_holes, border=border)
    expected = clean_slowly(found, min_area, max_area, fill_holes, border)
    assert len(cleaned) == len(expected)
    for number, mask in enumerate(expected, start=1):
        np.testing.assert_array_equal(cleaned.labels == number, mask)


def test_a_hole_shared_by_two_objects_stays():
    labels = np.ones((6, 8), np.int32)
    labels[:, 4:] = 2
    labels[3, 3:5] = 0
    labels[1, 1] = 0
    cleaned = clean_instances(number_instances(labels, 1.0, "x"), fill_holes=-1)
    assert cleaned.labels[1, 1] == 1 and cleaned.labels[3, 3] == cleaned.labels[3, 4] == 0


def test_cleaning_keeps_scores_beside_their_objects():
    found = crowd(1)
    areas = np.bincount(found.labels.ravel())[1:]
    limit = int(np.median(areas))
    cleaned = clean_instances(found, min_area=limit)
    assert 0 < len(cleaned) < len(found)
    np.testing.assert_array_equal(cleaned.scores, found.scores[areas >= limit])
    assert cleaned.engines == tuple(np.array(found.engines)[areas >= limit])


# ---- overlapping masks ----


def square(left, top, side):
    return ((left, top), np.ones((side, side), bool))


def test_the_higher_score_keeps_contested_pixels():
    found = paste_masks([square(0, 0, 6), square(4, 0, 6)], np.array([0.4, 0.9]), 8, 12, "sam")
    assert len(found) == 2
    assert np.bincount(found.labels.ravel())[1:].tolist() == [24, 36]
    assert found.scores.tolist() == pytest.approx([0.4, 0.9]) and found.engines == ("sam", "sam")


def test_two_overlapping_discs_stay_two_objects():
    y, x = np.mgrid[:21, :21]
    disc = (y - 10) ** 2 + (x - 10) ** 2 <= 100
    found = paste_masks([((5, 5), disc), ((19, 5), disc)], np.array([0.8, 0.7]), 32, 48, "sam")
    assert len(found) == 2
    assert pieces_of(gap_mask(found.labels, 1), 8)[1] == 2


def test_a_mask_mostly_under_better_ones_is_their_duplicate():
    masks, scores = [square(0, 0, 10), square(1, 1, 10), square(9, 9, 10)], np.array([0.9, 0.8, 0.7])
    assert paste_masks(masks, scores, 20, 20, "x").scores.tolist() == pytest.approx([0.9, 0.7])
    assert len(paste_masks(masks, scores, 20, 20, "x", max_overlap=0.9)) == 3


def test_order_by_size_lets_small_masks_lie_on_large_ones():
    masks, scores = [square(0, 0, 10), square(3, 3, 3)], np.array([0.9, 0.1])
    assert np.bincount(paste_masks(masks, scores, 10, 10, "x", order="small").labels.ravel())[1:].tolist() == [91, 9]
    assert len(paste_masks(masks, scores, 10, 10, "x", order="large")) == 1
    assert len(paste_masks(masks, scores, 10, 10, "x")) == 1


def test_pieces_cut_off_by_a_better_mask_go():
    bar = ((0, 2), np.ones((2, 12), bool))
    found = paste_masks([bar, ((4, 0), np.ones((6, 2), bool))], np.array([0.5, 0.9]), 6, 12, "x")
    assert np.bincount(found.labels.ravel())[1:].tolist() == [12, 12]
    assert (found.labels[2:4, :4] == 0).all()


def test_masks_outside_the_picture_are_cut_or_dropped():
    masks = [square(-3, -2, 5), square(9, 9, 5), square(-9, 0, 4), square(40, 40, 3), ((0, 5), np.zeros((2, 2), bool))]
    found = paste_masks(masks, np.ones(5), 10, 10, "x")
    assert np.bincount(found.labels.ravel())[1:].tolist() == [6, 1]


def test_paste_needs_a_score_for_each_mask():
    with pytest.raises(ValueError, match="1 masks came with 2 scores"):
        paste_masks([square(0, 0, 2)], np.ones(2), 4, 4, "x")
    assert len(paste_masks([], np.ones(0), 4, 4, "x")) == 0


# ---- measures ----


@pytest.mark.parametrize("seed", range(4))
def test_rows_are_those_of_regionprops(seed):
    found = crowd(seed)
    image = np.random.default_rng(seed).integers(0, 256, (*found.labels.shape, 3), np.uint8)
    rows = object_rows(found, image)
    references = regionprops(found.labels, image)
    assert len(rows) == len(references) == len(found)
    for row, props in zip(rows, references, strict=True):
        assert row["id"] == props.label and row["area"] == props.area
        assert (row["centroid_y"], row["centroid_x"]) == pytest.approx(props.centroid, rel=1e-5)
        top, left, bottom, right = props.bbox
        assert [row[f"box_{side}"] for side in ("left", "top", "width", "height")] == [
            left,
            top,
            right - left,
            bottom - top,
        ]
        assert row["equivalent_diameter"] == pytest.approx(props.equivalent_diameter_area, rel=1e-5)
        assert row["ellipse_major"] == pytest.approx(props.axis_major_length, rel=1e-5)
        assert row["ellipse_minor"] == pytest.approx(props.axis_minor_length, rel=1e-5, abs=1e-6)
        if props.axis_major_length > 1.001 * props.axis_minor_length:
            # theirs is the angle with the axis of rows, counter-clockwise
            apart = (row["ellipse_angle"] - np.degrees(props.orientation) - 90) % 180
            assert min(apart, 180 - apart) < 0.01
        hull = convex_hull_image(props.image, offset_coordinates=False) if props.area > 2 else props.image
        if props.image.any(axis=0).sum() > 1 and props.image.any(axis=1).sum() > 1:
            assert row["solidity"] == pytest.approx(props.area / hull.sum(), rel=1e-5)
        if props.area > 60:
            assert 0 <= row["solidity"] - props.solidity < 2 / np.sqrt(props.area)  # their hull is half a pixel wider
        assert row["mean_intensity"] == pytest.approx(np.mean(props.intensity_mean), rel=1e-5)
        assert row["score"] == pytest.approx(found.scores[props.label - 1]) and row["engine"].startswith("e")


@pytest.mark.parametrize(("step", "angle"), [((0, 1), 0), ((-1, 1), 45), ((1, 0), 90), ((1, 1), 135)])
def test_angle_turns_counter_clockwise_on_the_screen(step, angle):
    labels = np.zeros((40, 40), np.int32)
    for k in range(-10, 11):
        row, column = 20 + k * step[0], 20 + k * step[1]
        labels[row - 1 : row + 2, column - 1 : column + 2] = 1
    (row,) = object_rows(number_instances(labels, 1.0, "x"), np.zeros((40, 40, 1), np.uint8))
    assert row["ellipse_angle"] == pytest.approx(angle, abs=1e-3)


def test_lines_points_and_squares_are_convex():
    labels = np.zeros((12, 12), np.int32)
    labels[0, 0], labels[2, 1:9], labels[4:11, 1], labels[5:9, 4:8] = 1, 2, 3, 4
    rows = object_rows(number_instances(labels, 1.0, "x"), np.zeros((12, 12, 1), np.uint8))
    assert [row["solidity"] for row in rows] == [1, 1, 1, 1]
    assert [row["ellipse_angle"] for row in rows] == [0, 0, 90, 0]


def test_mean_intensity_leaves_pixels_out_that_are_not_finite():
    labels = np.array([[1, 1, 0, 2, 2]], np.int32)
    image = np.array([[[2.0], [np.nan], [9], [np.nan], [np.inf]]], np.float32)
    first, second = object_rows(number_instances(labels, 1.0, "x"), image)
    assert first["mean_intensity"] == 2 and second["mean_intensity"] is None


def test_mean_intensity_of_deep_pictures_keeps_its_digits():
    image = np.random.default_rng(0).integers(0, 65536, (50, 3000, 4), np.uint16)
    (row,) = object_rows(number_instances(np.ones((50, 3000), np.int32), 1.0, "x"), image)
    assert row["mean_intensity"] == pytest.approx(image.mean(), rel=1e-5)


def test_moments_far_from_the_origin_keep_their_digits():
    labels = np.zeros((60, 30000), np.int32)
    labels[40:50, 29970:29990] = 1
    (row,) = object_rows(number_instances(labels, 1.0, "x"), np.zeros((60, 30000, 1), np.uint8))
    assert row["ellipse_major"] == pytest.approx(4 * np.sqrt(399 / 12), rel=1e-6)
    assert row["ellipse_minor"] == pytest.approx(4 * np.sqrt(99 / 12), rel=1e-6)


# ---- gaps ----


@pytest.mark.parametrize("gap", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_every_object_is_one_piece_of_the_mask_and_apart(seed, gap):
    found = crowd(seed, count=120)
    mask = gap_mask(found.labels, gap)
    assert mask.dtype == np.uint8 and set(np.unique(mask)) == {0, 255}
    assert not mask[found.labels == 0].any()
    components, count = pieces_of(mask, 8)
    assert count == pieces_of(mask, 4)[1]
    owners = [np.unique(found.labels[components == k]) for k in range(1, count + 1)]
    assert all(len(owner) == 1 for owner in owners)
    assert sorted(int(owner[0]) for owner in owners) == list(range(1, len(found) + 1))


def test_the_gap_is_as_wide_as_asked_for():
    labels = np.ones((10, 40), np.int32)
    labels[:, 24:] = 2
    for gap in range(1, 6):
        row = gap_mask(labels, gap)[5]
        assert (row == 0).sum() == gap
        assert (row[:24] == 0).sum() == (gap + 1) // 2  # the larger gives way


def test_objects_far_from_others_stay_as_they_are():
    labels = discs(60, 60, [(15, 15), (40, 40)], 8)
    np.testing.assert_array_equal(gap_mask(labels, 3) > 0, labels > 0)
    np.testing.assert_array_equal(gap_mask(crowd(0).labels, 0) > 0, crowd(0).labels > 0)


def test_small_objects_among_large_ones_do_not_vanish():
    labels = np.ones((30, 30), np.int32)
    labels[:, 15:] = 2
    labels[10, 14:16], labels[20, 10] = 3, 4
    found = number_instances(labels, 1.0, "x")
    for gap in (1, 2, 5, 8):
        mask = gap_mask(found.labels, gap)
        assert set(found.labels[mask > 0]) == {1, 2, 3, 4}
        assert pieces_of(mask, 8)[1] == 4


@settings(max_examples=200, deadline=None)
@given(label_maps, st.integers(0, 4))
def test_no_object_ever_vanishes(labels, gap):
    found = number_instances(labels, 1.0, "x", pieces="all")
    assert len(np.unique(found.labels[gap_mask(found.labels, gap) > 0])) == len(found)


def test_more_objects_than_16_bits_hold_are_parted_too():
    labels = np.arange(1, 1 + 260 * 260, dtype=np.int32).reshape(260, 260).repeat(2, axis=0).repeat(2, axis=1)
    mask = gap_mask(labels, 1)
    assert pieces_of(mask, 8)[1] == len(np.unique(labels[mask > 0])) == 260 * 260
