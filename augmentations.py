"""Named presets of augmentations, as tables of moves (warp.py) and of changes of values (transforms.py).

`geometric` moves pixels and runs before the cut, on a crop larger than the network sees; `local` changes values and
runs after it. Both are functions of a seed alone, so the number of loader workers does not change a sample.

Example:
    augmentation = Augmentation("hard", rgb=True, value_range=(0, 255))
    image, mask = augmentation.geometric(image, mask, seed=1)
    image, mask = augmentation.local(image, mask, seed=1)
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import transforms as t
import warp

DTYPES = (np.uint8, np.uint16, np.float32)

Limit = float | Sequence[float]


@dataclass(frozen=True)
class Change:
    """A transform of values and what it works on.

    on: "all" channels; "colour", the first three of RGB; "uncoloured", all where there is no RGB; "light", the first
    three of RGB or a single channel; "bands", these three or all of several; "mask": image and mask together.
    """

    run: Callable[..., Any]
    on: str = "all"

    def channels(self, count: int, *, rgb: bool) -> int:
        """How many channels, from the first on, it works on; 0: it is not for such images."""
        if self.on in ("all", "mask"):
            return count
        if rgb:
            return 0 if self.on == "uncoloured" else 3
        fits = {"light": count == 1, "bands": count > 1, "colour": False, "uncoloured": True}[self.on]
        return count if fits else 0


@dataclass(frozen=True)
class Chance:
    """One of several steps, each as likely as the others, taken with a probability."""

    probability: float
    steps: tuple[Any, ...]


CONTRAST, GAMMA = Change(t.brightness_contrast), Change(t.gamma)
CLAHE, PCA = Change(t.clahe, "light"), Change(t.pca_shift, "bands")
HUE, SHIFT = Change(t.hue_saturation, "colour"), Change(t.rgb_shift, "colour")
HOLES, SHUFFLE = Change(t.holes, "mask"), Change(t.shuffle_cells, "mask")
BLUR, NOISE, SENSOR, COARSE = (Change(run) for run in (t.blur, t.gaussian_noise, t.sensor_noise, t.downscale))
HAZE = Chance(0.1, (Change(t.haze, "colour"),))
MILD_HUE = Change(partial(t.hue_saturation, hue=12), "colour")
TURN = Chance(1, (warp.turn,))


def affine(probability: float, scale: float, degrees: float, *others: Any) -> Chance:
    """Scaling, rotation and shift, or one of the other moves."""
    return Chance(probability, (partial(warp.affine, scale=scale, degrees=degrees), *others))


GEOMETRIC: dict[str, tuple[Chance, ...]] = {
    "none": (),
    "safe": (TURN,),
    "light": (TURN, affine(0.5, 0.05, 15)),
    "medium": (Chance(0.5, (warp.flip,)), affine(0.5, 0.1, 15)),
    "hard": (TURN, affine(0.5, 0.2, 45, warp.elastic)),
    "one": (TURN,),
    "vessel": (
        Chance(0.5, (warp.flip,)),
        Chance(0.2, (partial(warp.flip, down=True),)),
        Chance(0.2, (warp.elastic,)),
        Chance(0.2, (warp.grid_distortion,)),
        Chance(0.2, (warp.optical_distortion,)),
    ),
    "histology": (
        TURN,
        affine(0.6, 0.2, 35),
        Chance(0.3, (warp.perspective,)),
        Chance(0.5, (warp.optical_distortion, warp.grid_distortion, warp.bend)),
    ),
    "aerial": (TURN, affine(0.6, 0.2, 45), Chance(0.2, (partial(warp.perspective, reach=0.05),))),
}

LOCAL: dict[str, tuple[Chance, ...]] = {
    "none": (),
    "safe": (),
    # Occasional and mild: lowering the resolution of every sample would teach a network that never sees the detail it
    # is asked to find at prediction time.
    "light": (Chance(0.1, (COARSE,)), Chance(0.5, (CONTRAST,))),
    "medium": (
        Chance(0.25, (BLUR,)),
        Chance(0.25, (HOLES,)),
        Chance(0.5, (NOISE,)),
        Chance(0.5, (CONTRAST, GAMMA, CLAHE, HUE, SHIFT)),
        HAZE,
    ),
    "hard": (
        Chance(0.5, (CONTRAST, GAMMA, CLAHE, PCA, HUE, SHIFT)),
        Chance(0.5, (SHUFFLE, HOLES)),
        Chance(0.5, (BLUR, NOISE)),
        HAZE,
    ),
    "one": tuple(Chance(0.5, (step,)) for step in (CONTRAST, GAMMA, CLAHE, PCA, HUE, SHIFT)),
    "vessel": (Chance(0.1, (SENSOR,)), Chance(0.5, (CLAHE,)), Chance(0.5, (CONTRAST,)), Chance(0.2, (GAMMA,))),
    # Stains differ between laboratories more than anything else. Grey and swapped channels are rare: with them at six
    # samples in ten a network learns that colour says nothing.
    "histology": (
        Chance(0.1, (Change(t.to_grey, "colour"), Change(t.shuffle_channels, "colour"))),
        Chance(0.6, (Change(t.stain_shift, "colour"), SHIFT, PCA)),
        Chance(0.5, (MILD_HUE, CLAHE, CONTRAST, GAMMA)),
        Chance(0.3, (Change(t.median), BLUR)),
        Chance(0.3, (NOISE, SENSOR)),
    ),
    "aerial": (
        Chance(0.6, (CONTRAST, GAMMA, MILD_HUE, Change(partial(t.rgb_shift, limit=0.04), "colour"), PCA)),
        Chance(0.2, (Change(t.shadow, "bands"),)),
        HAZE,
        Chance(0.25, (BLUR, SENSOR, Change(partial(t.downscale, scale=(0.5, 0.9))))),
    ),
}
PRESETS = tuple(GEOMETRIC)


class Augmentation:
    """A named preset, ready to be applied to samples of one data set.

    What moves into the picture from outside is its reflection, and 255 (ignore) in the mask, which is moved by nearest
    neighbours: no class appears that was not there. An instance holds no random state and can be pickled.

    Args:
        preset: a name from PRESETS.
        rgb: the first three channels are red, green, blue. Colour transforms touch only them; brightness, contrast
            and gamma act on all channels, CLAHE on the luma of RGB or on a single channel.
        value_range: smallest and largest value of the data, each one number or one per channel. It fixes what "20 %
            brighter" means. Values outside it are kept: the range of that sample is widened to hold them.
        ignore_holes: pixels that were blacked out do not count in the mask; otherwise they keep their class: the object
            is there, hidden.

    Raises:
        ValueError: unknown preset, or a range that is empty or not finite.
    """

    def __init__(self, preset: str, *, rgb: bool, value_range: tuple[Limit, Limit], ignore_holes: bool = False) -> None:
        if preset not in PRESETS:
            raise ValueError(f"unknown augmentation preset {preset!r}, expected one of: {', '.join(PRESETS)}")
        low, high = (np.asarray(limit, np.float32) for limit in value_range)
        if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
            raise ValueError(f"value_range is {value_range}, expected two finite numbers, the first the smaller")
        self.preset, self.rgb, self.ignore_holes = preset, rgb, ignore_holes
        self.low, self.high = low, high
        self.moves: tuple[Chance, ...] = GEOMETRIC[preset]
        self.changes: tuple[Chance, ...] = LOCAL[preset]

    def geometric(
        self, image: np.ndarray, mask: np.ndarray, seed: int, part: warp.Part | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Flip, turn and warp an image and its mask together.

        Args:
            image: (H, W, C) uint8, uint16 or float32. When H and W differ, turns by 90 degrees become flips so that
                the shape stays.
            mask: (H, W) uint8 class index, 255 = ignore.
            seed: any integer >= 0; the same seed repeats the result.
            part: first row and column, height and width of the only part of the result that is wanted.

        Returns:
            Image and mask of the same shapes, or those of the part, and dtypes; the inputs are left as they were.

        Raises:
            ValueError: shapes or dtypes other than those above.
        """
        self._check(image, mask)
        # Even numbers move, odd ones recolour: the same seed in both calls must not tie a turn to a brightness.
        rng = np.random.default_rng(2 * seed)
        moves = [
            step(mask.shape, rng) for chance in self.moves for step in _draw(chance.probability, chance.steps, rng)
        ]
        return warp.move(image, mask, moves, part) if moves or part else (image, mask)

    def local(self, image: np.ndarray, mask: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Change values: colour, contrast, noise, blur, haze, holes, shuffled cells (which move the mask too).

        Args:
            image: (H, W, C) uint8, uint16 or float32, finite.
            mask: (H, W) uint8 class index, 255 = ignore.
            seed: any integer >= 0; the same seed repeats the result.

        Returns:
            Image and mask of the same shapes and dtypes; the inputs are left as they were.

        Raises:
            ValueError: shapes or dtypes other than those above, or values that are not finite.
        """
        self._check(image, mask)
        if not self.changes:
            return image, mask
        rng = np.random.default_rng(2 * seed + 1)
        if image.dtype == np.uint8 and (self.low == 0).all() and (self.high == 255).all():
            return self._change(image, mask, rng)
        low, span = self._sample_range(image)
        lows, spans = (np.tile(number, image.shape[1]) for number in (low, span))  # a short last axis is slow
        unit = (image.reshape(image.shape[0], -1) - lows) / spans
        changed, mask = self._change(unit.reshape(image.shape), mask, rng)
        values = changed.reshape(image.shape[0], -1) * spans
        values += lows
        return _to_dtype(values.reshape(image.shape), image.dtype), mask

    def single_steps(self, channels: int) -> list[tuple[str, "Augmentation"]]:
        """Each step that images of so many channels get, by its name: an augmentation that always does it alone."""
        steps = []
        for moves, chances in ((True, self.moves), (False, self.changes)):
            for step in (step for chance in chances for step in chance.steps):
                if moves or step.channels(channels, rgb=self.rgb):
                    other, only = copy.copy(self), (Chance(1, (step,)),)
                    other.moves, other.changes = (only, ()) if moves else ((), only)
                    run = step if moves else step.run
                    steps.append((getattr(run, "func", run).__name__, other))
        return steps

    def _change(self, image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw and apply the changes to an image of 8 bit or of floats from 0 to 1."""
        for chance in self.changes:
            fit = [step for step in chance.steps if step.channels(image.shape[2], rgb=self.rgb)]
            for step in _draw(chance.probability, fit, rng):
                count = step.channels(image.shape[2], rgb=self.rgb)
                if step.on == "mask":
                    options = {"ignored": True} if step == HOLES and self.ignore_holes else {}
                    image, mask = step.run(image, mask, rng, **options)
                elif count == image.shape[2]:
                    image = step.run(image, rng)
                else:
                    changed = step.run(np.ascontiguousarray(image[..., :count]), rng)
                    image = np.concatenate([changed, image[..., count:]], axis=2)
        return image, mask

    def _sample_range(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = image.reshape(image.shape[0], -1)
        smallest, largest = (pick(axis=0).reshape(-1, image.shape[2]) for pick in (rows.min, rows.max))
        smallest, largest = smallest.min(axis=0), largest.max(axis=0)  # (C,)
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


def _draw(probability: float, steps: Sequence[Any], rng: np.random.Generator) -> Sequence[Any]:
    """One of the steps, or none."""
    taken = rng.random() < probability
    return [steps[int(rng.integers(len(steps)))]] if taken and steps else []


def _to_dtype(image: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if dtype == np.float32:
        return image.astype(np.float32, copy=False)
    limits = np.iinfo(dtype)
    np.rint(image, out=image)
    return np.clip(image, limits.min, limits.max, out=image).astype(dtype)
