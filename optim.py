"""Optimisers by name, and learning-rate schedules as plain functions of the step."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

OPTIMISERS = (
    "AdamW",
    "Adam",
    "SGD",
    "NAdam",
    "RAdam",
    "Adamax",
    "Adadelta",
    "Adagrad",
    "ASGD",
    "RMSprop",
    "Rprop",
    "LARS",
)
# One kernel on a GPU instead of many. That of Adagrad is for processors alone in the older versions of PyTorch that are
# allowed, which refuse it on GPUs.
FUSED = ("AdamW", "Adam", "SGD")
REFUSED = {
    "LBFGS": "it compares the loss of one batch at several points, and with dropout, batch normalisation and another "
    "batch at every step that loss is not one function",
    "SparseAdam": "it takes sparse gradients, and those of convolutions are dense",
}
NOTES = {
    "Rprop": "Rprop takes -lr as the size of its first steps and then chooses them itself: schedule, warm-up and "
    "--weight-decay do nothing. It is made for batches of the whole training set",
    "LARS": "LARS steps by a thousandth of each layer's weights times -lr: rates of 0.1 to 5 suit it",
    "ASGD": "ASGD keeps an average of the weights that PyTorch leaves in its state: what is scored and saved is what "
    "it steps from. --ema 0.99 scores and saves an average",
    "Adadelta": "Adadelta chooses the size of its steps itself and multiplies it by -lr, which is 1 in the paper",
}
SCHEDULES = ("cosine", "plateau", "one-cycle", "poly", "step", "constant")
# The predecessor's spellings, and PyTorch's.
SCHEDULE_NAMES = {
    "CosineAnnealingLR": "cosine",
    "ReduceLROnPlateau": "plateau",
    "OneCycleLR": "one-cycle",
    "PolynomialLR": "poly",
    "StepLR": "step",
    "ConstantLR": "constant",
}
PLATEAU_SEEN = ("last_epoch", "best", "num_bad_epochs", "cooldown_counter")  # the state of PyTorch's rule


def resolve_optimiser(name: str) -> str:
    """PyTorch's spelling of an optimiser.

    Raises:
        ValueError: an unknown name, or an optimiser that cannot work here.
    """
    for known, reason in REFUSED.items():
        if name.lower() == known.lower():
            raise ValueError(f"--optim {known} cannot train here: {reason}. Take one of {' '.join(OPTIMISERS)}")
    for known in OPTIMISERS:
        if name.lower() == known.lower():
            return known
    raise ValueError(f"--optim {name!r} is unknown; expected one of {' '.join(OPTIMISERS)}")


def resolve_schedule(name: str) -> str:
    """Our spelling of a schedule; that of PyTorch's class is understood.

    Raises:
        ValueError: an unknown name.
    """
    known = SCHEDULE_NAMES.get(name, name.lower().replace("_", "-"))
    if known not in SCHEDULES:
        raise ValueError(f"--scheduler {name!r} is unknown; expected one of {' '.join(SCHEDULES)}")
    return known


def build_optimiser(
    name: str,
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    momentum: float,
    encoder_lr_scale: float = 1.0,
    fused: bool = False,
) -> torch.optim.Optimizer:
    """Build an optimiser; biases and normalisation weights are not decayed.

    Args:
        momentum: of SGD, with Nesterov's correction, and of LARS; others have their own.
        encoder_lr_scale: what the learning rate of `model.encoder` is multiplied by, see Schedule.before_step.
        fused: all weights of a step in one kernel, where PyTorch has it for this optimiser.

    Raises:
        ValueError: see resolve_optimiser.
    """
    name = resolve_optimiser(name)
    encoder = getattr(model, "encoder", None) if encoder_lr_scale != 1 else None
    own = {id(weight) for weight in encoder.parameters()} if isinstance(encoder, nn.Module) else set()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    groups = _decay_groups((weight for weight in weights if id(weight) in own), weight_decay, lr_scale=encoder_lr_scale)
    groups += _decay_groups((weight for weight in weights if id(weight) not in own), weight_decay)
    more: dict[str, Any] = {"momentum": momentum, "nesterov": momentum > 0} if name == "SGD" else {}
    if fused and name in FUSED:
        more["fused"] = True
    groups = [group for group in groups if group["params"]]
    if name == "LARS":
        return LARS(groups, lr=lr, momentum=momentum)
    return getattr(torch.optim, name)(groups, lr=lr, **more)


def _decay_groups(weights: Iterable[nn.Parameter], weight_decay: float, **options: float) -> list[dict[str, Any]]:
    """Weights of one part of the network: those that are decayed, then the others."""
    weights = list(weights)
    return [
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": weight_decay, **options},
        {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0, **options},
    ]


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose steps are a fixed share of each layer's weights, for large batches.

    A layer's gradient, decay included, is multiplied by trust * |w| / (|g| + weight_decay * |w|). Biases and
    normalisation weights, which have one dimension, are stepped as by SGD without decay, and so is a layer whose
    weights or gradients are all 0. The learning rate multiplies the step, not what momentum keeps, as in PyTorch's
    SGD; with a constant rate that is the paper's rule.

    Reference: You et al. 2017, https://arxiv.org/abs/1708.03888
    """

    def __init__(
        self, params: Any, lr: float, momentum: float = 0.9, weight_decay: float = 0.0, trust: float = 0.001
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; nothing waits for the device."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._step_layer(weight, group)
        return loss

    def _step_layer(self, weight: torch.Tensor, group: dict[str, Any]) -> None:
        change = weight.grad
        assert change is not None
        if weight.ndim > 1:
            decay, norm, slope = group["weight_decay"], weight.norm(), change.norm()
            share = group["trust"] * norm / (slope + decay * norm)
            share = torch.where((norm > 0) & (slope > 0), share, torch.ones_like(share))
            change = change.add(weight, alpha=decay) * share
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        velocity = state["momentum_buffer"]
        velocity.mul_(group["momentum"]).add_(change)
        weight.add_(velocity, alpha=-group["lr"])


@dataclass(frozen=True)
class ScheduleOptions:
    """Shape of the learning rate over a run.

    Warm-up is in epochs, patience and cooldown of `plateau` too, as are the distances of `step`.
    """

    name: str = "cosine"
    warmup: float = 0.0
    factor: float = 0.1
    patience: int = 10
    cooldown: int = 0
    power: float = 0.9
    every: int = 10
    step_factor: float = 0.1


class Schedule:
    """Sets the learning rate before every step.

    All shapes but `plateau` are functions of the step alone. Those that end with the run (cosine, one-cycle, poly) have
    a longer curve in a longer run. A resumed run with more epochs follows it from where it is lower than the rate that
    the shorter one had come down to: the rate never climbs because of --epochs. `limit` keeps that, as a share of lr.

    Args:
        lr: highest learning rate.
        epochs: of the whole run. steps: optimiser steps in one epoch.
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
        self.name = resolve_schedule(options.name)
        self.optimiser, self.options, self.lr, self.epochs, self.steps = optimiser, options, lr, epochs, steps
        self.limit = 1.0
        # PyTorch's own rule, run on a learning rate of 1: what is left of it scales ours, warm-up included.
        self.scale = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
        mode: Any = "max" if more_is_better else "min"
        self.plateau = (
            plateau(self.scale, mode, factor=options.factor, patience=options.patience, cooldown=options.cooldown)
            if self.name == "plateau"
            else None
        )

    @property
    def ends_with_run(self) -> bool:
        """Whether the curve depends on the number of epochs."""
        return self.name in ("cosine", "one-cycle", "poly")

    def at(self, step: int) -> float:
        """Learning rate of a step, counted from 0 over the whole run."""
        return self.lr * min(self.limit, self.factor(step, self.epochs))

    def factor(self, step: int, epochs: int) -> float:
        """Share of the highest rate that a step has in a run of so many epochs."""
        warmup_steps, total = round(self.options.warmup * self.steps), max(1, epochs * self.steps)
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        after = min((step - warmup_steps) / max(1, total - warmup_steps), 1.0)
        shapes: dict[str, Callable[[], float]] = {
            "cosine": lambda: cosine(after),
            "one-cycle": lambda: one_cycle(after),
            "poly": lambda: poly(after, self.options.power),
            "step": lambda: self.options.step_factor ** (step // max(1, self.options.every * self.steps)),
            "plateau": lambda: float(self.scale.param_groups[0]["lr"]),
        }
        return shapes.get(self.name, lambda: 1.0)()

    def before_step(self, step: int) -> None:
        """Put the learning rate of this step into the optimiser; a group with `lr_scale` gets its share of it."""
        lr = self.at(step)
        for group in self.optimiser.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)

    def after_epoch(self, value: float) -> None:
        """Let `plateau` see the monitored value of the epoch; others ignore it."""
        if self.plateau:
            self.plateau.step(value)

    def state_dict(self) -> dict[str, Any]:
        """Length of the run and limit of the rate; what `plateau` has seen, without its options."""
        state: dict[str, Any] = {"epochs": self.epochs, "limit": self.limit}
        if self.plateau:
            state |= {key: getattr(self.plateau, key) for key in PLATEAU_SEEN}
            state["scale"] = self.scale.param_groups[0]["lr"]
        return state

    def load_state_dict(self, state: dict[str, Any], *, epoch: int = 0) -> None:
        """Restore what state_dict returned; a run that became longer gets its limit.

        Args:
            epoch: epochs that are finished.
        """
        if self.plateau and "scale" in state:
            self.scale.param_groups[0]["lr"] = state["scale"]
            self.plateau.load_state_dict({key: state[key] for key in PLATEAU_SEEN})
        self.limit, planned = state.get("limit", 1.0), state.get("epochs", self.epochs)
        if self.ends_with_run and self.epochs > planned and epoch:
            begin, end = (epoch - 1) * self.steps, planned * self.steps
            highest = max(self.factor(step, planned) for step in range(begin, max(begin + 1, end)))
            self.limit = min(self.limit, highest)


def describe_limit(schedule: Schedule, way: str) -> str:
    """What a run that was made longer learns with.

    Args:
        way: how another run starts from its weights.
    """
    return (
        f"the run was made longer: its learning rate stays at {schedule.limit * schedule.lr:.3g}, where it had come "
        f"down to, until {schedule.name} over {schedule.epochs} epochs is lower. For a new curve start another run: "
        f"{way} and another --exp-name"
    )


def cosine(after: float) -> float:
    """Half a cosine from 1 to 0. Reference: Loshchilov and Hutter 2017, SGDR, https://arxiv.org/abs/1608.03983."""
    return 0.5 * (1 + math.cos(math.pi * after))


def poly(after: float, power: float) -> float:
    """A straight line from 1 to 0, bent by the power. Reference: Chen et al. 2018, https://arxiv.org/abs/1606.00915."""
    return (1 - after) ** power


def one_cycle(after: float) -> float:
    """Cosine up from 1/25 to 1 over three tenths of the run, then down to 1/250000.

    Reference: Smith and Topin 2018, Super-Convergence, https://arxiv.org/abs/1708.07120
    """
    if after < 0.3:
        return 1 / 25 + (1 - 1 / 25) * (1 - cosine(after / 0.3))
    return 1 / 250000 + (1 - 1 / 250000) * cosine((after - 0.3) / 0.7)
