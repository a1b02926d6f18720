"""Paired image and mask transforms behind a few preset names.

`geometric` moves pixels and runs before the cut, on a crop larger than the network sees; `local` changes values and
runs after it. Both are functions of a seed alone, so the number of loader workers does not change a sample.

Example:
    augmentation = Augmentation("hard", rgb=True, value_range=(0, 255))
    image, mask = augmentation.geometric(image, mask, seed=1)
    image, mask = augmentation.local(image, mask, seed=1)
"""

import os
import random
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # Otherwise the import asks PyPI for a newer version.
import albumentations as A  # noqa: E402

from image_io import IGNORE_INDEX  # noqa: E402

PRESETS = ("none", "safe", "light", "medium", "hard", "one", "vessel")
DTYPES = (np.uint8, np.uint16, np.float32)

Limit = float | Sequence[float]


class Augmentation:
    """A named preset, ready to be applied to samples of one data set.

    Transforms with a constant border give the pixels they bring in from outside the mask value 255 (ignore) and the
    image value at the low end of value_range; those that reflect do so in image and mask alike. Nearest-neighbour
    sampling of the mask never makes a class that was not there. An instance holds no random state between calls and
    can be pickled, but one instance must not be called from two threads at once.

    Args:
        preset: a name from PRESETS.
        rgb: the first three channels are red, green, blue. Colour transforms touch only them; brightness, contrast
            and gamma act on all channels, CLAHE on the lightness of RGB or on a single channel.
        value_range: smallest and largest value of the data, each one number or one per channel. It fixes what "20 %
            brighter" means. Values outside it are kept: the range of that sample is widened to hold them.

    Raises:
        ValueError: unknown preset, or a range that is empty or not finite.
    """

    def __init__(self, preset: str, *, rgb: bool, value_range: tuple[Limit, Limit]) -> None:
        if preset not in PRESETS:
            raise ValueError(f"unknown augmentation preset {preset!r}, expected one of: {', '.join(PRESETS)}")
        low, high = (np.asarray(limit, np.float32) for limit in value_range)
        if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
            raise ValueError(f"value_range is {value_range}, expected two finite numbers, the first the smaller")
        self.preset = preset
        self.rgb = rgb
        self.low, self.high = low, high
        self._geometric = {square: _compose(_geometric_steps(preset, square)) for square in (True, False)}
        self._local = {single: _compose(_local_steps(preset, rgb, single)) for single in (True, False)}

    def geometric(self, image: np.ndarray, mask: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Flip, turn and warp an image and its mask together.

        Args:
            image: (H, W, C) uint8, uint16 or float32. When H and W differ, turns by 90 degrees become flips so that
                the shape stays.
            mask: (H, W) uint8 class index, 255 = ignore.
            seed: any integer >= 0; the same seed repeats the result.

        Returns:
            Image and mask of the same shapes and dtypes; the inputs are left as they were.

        Raises:
            ValueError: shapes or dtypes other than those above.
        """
        self._check(image, mask)
        pipeline = self._geometric[image.shape[0] == image.shape[1]]
        if pipeline is None:
            return image, mask
        if not self.low.any():
            return _run(pipeline, image, mask, 2 * seed)
        # Borders are filled with 0, so the low end of the range is moved there and back.
        shifted, mask = _run(pipeline, image.astype(np.float32) - self.low, mask, 2 * seed)
        return _to_dtype(shifted + self.low, image.dtype), mask

    def local(self, image: np.ndarray, mask: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Change values: colour, contrast, noise, blur, haze, holes, shuffled cells (which move the mask too).

        Args:
            image: (H, W, C) uint8, uint16 or float32, finite.
            mask: (H, W) uint8 class index, 255 = ignore. Holes keep their class: the object is there, hidden.
            seed: any integer >= 0; the same seed repeats the result.

        Returns:
            Image and mask of the same shapes and dtypes; the inputs are left as they were.

        Raises:
            ValueError: shapes or dtypes other than those above, or values that are not finite.
        """
        self._check(image, mask)
        pipeline = self._local[image.shape[2] == 1]
        if pipeline is None:
            return image, mask
        if image.dtype == np.uint8 and (self.low == 0).all() and (self.high == 255).all():
            return _run(pipeline, image, mask, 2 * seed + 1)
        low, span = self._sample_range(image)
        scaled = (image.astype(np.float32) - low) / span
        changed, mask = _run(pipeline, scaled, mask, 2 * seed + 1)
        return _to_dtype(changed * span + low, image.dtype), mask

    def _sample_range(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        smallest, largest = image.min(axis=(0, 1)), image.max(axis=(0, 1))  # (C,)
        if not (np.isfinite(smallest).all() and np.isfinite(largest).all()):
            raise ValueError("image holds NaN or infinite values: fill the pixels without data before augmenting")
        low = np.minimum(self.low, smallest).astype(np.float32)
        return low, np.maximum(self.high, largest).astype(np.float32) - low

    def _check(self, image: np.ndarray, mask: np.ndarray) -> None:
        if image.ndim != 3 or image.dtype not in DTYPES:
            raise ValueError(
                f"image is {image.dtype} of shape {image.shape}, expected (H, W, C) uint8, uint16 or float32"
            )
        if mask.shape != image.shape[:2] or mask.dtype != np.uint8:
            raise ValueError(f"mask is {mask.dtype} of shape {mask.shape}, expected uint8 {image.shape[:2]}")
        if self.rgb and image.shape[2] < 3:
            raise ValueError(f"image has {image.shape[2]} channel(s), expected at least 3 because rgb=True")


class OnRGB(A.ImageOnlyTransform):
    """Run a colour transform on the first three channels and leave the others alone."""

    def __init__(self, transform: A.ImageOnlyTransform, p: float = 0.5) -> None:
        super().__init__(p=p)
        self.transform = transform

    def set_random_state(self, random_generator: np.random.Generator, py_random: random.Random) -> None:
        super().set_random_state(random_generator, py_random)
        self.transform.set_random_state(random_generator, py_random)

    def apply(self, img: np.ndarray, **params: Any) -> np.ndarray:
        colours = self.transform(image=np.ascontiguousarray(img[..., :3]), force_apply=True)["image"]
        return colours if img.shape[2] == 3 else np.concatenate([colours, img[..., 3:]], axis=2)


class SmoothElastic(A.ElasticTransform):
    """Shift pixels along a smooth random field of 2 to 6 pixels (root mean square), whatever the image size.

    The field is drawn on a coarse grid and enlarged by cubic interpolation. The library's own field moves 0.01 pixel
    at its defaults, folds when made strong enough to see, is stronger on small images and takes a wide blur.
    """

    spacing = 64  # Pixels between grid points: 6 pixels of shift do not fold, thin lines stay lines.

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        height, width = params["shape"][:2]
        size = (max(2, round(height / self.spacing)) + 1, max(2, round(width / self.spacing)) + 1, 2)
        coarse = self.random_generator.uniform(-1, 1, size).astype(np.float32)
        field = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)  # (H, W, 2) x, y
        strength = self.py_random.uniform(2, 6) / float(np.sqrt((field**2).sum(axis=2).mean()))
        rows, columns = np.indices((height, width), np.float32)
        return {"map_x": columns + strength * field[..., 0], "map_y": rows + strength * field[..., 1]}


class BrightnessContrast(A.RandomBrightnessContrast):
    """Scale each channel by 0.8 to 1.2 and shift it by up to a fifth of its own mean plus deviation.

    The library shifts by a fifth of the full range, which turns a dim 16-bit band, or a dark retina, black.
    """

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        mean, deviation = cv2.meanStdDev(data["image"])  # (C, 1) each
        size = (mean + deviation)[:, 0].astype(np.float32)
        alpha = 1 + self.py_random.uniform(*self.contrast_limit)
        return {"alpha": alpha, "beta": self.py_random.uniform(*self.brightness_limit) * size}

    def apply(self, img: np.ndarray, alpha: float, beta: np.ndarray, **params: Any) -> np.ndarray:
        if img.dtype == np.uint8:
            levels = np.arange(256, dtype=np.float32)[:, None] * alpha + beta  # (256, C)
            table = np.rint(np.clip(levels, 0, 255)).astype(np.uint8)
            bands = [cv2.LUT(np.ascontiguousarray(img[..., band]), table[:, band]) for band in range(img.shape[2])]
            return np.stack(bands, axis=2)
        return np.clip(img * np.float32(alpha) + beta, 0, 1)


class HueSaturationValue(A.HueSaturationValue):
    """The library's transform without its rounding of float images to 256 levels."""

    def apply(self, img: np.ndarray, hue_shift: int, sat_shift: int, val_shift: int, **params: Any) -> np.ndarray:
        if img.dtype == np.uint8:
            return super().apply(img, hue_shift, sat_shift, val_shift, **params)
        hue, saturation, value = cv2.split(cv2.cvtColor(img, cv2.COLOR_RGB2HSV))  # 0..360, 0..1, 0..1
        hue = (hue + 2 * hue_shift) % 360  # An 8-bit hue counts in steps of two degrees.
        grey = saturation == 0
        saturation = np.clip(saturation + sat_shift / 255, 0, 1)
        saturation[grey] = 0
        value = np.clip(value + val_shift / 255, 0, 1)
        changed = cv2.merge([hue.astype(np.float32), saturation, value.astype(np.float32)])
        return np.clip(cv2.cvtColor(changed, cv2.COLOR_HSV2RGB), 0, 1)


class Clahe(A.CLAHE):
    """The library's CLAHE; for float images on a luma stretched over 256 levels, adding only the difference.

    So a dim 16-bit picture gets more contrast and keeps the steps finer than 1/255 that it came with. Unlike the
    8-bit form, which works on L of Lab, it does not reach beyond the darkest and brightest luma of the picture.
    """

    def apply(self, img: np.ndarray, clip_limit: float, **params: Any) -> np.ndarray:
        if img.dtype == np.uint8:
            return super().apply(img, clip_limit, **params)
        luma = cv2.cvtColor(img, cv2.COLOR_RGB2GRAY) if img.shape[2] == 3 else img[..., 0]  # (H, W)
        darkest, brightest = float(luma.min()), float(luma.max())
        if darkest == brightest:
            return img
        step = (brightest - darkest) / 255
        levels = np.rint((luma - darkest) / step).astype(np.uint8)
        equalised = cv2.createCLAHE(clip_limit, self.tile_grid_size).apply(levels)
        return np.clip(img + ((equalised.astype(np.float32) - levels) * step)[..., None], 0, 1)


class Downscale(A.Downscale):
    """Lower the resolution by area averaging and linear enlargement, at full bit depth."""

    def apply(self, img: np.ndarray, scale: float, **params: Any) -> np.ndarray:
        height, width = img.shape[:2]
        small = (max(1, round(width * scale)), max(1, round(height * scale)))
        bands = [img[..., first : first + 4] for first in range(0, img.shape[2], 4)]  # OpenCV takes four at a time.
        coarse = [cv2.resize(np.ascontiguousarray(band), small, interpolation=cv2.INTER_AREA) for band in bands]
        fine = [cv2.resize(band, (width, height), interpolation=cv2.INTER_LINEAR) for band in coarse]
        return np.concatenate([band.reshape(height, width, -1) for band in fine], axis=2)


class SensorNoise(A.ISONoise):
    """Noise that grows with the square root of the signal: a common part, a smaller part of each channel's own.

    The library's version of this name draws from a Poisson law with a mean below one, which gives white specks.
    """

    def apply(
        self, img: np.ndarray, color_shift: float, intensity: float, random_seed: int, **params: Any
    ) -> np.ndarray:
        generator = np.random.default_rng(random_seed)
        signal = img.astype(np.float32) / 255 if img.dtype == np.uint8 else img
        noise = generator.standard_normal(img.shape, np.float32) * color_shift
        noise += generator.standard_normal((*img.shape[:2], 1), np.float32) * (intensity * 0.15)
        noised = np.clip(signal + noise * np.sqrt(np.maximum(signal, 0)), 0, 1)
        return np.rint(noised * 255).astype(np.uint8) if img.dtype == np.uint8 else noised


class Haze(A.ImageOnlyTransform):
    """Mix in white, by a share between 0.05 and 0.3 that varies slowly over the picture.

    The library's fog also blurs with a kernel of a thirtieth of the picture, however thin the fog.
    """

    def get_params(self) -> dict[str, Any]:
        share = self.py_random.uniform(0.05, 0.3)
        return {"share": share * self.random_generator.uniform(0.5, 1, (4, 4)).astype(np.float32)}

    def apply(self, img: np.ndarray, share: np.ndarray, **params: Any) -> np.ndarray:
        white = 255 if img.dtype == np.uint8 else 1
        local = cv2.resize(share, img.shape[1::-1], interpolation=cv2.INTER_LINEAR)[..., None]  # (H, W, 1)
        hazy = img + (white - img.astype(np.float32)) * local
        return np.rint(hazy).astype(np.uint8) if img.dtype == np.uint8 else hazy


def _compose(steps: list[A.BasicTransform]) -> A.Compose | None:
    return A.Compose(steps) if steps else None


def _run(pipeline: A.Compose, image: np.ndarray, mask: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    # Even numbers move, odd ones recolour: the same seed in both calls must not tie a turn to a brightness.
    # One shared stream, too. set_random_seed would give every transform its own copy of the same stream: with it a
    # horizontal and a vertical flip happen always together or not at all.
    pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
    result = pipeline(image=image, mask=mask)
    return np.ascontiguousarray(result["image"]), np.ascontiguousarray(result["mask"])


def _to_dtype(image: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if dtype == np.float32:
        return image.astype(np.float32, copy=False)
    limits = np.iinfo(dtype)
    return np.clip(np.rint(image), limits.min, limits.max).astype(dtype)


def _geometric_steps(preset: str, square: bool) -> list[A.BasicTransform]:
    turns = [A.RandomRotate90(p=1), A.Transpose(p=0.5)] if square else [A.HorizontalFlip(), A.VerticalFlip()]
    constant: dict[str, Any] = {"border_mode": cv2.BORDER_CONSTANT, "fill": 0, "fill_mask": IGNORE_INDEX}
    reflect: dict[str, Any] = {"border_mode": cv2.BORDER_REFLECT_101}
    return {
        "none": [],
        "safe": turns,
        "light": [*turns, _affine(0.05, 15, constant)],
        "medium": [A.HorizontalFlip(p=0.5), _affine(0.1, 15, constant)],
        "hard": [*turns, A.OneOf([_affine(0.2, 45, reflect), SmoothElastic(**reflect)], p=0.5)],
        "one": turns,
        "vessel": [
            A.HorizontalFlip(p=0.5),
            A.VerticalFlip(p=0.2),
            SmoothElastic(**constant, p=0.2),
            A.GridDistortion(**constant, p=0.2),
            A.OpticalDistortion(**constant, p=0.2),
        ],
    }[preset]


def _affine(scale: float, degrees: float, border: dict[str, Any]) -> A.Affine:
    return A.Affine(
        scale=(1 - scale, 1 + scale),
        translate_percent=(-0.0625, 0.0625),
        rotate=(-degrees, degrees),
        keep_ratio=True,
        p=0.5,
        **border,
    )


def _local_steps(preset: str, rgb: bool, single: bool) -> list[A.BasicTransform]:
    contrast = [BrightnessContrast(p=0.5), A.RandomGamma(p=0.5)]
    clahe = [OnRGB(Clahe())] if rgb else [Clahe(p=0.5)] if single else []
    hues = [OnRGB(HueSaturationValue()), OnRGB(A.RGBShift())] if rgb else []
    # Its shift is alpha times the variance of the picture: the default alpha of 0.1 moves about one grey level.
    pca = [OnRGB(A.FancyPCA(alpha=1.0))] if rgb else []
    haze = [OnRGB(Haze(), p=0.1)] if rgb else []
    # The library's defaults (std 0.2-0.44 of the range, sigma up to 3, holes of a fifth) hide what is to be found.
    noise = A.GaussNoise(std_range=(0.012, 0.04), p=0.5)
    blur = A.GaussianBlur(blur_limit=0, sigma_limit=(0.5, 1.5))
    holes = A.CoarseDropout(num_holes_range=(1, 8), hole_height_range=(0.02, 0.08), hole_width_range=(0.02, 0.08))
    return {
        "none": [],
        "safe": [],
        # Occasional and mild: lowering the resolution of every sample would teach a network that never sees the
        # detail it is asked to find at prediction time.
        "light": [Downscale(scale_range=(0.4, 0.8), p=0.1), contrast[0]],
        "medium": [
            A.OneOf([blur, A.NoOp()], p=0.5),
            A.OneOf([holes, A.NoOp()], p=0.5),
            noise,
            A.OneOf([*contrast, *clahe, *hues], p=0.5),
            *haze,
        ],
        "hard": [
            A.OneOf([*contrast, *clahe, *pca, *hues], p=0.5),
            A.OneOf([A.RandomGridShuffle(grid=(3, 3)), holes], p=0.5),
            A.OneOf([blur, noise], p=0.5),
            *haze,
        ],
        "one": [*contrast, *clahe, *pca, *hues],
        "vessel": [SensorNoise(p=0.1), *clahe, BrightnessContrast(p=0.5), A.RandomGamma(p=0.2)],
    }[preset]
