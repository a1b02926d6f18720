"""Predict an image of any size tile by tile: the one engine behind every command that runs a crops network.

The image is reflect-padded right and bottom to a frame the network accepts, cut into overlapping tiles, and the
probabilities are blended with per-axis shares that already sum to 1: there is no weight image and no division. Finished
rows leave as bands, so only predict_tiled, which collects them, needs the whole result in memory.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

WINDOWS = ("hann", "gaussian", "constant")
GAUSSIAN_SIGMA = 1 / 8  # of the window's length

Forward = Callable[[np.ndarray], np.ndarray]
Tile = tuple[int, int, np.ndarray]


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

    Returns:
        Probabilities, (K, H, W) float32.

    Raises:
        ValueError: a number is out of its range, or image or forward's answer has another shape.
        RuntimeError: a tile's probabilities hold NaN or infinity.
    """
    if image.ndim != 3 or 0 in image.shape:
        raise ValueError(f"image has shape {image.shape}, expected (C, H, W) with at least one pixel")
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size} is too small, expected 1 or more")
    rows, cols = (
        plan_axis(size, tile=tile, overlap=overlap, halo=halo, stride=stride, min_side=min_side, window=window)
        for size in image.shape[1:]
    )
    result = np.empty((0,), np.float32)
    for top, band in blend_bands(forward_tiles(image, forward, rows, cols, batch_size), rows, cols):
        if top == 0:
            result = np.empty((band.shape[0], rows.size, cols.size), np.float32)
        result[:, top : top + band.shape[1]] = band
    return result


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


def forward_tiles(image: np.ndarray, forward: Forward, rows: Axis, cols: Axis, batch_size: int) -> Iterator[Tile]:
    """Run the network over all tiles in reading order; a batch goes on into the next row of tiles.

    Yields:
        (row number, column number, probabilities (K, rows.tile, cols.tile) float32) of each tile.
    """
    row_index, col_index = (reflect_index(axis.size, axis.frame) for axis in (rows, cols))
    places = ((row, col) for row in range(len(rows.origins)) for col in range(len(cols.origins)))
    while chunk := list(islice(places, batch_size)):
        batch = np.empty((len(chunk), image.shape[0], rows.tile, cols.tile), np.float32)
        for slot, (row, col) in zip(batch, chunk, strict=True):
            top, left = rows.origins[row], cols.origins[col]
            slot[:] = cut_tile(image, row_index[top : top + rows.tile], col_index[left : left + cols.tile])
        probs = np.asarray(forward(batch), np.float32)
        check_probs(probs, batch, [(rows.origins[row], cols.origins[col]) for row, col in chunk])
        for (row, col), tile_probs in zip(chunk, probs, strict=True):
            yield row, col, tile_probs


def cut_tile(image: np.ndarray, row_index: np.ndarray, col_index: np.ndarray) -> np.ndarray:
    """The pixels (C, h, w) at some rows and columns of an image (C, H, W); a view where they are consecutive."""
    if _is_run(row_index) and _is_run(col_index):
        return image[:, row_index[0] : row_index[-1] + 1, col_index[0] : col_index[-1] + 1]
    return image[:, row_index[:, None], col_index]


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
        raise RuntimeError(
            f"the probabilities of the tile at row {top}, column {left} ({batch.shape[2]} x {batch.shape[3]} pixels) "
            f"hold {values}; {where}. Expected numbers in [0, 1]: look at the image there, or at the weights"
        )


def blend_bands(tiles: Iterable[Tile], rows: Axis, cols: Axis) -> Iterator[tuple[int, np.ndarray]]:
    """Blend tiles that arrive in reading order and let rows go as soon as no later tile touches them.

    Memory holds one strip of a tile's height and the rows that strips share, whatever the height of the image.

    Yields:
        (first row, probabilities (K, h, W) float32) from top to bottom, without the frame's padding. The array is
        reused: copy it to keep it.
    """
    strip: np.ndarray | None = None  # (K, rows.tile, cols.frame), one row of tiles
    carry: np.ndarray | None = None  # (K, h, cols.frame), rows above that wait for this strip
    stops = (*rows.origins[1:], rows.frame)
    filled = 0  # columns of the strip that hold values of this row of tiles
    for row, col, probs in tiles:
        if strip is None:
            strip = np.empty((probs.shape[0], rows.tile, cols.frame), np.float32)
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


def _add_tile(strip: np.ndarray, probs: np.ndarray, share: np.ndarray, left: int, filled: int) -> int:
    """Add a tile times its column share to a strip that is filled up to a column; return the new filled column."""
    shared = filled - left
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
