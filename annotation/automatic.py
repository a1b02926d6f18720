"""Choose the watershed engine's options from a picture, and bring the picture to bright objects on a range from 0."""

from collections.abc import Callable
from dataclasses import fields, replace

import cv2
import numpy as np

from annotation.basins import look_up
from annotation.presets import PRESETS, WatershedOptions, with_preset
from annotation.retinex import remove_spots, retinex, smooth_bilateral
from annotation.scale import estimate_size
from annotation.thresholds import find_threshold, thin

SAMPLE_SIDE = 512  # of the windows that a large picture is judged by
SAMPLE_PIXELS = 9 * SAMPLE_SIDE**2
CANDIDATES = 7  # places along each side that a window may take; every third of them is an ordinary one
EMPTY = 0.25  # contrast of a window, by that of the nine with the most, below which it shows nothing
CHANNELS = ("red", "green", "blue")
RIM_HOLES = 0.1  # share of the filled mask: what encloses more is a network, not objects
WIDE = 0.6  # share of the mask in areas of three sizes across and more: what is measured lies within them
CROWDED = 0.25  # share of the picture above the threshold
BLUR = 0.05  # sigmas and the width of the opening, as shares of the size
SMOOTH = 0.05
OPENING = 0.12
MOST = 1e18  # of the brightness of a pixel
COLOUR_SAMPLE = 1 << 14  # pixels

Read = Callable[[int, int, int, int], np.ndarray]


def sample_windows(height: int, width: int, read: Read) -> np.ndarray:
    """A part of a picture at full resolution, (h, w, C), by which what is automatic is chosen, once for all of it.

    The whole of a small picture; of a large one nine windows, evenly spread, side by side. One that is nearly empty, as
    the glass around tissue is, makes way for the nearest of more such places that is not, as long as there is one.

    Args:
        height, width: of the picture.
        read: gives the pixels of a window (top, left, height, width), (h, w, C).
    """
    if height * width <= SAMPLE_PIXELS:
        return read(0, 0, height, width)
    high, wide = (min(SAMPLE_SIDE, max(1, length // 3)) for length in (height, width))
    tops, lefts = (
        [(length - part) * step // (CANDIDATES - 1) for step in range(CANDIDATES)]
        for length, part in ((height, high), (width, wide))
    )
    places = [(top, left) for top in tops for left in lefts]
    variances = np.array([_variance(read(top, left, high, wide)[::4, ::4]) for top, left in places])
    chosen = [places[index] for index in _choose_windows(np.array(places), variances)]
    picked = [read(top, left, high, wide) for top, left in chosen]
    return np.concatenate([np.concatenate(picked[first : first + 3], axis=1) for first in (0, 3, 6)])


def _choose_windows(places: np.ndarray, variances: np.ndarray) -> list[int]:
    """Nine of the candidates (n, 2), which lie in a square of rows: those evenly spread, empty ones replaced."""
    steps = range(0, CANDIDATES, (CANDIDATES - 1) // 2)
    spread = [row * CANDIDATES + column for row in steps for column in steps]
    empty = variances < EMPTY**2 * np.sort(variances)[-len(spread) :].mean()
    free = ~empty
    free[spread] = False
    for index, place in enumerate(spread):
        if empty[place] and free.any():
            distances = ((places - places[place]) ** 2).sum(axis=1)
            spread[index] = int(np.argmin(np.where(free, distances, np.iinfo(np.int64).max)))
            free[spread[index]] = False
    return spread


def _variance(window: np.ndarray) -> float:
    """Variance of the numbers (h, w, C), the mean over the channels."""
    values = np.clip(window.reshape(-1, window.shape[2]).astype(np.float64), -MOST, MOST)
    known = ~np.isnan(values)
    count = np.maximum(1, known.sum(axis=0))
    means = np.where(known, values, 0).sum(axis=0) / count
    return float((np.where(known, values - means, 0) ** 2).sum(axis=0).dot(1 / count) / len(count))


def _sample(image: np.ndarray) -> np.ndarray:
    """The picture, or a sample of a large one."""
    height, width = image.shape[:2]
    if height * width <= SAMPLE_PIXELS:
        return image
    return sample_windows(height, width, lambda top, left, high, wide: image[top : top + high, left : left + wide])


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
    image = _thin_out(image)
    best = {}
    for name in ("grey", *CHANNELS):
        values = cv2.blur(_to_channel(image, name), (3, 3))
        best[name] = find_threshold(values, *_ends(values, 0.1)).separability
    return max(best, key=lambda name: best[name])


def _is_coloured(image: np.ndarray) -> bool:
    """Whether channels differ by more than 1 % of the range, on average."""
    if image.shape[2] < 3:
        return False
    image = _thin_out(image)
    red, green, blue = (_finite(image[..., channel].astype(np.float32)) for channel in range(3))
    span = max(float(one.max()) for one in (red, green, blue)) - min(float(one.min()) for one in (red, green, blue))
    return float((np.abs(red - green) + np.abs(green - blue)).mean()) > 0.02 * span


def _thin_out(image: np.ndarray) -> np.ndarray:
    """Every n-th row and column, COLOUR_SAMPLE pixels or some more: as much as a choice of colour needs."""
    step = max(1, int(np.sqrt(image.shape[0] * image.shape[1] / COLOUR_SAMPLE)))
    return image[::step, ::step]


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


def prepare(
    image: np.ndarray, options: WatershedOptions, *, only_options: bool = False
) -> tuple[np.ndarray | None, WatershedOptions]:
    """The picture as bright objects on a range from 0, None where nothing is to be seen, and the resolved options."""
    sample = _sample(image)
    automatic, asked = options.preset == "auto", options
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
    if automatic and options.preset == "nuclei" and options.objects == "dark" and _are_within(stretched, options):
        options = _fill_in(with_preset(asked, "cytology"), options)
    if options.ground is None:
        options = replace(options, ground=_find_ground(stretched, options.level))
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


def _are_within(values: np.ndarray, options: WatershedOptions) -> bool:
    """Whether objects lie within larger ones, as nuclei in cells do: most of the mask is in areas of several sizes."""
    mask = (values > options.level).view(np.uint8)
    areas = cv2.connectedComponentsWithStats(mask, connectivity=4)[2][1:, cv2.CC_STAT_AREA]
    return bool(areas[areas > np.pi / 4 * (3 * options.size) ** 2].sum() > WIDE * areas.sum())


def _fill_in(options: WatershedOptions, known: WatershedOptions) -> WatershedOptions:
    """The options, and what is known where they are still automatic."""
    missing = [one.name for one in fields(options) if getattr(options, one.name) is None]
    return replace(options, **{name: getattr(known, name) for name in missing})


def _hole_share(mask: np.ndarray) -> float:
    """Area of the holes of a mask by the area of mask and holes."""
    filled = fill_holes(mask.view(np.uint8), mask.size)
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
    stretched = values - np.float32(options.black)
    stretched *= np.float32(1 / span)
    return np.maximum(stretched, 0, out=stretched)


def _choose_level(values: np.ndarray, options: WatershedOptions) -> WatershedOptions:
    if options.level is not None:
        return options
    if options.threshold == "none":
        return replace(options, level=0.0)
    power = np.minimum(thin(values), 1)[None] ** np.float32(options.gamma)
    level = find_threshold(power, 0.0, 1.0, weighted=options.threshold == "weighted").at
    return replace(options, level=float(options.lower * level ** (1 / options.gamma)))


def _find_ground(values: np.ndarray, level: float) -> float:
    """Brightness of what is no object; one number for all parts of a picture, so that they are judged alike."""
    values = thin(values)
    below = values[values <= level] if level > 0 else values[:0]
    return float(np.median(below)) if below.size else float(np.quantile(values, 0.25))


def fill_holes(mask: np.ndarray, limit: int) -> np.ndarray:
    """Fill holes of at most so many pixels that do not reach the frame; (H, W) uint8 0 or 1."""
    if not limit:
        return mask
    height, width = mask.shape
    _, areas, stats, _ = cv2.connectedComponentsWithStats(1 - mask, connectivity=4)
    left, top, wide, high, area = stats.T
    holes = (left > 0) & (top > 0) & (left + wide < width) & (top + high < height) & (area <= limit)
    holes[0] = False
    return mask | look_up(holes.view(np.uint8), areas)
