"""What settings of engines are tried on: parts of pictures, whole ones and changed copies, with their references."""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np

CROP_SHARE = 0.4  # of a picture's area, on the first rung
SMALLEST_CROP, LARGEST_CROP = 128, 1024  # pixels along each side
LARGEST_SIDE = 4096  # of larger pictures a window stands for the whole
SCALES = (0.6, 1.3)  # of changed copies: other pictures hold objects of other sizes
NOISES = (0.01, 0.03)  # of their range of values, for other pictures may be noisier


@dataclass(frozen=True, eq=False)
class Sample:
    """A picture with its reference.

    Attributes:
        image: (H, W, C) as image_io.read_image gives it. labels: (H, W) integers, 0 background.
    """

    name: str
    image: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True, eq=False)
class View:
    """A picture, a part or a changed copy of one, with what engines keep for it."""

    image: np.ndarray
    labels: np.ndarray
    cache: dict[Any, Any] = field(default_factory=dict)


def make_rungs(samples: Sequence[Sample], seed: int) -> list[list[View]]:
    """What settings are tried on, rung after rung: crops, whole pictures, and two changed copies of each.

    What is random about a picture depends on the seed and its name, not on the other pictures.
    """
    crops, wholes, copies = [], [], []
    for sample in samples:
        rng = np.random.default_rng([seed, zlib.crc32(sample.name.encode())])
        whole = take_window(sample, [min(side, LARGEST_SIDE) for side in sample.labels.shape], rng)
        crops.append(crop_view(sample, rng))
        wholes.append(whole)
        copies += [change_view(whole, scale, rng) for scale in SCALES]
    return [crops, wholes, copies]


def crop_view(sample: Sample, rng: np.random.Generator) -> View:
    """A window of a picture."""
    sides = [round(side * CROP_SHARE**0.5) for side in sample.labels.shape]
    return take_window(sample, [min(max(side, SMALLEST_CROP), LARGEST_CROP) for side in sides], rng)


def take_window(sample: Sample, sides: Sequence[int], rng: np.random.Generator) -> View:
    """That of eight random windows of a picture that holds most objects.

    Args:
        sides: rows and columns; of smaller pictures all.
    """
    height, width = sample.labels.shape
    rows, cols = min(sides[0], height), min(sides[1], width)
    if (rows, cols) == (height, width):
        return View(sample.image, sample.labels)
    places = [(int(rng.integers(height - rows + 1)), int(rng.integers(width - cols + 1))) for _ in range(8)]
    windows = [np.s_[top : top + rows, left : left + cols] for top, left in places]
    window = max(windows, key=lambda window: len(np.unique(sample.labels[window])))
    return View(np.ascontiguousarray(sample.image[window]), np.ascontiguousarray(sample.labels[window]))


def change_view(view: View, scale: float, rng: np.random.Generator) -> View:
    """A copy that is turned or mirrored, `scale` times as large, with other tones and more noise."""
    image, labels = view.image, view.labels
    turns = int(rng.integers(4))
    image, labels = np.rot90(image, turns), np.rot90(labels, turns)
    if rng.random() < 0.5:
        image, labels = image[:, ::-1], labels[:, ::-1]
    size = tuple(max(1, round(side * scale)) for side in labels.shape[::-1])
    channels = [np.ascontiguousarray(image[..., c]) for c in range(image.shape[2])]
    scaled = np.stack([cv2.resize(c, size, interpolation=cv2.INTER_LINEAR) for c in channels], axis=-1)
    numbers = np.ascontiguousarray(labels).astype(np.float64)  # OpenCV does not resize every type of whole numbers
    objects = cv2.resize(numbers, size, interpolation=cv2.INTER_NEAREST).astype(np.int32)
    gamma, noise = math.exp(rng.uniform(-0.3, 0.3)), float(rng.choice(NOISES))
    return View(change_tones(scaled, gamma, noise, rng), objects)


def change_tones(image: np.ndarray, gamma: float, noise: float, rng: np.random.Generator) -> np.ndarray:
    """An image whose values, as shares of their range, are raised to the power gamma; noise is a share of it too."""
    finite = image[np.isfinite(image)] if image.dtype.kind == "f" else image
    if not finite.size or finite.min() == finite.max():
        return image
    low, span = float(finite.min()), float(finite.max()) - float(finite.min())
    values = ((image.astype(np.float64) - low) / span) ** gamma * span + low
    values += rng.normal(0, noise * span, image.shape)
    if image.dtype.kind != "f":
        info = np.iinfo(image.dtype)
        values = np.clip(np.rint(values), info.min, info.max)
    return values.astype(image.dtype)
