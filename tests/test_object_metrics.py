import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from scipy.stats import wasserstein_distance

from object_metrics import OBJECT_IOUS, _wasserstein, cldice, object_scores

seeds = st.integers(0, 10_000)


def random_labels(seed, num_objects, size=24):
    """Overlapping squares with gaps in their numbers."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((size, size), np.int32)
    for number in rng.permutation(40)[:num_objects] + 1:
        top, left = rng.integers(0, size - 3, 2)
        height, width = rng.integers(2, 7, 2)
        labels[top : top + height, left : left + width] = number
    return labels


def slow_matches(pred, true, limit):
    """Largest one-to-one matching among pairs with enough overlap, by the Hungarian method."""
    preds, trues = (np.unique(labels[labels > 0]) for labels in (pred, true))
    good = np.zeros((len(preds), len(trues)))
    for i, a in enumerate(preds):
        for j, b in enumerate(trues):
            good[i, j] = ((pred == a) & (true == b)).sum() * 100 >= limit * ((pred == a) | (true == b)).sum()
    return int(good[linear_sum_assignment(-good)].sum()), len(preds), len(trues)


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(0, 8))
def test_object_scores_equal_a_slow_matching(seed, num_objects):
    true = random_labels(seed, num_objects)
    pred = np.roll(np.where(true % 7 == 3, 0, true), seed % 3, axis=1)
    pred[:4] = random_labels(seed + 1, 3)[:4]
    summary = object_scores(pred, true).summary()
    for row, limit in zip(summary["at"], OBJECT_IOUS, strict=True):
        matched, num_pred, num_true = slow_matches(pred, true, limit)
        assert (summary["predicted"], summary["true"]) == (num_pred, num_true)
        if num_pred + num_true:
            assert row["f1"] == pytest.approx(2 * matched / (num_pred + num_true))
            assert row["ap"] == pytest.approx(matched / (num_pred + num_true - matched))


def test_two_halves_of_one_object_match_once():
    true = np.ones((2, 4), np.uint8)
    pred = np.array([[1, 1, 2, 2]] * 2)
    for a, b in ((pred, true), (true, pred)):
        summary = object_scores(a, b).summary()
        assert summary["at"][0]["f1"] == pytest.approx(2 / 3)  # one pair of IoU exactly 0.5
        assert summary["at"][1]["f1"] == 0
        assert summary["mean_matched_iou"] == 0.5


def test_object_sizes_by_hand():
    true = np.zeros((20, 20), np.uint16)
    true[:4, :4], true[10:16, 10:16] = 1, 2
    pred = np.zeros((20, 20), np.uint16)
    pred[:4, :4], pred[10:16, 10:13] = 9, 5
    summary = object_scores(pred, true).summary()
    diameters = [2 * math.sqrt(area / math.pi) for area in (16, 36, 16, 18)]
    assert summary["mean_diameter_true"] == pytest.approx(sum(diameters[:2]) / 2)
    assert summary["mean_diameter_error"] == pytest.approx(sum(diameters[2:]) / sum(diameters[:2]) - 1)
    assert summary["diameter_distance"] == pytest.approx((diameters[1] - diameters[3]) / 2)
    assert summary["count_error"] == 0
    assert summary["f1"] == pytest.approx((1 + 9 * 0.5) / 10)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=20), st.lists(st.floats(0, 100), min_size=1, max_size=20))
def test_wasserstein_equals_scipy(a, b):
    assert _wasserstein(np.array(a), np.array(b)) == pytest.approx(wasserstein_distance(a, b), abs=1e-9)


def test_object_scores_add_up_over_images():
    pairs = [(random_labels(seed, 5), random_labels(seed + 50, 6)) for seed in range(3)]
    pairs.append((random_labels(9, 4), random_labels(9, 4)))
    total = object_scores(*pairs[0])
    for pair in pairs[1:]:
        total = total + object_scores(*pair)
    side_by_side = object_scores(*(numbered_apart([pair[i] for pair in pairs]) for i in (0, 1)))
    got, expected = total.summary(), side_by_side.summary()
    assert got["images"] == 4
    assert got["count_error_per_image"] == pytest.approx(
        np.mean([abs(len(np.unique(a)) - len(np.unique(b))) for a, b in pairs])
    )
    for ours, theirs in zip(got.pop("at"), expected.pop("at"), strict=True):
        assert ours == theirs
    for key in expected.keys() - {"images", "count_error_per_image"}:
        assert got[key] == pytest.approx(expected[key]), key


def numbered_apart(maps):
    return np.concatenate([np.where(labels > 0, labels + 1000 * i, 0) for i, labels in enumerate(maps)])


def test_object_numbers_may_be_anything():
    true = random_labels(3, 6)
    pred = np.roll(true, 1, axis=0)
    expected = object_scores(pred, true).summary()
    huge = np.where(pred > 0, pred.astype(np.int64) * 10**12 + 5, 0)
    assert object_scores(huge, true.astype(np.uint8)).summary() == expected
    full = object_scores(np.full((3, 3), 10**12), np.ones((3, 3), np.uint8)).summary()  # no background at all
    assert full["f1"] == 1.0
    assert full["predicted"] == 1


def test_no_objects():
    nothing, something = np.zeros((5, 5), np.uint8), np.ones((5, 5), np.uint8)
    summary = json.loads(json.dumps(object_scores(nothing, nothing).summary(), allow_nan=False))
    assert summary["f1"] is None
    assert object_scores(something, nothing).summary()["f1"] == 0.0
    summary = object_scores(nothing, something).summary()
    assert summary["f1"] == 0.0
    assert summary["count_error"] == -1.0
    assert summary["diameter_distance"] is None


def test_bad_label_maps():
    with pytest.raises(ValueError, match="expected the same"):
        object_scores(np.zeros((2, 2), int), np.zeros((2, 3), int))
    with pytest.raises(ValueError, match="whole numbers"):
        object_scores(np.zeros((2, 2)), np.zeros((2, 2), int))
    with pytest.raises(ValueError, match="whole numbers"):
        object_scores(np.full((2, 2), -1), np.zeros((2, 2), int))


# Thin structures.


def line_mask(rows, columns):
    mask = np.zeros((31, 31), np.uint8)
    mask[slice(*rows), slice(*columns)] = 1
    return mask


def test_cldice_by_hand():
    true = line_mask((10, 11), (0, 20))  # one pixel wide: its own skeleton
    pred = line_mask((10, 11), (0, 10)) + line_mask((25, 26), (0, 5))
    precision, sensitivity = 10 / 15, 10 / 20
    assert cldice(pred, true) == pytest.approx(2 * precision * sensitivity / (precision + sensitivity))
    assert cldice(pred * 255, true.astype(bool)) == cldice(pred, true)
    assert cldice(true, true) == 1.0


def test_cldice_forgives_width_but_not_breaks():
    true = line_mask((10, 15), (2, 29))
    wide = line_mask((9, 16), (1, 30))
    broken = true.copy()
    broken[:, 12:18] = 0
    assert cldice(wide, true) == 1.0
    assert cldice(broken, true) < 0.95


def test_cldice_without_pixels():
    nothing, true = np.zeros((31, 31), np.uint8), line_mask((10, 15), (2, 29))
    assert cldice(nothing, nothing) is None
    assert cldice(nothing, true) == 0.0
    assert cldice(true, nothing) == 0.0
    keep = np.zeros((31, 31), bool)
    assert cldice(true, nothing, keep) is None
    keep[:, :16] = True
    assert cldice(line_mask((10, 15), (2, 16)), true, keep) == 1.0
    with pytest.raises(ValueError, match="expected the same"):
        cldice(nothing, nothing[1:])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_cldice_of_tiny_blobs_is_one(size):
    blob = line_mask((10, 10 + size), (10, 10 + size))
    assert cldice(blob, blob) == 1.0
