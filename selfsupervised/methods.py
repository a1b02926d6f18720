"""Methods by name."""

import math

from torch import nn

from model import image_channels
from selfsupervised.barlow_twins import BarlowTwins
from selfsupervised.dense import DenseBarlowTwins
from selfsupervised.encoders import feature_channels
from selfsupervised.interface import METHODS, Method, MethodOptions
from selfsupervised.mae import MaskedAutoencoder
from selfsupervised.moco import MomentumContrast, choose_queue
from selfsupervised.moco_v3 import MomentumContrastV3

# Widths of projectors, for encoders of the size of resnet18; moco's hidden layer is as wide as the features.
DEFAULT_PROJECTORS = {"barlow": (1024, 1024, 1024), "dense": (1024, 1024, 1024), "mocov3": (1024, 256)}
MOCO_WIDTH = 128
LOUD, FEW = 0.5, 64  # from where hints speak of chance correlations, and up to which batch of few images


def build_method(name: str, encoder: nn.Module, options: MethodOptions) -> Method:
    """A method around an encoder, which it trains in place.

    Raises:
        ValueError: an unknown name, or options that the method cannot work with; the message says what to do.
    """
    if name not in METHODS:
        raise ValueError(f"--method {name!r} is unknown; expected one of {', '.join(METHODS)}")
    _check(name, options)
    if name == "mae":
        return MaskedAutoencoder(encoder, image_channels(encoder), options)
    channels = feature_channels(encoder, image_channels(encoder))
    features = channels[-1]
    projector = options.projector or DEFAULT_PROJECTORS.get(name, (features, MOCO_WIDTH))
    if name == "barlow":
        return BarlowTwins(encoder, features, projector, options.lambda_)
    if name == "dense":
        return DenseBarlowTwins(encoder, channels, projector, options)
    if name == "moco":
        return MomentumContrast(encoder, features, projector, options)
    return MomentumContrastV3(encoder, features, projector, options)


def hints(name: str, options: MethodOptions, windows: int) -> list[str]:
    """Sentences about settings that a method can work with, but badly.

    Args:
        windows: images of one epoch, crops counted.
    """
    found, units = [], (options.projector or DEFAULT_PROJECTORS.get(name, (0,)))[-1]
    by_chance = options.lambda_ * (units - 1) / options.batch  # of the loss, to 1 for the diagonal: C_ij^2 is 1 / N
    if name in ("barlow", "dense") and by_chance > LOUD:
        found.append(
            f"{units} units at -b {options.batch}: correlations by chance are {by_chance:.2g} times the diagonal in "
            f"the loss. A larger -b, or a --projector that ends with {_quiet_units(options)} or less, learns more"
        )
    if name == "moco" and options.queue > choose_queue(windows, options.batch):
        found.append(
            f"--queue {options.queue} holds keys of most of the {windows} windows of an epoch, so an image is compared "
            f"with its own older keys. --queue {choose_queue(windows, options.batch)} avoids it"
        )
    if name == "mocov3" and options.batch < FEW:
        found.append(
            f"-b {options.batch}: an image is told from {options.batch - 1} others only. A larger -b, or --method "
            "moco, whose queue does not depend on the batch, learns more"
        )
    return found


def _quiet_units(options: MethodOptions) -> int:
    """The largest power of two of units whose chance correlations are not loud, 16 at least."""
    most = LOUD * options.batch / max(options.lambda_, 1e-9)
    return int(2 ** max(4, math.floor(math.log2(most))))


def _check(name: str, options: MethodOptions) -> None:
    """Raise ValueError for options out of range."""
    if options.batch < 2 and name != "moco":
        raise ValueError(
            f"-b {options.batch}: --method {name} compares the images of a batch with each other and needs two at "
            "least. Give -b 16 or more"
        )
    rules = {
        "--projector": (all(width > 0 for width in options.projector), "widths above 0, such as 1024-1024-1024"),
        "--lambda": (options.lambda_ >= 0, "0 or more"),
        "--temperature": (options.temperature > 0, "more than 0, such as 0.2"),
        "--momentum-encoder": (0 <= options.momentum < 1, "a share from 0 to below 1, such as 0.99"),
        "--queue": (options.queue > 0, "at least 1 key, several batches of them for good"),
        "--dense-points": (options.points > 0 and bool(options.local_projector), "at least 1 place"),
        "--dense-global": (0 <= options.global_weight <= 1, "a share from 0 to 1"),
        "--mask-share": (0 < options.mask_share < 1, "a share between 0 and 1, such as 0.75"),
    }
    values = {
        "--projector": options.projector,
        "--lambda": options.lambda_,
        "--temperature": options.temperature,
        "--momentum-encoder": options.momentum,
        "--queue": options.queue,
        "--dense-points": options.points,
        "--dense-global": options.global_weight,
        "--mask-share": options.mask_share,
    }
    for flag, (good, expected) in rules.items():
        if not good:
            raise ValueError(f"{flag} {values[flag]} cannot be used; expected {expected}. Change it or leave it out")
