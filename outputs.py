"""Predictions -> files: masks in the labels of training, probabilities, pictures, tables of scores."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint import ModelConfig
from image_io import write_image, write_mask, write_text
from metrics import SCORES, Scorer
from plots import sample_panel
from tables import format_csv


@dataclass(frozen=True)
class Outputs:
    """What is written for each image, and where."""

    folder: Path
    masks: bool = True
    binary: bool = False
    raw: bool = False
    plots: bool = False
    show: bool = False


def decide(probs: np.ndarray, threshold: float = 0.5) -> np.ndarray:
    """Class indices (H, W) uint8 from probabilities (K, H, W): p >= threshold for one class, else the largest."""
    if probs.shape[0] == 1:
        return (probs[0] >= np.float32(threshold)).astype(np.uint8)
    return probs.argmax(axis=0).astype(np.uint8)


def clear_outside(probs: np.ndarray, region: np.ndarray, *, has_background: bool) -> None:
    """Make background, in place, of what lies outside the region where pixels count; nothing is learned there.

    Args:
        probs: (K, H, W). region: (H, W) bool. has_background: class 0 of several is the background; without one
            the probabilities stay.
    """
    if probs.shape[0] == 1:
        probs[:, ~region] = 0
    elif has_background:
        probs[:, ~region] = 0
        probs[0, ~region] = 1


def write_prediction(outputs: Outputs, config: ModelConfig, name: str, probs: np.ndarray, pred: np.ndarray) -> None:
    """Write what was asked for, but plots.

    Args:
        name: file stem of the image.
        probs: (K, H, W) float32.
        pred: class indices (H, W) uint8.
    """
    if outputs.masks:
        write_mask(outputs.folder / "masks" / f"{name}.png", label_values(pred, config))
    if outputs.binary:
        write_mask(outputs.folder / f"{name}.png", pred * np.uint8(255))
    if outputs.raw:
        write_raw(outputs.folder / "raw", name, probs)


def label_values(pred: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Class indices (H, W) as the mask labels that training used; 255 for the object of `nonzero`."""
    labels = list(config.labels) or [255]
    values = labels if 0 in config.labels else [0, *labels]
    return np.array(values, np.uint8 if max(values) < 256 else np.uint16)[pred]


def write_raw(folder: Path, name: str, probs: np.ndarray) -> None:
    """Probabilities (K, H, W) as 16 bit, 65535 is 1; one class as PNG, several as bands of a TIFF."""
    scaled = np.round(np.clip(probs, 0, 1) * 65535).astype(np.uint16).transpose(1, 2, 0)
    write_image(folder / f"{name}{'.png' if scaled.shape[2] == 1 else '.tif'}", scaled)


def write_plot(
    outputs: Outputs,
    config: ModelConfig,
    name: str,
    *,
    image: np.ndarray,
    mask: np.ndarray | None,
    pred: np.ndarray,
    probs: np.ndarray,
    scores: Mapping[str, float | None] | None,
) -> None:
    """Write one panel: image, prediction, truth and difference, with IoU and Dice in its title and in the file name.

    Args:
        image: (H, W, C) as on disk. mask: class indices (H, W) or None.
        scores: of this image, see Scorer.update; None without a mask.
    """
    title = stem = name
    if scores is not None:
        title += f"  IoU {_show(scores['iou'])}  Dice {_show(scores['dice'])}"
        stem += f"_iou_{_show(scores['iou'])}_acc_{_show(scores['accuracy'])}"
    panel = sample_panel(image, mask, pred, probs, config.class_names, title)
    write_image(outputs.folder / "plots" / f"{stem}.png", panel)
    if outputs.show:
        from PIL import Image

        Image.fromarray(panel).show(title)


def _show(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def write_tables(folder: Path, scorer: Scorer, summary: Mapping[str, Any], decimal: str) -> None:
    """_metrics.csv with a row for each image, their mean and the pooled scores; _thresholds.csv for one class."""
    rows = [{"file": row["name"], **row} for row in scorer.rows()]
    rows.append({"file": "mean_vals", **summary["per_image_mean"]})
    rows.append({"file": "pooled", **summary})
    write_text(folder / "_metrics.csv", format_csv(["file", *SCORES], rows, decimal))
    if summary["sweep"]:
        write_text(folder / "_thresholds.csv", format_csv(["threshold", *SCORES], summary["sweep"], decimal))
