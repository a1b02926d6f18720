"""Training samples made of several: mosaic, cutmix, and objects of one picture pasted into another.

Every way takes parts of one size, each an image (H, W, C) with its class indices (H, W) uint8, and moves labels and
ignored pixels (255) with the picture.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np

from image_io import IGNORE_INDEX

Part = tuple[np.ndarray, np.ndarray]

KINDS = ("mosaic", "cutmix", "copy-paste")
MOST_OBJECTS = 30  # pasted into one picture
SMALLEST_OBJECT = 4  # pixels; smaller ones are crumbs of moved masks


@dataclass(frozen=True)
class Mixing:
    """Mixes samples with others of the data set.

    kind: one of KINDS. probability: share of the samples that are mixed. present: for each image the classes that it
    holds; objects are taken from images that have some. together: the samples of one item share one other image, so
    that it is decoded once for all of them.
    """

    kind: str
    probability: float
    present: Sequence[Sequence[int]]
    together: bool

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown way of mixing {self.kind!r}, expected one of: {', '.join(KINDS)}")

    def mix(self, own: Part, image: int, seeds: tuple[int, int], take: Callable[[int, int, int | None], Part]) -> Part:
        """The sample itself, or mixed with others.

        Args:
            own: the sample.
            image: the number of its image in the data set.
            seeds: of this sample, and of the item that it belongs to.
            take: gives another sample by the number of its image, a seed, and a class that it must hold, or None.
        """
        rng, of_item = np.random.default_rng([seeds[0], 2]), np.random.default_rng([seeds[1], 3])
        if rng.random() >= self.probability:
            return own
        parts = []
        partner = self._partner(image, of_item)
        for _ in range(3 if self.kind == "mosaic" else 1):
            wanted = None
            if self.kind == "copy-paste" and any(self.present[partner]):
                wanted = int(rng.choice([value for value in self.present[partner] if value]))
            parts.append(take(partner, int(rng.integers(2**31)), wanted))
            partner = partner if self.together else self._partner(image, of_item)
        kind = np.result_type(own[0], *(pixels for pixels, _ in parts))
        own, *parts = [(pixels.astype(kind, copy=False), indices) for pixels, indices in (own, *parts)]
        if self.kind == "mosaic":
            return mosaic([own, *parts], rng)
        return cutmix(own, parts[0], rng) if self.kind == "cutmix" else copy_paste(own, parts[0], rng)

    def _partner(self, image: int, rng: np.random.Generator) -> int:
        """Another image than this one, if there is one; for pasting, one with objects."""
        if self.kind == "copy-paste" and self._labelled:
            others = self._labelled
        else:
            others = range(len(self.present))
        chosen = others[int(rng.integers(len(others)))]
        if chosen == image and len(others) > 1:
            chosen = others[(others.index(image) + 1) % len(others)]
        return chosen

    @cached_property
    def _labelled(self) -> Sequence[int]:
        """Images that hold an object."""
        return [number for number, classes in enumerate(self.present) if any(classes)]


def mosaic(parts: Sequence[Part], rng: np.random.Generator) -> Part:
    """Four quarters round a random middle, each cut from one of four samples at its own scale, in random order."""
    (height, width), image, mask = parts[0][1].shape, parts[0][0].copy(), parts[0][1].copy()
    row, column = (int(side * rng.uniform(0.3, 0.7)) for side in (height, width))
    rows, columns = (slice(0, row), slice(row, height)), (slice(0, column), slice(column, width))
    for quarter, place in enumerate(rng.permutation(4).tolist()):
        box = rows[quarter // 2], columns[quarter % 2]
        cut = tuple(_slide(part, side, rng) for part, side in zip(box, (height, width), strict=True))
        image[box], mask[box] = parts[place][0][cut], parts[place][1][cut]
    return image, mask


def _slide(part: slice, side: int, rng: np.random.Generator) -> slice:
    """A piece of the same length somewhere on the side."""
    length = part.stop - part.start
    start = int(rng.integers(0, side - length + 1))
    return slice(start, start + length)


def cutmix(onto: Part, source: Part, rng: np.random.Generator) -> Part:
    """Put a rectangle of one sample, a tenth to a half of the area, onto the same place of another."""
    (image, mask), sides = (onto[0].copy(), onto[1].copy()), onto[1].shape
    area, stretch = rng.uniform(0.1, 0.5), rng.uniform(0.75, 1.33)
    lengths = (min(1, np.sqrt(area) * stretch), min(1, np.sqrt(area) / stretch))
    box = tuple(
        _slide(slice(0, max(1, round(side * length))), side, rng) for side, length in zip(sides, lengths, strict=True)
    )
    image[box], mask[box] = source[0][box], source[1][box]
    return image, mask


def copy_paste(onto: Part, source: Part, rng: np.random.Generator) -> Part:
    """Paste about half of the whole objects of one sample (at most MOST_OBJECTS) at random places of another.

    An object is a 4-connected component of a class other than 0 that touches neither the border nor ignored pixels. Its
    outermost pixels are mixed with what they lie on. Where the target is ignored, nothing is pasted.
    """
    image, mask = onto[0].copy(), onto[1].copy()
    objects = whole_objects(source[1])
    for number in np.flatnonzero(rng.random(len(objects)) < 0.5)[:MOST_OBJECTS]:
        box, inside = objects[int(number)]
        height, width = inside.shape
        top, left = (
            int(rng.integers(0, side - length + 1)) for side, length in zip(mask.shape, inside.shape, strict=True)
        )
        place = slice(top, top + height), slice(left, left + width)
        shown = inside & (mask[place] != IGNORE_INDEX)
        soft = cv2.blur(np.pad(inside, 1).astype(np.float32), (3, 3))[1:-1, 1:-1] * shown
        image[place] = _blend(image[place], source[0][box], soft[..., None])
        mask[place][shown] = source[1][box][shown]
    return image, mask


def _blend(under: np.ndarray, over: np.ndarray, share: np.ndarray) -> np.ndarray:
    mixed = under + (over.astype(np.float32) - under) * share
    return mixed if under.dtype == np.float32 else np.rint(mixed).astype(under.dtype)


def whole_objects(mask: np.ndarray) -> list[tuple[tuple[slice, slice], np.ndarray]]:
    """Bounding box and pixels (h, w) bool of each object that a sample shows whole; see copy_paste."""
    hidden = cv2.dilate((mask == IGNORE_INDEX).astype(np.uint8), np.ones((3, 3), np.uint8))
    hidden[[0, -1]] = 1
    hidden[:, [0, -1]] = 1
    found = []
    for value in np.flatnonzero(np.bincount(mask.ravel())).tolist():
        if value in (0, IGNORE_INDEX):
            continue
        count, labels, boxes, _ = cv2.connectedComponentsWithStats((mask == value).astype(np.uint8), connectivity=4)
        cut = np.bincount(labels[hidden > 0], minlength=count) > 0
        for number in range(1, count):
            left, top, width, height, area = boxes[number].tolist()
            if area >= SMALLEST_OBJECT and not cut[number]:
                box = slice(top, top + height), slice(left, left + width)
                found.append((box, labels[box] == number))
    return found
