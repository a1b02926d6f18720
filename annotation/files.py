"""The files of each annotated image, written so that a kill loses nothing and a person's work is never overwritten."""

import contextlib
import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

from annotation.coco import encode_objects, outlines_of
from annotation.doubts import flags_of, summarise
from annotation.edits import EDITED, follow_gt, keep_scores, values_of
from annotation.encoding import (
    encode,
    encode_labels,
    write_geojson,
    write_quickly,
    yolo_text,
)
from annotation.instances import ROW_COLUMNS, Instances, gap_mask, number_instances, object_rows
from annotation.merging import agreement
from annotation.overlays import overlay, panel
from annotation.placing import digest_image, put_image
from annotation.records import (
    RECORDS,
    VERSION,
    FileOptions,
    LabelFile,
    look_up,
    read_record,
)
from image_headers import ImageError
from image_io import atomic_write, file_stem, read_mask, write_text

LEFTOVER_SECONDS = 3600  # another run may be writing what is younger
OVERLAY_SIDE = 4096  # pixels of an overlay's longer side; of larger images every second pixel is shown, and so on


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
    chosen: dict[str, Any] = field(default_factory=dict)


def write_image_files(  # noqa: PLR0913 - what is known about one image
    options: FileOptions,
    path: Path,
    image: np.ndarray,
    found: Instances,
    parts: Mapping[str, Instances],
    settings_digest: str,
    seconds: float,
    *,
    image_digest: str | None = None,
    chosen: Mapping[str, Any] | None = None,
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
        chosen: what engines chose by themselves for this image, see Engines.chosen.

    Returns:
        The record without objects: see summarise, and image, stem, height, width, seconds, engines (objects of each),
        agreement, edited (digests of what a person made, or None), flags.

    Raises:
        OSError: a file cannot be written.
        ImageError: an edited file cannot be read or is of another size.
    """
    stem = file_stem(path)
    digest = image_digest or digest_image(path, image)
    previous = read_record(options, stem)
    states = {kind: look_up(options, kind, stem, previous) for kind in ("gt", "labels")}
    if any(state.edited for state in states.values()):
        return write_edited(options, path, image, settings_digest, image_digest=digest)
    maps = {name: part.labels for name, part in parts.items()}
    if len(parts) != 1:
        maps[{0: "objects", 2: "both"}.get(len(parts), "all")] = found.labels
    name = put_image(options, path, image, digest, previous)
    work = _Work(options, stem, name, image, found, states, maps)
    work.digests, work.seconds, work.parts = (digest, settings_digest), seconds, tuple(parts.values())
    work.chosen = dict(chosen or {})
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
    digest = image_digest or digest_image(path, image)
    name = put_image(options, path, image, digest, previous)
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
    options, found, size = work.options, work.found, work.found.labels.shape
    ours = {}
    if not work.states["gt"].edited:
        ours["gt"] = (".png", encode(gap_mask(found.labels, options.gap)))
    if not work.states["labels"].edited:
        ours["labels"] = encode_labels(found.labels, len(found))
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
        "kinds": options.kinds,
        "written": written,
        "edited": edited,
        "size": list(size),
        "seconds": round(work.seconds, 4),
        "engines": dict(engines),
        **work.chosen,
        "agreement": agreement(work.parts) if len(work.parts) > 1 else None,
        **summarise(found, objects),
    }
    record["flags"] = flags_of(record)
    write_text(options.record(work.stem), json.dumps({**record, "table": objects}, ensure_ascii=False))
    write_quickly(
        options.place("yolo", work.stem), yolo_text(objects, size, outlines=options.yolo == "segment").encode()
    )
    if options.overlays:
        step = -(-max(size) // OVERLAY_SIDE)
        drawn = overlay(work.image[::step, ::step], np.ascontiguousarray(found.labels[::step, ::step]))
        write_quickly(options.place("overlays", work.stem), encode(cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR)))
    if options.panels:
        page = cv2.cvtColor(panel(work.image, work.maps), cv2.COLOR_RGB2BGR)
        write_quickly(options.place("panels", work.stem), encode(page))
    if options.geojson:
        write_geojson(options.place("geojson", work.stem), found)
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
    files = {"labels": encode_labels(labels, int(labels.max(initial=0))), "gt": (".png", encode(gt))}
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


def _remove_others(before: LabelFile, kept: Path | None) -> None:
    for path in (before.path, *before.stale):
        if path is not None and path != kept:
            path.unlink(missing_ok=True)


def remove_leftovers(options: FileOptions) -> None:
    """Remove the half-written files of runs that were killed, when they are older than LEFTOVER_SECONDS."""
    oldest = time.time() - LEFTOVER_SECONDS
    for kind in (RECORDS, "images", "gt", "labels", *options.kinds, "."):
        for path in (options.folder / kind).glob(".*.tmp"):
            with contextlib.suppress(OSError):
                if path.lstat().st_mtime < oldest:
                    path.unlink()


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
