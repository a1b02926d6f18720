"""Fit a network, and evaluate it: the one evaluation that train.py and validate.py share."""

import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from backends import Forward, out_of_memory, torch_forward
from checkpoint import ModelConfig, load_checkpoint, save_checkpoint
from dataset import Batch, EvaluationSet, Sample, TrainingBatches, evaluation_loader, load_image
from image_io import IGNORE_INDEX, resize_image
from metrics import Scorer
from optim import Schedule, ScheduleOptions, build_optimiser
from outputs import clear_outside, decide
from pairing import Pair
from plots import sample_panel
from run_folder import RunFolder
from slide_scoring import LossFunction, SlidePrediction, logits_of, predict_slide, score_slide
from tiling import predict_tiled

MUCH_WAITING = 0.1  # share of the time above which more loader processes are suggested


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says at which step, with which learning rate and files."""


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


@dataclass(frozen=True)
class Prediction:
    """Probabilities (K, H, W) float32 of one image at its original size, with its mask (H, W) uint8 or None.

    pred: class indices (H, W) that somebody decided on; None leaves it to the scorer.
    """

    sample: Sample
    probs: np.ndarray
    mask: np.ndarray | None
    pred: np.ndarray | None = None


def predict_samples(
    forward: Forward, data: EvaluationSet, *, workers: int, description: str = ""
) -> Iterator[Prediction | SlidePrediction]:
    """Predict whole images in order, as the geometry of the checkpoint says; then slides, each while it is open.

    `resize`: probabilities are resized back to the image's size. `crops`: native scale, in tiles where the image is
    larger than one. Outside the region where pixels count everything is background.
    """
    images = data.without_slides()
    if len(images):
        yield from _predict_images(forward, images, workers=workers, description=description)
    for pair in data.slide_pairs():
        with predict_slide(forward, pair, data.classes, data.config, description=description) as prediction:
            yield prediction


def _predict_images(forward: Forward, data: EvaluationSet, *, workers: int, description: str) -> Iterator[Prediction]:
    config = data.config
    loader = evaluation_loader(data, config.batch, workers)
    with tqdm(total=len(data), desc=description, leave=False, disable=not description or None, unit="img") as bar:
        for samples in loader:
            predict = _predict_resized if config.geometry.kind == "resize" else _predict_native
            for sample, probs in zip(samples, predict(forward, samples, config), strict=True):
                mask = None if sample.mask is None else sample.mask.numpy()
                if sample.region is not None:
                    clear_outside(probs, sample.region.numpy(), has_background=0 not in config.labels)
                yield Prediction(sample, probs, mask)
            bar.update(len(samples))


def _predict_resized(forward: Forward, samples: Sequence[Sample], _: ModelConfig) -> Iterator[np.ndarray]:
    for sample, probs in zip(samples, forward(np.stack([s.tensor.numpy() for s in samples])), strict=True):
        if not np.isfinite(probs).all():
            raise ValueError(f"{sample.pair.image}: the network's probabilities are not finite")
        yield np.ascontiguousarray(resize_image(probs.transpose(1, 2, 0), sample.size).transpose(2, 0, 1))


def _predict_native(forward: Forward, samples: Sequence[Sample], config: ModelConfig) -> Iterator[np.ndarray]:
    geometry = config.geometry
    for sample in samples:
        try:
            probs = predict_tiled(
                sample.tensor.numpy(),
                forward,
                tile=geometry.tile,
                overlap=geometry.overlap,
                halo=geometry.halo,
                stride=config.stride,
                min_side=config.min_side,
                batch_size=config.tile_batch,
                window=geometry.window,
                tta=geometry.tta,
            )
        except RuntimeError as error:
            raise RuntimeError(f"{sample.pair.image}: {error}") from error
        yield probs


class Worst(NamedTuple):
    """An image with a low IoU (2: undefined); of a slide its worst tile, with the pixels of `image`."""

    iou: float
    pair: Pair
    mask: np.ndarray
    probs: np.ndarray
    image: np.ndarray | None = None


@dataclass
class Evaluation:
    """Scores of one validation set: the loss, the summary of the scorer, and the worst images of all."""

    loss: float | None
    summary: dict[str, Any]
    worst: list[Worst] = field(default_factory=list)


def evaluate(
    predictions: Iterable[Prediction | SlidePrediction],
    scorer: Scorer,
    *,
    loss: LossFunction | None = None,
    keep_worst: int = 0,
) -> Evaluation:
    """Score predictions against their masks.

    Args:
        loss: also computed, for each image whole, from its probabilities; the mean over images is reported.
        keep_worst: how many of the images with the lowest IoU to keep, with truth and prediction.
    """
    losses: list[float | None] = []
    worst: list[Worst] = []

    def note(scores: dict[str, float | None], *shown: Any) -> None:
        iou = 2.0 if scores["iou"] is None else scores["iou"]
        if keep_worst and (len(worst) < keep_worst or iou < worst[-1].iou):
            worst.append(Worst(iou, *shown))
            worst[:] = sorted(worst, key=lambda item: item.iou)[:keep_worst]

    for prediction in predictions:
        if isinstance(prediction, SlidePrediction):
            if not prediction.has_mask:
                deque(prediction.bands, maxlen=0)
                continue
            slide = score_slide(prediction, scorer, loss=loss, show=keep_worst > 0)
            losses.append(slide.loss)
            if slide.worst:
                note(slide.scores, prediction.pair, *slide.worst)
            continue
        probs, mask = prediction.probs, prediction.mask
        if mask is None:
            continue
        scores = scorer.update(prediction.sample.pair.name, probs, mask, prediction.pred)
        if loss is not None and (mask != IGNORE_INDEX).any():
            losses.append(loss_of_probs(loss, probs, mask))
        note(scores, prediction.sample.pair, mask, probs)
    known = [value for value in losses if value is not None]
    return Evaluation(float(np.mean(known)) if known else None, scorer.summary(), worst)


def loss_of_probs(loss: LossFunction, probs: np.ndarray, mask: np.ndarray) -> float:
    """Loss of one image (K, H, W) from its probabilities: their logarithms are logits that give them back."""
    with torch.inference_mode():
        return float(loss(logits_of(probs), torch.from_numpy(mask)[None].long()))


def build_scorer(config: ModelConfig, *, threshold: float = 0.5, empty: str = "skip") -> Scorer:
    """A scorer for the classes of a checkpoint."""
    return Scorer(
        config.class_names,
        binary=config.num_logits == 1,
        threshold=threshold,
        empty=empty,
        has_background=0 not in config.labels,
    )


# ----------------------------------------------------------------------------------------------------------------------
# Training


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
    watch = _LossWatch(every=1 if device.type == "cpu" else 20)
    position = learner.progress.epoch * learner.schedule.steps  # of the schedule, right on resume with another batch
    learner.model.train()
    groups = _groups(batches, options.accumulate)
    with tqdm(total=len(batches), desc=f"epoch {learner.progress.epoch + 1}", leave=False, disable=None) as bar:  # type: ignore[arg-type]
        while True:
            asked = time.perf_counter()
            group = next(groups, None)
            waited += time.perf_counter() - asked
            if group is None:
                break
            learner.schedule.before_step(position)
            position += 1
            whole = sum(len(batch.names) for batch in group)
            for batch in group:
                share = len(batch.names) / whole
                step_loss = _backward(learner, batch, loss, counts, share, batch is group[-1], options)
                total += step_loss * len(batch.names)
                samples += len(batch.names)
                if watch.see(step_loss, batch, learner):
                    iou = train_iou(counts, binary=binary) or 0
                    bar.set_postfix(loss=f"{total.item() / samples:.4f}", iou=f"{iou:.3f}")
                bar.update()
            _update(learner, options)
    watch.check()
    waited /= max(time.perf_counter() - begin, 1e-9)
    return {"loss": total.item() / max(1, samples), "iou": train_iou(counts, binary=binary), "waited": waited}


def _groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Batches that share one optimiser step; the last group may be smaller."""
    group: list[Batch] = []
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
    try:
        images = batch.images.to(device, non_blocking=True, memory_format=layout)
        masks = batch.masks.to(device, non_blocking=True).long()
        with nullcontext() if last else accelerator.no_sync(learner.model):
            with accelerator.autocast():
                logits = learner.model(images)
            value = loss(logits.float(), masks)
            accelerator.backward(value * share)
        add_counts(counts, logits.detach(), masks)
    except torch.cuda.OutOfMemoryError as error:
        raise TrainingStopped(out_of_memory(tuple(batch.images.shape))) from error
    return value.detach()


def _update(learner: Learner, options: FitOptions) -> None:
    if options.clip:
        learner.accelerator.clip_grad_norm_(learner.model.parameters(), options.clip)
    learner.optimiser.step()
    learner.optimiser.zero_grad(set_to_none=True)
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


class _LossWatch:
    """Looks at losses now and then, so that the device is not waited for at every step."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.recent: deque[tuple[Tensor, tuple[str, ...], int, float]] = deque()

    def see(self, value: Tensor, batch: Batch, learner: Learner) -> bool:
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
                    f"with the files {', '.join(sorted(set(names)))}. Lower -lr, add --clip 1, or look at these files; "
                    "the last finished epoch is kept and the same command goes on from it."
                )
        self.recent.clear()


def fit(
    learner: Learner,
    config: ModelConfig,
    batches: TrainingBatches,
    val_sets: Mapping[str, EvaluationSet],
    loss: LossFunction,
    options: FitOptions,
    run: RunFolder,
    report: Callable[[str], None] = lambda _: None,
) -> None:
    """Train until the last epoch or until nothing improves; every epoch is scored, logged and saved.

    Args:
        val_sets: by name, the main one first.
        report: takes one line for each epoch.

    Raises:
        TrainingStopped: the loss is not finite, or the device is out of memory.
        OSError: a checkpoint could not be written; the previous one is whole.
    """
    forward = torch_forward(learner.network, str(learner.accelerator.device))
    progress, main, workers = learner.progress, next(iter(val_sets)), batches.workers
    while not is_finished(progress, options):
        begin = time.perf_counter()
        batches.set_epoch(progress.epoch)
        lr = learner.schedule.at(progress.epoch * learner.schedule.steps)
        train = train_one_epoch(learner, batches, loss, options, config.num_logits)
        scores = {
            name: evaluate(
                predict_samples(forward, data, workers=workers, description=f"scoring {name}"),
                build_scorer(config, empty=options.empty),
                loss=loss,
                keep_worst=options.keep_worst,
            )
            for name, data in val_sets.items()
        }
        improved = note_epoch(learner, scores[main], options)
        config = replace(config, thresholds=_thresholds(scores[main].summary))
        row = _epoch_row(progress.epoch, lr, train, scores, time.perf_counter() - begin)
        run.log_epoch(row)
        for name, result in scores.items():
            run.log_images(f"worst {name}", worst_panels(result.worst, config), progress.epoch)
        save_epoch(learner, config, run, improved)
        report(epoch_line(row, options.epochs, main, run.best_path.name if improved else None, options.monitor))
        if progress.epoch == 1:
            report(waiting_line(train["waited"], workers))


def is_finished(progress: Progress, options: FitOptions) -> bool:
    """Whether all epochs are done, or early stopping has ended the run."""
    stands_still = options.patience and progress.epoch - progress.best_epoch >= options.patience
    return progress.epoch >= options.epochs or bool(stands_still)


def note_epoch(learner: Learner, result: Evaluation, options: FitOptions) -> bool:
    """Count an epoch, let the schedule see its monitored value, and tell whether it is the best so far."""
    progress = learner.progress
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
    progress, weights = learner.progress, learner.network.state_dict()
    if improved:
        save_checkpoint(run.best_path, config, weights, epoch=progress.epoch, max_score=progress.best)
    save_checkpoint(run.last_path, config, weights, **learner.state())


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
        name: {
            "loss": result.loss,
            "iou": result.summary["iou"],
            "dice": result.summary["dice"],
            "classes": {row["name"]: row["iou"] for row in result.summary["per_class"]},
        }
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


def epoch_line(row: dict[str, Any], epochs: int, main: str, saved: str | None, monitor: str) -> str:
    """One line of text about an epoch: losses, scores, and what improved and was saved."""

    def show(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    parts = [f"epoch {row['epoch']}/{epochs}  lr {row['lr']:.2e}"]
    parts.append(f"train loss {show(row['train']['loss'])} iou {show(row['train']['iou'])}")
    for name, scores in row["val"].items():
        parts.append(f"{name} loss {show(scores['loss'])} iou {show(scores['iou'])} dice {show(scores['dice'])}")
    parts.append(f"{row['seconds']:.1f} s")
    if saved:
        parts.append(f"{main} {monitor} improved, saved {saved}")
    return "  ".join(parts)


def worst_panels(worst: Sequence[Worst], config: ModelConfig, threshold: float = 0.5) -> list[np.ndarray]:
    """Pictures of the images with the lowest IoU: image, prediction, truth, difference."""
    panels = []
    for iou, pair, mask, probs, image in worst:
        if image is None:
            image, _ = load_image(pair, config.channels, ())
        title = f"{pair.name}  IoU {'-' if iou > 1 else f'{iou:.3f}'}"
        pred = decide(probs, threshold)
        panels.append(sample_panel(image, mask, pred, probs, config.class_names, title))
    return panels
