"""Read and write images, masks and label maps, whatever the file format, and bring them to the network's numbers.

Everything that leaves this module is upright, has its channels in the order RGB then extras, and owns its memory.
A file that is damaged, cut short or of another kind raises ImageError with its path, never a half-filled array.
"""

import contextlib
import io
import mmap
import os
import unicodedata
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
from PIL import BmpImagePlugin, GifImagePlugin, JpegImagePlugin, PngImagePlugin

from image_headers import DECODE_ERRORS, Header, ImageError, animated, scan_header, sniff, upright
from tiff_io import read_tiff_image, read_tiff_orientation, read_tiff_valid, read_tiff_values, write_tiff

IGNORE_INDEX = 255
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp")
PREPROCESS_STEPS = ("clahe", "denoise", "stretch")

_PILLOW_PLUGINS: dict[str, Callable[..., Any]] = {  # called directly, past PIL's limit on the number of pixels
    "PNG": PngImagePlugin.PngImageFile,
    "JPEG": JpegImagePlugin.JpegImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "GIF": GifImagePlugin.GifImageFile,
}


def file_stem(path: Path) -> str:
    """What images, masks and results of one picture have in common: the stem (NFC), without the .ome of .ome.tif."""
    stem = unicodedata.normalize("NFC", path.stem)
    return stem[:-4] if path.suffix.lower() in (".tif", ".tiff") and stem.lower().endswith(".ome") else stem


def cache_dir() -> Path:
    """Folder of what can be computed again: $XDG_CACHE_HOME/tessera or ~/.cache/tessera."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tessera"


def list_images(folder: Path, more: Sequence[str] = ()) -> dict[str, Path]:
    """Find the images directly inside a folder.

    Args:
        more: suffixes that count beside IMAGE_SUFFIXES, in lower case.

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
        if path.name.startswith(".") or path.suffix.lower() not in (*IMAGE_SUFFIXES, *more) or not path.is_file():
            continue
        stem = file_stem(path)
        if stem in found:
            raise ImageError(
                f"{folder} holds {found[stem].name!r} and {path.name!r}, which share the stem {stem!r}; images and "
                "masks pair by stem, so expected one file for each: rename or move one of them"
            )
        found[stem] = path
    return dict(sorted(found.items()))


def _spell(words: Sequence[str]) -> str:
    return " ".join(words)


def read_orientation(path: Path) -> int:
    """Read the EXIF (JPEG, PNG, WebP) or TIFF orientation, 1..8, without decoding pixels; 1 when none is declared."""
    path = Path(path)
    with path.open("rb") as handle:
        kind = sniff(handle.read(32), path)
        if kind != "TIFF":
            with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return scan_header(kind, data, path).orientation
    return read_tiff_orientation(path)


def _read_bytes(path: Path) -> tuple[str, bytes]:
    """The format and, except for TIFF (which is read by parts), the whole content of a file."""
    with path.open("rb") as handle:
        kind = sniff(handle.read(32), path)
        handle.seek(0)
        return kind, b"" if kind == "TIFF" else handle.read()


def _decode(kind: str, data: bytes, header: Header, path: Path) -> np.ndarray:
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
                raise animated(path)
            picture.load()
            if indices and picture.mode in ("1", "L", "P"):
                return np.array(picture, np.uint8)
            return np.array(picture.convert("L" if picture.mode in ("1", "L") else "RGB"))
    except ImageError:
        raise
    except DECODE_ERRORS as error:
        raise ImageError(
            f"{path} is damaged or truncated: its {kind} pixels could not be decoded ({error}); expected a complete "
            "file: copy or export it again"
        ) from error


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
        return read_tiff_image(path)
    header = scan_header(kind, data, path)
    if kind == "GIF" or (kind == "BMP" and header.palette) or (kind == "JPEG" and header.channels == 4):
        image = _decode_pillow(kind, data, path, indices=False)
    else:
        image = _decode(kind, data, header, path)
    image = upright(image, header.orientation)
    return image[..., None] if image.ndim == 2 else image


def read_valid(path: Path) -> np.ndarray | None:
    """Read which pixels of a GeoTIFF hold data.

    Returns:
        (H, W) bool, False where every band equals the nodata value of tag 42113; None when the file declares none.
    """
    path = Path(path)
    with path.open("rb") as handle:
        if sniff(handle.read(32), path) != "TIFF":
            return None
    return read_tiff_valid(path)


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
        return _to_labels(_one_channel(read_tiff_values(path), path), path)
    header = scan_header(kind, data, path)
    if header.palette or (kind == "JPEG" and header.channels == 4):
        mask = _decode_pillow(kind, data, path, indices=True)
    else:
        mask = _decode(kind, data, header, path)
        if header.bits < 8:  # grey PNG of 1, 2 or 4 bits, which the decoder spreads over 0..255
            mask //= 255 // (2**header.bits - 1)
    mask = upright(mask, header.orientation)
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
        with atomic_write(path) as handle:
            write_tiff(handle, image)
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
        with atomic_write(path) as handle:
            write_tiff(handle, mask[..., None])
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
        (C, H, W) float32. That of a picture (uint8, up to 4 channels) lies in memory as the picture does, channels
        last, which PyTorch's channels-last networks take without a copy.

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
    if image.dtype == np.uint8 and channels <= 4:  # the same arithmetic, done once for each of the 256 values
        table = (np.arange(256, dtype=np.float32)[:, None] - shift) / scale
        return cv2.LUT(image, table[None]).reshape(image.shape).transpose(2, 0, 1)
    result = np.empty((channels, height, width), np.float32)
    for c in range(channels):
        result[c] = image[..., c]
        result[c] -= shift[c]
        result[c] /= scale[c]
    return result
