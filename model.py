"""Names and weights of networks: architecture + encoder -> nn.Module that returns logits.

Architectures are those of segmentation_models_pytorch (smp) by their own names, and `plain-unet`. Encoders are
smp's and timm's. smp is imported inside the functions that need it: commands which only read names start quickly.
"""

import difflib
import inspect
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from networks.plain_unet import GROUP_NORM, PLAIN_WIDTHS, PlainUnet

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
BUILD_ERRORS = (ValueError, TypeError, RuntimeError, AssertionError, LookupError, AttributeError)


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


def list_encoders() -> list[str]:
    """Names of all encoders: of plain-unet, smp's own, timm's with `tu-`."""
    import segmentation_models_pytorch as smp
    import timm

    return [*PLAIN_WIDTHS, *smp.encoders.get_encoder_names(), *(f"tu-{name}" for name in timm.list_models())]


def published_side(encoder: str) -> int:
    """Side of the images that an encoder was published for; 256 where it does not say."""
    import timm

    config = timm.get_pretrained_cfg(encoder.removeprefix("tu-")) if encoder.startswith("tu-") else None
    return int(config.input_size[-1]) if config and config.input_size else 256


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
        width, groups = PLAIN_WIDTHS[encoder], encoder.endswith(GROUP_NORM)
        model: nn.Module = PlainUnet(in_channels=in_channels, num_logits=num_logits, width=width, groups=groups)
    else:
        try:
            model = build_smp(architecture, encoder, None, in_channels=in_channels, classes=num_logits)
        except BUILD_ERRORS as error:
            raise ValueError(_explain_build_error(architecture, encoder, error)) from error
    model.architecture, model.encoder_name = architecture, encoder  # type: ignore[assignment]
    return model


def build_outline(architecture: str, encoder: str) -> nn.Module:
    """A network of three channels and one logit whose weights have no values and take no memory, to look at.

    Some encoders read values of tensors while they are built (SegFormer's), and are built in full.

    Raises:
        ValueError: see build_model.
    """
    try:
        with torch.device("meta"):
            return build_model(architecture, encoder, in_channels=3, num_logits=1)
    except ValueError:
        return build_model(architecture, encoder, in_channels=3, num_logits=1)


def count_parameters(model: nn.Module) -> int:
    """Number of trained and frozen weights, buffers left out."""
    return sum(weight.numel() for weight in model.parameters())


def to_probabilities(logits: Tensor, activation: str = "auto") -> Tensor:
    """Probabilities in float32.

    Args:
        logits: (N, K, H, W), any float type.
        activation: "auto" is sigmoid for K = 1, else softmax over K. "sigmoid" makes the channels independent, as
            the predecessor's networks of several classes need it; "none" is for values that are probabilities already.
    """
    if activation == "auto":
        activation = "sigmoid" if logits.shape[1] == 1 else "softmax"
    if activation == "none":
        return logits.float()
    if activation == "sigmoid":
        return logits.float().sigmoid()
    if activation == "softmax" and logits.shape[1] > 1:
        return logits.float().softmax(dim=1)
    raise ValueError(
        f"activation {activation!r} for {logits.shape[1]} logits: expected auto, sigmoid or (K > 1) softmax"
    )


def build_smp(architecture: str, encoder: str, weights: str | None, *, in_channels: int, classes: int) -> nn.Module:
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
    return f"{pair}: {shorten_error(error)}. {way[0].upper()}{way[1:]}"


def shorten_error(error: Exception) -> str:
    """An error's text on one line, at most 300 characters."""
    return " ".join(str(error).split())[:300].rstrip(". ") or type(error).__name__


def published_weights(encoder: str) -> list[str]:
    """Names of the weights that smp or timm publish; timm's are called imagenet here whatever they were trained on."""
    import segmentation_models_pytorch as smp
    import timm

    if encoder.startswith("tu-"):
        return ["imagenet"] if timm.models.is_model_pretrained(encoder.removeprefix("tu-")) else []
    return list(smp.encoders.encoders.get(encoder, {}).get("pretrained_settings", {}))


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
    image = weight.new_zeros(1, image_channels(model.encoder), height, width)
    try:
        return tuple(model(image).shape[-2:]) == (height, width)
    except BUILD_ERRORS:
        return False


def image_channels(encoder: Any) -> int:
    """Input channels of the first convolution, which sees the image."""
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    raise ValueError(f"{type(encoder).__name__} has no 2-D convolution that could see an image")


def image_convs(model: Any) -> set[str]:
    """Names of the weights that may see the image: the encoder's convolutions of its input channels."""
    channels, encoder = image_channels(model.encoder), set(model.encoder.modules())
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module in encoder and module.in_channels == channels
    }
