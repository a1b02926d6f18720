"""The files of each annotated image, written so that a kill loses nothing and a person's work is never overwritten.

<folder>/.annotate/<stem>.json is the record of an image: digests of the image and the settings, of gt and labels as
they were written, and what the tables are made of. It is written before the files and names them as they will be, so
whatever a kill leaves behind, a file that is neither of these nor of those before was edited by somebody.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import unicodedata
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

from annotation.coco import encode_objects, outlines_of
from annotation.doubts import flags_of, summarise
from annotation.edits import EDITED, follow_gt, keep_scores, values_of
from annotation.instances import ROW_COLUMNS, Instances, gap_mask, number_instances, object_rows
from annotation.merging import agreement
from annotation.overlays import overlay, panel
from geojson import GeoJsonWriter
from image_headers import ImageError
from image_io import IMAGE_SUFFIXES, atomic_write, file_stem, read_mask, write_image, write_text
from polygons import trace_labels
from tiff_io import write_tiff

RECORDS = ".annotate"
VERSION = 1  # of records
SUFFIXES = {"yolo": ".txt", "overlays": ".png", "panels": ".png", "geojson": ".geojson"}
OVERLAY_SIDE = 4096  # pixels of an overlay's longer side; of larger images every second pixel is shown, and so on
PNG_LABELS = 65_535  # objects that a 16-bit label map holds


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
    if record["made"] != options.made:
        return False
    for kind in ("gt", "labels"):
        state = look_up(options, kind, stem, record)
        if state.digest is None or state.digest not in (record["written"][kind][-1:] + [record["edited"][kind]]):
            return False
    here = (options.folder / "images" / record["image"]).exists()
    return here and all(options.place(kind, stem).is_file() for kind in options.kinds)


# ----------------------------------------------------------------------------------------------------------------------
# Writing


@dataclass
class _Work:
    """The files of one image in the making."""

    options: FileOptions
    stem: str
    image_name: str
    image: np.ndarray
    found: Instances
    states: dict[str, LabelFile]
    maps: dict[str, np.ndarray] = field(default_factory=dict)  # of a panel
    ids: np.ndarray | None = None  # of the objects in the label file, when these are not 1..n
    digests: tuple[str, str] = ("", "")  # of the image and the settings
    seconds: float = 0.0
    parts: tuple[Instances, ...] = ()


def write_image_files(
    options: FileOptions,
    path: Path,
    image: np.ndarray,
    found: Instances,
    parts: Mapping[str, Instances],
    settings_digest: str,
    seconds: float,
    *,
    image_digest: str | None = None,
) -> dict[str, Any]:
    """Write everything about one image.

    Where a person edited gt or labels, these stay and everything else follows them, see write_edited.

    Args:
        options: what and where.
        path: the image's file; when there is none (a frame of a video) the image is written.
        image: (H, W, C) as read.
        found: its objects.
        parts: the objects of each engine before they were merged, for agreement and panels.
        settings_digest: of the settings of this run.
        seconds: that the engines took.
        image_digest: of the image; without it that of the file.

    Returns:
        The record without objects: see summarise, and image, stem, height, width, seconds, engines (objects of each),
        agreement, edited (digests of what a person made, or None), flags.

    Raises:
        OSError: a file cannot be written.
        ImageError: an edited file cannot be read or is of another size.
    """
    stem = file_stem(path)
    digest = image_digest or _digest(path, image)
    previous = read_record(options, stem)
    states = {kind: look_up(options, kind, stem, previous) for kind in ("gt", "labels")}
    if any(state.edited for state in states.values()):
        return write_edited(options, path, image, settings_digest, image_digest=digest)
    maps = {name: part.labels for name, part in parts.items()} | ({"together": found.labels} if len(parts) != 1 else {})
    name = _place_image(options, path, image, digest, previous)
    work = _Work(options, stem, name, image, found, states, maps)
    work.digests, work.seconds, work.parts = (digest, settings_digest), seconds, tuple(parts.values())
    return _write(work, engines={name: len(part) for name, part in parts.items()})


def write_edited(
    options: FileOptions, path: Path, image: np.ndarray, settings_digest: str, *, image_digest: str | None = None
) -> dict[str, Any]:
    """Make everything about an image anew from the gt or the labels that a person edited; these stay as they are.

    Edited labels give gt, unless that was edited too. An edited gt gives labels: what was added belongs to the object
    it touches or is a new one, what was removed is taken from its object, and an object cut in two becomes two. Each
    piece of a label is an object of its own. Objects that are as before keep engine and score, others have the
    engine EDITED and score 1.

    Args and errors: see write_image_files.
    """
    stem = file_stem(path)
    previous = read_record(options, stem)
    states = {kind: look_up(options, kind, stem, previous) for kind in ("gt", "labels")}
    ids = None
    if states["labels"].edited or states["gt"].path is None:
        if states["labels"].path is None:
            raise ImageError(f"{options.folder} holds no gt or labels of {stem!r}; expected a file that was edited")
        values = _read_labels(states["labels"].path, image)
        found = number_instances(values, 1.0, EDITED, pieces="all")
        ids = values_of(values, found)
    else:
        gt = _read_labels(states["gt"].path, image)
        before = None if states["labels"].path is None else _read_labels(states["labels"].path, image)
        found = number_instances(follow_gt(gt, before, (previous or {}).get("made", options.made)["gap"]), 1.0, EDITED)
    found = keep_scores(found, previous)
    digest = image_digest or _digest(path, image)
    name = _place_image(options, path, image, digest, previous)
    work = _Work(options, stem, name, image, found, states, {EDITED: found.labels}, ids)
    work.digests = (digest, settings_digest)
    return _write(work, engines={})


def _read_labels(path: Path, image: np.ndarray) -> np.ndarray:
    values = read_mask(path)
    if values.shape != image.shape[:2]:
        raise ImageError(
            f"{path} is {values.shape[1]} x {values.shape[0]} pixels, its image {image.shape[1]} x {image.shape[0]}; "
            "expected the same size: save it as large as the image, or remove it to have it made anew"
        )
    return values


def _write(work: _Work, engines: Mapping[str, int]) -> dict[str, Any]:
    """Write the record, then the files that it names, gt and labels last."""
    options, found = work.options, work.found
    ours = {}
    if not work.states["gt"].edited:
        ours["gt"] = (".png", _encode(gap_mask(found.labels, options.gap)))
    if not work.states["labels"].edited:
        ours["labels"] = _encode_labels(found.labels, len(found))
    written, edited = {}, {}
    for kind, state in work.states.items():
        old = [state.digest] if state.digest and not state.edited else []
        written[kind] = [*old, hashlib.sha256(ours[kind][1]).hexdigest()] if kind in ours else []
        edited[kind] = state.digest if state.edited else None
    objects = _objects(work)
    label_path = work.states["labels"].path
    record = {
        "version": VERSION,
        "stem": work.stem,
        "image": work.image_name,
        "label_file": f"{work.stem}{ours['labels'][0]}" if "labels" in ours or not label_path else label_path.name,
        "image_digest": work.digests[0],
        "settings": work.digests[1],
        "made": options.made,
        "written": written,
        "edited": edited,
        "size": list(found.labels.shape),
        "seconds": round(work.seconds, 4),
        "engines": dict(engines),
        "agreement": agreement(work.parts) if len(work.parts) > 1 else None,
        **summarise(found, objects),
    }
    record["flags"] = flags_of(record)
    write_text(options.record(work.stem), json.dumps({**record, "table": objects}, ensure_ascii=False))
    _write_quickly(options.place("yolo", work.stem), _yolo_text(work, objects).encode())
    if options.overlays:
        step = -(-max(found.labels.shape) // OVERLAY_SIDE)
        drawn = overlay(work.image[::step, ::step], np.ascontiguousarray(found.labels[::step, ::step]))
        _write_quickly(options.place("overlays", work.stem), _encode(cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR)))
    if options.panels:
        page = cv2.cvtColor(panel(work.image, work.maps), cv2.COLOR_RGB2BGR)
        _write_quickly(options.place("panels", work.stem), _encode(page))
    if options.geojson:
        _write_geojson(options.place("geojson", work.stem), found)
    for kind, (suffix, data) in ours.items():
        _put(options, kind, work.stem, suffix, data, work.states[kind])
    for kind, state in work.states.items():
        if kind not in ours:
            _remove_others(state, state.path)
    return record


def store_edited(
    options: FileOptions, stem: str, labels: np.ndarray, gt: np.ndarray, made: Literal["gt", "labels"]
) -> None:
    """Put labels and gt of an image in place that a person made elsewhere; an edited file there is kept aside.

    It goes to <folder>/.annotate/replaced/.

    Args:
        options: where.
        stem: of the image.
        labels: (H, W) label map, values of any size.
        gt: (H, W) uint8, 0 and 255.
        made: which of the two the person made, and which follows from it.
    """
    record = read_record(options, stem)
    kind = np.uint16 if labels.max(initial=0) <= PNG_LABELS else np.uint32
    suffix, data = (".png", _encode(labels.astype(kind))) if kind == np.uint16 else (".tif", _encode_tiff(labels))
    files = {"labels": (suffix, data), "gt": (".png", _encode(gt))}
    states = {name: look_up(options, name, stem, record) for name in files}
    digests = {name: hashlib.sha256(content).hexdigest() for name, (_, content) in files.items()}
    for name, state in states.items():
        if state.path and state.edited and state.digest != digests[name]:
            _keep_aside(options, name, state)
    if record is not None:
        for name, state in states.items():
            record["edited"][name] = digests[name] if name == made else None
            record["written"][name] = [] if name == made else [*([state.digest] if state.digest else []), digests[name]]
        write_text(options.record(stem), json.dumps(record, ensure_ascii=False))
    for name, (suffix, content) in files.items():
        _put(options, name, stem, suffix, content, states[name])


def _keep_aside(options: FileOptions, kind: str, state: LabelFile) -> None:
    """Copy a file that somebody made, before another takes its place."""
    assert state.path is not None and state.digest is not None
    path = options.folder / RECORDS / "replaced" / kind / f"{state.path.stem}.{state.digest[:8]}{state.path.suffix}"
    with atomic_write(path) as file:
        file.write(state.path.read_bytes())


def _put(options: FileOptions, kind: str, stem: str, suffix: str, data: bytes, before: LabelFile) -> None:
    """Write gt or labels; what lies there in other formats goes."""
    path = options.folder / kind / f"{stem}{suffix}"
    with atomic_write(path) as file:
        file.write(data)
    _remove_others(before, path)


def _write_quickly(path: Path, data: bytes) -> None:
    """Write a file that can be made again, whole or not at all, but without waiting for the disk."""
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(error.errno, f"{error.strerror or error}; nothing was saved here", str(path)) from error


def _remove_others(before: LabelFile, kept: Path | None) -> None:
    for path in (before.path, *before.stale):
        if path is not None and path != kept:
            path.unlink(missing_ok=True)


def _encode(array: np.ndarray) -> bytes:
    """A PNG, grey or BGR; OpenCV's own settings are near the fastest and the smallest for masks and for pictures."""
    written, data = cv2.imencode(".png", array)
    if not written:
        raise ImageError(f"an array of shape {array.shape} could not be encoded as PNG; expected fewer pixels")
    return data.tobytes()


def _encode_labels(labels: np.ndarray, count: int) -> tuple[str, bytes]:
    """Suffix and content of a label file: PNG of 16 bits, or TIFF of 32 when there are more objects."""
    if count <= PNG_LABELS:
        return ".png", _encode(labels.astype(np.uint16))
    return ".tif", _encode_tiff(labels)


def _encode_tiff(labels: np.ndarray) -> bytes:
    data = io.BytesIO()
    write_tiff(data, labels.astype(np.uint32)[..., None])
    return data.getvalue()


def _objects(work: _Work) -> dict[str, list[Any]]:
    """Columns of the object table, and the run lengths and outlines of the objects."""
    rows = object_rows(work.found, work.image)
    columns: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in ROW_COLUMNS}
    if work.ids is not None:
        columns["id"] = work.ids.tolist()
    columns["counts"] = encode_objects(work.found.labels)
    if "segment" in work.options.yolo or "polygons" in work.options.coco:
        columns["outline"], columns["holes"] = outlines_of(work.found.labels)
    return columns


def _yolo_text(work: _Work, objects: Mapping[str, list[Any]]) -> str:
    """A line for each object: class, then centre and size of the box, or the outline; in shares of the image."""
    height, width = work.found.labels.shape
    if work.options.yolo == "segment":
        return "".join(f"0 {_shares(outline, height, width)}\n" for outline in objects["outline"])
    boxes = zip(*(objects[f"box_{side}"] for side in ("left", "top", "width", "height")), strict=True)
    return "".join(
        f"0 {(x + w / 2) / width:.6f} {(y + h / 2) / height:.6f} {w / width:.6f} {h / height:.6f}\n"
        for x, y, w, h in boxes
    )


def _write_geojson(path: Path, found: Instances) -> None:
    """The outlines of the objects as QuPath reads them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with GeoJsonWriter(path) as writer:
        for polygon in trace_labels(found.labels.view(np.uint32)):
            score = float(found.scores[polygon.label - 1])
            writer.write(polygon, "object", measurements={"Area px^2": polygon.area, "Score": round(score, 4)})


def _shares(outline: list[int], height: int, width: int) -> str:
    """An outline x, y, x, y, ... without its steps, at most a pixel beside it, in shares of the image."""
    points = np.array(outline, np.int32).reshape(-1, 1, 2)
    plain = cv2.approxPolyDP(points, 1.0, True)
    shares = (plain if len(plain) > 2 else points)[:, 0] / (width, height)
    return " ".join(f"{value:.6f}" for value in shares.reshape(-1).tolist())


def _digest(path: Path, image: np.ndarray) -> str:
    """Digest of an image's file, or of its pixels when it has none."""
    return digest_file(path) if path.exists() else hashlib.sha256(image.tobytes()).hexdigest()


def _place_image(
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
    if target.is_file() and not target.is_symlink() and not target.samefile(path):
        if digest_file(target) == digest:
            return target.name
        if not previous or not _is_ours(target, previous["image_digest"]):
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
