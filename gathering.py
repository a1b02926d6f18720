"""Sums, rows and batch statistics of all processes together, with the gradients that belong to them.

Every process has a part of the batch and a copy of the weights; what is minimised is the mean of their losses. The
gradient of a gathered value is therefore the sum of what arrives in all processes, and the mean of gradients over
processes, which DDP takes, is the gradient of the loss of the whole batch: for a loss that every process computes in
full from gathered values (Barlow Twins, sums of a segmentation loss) as well as for one that is the mean over its own
rows (MoCo), and for statistics in the middle of a network.

With one process, or without torch.distributed, everything here is the identity and batch normalisation is PyTorch's.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def count_processes() -> int:
    """How many processes learn together; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over(values: Tensor) -> Tensor:
    """The sum over processes, the same in all; any shape, equal in all."""
    return _Sum.apply(values) if count_processes() > 1 else values  # type: ignore[no-any-return, no-untyped-call]


def gather_over(values: Tensor) -> Tensor:
    """The rows of all processes in the order of their ranks: (N, ...) -> (processes * N, ...); N is equal in all."""
    return _Gather.apply(values) if count_processes() > 1 else values  # type: ignore[no-any-return, no-untyped-call]


def in_full(values: Tensor) -> Tensor:
    """Values in float32 at least, as statistics and losses need them under autocast."""
    return values if values.dtype == torch.float64 else values.float()


class _Sum(torch.autograd.Function):
    """A sum over processes; so is its gradient, because every process uses the sum."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:  # noqa: D102
        return _added(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: D102
        return _added(gradient)


class _Gather(torch.autograd.Function):
    """Rows of all processes; the gradient of a process's own rows is what all of them found for these."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:  # noqa: D102
        parts = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(count_processes())]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: D102
        return _added(gradient).chunk(count_processes())[dist.get_rank()]


def _added(values: Tensor) -> Tensor:
    total = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


class GatheredBatchNorm(_BatchNorm):
    """Batch normalisation of (N, C) or (N, C, ...) by the statistics of the samples of all processes.

    Unlike PyTorch's SyncBatchNorm it works on a CPU, and modules below it, such as the activation inside timm's layers,
    are applied to what it returns, in their order. N may differ between processes.

    Reference: Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167
    """

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002
        if input.ndim < 2:
            raise ValueError(f"batch normalisation takes (N, C, ...), not {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """The same shape and type as the input."""
        in_training = self.training or self.running_mean is None
        values = self._normalise_together(input) if in_training and count_processes() > 1 else super().forward(input)
        for module in self.children():
            values = module(values)
        return values

    def _normalise_together(self, values: Tensor) -> Tensor:
        self._check_input_dim(values)
        exact = in_full(values)
        others = [0, *range(2, values.ndim)]
        spread, middle = torch.var_mean(exact, dim=others, correction=0)  # (C,) of this process
        number = torch.full_like(middle, values.numel() // values.shape[1])
        middles, spreads, numbers = gather_over(torch.stack((middle, spread, number))[None]).unbind(1)  # (processes, C)
        count = numbers.sum(0)
        mean = (numbers * middles).sum(0) / count
        variance = (numbers * (spreads + (middles - mean).square())).sum(0) / count
        if self.training and self.track_running_stats:
            self._follow(mean.detach(), variance.detach() * (count / (count - 1).clamp_min(1)))
        shape = (1, -1, *[1] * (values.ndim - 2))
        scale = torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        normal = (exact - mean.view(shape)) * scale.view(shape)
        if self.bias is not None:
            normal = normal + self.bias.view(shape)
        return normal.to(values.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics, as PyTorch does: by `momentum`, or to the mean of all batches without one."""
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


def gather_statistics(module: nn.Module) -> nn.Module:
    """Put GatheredBatchNorm in the place of every batch normalisation of a network.

    Weights, statistics and their names in the state dict stay, and so does the result in one process.

    Returns:
        The network, or what replaces it if it is a batch normalisation itself.
    """
    if isinstance(module, _BatchNorm) and not isinstance(module, GatheredBatchNorm):
        return _gathering(module)
    for name, child in list(module.named_children()):
        new = gather_statistics(child)
        if new is not child:
            setattr(module, name, new)
    return module


def _gathering(layer: _BatchNorm) -> GatheredBatchNorm:
    """The same layer with gathered statistics; it shares the tensors."""
    new = GatheredBatchNorm(layer.num_features, layer.eps, layer.momentum, False, layer.track_running_stats)
    new.weight, new.bias = layer.weight, layer.bias
    new.running_mean, new.running_var = layer.running_mean, layer.running_var
    new.num_batches_tracked = layer.num_batches_tracked
    for name, child in layer.named_children():
        new.add_module(name, child)
    new.training = layer.training
    return new
