"""Polygons against shapely's union of pixels; painting against a ray from every pixel centre."""

import tracemalloc
from collections import deque

import cv2
import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from polygons import Polygon, Shape, ShapeIndex, rasterise, rasterise_classes, trace_bands, trace_labels

BAND_HEIGHTS = (1, 2, 3, 7, 1000)


def picture(text: str) -> np.ndarray:
    return np.array([[int(pixel) if pixel.isdigit() else 0 for pixel in line] for line in text.split()], np.uint8)


def label(classes: np.ndarray) -> np.ndarray:
    """4-connected regions of equal class by flood filling, numbered in raster order."""
    labels = np.zeros(classes.shape, np.uint32)
    for start in np.argwhere(classes):
        if labels[tuple(start)]:
            continue
        labels[tuple(start)] = labels.max() + 1
        queue = deque([tuple(start)])
        while queue:
            y, x = queue.popleft()
            for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                inside = 0 <= near[0] < labels.shape[0] and 0 <= near[1] < labels.shape[1]
                if inside and labels[near] == 0 and classes[near] == classes[y, x]:
                    labels[near] = labels[y, x]
                    queue.append(near)
    return labels


def label_fast(mask: np.ndarray) -> np.ndarray:
    return cv2.connectedComponents(mask.astype(np.uint8), connectivity=4, ltype=cv2.CV_32S)[1].astype(np.uint32)


def cut(labels: np.ndarray, height: int) -> list[tuple[int, np.ndarray]]:
    return [(top, labels[top : top + height]) for top in range(0, len(labels), height)]


def spell(polygons) -> list:
    return [(polygon.label, polygon.area, [ring.tolist() for ring in polygon.rings]) for polygon in polygons]


def check_ring(ring: np.ndarray) -> None:
    """Closed, along the lattice, turning at every point."""
    assert ring[0].tolist() == ring[-1].tolist()
    steps = np.diff(ring, axis=0)
    assert ((steps == 0).sum(axis=1) == 1).all()
    assert ((steps[:, 0] == 0) != (np.roll(steps, 1, axis=0)[:, 0] == 0)).all()


def check_polygons(labels: np.ndarray) -> list[Polygon]:
    """Every promise about the polygons of a label map, and that bands of any height give the same."""
    polygons = trace_labels(labels)
    assert sorted(polygon.label for polygon in polygons) == np.unique(labels[labels > 0]).tolist()
    for polygon in polygons:
        outline = shapely.Polygon(polygon.exterior, polygon.holes)
        assert outline.is_valid, shapely.is_valid_reason(outline)
        assert outline.exterior.is_ccw and not any(hole.is_ccw for hole in outline.interiors)
        for ring in polygon.rings:
            check_ring(ring)
        y, x = np.nonzero(labels == polygon.label)
        assert outline.area == polygon.area == len(y)
        assert outline.equals(shapely.union_all(shapely.box(x, y, x + 1, y + 1)))
    for height in BAND_HEIGHTS:
        assert spell(trace_bands(cut(labels, height))) == spell(polygons)
    lowest = [(int(polygon.exterior[:, 1].max()), polygon.label) for polygon in polygons]
    assert lowest == sorted(lowest)
    shapes = [shape_of(polygon) for polygon in polygons]
    assert np.array_equal(rasterise(shapes, 0, 0, *labels.shape), labels > 0)
    return polygons


def shape_of(polygon: Polygon, name: str | None = None, scale: float = 1.0) -> Shape:
    return Shape(name, tuple(ring * scale for ring in polygon.rings))


SPIRAL = """
    1111111111
    .........1
    11111111.1
    1......1.1
    1.1111.1.1
    1.1..1.1.1
    1.11.1.1.1
    1....1.1.1
    111111.1.1
    .......1.1
"""
NESTED = """
    1111111111
    1........1
    1.222222.1
    1.2....2.1
    1.2.33.2.1
    1.2..4.2.1
    1.2....2.1
    1.222222.1
    1........1
    1111111111
"""
TOUCHING = """
    111.....
    1.1.11..
    11.111..
    .1111.11
    ..1.1111
    ..11.1.1
    ...11111
"""
DIAMOND = """
    .....
    ..1..
    .111.
    11.11
    .1.1.
    .111.
"""
PICTURES = {
    "pixel": "1",
    "full": "\n".join(["11111"] * 4),
    "row": "1111111",
    "column": "1\n1\n1\n1",
    "neighbours": "12\n21",
    "spiral": SPIRAL,
    "nested": NESTED,
    "touching": TOUCHING,
    "diamond": DIAMOND,
    "ring closed by a corner": "111\n1.1\n11.",
    "two holes that touch": "1111\n1.11\n11.1\n1111",
    "hole that touches the outside twice": "1111.\n1.1.1\n11.11\n11111",
    "lines": "1.1.1.1\n1.1.1.1\n1.1.1.1",
    "comb": "1111111\n1.1.1.1\n1.1.1.1",
}


@pytest.mark.parametrize("name", PICTURES)
def test_named_pictures(name):
    check_polygons(label(picture(PICTURES[name])))


@pytest.mark.parametrize("shape", [(1, 1), (6, 7), (16, 16)])
def test_checkerboards(shape):
    board = np.indices(shape).sum(axis=0) % 2
    assert len(check_polygons(label(board))) == board.sum()
    check_polygons(label(board + 1))


@settings(max_examples=150, deadline=None)
@given(
    st.tuples(st.integers(1, 12), st.integers(1, 12)).flatmap(
        lambda shape: arrays(np.uint8, shape, elements=st.integers(0, 2))
    ),
)
def test_small_masks(classes):
    check_polygons(label(classes))


@pytest.mark.parametrize("density", [0.3, 0.5, 0.6, 0.7, 0.9])
def test_noise(density):
    mask = np.random.default_rng(int(density * 10)).random((40, 57)) < density
    check_polygons(label(mask))


def test_known_polygon():
    outer = [[0, 0], [4, 0], [4, 3], [0, 3], [0, 0]]
    hole = [[2, 1], [1, 1], [1, 2], [2, 2], [2, 1]]
    assert spell(trace_labels(label(picture("1111\n1.11\n1111")))) == [(1, 11, [outer, hole])]


def test_ring_closed_by_a_corner_has_a_hole_that_touches_its_exterior():
    (polygon,) = trace_labels(label(picture("111\n1.1\n11.")))
    assert len(polygon.holes) == 1
    assert [2, 2] in polygon.exterior.tolist() and [2, 2] in polygon.holes[0].tolist()


def test_labels_may_be_large_and_far_down():
    labels = np.array([[0, 4294967295, 7]], np.uint32)
    first, second = trace_bands([(2_000_000_000, labels)])
    assert (first.label, second.label) == (7, 4294967295)
    assert second.exterior.tolist()[0] == [1, 2_000_000_000]


def test_one_object_of_many_corners():
    """Holes and turns by the hundred thousand, over the seams of bands and of the blocks that are compared."""
    mask = np.random.default_rng(3).random((700, 700)) < 0.68
    labels = label_fast(mask)
    polygons = list(trace_bands(cut(labels, 64)))
    assert len(polygons) == labels.max()
    areas = np.bincount(labels.ravel())
    assert all(polygon.area == areas[polygon.label] for polygon in polygons)
    largest = max(polygons, key=lambda polygon: polygon.area)
    outline = shapely.Polygon(largest.exterior, largest.holes)
    assert outline.is_valid and outline.area == largest.area and len(largest.holes) > 10_000
    assert np.array_equal(rasterise([largest], 0, 0, 700, 700), labels == largest.label)
    assert spell(trace_bands(cut(labels, 701))) == spell(polygons)


def test_polygons_come_as_objects_close():
    labels = label(picture("11..\n....\n.1..\n.1.1"))
    read = []

    def bands():
        for top, band in cut(labels, 1):
            read.append(top)
            yield top, band

    assert [(polygon.label, read[-1]) for polygon in trace_bands(bands())] == [(1, 1), (2, 3), (3, 3)]


def test_memory_does_not_grow_with_height():
    mask = np.random.default_rng(0).random((64, 512)) < 0.5
    mask[-1] = False
    band = label_fast(mask)

    def peak(count: int) -> int:
        tracemalloc.start()
        found = sum(1 for _ in trace_bands((64 * index, band) for index in range(count)))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert found == count * len(np.unique(band[band > 0]))
        return size

    assert peak(12) < 1.1 * peak(3)


def test_nothing_to_trace():
    assert list(trace_bands([])) == []
    assert list(trace_bands([(0, np.zeros((0, 5), np.uint32)), (0, np.zeros((3, 5), np.uint32))])) == []


@pytest.mark.parametrize(
    ("bands", "message"),
    [
        ([(0, (2, 3)), (3, (2, 3))], "starts at row 3 after one 3 wide that ended at row 2; expected consecutive"),
        ([(0, (2, 3)), (2, (2, 4))], "a band 4 wide starts at row 2 after one 3 wide"),
    ],
)
def test_bands_must_follow_each_other(bands, message):
    with pytest.raises(ValueError, match=message):
        list(trace_bands((top, np.ones(shape, np.uint32)) for top, shape in bands))


@pytest.mark.parametrize("text", ["1.1", "11..\n...1", "111\n1.1\n111\n...\n111"])
def test_a_label_of_two_regions_is_refused(text):
    with pytest.raises(ValueError, match=r"label 1 is not one 4-connected region.*expected a label for each region"):
        trace_labels(picture(text).astype(np.uint32))


# ---- painting


def paint_slowly(shapes, window, scale) -> np.ndarray:
    """Number (from 1) of the last shape that holds the centre of each pixel, by a ray to the left."""
    top, left, height, width = window
    out = np.zeros((height, width), np.int64)
    for number, shape in enumerate(shapes, 1):
        for row, column in np.ndindex(height, width):
            x, y = (left + column + 0.5) * scale, (top + row + 0.5) * scale
            crossings = 0
            for ring in shape.rings:
                for (x0, y0), (x1, y1) in zip(ring[:-1], ring[1:], strict=True):
                    if (y0 <= y) != (y1 <= y):
                        crossings += x0 + (y - y0) * (x1 - x0) / (y1 - y0) < x
            if crossings % 2:
                out[row, column] = number
    return out


def draw_shapes(seed: int, count: int, size: float) -> list[Shape]:
    rng = np.random.default_rng(seed)
    shapes = []
    for index in range(count):
        rings = [rng.uniform(-0.3 * size, 1.3 * size, (rng.integers(3, 9), 2)) for _ in range(rng.integers(1, 4))]
        shapes.append(Shape(f"class {index % 3}", tuple(np.concatenate([ring, ring[:1]]) for ring in rings)))
    return shapes


@pytest.mark.parametrize(
    ("seed", "window", "scale"),
    [(0, (0, 0, 30, 40), 1.0), (1, (7, 11, 13, 9), 1.0), (2, (3, 5, 20, 22), 2.5), (3, (-4, -6, 12, 50), 0.7)],
)
def test_any_rings_are_painted_by_the_even_odd_rule(seed, window, scale):
    shapes = draw_shapes(seed, 5, 40.0)
    expected = paint_slowly(shapes, window, scale)
    assert np.array_equal(rasterise(shapes, *window, scale), expected > 0)
    values = {"class 0": 3, "class 1": 0, "class 2": 300}
    table = np.array([0, *(values[shape.name] for shape in shapes)])
    painted = rasterise_classes(shapes, values, window, scale)
    assert painted.dtype == np.uint16
    assert np.array_equal(painted, table[expected])


def test_windows_fit_together():
    shapes = draw_shapes(5, 12, 700.0)
    index = ShapeIndex(shapes, 1.0)
    whole = index.rasterise(0, 0, 700, 600)
    assert 0.1 < whole.mean() < 0.999
    for top in range(0, 700, 100):
        for left in range(0, 600, 150):
            assert np.array_equal(index.rasterise(top, left, 100, 150), whole[top : top + 100, left : left + 150])


@pytest.mark.parametrize("scale", [1.0, 3.0, 2.37, 0.5])
def test_traced_masks_come_back_at_any_scale(scale):
    classes = np.random.default_rng(9).integers(0, 3, (60, 50)).astype(np.uint8)
    labels = label(classes)
    names = [f"class {classes[labels == number][0]}" for number in range(1, labels.max() + 1)]
    shapes = [shape_of(polygon, names[polygon.label - 1], scale) for polygon in trace_labels(labels)]
    index = ShapeIndex([Shape(shape.name, tuple(map(np.float64, shape.rings))) for shape in shapes], scale)
    assert np.array_equal(index.rasterise_classes({"class 1": 1, "class 2": 2}, 0, 0, 60, 50), classes)
    part = index.rasterise_classes({"class 1": 1, "class 2": 2}, 20, 10, 25, 33)
    assert part.dtype == np.uint8
    assert np.array_equal(part, classes[20:45, 10:43])


def test_long_edges_and_far_points():
    """Edges over thousands of rows, and coordinates no image has, cost no memory."""
    square = np.array([[10, -1e300], [1e300, -1e300], [1e300, 1e300], [10, 1e300], [10, -1e300]])
    index = ShapeIndex([Shape("all", (square,))])
    assert len(index._slab) == 0  # nothing is cut into pieces
    assert np.array_equal(index.rasterise(50_000, 0, 3, 20), np.tile(np.arange(20) >= 10, (3, 1)))


def test_open_rings_are_closed():
    ring = np.array([[0, 0], [4, 0], [4, 4], [0, 4]])
    assert rasterise([Shape(None, (ring,))], 0, 0, 4, 4).all()


def test_no_shapes_or_none_in_the_window():
    assert not rasterise([], 0, 0, 3, 4).any()
    away = [Shape("a", (np.array([[90.0, 90], [95, 90], [95, 95], [90, 90]]),))]
    assert rasterise_classes(away, {"a": 1}, (0, 0, 3, 4)).tolist() == np.zeros((3, 4)).tolist()


def test_more_pixels_than_are_painted_at_a_time():
    squares = [
        Shape("ab"[side % 2], (np.array([[0, 0], [side, 0], [side, side], [0, side], [0, 0]]),))
        for side in (1500, 1401, 1300, 1201)
    ]
    painted = rasterise_classes(squares, {"a": 1, "b": 2}, (0, 0, 1600, 1600))
    expected = np.zeros((1600, 1600))
    for side in (1500, 1401, 1300, 1201):
        expected[:side, :side] = 1 + side % 2
    assert np.array_equal(painted, expected)


def test_classes_need_values():
    shapes = draw_shapes(0, 3, 10.0)
    with pytest.raises(ValueError, match=r"\['class 1', 'class 2'\], which have no value; expected \['class 0'\]"):
        rasterise_classes(shapes, {"class 0": 1}, (0, 0, 4, 4))
    with pytest.raises(ValueError, match=r"values \[-1, 70000\]; expected 0 to 65535"):
        rasterise_classes(shapes, {"class 0": -1, "class 1": -1, "class 2": 70000}, (0, 0, 4, 4))
