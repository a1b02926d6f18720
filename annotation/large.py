"""Pictures too large to be held at once: annotated window by window, with the files and the record of any other.

Label map and mask are TIFF files, tiled as slides are. They are made in .annotate/<stem>.work/; then the record is
written that names them, and they are put in place. What belongs to single objects (rows, run lengths, outlines) is made
as the objects end, so memory follows the width of the picture and the number of objects, not the height.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from annotation.doubts import flags_of, summarise_objects
from annotation.edits import EDITED, follow_gt
from annotation.encoding import encode, write_quickly, yolo_text
from annotation.engines import Engines
from annotation.files import OVERLAY_SIDE
from annotation.instances import ROW_COLUMNS, Instances, number_instances
from annotation.merging import agreement
from annotation.overlays import overlay, panel
from annotation.placing import put_image
from annotation.records import RECORDS, VERSION, FileOptions, LabelFile, digest_file, look_up, read_record
from annotation.tiled import TiledFiles, TiledResult, TileOptions, annotate_tiled, sample_picture
from annotation.tiled_rows import ObjectCounts, ObjectRows
from geojson import GeoJsonWriter
from image_io import file_stem, write_text
from polygons import trace_bands
from regions import Band, Bands
from slide_io import Grid, Slide, open_slide
from slide_masks import MaskOptions, MaskSource, Raster, open_mask

SUFFIX = ".tif"
MARGINS = 256, 1024  # pixels of a window around its core, least and most
SIZES_AROUND = 2  # typical objects that the watershed looks at beyond an object

Progress = Callable[[int, int], None]


@dataclass
class _Work:
    """One large picture in the making.

    Attributes:
        states: what there is of gt and labels.
        edited: reads what a person edited; None where engines look at the picture.
        columns: of the table of objects.
        engine: what looks at the windows.
    """

    options: FileOptions
    path: Path
    stem: str
    digests: tuple[str, str]  # of the image and the settings
    previous: Mapping[str, Any] | None
    states: dict[str, LabelFile]
    slide: Slide
    grid: Grid
    edited: "_EditedLabels | None" = None
    engine: "_Looker | None" = None
    columns: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in ROW_COLUMNS})
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where files in the making are."""
        return self.options.folder / RECORDS / f"{self.stem}.work"

    def take_rows(self, rows: list[dict[str, Any]]) -> None:
        """Add objects to the table."""
        for name, column in self.columns.items():
            column.extend(row[name] for row in rows)


def annotate_large(
    options: FileOptions,
    path: Path,
    engines: Engines,
    settings: str,
    image_digest: str,
    *,
    max_decoded_gb: float = 4.0,
    tiles: TileOptions | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Annotate a picture window by window, and write what files.write_image_files writes.

    What is automatic is chosen once, from parts of the picture. Labels and gt that a person edited stay, and
    everything else follows them, as files.write_edited says. In the record, engines are the objects of each in the
    result, and seconds those of this run.

    Args:
        options: what and where.
        path: the picture: an image or a slide.
        engines: with their networks.
        settings: digest of the settings.
        image_digest: of the file. A run that was killed goes on when both digests are the same.
        max_decoded_gb: of a file that can only be decoded at once.
        tiles: the windows; None: as fits the engines.
        progress: called with windows done and windows in all.

    Returns:
        The record without objects, and as `damage` the messages about what could not be decoded; objects are missing
        there.

    Raises:
        ImageError: the picture or an edited file cannot be read.
        JobError: another process works on this picture.
        OSError: a file cannot be written.
    """
    stem = file_stem(path)
    previous = read_record(options, stem)
    states = {kind: look_up(options, kind, stem, previous) for kind in ("gt", "labels")}
    with ExitStack() as stack:
        slide = stack.enter_context(open_slide(path, max_decoded_gb=max_decoded_gb))
        work = _Work(options, path, stem, (image_digest, settings), previous, states, slide, slide.grid())
        if any(state.edited for state in states.values()):
            work.edited = _EditedLabels(work, max_decoded_gb)
            stack.callback(work.edited.close)
        else:
            work.engine = _Looker(_fix(engines, work.grid))
        _run(work, tiles, progress)
    return work.record


def _run(work: _Work, tiles: TileOptions | None, progress: Progress | None) -> None:
    """Look at all windows, or at those of the edited file, and write everything."""
    windows: Any
    engine: Any
    if work.edited is not None:
        windows, engine, margin = work.edited, work.edited.find, MARGINS[0]
        digest = " ".join(str(state.digest) for state in work.states.values())
    else:
        assert work.engine is not None
        windows, engine, margin = work.grid, work.engine, _choose_margin(work.engine.engines)
        digest = " ".join(work.digests)
    labels, gt = (work.folder / f"{kind}{SUFFIX}" for kind in ("labels", "gt"))
    annotate_tiled(
        windows,
        engine,
        tiles or TileOptions(margin=margin),
        TiledFiles(labels, gt, work.folder, work.options.gap),
        digest=digest,
        take_rows=None if work.edited else work.take_rows,
        progress=progress,
        complete=lambda result, bands: _complete(work, result, bands),
    )
    for unused in (labels, gt):
        unused.unlink(missing_ok=True)
    with suppress(OSError):
        work.folder.rmdir()


def _fix(engines: Engines, grid: Grid) -> Engines:
    """Choose what is automatic from a sample; what is no limit there is none in the picture either."""
    sample = sample_picture(grid)
    fixed = engines.fixed(sample)
    most = sample.shape[0] * sample.shape[1]
    if engines.options.watershed.max_area is not None or fixed.options.watershed.max_area != most:
        return fixed
    watershed = replace(fixed.options.watershed, max_area=grid.height * grid.width)
    return fixed.changed(replace(fixed.options, watershed=watershed))


def _choose_margin(engines: Engines) -> int:
    """So much that what the watershed sees around an object is what it sees in the whole picture."""
    size = engines.options.watershed.size if "watershed" in engines.options.parts else 0
    return int(np.clip(SIZES_AROUND * (size or 0), *MARGINS))


class _Looker:
    """The engines as annotate_tiled calls them.

    Attributes:
        seconds: that they took.
    """

    def __init__(self, engines: Engines) -> None:
        self.engines, self.seconds = engines, 0.0
        self._agreements: list[tuple[float, int]] = []

    def __call__(self, image: np.ndarray) -> Instances:
        begin = time.perf_counter()
        found, parts = self.engines.find(image)
        self.seconds += time.perf_counter() - begin
        shared = agreement(list(parts.values()))
        if shared is not None:
            self._agreements.append((shared, max(map(len, parts.values()))))
        return found

    def agreement(self) -> float | None:
        """Share of objects that engines share, over the windows of this run; None for one engine."""
        if not self._agreements:
            return None
        shares, weights = np.array(self._agreements).T
        return round(float(np.average(shares, weights=weights)), 6)


# ----------------------------------------------------------------------------------------------------------------------
# Edited files


class _EditedLabels:
    """Edited labels, or an edited gt and the labels before, as a grid whose windows are values (h, w, 1 or 2) uint32.

    Of labels each 4-connected piece is an object; a gt is followed as edits.follow_gt does, window by window.
    """

    damage: tuple[str, ...] = ()

    def __init__(self, work: _Work, max_decoded_gb: float) -> None:
        self.height, self.width = work.grid.height, work.grid.width
        self._gap = (work.previous or {}).get("made", work.options.made)["gap"]
        labels, gt = work.states["labels"], work.states["gt"]
        self.has_labels = labels.edited or gt.path is None
        paths = [labels.path] if self.has_labels else [gt.path, labels.path]
        raster, how = Raster(self.height, self.width, 1.0), MaskOptions(max_decoded_gb=max_decoded_gb)
        self._masks: list[MaskSource] = []
        try:
            for path in paths:
                if path is not None:
                    self._masks.append(open_mask(path, work.stem, work.slide, raster, how))
        except BaseException:
            self.close()
            raise

    def read(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Values of a window."""
        return np.stack([mask.read(top, left, height, width).astype(np.uint32) for mask in self._masks], axis=2)

    def valid(self, *_: int) -> None:
        """Everywhere."""

    def find(self, values: np.ndarray) -> Instances:
        """The objects of a window."""
        if self.has_labels:
            return number_instances(values[..., 0], 1.0, EDITED, pieces="all")
        before = values[..., 1] if values.shape[2] > 1 else None
        followed = follow_gt(values[..., 0], before, self._gap)
        return number_instances(followed, 1.0, EDITED, pieces="all")

    def close(self) -> None:
        """Close the files."""
        for mask in self._masks:
            mask.close()


def _keep_scores(columns: dict[str, list[Any]], previous: Mapping[str, Any] | None, size: tuple[int, int]) -> None:
    """Objects that the record holds pixel by pixel keep the engine and the score they have there, in place."""
    if previous is None or previous["size"] != list(size):
        return
    rows = previous["table"]
    known = dict(zip(rows["counts"], zip(rows["engine"], rows["score"], strict=True), strict=True))
    for place, counts in enumerate(columns["counts"]):
        if counts in known:
            columns["engine"][place], columns["score"][place] = known[counts]


# ----------------------------------------------------------------------------------------------------------------------
# What follows from the label map


class _Survey:
    """Looks at the bands of a label map, in order.

    Attributes:
        counts: run lengths of the objects.
        touching: whether each object touches another, (n + 1,) bool.
        shown: the label map at the size of an overlay, (h, w) int32.
    """

    def __init__(self, height: int, width: int, count: int) -> None:
        self.step = -(-max(height, width) // OVERLAY_SIDE)
        self.counts = [""] * count
        self.touching = np.zeros(count + 1, bool)
        rows, columns = (_sampled(length, self.step) for length in (height, width))
        self.shown = np.zeros((len(rows), len(columns)), np.int32)
        self._rows, self._columns = rows, columns
        self._encoder = ObjectCounts(height, width, count)
        self._above = np.zeros((0, width), np.uint32)

    def add(self, top: int, labels: np.ndarray) -> None:
        """Take the next band (h, W) uint32."""
        for number, text in zip(*self._encoder.add(top, labels), strict=True):
            self.counts[number - 1] = text
        for one, other in (
            (labels[:, 1:], labels[:, :-1]),
            (labels[1:], labels[:-1]),
            (labels[:1], self._above if len(self._above) else labels[:1]),
        ):
            meet = (one != other) & (one > 0) & (other > 0)
            self.touching[one[meet]] = self.touching[other[meet]] = True
        self._above = labels[-1:].copy()
        first, end = np.searchsorted(self._rows, [top, top + len(labels)])
        self.shown[first:end] = labels[self._rows[first:end] - top][:, self._columns]

    def show_small(self, columns: Mapping[str, list[Any]]) -> None:
        """Show objects that lie between the pixels of an overlay too, as one pixel each."""
        count = len(self.touching) - 1
        seen = np.zeros(count + 1, bool)
        seen[self.shown] = True
        places = [np.array(columns[f"centroid_{axis}"], np.float64).astype(np.int64) // self.step for axis in "yx"]
        row, column = (np.minimum(place, side - 1) for place, side in zip(places, self.shown.shape, strict=True))
        missing = np.flatnonzero(~seen[1:])
        self.shown[row[missing], column[missing]] = missing + 1
        if count:
            self.shown[row[-1], column[-1]] = count  # whatever came over it: panels tell the count by it


def _sampled(length: int, step: int) -> np.ndarray:
    """The rows or columns that an overlay shows: the middle ones of each step, as many as Slide.grid(reduce) has."""
    return np.minimum(np.arange(max(1, int(length / step + 0.5))) * step + step // 2, length - 1)


def _complete(work: _Work, result: TiledResult, bands: Bands) -> None:
    """Write everything, the label map and the mask last."""
    options, size = work.options, (result.height, result.width)
    survey = _Survey(*size, result.objects)
    for top, labels in _look(work, bands(), result.objects):
        survey.add(top, labels)
    columns = work.columns
    ids = columns["id"] if work.edited and work.edited.has_labels else None
    columns["counts"] = survey.counts
    if work.edited:
        _keep_scores(columns, work.previous, size)
    survey.show_small(columns)
    if options.geojson or "segment" in options.yolo or "polygons" in options.coco:
        _trace(work, bands())
    if ids is None:
        assert columns["id"] == list(range(1, result.objects + 1))
    summary = summarise_objects(
        columns, np.array(columns["score"], np.float64), int(survey.touching.sum()), size[0] * size[1]
    )
    _write_record(work, size, summary, list(work.grid.damage))
    outlines = options.yolo == "segment"
    write_quickly(options.place("yolo", work.stem), yolo_text(columns, size, outlines=outlines).encode())
    _draw(work, survey)
    _put_in_place(work)


def _look(work: _Work, bands: Iterable[Band], count: int) -> Iterator[Band]:
    """Pass bands on; the table is in order at the end, and that of edited labels made here."""
    made = work.edited
    values = np.zeros(count + 1, np.int64)
    measure = ObjectRows(np.ones(count + 1, np.float32), ("", *[EDITED] * count))
    for top, labels in bands:
        if made is not None:
            pixels = work.grid.read(top, 0, *labels.shape)
            work.take_rows(measure.add(top, labels, pixels, last=top + len(labels) == work.grid.height))
            if made.has_labels:
                values[labels] = made.read(top, 0, *labels.shape)[..., 0]
        yield top, labels
    order = np.argsort(work.columns["id"]).tolist()
    for name, column in work.columns.items():
        work.columns[name] = [column[place] for place in order]
    if made is not None and made.has_labels:
        work.columns["id"] = values[1:].tolist()


def _trace(work: _Work, bands: Iterable[Band]) -> None:
    """Outlines of the objects as columns and as GeoJSON."""
    options, columns = work.options, work.columns
    kept = "segment" in options.yolo or "polygons" in options.coco
    outlines: list[Any] = [None] * len(columns["id"])
    holes = [False] * len(outlines)
    with ExitStack() as stack:
        writer = None
        if options.geojson:
            place = options.place("geojson", work.stem)
            place.parent.mkdir(parents=True, exist_ok=True)
            writer = stack.enter_context(GeoJsonWriter(place))
        for polygon in trace_bands(bands):
            if writer is not None:
                score = float(columns["score"][polygon.label - 1])
                writer.write(polygon, "object", measurements={"Area px^2": polygon.area, "Score": round(score, 4)})
            if kept:
                outlines[polygon.label - 1] = polygon.exterior[:-1].reshape(-1).tolist()
                holes[polygon.label - 1] = bool(polygon.holes)
    if kept:
        columns["outline"], columns["holes"] = outlines, holes


def _write_record(work: _Work, size: tuple[int, int], summary: Mapping[str, Any], damage: list[str]) -> None:
    """Write the record of the files as they will be; see files.write_image_files."""
    written, edited = {}, {}
    for kind, state in work.states.items():
        old = [state.digest] if state.digest and not state.edited else []
        made = work.folder / f"{kind}{SUFFIX}"
        written[kind] = [] if state.edited else [*old, digest_file(made)]
        edited[kind] = state.digest if state.edited else None
    labels, nothing = work.states["labels"], np.zeros((1, 1, 1), np.uint8)
    engines = {} if work.engine is None else _count_engines(work.engine.engines, work.columns["engine"])
    work.record |= {
        "version": VERSION,
        "stem": work.stem,
        "image": put_image(work.options, work.path, nothing, work.digests[0], work.previous),
        "label_file": labels.path.name if labels.edited and labels.path else f"{work.stem}{SUFFIX}",
        "image_digest": work.digests[0],
        "settings": work.digests[1],
        "made": work.options.made,
        "kinds": work.options.kinds,
        "written": written,
        "edited": edited,
        "size": list(size),
        "seconds": round(work.engine.seconds, 4) if work.engine else 0.0,
        "engines": engines,
        **(work.engine.engines.chosen if work.engine else {}),
        "agreement": work.engine.agreement() if work.engine else None,
        **summary,
        "damage": damage,
    }
    work.record["flags"] = flags_of(work.record)
    write_text(work.options.record(work.stem), json.dumps({**work.record, "table": work.columns}, ensure_ascii=False))


def _count_engines(engines: Engines, names: list[str]) -> dict[str, int]:
    if len(engines.options.names) == 1:
        return {engines.options.names[0]: len(names)}
    counted = Counter(names)
    return {name: counted[name] for name in engines.options.names}


def _draw(work: _Work, survey: _Survey) -> None:
    """Overlay and panel at a size that programs open."""
    options = work.options
    if not options.overlays and not options.panels:
        return
    grid = work.slide.grid(reduce=float(survey.step))
    image = grid.read(0, 0, grid.height, grid.width)
    if image.shape[:2] != survey.shown.shape:  # a stored level can be rounded otherwise
        image = cv2.resize(image, survey.shown.shape[::-1], interpolation=cv2.INTER_AREA)
        image = image.reshape(*survey.shown.shape, -1)
    if options.overlays:
        drawn = cv2.cvtColor(overlay(image, survey.shown), cv2.COLOR_RGB2BGR)
        write_quickly(options.place("overlays", work.stem), encode(drawn))
    if options.panels:
        names = [EDITED] if work.engine is None else work.engine.engines.options.names
        caption = {1: names[0], 2: "both"}.get(len(names), "all")
        page = panel(image, {caption: survey.shown})
        write_quickly(options.place("panels", work.stem), encode(cv2.cvtColor(page, cv2.COLOR_RGB2BGR)))


def _put_in_place(work: _Work) -> None:
    """Move what was made to its place; what lies there of the stem in other formats goes."""
    for kind, state in work.states.items():
        kept = state.path
        if not state.edited:
            kept = work.options.folder / kind / f"{work.stem}{SUFFIX}"
            kept.parent.mkdir(parents=True, exist_ok=True)
            (work.folder / f"{kind}{SUFFIX}").replace(kept)
        for path in (state.path, *state.stale):
            if path is not None and path != kept:
                path.unlink(missing_ok=True)
