"""Moving an image and its mask together: turns, affine maps, perspective and bends, in one resampling.

A move is drawn as a function of (height, width) and a random generator. It is either a matrix (3, 3), which takes a
place (x, y, 1) of the result to its place in the source, both counted from the middle of the picture, or a Shift, which
is added to a place of the result before matrices take it on, so shifts are the last moves. `move` puts them together,
and pixels are interpolated once however many moves there are.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from image_io import IGNORE_INDEX

Size = tuple[int, int]
Limits = tuple[float, float]
Part = tuple[int, int, int, int]


class Shift(NamedTuple):
    """Pixels to the right and down, each float32 and (H, W) or what numpy spreads to that."""

    right: np.ndarray
    down: np.ndarray


# ----------------------------------------------------------------------------------------------------------------------
# Moves


def turn(size: Size, rng: np.random.Generator) -> np.ndarray:
    """One of the eight positions of a square; of an oblong picture one of the four that keep its shape."""
    flips = np.diag([rng.choice((-1.0, 1.0)), rng.choice((-1.0, 1.0)), 1.0])
    swaps = size[0] == size[1] and rng.random() < 0.5
    return flips[[1, 0, 2]] if swaps else flips


def flip(size: Size, rng: np.random.Generator, *, down: bool = False) -> np.ndarray:
    """Mirror left and right, or up and `down`."""
    return np.diag([1.0, -1.0, 1.0] if down else [-1.0, 1.0, 1.0])


def affine(size: Size, rng: np.random.Generator, *, scale: float, degrees: float, offset: float = 0.0625) -> np.ndarray:
    """Scale by 1 - scale to 1 + scale, rotate by up to so many degrees, shift by up to `offset` of each side."""
    factor, angle = 1 + rng.uniform(-scale, scale), math.radians(rng.uniform(-degrees, degrees))
    right, down = (side * rng.uniform(-offset, offset) for side in size[::-1])
    cosine, sine = math.cos(angle) / factor, math.sin(angle) / factor
    back = np.array([[1, 0, -right], [0, 1, -down], [0, 0, 1.0]])
    return np.array([[cosine, sine, 0], [-sine, cosine, 0], [0, 0, 1]]) @ back


def perspective(size: Size, rng: np.random.Generator, *, reach: float = 0.1) -> np.ndarray:
    """Stretch a slanted part over the whole picture: each corner comes from up to `reach` of the sides inside."""
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * (np.array(size[::-1]) - 1) / 2
    inner = corners * (1 - 2 * rng.uniform(0, reach, (4, 2)))
    return cv2.getPerspectiveTransform(corners.astype(np.float32), inner.astype(np.float32))


def elastic(size: Size, rng: np.random.Generator, *, spacing: float = 64, strength: Limits = (2, 6)) -> Shift:
    """A smooth random field of so many pixels (root mean square), drawn every `spacing` pixels and enlarged.

    At the defaults 6 pixels of shift do not fold and thin lines stay lines. Pictures smaller than `spacing`, whose
    field is drawn closer, are shifted by less.
    """
    height, width = size
    coarse = rng.uniform(-1, 1, (2, max(2, round(height / spacing)) + 1, max(2, round(width / spacing)) + 1))
    right, down = (cv2.resize(field, (width, height), interpolation=cv2.INTER_CUBIC) for field in coarse.astype("f4"))
    spread = math.hypot(cv2.norm(right), cv2.norm(down)) / math.sqrt(height * width)
    factor = np.float32(rng.uniform(*strength) / spread * min(1, height / spacing, width / spacing))
    right *= factor
    down *= factor
    return Shift(right, down)


def bend(size: Size, rng: np.random.Generator) -> Shift:
    """A wide elastic field: 1 to 2.5 % of the picture, drawn at a quarter of its side."""
    side = min(size)
    return elastic(size, rng, spacing=side / 4, strength=(0.01 * side, 0.025 * side))


def grid_distortion(size: Size, rng: np.random.Generator, *, steps: int = 5, limit: float = 0.3) -> Shift:
    """Make columns and rows of a grid narrower and wider by up to `limit`."""
    shifts = []
    for side in size[::-1]:
        ends = np.concatenate([[0], np.cumsum(1 + rng.uniform(-limit, limit, steps))])
        places = np.arange(side, dtype=np.float64)
        taken = np.interp(places, np.linspace(0, side - 1, steps + 1), ends / ends[-1] * (side - 1))
        shifts.append((taken - places).astype(np.float32))
    return Shift(shifts[0][None], shifts[1][:, None])


def optical_distortion(size: Size, rng: np.random.Generator, *, limit: float = 0.15) -> Shift:
    """Barrel or pincushion: a place moves along its radius by up to `limit` of the radius, at the longer side's end."""
    down, right = _from_middle(size)
    half = max(size) / 2
    share = np.float32(rng.uniform(-limit, limit) / half**2) * (right[None] ** 2 + down[:, None] ** 2)
    return Shift(share * right[None], share * down[:, None])


# ----------------------------------------------------------------------------------------------------------------------
# Moving pixels


def move(
    image: np.ndarray, mask: np.ndarray, moves: Sequence[np.ndarray | Shift], part: Part | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Apply moves, the first one first and shifts last, to an image (H, W, C) and its mask (H, W) uint8.

    What comes from outside the picture is its reflection, and 255 (ignore) in the mask. The mask takes the nearest
    pixel, so there is no class that was not there. Turns alone only reorder pixels.

    Args:
        part: first row and column, height and width of the part of the result that is wanted; None: all of it.
    """
    matrix = np.eye(3)
    for step in moves:
        matrix = matrix if isinstance(step, Shift) else matrix @ step
    shifts = [step for step in moves if isinstance(step, Shift)]
    turned = abs(matrix[:2, :2]).tolist()
    if not shifts and not matrix[:2, 2].any() and turned in ([[1, 0], [0, 1]], [[0, 1], [1, 0]]):
        box = _turned_box(mask.shape, matrix, part)
        return _turn(image[box], matrix), _turn(mask[box], matrix)
    places = source_places(mask.shape, matrix, shifts, part)
    parts = [cv2.remap(group, *places, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101) for group in _groups(image)]
    moved = parts[0] if len(parts) == 1 else cv2.merge(parts)
    indices = cv2.remap(mask, *places, cv2.INTER_NEAREST, borderMode=cv2.BORDER_CONSTANT, borderValue=IGNORE_INDEX)
    return moved.reshape(*indices.shape, -1), indices


def _groups(image: np.ndarray) -> list[np.ndarray]:
    """An image as images of four, three or one channels: of others OpenCV interpolates less finely."""
    groups, left = [], image
    while left.shape[2]:
        count = left.shape[2] if left.shape[2] in (1, 3, 4) else 1 if left.shape[2] == 2 else 4
        groups.append(left[..., :count])
        left = left[..., count:]
    return [np.ascontiguousarray(group) for group in groups]


def source_places(
    size: Size, matrix: np.ndarray, shifts: Sequence[Shift], part: Part | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Where each pixel of the result comes from: columns and rows of the source, (H, W) float32 each."""
    top, left, height, width = part or (0, 0, *size)
    down, right = _from_middle(size)
    box = slice(top, top + height), slice(left, left + width)
    moved = [[np.broadcast_to(field, size)[box] for field in shift] for shift in shifts]
    rows = []
    for weights in matrix[: 2 if matrix[2].tolist() == [0, 0, 1] else 3]:
        found = _weigh(right[box[1]], down[box[0]], weights)
        for weight, axis in zip(weights[:2], (0, 1), strict=True):
            for shift in moved if weight else ():
                add = np.add if weight > 0 else np.subtract
                add(found, shift[axis] if abs(weight) == 1 else np.float32(abs(weight)) * shift[axis], out=found)
        rows.append(found)
    places = rows if len(rows) == 2 else [rows[0] / rows[2], rows[1] / rows[2]]
    for place, side in zip(places, size[::-1], strict=True):
        place += np.float32((side - 1) / 2)
    return places[0], places[1]


def _weigh(right: np.ndarray, down: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """weights[0] x + weights[1] y + weights[2] on the whole picture, (H, W) float32."""
    return np.float32(weights[0]) * right[None] + (np.float32(weights[1]) * down + np.float32(weights[2]))[:, None]


def _from_middle(size: Size) -> tuple[np.ndarray, np.ndarray]:
    """Row and column numbers counted from the middle of the picture, (H,) and (W,) float32."""
    down, right = (np.arange(side, dtype=np.float32) - np.float32((side - 1) / 2) for side in size)
    return down, right


def _turned_box(size: Size, matrix: np.ndarray, part: Part | None) -> tuple[slice, slice]:
    """The rows and columns of the source that a turn brings to a part of the result."""
    if part is None:
        return slice(None), slice(None)
    spans = [(part[1], part[3]), (part[0], part[2])]  # columns and rows of the result: first one, how many
    box = []
    for axis in (1, 0):  # rows, then columns of the source
        start, length = spans[int(abs(matrix[axis, :2]).argmax())]
        start = size[1 - axis] - start - length if matrix[axis, :2].sum() < 0 else start
        box.append(slice(start, start + length))
    return box[0], box[1]


def _turn(picture: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Flip and transpose as the matrix says."""
    backward = matrix[:2, :2].sum(axis=1) < 0  # columns, rows
    if picture.ndim == 2 or picture.shape[2] <= 4:  # OpenCV reorders pixels many times faster than numpy
        shape = picture.shape[2:]
        if backward.any():
            picture = cv2.flip(picture, -1 if backward.all() else int(backward[0]))
        picture = cv2.transpose(picture) if matrix[0, 0] == 0 else picture.copy()
        return picture.reshape(*picture.shape[:2], *shape)
    picture = picture[:: -1 if backward[1] else 1, :: -1 if backward[0] else 1]
    return np.array(picture.swapaxes(0, 1) if matrix[0, 0] == 0 else picture, order="C")
