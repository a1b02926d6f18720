"""Fit a network: epochs, steps, what stops a run, what is saved and said after each epoch."""

import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from backends import Forward, out_of_memory, torch_forward
from checkpoint import ModelConfig, save_checkpoint
from dataset import Batch, EvaluationSet, TrainingBatches
from evaluation import Evaluation, score_set, shared_panels, weighted_mean
from learner import FitOptions, Learner, Progress
from processes import ALONE, Processes
from run_folder import MEAN_NAME, RunFolder
from slide_scoring import LossFunction
from tiling import NotFiniteError

LOWER = "Lower -lr, add --clip 1 or --warmup 1"  # what helps where numbers grow beyond all bounds
GOES_ON = "the last finished epoch is kept and the same command goes on from it"
MUCH_WAITING = 0.1  # share of the time above which more loader processes are suggested


Item = TypeVar("Item")


class Named(Protocol):
    """A batch that says which files it is made of."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the images."""


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says at which step, with which learning rate and files."""


class MemoryExhausted(TrainingStopped):
    """A step needs more memory than the device has; the message says for which batch."""


def train_one_epoch(
    learner: Learner, batches: Iterable[Batch], loss: LossFunction, options: FitOptions, num_logits: int
) -> dict[str, Any]:
    """One pass over the training samples.

    Returns:
        Mean loss over samples, IoU from counts over the whole epoch, share of the time spent waiting for the loader.
    """
    device = learner.accelerator.device
    num_classes, binary = max(2, num_logits), num_logits == 1
    counts = torch.zeros(num_classes + 1, num_classes, dtype=torch.int64, device=device)
    total, samples, waited, begin = torch.zeros((), device=device), 0, 0.0, time.perf_counter()
    watch = LossWatch(every=1 if device.type == "cpu" else 20)
    position = learner.progress.epoch * learner.schedule.steps  # of the schedule, right on resume with another batch
    learner.start_training(freeze_encoder=learner.progress.epoch < options.freeze_encoder)
    groups = groups_of(batches, options.accumulate)
    quiet = None if learner.processes.first else True
    with tqdm(total=len(batches), desc=f"epoch {learner.progress.epoch + 1}", leave=False, disable=quiet) as bar:  # type: ignore[arg-type]

        def note(value: Tensor, batch: Batch) -> None:
            nonlocal total, samples
            total += value * len(batch.names)
            samples += len(batch.names)
            if watch.see(value, batch, learner):
                iou = train_iou(counts, binary=binary) or 0
                bar.set_postfix(loss=f"{total.item() / samples:.4f}", iou=f"{iou:.3f}")
            bar.update()

        while True:
            asked = time.perf_counter()
            group = next(groups, None)
            waited += time.perf_counter() - asked
            if group is None:
                break
            learner.schedule.before_step(position)
            position += 1
            train_step(learner, group, loss, counts, options, note)
    watch.check()
    learner.processes.add(counts)
    learner.processes.same_buffers(learner.network)
    waited /= max(time.perf_counter() - begin, 1e-9)
    return {"loss": total.item() / max(1, samples), "iou": train_iou(counts, binary=binary), "waited": waited}


def train_step(
    learner: Learner,
    group: Sequence[Batch],
    loss: LossFunction,
    counts: Tensor,
    options: FitOptions,
    note: Callable[[Tensor, Batch], None],
) -> None:
    """One optimiser step from the batches that share it; the only place where weights change.

    Args:
        counts: see add_counts.
        note: is given the loss of each batch after its backward pass, and the batch.
    """
    whole = sum(len(batch.names) for batch in group)
    try:
        for batch in group:
            note(_backward(learner, batch, loss, counts, len(batch.names) / whole, batch is group[-1], options), batch)
        _update(learner, options)
    except torch.cuda.OutOfMemoryError as error:
        raise MemoryExhausted(out_of_memory(tuple(group[0].images.shape))) from error


def groups_of(batches: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Batches that share one optimiser step; the last group may be smaller."""
    group: list[Item] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _backward(
    learner: Learner, batch: Batch, loss: LossFunction, counts: Tensor, share: float, last: bool, options: FitOptions
) -> Tensor:
    """Forward and backward of one batch, which makes up `share` of the samples of its step."""
    accelerator, device = learner.accelerator, learner.accelerator.device
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    images = batch.images.to(device, non_blocking=True, memory_format=layout)
    masks = batch.masks.to(device, non_blocking=True).long()
    with nullcontext() if last else accelerator.no_sync(learner.model):
        with accelerator.autocast():
            logits = learner.model(images)
        value = loss(logits.float(), masks)
        accelerator.backward(value * share)
    add_counts(counts, logits.detach(), masks)
    return value.detach()


def _update(learner: Learner, options: FitOptions) -> None:
    if options.clip:
        learner.accelerator.clip_grad_norm_(learner.model.parameters(), options.clip)
    learner.optimiser.step()
    learner.optimiser.zero_grad(set_to_none=True)
    if learner.ema:
        learner.ema.update()
    learner.progress.step += 1


def add_counts(counts: Tensor, logits: Tensor, masks: Tensor) -> None:
    """Add a batch to a confusion matrix without waiting for the device.

    Args:
        counts: (K + 1, K) int64, true class by predicted class; the last row takes ignored pixels.
        logits: (N, 1 or K, H, W). masks: (N, H, W) int64 with 255 ignored.
    """
    num_classes = counts.shape[1]
    pred = (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(dim=1)
    cells = masks.clamp(max=num_classes) * num_classes + pred
    if counts.device.type == "cpu":
        counts += torch.bincount(cells.flatten(), minlength=counts.numel()).view_as(counts)
    else:
        counts.view(-1).scatter_add_(0, cells.flatten(), torch.ones_like(cells).flatten())


def train_iou(counts: Tensor, *, binary: bool) -> float | None:
    """IoU from a confusion matrix of add_counts: of the object (binary), or the mean over classes that occur."""
    table = counts[:-1].cpu().double()
    hits = table.diagonal()
    union = table.sum(0) + table.sum(1) - hits
    first = 1 if binary else 0
    iou = (hits / union)[first:][union[first:] > 0]
    return float(iou.mean()) if len(iou) else None


class LossWatch:
    """Looks at losses now and then, so that the device is not waited for at every step."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.recent: deque[tuple[Tensor, tuple[str, ...], int, float]] = deque()

    def see(self, value: Tensor, batch: Named, learner: Learner) -> bool:
        """Remember a loss; True when it was time to look."""
        lr = learner.optimiser.param_groups[0]["lr"]
        self.recent.append((value, batch.names, learner.progress.step, lr))
        if len(self.recent) < self.every:
            return False
        self.check()
        return True

    def check(self) -> None:
        """Stop at the first loss that is not finite."""
        values = torch.stack([value for value, *_ in self.recent]).tolist() if self.recent else []  # one wait for all
        for value, (_, names, step, lr) in zip(values, self.recent, strict=True):
            if not math.isfinite(value):
                raise TrainingStopped(
                    f"the loss became {value} at step {step}, learning rate {lr:.3g}, "
                    f"with the files {', '.join(sorted(set(names)))}. {LOWER}, or look at these files; {GOES_ON}."
                )
        self.recent.clear()


def fit(
    learner: Learner,
    config: ModelConfig,
    batches: TrainingBatches,
    val_sets: Mapping[str, EvaluationSet],
    loss: LossFunction,
    options: FitOptions,
    run: RunFolder | None,
    report: Callable[[str], None] = lambda _: None,
) -> None:
    """Train until the last epoch or until nothing improves; every epoch is scored, logged and saved.

    Args:
        val_sets: by name, the main one first unless options.weighted.
        loss: of the samples that this process has; several processes add its sums.
        run: where to write; None in all processes but the first.
        report: takes one line for each epoch.

    Raises:
        TrainingStopped: the loss or a probability is not finite.
        MemoryExhausted: the device is out of memory.
        OSError: a checkpoint could not be written; the previous one is whole.
    """
    forward = torch_forward(learner.network, str(learner.accelerator.device))
    progress, processes, workers = learner.progress, learner.processes, batches.workers
    shared = processes.shared_loss(loss)
    main = MEAN_NAME if options.weighted else next(iter(val_sets))
    while not is_finished(progress, options):
        begin = time.perf_counter()
        batches.set_epoch(progress.epoch)
        processes.start_epoch(batches.sampler.seed, progress.epoch)
        lr = learner.schedule.at(progress.epoch * learner.schedule.steps)
        train = train_one_epoch(learner, batches, shared, options, config.num_logits)
        with learner.averaged():
            scores = score_sets(forward, val_sets, loss, options, progress.epoch + 1, workers, processes)
        result = deciding_scores(scores, val_sets, options)
        improved = note_epoch(learner, result, options)
        if result:
            config = replace(config, thresholds=_thresholds(result.summary))
        row = _epoch_row(progress.epoch, lr, train, scores, time.perf_counter() - begin)
        if options.weighted:
            row["score"] = result and _scores_of(result)
        panels = {
            name: shared_panels(result.worst, config, processes, options.keep_worst) for name, result in scores.items()
        }
        if run is None:
            continue
        run.log_epoch(row)
        for name, pictures in panels.items():
            run.log_images(f"worst {name}", pictures, progress.epoch)
        save_epoch(learner, config, run, improved)
        report(epoch_line(row, options.epochs, main, run.best_path.name if improved else None, options.monitor))
        if progress.epoch == 1:
            report(waiting_line(train["waited"], workers * processes.on_machine))


def score_sets(
    forward: Forward,
    val_sets: Mapping[str, EvaluationSet],
    loss: LossFunction,
    options: FitOptions,
    epoch: int,
    workers: int,
    processes: Processes = ALONE,
) -> dict[str, Evaluation]:
    """Score the main validation set, and in every few epochs and the last one the further ones.

    Raises:
        TrainingStopped: the network answers with what is no number.
    """
    due = epoch % options.further_every == 0 or epoch == options.epochs
    main = [] if options.weighted else [next(iter(val_sets))]
    try:
        return {
            name: score_set(
                forward,
                data,
                workers=workers,
                description=f"scoring {name}",
                empty=options.empty,
                loss=loss,
                keep_worst=options.keep_worst,
                processes=processes,
            )
            for name, data in val_sets.items()
            if due or name in main
        }
    except NotFiniteError as error:
        raise TrainingStopped(f"{error}, after the training of epoch {epoch}. {LOWER}; {GOES_ON}.") from error


def deciding_scores(
    scores: Mapping[str, Evaluation], val_sets: Mapping[str, EvaluationSet], options: FitOptions
) -> Evaluation | None:
    """What the best epoch and `plateau` are chosen by: the main set, or the mean over all; None in epochs without."""
    if not options.weighted:
        return scores[next(iter(val_sets))]
    return weighted_mean(scores, {name: len(data) for name, data in val_sets.items()}) if scores else None


def is_finished(progress: Progress, options: FitOptions) -> bool:
    """Whether all epochs are done, or early stopping has ended the run."""
    stands_still = options.patience and progress.epoch - progress.best_epoch >= options.patience
    return progress.epoch >= options.epochs or bool(stands_still)


def note_epoch(learner: Learner, result: Evaluation | None, options: FitOptions) -> bool:
    """Count an epoch, let the schedule see its monitored value, and tell whether it is the best so far.

    An epoch without scores is neither good nor bad: `plateau` does not see it.
    """
    progress = learner.progress
    if result is None:
        progress.epoch += 1
        return False
    value = result.loss if options.monitor == "loss" else result.summary[options.monitor]
    sign = -1 if options.monitor == "loss" else 1
    score = -math.inf if value is None else sign * value  # more is better
    improved = progress.best is None or score > progress.best
    progress.epoch += 1
    if improved:
        progress.best, progress.best_epoch = score, progress.epoch
        learner.best = result.summary
    learner.schedule.after_epoch(sign * score)
    return improved


def save_epoch(learner: Learner, config: ModelConfig, run: RunFolder, improved: bool) -> None:
    """Save the best network if this one is it, then the whole state; a kill between the two repeats the epoch."""
    progress, network = learner.progress, learner.network
    if improved:
        with learner.averaged():
            save_checkpoint(run.best_path, config, network.state_dict(), epoch=progress.epoch, max_score=progress.best)
    save_checkpoint(run.last_path, config, network.state_dict(), **learner.state())


def waiting_line(share: float, workers: int) -> str:
    """What the loader costs, and what to do about it."""
    text = f"{share:.0%} of the training time went into waiting for the loader (-w {workers})"
    more = min(os.cpu_count() or 1, max(1, workers * 2))
    return f"{text}; try -w {more}" if share > MUCH_WAITING and more > workers else text


def _thresholds(summary: dict[str, Any]) -> dict[str, float]:
    best = summary["best"]
    return {"default": 0.5, **({"best": best["threshold"]} if best else {})}


def _epoch_row(
    epoch: int, lr: float, train: dict[str, Any], scores: dict[str, Evaluation], seconds: float
) -> dict[str, Any]:
    val = {
        name: {**_scores_of(result), "classes": {row["name"]: row["iou"] for row in result.summary["per_class"]}}
        for name, result in scores.items()
    }
    return {
        "epoch": epoch,
        "lr": lr,
        "train": {"loss": train["loss"], "iou": train["iou"]},
        "val": val,
        "seconds": round(seconds, 2),
        "waited": round(train["waited"], 3),
    }


def _scores_of(result: Evaluation) -> dict[str, float | None]:
    return {"loss": result.loss, "iou": result.summary["iou"], "dice": result.summary["dice"]}


def epoch_line(row: dict[str, Any], epochs: int, main: str, saved: str | None, monitor: str) -> str:
    """One line of text about an epoch: losses, scores, and what improved and was saved."""

    def show(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    parts = [f"epoch {row['epoch']}/{epochs}  lr {row['lr']:.2e}"]
    parts.append(f"train loss {show(row['train']['loss'])} iou {show(row['train']['iou'])}")
    shown = dict(row["val"])
    if row.get("score"):
        shown = {MEAN_NAME: row["score"], **shown}
    for name, scores in shown.items():
        parts.append(f"{name} loss {show(scores['loss'])} iou {show(scores['iou'])} dice {show(scores['dice'])}")
    parts.append(f"{row['seconds']:.1f} s")
    if saved:
        parts.append(f"{main} {monitor} improved, saved {saved}")
    return "  ".join(parts)
