"""What the first bytes of an image file tell: its format, depth, orientation, and whether it is all there."""

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL.Image import DecompressionBombError

# What PIL, tifffile and imagecodecs (its errors are RuntimeErrors) were seen to raise on damaged files.
DECODE_ERRORS = (
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


class ImageError(ValueError):
    """An image file that cannot be used; the message names the path, what was found and what was expected."""


@dataclass(frozen=True)
class Header:
    """What decides how a PNG, JPEG, BMP or WebP file is decoded."""

    channels: int = 3  # colour channels without alpha: 1 grey, 3 RGB, 4 CMYK
    bits: int = 8  # per channel, or per palette index
    palette: bool = False
    orientation: int = 1


def truncated(path: Path, what: str) -> ImageError:
    """The error to raise for a file that ends too early."""
    return ImageError(f"{path} is truncated: {what}; expected a complete file: copy or export it again")


def animated(path: Path) -> ImageError:
    """The error to raise for a file of several frames."""
    return ImageError(f"{path} is an animation; expected one picture: save each frame as a file of its own")


def sniff(head: bytes, path: Path) -> str:
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


def _scan_png(data: bytes | mmap.mmap, path: Path) -> Header:
    bits, colour = struct.unpack_from("BB", data, 24)
    orientation, position = 1, 8
    while position + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, position)
        if name == b"IEND":
            return Header(1 if colour in (0, 4) else 3, bits, colour == 3, orientation)
        if name == b"eXIf":
            orientation = _exif_orientation(data[position + 8 : position + 8 + length])
        elif name == b"acTL" and struct.unpack_from(">I", data, position + 8)[0] > 1:
            raise animated(path)
        position += 12 + length
    raise truncated(path, "the PNG has no end chunk (IEND)")


def _scan_jpeg(data: bytes | mmap.mmap, path: Path) -> Header:
    channels, bits, orientation, position = 3, 8, 1, 2
    while position + 4 <= len(data):
        marker = data[position + 1]
        if data[position] != 0xFF or marker == 0xFF:  # stray or fill bytes, which decoders skip
            position += 1
            continue
        if marker == 0xDA:  # the pixels start; 255 is escaped in them, so an end marker is real
            if data.rfind(b"\xff\xd9", position) < 0:
                raise truncated(path, "the JPEG has no end marker")
            return Header(channels, bits, orientation=orientation)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            bits, channels = data[position + 4], data[position + 9]
        elif marker == 0xE1 and data[position + 4 : position + 10] == b"Exif\0\0":
            (length,) = struct.unpack_from(">H", data, position + 2)
            orientation = _exif_orientation(data[position + 4 : position + 2 + length])
        standalone = marker == 0x01 or 0xD0 <= marker <= 0xD8
        position += 2 if standalone else 2 + struct.unpack_from(">H", data, position + 2)[0]
    raise truncated(path, "the JPEG ends before its pixels")


def _scan_webp(data: bytes | mmap.mmap, path: Path) -> Header:
    end = 8 + struct.unpack_from("<I", data, 4)[0]
    if end > len(data):
        raise truncated(path, f"the WebP header promises {end} bytes and {len(data)} are there")
    orientation, position, frames = 1, 12, 0
    while position + 8 <= end:
        name, length = struct.unpack_from("<4sI", data, position)
        if name == b"EXIF":
            orientation = _exif_orientation(data[position + 8 : position + 8 + length])
        frames += name == b"ANMF"
        position += 8 + length + length % 2
    if frames > 1:
        raise animated(path)
    return Header(orientation=orientation)


def _scan_bmp(data: bytes | mmap.mmap, path: Path) -> Header:
    offset, header_size = struct.unpack_from("<II", data, 10)
    if header_size == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
        compression = 0
    else:
        width, height, _, bits, compression = struct.unpack_from("<iiHHI", data, 18)
    needed = offset + (width * bits + 31) // 32 * 4 * abs(height)
    if compression in (0, 3) and needed > len(data):
        raise truncated(path, f"the BMP header promises {needed} bytes and {len(data)} are there")
    return Header(bits=bits, palette=bits <= 8)


def _scan_gif(data: bytes | mmap.mmap, path: Path) -> Header:
    return Header(palette=True)


_SCANNERS: dict[str, Callable[[bytes | mmap.mmap, Path], Header]] = {
    "PNG": _scan_png,
    "JPEG": _scan_jpeg,
    "WebP": _scan_webp,
    "BMP": _scan_bmp,
    "GIF": _scan_gif,
}


def scan_header(kind: str, data: bytes | mmap.mmap, path: Path) -> Header:
    """Read what decides the decoding, and refuse a file that ends too early or has several frames."""
    try:
        return _SCANNERS[kind](data, path)
    except (struct.error, IndexError) as error:
        raise truncated(path, f"its {kind} header is cut off") from error


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation of (H, W) or (H, W, C) pixels; contiguous."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
