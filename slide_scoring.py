"""Whole slides through the one engine: predicted band by band as predict.py does, scored band by band as they come.

Slides are scored on the grid of the network's scale, which is the one that predict.py writes. Nothing here holds more
than a band of a slide. Counts and losses are sums over pixels, so they are those of the whole slide at once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

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
from predictor import Picture, Plan, ReadOptions, TileOptions, plan_picture, predict_picture
from slide_index import slide_tissue
from slide_windows import SlideOptions, SlidePair

LOSS_PIXELS = 1 << 22  # that a loss is computed of at a time

LossFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class SlidePrediction:
    """A slide on its way through the network; `bands` can be gone through once, while the slide is open.

    bands: (first row, probabilities (K, h, W) float32, class indices (h, W) uint8 or None without a mask).
    """

    pair: Pair
    picture: Picture
    plan: Plan
    bands: Iterator[tuple[int, np.ndarray, np.ndarray | None]]

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
                yield SlidePrediction(pair, picture, plan, _with_truth(probs, picture, slide, classes))
            finally:
                probs.close()


def _with_truth(
    bands: Iterator[tuple[int, np.ndarray]], picture: Picture, slide: SlidePair, classes: ClassMap
) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
    for top, probs in bands:
        mask = None
        if slide.mask is not None:
            window = top, 0, probs.shape[1], slide.width
            mask = slide.labels(classes, *window)
            outside = slide.outside(*window)
            if outside is not None:
                mask[outside] = IGNORE_INDEX
            valid = picture.valid(top, probs.shape[1])
            if valid is not None:
                mask[~valid] = IGNORE_INDEX
        yield top, probs, mask


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
    """Count a slide as its bands come.

    Args:
        loss: also computed where it is made of sums over pixels, as those of losses.py are; it is then that of the
            whole slide.
        show: also find its worst tile.
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

    scores = scorer.update_parts(prediction.pair.name, parts())
    if worst.probs is None or worst.mask is None:
        return SlideScore(scores, sums.value(), None)
    image = prediction.picture.pixels(*worst.corner, *worst.mask.shape)
    return SlideScore(scores, sums.value(), (worst.mask, worst.probs, image))


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
