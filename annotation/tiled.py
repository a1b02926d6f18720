"""Engines over pictures larger than memory: window by window, objects joined at the borders, files written by rows.

Windows go through an engine and are stitched (stitching.py) into provisional numbers, which are spooled on the disk;
two more passes over the spool join the parts of objects, number them in reading order, measure them and write the
label map and the mask. Memory grows with width x tile and with the number of objects, not with the height.
"""

import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from annotation.automatic import sample_windows
from annotation.instances import Instances, Runs, empty_instances, find_runs, join_runs
from annotation.stitching import Parts, Stitcher, Window, plan_windows
from annotation.tiled_rows import ObjectRows
from image_io import atomic_write
from regions import Band, Bands, join_components
from slide_io import Grid
from slide_writer import Job, Layer, open_job

Engine = Callable[[np.ndarray], Instances]

STATE = "state.npz"  # of a run, beside the spool
FORMAT = 2  # raised when the same windows give other objects
BAND_PIXELS = 1 << 24  # looked at together in the passes over the spool


@dataclass(frozen=True)
class TileOptions:
    """How a picture is cut into windows.

    Attributes:
        tile: side of the cores that part the picture, in pixels, a multiple of 16.
        margin: pixels of the picture around a core that the engine sees too. Objects smaller than this come out as
            they do from the whole picture, as far as the engine decides about them by what is near.
        workers: windows in work at once; engines that leave Python's lock (OpenCV, ONNX Runtime) gain.
    """

    tile: int = 2048
    margin: int = 256
    workers: int = 1

    def __post_init__(self) -> None:
        if self.tile < 16 or self.tile % 16 or not 0 <= self.margin <= self.tile or self.workers < 1:
            raise ValueError(
                f"tiles of {self.tile} pixels with a margin of {self.margin} and {self.workers} workers; expected a "
                "multiple of 16, a margin of at most a tile and one worker or more"
            )


@dataclass(frozen=True)
class TiledFiles:
    """What is written.

    Attributes:
        labels: TIFF of uint32 numbers. mask: TIFF of uint8, 0 or 255.
        work: folder for files in between, about as large as the results; it is removed at the end.
        gap: pixels by which touching objects are parted in the mask.
    """

    labels: Path
    mask: Path
    work: Path
    gap: int = 0


@dataclass(frozen=True)
class TiledResult:
    """What came out: size of the picture, objects, pixels in objects, messages about what could not be decoded."""

    height: int
    width: int
    objects: int
    covered: int
    damage: list[str]


def sample_picture(grid: Grid) -> np.ndarray:
    """A part of a picture at full resolution, (h, w, C), on which an engine's options are chosen once for all windows.

    It is what the watershed engine chooses by when it gets the picture whole, see automatic.sample_windows.
    """
    return sample_windows(grid.height, grid.width, grid.read)


def annotate_tiled(
    grid: Grid,
    engine: Engine,
    options: TileOptions,
    files: TiledFiles,
    *,
    digest: str = "",
    take_rows: Callable[[list[dict[str, Any]]], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    complete: Callable[[TiledResult, Bands], None] | None = None,
) -> TiledResult:
    """Annotate a picture of any size.

    Args:
        grid: the picture at the scale that is wanted, see slide_io.
        engine: called with windows (h, w, C); its options are fixed, see sample_picture.
        options: the windows.
        files: the results.
        digest: of the picture, the engine and its options; with one, a run that was killed goes on with the row of
            windows that was in work. Without one it begins anew.
        take_rows: gets the rows of the objects (see instances.object_rows) in portions, as the objects end.
        progress: called with windows done and windows in all.
        complete: called when both files are there, with the result and the bands of the label map (h, W) uint32. What
            a run needs to go on is removed afterwards.

    Raises:
        SlideError: the picture cannot be read.
        JobError: another process uses the working folder.
        OSError: a file cannot be written; results of an earlier run stay as they were.
    """
    with ExitStack() as stack:
        key = f"{FORMAT} {options.tile} {options.margin} {digest}" if digest else ""
        draft, state = _open_draft(files.work / "draft", key, grid)
        stack.callback(draft.close)
        spool = _Spool(draft, Stitcher(grid.height, grid.width, options.tile, options.margin), key, state)
        parts = _draw_draft(grid, engine, options, spool, progress)
        bands = _portions(draft, "draft", grid.width)
        joined = join_parts(bands, parts)
        final = stack.enter_context(_open_anew(files.work / "final", "", grid, {"labels": np.uint32, "mask": np.uint8}))
        numbered = _measured(label_parts(bands, joined), grid, joined, take_rows)
        covered = 0
        for _, labels, mask in mask_bands(numbered, joined.areas, files.gap):
            covered += int(np.count_nonzero(labels))
            final.append({"labels": labels, "mask": mask})
        for name, path in (("labels", files.labels), ("mask", files.mask)):
            final.finish(name, path, kind="tiff")
        result = TiledResult(grid.height, grid.width, len(joined), covered, list(grid.damage))
        if complete is not None:
            complete(result, _portions(final, "labels", grid.width))
        final.remove()
        (files.work / "draft" / STATE).unlink(missing_ok=True)
        draft.remove()
    with suppress(OSError):
        files.work.rmdir()
    return result


def _open(folder: Path, key: str, grid: Grid, kinds: dict[str, Any]) -> Job:
    layers = [Layer(name, grid.height, grid.width, 1, kind, "nearest", pyramid=False) for name, kind in kinds.items()]
    return open_job(folder, key, layers)


def _open_anew(folder: Path, key: str, grid: Grid, kinds: dict[str, Any]) -> Job:
    """A job without what a killed run left of it."""
    _open(folder, key, grid, kinds).remove()
    return _open(folder, key, grid, kinds)


# ----------------------------------------------------------------------------------------------------------------------
# Windows


def _open_draft(folder: Path, key: str, grid: Grid) -> tuple[Job, dict[str, np.ndarray] | None]:
    """The job of provisional numbers, and the state in which a run with the same key left it."""
    kinds = {"draft": np.uint32}
    job = _open(folder, key, grid, kinds)
    try:
        with np.load(folder / STATE) as stored:
            state = dict(stored)
        if key and str(state["key"]) == key and int(state["start"]) <= job.rows_done:
            return job, state
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # none, or a damaged one
    job.close()
    return _open_anew(folder, key, grid, kinds), None


class _Spool:
    """Finished rows on their way from a stitcher to a job, noted so that a run that is killed can go on.

    Attributes:
        rows: of windows that are done.
    """

    def __init__(self, draft: Job, stitcher: Stitcher, key: str, state: dict[str, np.ndarray] | None) -> None:
        """With a state everything is brought to where it was."""
        self.stitcher, self.rows = stitcher, 0
        self._draft, self._key = draft, key
        self._start, self._unsafe = 0, np.zeros((0, stitcher.width), np.int32)  # rows that only the state has
        if state is not None:
            stitcher.restore(state)
            self.rows, self._start = int(state["rows"]), int(state["start"])
            self._take(state["unsafe"])

    def end_row(self, window: Window) -> None:
        """Take the rows that the last window of a row finished."""
        self._take(self.stitcher.end_row(window))
        self.rows += 1
        if self._key:
            with atomic_write(self._draft.folder / STATE) as handle:
                own = {"key": np.array(self._key), "rows": np.array(self.rows), "start": np.array(self._start)}
                known: dict[str, Any] = self.stitcher.state() | own | {"unsafe": self._unsafe}
                np.savez(handle, **known)

    def _take(self, rows: np.ndarray) -> None:
        first = self._start + len(self._unsafe)
        fresh = rows[max(0, self._draft.rows_done - first) :] if self._draft.rows_done > first else rows
        if len(fresh):
            self._draft.append({"draft": fresh.view(np.uint32)})
        self._unsafe = np.concatenate([self._unsafe, rows])
        safe = min(max(0, self._draft.rows_done - self._start), len(self._unsafe))
        self._unsafe, self._start = self._unsafe[safe:], self._start + safe


def _draw_draft(
    grid: Grid, engine: Engine, options: TileOptions, spool: _Spool, progress: Callable[[int, int], None] | None
) -> Parts:
    rows = plan_windows(grid.height, grid.width, options.tile, options.margin)
    windows = [window for row in rows[spool.rows :] for window in row]
    lasts = {id(row[-1]) for row in rows}
    total = len(rows) * len(rows[0])
    for number, (window, found) in enumerate(run_engine(grid, engine, windows, options.workers), start=1):
        spool.stitcher.add(window, found)
        if id(window) in lasts:
            spool.end_row(window)
        if progress is not None:
            progress(total - len(windows) + number, total)
    return spool.stitcher.parts()


def run_engine(
    grid: Grid, engine: Engine, windows: Iterable[Window], workers: int
) -> Iterator[tuple[Window, Instances]]:
    """The objects of each window in turn; windows are read here, and engines run in threads when there are several."""
    if workers == 1:
        for window in windows:
            yield window, _call(engine, window, *_read(grid, window))
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[tuple[Window, Future[Instances]]] = deque()
        try:
            for window in windows:
                waiting.append((window, pool.submit(_call, engine, window, *_read(grid, window))))
                if len(waiting) > workers:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def _read(grid: Grid, window: Window) -> tuple[np.ndarray, np.ndarray | None]:
    top, left, bottom, right = window.box
    place = top, left, bottom - top, right - left
    return grid.read(*place), grid.valid(*place)


def _call(engine: Engine, window: Window, pixels: np.ndarray, valid: np.ndarray | None) -> Instances:
    """Objects of a window; none where the file has no data."""
    if valid is not None and not valid.any():
        return empty_instances(*pixels.shape[:2])
    found = engine(pixels)
    if found.labels.shape != pixels.shape[:2]:
        raise ValueError(
            f"the engine gave labels of {found.labels.shape} for a window of {pixels.shape[:2]} pixels at row "
            f"{window.box[0]}, column {window.box[1]}; expected the same size"
        )
    if valid is not None:
        found = Instances(np.where(valid, found.labels, 0).astype(np.int32), found.scores, found.engines)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Parts to objects


def _portions(job: Job, name: str, width: int) -> Bands:
    """Bands of a spool in portions of BAND_PIXELS."""
    rows = max(1, BAND_PIXELS // width)

    def read() -> Iterator[Band]:
        for top, band in job.bands(name):
            for start in range(0, len(band), rows):
                yield top + start, band[start : start + rows]

    return read


@dataclass(frozen=True, eq=False)
class Joined:
    """Objects made of parts; entry 0 is the background.

    Attributes:
        group: object that each provisional number belongs to, before pieces are dropped: (parts + 1,) int32.
        joins: whether any two parts are one object.
        numbers: of each piece, in the order of the pass over the bands: (pieces + 1,) uint32, 0 for what is dropped.
        areas, scores, engines: of the objects 1..n, (n + 1,) each; engines are names.
    """

    group: np.ndarray
    joins: bool
    numbers: np.ndarray
    areas: np.ndarray
    scores: np.ndarray
    engines: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.areas) - 1


def join_parts(bands: Bands, parts: Parts) -> Joined:
    """Join the parts of objects and keep the largest 4-connected piece of each; numbers follow the first pixels.

    Args:
        bands: provisional numbers (h, W).
        parts: what stitching knows of them.
    """
    group = np.zeros(len(parts) + 1, np.int32)
    group[1:] = join_components(parts.pairs, len(parts)) + 1
    owners, areas, seams = [np.zeros(1, np.int64)], [np.zeros(1, np.int64)], [np.zeros((0, 2), np.int64)]
    count, above, above_ids = 0, np.zeros(0, np.int64), np.zeros(0, np.int64)
    for runs, pieces in _pieces(bands, group, joins=len(parts.pairs) > 0):
        number = int(pieces.max()) + 1
        owner = np.zeros(number, np.int64)
        owner[pieces] = runs.values
        for first in (True, False):
            row = (runs.rows == 0) if first else (runs.rows == runs.shape[0] - 1)
            values, ids = (np.repeat(each[row], runs.lengths[row]) for each in (runs.values, pieces + count + 1))
            if first and count:
                meet = (values == above) & (values > 0)
                seams.append(np.unique(np.stack([above_ids[meet], ids[meet]], axis=1), axis=0))
        above, above_ids = values, ids
        owners.append(owner)
        areas.append(np.bincount(pieces, runs.lengths, number).astype(np.int64))
        count += number
    owner, area = np.concatenate(owners), np.concatenate(areas)
    numbers, firsts, sizes = _keep_largest(owner, area, join_components(np.concatenate(seams), count))
    best = np.lexsort((parts.areas, group))  # the last of a group is its largest part
    lead = np.zeros(int(group.max()) + 1, np.int64)
    lead[group[best]] = best
    leads = lead[owner[firsts]]
    engines = ("", *(parts.engine_names[place] for place in parts.engines[leads[1:]].tolist()))
    return Joined(group, len(parts.pairs) > 0, numbers, sizes, parts.scores[leads], engines)


def _pieces(bands: Bands, group: np.ndarray, *, joins: bool) -> Iterator[tuple[Runs, np.ndarray]]:
    """The runs of the objects (or of the parts, where nothing is to be joined) of each band, and the piece of each."""
    for _, band in bands():
        labels = band.view(np.int32)
        labels = np.take(group, labels, mode="clip") if joins else labels
        runs = find_runs(labels)
        yield runs, join_runs(labels, runs)


def _keep_largest(owner: np.ndarray, area: np.ndarray, joined: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Final number of each piece, first piece and pixels of each object; entry 0 of all is the background.

    Args:
        owner: object of each piece, 0 for background. area: its pixels; (pieces + 1,) each with a 0 before.
        joined: which pieces hang together over the borders of bands, (pieces,).
    """
    whole = np.concatenate([[-1], joined])
    _, firsts, place = np.unique(whole, return_index=True, return_inverse=True)
    sizes = np.bincount(place, area).astype(np.int64)
    values = owner[firsts]
    order = np.lexsort((firsts, -sizes, values))
    best = np.ones(len(order), bool)
    best[1:] = values[order][1:] != values[order][:-1]
    kept = firsts[order[best]]
    kept = np.concatenate([[0], np.sort(kept[owner[kept] > 0])])
    numbers = np.zeros(len(owner), np.uint32)
    numbers[kept] = np.arange(len(kept))
    return numbers[firsts][place], kept, np.where(kept > 0, sizes[place[kept]], 0)


def label_parts(bands: Bands, joined: Joined) -> Iterator[Band]:
    """Final numbers (h, W) uint32 of the bands that join_parts saw."""
    count, top = 1, 0
    for runs, pieces in _pieces(bands, joined.group, joins=joined.joins):
        yield top, runs.paint(joined.numbers[pieces + count])
        count += int(pieces.max()) + 1
        top += runs.shape[0]


def _measured(
    bands: Iterable[Band],
    grid: Grid,
    joined: Joined,
    take_rows: Callable[[list[dict[str, Any]]], None] | None,
) -> Iterator[Band]:
    """Pass bands on, and the rows of the objects that end in them to take_rows."""
    table = ObjectRows(joined.scores, joined.engines)
    for top, labels in bands:
        if take_rows is not None:
            rows = table.add(top, labels, grid.read(top, 0, *labels.shape), last=top + len(labels) == grid.height)
            if rows:
                take_rows(rows)
        yield top, labels


def mask_bands(bands: Iterable[Band], areas: np.ndarray, gap: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """First row, labels and mask (0 or 255) of each band; objects that touch are parted by a gap.

    As instances.gap_mask: the larger object gives way by half of the gap, rounded up, the smaller by the rest. Pieces
    that a gap cuts off stay, and an object thinner than its share of the gap vanishes from the mask.

    Args:
        bands: labels (h, W) uint32. areas: of the objects, (n + 1,).
    """
    rank = np.zeros(len(areas), np.float32)
    rank[1 + np.argsort(areas[1:], kind="stable")] = np.arange(1, len(areas))
    above: np.ndarray | None = None  # the last rows before those that wait
    waiting: Band | None = None
    for band in bands:
        if waiting is not None:
            yield *waiting, _part(above, waiting[1], band[1][:gap], rank, gap)
            seen = waiting[1] if above is None else np.concatenate([above, waiting[1]])
            above = seen[max(0, len(seen) - gap) :]
        waiting = band
    if waiting is not None:
        yield *waiting, _part(above, waiting[1], waiting[1][:0], rank, gap)


def _part(above: np.ndarray | None, labels: np.ndarray, below: np.ndarray, rank: np.ndarray, gap: int) -> np.ndarray:
    mask = np.where(labels > 0, np.uint8(255), np.uint8(0))
    if not gap or not mask.any():
        return mask
    above = labels[:0] if above is None else above
    ranks = rank[np.concatenate([above, labels, below])]
    own = slice(len(above), len(above) + len(labels))
    larger, smaller = (np.ones((2 * radius + 1,) * 2, np.uint8) for radius in ((gap + 1) // 2, gap // 2))
    lowest = cv2.erode(np.where(ranks > 0, ranks, np.float32(len(rank))), larger)
    mask[(lowest < ranks)[own]] = 0
    if gap > 1:
        mask[(cv2.dilate(ranks, smaller) > ranks)[own]] = 0
    return mask
