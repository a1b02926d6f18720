"""Boxes that a detector found: their geometry, and what becomes of boxes that show the same object.

A box is x1, y1, x2, y2 in pixels of an image: the first pixel reaches from 0 to 1, so x2 - x1 is the width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from annotation.detector_options import MATCHES, MERGES

PAIRS_AT_ONCE = 1 << 20  # compared at a time: what bounds the memory
FEW_PAIRS = 1 << 22  # that match and are listed; where more do, the best boxes are taken block by block
BLOCK = 256


Mask = tuple[tuple[int, int], np.ndarray]  # (left, top) of a crop in the image, and the crop (h, w), bool


@dataclass(frozen=True, eq=False)
class Boxes:
    """Objects that a detector found in one image.

    Attributes:
        xyxy: (n, 4) float32 in pixels of the image.
        scores: (n,) float32 in [0, 1].
        classes: (n,) int64, places in names.
        names: of the classes that the detector knows.
        masks: of each object, or None when the detector finds boxes alone.
    """

    xyxy: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    names: tuple[str, ...] = ("object",)
    masks: list[Mask] | None = None

    def __post_init__(self) -> None:
        count = len(self.xyxy)
        object.__setattr__(self, "xyxy", np.asarray(self.xyxy, np.float32).reshape(count, 4))
        object.__setattr__(self, "scores", np.asarray(self.scores, np.float32).reshape(count))
        object.__setattr__(self, "classes", np.asarray(self.classes, np.int64).reshape(count))

    def __len__(self) -> int:
        return len(self.xyxy)

    def take(self, chosen: np.ndarray) -> "Boxes":
        """Some of the boxes, by number or by a bool for each."""
        numbers = np.arange(len(self))[chosen]
        masks = None if self.masks is None else [self.masks[i] for i in numbers]
        return Boxes(self.xyxy[numbers], self.scores[numbers], self.classes[numbers], self.names, masks)

    def moved(self, left: int, top: int) -> "Boxes":
        """The same boxes in an image that has this one at (left, top)."""
        masks = None if self.masks is None else [((x + left, y + top), crop) for (x, y), crop in self.masks]
        return replace(self, xyxy=self.xyxy + np.array([left, top, left, top], np.float64), masks=masks)


def no_boxes(names: tuple[str, ...] = ("object",)) -> Boxes:
    """Of an image in which nothing was found."""
    return Boxes(np.zeros((0, 4)), np.zeros(0), np.zeros(0), names)


def join_boxes(parts: Sequence[Boxes], names: tuple[str, ...]) -> Boxes:
    """Boxes of several passes over one image, in their order; they have masks when all parts do."""
    parts = [part for part in parts if len(part)]
    if not parts:
        return no_boxes(names)
    masks = [mask for part in parts for mask in part.masks or ()]
    return Boxes(
        np.concatenate([part.xyxy for part in parts]),
        np.concatenate([part.scores for part in parts]),
        np.concatenate([part.classes for part in parts]),
        names,
        masks if len(masks) == sum(map(len, parts)) else None,
    )


# ----------------------------------------------------------------------------------------------------------------------
# Geometry


def clip_boxes(xyxy: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Cut boxes (n, 4) to limits, (4,) or (n, 4) as x1, y1, x2, y2; a box outside becomes one without area."""
    low, high = limits[..., [0, 1, 0, 1]], limits[..., [2, 3, 2, 3]]
    return np.minimum(np.maximum(xyxy, low), high)


def box_areas(xyxy: np.ndarray) -> np.ndarray:
    """Areas of boxes (n, 4), (n,); 0 where a side is not positive."""
    sides = np.maximum(xyxy[:, 2:] - xyxy[:, :2], 0)
    return sides[:, 0] * sides[:, 1]


def match_boxes(first: np.ndarray, second: np.ndarray, match: str) -> np.ndarray:
    """How much the boxes of two rows (n, 4) are the same, (n,) in [0, 1].

    Args:
        match: iou, shared area over the area of both; or ios, over that of the smaller.

    Raises:
        ValueError: an unknown measure.
    """
    if match not in MATCHES:
        raise ValueError(f"unknown measure {match!r} of boxes that match; expected one of: {' '.join(MATCHES)}")
    first, second = first.astype(np.float64), second.astype(np.float64)
    low, high = np.maximum(first[:, :2], second[:, :2]), np.minimum(first[:, 2:], second[:, 2:])
    shared = box_areas(np.hstack([low, high]))
    one, other = box_areas(first), box_areas(second)
    whole = one + other - shared if match == "iou" else np.minimum(one, other)
    return np.divide(shared, whole, out=np.zeros(len(first)), where=whole > 0)


def _plan_sweep(xyxy: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    """How boxes (n, 4) are swept, along the axis on which fewer of them stand side by side.

    Returns:
        The axis; the order of the boxes along it; how many of those that follow begin
        before each ends, (n,).
    """
    count = len(xyxy)
    sweeps = []
    for axis in (0, 1):
        order = np.argsort(xyxy[:, axis], kind="stable")
        low, high = xyxy[order, axis], xyxy[order, axis + 2]
        following = np.maximum(np.searchsorted(low, high, "left") - np.arange(1, count + 1), 0)
        sweeps.append((int(following.sum()), axis, order, following))
    return min(sweeps, key=lambda sweep: sweep[:2])[1:]


def overlapping_pairs(xyxy: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs (i, j) of boxes (n, 4) that share an area, each pair once, in parts of bounded size."""
    count = len(xyxy)
    axis, order, following = _plan_sweep(xyxy)
    across = 1 - axis
    ends = np.cumsum(following)
    start = 0
    while start < count:
        done = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + PAIRS_AT_ONCE, "right")))
        lengths = following[start:stop]
        left = np.repeat(np.arange(start, stop), lengths)
        right = left + 1 + np.arange(len(left)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        i, j = order[left], order[right]
        meet = (xyxy[i, across] < xyxy[j, across + 2]) & (xyxy[j, across] < xyxy[i, across + 2])
        yield i[meet], j[meet]
        start = stop


def matching_pairs(
    xyxy: np.ndarray, match: str, threshold: float, classes: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs (i, j) of boxes of one class that match by more than a threshold, as overlapping_pairs gives them."""
    for i, j in overlapping_pairs(xyxy):
        if classes is not None:
            same = classes[i] == classes[j]
            i, j = i[same], j[same]
        over = match_boxes(xyxy[i], xyxy[j], match) > threshold
        yield i[over], j[over]


# ----------------------------------------------------------------------------------------------------------------------
# Boxes of one object


def choose_owners(
    xyxy: np.ndarray,
    scores: np.ndarray,
    classes: np.ndarray | None,
    *,
    merge: str = "nms",
    match: str = "iou",
    threshold: float = 0.5,
) -> np.ndarray:
    """Which box each box gives way to: (n,) numbers of boxes, its own where it stays.

    nms and greedy_nmm: the best box takes all that match it, then the best of the rest does. nmm: all that match,
    directly or through others, go to the best of them. Equal scores count in the order given.

    Args:
        xyxy: (n, 4). scores: (n,).
        classes: (n,), boxes of different classes never match; None: all are one class.
        match, threshold: boxes match when match_boxes is above the threshold.

    Raises:
        ValueError: unknown names.
    """
    if merge not in MERGES:
        raise ValueError(f"unknown way {merge!r} to merge boxes; expected one of: {' '.join(MERGES)}")
    if match not in MATCHES:
        raise ValueError(f"unknown measure {match!r} of boxes that match; expected one of: {' '.join(MATCHES)}")
    order = np.argsort(-np.asarray(scores), kind="stable")
    xyxy = np.asarray(xyxy)[order]
    classes = None if classes is None else np.asarray(classes)[order]
    if merge == "nmm":
        ranks = _joined_owners(xyxy, classes, match, threshold)
    else:
        ranks = _greedy_owners(xyxy, classes, match, threshold)
    owners = np.empty(len(xyxy), np.int64)
    owners[order] = order[ranks]
    return owners


def _joined_owners(xyxy: np.ndarray, classes: np.ndarray | None, match: str, threshold: float) -> np.ndarray:
    """Owners of boxes in the order of their scores: the best that each is connected to by matches."""
    owners = np.arange(len(xyxy))
    for i, j in matching_pairs(xyxy, match, threshold, classes):
        owners = group_numbers(owners[i], owners[j], len(xyxy))[owners]
    return owners


def _greedy_owners(xyxy: np.ndarray, classes: np.ndarray | None, match: str, threshold: float) -> np.ndarray:
    """Owners of boxes in the order of their scores: the first that stands and matches; by a list of all pairs."""
    count, listed = len(xyxy), 0
    pairs = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
    for part in matching_pairs(xyxy, match, threshold, classes):
        pairs.append(part)
        listed += len(part[0])
        if listed > FEW_PAIRS and count > BLOCK:
            return _crowded_owners(xyxy, classes, match, threshold)
    i, j = (np.concatenate(part) for part in zip(*pairs, strict=True))
    i, j = np.minimum(i, j), np.maximum(i, j)
    by_first = np.argsort(i, kind="stable")
    starts = np.searchsorted(i[by_first], np.arange(count + 1)).tolist()
    j = j[by_first]
    owners = np.full(count, -1, np.int64)
    for rank in range(count):
        if owners[rank] < 0:
            owners[rank] = rank
            matched = j[starts[rank] : starts[rank + 1]]
            owners[matched[owners[matched] < 0]] = rank
    return owners


def _crowded_owners(xyxy: np.ndarray, classes: np.ndarray | None, match: str, threshold: float) -> np.ndarray:
    """The same where too many pairs match to list them: the best BLOCK boxes at a time against all that are left."""
    owners = np.full(len(xyxy), -1, np.int64)
    left = np.arange(len(xyxy))
    while len(left):
        head, left = left[:BLOCK], left[BLOCK:]
        own = None if classes is None else classes[head]
        owners[head] = head[_greedy_owners(xyxy[head], own, match, threshold)]
        standing = head[owners[head] == head]
        for start in range(0, len(left), PAIRS_AT_ONCE // BLOCK):
            part = left[start : start + PAIRS_AT_ONCE // BLOCK]
            i, j = (axis.ravel() for axis in np.meshgrid(standing, part, indexing="ij"))
            over = match_boxes(xyxy[i], xyxy[j], match) > threshold
            if classes is not None:
                over &= classes[i] == classes[j]
            table = over.reshape(len(standing), len(part))
            taken = table.any(axis=0)
            owners[part[taken]] = standing[table.argmax(axis=0)[taken]]
        left = left[owners[left] < 0]
    return owners


def group_numbers(i: np.ndarray, j: np.ndarray, count: int) -> np.ndarray:
    """For each of `count` things the lowest number that pairs (i, j) connect it to, itself at most: (count,) int64."""
    links = coo_array((np.ones(len(i), bool), (i, j)), (count, count))
    groups = connected_components(links, directed=False)[1]
    first = np.full(count, count, np.int64)
    np.minimum.at(first, groups, np.arange(count))
    return first[groups]


def suppress(
    xyxy: np.ndarray, scores: np.ndarray, classes: np.ndarray | None, threshold: float, match: str = "iou"
) -> np.ndarray:
    """Non-maximum suppression within classes: numbers of the boxes that stay, best first."""
    owners = choose_owners(xyxy, scores, classes, match=match, threshold=threshold)
    kept = np.flatnonzero(owners == np.arange(len(xyxy)))
    return kept[np.argsort(-np.asarray(scores)[kept], kind="stable")]


def merge_boxes(boxes: Boxes, merge: str, match: str, threshold: float) -> Boxes:
    """Boxes of one object become one: the best of them (nms), or the hull of all (nmm, greedy_nmm), best first.

    A hull has the best score and its class; the masks of all are united.
    """
    rules = {"merge": merge, "match": match, "threshold": threshold}
    owners = choose_owners(boxes.xyxy, boxes.scores, boxes.classes, **rules)  # type: ignore[arg-type]
    return keep_owners(boxes, owners, hull=merge != "nms")


def keep_owners(boxes: Boxes, owners: np.ndarray, *, hull: bool) -> Boxes:
    """The boxes that own themselves, best first; with `hull` each grows to hold all that it owns."""
    kept = np.flatnonzero(owners == np.arange(len(boxes)))
    kept = kept[np.argsort(-boxes.scores[kept], kind="stable")]
    if not hull:
        return boxes.take(kept)
    low, high = boxes.xyxy[:, :2].copy(), boxes.xyxy[:, 2:].copy()
    scores = boxes.scores.copy()
    np.minimum.at(low, owners, boxes.xyxy[:, :2])
    np.maximum.at(high, owners, boxes.xyxy[:, 2:])
    np.maximum.at(scores, owners, boxes.scores)
    masks = boxes.masks and _unite_masks(boxes.masks, owners)
    grown = replace(boxes, xyxy=np.hstack([low, high]), scores=scores, masks=masks)
    return grown.take(kept[np.argsort(-scores[kept], kind="stable")])


def _unite_masks(masks: Sequence[Mask], owners: np.ndarray) -> list[Mask]:
    """At the place of each owner the union of all that it owns; masks of others stay as they are."""
    united = list(masks)
    order = np.argsort(owners, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(owners[order])) + 1):
        if len(members) > 1:
            parts = [masks[i] for i in members]
            left, top = (min(corner[axis] for corner, _ in parts) for axis in (0, 1))
            right = max(x + crop.shape[1] for (x, _), crop in parts)
            bottom = max(y + crop.shape[0] for (_, y), crop in parts)
            whole = np.zeros((bottom - top, right - left), bool)
            for (x, y), crop in parts:
                whole[y - top : y - top + crop.shape[0], x - left : x - left + crop.shape[1]] |= crop
            united[owners[members[0]]] = ((left, top), whole)
    return united
