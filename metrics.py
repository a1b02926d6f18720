"""Scores of predictions by pixel: counts summed over a set and then divided.

Undefined values are None, never NaN, so that every summary can be written as JSON.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np

IGNORE_INDEX = 255
EMPTY_RULES = ("skip", "one", "zero")
SCORES = ("iou", "dice", "precision", "recall", "accuracy")
BINS = 65_536  # of the object probability: bin k holds k / BINS <= p < (k + 1) / BINS, exact in float32
SWEEP = tuple(round(0.05 * step, 2) for step in range(1, 20))
_CHUNK = 1 << 20  # pixels counted at a time, so that temporaries stay small
_TOLERANCE = 1e-5  # how far outside [0, 1] rounding may put a blended probability


def scores_from_counts(counts: np.ndarray, empty: str = "skip") -> dict[str, np.ndarray]:
    """Score each class; NaN = undefined.

    Args:
        counts: true positives, false positives, false negatives, (..., K, 3), K being all classes: each pixel is
            in exactly one class of the truth.
        empty: what a class without pixels in both truth and prediction scores: "skip" (NaN), "one" or "zero".
            Without any counted pixel everything is NaN. Accuracy needs no rule.

    Returns:
        iou, dice, precision, recall, accuracy, each (..., K). Precision is 0 when nothing was predicted though
        there is something to find, recall is 0 when something was predicted though there is nothing to find.
    """
    tp, fp, fn = np.moveaxis(counts.astype(np.float64), -1, 0)
    total = (tp + fn).sum(axis=-1, keepdims=True)
    when_empty = {"skip": np.nan, "one": 1.0, "zero": 0.0}[empty]
    is_empty = (tp + fp + fn) == 0

    def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
        value = np.where(is_empty, when_empty, part / np.maximum(whole, 1))
        return np.where(total == 0, np.nan, value)

    return {
        "iou": ratio(tp, tp + fp + fn),
        "dice": ratio(2 * tp, 2 * tp + fp + fn),
        "precision": ratio(tp, tp + fp),
        "recall": ratio(tp, tp + fn),
        "accuracy": np.where(total == 0, np.nan, (total - fp - fn) / np.maximum(total, 1)),
    }


def confusion_matrix(pred: np.ndarray, mask: np.ndarray, num_classes: int) -> np.ndarray:
    """Count pixels by true class (row) and predicted class (column).

    Args:
        pred: class indices in [0, K), any shape.
        mask: true class indices in [0, K) or 255 (not counted), same shape.
        num_classes: K, at most 254.

    Returns:
        (K, K) int64.

    Raises:
        ValueError: shapes differ, or an index is out of range.
    """
    if pred.shape != mask.shape:
        raise ValueError(f"prediction {pred.shape} and mask {mask.shape} differ in shape")
    mask = _as_uint8(mask, "mask")
    pred = _as_uint8(pred, "prediction")
    if pred.size and pred.max() >= num_classes:
        raise ValueError(f"prediction holds class {pred.max()}, expected 0 to {num_classes - 1}")
    if num_classes == 2 and (table := _two_by_two(pred, mask)) is not None:
        return table
    rows = np.full(256, num_classes + 1, np.uint16)  # the first index of the row of each true class
    rows[:num_classes] = np.arange(num_classes)
    rows[IGNORE_INDEX] = num_classes
    rows *= num_classes
    counts = np.zeros((num_classes + 2) * num_classes, np.int64)
    pred, mask = pred.reshape(-1), mask.reshape(-1)
    for start in range(0, mask.size, _CHUNK):
        cells = rows[mask[start : start + _CHUNK]]
        cells += pred[start : start + _CHUNK]
        counts += np.bincount(cells, minlength=counts.size)
    table = counts.reshape(num_classes + 2, num_classes)
    if table[-1].any():
        bad = mask[(mask >= num_classes) & (mask != IGNORE_INDEX)]
        raise ValueError(f"mask holds class {bad[0]}, expected 0 to {num_classes - 1} or {IGNORE_INDEX} (ignored)")
    return table[:num_classes]


def _two_by_two(pred: np.ndarray, mask: np.ndarray) -> np.ndarray | None:
    """The same for two classes, several times faster; None when the mask holds more than 0, 1 and 255."""
    chosen, table = pred.view(bool), np.zeros((2, 2), np.int64)
    for label in (0, 1):
        truth = mask == label
        hits = np.count_nonzero(truth & chosen)
        table[label] = np.count_nonzero(truth) - hits, hits
    return table if table.sum() + np.count_nonzero(mask == IGNORE_INDEX) == mask.size else None


def _as_uint8(indices: np.ndarray, what: str) -> np.ndarray:
    if indices.dtype == np.uint8:
        return indices
    if indices.dtype == bool:
        return indices.view(np.uint8)
    if not np.issubdtype(indices.dtype, np.integer):
        raise ValueError(f"{what} is {indices.dtype}, expected class indices of an integer type")
    if indices.size and (indices.min() < 0 or indices.max() > IGNORE_INDEX):
        raise ValueError(f"{what} holds {indices.min()} to {indices.max()}, expected class indices 0 to {IGNORE_INDEX}")
    return indices.astype(np.uint8)


class Scorer:
    """Pixel scores of a set of images against their masks; the first class is the background.

    Args:
        class_names: one per class, K names. Binary: background, object.
        binary: probabilities have one plane, the object's; a pixel is object when p >= threshold. Otherwise K
            planes and the largest wins (the first of equals).
        threshold: of binary decisions, in [0, 1], compared in float32.
        empty: what a class without pixels in both truth and prediction scores, in an image or in the set: "skip"
            leaves it out, "one" and "zero" are its scores.
        has_background: False when the first class is an ordinary one, so there is no mean without background.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        *,
        binary: bool,
        threshold: float = 0.5,
        empty: str = "skip",
        has_background: bool = True,
    ) -> None:
        if empty not in EMPTY_RULES:
            raise ValueError(f"empty rule is {empty!r}, expected one of {', '.join(EMPTY_RULES)}")
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold is {threshold}, expected 0 to 1")
        if binary and len(class_names) != 2:
            raise ValueError(f"binary scores need two names, background and object, found {list(class_names)}")
        if not 2 <= len(class_names) < IGNORE_INDEX:
            raise ValueError(f"found {len(class_names)} class names, expected 2 to {IGNORE_INDEX - 1}")
        self.class_names = tuple(class_names)
        self.binary = binary
        self.threshold = float(threshold)
        self.empty = empty
        self.has_background = has_background
        self.confusion = np.zeros((len(class_names),) * 2, np.int64)  # (true, predicted)
        self.histogram = np.zeros((2, BINS), np.int64)  # of p on background and on object pixels, binary only
        self.names: list[str] = []
        self.image_counts: list[np.ndarray] = []  # per image (K, 3): true positives, false positives, false negatives

    def update(
        self, name: str, probs: np.ndarray, mask: np.ndarray, pred: np.ndarray | None = None
    ) -> dict[str, float | None]:
        """Count one image.

        Args:
            name: says in messages and rows which image it is.
            probs: float32 (K, H, W), binary (1, H, W), in [0, 1].
            mask: class indices (H, W) uint8; 255 is not counted.
            pred: class indices (H, W) that were decided on, such as filtered ones; None decides by the threshold. The
                sweep over thresholds and AUC always belong to probs.

        Returns:
            This image's iou, dice, precision, recall, accuracy: the object's (binary) or the mean over classes, but
            accuracy is the share of right pixels.

        Raises:
            ValueError: shapes that don't fit, NaN or values outside [0, 1] on counted pixels, unknown classes.
        """
        return self.update_parts(name, [(probs, mask)], pred)

    def update_parts(
        self, name: str, parts: Iterable[tuple[np.ndarray, np.ndarray]], pred: np.ndarray | None = None
    ) -> dict[str, float | None]:
        """Count one image that comes in parts, such as row bands: the counts are those of update with the whole.

        Args:
            name: see update.
            parts: (probabilities, mask) as update takes them, of any number of pixels each, every pixel once. They
                may be reused for the next part. Nothing is counted when making or counting one of them fails.
            pred: see update; for one part.

        Raises:
            ValueError: see update; also no part at all.
        """
        confusion, histogram, empty = np.zeros_like(self.confusion), np.zeros_like(self.histogram), True
        for probs, mask in parts:
            table, bins = self._count_part(name, probs, mask)
            confusion += table if pred is None else self._confusion(name, pred, mask)
            if bins is not None:
                histogram += bins
            empty = False
        if empty:
            raise ValueError(f"{name}: no pixel to score, expected at least one part")
        self.histogram += histogram
        return self._add_image(name, confusion)

    def _count_part(self, name: str, probs: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Confusion matrix (K, K) of some pixels, and the histogram of their probabilities for one class."""
        num_planes = 1 if self.binary else len(self.class_names)
        if mask.ndim != 2 or probs.shape != (num_planes, *mask.shape) or not mask.size:
            raise ValueError(
                f"{name}: probabilities are {probs.shape} and the mask is {mask.shape}, "
                f"expected ({num_planes}, H, W) and (H, W) with at least one pixel"
            )
        probs = probs.astype(np.float32, copy=False)
        if not self.binary:
            return self._confusion(name, _largest(name, probs, mask), mask), None
        histogram = _histogram(name, probs[0], mask)
        return self._confusion(name, probs[0] >= np.float32(self.threshold), mask), histogram

    def update_pred(self, name: str, pred: np.ndarray, mask: np.ndarray) -> dict[str, float | None]:
        """Count one image whose classes are decided: as update, with pred (H, W) class indices or bool."""
        return self._add_image(name, self._confusion(name, pred, mask))

    def _confusion(self, name: str, pred: np.ndarray, mask: np.ndarray) -> np.ndarray:
        try:
            return confusion_matrix(pred, mask, len(self.class_names))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def _add_image(self, name: str, confusion: np.ndarray) -> dict[str, float | None]:
        hits = confusion.diagonal()
        counts = np.stack([hits, confusion.sum(axis=0) - hits, confusion.sum(axis=1) - hits], axis=1)  # (K, 3)
        self.confusion += confusion
        self.names.append(name)
        self.image_counts.append(counts)
        return self._headline(counts)

    def merge(self, other: "Scorer") -> None:
        """Add the images of another scorer, for instance of another process.

        Raises:
            ValueError: classes, threshold or rule differ, so the counts can't be added.
        """
        for setting in ("class_names", "binary", "threshold", "empty", "has_background"):
            mine, theirs = getattr(self, setting), getattr(other, setting)
            if mine != theirs:
                raise ValueError(f"can't merge scores: {setting} is {mine!r} here and {theirs!r} there")
        self.confusion += other.confusion
        self.histogram += other.histogram
        self.names += other.names
        self.image_counts += other.image_counts

    def __iadd__(self, other: "Scorer") -> Self:
        self.merge(other)
        return self

    def rows(self) -> list[dict[str, Any]]:
        """One row per image in the order of update: name and what update returned."""
        return [
            {"name": name, **self._headline(counts)} for name, counts in zip(self.names, self.image_counts, strict=True)
        ]

    def summary(self, *, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
        """Every score of the set, JSON-able, None = undefined.

        Top level iou, dice, precision, recall are the headline: the object's (binary) or the mean over all classes;
        accuracy is the share of right pixels. Then the means with and without background (miou, ...), `per_class`,
        `per_image_mean`, `interval` and, when binary scores came with probabilities, `auc`, `average_precision`,
        `best` and `sweep`. The best threshold is optimistic for the set it was found on.
        """
        names = self.class_names
        counts = self._counts()
        scores = scores_from_counts(counts, self.empty)
        result: dict[str, Any] = {
            "images": len(self.names),
            "pixels": int(self.confusion.sum()),
            "threshold": self.threshold if self.binary else None,
            "empty": self.empty,
            **self._headline(counts),
        }
        for key in SCORES[:-1]:
            result[f"m{key}"] = _plain(_mean(scores[key]))
            result[f"m{key}_no_background"] = _plain(_mean(scores[key][1:])) if self.has_background else None
        result["per_class"] = [
            {
                "name": name,
                **{key: _plain(scores[key][k]) for key in SCORES},
                "true_pixels": int(self.confusion[k].sum()),
                "predicted_pixels": int(self.confusion[:, k].sum()),
            }
            for k, name in enumerate(names)
        ]
        result["per_image_mean"] = self._per_image_mean()
        result["interval"] = self.interval(resamples=resamples, seed=seed)
        result["confusion"] = self.confusion.tolist()
        return result | self._threshold_free()

    def interval(self, *, resamples: int = 1000, seed: int = 0) -> dict[str, Any] | None:
        """The 95 % bootstrap interval of the headline IoU over images; None with fewer than two images.

        Images are drawn with replacement and their counts summed before dividing, as for the headline itself. It
        does not depend on the order of the images, so merged scorers agree with a single one.
        """
        num_images, num_classes = len(self.names), len(self.class_names)
        if num_images < 2:
            return None
        order = sorted(range(num_images), key=lambda i: (self.names[i], self.image_counts[i].tolist()))
        counts = np.stack([self.image_counts[i] for i in order]).reshape(num_images, -1).astype(np.float64)
        rng = np.random.default_rng(seed)
        share = np.full(num_images, 1 / num_images)
        step = max(1, (1 << 21) // num_images)  # draws at a time, to bound the memory
        values = []
        for start in range(0, resamples, step):
            draws = rng.multinomial(num_images, share, size=min(step, resamples - start)).astype(np.float64)
            values.append(self._headline_iou((draws @ counts).reshape(-1, num_classes, 3)))
        ious = np.concatenate(values)
        ious = ious[~np.isnan(ious)]
        if not ious.size:
            return None
        low, high = np.percentile(ious, (2.5, 97.5))
        return {"metric": "iou", "level": 0.95, "low": float(low), "high": float(high), "resamples": resamples}

    def sweep(self, thresholds: Sequence[float] = SWEEP) -> list[dict[str, float | None]]:
        """The object's scores at other thresholds; empty list without a complete histogram.

        Each threshold is raised to the next k / 65536, and that number, used as the threshold, gives these scores.
        """
        if not self._has_histogram():
            return []
        bins = np.array([min(BINS - 1, math.ceil(threshold * BINS)) for threshold in thresholds])
        negative, positive = _at_least(self.histogram)[:, bins]  # false and true positives
        num_negative, num_positive = self.histogram.sum(axis=1)
        fn = num_positive - positive
        background = np.stack([num_negative - negative, fn, negative], axis=1)
        counts = np.stack([background, np.stack([positive, negative, fn], axis=1)], axis=1)  # (T, 2, 3)
        scores = scores_from_counts(counts, self.empty)
        return [
            {"threshold": float(k / BINS), **{key: _plain(scores[key][row, 1]) for key in SCORES}}
            for row, k in enumerate(bins)
        ]

    def best_threshold(self) -> float | None:
        """The threshold k / 65536 with the highest pooled IoU of the object, the nearest to 0.5 of equals.

        The same threshold has the highest Dice, which grows with IoU. None without a complete histogram or object.
        """
        num_positive = self.histogram[1].sum()
        if not self._has_histogram() or num_positive == 0:
            return None
        negative, positive = _at_least(self.histogram)
        iou = positive / (num_positive + negative)
        candidates = np.flatnonzero(iou == iou.max())
        return float(candidates[np.abs(candidates - BINS // 2).argmin()] / BINS)

    def _per_image_mean(self) -> dict[str, float | None]:
        rows, means = self.rows(), {}
        for key in SCORES:
            values = [row[key] for row in rows if row[key] is not None]
            means[key] = math.fsum(values) / len(values) if values else None  # fsum: the same in any order
        return means

    def _threshold_free(self) -> dict[str, Any]:
        if not self._has_histogram():
            return {"auc": None, "average_precision": None, "best": None, "sweep": []}
        auc, average_precision = ranking_scores(self.histogram)
        best = self.best_threshold()
        return {
            "auc": auc,
            "average_precision": average_precision,
            "best": None if best is None else self.sweep([best])[0],
            "sweep": self.sweep(),
        }

    def _has_histogram(self) -> bool:
        pixels = self.confusion.sum()
        return bool(self.binary and pixels and self.histogram.sum() == pixels)

    def _counts(self) -> np.ndarray:
        """Pooled true positives, false positives, false negatives, (K, 3)."""
        hits = self.confusion.diagonal()
        return np.stack([hits, self.confusion.sum(axis=0) - hits, self.confusion.sum(axis=1) - hits], axis=1)

    def _headline_iou(self, counts: np.ndarray) -> np.ndarray:
        iou = scores_from_counts(counts, self.empty)["iou"]
        return iou[..., 1] if self.binary else _mean(iou)

    def _headline(self, counts: np.ndarray) -> dict[str, float | None]:
        scores = scores_from_counts(counts, self.empty)
        pick = {key: scores[key][1] if self.binary else _mean(scores[key]) for key in SCORES}
        total = counts[:, 0].sum() + counts[:, 2].sum()
        pick["accuracy"] = counts[:, 0].sum() / total if total else np.nan
        return {key: _plain(value) for key, value in pick.items()}


def ranking_scores(histogram: np.ndarray) -> tuple[float | None, float | None]:
    """Area under the ROC curve and average precision from counts of negatives and positives per bin, (2, B).

    Exact for the binned probabilities, equals in one bin counting half. None where there are no positives, or for
    the area no negatives.
    """
    negative, positive = histogram.astype(np.float64)
    num_negative, num_positive = negative.sum(), positive.sum()
    if num_positive == 0:
        return None, None
    false, true = _at_least(histogram)
    precision = true / np.maximum(true + false, 1)
    average_precision = float((positive * precision).sum() / num_positive)
    if num_negative == 0:
        return None, average_precision
    below = negative.cumsum() - negative / 2
    return float((positive * below).sum() / (num_positive * num_negative)), average_precision


def _at_least(histogram: np.ndarray) -> np.ndarray:
    """How many pixels lie in each bin or above, (2, B)."""
    return histogram[:, ::-1].cumsum(axis=1)[:, ::-1]


def _histogram(name: str, probs: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Count the probabilities (H, W) of background and object pixels in bins, (2, BINS)."""
    if not (probs.min() >= -_TOLERANCE and probs.max() <= 1 + _TOLERANCE):  # False for NaN
        fits = (probs >= -_TOLERANCE) & (probs <= 1 + _TOLERANCE)
        _raise_if_counted(name, ~fits, mask)
        probs = np.where(fits, probs, np.float32(0))
    histogram = np.zeros((2, BINS), np.int64)
    probs, mask = probs.reshape(-1), mask.reshape(-1)
    for start in range(0, mask.size, _CHUNK):
        scaled = probs[start : start + _CHUNK] * np.float32(BINS)  # exact: a power of two
        bins = np.minimum(scaled, BINS - 1, out=scaled).astype(np.uint16)
        truth = mask[start : start + _CHUNK]
        for label in (0, 1):
            histogram[label] += np.bincount(bins[truth == label], minlength=BINS)
    return histogram


def _largest(name: str, probs: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The index of the largest of (K, H, W), the first of equals, (H, W) uint8."""
    pred = np.zeros(mask.shape, np.uint8)
    rows = max(1, (_CHUNK >> 4) // mask.shape[1])  # blocks that stay in the cache
    for top in range(0, mask.shape[0], rows):
        block = probs[:, top : top + rows]
        best = block[0].copy()
        for k in range(1, len(probs)):
            wins = (block[k] > best).view(np.uint8)
            wins *= np.uint8(k)  # the last k to win is the largest, so a maximum keeps it
            np.maximum(pred[top : top + rows], wins, out=pred[top : top + rows])
            np.maximum(best, block[k], out=best)
        if np.isnan(best.max()):
            _raise_if_counted(name, np.isnan(best), mask[top : top + rows], top)
    return pred


def _raise_if_counted(name: str, bad: np.ndarray, mask: np.ndarray, top: int = 0) -> None:
    where = np.argwhere(bad & (mask != IGNORE_INDEX))
    if len(where):
        row, column = where[0]
        raise ValueError(
            f"{name}: {len(where)} probabilities are NaN or outside [0, 1], first at row {row + top}, column {column}. "
            "Check that the network's weights and this image are finite"
        )


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean of the defined values over the last axis; NaN without any."""
    defined = ~np.isnan(values)
    count = defined.sum(axis=-1)
    return np.where(count == 0, np.nan, np.where(defined, values, 0).sum(axis=-1) / np.maximum(count, 1))


def _plain(value: float | np.ndarray) -> float | None:
    return None if np.isnan(value) else float(value)


def score_text(value: float | None) -> str:
    """Four decimals, or a dash where it is undefined."""
    return "-" if value is None else f"{value:.4f}"


def score_table(summary: dict[str, Any]) -> str:
    """A summary as text: a row for each class, then the means and what was counted."""

    def row(name: str, scores: dict[str, Any], prefix: str = "", suffix: str = "") -> str:
        values = [scores.get(f"{prefix}{key}{suffix}") for key in SCORES]
        return f"{name:<24}" + "".join(f"{score_text(value):>11}" for value in values)

    lines = [f"{'class':<24}" + "".join(f"{key:>11}" for key in SCORES)]
    lines += [row(scores["name"][:24], scores) for scores in summary["per_class"]]
    lines.append(row("mean", {**summary, "maccuracy": summary["accuracy"]}, "m"))
    if summary["miou_no_background"] is not None:
        lines.append(row("mean without background", summary, "m", "_no_background"))
    note = f"{summary['images']} images, {summary['pixels']} pixels; classes without pixels: {summary['empty']}"
    if summary["threshold"] is not None:
        note += f"; threshold {summary['threshold']:g}"
    if summary["interval"]:
        note += f"; IoU 95 % interval {summary['interval']['low']:.4f} to {summary['interval']['high']:.4f}"
    lines.append(note)
    if summary["auc"] is not None:
        best = summary["best"]
        lines.append(
            f"AUC {summary['auc']:.4f}, average precision {summary['average_precision']:.4f}"
            + (f"; best threshold {best['threshold']:.4f}: IoU {best['iou']:.4f}, optimistic here" if best else "")
        )
    return "\n".join(lines)
