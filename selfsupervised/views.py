"""Two random views of one place: a crop, scaled and turned in one resampling, then changes of its values.

What a preset may change is what a network should learn not to mind. The changes are those of transforms.py: 8 bits go
through tables, 16 bits and floats through 0..1, any number of channels.

Example:
    maker = ViewMaker("microscopy", ViewOptions(size=128), rgb=True, value_range=(0, 255))
    view_a, view_b, matrices = maker.make_views(image, seed=1)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np

import transforms as t
from augmentations import Augmentation, Chance, Change, Limit
from image_io import resize_image
from slide_index import draw_corner

Box = tuple[int, int, int, int]  # first row and column, height and width
Limits = tuple[float, float]

SHRUNK_FIRST = 2  # pixels of the image for one of the view, from which on they are averaged: else most are not seen
NEIGHBOURS = 1.5  # side of the region of two neighbouring windows, in sides of one
REDRAWN = 20  # times that the second view is drawn anew
SOURCES = ("crop", "neighbours")


@dataclass(frozen=True)
class ViewPreset:
    """How views of a kind of images are made.

    area: smallest and largest share of the window that a view shows; None: its middle as it is, at its own scale.
    aspect: how much wider than high, or higher than wide, that part may be. upright: what is up stays up, so views are
    mirrored left and right at most; else they come in all eight positions. degrees: of rotation beside that.
    shared: the middle of the second view lies in the first one, unless they are of neighbouring windows. Where objects
    are few, views that share nothing would teach that an object is like an empty place.
    first, second: changes of the values of the first and of the second view.
    """

    area: Limits | None
    aspect: float = 1.0
    upright: bool = False
    degrees: float = 0.0
    shared: bool = False
    first: tuple[Chance, ...] = ()
    second: tuple[Chance, ...] = ()


def often(probability: float, *steps: Change) -> Chance:
    """One of the steps that fit the image, with this probability."""
    return Chance(probability, steps)


def contrast(limit: float) -> Change:
    """Brightness and contrast, up to a share, of images that are not RGB."""
    return Change(partial(t.brightness_contrast, limit=limit), "uncoloured")


def jitter(light: float, saturation: float, hue: float) -> Change:
    """Brightness and contrast up to a share, saturation up to one, hue by up to so many degrees, of RGB."""
    return Change(partial(t.colour_jitter, brightness=light, contrast=light, saturation=saturation, hue=hue), "colour")


def blur(low: float, high: float) -> Change:
    """Gaussian blur of so many pixels."""
    return Change(partial(t.blur, sigma=(low, high)))


GREY, SOLARISE, GAMMA = Change(t.to_grey, "colour"), Change(t.solarise), Change(partial(t.gamma, limit=0.3))
GRAIN, UNEVEN = Change(t.grain), Change(t.uneven_light)
NATURAL = (often(0.8, jitter(0.4, 0.2, 36), contrast(0.4)), often(0.2, GREY))
MICROSCOPY = (
    often(0.8, jitter(0.3, 0.3, 8), contrast(0.3)),
    often(0.4, GAMMA),
    often(0.3, UNEVEN),
    often(0.4, blur(0.3, 1.5)),
    often(0.5, GRAIN),
)
HISTOLOGY = (
    often(0.8, Change(partial(t.stain_shift, factor=0.4, offset=0.05), "colour"), contrast(0.3)),
    often(0.6, jitter(0.25, 0.2, 10)),
    often(0.1, GREY),
    often(0.4, blur(0.3, 1.5)),
    often(0.3, GRAIN),
)
AERIAL = (
    often(0.8, jitter(0.3, 0.3, 12), contrast(0.3)),
    often(0.25, Change(t.shadow, "bands")),
    often(0.2, Change(t.haze)),
    often(0.4, blur(0.3, 1.5)),
    often(0.3, GRAIN),
)
MULTISPECTRAL = (
    often(0.8, Change(t.band_gains)),
    often(0.5, Change(partial(t.brightness_contrast, limit=0.3)), GAMMA),
    often(0.4, blur(0.3, 1.5)),
    often(0.4, GRAIN),
)


def anyhow(changes: tuple[Chance, ...]) -> ViewPreset:
    """Views of what has no up and down: turned anyhow, and scaled less than natural ones, for size says something."""
    return ViewPreset((0.25, 1), 1.15, degrees=45, shared=True, first=changes, second=changes)


VIEW_PRESETS = {
    "none": ViewPreset(None),
    # Barlow Twins (arXiv 2103.03230, appendix A), as BYOL and SimCLR before it
    "natural": ViewPreset(
        (0.08, 1),
        4 / 3,
        upright=True,
        first=(*NATURAL, often(1, blur(0.1, 2))),
        second=(*NATURAL, often(0.1, blur(0.1, 2)), often(0.2, SOLARISE)),
    ),
    "microscopy": anyhow(MICROSCOPY),
    "histology": anyhow(HISTOLOGY),
    "aerial": anyhow(AERIAL),
    "multispectral": anyhow(MULTISPECTRAL),
}
VIEWS = tuple(name for name in VIEW_PRESETS if name != "none")


def auto_views(channels: Sequence[str]) -> str:
    """The preset for images of which no more is known than the names of their channels."""
    return "natural" if tuple(channels) == ("red", "green", "blue") else "multispectral"


@dataclass(frozen=True)
class ViewOptions:
    """What views are cut from.

    size: side of a view. window: side of the part of an image that both views of a pair lie in, in sides of a view;
    0: the whole image. views_from: "crop", both from one window, or "neighbours", from two windows whose middles lie
    within half a window of each other. values: they change too; without it a view differs by its place alone.
    """

    size: int = 128
    window: float = 1.5
    views_from: str = "crop"
    values: bool = True

    def __post_init__(self) -> None:
        if self.views_from not in SOURCES:
            raise ValueError(f"views from {self.views_from!r}; expected {' or '.join(SOURCES)}")
        if self.size < 1 or self.window < 0 or not math.isfinite(self.window):
            raise ValueError(
                f"views of {self.size} pixels out of windows of {self.window} sides; expected a side of at least 1 "
                "and a window of 0 (the whole image) or more"
            )
        if 0 < self.window < 1:
            raise ValueError(
                f"a window of {self.window:g} sides of a view is smaller than the view; expected 1 or more, 1.5 say, "
                "or 0 for the whole image"
            )
        if self.views_from == "neighbours" and not self.window:
            raise ValueError("a whole image has no neighbour; give a window of 1 or more sides of a view, such as 1.5")

    @property
    def side(self) -> int:
        """Pixels of a side of a window; 0: as many as the image has."""
        return round(self.window * self.size)


class ViewMaker:
    """Makes pairs of views of images of one data set; holds no random state and can be pickled.

    Args:
        preset: a name of VIEW_PRESETS.
        rgb: the first three channels are red, green and blue.
        value_range: smallest and largest usual value, each one number or one per channel; see Augmentation.

    Raises:
        ValueError: an unknown preset, or a range that is empty.
    """

    def __init__(self, preset: str, options: ViewOptions, *, rgb: bool, value_range: tuple[Limit, Limit]) -> None:
        if preset not in VIEW_PRESETS:
            raise ValueError(f"unknown view preset {preset!r}; expected one of {', '.join(VIEWS)}")
        self.name, self.preset, self.options = preset, VIEW_PRESETS[preset], options
        # A preset is for RGB, and would leave channels beside it the same in both views: they would tell which belong
        # together without a look at the rest. They get the changes of bands.
        self.colours = slice(3 if rgb and preset != "multispectral" else None)
        first, second = (self.preset.first, self.preset.second) if options.values else ((), ())
        self.changes = [_changing(steps, value_range, self.colours, rgb=rgb) for steps in (first, second)]
        self.others = _changing(MULTISPECTRAL if first else (), value_range, slice(3, None), rgb=False)

    def make_views(self, image: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Two views of a random window of an image.

        Args:
            image: (H, W, C) uint8, uint16 or float32, finite. Where it is smaller than a view it goes on as its
                reflection.
            seed: any integer >= 0; the same seed repeats the result.

        Returns:
            Both views (S, S, C) of the image's type, and (2, 2, 3) float64: for each the matrix that takes a place
            (x, y, 1) of the view to its place in the image, where the middles of pixels are whole numbers.
        """
        size = image.shape[:2]
        corner = draw_corner(size, self.region(size), None, np.random.default_rng([seed, 0]))
        matrices = self.draw(size, corner, seed)
        first, second = self.change([self.cut(image, matrix, size) for matrix in matrices], seed)
        return first, second, matrices

    # ------------------------------------------------------------------------------------------------------------------
    # Where

    def window(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of a window in an image of a size: cut to the image as long as a view fits into it."""
        side = self.options.side
        if not side:
            return size
        height, width = (min(side, max(length, self.options.size)) for length in size)
        return height, width

    def region(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of what the windows of a pair lie in."""
        height, width = self.window(size)
        if self.options.views_from == "crop":
            return height, width
        return math.ceil(NEIGHBOURS * height), math.ceil(NEIGHBOURS * width)

    def draw(self, size: tuple[int, int], corner: tuple[int, int], seed: int) -> np.ndarray:
        """Where both views of a region lie in an image of a size, (2, 2, 3) float64; see make_views.

        Args:
            corner: row and column of the region's first pixel; the region may reach out of the image.
        """
        rng = np.random.default_rng([seed, 1])
        first, second = self._windows(size, corner, rng)
        matrix = self._draw_view(size, first, rng)
        other = self._draw_view(size, second, rng)
        for _ in range(REDRAWN if self.preset.shared and first == second else 0):
            if self._holds_middle(matrix, other):
                break
            other = self._draw_view(size, second, rng)
        return np.stack([matrix, other])

    def _holds_middle(self, matrix: np.ndarray, other: np.ndarray) -> bool:
        """Whether the middle of another view lies in a view."""
        half = (self.options.size - 1) / 2
        middle = other @ (half, half, 1)
        place = np.linalg.solve(matrix[:, :2], middle - matrix[:, 2])
        return bool(abs(place - half).max() <= half + 0.5)

    def _windows(self, size: tuple[int, int], corner: tuple[int, int], rng: np.random.Generator) -> list[Box]:
        window = self.window(size)
        if self.options.views_from == "crop":
            return [(*corner, *window)] * 2
        angle, far = rng.uniform(0, 2 * math.pi), 0.5 * math.sqrt(rng.uniform())
        starts: list[list[int]] = [[], []]
        for axis, share in ((0, far * math.sin(angle)), (1, far * math.cos(angle))):
            offset = int(share * window[axis])  # towards 0, so no more than half a window
            room = self.region(size)[axis] - window[axis] - abs(offset)
            first = corner[axis] + max(0, -offset) + int(rng.integers(room + 1))
            starts[0].append(first)
            starts[1].append(first + offset)
        return [(start[0], start[1], *window) for start in starts]

    def _draw_view(self, size: tuple[int, int], box: Box, rng: np.random.Generator) -> np.ndarray:
        """The matrix of one view of a window."""
        preset, side = self.preset, self.options.size
        corner, room = np.array([box[1], box[0]]), np.array([box[3], box[2]], float)  # x, y
        if preset.area is None:
            shown = np.array([side, side], float) if self.options.side else room
            return _matrix(corner + (room - shown) / 2 + shown / 2 - 0.5, np.diag(shown / side), side)
        nominal = self.options.side**2 or room.prod()
        stretch = math.log(preset.aspect) * rng.uniform(-0.5, 0.5)
        shown = math.sqrt(rng.uniform(*preset.area) * nominal) * np.exp([stretch, -stretch])
        shown *= min(1, *(room / shown))
        angle = math.radians(rng.uniform(-preset.degrees, preset.degrees))
        cosine, sine = math.cos(angle), math.sin(angle)
        middle = corner + shown / 2 + rng.uniform(size=2) * (room - shown)
        reach = abs(np.array([[cosine, sine], [sine, cosine]])) @ shown / 2
        whole = np.array(size[::-1])
        fits = 2 * reach <= whole  # turned corners may leave the window, but the image only where it is too small
        middle = np.where(fits, np.clip(middle, reach, np.maximum(whole - reach, reach)), middle)
        turned = np.diag([rng.choice((-1.0, 1.0)), 1.0 if preset.upright else rng.choice((-1.0, 1.0))])
        if not preset.upright and rng.random() < 0.5:
            turned = turned[::-1]
        linear = np.array([[cosine, -sine], [sine, cosine]]) @ np.diag(shown / side) @ turned
        return _matrix(middle - 0.5, linear, side)

    # ------------------------------------------------------------------------------------------------------------------
    # Pixels

    def needed(self, matrices: np.ndarray, size: tuple[int, int]) -> Box:
        """The part of an image of a size that views are made of, with what is reflected into them."""
        last = self.options.size - 1
        corners = np.array([[0, last, 0, last], [0, 0, last, last], [1, 1, 1, 1]])
        places = np.concatenate(list(matrices @ corners), axis=1)  # (2, 4 or 8) x, y
        margin = 2 * max(1, math.ceil(max(map(_factor, matrices))))
        spans = []
        for row, length in ((places[1], size[0]), (places[0], size[1])):
            low, high = math.floor(row.min()) - margin, math.ceil(row.max()) + margin
            first = min(max(0, min(low, 2 * (length - 1) - high)), length - 1)
            spans.append((first, max(1, min(length, max(high, -low) + 1) - first)))
        (top, height), (left, width) = spans
        return top, left, height, width

    def cut(
        self, pixels: np.ndarray, matrix: np.ndarray, size: tuple[int, int], origin: tuple[int, int] = (0, 0)
    ) -> np.ndarray:
        """One view (S, S, C), before its values are changed.

        Args:
            pixels: (h, w, C), the image or the part of it that is needed.
            matrix: (2, 3), see draw.
            size: of the whole image.
            origin: row and column of the first of the pixels in the image.
        """
        top, left, height, width = self.needed(matrix[None], size)
        rows, columns = top - origin[0], left - origin[1]
        part = pixels[rows : rows + height, columns : columns + width]
        factor, offset = _factor(matrix), np.array([left, top], float)
        scale = np.ones(2)
        if factor >= SHRUNK_FIRST:
            smaller = tuple(max(1, int(length / int(factor))) for length in (height, width))
            part = resize_image(part, (smaller[0], smaller[1]))
            scale = np.array([width / smaller[1], height / smaller[0]])
        own = matrix.copy()
        own[:, 2] += 0.5 - offset
        own /= scale[:, None]
        own[:, 2] -= 0.5
        return _resampled(part, own, self.options.size)

    def change(self, views: Sequence[np.ndarray], seed: int) -> list[np.ndarray]:
        """Change the values of both views, each for itself."""
        unmasked = np.zeros(views[0].shape[:2], np.uint8)
        seeds = np.random.default_rng([seed, 2]).integers(0, 2**31, 4).tolist()
        changed = []
        for view, values, own, other in zip(views, self.changes, seeds[:2], seeds[2:], strict=True):
            colours = values.local(np.ascontiguousarray(view[..., self.colours]), unmasked, own)[0]
            if colours.shape[2] < view.shape[2]:
                rest = np.ascontiguousarray(view[..., colours.shape[2] :])
                colours = np.concatenate([colours, self.others.local(rest, unmasked, other)[0]], axis=2)
            changed.append(colours)
        return changed


def _changing(steps: tuple[Chance, ...], limits: tuple[Limit, Limit], channels: slice, *, rgb: bool) -> Augmentation:
    """What changes the values of some of the channels."""
    low, high = (limit if isinstance(limit, float | int) else limit[channels] for limit in limits)
    changing = Augmentation("none", rgb=rgb, value_range=(low, high))
    changing.changes = steps
    return changing


def _factor(matrix: np.ndarray) -> float:
    """Pixels of the image along a side of one pixel of a view."""
    return math.sqrt(abs(float(np.linalg.det(matrix[:, :2]))))


def _resampled(image: np.ndarray, matrix: np.ndarray, side: int) -> np.ndarray:
    """(side, side, C) of an image; of other than one, three or four channels OpenCV interpolates less finely."""
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    parts = [image] if image.shape[2] in (1, 3, 4) else cv2.split(image)
    warped = [
        cv2.warpAffine(part, matrix, (side, side), flags=flags, borderMode=cv2.BORDER_REFLECT_101) for part in parts
    ]
    return (warped[0] if len(warped) == 1 else cv2.merge(warped)).reshape(side, side, -1)


def _matrix(middle: np.ndarray, linear: np.ndarray, side: int) -> np.ndarray:
    """(2, 3) that takes the middle of a view to a place (x, y), and steps from it as `linear` says."""
    half = np.full(2, (side - 1) / 2)
    return np.concatenate([linear, (middle - linear @ half)[:, None]], axis=1)
