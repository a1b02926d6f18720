"""Scores of what needs no network, to hold a network's against."""

from typing import Any

import numpy as np

from classes import ClassMap
from dataset import EvaluationSet, load_image, load_mask, load_region
from image_io import IGNORE_INDEX
from trainer import build_scorer


def score_baselines(data: EvaluationSet, *, empty: str) -> dict[str, dict[str, Any]]:
    """Score what needs no network on the same images: all foreground, and Otsu's threshold of the grey picture.

    Otsu gets the better of its two polarities for each image by the truth, so it is flattered.

    Reference: Otsu 1979, A threshold selection method from gray-level histograms.
    """
    config = data.config
    scorers = {name: build_scorer(config, empty=empty) for name in ("all foreground", "Otsu")}
    classes = ClassMap.from_config(config)
    for pair in data.pairs:
        if pair.mask is None:
            continue
        image, valid = load_image(pair, config.channels, ())
        mask, grey = load_mask(pair, classes, load_region(pair, valid)), image[:, :, :3].mean(axis=2)
        bright = grey > otsu_threshold(grey)
        scorers["all foreground"].update_pred(pair.name, np.ones_like(mask), mask)
        counted = mask != IGNORE_INDEX
        truth = mask == 1
        fits = [(side & truth & counted).sum() / max(1, ((side | truth) & counted).sum()) for side in (bright, ~bright)]
        scorers["Otsu"].update_pred(pair.name, bright if fits[0] >= fits[1] else ~bright, mask)
    return {name: scorer.summary() for name, scorer in scorers.items()}


def otsu_threshold(grey: np.ndarray) -> float:
    """The value that splits a picture (H, W) into two groups with the largest variance between them."""
    counts, edges = np.histogram(grey, bins=256)
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)[:-1]
    above = below[-1] + counts[-1] - below
    sums = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = sums[:-1] / below - (sums[-1] - sums[:-1]) / above
        between = np.nan_to_num(below * above * gap**2)
    return float(edges[1 + int(between.argmax())])
