"""Objects of class maps that come as bands: found, measured and numbered in two passes, in the memory of a few bands.

An object is a 4-connected component of one class; class 0 is background. The first pass labels each strip of rows by
itself, joins the labels over the seams and measures; the second labels the same strips again and looks the final
numbers up. Numbers run 1..n by each object's first pixel in reading order, whatever the heights of the bands. Memory
holds a few strips, 65 bytes for each object (twice that at the end) and 4 for each component of a strip, not the map.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

STRIP_PIXELS = 1 << 22  # bands are cut into strips of about so many pixels: labels take four bytes each

Band = tuple[int, np.ndarray]
Bands = Callable[[], Iterable[Band]]  # each call gives the very same bands

TABLE_ROWS = 65536  # made at a time
COLUMNS = (
    "id",
    "class",
    "area",
    "centroid_x",
    "centroid_y",
    "box_left",
    "box_top",
    "box_width",
    "box_height",
    "equivalent_diameter",
    "perimeter",
)
MICRON_COLUMNS = ("area_um2", "equivalent_diameter_um", "perimeter_um")

MEASURES = np.dtype(
    [
        ("class_index", np.uint8),
        ("area", np.int64),
        ("sum_x", np.int64),
        ("sum_y", np.int64),
        ("straight", np.int64),  # runs of pixels along rows and columns
        ("diagonal", np.int64),  # runs of pixels along both diagonals
        ("left", np.int32),
        ("top", np.int32),
        ("right", np.int32),
        ("bottom", np.int32),
        ("first", np.int64),  # place of the first pixel in reading order
    ]
)
COMBINED = {  # how the measures of two parts become those of the whole
    **dict.fromkeys(("area", "sum_x", "sum_y", "straight", "diagonal"), np.add),
    **dict.fromkeys(("left", "top", "first"), np.minimum),
    **dict.fromkeys(("right", "bottom"), np.maximum),
}


@dataclass(frozen=True, eq=False)
class Strip:
    """A few rows of a class map with the labels of their components.

    Attributes:
        top: first row in the map.
        classes: (h, W) uint8.
        labels: (h, W) int32, 0 outside, components 1..count of these rows alone.
        offset: label + offset is the provisional number of a component in the whole map.
        count: components in these rows.
        above_classes, above_ids: the row above, (W,): classes, and provisional numbers or 0.
    """

    top: int
    classes: np.ndarray
    labels: np.ndarray
    offset: int
    count: int
    above_classes: np.ndarray
    above_ids: np.ndarray

    @property
    def place(self) -> tuple[int, int, int]:
        """(first row, rows, components): the same in each pass."""
        return self.top, len(self.labels), self.count

    def row_ids(self, row: int) -> np.ndarray:
        """Provisional numbers along a row, (W,) int64, 0 outside."""
        labels = self.labels[row].astype(np.int64)
        return np.where(labels > 0, labels + self.offset, 0)

    def open_components(self) -> np.ndarray:
        """Whether each label, 0 included, reaches the first or the last of these rows: (count + 1,) bool."""
        result = np.zeros(self.count + 1, bool)
        result[self.labels[0]] = result[self.labels[-1]] = True
        return result

    def runs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pixels side by side in one component: labels, places in the flattened strip and lengths, (n,) each."""
        starts = np.ones(self.classes.shape, bool)
        np.not_equal(self.classes[:, 1:], self.classes[:, :-1], out=starts[:, 1:])
        places = np.flatnonzero(starts)
        lengths = np.diff(places, append=starts.size)
        labels = self.labels.ravel()[places]
        inside = labels > 0
        return labels[inside], places[inside], lengths[inside]


@dataclass(frozen=True, eq=False)
class Objects:
    """The objects of a class map; entry i of each array is object i + 1.

    Pixels are those of the map; x runs along columns, y along rows, and the first pixel has its centre at (0, 0).

    Attributes:
        measures: (n,) MEASURES; the properties read them.
        table: provisional -> final numbers, (provisional + 1,) uint32; 0 is no object.
        places: (first row, rows, components) of each strip: what the second pass must meet again.
        counts, areas: objects and pixels of each class, (256,) int64 each, with the objects that were dropped.
    """

    measures: np.ndarray
    table: np.ndarray
    places: tuple[tuple[int, int, int], ...]
    counts: np.ndarray
    areas: np.ndarray

    def __len__(self) -> int:
        return len(self.measures)

    @property
    def class_index(self) -> np.ndarray:
        """(n,) uint8."""
        return self.measures["class_index"]

    @property
    def area(self) -> np.ndarray:
        """Pixels, (n,) int64."""
        return self.measures["area"]

    @property
    def centroid_x(self) -> np.ndarray:
        """Mean column of the pixels, (n,) float64."""
        return self.measures["sum_x"] / self.area

    @property
    def centroid_y(self) -> np.ndarray:
        """Mean row of the pixels, (n,) float64."""
        return self.measures["sum_y"] / self.area

    @property
    def box_left(self) -> np.ndarray:
        """First column of the bounding box, (n,) int32."""
        return self.measures["left"]

    @property
    def box_top(self) -> np.ndarray:
        """First row of the bounding box, (n,) int32."""
        return self.measures["top"]

    @property
    def box_width(self) -> np.ndarray:
        """Columns of the bounding box, (n,) int32."""
        return self.measures["right"] - self.measures["left"]

    @property
    def box_height(self) -> np.ndarray:
        """Rows of the bounding box, (n,) int32."""
        return self.measures["bottom"] - self.measures["top"]

    @property
    def perimeter(self) -> np.ndarray:
        """Crofton's formula over 4 directions, (n,) float64.

        pi / 4 (runs along rows and columns + runs along the diagonals / sqrt(2)): what
        skimage.measure.perimeter_crofton(directions=4) gives for the object alone.
        """
        return math.pi / 4 * (self.measures["straight"] + self.measures["diagonal"] / math.sqrt(2))

    @property
    def equivalent_diameter(self) -> np.ndarray:
        """Diameter of the disc of the same area, in pixels, (n,) float64."""
        return 2 * np.sqrt(self.area / np.pi)

    def keep(self, kept: np.ndarray) -> "Objects":
        """Only the objects whose entry of kept, (n,) bool, is true; the rest is background, the numbers close up."""
        if kept.shape != (len(self),) or kept.dtype != bool:
            raise ValueError(f"found {kept.dtype} {kept.shape}, expected one bool for each of {len(self)} objects")
        if kept.all():
            return self
        numbers = np.concatenate([[0], np.cumsum(kept) * kept]).astype(np.uint32)
        return replace(self, measures=self.measures[kept], table=numbers[self.table])


def find_objects(bands: Bands, min_area: int = 0) -> Objects:
    """Measure the objects of a class map: the first pass.

    Args:
        bands: gives (first row, class indices (h, W) uint8) from top to bottom without gaps, any h.
        min_area: objects with fewer pixels are dropped, most of them as soon as they end: specks then cost 4 bytes.

    Raises:
        ValueError: a band is not where the last one ended, or has another width or type.
    """
    measured, seams, corners, places = [np.zeros(0, MEASURES)], [_NO_PAIRS], [_NO_PAIRS], []
    slots, held = [np.zeros(1, np.uint32)], 0
    counts, areas = np.zeros(256, np.int64), np.zeros(256, np.int64)
    for strip in label_strips(bands()):
        measures, touching = measure_strip(strip)
        kept = strip.open_components()[1:] | (measures["area"] >= min_area)
        _count_classes(measures[~kept], counts, areas)
        measured.append(measures[kept])
        slots.append(((np.cumsum(kept) + held) * kept).astype(np.uint32))
        held += len(measured[-1])
        corners.append(touching)
        seams.append(seam_pairs(strip))
        places.append(strip.place)
    slot = _emptied(slots)
    # Only components that are open meet others, and those are held.
    pairs = [slot[_emptied(parts)].astype(np.int64) for parts in (seams, corners)]
    measures, numbers = _join_measures(_emptied(measured), *pairs)
    _count_classes(measures, counts, areas)
    objects = Objects(measures, numbers[slot], tuple(places), counts, areas)
    return objects.keep(objects.area >= min_area)


def _count_classes(measures: np.ndarray, counts: np.ndarray, areas: np.ndarray) -> None:
    """Add objects and their pixels to the sums of their classes, in place."""
    counts += np.bincount(measures["class_index"], minlength=256)
    areas += np.bincount(measures["class_index"], measures["area"], minlength=256).astype(np.int64)


def _emptied(parts: list[np.ndarray]) -> np.ndarray:
    """The parts as one array; each is let go when it is copied, for together they can be gigabytes."""
    whole = np.empty((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype)
    end = len(whole)
    while parts:
        part = parts.pop()
        whole[end - len(part) : end] = part
        end -= len(part)
    return whole


def label_bands(bands: Bands, objects: Objects) -> Iterator[Band]:
    """Number the pixels of a class map: the second pass.

    Args:
        bands: what find_objects was given.
        objects: its answer, or some of it (see Objects.keep).

    Yields:
        (first row, numbers (h, W) uint32, 0 outside) from top to bottom. Tall bands come as several.

    Raises:
        ValueError: these are not the bands of the first pass.
    """
    for strip in repeat_strips(bands, objects.places):
        numbers = objects.table[strip.offset : strip.offset + strip.count + 1].copy()
        numbers[0] = 0
        yield strip.top, np.take(numbers, strip.labels, mode="clip")  # "clip" takes half the time of "raise"


def object_table(
    objects: Objects, class_names: Sequence[str], mpp: float | None = None
) -> tuple[tuple[str, ...], Iterator[dict[str, Any]]]:
    """The objects as a table for tables.format_csv.

    Args:
        objects: in pixels of the map.
        class_names: one for each class index, background included.
        mpp: micrometres per pixel of the map; adds MICRON_COLUMNS.

    Returns:
        Names of the columns, and a row for each object, made as they are asked for: there can be millions.
    """
    names = COLUMNS if mpp is None else (*COLUMNS, *MICRON_COLUMNS)
    return names, _table_rows(objects, class_names, mpp)


def _table_rows(objects: Objects, class_names: Sequence[str], mpp: float | None) -> Iterator[dict[str, Any]]:
    for start in range(0, len(objects), TABLE_ROWS):
        part = replace(objects, measures=objects.measures[start : start + TABLE_ROWS])
        columns = {name: getattr(part, name).tolist() for name in COLUMNS[2:]}
        columns["id"] = list(range(start + 1, start + 1 + len(part)))
        columns["class"] = [class_names[index] for index in part.class_index.tolist()]
        if mpp is not None:
            measures = (part.area * mpp**2, part.equivalent_diameter * mpp, part.perimeter * mpp)
            columns |= {name: values.tolist() for name, values in zip(MICRON_COLUMNS, measures, strict=True)}
        for row in zip(*columns.values(), strict=True):
            yield dict(zip(columns, row, strict=True))


def check_bands(bands: Iterable[Band]) -> Iterator[Band]:
    """Let bands of class indices through that follow each other from row 0 and have one width.

    Raises:
        ValueError: one does not; says where.
    """
    expected, width = 0, None
    for top, band in bands:
        if band.ndim != 2 or band.dtype not in (np.uint8, bool) or 0 in band.shape:
            raise ValueError(
                f"the band at row {top} is {band.dtype} {band.shape}, expected class indices (h, W) as uint8 with at "
                "least one pixel: convert it first"
            )
        if top != expected:
            raise ValueError(
                f"a band starts at row {top}, expected row {expected}, where the last one ended: give the bands from "
                "top to bottom, each row once"
            )
        if width not in (None, band.shape[1]):
            raise ValueError(f"the band at row {top} is {band.shape[1]} pixels wide, expected {width} as above it")
        expected, width = top + len(band), band.shape[1]
        yield top, band.view(np.uint8)


def label_strips(bands: Iterable[Band], *, background: bool = False) -> Iterator[Strip]:
    """Label the components of each strip of rows by itself.

    Args:
        bands: class maps, see check_bands.
        background: label the 8-connected components of class 0 in place of the 4-connected ones of the other classes.
    """
    offset, above_classes, above_ids = 0, np.zeros(0, np.uint8), np.zeros(0, np.int64)
    for band_top, band in check_bands(bands):
        if band_top == 0:
            above_classes, above_ids = np.zeros(band.shape[1], np.uint8), np.zeros(band.shape[1], np.int64)
        rows = max(1, STRIP_PIXELS // band.shape[1])
        for start in range(0, len(band), rows):
            classes = band[start : start + rows]
            labels, count = label_components(classes, background)
            strip = Strip(band_top + start, classes, labels, offset, count, above_classes, above_ids)
            yield strip
            offset += strip.count
            above_classes, above_ids = classes[-1].copy(), strip.row_ids(-1)


def repeat_strips(bands: Bands, places: Sequence[tuple[int, int, int]], *, background: bool = False) -> Iterator[Strip]:
    """Label the strips of an earlier pass again.

    Raises:
        ValueError: the strips do not lie at places, or hold other numbers of components.
    """
    number = 0
    for number, strip in enumerate(label_strips(bands(), background=background), start=1):
        expected = places[number - 1] if number <= len(places) else None
        if strip.place != expected:
            raise ValueError(
                f"rows at {strip.top} came as (first row, rows, components) {strip.place}, expected {expected} as in "
                "the first pass: the bands must be the very same each time"
            )
        yield strip
    if number != len(places):
        raise ValueError(f"{number} strips of rows came, expected {len(places)} as in the first pass: some are missing")


def label_components(classes: np.ndarray, background: bool = False) -> tuple[np.ndarray, int]:
    """Components of a class map (h, W) uint8, numbered class by class and within a class in reading order.

    Returns:
        Labels (h, W) int32, 0 outside, and how many there are.
    """
    if background:
        return _label_mask((classes == 0).view(np.uint8), 8)
    if classes.max() <= 1:
        return _label_mask(classes, 4)
    labels, count = np.zeros(classes.shape, np.int32), 0
    for value in list_classes(classes):
        mask = (classes == value).view(np.uint8)
        left, top, width, height = cv2.boundingRect(mask)
        box = np.s_[top : top + height, left : left + width]
        part, part_count = _label_mask(mask[box], 4)
        np.add(part, count, out=labels[box], where=mask[box].view(bool))
        count += part_count
    return labels, count


def list_classes(classes: np.ndarray) -> list[int]:
    """The classes of a map (h, W) uint8 besides the background, ascending."""
    counts = cv2.calcHist([classes], [0], None, [256], [0, 256])
    return [int(value) for value in np.flatnonzero(counts) if value > 0]


def _label_mask(mask: np.ndarray, connectivity: int) -> tuple[np.ndarray, int]:
    count, labels = cv2.connectedComponents(mask, connectivity=connectivity)
    return labels, count - 1  # without the one of the zeros


def measure_strip(strip: Strip) -> tuple[np.ndarray, np.ndarray]:
    """Measure the components of a strip.

    Returns:
        (count,) MEASURES in the map's coordinates; and pairs (m, 2) int64 of provisional numbers, one for each pair of
        pixels of one class that touch by a corner alone: a run ends there unless the two turn out to be one object.
    """
    height, width = strip.classes.shape
    measures = np.zeros(strip.count + 1, MEASURES)
    ids, places, lengths = strip.runs()
    row, col = np.divmod(places, width)
    for name, weights in (
        ("area", lengths),
        ("sum_x", lengths * (2 * col + lengths - 1) // 2),
        ("sum_y", lengths * (row + strip.top)),
        ("straight", None),
    ):
        measures[name] = np.bincount(ids, weights, minlength=strip.count + 1)  # whole numbers below 2 ** 53: exact
    measures["left"] = width
    np.minimum.at(measures["left"], ids, col.astype(np.int32))
    np.maximum.at(measures["right"], ids, (col + lengths).astype(np.int32))
    # Of several values for one entry the last one stays.
    measures["bottom"][ids] = row + strip.top + 1
    measures["top"][ids[::-1]] = row[::-1] + strip.top
    measures["first"][ids[::-1]] = places[::-1] + strip.top * width
    measures["class_index"][ids] = strip.classes.ravel()[places]

    around = np.zeros((height + 1, width + 2), np.uint8)
    around[0, 1:-1] = strip.above_classes
    around[1:, 1:-1] = strip.classes
    labels = strip.labels.ravel()
    upper = (around[:-1, 1:-1], around[:-1, :-2], around[:-1, 2:])
    starts = [np.flatnonzero(strip.classes != neighbours) for neighbours in upper]
    vertical, *diagonal = (np.bincount(labels[found], minlength=strip.count + 1) for found in starts)
    own, other, certain = _find_corners(strip, around, starts[0][labels[starts[0]] > 0])
    measures["straight"] += vertical
    measures["diagonal"] = sum(diagonal) + np.bincount(own[certain] - strip.offset, minlength=strip.count + 1)
    return measures[1:], np.stack([own, other], axis=1)[~certain]


def _find_corners(strip: Strip, around: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels of one class and two components that touch by a corner alone.

    Args:
        strip: of (h, W) pixels.
        around: (h + 1, W + 2) uint8, its classes with the row above and zeros on both sides.
        places: of the pixels whose class differs from the one above, in the flattened strip.

    Returns:
        Provisional numbers of the lower and of the upper pixel, (m,) int64 each, and whether the two components are
        certainly two objects, (m,) bool: one of them ends within the strip.
    """
    open_labels = strip.open_components()
    row, col = np.divmod(places, strip.labels.shape[1])
    value = around[row + 1, col + 1]
    found = []
    for side in (-1, 1):
        touching = (around[row, col + 1 + side] == value) & (around[row + 1, col + 1 + side] != value)
        y, x = row[touching], col[touching]
        own, upper = strip.labels[y, x].astype(np.int64), strip.labels[y - 1, x + side].astype(np.int64)
        other = np.where(y > 0, upper + strip.offset, strip.above_ids[x + side])
        certain = (y > 0) & ~(open_labels[own] & open_labels[upper])
        own += strip.offset
        found.append((own[own != other], other[own != other], certain[own != other]))
    own, other, certain = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    return own, other, certain


_NO_PAIRS = np.zeros((0, 2), np.int64)


def seam_pairs(strip: Strip, *, background: bool = False) -> np.ndarray:
    """Provisional numbers (m, 2) int64 of components that meet between a strip's first row and the row above."""
    above, here, width = strip.above_ids, strip.row_ids(0), strip.labels.shape[1]
    found = []
    for shift in (-1, 0, 1) if background else (0,):
        here_part, above_part = (
            slice(max(0, -shift), width - max(0, shift)),
            slice(max(0, shift), width + min(0, shift)),
        )
        same = strip.classes[0, here_part] == strip.above_classes[above_part]
        pairs = np.stack([above[above_part], here[here_part]], axis=1)[same]
        pairs = pairs[pairs.all(axis=1)]
        new = np.ones(len(pairs), bool)
        new[1:] = (pairs[1:] != pairs[:-1]).any(axis=1)
        found.append(pairs[new])
    return np.concatenate(found)


def join_components(pairs: np.ndarray, count: int) -> np.ndarray:
    """Which group each of the provisional numbers 1..count belongs to: (count,) int64 from 0, pairs (m, 2) joined."""
    ends = pairs.T - 1
    graph = coo_array((np.ones(len(pairs), bool), (ends[0], ends[1])), shape=(count, count))
    return connected_components(graph, directed=False)[1].astype(np.int64) if count else np.zeros(0, np.int64)


def _join_measures(measured: np.ndarray, seams: np.ndarray, corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Join components into objects, numbered by their first pixel.

    Args:
        measured: (m,) MEASURES of components 1..m; changed in place.
        seams: pairs (s, 2) of components that are one object.
        corners: pairs that touch by a corner, see measure_strip.

    Returns:
        (n,) MEASURES of the objects, and the object of each component, (m + 1,) uint32 with 0 for 0.
    """
    joined, place = np.unique(seams, return_inverse=True)  # the few that reach over a seam
    joined -= 1
    group = join_components(place.reshape(-1, 2) + 1, len(joined))
    by_first = np.argsort(measured["first"][joined])
    _, least = np.unique(group[by_first], return_index=True)
    lead = joined[by_first[least]][group]  # of each of the joined, the component of its object that comes first
    rest = lead != joined
    leads, others = lead[rest], measured[joined[rest]]
    for name, combine in COMBINED.items():
        combine.at(measured[name], leads, others[name])
    whole = np.ones(len(measured), bool)
    whole[joined[rest]] = False
    objects = np.flatnonzero(whole)
    objects = objects[np.argsort(measured["first"][objects])]
    numbers = np.zeros(len(measured) + 1, np.uint32)
    numbers[objects + 1] = np.arange(1, len(objects) + 1)
    numbers[joined[rest] + 1] = numbers[leads + 1]
    own, other = numbers[corners.T]
    measures = measured[objects]
    measures["diagonal"] += np.bincount(own[own != other] - 1, minlength=len(objects))
    return measures, numbers
