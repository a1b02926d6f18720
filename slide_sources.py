"""What an image file of any size holds: its levels, decoded tile by tile, its resolution and its place on the map.

A level is a Mosaic: pieces (tiles or strips of a TIFF, regions of OpenSlide, or one whole picture) that are decoded
when a window touches them. Pixels have the types and channels of image_io.read_image; those without data are 0.
"""

import contextlib
import math
import mmap
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import tifffile
from PIL import BmpImagePlugin, GifImagePlugin, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from image_headers import DECODE_ERRORS, ImageError, scan_header, sniff, truncated
from image_io import read_image, read_valid
from tiff_io import (
    Bands,
    check_colours,
    check_directory,
    hidden_stack,
    image_values,
    kept_bands,
    main_pages,
    open_tiff,
    page_nodata,
    page_orientation,
    stored_bands,
    valid_pixels,
)

OPENSLIDE_SUFFIXES = (".mrxs", ".vms", ".vmu", ".scn", ".bif", ".svslide")
JPEG2000 = (33003, 33005, 34712)
GEO_TAGS = (33550, 33922, 34264, 34735, 34736, 34737)
WINDOW_ROWS = 1024  # a traversal by rows of windows up to this height decodes each piece once
CACHE_BYTES = 64 * 2**20
RAW_BYTES = 4 * 2**20  # of a piece of an uncompressed file, whatever its strips
REGION = 512  # side of the regions that are asked of OpenSlide
PLAUSIBLE_MPP = (0.05, 50.0)  # what TIFF resolution tags may say; 72 dots per inch is a screen, not a microscope
UNITS = {"nm": 1e-3, "µm": 1.0, "μm": 1.0, "um": 1.0, "micron": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6, "inch": 25400.0}

_UNKNOWN, _FULL, _PARTIAL, _DAMAGED = range(4)
_HEADERS: dict[str, Callable[..., Any]] = {
    "PNG": PngImagePlugin.PngImageFile,
    "JPEG": JpegImagePlugin.JpegImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
}

Piece = tuple[np.ndarray, np.ndarray | None]  # pixels (h, w, C), and where they hold data (h, w) bool or None


class SlideError(ImageError):
    """A slide that cannot be used as asked; the message names the path, what was found and what was expected."""


class DamagedPieceError(Exception):
    """One tile or strip that cannot be decoded; the text is the reason."""


class Mosaic:
    """A raster of pieces that are loaded when a window touches them; those used last stay in memory.

    Reading is safe from several threads.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: np.dtype,
        piece: tuple[int, int],
        load: Callable[[int, int], Piece],
        title: str = "",
    ) -> None:
        """Args: shape (H, W, C); piece: height and width of one; load: row and column of a piece -> the piece."""
        self.height, self.width, self.channels = shape
        self.dtype = np.dtype(dtype)
        self.piece = piece
        self.damage: list[str] = []
        rows, columns = math.ceil(self.height / piece[0]), math.ceil(self.width / piece[1])
        touched = min(rows, math.ceil((WINDOW_ROWS - 1) / piece[0]) + 2)
        self.budget = max(CACHE_BYTES, touched * piece[0] * self.width * self.channels * self.dtype.itemsize)
        self._load, self._title = load, title
        self._state = np.zeros((rows, columns), np.uint8)
        self._kept: OrderedDict[tuple[int, int], Piece] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def read(self, top: int, left: int, height: int, width: int, fill: np.ndarray) -> np.ndarray:
        """The pixels of a window, (h, w, C); those of damaged pieces are `fill`, a number or one for each channel."""
        result = np.empty((height, width, self.channels), self.dtype)
        for row, column, inside, outside in self._touched(top, left, height, width):
            piece = self._find(row, column)
            result[outside] = fill if piece is None else piece[0][inside]
        return result

    def valid(self, top: int, left: int, height: int, width: int) -> np.ndarray | None:
        """Where a window holds data, (h, w) bool; None: everywhere."""
        result = None
        for row, column, inside, outside in self._touched(top, left, height, width):
            if self._state[row, column] == _FULL:
                continue
            piece = self._find(row, column)
            known = False if piece is None else True if piece[1] is None else piece[1][inside]
            if known is not True:
                result = np.ones((height, width), bool) if result is None else result
                result[outside] = known
        return None if result is None or result.all() else result

    def _touched(self, top: int, left: int, height: int, width: int) -> Iterator[tuple[int, int, Any, Any]]:
        """Row and column of each piece of a window, and where their common pixels lie in the piece and the window."""
        high, wide = self.piece
        for row in range(top // high, (top + height - 1) // high + 1):
            first, last = max(top, row * high), min(top + height, (row + 1) * high)
            for column in range(left // wide, (left + width - 1) // wide + 1):
                start, stop = max(left, column * wide), min(left + width, (column + 1) * wide)
                inside = np.s_[first - row * high : last - row * high, start - column * wide : stop - column * wide]
                yield row, column, inside, np.s_[first - top : last - top, start - left : stop - left]

    def _find(self, row: int, column: int) -> Piece | None:
        """A piece from memory or loaded; None when it is damaged."""
        key = row, column
        with self._lock:
            if self._state[key] == _DAMAGED:
                return None
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        try:
            piece = self._load(row, column)
        except DamagedPieceError as error:
            self._note(row, column, str(error))
            return None
        with self._lock:
            self._state[key] = _FULL if piece[1] is None else _PARTIAL
            if key not in self._kept:
                self._kept[key] = piece
                self._bytes += _piece_bytes(piece)
            while self._bytes > self.budget and len(self._kept) > 1:
                self._bytes -= _piece_bytes(self._kept.popitem(last=False)[1])
        return piece

    def _note(self, row: int, column: int, reason: str) -> None:
        with self._lock:
            if self._state[row, column] != _DAMAGED:
                self._state[row, column] = _DAMAGED
                top, left = row * self.piece[0], column * self.piece[1]
                bottom, right = min(top + self.piece[0], self.height), min(left + self.piece[1], self.width)
                self.damage.append(
                    f"{self._title}: the piece in row {row}, column {column} (pixel rows {top} to {bottom - 1}, "
                    f"columns {left} to {right - 1}) is damaged: {reason}; expected a complete file: "
                    "copy or export it again"
                )


def _piece_bytes(piece: Piece) -> int:
    return piece[0].nbytes + (0 if piece[1] is None else piece[1].nbytes)


@dataclass(frozen=True)
class Stored:
    """What a file holds; levels[0] is the full resolution and the others shrink."""

    levels: Sequence[Mosaic]
    mpp_xy: tuple[float, float] | None  # microns per pixel of level 0
    geo_tags: Sequence[tuple[int, int, int, Any]]  # code, type, count and value
    nodata: float | None
    close: Callable[[], None]


def open_stored(path: Path, max_decoded_gb: float) -> Stored:
    """Open an image file of any kind without decoding more than must be decoded at once.

    Raises:
        SlideError: not an image, damaged, too large to decode at once, or a format that needs OpenSlide.
        FileNotFoundError: no such file.
    """
    if path.is_dir():
        raise SlideError(f"{path} is a folder; expected an image file: give one of the files in it")
    try:
        if path.suffix.lower() in OPENSLIDE_SUFFIXES:
            return _open_openslide(path, f"files that end in {path.suffix}")
        with path.open("rb") as handle:
            head = handle.read(32)
        try:
            kind = sniff(head, path)
        except ImageError:
            if not openslide_reads(path):
                raise
            return _open_openslide(path, "this file")
        if kind == "TIFF":
            return _open_tiff_levels(path, max_decoded_gb)
        return _open_picture(path, kind, max_decoded_gb)
    except SlideError:
        raise
    except ImageError as error:
        raise SlideError(str(error)) from error


# Pictures that are decoded at once


def _open_picture(path: Path, kind: str, max_decoded_gb: float) -> Stored:
    with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
        header = scan_header(kind, data, path)
    try:
        with _HEADERS[kind](path) as picture:
            width, height = picture.size
    except DECODE_ERRORS as error:
        raise SlideError(
            f"{path} has a damaged {kind} header ({error}); expected a complete file: copy or export it again"
        ) from error
    samples = 3 if header.palette or header.channels == 4 else header.channels
    itemsize = 2 if kind == "PNG" and header.bits > 8 else 1
    _check_decoded(path, (height, width, samples), itemsize, max_decoded_gb)
    return Stored([_whole_level(path)], None, (), None, _do_nothing)


def _whole_level(path: Path) -> Mosaic:
    """The one level of a file that is decoded at once."""
    image, valid = read_image(path), read_valid(path)
    if valid is not None:
        image[~valid] = 0
        valid = None if valid.all() else valid
    return Mosaic(image.shape, image.dtype, image.shape[:2], lambda row, column: (image, valid), str(path))  # type: ignore[arg-type]


def _check_decoded(path: Path, shape: tuple[int, ...], itemsize: int, max_decoded_gb: float) -> None:
    size = math.prod(shape) * itemsize / 1e9
    if size > max_decoded_gb:
        raise SlideError(
            f"{path} can only be decoded at once and takes {size:.3g} GB ({shape[0]}x{shape[1]} pixels); expected at "
            f"most {max_decoded_gb:g} GB (--max-decoded-gb): convert it to a tiled TIFF, for example with "
            f"vips tiffsave '{path}' '{path.with_suffix('.tiled.tif').name}' --tile --pyramid --compression deflate "
            "--bigtiff"
        )


def _do_nothing() -> None:
    pass


# TIFF


def _open_tiff_levels(path: Path, max_decoded_gb: float) -> Stored:
    with contextlib.ExitStack() as stack:
        tif = stack.enter_context(open_tiff(path))
        _check_dimensions(tif, path)
        pages = main_pages(tif, path)
        main = pages[0]
        for page in {page.index: page for page in (*pages, tif.pages[-1])}.values():
            check_directory(tif, page, path)
        check_colours(main, path)
        if main.compression in JPEG2000 and openslide_reads(path):
            with contextlib.suppress(SlideError):  # it knows the layout, but not every kind of JPEG 2000 in it
                return _open_openslide(path, "JPEG 2000")
        _check_codec(main, path)
        mpp_xy, nodata = _tiff_mpp(tif, main), page_nodata(main, path)
        tags = [(t.code, t.dtype, t.count, t.value) for t in map(main.tags.get, GEO_TAGS) if t is not None]
        stacked = hidden_stack(tif, main)
        if stacked or page_orientation(main) != 1:
            shape = (main.imagelength, main.imagewidth, len(pages) * main.samplesperpixel * max(1, stacked))
            _check_decoded(path, shape, main.dtype.itemsize, max_decoded_gb)
            return Stored([_whole_level(path)], _turned(mpp_xy, main), (), nodata, _do_nothing)
        levels: list[Mosaic] = []
        lock = threading.Lock()  # of the one file that all levels read from
        for each in _level_pages(tif, pages):
            with contextlib.nullcontext() if not levels else contextlib.suppress(ImageError):
                level = _TiffLevel(tif, each, path, len(levels), lock).mosaic(max_decoded_gb)
                if not levels or (level.channels, level.dtype) == (levels[0].channels, levels[0].dtype):
                    levels.append(level)
        return Stored(levels, mpp_xy, tags, nodata, stack.pop_all().close)


def _turned(mpp_xy: tuple[float, float] | None, page: Any) -> tuple[float, float] | None:
    return mpp_xy[::-1] if mpp_xy and page_orientation(page) >= 5 else mpp_xy  # type: ignore[return-value]


def _check_dimensions(tif: tifffile.TiffFile, path: Path) -> None:
    """Refuse stacks in depth or time, which are no bands of one picture."""
    sizes: dict[str, int] = {}
    if tif.is_ome:
        pixels = _ome_pixels(tif)
        sizes = {name: int(pixels.get(f"Size{name}", 1)) for name in "ZT"}
    elif tif.is_imagej:
        known = tif.imagej_metadata or {}
        sizes = {"Z": int(known.get("slices", 1)), "T": int(known.get("frames", 1))}
    for name, long in (("T", "points in time"), ("Z", "slices in depth")):
        if sizes.get(name, 1) > 1:
            raise SlideError(
                f"{path} holds {sizes[name]} {long} (dimension {name}); expected one picture, {name} = 1: "
                "save each as a file of its own"
            )


def _ome_pixels(tif: tifffile.TiffFile) -> dict[str, str]:
    """Attributes of the OME Pixels element that describes the largest image."""
    try:
        found = [e for e in ElementTree.fromstring(tif.ome_metadata or "").iter() if e.tag.endswith("}Pixels")]
        return dict(max(found, key=lambda e: int(e.get("SizeX", 0)) * int(e.get("SizeY", 0))).attrib)
    except (ElementTree.ParseError, ValueError):
        return {}


def _check_codec(page: Any, path: Path) -> None:
    """Refuse a compression that cannot be decoded, once and by name, instead of every tile of it."""
    try:
        if page.compression != 1:
            tifffile.TIFF.DECOMPRESSORS[page.compression]
        if page.predictor != 1:
            tifffile.TIFF.UNPREDICTORS[page.predictor]
    except KeyError as error:
        raise SlideError(
            f"{path} is a TIFF whose compression is not understood ({error.args[0]}); expected one that imagecodecs "
            "or OpenSlide decodes: pip install -U imagecodecs, or pip install openslide-python openslide-bin, or "
            "convert it"
        ) from None
    if page.compression == 33003:
        raise _needs_openslide(path, "JPEG 2000 of this kind (33003)")
    if not all(isinstance(side, int) and side > 0 for side in (page.imagelength, page.imagewidth)):
        raise SlideError(
            f"{path} is a TIFF of {page.imagelength}x{page.imagewidth} pixels; expected at least one: "
            "copy or export it again"
        )
    if page.dtype is None:
        raise SlideError(f"{path} is a TIFF of {page.bitspersample} bits a sample: save it with 8, 16 or 32")


def _level_pages(tif: tifffile.TiffFile, pages: list[Any]) -> list[list[Any]]:
    """The pages of each level, largest first; a level has as many as there are bands in pages of their own."""
    main = pages[0]
    below = min(len(page.pages or ()) for page in pages)
    found = [[page.pages[i] for page in pages] for i in range(below)]
    groups: dict[tuple[int, ...], list[Any]] = {}
    page: Any
    for page in tif.pages:
        if not page.subfiletype & 4:  # a transparency mask
            groups.setdefault(page.shape, []).append(page)
    found += [group for group in groups.values() if len(group) == len(pages)]
    reduced = {group[0].shape: group for group in found if all(_is_reduced(tif, page, main) for page in group)}
    return [pages, *sorted(reduced.values(), key=lambda group: -group[0].imagewidth * group[0].imagelength)]


def _is_reduced(tif: tifffile.TiffFile, page: Any, main: Any) -> bool:
    """Whether a page is the picture of `main` made smaller, and no label, macro or thumbnail."""
    if page.samplesperpixel != main.samplesperpixel or page.dtype != main.dtype or page.is_tiled != main.is_tiled:
        return False
    if (tif.is_svs and page.subfiletype != 0) or (tif.is_ndpi and page.tags.valueof(65421, 1) < 0):
        return False
    height, width = page.imagelength, page.imagewidth
    if height * width == 0 or height * width >= main.imagelength * main.imagewidth:
        return False
    scale = level_scale((main.imagelength, main.imagewidth), (height, width))
    drift = max(abs(main.imagelength / scale - height), abs(main.imagewidth / scale - width))
    return scale > 1 and drift <= max(1.5, 0.01 * max(height, width))


def level_scale(full: tuple[int, int], level: tuple[int, int]) -> float:
    """Pixels of the full resolution for one of a level, a whole number where rounding explains the sizes."""
    scale = (full[0] / level[0] + full[1] / level[1]) / 2
    whole = float(max(1, round(scale)))
    explained = all(abs(size / whole - small) <= 1 for size, small in zip(full, level, strict=True))
    return whole if explained and level != (1, 1) else scale


class _TiffLevel:
    """Decodes the tiles or strips of one level, from one page or one for each band."""

    def __init__(self, tif: tifffile.TiffFile, pages: list[Any], path: Path, index: int, lock: threading.Lock) -> None:
        page = pages[0]
        self.tif, self.pages, self.path, self.index, self.lock = tif, pages, path, index, lock
        self.size = page.imagelength, page.imagewidth
        self.planes = page.samplesperpixel if page.planarconfig == 2 else 1
        self.samples = page.samplesperpixel // self.planes  # of one decoded piece
        self.raw = all(p.is_final and sum(p.databytecounts) == p.nbytes for p in pages)
        if self.raw:  # of any strips: they follow one another, so rows are found without them
            row_bytes = page.imagewidth * self.samples * page.dtype.itemsize
            self.piece = max(1, min(page.imagelength, RAW_BYTES // row_bytes)), page.imagewidth
        elif page.is_tiled:
            self.piece = page.tilelength, page.tilewidth
        else:
            self.piece = min(page.rowsperstrip, page.imagelength), page.imagewidth
        self.columns = math.ceil(page.imagewidth / self.piece[1])
        self.rows = math.ceil(page.imagelength / self.piece[0])
        listed, needed = min(len(p.dataoffsets) for p in pages), self.rows * self.columns * self.planes
        if listed < needed and not self.raw:
            raise truncated(path, f"its directory lists {listed} tiles or strips of {needed}")
        self.tables = {id(p): {"jpegtables": p.jpegtables, "jpegheader": p.jpegheader} for p in pages}
        count = len(pages) * page.samplesperpixel
        self.kept = kept_bands(page, count)
        check_colours(page, path)
        self.template = stored_bands(tif, page, np.zeros((1, 1, count), page.dtype), path)
        for each in pages:
            each.init_decode() if hasattr(each, "init_decode") else each.decode  # noqa: B018 - not safe in threads later

    def mosaic(self, max_decoded_gb: float) -> Mosaic:
        """The level; its type and channels are tried out on one black pixel."""
        page = self.pages[0]
        pixel = image_values(self.template, self.path, stream=True)
        if not self.raw:
            _check_decoded(self.path, (*self.piece, pixel.shape[2]), page.dtype.itemsize, max_decoded_gb)
        shape = (*self.size, pixel.shape[2])
        return Mosaic(shape, pixel.dtype, self.piece, self.load, f"{self.path}, level {self.index}")

    def load(self, row: int, column: int) -> Piece:
        """Decode one piece.

        Raises:
            DamagedPieceError: it cannot be decoded, and is one of several.
            SlideError: it is the only one, or a decoder is missing.
        """
        try:
            values = self._stored(row, column)
            bands = replace(self.template, values=values if self.kept is None else values[..., self.kept])
            return _picture(bands, self.path)
        except ImportError as error:
            raise SlideError(
                f"{self.path} needs a decoder that is not installed ({error}): pip install -U imagecodecs"
            ) from error
        except (DamagedPieceError, *DECODE_ERRORS) as error:
            reason = str(error).removeprefix(f"{self.path} ") or type(error).__name__
            if self.rows * self.columns == 1:
                raise SlideError(
                    f"{self.path} is damaged: {reason}; expected a complete file: copy it again"
                ) from error
            raise DamagedPieceError(reason) from error

    def _stored(self, row: int, column: int) -> np.ndarray:
        """The stored values of a piece, (h, w, samples) without what a tile has beyond the edge of the picture."""
        height = min(self.piece[0], self.size[0] - row * self.piece[0])
        width = min(self.piece[1], self.size[1] - column * self.piece[1])
        parts = []
        for page in self.pages:
            for plane in range(self.planes):
                part = self._rows(page, plane, row, height) if self.raw else self._segment(page, plane, row, column)
                parts.append(part[:height, :width])
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)

    def _rows(self, page: Any, plane: int, row: int, height: int) -> np.ndarray:
        shape = height, self.size[1], self.samples
        row_bytes = self.size[1] * self.samples * page.dtype.itemsize
        start = page.dataoffsets[0] + (plane * self.size[0] + row * self.piece[0]) * row_bytes
        data = self._bytes(start, height * row_bytes)
        values = np.frombuffer(data, page.dtype.newbyteorder(self.tif.byteorder)).reshape(shape)
        return values.astype(page.dtype.newbyteorder("="), copy=False)

    def _segment(self, page: Any, plane: int, row: int, column: int) -> np.ndarray:
        index = (plane * self.rows + row) * self.columns + column
        count = page.databytecounts[index]
        data = self._bytes(page.dataoffsets[index], count) if count else None
        values, _, shape = page.decode(data, index, **self.tables[id(page)])
        if values is None:  # never written: a sparse file
            values = np.full(shape, page.nodata, page.dtype)
        values = values[0]
        high, wide = (min(self.piece[i], self.size[i] - at * self.piece[i]) for i, at in enumerate((row, column)))
        if values.shape[0] < high or values.shape[1] < wide:
            raise DamagedPieceError(f"it decodes to {values.shape[0]}x{values.shape[1]} pixels")
        return values.astype(page.dtype, copy=False)

    def _bytes(self, start: int, count: int) -> bytes:
        file = self.tif.filehandle
        with self.lock:
            file.seek(start)
            data = file.read(count)
        if len(data) < count:
            raise DamagedPieceError(f"its bytes {start} to {start + count - 1} lie beyond the end ({file.size})")
        return data


def _picture(bands: Bands, path: Path) -> Piece:
    """The pixels of stored values, those without data 0, and where there is data."""
    image, valid = image_values(bands, path, stream=True), valid_pixels(bands)
    if valid is None or valid.all():
        return image, None
    return np.where(valid[..., None], image, np.zeros((), image.dtype)), valid


# Microns per pixel


def _tiff_mpp(tif: tifffile.TiffFile, page: Any) -> tuple[float, float] | None:
    """Microns per pixel in x and y, from whoever wrote the file; None when it does not say or cannot mean it."""
    with contextlib.suppress(*DECODE_ERRORS):
        if tif.is_svs:
            match = re.search(r"\bMPP\s*=\s*([\d.,]+)", page.description)
            return _usable(*[float(match[1].replace(",", "."))] * 2) if match else None
        if tif.is_ome:
            pixels = _ome_pixels(tif)
            x, y = (
                float(pixels[f"PhysicalSize{axis}"]) * UNITS[pixels.get(f"PhysicalSize{axis}Unit", "µm")]
                for axis in "XY"
            )
            return _usable(x, y)
        unit = {2: "inch", 3: "cm"}.get(int(page.tags.valueof(296, 2)))
        if tif.is_imagej and unit is None:
            unit = str((tif.imagej_metadata or {}).get("unit", "")).replace("\\u00B5", "µ")
        if 282 in page.tags and 283 in page.tags:
            x, y = (UNITS[unit or ""] * d / n for n, d in (page.tags[282].value, page.tags[283].value))
            plausible = all(PLAUSIBLE_MPP[0] <= size <= PLAUSIBLE_MPP[1] for size in (x, y))
            return _usable(x, y) if plausible else None
    return None


def _usable(x: float, y: float) -> tuple[float, float] | None:
    return (x, y) if math.isfinite(x) and math.isfinite(y) and x > 0 and y > 0 else None


# OpenSlide


def _import_openslide() -> Any:
    """The library, or None: it is optional."""
    try:
        import openslide
    except (ImportError, OSError):  # OSError: the Python part without the library itself
        return None
    return openslide


def openslide_reads(path: Path) -> bool:
    """Whether OpenSlide is installed and knows the format."""
    library = _import_openslide()
    return library is not None and library.OpenSlide.detect_format(str(path)) is not None


def _needs_openslide(path: Path, what: str) -> SlideError:
    return SlideError(f"{path}: {what} is read by OpenSlide: pip install openslide-python openslide-bin")


def _open_openslide(path: Path, what: str) -> Stored:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected an image")
    library = _import_openslide()
    if library is None:
        raise _needs_openslide(path, what)
    try:
        slide = library.OpenSlide(str(path))
    except library.OpenSlideError as error:
        raise SlideError(
            f"{path} cannot be read by OpenSlide ({error}); expected a complete slide: copy or export it again"
        ) from error
    known, mpp_xy = slide.properties, None
    with contextlib.suppress(KeyError, ValueError):
        mpp_xy = _usable(float(known[library.PROPERTY_NAME_MPP_X]), float(known[library.PROPERTY_NAME_MPP_Y]))
    levels = [_OpenSlideLevel(library, slide, path, index) for index in range(slide.level_count)]

    def close() -> None:
        for handle in {level.slide for level in levels}:  # those opened anew too; one that was replaced closes itself
            handle.close()

    return Stored([level.mosaic() for level in levels], mpp_xy, (), None, close)


class _OpenSlideLevel:
    """Reads regions of one level, always the same ones, so that pixels do not depend on the window."""

    def __init__(self, library: Any, slide: Any, path: Path, index: int) -> None:
        self.library, self.slide, self.path, self.index = library, slide, path, index
        self.width, self.height = slide.level_dimensions[index]
        self.scale = slide.level_downsamples[index]
        colour = slide.properties.get(library.PROPERTY_NAME_BACKGROUND_COLOR, "ffffff")
        self.background = np.frombuffer(bytes.fromhex(colour), np.uint8)

    def mosaic(self) -> Mosaic:
        """The level, RGB; what was never scanned has the slide's background colour."""
        shape = (self.height, self.width, 3)
        return Mosaic(shape, np.dtype(np.uint8), (REGION, REGION), self.load, f"{self.path}, level {self.index}")

    def load(self, row: int, column: int) -> Piece:
        """Read one region."""
        top, left = row * REGION, column * REGION
        size = min(REGION, self.width - left), min(REGION, self.height - top)
        corner = round(left * self.scale), round(top * self.scale)
        try:
            region = self._region(corner, size)
        except self.library.OpenSlideError:  # a handle keeps its first error, which may be of another region
            try:
                region = self._region(corner, size)
            except self.library.OpenSlideError as error:
                raise DamagedPieceError(str(error)) from error
        pixels, alpha = region[..., :3], region[..., 3:].astype(np.uint16)
        if (alpha == 255).all():
            return np.ascontiguousarray(pixels), None
        return ((pixels * alpha + self.background * (255 - alpha) + 127) // 255).astype(np.uint8), None

    def _region(self, corner: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
        """The pixels (h, w, 4) of a region; after an error the file is opened anew for the next one."""
        handle = self.slide
        try:
            return np.asarray(handle.read_region(corner, self.index, size))
        except self.library.OpenSlideError:
            if self.slide is handle:
                self.slide = self.library.OpenSlide(str(self.path))
            raise
