import cv2
import numpy as np
import pytest
from scipy import ndimage
from skimage.morphology import h_maxima

from annotation import basins


def hills(seed, shape=(60, 70)):
    rng = np.random.default_rng(seed)
    return cv2.GaussianBlur(rng.random(shape, np.float32), (0, 0), 2.0) * 100


def slow_climb(heights, mask):
    """Follow the steepest step pixel by pixel; the first of equal ones in the order of basins.NEIGHBOURS."""
    height, width = heights.shape
    summit = np.full(heights.shape, -1)
    for y in range(height):
        for x in range(width):
            if not mask[y, x]:
                continue
            here = (y, x)
            while True:
                best = here
                for down, right in basins.NEIGHBOURS:
                    there = here[0] + down, here[1] + right
                    inside = 0 <= there[0] < height and 0 <= there[1] < width
                    if inside and mask[there] and heights[there] > heights[best]:
                        best = there
                if best == here:
                    break
                here = best
            summit[y, x] = here[0] * width + here[1]
    return summit


def test_every_pixel_belongs_to_the_summit_it_climbs_to():
    heights = hills(1, (25, 30))
    mask = np.random.default_rng(0).random(heights.shape) > 0.2
    labels, summits = basins.climb(heights, mask)
    expected = slow_climb(heights, mask)
    assert np.array_equal(labels > 0, mask)
    assert np.array_equal(summits[labels[mask] - 1], expected[mask])
    assert np.all(np.diff(summits) > 0)


def test_the_cutting_into_chunks_changes_nothing(monkeypatch):
    heights = hills(2)
    mask = heights > np.median(heights)
    whole = basins.climb(heights, mask)
    monkeypatch.setattr(basins, "CHUNK", 17)
    for one, other in zip(whole, basins.climb(heights, mask), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("strip", [basins.STRIP, 70, 500])
def test_passes_are_the_highest_steps_between_basins(monkeypatch, strip):
    monkeypatch.setattr(basins, "STRIP", strip)
    heights = hills(3)
    labels, _ = basins.climb(heights, heights > 45)
    expected = {}
    height, width = heights.shape
    for y in range(height):
        for x in range(width):
            for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
                i, j = y + down, x + right
                if i < height and 0 <= j < width and labels[y, x] != labels[i, j] and labels[y, x] and labels[i, j]:
                    pair = tuple(sorted((int(labels[y, x]), int(labels[i, j]))))
                    expected[pair] = max(expected.get(pair, -1), min(heights[y, x], heights[i, j]))
    first, second, over = basins.find_passes(labels, heights)
    assert dict(zip(zip(first.tolist(), second.tolist(), strict=True), over, strict=True)) == expected
    assert np.all(np.diff(over) <= 0)


@pytest.mark.parametrize("depth", [0.5, 2.0, 8.0])
def test_depth_gives_as_many_parts_as_h_maxima(depth):
    heights = np.round(hills(4), 2).astype(np.float32)
    parts = basins.part_mask(heights, np.ones(heights.shape, bool), neck=1.0, depth=depth)
    count = ndimage.label(h_maxima(heights.astype(np.float64), depth), np.ones((3, 3)))[1]
    assert len(np.unique(parts)) == count


def two_discs(gap, radius=20):
    rows, columns = np.mgrid[:80, :140]
    left = (rows - 40) ** 2 + (columns - 45) ** 2 <= radius**2
    right = (rows - 40) ** 2 + (columns - 45 - gap) ** 2 <= radius**2
    return (left | right).astype(np.uint8)


@pytest.mark.parametrize(("gap", "parts"), [(34, 2), (28, 2), (8, 1)])
def test_discs_part_at_a_neck_and_only_there(gap, parts):
    mask = two_discs(gap)
    heights = cv2.distanceTransform(mask, cv2.DIST_L2, 5)
    labels = basins.part_mask(heights, mask > 0, neck=0.85, depth=0.5)
    assert len(np.unique(labels[mask > 0])) == parts
    if parts == 2:
        middle = 45 + gap / 2
        columns = np.nonzero(mask)[1]
        left = labels[mask > 0] == labels[40, 45]
        assert columns[left].max() <= middle + 1
        assert columns[~left].min() >= middle - 1


def test_a_plateau_is_one_part():
    labels = basins.part_mask(np.ones((9, 11), np.float32), np.ones((9, 11), bool), neck=1.0, depth=0.1)
    assert len(np.unique(labels)) == 1


def test_spacing_keeps_summits_apart_and_no_part_without_owner():
    heights = hills(5)
    mask = np.ones(heights.shape, bool)
    labels = basins.part_by_distance(heights, mask, 8)
    assert labels.min() > 0
    peaks = [np.unravel_index(np.argmax(np.where(labels == k, heights, -1)), heights.shape) for k in np.unique(labels)]
    for i, one in enumerate(peaks):
        for other in peaks[:i]:
            assert max(abs(int(one[0]) - int(other[0])), abs(int(one[1]) - int(other[1]))) > 8
    assert len(peaks) > 5


def test_a_ridge_of_equal_heights_is_one_part():
    mask = np.ones((15, 60), bool)
    heights = np.minimum(np.arange(15), np.arange(15)[::-1]).astype(np.float32)[:, None].repeat(60, axis=1)
    heights[:, 27:34] = 0.5  # a pass, wider than the spacing
    labels = basins.part_by_distance(heights, mask, 5)
    assert len(np.unique(labels)) == 2
    assert len(np.unique(labels[:, :27])) == len(np.unique(labels[:, 34:])) == 1


def test_labels_grow_to_the_nearest_and_keep_to_the_limit():
    labels = np.zeros((20, 30), np.int32)
    labels[10, 5], labels[10, 20] = 7, 3
    limit = np.ones(labels.shape, bool)
    limit[:5] = False
    grown = basins.grow_labels(labels, limit)
    assert not grown[:5].any()
    assert np.all(grown[5:, :12] == 7)
    assert np.all(grown[5:, 14:] == 3)
    assert np.array_equal(basins.grow_labels(np.zeros_like(labels), limit), np.zeros_like(labels))


def test_look_up_is_indexing():
    table = np.arange(100, dtype=np.float32) ** 2
    places = np.random.default_rng(0).integers(0, 100, (300, 400)).astype(np.int32)
    assert np.array_equal(basins.look_up(table, places), table[places])
