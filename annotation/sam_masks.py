"""From the coarse answers of SAM's decoder to masks in the picture, without whole-picture arrays of floats.

A network sees a window of the picture in a square; a Frame knows how. Its answer, logits of a quarter of the square's
side, is brought to the pixels of a box alone: bilinear resizing is linear and works on rows and columns apart, so two
small matrices give just the pixels that are asked for, and the same values as resizing everything.
"""

import functools
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np

STRIP_PIXELS = 1 << 20  # floats made at a time
STABILITY_OFFSET = 1.0  # logits
HOLE_SHARE = 0.1  # of the object's area: smaller holes are filled
BOX_MARGIN = 0.1  # of a box's sides: how far a mask may leave its box
WINDOW_OVERLAP = 0.25

Box = tuple[int, int, int, int]  # left, top, right, bottom; right and bottom are not in it


# ----------------------------------------------------------------------------------------------------------------------
# Geometry


@dataclass(frozen=True)
class Frame:
    """A window of a picture in the square that a network sees.

    Attributes:
        window: of the picture, in pixels.
        side: of the square.
        keep_ratio: the longer side fills the square and the rest is padding, as in SAM; else both do, as in SAM 2.
    """

    window: Box
    side: int
    keep_ratio: bool

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the window."""
        left, top, right, bottom = self.window
        return bottom - top, right - left

    @property
    def used(self) -> tuple[int, int]:
        """Rows and columns of the square that the window fills."""
        if not self.keep_ratio:
            return self.side, self.side
        scale = self.side / max(self.size)
        height, width = (max(1, int(length * scale + 0.5)) for length in self.size)
        return height, width

    def to_square(self, points: np.ndarray) -> np.ndarray:
        """Places in the picture as the networks take them.

        Args:
            points: (..., 2) x and y in pixels of the picture, where the first pixel reaches from 0 to 1.

        Returns:
            (..., 2) float32; the networks add half a pixel of the square to what they get, which is taken off here.
        """
        scale = np.array(self.used[::-1]) / self.size[::-1]
        return ((np.asarray(points, np.float64) - self.window[:2]) * scale - 0.5).astype(np.float32)

    def weights(self, axis: int, start: int, stop: int, cells: int) -> np.ndarray:
        """What the pixels start..stop of the window along an axis (0: rows) are made of.

        Returns:
            (stop - start, cells) float32 shares of the decoder's cells.
        """
        if not self.keep_ratio:
            return _resize_matrix(cells, self.size[axis], start, stop)
        inner = _square_matrix(cells, self.side)
        first, second, share = _taps(self.used[axis], self.size[axis], start, stop)
        return (1 - share)[:, None] * inner[first] + share[:, None] * inner[second]

    def extent(self, logits: np.ndarray, level: float) -> Box | None:
        """A box of the window that surely holds all its pixels above a level.

        Args:
            logits: (cells, cells) of the decoder.
            level: logit.
        """
        above = logits > level
        box = []
        for axis in (1, 0):
            cells = logits.shape[axis]
            hits = np.flatnonzero(above.any(axis=1 - axis))
            if not hits.size:
                return None
            pixels = self.side / cells * self.size[axis] / self.used[axis]
            start = max(0, math.floor((hits[0] - 2) * pixels) - 1)
            stop = min(self.size[axis], math.ceil((hits[-1] + 3) * pixels) + 1)
            if start >= stop:  # in the padding alone
                return None
            box.append((start, stop))
        (left, right), (top, bottom) = box
        return left, top, right, bottom


def _taps(size_in: int, size_out: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bilinear resizing of a row: both neighbours of each pixel and the share of the second."""
    places = np.maximum((np.arange(start, stop) + 0.5) * (size_in / size_out) - 0.5, 0)
    first = np.minimum(places.astype(np.int64), size_in - 1)
    second = np.minimum(first + 1, size_in - 1)
    return first, second, np.minimum(places - first, 1).astype(np.float32)


def _resize_matrix(size_in: int, size_out: int, start: int, stop: int) -> np.ndarray:
    first, second, share = _taps(size_in, size_out, start, stop)
    rows = np.arange(stop - start)
    matrix = np.zeros((stop - start, size_in), np.float32)
    matrix[rows, first] = 1 - share
    np.add.at(matrix, (rows, second), share)
    return matrix


@functools.lru_cache(maxsize=4)
def _square_matrix(cells: int, side: int) -> np.ndarray:
    """From the decoder's cells to the pixels of the square, (side, cells)."""
    return _resize_matrix(cells, side, 0, side)


def list_windows(height: int, width: int, side: int) -> list[Box]:
    """The whole picture, then windows that cover it with an overlap; no windows if side is 0 or the picture fits."""
    windows: list[Box] = [(0, 0, width, height)]
    if not side or side >= max(height, width):
        return windows
    tops, lefts = _starts(height, side), _starts(width, side)
    windows += [(left, top, min(left + side, width), min(top + side, height)) for top in tops for left in lefts]
    return windows


def _starts(length: int, side: int) -> list[int]:
    if side >= length:
        return [0]
    count = math.ceil((length - side) / (side * (1 - WINDOW_OVERLAP))) + 1
    return np.linspace(0, length - side, count).round().astype(int).tolist()


def choose_windows(boxes: np.ndarray, windows: list[Box], height: int, width: int) -> np.ndarray:
    """For each box the window in which it lies farthest from the edges; the whole picture if it fits into none.

    Args:
        boxes: (n, 4) left, top, right, bottom.
        windows: of list_windows.

    Returns:
        (n,) places in windows.
    """
    if len(windows) == 1:
        return np.zeros(len(boxes), np.int64)
    edges = np.array(windows[1:], np.float64)
    edges[:, :2][edges[:, :2] == 0] = -np.inf  # the frame of the picture cuts nothing off
    edges[:, 2][edges[:, 2] == width] = np.inf
    edges[:, 3][edges[:, 3] == height] = np.inf
    room = np.concatenate([boxes[:, None, :2] - edges[:, :2], edges[:, 2:] - boxes[:, None, 2:]], axis=2).min(axis=2)
    room[np.isinf(room)] = np.finfo(np.float64).max
    best = room.argmax(axis=1)
    return np.where(room[np.arange(len(boxes)), best] > 0, best + 1, 0)


def clean_boxes(boxes: np.ndarray, height: int, width: int, max_share: float) -> tuple[np.ndarray, np.ndarray]:
    """Clip boxes to the picture and leave out those that are no use.

    Args:
        boxes: (n, 4) left, top, right, bottom in pixels of the picture.
        height, width: of the picture.
        max_share: of the picture that a box may cover.

    Returns:
        (m, 4) float64, and (m,) their places among the given ones. Boxes outside the picture, without area, with NaN
        or above max_share are missing.

    Raises:
        ValueError: not four numbers for each box.
    """
    boxes = np.asarray(boxes, np.float64)
    if not boxes.size:
        return np.zeros((0, 4)), np.zeros(0, np.int64)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes have the shape {boxes.shape}, expected (n, 4): left, top, right, bottom")
    kept = np.flatnonzero(~np.isnan(boxes).any(axis=1))
    clipped = np.clip(boxes[kept], 0, [width, height, width, height])
    wide, high = clipped[:, 2] - clipped[:, 0], clipped[:, 3] - clipped[:, 1]
    useful = (wide > 0) & (high > 0) & (wide * high <= max_share * height * width)
    return clipped[useful], kept[useful]


# ----------------------------------------------------------------------------------------------------------------------
# Masks


@dataclass(frozen=True, eq=False)
class Mask:
    """One object as SAM gave it: the pixels of its box, packed.

    Attributes:
        left, top, height, width: of its box in the picture.
        packed: bits, compressed.
        area: pixels.
        iou: that the network expects, clipped to [0, 1].
        stability: share of the pixels that stay when the threshold rises from one logit below to one above.
        prompt: place of the box or point that it answers.
    """

    left: int
    top: int
    height: int
    width: int
    packed: bytes
    area: int
    iou: float
    stability: float
    prompt: int

    @property
    def score(self) -> float:
        """How good the mask is likely to be: what the network expects, times how firm it is."""
        return self.iou * self.stability

    @property
    def box(self) -> Box:
        """In the picture."""
        return self.left, self.top, self.left + self.width, self.top + self.height

    def pixels(self) -> np.ndarray:
        """(height, width) bool."""
        bits = np.unpackbits(np.frombuffer(zlib.decompress(self.packed), np.uint8), count=self.height * self.width)
        return bits.reshape(self.height, self.width).view(bool)


def make_mask(frame: Frame, logits: np.ndarray, *, iou: float, prompt: int, within: Box | None = None) -> Mask | None:
    """Decide a mask from the decoder's logits: threshold 0, its largest piece, small holes filled.

    Args:
        frame: what the network saw.
        logits: (cells, cells) float32.
        iou: predicted by the network.
        prompt: place of the prompt.
        within: part of the window that the mask may cover; None: all.

    Returns:
        The mask, or None where nothing is above the threshold.
    """
    box = frame.extent(logits, -STABILITY_OFFSET)
    if box is not None and within is not None:
        box = max(box[0], within[0]), max(box[1], within[1]), min(box[2], within[2]), min(box[3], within[3])
    if box is None or box[0] >= box[2] or box[1] >= box[3]:
        return None
    left, top, right, bottom = box
    mask = np.empty((bottom - top, right - left), np.uint8)
    firm = loose = 0
    for start, values in resize_logits(frame, logits, box):
        mask[start : start + len(values)] = values > 0
        firm += int(np.count_nonzero(values > STABILITY_OFFSET))
        loose += int(np.count_nonzero(values > -STABILITY_OFFSET))
    found = _keep_object(mask)
    if found is None:
        return None
    (across, down), mask = found
    return Mask(
        left=frame.window[0] + left + across,
        top=frame.window[1] + top + down,
        height=mask.shape[0],
        width=mask.shape[1],
        packed=zlib.compress(np.packbits(mask).tobytes(), 1),
        area=int(np.count_nonzero(mask)),
        iou=float(np.clip(iou, 0, 1)),
        stability=firm / loose,
        prompt=prompt,
    )


def resize_logits(frame: Frame, logits: np.ndarray, box: Box) -> Iterator[tuple[int, np.ndarray]]:
    """Logits at the pixels of a box of the window, some rows at a time: (first row, (rows, width) float32)."""
    left, top, right, bottom = box
    columns, first_column, last_column = _shorten(frame.weights(1, left, right, logits.shape[1]))
    rows = max(1, STRIP_PIXELS // (right - left))
    for start in range(top, bottom, rows):
        part, first, last = _shorten(frame.weights(0, start, min(start + rows, bottom), logits.shape[0]))
        cells = logits[first:last, first_column:last_column]
        yield start - top, part @ cells @ columns.T


def _shorten(weights: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Weights (n, cells) without the cells that count nowhere, and which cells these are."""
    used = np.flatnonzero(weights.any(axis=0))
    first, last = int(used[0]), int(used[-1]) + 1
    return weights[:, first:last], first, last


def _keep_object(mask: np.ndarray) -> tuple[tuple[int, int], np.ndarray] | None:
    """The largest piece of a mask (h, w) uint8 without small holes, cut to its box, and the box's left and top."""
    count, pieces, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=4)
    if count < 2:
        return None
    best = 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
    left, top, width, height, area = stats[best].tolist()
    piece = (pieces[top : top + height, left : left + width] == best).view(np.uint8)
    around = cv2.copyMakeBorder(piece ^ 1, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=1)
    count, gaps, stats, _ = cv2.connectedComponentsWithStats(around, connectivity=8)
    small = stats[:, cv2.CC_STAT_AREA] <= HOLE_SHARE * area
    small[[0, gaps[0, 0]]] = False  # the object itself, and what is around it
    if small.any():
        piece |= small[gaps[1:-1, 1:-1]]
    return (left, top), piece


def margin_box(box: np.ndarray, frame: Frame) -> Box:
    """A prompted box (4,), grown by a margin, as whole pixels of the frame's window."""
    margin = np.maximum(2, BOX_MARGIN * (box[2:] - box[:2]))
    low = np.floor(box[:2] - margin - frame.window[:2])
    high = np.ceil(box[2:] + margin - frame.window[:2])
    left, top = np.maximum(low, 0).astype(int).tolist()
    right, bottom = np.minimum(high, frame.size[::-1]).astype(int).tolist()
    return left, top, right, bottom


def grid_points(frame: Frame, per_side: int) -> np.ndarray:
    """Points spread evenly over a frame's window: (per_side ** 2, 2) x and y in the picture, row by row."""
    height, width = frame.size
    places = (np.arange(per_side) + 0.5) / per_side
    x, y = np.meshgrid(frame.window[0] + places * width, frame.window[1] + places * height)
    return np.stack([x.ravel(), y.ravel()], axis=1)


def cut_by_window(mask: Mask, frame: Frame, height: int, width: int) -> bool:
    """Whether a mask reaches an edge of its window inside the picture: another window shows more of the object."""
    (left, top, right, bottom), box = frame.window, mask.box
    inner = (left > 0, top > 0, right < width, bottom < height)
    reached = (box[0] <= left, box[1] <= top, box[2] >= right, box[3] >= bottom)
    return any(edge and hit for edge, hit in zip(inner, reached, strict=True))


def drop_duplicates(masks: list[Mask], limit: float) -> list[Mask]:
    """Non-maximum suppression: of masks whose boxes overlap with an IoU above the limit the highest score stays."""
    if not masks:
        return []
    boxes = np.array([mask.box for mask in masks], np.float64)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    order = np.argsort([-mask.score for mask in masks], kind="stable")
    kept = []
    while order.size:
        best, order = order[0], order[1:]
        kept.append(int(best))
        low = np.maximum(boxes[best, :2], boxes[order, :2])
        high = np.minimum(boxes[best, 2:], boxes[order, 2:])
        shared = np.prod(np.maximum(high - low, 0), axis=1)
        order = order[shared <= limit * (areas[best] + areas[order] - shared)]
    return [masks[place] for place in kept]
