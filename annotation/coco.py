"""COCO's notation of masks: run lengths down the columns, as a string, and polygons along the edges of pixels.

The strings are those of pycocotools: counts of pixels outside, inside, outside, ...; from the fourth on as the
difference from the count before the last one; in groups of five bits with a sixth that says that more follow.
"""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from annotation.instances import find_runs
from image_headers import ImageError
from polygons import Shape, rasterise, trace_labels

FIRST = 48  # the character of zero
MORE, SIGN = 0x20, 0x10


def encode_objects(labels: np.ndarray) -> list[str]:
    """Run lengths of every object of a label map.

    Args:
        labels: (H, W) int32, objects 1..n.

    Returns:
        The counts as strings, n of them: {"size": [H, W], "counts": each} is an RLE that pycocotools reads.
    """
    if not labels.any():
        return []
    runs = find_runs(cv2.transpose(labels).reshape(1, -1))
    inside = runs.values > 0
    order = np.argsort(runs.values[inside], kind="stable")
    ids, starts, lengths = (part[inside][order] for part in (runs.values, runs.places, runs.lengths))
    return encode_runs(ids, starts, lengths, labels.size)


def encode_runs(ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray, size: int) -> list[str]:
    """Run lengths of objects that are given as runs down the columns.

    Args:
        ids: (m,) from 1, ascending, each at least once. starts, lengths: of the runs, in order, none touching the next.
        size: pixels of the image.
    """
    first = np.ones(len(ids), bool)
    first[1:] = ids[1:] != ids[:-1]
    last = np.roll(first, -1)
    ends = starts + lengths
    before = np.where(first, 0, np.roll(ends, 1))
    rest = size - ends[last]
    # Of each object: gap, run, gap, run, ..., and what is left when there is any.
    tail = np.zeros(len(ids), np.int64)
    tail[last] = rest > 0
    sizes = 2 + tail
    places = np.cumsum(sizes) - sizes
    counts = np.empty(sizes.sum(), np.int64)
    counts[places], counts[places + 1] = starts - before, lengths
    counts[(places + 2)[tail > 0]] = rest[rest > 0]
    totals = np.bincount(ids, sizes)[1:].astype(np.int64)
    return _pack(counts, totals)


def _pack(counts: np.ndarray, totals: np.ndarray) -> list[str]:
    """Strings of several objects' counts, which lie one after another; totals (n,) says how many belong to each."""
    ends = np.cumsum(totals)
    place = np.arange(len(counts)) - np.repeat(ends - totals, totals)
    values = counts - np.where(place > 2, np.roll(counts, 2), 0)
    bits = np.frexp(np.where(values < 0, -1 - values, values).astype(np.float64))[1] + 1  # with the sign
    groups = np.maximum(1, -(-bits // 5))
    stops = np.cumsum(groups)
    text = np.empty(stops[-1], np.uint8)
    for k in range(int(groups.max())):
        some = groups > k
        more = np.where(groups[some] > k + 1, MORE, 0)
        text[(stops - groups)[some] + k] = FIRST + ((values[some] >> 5 * k & 0x1F) | more)
    whole = text.tobytes().decode("ascii")
    cuts = stops[ends - 1].tolist()
    return [whole[start:stop] for start, stop in zip([0, *cuts[:-1]], cuts, strict=True)]


def parse_counts(text: str) -> np.ndarray:
    """The counts (m,) int64 of a string.

    Raises:
        ValueError: it is no such string.
    """
    groups = np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype(np.int64) - FIRST
    if not len(groups) or groups.min() < 0 or groups.max() > 63 or groups[-1] & MORE:
        raise ValueError(f"{text[:20]!r} is no run-length string of COCO, or is cut short")
    last = np.flatnonzero((groups & MORE) == 0)
    starts = np.concatenate([[0], last[:-1] + 1])
    sizes = last - starts + 1
    if sizes.max() > 10:
        raise ValueError(f"{text[:20]!r} is no run-length string of COCO: it holds a number of {sizes.max() * 5} bits")
    place = np.arange(len(groups)) - np.repeat(starts, sizes)
    values = np.add.reduceat((groups & 0x1F) << 5 * place, starts)
    values -= np.where(groups[last] & SIGN, np.int64(1) << 5 * sizes, 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def outlines_of(labels: np.ndarray) -> tuple[list[list[int]], list[bool]]:
    """The outer outline [x, y, x, y, ...] of every object in pixel corners, and which objects have holes.

    COCO's polygons are painted one over the other, so they cannot say what a hole is; use the run lengths there.

    Args:
        labels: (H, W) int32, objects 1..n, each one 4-connected piece.
    """
    polygons = sorted(trace_labels(labels.view(np.uint32)), key=lambda polygon: polygon.label)
    return [each.exterior[:-1].reshape(-1).tolist() for each in polygons], [bool(each.holes) for each in polygons]


Crop = tuple[tuple[int, int], np.ndarray]  # (left, top) and (h, w) bool


def decode_segmentation(segmentation: Any, height: int, width: int) -> Crop:
    """The pixels of one annotation, as a crop of the image.

    Args:
        segmentation: {"size": [H, W], "counts": string or list}, or a list of polygons [x, y, ...], which together
            are the object. A pixel belongs to a polygon when its centre lies inside.
        height, width: of the image.

    Returns:
        (left, top) and the pixels (h, w) bool; h or w is 0 when it covers none.

    Raises:
        ImageError: it is none of these, or is of another size.
    """
    if isinstance(segmentation, dict) and "counts" in segmentation:
        return _decode_runs(segmentation, height, width)
    if isinstance(segmentation, list) and segmentation:
        parts = segmentation if isinstance(segmentation[0], list) else [segmentation]
        return paint_shapes([Shape(None, (_read_ring(part),)) for part in parts], height, width)
    raise ImageError(
        f"has the segmentation {str(segmentation)[:40]}; expected run lengths {{size, counts}} or a list of polygons"
    )


def _decode_runs(segmentation: dict[str, Any], height: int, width: int) -> Crop:
    size, counts = segmentation.get("size"), segmentation["counts"]
    if size != [height, width]:
        raise ImageError(f"has run lengths of size {size}; expected [{height}, {width}] as the image")
    try:
        values = parse_counts(counts) if isinstance(counts, str) else np.array(counts, np.int64).reshape(-1)
    except (ValueError, TypeError, OverflowError) as error:
        raise ImageError(f"has run lengths that cannot be read ({error}); expected counts of pixels") from error
    if (values < 0).any() or values.sum() != height * width:
        raise ImageError(f"has run lengths of {values.sum()} pixels; expected {height * width} as the image")
    ends = np.cumsum(values)
    inside = np.flatnonzero((np.arange(len(values)) % 2 == 1) & (values > 0))
    if not len(inside):
        return (0, 0), np.zeros((0, 0), bool)
    left, right = int(ends[inside[0] - 1]) // height, (int(ends[inside[-1]]) - 1) // height + 1
    edges = np.clip(ends, left * height, right * height)
    lengths = np.diff(edges, prepend=left * height)
    columns = np.repeat(np.arange(len(values)) % 2 == 1, lengths).reshape(right - left, height)
    return _trim(left, 0, columns.T)


def _trim(left: int, top: int, mask: np.ndarray) -> Crop:
    """Cut empty rows and columns off."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return (left, top), mask[:0, :0]
    part = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return (left + int(columns[0]), top + int(rows[0])), np.ascontiguousarray(part)


def _read_ring(part: Any) -> np.ndarray:
    """A closed ring (n, 2) of a list x, y, x, y, ..."""
    try:
        points = np.array(part, np.float64).reshape(-1, 2)
    except (ValueError, TypeError, OverflowError) as error:
        raise ImageError("has a polygon that is no list of numbers x, y, x, y, ...") from error
    if len(points) < 3 or not np.isfinite(points).all():
        raise ImageError(f"has a polygon of {len(points)} points; expected at least three finite ones")
    return np.concatenate([points, points[:1]])


def paint_shapes(shapes: Sequence[Shape], height: int, width: int) -> Crop:
    """The pixels of an image that lie in any of some shapes, as a crop.

    One that holds no pixel's centre is the pixel in its middle, so that no object vanishes.

    Args:
        shapes: in pixel corners of the image, at least one. height, width: of the image.
    """
    points = np.clip(np.concatenate([ring for shape in shapes for ring in shape.rings]), -1, (width + 1, height + 1))
    left, top = np.maximum(0, np.floor(points.min(axis=0))).astype(int).tolist()
    right, bottom = np.minimum((width, height), np.ceil(points.max(axis=0))).astype(int).tolist()
    if right <= left or bottom <= top:
        return (0, 0), np.zeros((0, 0), bool)
    crop = _trim(left, top, rasterise(shapes, top, left, bottom - top, right - left))
    if crop[1].size:
        return crop
    x, y = np.floor((points.min(axis=0) + points.max(axis=0)) / 2).astype(int).tolist()
    return (min(max(x, left), right - 1), min(max(y, top), bottom - 1)), np.ones((1, 1), bool)
