"""Layers that exporters cannot write with free sides, replaced by layers that compute the same."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional


def make_exportable(network: nn.Module) -> nn.Module:
    """Replace, in place, layers that depend on the image's size in a way that exporters cannot write.

    Args:
        network: one whose sides are multiples of its stride. Its weights stay where they are.
    """
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            kind = type(layer).__name__
            if kind == "Conv2dSame" and isinstance(layer, nn.Conv2d):
                setattr(parent, name, static_padding(layer))
            elif kind == "PSPBlock":
                setattr(parent, name, PooledContext(layer))
            elif isinstance(layer, nn.AdaptiveAvgPool2d) and layer.output_size not in (1, (1, 1)):
                setattr(parent, name, BinMeans(layer.output_size))  # type: ignore[arg-type]
    return network


def share_weights(network: nn.Module) -> nn.Module:
    """A copy whose layers may be replaced, with the very weights of the network."""
    tensors = [*network.parameters(), *network.buffers()]
    return copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})


def static_padding(layer: nn.Conv2d) -> nn.Module:
    """Pad as timm's "same" convolution (TensorFlow's) does, which computes its padding from the image's size.

    Sides are multiples of the network's stride, so the size at every convolution is a multiple of its own stride and
    the padding is the same for all of them. Fixed, it takes minutes off torch.export and nodes out of the graph.
    """
    total = [
        max((size - 1) * dilation + 1 - stride, 0)
        for size, dilation, stride in zip(layer.kernel_size, layer.dilation, layer.stride, strict=True)
    ]
    conv = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,  # type: ignore[arg-type]
        layer.stride,  # type: ignore[arg-type]
        dilation=layer.dilation,  # type: ignore[arg-type]
        groups=layer.groups,
        bias=layer.bias is not None,
    )
    conv.load_state_dict(layer.state_dict())
    (above, below), (left, right) = ((sum_ // 2, sum_ - sum_ // 2) for sum_ in total)
    return nn.Sequential(nn.ZeroPad2d((left, right, above, below)), conv)


class BinMeans(nn.Module):
    """Adaptive average pooling as two products with matrices that are made from the size while the network runs."""

    def __init__(self, bins: int | tuple[int, int]) -> None:
        super().__init__()
        self.bins = (bins, bins) if isinstance(bins, int) else bins

    def forward(self, features: Tensor) -> Tensor:
        """Means (N, C, *bins) of features (N, C, h, w)."""
        rows, columns = (_bin_weights(features.shape[2 + axis], self.bins[axis], features) for axis in (0, 1))
        return rows @ features @ columns.T


def _bin_weights(size: int, bins: int, like: Tensor) -> Tensor:
    """Weights (bins, size) of a mean over each bin; bin k reaches from floor(k size / bins) to ceil((k+1) size / bins).

    Neighbouring bins share a value where the size is no multiple of their number.
    """
    place = torch.arange(size, device=like.device)
    number = torch.arange(bins, device=like.device)[:, None]
    inside = (place >= number * size // bins) & (place < ((number + 1) * size + bins - 1) // bins)
    weights = inside.to(like.dtype)
    return weights / weights.sum(dim=1, keepdim=True)


class PooledContext(nn.Module):
    """A block of PSPNet, which takes another way while it is exported, one that is written for fixed sizes alone."""

    pool: nn.Module

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.pool = block.pool  # type: ignore[assignment]

    def forward(self, features: Tensor) -> Tensor:
        """Means over bins of features (N, C, h, w), enlarged to their size again: (N, C', h, w)."""
        return functional.interpolate(self.pool(features), features.shape[2:], mode="bilinear", align_corners=True)
