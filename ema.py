"""A moving average of a network's weights, which is often better than the weights that are trained."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """Exponential moving average of the weights that a network trains.

    The decay rises to its value: the first steps, from random weights, are soon forgotten. Buffers, such as the
    statistics of batch normalisation, are averages by themselves: those of the network are used as they are.

    Args:
        model: its parameters are looked at, never replaced by others.
        decay: share of the average that stays at each step, once warmed up.

    Reference: the rule of the warm-up is that of TensorFlow's ExponentialMovingAverage, min(decay, (1 + n) / (10 + n)).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        named = dict(model.named_parameters())
        self.names, self.weights = list(named), list(named.values())
        self.decay, self.updates = decay, 0
        self.average = [weight.detach().clone() for weight in self.weights]

    @property
    def current_decay(self) -> float:
        """Decay of the next update."""
        return min(self.decay, (2 + self.updates) / (11 + self.updates))

    def update(self) -> None:
        """Move the average towards the weights; call it after each optimiser step. Nothing waits for the device."""
        get_ema_multi_avg_fn(self.current_decay)(self.average, [weight.detach() for weight in self.weights], None)
        self.updates += 1

    def restart(self) -> None:
        """Begin again from the weights as they are."""
        with torch.no_grad():
            for kept, weight in zip(self.average, self.weights, strict=True):
                kept.copy_(weight)
        self.updates = 0

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the network has the averaged weights; memory changes hands and nothing is copied."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for place, weight in enumerate(self.weights):
            weight.data, self.average[place] = self.average[place], weight.data

    def state_dict(self) -> dict[str, Any]:
        """The averages by the names of the weights, and how many updates they have seen."""
        return {"updates": self.updates, "weights": dict(zip(self.names, self.average, strict=True))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what state_dict returned."""
        self.updates = state["updates"]
        with torch.no_grad():
            for name, kept in zip(self.names, self.average, strict=True):
                kept.copy_(state["weights"][name])
