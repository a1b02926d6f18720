"""Where a slide holds tissue: found on a thumbnail, so that the network does not look at empty glass."""

from dataclasses import dataclass

import cv2
import numpy as np

from image_io import ImageError, resize_mask
from slide_io import Grid, Slide
from tiling import Axis

RULES = ("saturation", "otsu")
THUMBNAIL_SIDE = 2048  # pixels of the longer side that tissue is looked for on
SATURATION = 40  # of 0..255: stained tissue is above it, glass and black padding are below
SPECK = 3  # pixels of the thumbnail; narrower bright points are dust
MARGIN = 8  # pixels of the thumbnail by which tissue is widened, so that its edge keeps all its tiles


@dataclass(frozen=True)
class Tissue:
    """Tissue of one grid: `mask` (h, w) bool is a thumbnail of its (height, width) pixels."""

    mask: np.ndarray
    height: int
    width: int

    @property
    def share(self) -> float:
        """Part of the slide that is tissue, 0..1."""
        return float(self.mask.mean())

    def rows(self, top: int, height: int) -> np.ndarray:
        """Tissue in some rows of the grid at full width: (height, width) bool."""
        rows = (2 * np.arange(top, top + height) + 1) * self.mask.shape[0] // (2 * self.height)
        return resize_mask(self.mask[rows], (height, self.width))

    def tiles(self, rows: Axis, cols: Axis) -> np.ndarray:
        """Which tiles hold a pixel of tissue: (len(rows.origins), len(cols.origins)) bool."""
        tall, wide = _first_and_last(rows, self.mask.shape[0]), _first_and_last(cols, self.mask.shape[1])
        above = np.zeros((self.mask.shape[0] + 1, self.mask.shape[1] + 1), np.int64)
        above[1:, 1:] = self.mask.cumsum(axis=0, dtype=np.int64).cumsum(axis=1)
        (top, bottom), (left, right) = tall, wide
        count = above[np.ix_(bottom, right)] - above[np.ix_(top, right)]
        return count - above[np.ix_(bottom, left)] + above[np.ix_(top, left)] > 0


def _first_and_last(axis: Axis, length: int) -> tuple[np.ndarray, np.ndarray]:
    """First pixel of the thumbnail that each tile touches, and the one after its last."""
    begin = np.minimum(np.array(axis.origins), axis.size - 1)
    last = np.minimum(np.array(axis.origins) + axis.tile, axis.size) - 1
    first, final = ((2 * place + 1) * length // (2 * axis.size) for place in (begin, last))
    return first, final + 1


def find_tissue(slide: Slide, grid: Grid, rule: str) -> Tissue:
    """Look for tissue on a thumbnail of a slide.

    Args:
        grid: the grid that is predicted; the result is in its pixels.
        rule: "saturation": colours above SATURATION and not black. "otsu": Otsu's threshold on the saturation of
            colour images, or on the brightness of grey ones, where tissue is what most of the border is not.

    Raises:
        ImageError: the saturation rule on an image without colours.
        ValueError: an unknown rule.
    """
    if rule not in RULES:
        raise ValueError(f"unknown tissue rule {rule!r}, expected one of {', '.join(RULES)}")
    if rule == "saturation" and slide.channels < 3:
        raise ImageError(f"{slide.path} has {slide.channels} channel(s) and no saturation; use --tissue otsu")
    reduce = max(grid.scale, max(slide.height, slide.width) / THUMBNAIL_SIDE)
    thumbnail = slide.grid(reduce=reduce)
    pixels = to_eight_bits(thumbnail.read(0, 0, thumbnail.height, thumbnail.width))
    return Tissue(tissue_mask(pixels, rule), grid.height, grid.width)


def to_eight_bits(pixels: np.ndarray) -> np.ndarray:
    """Any pixels as uint8; 16 bits lose the lower eight, real numbers are spread over their own range."""
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == np.uint16:
        return (pixels >> 8).astype(np.uint8)
    low, high = float(pixels.min()), float(pixels.max())
    return ((pixels - low) * (255 / (high - low) if high > low else 0)).astype(np.uint8)


def tissue_mask(pixels: np.ndarray, rule: str, margin: int = MARGIN) -> np.ndarray:
    """Tissue of a picture (H, W, C) uint8, widened by a margin of pixels: (H, W) bool. See find_tissue."""
    if pixels.shape[2] >= 3:
        rgb = np.ascontiguousarray(pixels[:, :, :3])
        saturation = cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV)[:, :, 1]
        limit = SATURATION if rule == "saturation" else _otsu(saturation)
        inside = (saturation > limit) & (rgb.max(axis=2) > SATURATION)
    else:
        grey = pixels[:, :, 0]
        inside = grey > _otsu(grey)
        border = np.concatenate([inside[0], inside[-1], inside[:, 0], inside[:, -1]])
        if border.mean() > 0.5:
            inside = ~inside
    opened = inside.astype(np.uint8)
    if min(inside.shape) > 4 * SPECK:
        opened = cv2.morphologyEx(opened, cv2.MORPH_OPEN, np.ones((SPECK, SPECK), np.uint8))
    return cv2.dilate(opened, np.ones((2 * margin + 1, 2 * margin + 1), np.uint8)) > 0


def _otsu(values: np.ndarray) -> float:
    from skimage.filters import threshold_otsu  # slow to import, and few runs need it

    return float(threshold_otsu(values)) if values.min() < values.max() else float(values.max())
