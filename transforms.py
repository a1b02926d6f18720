"""Changing the values of a picture: contrast, colour, light, noise, blur, holes.

A transform is a function of an image and a random generator. Images are (H, W, C), uint8 of the whole range 0..255, or
float32 from 0 to 1; what comes back is a new image of that type and range. Where each value maps to one value whatever
its neighbours, 8-bit images go through a table.
"""

import math
from collections.abc import Callable
from functools import cache
from statistics import NormalDist

import cv2
import numpy as np

from image_io import IGNORE_INDEX

Limits = tuple[float, float]

FULLY_COLOURED = 0.2  # saturation from which on it is shifted by the whole amount

# Ruifrok and Johnston: absorption of haematoxylin, eosin and what is left, in red, green and blue.
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])

# Luma and the two colour differences of YIQ, in red, green and blue.
YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


# ----------------------------------------------------------------------------------------------------------------------
# Contrast


def map_values(image: np.ndarray, formula: Callable[..., np.ndarray], *numbers: np.ndarray) -> np.ndarray:
    """Apply a formula on values from 0 to 1, float32, to every pixel; 8-bit images take it from a table.

    Args:
        formula: of the values, whose last axis is channels or pixels and channels, and of the numbers spread to that.
        numbers: (C,) each.
    """
    rows = [number.astype(np.float32) for number in numbers]
    if image.dtype != np.uint8:
        height, width = image.shape[:2]
        flat = formula(image.reshape(height, -1), *(np.tile(row, width) for row in rows))  # a short last axis is slow
        return np.clip(flat, 0, 1, out=flat).reshape(image.shape)
    levels = np.arange(256, dtype=np.float32)[:, None].repeat(image.shape[2], axis=1) / 255
    table = np.rint(np.clip(formula(levels, *rows), 0, 1) * 255).astype(np.uint8)  # (256, C)
    return cv2.LUT(image, table[None]).reshape(image.shape)


def brightness_contrast(image: np.ndarray, rng: np.random.Generator, *, limit: float = 0.2) -> np.ndarray:
    """Scale by 1 - limit to 1 + limit and shift each channel by up to `limit` of its own mean plus deviation.

    A shift by a share of the full range would turn a dim 16-bit band, or a dark retina, black.
    """
    factor, share = 1 + rng.uniform(-limit, limit), rng.uniform(-limit, limit) / _top(image)
    shift = np.asarray(cv2.meanStdDev(image)).sum(axis=0)[:, 0] * share  # (C,)
    return map_values(image, lambda values, shifts: values * np.float32(factor) + shifts, shift)


def gamma(image: np.ndarray, rng: np.random.Generator, *, limit: float = 0.2) -> np.ndarray:
    """Raise to a power of 1 - limit to 1 + limit."""
    power = np.float32(1 + rng.uniform(-limit, limit))
    return map_values(image, lambda values: np.power(values, power))


def clahe(image: np.ndarray, rng: np.random.Generator, *, limit: float = 4) -> np.ndarray:
    """Equalise the luma of RGB, or a single channel, in 8 x 8 tiles; every channel gets the difference.

    Float images are equalised on 256 levels between their darkest and brightest luma and get the difference alone. So a
    dim 16-bit picture gets more contrast and keeps the steps finer than 1/255 that it came with.
    """
    equaliser = cv2.createCLAHE(rng.uniform(1, limit), (8, 8))
    luma = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) if image.shape[2] == 3 else image[..., 0]  # (H, W)
    if image.dtype == np.uint8:
        change = cv2.subtract(equaliser.apply(luma), luma, dtype=cv2.CV_16S)
        return cv2.add(image, cv2.merge([change] * image.shape[2]), dtype=cv2.CV_8U).reshape(image.shape)
    darkest, brightest = float(luma.min()), float(luma.max())
    if darkest == brightest:
        return image.copy()
    step = (brightest - darkest) / 255
    levels = np.rint((luma - darkest) / step).astype(np.uint8)
    return np.clip(image + ((equaliser.apply(levels).astype(np.float32) - levels) * step)[..., None], 0, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Colour


def hue_saturation(
    image: np.ndarray, rng: np.random.Generator, *, hue: float = 40, saturation: float = 0.12, value: float = 0.08
) -> np.ndarray:
    """Turn the hue by up to so many degrees and shift saturation and value of RGB.

    Greys stay grey and what is nearly grey nearly so: its hue is noise, which more saturation would show.
    """
    turned = rng.uniform(-hue, hue)
    stronger, lighter = saturation * rng.uniform(-1, 1), value * rng.uniform(-1, 1)
    if image.dtype == np.uint8:
        levels = np.arange(256)
        shift = 255 * stronger * np.minimum(levels / FULLY_COLOURED / 255, 1)
        table = [(levels + round(turned / 2)) % 180, levels + shift, levels + 255 * lighter]
        hsv = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), np.rint(np.clip(table, 0, 255)).astype(np.uint8).T[None])
        return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    hues, saturations, values = map(np.asarray, cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV)))  # 0..360, 0..1, 0..1
    hues += np.float32(turned % 360)
    hues -= np.float32(360) * (hues >= 360)  # several times as fast as the remainder
    saturations += np.float32(stronger) * np.minimum(saturations / np.float32(FULLY_COLOURED), 1)
    values += np.float32(lighter)
    hsv = cv2.merge([hues, np.clip(saturations, 0, 1), np.clip(values, 0, 1)])
    return np.clip(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), 0, 1)


def rgb_shift(image: np.ndarray, rng: np.random.Generator, *, limit: float = 0.08) -> np.ndarray:
    """Shift each channel by up to `limit` of the range."""
    return map_values(image, np.add, rng.uniform(-limit, limit, (image.shape[2],)))


def pca_shift(image: np.ndarray, rng: np.random.Generator, *, strength: float = 0.25) -> np.ndarray:
    """Shift all pixels along the axes along which the picture's own colours vary, each by a share of its spread."""
    step = max(1, math.isqrt(image.shape[0] * image.shape[1] // 4096))
    pixels = image[::step, ::step].reshape(-1, image.shape[2]).astype(np.float64) / _top(image)
    variances, axes = np.linalg.eigh(np.cov(pixels, rowvar=False))
    share = np.clip(rng.standard_normal(len(variances)), -2, 2) * strength
    return map_values(image, np.add, axes @ (share * np.sqrt(np.maximum(variances, 0))))


def stain_shift(
    image: np.ndarray, rng: np.random.Generator, *, factor: float = 0.25, offset: float = 0.03
) -> np.ndarray:
    """Change how much haematoxylin and eosin a stained slide has taken up: shares of each stain in optical density."""
    factors, offsets = 1 + rng.uniform(-factor, factor, 3), rng.uniform(-offset, offset, 3)
    mixed = np.linalg.inv(STAINS) @ np.diag(factors) @ STAINS  # densities of channels to those after the change
    weights = np.concatenate([mixed.T, (offsets @ STAINS)[:, None]], axis=1)
    if image.dtype == np.uint8:
        density = cv2.LUT(image, -np.log((np.arange(256, dtype=np.float32) + 1) / 256))
    else:
        density = -cv2.log((image * 255 + 1) / 256)
    return _like(image, (cv2.exp(-cv2.transform(density, weights)) * 256 - 1) / 255)


def colour_jitter(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.2,
    hue: float = 36,
) -> np.ndarray:
    """Brightness, contrast and saturation of RGB by 1 - limit to 1 + limit, hue by up to so many degrees.

    All four are one matrix on colours: contrast leaves the mean luma, saturation and hue leave each pixel's luma, and
    hue turns the plane of colour differences of YIQ, so greys stay grey.
    """
    lighter, harder, richer = (1 + rng.uniform(-limit, limit) for limit in (brightness, contrast, saturation))
    angle = math.radians(rng.uniform(-hue, hue))
    differences = np.eye(3)  # of luma and the two colour differences
    differences[1:, 1:] = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]) * richer
    middle = lighter * float(YIQ[0] @ cv2.mean(image)[:3])  # luma
    colours = lighter * harder * np.linalg.inv(YIQ) @ differences @ YIQ
    weights = np.concatenate([colours, np.full((3, 1), (1 - harder) * middle)], axis=1)
    changed = cv2.transform(image, weights)  # 8 bits are rounded and cut here
    return changed if image.dtype == np.uint8 else np.clip(changed, 0, 1, out=changed)


def band_gains(image: np.ndarray, rng: np.random.Generator, *, gain: float = 0.3, offset: float = 0.2) -> np.ndarray:
    """Stretch each channel about its mean by 1 - gain to 1 + gain, and shift it by a share of its own deviation."""
    means, spreads = np.asarray(cv2.meanStdDev(image))[..., 0] / _top(image)  # (C,) each
    factors = 1 + rng.uniform(-gain, gain, (image.shape[2],))
    shifts = means * (1 - factors) + spreads * rng.uniform(-offset, offset, (image.shape[2],))
    return map_values(image, lambda values, factor, shift: values * factor + shift, factors, shifts)


def solarise(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Turn round what is lighter than the middle of the picture's own range: its lightest becomes its darkest."""
    low, high = float(image.min()) / _top(image), float(image.max()) / _top(image)
    middle, ends = np.float32((low + high) / 2), np.float32(low + high)
    return map_values(image, lambda values: np.where(values > middle, ends - values, values))


def to_grey(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Every channel becomes the luma of RGB."""
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def shuffle_channels(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Put the channels into another order."""
    order = rng.permutation(image.shape[2])
    while (order == np.arange(len(order))).all() and len(order) > 1:
        order = rng.permutation(len(order))
    return np.ascontiguousarray(image[..., order])


# ----------------------------------------------------------------------------------------------------------------------
# Light and weather


def haze(image: np.ndarray, rng: np.random.Generator, *, share: Limits = (0.05, 0.3)) -> np.ndarray:
    """Mix in white, by a share that varies slowly over the picture."""
    coarse = rng.uniform(*share) * rng.uniform(0.5, 1, (4, 4))
    white = cv2.resize(coarse.astype(np.float32), image.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    return _light(image, 1 - white, white)


def uneven_light(image: np.ndarray, rng: np.random.Generator, *, limit: float = 0.3) -> np.ndarray:
    """Multiply by a smooth field of 1 - limit to 1 + limit, as of a lamp that stands aside."""
    coarse = (1 + rng.uniform(-limit, limit, (3, 3))).astype(np.float32)
    return _light(image, cv2.resize(coarse, image.shape[1::-1], interpolation=cv2.INTER_LINEAR))


def shadow(image: np.ndarray, rng: np.random.Generator, *, share: Limits = (0.2, 0.5)) -> np.ndarray:
    """Darken a strip with a soft edge across the picture, as of a cloud or a building, by a share of the light."""
    height, width = image.shape[:2]
    angle, middle, half = rng.uniform(0, math.pi), rng.uniform(-0.35, 0.35), rng.uniform(0.08, 0.25)
    rows, columns = np.linspace(-0.5, 0.5, height, dtype=np.float32), np.linspace(-0.5, 0.5, width, dtype=np.float32)
    across = np.float32(math.cos(angle)) * columns[None] + np.float32(math.sin(angle)) * rows[:, None]
    covered = np.clip((np.float32(half) - abs(across - np.float32(middle))) / np.float32(0.04) + 0.5, 0, 1)
    return _light(image, 1 - np.float32(rng.uniform(*share)) * covered)


def _light(image: np.ndarray, factor: np.ndarray, added: np.ndarray | None = None) -> np.ndarray:
    """Multiply all channels by one field (H, W) float32, and add another one in shares of the range."""
    depth = cv2.CV_8U if image.dtype == np.uint8 else cv2.CV_32F
    if added is None:
        lit = cv2.multiply(image, _spread(factor, image), dtype=depth)
    else:
        lit = cv2.multiply(image, _spread(factor, image), dtype=cv2.CV_32F)
        lit = cv2.add(lit, _spread(added * _top(image), image), dtype=depth)
    return np.minimum(lit, lit.dtype.type(_top(image))).reshape(image.shape)


def _spread(field: np.ndarray, image: np.ndarray) -> np.ndarray:
    """A field (H, W) for each channel of an image: numpy's own way of spreading it is several times slower."""
    return cv2.merge([field] * image.shape[2])


# ----------------------------------------------------------------------------------------------------------------------
# Sharpness and noise


def blur(image: np.ndarray, rng: np.random.Generator, *, sigma: Limits = (0.5, 1.5)) -> np.ndarray:
    """Gaussian blur of so many pixels."""
    soft = cv2.GaussianBlur(image, (0, 0), rng.uniform(*sigma)).reshape(image.shape)
    return np.minimum(soft, soft.dtype.type(_top(image)))


def median(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Median of 3 x 3 pixels, channel by channel."""
    if image.shape[2] in (1, 3):
        return cv2.medianBlur(image, 3).reshape(image.shape)
    return cv2.merge([cv2.medianBlur(band, 3) for band in cv2.split(image)])


def downscale(image: np.ndarray, rng: np.random.Generator, *, scale: Limits = (0.4, 0.8)) -> np.ndarray:
    """Lower the resolution by area averaging and linear enlargement."""
    height, width = image.shape[:2]
    factor = rng.uniform(*scale)
    small = (max(1, round(width * factor)), max(1, round(height * factor)))
    bands = [image[..., first : first + 4] for first in range(0, image.shape[2], 4)]  # OpenCV takes four at a time
    coarse = [cv2.resize(np.ascontiguousarray(band), small, interpolation=cv2.INTER_AREA) for band in bands]
    fine = [cv2.resize(band, (width, height), interpolation=cv2.INTER_LINEAR) for band in coarse]
    return np.concatenate([band.reshape(height, width, -1) for band in fine], axis=2)


def gaussian_noise(image: np.ndarray, rng: np.random.Generator, *, deviation: Limits = (0.012, 0.04)) -> np.ndarray:
    """Normal noise, of one deviation (share of the range) over the whole picture."""
    return _add(image, normal_noise(rng, image.shape, rng.uniform(*deviation) * _top(image)))


def grain(image: np.ndarray, rng: np.random.Generator, *, share: Limits = (0.03, 0.15)) -> np.ndarray:
    """Normal noise of a share of the picture's own deviation: a dim picture is not drowned in it."""
    spread = float(np.sqrt(np.square(cv2.meanStdDev(image)[1]).mean()))
    return _add(image, normal_noise(rng, image.shape, rng.uniform(*share) * spread))


def sensor_noise(
    image: np.ndarray, rng: np.random.Generator, *, own: Limits = (0.01, 0.05), common: Limits = (0.015, 0.075)
) -> np.ndarray:
    """Noise that grows with the square root of the signal: each channel's own, and one that all of them share."""
    noise = normal_noise(rng, image.shape, rng.uniform(*own) * _top(image))
    shared = normal_noise(rng, image.shape[:2], rng.uniform(*common) * _top(image))
    noise += _spread(shared, image).reshape(image.shape)
    if image.dtype == np.uint8:
        noise *= cv2.LUT(image, np.sqrt(np.arange(256, dtype=np.float32) / 255)).reshape(image.shape)
    else:
        noise *= np.sqrt(image)
    return _add(image, noise)


def normal_noise(rng: np.random.Generator, shape: tuple[int, ...], deviation: float) -> np.ndarray:
    """Normal noise, float32: quantiles looked up by random 16-bit numbers, several times as fast as drawing it."""
    table = _quantiles() * np.float32(deviation)
    return table.take(np.frombuffer(rng.bytes(2 * math.prod(shape)), "<u2"), mode="wrap").reshape(shape)


@cache
def _quantiles() -> np.ndarray:
    """65,536 equally likely values of the normal law, in order, of mean 0 and deviation 1."""
    upper = np.array([NormalDist().inv_cdf(0.5 + (place + 0.5) / 65536) for place in range(32768)])
    both = np.concatenate([-upper[::-1], upper])
    return (both / both.std()).astype(np.float32)


def _add(image: np.ndarray, change: np.ndarray) -> np.ndarray:
    """The sum with a change of the same units, within the range; the change is used up."""
    if image.dtype == np.uint8:
        return cv2.add(image, change, dtype=cv2.CV_8U).reshape(image.shape)
    change += image
    return np.clip(change, 0, 1, out=change)


def _top(image: np.ndarray) -> float:
    """The value of white."""
    return 255 if image.dtype == np.uint8 else 1


def _like(image: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """Values from 0 to 1 as an image of the type of another one; those beyond are cut."""
    return np.rint(np.clip(unit, 0, 1) * 255).astype(np.uint8) if image.dtype == np.uint8 else np.clip(unit, 0, 1)


# ----------------------------------------------------------------------------------------------------------------------
# With the mask


def holes(
    image: np.ndarray, mask: np.ndarray, rng: np.random.Generator, *, ignored: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Black out 1 to 8 rectangles of 2 to 8 % of each side; the mask keeps what is hidden there, or has 255."""
    image, mask = image.copy(), mask.copy()
    for _ in range(rng.integers(1, 9)):
        sides = [max(1, round(side * rng.uniform(0.02, 0.08))) for side in mask.shape]
        box = tuple(
            slice(start := int(rng.integers(0, side - length + 1)), start + length)
            for side, length in zip(mask.shape, sides, strict=True)
        )
        image[box] = 0
        if ignored:
            mask[box] = IGNORE_INDEX
    return image, mask


def shuffle_cells(
    image: np.ndarray, mask: np.ndarray, rng: np.random.Generator, *, across: int = 3
) -> tuple[np.ndarray, np.ndarray]:
    """Cut into across x across equal cells and put them into another order, the mask too; what is left over stays."""
    height, width = (side // across for side in mask.shape)
    boxes = [
        (slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width))
        for row in range(across)
        for column in range(across)
    ]
    image, mask, before = image.copy(), mask.copy(), (image, mask)
    for box, place in zip(boxes, rng.permutation(len(boxes)).tolist(), strict=True):
        image[box], mask[box] = before[0][boxes[place]], before[1][boxes[place]]
    return image, mask
