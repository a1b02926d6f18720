"""Checkpoints of the predecessor: what is pickled in them is never loaded, and their networks are turned into ours.

Such a file holds a pickled loss, weights for images in B G R order, the background as the last class, and perhaps
`module.` before every name. It says neither the size that images were resized to nor the labels of very old runs.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from model import build_model, image_convs, resolve_architecture, resolve_encoder, stride_and_min_side

SIZE, LABELS = "size", "labels"  # what a file may leave open, see describe_assumptions
DEFAULT_SIZE = 512
DEFAULT_LABEL = 64  # of the predecessor's runs from before it stored labels
KEYS = ("model_state_dict", "model_name", "encoder_name")
HEAD = "segmentation_head.0.weight"
ACTIVATIONS = {"sigmoid": "sigmoid", "softmax": "softmax", "softmax2d": "softmax"}
SHOWN = 4  # names of tensors in a message

NUMBERS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")  # NumPy's names of what is read
STUBBED = (
    *(f"segmentation_models_pytorch.utils.losses.{name}" for name in ("DiceLoss", "JaccardLoss")),
    *(f"segmentation_models_pytorch.utils.base.{name}" for name in ("Loss", "SumOfLosses", "MultipliedLoss")),
    *(f"segmentation_models_pytorch.base.modules.{name}" for name in ("Activation", "ArgMax", "Clamp")),
    *(f"torch.nn.modules.activation.{name}" for name in ("LogSoftmax", "Sigmoid", "Softmax", "Softmax2d", "Tanh")),
    "torch.nn.modules.linear.Identity",
)


# ----------------------------------------------------------------------------------------------------------------------
# Reading without running anything


class Stub:
    """Stands for an object of a class that is not loaded; whatever it is given is dropped."""

    dump_patches = False  # asked for by PyTorch's reader of files from before 1.6

    def __new__(cls, *_: Any) -> "Stub":
        return object.__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class NumberType(Stub):
    """Stands for a NumPy dtype: only its name and byte order are kept."""

    def __init__(self, name: Any = "", *_: Any) -> None:
        self.name, self.order = name, "<"

    def __setstate__(self, state: Any) -> None:
        self.order = ">" if state[1] == ">" else "<"

    def read(self, data: Any) -> np.ndarray:
        """The numbers behind bytes, as float64.

        Raises:
            ValueError: not plain numbers.
        """
        if self.name not in NUMBERS or not isinstance(data, bytes):
            raise ValueError(f"an array of {str(self.name)[:20]}, expected numbers")
        return np.frombuffer(data, f"{self.order}{self.name}").astype(np.float64)


class Array(Stub):
    """Stands for a NumPy array: its numbers, in the order of the file."""

    def __init__(self, *_: Any) -> None:
        self.numbers: np.ndarray = np.zeros(0)

    def __setstate__(self, state: Any) -> None:
        kind, data = state[2], state[4]
        if not isinstance(kind, NumberType):
            raise ValueError("an array without a type")
        self.numbers = kind.read(data)


def read_scalar(kind: Any, data: Any) -> float:
    """One number of NumPy, as Python's.

    Raises:
        ValueError: not one plain number.
    """
    if not isinstance(kind, NumberType):
        raise ValueError("a number without a type")
    return float(kind.read(data).item())


def _stand_ins() -> list[Any]:
    """What PyTorch's reader puts in place of the classes and functions that a file names."""
    found: list[Any] = [(Stub, name) for name in STUBBED]
    for core in ("numpy.core.multiarray", "numpy._core.multiarray"):
        found += [(Array, f"{core}._reconstruct"), (read_scalar, f"{core}.scalar")]
    return [*found, (Array, "numpy.ndarray"), (NumberType, "numpy.dtype")]


@contextmanager
def inert_classes() -> Iterator[None]:
    """While it lasts, torch.load(weights_only=True) reads the predecessor's few known classes as stubs.

    Every other name in a file is refused as ever; nothing is imported for the names, and no code of them runs.
    """
    with torch.serialization.safe_globals(_stand_ins()):
        yield


# ----------------------------------------------------------------------------------------------------------------------
# Translation


class Translated(NamedTuple):
    """A network of the predecessor as one of ours: description as ModelConfig's entries, and weights."""

    description: dict[str, Any]
    weights: dict[str, Tensor]


def is_predecessors(saved: Any) -> bool:
    """Whether the content of a file has the entries of the predecessor's checkpoints."""
    return isinstance(saved, dict) and "config" not in saved and all(key in saved for key in KEYS)


def describe_assumptions(assumed: Sequence[str], size: Sequence[int]) -> list[str]:
    """What a user must know about a checkpoint that does not say everything.

    Args:
        assumed: SIZE, LABELS, or neither. size: (height, width) that images are resized to.
    """
    texts = {
        SIZE: "an old checkpoint, which does not say the size that images are resized to: "
        f"{size[0]}x{size[-1]} is assumed, --tile-size S names another",
        LABELS: f"an old checkpoint, which does not say its mask label: {DEFAULT_LABEL} is assumed",
    }
    return [texts[name] for name in assumed if name in texts]


def translate(saved: Mapping[str, Any]) -> Translated:
    """Turn the content of one of the predecessor's checkpoints into a description and weights of ours.

    Channels become R G B extras, the background becomes class 0, the labels keep their order, and the channels of
    several classes stay independent (sigmoid), as they were trained.

    Raises:
        ValueError: an entry is missing or wrong, or its network cannot be built today; says which.
    """
    stored = _plain_weights(saved["model_state_dict"])
    outputs = len(stored[HEAD])
    labels, assumed = _labels(saved, outputs)
    add_dirs = tuple(str(name) for name in _words(saved.get("add_dirs"), "add_dirs"))
    channels = 3 + len(add_dirs)
    mean, std = _statistics(saved, channels)
    architecture, encoder = _network_names(saved)
    with torch.random.fork_rng(devices=()):  # what comes after is as random as without it
        network = build_model(architecture, encoder, in_channels=channels, num_logits=outputs)
        stride, min_side = stride_and_min_side(architecture, encoder, network)
    weights = _fit_names(stored, network, f"{architecture} {encoder}")
    _swap_red_and_blue(weights, network)
    if outputs > 1:
        _put_background_first(weights)
    wide = max(mean) > 255
    names = ("background", *(map(str, labels) if outputs > 1 else ["object"]))
    description = {
        "architecture": architecture,
        "encoder": encoder,
        "labels": labels,
        "class_names": names,
        "channels": ("red", "green", "blue", *add_dirs),
        "mean": mean,
        "std": std,
        "geometry": {"kind": "resize", "size": (DEFAULT_SIZE, DEFAULT_SIZE)},
        "add_dirs": add_dirs,
        "dtype": "uint16" if wide else "uint8",
        "value_range": ((0.0,), (65535.0 if wide else 255.0,)),
        "stride": stride,
        "min_side": min_side,
        "activation": _activation(saved, outputs),
        "assumed": (SIZE, *assumed),
    }
    return Translated(description, weights)


def _plain_weights(state: Any) -> dict[str, Tensor]:
    """The weights without the `module.` of nn.DataParallel."""
    if not isinstance(state, Mapping) or not state:
        raise ValueError(
            "its model_state_dict is no table of tensors: the file is no whole checkpoint, use another copy"
        )
    stored = {str(key): value for key, value in state.items()}
    while all(key.startswith("module.") for key in stored):
        stored = {key.removeprefix("module."): value for key, value in stored.items()}
    wrong = [key for key, value in stored.items() if not isinstance(value, Tensor)]
    if wrong or HEAD not in stored or stored[HEAD].ndim != 4:
        found = f"{wrong[0]} is no tensor" if wrong else f"no {HEAD} among {_some(stored)}"
        raise ValueError(f"its model_state_dict is not that of a segmentation network ({found}): use another copy")
    return stored


def _network_names(saved: Mapping[str, Any]) -> tuple[str, str]:
    """Architecture and encoder by their names of today.

    Raises:
        ValueError: unknown, or a pair whose arithmetic has changed since.
    """
    named = str(saved["encoder_name"])
    architecture = resolve_architecture(str(saved["model_name"]))
    encoder = resolve_encoder(named, architecture)
    if architecture.startswith("deeplabv3") and encoder.startswith("tu-") and not named.startswith("tu-"):
        raise ValueError(
            f"{architecture} with encoder {named} cannot be read: {encoder}, which took its place, dilates other "
            "layers and would answer something else. Train it again, or use the old program"
        )
    return architecture, encoder


def _labels(saved: Mapping[str, Any], outputs: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Labels in their order, and what had to be assumed.

    Raises:
        ValueError: none are stored for several outputs, or they do not fit the outputs.
    """
    words = _words(saved.get("class_list"), "class_list")
    if not words and outputs == 1:
        return (DEFAULT_LABEL,), (LABELS,)
    try:
        labels = tuple(int(word) for word in words)
    except (TypeError, ValueError) as error:
        raise ValueError(f"its class_list {words!r} is not a list of labels ({error})") from error
    expected = 1 if len(labels) == 1 else len(labels) + 1
    if outputs != expected or len(set(labels)) != len(labels):
        raise ValueError(
            f"its class_list {list(labels)} needs {expected} outputs with different labels and its network has "
            f"{outputs}; set saved['class_list'] to the labels in the order of training"
        )
    if not all(0 < label <= 65535 for label in labels):
        raise ValueError(
            f"its class_list {list(labels)} must hold labels from 1 to 65535: a learned label 0 beside a background of "
            "all other values is not possible here. Train again with labels that are not 0"
        )
    return labels, ()


def _words(value: Any, name: str) -> list[Any]:
    """A stored list, whatever it was stored as; nothing of None."""
    if value is None:
        return []
    if isinstance(value, str):
        return value.split()
    if isinstance(value, Array):
        return value.numbers.tolist()
    if isinstance(value, (list, tuple)):
        return [*value]
    if isinstance(value, (int, float)):
        return [value]
    raise ValueError(f"its {name} is {type(value).__name__}, expected a list")


def _statistics(saved: Mapping[str, Any], channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of R G B extras in raw units.

    Raises:
        ValueError: missing, too few, or not finite.
    """
    both = saved.get("mean_var")
    remedy = (
        "expected mean and std of the training images for each channel: put the two lines of their mean_vals.txt into "
        "saved['mean_var'] = {'mean': [...], 'std': [...]} and save it again"
    )
    if not isinstance(both, Mapping) or "mean" not in both or "std" not in both:
        raise ValueError(f"it has no mean_var; {remedy}")
    rows = []
    for name in ("mean", "std"):
        try:
            row = [float(value) for value in _words(both[name], f"mean_var {name}")]
        except (TypeError, ValueError) as error:
            raise ValueError(f"its mean_var {name} cannot be read ({error}); {remedy}") from error
        if len(row) < channels or not np.isfinite(row).all() or (name == "std" and min(row) < 0):
            raise ValueError(f"its mean_var {name} is {row} for {channels} channels; {remedy}")
        blue, green, red, *extras = row[:channels]  # a longer file of statistics was cut as well
        rows.append((red, green, blue, *extras))
    return rows[0], rows[1]


def _activation(saved: Mapping[str, Any], outputs: int) -> str:
    name = str(saved.get("activation", "sigmoid")).lower()
    known = ACTIVATIONS.get(name)
    if known is None or (known == "softmax" and outputs == 1):
        raise ValueError(f"its activation is {name!r} for {outputs} outputs, expected sigmoid: it cannot be read")
    return known


def _fit_names(stored: Mapping[str, Tensor], network: nn.Module, what: str) -> dict[str, Tensor]:
    """The weights under today's names; encoders that timm builds now have `model.` before theirs.

    Raises:
        ValueError: other names or shapes; the first of them are named.
    """
    target = network.state_dict()

    def today(key: str) -> str:
        moved = f"encoder.model.{key.removeprefix('encoder.')}"
        return moved if key not in target and key.startswith("encoder.") and moved in target else key

    weights = {today(key): value for key, value in stored.items()}
    lacking = [key for key in target if key not in weights]
    strange = [key for key in weights if key not in target]
    if lacking or strange:
        found = [
            f"{len(keys)} {kind} ({_some(keys)})" for keys, kind in ((lacking, "missing"), (strange, "unknown")) if keys
        ]
        raise ValueError(
            f"its weights are not those of today's {what}: tensors {' and '.join(found)}. Its encoder has changed "
            "since: train it again, or use the old program"
        )
    for key, value in weights.items():
        if value.shape != target[key].shape:
            raise ValueError(
                f"its weights do not fit {what}: {key} is {tuple(value.shape)}, expected {tuple(target[key].shape)}; "
                "model_name, encoder_name, add_dirs and class_list must be those of training"
            )
    return {key: weights[key] for key in target}


def _swap_red_and_blue(weights: dict[str, Tensor], network: nn.Module) -> None:
    """Let the convolutions that see the image take R G B where they took B G R; extras stay."""
    for key in image_convs(network):
        order = [2, 1, 0, *range(3, weights[key].shape[1])]
        weights[key] = weights[key][:, order].contiguous()


def _put_background_first(weights: dict[str, Tensor]) -> None:
    """Turn the classes from labels and then background into background and then labels."""
    for key in (HEAD, HEAD.replace("weight", "bias")):
        weights[key] = weights[key].roll(1, 0)


def _some(names: Any) -> str:
    shown = [*names][:SHOWN]
    return ", ".join(shown) + (", ..." if len(names) > SHOWN else "")


# ----------------------------------------------------------------------------------------------------------------------
# Files that are neither


def describe_stranger(saved: Any) -> str:
    """What the content of a file is that is no checkpoint, and what to do with it; nothing is known of some."""
    if isinstance(saved, Tensor):
        return "but a single tensor"
    if not isinstance(saved, dict):
        return f"but a {type(saved).__name__}"
    if "pytorch-lightning_version" in saved:
        return "but one of Lightning: save its network's state_dict, which train.py --encoder-weights FILE takes"
    if saved and all(isinstance(value, Tensor) for value in saved.values()):
        return (
            f"but weights alone ({_some(list(saved))}), without what describes the network: "
            "train.py --encoder-weights FILE starts a training from them"
        )
    inner = [key for key in ("model_state_dict", "state_dict", "model", "net") if key in saved]
    held = f"weights under {inner[0]!r} without a description that is known here" if inner else _some(map_keys(saved))
    way = ": train.py --encoder-weights FILE starts a training from them" if inner else ""
    return f"but holds {held}{way}"


def map_keys(saved: Mapping[Any, Any]) -> list[str]:
    """The entries of a file as short texts."""
    return [str(key)[:40] for key in saved] or ["nothing"]


def describe_reading(error: BaseException) -> str:
    """What a file is that PyTorch's reader of plain types gave up on, and what to do; empty when unknown."""
    if "persistent_load of storage" in str(error):
        return (
            "is in PyTorch's format of before 1.6 and holds a pickled module, which would run code. Save it again "
            "where it was made: torch.save(torch.load(FILE), FILE) with PyTorch 1.6 or newer, or without its loss"
        )
    if "TorchScript" in str(error):
        return (
            "is not a checkpoint written by train.py but a TorchScript program. Use the checkpoint that it was made "
            "from, or an ONNX file"
        )
    return ""


def describe_code(name: str) -> str:
    """What a file is that asks for the class or function `name`, beside that it is refused; empty when unknown."""
    if name.startswith(("ultralytics.", "models.yolo", "models.common")):
        return " It is a detector of YOLO: annotate.py --detector takes such files."
    if name.startswith(("pytorch_lightning.", "lightning.", "omegaconf.")):
        return " It is a checkpoint of another framework: save its network's state_dict alone."
    if name.startswith(("torch.nn.", "torchvision.", "segmentation_models_pytorch.", "timm.")):
        return (
            " It is a network that was pickled whole: save its state_dict() where its code is at home, which "
            "train.py --encoder-weights FILE takes."
        )
    return ""
