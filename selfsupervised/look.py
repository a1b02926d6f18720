"""What is looked at every few epochs: the encoder file, the rank of its features, probes, pictures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from selfsupervised.encoder_file import Description, mixed_batches, save_encoder, settle_statistics
from selfsupervised.encoders import feature_maps
from selfsupervised.interface import Method
from selfsupervised.pictures import FeaturePictures
from selfsupervised.run_log import RunLog
from selfsupervised.watch import describe_features, effective_rank


@dataclass
class Look:
    """What the first process looks at every few epochs and after the last.

    encoder: another copy of the encoder that is trained, with plain layers; it gets its weights. windows: (n, C, S, S)
    normalised, not augmented: statistics and features are theirs. names: of the images that they are from. probes and
    pictures are given that encoder in evaluation mode.
    """

    encoder: nn.Module
    windows: Tensor
    names: Sequence[str]
    every: int = 10
    probes: Sequence[Callable[[nn.Module], dict[str, float | None]]] = ()
    pictures: FeaturePictures | None = None


def take_look(method: Method, look: Look, description: Description, run: RunLog, row: dict[str, Any]) -> None:
    """Write the encoder file, measure the encoder's features, probe it, draw what it sees; all of it on a copy."""
    _copy_encoder(method, look)
    save_encoder(run.encoder_path, look.encoder.state_dict(), description, epochs=row["epoch"])
    rank = feature_rank(look.encoder, look.windows)
    row["watch"]["feature_rank"], row["warning"] = rank, describe_features(rank, len(look.windows))
    generator = torch.get_rng_state()
    if look.probes:
        row["probe"] = _probe(look)
    if look.pictures:
        drawn = look.pictures(look.encoder, look.windows, look.names)
        run.log_images(drawn | look.pictures.completions(method, look.windows, look.names), row["epoch"])
    torch.set_rng_state(generator)


def probe_start(method: Method, look: Look) -> dict[str, float | None]:
    """Scores of the probes before anything was learned, which later ones are compared with."""
    generator = torch.get_rng_state()
    _copy_encoder(method, look)
    scores = _probe(look)
    torch.set_rng_state(generator)
    return scores


def _copy_encoder(method: Method, look: Look) -> None:
    look.encoder.load_state_dict(method.encoder.state_dict())
    settle_statistics(look.encoder, look.windows)


def _probe(look: Look) -> dict[str, float | None]:
    return {name: value for probe in look.probes for name, value in probe(look.encoder).items()}


@torch.no_grad()
def feature_rank(encoder: nn.Module, windows: Tensor) -> float:
    """Effective rank of the encoder's coarsest features, averaged over each window, without their mean."""
    device = next(encoder.parameters()).device
    pooled = [
        feature_maps(encoder, batch.to(device))[-1].mean(dim=(2, 3)).double().cpu() for batch in mixed_batches(windows)
    ]
    features = torch.cat(pooled)
    return effective_rank(features - features.mean(dim=0))
