"""A network in fewer bits: int8 or float16, kept only where it is measured to be faster and to lose little."""

import contextlib
import io
import itertools
import json
import logging
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint import ModelConfig
from model import shorten_error
from onnx_export import make_session

KINDS = ("int8-static", "int8-dynamic", "fp16")
METHODS = {"min-max": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}  # ours -> ONNX Runtime's
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")  # a layer is one of these and what follows it
VNNI = ("avx512_vnni", "avx_vnni", "avx_vnni_int8", "asimddp")  # int8 products summed in 32 bits
REPEATS = 20  # runs of each model, in turns; medians count
LEAST_GAIN = 1.05  # a smaller gain in speed is within what medians vary by
MOST_FLOAT = 0.5  # of the layers: with more of them in float there is little left to win
PROBE_SIDE = 256  # of the tiles on which single layers are compared
PROBE_TILES = 4

Proto = Any  # onnx.ModelProto, which is imported where one is made
Convert = Callable[[Collection[str]], bytes]  # names of nodes that stay in float -> the model
Race = Callable[[bytes, bytes, np.ndarray], tuple[float, float]]


@dataclass(frozen=True)
class Quantised:
    """What became of a model. IoU and seconds are those of the float model and of the one in fewer bits.

    `model` is the one to use: the float model where it was not kept. `float_layers` name the nodes with weights that
    were left in float, the most harmful first. What was not measured is NaN.
    """

    model: bytes
    iou_before: float
    iou_after: float
    seconds_before: float
    seconds_after: float
    float_layers: tuple[str, ...]
    kept: bool
    reason: str


# ----------------------------------------------------------------------------------------------------------------------
# The whole


def quantise(
    model: bytes,
    config: ModelConfig,
    kind: str,
    *,
    calibration: Iterable[np.ndarray],
    measure: Callable[[bytes], float],
    max_drop: float,
    method: str = "percentile",
    race: Race | None = None,
) -> Quantised:
    """Write a model in fewer bits; leave the layers that hurt most in float; keep it if it is faster and good.

    Args:
        model: an ONNX file with one float32 input (N, C, h, w).
        config: of the network; channels, stride and smallest side are looked at.
        kind: one of KINDS.
        calibration: normalised training tiles, float32 batches (N, C, h, w), at least one. All are seen once, one tile
            at a time. The first ones serve to compare layers too, and the very first to measure speed.
        measure: IoU of a model on real tiles, in [0, 1]; called a few times.
        max_drop: IoU that may be lost.
        method: of METHODS, how the range of activations is found; int8-static alone uses it. Percentile leaves out one
            value in 100,000, which lost least on networks that were trained here.
        race: seconds that two models need for a batch; compare_speed on the CPU if None.

    Returns:
        The result with its figures; the reason is a sentence for the user in both cases.

    Raises:
        ValueError: unknown kind or method, no calibration tiles, or tiles that do not fit the network.
    """
    _check_choice("kind", kind, KINDS)
    _check_choice("calibration method", method, METHODS)
    tiles = _checked_tiles(calibration, config)
    head = list(itertools.islice(tiles, PROBE_TILES))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch, _quiet():
        try:
            prepared = _prepare(model, Path(scratch))
            convert = _converter(kind, prepared, itertools.chain(head, tiles), METHODS[method])
            trial = _Trial(model, kind, convert, measure, max_drop, race or compare_speed, head)
            result = trial.run(list_layers(_load(prepared)), config)
        except _ConversionError as error:
            return _not_converted(model, kind, error)
    if not result.kept:
        return result
    entries = {
        "precision": kind,
        "calibration": method if kind == "int8-static" else "",
        "float_layers": json.dumps(result.float_layers),
        "vnni": find_vnni(),
    }
    return Quantised(**{**vars(result), "model": _with_metadata(result.model, model, entries)})


def to_half(model: bytes, float_nodes: Collection[str] = ()) -> bytes:
    """The model in float16, with inputs and outputs in float32 as before; nothing is measured.

    Args:
        float_nodes: names of nodes that stay in float32.
    """
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with _quiet():
        proto = convert_float_to_float16(
            onnx.load_model_from_string(model), keep_io_types=True, node_block_list=list(float_nodes)
        )
    return _with_metadata(proto.SerializeToString(), model, {"precision": "fp16"})


def find_vnni() -> str:
    """The CPU's instructions for int8 products, such as avx512_vnni; "none" if it has none, "unknown" off Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "unknown"
    flags = {flag for line in lines if line.lower().startswith(("flags", "features")) for flag in line.split()}
    return ", ".join(name for name in (*VNNI, "amx_int8") if name in flags) or "none"


def compare_speed(
    before: bytes,
    after: bytes,
    batch: np.ndarray,
    *,
    device: str = "cpu",
    repeats: int = REPEATS,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float]:
    """Median seconds that two models need for a batch, run in turns so that other work meets both alike.

    Args:
        batch: (N, C, h, w) float32.
        clock: seconds; called before and after every counted run, of `before` first.
    """
    runners = [_runner(make_session(model, device)) for model in (before, after)]
    for run in runners:  # the first calls prepare kernels
        run(batch)
        run(batch)
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for run, times in zip(runners, seconds, strict=True):
            begin = clock()
            run(batch)
            times.append(clock() - begin)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


# ----------------------------------------------------------------------------------------------------------------------
# Layers in float


@dataclass(frozen=True)
class _Trial:
    """One model, one kind: search and judgement."""

    model: bytes
    kind: str
    convert: Convert
    measure: Callable[[bytes], float]
    max_drop: float
    race: Race
    tiles: Sequence[np.ndarray]  # single ones, (1, C, h, w)

    def run(self, layers: dict[str, tuple[str, ...]], config: ModelConfig) -> Quantised:
        """Convert everything; where that is faster but loses too much, leave layers in float, and judge the result."""
        before = self.measure(self.model)
        found = self.convert(())
        iou = self.measure(found)
        floats: tuple[str, ...] = ()
        seconds = self.race(self.model, found, self.tiles[0])
        if seconds[0] >= LEAST_GAIN * seconds[1] and not before - iou <= self.max_drop:
            errors = self._layer_errors(layers, config)
            order = sorted(errors, key=lambda name: -errors[name])
            found, iou, floats = self._search(order, layers, before, (found, iou))
            seconds = self.race(self.model, found, self.tiles[0]) if floats else seconds
        kept = seconds[0] >= LEAST_GAIN * seconds[1] and before - iou <= self.max_drop
        reason = self._explain(kept, (before, iou), seconds, floats, len(layers))
        return Quantised(found if kept else self.model, before, iou, *seconds, floats, kept, reason)

    def _layer_errors(self, layers: dict[str, tuple[str, ...]], config: ModelConfig) -> dict[str, float]:
        """Mean squared change of the output when a layer is the only one in fewer bits."""
        batches = [_probe(tile, config) for tile in self.tiles]
        expected = _run_all(self.model, batches)
        every = {node for nodes in layers.values() for node in nodes}
        errors = {}
        for name, nodes in layers.items():
            found = _run_all(self.convert(every - set(nodes)), batches)
            error = float(np.mean([np.mean((a - b) ** 2) for a, b in zip(found, expected, strict=True)]))
            errors[name] = error if math.isfinite(error) else math.inf
        return errors

    def _search(
        self, order: Sequence[str], layers: dict[str, tuple[str, ...]], before: float, best: tuple[bytes, float]
    ) -> tuple[bytes, float, tuple[str, ...]]:
        """The fewest layers, taken in order, that bring the loss under the limit: doubled, then halved in.

        Returns:
            Model, IoU and the layers in float; what comes nearest to the limit when none stays under it.
        """
        most = max(1, int(MOST_FLOAT * len(order)))
        result: tuple[bytes, float, tuple[str, ...]] = (*best, ())
        low, high, count = 0, 0, 1
        while low < most and high - low != 1:
            found = self.convert([node for name in order[:count] for node in layers[name]])
            iou = self.measure(found)
            if before - iou <= self.max_drop:
                result, high = (found, iou, tuple(order[:count])), count
            else:
                low = count
                if not high and not result[1] >= iou:
                    result = (found, iou, tuple(order[:count]))
            count = (low + high) // 2 if high else min(2 * count, most)
        return result

    def _explain(
        self, kept: bool, iou: tuple[float, float], seconds: tuple[float, float], floats: Sequence[str], layers: int
    ) -> str:
        size = "x".join(str(side) for side in self.tiles[0].shape[2:])
        figures = (
            f"{seconds[0] / seconds[1]:.2f} times as fast as float32 on a tile of {size} ({seconds[0] * 1e3:.1f} ms to "
            f"{seconds[1] * 1e3:.1f} ms), IoU {iou[0]:.4f} to {iou[1]:.4f}, {len(floats)} of {layers} layers in float"
        )
        if kept:
            return f"{self.kind} is kept: {figures}"
        wishes = []
        if not seconds[0] >= LEAST_GAIN * seconds[1]:
            wishes.append(f"{LEAST_GAIN:.2f} times as fast or more")
        if not iou[0] - iou[1] <= self.max_drop:
            wishes.append(f"a drop of IoU of {self.max_drop:g} or less")
        ways = "Use the float file" + (", or allow a larger drop" if len(wishes) == 1 and "drop" in wishes[0] else "")
        return f"{self.kind} is refused: {figures}; expected {' and '.join(wishes)}. {ways}"


def list_layers(proto: Proto) -> dict[str, tuple[str, ...]]:
    """Parts of a graph that go into fewer bits together.

    Returns:
        The name of every node with weights, to the names of it and of the nodes after it until the next one; what comes
        before the first belongs to the first.
    """
    layers: dict[str, list[str]] = {}
    ahead: list[str] = []
    for node in proto.graph.node:
        if node.op_type in WEIGHTED:
            layers[node.name] = [*ahead, node.name]
            current, ahead = layers[node.name], []
        elif layers:
            current.append(node.name)
        else:
            ahead.append(node.name)
    return {name: tuple(nodes) for name, nodes in layers.items()}


def _probe(tile: np.ndarray, config: ModelConfig) -> np.ndarray:
    """The middle of a tile, as large as PROBE_SIDE but no smaller than the network takes."""
    side = max(config.min_side, PROBE_SIDE // config.stride * config.stride)
    top, left = (max(0, (size - side) // 2) for size in tile.shape[2:])
    return np.ascontiguousarray(tile[:, :, top : top + side, left : left + side])


# ----------------------------------------------------------------------------------------------------------------------
# Conversion


class _ConversionError(RuntimeError):
    """The library could not write the model in fewer bits, or ONNX Runtime cannot run what it wrote."""


@contextlib.contextmanager
def _convertible() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the library raises anything
        raise _ConversionError(shorten_error(error)) from error


def _prepare(model: bytes, folder: Path) -> Path:
    """Write the model with shapes, constants folded, normalisations merged into convolutions and names for nodes."""
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    source, prepared = folder / "model.onnx", folder / "prepared.onnx"
    source.write_bytes(model)
    with _convertible():
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)  # symbols: fails on sides left free
    proto = _load(prepared)
    _pool_means(proto)
    for number, node in enumerate(proto.graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
    onnx.save_model(proto, prepared)
    return prepared


def _pool_means(proto: Proto) -> None:
    """Turn means over a whole picture into the operator for it, in place.

    ONNX Runtime has that one in int8; a mean over two axes stays in float, and takes ten times as long between
    convolutions in int8, whose tensors have their channels last.
    """
    from onnx import numpy_helper

    constants = {item.name: item for item in proto.graph.initializer}
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in proto.graph.value_info}
    for node in proto.graph.node:
        if node.op_type != "ReduceMean" or ranks.get(node.input[0]) != 4:
            continue
        values = {item.name: item for item in node.attribute}
        axes = list(values["axes"].ints) if "axes" in values else []
        if len(node.input) > 1 and node.input[1] in constants:
            axes = numpy_helper.to_array(constants[node.input[1]]).tolist()
        if {axis % 4 for axis in axes} == {2, 3} and ("keepdims" not in values or values["keepdims"].i == 1):
            node.op_type = "GlobalAveragePool"
            del node.input[1:], node.attribute[:]
    used = {name for node in proto.graph.node for name in node.input}
    kept = [item for item in proto.graph.initializer if item.name in used]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)


def _converter(kind: str, prepared: Path, tiles: Iterator[np.ndarray], method: str) -> Convert:
    make = {"int8-static": _static, "int8-dynamic": _dynamic, "fp16": _half}[kind]

    def guard(floats: Collection[str]) -> bytes:
        with _convertible():
            model = convert(floats)
            make_session(model, "cpu")
        return model

    convert = make(prepared, tiles, method)
    return guard


def _static(prepared: Path, tiles: Iterator[np.ndarray], method: str) -> Convert:
    """Weights and activations in int8, a scale for every output channel, ranges from calibration."""
    from onnxruntime.quantization import QDQQuantizer, QuantType
    from onnxruntime.quantization.quant_utils import load_model_with_shape_infer
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    types = sorted({*QDQRegistry, *QLinearOpsRegistry})
    ranges = _calibrate(prepared, types, tiles, method)
    narrow = find_vnni() == "none" and platform.machine() in ("x86_64", "AMD64")

    def convert(floats: Collection[str]) -> bytes:
        """The network with all but some layers in int8."""
        # Without VNNI, x86 adds pairs of products in 16 bits, which overflow unless weights keep to 7 bits.
        quantizer = QDQQuantizer(
            load_model_with_shape_infer(prepared),
            per_channel=True,
            reduce_range=narrow,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=ranges,
            nodes_to_quantize=[],
            nodes_to_exclude=list(floats),
            op_types_to_quantize=types,
            extra_options={},
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
        return quantizer.model.model.SerializeToString()

    return convert


def _dynamic(prepared: Path, _tiles: Iterator[np.ndarray], _method: str) -> Convert:
    """Weights in int8; activations are brought into int8 while the model runs, by the range of each tensor."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    def convert(floats: Collection[str]) -> bytes:
        place = prepared.with_name("dynamic.onnx")
        # ONNX Runtime has no convolution of uint8 with int8 weights outside of static models.
        quantize_dynamic(prepared, place, weight_type=QuantType.QUInt8, nodes_to_exclude=list(floats))
        return place.read_bytes()

    return convert


def _half(prepared: Path, _tiles: Iterator[np.ndarray], _method: str) -> Convert:
    return lambda floats: to_half(prepared.read_bytes(), floats)


def _calibrate(prepared: Path, types: Sequence[str], tiles: Iterator[np.ndarray], method: str) -> Any:
    """Ranges of all activations over the calibration tiles, in memory for one tile's activations."""
    from onnxruntime.quantization import CalibrationMethod, create_calibrator

    with _convertible():
        calibrator = create_calibrator(
            prepared,
            types,
            augmented_model_path=str(prepared.with_name("augmented.onnx")),
            calibrate_method=CalibrationMethod[method],
        )
    name = _load(prepared).graph.input[0].name
    for tile in tiles:
        with _convertible(), _silent():
            calibrator.collect_data(_OneTile({name: tile}))
    with _convertible(), _silent():
        return calibrator.compute_data()


class _OneTile:
    """A calibration set of one tile, as ONNX Runtime reads them."""

    def __init__(self, feed: dict[str, np.ndarray]) -> None:
        self.feeds = [feed]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self.feeds.pop() if self.feeds else None


# ----------------------------------------------------------------------------------------------------------------------
# Small parts


def _check_choice(name: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}, expected one of {', '.join(known)}")


def _checked_tiles(calibration: Iterable[np.ndarray], config: ModelConfig) -> Iterator[np.ndarray]:
    """Single tiles (1, C, h, w), of which there is at least one.

    Raises:
        ValueError: none, or one that does not fit the network; at the first call of next() for the others.
    """
    tiles = (tile[None] for batch in calibration for tile in _checked(batch, config))
    first = next(tiles, None)
    if first is None:
        raise ValueError(
            "no calibration tiles were found, expected some of the images that the network was trained on: pass the "
            "data set with -ds DIR"
        )
    return itertools.chain((first,), tiles)


def _checked(batch: np.ndarray, config: ModelConfig) -> np.ndarray:
    if batch.ndim != 4 or batch.shape[1] != len(config.channels):
        raise ValueError(
            f"calibration tiles of shape {batch.shape}, expected (N, {len(config.channels)}, h, w): pass images with "
            f"the channels {', '.join(config.channels)}"
        )
    if not np.isfinite(batch).all():
        raise ValueError("a calibration tile holds NaN or infinity, expected finite values: leave such images out")
    return np.ascontiguousarray(batch, np.float32)


def _load(path: Path) -> Proto:
    import onnx

    return onnx.load_model(path)


def _runner(session: Any) -> Callable[[np.ndarray], np.ndarray]:
    """A function from a batch to the first output, whatever the names are."""
    name, output = session.get_inputs()[0].name, session.get_outputs()[0].name
    return lambda batch: session.run([output], {name: batch})[0]


def _run_all(model: bytes, batches: Sequence[np.ndarray]) -> list[np.ndarray]:
    run = _runner(make_session(model, "cpu"))
    return [run(batch).astype(np.float64) for batch in batches]


def _with_metadata(model: bytes, source: bytes, entries: dict[str, str]) -> bytes:
    """A model with the metadata of the one that it was made from, and more entries."""
    import onnx

    proto = onnx.load_model_from_string(model)
    known = {entry.key: entry.value for entry in onnx.load_model_from_string(source).metadata_props}
    onnx.helper.set_model_props(proto, {**known, **entries})
    return proto.SerializeToString()


def _not_converted(model: bytes, kind: str, error: Exception) -> Quantised:
    reason = (
        f"{kind} is refused: the model cannot be converted: {error}; expected a graph that ONNX Runtime's quantiser "
        "takes. Use the float file"
    )
    return Quantised(model, *(math.nan,) * 4, (), False, reason)


def _silent() -> contextlib.AbstractContextManager[object]:
    """Histograms print a line for every tile."""
    return contextlib.redirect_stdout(io.StringIO())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The library logs advice on what is done here already, and errors that it raises as well."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(level)
