"""What learns: a network, its optimiser and schedule, and all of their state that a resumed run needs."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import nn

from checkpoint import ModelConfig, load_checkpoint
from ema import WeightAverage
from optim import Schedule, ScheduleOptions, build_optimiser
from processes import ALONE, Processes


@dataclass(frozen=True)
class FitOptions:
    """How to train.

    clip: largest norm of the gradient; 0 is no limit. patience: epochs without a best that end the run; 0 is never.
    encoder_lr_scale: what the encoder's learning rate is multiplied by. freeze_encoder: epochs in which it does not
    learn. ema: decay of the average of the weights that is scored and saved as the best; 0 is none.
    further_every: epochs between two scorings of the validation sets beside the main one. weighted: there is no main
    one; the mean over all sets, weighted by their sizes, decides instead.
    """

    epochs: int = 50
    lr: float = 1e-3
    optimiser: str = "AdamW"
    weight_decay: float = 1e-4
    momentum: float = 0.9
    encoder_lr_scale: float = 1.0
    freeze_encoder: int = 0
    ema: float = 0.0
    schedule: ScheduleOptions = ScheduleOptions()
    amp: str = "no"
    accumulate: int = 1
    clip: float = 0.0
    patience: int = 0
    monitor: str = "iou"
    channels_last: bool = True
    keep_worst: int = 4
    empty: str = "skip"
    further_every: int = 1
    weighted: bool = False


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
    encoder_weights: list[nn.Parameter] = field(default_factory=list)  # those that learn unless it is frozen
    ema: WeightAverage | None = None
    progress: Progress = field(default_factory=Progress)
    best: dict[str, Any] | None = None  # summary of the best epoch's scores; None when another run computed them
    processes: Processes = ALONE

    @property
    def network(self) -> Any:
        """The network itself; Accelerate's autocast is taken off it, so that it is scored as validate.py scores it."""
        return self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)

    @property
    def optimiser_name(self) -> str:
        """PyTorch's name of the optimiser, which Accelerate wraps."""
        return type(getattr(self.optimiser, "optimizer", self.optimiser)).__name__

    def start_training(self, *, freeze_encoder: bool = False) -> None:
        """Put the network into training mode, its encoder too unless that is frozen.

        A frozen encoder has no gradients, and its batch normalisation and dropout work as in prediction.
        """
        self.model.train()
        for weight in self.encoder_weights:
            weight.requires_grad_(not freeze_encoder)
        if freeze_encoder:
            self.network.encoder.eval()

    def averaged(self) -> AbstractContextManager[None]:
        """Within it the network has the averaged weights, if an average is kept."""
        return self.ema.in_place() if self.ema else nullcontext()

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
            "ema_state_dict": self.ema.state_dict() if self.ema else {},
            "scaler_state_dict": scaler.state_dict() if scaler else {},
            "rng": {"cpu": torch.get_rng_state(), "cuda": own},
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Go back to a state that was saved."""
        self.network.load_state_dict(saved["model_state_dict"])
        self.optimiser.load_state_dict(self._with_present_options(saved["optimizer_state_dict"]))
        self.schedule.load_state_dict(saved["scheduler_state_dict"], epoch=saved["progress"]["epoch"])
        if self.ema and saved.get("ema_state_dict"):
            self.ema.load_state_dict(saved["ema_state_dict"])
        elif self.ema:
            self.ema.restart()
        if self.accelerator.scaler and saved["scaler_state_dict"]:
            self.accelerator.scaler.load_state_dict(saved["scaler_state_dict"])
        torch.set_rng_state(saved["rng"]["cpu"])
        if saved["rng"]["cuda"] and self.accelerator.device.type == "cuda":
            torch.cuda.set_rng_state(saved["rng"]["cuda"][0], self.accelerator.device)
        self.progress = Progress(**saved["progress"])

    def _with_present_options(self, state: dict[str, Any]) -> dict[str, Any]:
        """A saved state of the optimiser with the options of this run, not those that it was started with."""
        groups = [
            {**saved, **{key: value for key, value in now.items() if key != "params"}}
            for saved, now in zip(state["param_groups"], self.optimiser.param_groups, strict=True)
        ]
        return {**state, "param_groups": groups}


def build_learner(
    model: nn.Module,
    options: FitOptions,
    *,
    device: str,
    steps: int,
    processes: Processes = ALONE,
    image: Sequence[int] | None = (),
) -> Learner:
    """Put a network and its optimiser in the hands of Accelerate, which adds the gradients of several processes.

    Args:
        steps: optimiser steps in one epoch.
        image: (C, H, W) of an image that the network takes, for several processes; None: all its weights learn.
    """
    os.environ["ACCELERATE_TORCH_DEVICE"] = device
    several = processes.world > 1 and image is not None
    idle = several and (options.freeze_encoder > 0 or has_idle_weights(model, image or ()))
    sharing = DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=idle)
    accelerator = Accelerator(mixed_precision=options.amp, cpu=device == "cpu", kwargs_handlers=[sharing])
    model = model.to(accelerator.device)
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimiser = build_optimiser(
        options.optimiser,
        model,
        lr=options.lr,
        weight_decay=options.weight_decay,
        momentum=options.momentum,
        encoder_lr_scale=options.encoder_lr_scale,
        fused=accelerator.device.type == "cuda",
    )
    encoder = getattr(model, "encoder", None)
    encoder_weights = [w for w in encoder.parameters() if w.requires_grad] if isinstance(encoder, nn.Module) else []
    ema = WeightAverage(model, options.ema) if options.ema else None
    model, optimiser = accelerator.prepare(model, optimiser)
    schedule = Schedule(
        optimiser,
        options.schedule,
        lr=options.lr,
        epochs=options.epochs,
        steps=steps,
        more_is_better=options.monitor != "loss",
    )
    progress = Progress(monitor=options.monitor)
    return Learner(model, optimiser, schedule, accelerator, encoder_weights, ema, progress, processes=processes)


def has_idle_weights(model: nn.Module, image: Sequence[int]) -> bool:
    """Whether some weights have no part in the answer to an image (C, H, W), so that no gradient reaches them."""
    training = model.training
    answer = model.eval()(torch.zeros(1, *image))
    gradients = torch.autograd.grad(answer.sum(), [w for w in model.parameters() if w.requires_grad], allow_unused=True)
    model.train(training)
    return any(gradient is None for gradient in gradients)


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
    check_state(learner, saved, path)
    learner.restore(saved)
    return saved_config


def check_state(learner: Learner, saved: dict[str, Any], path: Path) -> None:
    """Refuse the state of a run with another optimiser, another monitored value or other groups of weights.

    Raises:
        ValueError: names both.
    """
    before = {"--optim": saved["optimizer_name"], "--monitor": Progress(**saved["progress"]).monitor}
    now = {"--optim": learner.optimiser_name, "--monitor": learner.progress.monitor}
    for flag, old in before.items():
        if old != now[flag]:
            raise ValueError(
                f"{path.parent} was trained with {flag} {old}, now it is {now[flag]}. "
                "Use the first one again to go on, or another --exp-name."
            )
    groups = len(saved["optimizer_state_dict"]["param_groups"]), len(learner.optimiser.param_groups)
    if groups[0] != groups[1]:
        raise ValueError(
            f"{path.parent} was trained {'without' if groups[0] < groups[1] else 'with'} --encoder-lr-scale, which "
            "sorts the weights into other groups. Give what it began with to go on, or another --exp-name."
        )
