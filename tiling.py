"""Predict an image of any size tile by tile: the one engine behind every command that runs a crops network.

The image is reflect-padded right and bottom to a frame the network accepts, cut into overlapping tiles, and the
probabilities are blended with per-axis shares that already sum to 1: there is no weight image and no division. Tiles
are read by window and finished rows leave as bands, so memory grows with the width of an image and not with its height;
only predict_tiled, which collects the bands, holds a whole result.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np

WINDOWS = ("hann", "gaussian", "constant")
GAUSSIAN_SIGMA = 1 / 8  # of the window's length

# Each turns a tile (..., h, w); the second undoes the first. Transposed tiles are (..., w, h).
Turn = Callable[[np.ndarray], np.ndarray]
_UNCHANGED: tuple[Turn, Turn] = (lambda a: a, lambda a: a)
_FLIPS: list[tuple[Turn, Turn]] = [
    _UNCHANGED,
    (lambda a: a[..., ::-1], lambda a: a[..., ::-1]),
    (lambda a: a[..., ::-1, :], lambda a: a[..., ::-1, :]),
    (lambda a: a[..., ::-1, ::-1], lambda a: a[..., ::-1, ::-1]),
]
_TRANSPOSED: list[tuple[Turn, Turn]] = [
    (lambda a, turn=turn: turn(a.swapaxes(-1, -2)), lambda a, back=back: back(a).swapaxes(-1, -2))  # type: ignore[misc]
    for turn, back in _FLIPS
]
TTA = {"none": [_UNCHANGED], "flips": _FLIPS, "d4": _FLIPS + _TRANSPOSED}

Forward = Callable[[np.ndarray], np.ndarray]
Read = Callable[[int, int, int, int], np.ndarray]  # top, left, height, width inside the image -> (C, height, width)
Tile = tuple[int, int, np.ndarray | None]
T = TypeVar("T")


class NotFiniteError(RuntimeError):
    """A network answered with what is no number; the message names the image or tile."""


@dataclass(frozen=True)
class Axis:
    """How the tiles lie along one axis of the frame."""

    size: int  # pixels of the image
    frame: int  # pixels after padding, a multiple of the stride
    tile: int  # pixels of one tile, a multiple of the stride
    origins: tuple[int, ...]  # first pixel of each tile in the frame, ascending multiples of the stride
    shares: np.ndarray  # (len(origins), tile) float32, at every pixel of the frame they sum to 1


def predict_tiled(  # noqa: PLR0913 - the geometry of a network is five numbers, and they are its checkpoint's
    image: np.ndarray,
    forward: Forward,
    *,
    tile: int,
    overlap: int,
    halo: int,
    stride: int,
    min_side: int,
    batch_size: int,
    window: str = "hann",
    tta: str = "none",
) -> np.ndarray:
    """Blend the probabilities of overlapping tiles into one picture of the image's size.

    Args:
        image: normalised image, (C, H, W) float32, any size from one pixel.
        forward: (N, C, h, w) float32 -> probabilities (N, K, h, w); h and w are multiples of the stride.
        tile: side of a tile in pixels; rounded up to a multiple of the stride that is at least min_side. A shorter axis
            gets one tile of the frame's length.
        overlap: least number of pixels that neighbouring tiles share, in [2 * halo, tile).
        halo: pixels along a tile's inner edges that get no weight; the network's border effects belong in there.
        stride: total stride of the network; tile origins and sizes are multiples of it.
        min_side: smallest side the network accepts, in pixels.
        batch_size: most tiles in one call of forward.
        window: weight of a tile's pixels, one of WINDOWS.
        tta: see predict_bands.

    Returns:
        Probabilities, (K, H, W) float32.

    Raises:
        ValueError: a number is out of its range, or image or forward's answer has another shape.
        RuntimeError: a tile's probabilities hold NaN or infinity.
    """
    if image.ndim != 3 or 0 in image.shape:
        raise ValueError(f"image has shape {image.shape}, expected (C, H, W) with at least one pixel")
    rows, cols = (
        plan_axis(size, tile=tile, overlap=overlap, halo=halo, stride=stride, min_side=min_side, window=window)
        for size in image.shape[1:]
    )
    result = np.empty((0,), np.float32)
    for top, band in predict_bands(window_reader(image), forward, rows, cols, batch_size=batch_size, tta=tta):
        if top == 0:
            result = np.empty((band.shape[0], rows.size, cols.size), np.float32)
        result[:, top : top + band.shape[1]] = band
    return result


def predict_bands(  # noqa: PLR0913 - the last five are for slides, an image in memory needs none of them
    read: Read,
    forward: Forward,
    rows: Axis,
    cols: Axis,
    *,
    batch_size: int,
    tta: str = "none",
    keep: np.ndarray | None = None,
    channels: int = 0,
    first_row: int = 0,
    ahead: int = 0,
    buffers: int = 1,
) -> Iterator[tuple[int, np.ndarray]]:
    """Predict an image that is read by windows; rows leave as soon as no later tile touches them.

    Args:
        read: (top, left, height, width), a window inside the image -> its pixels (C, height, width).
        forward: (N, C, h, w) -> probabilities (N, K, h, w).
        rows: the plan of the image's height, from plan_axis.
        cols: the plan of its width.
        batch_size: most tiles in one call of forward. Batches are the same wherever a run begins.
        tta: "none", "flips" (4 views) or "d4" (8 views): every tile is also predicted mirrored and transposed, and the
            mean of the views, each turned back, is blended.
        keep: (len(rows.origins), len(cols.origins)) bool, tiles to predict; the others count as 0. None: all.
        channels: K, needed with `keep`, for there may be no tile to learn it from.
        first_row: rows above it are not wanted; tiles that touch none of the others are not predicted.
        ahead: batches that a thread of its own reads before they are asked for; 0 reads when they are.
        buffers: a band is overwritten when this many more have been asked for.

    Yields:
        (first row, probabilities (K, h, W) float32) from top to bottom, without the frame's padding. The arrays are
        reused: copy them to keep them.

    Raises:
        ValueError, RuntimeError: see predict_tiled.
    """
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size} is too small, expected 1 or more")
    if tta not in TTA:
        raise ValueError(f"unknown TTA {tta!r}, expected one of {', '.join(TTA)}")
    first = next(row for row, origin in enumerate(rows.origins) if origin + rows.tile > first_row)
    kept = np.ones((len(rows.origins), len(cols.origins)), bool) if keep is None else keep
    batches: Generator[Batch, None, None] = read_batches(read, rows, cols, batch_size, kept, first)
    if ahead:
        batches = run_ahead(batches, ahead)
    found = forward_batches(batches, turned(forward, TTA[tta]), rows, cols)
    tiles = with_skipped(found, kept, first)
    with closing(batches):  # reading has ended when an error arrives: what is read may be closed next
        for top, band in blend_bands(tiles, rows, cols, channels, buffers):
            cut = min(max(first_row - top, 0), band.shape[1])
            if cut < band.shape[1]:
                yield top + cut, band[:, cut:]


def window_reader(image: np.ndarray) -> Read:
    """How predict_bands reads an image (C, H, W) that is in memory; windows are views."""
    return lambda top, left, height, width: image[:, top : top + height, left : left + width]


def plan_axis(size: int, *, tile: int, overlap: int, halo: int, stride: int, min_side: int, window: str) -> Axis:
    """Lay tiles along one axis of an image; the arguments are those of predict_tiled.

    Raises:
        ValueError: a number is out of its range.
    """
    for name, value, least in (("tile", tile, 1), ("stride", stride, 1), ("halo", halo, 0), ("min_side", min_side, 0)):
        if value < least:
            raise ValueError(f"{name} is {value}, expected {least} or more")
    if window not in WINDOWS:
        raise ValueError(f"unknown window {window!r}, expected one of {', '.join(WINDOWS)}")
    if overlap < 2 * halo:
        raise ValueError(
            f"overlap {overlap} is less than twice the halo {halo}: pixels between two tiles would get no weight. "
            f"Use an overlap of {2 * halo} or more, or a smaller halo"
        )
    tile = round_up(max(tile, min_side), stride)
    step = (tile - overlap) // stride * stride
    if step < 1:
        raise ValueError(
            f"tile {tile} and overlap {overlap} leave no step of at least the stride {stride}. "
            f"Use a tile of {round_up(overlap + stride, stride)} or more, or a smaller overlap"
        )
    frame = round_up(max(size, min_side), stride)
    tile = min(tile, frame)
    origins = (*range(0, frame - tile, step), frame - tile)
    return Axis(size, frame, tile, origins, axis_shares(origins, tile, halo, window))


def axis_shares(origins: tuple[int, ...], tile: int, halo: int, window: str) -> np.ndarray:
    """What part of each pixel's value comes from which tile along one axis.

    Returns:
        (len(origins), tile) float32: window weights divided by their sum over all tiles at that pixel. Exactly 0 within
        halo pixels of an inner tile edge; flat towards the first and last pixel of the frame.
    """
    weights = np.ones((len(origins), tile))
    if len(origins) > 1:
        middle = np.arange(tile) + 0.5 < tile / 2
        inner = window_weights(tile, halo, window)
        weights[1:, middle] = inner[middle]
        weights[:-1, ~middle] = inner[~middle]
    total = np.zeros(origins[-1] + tile)
    for origin, weight in zip(origins, weights, strict=True):
        total[origin : origin + tile] += weight
    shares = [weight / total[origin : origin + tile] for origin, weight in zip(origins, weights, strict=True)]
    return np.stack(shares).astype(np.float32)


def window_weights(tile: int, halo: int, window: str) -> np.ndarray:
    """Weights of a tile with two inner edges: (tile,) float64, sampled at half pixels, 0 in the halo, else above 0."""
    length = tile - 2 * halo
    place = (np.arange(length) + 0.5) / length  # in (0, 1)
    if window == "hann":
        inside = np.sin(np.pi * place) ** 2
    elif window == "gaussian":
        inside = np.exp(-0.5 * ((place - 0.5) / GAUSSIAN_SIGMA) ** 2)
    else:
        inside = np.ones(length)
    return np.pad(inside, halo)


Batch = tuple[list[tuple[int, int]], np.ndarray]


def read_batches(
    read: Read, rows: Axis, cols: Axis, batch_size: int, kept: np.ndarray, first: int = 0
) -> Generator[Batch, None, None]:
    """Read the kept tiles in reading order; a batch goes on into the next row of tiles.

    Args:
        first: row of tiles to begin with; the batch that holds its first tile is read whole, so a run that begins here
            has the batches of one that began at the top.

    Yields:
        ([(row number, column number), ...], pixels (N, C, rows.tile, cols.tile)) of each batch.
    """
    before = int(np.count_nonzero(kept[:first])) // batch_size * batch_size
    places = islice(zip(*np.nonzero(kept), strict=True), before, None)
    row_index, col_index = (reflect_index(axis.size, axis.frame) for axis in (rows, cols))
    while chunk := [(int(row), int(col)) for row, col in islice(places, batch_size)]:
        pixels = [
            read_tile(
                read,
                row_index[rows.origins[row] : rows.origins[row] + rows.tile],
                col_index[cols.origins[col] : cols.origins[col] + cols.tile],
            )
            for row, col in chunk
        ]
        yield chunk, pixels[0][None] if len(pixels) == 1 else np.stack(pixels)


def read_tile(read: Read, row_index: np.ndarray, col_index: np.ndarray) -> np.ndarray:
    """The pixels (C, h, w) at some rows and columns of an image, of which only the box that holds them is read."""
    top, left = int(row_index.min()), int(col_index.min())
    pixels = read(top, left, int(row_index.max()) + 1 - top, int(col_index.max()) + 1 - left)
    if _is_run(row_index) and _is_run(col_index):
        return pixels
    return pixels[:, (row_index - top)[:, None], col_index - left]


def forward_batches(batches: Iterable[Batch], forward: Forward, rows: Axis, cols: Axis) -> Iterator[Tile]:
    """Run the network over batches of tiles.

    Yields:
        (row number, column number, probabilities (K, rows.tile, cols.tile) float32) of each tile.
    """
    for chunk, batch in batches:
        probs = np.asarray(forward(batch), np.float32)
        check_probs(probs, batch, [(rows.origins[row], cols.origins[col]) for row, col in chunk])
        for (row, col), tile_probs in zip(chunk, probs, strict=True):
            yield row, col, tile_probs


def turned(forward: Forward, views: Sequence[tuple[Turn, Turn]]) -> Forward:
    """The mean of what forward says of several views of a batch, each turned back; see TTA."""
    if len(views) == 1:
        return forward

    def mean(batch: np.ndarray) -> np.ndarray:
        total = np.zeros((), np.float32)
        for turn, back in views:
            total = total + back(np.asarray(forward(np.ascontiguousarray(turn(batch))), np.float32))
        return total / np.float32(len(views))

    return mean


def with_skipped(tiles: Iterable[Tile], kept: np.ndarray, first: int) -> Iterator[Tile]:
    """Put the tiles that are not kept back into the reading order, without probabilities, from a row of tiles on."""
    predicted = (tile for tile in tiles if tile[0] >= first)
    for row in range(first, kept.shape[0]):
        for col in range(kept.shape[1]):
            yield next(predicted) if kept[row, col] else (row, col, None)


def run_ahead(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """Make items in a thread of their own, at most `depth` before they are asked for, in the same order.

    What making them raises is raised here; a consumer that stops early ends the thread.
    """
    end = object()
    worker = ThreadPoolExecutor(1)
    try:
        waiting = deque(worker.submit(next, items, end) for _ in range(depth))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(worker.submit(next, items, end))
            yield item  # type: ignore[misc]
    finally:
        worker.shutdown(cancel_futures=True)
        if isinstance(items, Generator):
            items.close()


def check_probs(probs: np.ndarray, batch: np.ndarray, corners: list[tuple[int, int]]) -> None:
    """Refuse an answer of another shape, and name the tile whose probabilities are not finite.

    Args:
        probs: forward's answer, expected (N, K, h, w).
        batch: forward's input, (N, C, h, w).
        corners: (row, column) in pixels of the N tiles.
    """
    if probs.ndim != 4 or probs.shape[0] != batch.shape[0] or probs.shape[2:] != batch.shape[2:]:
        expected = f"({batch.shape[0]}, K, {batch.shape[2]}, {batch.shape[3]})"
        raise ValueError(f"forward returned shape {probs.shape} for a batch {batch.shape}, expected {expected}")
    for (top, left), tile_input, tile_probs in zip(corners, batch, probs, strict=True):
        if np.isfinite(tile_probs.sum()):  # one cheap pass: a sum keeps every NaN and infinity
            continue
        values = "values that are not finite (NaN)" if np.isnan(tile_probs).any() else "infinite values"
        where = "its input pixels hold some too" if not np.isfinite(tile_input).all() else "its input pixels are finite"
        raise NotFiniteError(
            f"the probabilities of the tile at row {top}, column {left} ({batch.shape[2]} x {batch.shape[3]} pixels) "
            f"hold {values}; {where}. Expected numbers in [0, 1]: look at the image there, or at the weights"
        )


def blend_bands(
    tiles: Iterable[Tile], rows: Axis, cols: Axis, channels: int = 0, buffers: int = 1
) -> Iterator[tuple[int, np.ndarray]]:
    """Blend tiles that arrive in reading order and let rows go as soon as no later tile touches them.

    Memory holds `buffers` strips of a tile's height and the rows that strips share, whatever the height of the image.

    Args:
        tiles: as forward_batches yields them, from the first tile of some row of tiles on; a tile without
            probabilities counts as 0.
        channels: K; 0 takes it from the first tile, which then has probabilities.
        buffers: see predict_bands.

    Yields:
        (first row, probabilities (K, h, W) float32) from top to bottom, without the frame's padding.
    """
    strips: deque[np.ndarray] = deque()  # (K, rows.tile, cols.frame) each, one row of tiles; used in turns
    carry: np.ndarray | None = None  # (K, h, cols.frame), rows above that wait for this strip
    stops = (*rows.origins[1:], rows.frame)
    filled = 0  # columns of the strip that hold values of this row of tiles
    for row, col, probs in tiles:
        if len(strips) < buffers and col == 0:
            count = channels if probs is None else probs.shape[0]
            strips.append(np.empty((count, rows.tile, cols.frame), np.float32))
        elif col == 0:
            strips.rotate(-1)
        strip = strips[-1]
        filled = _add_tile(strip, probs, cols.shares[col], cols.origins[col], filled)
        if col + 1 < len(cols.origins):
            continue
        strip *= rows.shares[row][:, None]
        if carry is not None:
            strip[:, : carry.shape[1]] += carry
        done = stops[row] - rows.origins[row]
        carry, filled = strip[:, done:].copy(), 0
        kept = min(done, rows.size - rows.origins[row])
        if kept > 0:
            yield rows.origins[row], strip[:, :kept, : cols.size]


def _add_tile(strip: np.ndarray, probs: np.ndarray | None, share: np.ndarray, left: int, filled: int) -> int:
    """Add a tile times its column share to a strip that is filled up to a column; return the new filled column."""
    shared = filled - left
    if probs is None:
        strip[:, :, filled : left + len(share)] = 0
        return left + len(share)
    strip[:, :, left:filled] += probs[:, :, :shared] * share[:shared]
    np.multiply(probs[:, :, shared:], share[shared:], out=strip[:, :, filled : left + len(share)])
    return left + len(share)


def reflect_index(size: int, frame: int) -> np.ndarray:
    """Which pixel of the image each pixel of the frame shows: (frame,) int64, a triangle wave over 0..size-1.

    The edge pixel is not repeated (0 1 2 3 2 1 0 1 ...), and an image of one pixel repeats it. Any frame length works,
    unlike one-step reflection, which stops at twice the size.
    """
    if size == 1:
        return np.zeros(frame, np.int64)
    period = 2 * (size - 1)
    place = np.arange(frame) % period
    return np.minimum(place, period - place)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not below the value, and never 0."""
    return max(-(-value // multiple), 1) * multiple


def _is_run(index: np.ndarray) -> bool:
    return bool(index[-1] - index[0] == len(index) - 1)
