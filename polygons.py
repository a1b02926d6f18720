"""Label maps -> polygons along pixel edges, band by band, and polygons -> masks, window by window.

Tracing. The corners of a region are the lattice points where its boundary turns. Along a row of the lattice the
corners pair up, first with second, third with fourth, into the horizontal edges; along a column into the vertical
ones. Horizontal and vertical edges taken in turns make the rings, and pointer jumping puts each ring in order, for
all regions that close in a band at once. Where two pixels of a region touch only by their corner, the lattice point
is a corner twice, once round each of the two pixels that are not of the region. A region is 4-connected, so these
two lie on different sides of it (Jordan): no ring passes a point twice, rings touch in points only, and the polygon
is valid.

Coordinates are (x, y) of pixel corners: pixel (row, column) covers x column..column+1, y row..row+1.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_BLOCK = 1 << 18  # pixels compared at a time: the intermediate arrays stay in the cache

# A corner is packed into an int64: row, column, whether a horizontal edge starts here, rank among two at one point.
_ROW, _COLUMN, _START, _SECOND = 32, 2, 2, 1
_COLUMN_BITS = _ROW - _COLUMN

_SLAB = 256  # rows of a slab of ShapeIndex
_LONG = 64  # slabs an edge may cross before it is kept apart
_FAR = 1 << 40  # pixels; what lies further out is moved here
_PAINT = 1 << 20  # pixels painted at a time


@dataclass(frozen=True, eq=False)
class Polygon:
    """The outline of one region in pixel corners.

    The rings are closed (the first point again at the end) and have no collinear points. The shoelace sum of the
    numbers (x, y) is positive for the exterior and negative for holes, which is the order RFC 7946 wants.
    """

    label: int
    exterior: np.ndarray  # (n, 2) int64, from the topmost, then leftmost corner
    holes: tuple[np.ndarray, ...]
    area: int  # pixels

    @property
    def rings(self) -> tuple[np.ndarray, ...]:
        """The exterior, then the holes."""
        return (self.exterior, *self.holes)


@dataclass(frozen=True, eq=False)
class Shape:
    """A polygon that somebody drew: what read_geojson gives and ShapeIndex paints."""

    name: str | None  # of its class
    rings: tuple[np.ndarray, ...]  # closed, (n, 2) float64, pixels; the inside is where a ray crosses an odd number
    feature: int = 0  # its number in the file, from 1


def trace_bands(label_bands: Iterable[tuple[int, np.ndarray]]) -> Iterator[Polygon]:
    """Trace every region of a label map that comes band by band.

    A polygon is yielded at the end of the band whose last row no longer holds its label. The order is that of the
    lowest row, then of the label, whatever the heights of the bands. Kept in memory are the corners of the regions
    that are still open.

    Args:
        label_bands: (top, labels (h, W) of an unsigned type), consecutive from top to bottom. 0 is background; every
            other label is one 4-connected region.

    Raises:
        ValueError: the bands are not consecutive, differ in width, or a label has several outlines.
    """
    waiting: dict[int, list[np.ndarray]] = {}
    above = np.zeros(0, np.uint32)
    bottom = -1
    for top, labels in label_bands:
        if labels.shape[0] == 0:
            continue
        if bottom < 0:
            above = np.zeros(labels.shape[1], labels.dtype)
        elif top != bottom or labels.shape[1] != len(above):
            raise ValueError(
                f"a band {labels.shape[1]} wide starts at row {top} after one {len(above)} wide that ended at row "
                f"{bottom}; expected consecutive bands of one width"
            )
        corners, owners = _find_corners(above, labels, top)
        above, bottom = labels[-1].copy(), top + labels.shape[0]
        yield from _trace_closed(waiting, corners, owners, above)
    if bottom >= 0:
        nothing = np.zeros((1, len(above)), above.dtype)
        yield from _trace_closed(waiting, *_find_corners(above, nothing, bottom), nothing)


def trace_labels(labels: np.ndarray) -> list[Polygon]:
    """Trace a whole label map (H, W); see trace_bands."""
    return list(trace_bands([(0, labels)]))


def _find_corners(above: np.ndarray, labels: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """The corners on the upper edges of a band's rows.

    Returns:
        Packed corners int64, and the labels they belong to; from top to bottom and left to right.
    """
    height, width = labels.shape
    rows = max(1, _BLOCK // width)
    found = []
    for start in range(0, height, rows):
        block = np.zeros((min(rows, height - start) + 1, width + 2), labels.dtype)
        block[0, 1:-1] = labels[start - 1] if start else above
        block[1:, 1:-1] = labels[start : start + rows]
        found.append(_find_block_corners(block, top + start))
    return np.concatenate([corners for corners, _ in found]), np.concatenate([owners for _, owners in found])


def _find_block_corners(block: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """The corners between the rows of a block with a frame of background at its left and right.

    Round a lattice point lie the pixels a b over c d. Each of them tells of at most one corner, of its own region: an
    outer one when both its neighbours differ from it, an inner one when both are like it and the opposite is not.
    """
    across = block[:, 1:] == block[:, :-1]
    down = block[1:] == block[:-1]
    straight = (across[1:] & across[:-1]) | (down[:, 1:] & down[:, :-1])
    y, x = np.divmod(np.flatnonzero(~straight), straight.shape[1])
    a, b, c, d = block[y, x], block[y, x + 1], block[y + 1, x], block[y + 1, x + 1]
    ab, cd, ac, bd = across[y, x], across[y + 1, x], down[y, x], down[y, x + 1]
    pixels = np.stack([a, b, c, d], axis=1)
    like_beside = np.stack([ab, ab, cd, cd], axis=1)
    like_upright = np.stack([ac, bd, ac, bd], axis=1)
    is_corner = (like_beside == like_upright) & (pixels != 0)
    # Edges above the region run right, edges below it run left: where do they start?
    packed = (like_beside ^ np.array([True, False, False, True])).astype(np.int64) * _START
    # Of two corners at a point the order of pixels is the order along the row; along the column:
    packed[:, 0] |= a == d
    packed[:, 2] |= b == c
    packed |= (((y + top) << _ROW) | (x << _COLUMN))[:, None]
    return packed[is_corner], pixels[is_corner]


def _trace_closed(
    waiting: dict[int, list[np.ndarray]], corners: np.ndarray, owners: np.ndarray, last_row: np.ndarray
) -> Iterator[Polygon]:
    """Trace the regions that are not in the last row; the corners of the others wait."""
    order = np.argsort(owners, kind="stable")
    corners, owners = corners[order], owners[order]
    labels, firsts = np.unique(owners, return_index=True)
    ends = np.append(firsts[1:], len(owners))
    is_open = np.isin(labels, last_row)
    for label, first, end in zip(*(part[is_open].tolist() for part in (labels, firsts, ends)), strict=True):
        waiting.setdefault(label, []).append(corners[first:end].copy())
    closed = labels[~is_open]
    if len(closed) == 0:
        return
    is_closed = np.repeat(~is_open, ends - firsts)
    corners, numbers = corners[is_closed], np.repeat(np.arange(len(closed)), (ends - firsts)[~is_open])
    earlier = [(number, waiting.pop(label)) for number, label in enumerate(closed.tolist()) if label in waiting]
    if earlier:
        parts = [part for _, parts in earlier for part in parts]
        sizes = [sum(map(len, parts)) for _, parts in earlier]
        numbers = np.concatenate([np.repeat([number for number, _ in earlier], sizes), numbers])
        corners = np.concatenate([*parts, corners])
        order = np.argsort(numbers, kind="stable")
        corners, numbers = corners[order], numbers[order]
    yield from _build_polygons(closed, corners, numbers)


def _build_polygons(labels: np.ndarray, corners: np.ndarray, numbers: np.ndarray) -> Iterator[Polygon]:
    """Link the corners of whole regions to polygons.

    Args:
        labels: (k,) of the regions, ascending.
        corners: packed, all of region 0, then of region 1, ...; each region's along the rows, from top to bottom.
        numbers: which of the regions each corner belongs to.
    """
    points = np.stack([(corners >> _COLUMN) & ((1 << _COLUMN_BITS) - 1), corners >> _ROW], axis=1)
    starts = np.arange(0, len(corners), 2) + ((corners[::2] & _START) == 0)  # corners 2k and 2k+1 share an edge
    following = _pair_along_columns(corners, numbers)[starts ^ 1] >> 1
    rings, places, lengths = _order_rings(following)

    outline = np.empty((len(corners) + len(lengths), 2), np.int64)
    ring_ends = np.cumsum(2 * lengths + 1)
    ring_firsts = ring_ends - 2 * lengths - 1
    slots = ring_firsts[rings] + 2 * places
    outline[slots], outline[slots + 1] = points[starts], points[starts ^ 1]
    outline[ring_ends - 1] = outline[ring_firsts]

    ring_owners = np.empty(len(lengths), np.int64)
    ring_owners[rings] = numbers[::2]
    areas = _ring_areas(outline, ring_firsts)
    firsts = np.searchsorted(ring_owners, np.arange(len(labels) + 1))  # of each region's rings; its exterior is first
    _check_one_exterior(labels, areas, firsts)
    totals = np.add.reduceat(areas, firsts[:-1]).tolist()
    lowest = points[np.searchsorted(numbers, np.arange(len(labels)), side="right") - 1, 1]
    bounds = list(zip(ring_firsts.tolist(), ring_ends.tolist(), strict=True))
    spans, names = firsts.tolist(), labels.tolist()
    for region in np.argsort(lowest, kind="stable").tolist():
        exterior, *holes = (outline[first:end] for first, end in bounds[spans[region] : spans[region + 1]])
        yield Polygon(names[region], exterior, tuple(holes), totals[region])


def _pair_along_columns(corners: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The other end of the vertical edge at each corner."""
    column = (corners >> _COLUMN) & ((1 << _COLUMN_BITS) - 1)
    row = (corners >> _ROW << 1) | (corners & _SECOND)
    order = np.lexsort((row, (numbers << _COLUMN_BITS) | column))
    other = np.empty_like(order)
    other[order[::2]], other[order[1::2]] = order[1::2], order[::2]
    return other


def _order_rings(following: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Put the cycles of a permutation in order by pointer jumping.

    Returns:
        For each element its cycle (numbered by their smallest elements) and its place in it (0 is the smallest
        element); the length of each cycle.
    """
    # The smallest element within the next `step` ones, and the way to it, in one number whose minimum is both.
    nearest = np.arange(len(following)) << 32
    jump, step = following, 1
    while True:
        leader = nearest >> 32
        if np.array_equal(leader[following], leader):
            break
        nearest = np.minimum(nearest, nearest[jump] + step)
        jump, step = jump[jump], 2 * step
    way = nearest & 0xFFFFFFFF
    counts = np.bincount(leader, minlength=len(following))
    lengths = counts[counts > 0]
    rings = (np.cumsum(counts > 0) - 1)[leader]
    return rings, np.where(way > 0, lengths[rings] - way, 0), lengths


def _ring_areas(outline: np.ndarray, firsts: np.ndarray) -> np.ndarray:
    """Signed areas of closed rings that lie one after another, (n, 2) int64; exact."""
    steps = np.zeros(len(outline), np.int64)
    steps[:-1] = outline[:-1, 0] - outline[1:, 0]
    steps[firsts[1:] - 1] = 0
    return np.add.reduceat(steps * outline[:, 1], firsts)


def _check_one_exterior(labels: np.ndarray, areas: np.ndarray, firsts: np.ndarray) -> None:
    outer = np.add.reduceat(areas > 0, firsts[:-1], dtype=np.int64)
    if (outer != 1).any():
        label = labels[np.flatnonzero(outer != 1)[0]]
        raise ValueError(
            f"label {label} is not one 4-connected region: it has several outlines; expected a label for each region"
        )


class ShapeIndex:
    """Shapes that are painted window by window; a window looks only at the edges of its own rows.

    A pixel belongs to a shape when its centre lies inside: a ray from it crosses the rings an odd number of times, so
    holes are cut out. Shapes traced from a mask therefore give the mask again.

    Args:
        shapes: polygons in level-0 pixels. Later ones are painted over earlier ones.
        scale: level-0 pixels for each pixel of the windows.
    """

    def __init__(self, shapes: Sequence[Shape | Polygon], scale: float = 1.0) -> None:
        self.shapes = list(shapes)
        rings = [(number, ring) for number, shape in enumerate(self.shapes) for ring in shape.rings]
        head = np.concatenate([np.zeros((0, 2)), *(ring for _, ring in rings)])
        tail = np.concatenate([np.zeros((0, 2)), *(part for _, ring in rings for part in (ring[1:], ring[:1]))])
        head, tail = np.clip(head / scale, -_FAR, _FAR), np.clip(tail / scale, -_FAR, _FAR)
        owner = np.repeat([number for number, _ in rings], [len(ring) for _, ring in rings]).astype(np.int64)
        self._boxes = _find_boxes(head, owner, len(self.shapes))
        upwards = head[:, 1] > tail[:, 1]
        head[upwards], tail[upwards] = tail[upwards], head[upwards]
        first, end = _round_up(head[:, 1] - 0.5), _round_up(tail[:, 1] - 0.5)  # rows whose centres the edge passes
        crosses = first < end
        self._head, self._owner = head[crosses], owner[crosses]
        run, rise = (tail - head)[crosses].T
        self._slope = run / rise
        self._file_slabs(first[crosses], end[crosses])

    def _file_slabs(self, first: np.ndarray, end: np.ndarray) -> None:
        """Cut the edges at the borders of slabs and sort the pieces; very long edges stay whole in a list of theirs."""
        slabs = (end - 1) // _SLAB - first // _SLAB + 1
        self._long = np.flatnonzero(slabs > _LONG)
        self._first, self._end = first, end
        edges = np.repeat(np.flatnonzero(slabs <= _LONG), slabs[slabs <= _LONG])
        slab = first[edges] // _SLAB + _count_within(slabs[slabs <= _LONG])
        order = np.argsort(slab, kind="stable")
        self._slab, self._edge = slab[order], edges[order]

    def rasterise(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Which pixels of a window lie in any shape: (height, width) bool."""
        return self._paint((top, left, height, width), np.ones(len(self.shapes), np.uint8)).astype(bool)

    def rasterise_classes(
        self, values: Mapping[str | None, int], top: int, left: int, height: int, width: int
    ) -> np.ndarray:
        """Paint every shape of a window with the value of its class.

        Args:
            values: class name (None for shapes without) to 0..65535. A class of value 0 erases what lies below it.
            top, left, height, width: the window.

        Returns:
            (height, width) uint8, or uint16 when a value is above 255.

        Raises:
            ValueError: a shape's class has no value, or a value is out of range.
        """
        missing = {shape.name if isinstance(shape, Shape) else None for shape in self.shapes} - set(values)
        if missing:
            raise ValueError(
                f"shapes have the classes {sorted(map(str, missing))}, which have no value; expected "
                f"{sorted(map(str, values))}: name the value of each class, 0 for those to leave out"
            )
        highest = max(values.values(), default=0)
        if min(values.values(), default=0) < 0 or highest > 0xFFFF:
            raise ValueError(f"classes have the values {sorted(set(values.values()))}; expected 0 to 65535")
        names = [shape.name if isinstance(shape, Shape) else None for shape in self.shapes]
        dtype = np.uint8 if highest < 256 else np.uint16
        return self._paint((top, left, height, width), np.array([values[name] for name in names], dtype))

    def _paint(self, window: tuple[int, int, int, int], values: np.ndarray) -> np.ndarray:
        """Paint shape after shape; values (n,) of the shapes."""
        _, _, height, width = window
        out = np.zeros(height * width, values.dtype)
        owners, firsts, ends = self._find_spans(window)
        paint, lengths = values[owners], ends - firsts
        cuts = np.searchsorted(np.cumsum(lengths), np.arange(0, lengths.sum(), _PAINT), side="right")
        for begin, stop in itertools.pairwise([*cuts, len(lengths)]):
            sizes = lengths[begin:stop]
            out[np.repeat(firsts[begin:stop], sizes) + _count_within(sizes)] = np.repeat(paint[begin:stop], sizes)
        return out.reshape(height, width)

    def _find_spans(self, window: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Runs of pixels inside the shapes: shape, first pixel and end in the flattened window; shape after shape."""
        top, left, height, width = window
        low, high = np.searchsorted(self._slab, [top // _SLAB, (top + height - 1) // _SLAB + 1])
        edges, slabs = self._edge[low:high], self._slab[low:high] * _SLAB
        first, end = np.maximum(self._first[edges], slabs), np.minimum(self._end[edges], slabs + _SLAB)
        edges = np.concatenate([edges, self._long])
        first = np.maximum(np.concatenate([first, self._first[self._long]]), top)
        end = np.minimum(np.concatenate([end, self._end[self._long]]), top + height)
        box_left, box_right = self._boxes[self._owner[edges]].T
        meets = (first < end) & (box_left < left + width) & (box_right > left)
        edges, first, rows = edges[meets], first[meets], (end - first)[meets]
        crossing, row = np.repeat(edges, rows), np.repeat(first, rows) + _count_within(rows)
        x = self._head[crossing, 0] + (row + 0.5 - self._head[crossing, 1]) * self._slope[crossing]
        column = np.clip(_round_up(x - 0.5) - left, 0, width)
        line = self._owner[crossing] * height + (row - top)
        owner_rows, columns = np.divmod(np.sort(line * (width + 1) + column), width + 1)
        owners, rows = np.divmod(owner_rows[::2], height)
        return owners, rows * width + columns[::2], rows * width + columns[1::2]


def rasterise(
    shapes: Sequence[Shape | Polygon], top: int, left: int, height: int, width: int, scale: float = 1.0
) -> np.ndarray:
    """Which pixels of one window lie in any shape, (height, width) bool; make a ShapeIndex for several windows."""
    return ShapeIndex(shapes, scale).rasterise(top, left, height, width)


def rasterise_classes(
    shapes: Sequence[Shape],
    values: Mapping[str | None, int],
    window: tuple[int, int, int, int],
    scale: float = 1.0,
) -> np.ndarray:
    """Paint the shapes of one window (top, left, height, width); see ShapeIndex.rasterise_classes."""
    return ShapeIndex(shapes, scale).rasterise_classes(values, *window)


def _find_boxes(points: np.ndarray, owner: np.ndarray, count: int) -> np.ndarray:
    """Left and right end of each shape's points, (count, 2); owner ascends."""
    boxes = np.zeros((count, 2))
    owners, firsts = np.unique(owner, return_index=True)
    if len(owners):
        boxes[owners, 0] = np.minimum.reduceat(points[:, 0], firsts)
        boxes[owners, 1] = np.maximum.reduceat(points[:, 0], firsts)
    return boxes


def _round_up(values: np.ndarray) -> np.ndarray:
    return np.ceil(values).astype(np.int64)


def _count_within(sizes: np.ndarray) -> np.ndarray:
    """0..size-1 for each size, one after another."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
