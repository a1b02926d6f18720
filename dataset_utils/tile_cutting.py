"""Cut the tiles of a slide, one row of the grid of tiles at a time: the work that processes share."""

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread

import cv2
import numpy as np

import tissue
from dataset_utils.tile_masks import Annotation, LabelRule, TileMask
from image_io import ImageError, write_image, write_mask
from slide_io import Grid, Slide, open_slide

ANNOTATED, EMPTY, NO_TISSUE, NO_DATA, UNREADABLE = "annotated", "empty", "no tissue", "no data", "unreadable"
AHEAD = 3  # rows that wait for each process


@dataclass(frozen=True)
class CutOptions:
    """How slides are cut.

    size and step: side of a tile and distance of neighbours, in pixels of the grid. reduce, level or mpp: its scale.
    tissue: "saturation", "otsu" or "none"; a tile without annotation needs more than min_tissue pixels of it.
    write_empty: write tiles without annotation right away; else they are only listed. dry_run: write nothing.
    """

    size: int
    step: int
    reduce: float | None = None
    level: int | None = None
    mpp: float | None = None
    tissue: str = "saturation"
    min_tissue: int = 200
    rule: LabelRule = LabelRule()
    predecessor: bool = False
    write_empty: bool = True
    dry_run: bool = False
    max_decoded_gb: float = 4.0


@dataclass(frozen=True)
class Job:
    """One slide: its file, its annotation and the folder that gets the tiles."""

    name: str
    path: Path
    mask: Annotation
    folder: Path
    options: CutOptions


@dataclass(frozen=True)
class Layout:
    """Where the tiles of a slide lie; `rows` and `columns` are their corners in pixels of the grid.

    height, width: of the grid. scale: level-0 pixels for each pixel of it. suffix: of the image files.
    """

    job: Job
    height: int
    width: int
    scale: float
    mpp: float | None
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    suffix: str

    def corner(self, row: int, column: int) -> tuple[float, float]:
        """Level-0 x and y of a tile's corner."""
        return self.columns[column] * self.scale, self.rows[row] * self.scale

    def extent(self) -> tuple[int, int]:
        """Height and width of each tile: the side, or what there is of a smaller slide."""
        return min(self.job.options.size, self.height), min(self.job.options.size, self.width)

    @cached_property
    def folders(self) -> tuple[str, str]:
        """Names of the folders of images and masks."""
        if self.job.options.predecessor:
            tail = f"_{self.job.options.size}_red{self.scale:.6g}"
            return f"images{tail}", f"masks{tail}"
        return "images", "gt"

    def files(self, row: int, column: int) -> tuple[Path, Path]:
        """The image and the mask of a tile."""
        if self.job.options.predecessor:
            name = f"{self.job.name}_{row * len(self.columns) + column}red{self.scale:.6g}"
        else:
            x, y = self.corner(row, column)
            name = f"{self.job.name}_x{round(x)}_y{round(y)}"
        images, masks = (self.job.folder / folder for folder in self.folders)
        return images / f"{name}{self.suffix}", masks / f"{name}.png"


@dataclass(frozen=True)
class Tile:
    """What became of a tile: kind is one of the words above; tissue in pixels; labels: value to pixels of the mask."""

    row: int
    column: int
    kind: str
    tissue: int
    labels: dict[int, int]


@dataclass
class RowResult:
    """The tiles of a row; findings are damaged parts and shapes that cannot be used, error ends the slide."""

    name: str
    row: int
    tiles: list[Tile] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    error: str | None = None


@dataclass(frozen=True)
class Task:
    """A row to look at; or, with `columns`, the tiles in it that are to be written whatever they hold."""

    layout: Layout
    row: int
    columns: tuple[int, ...] | None = None


def plan_origins(length: int, size: int, step: int) -> tuple[int, ...]:
    """Where tiles begin along an axis; the last one is moved in, so that it ends with the axis."""
    return tuple(min(at, max(0, length - size)) for at in range(0, max(1, length - size + step), step))


def plan_slide(job: Job) -> Layout:
    """Lay the tiles of a slide.

    Raises:
        ImageError: not a slide, or it has no such scale.
        OSError: it cannot be read.
    """
    options = job.options
    with open_slide(job.path, max_decoded_gb=options.max_decoded_gb) as slide:
        grid = _grid(slide, options)
        plain = grid.channels in (1, 3) and grid.dtype.kind == "u"
        return Layout(
            job,
            grid.height,
            grid.width,
            grid.scale,
            grid.mpp,
            plan_origins(grid.height, options.size, options.step),
            plan_origins(grid.width, options.size, options.step),
            ".png" if plain else ".tif",
        )


def _grid(slide: Slide, options: CutOptions, fill: float = 0.0) -> Grid:
    return slide.grid(reduce=options.reduce, level=options.level, mpp=options.mpp, fill=fill)


# ----------------------------------------------------------------------------------------------------------------------
# In a worker process


class OpenSlide:
    """A slide with its annotation, open for cutting."""

    def __init__(self, job: Job) -> None:
        """Open both.

        Raises:
            ImageError: one of them cannot be used; OSError: or read.
        """
        options = job.options
        self.options = options
        self.slide = open_slide(job.path, max_decoded_gb=options.max_decoded_gb)
        self.grid = _grid(self.slide, options)
        if options.tissue == "saturation" and (self.grid.channels < 3 or self.grid.dtype.kind == "f"):
            what = f"{self.grid.channels} channel(s)" if self.grid.channels < 3 else "real numbers"
            raise ImageError(f"{job.path} has {what} and no saturation; use --tissue otsu or --tissue none")
        self.mask = TileMask(job.mask, self.slide, self.grid, options.rule, options.max_decoded_gb)
        self.tissue = tissue.find_tissue(self.slide, self.grid, "otsu") if options.tissue == "otsu" else None

    def findings(self) -> list[str]:
        """Damage seen so far and what of the annotation is not used."""
        return [*self.grid.damage, *self.mask.findings]

    def is_damaged(self, window: tuple[int, int, int, int], pixels: np.ndarray, valid: np.ndarray | None) -> bool:
        """Whether pixels of a window could not be decoded; those that hold no data are no damage."""
        if valid is None or not self.grid.damage:
            return False
        top = 1.0 if self.grid.dtype.kind == "f" else float(np.iinfo(self.grid.dtype).max)
        return not np.array_equal(pixels, _grid(self.slide, self.options, top).read(*window))

    def count_tissue(self, window: tuple[int, int, int, int], pixels: np.ndarray, valid: np.ndarray | None) -> int:
        """Pixels of tissue in a window that hold data."""
        if self.options.tissue == "saturation":
            inside = tissue_pixels(pixels)
        elif self.tissue is not None:
            inside = _cut_thumbnail(self.tissue, window)
        else:
            inside = np.ones(pixels.shape[:2], bool)
        return int(np.count_nonzero(inside if valid is None else inside & valid))


def tissue_pixels(pixels: np.ndarray) -> np.ndarray:
    """Where pixels (H, W, C >= 3) uint8 or uint16 are coloured and not black: (H, W) bool."""
    rgb = np.ascontiguousarray(tissue.to_eight_bits(pixels[..., :3]))
    saturation = cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV)[..., 1]
    return (saturation > tissue.SATURATION) & (rgb.max(axis=2) > tissue.SATURATION)


def _cut_thumbnail(found: tissue.Tissue, window: tuple[int, int, int, int]) -> np.ndarray:
    """The thumbnail's tissue in a window of the grid, (height, width) bool."""
    top, left, height, width = window
    rows = (2 * np.arange(top, top + height) + 1) * found.mask.shape[0] // (2 * found.height)
    columns = (2 * np.arange(left, left + width) + 1) * found.mask.shape[1] // (2 * found.width)
    return found.mask[np.ix_(rows, columns)]


_LAST: dict[Job, OpenSlide | str] = {}  # the slide of this process, or why it cannot be opened


def close_last() -> None:
    """Close the slide that this process has open."""
    for opened in _LAST.values():
        if isinstance(opened, OpenSlide):
            opened.slide.close()
            opened.mask.close()
    _LAST.clear()


def cut_row(task: Task) -> RowResult:
    """Look at a row of tiles and write those that are kept; what fails is told, not raised."""
    job = task.layout.job
    result = RowResult(job.name, task.row)
    if job not in _LAST:
        close_last()
        try:
            _LAST[job] = OpenSlide(job)
        except (OSError, ValueError) as error:
            _LAST[job] = str(error)
    opened = _LAST[job]
    if isinstance(opened, str):
        result.error = opened
        return result
    try:
        for column in range(len(task.layout.columns)) if task.columns is None else task.columns:
            result.tiles.append(_cut_tile(task, opened, column, result.findings))
    except (OSError, ImageError) as error:
        result.error = str(error)
    result.findings = list(dict.fromkeys([*opened.findings(), *result.findings]))
    return result


def _cut_tile(task: Task, opened: OpenSlide, column: int, findings: list[str]) -> Tile:
    layout, options = task.layout, task.layout.job.options
    window = (layout.rows[task.row], layout.columns[column], *layout.extent())
    pixels, valid = opened.grid.read(*window), opened.grid.valid(*window)
    try:
        labels, annotated = opened.mask.read(*window)
    except ImageError as error:
        findings.append(str(error))
        return Tile(task.row, column, UNREADABLE, 0, {})
    if opened.is_damaged(window, pixels, valid):
        return Tile(task.row, column, UNREADABLE, 0, {})
    count = opened.count_tissue(window, pixels, valid)
    kind = ANNOTATED if annotated else EMPTY if count > options.min_tissue else NO_TISSUE
    if kind != ANNOTATED and valid is not None and not valid.any():
        kind = NO_DATA
    wanted = kind == ANNOTATED or (kind == EMPTY and (options.write_empty or task.columns is not None))
    if wanted and not options.dry_run:
        image, mask = layout.files(task.row, column)
        write_mask(mask, labels)
        write_image(image, pixels)
    counts = np.bincount(labels.ravel())
    return Tile(task.row, column, kind, count, {int(v): int(counts[v]) for v in np.flatnonzero(counts) if v})


def cut_rows(tasks: Iterable[Task], workers: int, cut: Callable[[Task], RowResult] = cut_row) -> Iterator[RowResult]:
    """Do tasks in their order, with so many processes; 0 and 1 stay in this one.

    Tasks are asked for when their turn comes, so later ones may depend on earlier results.
    """
    if workers < 2:
        try:
            yield from map(cut, tasks)
        finally:
            close_last()
        return
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start_worker)
    waiting: deque[Future[RowResult]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(cut, task))
            if len(waiting) >= AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        with suppress(KeyboardInterrupt):
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """One thread; Ctrl-C is the parent's to handle, and a parent that was killed takes its workers with it."""
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
