"""Read windows of images of any size, at a level, a reduction or microns per pixel, whatever the file.

Tiled, stripped and pyramidal TIFF, SVS and NDPI are decoded tile by tile, ordinary images once; callers see no
difference. Every scale has one output grid, and reads are exact crops of it: windows that meet have no seam.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from image_io import resize_image
from slide_sources import Mosaic, Piece, SlideError, Stored, level_scale, open_stored

__all__ = ["Georeference", "Grid", "Level", "Slide", "SlideError", "open_slide"]

SAME_SCALE = 0.005  # a stored level this near to the scale asked for is taken as it is
BLOCK = 256  # largest side of the blocks that are averaged at once, in pixels of the grid
SOURCE_SIDE = 2048  # of what such a block covers in the level it is averaged from
GROUP = 32  # pixels of an axis that are averaged by one matrix product


@dataclass(frozen=True)
class Level:
    """A stored resolution; scale is level-0 pixels per pixel."""

    height: int
    width: int
    scale: float


@dataclass(frozen=True)
class Georeference:
    """Where level 0 lies on the map: GeoTIFF tags as (code, type, count, value, once), as tifffile writes them."""

    tags: tuple[tuple[int, int, int, Any, bool], ...]

    def _value(self, code: int) -> Any:
        return next((tag[3] for tag in self.tags if tag[0] == code), None)

    def _points(self) -> bool:
        """Whether raster coordinates name the centres of pixels (GTRasterTypeGeoKey), not their corners."""
        keys = self._value(34735) or ()
        return any(keys[i] == 1025 and keys[i + 3] == 2 for i in range(4, len(keys) - 3, 4))

    def epsg(self) -> int | None:
        """EPSG code of the map's coordinate system: projected if there is one, else geographic; None when not coded."""
        keys = self._value(34735) or ()
        codes = {keys[i]: keys[i + 3] for i in range(4, len(keys) - 3, 4) if keys[i + 1] == 0}
        found = [codes[key] for key in (3072, 2048) if 0 < codes.get(key, 0) < 32767]
        return int(found[0]) if found else None

    def scaled(self, factor: float) -> list[tuple[int, int, int, Any, bool]]:
        """The tags for a raster whose pixels are `factor` times as long, for tifffile's extratags."""
        shift = (factor - 1) / 2 if self._points() else 0.0  # raster coordinate u is factor * new + shift
        scaled = []
        for code, kind, count, value, once in self.tags:
            if code == 33550:
                value = (value[0] * factor, value[1] * factor, *value[2:])
            elif code == 33922:
                value = tuple((v - shift) / factor if i % 6 < 2 else v for i, v in enumerate(value))
            elif code == 34264:
                moved = np.array(value, np.float64).reshape(4, 4)
                moved[:, 3] += shift * (moved[:, 0] + moved[:, 1])
                moved[:, :2] *= factor
                value = tuple(moved.ravel().tolist())
            scaled.append((code, kind, count, value, once))
        return scaled

    def affine(self) -> tuple[float, float, float, float, float, float] | None:
        """The way from pixels to the map, (a, b, c, d, e, f); None when the tags only hold control points.

        The corner of level-0 pixels at (column, row) lies at (a * column + b * row + c, d * column + e * row + f).
        """
        matrix, size, tie = self._value(34264), self._value(33550), self._value(33922)
        half = 0.5 if self._points() else 0.0
        if matrix is not None and len(matrix) >= 8:
            a, b, c, d, e, f = (float(matrix[i]) for i in (0, 1, 3, 4, 5, 7))
        elif size is not None and tie is not None and len(size) >= 2 and len(tie) >= 6:
            a, b, d, e = float(size[0]), 0.0, 0.0, -float(size[1])
            c, f = float(tie[3] - tie[0] * a), float(tie[4] - tie[1] * e)
        else:
            return None
        return a, b, c - half * (a + b), d, e, f - half * (d + e)


class Grid:
    """The pixels of a slide at one scale. Windows of it are crops of one and the same raster.

    height, width: round(level 0 / scale), at least 1; of a stored level its own. scale: level-0 pixels per pixel of the
    grid, >= 1. channels, dtype: as image_io.read_image. mpp: microns per pixel of the grid, or None.
    """

    def __init__(self, path: Path, mosaic: Mosaic, stored: Mosaic, scale: float, mpp: float | None, fill: np.ndarray):
        """Args: mosaic: the grid; stored: the level it is read from; fill: of damaged pixels, a number a channel."""
        self.path, self.scale, self.mpp = path, scale, mpp
        self.height, self.width = mosaic.height, mosaic.width
        self.channels, self.dtype = mosaic.channels, mosaic.dtype
        self._mosaic, self._stored, self._fill = mosaic, stored, fill

    @property
    def damage(self) -> list[str]:
        """A message for each damaged tile that reading met so far."""
        return self._stored.damage

    def read(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Read a window inside the grid.

        Returns:
            (height, width, C); 0 where the file declares no data, `fill` where a tile is damaged.

        Raises:
            ValueError: the window leaves the grid.
            SlideError: a decoder is missing, or the only tile of the file is damaged.
        """
        self._check(top, left, height, width)
        return self._mosaic.read(top, left, height, width, self._fill)

    def valid(self, top: int, left: int, height: int, width: int) -> np.ndarray | None:
        """Where a window holds data, (height, width) bool; None: everywhere.

        Averaged pixels count when at least half of their area does.
        """
        self._check(top, left, height, width)
        return self._mosaic.valid(top, left, height, width)

    def keep(self, size: int) -> None:
        """Keep at most `size` bytes of decoded pixels at each scale, for windows that jump about in the slide."""
        self._mosaic.budget = self._stored.budget = size

    def _check(self, top: int, left: int, height: int, width: int) -> None:
        if min(top, left) < 0 or min(height, width) < 1 or top + height > self.height or left + width > self.width:
            raise ValueError(
                f"the window of {height}x{width} pixels at row {top}, column {left} leaves the grid of {self.path}, "
                f"which is {self.height}x{self.width}; expected a window inside it"
            )


class Slide:
    """An image of any size, opened for reading; a context manager. Worker processes each open their own.

    height, width: of level 0. channels, dtype (uint8, uint16 or float32): as image_io.read_image; whole numbers of
    other types are float32 where the file is read by tiles. levels: Level, largest first. mpp_xy, mpp: microns per
    pixel of level 0 in x and y and their mean, or None. geo: Georeference or None. nodata: the declared value or None.
    """

    def __init__(self, path: Path, stored: Stored) -> None:
        """See open_slide."""
        full = stored.levels[0]
        self.path, self._stored = path, stored
        self.height, self.width, self.channels, self.dtype = full.height, full.width, full.channels, full.dtype
        self.levels = tuple(
            Level(each.height, each.width, 1.0 if each is full else level_scale((full.height, full.width), size))
            for each, size in ((each, (each.height, each.width)) for each in stored.levels)
        )
        self.mpp_xy, self.nodata = stored.mpp_xy, stored.nodata
        self.mpp = None if self.mpp_xy is None else (self.mpp_xy[0] + self.mpp_xy[1]) / 2
        tags = tuple((*tag, True) for tag in stored.geo_tags)
        placed = {tag[0] for tag in tags} & {33922, 34264}
        self.geo = Georeference(tags) if placed else None  # type: ignore[arg-type]

    def __enter__(self) -> "Slide":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; grids cannot be read any more."""
        self._stored.close()

    def grid(
        self,
        *,
        reduce: float | None = None,
        level: int | None = None,
        mpp: float | None = None,
        fill: float | Sequence[float] = 0.0,
    ) -> Grid:
        """The grid of one scale; at most one of three ways to name it, none is the full resolution.

        Args:
            reduce: level-0 pixels per pixel, >= 1.
            level: index of a stored level.
            mpp: microns per pixel.
            fill: value of the pixels of damaged tiles, one number or one for each channel.

        Raises:
            SlideError: no such level, finer than the file, or microns per pixel of a file that does not say its own.
            ValueError: more than one scale, or fill does not fit the pixels.
        """
        if sum(given is not None for given in (reduce, level, mpp)) > 1:
            raise ValueError("expected one of reduce, level and mpp, not several")
        filled = self._check_fill(fill)
        if level is not None:
            index = self._check_level(level)
            return self._stored_grid(index, filled)
        scale = self._scale(reduce, mpp)
        for index, each in enumerate(self.levels):
            if abs(scale / each.scale - 1) <= SAME_SCALE or self._size(scale) == (each.height, each.width):
                return self._stored_grid(index, filled)
        return self._averaged_grid(scale, filled)

    def _size(self, scale: float) -> tuple[int, int]:
        return max(1, math.floor(self.height / scale + 0.5)), max(1, math.floor(self.width / scale + 0.5))

    def _scale(self, reduce: float | None, mpp: float | None) -> float:
        if mpp is not None:
            if self.mpp is None:
                raise SlideError(
                    f"{self.path} does not say how many microns a pixel is; expected that in a file read at {mpp:g} "
                    "microns per pixel: give the scale as --reduce or --level instead"
                )
            scale, asked = mpp / self.mpp, f"{mpp:g} microns per pixel"
        else:
            scale = 1.0 if reduce is None else float(reduce)
            asked = f"a reduction of {scale:g}"
        if not (math.isfinite(scale) and scale >= 1 - SAME_SCALE):
            finest = "" if self.mpp is None else f" ({self.mpp:.4g} microns per pixel)"
            raise SlideError(
                f"{self.path} was asked for at {asked}, but nothing is finer than its full resolution{finest}; "
                "expected a reduction of 1 or more: ask for a coarser scale"
            )
        return max(1.0, scale)

    def _check_level(self, level: int) -> int:
        if level not in range(len(self.levels)):
            known = ", ".join(f"{i} ({e.height}x{e.width}, 1/{e.scale:.4g})" for i, e in enumerate(self.levels))
            raise SlideError(f"{self.path} has no level {level}; expected one of: {known}")
        return level

    def _check_fill(self, fill: float | Sequence[float]) -> np.ndarray:
        values = np.atleast_1d(np.asarray(fill, np.float64))
        top = math.inf if self.dtype.kind == "f" else float(np.iinfo(self.dtype).max)
        low = -math.inf if self.dtype.kind == "f" else 0.0
        if values.shape not in ((1,), (self.channels,)) or not ((values >= low) & (values <= top)).all():
            raise ValueError(
                f"fill {fill} does not fit {self.path}; expected one number or {self.channels}, each a value of "
                f"{self.dtype}"
            )
        return values.astype(self.dtype)

    def _mpp_at(self, scale: float) -> float | None:
        return None if self.mpp is None else self.mpp * scale

    def _stored_grid(self, index: int, fill: np.ndarray) -> Grid:
        mosaic, scale = self._stored.levels[index], self.levels[index].scale
        return Grid(self.path, mosaic, mosaic, scale, self._mpp_at(scale), fill)

    def _averaged_grid(self, scale: float, fill: np.ndarray) -> Grid:
        index = max(i for i, each in enumerate(self.levels) if each.scale < scale)
        source, factor = self._stored.levels[index], scale / self.levels[index].scale
        drift = abs(factor - round(factor))  # pixels of the level that each pixel of the grid would be out
        if drift < 0.01 and drift * max(self._size(scale)) < 0.5:
            factor = float(round(factor))
            scale = factor * self.levels[index].scale
        size = self._size(scale)
        averaged = _Averaged(source, factor, _block_size(source, factor, size), size, fill)
        mosaic = Mosaic((*size, source.channels), source.dtype, averaged.block, averaged.load)
        return Grid(self.path, mosaic, source, scale, self._mpp_at(scale), fill)


def open_slide(path: Path, *, max_decoded_gb: float = 4.0) -> Slide:
    """Open an image file of any kind and size for reading by windows.

    Args:
        max_decoded_gb: most gigabytes of an image that can only be decoded at once.

    Raises:
        SlideError: not an image, damaged, too large to decode at once, or a decoder is missing.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    return Slide(path, open_stored(path, max_decoded_gb))


# Averaging


def _block_size(source: Mosaic, factor: float, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the blocks of a reduced grid: whole rows where the file has strips, else squares."""
    if source.piece[1] >= source.width:
        rows = SOURCE_SIDE * SOURCE_SIDE * 4 / (factor * factor * size[1])
        return max(1, min(BLOCK, size[0], int(rows))), size[1]
    side = max(1, min(BLOCK, int(SOURCE_SIDE / factor)))
    return min(side, size[0]), min(side, size[1])


class _Averaged:
    """Blocks of a reduced grid, each averaged from the part of a stored level that it covers."""

    def __init__(
        self, source: Mosaic, factor: float, block: tuple[int, int], size: tuple[int, int], fill: np.ndarray
    ) -> None:
        self.source, self.factor, self.block, self.size, self.fill = source, factor, block, size, fill

    def load(self, row: int, column: int) -> Piece:
        """Average one block.

        A pixel of which half or more holds data is the mean of that part, any other pixel the mean of the rest.
        """
        rows = _Span.of(row * self.block[0], self.block[0], self.size[0], self.factor, self.source.height)
        columns = _Span.of(column * self.block[1], self.block[1], self.size[1], self.factor, self.source.width)
        window = rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start
        pixels = self.source.read(*window, self.fill)
        valid = self.source.valid(*window)
        result = _shrink(pixels, rows, columns)
        if valid is None:
            return result, None
        known = _average(valid[..., None].astype(np.float32), rows, columns)
        share = known[..., 0]
        counts = share >= 0.5
        mixed = (share > 0) & (share < 1)
        if mixed.any():
            part = np.where(valid[..., None], pixels, np.zeros((), pixels.dtype))
            inside = _average(part.astype(np.float32), rows, columns)
            outside = _average((pixels - part).astype(np.float32), rows, columns)
            with np.errstate(divide="ignore", invalid="ignore"):
                means = np.where(counts[..., None], inside / known, outside / (1 - known))
            result[mixed] = _cast(means[mixed], result.dtype)
        return result, None if counts.all() else counts


@dataclass(frozen=True)
class _Span:
    """A run of grid pixels along one axis, and the pixels of the level, start to stop, that it covers."""

    first: int  # grid pixel
    count: int
    factor: float  # level pixels per grid pixel
    size: int  # of the level
    start: int
    stop: int

    @classmethod
    def of(cls, first: int, count: int, grid: int, factor: float, size: int) -> "_Span":
        """The run of up to `count` pixels from `first` in a grid of `grid` pixels."""
        count = min(count, grid - first)
        start = min(math.floor(first * factor), size - 1)
        return cls(first, count, factor, size, start, max(start + 1, min(size, math.ceil((first + count) * factor))))

    def weights(self, begin: int, end: int) -> tuple[np.ndarray, int, int]:
        """Shares of level pixels in the grid pixels begin to end of this run, (end - begin, n), rows that sum to 1.

        With the first and past the last of the n level pixels, counted from start. Grid pixels are cut off at the edge
        of the level.
        """
        edges = np.minimum(np.arange(self.first + begin, self.first + end + 1) * self.factor, self.size)
        low, high = np.minimum(edges[:-1], self.size - 1), edges[1:]
        high = np.maximum(high, low + 1e-6)
        start = max(self.start, int(low[0]))
        stop = min(self.stop, math.ceil(high[-1]))
        cells = np.arange(start, stop)
        shares = np.minimum(high[:, None], cells + 1) - np.maximum(low[:, None], cells)
        shares = np.maximum(shares, 0)
        shares /= shares.sum(axis=1, keepdims=True)
        return shares.astype(np.float32), start - self.start, stop - self.start


def _shrink(pixels: np.ndarray, rows: _Span, columns: _Span) -> np.ndarray:
    """Average what a block covers, (h, w, C) -> (rows, columns, C) of the same type."""
    if rows.factor != round(rows.factor):
        return _cast(_average(pixels, rows, columns), pixels.dtype)
    factor = int(rows.factor)
    result = np.empty((rows.count, columns.count, pixels.shape[2]), pixels.dtype)
    for down, from_rows in _whole_runs(pixels.shape[0], factor, rows.count):
        for across, from_columns in _whole_runs(pixels.shape[1], factor, columns.count):
            size = down.stop - down.start, across.stop - across.start
            result[down, across] = resize_image(pixels[from_rows, from_columns], size)
    return result


def _whole_runs(size: int, factor: int, count: int) -> list[tuple[slice, slice]]:
    """The grid pixels that lie wholly inside, and the one that the edge of the level cuts off, with what they cover."""
    whole = min(count, size // factor)
    runs = [(slice(0, whole), slice(0, whole * factor))] if whole else []
    return runs if whole == count else [*runs, (slice(whole, count), slice(whole * factor, size))]


def _average(values: np.ndarray, rows: _Span, columns: _Span) -> np.ndarray:
    """Area averages of (h, w, C) values, (rows, columns, C) float32."""
    down = _average_axis(values, rows)
    return np.ascontiguousarray(_average_axis(down.transpose(1, 0, 2), columns).transpose(1, 0, 2))


def _average_axis(values: np.ndarray, span: _Span) -> np.ndarray:
    """Area averages along the first axis of (n, m, C), float32."""
    result = np.empty((span.count, *values.shape[1:]), np.float32)
    for begin in range(0, span.count, GROUP):
        end = min(begin + GROUP, span.count)
        shares, start, stop = span.weights(begin, end)
        part = values[start:stop].astype(np.float32).reshape(stop - start, -1)
        result[begin:end] = (shares @ part).reshape(end - begin, *values.shape[1:])
    return result


def _cast(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Float32 averages as pixels of a type, rounded to the nearest."""
    return values if dtype.kind == "f" else np.rint(values).astype(dtype)
