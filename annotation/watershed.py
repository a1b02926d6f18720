"""The watershed engine: objects of a picture by thresholds, shapes and their own heights, without weights.

One channel is cleaned, stretched and cut; the mask is parted at its necks. Each part is then cut again at a share of
its own height over the background, which finds the same outline for bright and dim objects and parts what a threshold
for the whole picture had joined. What does not rise over its surroundings is dropped.
"""

import cv2
import numpy as np

from annotation import basins
from annotation.automatic import fill_holes, prepare
from annotation.instances import (
    Instances,
    clean_instances,
    empty_instances,
    find_runs,
    number_instances,
    select_instances,
)
from annotation.presets import (
    PRESET_NAMES,
    PRESETS,
    SPACE,
    WatershedOptions,
    add_watershed_args,
    options_from,
)
from annotation.retinex import wide_blur

__all__ = [
    "PRESETS",
    "PRESET_NAMES",
    "SPACE",
    "WatershedOptions",
    "add_watershed_args",
    "choose_options",
    "options_from",
    "segment",
]

ENGINE = "watershed"
HEIGHT_RANK = 0.8  # an object's height is reached by the rest of its pixels
QUANTILE_BINS = 128
SHAPE = 4  # power of the ellipse fit in a score: 0.9, which two discs in touch have, counts 0.66
REACH = 0.4  # side of the square that holds the brightest nearby, as a share of the size
FAINT = 1e-6


def segment(image: np.ndarray, options: WatershedOptions | None = None) -> Instances:
    """Find the objects of a picture.

    Args:
        image: (H, W, C) uint8, uint16 or float32; NaN and infinities count as the median. Of several channels the
            first three are red, green and blue.
        options: resolved or not; None chooses all from the picture.

    Returns:
        The objects. A score is high where an object rises far over its surroundings and fills the ellipse around it.
    """
    options = options or WatershedOptions()
    height, width = image.shape[:2]
    if min(height, width) < 3:
        return empty_instances(height, width)
    values, resolved = prepare(image, options)
    if values is None:
        return empty_instances(height, width)
    return _find_objects(values, resolved)


def choose_options(image: np.ndarray, options: WatershedOptions | None = None) -> WatershedOptions:
    """Resolve a preset of auto and all that is None from the picture; of a large one nine windows are looked at.

    Returns:
        Options without None. segment gives the same with them as with the options they come from.
    """
    return prepare(image, options or WatershedOptions(), only_options=True)[1]


# ----------------------------------------------------------------------------------------------------------------------
# From bright objects to a label map


def _find_objects(values: np.ndarray, options: WatershedOptions) -> Instances:
    mask = _cut(values, options)
    labels = _part(mask, values, options)
    if options.core:
        heights = _background(values, mask, options)
        np.subtract(values, heights, out=heights)
        limit = None
        for _ in range(options.passes):
            inside = labels > 0
            tops = _quantiles(labels[inside], heights[inside], int(labels.max()) + 1, HEIGHT_RANK)
            own = basins.look_up(tops, labels)
            if limit is None:
                limit = (labels > 0) & (heights > options.extent * own)
            mask = _tidy((labels > 0) & (heights > options.core * own), options)
            labels = _part(mask, values, options)
        if limit is not None:
            labels = basins.grow_labels(labels, limit)
    if options.grow and labels.any():
        nearest, distance = basins.nearest_labels(labels)
        labels = np.where(distance <= options.grow, nearest, 0)
    if not labels.any():
        return empty_instances(*labels.shape)
    found = number_instances(labels, 1.0, ENGINE)
    found = clean_instances(
        found,
        min_area=options.min_area,
        max_area=options.max_area,
        fill_holes=options.holes,
        border=options.border,
    )
    return _judge(found, values, mask, options)


def _cut(values: np.ndarray, options: WatershedOptions) -> np.ndarray:
    """The mask of all objects together, (H, W) uint8 0 or 1."""
    mask = values > np.float32(options.level)
    if options.relative:
        side = max(3, int(REACH * options.size) | 1)
        mask &= values > np.float32(options.relative) * cv2.dilate(values, np.ones((side, side), np.uint8))
    if options.local:
        side = int(options.local * options.size) | 1
        mask &= values > cv2.blur(values, (side, side), borderType=cv2.BORDER_REFLECT)
    cut = _tidy(mask, options)
    return cut if options.markers == "all" else _select_markers(cut, options.markers)


def _tidy(mask: np.ndarray, options: WatershedOptions) -> np.ndarray:
    tidy = mask.view(np.uint8)
    if options.opening > 1:
        tidy = cv2.morphologyEx(tidy, cv2.MORPH_OPEN, _ellipse(options.opening))
    return fill_holes(tidy, tidy.size if options.holes < 0 else options.holes)


def _ellipse(side: int) -> np.ndarray:
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))


def _select_markers(mask: np.ndarray, which: str) -> np.ndarray:
    """Objects that survive three erosions, or those that do not."""
    core = cv2.erode(mask, _ellipse(5), iterations=3)
    core = cv2.dilate(core, _ellipse(5), iterations=2)
    if which == "big":
        return core & mask
    return mask & (1 - cv2.dilate(core, np.ones((5, 5), np.uint8), iterations=6))


def _part(mask: np.ndarray, values: np.ndarray, options: WatershedOptions) -> np.ndarray:
    if options.landscape == "intensity":
        landscape, depth = values, options.depth * 0.01  # of the range, as distances are in pixels
    else:
        landscape, depth = cv2.distanceTransform(mask, cv2.DIST_L2, 5), options.depth
    if options.smooth:
        landscape = wide_blur(landscape, options.smooth)
    inside = mask.astype(bool)
    if options.spacing:
        return basins.part_by_distance(landscape, inside, options.spacing)
    return basins.part_mask(landscape, inside, neck=options.neck, depth=depth)


def _background(values: np.ndarray, mask: np.ndarray, options: WatershedOptions) -> np.ndarray:
    """The mean of what is no object in a window of four sizes, drawn to the ground where there is little."""
    outside = (1 - mask).astype(np.float32)
    side = int(4 * options.size) | 1
    ground = cv2.blur(outside, (side, side), borderType=cv2.BORDER_REFLECT)
    ground += np.float32(0.02)
    outside *= values
    total = cv2.blur(outside, (side, side), borderType=cv2.BORDER_REFLECT, dst=outside)
    total += np.float32(0.02 * options.ground)
    return np.divide(total, ground, out=total)


def _quantiles(owners: np.ndarray, values: np.ndarray, count: int, rank: float) -> np.ndarray:
    """The rank quantile of the values of each owner 0..count - 1, by a histogram: (count,) float32, 0 without values.

    Negative values count as 0. Bins are of equal width in the root of the value, so the error is 1 % or so.
    """
    most = float(values.max(initial=0))
    if most <= 0:
        return np.zeros(count, np.float32)
    places = np.sqrt(np.maximum(values, 0) * np.float32(1 / most)) * np.float32(QUANTILE_BINS - 1)
    keys = owners.astype(np.int64) * QUANTILE_BINS + places.astype(np.int64)
    shares = np.bincount(keys, minlength=count * QUANTILE_BINS).reshape(count, QUANTILE_BINS).cumsum(axis=1)
    bins = (shares <= rank * shares[:, -1:]).sum(axis=1)
    return np.where(shares[:, -1] > 0, ((bins + 0.5) / QUANTILE_BINS) ** 2 * most, 0).astype(np.float32)


def _judge(found: Instances, values: np.ndarray, mask: np.ndarray, options: WatershedOptions) -> Instances:
    """Score the objects, and drop those that do not rise over their surroundings."""
    if not len(found):
        return found
    count = len(found) + 1
    nearest, distance = basins.nearest_labels(found.labels)
    ring = (distance > 1) & (distance <= max(2.0, 0.2 * options.size) + 1)
    inside = found.labels > 0
    area = np.bincount(found.labels[inside], minlength=count)
    inner = np.bincount(found.labels[inside], values[inside], count) / np.maximum(area, 1)
    around = np.bincount(nearest[ring], minlength=count)
    outer = _quantiles(nearest[ring], values[ring], count, options.around)
    contrast = np.clip((inner - outer) / np.maximum(inner - options.ground, FAINT), 0, 1)
    hidden = around < 0.1 * area  # nothing is seen of the surroundings
    contrast[hidden] = 1
    if options.landscape == "intensity":
        foot = _quantiles(found.labels[inside], values[inside], count, 0.05)
        peak = _quantiles(found.labels[inside], values[inside], count, 0.95)
        contrast = np.where(hidden, (peak - foot) / np.maximum(peak, FAINT), contrast)
    contrast, fits = contrast[1:], _ellipse_fits(found.labels, count - 1)
    kept = contrast >= options.contrast + options.ellipse * (1 - fits)
    scores = (contrast * fits**SHAPE).astype(np.float32)
    return select_instances(Instances(found.labels, scores, found.engines), kept)


def _ellipse_fits(labels: np.ndarray, count: int) -> np.ndarray:
    """Area of each object by that of the ellipse with its second moments, (count,) in [0, 1]: 1 for ellipses."""
    runs = find_runs(labels)
    inside = runs.values > 0
    ids, lengths, rows = runs.values[inside] - 1, runs.lengths[inside], runs.rows[inside]
    middles = runs.columns[inside] + (lengths - 1) / 2
    area = np.bincount(ids, lengths, count)
    across = middles - (np.bincount(ids, lengths * middles, count) / area)[ids]
    down = rows - (np.bincount(ids, lengths * rows, count) / area)[ids]
    # a pixel is a square of variance 1/12, a run of n pixels a line of variance n^2/12
    xx = np.bincount(ids, lengths * (across**2 + lengths**2 / 12), count) / area
    yy = np.bincount(ids, lengths * (down**2 + 1 / 12), count) / area
    xy = np.bincount(ids, lengths * across * down, count) / area
    return np.clip(area / (4 * np.pi * np.sqrt(xx * yy - xy**2)), 0, 1)
