"""Contact sheets of augmented training samples, to judge with one's own eyes whether a preset is too strong."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

from augmentations import Augmentation
from dataset import Slot, TrainingSet
from image_io import write_image
from plots import class_colours, display_limits, overlay

TILE = 240  # pixels of the longer side of a shown sample
DRAWS = 4  # of every step, beside the sample as it is
GAP, HEADER = 4, 26


def write_sheets(folder: Path, data: TrainingSet, slots: Sequence[Slot]) -> list[Path]:
    """Write a sheet for each step of the preset alone, one of the mixing, and one of all together.

    A row is a sample of the training set, first as it is, then drawn anew DRAWS times with the mask over it.

    Args:
        folder: made if it is not there; sheets in it are written over.
        data: the training set with its preset.
        slots: the samples.

    Returns:
        The files, in the order in which the steps are done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    none = Augmentation("none", rgb=data.augmentation.rgb, value_range=(0, 1))
    plain = data.varied(none, mixed=False)
    steps = data.augmentation.single_steps(len(data.config.channels))
    sheets = [(name, data.varied(step, mixed=False)) for name, step in steps]
    if data.mixing is not None:
        sheets.append((data.mixing.kind, data.varied(none, mixed=True)))
    paths = []
    for number, (name, variant) in enumerate([*sheets, ("all", data)], 1):
        rows = [[*plain[(slot,)], *variant[_draws(slot)]] for slot in slots]
        paths.append(folder / f"{number:02}_{name}.jpg")
        write_image(paths[-1], _sheet(f"{number} {name}", rows, data))
    return paths


def _draws(slot: Slot) -> tuple[Slot, ...]:
    return tuple(replace(slot, draw=7919 * number) for number in range(1, DRAWS + 1))


def _sheet(title: str, rows: Sequence[Sequence[tuple[str, np.ndarray, np.ndarray]]], data: TrainingSet) -> np.ndarray:
    """Samples in rows on white paper, under the title, RGB uint8."""
    colours, lines = class_colours(data.classes.names), []
    for row in rows:
        shown = [_raw(pixels, data) for _, pixels, _ in row]
        limits = display_limits(shown[0])  # of the sample as it is: brighter must look brighter
        tiles = [_tile(overlay(image, mask, colours, limits)) for image, (_, _, mask) in zip(shown, row, strict=True)]
        lines.append(np.hstack(tiles))
    sheet = np.vstack([np.full((HEADER, lines[0].shape[1], 3), 255, np.uint8), *lines])
    return cv2.putText(sheet, title, (GAP, HEADER - 8), cv2.FONT_HERSHEY_SIMPLEX, 0.55, (0, 0, 0), 1, cv2.LINE_AA)


def _raw(pixels: np.ndarray, data: TrainingSet) -> np.ndarray:
    """A sample in raw units again, (H, W, C), 8 bit as such."""
    mean, std = (np.array(values, np.float32) for values in (data.config.mean, data.config.std))
    image = pixels.transpose(1, 2, 0) * std + mean
    return np.rint(np.clip(image, 0, 255)).astype(np.uint8) if data.config.dtype == "uint8" else image


def _tile(picture: np.ndarray) -> np.ndarray:
    """A picture of at most TILE pixels with a white edge."""
    scale = TILE / max(picture.shape[:2])
    size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
    small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST)
    return cv2.copyMakeBorder(small, 0, GAP, 0, GAP, cv2.BORDER_CONSTANT, value=(255, 255, 255))
