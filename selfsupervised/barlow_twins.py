"""Barlow Twins: the two views' embeddings correlate unit by unit, and no unit with another.

Reference: Zbontar et al. 2021, https://arxiv.org/abs/2103.03230
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gathering import in_full, sum_over
from selfsupervised.heads import build_head, pooled_features
from selfsupervised.interface import Method, Step

EPSILON = 1e-5  # added to variances, as batch normalisation does
WHY_NOT = (
    "the loss is a function of the correlations over the whole batch, and the mean of the losses of several smaller "
    "batches is another function. Give a larger -b, or more processes"
)


class BarlowTwins(Method):
    """An encoder and a projector that see both views in one batch.

    The views go through the network together, 2 N images at once, instead of one after the other as in the paper's
    pseudo-code. Batch normalisation in the network then takes its statistics over both views: twice the values,
    which is what small batches lack, and a third fewer calls. The loss still standardises each view by itself.

    Args:
        features: channels of the encoder's coarsest map.
        projector: widths of the projector, whose last one is the number of units.
        lambda_: weight of correlations off the diagonal.
    """

    accumulates, why_not = False, WHY_NOT

    def __init__(self, encoder: nn.Module, features: int, projector: Sequence[int], lambda_: float) -> None:
        super().__init__()
        self.encoder, self.lambda_ = encoder, lambda_
        self.projector = build_head(features, projector)

    def forward(self, view_a: Tensor, view_b: Tensor, places: Tensor) -> Step:
        """See Method.forward; the places are not looked at."""
        embedded = self.projector(pooled_features(self.encoder, torch.cat((view_a, view_b))))  # (2 N, D)
        z_a, z_b = in_full(embedded).chunk(2)
        loss, scores = barlow_loss(z_a, z_b, self.lambda_)
        return Step(loss, z_a.detach(), scores)


def barlow_loss(
    z_a: Tensor, z_b: Tensor, lambda_: float, weights: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of (1 - C_ii)^2 plus lambda times the sum of C_ij^2 over i != j, over the samples of all processes.

    C is the correlation of unit i in one view with unit j in the other. A unit that is constant has correlation 0.

    Args:
        z_a: (N, D), float32. z_b: the same samples in the other view.
        weights: (N,), 0 or 1: samples that count. If fewer than two do, in all processes together, the loss is 0.

    Returns:
        The loss, and `diagonal` (mean C_ii) and `off-diagonal energy` (mean C_ij^2) for the log.
    """
    with torch.autocast(z_a.device.type, enabled=False):
        if weights is None:
            weights = z_a.new_ones(len(z_a))
        count = sum_over(weights.sum())
        both = _standardise(torch.stack((z_a, z_b)), weights[:, None], count)  # (2, N, D)
        correlation = sum_over((both[0] * weights[:, None]).T @ both[1]) / count.clamp_min(1)  # (D, D)
        diagonal = correlation.diagonal()
        off_diagonal = correlation.square().sum() - diagonal.square().sum()
        loss = (1 - diagonal).square().sum() + lambda_ * off_diagonal
        units = len(diagonal)
        scores = {
            "diagonal": diagonal.mean().detach(),
            "off-diagonal energy": off_diagonal.detach() / max(1, units * (units - 1)),
        }
        return loss * (count > 1), scores


def _standardise(values: Tensor, weights: Tensor, count: Tensor) -> Tensor:
    """Each unit of each view with mean 0 and variance 1 over the samples that count: (2, N, D) by weights (N, 1)."""
    count = count.clamp_min(1)
    mean = sum_over((values * weights).sum(1, keepdim=True)) / count
    centred = values - mean
    variance = sum_over((centred.square() * weights).sum(1, keepdim=True)) / count
    return centred * torch.rsqrt(variance + EPSILON)
