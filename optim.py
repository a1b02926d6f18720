"""Optimisers by name, and learning-rate schedules as plain functions of the step."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

OPTIMISERS = ("AdamW", "Adam", "SGD")
SCHEDULES = ("cosine", "plateau", "one-cycle", "constant")
# The predecessor's spellings.
SCHEDULE_NAMES = {"CosineAnnealingLR": "cosine", "ReduceLROnPlateau": "plateau", "OneCycleLR": "one-cycle"}
PLATEAU_SEEN = ("last_epoch", "best", "num_bad_epochs", "cooldown_counter")  # the state of PyTorch's rule


def check_names(optimiser: str, schedule: str) -> None:
    """Refuse names that are not known.

    Raises:
        ValueError: an unknown optimiser or schedule.
    """
    if optimiser.lower() not in [name.lower() for name in OPTIMISERS]:
        raise ValueError(f"--optim {optimiser!r} is unknown; expected one of {' '.join(OPTIMISERS)}")
    if SCHEDULE_NAMES.get(schedule, schedule) not in SCHEDULES:
        raise ValueError(f"--scheduler {schedule!r} is unknown; expected one of {' '.join(SCHEDULES)}")


def build_optimiser(
    name: str, model: nn.Module, *, lr: float, weight_decay: float, momentum: float
) -> torch.optim.Optimizer:
    """Build an optimiser; biases and normalisation weights are not decayed.

    Raises:
        ValueError: an unknown name.
    """
    check_names(name, "constant")
    name = next(known for known in OPTIMISERS if known.lower() == name.lower())
    weights = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
    ]
    more: dict[str, Any] = {"momentum": momentum, "nesterov": momentum > 0} if name == "SGD" else {}
    return getattr(torch.optim, name)([g for g in groups if g["params"]], lr=lr, **more)


@dataclass(frozen=True)
class ScheduleOptions:
    """Shape of the learning rate over a run; warm-up is in epochs, patience and cooldown too."""

    name: str = "cosine"
    warmup: float = 0.0
    factor: float = 0.1
    patience: int = 10
    cooldown: int = 0


class Schedule:
    """Sets the learning rate before every step.

    All shapes but `plateau` are functions of the step alone, so a resumed run with more epochs follows the curve of
    the longer run, and there is nothing to restore.

    Args:
        lr: highest learning rate.
        steps: optimiser steps in one epoch.
        more_is_better: whether the value that `plateau` watches should rise (a score) or fall (a loss).
    """

    def __init__(
        self,
        optimiser: torch.optim.Optimizer,
        options: ScheduleOptions,
        *,
        lr: float,
        epochs: int,
        steps: int,
        more_is_better: bool = False,
    ) -> None:
        name = SCHEDULE_NAMES.get(options.name, options.name)
        check_names("AdamW", name)
        self.optimiser, self.lr, self.steps, self.total = optimiser, lr, steps, max(1, epochs * steps)
        self.warmup_steps = round(options.warmup * steps)
        self.shape: Callable[[float], float] = {"cosine": cosine, "one-cycle": one_cycle}.get(name, lambda _: 1.0)
        # PyTorch's own rule, run on a learning rate of 1: what is left of it scales ours, warm-up included.
        self.scale = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
        mode: Any = "max" if more_is_better else "min"
        self.plateau = (
            plateau(self.scale, mode, factor=options.factor, patience=options.patience, cooldown=options.cooldown)
            if name == "plateau"
            else None
        )

    def at(self, step: int) -> float:
        """Learning rate of a step, counted from 0 over the whole run."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / (self.warmup_steps + 1)
        after = (step - self.warmup_steps) / max(1, self.total - self.warmup_steps)
        return self.lr * self.scale.param_groups[0]["lr"] * self.shape(min(after, 1.0))

    def before_step(self, step: int) -> None:
        """Put the learning rate of this step into the optimiser."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.at(step)

    def after_epoch(self, value: float) -> None:
        """Let `plateau` see the monitored value of the epoch; others ignore it."""
        if self.plateau:
            self.plateau.step(value)

    def state_dict(self) -> dict[str, Any]:
        """What `plateau` has seen, without its options; empty for the others."""
        if self.plateau is None:
            return {}
        return {"scale": self.scale.param_groups[0]["lr"], **{key: getattr(self.plateau, key) for key in PLATEAU_SEEN}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what state_dict returned."""
        if self.plateau and state:
            self.scale.param_groups[0]["lr"] = state["scale"]
            self.plateau.load_state_dict({key: state[key] for key in PLATEAU_SEEN})


def cosine(after: float) -> float:
    """Half a cosine from 1 to 0. Reference: Loshchilov and Hutter 2017, SGDR, https://arxiv.org/abs/1608.03983."""
    return 0.5 * (1 + math.cos(math.pi * after))


def one_cycle(after: float) -> float:
    """Cosine up from 1/25 to 1 over three tenths of the run, then down to 1/250000.

    Reference: Smith and Topin 2018, Super-Convergence, https://arxiv.org/abs/1708.07120
    """
    if after < 0.3:
        return 1 / 25 + (1 - 1 / 25) * (1 - cosine(after / 0.3))
    return 1 / 250000 + (1 - 1 / 250000) * cosine((after - 0.3) / 0.7)
