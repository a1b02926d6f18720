"""Pictures of objects over their image, and panels that compare engines."""

import colorsys
import math
from collections.abc import Mapping
from functools import lru_cache

import cv2
import numpy as np

from annotation.instances import find_runs
from plots import to_display

FILL = 0.3  # opacity of an object over the image
LINE_SIDE = 1000  # pixels of an image's longer side for each pixel of an outline's width
COLOURS = 251  # of objects; their numbers run along the picture, so neighbours get colours far apart
DARKEST, BRIGHTEST = 95, 190  # luminance of the colours, 0..255
TILE_SIDE = 640  # longer side of a picture of a panel
SMALL_SIDE = 320  # smaller ones are enlarged up to it
CAPTION, GAP = 30, 8  # pixels of a panel


def show_image(image: np.ndarray) -> np.ndarray:
    """Any image as RGB (H, W, 3) uint8; as plots.to_display, but at once for ordinary 8-bit images.

    Args:
        image: (H, W, C), any type; NaN and infinite values are shown black.
    """
    if image.dtype != np.uint8:
        return to_display(image)
    step = max(1, min(image.shape[:2]) // 256)
    thinned = image[::step, ::step, : 3 if image.shape[2] >= 3 else 1]
    if np.percentile(thinned, 99.5) < 64:
        return to_display(image)
    if image.shape[2] >= 3:
        return np.ascontiguousarray(image[..., :3])
    return cv2.cvtColor(np.ascontiguousarray(image[..., 0]), cv2.COLOR_GRAY2RGB)


@lru_cache(maxsize=1)
def _colour_table() -> np.ndarray:
    """(COLOURS, 4) uint8 RGBA: hues by the golden ratio, neither so dark nor so bright that an image hides them."""
    table = np.empty((COLOURS, 4))
    for k in range(COLOURS):
        colour = 255 * np.array(colorsys.hsv_to_rgb(k * 0.618034 % 1, (0.95, 0.6, 0.8)[k % 3], 1.0))
        luminance = colour @ (0.299, 0.587, 0.114)
        if luminance < DARKEST:
            colour += (255 - colour) * (DARKEST - luminance) / (255 - luminance)
        table[k] = [*(colour * min(1.0, BRIGHTEST / luminance)), 255]
    return table.round().astype(np.uint8)


def object_edges(labels: np.ndarray) -> np.ndarray:
    """Pixels of objects beside another object or the background, (H, W) bool; the frame is no edge."""
    edges = np.zeros(labels.shape, bool)
    for one, other in (
        (np.s_[:, 1:], np.s_[:, :-1]),
        (np.s_[1:], np.s_[:-1]),
    ):
        differs = labels[one] != labels[other]
        edges[one] |= differs
        edges[other] |= differs
    edges &= labels > 0
    return edges


def overlay(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Draw objects over their image, each in its own colour: outlined, lightly filled.

    Args:
        image: (H, W, C), any type and range.
        labels: (H, W) int32, 0 background, objects 1..n.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    shown = show_image(image)
    runs = find_runs(labels)
    if not runs.values.any():
        return shown.copy()
    colours = _colour_table()[(runs.values - 1) % COLOURS]
    colours[runs.values == 0] = 0
    packed = runs.paint(colours.view(np.uint32)[:, 0])  # one number for each pixel, not three
    flat = cv2.cvtColor(packed.view(np.uint8).reshape(*labels.shape, 4), cv2.COLOR_RGBA2RGB)
    outside = (packed == 0).view(np.uint8)
    edges = object_edges(labels).view(np.uint8)
    width = 1 + max(labels.shape) // LINE_SIDE
    if width > 1:
        edges = cv2.dilate(edges, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width))) & (outside ^ 1)
    result = cv2.copyTo(shown, outside, cv2.addWeighted(shown, 1 - FILL, flat, FILL, 0))
    return cv2.copyTo(flat, edges, result)


def panel(image: np.ndarray, maps: Mapping[str, np.ndarray]) -> np.ndarray:
    """Show the image and, beside it, the objects of several label maps over it, with how many they are.

    Args:
        image: (H, W, C), any type and range.
        maps: caption to label map (H, W) int32 with objects 1..n, such as of each engine and of all together.

    Returns:
        (H', W', 3) uint8 RGB; each picture is at most TILE_SIDE pixels long.
    """
    height, width = image.shape[:2]
    longest = max(height, width)
    scale = TILE_SIDE / longest if longest > TILE_SIDE else math.ceil(min(SMALL_SIDE, TILE_SIDE / 2) / longest)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    shown = cv2.resize(show_image(image), size, interpolation=how)
    tiles = [("image", shown)]
    for name, labels in maps.items():
        fitted = cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST)
        tiles.append((f"{name}: {labels.max()}", overlay(shown, fitted)))
    column = max(size[0], 150)
    page = np.full((CAPTION + size[1] + GAP, GAP + len(tiles) * (column + GAP), 3), 255, np.uint8)
    for place, (caption, tile) in enumerate(tiles):
        left = GAP + place * (column + GAP)
        page[CAPTION : CAPTION + size[1], left : left + size[0]] = tile
        font = 0.5 * min(1.0, column / (9.5 * len(caption)))
        cv2.putText(page, caption, (left, CAPTION - 9), cv2.FONT_HERSHEY_SIMPLEX, font, (30, 30, 30), 1, cv2.LINE_AA)
    return page
