"""Predict labelled sets and score them: the one evaluation that train.py and validate.py share."""

import copy
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from backends import Forward
from checkpoint import ModelConfig
from dataset import EvaluationSet, Sample, evaluation_loader, load_image
from image_io import IGNORE_INDEX, resize_image
from metrics import Scorer
from outputs import clear_outside, decide
from pairing import Pair
from plots import sample_panel
from processes import ALONE, Processes
from run_folder import shrink_panel
from shared_batches import part_of_set
from slide_scoring import LossFunction, SlidePrediction, logits_of, predict_slide, score_slide
from tiling import NotFiniteError, predict_tiled


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
            raise NotFiniteError(f"{sample.pair.image}: the network's probabilities are not finite")
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
            kind = NotFiniteError if isinstance(error, NotFiniteError) else RuntimeError
            raise kind(f"{sample.pair.image}: {error}") from error
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
    """Scores of one validation set: the loss, the summary of the scorer, the worst images of all, and the scorer."""

    loss: float | None
    summary: dict[str, Any]
    worst: list[Worst] = field(default_factory=list)
    scorer: Scorer | None = None


def evaluate(
    predictions: Iterable[Prediction | SlidePrediction],
    scorer: Scorer,
    *,
    loss: LossFunction | None = None,
    keep_worst: int = 0,
    processes: Processes = ALONE,
) -> Evaluation:
    """Score predictions against their masks.

    Args:
        processes: each has predictions of its own images; the scores, not the worst images, are those of all.
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
    shares = processes.gather((losses, scorer))
    scorer = shares[0][1]
    for _, other in shares[1:]:
        scorer.merge(other)
    known = [value for share, _ in shares for value in share if value is not None]
    return Evaluation(float(np.mean(known)) if known else None, scorer.summary(), worst, scorer)


def weighted_mean(results: Mapping[str, Evaluation], sizes: Mapping[str, int]) -> Evaluation:
    """Several sets as one: IoU, Dice and loss are means over the sets, everything else is of their pooled counts.

    Args:
        sizes: images of each set, by name. They are its weight, as shares that sum to 1 over the sets that are scored;
            a set whose value is undefined is left out of that mean.
    """
    scorers = [result.scorer for result in results.values() if result.scorer]
    pooled = copy.deepcopy(scorers[0])
    for scorer in scorers[1:]:
        pooled.merge(scorer)

    def mean(values: dict[str, float | None]) -> float | None:
        known = {name: value for name, value in values.items() if value is not None}
        whole = sum(sizes[name] for name in known)
        return math.fsum(sizes[name] / whole * value for name, value in known.items()) if whole else None

    scores = {key: mean({name: result.summary[key] for name, result in results.items()}) for key in ("iou", "dice")}
    loss = mean({name: result.loss for name, result in results.items()})
    return Evaluation(loss, {**pooled.summary(), **scores}, scorer=pooled)


def score_set(
    forward: Forward,
    data: EvaluationSet,
    *,
    workers: int,
    empty: str,
    description: str = "",
    loss: LossFunction | None = None,
    keep_worst: int = 0,
    processes: Processes = ALONE,
) -> Evaluation:
    """Predict a set and score it, see predict_samples, evaluate and Scorer; several processes take a part each."""
    part, description = part_of_set(data, processes.rank, processes.world), description if processes.first else ""
    predictions, scorer = (
        predict_samples(forward, part, workers=workers, description=description),
        build_scorer(data.config, empty=empty),
    )
    return evaluate(predictions, scorer, loss=loss, keep_worst=keep_worst, processes=processes)


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


def shared_panels(
    worst: Sequence[Worst], config: ModelConfig, processes: Processes, keep_worst: int
) -> list[np.ndarray]:
    """Pictures of the images with the lowest IoU of all processes, small ones where there are several."""
    panels = worst_panels(worst, config)
    if processes.world == 1:
        return panels
    small = [(item.iou, shrink_panel(panel)) for item, panel in zip(worst, panels, strict=True)]
    shares = [shown for share in processes.gather(small) for shown in share]
    return [panel for _, panel in sorted(shares, key=lambda shown: shown[0])[:keep_worst]]


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
