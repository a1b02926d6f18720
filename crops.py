"""Where crops lie, and cutting them from images and masks; what lies outside is reflected and not counted."""

import cv2
import numpy as np

from image_io import IGNORE_INDEX
from tiling import reflect_index


def crop_corner(
    mask: np.ndarray, size: tuple[int, int], wanted: int | None, rng: np.random.Generator
) -> tuple[int, int]:
    """Upper left corner of a random window of `size` that holds a pixel of class `wanted`, if given.

    The window lies inside the mask; where the mask is smaller, the mask lies inside the window (negative corner).
    """
    low, high = [], []
    for length, side in zip(mask.shape, size, strict=True):
        low.append(min(0, length - side))
        high.append(max(0, length - side))
    if wanted is not None:
        place = divmod(int(rng.choice(np.flatnonzero(mask == wanted))), mask.shape[1])
        low = [max(least, at - side + 1) for least, at, side in zip(low, place, size, strict=True)]
        high = [min(most, at) for most, at in zip(high, place, strict=True)]
    return int(rng.integers(low[0], high[0] + 1)), int(rng.integers(low[1], high[1] + 1))


def cut_window(
    image: np.ndarray, mask: np.ndarray, corner: tuple[int, int], size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Cut a window; outside the image the pixels are reflected and the mask is 255 (not counted).

    Args:
        corner: (row, column) of the window's first pixel, may lie outside the image.
        size: (height, width) of the window.
    """
    spans = [_span(*axis) for axis in zip(corner, size, mask.shape, strict=True)]
    if None in spans:
        return _cut_far(image, mask, corner, size)
    (rows, above, below, top), (columns, before, behind, left) = filter(None, spans)
    image, mask = image[rows, columns], mask[rows, columns]
    if above or below or before or behind:
        border, shape = (above, below, before, behind), image.shape
        image = cv2.copyMakeBorder(image, *border, cv2.BORDER_REFLECT_101).reshape(
            -1, shape[1] + before + behind, shape[2]
        )
        mask = cv2.copyMakeBorder(mask, *border, cv2.BORDER_CONSTANT, value=IGNORE_INDEX)
    cut = slice(top, top + size[0]), slice(left, left + size[1])
    return image[cut], mask[cut]


def _span(first: int, length: int, side: int) -> tuple[slice, int, int, int] | None:
    """How a window lies on one axis of an image: what it needs of it, pixels to reflect at both ends, its first of all.

    None: it reaches so far that what is reflected is reflected again.
    """
    before, after = max(0, -first), max(0, first + length - side)
    if before >= side or after >= side:
        return None
    low, high = min(first, side - 1 - after), max(first + length, before + 1)
    used = slice(max(0, low), min(side, high))
    return used, before, after, first + before - used.start


def _cut_far(
    image: np.ndarray, mask: np.ndarray, corner: tuple[int, int], size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """As cut_window, of any window."""
    rows, columns = (np.arange(first, first + length) for first, length in zip(corner, size, strict=True))
    places = np.ix_(_reflected(rows, mask.shape[0]), _reflected(columns, mask.shape[1]))
    outside = (rows < 0)[:, None] | (rows >= mask.shape[0])[:, None] | (columns < 0) | (columns >= mask.shape[1])
    return image[places], np.where(outside, np.uint8(IGNORE_INDEX), mask[places])


def _reflected(places: np.ndarray, length: int) -> np.ndarray:
    """Index of the pixel that stands at each place; the wave is even, so places before the image mirror too."""
    distance = np.abs(places)
    return reflect_index(length, int(distance.max()) + 1)[distance]
