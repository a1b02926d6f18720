import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk
from torchmetrics.classification import BinaryJaccardIndex, MulticlassF1Score, MulticlassJaccardIndex

import metrics
from metrics import BINS, IGNORE_INDEX, Scorer, confusion_matrix

NAMES = ("background", "object")
seeds = st.integers(0, 10_000)


def random_image(seed, num_classes, size=(17, 13), ignored=0.2):
    """Probabilities (K, H, W), binary (1, H, W), that know something about the mask."""
    rng = np.random.default_rng(seed)
    mask = rng.integers(0, num_classes, size).astype(np.uint8)
    if num_classes == 2:
        probs = np.clip(0.3 + 0.4 * mask + rng.normal(0, 0.3, size), 0, 1)[None]
    else:
        logits = rng.normal(0, 1, (num_classes, *size)) + 1.5 * (np.arange(num_classes)[:, None, None] == mask)
        probs = np.exp(logits) / np.exp(logits).sum(axis=0)
    mask[rng.random(size) < ignored] = IGNORE_INDEX
    return probs.astype(np.float32), mask


def binary_scorer(seeds_of_images, **settings_):
    scorer = Scorer(NAMES, binary=True, **settings_)
    for seed in seeds_of_images:
        scorer.update(f"image{seed}", *random_image(seed, 2))
    return scorer


def one_image(pred, mask, num_classes=2, **settings_):
    scorer = Scorer([str(k) for k in range(num_classes)], binary=num_classes == 2, **settings_)
    row = scorer.update_pred("a", np.array([pred], np.uint8), np.array([mask], np.uint8))
    return row, scorer.summary()


# Pixel scores.


def test_numbers_by_hand():
    probs = np.array([[[0.9, 0.8, 0.5, 0.49, 0.1, 1.0]]], np.float32)
    mask = np.array([[1, 0, 1, 1, 0, IGNORE_INDEX]], np.uint8)
    scorer = Scorer(NAMES, binary=True)
    row = scorer.update("a", probs, mask)  # 2 hits, 1 false alarm, 1 miss, 1 right rejection
    expected = {"iou": 2 / 4, "dice": 4 / 6, "precision": 2 / 3, "recall": 2 / 3, "accuracy": 3 / 5}
    assert row == pytest.approx(expected)
    summary = scorer.summary()
    assert {key: summary[key] for key in expected} == pytest.approx(expected)
    assert summary["confusion"] == [[1, 1], [1, 2]]
    assert summary["miou"] == pytest.approx((1 / 3 + 2 / 4) / 2)
    assert summary["miou_no_background"] == pytest.approx(2 / 4)
    assert summary["auc"] == pytest.approx(4 / 6)  # of the 6 pairs 0.5 < 0.8 and 0.49 < 0.8 are wrong
    assert summary["pixels"] == 5


def test_counts_are_summed_before_dividing():
    scorer = Scorer(NAMES, binary=True)
    scorer.update_pred("large", np.ones((10, 10), bool), np.ones((10, 10), np.uint8))
    scorer.update_pred("small", np.ones((1, 10), bool), np.zeros((1, 10), np.uint8))
    summary = scorer.summary()
    assert summary["iou"] == pytest.approx(100 / 110)
    assert summary["per_image_mean"]["iou"] == pytest.approx(0.5)


@settings(max_examples=20, deadline=None)
@given(seeds, st.sampled_from([3, 5]))
def test_several_classes_equal_torchmetrics_and_sklearn(seed, num_classes):
    scorer = Scorer([str(k) for k in range(num_classes)], binary=False)
    kwargs = {"num_classes": num_classes, "ignore_index": IGNORE_INDEX, "average": "none"}
    jaccard, f1 = MulticlassJaccardIndex(**kwargs), MulticlassF1Score(**kwargs)
    truth, decided = [], []
    for part in range(3):
        probs, mask = random_image(seed + part, num_classes)
        scorer.update(str(part), probs, mask)
        for reference in (jaccard, f1):
            reference.update(torch.from_numpy(probs)[None], torch.from_numpy(mask).long()[None])
        keep = mask != IGNORE_INDEX
        truth.append(mask[keep])
        decided.append(probs.argmax(axis=0)[keep])
    truth, decided = np.concatenate(truth), np.concatenate(decided)
    summary = scorer.summary(resamples=10)
    per_class = {key: [row[key] for row in summary["per_class"]] for key in metrics.SCORES}
    assert per_class["iou"] == pytest.approx(jaccard.compute().tolist(), abs=1e-6)
    assert per_class["dice"] == pytest.approx(f1.compute().tolist(), abs=1e-6)
    precision, recall, _, support = sk.precision_recall_fscore_support(truth, decided, zero_division=0)
    assert per_class["precision"] == pytest.approx(precision.tolist())
    assert per_class["recall"] == pytest.approx(recall.tolist())
    assert [row["true_pixels"] for row in summary["per_class"]] == support.tolist()
    accuracy = [((truth == k) == (decided == k)).mean() for k in range(num_classes)]
    assert per_class["accuracy"] == pytest.approx(accuracy)
    assert summary["accuracy"] == pytest.approx((truth == decided).mean())
    assert summary["confusion"] == sk.confusion_matrix(truth, decided, labels=range(num_classes)).tolist()
    assert summary["iou"] == summary["miou"] == pytest.approx(np.mean(per_class["iou"]))
    assert summary["miou_no_background"] == pytest.approx(np.mean(per_class["iou"][1:]))


@settings(max_examples=20, deadline=None)
@given(seeds, st.sampled_from([0.2, 0.5, 0.7]))
def test_binary_equals_torchmetrics(seed, threshold):
    scorer = binary_scorer([seed, seed + 1], threshold=threshold)
    jaccard = BinaryJaccardIndex(threshold=threshold, ignore_index=IGNORE_INDEX)
    for part in (seed, seed + 1):
        probs, mask = random_image(part, 2)
        jaccard.update(torch.from_numpy(probs), torch.from_numpy(mask).long()[None])
    assert scorer.summary(resamples=10)["iou"] == pytest.approx(float(jaccard.compute()), abs=1e-6)


@pytest.mark.parametrize("num_classes", [2, 3, 254])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_confusion_matrix_equals_a_slow_loop(num_classes, dtype, monkeypatch):
    monkeypatch.setattr(metrics, "_CHUNK", 50)  # several chunks
    rng = np.random.default_rng(0)
    pred = rng.integers(0, num_classes, (20, 15)).astype(dtype)
    mask = rng.integers(0, num_classes, (20, 15)).astype(dtype)
    mask[rng.random(mask.shape) < 0.3] = IGNORE_INDEX
    expected = np.zeros((num_classes, num_classes), int)
    for true, chosen in zip(mask.flat, pred.flat, strict=True):
        if true != IGNORE_INDEX:
            expected[true, chosen] += 1
    assert (confusion_matrix(pred, mask, num_classes) == expected).all()
    assert (confusion_matrix(pred.T, mask.T, num_classes) == expected).all()


def test_largest_equals_argmax_with_ties(monkeypatch):
    monkeypatch.setattr(metrics, "_CHUNK", 400)
    probs = np.random.default_rng(0).integers(0, 4, (6, 30, 20)).astype(np.float32)
    pred = metrics._largest("a", probs, np.zeros((30, 20), np.uint8))
    assert (pred == probs.argmax(axis=0)).all()


@pytest.mark.parametrize(("empty", "score"), [("skip", None), ("one", 1.0), ("zero", 0.0)])
def test_rule_for_nothing_to_find_and_nothing_found(empty, score):
    row, summary = one_image([0, 0, 0], [0, 0, 0], empty=empty)
    for result in (row, summary):
        assert [result[key] for key in ("iou", "dice", "precision", "recall")] == [score] * 4
        assert result["accuracy"] == 1.0
    assert summary["miou"] == (1.0 if score is None else (1 + score) / 2)
    assert summary["empty"] == empty
    _, summary = one_image([0, 0, 1], [0, 0, 1], 3, empty=empty)  # class 2 does not occur
    assert summary["miou"] == pytest.approx(1.0 if score is None else (2 + score) / 3)


@pytest.mark.parametrize("empty", ["skip", "one", "zero"])
def test_one_side_without_pixels_is_zero_whatever_the_rule(empty):
    for pred, mask in (([1, 0], [0, 0]), ([0, 0], [1, 0])):
        row, _ = one_image(pred, mask, empty=empty)
        assert [row[key] for key in ("iou", "dice", "precision", "recall")] == [0.0] * 4
        row, _ = one_image([1, 0], [IGNORE_INDEX] * 2, empty=empty)
        assert set(row.values()) == {None}


def test_nothing_scored_gives_none_and_json():
    for scorer in (Scorer(NAMES, binary=True), Scorer(["a", "b", "c"], binary=False)):
        summary = json.loads(json.dumps(scorer.summary(), allow_nan=False))
        assert summary["iou"] is None
        assert summary["interval"] is None
        assert summary["auc"] is None
        assert summary["images"] == 0


def test_first_class_may_be_an_ordinary_one():
    summary = Scorer(["sky", "road"], binary=False, has_background=False).summary()
    assert summary["miou_no_background"] is None


def test_rows_and_means_over_images():
    scorer = binary_scorer(range(4))
    rows = scorer.rows()
    assert [row["name"] for row in rows] == ["image0", "image1", "image2", "image3"]
    assert rows[2] == {"name": "image2", **Scorer(NAMES, binary=True).update("x", *random_image(2, 2))}
    mean = np.mean([row["iou"] for row in rows])
    assert scorer.summary()["per_image_mean"]["iou"] == pytest.approx(mean)


# Thresholds.


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_area_and_average_precision_equal_sklearn(seed):
    probs, mask = random_image(seed, 2)
    probs = np.round(probs * 50) / 50  # with equal values
    scorer = Scorer(NAMES, binary=True)
    scorer.update("a", probs, mask)
    keep = mask != IGNORE_INDEX
    binned = np.floor(probs[0][keep].astype(np.float64) * BINS)
    summary = scorer.summary()
    assert summary["auc"] == pytest.approx(sk.roc_auc_score(mask[keep], binned))
    assert summary["average_precision"] == pytest.approx(sk.average_precision_score(mask[keep], binned))
    assert summary["auc"] == pytest.approx(sk.roc_auc_score(mask[keep], probs[0][keep]), abs=1e-4)


@settings(max_examples=10, deadline=None)
@given(seeds)
def test_sweep_and_best_threshold_reproduce_the_counts(seed):
    images = [seed, seed + 1]
    scorer = binary_scorer(images)
    summary = scorer.summary(resamples=10)
    best = json.loads(json.dumps(summary["best"]))
    for row in [*summary["sweep"][::4], best]:
        again = binary_scorer(images, threshold=row["threshold"]).summary(resamples=10)
        assert {key: again[key] for key in metrics.SCORES} == {key: row[key] for key in metrics.SCORES}
    pairs = [random_image(image, 2) for image in images]
    probs = np.concatenate([probs.ravel() for probs, _ in pairs])
    mask = np.concatenate([mask.ravel() for _, mask in pairs])
    ious = []
    for threshold in np.unique(np.floor(probs[mask != IGNORE_INDEX].astype(np.float64) * BINS)) / BINS:
        pred = probs >= np.float32(threshold)
        ious.append((pred & (mask == 1)).sum() / ((pred & (mask == 0)).sum() + (mask == 1).sum()))
    assert best["iou"] == pytest.approx(max(ious), abs=1e-12)  # the best of all edges of bins
    assert best["dice"] >= max(row["dice"] for row in summary["sweep"])


def test_bins_agree_with_float32_comparison_at_their_edges():
    edges = np.concatenate([np.arange(BINS + 1), np.arange(1, 2000)]) / BINS
    values = np.concatenate([edges, np.nextafter(np.float32(edges), 0), np.nextafter(np.float32(edges), np.float32(2))])
    values = np.clip(values.astype(np.float32), 0, 1)
    for k in (0, 1, 2, 3, 3277, 32767, 32768, 45875, 65534, 65535):
        scorer = Scorer(NAMES, binary=True, threshold=k / BINS)
        scorer.update("a", values[None, None], np.ones((1, values.size), np.uint8))
        assert metrics._at_least(scorer.histogram)[1, k] == scorer.confusion[1, 1], k


def test_best_threshold_is_the_nearest_to_one_half_of_equals():
    scorer = Scorer(NAMES, binary=True)
    scorer.update("a", np.array([[[0.0, 1.0, 1.0]]], np.float32), np.array([[0, 1, 1]], np.uint8))
    assert scorer.best_threshold() == 0.5
    scorer = Scorer(NAMES, binary=True)
    scorer.update("a", np.array([[[0.125, 0.25, 0.25]]], np.float32), np.array([[0, 1, 1]], np.uint8))
    assert scorer.best_threshold() == 0.25


def test_without_objects_or_probabilities_there_is_no_best_threshold():
    scorer = Scorer(NAMES, binary=True)
    scorer.update("a", np.array([[[0.3, 0.7]]], np.float32), np.array([[0, 0]], np.uint8))
    assert scorer.best_threshold() is None
    assert scorer.summary()["auc"] is None
    scorer = binary_scorer([1])
    scorer.update_pred("b", np.array([[1]]), np.array([[1]]))  # this image has no probabilities
    assert scorer.best_threshold() is None
    assert scorer.summary()["sweep"] == []


def test_sweep_thresholds_are_the_next_on_the_grid():
    rows = binary_scorer([0]).sweep([0.0, 0.3, 0.5, 1.0])
    assert [row["threshold"] for row in rows] == [0.0, 19661 / BINS, 0.5, 1 - 1 / BINS]
    assert rows[0]["recall"] == 1.0


@pytest.mark.filterwarnings("error")
def test_rounding_outside_the_range_and_nan_on_ignored_pixels_are_accepted():
    probs = np.array([[[1 + 1e-6, -1e-6, np.nan]]], np.float32)
    scorer = Scorer(NAMES, binary=True)
    scorer.update("a", probs, np.array([[1, 0, IGNORE_INDEX]], np.uint8))
    assert scorer.histogram[1, BINS - 1] == scorer.histogram[0, 0] == 1
    assert scorer.histogram.sum() == 2
    scorer = Scorer(["a", "b", "c"], binary=False)
    probs = np.array([[[0.2, np.nan]], [[0.5, 0]], [[0.3, 0]]], np.float32)
    assert scorer.update("a", probs, np.array([[1, IGNORE_INDEX]], np.uint8))["iou"] == 1.0


# Several scorers, bootstrap.


def test_merged_scorers_equal_one():
    whole = binary_scorer(range(7))
    parts = binary_scorer([4, 1, 6])
    parts += pickle.loads(pickle.dumps(binary_scorer([0, 2, 3, 5])))
    assert parts.summary() == whole.summary()
    assert sorted(parts.rows(), key=lambda row: row["name"]) == whole.rows()


def test_merge_refuses_other_settings():
    with pytest.raises(ValueError, match="can't merge scores: threshold is 0.5 here and 0.4 there"):
        binary_scorer([0]).merge(binary_scorer([1], threshold=0.4))


@pytest.mark.parametrize("num_classes", [2, 3])
def test_interval_equals_a_slow_bootstrap(num_classes):
    scorer = Scorer([str(k) for k in range(num_classes)], binary=num_classes == 2)
    images = []
    for seed in range(12):
        probs, mask = random_image(seed, num_classes, size=(3 + seed, 5))
        scorer.update(f"{seed:02}", probs, mask)
        images.append(confusion_matrix(probs.argmax(axis=0) if num_classes > 2 else probs[0] >= 0.5, mask, num_classes))
    rng = np.random.default_rng(1)
    values = []
    for _ in range(4000):
        total = sum(images[i] for i in rng.integers(0, 12, 12))
        ious = total.diagonal() / (total.sum(axis=0) + total.sum(axis=1) - total.diagonal())
        values.append(ious[1] if num_classes == 2 else ious.mean())
    interval = scorer.interval(resamples=4000)
    low, high = np.percentile(values, (2.5, 97.5))
    assert interval["low"] == pytest.approx(low, abs=0.004)
    assert interval["high"] == pytest.approx(high, abs=0.004)
    assert high - low > 0.03
    assert interval["low"] < scorer.summary()["iou"] < interval["high"]
    assert scorer.interval(seed=3) == scorer.interval(seed=3) != scorer.interval(seed=4)


# Bad input.


def test_bad_settings():
    with pytest.raises(ValueError, match="empty rule is 'drop', expected one of skip, one, zero"):
        Scorer(NAMES, binary=True, empty="drop")
    with pytest.raises(ValueError, match="threshold is 128, expected 0 to 1"):
        Scorer(NAMES, binary=True, threshold=128)
    with pytest.raises(ValueError, match="two names, background and object, found"):
        Scorer(["a"], binary=True)
    with pytest.raises(ValueError, match="found 1 class names"):
        Scorer(["a"], binary=False)


@pytest.mark.parametrize(
    ("num_classes", "probs", "mask", "message"),
    [
        (2, np.zeros((1, 2, 3)), np.zeros((3, 2), np.uint8), r"b07: probabilities are \(1, 2, 3\) and the mask is"),
        (2, np.zeros((2, 2, 2)), np.zeros((2, 2), np.uint8), r"expected \(1, H, W\)"),
        (2, np.zeros((1, 0, 0)), np.zeros((0, 0), np.uint8), "at least one pixel"),
        (2, np.full((1, 2, 2), np.nan), np.zeros((2, 2), np.uint8), "b07: 4 probabilities are NaN.*row 0, column 0"),
        (2, np.full((1, 2, 2), 255.0), np.zeros((2, 2), np.uint8), r"outside \[0, 1\]"),
        (2, np.zeros((1, 2, 2)), np.full((2, 2), 64, np.uint8), "b07: mask holds class 64, expected 0 to 1 or 255"),
        (3, np.full((3, 2, 2), np.nan), np.zeros((2, 2), np.uint8), "b07: 4 probabilities are NaN"),
        (3, np.zeros((3, 2, 2)), np.full((2, 2), 3, np.uint8), "b07: mask holds class 3"),
        (3, np.zeros((3, 2, 2)), np.full((2, 2), -1), "mask holds -1 to -1"),
        (3, np.zeros((3, 2, 2)), np.zeros((2, 2)), "mask is float64, expected class indices"),
    ],
)
def test_bad_images_are_named_and_leave_nothing_counted(num_classes, probs, mask, message):
    scorer = Scorer([str(k) for k in range(num_classes)], binary=num_classes == 2)
    with pytest.raises(ValueError, match=message):
        scorer.update("b07", probs.astype(np.float32), mask)
    assert scorer.summary()["images"] == scorer.confusion.sum() == scorer.histogram.sum() == 0


def test_bad_predictions():
    with pytest.raises(ValueError, match="b07: prediction holds class 2, expected 0 to 1"):
        Scorer(NAMES, binary=True).update_pred("b07", np.full((2, 2), 2), np.zeros((2, 2), np.uint8))
    with pytest.raises(ValueError, match="differ in shape"):
        Scorer(NAMES, binary=True).update_pred("b07", np.zeros((2, 3), bool), np.zeros((2, 2), np.uint8))
