"""Objects that several engines found in one picture, made into one set of objects; none of them melt into one.

Where two objects claim the same pixels the border runs where both lie equally deep: for two discs through the points
where their outlines cross. An object that lies mostly inside another one either is that one again or keeps its pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import cv2
import numpy as np

from annotation.instances import Instances, empty_instances, number_instances
from annotation.merge_options import MergeOptions
from object_metrics import object_scores

DEFAULT = MergeOptions()

# ----------------------------------------------------------------------------------------------------------------------
# Shapes: the pixels of one object in its box


@dataclass(frozen=True, eq=False)
class Shape:
    """An object that claims pixels.

    Attributes:
        top, left: of its box in the picture.
        depth: (h, w) float32, how deep each pixel lies inside, above 0 there and 0 outside.
        score: in [0, 1]. engine: who found it.
        rank: what comes first when objects compete; smaller is better.
    """

    top: int
    left: int
    depth: np.ndarray
    score: float
    engine: str
    rank: tuple[float, ...] = ()
    area: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "area", int(np.count_nonzero(self.depth)))

    @property
    def window(self) -> tuple[slice, slice]:
        """Its box in the picture."""
        height, width = self.depth.shape
        return np.s_[self.top : self.top + height, self.left : self.left + width]

    @property
    def first(self) -> tuple[int, int]:
        """Row and column of its first pixel in reading order."""
        place = int(np.flatnonzero(self.depth)[0])
        row, column = divmod(place, self.depth.shape[1])
        return self.top + row, self.left + column


def depth_of(mask: np.ndarray) -> np.ndarray:
    """Distance of each pixel to the outside of (h, w) bool, (h, w) float32; beyond the box is outside."""
    framed = cv2.copyMakeBorder(mask.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    return cv2.distanceTransform(framed, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]


def boxes_of(labels: np.ndarray, count: int) -> np.ndarray:
    """Top, left, bottom and right (the last two behind the end) of labels 1..count, (count, 4) int64."""
    rows, columns = np.nonzero(labels)
    values = labels[rows, columns] - 1
    boxes = np.empty((count, 4), np.int64)
    boxes[:, :2], boxes[:, 2:] = max(labels.shape), 0
    np.minimum.at(boxes[:, 0], values, rows)
    np.minimum.at(boxes[:, 1], values, columns)
    np.maximum.at(boxes[:, 2], values, rows + 1)
    np.maximum.at(boxes[:, 3], values, columns + 1)
    return boxes


def _shapes_of(found: Instances, rank: Callable[[float], tuple[float, ...]]) -> list[Shape]:
    """The objects of one engine; rank makes the first part of their rank from the score."""
    shapes = []
    for index, (top, left, bottom, right) in enumerate(boxes_of(found.labels, len(found)).tolist()):
        depth = depth_of(found.labels[top:bottom, left:right] == index + 1)
        score = float(found.scores[index])
        shapes.append(Shape(top, left, depth, score, found.engines[index], (*rank(score), top, left, index)))
    return shapes


# ----------------------------------------------------------------------------------------------------------------------
# Which objects are the same


@dataclass(frozen=True, eq=False)
class Overlaps:
    """Pairs of objects of two engines that share pixels: indices from 0 and pixels, (m,) each."""

    first: np.ndarray
    second: np.ndarray
    shared: np.ndarray
    iou: np.ndarray


def find_overlaps(a: Instances, b: Instances) -> Overlaps:
    """The objects of a and of b that share pixels."""
    both = (a.labels > 0) & (b.labels > 0)
    codes = (a.labels[both].astype(np.int64) - 1) * max(1, len(b)) + b.labels[both] - 1
    pairs, shared = np.unique(codes, return_counts=True)
    first, second = np.divmod(pairs, max(1, len(b)))
    areas_a = np.bincount(a.labels.ravel(), minlength=len(a) + 1)[1:]
    areas_b = np.bincount(b.labels.ravel(), minlength=len(b) + 1)[1:]
    return Overlaps(first, second, shared, shared / (areas_a[first] + areas_b[second] - shared))


def agreement(found: Sequence[Instances]) -> float | None:
    """Share of objects that two engines share: F1 at IoU 0.5, its mean over the pairs of engines.

    None for less than two engines, or when no engine found anything.
    """
    values = []
    for a, b in combinations(found, 2):
        if len(a) + len(b):
            values.append(2 * int(object_scores(a.labels, b.labels).matched[0]) / (len(a) + len(b)))
    return sum(values) / len(values) if values else None


def _clusters(found: Sequence[Instances], limit: float) -> list[list[tuple[int, int]]]:
    """Groups of (engine, object) that are the same object, at most one of each engine; the most alike come first."""
    edges = []
    for (i, a), (j, b) in combinations(enumerate(found), 2):
        pairs = find_overlaps(a, b)
        for k in np.flatnonzero(pairs.iou > limit):
            edges.append((-pairs.iou[k], -pairs.shared[k], (i, int(pairs.first[k])), (j, int(pairs.second[k]))))
    places = [_first_pixels(each) for each in found]
    # What is equally alike is taken by place, never by the order of the engines.
    edges.sort(key=lambda e: (e[0], e[1], sorted((places[e[2][0]][e[2][1]], places[e[3][0]][e[3][1]]))))
    cluster = {(i, k): [(i, k)] for i, each in enumerate(found) for k in range(len(each))}
    for _, _, one, other in edges:
        left, right = cluster[one], cluster[other]
        if left is not right and not {i for i, _ in left} & {i for i, _ in right}:
            left += right
            for member in right:
                cluster[member] = left
    return list({id(members): members for members in cluster.values()}.values())


def _first_pixels(found: Instances) -> list[int]:
    """Place of each object's first pixel in reading order."""
    values, places = np.unique(found.labels, return_index=True)
    return places[values > 0].tolist()


# ----------------------------------------------------------------------------------------------------------------------
# Merging


def merge(found: Sequence[Instances], options: MergeOptions | str = DEFAULT) -> Instances:
    """Make one set of objects of what several engines found in a picture.

    Args:
        found: of each engine; the first has priority under sam_first, the order does not matter under vote.
        options: rules, or the name of the rule alone.

    Returns:
        Objects whose engines are joined by "+" where several found the same. None is lost but duplicates, those that
        better ones cover, and under vote those that too few engines found.

    Raises:
        ValueError: no engine, pictures of different sizes, or an unknown rule.
    """
    options = MergeOptions(options) if isinstance(options, str) else options
    if not found:
        raise ValueError("nothing to merge: expected the objects of at least one engine")
    sizes = {each.labels.shape for each in found}
    if len(sizes) > 1:
        raise ValueError(f"label maps of one picture are {' and '.join(map(str, sorted(sizes)))}; expected one size")
    if len(found) == 1:
        return found[0]
    if options.rule == "vote":
        shapes = _voted(found, options)
    else:
        shapes = _listed(found, options)
    return _paint(shapes, found[0].labels.shape, options)


def _listed(found: Sequence[Instances], options: MergeOptions) -> list[Shape]:
    """All objects without duplicates, the best first."""
    in_order = options.rule == "sam_first"
    shapes = {}
    for i, each in enumerate(found):
        ranks = _shapes_of(each, lambda score, i=i: (i, -score) if in_order else (-score, i))  # type: ignore[misc]
        shapes.update({(i, k): shape for k, shape in enumerate(ranks)})
    kept = []
    for members in _clusters(found, options.duplicate_iou):
        best = min((shapes[member] for member in members), key=lambda shape: shape.rank)
        engine = "+".join(_names(found, members))
        kept.append(Shape(best.top, best.left, best.depth, best.score, engine, best.rank))
    return sorted(kept, key=lambda shape: shape.rank)


def _names(found: Sequence[Instances], members: Sequence[tuple[int, int]]) -> list[str]:
    return sorted({found[i].engines[k] for i, k in members})


def _voted(found: Sequence[Instances], options: MergeOptions) -> list[Shape]:
    """Objects that enough engines found, each with the mean outline; the more votes and the better the score first."""
    needed = min(options.min_votes or len(found) // 2 + 1, len(found))
    boxes = [boxes_of(each.labels, len(each)) for each in found]
    kept = []
    for members in _clusters(found, options.duplicate_iou):
        if len(members) < needed:
            continue
        corners = np.array([boxes[i][k] for i, k in members])
        (top, left), (bottom, right) = corners[:, :2].min(axis=0).tolist(), corners[:, 2:].max(axis=0).tolist()
        crops = [found[i].labels[top:bottom, left:right] == k + 1 for i, k in members]
        score = float(np.sort([found[i].scores[k] for i, k in members]).sum(dtype=np.float64)) / len(found)
        shape = Shape(top, left, mean_shape(crops), score, "+".join(_names(found, members)))
        rank = (-len(members), -score, *shape.first, shape.area)
        kept.append(Shape(top, left, shape.depth, score, shape.engine, rank))
    return sorted(kept, key=lambda shape: shape.rank)


def mean_shape(crops: Sequence[np.ndarray]) -> np.ndarray:
    """The shape midway between masks (h, w) bool of one object: its depth, (h, w) float32.

    Its outline is where the mean of the signed distances to the outlines is 0. If nothing is left of thin shapes that
    miss each other, it is what most of them share, or else what any of them has.
    """
    if len(crops) == 1:
        return depth_of(crops[0])
    signed = [np.where(crop, depth_of(crop) - 0.5, 0.5 - _distance_to(crop)) for crop in crops]
    mean = np.sort(np.array(signed, np.float64), axis=0).sum(axis=0)  # sorted: sums do not depend on the order
    votes = np.sum(crops, axis=0)
    for mask in (mean > 0, 2 * votes > len(crops), votes > 0):
        if mask.any():
            return depth_of(_largest_piece(mask))
    raise ValueError("masks are empty; expected the pixels of one object")


def _distance_to(mask: np.ndarray) -> np.ndarray:
    return cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)


def _largest_piece(mask: np.ndarray) -> np.ndarray:
    count, pieces, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    return mask if count <= 2 else pieces == 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())


def _paint(shapes: Sequence[Shape], size: tuple[int, int], options: MergeOptions) -> Instances:
    """Drop what better ones cover, then share out contested pixels.

    Args:
        shapes: the best first.
    """
    if not shapes:
        return empty_instances(*size)
    free = 1 - options.max_covered
    kept = _fill_up(np.zeros(size, np.int32), shapes, free)
    order = np.flatnonzero(kept)
    areas = np.array([shape.area for shape in shapes])
    firm = np.full(len(shapes), options.rule == "sam_first")  # they take all their pixels from worse ones
    while True:
        labels = _share_out(shapes, order, size, firm, options.max_covered)
        pieces = _numbered(labels, shapes)
        left = np.bincount(labels[pieces.labels > 0], minlength=len(shapes) + 1)[1:]
        worn = kept & ~firm & (left < free / 2 * areas)  # little is left of them
        if not worn.any():
            break
        firm |= worn
    labels[pieces.labels == 0] = 0
    # What was cut off from an object covers nothing any more.
    _fill_up(labels, shapes, free, skip=kept)
    return _numbered(labels, shapes)


def _numbered(labels: np.ndarray, shapes: Sequence[Shape]) -> Instances:
    scores = np.array([shape.score for shape in shapes], np.float32)
    return number_instances(labels, scores, [shape.engine for shape in shapes])


def _fill_up(labels: np.ndarray, shapes: Sequence[Shape], free: float, skip: np.ndarray | None = None) -> np.ndarray:
    """Paint shape k as k + 1 where nothing is, in place, if that is at least the share `free` of its pixels.

    Returns:
        (n,) bool, which were painted; those of `skip` are not.
    """
    painted = np.zeros(len(shapes), bool)
    for k, shape in enumerate(shapes):
        if skip is None or not skip[k]:
            window = labels[shape.window]
            open_pixels = (shape.depth > 0) & (window == 0)
            painted[k] = np.count_nonzero(open_pixels) >= free * shape.area
            if painted[k]:
                window[open_pixels] = k + 1
    return painted


def _share_out(
    shapes: Sequence[Shape], order: np.ndarray, size: tuple[int, int], firm: np.ndarray, max_covered: float
) -> np.ndarray:
    """Labels (H, W) int32: shape k of `order` as k + 1; the worst come first, so better ones see what they lie in.

    Each pixel goes to the highest level, then to the deepest. An object is a level above the worse ones that it lies
    in; firm objects are above everything worse.
    """
    labels, level, depth = np.zeros(size, np.int32), np.zeros(size, np.int32), np.zeros(size, np.float32)
    levels = np.zeros(len(shapes) + 1, np.int32)
    for k in order[::-1].tolist():
        shape = shapes[k]
        inside = shape.depth > 0
        here, heights, depths = labels[shape.window], level[shape.window], depth[shape.window]
        own, below = 0, here[inside]
        if below.any():
            if firm[k]:
                own = int(heights[inside].max()) + 1
            else:
                numbers, counts = np.unique(below, return_counts=True)
                around = numbers[(counts > max_covered * shape.area) & (numbers > 0)]
                own = int(levels[around].max()) + 1 if len(around) else 0
        levels[k + 1] = own
        wins = inside & ((own > heights) | ((own == heights) & (shape.depth >= depths)) | (here == 0))
        here[wins], heights[wins], depths[wins] = k + 1, own, shape.depth[wins]
    return labels
