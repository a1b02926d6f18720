"""Rows of a raster -> encoded TIFF tiles of every pyramid level, in memory that does not grow with the height.

Discrete values (shrink "nearest": masks, labels) take the lower right pixel of each 2 x 2 block on the first level, the
upper left one on the second, and so on in turn: a pixel of any level then lies within a quarter of its own side from
the centre of what it stands for, where one fixed corner drifts by half of it. Continuous values (shrink "mean":
probabilities, pictures) take the mean, halves rounded up. Where a side is odd its last row or column is repeated.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import numpy as np
import numpy.typing as npt

from spool import DamagedTile, JobError, Spool

DTYPES = ("uint8", "uint16", "uint32", "float32")
SHRINKS = ("nearest", "mean")
# libdeflate's levels. Discrete tiles: 2 is smaller than zlib's 3 and as fast as its 1. Continuous ones: 1 takes half of
# level 2's time for 2 % more bytes, and half of zlib's 1.
LEVELS = {"nearest": 2, "mean": 1}
AT_ONCE = 32  # tiles in work; all of a row would be as large as the row itself
REMEMBERED = 64  # encoded tiles of one value that are kept


@dataclass(frozen=True)
class Layer:
    """One raster to write.

    Attributes:
        name: letters, digits, - and _; it names the files of the working folder.
        height, width: pixels, 1 or more.
        bands: values for each pixel.
        dtype: uint8, uint16, uint32 or float32.
        shrink: how levels are made, "nearest" or "mean" (not for uint32).
        pyramid: whether to make levels: halves until the longer side fits into one tile.
        tile: side of a tile in pixels, a multiple of 16.
        rgb: the three uint8 bands are the colours of a picture, kept together in one tile. Other bands have tiles of
            their own.
    """

    name: str
    height: int
    width: int
    bands: int
    dtype: npt.DTypeLike
    shrink: str
    pyramid: bool = True
    tile: int = 512
    rgb: bool = False

    def __post_init__(self) -> None:
        if not self.name or not all(letter.isascii() and (letter.isalnum() or letter in "-_") for letter in self.name):
            raise ValueError(f"layer name {self.name!r} cannot name a file, expected letters, digits, - and _")
        if min(self.height, self.width, self.bands) < 1:
            raise ValueError(
                f"layer {self.name} has {self.height} x {self.width} pixels of {self.bands} bands, expected 1 or more"
            )
        if self.kind.name not in DTYPES or self.shrink not in SHRINKS:
            raise ValueError(
                f"layer {self.name} is {self.kind} shrunk by {self.shrink!r}, expected one of {', '.join(DTYPES)} and "
                f"one of {', '.join(SHRINKS)}"
            )
        if self.shrink == "mean" and self.kind == np.uint32:
            raise ValueError(f"layer {self.name} is uint32, whose mean is not made: labels shrink by 'nearest'")
        if self.tile < 16 or self.tile % 16:
            raise ValueError(f"layer {self.name} has tiles of {self.tile} pixels, expected a multiple of 16")
        if self.rgb and (self.bands != 3 or self.kind != np.uint8):
            raise ValueError(f"layer {self.name} is RGB with {self.bands} bands of {self.kind}, expected 3 of uint8")

    @property
    def kind(self) -> np.dtype:
        """The number type."""
        return np.dtype(self.dtype)

    @property
    def planes(self) -> int:
        """Tiles for each place: bands, but 1 for a picture."""
        return 1 if self.rgb else self.bands

    @property
    def samples(self) -> int:
        """Values of a pixel inside one tile: 1, but 3 for a picture."""
        return self.bands if self.rgb else 1

    @property
    def predictor(self) -> bool:
        """Whether tiles hold horizontal differences (TIFF predictor 2): worth it for continuous whole numbers."""
        return self.shrink == "mean" and self.kind.kind == "u"

    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of every level, level 0 first."""
        sizes = [(self.height, self.width)]
        while self.pyramid and max(sizes[-1]) > self.tile:
            sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
        return sizes

    def tile_rows(self, rows: int) -> list[int]:
        """How many rows of tiles each level has when `rows` rows of level 0 are done."""
        counts = []
        for height, _ in self.sizes():
            counts.append(-(-height // self.tile) if rows >= height else rows // self.tile)
            rows = (height + 1) // 2 if rows >= height else counts[-1] * self.tile // 2
        return counts

    def describe(self) -> dict[str, Any]:
        """Plain values that are equal exactly for layers that give equal files."""
        numbers = {name: int(getattr(self, name)) for name in ("height", "width", "bands", "tile")}
        return {
            **numbers,
            "name": self.name,
            "dtype": self.kind.name,
            "shrink": self.shrink,
            "pyramid": self.pyramid,
            "rgb": self.rgb,
        }


def shrink_plane(plane: np.ndarray, shrink: str, level: int) -> np.ndarray:
    """Halve rows and columns.

    Args:
        plane: (h, w, samples), starting at an even row of its level.
        shrink: "nearest" or "mean".
        level: the level that is made, from 1.

    Returns:
        (ceil(h / 2), ceil(w / 2), samples) of the same number type.
    """
    height, width, samples = plane.shape
    if height % 2 or width % 2:
        plane = np.pad(plane, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    if shrink == "nearest":
        corner = level % 2
        return plane[corner::2, corner::2]
    size = (plane.shape[1] // 2, plane.shape[0] // 2)
    return cv2.resize(plane, size, interpolation=cv2.INTER_AREA).reshape(size[1], size[0], samples)


class Pyramid:
    """One layer's levels: buffers of unfinished tile rows above spools of finished tiles."""

    def __init__(self, folder: Path, layer: Layer, pool: Executor) -> None:
        self.layer = layer
        self.sizes = layer.sizes()
        self.spools = [Spool(folder, f"{layer.name}.{level}") for level in range(len(self.sizes))]
        self._pool = pool
        self._constant: dict[bytes, bytes] = {}
        self._buffers: list[np.ndarray | None] = [None] * len(self.sizes)
        self._filled = [0] * len(self.sizes)  # rows in each buffer

    # ---- writing

    def add(self, rows: np.ndarray) -> None:
        """Add rows of level 0, (h, W, bands); at most as many as complete the tile row that is open."""
        if self.layer.rgb:
            self._push(0, rows[None])
        else:
            self._push(0, np.moveaxis(rows, 2, 0)[..., None])

    def _push(self, level: int, rows: np.ndarray) -> None:
        """Add rows (planes, h, w, samples) to a level, and write its tile row when that is complete."""
        layer, (height, width) = self.layer, self.sizes[level]
        buffer = self._buffers[level]
        if buffer is None:
            shape = (layer.planes, min(layer.tile, height), width, layer.samples)
            buffer = self._buffers[level] = np.empty(shape, layer.kind)
        filled = self._filled[level] + rows.shape[1]
        buffer[:, self._filled[level] : filled] = rows
        self._filled[level] = filled
        if filled < layer.tile and self._top(level) + filled < height:
            return
        self._filled[level] = 0
        done = buffer[:, :filled]
        self._write(level, done)
        if level + 1 < len(self.sizes):
            self._push(level + 1, self._shrink(done, level + 1))
        if self._top(level) >= height:
            self._buffers[level] = None

    def _top(self, level: int) -> int:
        """First row of the tile row that comes next."""
        return self.spools[level].count // self.tiles_across(level) * self.layer.tile

    def _shrink(self, rows: np.ndarray, level: int) -> np.ndarray:
        return np.stack([shrink_plane(plane, self.layer.shrink, level) for plane in rows])

    def tiles_across(self, level: int) -> int:
        """Tiles in one row of tiles, all planes counted."""
        return -(-self.sizes[level][1] // self.layer.tile) * self.layer.planes

    def _write(self, level: int, rows: np.ndarray) -> None:
        """Encode a tile row (planes, h, w, samples) plane by plane, left to right, into the spool."""
        side = self.layer.tile
        tiles = [plane[:, left : left + side] for plane in rows for left in range(0, rows.shape[2], side)]
        for start in range(0, len(tiles), AT_ONCE):
            self.spools[level].append(list(self._pool.map(self._encode_tile, tiles[start : start + AT_ONCE])))

    def _encode_tile(self, tile: np.ndarray) -> bytes:
        first = tile[0, 0]
        if not np.array_equal(first, tile[-1, -1]) or not (tile == first).all():
            return self._compress(tile)
        known = self._constant.get(first.tobytes())
        if known is None:
            if len(self._constant) >= REMEMBERED:
                self._constant.clear()
            known = self._constant[first.tobytes()] = self._compress(tile)
        return known

    def _compress(self, tile: np.ndarray) -> bytes:
        missing = [(0, self.layer.tile - size) for size in tile.shape[:2]]
        if any(after for _, after in missing):
            tile = np.pad(tile, (*missing, (0, 0)), mode="edge")
        data: Any = np.ascontiguousarray(tile)
        if self.layer.predictor:
            data = imagecodecs.delta_encode(data, axis=1)
        return bytes(imagecodecs.deflate_encode(data, level=LEVELS[self.layer.shrink]))

    # ---- reading

    def read_rows(self, level: int, row: int) -> np.ndarray:
        """Decode one row of tiles from the spool, (h, w, bands).

        Raises:
            JobError: a tile is damaged; names it.
        """
        layer, side = self.layer, self.layer.tile
        height, width = self.sizes[level]
        rows = np.empty((min(side, height - row * side), width, layer.bands), layer.kind)
        across = self.tiles_across(level)
        columns = across // layer.planes
        for start in range(0, across, AT_ONCE):
            stop = min(start + AT_ONCE, across)
            encoded = self.read_encoded(level, row * across + start, row * across + stop)
            for number, tile in enumerate(self._pool.map(self._decode_tile, encoded), start):
                plane, left = number // columns, number % columns * side
                target = rows[:, left : left + side, plane : plane + layer.samples]
                target[:] = tile[: target.shape[0], : target.shape[1]]
        return rows

    def _decode_tile(self, data: bytes) -> np.ndarray:
        side, samples = self.layer.tile, self.layer.samples
        raw = imagecodecs.deflate_decode(data)
        tile = np.frombuffer(raw, self.layer.kind).reshape(side, side, samples)
        return imagecodecs.delta_decode(tile, axis=1) if self.layer.predictor else tile

    def read_encoded(self, level: int, start: int, stop: int) -> list[bytes]:
        """The encoded bytes of some tiles of a level, in the order of the spool.

        Raises:
            JobError: a tile is damaged; names it.
        """
        try:
            return self.spools[level].read(start, stop)
        except DamagedTile as damage:
            row, rest = divmod(damage.number, self.tiles_across(level))
            plane, column = divmod(rest, self.tiles_across(level) // self.layer.planes)
            band = f", band {plane + 1}" if self.layer.planes > 1 else ""
            raise JobError(
                f"{self.spools[level].path}: the tile of layer {self.layer.name}, level {level}, tile row {row}, tile "
                f"column {column}{band} is damaged (its checksum differs); expected the bytes that were written: check "
                f"the disk, delete {self.spools[level].path.parent} and run the same command again"
            ) from damage

    def iterate_encoded(self, level: int) -> Iterator[bytes]:
        """All encoded tiles of a level plane by plane, the order in which a TIFF keeps them."""
        height, _ = self.sizes[level]
        across = self.tiles_across(level)
        columns = across // self.layer.planes
        for plane in range(self.layer.planes):
            for row in range(-(-height // self.layer.tile)):
                end = row * across + (plane + 1) * columns
                for start in range(end - columns, end, AT_ONCE):
                    yield from self.read_encoded(level, start, min(start + AT_ONCE, end))

    # ---- going on

    def holds(self, rows: int, sizes: Sequence[int]) -> bool:
        """Whether the spools hold `rows` rows of level 0 and what follows from them, `sizes` bytes a level."""
        counts = self.layer.tile_rows(rows)
        across = [self.tiles_across(level) for level in range(len(counts))]
        return len(sizes) == len(counts) and all(
            spool.holds(size, count * tiles, tiles)
            for spool, size, count, tiles in zip(self.spools, sizes, counts, across, strict=True)
        )

    def resume(self, rows: int, sizes: Sequence[int]) -> None:
        """Cut the spools back to `rows` rows of level 0 and fill the buffers of levels that wait for a second half."""
        counts = self.layer.tile_rows(rows)
        self._filled = [0] * len(counts)
        for level, (spool, size, count) in enumerate(zip(self.spools, sizes, counts, strict=True)):
            spool.cut(size, count * self.tiles_across(level))
        for level, count in enumerate(counts[:-1]):
            if count % 2 and count * self.layer.tile < self.sizes[level][0]:
                last = self.read_rows(level, count - 1)
                planes = last[None] if self.layer.rgb else np.moveaxis(last, 2, 0)[..., None]
                self._push(level + 1, self._shrink(planes, level + 1))
