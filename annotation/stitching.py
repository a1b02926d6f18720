"""Objects of overlapping windows -> one label map without seams, each object once.

A picture is parted into cores; a window is a core with a margin around it. Every object that ends inside a window and
reaches its core is painted whole, by the first window that has it, over the borders of cores; what other windows say
about the same pixels is dropped. So an object smaller than the margin comes from one window and is never cut. An object
that goes on beyond its window is painted in the core alone and joined to what the neighbours see of it in the overlap.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from annotation.instances import Instances, find_runs, join_runs

REACH = 8  # part of the margin by which objects may miss the core, for windows do not agree to the pixel
SAME = 0.5  # of its pixels that an object must share with another to be the same
NOT_SMALLER = 0.25  # of an object's pixels that another must have to be taken for the same

Box = tuple[int, int, int, int]  # top, left, bottom, right in the picture


@dataclass(frozen=True)
class Window:
    """A core and the window around it, as boxes in the picture."""

    core: Box
    box: Box

    def local(self, box: Box) -> tuple[slice, slice]:
        """A box of the picture inside this window's array."""
        return slice(box[0] - self.box[0], box[2] - self.box[0]), slice(box[1] - self.box[1], box[3] - self.box[1])


def plan_windows(height: int, width: int, tile: int, margin: int) -> list[list[Window]]:
    """Windows of a picture row by row; cores of tile x tile pixels part it, the last ones may be smaller."""
    rows = []
    for top in range(0, height, tile):
        bottom = min(top + tile, height)
        row = []
        for left in range(0, width, tile):
            core = top, left, bottom, min(left + tile, width)
            row.append(Window(core, grow(core, margin, height, width)))
        rows.append(row)
    return rows


def grow(box: Box, pixels: int, height: int, width: int) -> Box:
    """A box grown on all sides, inside the picture."""
    top, left, bottom, right = box
    return max(0, top - pixels), max(0, left - pixels), min(height, bottom + pixels), min(width, right + pixels)


def common(one: Box, other: Box) -> Box | None:
    """What two boxes share, or None."""
    box = max(one[0], other[0]), max(one[1], other[1]), min(one[2], other[2]), min(one[3], other[3])
    return box if box[0] < box[2] and box[1] < box[3] else None


@dataclass(eq=False)
class Parts:
    """What stitching knows of the provisional objects; entry 0 is the background.

    Attributes:
        scores: (n + 1,) float32. areas: pixels that were painted, (n + 1,) int64.
        engines: index into engine_names, (n + 1,) int32.
        pairs: (m, 2) int64 numbers of parts of one object.
    """

    scores: np.ndarray
    areas: np.ndarray
    engines: np.ndarray
    pairs: np.ndarray
    engine_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.scores) - 1


def no_parts() -> Parts:
    """The background alone."""
    return Parts(np.zeros(1, np.float32), np.zeros(1, np.int64), np.zeros(1, np.int32), np.zeros((0, 2), np.int64))


class Stitcher:
    """Takes the objects of windows in the order of plan_windows and gives finished rows of provisional numbers.

    Attributes:
        top: first row of the picture that was not given out yet.
        canvas: provisional numbers of the rows from there, (h, W) int32.
        above: (box, numbers) where the last row of windows cut objects off that go on downwards.
    """

    def __init__(self, height: int, width: int, tile: int, margin: int) -> None:
        """The picture and its windows, in pixels. Memory: (tile + 2 margin) x width x 4 bytes, twice while rows end."""
        self.height, self.width, self.margin = height, width, margin
        self.top = 0
        self._parts = [no_parts()]
        self._count = 0
        self.canvas = np.zeros((min(height, tile + 2 * margin), width), np.int32)
        self._beside: list[tuple[Box, np.ndarray]] = []  # objects that go on to the right
        self.above: list[tuple[Box, np.ndarray]] = []
        self._below: list[tuple[Box, np.ndarray]] = []

    def parts(self) -> Parts:
        """What is known of the objects so far."""
        if len(self._parts) > 1:
            each = self._parts
            names = tuple(dict.fromkeys(name for part in each for name in part.engine_names))
            places = {name: place for place, name in enumerate(names)}
            engines = [np.array([places[name] for name in part.engine_names] or [0])[part.engines] for part in each]
            joined = Parts(
                np.concatenate([part.scores for part in each]),
                np.concatenate([part.areas for part in each]),
                np.concatenate(engines).astype(np.int32),
                np.concatenate([part.pairs for part in each]),
                names,
            )
            self._parts = [joined]
        return self._parts[0]

    def add(self, window: Window, found: Instances) -> None:
        """Take the objects of the next window.

        Args:
            found: labels as large as the window.
        """
        labels, count = found.labels, len(found)
        if not count:
            self._beside = []
            return
        cut = self._cut_off(window, labels, count)
        target, painted = self._choose(window, labels, cut)
        top, left, bottom, right = window.box
        below = self.canvas[top - self.top : bottom - self.top, left:right]
        wanted = np.bincount(target.ravel(), minlength=count + 1)
        covered = below > 0
        there, here = below[covered], target[covered]
        gained = wanted - np.bincount(here, minlength=count + 1)
        pairs = self._partners(window, labels, cut)
        joined = np.zeros(count + 1, bool)
        joined[pairs[:, 1]] = True
        taken = painted & (gained > 0) & (joined | ~_doubled(there, here, wanted, gained))
        numbers = np.where(taken, np.cumsum(taken) + self._count, 0).astype(np.int32)
        np.copyto(below, _look_up(numbers, target), where=~covered)
        self._remember(window, labels, np.where(cut, numbers, 0))
        self._note(found, np.flatnonzero(taken), gained, numbers, pairs[taken[pairs[:, 1]]])

    def _choose(self, window: Window, labels: np.ndarray, cut: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Labels of the pixels that this window may paint, (h, w), and of which objects they are, (count + 1,) bool."""
        core = window.local(window.core)
        inside, near = np.zeros((2, len(cut)), bool)
        inside[labels[core]] = True
        rows, columns = window.local(grow(window.core, self.margin // REACH, self.height, self.width))
        for edge in (slice(rows.start, core[0].start), slice(core[0].stop, rows.stop)):
            near[labels[edge, columns]] = True
        for edge in (slice(columns.start, core[1].start), slice(core[1].stop, columns.stop)):
            near[labels[rows, edge]] = True
        whole, part = (inside | near) & ~cut, inside & cut
        whole[0] = part[0] = False
        target = _look_up(np.arange(len(cut), dtype=np.int32) * whole, labels)
        if part.any():
            np.copyto(target[core], labels[core], where=_look_up(part, labels[core]))
        return target, whole | part

    def _note(
        self, found: Instances, places: np.ndarray, gained: np.ndarray, numbers: np.ndarray, pairs: np.ndarray
    ) -> None:
        """Keep what is known of the objects that were taken; places are their labels."""
        if not len(places):
            return
        names = [found.engines[place - 1] for place in places.tolist()]
        known = tuple(dict.fromkeys(names))
        engines = np.array([known.index(name) for name in names], np.int32)
        pairs = np.stack([pairs[:, 0], numbers[pairs[:, 1]]], axis=1)
        self._parts.append(Parts(found.scores[places - 1], gained[places], engines, pairs, known))
        self._count += len(places)

    def _cut_off(self, window: Window, labels: np.ndarray, count: int) -> np.ndarray:
        """Which objects touch an edge of the window behind which the picture goes on, (count + 1,) bool."""
        top, left, bottom, right = window.box
        result = np.zeros(count + 1, bool)
        inner = (top > 0, left > 0, bottom < self.height, right < self.width)
        for goes_on, edge in zip(inner, (labels[0], labels[:, 0], labels[-1], labels[:, -1]), strict=True):
            if goes_on:
                result[edge] = True
        return result

    def _partners(self, window: Window, labels: np.ndarray, cut: np.ndarray) -> np.ndarray:
        """(number of an object that an earlier window cut off, label here) of one and the same object, (m, 2) int64.

        Where the windows overlap the two share more than SAME of the pixels of one that is cut off, or a piece of one
        and a piece of the other are the same: of winding objects a window sees several ends.
        """
        result = [np.zeros((0, 2), np.int64)]
        for box, numbers in (*self.above, *self._beside):
            shared = common(box, window.box)
            if shared is None:
                continue
            here = labels[window.local(shared)]
            there = numbers[shared[0] - box[0] : shared[2] - box[0], shared[1] - box[1] : shared[3] - box[1]]
            other, own, amounts = _pairs(there, here)
            if not len(own):
                continue
            share = amounts / np.bincount(there[there > 0])[other]
            of_own = amounts / np.bincount(here.ravel())[own]
            matched = np.maximum(share, np.where(cut[own], of_own, 0)) > SAME
            result += [np.stack([other[matched], own[matched]], axis=1), _same_pieces(there, here)]
        return np.concatenate(result)

    def _remember(self, window: Window, labels: np.ndarray, numbers: np.ndarray) -> None:
        """Keep the objects that the window cuts off, numbers (count + 1,), where later windows overlap it."""
        top, left, bottom, right = window.box
        self._beside = []
        if not numbers.any():
            return
        across, down = max(left, window.core[3] - self.margin), max(top, window.core[2] - self.margin)
        if right > window.core[3]:
            self._beside = [((top, across, bottom, right), numbers[labels[:, across - left :]])]
        if bottom > window.core[2]:
            self._below.append(((down, left, bottom, right), numbers[labels[down - top :]]))

    def end_row(self, window: Window) -> np.ndarray:
        """Rows that no later window changes, (h, W) int32, after the last window of a row of them."""
        end = self.height if window.core[2] == self.height else max(self.top, window.core[2] - self.margin)
        done = self.canvas[: end - self.top].copy()
        kept = self.canvas[end - self.top :]
        self.canvas[: len(kept)] = kept.copy()
        self.canvas[len(kept) :] = 0
        self.top = end
        self.above, self._below, self._beside = self._below, [], []
        return done

    def state(self) -> dict[str, np.ndarray]:
        """All that is known between two rows of windows, as plain arrays."""
        parts = self.parts()
        boxes = np.array([box for box, _ in self.above], np.int64).reshape(-1, 4)
        overlap = self.canvas[: min(len(self.canvas), 2 * self.margin)]  # the rest of it is empty
        known = {
            "top": np.array(self.top),
            "canvas": overlap,
            "boxes": boxes,
            "names": np.array(parts.engine_names, str),
        }
        known |= {f"above{number}": numbers for number, (_, numbers) in enumerate(self.above)}
        return known | {name: getattr(parts, name) for name in ("scores", "areas", "engines", "pairs")}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on where state() was called, in a stitcher of the same size."""
        self.top = int(state["top"])
        self.canvas[: len(state["canvas"])] = state["canvas"]
        boxes = [tuple(box) for box in state["boxes"].tolist()]
        self.above = [(box, state[f"above{number}"]) for number, box in enumerate(boxes)]
        scores, areas, engines, pairs = (state[name] for name in ("scores", "areas", "engines", "pairs"))
        self._parts = [Parts(scores, areas, engines, pairs, tuple(state["names"].tolist()))]
        self._count = len(self._parts[0])


def _look_up(table: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.take(table, labels, mode="clip")  # takes half the time of "raise"


def _pairs(there: np.ndarray, here: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers and labels, both above 0, that share pixels, and how many pixels: (m,) each."""
    both = (there > 0) & (here > 0)
    span = int(here.max(initial=0)) + 1
    keys, amounts = np.unique(there[both].astype(np.int64) * span + here[both], return_counts=True)
    other, own = np.divmod(keys, span)
    return other, own, amounts


def _same_pieces(there: np.ndarray, here: np.ndarray) -> np.ndarray:
    """(number, label) of objects of which a 4-connected piece each is the same by IoU above SAME, (m, 2) int64."""
    maps, owners = [], []
    for labels in (there, here):
        runs = find_runs(labels)
        pieces = join_runs(labels, runs)
        owner = np.zeros(int(pieces.max()) + 2, np.int64)
        owner[pieces + 1] = runs.values
        maps.append(runs.paint(np.where(runs.values > 0, pieces + 1, 0)))
        owners.append(owner)
    first, second, amounts = _pairs(*maps)
    areas = [np.bincount(each.ravel()) for each in maps]
    same = amounts > SAME * (areas[0][first] + areas[1][second] - amounts)
    return np.unique(np.stack([owners[0][first[same]], owners[1][second[same]]], axis=1), axis=0)


def _doubled(there: np.ndarray, here: np.ndarray, wanted: np.ndarray, gained: np.ndarray) -> np.ndarray:
    """Which labels are objects that the canvas has already, (count + 1,) bool.

    More than SAME of their pixels are taken, or they cover more than SAME of an object there that is not much smaller.

    Args:
        there, here: of the pixels of the window that are painted already, (m,): the number and the label to paint.
        wanted, gained: pixels of each label, and those that are free.
    """
    count = len(gained)
    result = wanted - gained > SAME * wanted
    some = (gained > 0) & (gained < wanted) & ~result
    some[0] = False
    if not some.any():
        return result
    shared = some[here]
    keys, amounts = np.unique(there[shared].astype(np.int64) * count + here[shared], return_counts=True)
    other, own = np.divmod(keys, count)
    area = np.bincount(there)[other]
    same = (amounts > SAME * area) & (area > NOT_SMALLER * wanted[own])
    result[own[same]] = True
    return result
