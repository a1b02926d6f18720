"""Whether embeddings still tell images apart: their spread, their effective rank, and what to do when they collapse."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer import TrainingStopped

KEPT = 512  # embeddings of an epoch that are looked at
FEW = 16  # embeddings that are too few for a rank
SPREAD_LIMIT, RANK_LIMIT = 0.02, 1.5
PATIENCE = 3  # collapsed epochs in a row that end a run


class CollapseError(TrainingStopped):
    """All images have the same embedding, or embeddings on a line: nothing is learned any more."""


def measure(embeddings: Tensor) -> dict[str, float]:
    """What `is_collapsed` decides by, and what people watch.

    Args:
        embeddings: (N, D), as the projector returns them.

    Returns:
        `spread`: see spread. `rank`: see effective_rank, of the embeddings without their mean. `energy`: see
        off_diagonal_energy.
    """
    embeddings = embeddings.double()
    centred = embeddings - embeddings.mean(dim=0)
    return {
        "spread": spread(embeddings),
        "rank": effective_rank(centred),
        "energy": off_diagonal_energy(centred),
    }


def spread(embeddings: Tensor) -> float:
    """Standard deviation of normalised embeddings (N, D) over the samples, times sqrt(D).

    1 where they lie all around the sphere, 0 where all are the same.

    Reference: Chen and He 2021, SimSiam, section 4.1, https://arxiv.org/abs/2011.10566
    """
    normalised = torch.nn.functional.normalize(embeddings, dim=1)
    return float(normalised.std(dim=0, unbiased=False).mean()) * math.sqrt(embeddings.shape[1])


def effective_rank(embeddings: Tensor) -> float:
    """The number of directions that embeddings (N, D) use: from 1 to the smaller of N and D; 0 for all zeros.

    The exponential of the entropy of the singular values.

    Reference: Garrido et al. 2023, RankMe, https://arxiv.org/abs/2210.02885; theirs keeps the mean, which is one
    direction however large it is. measure() takes it off first.
    """
    if not torch.isfinite(embeddings).all():
        return 0.0
    values = torch.linalg.svdvals(embeddings)
    total = values.sum()
    if total <= 0:
        return 0.0
    shares = values / total
    shares = shares[shares > 0]
    return float(torch.exp(-(shares * shares.log()).sum()))


def off_diagonal_energy(centred: Tensor) -> float:
    """Mean square correlation between two dimensions of embeddings (N, D) without their mean; 1: all say the same.

    About 1 / N for dimensions that have nothing in common.
    """
    dimensions = centred.shape[1]
    if dimensions < 2:
        return 0.0
    scaled = torch.nn.functional.normalize(centred, dim=0)
    correlation = scaled.T @ scaled
    off = correlation.square().sum() - correlation.diagonal().square().sum()
    return float(off) / (dimensions * (dimensions - 1))


def is_collapsed(values: Mapping[str, float], samples: int) -> bool:
    """Whether embeddings of so many samples are all the same, or on one line."""
    return values["spread"] < SPREAD_LIMIT or (samples >= FEW and values["rank"] < RANK_LIMIT)


def describe_features(rank: float, windows: int) -> str:
    """A warning when an encoder's features of so many windows are all the same, or on one line; else nothing."""
    if windows < FEW or rank >= RANK_LIMIT:
        return ""
    return (
        f"the encoder's features of all windows are the same or on one line (effective rank {rank:.1f} of {windows} "
        "windows): the images may all be alike, or too small a part of them is seen (--image-size, --window)"
    )


def check_collapse(history: Sequence[Mapping[str, Any]], *, allowed: bool) -> str:
    """Look at the last epochs of a run.

    Args:
        history: rows of metrics.jsonl with `collapsed`, that of the epoch that has just ended the last.
        allowed: go on all the same.

    Returns:
        A warning to print, or nothing.

    Raises:
        CollapseError: the embeddings have been collapsed for PATIENCE epochs in a row; says what helps.
    """
    last = [row["watch"] for row in history[-PATIENCE:] if row.get("collapsed")]
    if not last or not history[-1].get("collapsed"):
        return ""
    values = last[-1]
    text = (
        f"the embeddings have collapsed: spread {values['spread']:.3f} (1 is healthy, 0: all images look the same), "
        f"effective rank {values['rank']:.1f}"
    )
    if allowed or len(last) < PATIENCE:
        return text
    raise CollapseError(
        f"{text}, in each of the last {PATIENCE} epochs up to {history[-1]['epoch']}. Lower -lr or raise --warmup; "
        "give a larger -b (Barlow Twins and dense want 32 and more); look at the images, which may all be alike. "
        "Another --exp-name starts anew; --allow-collapse goes on."
    )
