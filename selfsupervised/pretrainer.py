"""Fit a self-supervised method: epochs, steps, what stops a run, what is saved and said after each epoch."""

import copy
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from backends import out_of_memory
from checkpoint import read_content, write_content
from learner import FitOptions, Learner, build_learner, check_state
from processes import ALONE, Processes
from selfsupervised.encoder_file import Description, describe_change
from selfsupervised.encoders import feature_maps
from selfsupervised.interface import Method, Step
from selfsupervised.look import Look, take_look
from selfsupervised.run_log import RunLog
from selfsupervised.watch import KEPT, check_collapse, is_collapsed, measure
from trainer import LossWatch, MemoryExhausted, groups_of, waiting_line

WARM_EPOCH = 1_000_000  # the numbers of the epochs whose views fill a queue; no run comes so far


class Views(Protocol):
    """Two views of each of N images; see selfsupervised.images.Views."""

    view_a: Tensor
    view_b: Tensor
    places: Tensor
    names: tuple[str, ...]


class Batches(Protocol):
    """The batches of an epoch; see selfsupervised.images.ViewBatches."""

    workers: int
    sampler: Any

    def __len__(self) -> int: ...
    def __iter__(self) -> Any: ...
    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose views come next."""


@dataclass
class Epoch:
    """What an epoch of training gave: loss and scores as means over batches, the last embeddings (N, D)."""

    means: dict[str, float]
    embeddings: Tensor
    waited: float


@dataclass
class _Sums:
    """Losses and scores, added up on the device."""

    values: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0
    embeddings: deque[Tensor] = field(default_factory=deque)

    def add(self, step: Step) -> None:
        for name, value in {"loss": step.loss, **step.scores}.items():
            value = value.detach().float()
            self.values[name] = self.values[name] + value if name in self.values else value
        self.count += 1
        self.embeddings.append(step.embeddings.float())
        while sum(map(len, self.embeddings)) - len(self.embeddings[0]) >= KEPT:
            self.embeddings.popleft()


def build_pretrainer(
    method: Method, options: FitOptions, *, device: str, steps: int, processes: Processes = ALONE
) -> Learner:
    """A learner around a method whose weights all learn; see freeze_idle_weights.

    Args:
        steps: optimiser steps in one epoch.
    """
    return build_learner(method, options, device=device, steps=steps, processes=processes, image=None)


def freeze_idle_weights(method: Method, shape: Sequence[int]) -> list[str]:
    """Take weights that the loss does not depend on out of training, such as an encoder's last normalisation.

    Several processes would wait for their gradients. One would pass them over, but then the optimiser's state would
    not fit a run that goes on in several.

    Args:
        shape: (C, H, W) of a view.

    Returns:
        Names of those among them that features of the encoder depend on: at scales that the loss does not look at.
    """
    copied = copy.deepcopy(method).train()
    with torch.random.fork_rng(devices=[]):
        views = torch.randn(2, 2, *shape)
        loss = copied(*views, torch.eye(2, 3).expand(2, 2, 2, 3)).loss
        features = sum((values.sum() for values in feature_maps(copied.encoder, views[0])), loss.new_zeros(()))
    learned = {name: weight for name, weight in copied.named_parameters() if weight.requires_grad}
    by_loss, by_features = (
        torch.autograd.grad(value, [*learned.values()], allow_unused=True) for value in (loss, features)
    )
    own = dict(method.named_parameters())
    untrained: list[str] = []
    for name, slope, use in zip(learned, by_loss, by_features, strict=True):
        if slope is None:
            own[name].requires_grad_(False)
            untrained += [name] if use is not None else []
    return untrained


def read_state(path: Path, description: Description) -> dict[str, Any] | None:
    """The last_checkpoint of a run; None when there is none.

    Raises:
        ValueError: it belongs to another method, encoder or images, or to train.py.
    """
    if not path.is_file():
        return None
    saved = read_content(path)
    before = saved.get("pretraining") if isinstance(saved, dict) else None
    if not isinstance(before, dict):
        raise ValueError(
            f"{path} is not the state of a pretraining, it may be that of a run of train.py; use another --exp-name"
        )
    change = describe_change(before, description)
    if change:
        raise ValueError(
            f"{path.parent} holds a pretraining with {change}. Use another --exp-name, or the flags of that run "
            "(args.json in its folder)."
        )
    return dict(saved)


def resume(learner: Learner, path: Path, description: Description) -> bool:
    """Restore a run from its last_checkpoint; False when there is none.

    Raises:
        ValueError: see read_state; or it has another optimiser.
    """
    saved = read_state(path, description)
    if saved is None:
        return False
    check_state(learner, saved, path)
    learner.restore(saved)
    return True


def warm(learner: Learner, batches: Batches) -> None:
    """Give a new method the batches that it wants before the first step."""
    method = learner.network
    learner.start_training()
    left, epoch = method.warm_steps, WARM_EPOCH
    while left > 0:
        batches.set_epoch(epoch)
        for views in itertools.islice(batches, left):
            with torch.no_grad(), learner.accelerator.autocast():
                method.warm(*_to_device(learner, views)[:2])
            left -= 1
        epoch += 1


def train_one_epoch(learner: Learner, batches: Batches, options: FitOptions) -> Epoch:
    """One pass over the views.

    Raises:
        TrainingStopped: the loss is not finite.
        MemoryExhausted: the device is out of memory.
    """
    device, schedule, method = learner.accelerator.device, learner.schedule, learner.network
    sums, waited, begin = _Sums(), 0.0, time.perf_counter()
    watch = LossWatch(every=1 if device.type == "cpu" else 20)
    position = learner.progress.epoch * schedule.steps
    learner.start_training()
    quiet = None if learner.processes.first else True
    bar: Iterable[Views] = tqdm(batches, desc=f"epoch {learner.progress.epoch + 1}", leave=False, disable=quiet)
    groups = groups_of(bar, options.accumulate)
    while True:
        asked = time.perf_counter()
        group = next(groups, None)
        waited += time.perf_counter() - asked
        if group is None:
            break
        schedule.before_step(position)
        position += 1
        try:
            for place, views in enumerate(group):
                step = _backward(learner, views, 1 / len(group), last=place == len(group) - 1, options=options)
                sums.add(step)
                watch.see(step.loss.detach(), views, learner)
            _update(learner, options)
        except torch.cuda.OutOfMemoryError as error:
            raise MemoryExhausted(out_of_memory(tuple(group[0].view_a.shape))) from error
        method.after_step(position / (schedule.epochs * schedule.steps))
    watch.check()
    waited /= max(time.perf_counter() - begin, 1e-9)
    learner.processes.same_buffers(method)
    return Epoch(_means(sums, learner.processes), _gathered(sums.embeddings, learner.processes), waited)


def _to_device(learner: Learner, views: Views) -> tuple[Tensor, Tensor, Tensor]:
    device = learner.accelerator.device
    pair = [view.to(device, non_blocking=True) for view in (views.view_a, views.view_b)]
    return pair[0], pair[1], views.places.to(device, non_blocking=True)


def _backward(learner: Learner, views: Views, share: float, *, last: bool, options: FitOptions) -> Step:
    """Forward and backward of one batch, which makes up `share` of its optimiser step."""
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    view_a, view_b, places = _to_device(learner, views)
    with nullcontext() if last else learner.accelerator.no_sync(learner.model):
        with learner.accelerator.autocast():
            step: Step = learner.model(view_a.to(memory_format=layout), view_b.to(memory_format=layout), places)
        learner.accelerator.backward(step.loss * share)
    return step


def _update(learner: Learner, options: FitOptions) -> None:
    """The only place where an optimiser changes weights."""
    if options.clip:
        learner.accelerator.clip_grad_norm_(learner.model.parameters(), options.clip)
    learner.optimiser.step()
    learner.optimiser.zero_grad(set_to_none=True)
    learner.progress.step += 1


def _means(sums: _Sums, processes: Processes) -> dict[str, float]:
    """Means over batches and processes."""
    values = torch.stack([*sums.values.values()]) / sums.count
    processes.add(values)
    return dict(zip(sums.values, (values / processes.world).tolist(), strict=True))


def _gathered(embeddings: Iterable[Tensor], processes: Processes) -> Tensor:
    own = torch.cat([*embeddings]).cpu()
    return torch.cat(processes.gather(own[-max(1, KEPT // processes.world) :]))


def fit(
    learner: Learner,
    description: Description,
    batches: Batches,
    options: FitOptions,
    look: Look | None,
    run: RunLog | None,
    *,
    allow_collapse: bool = False,
    report: Callable[[str], None] = lambda _: None,
) -> None:
    """Train until the last epoch; every epoch is logged and saved.

    Args:
        look, run: what is looked at, and where to write; None in all processes but the first.
        report: takes one line for each epoch.

    Raises:
        TrainingStopped: the loss is not finite, or embeddings have collapsed (CollapseError).
        OSError: a file could not be written; the previous one is whole.
    """
    progress, processes = learner.progress, learner.processes
    if not progress.step:
        warm(learner, batches)
    while progress.epoch < options.epochs:
        begin = time.perf_counter()
        batches.set_epoch(progress.epoch)
        processes.start_epoch(batches.sampler.seed, progress.epoch)
        lr = learner.schedule.at(progress.epoch * learner.schedule.steps)
        result = train_one_epoch(learner, batches, options)
        progress.epoch += 1
        watched = measure(result.embeddings)
        row: dict[str, Any] = {"epoch": progress.epoch, "lr": lr, "train": result.means, "watch": watched}
        row["collapsed"] = is_collapsed(watched, len(result.embeddings))

        def close(row: dict[str, Any] = row, begin: float = begin, waited: float = result.waited) -> None:
            assert run is not None and look is not None, "the first process has both"
            if progress.epoch % look.every == 0 or progress.epoch == options.epochs:
                take_look(learner.network, look, description, run, row)
            row |= {"seconds": round(time.perf_counter() - begin, 2), "waited": round(waited, 3)}
            end_epoch(learner, description, run, row, options, allow_collapse=allow_collapse, report=report)
            if progress.epoch == 1:
                report(waiting_line(waited, batches.workers))

        processes.first_does(close)


def end_epoch(
    learner: Learner,
    description: Description,
    run: RunLog,
    row: dict[str, Any],
    options: FitOptions,
    *,
    allow_collapse: bool,
    report: Callable[[str], None],
) -> None:
    """Log an epoch and save the state to go on from; a kill between the two repeats the epoch.

    Raises:
        CollapseError: see watch.check_collapse; this epoch's state is saved.
    """
    run.log_epoch(row)
    state = learner.network.state_dict()
    write_content(run.last_path, {"pretraining": description.plain(), "model_state_dict": state, **learner.state()})
    report(epoch_line(row, options.epochs, run.encoder_path.name))
    if row.get("warning"):
        report(f"warning: {row['warning']}")
    warning = check_collapse(run.history, allowed=allow_collapse)
    if warning:
        report(f"warning: {warning}")


def epoch_line(row: dict[str, Any], epochs: int, saved: str) -> str:
    """One line of text about an epoch: loss, the method's first score, the watch, and what was saved."""
    parts = [f"epoch {row['epoch']}/{epochs}  lr {row['lr']:.2e}"]
    parts += [f"{name} {value:.4f}" for name, value in [*row["train"].items()][:2]]  # the loss stands first
    watch = row["watch"]
    parts.append(f"spread {watch['spread']:.2f} rank {watch['rank']:.1f}")
    if "feature_rank" in watch:
        parts.append(f"features' rank {watch['feature_rank']:.1f}")
    parts += [f"probe {shown}" for shown in show_scores(row.get("probe", {}))]
    parts.append(f"{row['seconds']:.1f} s")
    if "feature_rank" in watch:
        parts.append(f"saved {saved}")
    return "  ".join(parts)


def show_scores(scores: Mapping[str, float | None]) -> list[str]:
    """Scores of a probe as words."""
    return [f"{name} {'-' if value is None else f'{value:.4f}'}" for name, value in scores.items()]
