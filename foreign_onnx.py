"""ONNX files of other projects: brought into the form of our own and described, so that every command takes them.

Such a file maps one normalised float32 image batch to logits or probabilities. Names, layout, the order of colours and
an output that is smaller by a whole number are put right by nodes around its graph; the sides that it takes are tried.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from checkpoint import Geometry, ModelConfig
from classes import ClassMap
from export_graph import FEWEST_OPSET, Nodes
from model import shorten_error
from onnx_export import INPUT, OPSET, OUTPUT, make_session

STRIDES = (1, 2, 4, 8, 16, 32, 64)
LARGEST_SIDE = 512  # that is tried when the least side is looked for
LARGEST_FACTOR = 8  # an output that is smaller than this is no segmentation of the image
TILE = 512  # where no flag says what the network was trained on
BATCH = 4
ARCHITECTURE = "onnx"  # in the description, with the file's name in place of the encoder's

Proto = Any  # onnx.ModelProto
Run = Callable[[tuple[int, int]], list[np.ndarray]]  # a size to all outputs for one image of it


@dataclass(frozen=True)
class Facts:
    """What nobody can read in the file.

    mean, std: raw units of the pixels, in the file's order of channels. classes: None, what its channels mean is told
    by their number. gives: logits, probabilities, or empty: told by the values. output: name of the output, or empty:
    the first that looks like one. size: the only (height, width) to run it at; None: any that it takes.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: ClassMap | None = None
    add_dirs: tuple[str, ...] = ()
    gives: str = ""
    bgr: bool = False
    output: str = ""
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Ends:
    """How a file is fed and what comes out: names, layouts, order of colours, and how many times smaller the output is.

    size: (height, width) when the graph takes no other. single: one image at a time.
    """

    input: str
    last: bool = False
    bgr: bool = False
    size: tuple[int, int] | None = None
    single: bool = False
    output: str = ""
    output_last: bool = False
    factor: int = 1


@dataclass(frozen=True)
class Adopted:
    """A file of another project in our form.

    bare: `image` (N, C, H, W) to `logits` (N, K, H, W), the description not yet in it. original: the file as it came,
    fed from outside, to be compared with. size: of images, where it takes no other. single: one image at a time. notes:
    what was found out.
    """

    bare: bytes
    config: ModelConfig
    original: nn.Module
    size: tuple[int, int] | None
    single: bool
    notes: tuple[str, ...]


class Original(nn.Module):
    """The file as it came, fed and read from outside, in the place of a network of PyTorch."""

    def __init__(self, session: Any, ends: Ends) -> None:
        super().__init__()
        self.session, self.ends = session, ends

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, K, H, W), one after another where it takes one image."""
        batch = np.ascontiguousarray(images.numpy())
        parts = [batch[place : place + 1] for place in range(len(batch))] if self.ends.single else [batch]
        found = [self.session.run([self.ends.output], feed(part, self.ends))[0] for part in parts]
        values = torch.from_numpy(np.concatenate(found))
        if self.ends.output_last:
            values = values.permute(0, 3, 1, 2)
        if self.ends.factor > 1:
            values = nn.functional.interpolate(values, size=images.shape[2:], mode="bilinear")
        return values.contiguous()


def feed(batch: np.ndarray, ends: Ends) -> dict[str, np.ndarray]:
    """What the file takes, from normalised images (N, C, H, W) in our order of channels."""
    if ends.bgr:
        batch = batch[:, bgr_order(batch.shape[1])]
    return {ends.input: np.ascontiguousarray(batch.transpose(0, 2, 3, 1) if ends.last else batch)}


def bgr_order(channels: int) -> list[int]:
    """Where each channel of B G R extras stands in R G B extras; it is its own inverse."""
    return [2, 1, 0, *range(3, channels)]


def adopt(path: Path, facts: Facts) -> Adopted:
    """Read a file of another project, find out what it takes and gives, and bring it into our form.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or not of a form that can be used; the message names shapes, types and flags.
    """
    proto = read_foreign(path)
    ends = find_input(path, proto, facts)
    try:
        session = make_session(proto.SerializeToString(), "cpu")
    except ValueError as error:
        raise ValueError(f"{path}: {error}. Expected operators and an opset that it knows: export it again") from error
    ends, stride, least, logits = find_output(path, session, ends, facts)
    activation, note = judge_values(path, session, ends, facts, (stride, least))
    notes = [note]
    if ends.factor > 1:
        notes.append(f"its output is {ends.factor} times smaller: enlarged bilinearly")
    bare = rewrite(proto, ends, len(facts.mean), logits)
    original = Original(session, ends)
    single = ends.single and not ends.size
    if not ends.size:
        notes.append(f"sides are multiples of {stride} from {least} on, as tried")
        single = single and not takes_batches(bare, original, max(least, stride * -(-96 // stride)))
    config = describe_network(path, facts, stride=stride, least=least, logits=logits, activation=activation)
    return Adopted(bare, config, original, ends.size, single, tuple(notes))


def read_foreign(path: Path) -> Proto:
    """An ONNX file with the data that lie beside it.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is damaged or its data are missing.
    """
    import onnx

    if not path.is_file():
        raise FileNotFoundError(f"no ONNX file {path}; expected one of this or another project")
    try:
        proto = onnx.load(str(path))
    except Exception as error:  # protobuf's own class of error is not part of its interface
        raise ValueError(
            f"{path} is truncated, not an ONNX file, or its external data are not beside it ({shorten_error(error)}). "
            "Use another copy of it, with the files that belong to it"
        ) from error
    if not proto.graph.node:
        raise ValueError(f"{path} is truncated or not an ONNX file (it holds no graph). Use another copy of it")
    return proto


# ----------------------------------------------------------------------------------------------------------------------
# What it takes


def find_input(path: Path, proto: Proto, facts: Facts) -> Ends:
    """The one input, which axis its channels are on, and what is fixed.

    Raises:
        ValueError: several inputs, or one that is no batch of float32 images with so many channels.
    """
    constants = {item.name for item in proto.graph.initializer}
    inputs = [item for item in proto.graph.input if item.name not in constants]
    shown = "; ".join(describe_value(item) for item in inputs)
    if len(inputs) != 1:
        raise ValueError(f"{path} has {len(inputs)} inputs ({shown}), expected one image batch: export it with one")
    kind, shape = value_type(inputs[0])
    if kind != "float32" or len(shape) != 4:
        raise ValueError(
            f"{path} takes {shown}, expected normalised float32 images (N, C, H, W) or (N, H, W, C): export it again "
            "without its preprocessing"
        )
    channels = len(facts.mean)
    last = shape[1] != channels and shape[3] == channels
    if not last and shape[1] not in (channels, None):
        raise ValueError(
            f"{path} takes {shown}, and --mean and --std name {channels} channels: give one number for each channel"
        )
    batch, height, width = shape[0], shape[1 if last else 2], shape[2 if last else 3]
    if batch not in (None, 1):
        raise ValueError(f"{path} takes {batch} images at a time ({shown}), expected any number or one: export it anew")
    size = facts.size
    if height or width:
        size = height or width or 0, width or height or 0
        if facts.size and facts.size != size:
            raise ValueError(f"{path} takes {size[0]}x{size[1]} alone ({shown}): leave out --fixed-size")
    if facts.bgr and channels < 3:
        raise ValueError(f"--bgr: {path} takes {channels} channels, expected 3 or more: leave it out")
    return Ends(inputs[0].name, last, facts.bgr, size, single=batch == 1)


def value_type(value: Any) -> tuple[str, list[int | None]]:
    """Type and shape of an input or output; None is a free side."""
    import onnx

    tensor = value.type.tensor_type
    kind = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name if tensor.elem_type else "nothing"
    return kind, [each.dim_value if each.HasField("dim_value") else None for each in tensor.shape.dim]


def describe_value(value: Any) -> str:
    """Name, type and shape, to be shown."""
    kind, _ = value_type(value)
    sides = [each.dim_param or str(each.dim_value or "?") for each in value.type.tensor_type.shape.dim]
    return f"{value.name} {kind} ({', '.join(sides)})"


def describe_ends(path: Path) -> str:
    """What a file takes and gives, to be shown before anything is known about it."""
    graph = read_foreign(path).graph
    constants = {item.name for item in graph.initializer}
    taken = [describe_value(item) for item in graph.input if item.name not in constants]
    return f"{', '.join(taken) or 'nothing'} to {', '.join(describe_value(item) for item in graph.output) or 'nothing'}"


# ----------------------------------------------------------------------------------------------------------------------
# What it gives


@dataclass(frozen=True)
class Answer:
    """One output that could be the segmentation: its place, layout, classes, and how many times smaller it is."""

    place: int
    last: bool
    logits: int
    factor: int


def find_output(path: Path, session: Any, ends: Ends, facts: Facts) -> tuple[Ends, int, int, int]:
    """Try the file at sizes: which output it is, the stride and least side that work, and the number of its channels.

    Raises:
        ValueError: nothing comes out that is a segmentation of the image; or not with as many channels as classes.
    """
    names = [each.name for each in session.get_outputs()]
    if facts.output and facts.output not in names:
        raise ValueError(f"{path} has no output {facts.output!r}, found {', '.join(names)}: give one to --output-name")
    wanted = facts.classes and count_logits(facts.classes)
    run = runner(session, ends, len(facts.mean))
    seen: list[str] = []
    for stride in (1,) if ends.size else STRIDES:
        sizes = [ends.size] if ends.size else two_sizes(stride)
        found = [find_answers(run, size, names, facts.output, seen) for size in sizes]
        both = [answer for answer in found[0] if answer in found[-1]]
        if both:
            best = min(both, key=lambda each: (each.logits != wanted, each.factor, each.place))
            check_count(path, names[best.place], best.logits, facts.classes)
            ends = replace(ends, output=names[best.place], output_last=best.last, factor=best.factor)
            least = stride if ends.size else find_least(run, names, best, stride)
            return ends, stride, least, best.logits
    where = f"{ends.size[0]}x{ends.size[1]}" if ends.size else "any of the sizes that were tried; give --fixed-size"
    raise ValueError(
        f"{path} gives no segmentation of an image of {where}: found {'; '.join(dict.fromkeys(seen))}; expected "
        f"float32 (N, K, H, W) or (N, H, W, K), H and W those of the image or up to {LARGEST_FACTOR} times smaller"
    )


def two_sizes(stride: int) -> list[tuple[int, int]]:
    """Odd multiples of a stride, so that they are no multiples of a larger one."""
    first = max(-(-64 // stride), 1) | 1
    return [(first * stride, (first + 2) * stride), ((first + 4) * stride, first * stride)]


def runner(session: Any, ends: Ends, channels: int) -> Run:
    """A function from a size to all outputs for one image of noise."""

    def run(size: tuple[int, int]) -> list[np.ndarray]:
        noise = np.random.default_rng(0).standard_normal((1, channels, *size)).astype(np.float32)
        return session.run(None, feed(noise, ends))

    return run


def find_answers(
    run: Run,
    size: tuple[int, int],
    names: Sequence[str],
    wanted: str,
    seen: list[str],
) -> list[Answer]:
    """Outputs that could be the segmentation of an image of a size; what others are goes into `seen`."""
    try:
        values = run(size)
    except Exception as error:  # ONNX Runtime's errors have no common class
        seen.append(f"an error with {size[0]}x{size[1]} ({shorten_error(error)})")
        return []
    answers = []
    for place, value in enumerate(values):
        if wanted and names[place] != wanted:
            continue
        answer = judge_shape(np.asarray(value), size, place)
        if answer:
            answers.append(answer)
        else:
            shape = ", ".join(map(str, np.shape(value)))
            seen.append(f"{names[place]} {np.asarray(value).dtype} ({shape}) with {size[0]}x{size[1]}")
    return answers


def judge_shape(value: np.ndarray, size: tuple[int, int], place: int) -> Answer | None:
    """Whether an output is the segmentation of an image of a size."""
    if value.ndim != 4 or value.dtype != np.float32 or not np.isfinite(value).all():
        return None
    for last in (False, True):
        height, width, logits = value.shape[1:] if last else (*value.shape[2:], value.shape[1])
        factor = size[0] // max(height, 1)
        if 1 <= factor <= LARGEST_FACTOR and (height * factor, width * factor) == size:
            return Answer(place, last, logits, factor)
    return None


def find_least(run: Run, names: Sequence[str], best: Answer, stride: int) -> int:
    """The least multiple of the stride from which on images are taken, as far as tried."""

    def works(side: int) -> bool:
        return best in find_answers(run, (side, side), names, names[best.place], [])

    sides = range(stride, LARGEST_SIDE + 1, stride)
    return next((side for side in sides if works(side)), two_sizes(stride)[0][1])


def count_logits(classes: ClassMap) -> int:
    """Channels of a network that tells these classes apart; see ModelConfig.num_logits."""
    return 1 if len(classes.names) == 2 and classes.has_background else len(classes.names)


def check_count(path: Path, name: str, logits: int, classes: ClassMap | None) -> None:
    """Refuse classes that are not as many as the output's channels.

    Raises:
        ValueError: see the message.
    """
    every = " ".join(map(str, range(logits)))
    if classes is None and logits > 1:
        raise ValueError(
            f"{path}: {name} has {logits} channels, and nothing says which mask label each of them stands for: give "
            f'--class-list, such as --class-list "{every}" for labels 0 to {logits - 1} in the order of the channels'
        )
    if classes is not None and count_logits(classes) != logits:
        expected = count_logits(classes)
        words = "1 channel, for the object" if expected == 1 else f"{expected} channels ({', '.join(classes.names)})"
        raise ValueError(
            f"{path}: {name} has {logits} channel{'s' if logits > 1 else ''}, and the classes ask for {words}: give "
            + ("--class-list LABEL, one label" if logits == 1 else "--class-list one label for each channel, in order,")
            + ("" if logits == 1 else f' such as "{every}"; without a 0 in it the first channel is the background')
        )


def judge_values(path: Path, session: Any, ends: Ends, facts: Facts, sides: tuple[int, int]) -> tuple[str, str]:
    """The activation that is still to be done, see ModelConfig, and how that was found out.

    Raises:
        ValueError: probabilities were announced and the values lie outside 0 and 1.
    """
    stride, least = sides
    side = max(least, stride * -(-96 // stride))
    size = ends.size or (side, side)
    noise = np.random.default_rng(1).standard_normal((1, len(facts.mean), *size)).astype(np.float32)
    values = session.run([ends.output], feed(noise, ends))[0]
    low, high = float(values.min()), float(values.max())
    within = low >= -1e-4 and high <= 1 + 1e-4
    if facts.gives == "probabilities" and not within:
        raise ValueError(
            f"{path}: values of {ends.output} lie between {low:.3g} and {high:.3g} on noise, expected 0 to 1 of "
            "--gives probabilities: use --gives logits"
        )
    kind = facts.gives or ("probabilities" if within else "logits")
    why = "as --gives says" if facts.gives else f"values from {low:.3g} to {high:.3g} on noise; if not, give --gives"
    return ("none" if kind == "probabilities" else "auto"), f"its output {ends.output!r} holds {kind} ({why})"


# ----------------------------------------------------------------------------------------------------------------------
# Our form


def rewrite(proto: Proto, ends: Ends, channels: int, logits: int) -> bytes:
    """The graph with our names and layout, free sides declared, in an opset that everything around it has.

    Raises:
        ValueError: it is in an opset that cannot be brought up.
    """
    import onnx

    made = onnx.ModelProto()
    made.CopyFrom(proto)
    constants = {item.name for item in made.graph.initializer}
    taken = [item for item in made.graph.input if item.name not in constants]
    del made.graph.input[:], made.graph.value_info[:]
    made.graph.input.extend(taken)
    made.ir_version = max(made.ir_version, 8)
    version = next((each.version for each in made.opset_import if each.domain in ("", "ai.onnx")), 1)
    if version < FEWEST_OPSET:
        try:
            made = onnx.version_converter.convert_version(made, OPSET)
        except Exception as error:  # it raises anything
            raise ValueError(
                f"its opset is {version} and cannot be raised to {OPSET} ({shorten_error(error)}): export it again "
                f"with opset {FEWEST_OPSET} or later"
            ) from error
    made = onnx.compose.add_prefix(made, "other_")  # so that no name in it is one of ours
    graph, before, after = made.graph, Nodes("ends_before"), Nodes("ends_after")
    value = INPUT
    if ends.bgr:
        value = before.add("Gather", value, before.whole(*bgr_order(channels)), axis=1)
    if ends.last:
        value = before.add("Transpose", value, perm=[0, 2, 3, 1])
    before.add("Identity", value, name="other_" + ends.input)
    value = "other_" + ends.output
    if ends.output_last:
        value = after.add("Transpose", value, perm=[0, 3, 1, 2])
    if ends.factor > 1:
        scales = after.constant(np.array([1, 1, ends.factor, ends.factor], np.float32))
        value = after.add("Resize", value, "", scales, mode="linear", coordinate_transformation_mode="half_pixel")
    after.add("Identity", value, name=OUTPUT)
    body = list(graph.node)
    del graph.node[:], graph.input[:], graph.output[:], graph.value_info[:]
    for node in (*before.made, *after.made):
        node.name = f"ends_{node.name}"
    graph.node.extend([*before.made, *body, *after.made])
    graph.initializer.extend([*before.constants, *after.constants])
    declare = onnx.helper.make_tensor_value_info
    batch, sides = (1, ends.size) if ends.size else ("batch", ("height", "width"))
    graph.input.append(declare(INPUT, onnx.TensorProto.FLOAT, (batch, channels, *sides)))
    graph.output.append(declare(OUTPUT, onnx.TensorProto.FLOAT, (batch, logits, *sides)))
    return made.SerializeToString()


def takes_batches(bare: bytes, original: nn.Module, side: int) -> bool:
    """Whether a graph that declares a batch of one takes two as well, and each as if it were alone."""
    channels = make_session(bare, "cpu").get_inputs()[0].shape[1]
    noise = np.random.default_rng(2).standard_normal((2, channels, side, side)).astype(np.float32)
    try:
        found = make_session(bare, "cpu").run([OUTPUT], {INPUT: noise})[0]
    except Exception:  # ONNX Runtime's errors have no common class
        return False
    expected = original(torch.from_numpy(noise)).numpy()
    return found.shape == expected.shape and bool(np.allclose(found, expected, rtol=1e-4, atol=1e-5))


def describe_network(path: Path, facts: Facts, *, stride: int, least: int, logits: int, activation: str) -> ModelConfig:
    """The description, with tiles of TILE or the least side that is taken."""
    count = len(facts.mean)
    order = bgr_order(count) if facts.bgr else list(range(count))
    own = count - len(facts.add_dirs)
    if own < 1:
        raise ValueError(f"--add-dirs names {len(facts.add_dirs)} channels and {path} takes {count} in all")
    names = {1: ("grey",), 3: ("red", "green", "blue")}.get(own) or tuple(f"band{i + 1}" for i in range(own))
    classes = facts.classes or ClassMap((), ("background", "object"))
    side = -(-max(TILE, least) // stride) * stride
    return ModelConfig(
        architecture=ARCHITECTURE,
        encoder=path.stem,
        labels=classes.labels,
        class_names=classes.names,
        channels=(*names, *facts.add_dirs),
        mean=tuple(facts.mean[place] for place in order),
        std=tuple(facts.std[place] for place in order),
        geometry=Geometry("crops", (side, side), side, side // 4, side // 16),
        ignore_label=classes.ignore_label,
        add_dirs=facts.add_dirs,
        stride=stride,
        min_side=least,
        activation=activation,
        batch=BATCH,
    )


def noise_images(config: ModelConfig) -> list[np.ndarray]:
    """Raw pixels (H, W, C) of three sizes as tiles have them: a stride of 1 makes the other images of a proof small."""
    rng = np.random.default_rng(4)
    top = np.iinfo(config.dtype).max if config.dtype.startswith("uint") else np.inf
    sizes = [(64, 96), (131, 77), (200, 33)]
    images = [rng.standard_normal((*size, len(config.mean))) * config.std + config.mean for size in sizes]
    if not np.isfinite(top):
        return [image.astype(np.float32) for image in images]
    return [np.clip(np.rint(image), 0, top).astype(config.dtype) for image in images]
