"""Normalisation layers that live through a step in which they see one value per channel."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from gathering import GatheredBatchNorm, count_processes


def tolerate_single_values(model: nn.Module) -> None:
    """Let normalisation layers that see one value per channel in training use running statistics for that step.

    One value has no spread: torch raises an error (batch normalisation of a 1x1 map in a batch of one, instance
    normalisation of a 1x1 map). With this, such a step normalises by the running statistics, leaves them as they are,
    and a warning is given once per network. Layers without running statistics take mean 0 and variance 1. Every other
    step is untouched, and so are the state dict, copies and pickles. Calling it twice changes nothing.
    """
    guard = SingleValueGuard()
    for layer in model.modules():
        if isinstance(layer, _BatchNorm | _InstanceNorm) and not _is_guarded(layer):
            layer.register_forward_pre_hook(guard.before)
            layer.register_forward_hook(guard.after, always_call=True)


class SingleValueGuard:
    """The two hooks around a normalisation layer; one object for all layers of a network."""

    def __init__(self) -> None:
        self.warned = False

    def before(self, layer: Any, inputs: tuple[Tensor, ...]) -> None:
        """Switch the layer to running statistics if its input has one value per channel."""
        if not self.must_switch(layer, inputs[0]):
            return
        if not self.warned:
            warnings.warn(
                f"a {type(layer).__name__} layer saw one value per channel (input {tuple(inputs[0].shape)}): such "
                "layers use their running statistics for that step. A larger batch or image avoids it",
                stacklevel=2,
            )
            self.warned = True
        names = ("training", "track_running_stats", "running_mean", "running_var")
        layer.__dict__["_before_single_value"] = {name: getattr(layer, name) for name in names}
        layer.training, layer.track_running_stats = False, True
        if layer.running_mean is None:
            layer.running_mean = inputs[0].new_zeros(inputs[0].shape[1], dtype=torch.float32)
            layer.running_var = torch.ones_like(layer.running_mean)

    def after(self, layer: nn.Module, _inputs: Any, _output: Any) -> None:
        """Put the layer back, also after an error."""
        for name, value in layer.__dict__.pop("_before_single_value", {}).items():
            setattr(layer, name, value)

    @staticmethod
    def must_switch(layer: nn.Module, values: Tensor) -> bool:
        """Whether the layer would compute statistics of one value."""
        if not (layer.training or layer.running_mean is None):
            return False
        if isinstance(layer, _InstanceNorm):
            return values.ndim > 2 and values.shape[2:].numel() == 1
        many = isinstance(layer, GatheredBatchNorm) and count_processes() > 1
        return values.ndim > 1 and values.numel() == values.shape[1] and not many


def _is_guarded(layer: nn.Module) -> bool:
    hooks: list[Callable[..., Any]] = list(layer._forward_pre_hooks.values())
    return any(isinstance(getattr(hook, "__self__", None), SingleValueGuard) for hook in hooks)
