"""Pretrained weights: published ones or a file into an encoder, another network's into a whole network.

Tensors are matched by name, or by order where a file has other names and the same shapes in the same order.
"""

import contextlib
import importlib.util
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model import PLAIN_UNET, build_smp, image_channels, image_convs, published_weights, shorten_error

HEAD = "segmentation_head."
WRAPPERS = ("encoder_state_dict", "model_state_dict", "state_dict", "model", "net")


class Matched(NamedTuple):
    """Which tensors of a file go where."""

    pairs: dict[str, str]  # name in the network -> name in the file
    refused: list[str]  # names in the network whose tensor has another shape in the file
    by_order: bool


def load_encoder_weights(model: nn.Module, source: str, *, in_channels: int) -> str:
    """Put pretrained weights into the encoder.

    Args:
        model: as build_model returns it.
        source: "imagenet" (or another name that smp lists for this encoder): downloaded, or taken from the local
            cache; else a .pth, .pt or .safetensors file: an encoder file, a checkpoint, or a plain state dict, with
            the encoder's own names or with other names and the same tensors in the same order.
        in_channels: channels that the network takes; a first convolution for another number is adapted.

    Returns:
        One line that says what matched.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the weights cannot be had, the file holds none, or nothing in it fits.
    """
    encoder = model.encoder
    if not isinstance(encoder, nn.Module) or image_channels(encoder) != in_channels:
        raise ValueError(f"the network's encoder does not take in_channels={in_channels}: build it with that number")
    if source == "imagenet" or source in published_weights(str(getattr(model, "encoder_name", ""))):
        return _load_published(model, source, in_channels=in_channels)
    path = Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"--encoder-weights {source}: no such file{' but a folder' if path.is_dir() else ''}. Expected imagenet, "
            "none or a .pth, .pt or .safetensors file"
        )
    payload = _read_weights(path)
    stored = _encoder_part(_unwrap(payload, str(path)))
    target = _state(encoder)
    matched = _match(target, stored, {key.removeprefix("encoder.") for key in image_convs(model)})
    described = _described(payload)
    made_for, name = described.get("encoder"), getattr(model, "encoder_name", None)
    missing = [key for key in _counted(target) if key not in matched.pairs]
    if isinstance(made_for, str) and name and made_for.removeprefix("tu-") != name.removeprefix("tu-") and missing:
        raise ValueError(
            f"{path} holds weights of encoder {made_for}, the network has {name}: pass --encoder {made_for}"
        )
    if not matched.pairs:
        raise ValueError(
            f"{path}: none of its {len(stored)} tensors fits the encoder {name}. The file has {_some(stored)}; the "
            f"encoder has {_some(target)}. Pass the --encoder that the file was made for"
        )
    notes = _copy_tensors(target, stored, matched)
    return _report(f"encoder weights {path}", target, stored, matched, notes)


def encoder_file_differences(source: str, images: Any, scale: Any) -> list[str]:
    """How the images that an encoder of pretrain.py was made from differ from those that are learned from now.

    Args:
        source: as of load_encoder_weights, the last_checkpoint of a pretraining too; published weights and other files
            have no differences that are known.
        images: what has their channels, dtype and preprocess: ModelConfig, or Description of the next pretraining.
        scale: what has the reduction and mpp of slides: Geometry, or Description.

    Returns:
        Warnings to print.
    """
    path = Path(source).expanduser()
    payload = _read_weights(path) if path.is_file() else {}
    described = _described(payload)
    if not ("encoder_state_dict" in payload or "pretraining" in payload) or "method" not in described:
        return []
    pairs = {
        what: (_listed(described.get(key, "")), _listed(getattr(images, key)))
        for key, what in (("channels", "channels"), ("dtype", "pixel type"), ("preprocess", "preprocessing"))
    }
    before = _scale(described.get("reduction", 1.0), described.get("mpp", 0.0))
    pairs["the scale"] = before, _scale(scale.reduction, scale.mpp)
    return [
        f"{path} was pretrained on images with {what} {old}, these have {new}: its weights may help less"
        for what, (old, new) in pairs.items()
        if old != new
    ]


def _described(payload: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a file says of its network: in an entry of its own, as checkpoints and states of runs, or beside it."""
    return next((payload[key] for key in ("config", "pretraining") if isinstance(payload.get(key), Mapping)), payload)


def _listed(value: str | Sequence[str]) -> str:
    return (value if isinstance(value, str) else ", ".join(value)) or "none"


def _scale(reduction: float, mpp: float) -> str:
    """How the flags of slides say a scale."""
    return f"--mpp {mpp:g}" if mpp else f"--reduce {reduction:g}"


def init_from(model: nn.Module, state_dict: Mapping[str, Any]) -> str:
    """Start a whole network from another one's weights; the head stays random where its shape differs.

    Args:
        model: as build_model returns it.
        state_dict: of the other network, with or without `module.`; a checkpoint that holds one is taken too.

    Returns:
        One line that says what matched.

    Raises:
        ValueError: nothing matched.
    """
    stored = _strip_common(_unwrap(state_dict, "the checkpoint"))
    target = _state(model)
    matched = _match(target, stored, image_convs(model), ordered=False)
    heads = [key for key in matched.refused if key.startswith(HEAD)]
    for key in [key for key in matched.pairs if heads and key.startswith(HEAD)]:
        del matched.pairs[key]  # a head is taken whole or not at all
    if all(key.startswith(HEAD) for key in matched.pairs):
        raise ValueError(
            f"--init-from: none of the {len(stored)} tensors fits the network. The checkpoint has {_some(stored)}; the "
            f"network has {_some(target)}. Pass the -m and --encoder that the checkpoint was made with"
        )
    notes = _copy_tensors(target, stored, matched)
    if heads:
        old, new = (tuple(tensors[key].shape) for tensors, key in ((stored, heads[0]), (target, heads[0])))
        notes.append(f"head skipped, it is new: {heads[0]} is {old} there and {new} here")
    return _report("network weights", target, stored, matched, notes)


def init_decoder(model: Any, how: str) -> None:
    """Random weights of the decoder's convolutions and linear layers anew; call it before weights are loaded.

    Biases become 0; normalisation and the head stay as they are.

    Args:
        model: as build_model returns it.
        how: "kaiming" (normal, for layers with a ReLU behind them) or "xavier" (uniform).

    Reference: He et al. 2015, https://arxiv.org/abs/1502.01852; Glorot and Bengio 2010.
    """
    for layer in model.decoder.modules():
        if not isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            continue
        if how == "kaiming":
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        else:
            nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def _load_published(model: nn.Module, source: str, *, in_channels: int) -> str:
    """Weights through smp's and timm's own loading, which also adapts the first convolution."""
    architecture, encoder = str(getattr(model, "architecture", PLAIN_UNET)), str(getattr(model, "encoder_name", ""))
    ways = "Pass --encoder-weights none, or --encoder-weights FILE"
    if architecture == PLAIN_UNET:
        raise ValueError(f"there are no {source} weights of {encoder or 'this encoder'}. {ways}")
    published = published_weights(encoder)
    if source not in published:
        others = f", only {', '.join(published)} (--encoder-weights {published[0]})" if published else ""
        raise ValueError(f"smp and timm publish no {source} weights of encoder {encoder}{others}. {ways}")
    errors: tuple[type[Exception], ...] = (*_network_errors(), RuntimeError)
    try:
        donor = build_smp(architecture, encoder, source, in_channels=in_channels, classes=1)
    except errors as error:
        raise ValueError(
            f"the {source} weights of {encoder} could not be loaded: {shorten_error(error)}. {ways}, or fill the cache "
            "of Hugging Face (HF_HOME) on a machine with network and set HF_HUB_OFFLINE=1 here"
        ) from error
    target, stored = _state(model.encoder), _state(donor.encoder)
    matched = _match(target, stored, set())
    notes = _copy_tensors(target, stored, matched)
    if in_channels != 3:
        notes.append(f"first convolution adapted from 3 to {in_channels} channels")
    return _report(f"encoder weights {source} of {encoder}", target, stored, matched, notes)


def _network_errors() -> tuple[type[Exception], ...]:
    """OSError covers huggingface_hub and requests; its newer versions let errors of httpx through."""
    if importlib.util.find_spec("httpx") is None:
        return (OSError,)
    import httpx

    return (OSError, httpx.HTTPError)


def _read_weights(path: Path) -> dict[str, Any]:
    """The file's dict of plain types and tensors; nothing in it is executed."""
    try:
        if path.suffix.lower() == ".safetensors":
            from safetensors import SafetensorError
            from safetensors.torch import load_file

            with _renamed(SafetensorError):
                return load_file(path, device="cpu")
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError) as error:
        raise ValueError(
            f"{path} cannot be read as weights: {_unpickling_reason(error)}. Expected tensors and plain types saved by "
            "torch.save (nothing else is unpickled), or .safetensors"
        ) from error
    if not isinstance(payload, dict):
        raise ValueError(f"{path} holds a {type(payload).__name__}, expected a dict of tensors (a state dict)")
    return payload


def _unpickling_reason(error: Exception) -> str:
    """Torch's own text tells to switch the safety off; ours names what it met."""
    if not isinstance(error, pickle.UnpicklingError):
        return shorten_error(error)
    found = re.search(r"GLOBAL (\S+)", str(error))
    return f"it holds a pickled {found[1]}, which is not loaded" if found else "it is not a file of torch.save"


def _state(module: Any) -> dict[str, Tensor]:
    """The module's own tensors by name, not copies."""
    return dict(module.state_dict())


@contextlib.contextmanager
def _renamed(foreign: type[Exception]) -> Iterator[None]:
    """Errors of a library that derive from Exception alone, as ValueError."""
    try:
        yield
    except foreign as error:
        raise ValueError(str(error)) from error


def _unwrap(payload: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """The tensors of a state dict, also when it lies inside a checkpoint."""
    inner = next((payload[key] for key in WRAPPERS if isinstance(payload.get(key), Mapping)), payload)
    tensors = {key: value for key, value in inner.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(
            f"{where} holds no tensors. Its entries: {_some(payload)}; expected {', '.join(WRAPPERS[:3])}, or tensors"
        )
    return tensors


def _strip_common(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes of DataParallel, torch.compile and Lightning, where all names have them."""
    while prefix := next((p for p in ("module.", "_orig_mod.", "model.") if all(k.startswith(p) for k in state)), ""):
        state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return state


def _encoder_part(state: dict[str, Tensor]) -> dict[str, Tensor]:
    state = _strip_common(state)
    part = {key.removeprefix("encoder."): tensor for key, tensor in state.items() if key.startswith("encoder.")}
    return _strip_common(part) if part else state


def _canonical(key: str) -> str:
    """A name without smp's wrapper level `model` and with timm's two spellings of a stage made equal."""
    return ".".join(part for part in re.split(r"[._]", key) if part not in ("", "model"))


def _match(
    target: dict[str, Tensor], stored: dict[str, Tensor], image_convs: set[str], *, ordered: bool = True
) -> Matched:
    """By name, or by order where that fits the whole target and more of it."""
    by_canonical = {_canonical(key): key for key in stored}
    named = {key: key if key in stored else by_canonical.get(_canonical(key)) for key in target}
    found = {key: name for key, name in named.items() if name is not None}
    pairs = {key: name for key, name in found.items() if _fits(target[key], stored[name], key in image_convs)}
    in_order = _pair_by_order(target, stored, image_convs) if ordered else {}
    if len(in_order) > len(_counted(pairs)):
        return Matched(in_order, [], True)
    if not _counted(pairs):
        pairs = {}
    return Matched(pairs, [key for key in found if key not in pairs], False)


def _pair_by_order(target: dict[str, Tensor], stored: dict[str, Tensor], image_convs: set[str]) -> dict[str, str]:
    """All tensors of the target in turn, if the stored ones begin with the same shapes and roles; else none."""
    ours, theirs = _counted(target), _counted(stored)
    if len(theirs) < len(ours):
        return {}
    pairs = dict(zip(ours, theirs, strict=False))
    roles = {"weight", "bias", "running_mean", "running_var"}
    for key, name in pairs.items():
        role, other = key.rsplit(".", 1)[-1], name.rsplit(".", 1)[-1]
        if (role != other and other in roles) or not _fits(target[key], stored[name], key in image_convs):
            return {}
    return pairs


def _fits(ours: Tensor, theirs: Tensor, sees_image: bool) -> bool:
    if sees_image and ours.ndim == theirs.ndim == 4:
        return ours.shape[0] == theirs.shape[0] and ours.shape[2:] == theirs.shape[2:]
    return ours.shape == theirs.shape


def _counted(names: Mapping[str, Any]) -> list[str]:
    """Names that count in a report: batch normalisation's step counters do not."""
    return [name for name in names if not name.endswith("num_batches_tracked")]


@torch.no_grad()
def _copy_tensors(target: dict[str, Tensor], stored: dict[str, Tensor], matched: Matched) -> list[str]:
    """Copy in place; returns remarks. A first convolution for other channels is repeated over them and rescaled."""
    notes = []
    for key, name in matched.pairs.items():
        ours, theirs = target[key], stored[name]
        if ours.shape != theirs.shape:
            here, there = ours.shape[1], theirs.shape[1]
            notes.append(f"first convolution adapted from {there} to {here} channels")
            theirs = theirs.float()
            if here == 1:
                theirs = theirs.sum(dim=1, keepdim=True)
            else:
                theirs = theirs[:, [channel % there for channel in range(here)]] * (there / here)
        ours.copy_(theirs)
    return list(dict.fromkeys(notes))


def _report(
    title: str, target: dict[str, Tensor], stored: dict[str, Tensor], matched: Matched, notes: Sequence[str]
) -> str:
    """One line: counts, then remarks."""
    wanted, used = _counted(target), set(matched.pairs.values())
    missing = [key for key in wanted if key not in matched.pairs]
    unexpected = [key for key in _counted(stored) if key not in used]
    parts = [
        f"{title}: {len(wanted) - len(missing)} of {len(wanted)} tensors matched"
        + (" by their order (other names, same shapes)" if matched.by_order else ""),
        f"{len(missing)} missing{f' (first {missing[0]})' if missing else ''}",
        f"{len(unexpected)} unexpected{f' (first {unexpected[0]})' if unexpected else ''}",
    ]
    remarks = list(notes)
    refused = [key for key in matched.refused if not key.startswith(HEAD)]
    if refused:
        remarks.append(f"{len(refused)} have another shape there and stay new (first {refused[0]})")
    if 2 * len(missing) > len(wanted):
        remarks.append("less than half matched: are these weights of another network?")
    return "; ".join([", ".join(parts), *remarks])


def _some(names: Mapping[str, Any]) -> str:
    return ", ".join([str(name) for name in list(names)[:3]]) + (", ..." if len(names) > 3 else "")
