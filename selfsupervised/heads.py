"""The small networks after an encoder: projectors and predictors, which are thrown away after pretraining."""

from collections.abc import Sequence

from torch import Tensor, nn

from gathering import GatheredBatchNorm
from selfsupervised.encoders import feature_maps


def build_head(features: int, widths: Sequence[int], *, norm: bool = True, norm_last: bool = False) -> nn.Sequential:
    """Linear layers with ReLU between them: (N, features) -> (N, widths[-1]).

    Args:
        norm: batch normalisation, by the statistics of all processes, before each ReLU; without it layers have biases.
        norm_last: batch normalisation of the result too, without weights of its own.
    """
    layers: list[nn.Module] = []
    for place, width in enumerate(widths):
        layers.append(nn.Linear(features, width, bias=not norm))
        if place < len(widths) - 1:
            layers += [GatheredBatchNorm(width), nn.ReLU(inplace=True)] if norm else [nn.ReLU(inplace=True)]
        features = width
    if norm_last:
        layers.append(GatheredBatchNorm(features, affine=False))
    return nn.Sequential(*layers)


def pool(maps: Sequence[Tensor]) -> Tensor:
    """The mean of the coarsest map over its places, (N, C)."""
    return maps[-1].mean(dim=(2, 3))


def pooled_features(encoder: nn.Module, images: Tensor) -> Tensor:
    """One vector for each image: (N, C, H, W) -> (N, C of the coarsest map)."""
    return pool(feature_maps(encoder, images))
