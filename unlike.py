"""Pictures unlike those that a network was trained on: what is said about them, each kind once."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from checkpoint import ModelConfig

SAMPLED = 4  # one in so many pixels, both ways, is looked at
# How far the mean of a picture may lie outside of the means of the training's, in deviations of the training's pixels:
# it is then darker than the darkest by as much as pixels vary. Where only the mean of all is known, from that.
ALLOWED, ALLOWED_OLD = 1.0, 3.0


class Moments:
    """Mean and extremes of the pixels that a network saw of one picture, window by window."""

    def __init__(self) -> None:
        self.count, self.total = 0, np.zeros(1)
        self.low = self.high = np.zeros(0)

    def add(self, pixels: np.ndarray) -> None:
        """Take in a window (h, w, C), of which a sample is looked at; windows may overlap."""
        some = pixels[::SAMPLED, ::SAMPLED].reshape(-1, pixels.shape[2])
        low, high = some.min(axis=0), some.max(axis=0)
        if self.count:
            low, high = np.minimum(low, self.low), np.maximum(high, self.high)
        if np.array_equal(low, high):  # so far: a few other pixels are enough
            low, high = np.minimum(low, pixels.min(axis=(0, 1))), np.maximum(high, pixels.max(axis=(0, 1)))
        self.total = self.total + some.sum(axis=0, dtype=np.float64)
        self.count += len(some)
        self.low, self.high = low, high

    def findings(self, config: ModelConfig) -> list[str]:
        """What is odd about these pixels for a network; nothing where there are none."""
        if not self.count:
            return []
        return intensity_findings(config, self.total / self.count, constant=bool((self.low == self.high).all()))


def intensity_findings(config: ModelConfig, mean: np.ndarray, *, constant: bool) -> list[str]:
    """What to say about a picture with this mean of each channel, (C,) in raw units after preprocessing.

    Args:
        constant: all of its pixels are alike.
    """
    if constant:
        return [f"every pixel is {_spell(mean)}, there is nothing to see"]
    gaps = outside(config, mean)
    allowed = ALLOWED if config.image_means else ALLOWED_OLD
    if len(gaps) == 0 or not gaps.max() > allowed:
        return []
    channel = int(gaps.argmax())
    if config.image_means:
        low, high = (ends[channel] for ends in config.image_means)
        known = f"those of training images are {low:.4g} to {high:.4g}"
    else:
        known = f"that of the training images is {config.mean[channel]:.4g}"
    return [
        f"the mean of {config.channels[channel]} is {mean[channel]:.4g}, {known} (their pixels vary by "
        f"{config.std[channel]:.3g}): expect worse results"
    ]


def outside(config: ModelConfig, mean: np.ndarray) -> np.ndarray:
    """How far means lie outside of those of the training images, (C,) in deviations of their pixels; 0 inside.

    Empty for another number of channels.
    """
    if len(mean) != len(config.mean):
        return np.zeros(0)
    low, high = (np.asarray(ends) for ends in (config.image_means or (config.mean, config.mean)))
    return np.maximum(np.maximum(low - mean, mean - high), 0) / np.maximum(np.asarray(config.std), 1e-6)


def mean_range(means: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Lowest and highest mean of each channel over images, (I, C) -> two of length C."""
    values = np.asarray(means, np.float64)
    return tuple(values.min(axis=0).tolist()), tuple(values.max(axis=0).tolist())


class Told:
    """Says something about a picture once for each kind, and counts the others; numbers make no other kind."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.firsts: dict[str, tuple[str, str]] = {}

    def tell(self, say: Callable[[str], Any], name: str, text: str) -> None:
        """Say it, unless the like was said about another picture."""
        kind = re.sub(r"[\d.]+", "#", text)
        if kind not in self.firsts:
            say(f"warning: {name}: {text}")
            self.firsts[kind] = (name, text)
        self.counts[kind] = self.counts.get(kind, 0) + 1

    def kinds(self) -> list[tuple[int, str, str]]:
        """Of each kind how many pictures it was said of, the first of them, and what was said of that."""
        return [(self.counts[kind], name, text) for kind, (name, text) in self.firsts.items()]

    def summary(self) -> list[str]:
        """A line for each kind that was found in more than one picture."""
        return [f"warning: {count} pictures are like {name}: {text}" for count, name, text in self.kinds() if count > 1]


def _spell(values: np.ndarray) -> str:
    return " ".join(f"{value:.4g}" for value in np.atleast_1d(values))
