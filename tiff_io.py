"""Read and write TIFF: bands, pages and pyramids, palettes, CMYK, white-is-zero, nodata; and know what is damaged."""

import contextlib
import logging
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import tifffile

from image_headers import DECODE_ERRORS, ImageError, truncated, upright

tifffile.logger().setLevel(logging.CRITICAL)  # what it logs is an error here, with the path, or does not matter


@dataclass(frozen=True)
class Bands:
    """Pixels of a TIFF as stored: (H, W, C), native byte order, alpha dropped, no value changed."""

    values: np.ndarray
    photometric: int
    bits: int
    colormap: np.ndarray | None
    nodata: float | None


def read_tiff_orientation(path: Path) -> int:
    """Read the orientation of a TIFF, 1..8; 1 when none is declared."""
    with open_tiff(path) as tif:
        return page_orientation(main_pages(tif, path)[0])


def read_tiff_image(path: Path) -> np.ndarray:
    """Read a TIFF upright as image_io.read_image promises, (H, W, C) uint8, uint16 or float32."""
    return image_values(_load_tiff(path), path)


def read_tiff_values(path: Path) -> np.ndarray:
    """Read the stored values of a TIFF upright, (H, W, C) of any type, palettes as indices, 0 being dark."""
    return _dark_is_zero(_load_tiff(path))


def read_tiff_valid(path: Path) -> np.ndarray | None:
    """Read where a TIFF holds data, (H, W) bool; None when it declares no nodata value."""
    with open_tiff(path) as tif:
        if page_nodata(main_pages(tif, path)[0], path) is None:
            return None
    return valid_pixels(_load_tiff(path))


@contextlib.contextmanager
def open_tiff(path: Path) -> Iterator[tifffile.TiffFile]:
    """Open a TIFF; whatever its reader raises inside the block becomes an ImageError with the path."""
    try:
        with tifffile.TiffFile(path) as tif:
            yield tif
    except ImageError:
        raise
    except DECODE_ERRORS as error:
        raise ImageError(
            f"{path} is a damaged, truncated or unsupported TIFF ({type(error).__name__}: {error}); expected a "
            "complete file: copy or export it again"
        ) from error


def main_pages(tif: tifffile.TiffFile, path: Path) -> list[Any]:
    """The pages that make up the full-resolution image: one, or one for each band."""
    every: list[Any] = list(tif.pages)
    if not every:
        raise truncated(path, "it has no TIFF page")
    pages = [page for page in every if not page.subfiletype & 5] or every[:1]  # 1 is reduced, 4 a transparency mask
    main = max(pages, key=lambda page: page.imagelength * page.imagewidth)
    same = [page for page in pages if page.shape == main.shape and page.dtype == main.dtype]
    if len(same) > 1 and main.samplesperpixel > 1:
        if tif.is_svs:  # the thumbnail of a tiny slide can be as large as the slide
            return same[:1]
        raise ImageError(
            f"{path} holds {len(same)} pages of {main.samplesperpixel} channels; expected one picture: "
            "save each page as a file of its own"
        )
    if main.imagedepth > 1:
        raise ImageError(f"{path} holds a volume of depth {main.imagedepth}; expected a picture: save its slices")
    return same


def page_orientation(page: Any) -> int:
    """The orientation tag of a page, 1..8; 1 when there is none."""
    tag = page.tags.get(274)
    return int(tag.value) if tag is not None and tag.value in range(1, 9) else 1


def page_nodata(page: Any, path: Path) -> float | None:
    """The nodata value of tag 42113 (GDAL); None when there is none."""
    tag = page.tags.get(42113)
    if tag is None:
        return None
    text = str(tag.value).strip("\0 \n").lower()
    if "nan" in text:
        return math.nan
    try:
        return float(text)
    except ValueError:
        raise ImageError(
            f"{path} declares the nodata value {text!r} (tag 42113); expected a number or nan: repair it with "
            "gdal_edit.py -a_nodata VALUE"
        ) from None


def check_directory(tif: tifffile.TiffFile, page: Any, path: Path) -> None:
    """Refuse a page with lost tags, for which its reader takes defaults, or with lost pages behind it."""
    file, layout = tif.filehandle, tif.tiff
    file.seek(page.offset)
    (count,) = struct.unpack(layout.tagnoformat, file.read(layout.tagnosize))
    entries = file.read(count * layout.tagsize)
    codes = {struct.unpack_from(layout.byteorder + "H", entries, i * layout.tagsize)[0] for i in range(count)}
    lost = [code for code in codes if (254 <= code <= 339 or code == 42113) and code not in page.tags]
    if lost:
        raise truncated(path, f"the values of its TIFF tags {sorted(lost)} are missing")
    (following,) = struct.unpack(layout.offsetformat, file.read(layout.offsetsize))
    if following and page.index == len(tif.pages) - 1:
        raise truncated(path, f"TIFF page {page.index + 2} is missing")


def _check_pixels(tif: tifffile.TiffFile, page: Any, path: Path) -> None:
    """Refuse a page whose pixels are not all there: its reader fills them with zeros."""
    size = tif.filehandle.size
    ends = np.add(page.dataoffsets, page.databytecounts, dtype=np.int64)
    if not len(ends) or ends.max() > size:
        raise truncated(path, f"its TIFF pixels end at byte {max(ends, default=0)} and the file at {size}")


def _load_tiff(path: Path) -> Bands:
    """The whole picture, upright."""
    with open_tiff(path) as tif:
        pages = main_pages(tif, path)
        page = pages[0]
        for each in {page.index: page for page in (*pages, tif.pages[-1])}.values():
            _check_pixels(tif, each, path)
            check_directory(tif, each, path)
        check_colours(page, path)
        if len(pages) > 1:
            values = np.stack([each.asarray() for each in pages], axis=2)
        else:
            values = _single_page(tif, page, path)
        bands = stored_bands(tif, page, values, path)
        return replace(bands, values=upright(bands.values, page_orientation(page)))


def check_colours(page: Any, path: Path) -> None:
    """Refuse a page of colours that no decoder here turns into RGB."""
    if page.photometric not in (0, 1, 2, 3, 4, 5, 6, 34892) or (
        page.photometric == 6 and page.compression not in (6, 7)
    ):
        raise ImageError(f"{path} is a TIFF of colour type {page.photometric!r}; expected grey, RGB or a palette")


def stored_bands(tif: tifffile.TiffFile, page: Any, values: np.ndarray, path: Path) -> Bands:
    """Describe decoded values of a page, (H, W, samples); alpha is dropped.

    Raises:
        ImageError: no picture, or samples of unequal depth.
    """
    kept = kept_bands(page, values.shape[-1])
    if kept is not None:
        values = values[..., kept]
    if values.ndim != 3 or values.size == 0 or not isinstance(page.bitspersample, int):
        raise ImageError(f"{path} is a TIFF of shape {values.shape} and {page.bitspersample} bits: save it as RGB")
    if not values.dtype.isnative:
        values = values.astype(values.dtype.newbyteorder("="))
    # tifffile and ImageJ call boolean or inverted pictures white-is-zero and mean the stored values all the same
    photometric = 1 if page.photometric == 0 and (tif.is_shaped or tif.is_imagej) else page.photometric
    return Bands(values, photometric, page.bitspersample, page.colormap, page_nodata(page, path))


def kept_bands(page: Any, samples: int) -> list[int] | None:
    """Which of a page's samples are no alpha; None: all."""
    extra = page.extrasamples
    if not any(extra):  # 1 and 2 are alpha, 0 an ordinary band
        return None
    colours = samples - len(extra)
    return [c for c in range(samples) if c < colours or not extra[c - colours]]


def hidden_stack(tif: tifffile.TiffFile, page: Any) -> int:
    """How many pictures ImageJ keeps behind the one page it describes; 0 in any other file."""
    promised = int((tif.imagej_metadata or {}).get("images", 1)) if tif.is_imagej else 1
    return promised if promised > 1 and len(tif.pages) == 1 and page.samplesperpixel == 1 else 0


def _single_page(tif: tifffile.TiffFile, page: Any, path: Path) -> np.ndarray:
    """(H, W, C) of a page, or of the stack behind it."""
    promised = hidden_stack(tif, page)
    if promised:
        stack = tif.series[0].asarray().reshape(-1, page.imagelength, page.imagewidth)
        if len(stack) != promised:
            raise truncated(path, f"ImageJ's description promises {promised} pages and {len(stack)} can be read")
        return np.moveaxis(stack, 0, 2)
    values = page.asarray()
    if values.ndim == 2:
        return values[..., None]
    return np.moveaxis(values, 0, 2) if page.planarconfig == 2 else values


def _dark_is_zero(bands: Bands) -> np.ndarray:
    """The values with white-is-zero files turned round, as every viewer shows them."""
    values = bands.values
    if bands.photometric != 0 or values.dtype.kind not in "bu":
        return values
    return ~values if values.dtype == np.bool_ else (2**bands.bits - 1) - values


def valid_pixels(bands: Bands) -> np.ndarray | None:
    """Where there is data, (H, W) bool: False where every band equals the declared nodata value."""
    if bands.nodata is None:
        return None
    values, nodata = bands.values, bands.nodata
    if math.isnan(nodata):
        same = np.isnan(values) if values.dtype.kind == "f" else np.zeros(values.shape, bool)
    elif values.dtype.kind == "f":  # the tag is text, often of fewer digits than the pixels
        with np.errstate(over="ignore", invalid="ignore"):
            same = np.isclose(values, values.dtype.type(nodata), rtol=2e-6, atol=0)
    else:
        same = values == nodata
    return np.asarray(~same.all(axis=2))


def image_values(bands: Bands, path: Path, *, stream: bool = False) -> np.ndarray:
    """Turn stored values into a picture, (H, W, C) uint8, uint16 or float32, see image_io.read_image.

    Args:
        stream: the bands are a part of a picture, so the type must not depend on their values: whole numbers other
            than uint8 and uint16 become float32.

    Raises:
        ImageError: colours or values that are no picture, or not finite.
    """
    values = _dark_is_zero(bands)
    if bands.photometric == 3:
        return _apply_colormap(values, bands, path)
    if bands.photometric == 5:
        return _cmyk_to_rgb(values, path)
    if bands.bits < 8 and values.dtype.kind in "bu":
        return values.astype(np.uint8) * np.uint8(255 // (2**bands.bits - 1))
    if stream and values.dtype.kind in "iu" and values.dtype not in (np.uint8, np.uint16):
        return values.astype(np.float32)
    values = _to_image_dtype(values, path)
    if values.dtype == np.float32 and not np.isfinite(values).all():
        bad = ~np.isfinite(values).all(axis=2)
        valid = valid_pixels(bands)
        count = int(np.count_nonzero(bad if valid is None else bad & valid))
        if count:
            raise ImageError(
                f"{path} holds NaN or infinity in {count} pixels; expected finite values: repair it, or declare the "
                "value as nodata in every band (gdal_edit.py -a_nodata nan)"
            )
    return values


def _apply_colormap(values: np.ndarray, bands: Bands, path: Path) -> np.ndarray:
    colormap = bands.colormap
    if colormap is None or colormap.ndim != 2 or values.shape[2] != 1 or values.max() >= colormap.shape[1]:
        raise ImageError(f"{path} is a palette TIFF without a fitting palette: save it as RGB")
    table = colormap if colormap.max() < 256 else colormap >> 8  # 16 bits by the standard, 8 from some writers
    return np.ascontiguousarray(table.T.astype(np.uint8)[values[..., 0].astype(np.uint16)])


def _cmyk_to_rgb(values: np.ndarray, path: Path) -> np.ndarray:
    if values.shape[2] != 4 or values.dtype != np.uint8:
        raise ImageError(f"{path} is a CMYK TIFF of {values.shape[2]} {values.dtype} channels: save it as RGB")
    light = 255 - values.astype(np.uint16)
    return ((light[..., :3] * light[..., 3:].astype(np.uint32) + 127) // 255).astype(np.uint8)


def _to_image_dtype(values: np.ndarray, path: Path) -> np.ndarray:
    """Cast to uint8, uint16 or float32 without losing a whole value below 65536."""
    kind = values.dtype.kind
    if values.dtype in (np.uint8, np.uint16, np.float32):
        return values
    if kind == "f":
        with np.errstate(over="ignore"):
            return values.astype(np.float32)
    if kind not in "iu":
        raise ImageError(f"{path} holds {values.dtype} values; expected whole or real numbers: save one part of them")
    if values.min() < 0 or values.max() > 65535:
        return values.astype(np.float32)
    return values.astype(np.uint8 if values.dtype == np.int8 else np.uint16)


def write_tiff(handle: IO[bytes], image: np.ndarray) -> None:
    """Write (H, W, C) pixels, RGB then extras, as a compressed TIFF into an open file."""
    channels = image.shape[2]
    colours = 3 if channels >= 3 else 1
    tifffile.imwrite(
        handle,
        image[..., 0] if channels == 1 else image,
        photometric="rgb" if colours == 3 else "minisblack",
        planarconfig=None if channels == 1 else "contig",
        extrasamples=["unspecified"] * (channels - colours),
        compression="zlib",
        predictor=image.dtype != np.float32,
        metadata=None,
    )
