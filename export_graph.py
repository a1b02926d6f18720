"""What an exported file holds around its network: raw pixels in, padded sides, probabilities or a mask out.

The network is exported bare, for normalised images whose sides are multiples of its stride, and proved; the nodes here
are put around it afterwards, so they are the same whatever exporter made it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from checkpoint import ModelConfig
from model import to_probabilities
from onnx_export import INPUT, OUTPUT
from tiling import reflect_index, round_up

PIXEL_TYPES = ("uint8", "uint16", "float32")
KINDS = ("logits", "probabilities", "mask")
FEWEST_OPSET = 13  # Softmax and Squeeze as they are written here
INNER = "network_"  # before the names of what was the outside of the bare network


@dataclass(frozen=True)
class Shell:
    """What lies around the network in a file.

    pixels: type of raw pixels (N, H, W, C) that the file takes; empty: normalised images (N, C, H, W) float32.
    output: one of KINDS; a mask is (N, H, W) uint8, class indices as outputs.decide gives them.
    threshold: of the mask of one class. size: (height, width), the only one that the file takes, one image at a time.
    """

    pixels: str = ""
    output: str = "logits"
    threshold: float = 0.5
    size: tuple[int, int] | None = None

    def metadata(self) -> dict[str, str]:
        """The same as entries of a file's metadata."""
        entries = {"layout": "NHWC" if self.pixels else "NCHW", "pixels": self.pixels, "output": self.output}
        if self.output == "mask":
            entries["threshold"] = str(float(self.threshold))
        if self.size:
            entries["size"] = f"{self.size[0]}x{self.size[1]}"
        return entries

    @classmethod
    def from_metadata(cls, entries: dict[str, str]) -> "Shell":
        """Read what `metadata` wrote; files without it hold a bare network.

        Raises:
            ValueError: an entry is not what `metadata` writes.
        """
        size = tuple(int(side) for side in entries["size"].split("x")) if entries.get("size") else None
        shell = cls(entries.get("pixels", ""), entries.get("output", OUTPUT), float(entries.get("threshold", 0.5)))
        if shell.pixels not in ("", *PIXEL_TYPES) or shell.output not in KINDS or (size and len(size) != 2):
            raise ValueError(f"its metadata say pixels {shell.pixels!r}, output {shell.output!r}, size {size}")
        return cls(shell.pixels, shell.output, shell.threshold, size)  # type: ignore[arg-type]


def wrap_network(model: bytes, config: ModelConfig, shell: Shell) -> bytes:
    """Put padding, and what `shell` asks for, around a bare network.

    Args:
        model: as onnx_export.export_network makes it, or a quantised one with the same input and output.

    Returns:
        An ONNX file with input `image` and the output that shell names; its metadata are those of `model`.
    """
    import onnx

    proto = onnx.load_model_from_string(model)
    graph = proto.graph
    _rename(graph, {INPUT: INNER + INPUT, OUTPUT: INNER + OUTPUT})
    del graph.value_info[:]  # shapes under names that now mean something else
    nodes = Nodes()
    before = _before(nodes, config, shell)
    split = len(nodes.made)
    _after(nodes, config, shell, before)
    body = _in_order(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes.made[:split], *body, *nodes.made[split:]])
    graph.initializer.extend(nodes.constants)
    _declare(graph, config, shell)
    onnx.checker.check_model(proto)
    return proto.SerializeToString()


def _in_order(nodes: Sequence[Any]) -> list[Any]:
    """Nodes after those whose values they take; the conversion to float16 leaves casts at the end."""
    made = {name for node in nodes for name in node.output if name}
    waiting, ordered = list(nodes), list[Any]()
    known: set[str] = set()
    while waiting:
        later: list[Any] = []
        for node in waiting:  # keep the order that is there wherever it is right
            if (_needs(node) & made) - known:
                later.append(node)
            else:
                ordered.append(node)
                known.update(node.output)
        assert len(later) < len(waiting), "a graph has no circles"
        waiting = later
    return ordered


def _needs(node: Any) -> set[str]:
    """Names that a node takes, those inside its own graphs too."""
    names = set(node.input)
    for attribute in node.attribute:
        for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            names.update(name for each in inner.node for name in _needs(each))
    return names


class Nodes:
    """Collects nodes of a graph; every method that adds one returns the name of its output, which begins as given."""

    def __init__(self, begin: str = "shell") -> None:
        self.begin = begin
        self.made: list[Any] = []
        self.constants: list[Any] = []

    def add(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Add a node with one output."""
        import onnx

        name = name or f"{self.begin}_{len(self.made)}_{kind}"
        self.made.append(onnx.helper.make_node(kind, list(inputs), [name], name=f"node_{name}", **attributes))
        return name

    def constant(self, value: np.ndarray) -> str:
        """Add a constant."""
        import onnx

        name = f"{self.begin}_constant_{len(self.constants)}"
        self.constants.append(onnx.numpy_helper.from_array(np.asarray(value), name))
        return name

    def whole(self, *values: int) -> str:
        """A list of whole numbers."""
        return self.constant(np.array(values, np.int64))

    def number(self, value: int) -> str:
        """One whole number, a scalar."""
        return self.constant(np.array(value, np.int64))


def _before(nodes: Nodes, config: ModelConfig, shell: Shell) -> dict[int, str]:
    """Nodes from `image` to the network's input; returns the names of the image's height (2) and width (3)."""
    value = INPUT
    if shell.pixels:
        if shell.pixels != "float32":
            value = nodes.add("Cast", value, to=1)
        mean, std = (
            np.asarray(config.mean, np.float32),
            np.maximum(np.asarray(config.std, np.float32), np.float32(1e-6)),
        )
        value = nodes.add("Div", nodes.add("Sub", value, nodes.constant(mean)), nodes.constant(std))
        value = nodes.add("Transpose", value, perm=[0, 3, 1, 2])
    shape, sides = nodes.add("Shape", value), {}
    for axis in (2, 3):
        sides[axis] = nodes.add("Gather", shape, nodes.number(axis))
        value = _padded(nodes, value, sides[axis], axis, config)
    nodes.add("Identity", value, name=INNER + INPUT)
    return sides


def _padded(nodes: Nodes, value: str, size: str, axis: int, config: ModelConfig) -> str:
    """One axis extended to the frame of tiling.plan_axis by the rule of tiling.reflect_index."""
    stride, one = nodes.number(config.stride), nodes.number(1)
    least = round_up(config.min_side, config.stride)
    up = nodes.add("Add", nodes.add("Max", size, nodes.number(least)), nodes.number(config.stride - 1))
    frame = nodes.add("Mul", nodes.add("Div", up, stride), stride)
    added = nodes.add("Range", size, frame, one)
    wave = nodes.add("Mul", nodes.add("Sub", size, one), nodes.number(2))
    period = nodes.add("Max", wave, one)  # of one pixel every place is 0 modulo 1
    place = nodes.add("Mod", added, period)
    index = nodes.add("Min", place, nodes.add("Sub", wave, place))
    return nodes.add("Concat", value, nodes.add("Gather", value, index, axis=axis), axis=axis)


def _after(nodes: Nodes, config: ModelConfig, shell: Shell, sides: dict[int, str]) -> None:
    """Nodes from the network's logits to the output."""
    value = INNER + OUTPUT
    ends = nodes.add("Concat", *(nodes.add("Reshape", sides[axis], nodes.whole(1)) for axis in (2, 3)), axis=0)
    last = OUTPUT if shell.output == "logits" else ""
    value = nodes.add("Slice", value, nodes.whole(0, 0), ends, nodes.whole(2, 3), name=last)
    if shell.output == "logits":
        return
    alone = config.num_logits == 1
    last = "probabilities" if shell.output == "probabilities" else ""
    if config.activation == "none":
        value = nodes.add("Identity", value, name=last)
    elif config.activation == "sigmoid" or (config.activation == "auto" and alone):
        value = nodes.add("Sigmoid", value, name=last)
    else:
        value = nodes.add("Softmax", value, name=last, axis=1)
    if shell.output == "probabilities":
        return
    if alone:
        limit = nodes.constant(np.array(shell.threshold, np.float32))
        value = nodes.add("GreaterOrEqual", nodes.add("Gather", value, nodes.number(0), axis=1), limit)
    else:
        value = nodes.add("ArgMax", value, axis=1, keepdims=0)
    nodes.add("Cast", value, to=2, name="mask")


def _declare(graph: Any, config: ModelConfig, shell: Shell) -> None:
    """Write the graph's outside: names, types and which sides are free."""
    import onnx

    batch, height, width = (1, *shell.size) if shell.size else ("batch", "height", "width")
    channels = len(config.channels)
    kinds = {"uint8": onnx.TensorProto.UINT8, "uint16": onnx.TensorProto.UINT16}
    taken = (batch, height, width, channels) if shell.pixels else (batch, channels, height, width)
    given = (batch, height, width) if shell.output == "mask" else (batch, config.num_logits, height, width)
    del graph.input[:], graph.output[:]
    make = onnx.helper.make_tensor_value_info
    graph.input.append(make(INPUT, kinds.get(shell.pixels, onnx.TensorProto.FLOAT), taken))
    kind = onnx.TensorProto.UINT8 if shell.output == "mask" else onnx.TensorProto.FLOAT
    graph.output.append(make(shell.output, kind, given))


def _rename(graph: Any, names: dict[str, str]) -> None:
    """Give values of a graph other names, in the graphs inside it too."""
    for node in graph.node:
        for values in (node.input, node.output):
            for place, name in enumerate(values):
                values[place] = names.get(name, name)
        for attribute in node.attribute:
            inner: Sequence[Any] = [attribute.g] if attribute.HasField("g") else attribute.graphs
            for each in inner:
                _rename(each, names)


# ----------------------------------------------------------------------------------------------------------------------
# For engines, which cut, normalise and decide on their own


def frame_of(size: tuple[int, int], config: ModelConfig) -> tuple[int, int]:
    """Sides that an image of a size is padded to."""
    height, width = (round_up(max(side, config.min_side), config.stride) for side in size)
    return height, width


def fit_config(config: ModelConfig, size: tuple[int, int]) -> ModelConfig:
    """The same network for engines that may give it one size alone: tiles of it, and never less.

    Raises:
        ValueError: no tile of the network fits into the size.
    """
    geometry = config.geometry
    if geometry.kind == "resize":
        return config.with_size(size)
    side = min(size) // config.stride * config.stride
    if side < max(config.min_side, 1):
        raise ValueError(
            f"a fixed size of {size[0]}x{size[1]} is too small; expected sides of at least "
            f"{round_up(config.min_side, config.stride)}, the least that {config.architecture} {config.encoder} takes"
        )
    if side != geometry.tile:  # as predictor.geometry_from_flags does it
        geometry = replace(geometry, tile=side, overlap=side // 4, halo=side // 16)
    return replace(config, min_side=side, geometry=geometry)


def file_runner(
    run: Callable[[np.ndarray], np.ndarray], config: ModelConfig, shell: Shell
) -> Callable[[np.ndarray], np.ndarray]:
    """Make a function from normalised images to probabilities out of a file that takes and gives something else.

    Args:
        run: what the file maps its input to.

    Returns:
        (N, C, h, w) float32, normalised with the statistics of `config` -> (N, K, h, w) float32. A mask becomes
        probabilities of 0 and 1. It raises ValueError when images are larger than a fixed size, or when their pixels
        are not of the type that the file takes.
    """

    def forward(batch: np.ndarray) -> np.ndarray:
        if shell.size is None:
            return give_probabilities(run(take_pixels(batch, config, shell)), config, shell)
        height, width = batch.shape[2:]
        padded = pad_to(batch, shell.size)
        parts = [
            give_probabilities(run(take_pixels(image[None], config, shell)), config, shell)[..., :height, :width]
            for image in padded
        ]
        return np.concatenate(parts)

    return forward


def pad_to(batch: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Extend (N, C, h, w) to the right and below by reflection.

    Raises:
        ValueError: it is larger than the size.
    """
    height, width = batch.shape[2:]
    if height > size[0] or width > size[1]:
        raise ValueError(
            f"the file takes {size[0]}x{size[1]} alone, found tiles of {height}x{width}: leave out --tile-size and "
            "--image-size, or export with another --fixed-size"
        )
    if (height, width) == size:
        return batch
    return batch.take(reflect_index(height, size[0]), axis=2).take(reflect_index(width, size[1]), axis=3)


def take_pixels(batch: np.ndarray, config: ModelConfig, shell: Shell) -> np.ndarray:
    """What a file takes, from normalised images (N, C, h, w): the raw pixels (N, h, w, C) again, where it wants them.

    Whole numbers come back exactly: the error of the way there and back is below 0.02 even for 16 bits.

    Raises:
        ValueError: the pixels are not of the type that the file takes.
    """
    if not shell.pixels:
        return np.ascontiguousarray(batch, np.float32)
    std = np.maximum(np.asarray(config.std, np.float32), np.float32(1e-6))
    raw = batch.transpose(0, 2, 3, 1) * std + np.asarray(config.mean, np.float32)
    if shell.pixels == "float32":
        return np.ascontiguousarray(raw, np.float32)
    whole = np.rint(raw)
    top = np.iinfo(shell.pixels).max
    if not (np.abs(raw - whole).max() < 0.05 and whole.min() >= 0 and whole.max() <= top):
        raise ValueError(
            f"the file takes {shell.pixels} pixels, found values from {raw.min():g} to {raw.max():g}: expected whole "
            f"numbers of 0 to {top}. Export with --input-dtype float32, or without --with-preprocessing"
        )
    return np.ascontiguousarray(whole.astype(shell.pixels))


def give_probabilities(values: np.ndarray, config: ModelConfig, shell: Shell) -> np.ndarray:
    """Probabilities (N, K, h, w) float32 from what a file gives."""
    if shell.output == "probabilities":
        return values
    if shell.output == "mask":
        if config.num_logits == 1:
            return values[:, None].astype(np.float32)
        return (values[:, None] == np.arange(config.num_logits, dtype=np.uint8)[:, None, None]).astype(np.float32)
    return to_probabilities(torch.from_numpy(values), config.activation).numpy()
