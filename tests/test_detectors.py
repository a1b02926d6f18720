"""Detectors from ONNX files: what is told apart and refused, decoding against loops, colours, sizes, bad files."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import cli
from annotation import decoding, detector_options, detectors
from annotation.boxes import Boxes, no_boxes
from annotation.decoding import DetectorError, cut_mask, decode, fill_letterbox, fit_size, identify, plan_letterbox
from annotation.detector_options import DetectorOptions
from annotation.detectors import boxes_to_instances, ellipse_mask, load_detector, to_rgb8
from image_io import read_image, read_mask

SIZE = (128, 160)
CELLS = decoding.grid_cells(SIZE, (8, 16, 32))
WEIGHTS = Path(os.environ.get("TESSERA_DATA", "missing")).parent / "weights"


def save_graph(path, nodes, outputs, constants=(), *, shape=(1, 3, *SIZE), dtype=TensorProto.FLOAT, metadata=None):
    graph = helper.make_graph(
        nodes,
        "detector",
        [helper.make_tensor_value_info("images", dtype, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, metadata or {})
    onnx.save(model, str(path))
    return path


def save_outputs(path, *outputs, size=SIZE, metadata=None, batch=1, dtype=TensorProto.FLOAT):
    """A network that gives these arrays whatever it sees."""
    names = [f"output{number}" for number in range(len(outputs))]
    nodes = [helper.make_node("Identity", [f"c_{name}"], [name]) for name in names]
    constants = [(f"c_{name}", np.asarray(value, np.float32)) for name, value in zip(names, outputs, strict=True)]
    return save_graph(path, nodes, names, constants, shape=(batch, 3, *size), metadata=metadata, dtype=dtype)


def save_colour_detector(path, kind, *, sides=("height", "width")):
    """Finds 8 x 8 squares in the grid's cells, class by colour: reads the input, so colours and ranges are tested.

    The output of each cell of stride 8 is the mean of its pixels' channels as class scores, in the order in which the
    network takes them; that of larger strides is zero.
    """
    scale = 1 / 255 if kind == "yolox" else 1.0
    head = np.zeros((8, 3, 1, 1), np.float32)
    head[5:8, :, 0, 0] = np.eye(3) * scale
    bias = np.array([0.5, 0.5, np.log(1.0), np.log(1.0), 1.0, -0.5, -0.5, -0.5], np.float32)  # one cell wide and high
    nodes, parts = [], []
    for stride in (8, 16, 32):
        nodes += [
            helper.make_node(
                "AveragePool", ["images"], [f"p{stride}"], kernel_shape=[stride] * 2, strides=[stride] * 2
            ),
            helper.make_node("Conv", [f"p{stride}", f"w{stride}", f"b{stride}"], [f"h{stride}"]),
            helper.make_node("Reshape", [f"h{stride}", "flat"], [f"r{stride}"]),
        ]
        parts.append(f"r{stride}")
    nodes += [
        helper.make_node("Concat", parts, ["all"], axis=2),
        helper.make_node("Transpose", ["all"], ["output"], perm=[0, 2, 1]),
    ]
    constants = [("flat", np.array([0, 8, -1], np.int64))]
    for stride in (8, 16, 32):
        constants += [(f"w{stride}", head * (stride == 8)), (f"b{stride}", bias if stride == 8 else bias * 0)]
    return save_graph(path, nodes, ["output"], constants, shape=(1, 3, *sides))


def random_objects(seed, count=12, classes=3, num_masks=0):
    """Boxes as centre and sides in input pixels, class scores, mask coefficients."""
    rng = np.random.default_rng(seed)
    sides = rng.uniform(6, 60, (count, 2))
    centre = rng.uniform(0, 1, (count, 2)) * [SIZE[1], SIZE[0]]
    scores = rng.uniform(0, 1, (count, classes))
    return np.hstack([centre, sides]), scores, rng.normal(size=(count, num_masks))


def encode(kind, boxes, scores, coefficients, seed):
    """Rows of an output of a kind that hold these objects at random cells, and the cells."""
    rng = np.random.default_rng(seed)
    rows = 3 * CELLS if kind == "v5" else CELLS
    cells = rng.choice(rows, len(boxes), replace=False)
    first = 4 if kind == "v8" else 5
    table = np.zeros((rows, first + scores.shape[1] + coefficients.shape[1]))
    table[cells, :4] = boxes
    if kind != "v8":
        table[cells, 4] = 0.9
    table[cells, first : first + scores.shape[1]] = scores
    table[cells, first + scores.shape[1] :] = coefficients
    if kind in ("raw", "yolox"):
        places = [(x, y, s) for s in (8, 16, 32) for y in range(SIZE[0] // s) for x in range(SIZE[1] // s)]
        empty = np.setdiff1d(np.arange(CELLS), cells)
        table[empty, :4] = [((x + 0.4) * s, (y + 0.6) * s, s, s) for x, y, s in np.array(places)[empty].tolist()]
        for cell, (x, y, s) in enumerate(places if kind == "raw" else []):
            cx, cy, w, h = table[cell, :4]
            table[cell, :4] = cx / s - x, cy / s - y, np.log(w / s), np.log(h / s)
    return table[None].transpose(0, 2, 1) if kind == "v8" else table[None]


def slow_decode(kind, boxes, scores, confidence, iou):
    """What should come out: (x1, y1, x2, y2), score and class, best first, by loops and torchvision."""
    rows = []
    for (cx, cy, w, h), each in zip(boxes.tolist(), scores.tolist(), strict=True):
        best = max(range(len(each)), key=each.__getitem__)
        score = each[best] * (1 if kind == "v8" else 0.9)
        if score >= confidence:
            rows.append([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2, score, best])
    if not rows:
        return []
    table = torch.tensor(rows, dtype=torch.float64)
    kept = torchvision.ops.batched_nms(table[:, :4], table[:, 4], table[:, 5].long(), iou)
    return table[kept].tolist()


METADATA = {"names": "{0: 'cell', 1: 'two words', 2: \"it's\"}", "task": "detect", "stride": "32"}


@given(st.integers(0, 2**32 - 1), st.sampled_from(["v8", "v5", "raw", "yolox"]), st.sampled_from([0.1, 0.4, 0.8]))
@settings(max_examples=40, deadline=None)
def test_decoding_gives_what_was_encoded(seed, kind, confidence):
    boxes, scores, none = random_objects(seed)
    output = encode(kind, boxes, scores, none, seed)
    layout = identify(SIZE, [output.shape], METADATA)
    assert layout.kind == ("yolox" if kind == "raw" else kind) and layout.names == ("cell", "two words", "it's")
    layout = decoding.Layout(layout.kind, layout.names, 0, layout.strides, decoded=kind != "raw")
    found = decode(layout, output[0].astype(np.float32), SIZE, confidence, 0.5)
    expected = np.array(slow_decode(kind, boxes, scores, confidence, 0.5)).reshape(-1, 6)
    assert len(found.xyxy) == len(expected)
    np.testing.assert_allclose(found.xyxy, expected[:, :4], atol=2e-4)
    np.testing.assert_allclose(found.scores, expected[:, 4], atol=1e-6)
    assert found.classes.tolist() == expected[:, 5].tolist()


@pytest.mark.parametrize(
    ("shapes", "kind", "classes", "masks", "strides"),
    [
        ([(1, 84, CELLS)], "v8", 80, 0, (8, 16, 32)),
        ([(1, 5, CELLS)], "v8", 1, 0, (8, 16, 32)),
        ([(1, 116, CELLS), (1, 32, 32, 40)], "v8", 80, 32, (8, 16, 32)),
        ([(1, 32, 32, 40), (1, 37, CELLS)], "v8", 1, 32, (8, 16, 32)),
        ([(1, 3 * CELLS, 85)], "v5", 80, 0, (8, 16, 32)),
        ([(1, 3 * CELLS, 6)], "v5", 1, 0, (8, 16, 32)),
        ([(1, 3 * CELLS, 117), (1, 32, 32, 40)], "v5", 80, 32, (8, 16, 32)),
        ([(1, 3 * CELLS, 7), (1, 3, 16, 20, 7), (1, 3, 8, 10, 7), (1, 3, 4, 5, 7)], "v5", 2, 0, (8, 16, 32)),
        ([(1, CELLS, 85)], "yolox", 80, 0, (8, 16, 32)),
        ([(1, CELLS, 6)], "yolox", 1, 0, (8, 16, 32)),
        ([(1, CELLS + 4, 9)], "", 0, 0, ()),
        ([(1, 300, 6)], "end2end", 1000, 0, (8, 16, 32)),
        ([(1, 300, 38), (1, 32, 32, 40)], "end2end", 1000, 32, (8, 16, 32)),
        ([(1, 9, decoding.grid_cells(SIZE, (4, 8, 16, 32)))], "v8", 5, 0, (4, 8, 16, 32)),
    ],
)
def test_exports_are_told_by_their_shapes(shapes, kind, classes, masks, strides):
    if not kind:
        with pytest.raises(DetectorError, match=r"outputs \(1, 424, 9\) for an input of 128x160; known are"):
            identify(SIZE, shapes, {})
        return
    layout = identify(SIZE, shapes, {})
    assert (layout.kind, len(layout.names), layout.num_masks, layout.strides) == (kind, classes, masks, strides)
    assert len(shapes[layout.boxes]) == 3 and (layout.protos is None) == (masks == 0)


def test_a_fourth_grid_needs_sides_that_it_divides():
    shape = (1, 84, decoding.grid_cells((128, 192), (8, 16, 32, 64)))
    assert identify((128, 192), [shape], {}).strides == (8, 16, 32, 64)


def test_names_without_metadata():
    assert identify(SIZE, [(1, 84, CELLS)], {}).names[2] == "car"
    assert identify(SIZE, [(1, 5, CELLS)], {}).names == ("object",)
    assert identify(SIZE, [(1, 6, CELLS)], {}).names == ("class_0", "class_1")
    assert identify(SIZE, [(1, 300, 6)], {"names": "['a', 'b']"}).names == ("a", "b")
    for odd in ("{0: 'a'", "__import__('os')", "{1: 'a', 2: 'b'}", "7", "{}"):
        assert identify(SIZE, [(1, 6, CELLS)], {"names": odd}).names == ("class_0", "class_1")


@pytest.mark.parametrize(
    ("shapes", "metadata", "words"),
    [
        ([(1, 1000)], {}, r"outputs \(1, 1000\)"),
        ([(1, 300, 84)], {}, r"\(1, 300, 84\).*known are"),
        ([(1, 8, CELLS), (1, 8, CELLS)], {}, "known are"),
        ([(1, 84, CELLS)], {"names": "{0: 'a', 1: 'b'}"}, "names of 2 classes"),
        ([(1, 56, CELLS)], {"task": "pose"}, "task 'pose'; expected a model of the task detect or segment"),
        ([(1, 300, 6)], {"description": "Ultralytics RT-DETR-l model"}, "RT-DETR"),
        ([(1, 4, CELLS)], {}, "known are"),
        ([(1, 3, 24, 24), (1, 3, 12, 12)], {}, "known are"),
    ],
)
def test_other_networks_are_refused_with_what_was_found(shapes, metadata, words):
    with pytest.raises(DetectorError, match=words):
        identify(SIZE, shapes, metadata)


# ---- letterbox and masks ----


@given(st.integers(1, 900), st.integers(1, 900), st.booleans(), st.sampled_from([(320, 320), (128, 160), (416, 416)]))
@settings(max_examples=80, deadline=None)
def test_boxes_go_into_a_letterbox_and_back(height, width, centred, size):
    box = plan_letterbox((height, width), size, centred=centred)
    assert box.top + box.height <= size[0] and box.left + box.width <= size[1]
    assert min(box.top, box.left) >= 0 and (centred or (box.top, box.left) == (0, 0))
    assert box.height >= size[0] - 1 or box.width >= size[1] - 1
    whole = np.array([[0.0, 0, width, height]])
    inside = box.to_input(whole)
    np.testing.assert_allclose(inside, [[box.left, box.top, box.left + box.width, box.top + box.height]])
    some = np.random.default_rng(0).uniform(-50, 900, (20, 4))
    np.testing.assert_allclose(box.to_image(box.to_input(some)), some, atol=1e-9)


@given(st.integers(20, 300), st.integers(20, 300), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_what_is_painted_lies_where_its_box_goes(height, width, seed):
    rng = np.random.default_rng(seed)
    x1, y1 = rng.integers(0, width - 10), rng.integers(0, height - 10)
    x2, y2 = rng.integers(x1 + 8, width), rng.integers(y1 + 8, height)
    image = np.zeros((height, width, 3), np.uint8)
    image[y1:y2, x1:x2] = 255
    box = plan_letterbox((height, width), (320, 256), centred=True)
    seen = fill_letterbox(image, box)
    assert seen.shape == (320, 256, 3)
    rows, columns = np.nonzero(seen[..., 0] > 127)
    expected = box.to_input(np.array([[x1, y1, x2, y2]]))[0]
    np.testing.assert_allclose([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], expected, atol=1.01)
    outside = np.ones((320, 256), bool)
    outside[box.top : box.top + box.height, box.left : box.left + box.width] = False
    assert (seen[outside] == decoding.PAD_VALUE).all()


def test_free_sizes_are_multiples_of_the_stride():
    assert fit_size((360, 480), 320, 32) == (256, 320)
    assert fit_size((1, 1), 640, 32) == (640, 640)
    assert fit_size((10, 4000), 640, 32) == (32, 640)


def slow_mask(logits, xyxy, box):
    """The same by loops over pixels of the image, with bilinear values taken one by one."""
    height, width = logits.shape
    result = np.zeros(box.image, bool)
    for y in range(box.image[0]):
        for x in range(box.image[1]):
            if not (xyxy[0] <= x + 0.5 < xyxy[2] and xyxy[1] <= y + 0.5 < xyxy[3]):
                continue
            px = ((x + 0.5) * box.width / box.image[1] + box.left) * width / box.size[1] - 0.5
            py = ((y + 0.5) * box.height / box.image[0] + box.top) * height / box.size[0] - 0.5
            px, py = min(max(px, 0), width - 1), min(max(py, 0), height - 1)
            x0, y0 = int(px), int(py)
            x1, y1 = min(x0 + 1, width - 1), min(y0 + 1, height - 1)
            top = logits[y0, x0] * (1 - (px - x0)) + logits[y0, x1] * (px - x0)
            low = logits[y1, x0] * (1 - (px - x0)) + logits[y1, x1] * (px - x0)
            result[y, x] = top * (1 - (py - y0)) + low * (py - y0) > 0
    return result


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=25, deadline=None)
def test_masks_are_bilinear_inside_their_box(seed, height, width):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(16, 20)).astype(np.float32)
    box = plan_letterbox((height, width), (64, 80), centred=True)
    xyxy = np.sort(rng.uniform(0, 1, (2, 2)), axis=0).ravel() * [width, height, width, height]
    (left, top), crop = cut_mask(logits, xyxy, box)
    canvas = np.zeros((height, width), bool)
    assert crop.size and left + crop.shape[1] <= width and top + crop.shape[0] <= height
    canvas[top : top + crop.shape[0], left : left + crop.shape[1]] = crop
    expected = slow_mask(logits, xyxy, box)
    if expected.any():  # else a box without a pixel's centre still has its one pixel
        assert np.count_nonzero(canvas != expected) <= 0.02 * expected.size


# ---- whole files ----


@pytest.mark.parametrize("kind", ["v8", "v5", "raw", "yolox", "end2end"])
@pytest.mark.parametrize("height", [96, 200])
def test_a_file_finds_what_is_encoded_in_pixels_of_the_image(tmp_path, kind, height):
    boxes, scores, none = random_objects(5, 10)
    if kind == "end2end":
        rows = np.array(slow_decode("v8", boxes, scores, 0.0, 0.5))
        output = np.zeros((1, 300, 6))
        output[0, : len(rows)] = rows
    else:
        output = encode(kind, boxes, scores, none, 5)
    path = save_outputs(tmp_path / "d.onnx", output, metadata={**METADATA, "imgsz": "[128, 160]"})
    detector = load_detector(DetectorOptions(path, confidence=0.3, iou=0.5))
    assert detector.names[1] == "two words" and detector.side == 160 and not detector.free and detector.batch == 1
    image = np.zeros((height, 240, 3), np.uint8)
    (found,) = detector.detect([image])
    expected = np.array(slow_decode("v8" if kind == "end2end" else kind, boxes, scores, 0.3, 0.5))
    # The way back, by hand: YOLOX lies in the corner, the others in the middle.
    scale = min(128 / height, 160 / 240)
    place = int if kind in ("raw", "yolox") else round
    new = place(240 * scale), place(height * scale)
    shift = (0, 0) if kind in ("raw", "yolox") else ((160 - new[0]) // 2, (128 - new[1]) // 2)
    xyxy = (expected[:, :4] - [*shift, *shift]) / np.tile([new[0] / 240, new[1] / height], 2)
    xyxy = np.clip(xyxy, 0, [240, height, 240, height])
    inside = (xyxy[:, 2] > xyxy[:, 0]) & (xyxy[:, 3] > xyxy[:, 1])
    np.testing.assert_allclose(found.xyxy, xyxy[inside], atol=1e-2)
    np.testing.assert_allclose(found.scores, expected[inside, 4], atol=1e-6)
    assert found.classes.tolist() == expected[inside, 5].tolist() and found.masks is None


@pytest.mark.parametrize("kind", ["v8", "v5", "end2end"])
def test_masks_of_a_segment_file(tmp_path, kind):
    boxes, scores, coefficients = random_objects(11, 8, num_masks=4)
    protos = np.random.default_rng(3).normal(size=(1, 4, 32, 40)).astype(np.float32)
    if kind == "end2end":
        corners = np.hstack([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2])
        output = np.hstack([corners, scores.max(axis=1)[:, None], scores.argmax(axis=1)[:, None], coefficients])[None]
    else:
        output = encode(kind, boxes, scores, coefficients, 11)
    path = save_outputs(tmp_path / "s.onnx", output, protos, metadata={**METADATA, "task": "segment"})
    (found,) = load_detector(DetectorOptions(path, confidence=0.2, iou=1.0)).detect([np.zeros((60, 90, 3), np.uint8)])
    order = [
        number
        for number in np.argsort(-scores.max(axis=1))
        if scores[number].max() * (0.9 if kind == "v5" else 1) >= 0.2
    ]
    assert len(found) == len(order) == len(found.masks) > 4
    box = plan_letterbox((60, 90), SIZE, centred=True)
    for number, xyxy, ((left, top), crop) in zip(order, found.xyxy.astype(float), found.masks, strict=True):
        logits = np.tensordot(coefficients[number], protos[0], 1)
        canvas = np.zeros((60, 90), bool)
        canvas[top : top + crop.shape[0], left : left + crop.shape[1]] = crop
        assert np.count_nonzero(canvas != slow_mask(logits, xyxy, box)) <= 3


@pytest.mark.parametrize("colour", [0, 1, 2])
def test_yolox_sees_bgr_and_any_size(tmp_path, colour):
    path = save_colour_detector(tmp_path / "x.onnx", "yolox")
    detector = load_detector(DetectorOptions(path, confidence=0.4, size=320))
    assert detector.free and detector.side == 320
    image = np.zeros((96, 160, 3), np.uint8)
    image[24:32, 64:72, colour] = 255
    (found,) = detector.detect([image], side=160)  # as large as the picture: nothing is scaled
    assert found.xyxy.tolist() == [[64, 24, 72, 32]] and found.scores[0] == pytest.approx(0.5)
    assert found.classes.tolist() == [2 - colour], "class k looks at channel k of the input, which is BGR"
    (twice,) = detector.detect([image])  # 320: every pixel twice as large, so four cells see the square
    assert len(twice) == 4 and twice.xyxy[:, :2].min(axis=0).tolist() == [64, 24]
    assert twice.xyxy[:, 2:].max(axis=0).tolist() == [72, 32]
    assert detector._plan((100, 150), 150).size == (128, 160), "multiples of the largest stride"


@pytest.mark.parametrize("colour", [0, 1, 2])
def test_yolov8_sees_rgb_from_0_to_1(tmp_path, colour):
    nodes = [
        helper.make_node("ReduceMean", ["images", "axes"], ["mean"], keepdims=0),  # (1, 3): class scores
        helper.make_node("Reshape", ["mean", "column"], ["scores"]),
        helper.make_node("Expand", ["scores", "wide"], ["all"]),
        helper.make_node("Concat", ["boxes", "all"], ["output"], axis=1),
    ]
    boxes = np.zeros((1, 4, CELLS), np.float32)
    boxes[0, :, :] = np.array([80, 64, 40, 20], np.float32)[:, None]
    constants = [
        ("axes", np.array([2, 3])),
        ("column", np.array([1, 3, 1])),
        ("wide", np.array([1, 3, CELLS])),
        ("boxes", boxes),
    ]
    path = save_graph(tmp_path / "c.onnx", nodes, ["output"], constants)
    image = np.zeros((*SIZE, 3), np.uint8)
    image[..., colour] = 204
    (found,) = load_detector(DetectorOptions(path)).detect([image])
    assert found.classes.tolist() == [colour] and found.scores[0] == pytest.approx(0.8, abs=1e-3)
    assert found.xyxy.tolist() == [[60, 54, 100, 74]]


def test_a_fixed_batch_is_filled_and_pictures_may_differ_in_size(tmp_path):
    boxes, scores, none = random_objects(2, 4)
    output = np.repeat(encode("v8", boxes, scores, none, 2), 4, axis=0)
    output[1:] *= 0
    path = save_outputs(tmp_path / "b.onnx", output, batch=4)
    detector = load_detector(DetectorOptions(path, confidence=0.01, iou=1.0))
    found = detector.detect([np.zeros((128, 160, 3), np.uint8)] * 5)
    assert detector.batch == 4 and [len(each) for each in found] == [4, 0, 0, 0, 4]
    half = save_outputs(tmp_path / "h.onnx", output[:1], dtype=TensorProto.FLOAT16)
    sizes = [np.zeros((height, 50, 3), np.uint8) for height in (1, 30, 200)]
    assert len(load_detector(DetectorOptions(half)).detect(sizes)) == 3


def test_only_the_classes_that_were_asked_for(tmp_path):
    boxes, scores, none = random_objects(4, 20)
    path = save_outputs(tmp_path / "n.onnx", encode("v8", boxes, scores, none, 4), metadata=METADATA)
    image = [np.zeros((*SIZE, 3), np.uint8)]
    by_name = load_detector(DetectorOptions(path, classes=("two words",))).detect(image)[0]
    by_number = load_detector(DetectorOptions(path, classes=("1",))).detect(image)[0]
    assert set(by_name.classes.tolist()) == {1} and by_name.xyxy.tolist() == by_number.xyxy.tolist()
    with pytest.raises(DetectorError, match=r"n\.onnx has no class 'dog'; expected some of cell, two words, it's"):
        load_detector(DetectorOptions(path, classes=("cell", "dog")))


def test_limits_can_change_without_loading_again(tmp_path):
    boxes, scores, none = random_objects(4, 20)
    path = save_outputs(tmp_path / "n.onnx", encode("v8", boxes, scores, none, 4))
    detector = load_detector(DetectorOptions(path, confidence=0.9))
    path.unlink()
    image = [np.zeros((*SIZE, 3), np.uint8)]
    lower = detector.changed(DetectorOptions(confidence=0.1, iou=1.0))
    assert len(lower.detect(image)[0]) > len(detector.detect(image)[0]) > 0
    assert (detector.detect(image)[0].scores >= 0.9).all()


def test_values_that_are_no_numbers_are_no_boxes(tmp_path):
    boxes, scores, none = random_objects(4, 6)
    output = encode("v8", boxes, np.ones_like(scores), none, 4)
    filled = np.flatnonzero(output[0, 2])
    output[0, 0, filled[0]], output[0, 5, filled[1]], output[0, 2, filled[2]] = np.nan, np.nan, np.inf
    path = save_outputs(tmp_path / "n.onnx", output)
    (found,) = load_detector(DetectorOptions(path, iou=1.0)).detect([np.zeros((*SIZE, 3), np.uint8)])
    assert 3 <= len(found) <= 4 and np.isfinite(found.xyxy).all() and np.isfinite(found.scores).all()


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no detector .*none\.onnx; expected an \.onnx file or a \.pt file"):
        load_detector(DetectorOptions(tmp_path / "none.onnx"))
    (tmp_path / "a.onnx").write_bytes(b"not a network")
    with pytest.raises(DetectorError, match=r"a\.onnx: ONNX Runtime cannot load .*known are exports"):
        load_detector(DetectorOptions(tmp_path / "a.onnx"))
    (tmp_path / "a.tflite").write_bytes(b"x")
    with pytest.raises(DetectorError, match=r"a\.tflite is a \.tflite file; expected \.onnx, or \.pt"):
        load_detector(DetectorOptions(tmp_path / "a.tflite"))
    path = save_outputs(tmp_path / "c.onnx", np.zeros((1, 1000)))
    with pytest.raises(DetectorError, match=r"c\.onnx has outputs \(1, 1000\) for an input of 128x160; known"):
        load_detector(DetectorOptions(path))
    path = save_outputs(tmp_path / "s.onnx", np.zeros((1, 5, CELLS)))
    with pytest.raises(DetectorError, match=r"takes 128x160 pixels alone, found the size 640: leave --detector-size"):
        load_detector(DetectorOptions(path, size=640))
    path = save_graph(
        tmp_path / "i.onnx",
        [helper.make_node("Cast", ["images"], ["output"], to=TensorProto.FLOAT)],
        ["output"],
        dtype=TensorProto.UINT8,
    )
    with pytest.raises(DetectorError, match=r"i\.onnx has the inputs images tensor\(uint8\) .*expected one, float"):
        load_detector(DetectorOptions(path))


def test_a_pt_file_says_what_it_needs(tmp_path, monkeypatch):
    (tmp_path / "best.pt").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "ultralytics", None)  # as if it were not installed
    with pytest.raises(DetectorError, match=r"best\.pt needs the package ultralytics.*AGPL.*format=onnx"):
        load_detector(DetectorOptions(tmp_path / "best.pt"))


class StandIn:
    """What UltralyticsDetector uses of ultralytics.YOLO; notes what it was asked."""

    names = {1: "bee", 0: "ant"}  # noqa: RUF012
    task = "segment"
    asked: dict = {}  # noqa: RUF012

    def __init__(self, path):
        self.overrides = {"imgsz": 320}
        if Path(path).read_bytes() == b"broken":
            raise RuntimeError("invalid load key")

    def predict(self, image, **flags):
        StandIn.asked = {"image": image, **flags}
        masks = np.zeros((3, *image.shape[:2]), np.float32)
        masks[0, 5:9, 3:8] = 1
        rows = [[2.5, 4.5, 8, 9.5, 0.9, 1], [-9, -9, 300, 300, 0.8, 0], [40, 40, 50, 50, 0.7, 0]]
        boxes = SimpleNamespace(data=torch.tensor(rows))
        return [SimpleNamespace(boxes=boxes, masks=SimpleNamespace(data=torch.from_numpy(masks)))]


@pytest.fixture
def ultralytics(monkeypatch):
    monkeypatch.setitem(sys.modules, "ultralytics", SimpleNamespace(YOLO=StandIn))


def test_a_pt_file_is_given_bgr_and_the_limits(tmp_path, ultralytics):
    (tmp_path / "best.pt").write_bytes(b"fine")
    options = DetectorOptions(tmp_path / "best.pt", confidence=0.3, iou=0.6, classes=("bee",))
    detector = load_detector(options)
    image = np.zeros((20, 30, 3), np.uint8)
    image[..., 0] = 200
    (found,) = detector.detect([image])
    asked = StandIn.asked
    assert asked["image"][0, 0].tolist() == [0, 0, 200] and asked["classes"] == [1]
    assert (asked["conf"], asked["iou"], asked["imgsz"]) == (0.3, 0.6, 320)
    assert found.names == ("ant", "bee") and found.classes.tolist() == [1, 0], "the third lies outside"
    np.testing.assert_allclose(found.xyxy, [[2.5, 4.5, 8, 9.5], [0, 0, 30, 20]])
    (left, top), crop = found.masks[0]
    assert (left, top) == (2, 4) and crop.shape == (6, 6) and crop.sum() == 20
    detector.changed(DetectorOptions(confidence=0.1)).detect([image], side=640)
    assert (StandIn.asked["conf"], StandIn.asked["imgsz"]) == (0.1, 640)


def test_a_pt_file_of_another_kind_is_refused(tmp_path, ultralytics, monkeypatch):
    (tmp_path / "best.pt").write_bytes(b"broken")
    with pytest.raises(DetectorError, match=r"best\.pt is no model of ultralytics \(invalid load key\)"):
        load_detector(DetectorOptions(tmp_path / "best.pt"))
    (tmp_path / "best.pt").write_bytes(b"fine")
    monkeypatch.setattr(StandIn, "task", "pose")
    with pytest.raises(DetectorError, match=r"best\.pt is a model of the task 'pose'; expected detect or segment"):
        load_detector(DetectorOptions(tmp_path / "best.pt"))


def test_a_gpu_that_onnx_runtime_cannot_use_is_said(tmp_path):
    path = save_outputs(tmp_path / "d.onnx", np.zeros((1, 5, CELLS)))
    detector = load_detector(DetectorOptions(path), "mps")
    assert "runs on the CPU" in detector.note and "mps" in detector.note
    assert load_detector(DetectorOptions(path), "cpu").note == ""


# ---- pictures, instances, flags ----


def test_pictures_of_any_kind_become_rgb8(monkeypatch):
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (20, 30, 3), np.uint8)
    assert np.array_equal(to_rgb8(rgb), rgb)
    assert np.array_equal(to_rgb8(np.dstack([rgb, rgb[..., :1]])), rgb), "alpha is left out"
    assert np.array_equal(to_rgb8(rgb[..., :1]), rgb[..., [0, 0, 0]])
    assert np.array_equal(to_rgb8(rgb[..., :2]), rgb[..., [0, 0, 0]])
    dark = rgb // 64
    assert np.array_equal(to_rgb8(dark), dark), "8 bit stay as they are, however dark"
    deep = rng.integers(1000, 4000, (200, 300, 1)).astype(np.uint16)
    low, high = np.percentile(deep, (0.5, 99.5))
    expected = np.clip((deep.astype(float) - low) / (high - low) * 255, 0, 255)
    assert np.abs(to_rgb8(deep) - expected).max() <= 0.51 and to_rgb8(deep).shape == (200, 300, 3)
    whole = to_rgb8(deep)
    monkeypatch.setattr(detectors, "BAND_PIXELS", 900)
    assert np.array_equal(to_rgb8(deep), whole), "in bands"
    holes = deep.astype(np.float32)
    holes[:5] = np.nan
    assert (to_rgb8(holes)[:5] == 0).all() and to_rgb8(holes)[5:].max() == 255
    for constant in (np.full((4, 4, 1), 7, np.uint16), np.full((1, 1, 3), np.nan, np.float32)):
        assert (to_rgb8(constant) == 0).all()


def test_boxes_become_ellipses_and_masks_stay():
    boxes = Boxes([[10, 20, 50, 40], [59.6, 50, 60.2, 50.4], [-5, -5, 5, 5]], [0.9, 0.8, 0.5], [0, 0, 0])
    found = boxes_to_instances(boxes, 60, 80)
    assert len(found) == 3 and set(found.engines) == {"yolo"}
    ellipse = found.labels == found.labels[30, 30]
    y, x = np.mgrid[:60, :80] + 0.5
    assert np.array_equal(ellipse, ((x - 30) / 20) ** 2 + ((y - 30) / 10) ** 2 <= 1)
    assert found.scores[found.labels[30, 30] - 1] == np.float32(0.9)
    masks = [((2, 1), np.ones((3, 4), bool)), ((3, 2), np.ones((4, 4), bool))]
    both = boxes_to_instances(Boxes([[2, 1, 6, 4], [3, 2, 7, 6]], [0.3, 0.6], [0, 0], masks=masks), 10, 10, "segment")
    assert both.engines == ("segment",) * 2 and (both.labels[2:6, 3:7] == both.labels[5, 5]).all()
    assert len(boxes_to_instances(no_boxes(), 5, 6)) == 0


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_an_ellipse_lies_in_its_box_and_in_the_picture(seed):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(-20, 40, 2)
    xyxy = np.hstack([corner, corner + rng.uniform(0, 30, 2)])
    (left, top), crop = ellipse_mask(xyxy, 30, 40)
    assert crop.any() and left >= 0 and top >= 0 and left + crop.shape[1] <= 40 and top + crop.shape[0] <= 30


def test_flags_become_options():
    parser = cli.make_parser("test")
    detector_options.add_detector_args(parser)
    assert detector_options.detector_options_from(parser.parse_args([])) == DetectorOptions()
    words = (
        "--detector a.onnx --detector-confidence 0.1 --detector-iou 0.7 --detector-classes car 3 --detector-size 640"
    )
    expected = DetectorOptions(Path("a.onnx"), 0.1, 0.7, ("car", "3"), 640)
    assert detector_options.detector_options_from(parser.parse_args(words.split())) == expected
    assert set(detector_options.DETECTOR_SPACE) <= {action.dest for action in parser._actions}


@pytest.mark.skipif(not (WEIGHTS / "yolox_nano.onnx").is_file(), reason="needs TESSERA_DATA, with weights/ beside it")
@pytest.mark.parametrize("name", ["yolox_nano", "yolov8n-seg_int8"])
def test_real_detectors_find_the_cars(name):
    folder = Path(os.environ["TESSERA_DATA"]) / "camvid" / "val"
    detector = load_detector(DetectorOptions(WEIGHTS / f"{name}.onnx", classes=("car",)))
    hits = found_in_all = 0
    for path in sorted((folder / "images").iterdir()):
        cars = read_mask(next((folder / "gt").glob(f"{path.stem}.*"))) == 8
        (found,) = detector.detect([to_rgb8(read_image(path))])
        for x1, y1, x2, y2 in np.rint(found.xyxy).astype(int):
            found_in_all += 1
            hits += bool(cars[y1:y2, x1:x2].mean() > 0.4)
    assert found_in_all >= 6 and hits >= 0.7 * found_in_all


def test_the_flags_load_nothing_heavy():
    code = (
        "import sys, annotation.detector_options; print(sorted({'cv2', 'numpy', 'scipy', 'torch'} & set(sys.modules)))"
    )
    root = Path(detectors.__file__).parent.parent
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
