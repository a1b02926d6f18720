"""The watershed engine: objects of a picture by thresholds, shapes and their own heights, without weights.

One channel is cleaned, stretched and cut; the mask is parted at its necks. Each part is then cut again at a share of
its own height over the background, which finds the same outline for bright and dim objects and parts what a threshold
for the whole picture had joined. What does not rise over its surroundings is dropped.
"""

from dataclasses import replace

import cv2
import numpy as np

from annotation import basins
from annotation.instances import Instances, clean_instances, empty_instances, number_instances, select_instances
from annotation.presets import (
    PRESET_NAMES,
    PRESETS,
    SPACE,
    WatershedOptions,
    add_watershed_args,
    options_from,
    with_preset,
)
from annotation.retinex import remove_spots, retinex, smooth_bilateral, wide_blur
from annotation.scale import estimate_size
from annotation.thresholds import find_threshold, thin

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
SAMPLE_SIDE = 512  # of the windows that a large picture is judged by
SAMPLE_PIXELS = 9 * SAMPLE_SIDE**2
CHANNELS = ("red", "green", "blue")
HEIGHT_RANK = 0.8  # an object's height is reached by the rest of its pixels
QUANTILE_BINS = 128
BLUR = 0.05
SMOOTH = 0.05
OPENING = 0.12
REACH = 0.4
MOST = 1e18  # of the brightness of a pixel
COLOUR_SAMPLE = 1 << 14
FAINT = 1e-6
RIM_HOLES = 0.1
CROWDED = 0.35


def segment(image: np.ndarray, options: WatershedOptions | None = None) -> Instances:
    """Find the objects of a picture.

    Args:
        image: (H, W, C) uint8, uint16 or float32; NaN and infinities count as the median. Of several channels the
            first three are red, green and blue.
        options: resolved or not; None chooses all from the picture.

    Returns:
        The objects. A score is high where an object rises far over its surroundings and is convex.
    """
    options = options or WatershedOptions()
    height, width = image.shape[:2]
    if min(height, width) < 3:
        return empty_instances(height, width)
    values, resolved = _prepare(image, options)
    if values is None:
        return empty_instances(height, width)
    return _find_objects(values, resolved)


def choose_options(image: np.ndarray, options: WatershedOptions | None = None) -> WatershedOptions:
    """Resolve a preset of auto and all that is None from the picture; of a large one nine windows are looked at.

    Returns:
        Options without None. segment gives the same with them as with the options they come from.
    """
    return _prepare(image, options or WatershedOptions(), only_options=True)[1]


# ----------------------------------------------------------------------------------------------------------------------
# From the picture to bright objects on a range of 0 to 1


def _sample(image: np.ndarray) -> np.ndarray:
    """The picture, or nine windows of a large one, evenly spread, side by side."""
    height, width = image.shape[:2]
    if height * width <= SAMPLE_PIXELS:
        return image
    high, wide = min(height, 3 * SAMPLE_SIDE), min(width, 3 * SAMPLE_SIDE)
    rows = [np.arange(high // 3) + start for start in np.linspace(0, height - high // 3, 3).astype(int)]
    columns = [np.arange(wide // 3) + start for start in np.linspace(0, width - wide // 3, 3).astype(int)]
    return image[np.concatenate(rows)][:, np.concatenate(columns)]


def _to_channel(image: np.ndarray, channel: str) -> np.ndarray:
    """One channel (H, W) float32, finite."""
    count = image.shape[2]
    if channel in CHANNELS and count >= 3:
        values = image[..., CHANNELS.index(channel)].astype(np.float32)
    elif count == 1:
        values = image[..., 0].astype(np.float32)
    elif image.dtype == np.uint8 and count >= 3:
        values = cv2.transform(np.ascontiguousarray(image[..., :3]), np.full((1, 3), 1 / 3)).astype(np.float32)
    else:
        values = image[..., :3].mean(axis=2, dtype=np.float64).astype(np.float32)
    return _finite(values) if image.dtype.kind == "f" else values


def _finite(values: np.ndarray) -> np.ndarray:
    """Values (H, W) float32 whose squares of sums fit; what is no number becomes the median."""
    values = np.clip(values, -MOST, MOST)
    missing = np.isnan(values)
    if missing.any():
        values[missing] = 0 if missing.all() else np.median(values[~missing])
    return values


def _choose_channel(image: np.ndarray) -> str:
    """The channel that Otsu's threshold parts best, for pictures in colour."""
    if not _is_coloured(image):
        return "grey"
    best = {}
    for name in ("grey", *CHANNELS):
        values = cv2.blur(_to_channel(image, name), (3, 3))
        best[name] = find_threshold(values, *_ends(values, 0.1)).separability
    return max(best, key=lambda name: best[name])


def _is_coloured(image: np.ndarray) -> bool:
    """Whether channels differ by more than 1 % of the range, on average."""
    if image.shape[2] < 3:
        return False
    step = max(1, int(np.sqrt(image.shape[0] * image.shape[1] / COLOUR_SAMPLE)))
    red, green, blue = (_finite(image[::step, ::step, channel].astype(np.float32)) for channel in range(3))
    span = max(float(one.max()) for one in (red, green, blue)) - min(float(one.min()) for one in (red, green, blue))
    return float((np.abs(red - green) + np.abs(green - blue)).mean()) > 0.02 * span


def _ends(values: np.ndarray, percentage: float) -> tuple[float, float]:
    low, high = np.percentile(thin(values), [percentage, 100 - percentage])
    return float(low), float(high)


def _clean(values: np.ndarray, options: WatershedOptions) -> np.ndarray:
    """Filters before the stretch; every field they use is set."""
    if options.retinex:
        values = retinex(values, options.retinex)
    if options.bilateral:
        values = smooth_bilateral(values, options.bilateral, options.bilateral_colour, options.bilateral_space)
    if options.reconstruct:
        values = remove_spots(values, options.reconstruct | 1)
    return cv2.GaussianBlur(values, (0, 0), options.blur) if options.blur else values


def _prepare(
    image: np.ndarray, options: WatershedOptions, *, only_options: bool = False
) -> tuple[np.ndarray | None, WatershedOptions]:
    """The picture as bright objects on a range from 0, None where nothing is to be seen, and the resolved options."""
    sample = _sample(image)
    automatic = options.preset == "auto"
    known = with_preset(options, "nuclei" if automatic else options.preset)
    channel = known.channel or _choose_channel(sample)
    values = plain = _to_channel(sample, channel)
    if automatic:
        known = with_preset(options, _choose_preset(plain, sample))
    options = replace(known, channel=channel)
    values = _clean(plain, options)
    if options.size is None or options.blur is None:
        rough = values if options.blur else cv2.GaussianBlur(values, (0, 0), 1.0)
        found = _choose_range(rough, options)
        size = options.size or estimate_size(_stretch(rough, found))
        blur = float(np.clip(size * BLUR, 0.7, 3.0)) if options.blur is None else options.blur
        values = _clean(plain, replace(options, blur=blur))
        options = replace(options, size=size, blur=blur, objects=found.objects)
    options = _choose_range(values, options)
    stretched = _stretch(values, options)
    options = _choose_level(stretched, options)
    area = np.pi / 4 * options.size**2
    options = replace(
        options,
        opening=max(3, int(OPENING * options.size) | 1) if options.opening is None else options.opening,
        smooth=float(np.clip(options.size * SMOOTH, 0.7, 3.0)) if options.smooth is None else options.smooth,
        holes=int(0.4 * area) if options.holes is None else options.holes,
        min_area=max(20, int(0.05 * area)) if options.min_area is None else options.min_area,
        max_area=_largest(image, options) if options.max_area is None else options.max_area,
    )
    if only_options or options.black == options.white:
        return None, options
    if sample is not image:
        stretched = _stretch(_clean(_to_channel(image, options.channel), options), options)
    return stretched, options


def _largest(image: np.ndarray, options: WatershedOptions) -> int:
    """Any area, but where every pixel belongs to some basin those many times the typical size are no objects."""
    return int((8 * options.size) ** 2) if options.landscape == "intensity" else image.shape[0] * image.shape[1]


def _choose_preset(values: np.ndarray, sample: np.ndarray) -> str:
    """The preset for a channel of the sample: by what is the background, holes in the mask, colour and crowding."""
    options = replace(PRESETS["nuclei"], blur=1.0, gamma=1.0)
    values = _clean(values, options)
    options = _choose_range(values, options)
    coloured = _is_coloured(sample)
    if options.black == options.white:
        return "nuclei"
    stretched = _stretch(values, options)
    mask = stretched > _choose_level(stretched, options).level
    network = _hole_share(mask) > RIM_HOLES  # what encloses so much is no objects but what lies around them
    if options.objects == "dark":
        return "grains" if network else "histology" if coloured else "nuclei"
    if network:
        return "bubbles"
    return "froth" if coloured and mask.mean() > CROWDED else "fluorescence"


def _hole_share(mask: np.ndarray) -> float:
    """Area of the holes of a mask by the area of mask and holes."""
    filled = _fill(mask.view(np.uint8), mask.size)
    return float((filled.sum() - mask.sum()) / max(1, filled.sum()))


def _choose_range(values: np.ndarray, options: WatershedOptions) -> WatershedOptions:
    """Polarity, and the values that become 0 and 1."""
    low, high = _ends(values, options.stretch)
    if options.objects is None:
        threshold = find_threshold(values, low, high).at
        options = replace(options, objects="dark" if (values > threshold).mean() > 0.5 else "bright")
    dark = (
        options.objects == "dark"
    )  # as a rule they are seen through others: no faint ones, and they rise on all sides
    if dark:
        low, high = high, low
    return replace(
        options,
        gamma=(1.0 if dark else 0.5) if options.gamma is None else options.gamma,
        around=(0.9 if dark else 0.75) if options.around is None else options.around,
        black=low if options.black is None else options.black,
        white=high if options.white is None else options.white,
    )


def _stretch(values: np.ndarray, options: WatershedOptions) -> np.ndarray:
    span = options.white - options.black
    if not abs(span) > 0:
        return np.zeros_like(values)
    return np.maximum((values - np.float32(options.black)) * np.float32(1 / span), 0)


def _choose_level(values: np.ndarray, options: WatershedOptions) -> WatershedOptions:
    if options.level is not None:
        return options
    if options.threshold == "none":
        return replace(options, level=0.0)
    power = np.minimum(thin(values), 1)[None] ** np.float32(options.gamma)
    level = find_threshold(power, 0.0, 1.0, weighted=options.threshold == "weighted").at
    return replace(options, level=float(options.lower * level ** (1 / options.gamma)))


# ----------------------------------------------------------------------------------------------------------------------
# From bright objects to a label map


def _find_objects(values: np.ndarray, options: WatershedOptions) -> Instances:
    mask = _cut(values, options)
    labels = _part(mask, values, options)
    if options.core:
        heights = values - _background(values, mask, options.size)
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
    return _fill(tidy, tidy.size if options.holes < 0 else options.holes)


def _ellipse(side: int) -> np.ndarray:
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))


def _fill(mask: np.ndarray, limit: int) -> np.ndarray:
    """Fill holes of at most so many pixels that do not reach the frame; (H, W) uint8 0 or 1."""
    if not limit:
        return mask
    height, width = mask.shape
    _, areas, stats, _ = cv2.connectedComponentsWithStats(1 - mask, connectivity=4)
    left, top, wide, high, area = stats.T
    holes = (left > 0) & (top > 0) & (left + wide < width) & (top + high < height) & (area <= limit)
    holes[0] = False
    return mask | basins.look_up(holes.view(np.uint8), areas)


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


def _background(values: np.ndarray, mask: np.ndarray, size: float) -> np.ndarray:
    """The mean of what is no object in a window of four sizes, drawn to that of the picture where there is little."""
    outside = (1 - mask).astype(np.float32)
    if not outside.any():
        return np.full(values.shape, values.min(), np.float32)
    side = int(4 * size) | 1
    total = cv2.blur(values * outside, (side, side), borderType=cv2.BORDER_REFLECT)
    share = cv2.blur(outside, (side, side), borderType=cv2.BORDER_REFLECT)
    overall = float((values * outside).sum() / outside.sum())
    return (total + np.float32(0.02 * overall)) / (share + np.float32(0.02))


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
    empty = cv2.dilate(mask, _ellipse(5)) == 0
    ground = float(np.median(thin(values[empty][None]))) if empty.any() else float(values.min())
    contrast = np.clip((inner - outer) / np.maximum(inner - ground, FAINT), 0, 1)
    hidden = around < 0.1 * area  # nothing is seen of the surroundings
    contrast[hidden] = 1
    if options.landscape == "intensity":
        foot = _quantiles(found.labels[inside], values[inside], count, 0.05)
        peak = _quantiles(found.labels[inside], values[inside], count, 0.95)
        contrast = np.where(hidden, (peak - foot) / np.maximum(peak, FAINT), contrast)
    kept = (contrast >= options.contrast)[1:]
    scores = contrast[1:].astype(np.float32)
    return select_instances(Instances(found.labels, scores, found.engines), kept)
