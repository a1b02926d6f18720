"""Whole slides through the one engine: predicted band by band as predict.py does, scored band by band as they come.

Slides are scored on the grid of the network's scale, which is the one that predict.py writes. Nothing here holds more
than a band of a slide. Counts and losses are sums over pixels, so they are those of the whole slide at once. Filters of
objects need more than one pass: classes and truth wait for them on the disk.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from backends import Forward
from checkpoint import ModelConfig
from classes import ClassMap
from image_io import IGNORE_INDEX
from metrics import Scorer
from outputs import decide
from pairing import DatasetError, Pair
from postprocess import Filters, filter_bands
from predictor import Picture, Plan, ReadOptions, TileOptions, plan_picture, predict_picture
from slide_index import slide_tissue
from slide_windows import SlideOptions, SlidePair
from slide_writer import Job, Layer, open_job

LOSS_PIXELS = 1 << 22  # that a loss is computed of at a time

LossFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Filtering:
    """Filters of a slide's objects, and a folder of their own for what waits on the disk until it is scored."""

    filters: Filters
    folder: Path


@dataclass(frozen=True)
class SlidePrediction:
    """A slide on its way through the network; `bands` can be gone through once, while the slide is open.

    bands: (first row, probabilities (K, h, W) float32, class indices (h, W) uint8 or None without a mask).
    filtering: what is done to the predicted classes before they are scored; None: nothing.
    """

    pair: Pair
    picture: Picture
    plan: Plan
    bands: Iterator[tuple[int, np.ndarray, np.ndarray | None]]
    filtering: Filtering | None = None

    @property
    def has_mask(self) -> bool:
        """Whether it can be scored."""
        return self.pair.mask is not None


@contextmanager
def predict_slide(
    forward: Forward, pair: Pair, classes: ClassMap, config: ModelConfig, *, description: str = ""
) -> Iterator[SlidePrediction]:
    """Open a slide and predict it as its bands are asked for, with the tiles of the checkpoint and its tissue rule.

    Raises:
        DatasetError: the network sees whole images resized.
        ImageError: the slide or its mask cannot be used.
    """
    geometry, options = config.geometry, SlideOptions.from_config(config)
    if geometry.kind != "crops":
        raise DatasetError(f"{pair.image} is a slide: a network that sees whole images resized cannot predict it")
    tiles = TileOptions.from_config(config)
    with Picture(pair, [config], ReadOptions()) as picture, SlidePair(pair, options, config.mean) as slide:
        plan = plan_picture(picture, tiles)
        tissue = slide_tissue(slide, slide.options.tissue)
        if tissue is not None:
            plan = replace(plan, tissue=tissue, keep=tissue.tiles(plan.rows, plan.cols))
        total = round(picture.height * picture.width / 1e6, 2)
        title = f"{description} {pair.name}".strip()
        with tqdm(total=total, desc=title, leave=False, disable=not description or None, unit="MP") as bar:
            probs = predict_picture(
                picture, forward, plan, tiles, count=lambda pixels: bar.update(pixels / 1e6) and None
            )
            try:
                yield SlidePrediction(pair, picture, plan, _with_truth(probs, picture, slide, classes, plan))
            finally:
                probs.close()


def _with_truth(
    bands: Iterator[tuple[int, np.ndarray]], picture: Picture, slide: SlidePair, classes: ClassMap, plan: Plan
) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
    for top, probs in bands:
        mask, height = None, probs.shape[1]
        if slide.mask is not None:
            window = top, 0, height, slide.width
            mask = slide.labels(classes, *window)
            outside = slide.outside(*window)
            if outside is not None:
                mask[outside] = IGNORE_INDEX
            for left, right in columns_read(plan, top, height):
                valid = picture.valid(top, height, left, right - left)
                if valid is not None:
                    mask[:, left:right][~valid] = IGNORE_INDEX
        yield top, probs, mask


def columns_read(plan: Plan, top: int, height: int) -> list[tuple[int, int]]:
    """The columns, first and end, that the network sees of some rows; others need no decoding to be background."""
    rows, cols = plan.rows, plan.cols
    if plan.keep is None:
        return [(0, cols.size)]
    begin = np.array(rows.origins)
    kept = plan.keep[(begin < top + height) & (begin + rows.tile > top)].any(axis=0)
    seen = np.zeros(cols.size + 2, bool)
    for place in np.flatnonzero(kept):
        seen[1 + cols.origins[place] : 1 + min(cols.origins[place] + cols.tile, cols.size)] = True
    edges = np.flatnonzero(seen[1:] != seen[:-1]).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


@dataclass
class WorstTile:
    """The part of a slide with the most wrong pixels: probabilities (K, h, w), mask (h, w), where it is."""

    errors: int = -1
    corner: tuple[int, int] = (0, 0)
    probs: np.ndarray | None = None
    mask: np.ndarray | None = None

    def see(self, top: int, probs: np.ndarray, mask: np.ndarray, side: int, threshold: float) -> None:
        """Look at a band in parts of `side` columns."""
        wrong = (decide(probs, threshold) != mask) & (mask != IGNORE_INDEX)
        by_part = np.add.reduceat(wrong.sum(axis=0), np.arange(0, mask.shape[1], side))
        part = int(by_part.argmax())
        if by_part[part] > self.errors:
            columns = np.s_[..., part * side : (part + 1) * side]
            self.errors, self.corner = int(by_part[part]), (top, part * side)
            self.probs, self.mask = probs[columns].copy(), mask[columns].copy()


@dataclass(frozen=True)
class SlideScore:
    """What scoring a slide gives: its scores as Scorer.update, its loss, and (mask, probabilities, image) to show."""

    scores: dict[str, float | None]
    loss: float | None
    worst: tuple[np.ndarray, np.ndarray, np.ndarray] | None


def score_slide(
    prediction: SlidePrediction, scorer: Scorer, *, loss: LossFunction | None = None, show: bool = False
) -> SlideScore:
    """Count a slide as its bands come; where objects are filtered, the sweep over thresholds is of all of them.

    Args:
        loss: also computed where it is made of sums over pixels, as those of losses.py are; it is then that of the
            whole slide.
        show: also find its worst tile, as it is before objects are filtered.

    Raises:
        JobError, OSError: classes cannot be kept on the disk until they are filtered.
    """
    worst, sums = WorstTile(), LossSums(loss)
    side = prediction.picture.configs[0].geometry.tile

    def parts() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for top, probs, mask in prediction.bands:
            assert mask is not None, f"{prediction.pair.image} has no mask"
            sums.add(probs, mask)
            if show:
                worst.see(top, probs, mask, side, scorer.threshold)
            yield probs, mask

    if prediction.filtering is None:
        scores = scorer.update_parts(prediction.pair.name, parts())
    else:
        scores = _count_filtered(prediction, prediction.filtering, scorer, parts())
    if worst.probs is None or worst.mask is None:
        return SlideScore(scores, sums.value(), None)
    image = prediction.picture.pixels(*worst.corner, *worst.mask.shape)
    return SlideScore(scores, sums.value(), (worst.mask, worst.probs, image))


def _count_filtered(
    prediction: SlidePrediction,
    filtering: Filtering,
    scorer: Scorer,
    parts: Iterator[tuple[np.ndarray, np.ndarray]],
) -> dict[str, float | None]:
    """What Scorer.update does with filtered classes, for a slide in parts: nothing is counted when one fails."""
    name, size = prediction.pair.name, (prediction.picture.height, prediction.picture.width)
    layers = [Layer(each, *size, 1, np.uint8, "nearest", pyramid=False) for each in ("classes", "truth")]
    unfiltered, filtered = _empty_copy(scorer), _empty_copy(scorer)
    job = open_job(filtering.folder, uuid4().hex, layers)  # what a killed run left there is of no use
    try:
        unfiltered.update_parts(name, _spooled(parts, job, scorer.threshold))
        bands = filter_bands(lambda: job.bands("classes"), filtering.filters)
        for pred, mask in pair_rows(bands(), job.bands("truth")):
            filtered.update_pred(name, pred, mask)
    finally:
        job.remove()
    filtered.names, filtered.image_counts = [name], [np.sum(filtered.image_counts, axis=0)]
    filtered.histogram = unfiltered.histogram
    scorer.merge(filtered)
    return {key: value for key, value in filtered.rows()[0].items() if key != "name"}


def _empty_copy(scorer: Scorer) -> Scorer:
    """A scorer of the same kind that has counted nothing."""
    return Scorer(
        scorer.class_names,
        binary=scorer.binary,
        threshold=scorer.threshold,
        empty=scorer.empty,
        has_background=scorer.has_background,
    )


def _spooled(
    parts: Iterator[tuple[np.ndarray, np.ndarray]], job: Job, threshold: float
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Hand on the bands of a slide, and keep their classes and truth."""
    for probs, mask in parts:
        job.append({"classes": decide(probs, threshold), "truth": mask})
        yield probs, mask


def pair_rows(
    bands: Iterable[tuple[int, np.ndarray]], others: Iterable[tuple[int, np.ndarray]]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same rows of two rasters (h, W) whose bands end at different rows, a part at a time."""
    left = iter(others)
    rest: np.ndarray | None = None
    for _, band in bands:
        while len(band):
            if rest is None or not len(rest):
                rest = next(left)[1]
            count = min(len(band), len(rest))
            yield band[:count], rest[:count]
            band, rest = band[count:], rest[count:]  # what is left of them


class LossSums:
    """The loss of an image that comes in parts."""

    def __init__(self, loss: LossFunction | None) -> None:
        self.loss: Any = loss if hasattr(loss, "sums") and hasattr(loss, "from_sums") else None
        self.total: Tensor | None = None

    def add(self, probs: np.ndarray, mask: np.ndarray) -> None:
        """Add probabilities (K, h, W) against their mask (h, W)."""
        if self.loss is None or not (mask != IGNORE_INDEX).any():
            return
        step = max(1, LOSS_PIXELS // mask.shape[0])
        with torch.inference_mode():
            for left in range(0, mask.shape[1], step):
                columns = np.s_[..., left : left + step]
                truth = torch.from_numpy(np.ascontiguousarray(mask[columns]))[None].long()
                sums = self.loss.sums(logits_of(np.ascontiguousarray(probs[columns])), truth).double()
                self.total = sums if self.total is None else self.total + sums

    def value(self) -> float | None:
        """The loss; None when no pixel counts or it is not made of sums."""
        return None if self.total is None else float(self.loss.from_sums(self.total))


def logits_of(probs: np.ndarray) -> Tensor:
    """Logits (1, K, H, W) that give probabilities (K, H, W) back: their logarithms, or log odds for one class."""
    values = torch.from_numpy(probs)[None].clamp(1e-7, 1 - 1e-7)
    return values.logit() if probs.shape[0] == 1 else values.log()
