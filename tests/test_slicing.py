"""Sliced inference: where slices lie, objects cut by them come back once and exactly, scale, odd pictures."""

import argparse
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cli
from annotation import detector_options
from annotation.boxes import Boxes, match_boxes
from annotation.detector_options import SliceOptions
from annotation.slicing import detect_sliced, find_cut, plan_axis, plan_slices, slice_sides

seeds = st.integers(0, 2**32 - 1)


class Rectangles:
    """Finds painted rectangles, each of its own colour, as far as they lie in the slice: exact, cut off at its edges.

    With `mask` also their pixels. Slices that show less than `least` of a rectangle's sides do not find it.
    """

    def __init__(self, *, side=64, batch=1, mask=False, free=False, least=1):
        self.name, self.names, self.note = "rectangles", ("thing",), ""
        self.side, self.batch, self.mask, self.free, self.least = side, batch, mask, free, least
        self.calls, self.sides = [], []

    def detect(self, images, side=None):
        self.calls.append([image.shape[:2] for image in images])
        self.sides.append(side)
        return [self._find(image) for image in images]

    def _find(self, image):
        colour = image[..., 0].astype(int) * 256 + image[..., 1]
        boxes, masks = [], []
        for value in np.unique(colour[colour > 0]):
            rows, columns = np.nonzero(colour == value)
            x1, y1, x2, y2 = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            if min(x2 - x1, y2 - y1) >= self.least:
                boxes.append([x1, y1, x2, y2])
                masks.append(((int(x1), int(y1)), (colour == value)[y1:y2, x1:x2]))
        scores = np.linspace(0.9, 0.5, len(boxes))  # unlike in other slices
        return Boxes(np.reshape(boxes, (-1, 4)), scores, np.zeros(len(boxes)), self.names, masks if self.mask else None)


def paint(height, width, boxes):
    image = np.zeros((height, width, 3), np.uint8)
    for number, (x1, y1, x2, y2) in enumerate(boxes, 1):
        image[y1:y2, x1:x2] = divmod(number * 37 + 1, 256) + (0,)
    return image


def random_rectangles(seed, height, width, count, longest):
    """Rectangles that do not touch each other."""
    rng = np.random.default_rng(seed)
    taken, boxes = np.zeros((height + 2, width + 2), bool), []
    for _ in range(count * 5):
        h, w = rng.integers(4, longest + 1, 2)
        y, x = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
        if len(boxes) < count and not taken[y : y + h + 2, x : x + w + 2].any():
            taken[y + 1 : y + h + 1, x + 1 : x + w + 1] = True
            boxes.append((int(x), int(y), int(x + w), int(y + h)))
    return boxes


def as_set(boxes):
    return sorted(map(tuple, boxes.xyxy.tolist()))


# ---- windows ----


@given(st.integers(1, 3000), st.integers(1, 700), st.floats(0, 0.9))
@settings(max_examples=100, deadline=None)
def test_slices_cover_an_axis_and_share_what_was_asked(length, size, overlap):
    origins = plan_axis(length, size, overlap)
    size = min(size, length)
    assert origins[0] == 0 and origins[-1] == length - size and origins == sorted(set(origins))
    steps = np.diff(origins)
    assert len(steps) == 0 or steps.max() <= max(1, size * (1 - overlap)), "an object of the overlap fits into one"


def test_an_axis_has_no_more_slices_than_needed():
    assert plan_axis(100, 50, 0.0) == [0, 50]
    assert plan_axis(100, 50, 0.5) == [0, 25, 50]
    assert plan_axis(3, 50, 0.2) == [0]


@pytest.mark.parametrize(
    ("sizes", "scale", "expected"),
    [
        ((), None, [(64, 64)]),
        ((), 2.0, [(32, 32)]),
        ((), 0.25, []),
        ((0.0,), None, []),
        ((1.0,), None, []),
        ((0.5,), None, [(100, 150)]),
        ((50.0,), 3.0, [(50, 50)]),
        ((250.0,), None, [(200, 250)]),
        ((0.5, 0.25, 50.0, 0.0), None, [(100, 150), (50, 75), (50, 50)]),
    ],
)
def test_sides_of_slices(sizes, scale, expected):
    assert slice_sides(200, 300, SliceOptions(sizes=sizes, scale=scale), side=64) == expected


def test_pictures_that_the_network_takes_are_not_sliced():
    assert plan_slices(64, 96, SliceOptions(), 64) == [(0, 0, 96, 64)]
    assert len(plan_slices(64, 97, SliceOptions(), 64)) > 1
    assert plan_slices(64, 96, SliceOptions(whole=False), 64) == [(0, 0, 96, 64)], "nothing else would look at it"
    assert (0, 0, 200, 200) not in plan_slices(200, 200, SliceOptions(whole=False), 64)


# ---- objects ----


@given(seeds, st.sampled_from(["nms", "greedy_nmm", "nmm"]), st.sampled_from(["iou", "ios"]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_objects_of_the_overlap_come_back_once_and_exactly(seed, merge, match, whole):
    boxes = random_rectangles(seed, 150, 210, 25, 16)
    options = SliceOptions(sizes=(64.0,), overlap=0.3, merge=merge, match=match, whole=whole)
    found = detect_sliced(Rectangles(), paint(150, 210, boxes), options)
    assert as_set(found) == sorted(boxes)
    assert (np.diff(found.scores) <= 0).all()


@given(seeds, st.booleans())
@settings(max_examples=40, deadline=None)
def test_objects_larger_than_a_slice_are_put_together(seed, mask):
    boxes = random_rectangles(seed, 180, 240, 6, 110)
    options = SliceOptions(sizes=(64.0,), overlap=0.3, whole=False)
    image = paint(180, 240, boxes)
    found = detect_sliced(Rectangles(mask=mask, least=3), image, options)
    assert as_set(found) == sorted(boxes)
    for xyxy, ((left, top), crop) in zip(found.xyxy.tolist(), found.masks or [], strict=False):
        assert [left, top, left + crop.shape[1], top + crop.shape[0]] == xyxy and crop.all()
    assert (found.masks is not None) == (mask and len(boxes) > 0)


def test_plain_suppression_would_leave_pieces():
    """What the joining is for: the same boxes without it."""
    boxes = [(26, 10, 84, 30)]  # the first slice sees its first 38 columns, the second one its last 38
    image = paint(64, 110, boxes)
    options = SliceOptions(sizes=(64.0,), overlap=0.2, whole=False)
    pieces = [
        Rectangles().detect([image[:, left:right]])[0].moved(left, top)
        for left, top, right, _ in plan_slices(64, 110, options, 64)
    ]
    xyxy = np.concatenate([each.xyxy for each in pieces])
    assert len(xyxy) == 2 and match_boxes(xyxy[:1], xyxy[1:], "iou")[0] < 0.5
    assert as_set(detect_sliced(Rectangles(), image, options)) == boxes


def test_neighbours_at_a_seam_stay_two():
    boxes = [(20, 10, 57, 30), (58, 10, 90, 30), (20, 31, 57, 50), (58, 31, 90, 50)]
    options = SliceOptions(sizes=(64.0,), overlap=0.25, whole=False)
    assert as_set(detect_sliced(Rectangles(), paint(64, 110, boxes), options)) == sorted(boxes)


class Known(Rectangles):
    """Finds these boxes as far as they lie in the slice, though they overlap; pixels say where the slice lies."""

    def __init__(self, boxes):
        super().__init__()
        self.boxes = np.array(boxes)

    def _find(self, image):
        left, top = image[0, 0, :2].astype(int).tolist()
        limits = np.array([0, 0, image.shape[1], image.shape[0]])
        cut = np.clip(self.boxes - [left, top, left, top], 0, limits[[2, 3, 2, 3]])
        cut = cut[((cut[:, 2:] - cut[:, :2]) > 0).all(axis=1)]
        return Boxes(cut, np.linspace(0.9, 0.5, len(cut)), np.zeros(len(cut)), self.names)


def places(height, width):
    y, x = np.mgrid[:height, :width].astype(np.uint8)
    return np.dstack([x, y, x * 0])


def test_objects_that_overlap_at_a_seam_stay_two():
    boxes = [(20, 10, 70, 30), (60, 12, 100, 28)]  # the first slice ends at 64, the second begins at 46
    options = SliceOptions(sizes=(64.0,), overlap=0.2, whole=False, match="iou")
    assert as_set(detect_sliced(Known(boxes), places(64, 110), options)) == boxes


@given(seeds, st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_objects_that_overlap_a_little_come_back_once(seed, count):
    rng = np.random.default_rng(seed)
    boxes = []
    for _ in range(count):
        x, y = rng.integers(0, 180), rng.integers(0, 130)
        new = (int(x), int(y), int(x + rng.integers(8, 19)), int(y + rng.integers(8, 19)))
        if all(match_boxes(np.array([new]), np.array([old]), "iou")[0] < 0.2 for old in boxes):
            boxes.append(new)
    options = SliceOptions(sizes=(64.0,), overlap=0.4, whole=bool(seed % 2), match="iou")
    assert as_set(detect_sliced(Known(boxes), places(150, 200), options)) == sorted(boxes)


def test_several_sizes_find_small_and_large():
    boxes = [(0, 0, 150, 150), (160, 10, 164, 14)]
    options = SliceOptions(sizes=(32.0, 160.0), overlap=0.2)
    found = detect_sliced(Rectangles(side=100, batch=3), paint(160, 200, boxes), options)
    assert as_set(found) == boxes


def test_a_piece_that_only_one_slice_found_stays():
    class OnlyFirst(Rectangles):
        def _find(self, image):
            found = super()._find(image)
            self.count = getattr(self, "count", 0) + 1
            return found if self.count == 1 else found.take(np.zeros(len(found), bool))

    options = SliceOptions(sizes=(64.0,), overlap=0.2, whole=False)
    found = detect_sliced(OnlyFirst(), paint(64, 110, [(40, 10, 72, 30)]), options)
    assert as_set(found) == [(40, 10, 64, 30)]


def test_classes_are_not_joined():
    class TwoClasses(Rectangles):
        def _find(self, image):
            found = super()._find(image)
            self.count = getattr(self, "count", 0) + 1
            return Boxes(found.xyxy, found.scores, np.full(len(found), self.count % 2), ("a", "b"))

    options = SliceOptions(sizes=(64.0,), overlap=0.2, whole=False)
    found = detect_sliced(TwoClasses(), paint(64, 110, [(40, 10, 72, 30)]), options)
    assert sorted(found.classes.tolist()) == [0, 1] and len(found) == 2


def test_edges_of_the_picture_cut_nothing():
    seen = np.array([[0, 0, 64, 64], [46, 0, 110, 64], [0, 0, 64, 64.0]])
    xyxy = np.array([[0, 0, 10, 64], [100, 5, 110, 64], [60, 5, 62.5, 9.0]])
    assert find_cut(xyxy, seen, (64, 110)).tolist() == [False, False, True]


def test_sizes_and_shares_of_boxes():
    boxes = [(0, 0, 150, 100), (5, 105, 9, 109), (20, 105, 40, 125)]
    image = paint(130, 150, boxes)
    none = SliceOptions(sizes=(0.0,))
    assert len(detect_sliced(Rectangles(), image, none)) == 3
    assert as_set(detect_sliced(Rectangles(), image, SliceOptions(sizes=(0.0,), max_share=0.5))) == boxes[1:]
    assert as_set(detect_sliced(Rectangles(), image, SliceOptions(sizes=(0.0,), min_side=5))) == [boxes[0], boxes[2]]


def test_boxes_outside_the_picture_are_cut_or_dropped():
    class Wild(Rectangles):
        def detect(self, images, side=None):
            xyxy = [[-20, -20, 10, 10], [500, 500, 600, 600], [5, 5, 5, 9], [3, 3, 1e9, 1e9]]
            return [Boxes(xyxy, [0.9, 0.8, 0.7, 0.6], [0] * 4, self.names) for _ in images]

    found = detect_sliced(Wild(), np.zeros((40, 50, 3), np.uint8), SliceOptions())
    assert as_set(found) == [(0, 0, 10, 10), (3, 3, 50, 40)]


# ---- what the detector is given ----


def test_batches_hold_slices_of_one_size():
    detector = Rectangles(batch=4)
    detect_sliced(detector, np.zeros((150, 210, 3), np.uint8), SliceOptions(sizes=(64.0, 0.5)))
    assert all(len(set(call)) == 1 and len(call) <= 4 for call in detector.calls)
    seen = [size for call in detector.calls for size in call]
    assert seen.count((150, 210)) == 1 and seen.count((64, 64)) == 12 and seen.count((75, 105)) == 9


@pytest.mark.parametrize(("free", "scale", "expected"), [(True, 2.0, 128), (False, 2.0, None), (True, None, None)])
def test_the_scale_is_the_input_of_networks_of_free_size(free, scale, expected):
    detector = Rectangles(free=free)
    detect_sliced(detector, np.zeros((64, 128, 3), np.uint8), SliceOptions(sizes=(64.0,), scale=scale, whole=True))
    assert detector.sides[0] is None and set(detector.sides[1:]) == {expected}


def test_deep_pictures_are_stretched_as_a_whole():
    seen = []

    class Looks(Rectangles):
        def detect(self, images, side=None):
            seen.extend(images)
            return super().detect(images, side)

    ramp = np.linspace(0, 60_000, 200)[None, :, None].repeat(100, axis=0).astype(np.uint16)
    detect_sliced(Looks(), ramp, SliceOptions(sizes=(64.0,), whole=False))
    assert all(image.dtype == np.uint8 and image.shape[2] == 3 for image in seen)
    assert seen[0].max() < 90 and seen[-1].min() > 160, "not each slice for itself"


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 4), (1, 300, 3), (200, 1, 2)])
def test_odd_pictures_have_no_objects(shape):
    for dtype in (np.uint8, np.uint16, np.float32):
        image = np.zeros(shape, dtype)
        found = detect_sliced(Rectangles(), image, SliceOptions(sizes=(64.0, 0.5)))
        assert len(found) == 0 and found.names == ("thing",)


def test_memory_is_that_of_a_few_slices():
    image = np.zeros((3000, 3000, 4), np.uint16)
    detect_sliced(Rectangles(), image[:70, :70], SliceOptions(sizes=(64.0,)))

    class Nothing(Rectangles):
        def detect(self, images, side=None):
            return [Boxes(np.zeros((0, 4)), np.zeros(0), np.zeros(0)) for _ in images]

    tracemalloc.start()
    detect_sliced(Nothing(), image, SliceOptions(sizes=(256.0,), whole=False))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < image.nbytes / 2


def test_flags_become_options():
    parser = cli.make_parser("test")
    detector_options.add_slice_args(parser)
    assert detector_options.slice_options_from(parser.parse_args([])) == SliceOptions()
    words = (
        "--slice 0.5 320 --slice-scale 3 --slice-overlap 0.1 --slice-merge greedy_nmm --slice-match iou "
        "--slice-threshold 0.4 --no-slice-whole --box-min-side 4 --box-max-share 0.5"
    )
    expected = SliceOptions((0.5, 320.0), 3.0, 0.1, "greedy_nmm", "iou", 0.4, False, 4.0, 0.5)
    assert detector_options.slice_options_from(parser.parse_args(words.split())) == expected
    assert set(detector_options.SLICE_SPACE) <= {action.dest for action in parser._actions}
    with pytest.raises(argparse.ArgumentTypeError, match=r"0\.95 is out of range.*0 to 0\.9"):
        detector_options._overlap("0.95")
