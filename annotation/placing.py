"""The images of a data set of labels: links to where they are, or copies."""

import hashlib
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from annotation.records import FileOptions, digest_file
from image_headers import ImageError
from image_io import file_stem, write_image


def digest_image(path: Path, image: np.ndarray) -> str:
    """Digest of an image's file, or of its pixels when it has none."""
    return digest_file(path) if path.exists() else hashlib.sha256(image.tobytes()).hexdigest()


def put_image(
    options: FileOptions, path: Path, image: np.ndarray, digest: str, previous: Mapping[str, Any] | None
) -> str:
    """Put an image into images/ and take an older one of another name away; its name there."""
    folder = options.folder / "images"
    folder.mkdir(parents=True, exist_ok=True)
    is_png = image.dtype != np.float32 and image.shape[2] in (1, 3)
    target = folder / (path.name if path.exists() else f"{file_stem(path)}{'.png' if is_png else '.tif'}")
    old = folder / previous["image"] if previous else target
    if previous and old != target and _is_ours(old, previous["image_digest"]):
        old.unlink()
    if not path.exists():
        write_image(target, image)
        return target.name
    if target.is_file() and not target.samefile(path):
        same = digest_file(target) == digest
        if same and not target.is_symlink():
            return target.name
        if not same and not (previous and _is_ours(target, previous["image_digest"])):
            raise ImageError(
                f"{target} is another image than {path}; expected no file of this name, or the same image: give "
                "another output folder"
            )
    place_image(path, target, copy=options.copy)
    return target.name


def _is_ours(path: Path, digest: str) -> bool:
    """Whether a file of images/ is a link, or the copy that was made of the image with this digest."""
    return path.is_symlink() or (path.is_file() and digest_file(path) == digest)


def place_image(path: Path, target: Path, *, copy: bool = False) -> None:
    """Make target a relative link to an image, or a copy of it where that is wanted or links are refused; atomically.

    A target that is the image itself stays.
    """
    if target.exists() and target.samefile(path) and not (copy and target.is_symlink()):
        return
    temporary = target.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        if not copy:
            try:
                temporary.symlink_to(os.path.relpath(path.resolve(), target.parent.resolve()))
                temporary.replace(target)
                return
            except (OSError, NotImplementedError):
                temporary.unlink(missing_ok=True)
        shutil.copy2(path, temporary)
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, f"{error.strerror or error}; the image was not put here", str(target)) from error
