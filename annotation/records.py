"""The record of each annotated image: what was written, so that a later run knows what is done and what was edited.

<folder>/.annotate/<stem>.json holds digests of the image and the settings, of gt and labels as they were written, and
what the tables are made of. It is written before the files and names them as they will be, so whatever a kill leaves
behind, a file that is neither of these nor of those before was edited by somebody.
"""

import contextlib
import hashlib
import json
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from image_headers import ImageError
from image_io import IMAGE_SUFFIXES
from spool import FolderLock

RECORDS = ".annotate"
VERSION = 1  # of records
SUFFIXES = {"yolo": ".txt", "overlays": ".png", "panels": ".png", "geojson": ".geojson"}


@dataclass(frozen=True)
class FileOptions:
    """What is written for each image, and where.

    Attributes:
        folder: the output; with its images/ and gt/ a data set for training.
        copy: copy the images; otherwise they are relative links, or copies where links are refused.
        mm_per_pixel: adds columns in millimetres to objects.csv.
        overlays: write overlays/.
        panels: write panels/.
        geojson: write geojson/, which QuPath opens.
        gap: pixels between objects in gt, see gap_mask.
        coco: how annotations.json says masks; objects with holes are run lengths even so.
        yolo: text for a detector, or the outlines for a segmenter.
        decimal: sign in csv files.
    """

    folder: Path
    copy: bool = False
    mm_per_pixel: float | None = None
    overlays: bool = True
    panels: bool = False
    geojson: bool = False
    gap: int = 1
    coco: Literal["rle", "polygons"] = "rle"
    yolo: Literal["detect", "segment"] = "detect"
    decimal: Literal["comma", "dot"] = "comma"

    @property
    def made(self) -> dict[str, Any]:
        """What a record's files must have been made with to be taken as done."""
        return {"gap": self.gap, "coco": self.coco, "yolo": self.yolo}

    def record(self, stem: str) -> Path:
        """Path of the record of an image."""
        return self.folder / RECORDS / f"{stem}.json"

    def place(self, kind: str, stem: str) -> Path:
        """Path of a file of an image in overlays, panels, yolo or geojson."""
        return self.folder / kind / f"{stem}{SUFFIXES[kind]}"

    @property
    def kinds(self) -> list[str]:
        """The folders with a file for each image, besides gt and labels."""
        return ["yolo", *(kind for kind in ("overlays", "panels", "geojson") if getattr(self, kind))]


@contextlib.contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Keep other commands from writing labels into an output: each would take what the other wrote for a person's work.

    Raises:
        JobError: another process writes there.
        OSError: it cannot be written to.
    """
    records = folder / RECORDS
    records.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(records)
    try:
        yield
    finally:
        lock.release(remove=True)
        with contextlib.suppress(OSError):  # it holds something
            records.rmdir()


def list_label_files(folder: Path, kind: str, stem: str) -> list[Path]:
    """The files of gt/ or labels/ that belong to an image, in all formats that can be read."""
    paths = (folder / kind / f"{stem}{suffix}" for suffix in (*IMAGE_SUFFIXES, ".ome.tif"))
    return [path for path in paths if path.is_file() and path.stat().st_size]  # a crash can leave empty files


def digest_file(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_record(options: FileOptions, stem: str) -> dict[str, Any] | None:
    """The record of an image with its objects; None when there is none that can be read."""
    try:
        record = json.loads(options.record(stem).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("version") == VERSION else None


def list_records(options: FileOptions) -> Iterator[dict[str, Any]]:
    """The records of all images of the output, by stem, without their objects."""
    for path in sorted((options.folder / RECORDS).glob("*.json")):
        record = read_record(options, unicodedata.normalize("NFC", path.stem))
        if record:
            yield brief(record)


def brief(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without its objects, of some hundred bytes."""
    return {name: value for name, value in record.items() if name != "table"}


@dataclass(frozen=True)
class LabelFile:
    """The gt or the labels of an image.

    Attributes:
        path, digest: of the file there is, None without one.
        edited: whether a person made it what it is.
        stale: files of the same stem in other formats, which no person made.
    """

    path: Path | None = None
    digest: str | None = None
    edited: bool = False
    stale: tuple[Path, ...] = ()


def look_up(options: FileOptions, kind: str, stem: str, record: Mapping[str, Any] | None) -> LabelFile:
    """What there is of gt or labels.

    Raises:
        ImageError: a person made several files for one image.
    """
    mine: list[tuple[Path, str]] = []
    theirs: list[tuple[Path, str]] = []
    for path in list_label_files(options.folder, kind, stem):
        digest = digest_file(path)
        written = record is not None and digest != record["edited"][kind] and digest in record["written"][kind]
        (mine if written else theirs).append((path, digest))
    if len(theirs) > 1:
        names = " and ".join(path.name for path, _ in theirs)
        raise ImageError(f"{options.folder / kind} holds {names}; expected one file for each image: remove the others")
    if not theirs and not mine:
        return LabelFile()
    (path, digest), *rest = theirs + mine
    return LabelFile(path, digest, bool(theirs), tuple(path for path, _ in rest))


def is_edited(options: FileOptions, stem: str) -> bool:
    """Whether a person made or changed gt or labels of an image, so that neither may be written by an engine."""
    record = read_record(options, stem)
    return any(look_up(options, kind, stem, record).edited for kind in ("gt", "labels"))


def is_done(options: FileOptions, stem: str, image_digest: str, settings_digest: str) -> bool:
    """Whether all files of an image are there, made of this image with these settings, or taken in after an edit."""
    record = read_record(options, stem)
    if record is None or (record["image_digest"], record["settings"]) != (image_digest, settings_digest):
        return False
    if record["made"] != options.made or not set(options.kinds) <= set(record.get("kinds", ())):  # others are older
        return False
    for kind in ("gt", "labels"):
        state = look_up(options, kind, stem, record)
        if state.digest is None or state.digest not in (record["written"][kind][-1:] + [record["edited"][kind]]):
            return False
    here = (options.folder / "images" / record["image"]).exists()
    return here and all(options.place(kind, stem).is_file() for kind in options.kinds)
