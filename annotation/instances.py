"""Instances: the objects of one picture with their scores, which every engine gives and every file is made of.

Label maps are read as runs: neighbouring pixels of one value in a row. There are some dozens of runs for an object
and thousands of pixels, so joining, numbering and measuring cost little beside finding the runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

ROW_COLUMNS = (
    "id",
    "area",
    "centroid_x",
    "centroid_y",
    "box_left",
    "box_top",
    "box_width",
    "box_height",
    "equivalent_diameter",
    "ellipse_major",
    "ellipse_minor",
    "ellipse_angle",
    "solidity",
    "mean_intensity",
    "engine",
    "score",
)


@dataclass(frozen=True, eq=False)
class Instances:
    """The objects of one picture.

    Attributes:
        labels: (H, W) int32, 0 background, objects 1..n in the order of their first pixels in reading order, each
            one 4-connected piece.
        scores: (n,) float32 in [0, 1], how sure the engine is of each.
        engines: who found each, n names.
    """

    labels: np.ndarray
    scores: np.ndarray
    engines: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.labels.ndim != 2 or self.labels.dtype != np.int32:
            raise ValueError(f"labels are {self.labels.dtype} {self.labels.shape}, expected (H, W) as int32")
        if self.scores.shape != (len(self.engines),) or self.scores.dtype != np.float32:
            raise ValueError(
                f"scores are {self.scores.dtype} {self.scores.shape} for {len(self.engines)} names of engines, "
                "expected one float32 for each object"
            )

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(frozen=True, eq=False)
class Runs:
    """Runs of equal values along the rows of a map, in reading order; background runs are among them.

    Attributes:
        values: (m,) of the map's type.
        places: (m,) int64, of the first pixels in the flattened map.
        lengths: (m,) int64, pixels.
        shape: (H, W) of the map.
    """

    values: np.ndarray
    places: np.ndarray
    lengths: np.ndarray
    shape: tuple[int, int]

    @property
    def rows(self) -> np.ndarray:
        """(m,) int64."""
        return self.places // self.shape[1]

    @property
    def columns(self) -> np.ndarray:
        """First columns, (m,) int64."""
        return self.places % self.shape[1]

    def paint(self, values: np.ndarray) -> np.ndarray:
        """A map (H, W) with a value for each run, (m,) of any type."""
        return np.repeat(values, self.lengths).reshape(self.shape)


def find_runs(labels: np.ndarray) -> Runs:
    """The runs of a map (H, W) of any type of number."""
    starts = _run_starts(labels)
    places = np.flatnonzero(starts)
    return Runs(labels.reshape(-1)[places], places, np.diff(places, append=starts.size), labels.shape)


def _run_starts(labels: np.ndarray) -> np.ndarray:
    starts = np.ones(labels.shape, bool)
    np.not_equal(labels[:, 1:], labels[:, :-1], out=starts[:, 1:])
    return starts


def join_runs(labels: np.ndarray, runs: Runs) -> np.ndarray:
    """Which 4-connected piece of one value each run belongs to: (m,) int64, pieces numbered by their first pixels."""
    starts = _run_starts(labels)
    run_of = runs.paint(np.arange(len(runs.places), dtype=np.int32))
    meets = labels[1:] == labels[:-1]
    meets &= starts[1:] | starts[:-1]  # one place for each two runs that lie on each other
    lower, upper = run_of[1:][meets], run_of[:-1][meets]
    links = coo_array((np.ones(len(lower), bool), (lower, upper)), shape=(len(runs.places),) * 2)
    pieces = connected_components(links, directed=False)[1]
    _, firsts, inverse = np.unique(pieces, return_index=True, return_inverse=True)
    order = np.empty(len(firsts), np.int64)
    order[np.argsort(firsts)] = np.arange(len(firsts))
    return order[inverse]


def number_values(labels: np.ndarray) -> np.ndarray:
    """A label map (H, W) of any type of number as int32 with the values 1..n, in their order; 0 stays."""
    runs = find_runs(labels)
    values, numbers = np.unique(runs.values, return_inverse=True)
    first = 0 if len(values) and values[0] == 0 else 1
    return runs.paint((numbers + first).astype(np.int32))


def empty_instances(height: int, width: int) -> Instances:
    """No object in a picture of height x width pixels."""
    return Instances(np.zeros((height, width), np.int32), np.zeros(0, np.float32), ())


def number_instances(
    labels: np.ndarray,
    scores: np.ndarray | float,
    engines: Sequence[str] | str,
    *,
    pieces: Literal["largest", "all"] = "largest",
) -> Instances:
    """Bring any label map to the form of Instances.

    Args:
        labels: (H, W) whole numbers, values below 1 are background. Gaps between the values do not matter.
        scores: of value k at scores[k - 1], or one for all (then values may be of any size); clipped to [0, 1].
        engines: the same with names.
        pieces: of a value with several 4-connected pieces keep the largest (of equal ones the first), or make each
            piece an object.

    Raises:
        ValueError: labels are no whole numbers, or a value has no score or engine.
    """
    if labels.ndim != 2 or labels.dtype.kind not in "iub":
        raise ValueError(f"label map is {labels.dtype} {labels.shape}, expected whole numbers (H, W)")
    runs = find_runs(labels)
    piece_of = join_runs(labels, runs)
    areas = np.bincount(piece_of, runs.lengths)
    _, firsts = np.unique(piece_of, return_index=True)
    values = runs.values[firsts]
    kept = values > 0
    if pieces == "largest":
        order = np.lexsort((-areas, values))  # stable: the first of equal ones
        best = np.ones(len(order), bool)
        best[1:] = values[order][1:] != values[order][:-1]
        kept[order[~best]] = False
    numbers = np.where(kept, np.cumsum(kept), 0).astype(np.int32)
    owners = values[kept].astype(np.int64)
    return Instances(runs.paint(numbers[piece_of]), _scores_of(scores, owners), _engines_of(engines, owners))


def _scores_of(scores: np.ndarray | float, owners: np.ndarray) -> np.ndarray:
    if np.ndim(scores) == 0:
        return np.full(len(owners), np.clip(scores, 0, 1), np.float32)
    known = np.asarray(scores, np.float32)
    _check_known("scores", len(known), owners)
    return np.clip(known[owners - 1], 0, 1)


def _engines_of(engines: Sequence[str] | str, owners: np.ndarray) -> tuple[str, ...]:
    if isinstance(engines, str):
        return (engines,) * len(owners)
    _check_known("engines", len(engines), owners)
    return tuple(engines[value - 1] for value in owners.tolist())


def _check_known(what: str, count: int, owners: np.ndarray) -> None:
    if owners.size and owners.max() > count:
        raise ValueError(f"label {owners.max()} was found but {count} {what}, expected one for each label")


def select_instances(found: Instances, kept: np.ndarray) -> Instances:
    """Only the objects whose entry of kept, (n,) bool, is true; the numbers close up."""
    if kept.all():
        return found
    numbers = np.concatenate([[0], np.cumsum(kept) * kept]).astype(np.int32)
    engines = tuple(name for name, keep in zip(found.engines, kept.tolist(), strict=True) if keep)
    labels = np.take(numbers, found.labels, mode="clip")  # "clip" takes half the time of "raise"
    return Instances(labels, found.scores[kept], engines)


def clean_instances(
    found: Instances,
    *,
    min_area: int = 0,
    max_area: int | None = None,
    fill_holes: int = 0,
    border: Literal["keep", "drop"] = "keep",
) -> Instances:
    """Apply rules about single objects.

    Args:
        found: the objects.
        min_area: smaller objects are dropped, in pixels, holes filled before.
        max_area: larger ones are dropped.
        fill_holes: largest hole that is filled, in pixels; -1 fills all, 0 none. A hole is an 8-connected piece of
            background inside one object; what lies between several objects stays.
        border: drop the objects that touch the frame of the picture, or keep them.
    """
    labels = found.labels
    if fill_holes and len(found):
        labels = _fill_holes(labels, labels.size if fill_holes < 0 else fill_holes)
    kept = np.ones(len(found) + 1, bool)
    if min_area > 1 or max_area is not None:
        runs = find_runs(labels)
        areas = np.bincount(runs.values, runs.lengths, len(kept))
        kept = (areas >= min_area) & (areas <= (labels.size if max_area is None else max_area))
    if border == "drop":
        for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
            kept[edge] = False
    return select_instances(Instances(labels, found.scores, found.engines), kept[1:])


def _fill_holes(labels: np.ndarray, limit: int) -> np.ndarray:
    """Fill background inside one object; the first pixels of objects do not change, so neither do their numbers."""
    height, width = labels.shape
    count, areas, stats, _ = cv2.connectedComponentsWithStats((labels == 0).view(np.uint8), connectivity=8)
    left, top, wide, high, area = stats.T
    inner = (left > 0) & (top > 0) & (left + wide < width) & (top + high < height) & (area <= limit)
    inner[0] = False  # the objects
    places = np.flatnonzero(inner[areas])
    if not len(places):
        return labels
    owner = areas.reshape(-1)[places]
    flat = labels.reshape(-1)
    lowest, highest = np.full(count, np.iinfo(np.int32).max, np.int32), np.zeros(count, np.int32)
    for step in (-1, 1, -width, width):
        beside = flat[places + step]
        touching = beside > 0
        np.minimum.at(lowest, owner[touching], beside[touching])
        np.maximum.at(highest, owner[touching], beside[touching])
    filled = np.where(lowest == highest, highest, 0).astype(np.int32)
    result = labels.copy()
    result.reshape(-1)[places] = filled[owner]
    return result


def paste_masks(
    masks: Sequence[tuple[tuple[int, int], np.ndarray]],
    scores: np.ndarray,
    height: int,
    width: int,
    engine: str,
    *,
    max_overlap: float = 0.5,
    order: Literal["score", "small", "large"] = "score",
) -> Instances:
    """Overlapping masks to one label map.

    Args:
        masks: ((left, top), crop (h, w), bool or non-zero) each; parts outside the picture are cut off.
        scores: (n,) in [0, 1].
        height, width: of the picture.
        engine: who found them.
        max_overlap: a mask with a larger share of its pixels under better ones is dropped as their duplicate.
        order: which mask keeps a pixel that several claim: that of the higher score, the smaller or the larger one.
            Equal ones: the smaller, then the earlier one.

    Returns:
        Objects; one that others cut into pieces keeps its largest.

    Raises:
        ValueError: not one score for each mask.
    """
    if len(scores) != len(masks):
        raise ValueError(f"{len(masks)} masks came with {len(scores)} scores, expected one for each")
    areas = np.array([np.count_nonzero(crop) for _, crop in masks], np.int64)
    scores = np.asarray(scores, np.float32)
    keys = {"score": -scores, "small": areas, "large": -areas}
    labels = np.zeros((height, width), np.int32)
    for number in np.lexsort((areas, keys[order])).tolist():
        (left, top), crop = masks[number]
        window = labels[max(0, top) : max(0, top + crop.shape[0]), max(0, left) : max(0, left + crop.shape[1])]
        inside = crop[max(0, -top) :, max(0, -left) :][: window.shape[0], : window.shape[1]] != 0
        free = inside & (window == 0)
        total, visible = np.count_nonzero(inside), np.count_nonzero(free)
        if visible and total - visible <= max_overlap * total:
            window[free] = number + 1
    return number_instances(labels, scores, [engine] * len(masks))


# ----------------------------------------------------------------------------------------------------------------------
# Measures


def object_rows(found: Instances, image: np.ndarray) -> list[dict[str, Any]]:
    """Measure every object.

    Args:
        found: the objects.
        image: (H, W, C), any type; mean_intensity is over all channels and the finite pixels, in the image's units.

    Returns:
        A row of ROW_COLUMNS for each object, in pixels. The centre of the first pixel is (0, 0). ellipse_*: of the
        ellipse with the same second moments (axes as skimage.measure.regionprops); its angle is that of the long axis
        with the x axis, counter-clockwise on the screen, in degrees from 0 to below 180. solidity: area by the
        pixels whose centres lie in the convex hull of the pixels' centres, 1 for convex objects.
    """
    if not len(found):
        return []
    runs = find_runs(found.labels)
    inside = runs.values > 0
    ids, count = runs.values[inside] - 1, len(found)
    table = {"id": np.arange(1, count + 1)}
    table |= measure_runs(ids, runs.rows[inside], runs.columns[inside], runs.lengths[inside], count)
    sums, amounts = sum_intensities(image, runs)
    table["mean_intensity"] = mean_intensities(ids, sums[inside], amounts[inside], count)
    table["score"] = found.scores.astype(np.float64)
    return list_rows(table, found.engines)


def measure_runs(
    ids: np.ndarray, rows: np.ndarray, columns: np.ndarray, lengths: np.ndarray, count: int
) -> dict[str, np.ndarray]:
    """Sizes, places and shapes of objects from their runs.

    Args:
        ids: (m,) from 0 to count - 1, each at least once, with their rows, first columns and lengths; the rows of
            each object ascend.
        count: objects.

    Returns:
        The columns area to solidity of ROW_COLUMNS, (count,) each; see object_rows.
    """
    area = np.bincount(ids, lengths, count)
    middle = columns + (lengths - 1) / 2
    x, y = np.bincount(ids, lengths * middle, count) / area, np.bincount(ids, lengths * rows, count) / area
    left, right = np.full(count, np.iinfo(np.int64).max), np.zeros(count, np.int64)
    np.minimum.at(left, ids, columns)
    np.maximum.at(right, ids, columns + lengths)
    bottom, top = np.zeros(count, np.int64), np.zeros(count, np.int64)
    bottom[ids], top[ids[::-1]] = rows + 1, rows[::-1]  # of several values for one entry the last one stays
    across, down = middle - x[ids], rows - y[ids]
    xx = np.bincount(ids, lengths * across**2 + lengths * (lengths**2 - 1.0) / 12, count) / area
    yy = np.bincount(ids, lengths * down**2, count) / area
    xy = np.bincount(ids, lengths * across * down, count) / area
    return {
        "area": area.astype(np.int64),
        "centroid_x": x,
        "centroid_y": y,
        "box_left": left,
        "box_top": top,
        "box_width": right - left,
        "box_height": bottom - top,
        "equivalent_diameter": 2 * np.sqrt(area / np.pi),
        **_ellipses(xx, yy, xy),
        "solidity": area / _hull_pixels(ids, rows, columns, lengths, count),
    }


def list_rows(table: dict[str, np.ndarray], engines: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of ROW_COLUMNS from all columns (n,) but that of the engines."""
    lists = {name: _tidy(values) for name, values in table.items()} | {"engine": list(engines)}
    rows = zip(*(lists[name] for name in ROW_COLUMNS), strict=True)
    return [dict(zip(ROW_COLUMNS, row, strict=True)) for row in rows]


def _tidy(values: np.ndarray) -> list[Any]:
    """Numbers of seven significant digits; None for what is not known."""
    if values.dtype.kind != "f":
        return values.tolist()
    magnitude = np.log10(np.abs(values), out=np.zeros_like(values), where=np.abs(values) > 1e-30)
    scale = 10.0 ** np.clip(6 - np.floor(magnitude), 0, 30)
    return [value if value == value else None for value in (np.round(values * scale) / scale).tolist()]


def _ellipses(xx: np.ndarray, yy: np.ndarray, xy: np.ndarray) -> dict[str, np.ndarray]:
    """Axes and angle of ellipses from second central moments, (n,) each."""
    half, spread = (xx + yy) / 2, np.hypot((xx - yy) / 2, xy)
    angle = np.degrees(np.arctan2(-2 * xy, xx - yy)) / 2 % 180  # y points down
    angle[(spread <= 1e-9 * half) | (angle > 180 - 1e-9)] = 0  # a disc has no direction
    return {
        "ellipse_major": 4 * np.sqrt(half + spread),
        "ellipse_minor": 4 * np.sqrt(np.maximum(half - spread, 0)),
        "ellipse_angle": angle,
    }


def _hull_pixels(ids: np.ndarray, rows: np.ndarray, columns: np.ndarray, lengths: np.ndarray, count: int) -> np.ndarray:
    """Pixels whose centres lie in the convex hull of each object's centres, (count,), by Pick's theorem.

    Args:
        ids: (m,) of the runs from 0, with their rows, first columns and lengths.
    """
    order = np.argsort(ids, kind="stable")
    ends = np.stack([columns, rows, columns + lengths - 1, rows], axis=1)[order].astype(np.int32).reshape(-1, 1, 2)
    stops = 2 * np.cumsum(np.bincount(ids, minlength=count))
    bounds = zip([0, *stops[:-1].tolist()], stops.tolist(), strict=True)
    hulls = [cv2.convexHull(ends[start:stop]) for start, stop in bounds]
    sizes = np.array([len(hull) for hull in hulls])
    corners = np.concatenate(hulls).reshape(-1, 2).astype(np.int64)
    firsts = np.cumsum(sizes) - sizes
    after = np.arange(1, len(corners) + 1)
    after[firsts + sizes - 1] = firsts
    step = corners[after] - corners
    twice = corners[:, 0] * step[:, 1] - corners[:, 1] * step[:, 0]
    doubled = np.abs(np.add.reduceat(twice, firsts))
    on_edge = np.add.reduceat(np.gcd(step[:, 0], step[:, 1]), firsts)
    return doubled / 2 + on_edge / 2 + 1


def sum_intensities(image: np.ndarray, runs: Runs) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the finite values (H, W, C) below each run, over all channels, and how many they are: (m,) float64."""
    sums, amounts = np.zeros(len(runs.places)), np.zeros(len(runs.places))
    for c in range(image.shape[2]):
        values = image[..., c].reshape(-1).astype(np.float32)
        if image.dtype.kind != "f":
            amounts += runs.lengths
        else:
            finite = np.isfinite(values)
            values[~finite] = 0
            amounts += np.add.reduceat(finite.astype(np.float32), runs.places)
        sums += np.add.reduceat(values, runs.places)
    return sums, amounts


def mean_intensities(ids: np.ndarray, sums: np.ndarray, amounts: np.ndarray, count: int) -> np.ndarray:
    """Mean value of each object, (count,) float64, from those of its runs (m,); NaN where none is finite."""
    total, number = np.bincount(ids, sums, count), np.bincount(ids, amounts, count)
    return np.divide(total, number, out=np.full(count, np.nan), where=number > 0)


# ----------------------------------------------------------------------------------------------------------------------
# Objects apart in a binary mask


def gap_mask(labels: np.ndarray, gap: int) -> np.ndarray:
    """A mask in which objects that touch are parted.

    Where two objects come closer than `gap` pixels, the larger gives way by half of it, rounded up, the smaller by
    the rest. Of an object that a gap cuts through its largest piece stays. So every object is one 4-connected piece
    of the mask, and touches no other, not by a corner either. An object that would vanish keeps
    one pixel and takes its neighbours' room; only where objects of a pixel or two are packed without background can
    they still touch.

    Args:
        labels: (H, W) int32, 0 background, objects 1..n.
        gap: pixels; 0 paints the objects as they are.

    Returns:
        (H, W) uint8, 0 or 255.
    """
    if gap < 1 or not labels.any():
        return np.where(labels > 0, np.uint8(255), np.uint8(0))
    runs = find_runs(labels)
    areas = np.bincount(runs.values, runs.lengths).astype(np.int64)
    kind = np.uint16 if len(areas) < 65_535 else np.float32  # what OpenCV filters
    rank = np.zeros(len(areas), kind)
    rank[1 + np.argsort(areas[1:], kind="stable")] = np.arange(1, len(areas))
    rank[0] = len(areas)  # the background: above all
    ranks = runs.paint(rank[runs.values])
    lowest = cv2.erode(ranks, np.ones((2 * ((gap + 1) // 2) + 1,) * 2, np.uint8))
    mask = (lowest == ranks).view(np.uint8) * np.uint8(255)
    if gap > 1:
        rank[0] = 0
        ranks = runs.paint(rank[runs.values])
        highest = cv2.dilate(ranks, np.ones((2 * (gap // 2) + 1,) * 2, np.uint8))
        mask[highest > ranks] = 0
    mask[labels == 0] = 0
    left = _keep_one_piece(mask, labels, len(areas))
    if _restore(mask, labels, left):
        _keep_one_piece(mask, labels, len(areas))
    return mask


def _keep_one_piece(mask: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Of the 4-connected pieces of one object clear all but the largest, in place.

    Returns:
        Pixels of each label that are left, (count,) int64.
    """
    number, pieces = cv2.connectedComponents(mask, connectivity=4)
    runs = find_runs(pieces)
    owner = np.zeros(number, np.int64)
    owner[runs.values] = labels.reshape(-1)[runs.places]
    owner[0] = 0
    areas = np.bincount(runs.values, runs.lengths, number).astype(np.int64)
    order = np.lexsort((-areas, owner))
    extra = np.zeros(number, bool)
    extra[order[1:]] = owner[order][1:] == owner[order][:-1]
    extra[0] = False
    if extra.any():
        mask[extra[pieces]] = 0
    left = np.zeros(count, np.int64)
    left[owner[~extra]] = areas[~extra]
    return left


def _restore(mask: np.ndarray, labels: np.ndarray, left: np.ndarray) -> bool:
    """Give objects with no pixel left one each, and free it of neighbours, in place; whether there were any."""
    gone = left == 0
    gone[0] = False
    places = np.flatnonzero(gone[labels]) if gone.any() else np.zeros(0, np.int64)
    owners = labels.reshape(-1)[places]  # a label that never was owns no place
    for label in np.unique(owners).tolist():
        own = places[owners == label]
        row, column = divmod(int(own[len(own) // 2]), labels.shape[1])
        near = np.s_[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
        others = np.unique(labels[near][(mask[near] > 0) & (labels[near] != label)])
        lost = [np.count_nonzero((mask[near] > 0) & (labels[near] == other)) for other in others.tolist()]
        for other, number in zip(others.tolist(), lost, strict=True):
            if left[other] > number:
                left[other] -= number
                mask[near][labels[near] == other] = 0
        mask[row, column] = 255
        left[label] = 1
    return len(places) > 0
