"""Thresholds from histograms: where bright objects end and background begins."""

from typing import NamedTuple

import numpy as np

BINS = 256
SAMPLE = 1 << 16  # values that a histogram or percentile is made of: more changes little


class Threshold(NamedTuple):
    """A threshold and how well it parts the values.

    Attributes:
        at: values above it are objects.
        separability: variance between the two classes by the whole variance, in [0, 1]; 0 for constant values.
    """

    at: float
    separability: float


def thin(values: np.ndarray) -> np.ndarray:
    """Every n-th value along each axis of a map (H, W), about SAMPLE of them, flat."""
    step = max(1, int(np.sqrt(values.size / SAMPLE)))
    return values[::step, ::step].reshape(-1)


def find_threshold(values: np.ndarray, low: float, high: float, *, weighted: bool = False) -> Threshold:
    """Otsu's threshold of the values of a map, or the weighted one.

    Otsu maximises w1 w2 (m1 - m2)^2, or w1 m1^2 + w2 m2^2, over the two classes with shares w and means m. The weighted
    one maximises (1 - h[t]) (w1 m1^2 + w2 m2^2), where h[t] is the share of values in the bin of the threshold: it
    avoids thresholds within a peak of the histogram, which suits few objects on much background.

    Args:
        values: (H, W) finite numbers.
        low, high: ends of the histogram of 256 bins; what lies outside counts in the first and last bin.
        weighted: the weighted criterion.
    """
    if not high > low:
        return Threshold(high, 0.0)
    places = (thin(values) - low) * (BINS / (high - low))
    shares = np.bincount(np.clip(places, 0, BINS - 1).astype(np.int64), minlength=BINS) / places.size
    centres = (np.arange(BINS) + 0.5) / BINS
    below = np.cumsum(shares)
    first = np.cumsum(shares * centres)
    mean = first[-1]
    inner = (below > 0) & (below < 1 - 1e-12)
    above = np.where(inner, 1 - below, 1)
    squares = first**2 / np.where(below > 0, below, 1) + (mean - first) ** 2 / above
    between = np.where(inner, squares - mean**2, 0)
    total = float((shares * (centres - mean) ** 2).sum())
    if not inner.any() or total <= 0:
        return Threshold(high, 0.0)
    criterion = np.where(inner, (1 - shares) * squares, -1) if weighted else between
    # where no value lies between the classes every threshold is as good: the middle one is taken
    best = np.flatnonzero(criterion >= criterion.max() * (1 - 1e-9))
    middle = float(best[0] + best[-1]) / 2 + 1
    return Threshold(low + middle * (high - low) / BINS, float(between[best[0]] / total))
