"""Masks of slides, read by windows at any scale: polygons (GeoJSON), run lengths (csv), rasters of any level.

A pixel of a reduced scale has the value that level 0 has at its centre, whatever the form of the mask: polygons, run
lengths and a raster of the same regions give the same pixels, bit for bit.
"""

import math
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from geojson import check_inside, read_geojson
from image_headers import ImageError
from image_io import read_mask
from pairing import SHAPE_SUFFIXES, read_runs
from polygons import ShapeIndex
from rle import RleRaster
from slide_io import Slide, open_slide
from tiff_io import main_pages, open_tiff

RUN_SUFFIX = ".csv"
CHUNK = 1 << 22  # pixels of a mask that are read at a time when few of them are kept
KEPT_BYTES = 1 << 25  # of decoded tiles of a mask

Read = Callable[[int, int, int, int], np.ndarray]  # top, left, height, width -> values (h, w)


@dataclass(frozen=True)
class Raster:
    """The raster on which a mask is wanted; scale is level-0 pixels for each of its pixels."""

    height: int
    width: int
    scale: float

    def places(self, top: int, height: int, left: int, width: int, mask: "Raster") -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of a mask that lie under the centres of the pixels of a window."""
        ratio = self.scale / mask.scale
        rows, columns = np.arange(top, top + height), np.arange(left, left + width)
        if ratio != 1:
            rows, columns = (np.floor((places + 0.5) * ratio).astype(np.int64) for places in (rows, columns))
        return np.minimum(rows, mask.height - 1), np.minimum(columns, mask.width - 1)


class MaskSource(Protocol):
    """A mask that is read by windows.

    names: of annotations with classes: value k is the class names[k - 1]; None: the values are the file's own.
    findings: what is odd about the file.
    """

    names: list[str | None] | None
    findings: list[str]

    def read(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Values (height, width) of a window inside the raster, of an unsigned type.

        Raises:
            ImageError: the file cannot be decoded there, or holds no labels.
        """

    def at(self, raster: Raster) -> "MaskSource":
        """The same mask on another raster of the slide; it is open as long as this one."""

    def close(self) -> None:
        """Let go of the file."""


def is_annotation(path: Path | None) -> bool:
    """Whether a mask file holds polygons or run lengths."""
    return path is not None and path.suffix.lower() in (*SHAPE_SUFFIXES, RUN_SUFFIX)


@dataclass(frozen=True)
class MaskOptions:
    """How masks are opened.

    classes: names of columns of a table, or endings of its names as in slide_tumor, that hold the runs of one class.
    left_out: classes that are not painted. max_decoded_gb: of a raster that cannot be read by windows.
    """

    classes: tuple[str, ...] = ()
    left_out: frozenset[str | None] = frozenset()
    max_decoded_gb: float = 4.0


def open_mask(path: Path, name: str, slide: Slide, raster: Raster, options: MaskOptions = MaskOptions()) -> MaskSource:
    """Open the mask, or the region of interest, of a slide.

    Args:
        name: of the slide, which its rows in a table of run lengths bear.

    Raises:
        ImageError: the file cannot be used; it is named.
        DatasetError: a csv file that is no table of run lengths.
    """
    if path.suffix.lower() in SHAPE_SUFFIXES:
        return ShapeMask(path, slide, raster, options)
    if path.suffix.lower() == RUN_SUFFIX:
        return RunMask(path, name, slide, raster, options)
    return RasterMask(path, slide, raster, options)


def strips_below(
    mask: MaskSource, slide: Slide, raster: Raster, window: tuple[int, int, int, int]
) -> Iterator[np.ndarray]:
    """All values of level 0 that lie under a window (top, left, height, width) of a raster, some rows at a time.

    Args:
        mask: of the slide, on the raster of level 0.
    """
    sizes = (slide.height, slide.width)
    (top, bottom), (left, right) = (
        (min(math.floor(first * raster.scale), size - 1), min(math.ceil((first + count) * raster.scale), size))
        for first, count, size in zip(window[:2], window[2:], sizes, strict=True)
    )
    step = max(1, CHUNK // (right - left))
    for first in range(top, bottom, step):
        yield mask.read(first, left, min(step, bottom - first), right - left)


class ShapeMask:
    """Polygons of a GeoJSON file in level-0 pixels; later ones lie over earlier ones."""

    def __init__(self, path: Path, slide: Slide, raster: Raster, options: MaskOptions) -> None:
        shapes, findings = read_geojson(path)
        outside = check_inside(shapes, slide.height, slide.width, max(1.0, raster.scale))
        apart = {finding.feature for finding in outside if "wholly" in finding.problem}
        if shapes and apart >= {shape.feature for shape in shapes}:
            raise ImageError(f"{path}: no annotation lies on the slide {slide.path}: {outside[0]}")
        self.findings = [f"{path}: {finding}" for finding in (*findings, *outside)]
        shapes = [shape for shape in shapes if shape.name not in options.left_out]
        found = {shape.name for shape in shapes}
        self.names: list[str | None] | None = sorted(found, key=lambda name: (name is not None, name or ""))
        self._values = {name: number for number, name in enumerate(self.names, 1)}
        self._raster, self._full = raster, Raster(slide.height, slide.width, 1.0)
        self._index = ShapeIndex(shapes, raster.scale)
        last = slide.width - 1, slide.height - 1
        self._border = ShapeIndex([shape for shape in shapes if any((ring > last).any() for ring in shape.rings)])

    def read(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """See MaskSource."""
        values = self._index.rasterise_classes(self._values, top, left, height, width)
        rows, columns = self._raster.places(top, height, left, width, self._full)
        border = partial(self._border.rasterise_classes, self._values)
        bottom, right = ((end - 0.5) * self._raster.scale for end in (top + height, left + width))
        if bottom >= self._full.height:  # the centres of the last row lie on the slide's border, where polygons end
            values[-1:] = read_places(border, rows[-1:], columns)
        if right >= self._full.width:
            values[:, -1:] = read_places(border, rows, columns[-1:])
        return values

    def at(self, raster: Raster) -> "ShapeMask":
        """See MaskSource."""
        other = copy(self)
        other._raster, other._index = raster, ShapeIndex(self._index.shapes, raster.scale)
        return other

    def close(self) -> None:
        """Nothing is open."""


class RunMask:
    """The rows of one image in a table of run lengths of level 0; a later class lies over an earlier one."""

    findings: list[str]

    def __init__(self, path: Path, name: str, slide: Slide, raster: Raster, options: MaskOptions) -> None:
        self.findings, self._raster, self._full = [], raster, Raster(slide.height, slide.width, 1.0)
        texts: dict[str | None, str] = {}
        endings = {f"{name}_{kind}": kind for kind in options.classes}
        for other, kind, runs in read_runs(path, options.classes):
            if other != name and other not in endings:
                continue
            kind = endings.get(other, kind)
            if kind in texts:
                which = f" of class {kind!r}" if kind is not None else ""
                raise ImageError(f"{path} has two rows for {name!r}{which}; expected one: join or delete them")
            texts[kind] = runs
        texts = {kind: runs for kind, runs in texts.items() if kind not in options.left_out}
        self.names: list[str | None] | None = list(texts)
        try:
            self._parts = [RleRaster(runs, slide.height, slide.width) for runs in texts.values()]
        except ValueError as error:
            raise ImageError(f"{path}, row {name!r}, of the slide {slide.path}: {error}") from error

    def read(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """See MaskSource."""
        rows, columns = self._raster.places(top, height, left, width, self._full)
        values = np.zeros((height, width), np.uint8)
        for number, part in enumerate(self._parts, 1):
            values[read_places(part.read, rows, columns)] = number
        return values

    def at(self, raster: Raster) -> "RunMask":
        """See MaskSource."""
        other = copy(self)
        other._raster = raster
        return other

    def close(self) -> None:
        """Nothing is open."""


class RasterMask:
    """A mask image with as many pixels as a level of the slide, or as the raster; the file's own values."""

    names: list[str | None] | None = None
    findings: list[str]

    def __init__(self, path: Path, slide: Slide, raster: Raster, options: MaskOptions) -> None:
        self.findings, self.path, self._raster = [], path, raster
        self._slide: Slide | None = None
        self._divisor, is_palette = _tiff_form(path)
        if is_palette:
            whole = read_mask(path)
            (height, width), self._read = whole.shape, _window_reader(whole)
        else:
            self._slide = open_slide(path, max_decoded_gb=options.max_decoded_gb)
            self._grid = self._slide.grid()
            self._grid.keep(KEPT_BYTES)
            height, width, self._read = self._grid.height, self._grid.width, self._read_grid
        fits = [raster, *(Raster(level.height, level.width, level.scale) for level in slide.levels)]
        found = [each for each in fits if (each.height, each.width) == (height, width)]
        if not found:
            self.close()
            known = ", ".join(dict.fromkeys(f"{each.height}x{each.width}" for each in fits[1:] + fits[:1]))
            raise ImageError(
                f"{path} is {height}x{width}, its slide {slide.path} has the sizes {known}; expected one of these: "
                "save the mask at the size of level 0"
            )
        self._own = found[0]

    def _read_grid(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        pixels = self._grid.read(top, left, height, width)
        if self._grid.damage and self._grid.valid(top, left, height, width) is not None:
            raise ImageError(self._grid.damage[-1])
        values = pixels[:, :, 0]
        if pixels.shape[2] > 1 and (pixels != pixels[:, :, :1]).any():
            raise ImageError(f"{self.path} has {pixels.shape[2]} channels that differ; expected one: save it as grey")
        if values.dtype.kind == "f":
            if not ((values >= 0) & (values == np.rint(values))).all():
                found = f"{values.min():g} to {values.max():g}"
                raise ImageError(f"{self.path} holds the values {found}; expected whole labels from 0")
            return values.astype(np.uint32)
        return values // values.dtype.type(self._divisor) if self._divisor > 1 else values

    def read(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """See MaskSource."""
        rows, columns = self._raster.places(top, height, left, width, self._own)
        return read_places(self._read, rows, columns)

    def at(self, raster: Raster) -> "RasterMask":
        """See MaskSource."""
        other = copy(self)
        other._raster = raster
        return other

    def close(self) -> None:
        """Close the file."""
        if self._slide:
            self._slide.close()


def _tiff_form(path: Path) -> tuple[int, bool]:
    """What few bits are spread by when a TIFF is read as an image; whether the file is to be read as a mask instead.

    The values of palettes are indices, which only read_mask keeps; so are those of anything but TIFF.
    """
    if path.suffix.lower() not in (".tif", ".tiff", ".btf"):
        return 1, True
    with open_tiff(path) as tif:
        page = main_pages(tif, path)[0]
        bits = page.bitspersample
        return (255 // (2**bits - 1) if bits < 8 else 1), page.photometric == 3


def _window_reader(values: np.ndarray) -> Read:
    return lambda top, left, height, width: values[top : top + height, left : left + width]


def read_places(read: Read, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Values at some ascending rows and columns of a mask, a copy; of windows that are larger, a part at a time."""
    top, left = int(rows[0]), int(columns[0])
    height, width = int(rows[-1]) + 1 - top, int(columns[-1]) + 1 - left
    if (height, width) == (len(rows), len(columns)):
        return read(top, left, height, width).copy()
    step = max(1, math.floor(CHUNK / width * len(rows) / height))
    parts = []
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        first, count = int(some[0]), int(some[-1]) + 1 - int(some[0])
        parts.append(read(first, left, count, width)[np.ix_(some - first, columns - left)])
    return np.concatenate(parts)
