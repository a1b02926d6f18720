"""Filters over class maps that come as bands: closing, holes, and rules about the area and length of objects.

Each filter gives on bands of any heights what it gives on the whole map, in the memory of a few bands and some 130
bytes for each object or hole (4 for an object that min_area drops). Objects are 4-connected components of one class,
as in regions; holes are 8-connected components of the background.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import cv2
import numpy as np

from regions import (
    Band,
    Bands,
    Objects,
    Strip,
    check_bands,
    find_objects,
    join_components,
    label_bands,
    label_strips,
    list_classes,
    repeat_strips,
    seam_pairs,
)

HELD_PIXELS = 1 << 24  # of an object's box that wait for its end; a larger object is measured part by part
MARGIN = 256  # rows that such parts share on either side: twice the rows that thinning moves a border of 256 pixels


@dataclass(frozen=True)
class Filters:
    """What is changed in a class map, in this order; each class by itself, lengths in pixels of the map.

    Attributes:
        closing: side of the elliptic element of a morphological closing, odd; 0 for none. Only background becomes an
            object, and of two classes the one with the lower index. What lies outside the map is left out, as in
            cv2.morphologyEx.
        fill_holes: area of the largest hole that is filled; -1 for all. A hole does not reach the map's border, and
            all pixels around it, corners included, belong to one class.
        min_area: objects with fewer pixels are dropped.
        relative_area: k of the rule "drop what is smaller than the mean area of the class's objects / k"; 0 for none.
            The mean is taken before min_area. Areas are counts of pixels, so a line one pixel wide has an area and
            holes have none; the rule over contours that it stands for gave such a line none and counted holes in.
        min_length: objects whose skeleton (skimage.morphology.skeletonize of the object alone) has fewer pixels are
            dropped. Pixels are counted, not steps: a diagonal line is 1.41 times as long as its count.
        keep_largest: of each class only the object of the largest area stays, the first one of several.
    """

    closing: int = 0
    fill_holes: float = 0
    min_area: int = 0
    relative_area: float = 0.0
    min_length: int = 0
    keep_largest: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers out of their ranges."""
        if self.closing < 0 or (self.closing and self.closing % 2 == 0):
            raise ValueError(f"closing is {self.closing}, expected 0 or an odd side in pixels such as 3")
        if not (self.fill_holes >= 0 or self.fill_holes == -1):
            raise ValueError(f"fill_holes is {self.fill_holes}, expected an area in pixels, 0 for none or -1 for all")
        for name in ("min_area", "relative_area", "min_length"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}, expected 0 for none or a number above it")

    @property
    def drop_objects(self) -> bool:
        """Whether some filter drops objects."""
        return bool(self.min_area or self.relative_area or self.min_length or self.keep_largest)


def filter_mask(mask: np.ndarray, filters: Filters) -> np.ndarray:
    """Filter a whole class map (H, W) uint8 or bool; a new array of its type."""
    result = np.empty(mask.shape, np.uint8)
    for top, band in filter_bands(lambda: [(0, mask)], filters)():
        result[top : top + len(band)] = band
    return result.astype(mask.dtype)


def filter_bands(bands: Bands, filters: Filters) -> Bands:
    """Filter a class map that comes as bands.

    Holes and objects are looked for when the result is first asked for; that reads the bands once more for holes, once
    for objects and once for lengths. Later calls read them once.

    Args:
        bands: gives (first row, class indices (h, W) uint8) from top to bottom, any h, the same at each call.
        filters: what to do.

    Returns:
        The same kind of callable; its bands may have other heights.

    Raises:
        ValueError: when read: a band is not where the last one ended, or the bands differ from those of the last call.
    """
    bands = _complete(bands, filters)
    if filters.drop_objects:
        bands = _look_up(bands, lambda objects: find_kept(objects, filters), drop_objects)
    return bands


def filter_objects(bands: Bands, filters: Filters) -> tuple[Bands, Objects]:
    """The objects of the filtered class map, with fewer passes than find_objects(filter_bands(bands, filters)).

    Returns:
        Bands and objects for regions.label_bands; pixels of objects that were dropped get the number 0.
    """
    bands = _complete(bands, filters)
    return bands, select_objects(bands, filters)


def _complete(bands: Bands, filters: Filters) -> Bands:
    """Bands with what the filters add to objects."""
    if filters.closing:
        bands = _close(bands, filters.closing)
    if filters.fill_holes:
        limit = math.inf if filters.fill_holes < 0 else filters.fill_holes
        bands = _look_up(bands, lambda unfilled: find_holes(unfilled, limit), fill_holes)
    return bands


def _close(bands: Bands, side: int) -> Bands:
    def closed() -> Iterator[Band]:
        for top, window, rows in add_margins(bands(), side - 1):
            yield top, close_classes(window, side)[rows]

    return closed


def _look_up(
    bands: Bands, find: Callable[[Bands], "Found"], change: Callable[[Bands, "Found"], Iterator[Band]]
) -> Bands:
    """Bands that are changed by what a first pass over all of them found."""
    found: list[Found] = []

    def changed() -> Iterator[Band]:
        if not found:
            found.append(find(bands))
        return change(bands, found[0])

    return changed


@dataclass(frozen=True, eq=False)
class Found:
    """What a first pass found.

    Attributes:
        values: (provisional + 1,) uint8: what becomes of each component.
        places: of the strips, see regions.repeat_strips.
    """

    values: np.ndarray
    places: tuple[tuple[int, int, int], ...]

    def look_up(self, strip: Strip) -> np.ndarray:
        """The values of a strip's pixels, (h, W) uint8, 0 outside of its components."""
        values = self.values[strip.offset : strip.offset + strip.count + 1].copy()
        values[0] = 0
        return np.take(values, strip.labels, mode="clip")


def add_margins(bands: Iterable[Band], margin: int) -> Iterator[tuple[int, np.ndarray, slice]]:
    """Add the rows around each band to it.

    Yields:
        (first row of the band, its rows and up to margin rows on either side (h, W), where in there the band lies).
    """
    held, begin, waiting = np.zeros((0, 0), np.uint8), 0, []
    for top, band in check_bands(bands):
        held = np.concatenate([held, band]) if len(held) else band.copy()
        waiting.append((top, top + len(band)))
        while waiting and waiting[0][1] + margin <= begin + len(held):
            window, begin, held = _cut(held, begin, *waiting.pop(0), margin)
            yield window
    while waiting:
        window, begin, held = _cut(held, begin, *waiting.pop(0), margin)
        yield window


def _cut(
    held: np.ndarray, begin: int, top: int, bottom: int, margin: int
) -> tuple[tuple[int, np.ndarray, slice], int, np.ndarray]:
    """A band with its margins from the rows held from row begin on; then the first row still needed, and the rows."""
    low = max(0, top - margin)
    window = held[low - begin : bottom + margin - begin]
    needed = max(0, bottom - margin)
    return (top, window, slice(top - low, bottom - low)), needed, held[needed - begin :]


def close_classes(classes: np.ndarray, side: int) -> np.ndarray:
    """Close each class of a map (h, W) uint8 with an ellipse; only background changes, lower classes go first."""
    element = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    if classes.max() <= 1:
        return cv2.morphologyEx(classes, cv2.MORPH_CLOSE, element)
    result = classes.copy()
    for value in list_classes(classes):
        closed = cv2.morphologyEx((classes == value).view(np.uint8), cv2.MORPH_CLOSE, element).view(bool)
        result[closed & (result == 0)] = value
    return result


def fill_holes(bands: Bands, holes: Found) -> Iterator[Band]:
    """Give each hole the class around it."""
    for strip in repeat_strips(bands, holes.places, background=True):
        yield strip.top, strip.classes | holes.look_up(strip)


def find_holes(bands: Bands, limit: float) -> Found:
    """Find the holes of at most limit pixels; values are the classes that fill them, 0 where nothing does."""
    areas, edges, seams, rings, places = (
        [_NONE],
        [_NONE],
        [np.zeros((0, 2), np.int64)],
        [np.zeros((3, 0), np.int64)],
        [],
    )
    last_row = _NONE
    for strip in label_strips(bands(), background=True):
        ids, _, lengths = strip.runs()
        areas.append(np.bincount(ids, lengths, minlength=strip.count + 1)[1:])
        sides = strip.labels[:, [0, -1]]
        edges.append(sides[sides > 0].astype(np.int64) + strip.offset)
        if strip.top == 0:
            edges.append(strip.row_ids(0))
        last_row = strip.row_ids(-1)
        seams.append(seam_pairs(strip, background=True))
        own = measure_rings(strip.classes, strip.labels)
        own[0] += strip.offset
        seam = np.stack([strip.above_classes, strip.classes[0]])
        rings += [own, measure_rings(seam, np.stack([strip.above_ids, strip.row_ids(0)]))]
        places.append(strip.place)
    area = np.concatenate(areas)
    group = np.concatenate([[0], 1 + join_components(np.concatenate(seams), len(area))])
    count = int(group.max()) + 1
    edge = np.zeros(count, bool)
    edge[group[np.concatenate([*edges, last_row])]] = True
    ids, low, high = np.concatenate(rings, axis=1)
    lowest, highest = np.full(count, 255), np.zeros(count, np.int64)
    np.minimum.at(lowest, group[ids], low)
    np.maximum.at(highest, group[ids], high)
    total = np.bincount(group[1:], area, minlength=count)
    filled = ~edge & (lowest == highest) & (total <= limit)
    filled[0] = False
    return Found(np.where(filled, lowest, 0).astype(np.uint8)[group], tuple(places))


_NONE = np.zeros(0, np.int64)


def measure_rings(classes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The lowest and the highest class among the 8 neighbours of each component of the background.

    Args:
        classes: (h, W) uint8.
        labels: (h, W), numbers of the background's components.

    Returns:
        (3, n) int64: numbers of the components that have such neighbours, lowest and highest class.
    """
    square = np.ones((3, 3), np.uint8)
    highest = cv2.dilate(classes, square)
    places = np.flatnonzero((classes == 0) & (highest > 0))
    if len(places) == 0:
        return np.zeros((3, 0), np.int64)
    ids, inverse = _number_densely(labels.ravel()[places])
    low, high = np.full(len(ids), 255, np.uint8), np.zeros(len(ids), np.uint8)
    lowest = cv2.erode(classes - np.uint8(1), square)  # class 0 becomes 255 and is never the lowest
    np.minimum.at(low, inverse, lowest.ravel()[places] + np.uint8(1))
    np.maximum.at(high, inverse, highest.ravel()[places])
    return np.stack([ids.astype(np.int64), low.astype(np.int64), high.astype(np.int64)])


def _number_densely(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct numbers among ids, ascending, and which of them each is; by a table, for numbers close together."""
    low = int(ids.min())
    seen = np.zeros(int(ids.max()) - low + 1, bool)
    seen[ids - low] = True
    return np.flatnonzero(seen) + low, (np.cumsum(seen) - 1)[ids - low]


def drop_objects(bands: Bands, kept: Found) -> Iterator[Band]:
    """Make background of the objects whose value is 0."""
    for strip in repeat_strips(bands, kept.places):
        yield strip.top, strip.classes & kept.look_up(strip)


def find_kept(bands: Bands, filters: Filters) -> Found:
    """Find the objects that stay; values are 255 for those, 0 for the others."""
    kept = select_objects(bands, filters)
    return Found((kept.table > 0).astype(np.uint8) * np.uint8(255), kept.places)


def select_objects(bands: Bands, filters: Filters) -> Objects:
    """The objects of some bands that stay."""
    objects = find_objects(bands, max(filters.min_area, filters.min_length))  # a skeleton is a part of its object
    if filters.relative_area:
        mean = objects.areas / np.maximum(objects.counts, 1)  # of the dropped ones, too
        objects = objects.keep(objects.area >= mean[objects.class_index] / filters.relative_area)
    if filters.min_length:
        objects = objects.keep(find_long(bands, objects, filters.min_length))
    if filters.keep_largest:
        order = np.lexsort((-objects.area, objects.class_index))  # stable: the first of equals
        kept = np.zeros(len(objects), bool)
        kept[order[np.unique(objects.class_index[order], return_index=True)[1]]] = True
        objects = objects.keep(kept)
    return objects


@dataclass
class OpenObject:
    """An object of which rows are still to come.

    Attributes:
        begin: row of the map where the held rows begin.
        counted: row up to which the skeleton is counted.
        length: pixels of the skeleton above that row.
        parts: the rows held, eight pixels to a byte.
    """

    begin: int
    counted: int
    length: int = 0
    parts: list[np.ndarray] = field(default_factory=list)


def find_long(bands: Bands, objects: Objects, min_length: int) -> np.ndarray:
    """Whether each object's skeleton has min_length pixels or more, (n,) bool.

    Memory holds the rows so far of the objects that are open, in their boxes, at a bit a pixel. An object with more
    than HELD_PIXELS of them is measured part by part: exact while it is nowhere wider than about MARGIN pixels.
    """
    result, opened = np.zeros(len(objects), bool), 0
    waiting: dict[int, OpenObject] = {}
    tops, bottoms, lefts, widths = objects.box_top, objects.measures["bottom"], objects.box_left, objects.box_width
    for top, labels in label_bands(bands, objects):
        bottom = top + len(labels)
        until = int(np.searchsorted(tops, bottom))  # objects are numbered by their first row
        for index in range(opened, until):
            waiting[index] = OpenObject(int(tops[index]), int(tops[index]))
        opened = until
        for index, item in list(waiting.items()):
            left, width = int(lefts[index]), int(widths[index])
            rows = slice(max(0, int(tops[index]) - top), int(bottoms[index]) - top)
            mask = labels[rows, left : left + width] == index + 1
            closed = bool(bottoms[index] <= bottom)
            if _add_rows(item, mask, min_length, closed):
                result[index] = True
            if closed or result[index]:
                del waiting[index]
    return result


def _add_rows(item: OpenObject, mask: np.ndarray, min_length: int, closed: bool) -> bool:
    """Add the next rows (h, w) bool of an object; whether it is known to be long now."""
    width = mask.shape[1]
    held = sum(map(len, item.parts)) + len(mask)
    if not closed and held < max(HELD_PIXELS // width, 4 * MARGIN):
        item.parts.append(np.packbits(mask, axis=1))
        return False
    if item.parts:
        above = np.unpackbits(np.concatenate(item.parts), axis=1, count=width).view(bool)
        mask = np.concatenate([above, mask])
    certain = item.begin + held - (0 if closed else MARGIN)
    item.length += _skeleton_pixels(mask, item.counted - item.begin, certain - item.begin)
    item.parts = [np.packbits(mask[held - 2 * MARGIN :], axis=1)] if not closed else []
    item.begin, item.counted = item.begin + held - 2 * MARGIN, certain
    return item.length >= min_length


def _skeleton_pixels(mask: np.ndarray, first: int, last: int) -> int:
    from skimage.morphology import skeletonize

    return int(np.count_nonzero(skeletonize(mask)[first:last]))
