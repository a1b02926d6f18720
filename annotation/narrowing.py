"""Narrow objects to their cores and grow the cores back along the edges of the picture.

Cores are apart where objects touched. Grown back they fill the same pixels, but the lines between neighbours follow
the picture, and the labels are not smaller than the objects.
"""

import cv2
import numpy as np
from scipy.ndimage import find_objects

from plots import to_display

SMOOTHING = 1.0  # sigma in pixels, against noise, before the picture guides the growth
LEVELS = 120  # grey levels of the picture while it guides; steps over the limit cost more than any between them
CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))


def narrow(labels: np.ndarray, share: float) -> np.ndarray:
    """Remove a rim from each object whose width is a share of the object's inscribed radius.

    Distances are taken within each object, so neighbours that touch are narrowed like lone ones. The frame of the
    picture is no edge: an object that it cuts is not narrowed there. Every object keeps some pixels, and of those the
    largest 4-connected piece. A disc keeps (1 - share) ** 2 of its area.

    Args:
        labels: (H, W) int32 label map.
        share: of the inscribed radius, in [0, 1); 0 keeps everything.

    Returns:
        (H, W) int32 with the same numbers.

    Raises:
        ValueError: share is outside [0, 1).
    """
    if not 0 <= share < 1:
        raise ValueError(f"narrowing {share} was asked for, expected a share of the radius from 0 to below 1")
    if share == 0:
        return labels.copy()
    cores = np.zeros_like(labels)
    for label, place in enumerate(find_objects(labels), start=1):
        if place is not None:
            around = tuple(slice(max(0, part.start - 1), part.stop + 1) for part in place)
            core = _narrow_one((labels[around] == label).view(np.uint8), share)
            np.copyto(cores[around], np.int32(label), where=core)
    return cores


def _narrow_one(mask: np.ndarray, share: float) -> np.ndarray:
    """The core (h, w) bool of one object (h, w) uint8."""
    if mask.all():  # no edge in sight
        return mask.astype(bool)
    distance = cv2.distanceTransform(mask, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    core = distance > share * distance.max()
    count, pieces, stats, _ = cv2.connectedComponentsWithStats(core.view(np.uint8), connectivity=4)
    return pieces == 1 + np.argmax(stats[1:, cv2.CC_STAT_AREA]) if count > 2 else core


def grow_back(narrowed: np.ndarray, image: np.ndarray, limit: np.ndarray | float) -> np.ndarray:
    """Grow cores by watershed until they meet each other or the limit; the lines between them follow edges.

    Args:
        narrowed: (H, W) int32, the cores.
        image: (H, W) or (H, W, C), any type and range.
        limit: (H, W) bool, where labels may be, such as the objects before narrowing; or how far they may grow, in
            pixels. Parts of it without a core stay background.

    Returns:
        (H, W) int32 with the same numbers. Cores keep all their pixels, and one 4-connected piece stays one.

    Raises:
        ValueError: the sizes differ.
    """
    if image.shape[:2] != narrowed.shape:
        raise ValueError(f"the picture is {image.shape[:2]} and the label map {narrowed.shape}; expected one size")
    inside = _allowed(narrowed, limit)
    if not inside.any():
        return narrowed.copy()
    # cv2.watershed knows no mask and spoils the outermost pixels: a frame is added, and outside the limit one channel
    # alternates, so that a step there is dearer than any step inside.
    padded = cv2.copyMakeBorder(inside.view(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    seeds = cv2.copyMakeBorder(narrowed, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    labels = cv2.watershed(_guide(image, padded), seeds)[1:-1, 1:-1]
    labels = np.where(inside, np.maximum(labels, 0), 0)
    return _close_lines(labels, inside)


def _allowed(narrowed: np.ndarray, limit: np.ndarray | float) -> np.ndarray:
    """The limit as a mask (H, W) bool, without parts that hold no core."""
    cores = narrowed > 0
    if isinstance(limit, np.ndarray):
        if limit.shape != narrowed.shape:
            raise ValueError(f"the limit is {limit.shape} and the label map {narrowed.shape}; expected one size")
        inside = (limit != 0) | cores
    elif cores.any():
        inside = cv2.distanceTransform((~cores).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE) <= limit
    else:
        inside = cores
    count, pieces = cv2.connectedComponents(inside.view(np.uint8), connectivity=4)
    held = np.zeros(count, bool)
    held[pieces[cores]] = True
    held[0] = False
    return held[pieces]


def _guide(image: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """The padded picture (H + 2, W + 2, 3) uint8 that cv2.watershed floods by the steps between its pixels."""
    grey = cv2.cvtColor(to_display(image), cv2.COLOR_RGB2GRAY)
    grey = cv2.GaussianBlur(grey, (0, 0), SMOOTHING)
    grey = cv2.normalize(grey, None, 0, LEVELS, cv2.NORM_MINMAX)
    guide = np.zeros((*inside.shape, 3), np.uint8)
    guide[1:-1, 1:-1, 0] = grey
    rows, columns = np.ogrid[: inside.shape[0], : inside.shape[1]]
    barrier = (((rows + columns) & 1) * 255).astype(np.uint8)
    guide[..., 2] = np.where(inside, np.uint8(127), barrier)
    return guide


def _close_lines(labels: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Give the pixels that the watershed left between objects to a neighbour above, below, left or right."""
    labels = labels.astype(np.float32)  # what OpenCV dilates; exact to 16.7 million objects
    free = inside & (labels == 0)
    while free.any():
        near = cv2.dilate(labels, CROSS)
        reached = free & (near > 0)
        if not reached.any():
            break
        labels[reached] = near[reached]
        free &= ~reached
    return labels.astype(np.int32)
