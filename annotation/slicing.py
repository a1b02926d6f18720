"""Sliced inference: a detector goes over a picture piece by piece, so that small objects are large enough for it.

A box that a slice's edge has cut is one with the box of the same object in the neighbouring slice when both agree
where both slices saw: there, cut to what the slices share, they are the same box. The box that is whole stays as it
is; of pieces alone the hull is taken. After that what still overlaps is merged by the rule that was chosen.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from annotation.boxes import (
    Boxes,
    clip_boxes,
    group_numbers,
    join_boxes,
    keep_owners,
    match_boxes,
    merge_boxes,
    no_boxes,
    overlapping_pairs,
)
from annotation.detector_options import SliceOptions
from annotation.detectors import Detector, display_range, to_rgb8

WHOLE_UP_TO = 1.5  # times the network's side: pictures up to here are not sliced by themselves
EDGE_SHARE = 0.01  # a box that ends so near an inner edge of its slice counts as cut
EDGE_PIXELS = 2.0
SAME_OBJECT = 0.5  # IoU of two boxes where both slices saw


# ----------------------------------------------------------------------------------------------------------------------
# Slices


Slice = tuple[int, int, int, int]  # left, top, right, bottom


def plan_axis(length: int, size: int, overlap: float) -> list[int]:
    """Where slices of `size` begin along an axis: evenly spaced, neighbours share at least `overlap` of their size."""
    size = min(size, length)
    step = max(1, int(size * (1 - overlap)))
    count = -(-(length - size) // step) + 1
    return [round(number * (length - size) / max(1, count - 1)) for number in range(count)]


def slice_sides(height: int, width: int, options: SliceOptions, side: int) -> list[tuple[int, int]]:
    """(height, width) of the slices of each pass; none where no slice is smaller than the picture.

    Args:
        side: of the network's input.
    """
    sizes = options.sizes
    if not sizes:
        automatic = side / (options.scale or 1.0)
        sizes = (max(automatic, 2.0),) if max(height, width) > WHOLE_UP_TO * automatic else ()
    sides = []
    for size in sizes:
        high, wide = (size * height, size * width) if size <= 1 else (size, size)
        each = max(1, min(height, round(high))), max(1, min(width, round(wide)))
        if size > 0 and each != (height, width):
            sides.append(each)
    return list(dict.fromkeys(sides))


def plan_slices(height: int, width: int, options: SliceOptions, side: int) -> list[Slice]:
    """All windows that the detector looks at, the whole picture first."""
    sides = slice_sides(height, width, options, side)
    windows = [(0, 0, width, height)] if options.whole or not sides else []
    for high, wide in sides:
        for top in plan_axis(height, high, options.overlap):
            windows += [(left, top, left + wide, top + high) for left in plan_axis(width, wide, options.overlap)]
    return windows


def detect_sliced(
    detector: Detector, image: np.ndarray, options: SliceOptions, limits: tuple[float, float] | None = None
) -> Boxes:
    """Find the objects of a picture slice by slice.

    Only the slices of a batch are held in the form that the detector takes, so memory hardly grows with the picture.

    Args:
        detector: what looks at each slice.
        image: (H, W, C) as image_io.read_image gives it; see detectors.to_rgb8.
        options: how to cut and merge.
        limits: display_range of the whole of which this is a part; None: of this picture.

    Returns:
        Boxes in pixels of the picture, inside it and best first.
    """
    height, width = image.shape[:2]
    limits = limits or display_range(image)
    windows = plan_slices(height, width, options, detector.side)
    parts, regions = [], []
    for group in _batches(windows, detector.batch):
        crops = [to_rgb8(image[top:bottom, left:right], limits) for left, top, right, bottom in group]
        side = _input_side(crops[0], group[0] == (0, 0, width, height), detector, options)
        for window, found in zip(group, detector.detect(crops, side), strict=True):
            parts.append(found.moved(*window[:2]))
            regions += [window] * len(found)
    if not regions:
        return no_boxes(detector.names)
    boxes, seen = join_boxes(parts, detector.names), np.array(regions, np.float64)
    boxes, seen = _drop_odd(boxes, seen, height, width, options)
    if len(windows) == 1:
        return boxes
    boxes = join_cut(boxes, seen, (height, width))
    return merge_boxes(boxes, options.merge, options.match, options.match_threshold)


def _batches(windows: list[Slice], count: int) -> Iterator[list[Slice]]:
    """Windows of one size, `count` at a time."""
    group: list[Slice] = []
    for window in windows:
        same = group and (window[2] - window[0], window[3] - window[1]) == (
            group[0][2] - group[0][0],
            group[0][3] - group[0][1],
        )
        if group and (len(group) == count or not same):
            yield group
            group = []
        group.append(window)
    if group:
        yield group


def _input_side(crop: np.ndarray, is_whole: bool, detector: Detector, options: SliceOptions) -> int | None:
    """Longest side of the input, for networks that take any: slices by scale, the whole picture as it was trained."""
    if not detector.free or options.scale is None or is_whole:
        return None
    return max(32, round(max(crop.shape[:2]) * options.scale))


def _drop_odd(
    boxes: Boxes, seen: np.ndarray, height: int, width: int, options: SliceOptions
) -> tuple[Boxes, np.ndarray]:
    """Leave out boxes that are too small, too large or, by a detector's mistake, outside the picture."""
    xyxy = clip_boxes(boxes.xyxy.astype(np.float64), np.array([0, 0, width, height]))
    sides = xyxy[:, 2:] - xyxy[:, :2]
    kept = (sides > 0).all(axis=1) & (sides >= options.min_side).all(axis=1)
    kept &= sides.prod(axis=1) <= options.max_share * height * width
    return replace(boxes, xyxy=xyxy).take(kept), seen[kept]


# ----------------------------------------------------------------------------------------------------------------------
# Boxes that edges have cut


def find_cut(xyxy: np.ndarray, seen: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Whether boxes (n, 4) end at an edge of their window, (n, 4), that is no edge of the picture: (n,) bool."""
    sides = seen[:, 2:] - seen[:, :2]
    margin = np.tile(np.minimum(np.maximum(EDGE_PIXELS, EDGE_SHARE * sides), sides / 4), 2)
    inner = seen != np.array([0, 0, size[1], size[0]])
    return (inner & (np.abs(xyxy - seen) <= margin)).any(axis=1)


def join_cut(boxes: Boxes, seen: np.ndarray, size: tuple[int, int]) -> Boxes:
    """Make one box of those that edges of slices have cut and what other slices show of the same object.

    Args:
        boxes: of all slices, in pixels of the picture.
        seen: (n, 4), the window that each was found in, as left, top, right, bottom.
        size: (height, width) of the picture.

    Returns:
        Boxes; a cut one is left only where no other slice saw its object.
    """
    xyxy = boxes.xyxy.astype(np.float64)
    cut = find_cut(xyxy, seen, size)
    if not cut.any():
        return boxes
    pairs = []
    for i, j in overlapping_pairs(xyxy):
        asked = (cut[i] | cut[j]) & (boxes.classes[i] == boxes.classes[j]) & (seen[i] != seen[j]).any(axis=1)
        i, j = i[asked], j[asked]
        common = np.hstack([np.maximum(seen[i, :2], seen[j, :2]), np.minimum(seen[i, 2:], seen[j, 2:])])
        match = match_boxes(clip_boxes(xyxy[i], common), clip_boxes(xyxy[j], common), "iou")
        same = match > SAME_OBJECT
        pairs.append((i[same], j[same], match[same]))
    i, j, match = (np.concatenate(part) for part in zip(*pairs, strict=True))
    owners = np.arange(len(boxes))
    # A piece goes to the whole box that it agrees with best ...
    mixed = cut[i] != cut[j]
    piece, whole = np.where(cut[i], i, j)[mixed], np.where(cut[i], j, i)[mixed]
    order = np.argsort(match[mixed], kind="stable")
    owners[piece[order]] = whole[order]
    given = owners != np.arange(len(boxes))
    # ... and pieces without one are joined with each other.
    free = cut[i] & cut[j] & ~given[i] & ~given[j]
    groups = group_numbers(i[free], j[free], len(boxes))
    pieces = np.flatnonzero(cut & ~given)
    joined = keep_owners(boxes.take(pieces), np.searchsorted(pieces, groups[pieces]), hull=True)
    return join_boxes([boxes.take(~cut), joined], boxes.names)
