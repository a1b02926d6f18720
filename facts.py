"""What one look at the files of a data set says about each: sizes, moments of the pixels, counts of the labels."""

from dataclasses import dataclass, field

import numpy as np

from pairing import Pair

MANY_LABELS = 4096  # of one mask; those beyond are counted under its largest label


@dataclass
class ImageFacts:
    """What one image file holds, after preprocessing.

    pixels: how many hold data. means and spreads: for each channel, over these pixels, the mean and the sum of squared
    differences from it. low and high: smallest and largest value.
    """

    size: tuple[int, int] = (0, 0)
    channels: int = 0
    dtype: str = ""
    orientation: int = 1
    pixels: int = 0
    means: list[float] = field(default_factory=list)
    spreads: list[float] = field(default_factory=list)
    low: float = 0.0
    high: float = 0.0
    error: str | None = None


@dataclass
class MaskFacts:
    """What one mask file holds: pixels of each value, [[value, count], ...], where the pixels count.

    names: of annotations that name their classes: value k stands for names[k - 1] until name_labels gave it the mask
    value of that class; None: the values are the file's own. findings: what is odd about the file.
    """

    size: tuple[int, int] = (0, 0)
    orientation: int = 1
    labels: list[list[int]] = field(default_factory=list)
    error: str | None = None
    names: list[str | None] | None = None
    findings: list[str] = field(default_factory=list)


@dataclass
class PairFacts:
    """Facts of one pair; `layers` are the image and its extra channels.

    sampled: of a slide, which part of its pixels the statistics are from; empty: all of them.
    """

    pair: Pair
    layers: list[ImageFacts]
    mask: MaskFacts | None
    roi: MaskFacts | None
    sampled: str = ""

    @property
    def channels(self) -> int:
        """Channels of the image file alone, without the extra ones."""
        return self.layers[0].channels

    @property
    def has_data(self) -> bool:
        """Whether every layer was read and has a pixel that counts."""
        return all(layer.pixels for layer in self.layers)


def moments(pixels: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and sum of squared differences from it, for each channel of (P, C) uint8, uint16 or float32."""
    means, spreads = [], []
    weights: np.ndarray
    for channel in pixels.T:
        if channel.dtype.kind == "u":  # by value, each of which is exact
            weights = np.bincount(channel)
            values = np.arange(len(weights), dtype=np.float64)
        else:
            weights, values = np.ones(len(channel)), channel.astype(np.float64)
        mean = float(weights @ values / len(channel))
        means.append(mean)
        spreads.append(float(weights @ (values - mean) ** 2))
    return means, spreads


def count_labels(values: np.ndarray) -> list[list[int]]:
    """[[value, pixels], ...] of mask values of any shape; see MANY_LABELS."""
    if values.dtype.itemsize <= 2:
        counts = np.bincount(values.ravel(), minlength=1)
        found = np.flatnonzero(counts)
        counts = counts[found]
    else:
        found, counts = np.unique(values, return_counts=True)
    if len(found) > MANY_LABELS:
        counts = np.append(counts[: MANY_LABELS - 1], counts[MANY_LABELS - 1 :].sum())
        found = np.append(found[: MANY_LABELS - 1], found[-1])
    return [[int(value), int(count)] for value, count in zip(found, counts, strict=True)]
