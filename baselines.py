"""Scores of what needs no network, to hold a network's against."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from skimage.filters import threshold_otsu

from classes import ClassMap
from dataset import EvaluationSet, load_image, load_mask, load_region
from evaluation import build_scorer
from image_io import IGNORE_INDEX
from metrics import score_text

LEFT_OUT = "baselines are left out: they are for one class, and there are several"


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
        bright = grey > threshold_otsu(grey)
        scorers["all foreground"].update_pred(pair.name, np.ones_like(mask), mask)
        counted = mask != IGNORE_INDEX
        truth = mask == 1
        fits = [(side & truth & counted).sum() / max(1, ((side | truth) & counted).sum()) for side in (bright, ~bright)]
        scorers["Otsu"].update_pred(pair.name, bright if fits[0] >= fits[1] else ~bright, mask)
    return {name: scorer.summary() for name, scorer in scorers.items()}


def baseline_lines(summaries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line of text for each baseline."""
    return [
        f"for comparison: {name} IoU {score_text(scores['iou'])} Dice {score_text(scores['dice'])}"
        for name, scores in summaries.items()
    ]
