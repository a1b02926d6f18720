"""Watersheds as trees of basins: every pixel climbs to a summit, and summits join over their passes.

The parting of a mask into objects is one sweep: each pixel points at its highest neighbour, pointers are followed to
the end, and the basins found so are joined in the order of the passes between them. The rule that stops a join is what
is elsewhere called h-maxima (a summit has to rise by h above its highest pass), a neck (the pass has to be low compared
with the lower summit) or a minimum distance, so no reconstruction and no queue of pixels is needed.
"""

from collections.abc import Callable

import cv2
import numpy as np

STRIP = 1 << 20  # pixels of a strip of rows: large arrays cost more to get than to fill
CHUNK = 1 << 15  # pixels at a time: what is computed of them stays in the processor's cache
NEIGHBOURS = ((-1, 0), (0, -1), (0, 1), (1, 0), (-1, -1), (-1, 1), (1, -1), (1, 1))


def climb(heights: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Part a mask into the basins of attraction of its summits.

    Args:
        heights: (H, W) float32, finite.
        mask: (H, W) bool; what lies outside belongs to no basin.

    Returns:
        (H, W) int32, 0 outside and basins 1..n in reading order of their summits, and the places of the summits in
        the flattened map, (n,). A plateau may hold several summits; their pass is as high as they are.
    """
    height, width = mask.shape
    row = width + 2
    framed = np.full((height + 2, row), -np.inf, np.float32)
    np.copyto(framed[1:-1, 1:-1], heights, where=mask)
    flat = framed.reshape(-1)
    places = np.flatnonzero(flat > -np.inf)
    rank = np.zeros(flat.size, np.int32)
    rank[places] = np.arange(len(places), dtype=np.int32)
    target = np.empty(len(places), np.int32)
    for start in range(0, len(places), CHUNK):
        target[start : start + CHUNK] = rank.take(_highest_neighbours(flat, places[start : start + CHUNK], row))
    _follow(target)
    summits = np.flatnonzero(target == np.arange(len(target), dtype=np.int32))
    number = np.zeros(len(places), np.int32)
    number[summits] = np.arange(1, len(summits) + 1, dtype=np.int32)
    basins = np.zeros(flat.size, np.int32)
    basins[places] = look_up(number, target)
    rows, columns = np.divmod(places[summits], row)
    return np.ascontiguousarray(basins.reshape(framed.shape)[1:-1, 1:-1]), (rows - 1) * width + columns - 1


def _highest_neighbours(flat: np.ndarray, places: np.ndarray, row: int) -> np.ndarray:
    """The place of the highest of each pixel and its eight neighbours; the pixel itself where none is higher."""
    best, target = flat.take(places), places.copy()
    for down, right in NEIGHBOURS:
        beside = places + (down * row + right)
        value = flat.take(beside)
        higher = value > best
        np.copyto(best, value, where=higher)
        np.copyto(target, beside, where=higher)
    return target


def _follow(target: np.ndarray) -> None:
    """Follow pointers to their ends, in place: (n,) int32 places in the array itself."""
    for start in range(0, len(target), CHUNK):
        part = target[start : start + CHUNK]
        while True:
            further = target.take(part)
            if np.array_equal(further, part):
                break
            part[:] = further


def look_up(table: np.ndarray, places: np.ndarray) -> np.ndarray:
    """table[places] for a table (n,) and places of any shape within it, part by part, as that is faster."""
    result = np.empty(places.shape, table.dtype)
    flat_in, flat_out = places.reshape(-1), result.reshape(-1)
    for start in range(0, flat_in.size, CHUNK):
        np.take(table, flat_in[start : start + CHUNK], out=flat_out[start : start + CHUNK], mode="clip")
    return result


def find_passes(basins: np.ndarray, heights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The highest pass between each two basins that touch by a side or a corner.

    Returns:
        Numbers of the two basins and the height of the pass, (m,) each, highest first. A step from one pixel to the
        next is as high as the lower of the two.
    """
    strip = max(1, STRIP // basins.shape[1])
    found = [
        _find_steps(basins[top : top + strip + 1], heights[top : top + strip + 1])
        for top in range(0, len(basins), strip)
    ]
    firsts, seconds, passes = zip(*found, strict=True)
    first, second = np.concatenate(firsts).astype(np.int64), np.concatenate(seconds).astype(np.int64)
    over = np.concatenate(passes)
    order = np.lexsort((-over, second, first))
    first, second, over = first[order], second[order], over[order]
    best = np.ones(len(first), bool)
    best[1:] = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
    first, second, over = first[best], second[best], over[best]
    order = np.argsort(-over, kind="stable")
    return first[order], second[order], over[order]


def _find_steps(basins: np.ndarray, heights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each step between two basins: the lower and the higher number, and the lower height."""
    height, width = basins.shape
    numbers = np.zeros((height + 1, width + 2), np.float32)  # exact up to 2^24 basins
    numbers[:-1, 1:-1] = basins
    inner = numbers > 0
    edge = inner & (cv2.dilate(numbers, np.ones((3, 3), np.uint8)) > numbers)
    places = np.flatnonzero(edge | inner & _sees_less(numbers))
    flat = numbers.reshape(-1)
    framed = np.zeros(numbers.shape, np.float32)
    framed[:-1, 1:-1] = heights
    high = framed.reshape(-1)
    firsts, seconds, passes = [], [], []
    own, rise = flat.take(places), high.take(places)
    for step in (1, width + 2, width + 3, width + 1):
        beside = np.minimum(places + step, flat.size - 1)
        other = flat.take(beside)
        meets = (other != own) & (other > 0)
        firsts.append(np.minimum(own[meets], other[meets]))
        seconds.append(np.maximum(own[meets], other[meets]))
        passes.append(np.minimum(rise[meets], high.take(beside[meets])))
    return np.concatenate(firsts), np.concatenate(seconds), np.concatenate(passes)


def _sees_less(numbers: np.ndarray) -> np.ndarray:
    """Whether a neighbour has a lower number that is not 0, (H, W) bool."""
    filled = np.where(numbers > 0, numbers, np.float32(np.inf))
    return cv2.erode(filled, np.ones((3, 3), np.uint8)) < filled


def join_basins(
    tops: np.ndarray, passes: tuple[np.ndarray, np.ndarray, np.ndarray], apart: Callable[[float, float], bool]
) -> np.ndarray:
    """Join basins over their passes, from the highest pass down.

    Args:
        tops: (n,) heights of the summits of basins 1..n.
        passes: as find_passes gives them.
        apart: whether two groups of basins stay apart, of the height of the lower summit and of the pass.

    Returns:
        (n + 1,) int32: the group of each basin, named after the basin of its highest summit; 0 for 0.
    """
    parent = list(range(len(tops) + 1))
    top = [0.0, *tops.tolist()]

    def root_of(basin: int) -> int:
        while parent[basin] != basin:
            parent[basin] = parent[parent[basin]]
            basin = parent[basin]
        return basin

    for first, second, over in zip(*(part.tolist() for part in passes), strict=True):
        high, low = root_of(first), root_of(second)
        if high == low:
            continue
        if (top[high], -high) < (top[low], -low):
            high, low = low, high
        if not apart(top[low], over):
            parent[low] = high
    return np.array([root_of(basin) for basin in range(len(parent))], np.int32)


def part_mask(heights: np.ndarray, mask: np.ndarray, *, neck: float, depth: float) -> np.ndarray:
    """Part a mask where its landscape has a pass that is low on both sides.

    Args:
        heights: (H, W) float32, finite, above 0 inside the mask.
        mask: (H, W) bool.
        neck: two parts stay apart when the pass is lower than this share of the lower summit, in [0, 1].
        depth: and at least so much lower than it (the h of h-maxima).

    Returns:
        (H, W) int32 label map with gaps between the numbers.
    """
    basins, summits = climb(heights, mask)
    passes = find_passes(basins, heights)

    def apart(top: float, over: float) -> bool:
        return over < neck * top and top - over >= depth

    return look_up(join_basins(heights.reshape(-1)[summits], passes, apart), basins)


def part_by_distance(heights: np.ndarray, mask: np.ndarray, spacing: int) -> np.ndarray:
    """Part a mask between summits that are the highest within some distance of themselves.

    Args:
        heights: (H, W) float32, finite.
        mask: (H, W) bool.
        spacing: a summit counts when nothing is higher in the square of so many pixels to each side; of equally high
            ones, of which ridges have many, the first does.

    Returns:
        (H, W) int32 label map with gaps between the numbers. A part without such a summit belongs to the neighbour
        over its highest pass.
    """
    basins, summits = climb(heights, mask)
    flat = heights.reshape(-1)
    square = np.ones((2 * spacing + 1,) * 2, np.uint8)
    inside = np.where(mask, heights, np.float32(-1e30)).astype(np.float32)
    place = np.zeros(flat.size, np.float32)
    place[summits] = np.arange(len(summits), 0, -1)  # exact up to 2^24 summits
    place[summits[flat[summits] < cv2.dilate(inside, square).reshape(-1)[summits]]] = 0
    seeds = (place > 0) & (place >= cv2.dilate(place.reshape(mask.shape), square).reshape(-1))
    passes = find_passes(basins, heights)
    ranks = seeds[summits].astype(np.float64)  # joins keep the larger rank: parts stay apart when both hold a seed
    return look_up(join_basins(ranks, passes, lambda lower, _: lower > 0), basins)


def grow_labels(labels: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """Give each pixel of the limit the number of the nearest labelled pixel.

    Args:
        labels: (H, W) int32 label map.
        limit: (H, W) bool.

    Returns:
        (H, W) int32; labelled pixels outside the limit keep their numbers.
    """
    if not labels.any():
        return labels.copy()
    nearest = nearest_labels(labels)[0]
    nearest[~limit & (labels == 0)] = 0
    return nearest


def nearest_labels(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The number of the nearest labelled pixel, (H, W) int32, and its distance, (H, W) float32; some pixel has one."""
    distance, cell = cv2.distanceTransformWithLabels(
        (labels == 0).view(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    inside = labels > 0
    number: np.ndarray = np.zeros(int(cell.max()) + 1, np.int32)
    number[cell[inside]] = labels[inside]
    return look_up(number, cell), distance
