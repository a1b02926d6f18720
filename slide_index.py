"""Where a slide has tissue and where each class lies: found once, kept in the cache, asked for places.

The index of a class counts its pixels in cells of CELL x CELL; the mask of one cell is then read to find a pixel. So a
pixel is drawn uniformly from all of its class, whatever the form of the mask, and memory grows with the annotated area.
"""

import hashlib
import json
import math
import os
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from classes import ClassMap
from image_io import IGNORE_INDEX, atomic_write, cache_dir
from pairing import Pair
from slide_windows import BAND_ROWS, SlideOptions, SlidePair, encode_values
from tissue import Tissue, find_tissue

INDEX_VERSION = 1
CELL = 128  # pixels of a side; BAND_ROWS is a multiple
OPEN_SLIDES = 8  # that a process keeps open
_BROKEN = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
)  # of damaged .npz


@dataclass(frozen=True)
class ClassCells:
    """The cells that hold pixels of a class, numbered in reading order, and how many pixels are in them and before."""

    cells: np.ndarray  # (n,) int64
    ends: np.ndarray  # (n,) int64, running sum of the counts

    @property
    def pixels(self) -> int:
        """All pixels of the class."""
        return int(self.ends[-1]) if len(self.ends) else 0


def _state(path: Path) -> list[object]:
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def _place(kind: str, paths: Sequence[Path], *more: object) -> Path:
    """Where something about these files is kept."""
    words = json.dumps([INDEX_VERSION, *map(_state, paths), *more], default=str)
    return cache_dir() / "slides" / f"{kind}-{hashlib.sha256(words.encode()).hexdigest()[:24]}.npz"


def _keep(path: Path, arrays: dict[str, np.ndarray]) -> None:
    try:
        with atomic_write(path) as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    except OSError:
        return  # a read-only home only means that it is found anew


def slide_tissue(slide: SlidePair, rule: str) -> Tissue | None:
    """Tissue of an open slide by a rule of tissue.RULES, from the cache if it is there; None for the rule "none".

    Raises:
        ImageError: see tissue.find_tissue.
    """
    if rule == "none":
        return None
    options = slide.options
    path = _place("tissue", [slide.pair.image], options.mpp, options.reduction, rule)
    try:
        with np.load(path) as saved:
            return Tissue(saved["mask"], slide.height, slide.width)
    except _BROKEN:
        found = find_tissue(slide.slide, slide.grids[0], rule)
        _keep(path, {"mask": found.mask})
        return found


def class_cells(slide: SlidePair, classes: ClassMap) -> list[ClassCells]:
    """Where each class index lies on an open slide, from the cache if it is there; pixels count as in training.

    Raises:
        ImageError, DatasetError: the mask cannot be read, or holds what no class takes.
    """
    pair, options = slide.pair, slide.options
    assert pair.mask is not None
    paths = [*pair.layers, pair.mask, *([pair.roi] if pair.roi else [])]
    path = _place("cells", paths, pair.name, options.mpp, options.reduction, classes)
    names = range(len(classes.names))
    try:
        with np.load(path) as saved:
            return [ClassCells(saved[f"cells{k}"], saved[f"ends{k}"]) for k in names]
    except _BROKEN:
        found = _count_cells(slide, classes)
        _keep(path, {f"{part}{k}": getattr(found[k], part) for k in names for part in ("cells", "ends")})
        return found


def _count_cells(slide: SlidePair, classes: ClassMap) -> list[ClassCells]:
    assert slide.mask is not None
    across, wanted = math.ceil(slide.width / CELL), range(int(classes.has_background), len(classes.names))
    cells: list[list[np.ndarray]] = [[] for _ in classes.names]
    counts: list[list[np.ndarray]] = [[] for _ in classes.names]
    for top, values, outside in slide.bands():
        labels = encode_values(slide.mask, values, classes, slide.pair)
        if outside is not None:
            labels[outside] = IGNORE_INDEX
        for k in wanted:
            inside = labels == k
            if not inside.any():
                continue
            by_column = np.add.reduceat(inside, np.arange(0, slide.width, CELL), axis=1, dtype=np.int32)
            found = np.add.reduceat(by_column, np.arange(0, len(labels), CELL), axis=0).ravel()
            some = np.flatnonzero(found)
            cells[k].append(some + top // CELL * across)
            counts[k].append(found[some])
    none = np.zeros(0, np.int64)
    return [
        ClassCells(np.concatenate([none, *cells[k]]), np.cumsum(np.concatenate([none, *counts[k]])))
        for k in range(len(classes.names))
    ]


assert BAND_ROWS % CELL == 0


class SlidePlaces:
    """Draws places on one open slide: a pixel of a class, or a pixel of tissue.

    Args:
        classes: None: nothing is labelled, the slide need not have a mask.
    """

    def __init__(self, slide: SlidePair, classes: ClassMap | None) -> None:
        self.slide, self.classes = slide, classes
        self.cells = [] if classes is None else class_cells(slide, classes)
        self.tissue = slide_tissue(slide, slide.options.tissue)

    def draw_class(self, wanted: int, rng: np.random.Generator) -> tuple[int, int] | None:
        """Row and column of a pixel of a class, each as likely as the others; None: there is none."""
        assert self.classes is not None
        index = self.cells[wanted]
        if not index.pixels:
            return None
        number = int(rng.integers(index.pixels))
        at = int(np.searchsorted(index.ends, number, side="right"))
        row, column = divmod(int(index.cells[at]), math.ceil(self.slide.width / CELL))
        top, left = row * CELL, column * CELL
        window = top, left, min(CELL, self.slide.height - top), min(CELL, self.slide.width - left)
        labels = self.slide.labels(self.classes, *window)
        outside = self.slide.outside(*window)
        if outside is not None:
            labels[outside] = IGNORE_INDEX
        before = int(index.ends[at - 1]) if at else 0
        place = int(np.flatnonzero(labels == wanted)[number - before])
        return top + place // labels.shape[1], left + place % labels.shape[1]

    def corner(self, size: tuple[int, int], wanted: int | None, rng: np.random.Generator) -> tuple[int, int]:
        """Upper left corner of a random window that holds a pixel of class `wanted`, else one of tissue."""
        place = draw_tissue(self.tissue, rng) if wanted is None else self.draw_class(wanted, rng)
        return draw_corner((self.slide.height, self.slide.width), size, place, rng)


def draw_tissue(tissue: Tissue | None, rng: np.random.Generator) -> tuple[int, int] | None:
    """Row and column of a pixel of tissue; None: the whole slide counts, or none of it is tissue."""
    if tissue is None or not tissue.mask.any():
        return None
    shape = tissue.mask.shape
    rows = np.cumsum(tissue.mask.sum(axis=1))
    number = int(rng.integers(rows[-1]))
    row = int(np.searchsorted(rows, number, side="right"))
    column = int(np.flatnonzero(tissue.mask[row])[number - (int(rows[row - 1]) if row else 0)])
    return _draw_under(row, shape[0], tissue.height, rng), _draw_under(column, shape[1], tissue.width, rng)


def draw_corner(
    size: tuple[int, int], side: tuple[int, int], place: tuple[int, int] | None, rng: np.random.Generator
) -> tuple[int, int]:
    """Upper left corner of a random window of `side` (height, width) that holds a place, if given.

    The window lies inside the slide of `size`; where the slide is smaller, the slide lies inside the window.
    """
    corner = []
    for axis in (0, 1):
        low, high = min(0, size[axis] - side[axis]), max(0, size[axis] - side[axis])
        if place is not None:
            low, high = max(low, place[axis] - side[axis] + 1), min(high, place[axis])
        corner.append(int(rng.integers(low, high + 1)))
    return corner[0], corner[1]


def _draw_under(number: int, count: int, size: int, rng: np.random.Generator) -> int:
    """One of the pixels of the grid that a pixel of the thumbnail stands for; see Tissue.rows."""
    first, end = (min(max(-(-(2 * size * n - count) // (2 * count)), 0), size) for n in (number, number + 1))
    return int(rng.integers(first, end)) if end > first else min(first, size - 1)


_OPEN: OrderedDict[tuple[Pair, SlideOptions, ClassMap | None], SlidePlaces] = OrderedDict()
_OWNER = [0]  # the process that opened them: a forked one shares no file positions with its parent


def open_places(pair: Pair, options: SlideOptions, classes: ClassMap | None, fill: Sequence[float] = ()) -> SlidePlaces:
    """The slide of a pair, opened on first use in this process; the OPEN_SLIDES used last stay open."""
    if _OWNER[0] != os.getpid():
        _OPEN.clear()
        _OWNER[0] = os.getpid()
    key = (pair, options, classes)
    if key in _OPEN:
        _OPEN.move_to_end(key)
        return _OPEN[key]
    while len(_OPEN) >= OPEN_SLIDES:
        _OPEN.popitem(last=False)[1].slide.close()
    _OPEN[key] = SlidePlaces(SlidePair(pair, options, fill), classes)
    return _OPEN[key]


def close_places() -> None:
    """Close what this process keeps open."""
    while _OPEN:
        _OPEN.popitem()[1].slide.close()


def prepare_slides(pairs: Sequence[Pair], options: SlideOptions, classes: ClassMap | None) -> list[str]:
    """Find tissue and classes of every slide before training begins; return what a user should know.

    Raises:
        ImageError: a slide cannot be used any more.
    """
    warnings = []
    for pair in pairs:
        with SlidePair(pair, options) as slide:
            places = SlidePlaces(slide, classes)
        if places.tissue is not None and not places.tissue.mask.any():
            warnings.append(f"{pair.image} shows no tissue by the {options.tissue} rule: windows come from all of it")
    return warnings
