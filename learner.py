"""What learns: a network, its optimiser and schedule, and all of their state that a resumed run needs."""

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from checkpoint import ModelConfig, load_checkpoint
from optim import Schedule, ScheduleOptions, build_optimiser


@dataclass(frozen=True)
class FitOptions:
    """How to train.

    clip: largest norm of the gradient; 0 is no limit. patience: epochs without a best that end the run; 0 is never.
    """

    epochs: int = 50
    lr: float = 1e-3
    optimiser: str = "AdamW"
    weight_decay: float = 1e-4
    momentum: float = 0.9
    schedule: ScheduleOptions = ScheduleOptions()
    amp: str = "no"
    accumulate: int = 1
    clip: float = 0.0
    patience: int = 0
    monitor: str = "iou"
    channels_last: bool = True
    keep_worst: int = 4
    empty: str = "skip"


@dataclass
class Progress:
    """How far a run is; stored in last_checkpoint. `best` is in the unit of `monitor`, more is better."""

    epoch: int = 0
    step: int = 0
    best: float | None = None
    best_epoch: int = 0
    monitor: str = "iou"
    seconds: float = 0.0


@dataclass
class Learner:
    """What learns: the network and everything whose state a resumed run needs."""

    model: nn.Module
    optimiser: torch.optim.Optimizer
    schedule: Schedule
    accelerator: Accelerator
    progress: Progress = field(default_factory=Progress)
    best: dict[str, Any] | None = None  # summary of the best epoch's scores; None when another process computed them

    @property
    def network(self) -> nn.Module:
        """The network itself; Accelerate's autocast is taken off it, so that it is scored as validate.py scores it."""
        return self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)

    @property
    def optimiser_name(self) -> str:
        """PyTorch's name of the optimiser, which Accelerate wraps."""
        return type(getattr(self.optimiser, "optimizer", self.optimiser)).__name__

    def state(self) -> dict[str, Any]:
        """Everything but the weights, as plain types and tensors."""
        scaler, device = self.accelerator.scaler, self.accelerator.device
        own = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []  # other GPUs are left alone
        return {
            "epoch": self.progress.epoch,
            "progress": asdict(self.progress),
            "max_score": self.progress.best,
            "optimizer_name": self.optimiser_name,
            "optimizer_state_dict": self.optimiser.state_dict(),
            "scheduler_state_dict": self.schedule.state_dict(),
            "scaler_state_dict": scaler.state_dict() if scaler else {},
            "rng": {"cpu": torch.get_rng_state(), "cuda": own},
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Go back to a state that was saved."""
        self.network.load_state_dict(saved["model_state_dict"])
        options = [dict(group) for group in self.optimiser.param_groups]
        self.optimiser.load_state_dict(saved["optimizer_state_dict"])
        for group, wanted in zip(self.optimiser.param_groups, options, strict=True):
            group.update(wanted)  # the flags of this run, not those it was started with
        self.schedule.load_state_dict(saved["scheduler_state_dict"])
        if self.accelerator.scaler and saved["scaler_state_dict"]:
            self.accelerator.scaler.load_state_dict(saved["scaler_state_dict"])
        torch.set_rng_state(saved["rng"]["cpu"])
        if saved["rng"]["cuda"] and self.accelerator.device.type == "cuda":
            torch.cuda.set_rng_state(saved["rng"]["cuda"][0], self.accelerator.device)
        self.progress = Progress(**saved["progress"])


def build_learner(model: nn.Module, options: FitOptions, *, device: str, steps: int) -> Learner:
    """Put a network and its optimiser in the hands of Accelerate.

    Args:
        steps: optimiser steps in one epoch.
    """
    os.environ["ACCELERATE_TORCH_DEVICE"] = device
    accelerator = Accelerator(mixed_precision=options.amp, cpu=device == "cpu")
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimiser = build_optimiser(
        options.optimiser, model, lr=options.lr, weight_decay=options.weight_decay, momentum=options.momentum
    )
    model, optimiser = accelerator.prepare(model, optimiser)
    schedule = Schedule(
        optimiser,
        options.schedule,
        lr=options.lr,
        epochs=options.epochs,
        steps=steps,
        more_is_better=options.monitor != "loss",
    )
    return Learner(model, optimiser, schedule, accelerator, Progress(monitor=options.monitor))


def resume(learner: Learner, path: Path, config: ModelConfig) -> ModelConfig | None:
    """Restore a run from its last_checkpoint and return the config stored there; None when there is none.

    Raises:
        ValueError: the checkpoint belongs to another network, other classes, another geometry, optimiser or monitor,
            or it holds no state to go on from.
    """
    if not path.is_file():
        return None
    saved_config, saved = load_checkpoint(path)
    for name in ("architecture", "encoder", "labels", "class_names", "channels", "geometry", "preprocess"):
        old, new = getattr(saved_config, name), getattr(config, name)
        if old != new:
            raise ValueError(
                f"{path.parent} holds a run with {name} {old}, now it is {new}. Use another --exp-name, "
                "or the flags of that run (args.json in its folder)."
            )
    if "optimizer_name" not in saved:
        raise ValueError(
            f"{path} holds weights but no state to go on from, as a best checkpoint does. Start another run from it: "
            f"--init-from {path} with another --exp-name."
        )
    before = {"--optim": saved["optimizer_name"], "--monitor": Progress(**saved["progress"]).monitor}
    now = {"--optim": learner.optimiser_name, "--monitor": learner.progress.monitor}
    for flag, old in before.items():
        if old != now[flag]:
            raise ValueError(
                f"{path.parent} was trained with {flag} {old}, now it is {now[flag]}. "
                "Use the first one again to go on, or another --exp-name."
            )
    learner.restore(saved)
    return saved_config
