"""Names and weights of networks: architecture + encoder -> nn.Module that returns logits.

Architectures are those of segmentation_models_pytorch (smp) by their own names, and `plain-unet`. Encoders are
smp's and timm's. smp is imported inside the functions that need it: commands which only read names start quickly.
"""

import contextlib
import difflib
import importlib.util
import inspect
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from networks.plain_unet import PLAIN_WIDTHS, PlainUnet

SMP_CLASSES = {
    "unet": "Unet",
    "unetplusplus": "UnetPlusPlus",
    "manet": "MAnet",
    "linknet": "Linknet",
    "fpn": "FPN",
    "pspnet": "PSPNet",
    "deeplabv3": "DeepLabV3",
    "deeplabv3+": "DeepLabV3Plus",
    "pan": "PAN",
    "upernet": "UPerNet",
    "segformer": "Segformer",
    "dpt": "DPT",
}
PLAIN_UNET = "plain-unet"
ARCHITECTURES = (*SMP_CLASSES, PLAIN_UNET)
ALIASES = {"deeplabv3plus": "deeplabv3+", "unet++": "unetplusplus", "plain_unet": PLAIN_UNET, "plainunet": PLAIN_UNET}
DILATED = ("deeplabv3", "deeplabv3+", "pan")  # they ask the encoder for stride 8 or 16
WITHOUT_MIT = ("unetplusplus", "linknet")
LARGEST_PROBE = 512  # pixels: stride_and_min_side looks no further
SIZE_OPTIONS: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False})  # timm's names
BUILD_ERRORS = (ValueError, TypeError, RuntimeError, AssertionError, LookupError, AttributeError, NotImplementedError)
HEAD = "segmentation_head."
WRAPPERS = ("encoder_state_dict", "model_state_dict", "state_dict", "model", "net")


# ------------------------------------------------------------------ names


def resolve_architecture(name: str) -> str:
    """Our spelling of an architecture: any case, smp's class names, `deeplabv3plus` and `unet++` are understood."""
    known = name.strip().lower()
    known = ALIASES.get(known, known)
    if known not in ARCHITECTURES:
        raise ValueError(
            f"unknown architecture {name!r}{_suggest(known, ARCHITECTURES)}. Known: {_join(ARCHITECTURES)}"
        )
    return known


def resolve_encoder(name: str, architecture: str = "unet") -> str:
    """The name an encoder is stored under: smp's own, `tu-` and timm's, or `plain-N` for plain-unet.

    Raises:
        ValueError: nobody knows the name, or it belongs to another architecture.
    """
    architecture, known = resolve_architecture(architecture), name.strip()
    if (architecture == PLAIN_UNET) != (known in PLAIN_WIDTHS):
        if architecture == PLAIN_UNET:
            raise ValueError(f"{PLAIN_UNET} has no encoder {name!r}, its encoders are {_join(PLAIN_WIDTHS)}")
        raise ValueError(f"encoder {name!r} belongs to {PLAIN_UNET}, not to {architecture}: pass -m {PLAIN_UNET}")
    if architecture == PLAIN_UNET:
        return known
    import segmentation_models_pytorch as smp
    import timm

    if known in smp.encoders.encoders:
        return known
    if smp.encoders.is_equivalent_to_timm_universal(known):  # smp's former names of timm encoders
        known = known.replace("timm-mobilenetv3", "timm-tf_mobilenetv3").replace("timm-", "tu-", 1)
    bare = known.removeprefix("tu-")
    if timm.is_model(bare.split(".")[0]):  # a pretrained tag may follow the dot
        return f"tu-{bare}"
    names = [*smp.encoders.get_encoder_names(), *(f"tu-{model}" for model in timm.list_models())]
    close = _suggest(known, [*names, *timm.list_models()])
    raise ValueError(
        f"unknown encoder {name!r}{close}. Known: smp's ({_join(smp.encoders.get_encoder_names()[:6])}, ...) and every "
        "timm model as tu-NAME (python -c \"import timm; print(timm.list_models('*resnet*'))\" lists them)"
    )


def _suggest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name.lower(), names, n=4, cutoff=0.6)
    return f" (did you mean {' or '.join(dict.fromkeys(close))}?)" if close else ""


def _join(names: Iterator[str] | Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(names)


# ------------------------------------------------------------------ networks


def build_model(architecture: str, encoder: str, *, in_channels: int, num_logits: int) -> nn.Module:
    """A network with random weights; nothing is downloaded.

    Args:
        architecture: one of ARCHITECTURES, in any spelling that resolve_architecture takes.
        encoder: smp's name, timm's name with or without `tu-`, or `plain-N` for plain-unet.
        in_channels: channels of the image, at least 1.
        num_logits: K of the logits (N, K, H, W): 1 for one object class (sigmoid), else one per class.

    Returns:
        (N, C, H, W) -> logits (N, K, H, W), with parts `encoder`, `decoder`, `segmentation_head` and the attributes
        `architecture` and `encoder_name`.

    Raises:
        ValueError: unknown name, or a pair that smp cannot build; the message names a way on.
    """
    if in_channels < 1 or num_logits < 1:
        raise ValueError(f"in_channels {in_channels} and num_logits {num_logits} must be at least 1")
    architecture = resolve_architecture(architecture)
    encoder = resolve_encoder(encoder, architecture)
    if architecture == PLAIN_UNET:
        width = PLAIN_WIDTHS[encoder]
        model: nn.Module = PlainUnet(in_channels=in_channels, num_logits=num_logits, width=width)
    else:
        try:
            model = _build_smp(architecture, encoder, None, in_channels=in_channels, classes=num_logits)
        except BUILD_ERRORS as error:
            raise ValueError(_explain_build_error(architecture, encoder, error)) from error
    model.architecture, model.encoder_name = architecture, encoder  # type: ignore[assignment]
    return model


def count_parameters(model: nn.Module) -> int:
    """Number of trained and frozen weights, buffers left out."""
    return sum(weight.numel() for weight in model.parameters())


def to_probabilities(logits: Tensor, activation: str = "auto") -> Tensor:
    """Probabilities in float32.

    Args:
        logits: (N, K, H, W), any float type.
        activation: "auto" is sigmoid for K = 1, else softmax over K. "sigmoid" makes the channels independent, as
            the predecessor's networks of several classes need it.
    """
    if activation == "auto":
        activation = "sigmoid" if logits.shape[1] == 1 else "softmax"
    if activation == "sigmoid":
        return logits.float().sigmoid()
    if activation == "softmax" and logits.shape[1] > 1:
        return logits.float().softmax(dim=1)
    raise ValueError(
        f"activation {activation!r} for {logits.shape[1]} logits: expected auto, sigmoid or (K > 1) softmax"
    )


def _build_smp(architecture: str, encoder: str, weights: str | None, *, in_channels: int, classes: int) -> nn.Module:
    """The network of smp; timm encoders are told to take any image size where they can."""
    import segmentation_models_pytorch as smp

    build = getattr(smp, SMP_CLASSES[architecture])
    for options in _size_options(encoder):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecated names, readout of encoders without a class token
                return build(encoder, encoder_weights=weights, in_channels=in_channels, classes=classes, **options)
        except TypeError as error:
            if not any(option in str(error) for option in options):
                raise
    raise AssertionError("the last options are empty")


def _size_options(encoder: str) -> list[dict[str, Any]]:
    """Keyword arguments to try, last none: those that some class beside the timm model's definition knows."""
    if not encoder.startswith("tu-"):
        return [{}]
    import timm

    module = sys.modules[timm.model_entrypoint(encoder.removeprefix("tu-").split(".")[0]).__module__]
    classes = [item for item in vars(module).values() if inspect.isclass(item) and issubclass(item, nn.Module)]
    known = {name for item in classes for name in inspect.signature(item.__init__).parameters}
    return [*(options for options in SIZE_OPTIONS if known >= options.keys()), {}]


def _explain_build_error(architecture: str, encoder: str, error: Exception) -> str:
    """What smp refused and what to pass instead."""
    if architecture == "dpt":
        way = "dpt needs a timm vision transformer: --encoder tu-vit_tiny_patch16_224, or -m unet"
    elif encoder.startswith("mit_b") and architecture in WITHOUT_MIT:
        way = "MiT encoders have no features at half size: take -m unet, fpn or segformer, or --encoder resnet34"
    elif "downsampling pattern" in str(error):
        way = "its scales are not 2, 4, ... 32: -m dpt takes vision transformers (ViT); or pass --encoder resnet34"
    elif architecture in DILATED:
        way = "the architecture needs an encoder that can be dilated: --encoder resnet34 or efficientnet-b0, or -m unet"
    else:
        way = "pass another encoder (--encoder resnet34) or architecture (-m unet)"
    pair = f"architecture {architecture} cannot be built with encoder {encoder}"
    return f"{pair}: {_short(error)}. {way[0].upper()}{way[1:]}"


# ------------------------------------------------------------------ sizes


def stride_and_min_side(architecture: str, encoder: str, model: nn.Module) -> tuple[int, int]:
    """Image sides that the network takes: multiples of the stride, from the minimum side on. Found by trying.

    Args:
        architecture: for the message only, as is encoder.
        model: any device; its weights, statistics and mode stay as they are.

    Returns:
        (stride, minimum side) in pixels; the minimum is a multiple of the stride. Equal to plain-unet's coarsest
        stage there, though it takes any size. For a network of one fixed size both are that size, with a warning.

    Raises:
        ValueError: the network fails at every side that was tried.
    """
    nominal = int(getattr(model.encoder, "output_stride", 32) or 32)
    if resolve_architecture(architecture) == PLAIN_UNET:
        return nominal, nominal
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for stride in (nominal * factor for factor in (1, 2, 4, 7, 8, 14, 16)):
            for side in range(stride, min(8 * stride, LARGEST_PROBE) + 1, stride):
                pairs = ((side, side + stride), (side + 3 * stride, side + 2 * stride), (side, side))
                if all(_keeps_size(model, *pair) for pair in pairs):
                    return stride, side
        for side in (224, 256, 384, 448, 336, 240, 512):
            if _keeps_size(model, side, side):
                warnings.warn(f"{architecture} with {encoder} takes {side}x{side} images only", stacklevel=2)
                return side, side
    finally:
        for module, training in modes:
            module.training = training
    raise ValueError(
        f"{architecture} with encoder {encoder} fails on images of every side up to {LARGEST_PROBE}: "
        "pass another encoder (--encoder resnet34) or architecture (-m unet)"
    )


@torch.no_grad()
def _keeps_size(model: nn.Module, height: int, width: int) -> bool:
    """Whether one black image gives logits of its own size."""
    weight = next(model.parameters())
    image = weight.new_zeros(1, _image_channels(model.encoder), height, width)
    try:
        return tuple(model(image).shape[-2:]) == (height, width)
    except BUILD_ERRORS:
        return False


def _image_channels(encoder: Any) -> int:
    """Input channels of the first convolution, which sees the image."""
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    raise ValueError(f"{type(encoder).__name__} has no 2-D convolution that could see an image")


def _image_convs(model: Any) -> set[str]:
    """Names of the weights that may see the image: the encoder's convolutions of its input channels."""
    channels, encoder = _image_channels(model.encoder), set(model.encoder.modules())
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module in encoder and module.in_channels == channels
    }


# ------------------------------------------------------------------ weights


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
    if not isinstance(encoder, nn.Module) or _image_channels(encoder) != in_channels:
        raise ValueError(f"the network's encoder does not take in_channels={in_channels}: build it with that number")
    if source == "imagenet" or source in _published(str(getattr(model, "encoder_name", ""))):
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
    matched = _match(target, stored, {key.removeprefix("encoder.") for key in _image_convs(model)})
    described = payload["config"] if isinstance(payload.get("config"), Mapping) else payload
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
    matched = _match(target, stored, _image_convs(model), ordered=False)
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


def _load_published(model: nn.Module, source: str, *, in_channels: int) -> str:
    """Weights through smp's and timm's own loading, which also adapts the first convolution."""
    architecture, encoder = str(getattr(model, "architecture", PLAIN_UNET)), str(getattr(model, "encoder_name", ""))
    ways = "Pass --encoder-weights none, or --encoder-weights FILE"
    if architecture == PLAIN_UNET:
        raise ValueError(f"there are no {source} weights of {encoder or 'this encoder'}. {ways}")
    published = _published(encoder)
    if source not in published:
        others = f", only {_join(published)} (--encoder-weights {published[0]})" if published else ""
        raise ValueError(f"smp and timm publish no {source} weights of encoder {encoder}{others}. {ways}")
    errors: tuple[type[Exception], ...] = (*_network_errors(), RuntimeError)
    try:
        donor = _build_smp(architecture, encoder, source, in_channels=in_channels, classes=1)
    except errors as error:
        raise ValueError(
            f"the {source} weights of {encoder} could not be loaded: {_short(error)}. {ways}, or fill the cache of "
            "Hugging Face (HF_HOME) on a machine with network and set HF_HUB_OFFLINE=1 here"
        ) from error
    target, stored = _state(model.encoder), _state(donor.encoder)
    matched = _match(target, stored, set())
    notes = _copy_tensors(target, stored, matched)
    if in_channels != 3:
        notes.append(f"first convolution adapted from 3 to {in_channels} channels")
    return _report(f"encoder weights {source} of {encoder}", target, stored, matched, notes)


def _published(encoder: str) -> list[str]:
    """Names of the weights that smp or timm publish; timm's are called imagenet here whatever they were trained on."""
    import segmentation_models_pytorch as smp
    import timm

    if encoder.startswith("tu-"):
        return ["imagenet"] if timm.models.is_model_pretrained(encoder.removeprefix("tu-")) else []
    return list(smp.encoders.encoders.get(encoder, {}).get("pretrained_settings", {}))


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
        return _short(error)
    found = re.search(r"GLOBAL (\S+)", str(error))
    return f"it holds a pickled {found[1]}, which is not loaded" if found else "it is not a file of torch.save"


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(". ") or type(error).__name__


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
            f"{where} holds no tensors. Its entries: {_some(payload)}; expected {_join(WRAPPERS[:3])}, or tensors"
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
    return _join([str(name) for name in list(names)[:3]]) + (", ..." if len(names) > 3 else "")


# ------------------------------------------------------------------ small batches


def tolerate_single_values(model: nn.Module) -> None:
    """Let normalisation layers that see one value per channel in training use running statistics for that step.

    One value has no spread: torch raises an error (batch normalisation of a 1x1 map in a batch of one, instance
    normalisation of a 1x1 map). With this, such a step normalises by the running statistics, leaves them as they are,
    and a warning is given once per network. Layers without running statistics take mean 0 and variance 1. Every other
    step is untouched, and so are the state dict, copies and pickles. Calling it twice changes nothing.
    """
    guard = SingleValueGuard()
    for layer in model.modules():
        if isinstance(layer, _BatchNorm | _InstanceNorm) and not _is_guarded(layer):
            layer.register_forward_pre_hook(guard.before)
            layer.register_forward_hook(guard.after, always_call=True)


class SingleValueGuard:
    """The two hooks around a normalisation layer; one object for all layers of a network."""

    def __init__(self) -> None:
        self.warned = False

    def before(self, layer: Any, inputs: tuple[Tensor, ...]) -> None:
        """Switch the layer to running statistics if its input has one value per channel."""
        if not self.must_switch(layer, inputs[0]):
            return
        if not self.warned:
            warnings.warn(
                f"a {type(layer).__name__} layer saw one value per channel (input {tuple(inputs[0].shape)}): such "
                "layers use their running statistics for that step. A larger batch or image avoids it",
                stacklevel=2,
            )
            self.warned = True
        names = ("training", "track_running_stats", "running_mean", "running_var")
        layer.__dict__["_before_single_value"] = {name: getattr(layer, name) for name in names}
        layer.training, layer.track_running_stats = False, True
        if layer.running_mean is None:
            layer.running_mean = inputs[0].new_zeros(inputs[0].shape[1], dtype=torch.float32)
            layer.running_var = torch.ones_like(layer.running_mean)

    def after(self, layer: nn.Module, _inputs: Any, _output: Any) -> None:
        """Put the layer back, also after an error."""
        for name, value in layer.__dict__.pop("_before_single_value", {}).items():
            setattr(layer, name, value)

    @staticmethod
    def must_switch(layer: nn.Module, values: Tensor) -> bool:
        """Whether the layer would compute statistics of one value."""
        if not (layer.training or layer.running_mean is None):
            return False
        if isinstance(layer, _InstanceNorm):
            return values.ndim > 2 and values.shape[2:].numel() == 1
        many = isinstance(layer, nn.SyncBatchNorm) and torch.distributed.is_initialized()
        return values.ndim > 1 and values.numel() == values.shape[1] and not many


def _is_guarded(layer: nn.Module) -> bool:
    hooks: list[Callable[..., Any]] = list(layer._forward_pre_hooks.values())
    return any(isinstance(getattr(hook, "__self__", None), SingleValueGuard) for hook in hooks)
