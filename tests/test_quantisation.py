"""Models in fewer bits: what is written, which layers stay in float, and when the float file is kept instead."""

import itertools
import json
from functools import partial

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import quantisation
from checkpoint import Geometry, ModelConfig
from onnx_export import make_session
from quantisation import KINDS, METHODS, compare_speed, list_layers, quantise, to_half

CHANNELS = ("red", "green", "blue")
CONFIG = ModelConfig(
    *("plain-unet", "plain-8", (1,), ("background", "object"), CHANNELS),
    *((0.0,) * 3, (1.0,) * 3, Geometry("crops", (32, 32), 32, 16, 4)),
    **{"stride": 16, "min_side": 16},
)


def make_model(widths=(3, 8, 8, 1), wild=0.0):
    """Convolutions 3x3 in a row, ReLU between them, on images of any size.

    `wild` multiplies one channel after the first of them and divides it again before the second: it computes the same,
    but one scale for the whole tensor has no room left for the other channels.
    """
    rng = np.random.default_rng(0)
    nodes, values, name = [], [], "image"
    for number, (inside, outside) in enumerate(itertools.pairwise(widths)):
        weight = (rng.normal(size=(outside, inside, 3, 3)) / np.sqrt(9 * inside)).astype(np.float32)
        bias = (rng.normal(size=outside) * 0.1 * (outside > 1)).astype(np.float32)
        if wild and number == 0:
            weight[0], bias[0] = weight[0] * wild, bias[0] * wild
        if wild and number == 1:
            weight[:, 0] /= wild
        values += [numpy_helper.from_array(weight, f"w{number}"), numpy_helper.from_array(bias, f"b{number}")]
        last = number == len(widths) - 2
        result = "logits" if last else f"c{number}"
        inputs = [name, f"w{number}", f"b{number}"]
        nodes.append(helper.make_node("Conv", inputs, [result], f"conv{number}", pads=[1] * 4))
        name = f"r{number}"
        if not last:
            nodes.append(helper.make_node("Relu", [result], [name], f"relu{number}"))
    ends = [
        helper.make_tensor_value_info(end, TensorProto.FLOAT, ["batch", width, "height", "width"])
        for end, width in (("image", widths[0]), ("logits", widths[-1]))
    ]
    graph = helper.make_graph(nodes, "toy", ends[:1], ends[1:], values)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(proto, {"tessera": "about the network"})
    return proto.SerializeToString()


def tiles(count=3, side=32, seed=1, batch=1):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(batch, 3, side, side)).astype(np.float32) for _ in range(count)]


def run(model, batch):
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, {"image": batch})[0]


def agreement(reference, calls=None):
    """IoU of a model's mask with the mask of the float model, on a picture that was not calibrated with."""
    picture = tiles(1, 64, seed=9)[0]
    threshold = np.median(run(reference, picture))  # half of the pixels are the object
    expected = run(reference, picture) > threshold

    def measure(model):
        if calls is not None:
            calls.append(model)
        found = run(model, picture) > threshold
        return float((found & expected).sum() / (found | expected).sum())

    return measure


def race(before, after):
    """The measurement of speed with a clock on which the two models take so many seconds a run."""
    durations = itertools.cycle([before, after])
    now, running = 0.0, False

    def clock():
        nonlocal now, running
        running = not running
        if not running:
            now += next(durations)
        return now

    return partial(compare_speed, clock=clock)


def do(model, kind="int8-static", *, clock=(2.0, 1.0), drop=0.05, calibration=None, measure=None, method="min-max"):
    return quantise(
        model,
        CONFIG,
        kind,
        calibration=tiles() if calibration is None else calibration,
        measure=measure or agreement(model),
        max_drop=drop,
        method=method,
        race=race(*clock),
    )


def metadata_of(model):
    return {entry.key: entry.value for entry in onnx.load_model_from_string(model).metadata_props}


def initialisers(model):
    return {item.name: numpy_helper.to_array(item) for item in onnx.load_model_from_string(model).graph.initializer}


def input_scale(model):
    """Scale and zero point of the first tensor that is brought into int8."""
    graph = onnx.load_model_from_string(model).graph
    node = next(node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] == "image")
    return tuple(initialisers(model)[name] for name in node.input[1:])


# ---- kept or refused ----


def test_a_faster_model_that_agrees_is_kept():
    model = make_model()
    result = do(model)
    assert result.kept and result.float_layers == ()
    assert (result.seconds_before, result.seconds_after, result.iou_before) == (2.0, 1.0, 1.0)
    assert 0.95 <= result.iou_after < 1  # int8 is seen in the mask, else the file would be a float one
    assert result.reason == (
        "int8-static is kept: 2.00 times as fast as float32 on a tile of 32x32 (2000.0 ms to 1000.0 ms), "
        f"IoU 1.0000 to {result.iou_after:.4f}, 0 of 3 layers in float"
    )
    metadata = metadata_of(result.model)
    assert metadata["tessera"] == "about the network"
    assert (metadata["precision"], metadata["calibration"], metadata["float_layers"]) == (
        "int8-static",
        "min-max",
        "[]",
    )
    kinds = {value.dtype.name for name, value in initialisers(result.model).items() if name.endswith("_quantized")}
    assert kinds == {"int8", "int32"}
    assert run(result.model, tiles(1, 48, batch=2)[0]).shape == (2, 1, 48, 48)


@pytest.mark.parametrize("seconds", [1.0, 0.99, 1.5])
def test_a_model_that_is_no_faster_is_refused_without_a_search(seconds):
    model, calls = make_model(), []
    result = do(model, clock=(1.0, seconds), measure=agreement(model, calls), drop=1e-9)
    assert not result.kept and result.model == model and len(calls) == 2
    assert f"{1 / seconds:.2f} times as fast as float32" in result.reason
    assert "1.05 times as fast or more" in result.reason and "Use the float file" in result.reason


def test_a_model_that_loses_too_much_is_refused_with_its_figures():
    model, calls = make_model(), []

    def measure(given):
        calls.append(given)
        return 0.9 if given == model else 0.5

    result = do(model, measure=measure, drop=0.01)
    assert not result.kept and result.model == model
    assert (result.iou_before, result.iou_after) == (0.9, 0.5) and len(calls) == 3
    assert "IoU 0.9000 to 0.5000" in result.reason
    assert "a drop of IoU of 0.01 or less. Use the float file, or allow a larger drop" in result.reason


def test_an_iou_that_is_no_number_is_refused():
    model = make_model()
    result = do(model, measure=lambda given: 0.9 if given == model else float("nan"))
    assert not result.kept and "IoU 0.9000 to nan" in result.reason


def test_the_layers_that_hurt_stay_in_float():
    model, calls = make_model((3, 8, 8, 8, 8, 1), wild=3000.0), []
    np.testing.assert_allclose(run(model, tiles(1)[0]), run(make_model((3, 8, 8, 8, 8, 1)), tiles(1)[0]), atol=1e-4)
    everything = do(model, drop=1.0)
    assert everything.kept and everything.iou_after < 0.8
    result = do(model, drop=0.05, measure=agreement(model, calls))
    assert result.kept and set(result.float_layers) == {"conv0", "conv1"}
    assert result.iou_after >= 0.95 and len(calls) <= 5
    assert "2 of 5 layers in float" in result.reason
    assert set(json.loads(metadata_of(result.model)["float_layers"])) == {"conv0", "conv1"}
    floats = {
        name for name, value in initialisers(result.model).items() if value.ndim == 4 and value.dtype == "float32"
    }
    assert floats == {"w0", "w1"}


def test_a_mixed_model_that_is_slow_is_refused_after_the_search():
    model = make_model((3, 8, 8, 8, 8, 1), wild=3000.0)
    speeds = iter([(2.0, 1.0), (2.0, 1.99)])
    result = quantise(
        *(model, CONFIG, "int8-static"),
        **{"calibration": tiles(), "measure": agreement(model), "max_drop": 0.05, "race": lambda *_: next(speeds)},
    )
    assert not result.kept and result.model == model
    assert "1.01 times as fast" in result.reason and "allow a larger drop" not in result.reason


# ---- what is written ----


def test_every_output_channel_has_its_own_scale(monkeypatch):
    monkeypatch.setattr(quantisation, "find_vnni", lambda: "avx512_vnni")
    model = make_model()
    written = initialisers(do(model, drop=1.0).model)
    for name, weight in initialisers(model).items():
        if weight.ndim == 4:
            expected = np.abs(weight).max(axis=(1, 2, 3)) / 127
            np.testing.assert_allclose(written[f"{name}_scale"], expected, rtol=1e-6)


def test_weights_keep_to_seven_bits_where_products_would_overflow(monkeypatch):
    monkeypatch.setattr(quantisation.platform, "machine", lambda: "x86_64")
    largest = {}
    for name in ("none", "avx_vnni"):
        monkeypatch.setattr(quantisation, "find_vnni", lambda name=name: name)
        written = initialisers(do(make_model(), drop=1.0).model)
        largest[name] = max(np.abs(value.astype(int)).max() for value in written.values() if value.dtype == "int8")
    assert largest["none"] <= 64 < largest["avx_vnni"] <= 127


def test_the_range_is_that_of_all_tiles():
    calibration = tiles(8, batch=2)
    calibration[6][1, 0, 3, 3], calibration[0][0, 2, 5, 5] = 9.0, -7.5
    scale, zero = input_scale(do(make_model(), calibration=iter(calibration), drop=1.0).model)
    assert scale == pytest.approx((9.0 + 7.5) / 255, rel=1e-5) and zero == round(7.5 / scale)


def test_methods_cut_off_what_is_rare():
    calibration = tiles(4, side=64)
    calibration[1][0, 0, 3, 3] = 50.0
    scales = {name: float(input_scale(do(make_model(), calibration=calibration, drop=1.0, method=name).model)[0])
              for name in METHODS}  # fmt: skip
    assert scales["min-max"] > 50 / 255
    assert scales["percentile"] < scales["min-max"] and scales["entropy"] < scales["min-max"]


@pytest.mark.parametrize("kind", ["int8-dynamic", "fp16"])
def test_the_other_kinds_compute_nearly_the_same(kind):
    model, batch = make_model(), tiles(1, 48, batch=2)[0]
    result = do(model, kind)
    assert result.kept and metadata_of(result.model)["precision"] == kind
    expected, found = run(model, batch), run(result.model, batch)
    assert found.dtype == np.float32
    error = np.abs(found - expected).max() / expected.std()
    assert 0 < error < (0.2 if kind == "int8-dynamic" else 0.01)
    stored = {value.dtype.name for value in initialisers(result.model).values() if value.ndim == 4}
    assert stored == ({"uint8"} if kind == "int8-dynamic" else {"float16"})


def test_half_keeps_the_nodes_named_in_float():
    found = initialisers(to_half(make_model(), ["conv1"]))
    assert {name: value.dtype.name for name, value in found.items() if value.ndim == 4} == {
        "w0": "float16",
        "w1": "float32",
        "w2": "float16",
    }


@pytest.mark.parametrize(
    ("kind", "method"),
    [*((kind, "min-max") for kind in KINDS), ("int8-static", "entropy"), ("int8-static", "percentile")],
)
def test_nothing_is_printed_or_left_behind(kind, method, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    do(make_model(), kind, method=method)
    assert capfd.readouterr() == ("", "") and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("opset", [13, 18])
@pytest.mark.parametrize(("axes", "keep", "pooled"), [([2, 3], 1, True), ([-1, -2], 1, True), ([1, 2], 1, False),
                                                      ([2, 3], 0, False)])  # fmt: skip
def test_means_over_the_picture_become_pooling_and_nothing_else_does(opset, axes, keep, pooled):
    proto = onnx.load_model_from_string(make_model())
    proto.opset_import[0].version = opset
    more, given = ["axes"] if opset == 18 else [], {} if opset == 18 else {"axes": axes}
    proto.graph.initializer.append(numpy_helper.from_array(np.array(axes), "axes"))
    proto.graph.node[2].input[0] = "scaled"
    nodes = [helper.make_node("ReduceMean", ["r0", *more], ["mean"], "mean", keepdims=keep, **given)]
    if not keep:
        proto.graph.initializer.append(numpy_helper.from_array(np.array([-1, 8, 1, 1]), "shape"))
        nodes.append(helper.make_node("Reshape", ["mean", "shape"], ["whole"], "whole"))
    nodes.append(helper.make_node("Add", ["r0", "whole" if not keep else "mean"], ["scaled"], "scaled"))
    for number, node in enumerate(nodes):
        proto.graph.node.insert(2 + number, node)
    model = proto.SerializeToString()
    result = do(model, drop=0.1)
    assert result.kept and 0.9 <= result.iou_after <= 1
    kinds = [node.op_type for node in onnx.load_model_from_string(result.model).graph.node]
    assert ("GlobalAveragePool" in kinds, "ReduceMean" in kinds) == (pooled, not pooled)


# ---- parts ----


def test_layers_are_a_node_with_weights_and_what_follows():
    layers = list_layers(onnx.load_model_from_string(make_model()))
    assert layers == {"conv0": ("conv0", "relu0"), "conv1": ("conv1", "relu1"), "conv2": ("conv2",)}
    nodes = [helper.make_node(kind, ["a"], ["b"], kind) for kind in ("Pad", "Add", "Gemm", "Relu", "MatMul")]
    assert list_layers(helper.make_model(helper.make_graph(nodes, "g", [], []))) == {
        "Gemm": ("Pad", "Add", "Gemm", "Relu"),
        "MatMul": ("MatMul",),
    }


def test_speed_is_a_median_of_runs_in_turns():
    durations = iter([3.0, 1.0, 900.0, 1.5, 4.0, 700.0, 5.0, 2.0, 3.5, 1.75])
    now, running = 0.0, False

    def clock():
        nonlocal now, running
        running = not running
        if not running:
            now += next(durations)
        return now

    model = make_model()
    assert compare_speed(model, model, tiles(1)[0], repeats=5, clock=clock) == (4.0, 1.75)


def test_a_model_that_has_run_leaves_the_cores_to_the_next():
    """Threads that spin on would slow the second of two models that are compared in turns."""
    options = make_session(make_model(), "cpu").get_session_options()
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def test_vnni_is_reported_from_the_flags_of_the_processor(monkeypatch, tmp_path):
    found = {}
    for name, text in (("x86", "flags\t\t: fpu avx2 avx512_vnni\n"), ("old", "flags : fpu avx2\n"), ("arm", "")):
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(quantisation, "Path", lambda _, name=name: tmp_path / name)
        found[name] = quantisation.find_vnni()
    monkeypatch.setattr(quantisation, "Path", lambda _: tmp_path / "missing")
    assert found == {"x86": "avx512_vnni", "old": "none", "arm": "none"} and quantisation.find_vnni() == "unknown"


# ---- bad input ----


def test_no_tiles_are_refused():
    with pytest.raises(ValueError, match="no calibration tiles were found.*trained on: pass the data set with -ds DIR"):
        do(make_model(), calibration=[])
    with pytest.raises(ValueError, match="no calibration tiles"):
        do(make_model(), calibration=[np.zeros((0, 3, 32, 32), np.float32)])


@pytest.mark.parametrize("late", [0, 7])
def test_tiles_that_do_not_fit_are_refused(late):
    with pytest.raises(ValueError, match=r"shape \(1, 4, 8, 8\), expected \(N, 3, h, w\).*red, green, blue"):
        do(make_model(), calibration=[*tiles(late), np.zeros((1, 4, 8, 8), np.float32)])
    with pytest.raises(ValueError, match="NaN or infinity"):
        do(make_model(), calibration=[*tiles(late), np.full((1, 3, 32, 32), np.nan, np.float32)])


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match="unknown kind 'int4', expected one of int8-static, int8-dynamic, fp16"):
        do(make_model(), "int4")
    with pytest.raises(ValueError, match="unknown calibration method 'max', expected one of min-max, entropy, percen"):
        do(make_model(), method="max")


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_that_cannot_be_converted_is_refused_with_the_reason(kind):
    proto = onnx.load_model_from_string(make_model())
    proto.graph.node[1].op_type, proto.graph.node[1].domain = "Unheard", "of.somebody"
    proto.opset_import.append(helper.make_opsetid("of.somebody", 1))
    model = proto.SerializeToString()
    result = do(model, kind, measure=lambda _: 1.0)
    assert not result.kept and result.model == model and np.isnan(result.iou_after)
    assert f"{kind} is refused: the model cannot be converted: " in result.reason and "Unheard" in result.reason
