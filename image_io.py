"""Read and write images, masks and label maps, whatever the file format, and bring them to the network's numbers.

Everything that leaves this module is upright, has its channels in the order RGB then extras, and owns its memory.
A file that is damaged, cut short or of another kind raises ImageError with its path, never a half-filled array.
"""

import contextlib
import io
import math
import mmap
import os
import struct
import unicodedata
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
import tifffile
from PIL import BmpImagePlugin, GifImagePlugin, JpegImagePlugin, PngImagePlugin
from PIL.Image import DecompressionBombError

IGNORE_INDEX = 255
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp")
PREPROCESS_STEPS = ("clahe", "denoise", "stretch")

# What PIL, tifffile and imagecodecs (its errors are RuntimeErrors) were seen to raise on damaged files.
_DECODE_ERRORS = (
    ArithmeticError,
    AttributeError,
    DecompressionBombError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
)
_PILLOW_PLUGINS: dict[str, Callable[..., Any]] = {  # called directly, past PIL's limit on the number of pixels
    "PNG": PngImagePlugin.PngImageFile,
    "JPEG": JpegImagePlugin.JpegImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "GIF": GifImagePlugin.GifImageFile,
}


class ImageError(ValueError):
    """An image file that cannot be used; the message names the path, what was found and what was expected."""


@dataclass(frozen=True)
class _Header:
    """What decides how a PNG, JPEG, BMP or WebP file is decoded."""

    channels: int = 3  # colour channels without alpha: 1 grey, 3 RGB, 4 CMYK
    bits: int = 8  # per channel, or per palette index
    palette: bool = False
    orientation: int = 1


@dataclass(frozen=True)
class _Bands:
    """A TIFF file as stored: (H, W, C), native byte order, upright, alpha dropped, no value changed."""

    values: np.ndarray
    photometric: int
    bits: int
    colormap: np.ndarray | None
    nodata: float | None


def list_images(folder: Path) -> dict[str, Path]:
    """Find the images directly inside a folder.

    Returns:
        File stem (Unicode NFC, so that files from macOS and Linux pair) to path, sorted by stem. Hidden files,
        folders and other file types are left out.

    Raises:
        FileNotFoundError: the folder does not exist.
        ImageError: two images share a stem.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist; expected a folder with images ({_spell(IMAGE_SUFFIXES)})")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; expected a folder with images ({_spell(IMAGE_SUFFIXES)})")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if path.name.startswith(".") or path.suffix.lower() not in IMAGE_SUFFIXES or not path.is_file():
            continue
        stem = unicodedata.normalize("NFC", path.stem)
        if stem in found:
            raise ImageError(
                f"{folder} holds {found[stem].name!r} and {path.name!r}, which share the stem {stem!r}; images and "
                "masks pair by stem, so expected one file for each: rename or move one of them"
            )
        found[stem] = path
    return dict(sorted(found.items()))


def _spell(words: Sequence[str]) -> str:
    return " ".join(words)


def _truncated(path: Path, what: str) -> ImageError:
    return ImageError(f"{path} is truncated: {what}; expected a complete file: copy or export it again")


def _sniff(head: bytes, path: Path) -> str:
    """Name the format of a file from its first bytes; the suffix is not asked."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "TIFF"
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WebP"
    if head.startswith(b"BM"):
        return "BMP"
    if not head:
        raise ImageError(f"{path} is empty (0 bytes); expected an image: copy or export it again")
    if head.startswith(b"version https://g"):
        raise ImageError(f"{path} is a Git LFS pointer, not the image itself: run 'git lfs pull'")
    raise ImageError(
        f"{path} is not an image Tessera reads: it starts with {head[:12]!r}; "
        "expected PNG, JPEG, TIFF, BMP, GIF or WebP: convert it, or move it out of the folder"
    )


def _exif_orientation(block: bytes) -> int:
    """Orientation 1..8 from an EXIF block (a small TIFF, perhaps behind 'Exif'), 1 when it says none."""
    block = block.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    if order is None or len(block) < 10:
        return 1
    (start,) = struct.unpack_from(order + "I", block, 4)
    if start + 2 > len(block):
        return 1
    (count,) = struct.unpack_from(order + "H", block, start)
    for entry in range(start + 2, min(start + 2 + 12 * count, len(block) - 11), 12):
        tag, kind = struct.unpack_from(order + "HH", block, entry)
        if tag == 274:
            (value,) = struct.unpack_from(order + ("I" if kind == 4 else "H"), block, entry + 8)
            return value if 1 <= value <= 8 else 1
    return 1


def _scan_png(data: bytes | mmap.mmap, path: Path) -> _Header:
    bits, colour = struct.unpack_from("BB", data, 24)
    orientation, position = 1, 8
    while position + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, position)
        if name == b"IEND":
            return _Header(1 if colour in (0, 4) else 3, bits, colour == 3, orientation)
        if name == b"eXIf":
            orientation = _exif_orientation(data[position + 8 : position + 8 + length])
        elif name == b"acTL" and struct.unpack_from(">I", data, position + 8)[0] > 1:
            raise _animated(path)
        position += 12 + length
    raise _truncated(path, "the PNG has no end chunk (IEND)")


def _scan_jpeg(data: bytes | mmap.mmap, path: Path) -> _Header:
    channels, bits, orientation, position = 3, 8, 1, 2
    while position + 4 <= len(data):
        marker = data[position + 1]
        if data[position] != 0xFF or marker == 0xFF:  # stray or fill bytes, which decoders skip
            position += 1
            continue
        if marker == 0xDA:  # the pixels start; 255 is escaped in them, so an end marker is real
            if data.rfind(b"\xff\xd9", position) < 0:
                raise _truncated(path, "the JPEG has no end marker")
            return _Header(channels, bits, orientation=orientation)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            bits, channels = data[position + 4], data[position + 9]
        elif marker == 0xE1 and data[position + 4 : position + 10] == b"Exif\0\0":
            (length,) = struct.unpack_from(">H", data, position + 2)
            orientation = _exif_orientation(data[position + 4 : position + 2 + length])
        standalone = marker == 0x01 or 0xD0 <= marker <= 0xD8
        position += 2 if standalone else 2 + struct.unpack_from(">H", data, position + 2)[0]
    raise _truncated(path, "the JPEG ends before its pixels")


def _scan_webp(data: bytes | mmap.mmap, path: Path) -> _Header:
    end = 8 + struct.unpack_from("<I", data, 4)[0]
    if end > len(data):
        raise _truncated(path, f"the WebP header promises {end} bytes and {len(data)} are there")
    orientation, position, frames = 1, 12, 0
    while position + 8 <= end:
        name, length = struct.unpack_from("<4sI", data, position)
        if name == b"EXIF":
            orientation = _exif_orientation(data[position + 8 : position + 8 + length])
        frames += name == b"ANMF"
        position += 8 + length + length % 2
    if frames > 1:
        raise _animated(path)
    return _Header(orientation=orientation)


def _scan_bmp(data: bytes | mmap.mmap, path: Path) -> _Header:
    offset, header_size = struct.unpack_from("<II", data, 10)
    if header_size == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
        compression = 0
    else:
        width, height, _, bits, compression = struct.unpack_from("<iiHHI", data, 18)
    needed = offset + (width * bits + 31) // 32 * 4 * abs(height)
    if compression in (0, 3) and needed > len(data):
        raise _truncated(path, f"the BMP header promises {needed} bytes and {len(data)} are there")
    return _Header(bits=bits, palette=bits <= 8)


def _scan_gif(data: bytes | mmap.mmap, path: Path) -> _Header:
    return _Header(palette=True)


def _animated(path: Path) -> ImageError:
    return ImageError(f"{path} is an animation; expected one picture: save each frame as a file of its own")


_SCANNERS: dict[str, Callable[[bytes | mmap.mmap, Path], _Header]] = {
    "PNG": _scan_png,
    "JPEG": _scan_jpeg,
    "WebP": _scan_webp,
    "BMP": _scan_bmp,
    "GIF": _scan_gif,
}


def _scan(kind: str, data: bytes | mmap.mmap, path: Path) -> _Header:
    try:
        return _SCANNERS[kind](data, path)
    except (struct.error, IndexError) as error:
        raise _truncated(path, f"its {kind} header is cut off") from error


def read_orientation(path: Path) -> int:
    """Read the EXIF (JPEG, PNG, WebP) or TIFF orientation, 1..8, without decoding pixels; 1 when none is declared."""
    path = Path(path)
    with path.open("rb") as handle:
        kind = _sniff(handle.read(32), path)
        if kind != "TIFF":
            with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _scan(kind, data, path).orientation
    with _open_tiff(path) as tif:
        return _tiff_orientation(_tiff_pages(tif, path)[0])


def _read_bytes(path: Path) -> tuple[str, bytes]:
    """The format and, except for TIFF (which is read by parts), the whole content of a file."""
    with path.open("rb") as handle:
        kind = _sniff(handle.read(32), path)
        handle.seek(0)
        return kind, b"" if kind == "TIFF" else handle.read()


def _decode(kind: str, data: bytes, header: _Header, path: Path) -> np.ndarray:
    """Decode with OpenCV to (H, W) grey or (H, W, 3) RGB, uint8 or uint16; alpha and orientation are left out."""
    colour = cv2.IMREAD_GRAYSCALE if header.channels == 1 else cv2.IMREAD_COLOR_RGB
    flags = colour | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise ImageError(f"{path} could not be decoded as {kind} ({error.err}): export it again") from error
    if image is None:
        raise ImageError(
            f"{path} is damaged or truncated: its {kind} pixels could not be decoded; expected a complete file: "
            "copy or export it again"
        )
    return image


def _decode_pillow(kind: str, data: bytes, path: Path, *, indices: bool) -> np.ndarray:
    """Decode what OpenCV does not (GIF, CMYK) or only to colours (palettes).

    Returns:
        (H, W) palette indices, 0/1 or grey when indices is set; else (H, W) grey or (H, W, 3) RGB, uint8.
    """
    try:
        with _PILLOW_PLUGINS[kind](io.BytesIO(data)) as picture:
            if getattr(picture, "is_animated", False):
                raise _animated(path)
            picture.load()
            if indices and picture.mode in ("1", "L", "P"):
                return np.array(picture, np.uint8)
            return np.array(picture.convert("L" if picture.mode in ("1", "L") else "RGB"))
    except ImageError:
        raise
    except _DECODE_ERRORS as error:
        raise ImageError(
            f"{path} is damaged or truncated: its {kind} pixels could not be decoded ({error}); expected a complete "
            "file: copy or export it again"
        ) from error


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation of (H, W) or (H, W, C) pixels; contiguous."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def read_image(path: Path) -> np.ndarray:
    """Read an image upright, with channels RGB then extras.

    Alpha is dropped; palettes and CMYK become RGB; 1, 2 and 4 bits are spread over 0..255; the bands of a TIFF
    (planar, interleaved or one a page) become channels, of a pyramid the full resolution is read. Other number
    types become the smallest of the three that holds them. Pixels that a GeoTIFF declares as nodata are left as
    stored (see read_valid); any other NaN or infinity is an error.

    Returns:
        (H, W, C) uint8, uint16 or float32, contiguous; C = 1 for grey.

    Raises:
        ImageError: truncated, damaged, animated, not an image, or not finite.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    kind, data = _read_bytes(path)
    if kind == "TIFF":
        return _tiff_image(_load_tiff(path), path)
    header = _scan(kind, data, path)
    if kind == "GIF" or (kind == "BMP" and header.palette) or (kind == "JPEG" and header.channels == 4):
        image = _decode_pillow(kind, data, path, indices=False)
    else:
        image = _decode(kind, data, header, path)
    image = _upright(image, header.orientation)
    return image[..., None] if image.ndim == 2 else image


def read_valid(path: Path) -> np.ndarray | None:
    """Read which pixels of a GeoTIFF hold data.

    Returns:
        (H, W) bool, False where every band equals the nodata value of tag 42113; None when the file declares none.
    """
    path = Path(path)
    with path.open("rb") as handle:
        if _sniff(handle.read(32), path) != "TIFF":
            return None
    with _open_tiff(path) as tif:
        if _tiff_nodata(_tiff_pages(tif, path)[0], path) is None:
            return None
    return _valid_pixels(_load_tiff(path))


def read_mask(path: Path) -> np.ndarray:
    """Read a mask or label map upright, values as stored.

    Palettes and 1-bit files give indices; alpha is dropped; an RGB file whose channels are equal counts as grey.

    Returns:
        (H, W) uint8, uint16 or uint32, contiguous.

    Raises:
        ImageError: as read_image; also colours, several bands, negative or fractional labels.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    kind, data = _read_bytes(path)
    if kind == "TIFF":
        bands = _load_tiff(path)
        return _to_labels(_one_channel(_dark_is_zero(bands), path), path)
    header = _scan(kind, data, path)
    if header.palette or (kind == "JPEG" and header.channels == 4):
        mask = _decode_pillow(kind, data, path, indices=True)
    else:
        mask = _decode(kind, data, header, path)
        if header.bits < 8:  # grey PNG of 1, 2 or 4 bits, which the decoder spreads over 0..255
            mask //= 255 // (2**header.bits - 1)
    mask = _upright(mask, header.orientation)
    return mask if mask.ndim == 2 else _one_channel(mask, path)


def _one_channel(mask: np.ndarray, path: Path) -> np.ndarray:
    """(H, W, C) -> (H, W), when there is one channel or three equal ones."""
    channels = mask.shape[2]
    if channels == 1:
        return np.ascontiguousarray(mask[..., 0])
    first = np.ascontiguousarray(mask[..., 0])
    if channels == 3 and all(np.array_equal(first, mask[..., c]) for c in (1, 2)):
        return first
    found = "an RGB mask: its three channels differ" if channels == 3 else f"a mask with {channels} bands"
    raise ImageError(f"{path} is {found}; expected one label for each pixel: save one channel of labels")


def _to_labels(mask: np.ndarray, path: Path) -> np.ndarray:
    """Cast whole, non-negative values to uint8, uint16 or uint32."""
    kind = mask.dtype.kind
    if mask.dtype in (np.uint8, np.uint16, np.uint32):
        return mask
    if kind not in "biuf":
        raise ImageError(f"{path} holds {mask.dtype} values; expected whole labels: save it as uint8 or uint16")
    low, high = mask.min(), mask.max()
    if kind == "f" and not (np.isfinite(low) and np.isfinite(high) and np.array_equal(mask, np.rint(mask))):
        raise ImageError(
            f"{path} holds {mask.dtype} values that are not whole (range {low:g} to {high:g}); expected labels "
            "0, 1, 2, ...: threshold it, or save it as uint8 or uint16"
        )
    if low < 0 or high > 0xFFFFFFFF:
        raise ImageError(
            f"{path} holds labels from {int(low)} to {int(high)}; expected 0 to 4294967295: give pixels without a "
            f"class a label of their own, such as {IGNORE_INDEX}"
        )
    if mask.dtype == np.int16 or mask.dtype == np.int32:
        return mask.astype(np.uint16 if mask.dtype == np.int16 else np.uint32)
    return mask.astype(np.min_scalar_type(int(high)))


@contextlib.contextmanager
def _open_tiff(path: Path) -> Iterator[tifffile.TiffFile]:
    """Open a TIFF; whatever its reader raises inside the block becomes an ImageError with the path."""
    try:
        with tifffile.TiffFile(path) as tif:
            yield tif
    except ImageError:
        raise
    except _DECODE_ERRORS as error:
        raise ImageError(
            f"{path} is a damaged, truncated or unsupported TIFF ({type(error).__name__}: {error}); expected a "
            "complete file: copy or export it again"
        ) from error


def _tiff_pages(tif: tifffile.TiffFile, path: Path) -> list[Any]:
    """The pages that make up the full-resolution image: one, or one for each band."""
    every: list[Any] = list(tif.pages)
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


def _tiff_orientation(page: Any) -> int:
    tag = page.tags.get(274)
    return int(tag.value) if tag is not None and tag.value in range(1, 9) else 1


def _tiff_nodata(page: Any, path: Path) -> float | None:
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


def _check_whole(tif: tifffile.TiffFile, page: Any, path: Path) -> None:
    """Refuse a page that is not all there: its reader fills lost pixels with zeros and lost tags with defaults."""
    file, layout = tif.filehandle, tif.tiff
    ends = np.add(page.dataoffsets, page.databytecounts, dtype=np.int64)
    if not len(ends) or ends.max() > file.size:
        raise _truncated(path, f"its TIFF pixels end at byte {max(ends, default=0)} and the file at {file.size}")
    file.seek(page.offset)
    (count,) = struct.unpack(layout.tagnoformat, file.read(layout.tagnosize))
    entries = file.read(count * layout.tagsize)
    codes = {struct.unpack_from(layout.byteorder + "H", entries, i * layout.tagsize)[0] for i in range(count)}
    lost = [code for code in codes if (254 <= code <= 339 or code == 42113) and code not in page.tags]
    if lost:
        raise _truncated(path, f"the values of its TIFF tags {sorted(lost)} are missing")
    (following,) = struct.unpack(layout.offsetformat, file.read(layout.offsetsize))
    if following and page.index == len(tif.pages) - 1:
        raise _truncated(path, f"TIFF page {page.index + 2} is missing")


def _load_tiff(path: Path) -> _Bands:
    with _open_tiff(path) as tif:
        pages = _tiff_pages(tif, path)
        page = pages[0]
        for each in {page.index: page for page in (*pages, tif.pages[-1])}.values():
            _check_whole(tif, each, path)
        if page.photometric not in (0, 1, 2, 3, 4, 5, 6, 34892) or (
            page.photometric == 6 and page.compression not in (6, 7)
        ):
            raise ImageError(f"{path} is a TIFF of colour type {page.photometric!r}; expected grey, RGB or a palette")
        if len(pages) > 1:
            values = np.stack([each.asarray() for each in pages], axis=2)
        else:
            values = _single_page(tif, page, path)
        extra = page.extrasamples
        if any(extra):  # 1 and 2 are alpha, 0 an ordinary band
            colours = values.shape[2] - len(extra)
            values = values[..., [c for c in range(values.shape[2]) if c < colours or not extra[c - colours]]]
        if values.ndim != 3 or values.size == 0 or not isinstance(page.bitspersample, int):
            raise ImageError(f"{path} is a TIFF of shape {values.shape} and {page.bitspersample} bits: save it as RGB")
        if not values.dtype.isnative:
            values = values.astype(values.dtype.newbyteorder("="))
        values = _upright(values, _tiff_orientation(page))
        # tifffile and ImageJ call boolean or inverted pictures white-is-zero and mean the stored values all the same
        photometric = 1 if page.photometric == 0 and (tif.is_shaped or tif.is_imagej) else page.photometric
        return _Bands(values, photometric, page.bitspersample, page.colormap, _tiff_nodata(page, path))


def _single_page(tif: tifffile.TiffFile, page: Any, path: Path) -> np.ndarray:
    """(H, W, C) of a page; ImageJ can keep a whole stack behind the one page it describes."""
    promised = int((tif.imagej_metadata or {}).get("images", 1)) if tif.is_imagej else 1
    if promised > 1 and len(tif.pages) == 1 and page.samplesperpixel == 1:
        stack = tif.series[0].asarray().reshape(-1, page.imagelength, page.imagewidth)
        if len(stack) != promised:
            raise _truncated(path, f"ImageJ's description promises {promised} pages and {len(stack)} can be read")
        return np.moveaxis(stack, 0, 2)
    values = page.asarray()
    if values.ndim == 2:
        return values[..., None]
    return np.moveaxis(values, 0, 2) if page.planarconfig == 2 else values


def _dark_is_zero(bands: _Bands) -> np.ndarray:
    """The values with white-is-zero files turned round, as every viewer shows them."""
    values = bands.values
    if bands.photometric != 0 or values.dtype.kind not in "bu":
        return values
    return ~values if values.dtype == np.bool_ else (2**bands.bits - 1) - values


def _valid_pixels(bands: _Bands) -> np.ndarray | None:
    """(H, W) bool, False where every band equals the declared nodata value."""
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


def _tiff_image(bands: _Bands, path: Path) -> np.ndarray:
    values = _dark_is_zero(bands)
    if bands.photometric == 3:
        return _apply_colormap(values, bands, path)
    if bands.photometric == 5:
        return _cmyk_to_rgb(values, path)
    if bands.bits < 8 and values.dtype.kind in "bu":
        return values.astype(np.uint8) * np.uint8(255 // (2**bands.bits - 1))
    values = _to_image_dtype(values, path)
    if values.dtype == np.float32 and not np.isfinite(values).all():
        bad = ~np.isfinite(values).all(axis=2)
        valid = _valid_pixels(bands)
        count = int(np.count_nonzero(bad if valid is None else bad & valid))
        if count:
            raise ImageError(
                f"{path} holds NaN or infinity in {count} pixels; expected finite values: repair it, or declare the "
                "value as nodata in every band (gdal_edit.py -a_nodata nan)"
            )
    return values


def _apply_colormap(values: np.ndarray, bands: _Bands, path: Path) -> np.ndarray:
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


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file that appears under its name only when the block ends well.

    The content goes to a hidden file in the same folder, is synced to the disk and renamed. When anything fails the
    old file stays as it was and the hidden one is removed.

    Args:
        path: target; its folders are created. A symbolic link is followed.
        mode: "wb" or "w" (UTF-8, lines end in a line feed).

    Raises:
        OSError: the file could not be written (folder read-only, disk full); names the target.
    """
    path = Path(path)
    target = path.resolve() if path.is_symlink() else path
    temporary = target.with_name(f".{uuid.uuid4().hex}.tmp")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    opened = False
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open(mode.replace("w", "x"), **text) as handle:  # type: ignore[call-overload]
            opened = True
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(target)
    except OSError as error:
        _remove(temporary)
        if opened and error.filename not in (None, str(temporary)):  # the caller's trouble with another file
            raise
        raise OSError(error.errno, f"{error.strerror or error}; nothing was saved here", str(path)) from error
    except BaseException:
        _remove(temporary)
        raise


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8) atomically, creating its folder."""
    with atomic_write(path, "w") as handle:
        handle.write(text)


def write_image(path: Path, image: np.ndarray) -> None:
    """Write an image atomically; the suffix decides the format.

    Args:
        path: .png (8 or 16 bit), .jpg .jpeg .bmp .webp (8 bit), or .tif .tiff (these and float32, any channel count).
        image: (H, W) or (H, W, C), RGB then extras, uint8, uint16 or float32.

    Raises:
        ImageError: the format cannot hold the image, or the array is no image.
        OSError: the file could not be written.
    """
    path, suffix = Path(path), Path(path).suffix.lower()
    image = image[..., None] if image.ndim == 2 else image
    if image.ndim != 3 or image.size == 0 or image.dtype not in (np.uint8, np.uint16, np.float32):
        raise ImageError(
            f"{path} cannot be written from a {image.dtype} array of shape {image.shape}; "
            "expected (H, W, C), uint8, uint16 or float32"
        )
    if suffix in (".tif", ".tiff"):
        _write_tiff(path, image)
        return
    depths = {".png": "uint8 uint16", ".jpg": "uint8", ".jpeg": "uint8", ".bmp": "uint8", ".webp": "uint8"}
    if suffix not in depths:
        raise ImageError(f"{path} cannot be written: expected the suffix {_spell([*depths, '.tif', '.tiff'])}")
    if image.shape[2] not in (1, 3) or image.dtype.name not in depths[suffix].split():
        raise ImageError(
            f"{path}: {suffix} cannot hold {image.shape[2]} channels of {image.dtype}; expected 1 or 3 of "
            f"{depths[suffix].replace(' ', ' or ')}: use .tif"
        )
    _write_encoded(path, image)


def write_mask(path: Path, mask: np.ndarray) -> None:
    """Write a mask or label map atomically and without loss; the suffix decides the format.

    Args:
        path: .png (uint8, uint16), .bmp (uint8), or .tif .tiff (uint32 too).
        mask: (H, W) uint8, uint16 or uint32.

    Raises:
        ImageError: the format cannot hold the mask, or the array is no mask.
        OSError: the file could not be written.
    """
    path, suffix = Path(path), Path(path).suffix.lower()
    if mask.ndim != 2 or mask.size == 0 or mask.dtype not in (np.uint8, np.uint16, np.uint32):
        raise ImageError(
            f"{path} cannot be written from a {mask.dtype} array of shape {mask.shape}; "
            "expected (H, W), uint8, uint16 or uint32"
        )
    if suffix in (".tif", ".tiff"):
        _write_tiff(path, mask[..., None])
        return
    depths = {".png": ("uint8", "uint16"), ".bmp": ("uint8",)}
    if suffix not in depths:
        raise ImageError(f"{path} cannot hold a mask without loss: use .png, .tif or .bmp")
    if mask.dtype.name not in depths[suffix]:
        raise ImageError(f"{path}: {suffix} cannot hold {mask.dtype} labels (largest is {mask.max()}): use .tif")
    _write_encoded(path, mask)


def _write_encoded(path: Path, image: np.ndarray) -> None:
    if image.ndim == 3 and image.shape[2] == 3:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    try:
        written, data = cv2.imencode(path.suffix.lower(), image)
    except cv2.error as error:
        raise ImageError(f"{path} could not be encoded from shape {image.shape} ({error.err}): use .tif") from error
    if not written:
        raise ImageError(f"{path} could not be encoded from shape {image.shape}: use .tif")
    with atomic_write(path) as handle:
        handle.write(data)


def _write_tiff(path: Path, image: np.ndarray) -> None:
    channels = image.shape[2]
    colours = 3 if channels >= 3 else 1
    with atomic_write(path) as handle:
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


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize by area averaging along an axis that shrinks and linearly along one that grows.

    Args:
        image: (H, W, C) uint8, uint16 or float32.
        size: (height, width) wanted.

    Returns:
        (height, width, C) of the same type; the image itself when it has that size.
    """
    height, width = size
    if image.shape[0] > height or image.shape[1] > width:
        smaller = (min(width, image.shape[1]), min(height, image.shape[0]))
        parts = [  # area averaging takes at most 4 channels at a time
            cv2.resize(np.ascontiguousarray(image[..., c : c + 4]), smaller, interpolation=cv2.INTER_AREA)
            for c in range(0, image.shape[2], 4)
        ]
        image = np.dstack(parts) if len(parts) > 1 else parts[0].reshape(*smaller[::-1], -1)
    if image.shape[:2] != (height, width):
        parts = [
            cv2.resize(np.ascontiguousarray(image[..., c : c + 4]), (width, height), interpolation=cv2.INTER_LINEAR)
            for c in range(0, image.shape[2], 4)
        ]
        image = np.dstack(parts) if len(parts) > 1 else parts[0].reshape(height, width, -1)
    return image


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize (H, W) labels of any type to (height, width): each pixel takes the label under its centre."""
    if mask.shape == tuple(size):
        return mask
    rows, columns = (
        (2 * np.arange(wanted) + 1) * present // (2 * wanted) for present, wanted in zip(mask.shape, size, strict=True)
    )
    return mask.take(rows, axis=0).take(columns, axis=1)


def preprocess(image: np.ndarray, steps: Sequence[str]) -> np.ndarray:
    """Apply named steps in order, each channel on its own.

    clahe: contrast-limited adaptive histogram equalisation, 8 x 8 fields; denoise: median of 3 x 3 pixels; stretch:
    percentiles 0.5 and 99.5 of the image to the ends of the range (0..255, 0..65535, or 0..1 for float32).

    Args:
        image: (H, W, C) uint8, uint16 or float32; non-finite pixels stay as they are. Not changed.
        steps: names from PREPROCESS_STEPS; none returns the image itself.

    Raises:
        ValueError: an unknown step.
    """
    functions = {"clahe": _clahe, "denoise": _denoise, "stretch": _stretch}
    for step in steps:
        if step not in functions:
            raise ValueError(f"unknown preprocessing step {step!r}; expected some of: {_spell(PREPROCESS_STEPS)}")
    if not steps:
        return image
    result = image.copy()
    for c in range(image.shape[2]):
        channel = np.ascontiguousarray(image[..., c])
        finite = np.isfinite(channel)
        if not finite.any():
            continue
        channel = np.where(finite, channel, channel[finite].min())
        for step in steps:
            channel = functions[step](channel)
        result[..., c] = np.where(finite, channel, image[..., c])
    return result


def _clahe(channel: np.ndarray) -> np.ndarray:
    """Equalise 8-bit values; of deeper ones add what an 8-bit copy gained, so that no fine step is lost."""
    equaliser = cv2.createCLAHE(clipLimit=2.0, tileGridSize=(8, 8))
    if channel.dtype == np.uint8:
        return equaliser.apply(channel)
    low, high = float(channel.min()), float(channel.max())
    if low == high:
        return channel
    step = (high - low) / 255
    coarse = np.rint((channel - low) / step).astype(np.uint8)
    gain = equaliser.apply(coarse).astype(np.float32) - coarse
    deeper = np.clip(channel + gain * np.float32(step), low, high)
    return (deeper if channel.dtype == np.float32 else np.rint(deeper)).astype(channel.dtype)


def _denoise(channel: np.ndarray) -> np.ndarray:
    return cv2.medianBlur(channel, 3)


def _stretch(channel: np.ndarray) -> np.ndarray:
    low, high = np.percentile(channel, (0.5, 99.5))
    if low == high:
        return channel
    top = 1.0 if channel.dtype == np.float32 else float(np.iinfo(channel.dtype).max)
    stretched = np.clip((channel.astype(np.float32) - np.float32(low)) * np.float32(top / (high - low)), 0, top)
    return (stretched if channel.dtype == np.float32 else np.rint(stretched)).astype(channel.dtype)


def normalise(image: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Turn an image into the network's input: (value - mean) / std in float32. The only place where this happens.

    Args:
        image: (H, W, C) uint8, uint16 or float32.
        mean: C numbers in raw pixel units.
        std: C numbers in raw pixel units; below 1e-6 they count as 1e-6.

    Returns:
        (C, H, W) float32, contiguous.

    Raises:
        ValueError: mean or std has not one number for each channel.
    """
    height, width, channels = image.shape
    if len(mean) != channels or len(std) != channels:
        raise ValueError(
            f"the image has {channels} channels, the statistics {len(mean)} means and {len(std)} standard deviations; "
            "expected as many: give the channels that the statistics were computed on"
        )
    shift, scale = np.asarray(mean, np.float32), np.maximum(np.asarray(std, np.float32), np.float32(1e-6))
    result = np.empty((channels, height, width), np.float32)
    for c in range(channels):
        if image.dtype == np.uint8:  # the same arithmetic, done once for each of the 256 values
            table = (np.arange(256, dtype=np.float32) - shift[c]) / scale[c]
            cv2.LUT(np.ascontiguousarray(image[..., c]), table, dst=result[c])
        else:
            result[c] = image[..., c]
            result[c] -= shift[c]
            result[c] /= scale[c]
    return result
