"""Images and slides on disk: found by names, folders and globs, and measured by their headers."""

import glob
import warnings
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from image_io import IMAGE_SUFFIXES
from pairing import SLIDE_SUFFIXES
from slide_io import open_slide

PILLOW_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")


def list_pictures(words: Sequence[str], more: Sequence[str] = ()) -> list[Path]:
    """Images and slides behind file names, folders and globs, in order of name within each.

    Args:
        more: suffixes that count in folders too, in lower case.

    Raises:
        FileNotFoundError: a word stands for nothing.
    """
    found: list[Path] = []
    suffixes = (*IMAGE_SUFFIXES, *SLIDE_SUFFIXES, *more)
    for word in map(str, words):
        path = Path(word).expanduser()
        if path.is_dir():
            inside = [item for item in path.iterdir() if item.suffix.lower() in suffixes and item.name[0] != "."]
        elif path.exists():
            inside = [path]
        else:
            inside = [Path(item) for item in glob.glob(str(path), recursive=True)]  # noqa: PTH207 - may be absolute
        files = [item for item in inside if item.is_file()]
        if not inside and not glob.has_magic(str(path)) and not path.is_dir():
            raise FileNotFoundError(f"{word} does not exist; expected an image, a slide, a folder or a glob")
        if not files:
            what = f"the folder {path} holds" if path.is_dir() else f"{word} names"
            raise FileNotFoundError(f"{what} no image or slide; expected files such as *.png, *.tif or *.svs")
        found += sorted(files, key=lambda item: item.name)
    first: dict[Path, Path] = {}
    for path in found:
        first.setdefault(path.resolve(), path)
    return list(first.values())


def count_pixels(path: Path) -> int:
    """Pixels of an image, from its header alone; 0 when it cannot be read, which is said when its turn comes."""
    try:
        if path.suffix.lower() in PILLOW_SUFFIXES:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of large pictures, which are welcome
                with Image.open(path) as picture:
                    return picture.width * picture.height
        with open_slide(path) as slide:
            return slide.height * slide.width
    except Image.DecompressionBombError:
        return 2 * (Image.MAX_IMAGE_PIXELS or 0)  # at least that many
    except (OSError, ValueError, RuntimeError):
        return 0
