"""Encoders that train.py takes, on their own: from an image to its features at several scales."""

import torch
from torch import Tensor, nn

from model import BUILD_ERRORS, PLAIN_UNET, build_model, shorten_error
from networks.plain_unet import PLAIN_WIDTHS

HOLDERS = ("unet", "fpn", "dpt")  # architectures that between them take every encoder of train.py
PROBE_SIDES = (64, 224)  # the second for vision transformers of one size


class EncoderError(ValueError):
    """An encoder that cannot be pretrained."""


def build_encoder(name: str, in_channels: int) -> nn.Module:
    """A randomly initialised encoder.

    Args:
        name: as for train.py: smp's name, timm's with or without `tu-`, `plain-N` of plain-unet.
        in_channels: channels of the images.

    Returns:
        The `encoder` of a network that train.py builds, with the same names of weights; see feature_maps.

    Raises:
        EncoderError: unknown, of no architecture, or without features that learn; the message says what to do.
    """
    holders = (PLAIN_UNET,) if name in PLAIN_WIDTHS else HOLDERS
    errors = []
    for architecture in holders:
        try:
            encoder = build_model(architecture, name, in_channels=in_channels, num_logits=1).encoder
        except ValueError as error:
            errors.append(str(error))
            continue
        assert isinstance(encoder, nn.Module)
        _refuse_without_learning(name, encoder, in_channels)
        return encoder
    if errors[0].startswith("unknown encoder"):
        raise EncoderError(errors[0])
    raise EncoderError(
        f"--encoder {name} cannot be pretrained: none of {', '.join(holders)} takes it ({errors[0]}). Expected an "
        "encoder that train.py can use afterwards: pass --encoder resnet18, or another one that it trains with"
    )


def feature_maps(encoder: nn.Module, images: Tensor) -> list[Tensor]:
    """Features of images (N, C, H, W) at all scales of an encoder, (N, C_i, h_i, w_i), finest first.

    The image itself, which smp's encoders return first, is left out, as are maps without channels that stand for a
    scale that an encoder does not have. The four maps of a vision transformer are of one scale.
    """
    answer = encoder(images)
    maps = answer[0] if isinstance(answer[0], list | tuple) else answer  # ViT: maps, then the class tokens
    return [values for values in maps if values is not images and values.shape[1] > 0]


def feature_channels(encoder: nn.Module, in_channels: int) -> list[int]:
    """Channels of what feature_maps returns; found by trying, weights, statistics and mode stay as they are."""
    return [values.shape[1] for values in _probe(encoder, in_channels)]


@torch.no_grad()
def _probe(encoder: nn.Module, in_channels: int) -> list[Tensor]:
    """Features of a black image at the first side that the encoder takes."""
    modes = [(module, module.training) for module in encoder.modules()]
    weight = next(encoder.parameters())
    encoder.eval()
    try:
        for side in PROBE_SIDES[:-1]:
            try:
                return feature_maps(encoder, weight.new_zeros(1, in_channels, side, side))
            except BUILD_ERRORS:
                continue
        return feature_maps(encoder, weight.new_zeros(1, in_channels, PROBE_SIDES[-1], PROBE_SIDES[-1]))
    finally:
        for module, training in modes:
            module.training = training


def _refuse_without_learning(name: str, encoder: nn.Module, in_channels: int) -> None:
    """Raise EncoderError for an encoder in which nothing learns or whose features cannot be computed."""
    way = "Expected an encoder with weights that learn and maps of features: pass --encoder resnet18, or another one"
    if not any(weight.requires_grad for weight in encoder.parameters()):
        raise EncoderError(f"--encoder {name} cannot be pretrained: it has no weights that learn. {way}")
    try:
        maps = _probe(encoder, in_channels)
    except BUILD_ERRORS as error:
        reason = shorten_error(error)
        raise EncoderError(f"--encoder {name} cannot be pretrained: it fails on an image ({reason}). {way}") from error
    if not maps or maps[-1].ndim != 4:
        raise EncoderError(f"--encoder {name} cannot be pretrained: it gives no maps of features. {way}")
