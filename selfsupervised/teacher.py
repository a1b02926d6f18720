"""A teacher that follows its student: an exponential moving average of the weights and the normalisation statistics.

References:
    - He et al. 2020, Momentum Contrast: https://arxiv.org/abs/1911.05722
    - Cai et al. 2021, Exponential Moving Average Normalization (EMAN): https://arxiv.org/abs/2101.08482
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gathering import count_processes, sum_over
from selfsupervised.heads import pooled_features

STATISTICS_BATCHES = 8  # for the teacher's first statistics


class Embedder(nn.Module):
    """An encoder and its projector: images (N, C, H, W) -> embeddings (N, D)."""

    def __init__(self, encoder: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.encoder, self.projector = encoder, projector

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings, before any normalisation of their length."""
        embedded: Tensor = self.projector(pooled_features(self.encoder, images))
        return embedded


class Teacher(Embedder):
    """A copy of a student that no gradient reaches.

    It is always in evaluation mode: batch normalisation uses averages of the student's statistics, so that the key of
    an image does not depend on the other images of its batch. In training mode the statistics of the batch tell query
    and key that they belong together, and a single process has no other batch to shuffle keys with.
    """

    def __init__(self, encoder: nn.Module, projector: nn.Module) -> None:
        super().__init__(copy.deepcopy(encoder), copy.deepcopy(projector))
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode."""
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Embeddings without a graph."""
        return super().forward(images)

    @torch.no_grad()
    def follow(self, encoder: nn.Module, projector: nn.Module, momentum: float) -> None:
        """Move weights and statistics towards the student's; `momentum` is the share that stays."""
        for own, student in ((self.encoder, encoder), (self.projector, projector)):
            weights: list[Tensor] = list(own.parameters())
            torch._foreach_lerp_(weights, list(student.parameters()), 1 - momentum)
            _move_buffers(own, student, 1 - momentum)

    @property
    def has_statistics(self) -> bool:
        """Whether it has batch normalisation with running statistics."""
        return bool(self._normalisations())

    @torch.no_grad()
    def observe(self, images: Tensor, *, first: bool) -> None:
        """Take the statistics of one batch into the mean over batches; `first` forgets those before."""
        layers = self._normalisations()
        momenta = [layer.momentum for layer in layers]
        for layer in layers:
            if first:
                layer.reset_running_stats()
            layer.momentum = None  # the mean of all batches, see torch.nn.BatchNorm2d
            layer.train()
        self(images)
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        self.eval()

    @torch.no_grad()
    def hand_statistics(self, encoder: nn.Module, projector: nn.Module) -> None:
        """Give the student, whose weights are still the same, the statistics that were observed."""
        for own, student in ((self.encoder, encoder), (self.projector, projector)):
            _move_buffers(own, own, 1)  # to the mean over processes
            for kept, buffer in zip(own.buffers(), student.buffers(), strict=True):
                buffer.copy_(kept)

    def _normalisations(self) -> list[_BatchNorm]:
        return [m for m in self.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def _move_buffers(own: nn.Module, student: nn.Module, share: float) -> None:
    """Move buffers towards the mean over processes of the student's; counters are copied."""
    pairs = list(zip(own.buffers(), student.buffers(), strict=True))
    floats = [(kept, buffer) for kept, buffer in pairs if kept.is_floating_point()]
    if floats:
        goals = _mean_over_processes([buffer for _, buffer in floats])
        torch._foreach_lerp_([kept for kept, _ in floats], goals, share)
    for kept, buffer in pairs:
        if not kept.is_floating_point():
            kept.copy_(buffer)


def _mean_over_processes(buffers: list[Tensor]) -> list[Tensor]:
    """Means of tensors; processes whose statistics are their own must have the same teacher all the same."""
    processes = count_processes()
    if processes == 1:
        return buffers
    joined = sum_over(torch.cat([buffer.flatten() for buffer in buffers])) / processes
    parts = joined.split([buffer.numel() for buffer in buffers])
    return [part.view_as(buffer) for part, buffer in zip(parts, buffers, strict=True)]
