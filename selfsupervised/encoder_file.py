"""The encoder file of pretraining: what train.py --encoder-weights takes, with what it must know of the images."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoint import write_content

FORMAT = 1
BATCH = 32  # windows at a time

Normalisation = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Description:
    """What was pretrained, on what. Stored in the encoder file and in the state that a run goes on from.

    mean and std run in the order of the channels, in raw units. images: how many there were; digest: which.
    reduction, mpp: at which scale slides were read, see checkpoint.Geometry.
    sizes: what decides the shapes of the method's own weights, by the names of the flags.
    """

    method: str
    encoder: str
    channels: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    preprocess: tuple[str, ...]
    dtype: str
    image_size: int
    images: int
    digest: str
    reduction: float = 1.0
    mpp: float = 0.0
    sizes: dict[str, str] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """As lists, numbers and strings."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def describe_change(before: Mapping[str, Any], now: Description) -> str:
    """What keeps a run from going on: names what it is called, what it was and what it is; empty when nothing does.

    Args:
        before: Description.plain of the run.
    """
    new = now.plain()
    for key in ("method", "encoder", "channels", "image_size", "preprocess"):
        if before.get(key) != new[key]:
            return f"{key.replace('_', ' ')} {_shown(before.get(key))}, now it is {_shown(new[key])}"
    for flag, value in now.sizes.items():
        if before.get("sizes", {}).get(flag) != value:
            return f"{flag} {before.get('sizes', {}).get(flag)}, now it is {value}"
    if before.get("digest") != now.digest:
        return (
            f"{before.get('images')} images (digest {before.get('digest')}), now they are {now.images} "
            f"(digest {now.digest})"
        )
    return ""


def _shown(value: Any) -> str:
    return (", ".join(map(str, value)) or "none") if isinstance(value, (list, tuple)) else str(value)


def save_encoder(path: Path, state: Mapping[str, Tensor], description: Description, *, epochs: int) -> None:
    """Write an encoder file whole or not at all.

    Args:
        state: the encoder's own, with the names that model.build_model(...).encoder has.
        epochs: how many were trained.

    Raises:
        OSError: the folder is read-only or the disk full; the file that was there is whole.
    """
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    write_content(path, {"format": FORMAT, **description.plain(), "epochs": epochs, "encoder_state_dict": tensors})


@torch.no_grad()
def settle_statistics(encoder: nn.Module, windows: Tensor) -> None:
    """Compute the statistics of batch normalisation anew, and put the encoder into evaluation mode.

    Training leaves moving averages over augmented views and over weights that have moved on. These are the means over
    the windows as they are, for the weights as they are; so the encoder answers in evaluation mode as it did in
    training. Weights stay as they are, nothing random is drawn; other normalisations have no such statistics.

    Args:
        windows: (n, C, S, S), normalised, not augmented, on any device.
    """
    layers = [layer for layer in encoder.eval().modules() if isinstance(layer, Normalisation)]
    layers = [layer for layer in layers if layer.track_running_stats]
    kept = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # PyTorch's word for the mean over all batches
        layer.train()
    if layers:
        device = next(encoder.parameters()).device
        for batch in mixed_batches(windows):
            encoder(batch.to(device))
    for layer, momentum in zip(layers, kept, strict=True):
        layer.momentum = momentum
    encoder.eval()


def mixed_batches(windows: Tensor) -> list[Tensor]:
    """Batches of about BATCH windows, each from all over the set; a last one of a single window is never made."""
    count = max(1, len(windows) // BATCH)
    return [windows[start::count] for start in range(count)]
