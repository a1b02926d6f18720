"""Scores of objects in label maps, matched one to one, and of thin structures by their centre lines."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

OBJECT_IOUS = tuple(range(50, 100, 5))  # percent


@dataclass
class ObjectScores:
    """How well predicted objects match true ones; add (+) those of several images before summary().

    Attributes:
        images: how many images.
        matched: matched pairs with IoU >= 0.50, 0.55, ... 0.95, (10,).
        matched_iou: sum of the IoU of the pairs matched at 0.5.
        predicted_diameters, true_diameters: equivalent diameters, 2 sqrt(area / pi), in pixels, one per object.
        count_errors: |predicted - true| objects per image, summed.
    """

    images: int
    matched: np.ndarray
    matched_iou: float
    predicted_diameters: np.ndarray
    true_diameters: np.ndarray
    count_errors: int

    def __add__(self, other: "ObjectScores") -> "ObjectScores":
        return ObjectScores(
            self.images + other.images,
            self.matched + other.matched,
            self.matched_iou + other.matched_iou,
            np.concatenate([self.predicted_diameters, other.predicted_diameters]),
            np.concatenate([self.true_diameters, other.true_diameters]),
            self.count_errors + other.count_errors,
        )

    def summary(self) -> dict[str, Any]:
        """JSON-able scores, None = undefined.

        Per IoU limit f1, precision, recall and ap = matched / (predicted + true - matched) in `at`; f1 and ap also
        as means over the limits. A side without objects scores 0 against a side with some.
        """
        num_predicted, num_true = len(self.predicted_diameters), len(self.true_diameters)
        any_object = num_predicted + num_true > 0
        at = []
        for limit, matched in zip(OBJECT_IOUS, self.matched.tolist(), strict=True):
            row = {
                "f1": 2 * matched / max(1, num_predicted + num_true),
                "precision": matched / max(1, num_predicted),
                "recall": matched / max(1, num_true),
                "ap": matched / max(1, num_predicted + num_true - matched),
            }
            at.append({"iou": limit / 100, **(row if any_object else dict.fromkeys(row))})
        both = min(num_predicted, num_true) > 0
        mean_true = float(self.true_diameters.mean()) if num_true else None
        mean_predicted = float(self.predicted_diameters.mean()) if num_predicted else None
        return {
            "images": self.images,
            "predicted": num_predicted,
            "true": num_true,
            "count_error": (num_predicted - num_true) / num_true if num_true else None,
            "count_error_per_image": self.count_errors / self.images if self.images else None,
            "f1": sum(row["f1"] for row in at) / len(at) if any_object else None,
            "ap": sum(row["ap"] for row in at) / len(at) if any_object else None,
            "mean_matched_iou": float(self.matched_iou / self.matched[0]) if self.matched[0] else None,
            "at": at,
            "mean_diameter_predicted": mean_predicted,
            "mean_diameter_true": mean_true,
            "mean_diameter_error": mean_predicted / mean_true - 1 if mean_predicted and mean_true else None,
            "diameter_distance": _wasserstein(self.predicted_diameters, self.true_diameters) if both else None,
        }


def object_scores(pred_labels: np.ndarray, true_labels: np.ndarray) -> ObjectScores:
    """Compare two label maps of one image object by object.

    Objects are matched one to one, best IoU first. From IoU 0.5 on this is a largest matching: above it an object
    overlaps one other that much, and at exactly 0.5 two equal halves compete for their whole at most.

    Args:
        pred_labels: (H, W) integers, 0 is background, every other value is one object.
        true_labels: the same.

    Raises:
        ValueError: shapes differ, or the values are not whole or negative.
    """
    if pred_labels.shape != true_labels.shape or pred_labels.ndim != 2:
        raise ValueError(f"label maps are {pred_labels.shape} and {true_labels.shape}, expected the same (H, W)")
    pred, pred_areas = _number_objects(pred_labels)
    true, true_areas = _number_objects(true_labels)
    both = (pred > 0) & (true > 0)
    pairs, overlaps = np.unique(true[both] * (len(pred_areas) + 1) + pred[both], return_counts=True)
    true_ids, pred_ids = np.divmod(pairs, len(pred_areas) + 1)
    unions = true_areas[true_ids - 1] + pred_areas[pred_ids - 1] - overlaps
    matched, matched_iou = np.zeros(len(OBJECT_IOUS), np.int64), 0.0
    used_true, used_pred = set(), set()
    candidates = np.flatnonzero(2 * overlaps >= unions)
    for i in candidates[np.argsort(-overlaps[candidates] / unions[candidates], kind="stable")]:
        if true_ids[i] not in used_true and pred_ids[i] not in used_pred:
            used_true.add(true_ids[i])
            used_pred.add(pred_ids[i])
            matched += [100 * overlaps[i] >= limit * unions[i] for limit in OBJECT_IOUS]
            matched_iou += float(overlaps[i] / unions[i])
    return ObjectScores(
        images=1,
        matched=matched,
        matched_iou=matched_iou,
        predicted_diameters=np.sqrt(pred_areas * (4 / math.pi)),
        true_diameters=np.sqrt(true_areas * (4 / math.pi)),
        count_errors=abs(len(pred_areas) - len(true_areas)),
    )


def _number_objects(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Renumber labels as 1, 2, ... without gaps, (H, W) int64, and give their areas in pixels."""
    if not np.issubdtype(labels.dtype, np.integer) or (labels.size and labels.min() < 0):
        raise ValueError(f"label map is {labels.dtype}, expected whole numbers from 0 (background)")
    if labels.size and labels.max() < 4 * labels.size + 65_536:
        areas = np.bincount(labels.reshape(-1))
        values = np.flatnonzero(areas)
        values = values[values > 0]
        numbers = np.zeros(len(areas), np.int64)
        numbers[values] = np.arange(1, len(values) + 1)
        return numbers[labels], areas[values]
    values, inverse, areas = np.unique(labels, return_inverse=True, return_counts=True)
    first = int(values.size > 0 and values[0] == 0)  # the background, if there is any
    return inverse.reshape(labels.shape) + 1 - first, areas[first:]


def _wasserstein(a: np.ndarray, b: np.ndarray) -> float:
    """The area between the cumulative distributions of two samples, in their unit."""
    a, b = np.sort(a), np.sort(b)
    values = np.sort(np.concatenate([a, b]))
    share_a = np.searchsorted(a, values[:-1], side="right") / len(a)
    share_b = np.searchsorted(b, values[:-1], side="right") / len(b)
    return float((np.abs(share_a - share_b) * np.diff(values)).sum())


def cldice(pred: np.ndarray, true: np.ndarray, keep: np.ndarray | None = None) -> float | None:
    """The centreline Dice of two binary masks of thin structures: harmonic mean of two shares.

    They are the share of the predicted skeleton inside the true mask and of the true skeleton inside the predicted
    one. Use whole images: cutting into tiles changes skeletons.

    Args:
        pred: (H, W), non-zero is the structure.
        true: the same.
        keep: (H, W) bool, False pixels are removed from both first; None keeps all.

    Returns:
        In [0, 1]; None when both masks are empty.

    Reference: Shit et al. 2021, https://arxiv.org/abs/2003.07311
    """
    from skimage.morphology import skeletonize

    if pred.shape != true.shape or pred.ndim != 2:
        raise ValueError(f"masks are {pred.shape} and {true.shape}, expected the same (H, W)")
    pred, true = pred != 0, true != 0
    if keep is not None:
        pred, true = pred & keep, true & keep
    if not pred.any() and not true.any():
        return None
    pred_line, true_line = skeletonize(pred), skeletonize(true)
    precision = (pred_line & true).sum() / max(1, pred_line.sum())
    sensitivity = (true_line & pred).sum() / max(1, true_line.sum())
    return float(2 * precision * sensitivity / (precision + sensitivity)) if precision + sensitivity else 0.0
