"""How large the objects of a picture are, from the picture alone."""

import math

import cv2
import numpy as np

FINEST = 1.5  # sigma in pixels of the finest blob looked for
STEP = math.sqrt(2)  # from one scale to the next
KEPT = 0.65  # share of the strong blobs that a blob must reach to be counted
MOST = 1 / 6  # of the shorter side: the widest sigma


def estimate_size(values: np.ndarray) -> float:
    """The diameter of the typical bright object, in pixels.

    The picture is compared with blobs of all sizes (differences of Gaussians, each octave on a copy of half the side);
    a blob counts where it fits better than its neighbours in place and size. The result is the median diameter of the
    strong blobs, weighted by contrast and diameter: grain inside objects is small and weak, haze is wide and weak.

    Args:
        values: (H, W) float32, bright objects.
    """
    scales = _blob_responses(values)
    square = np.ones((3, 3), np.uint8)
    diameters, strengths = [], []
    for index, (diameter, response) in enumerate(scales):
        peak = (response >= cv2.dilate(response, square)) & (response > 0)
        for other in (index - 1, index + 1):
            if 0 <= other < len(scales):
                beside = scales[other][1]
                if beside.shape != response.shape:
                    beside = cv2.resize(beside, response.shape[::-1], interpolation=cv2.INTER_LINEAR)
                peak &= response >= cv2.dilate(beside, square)
        found = response[peak]
        diameters.append(np.full(len(found), diameter))
        strengths.append(found)
    sizes, strength = np.concatenate(diameters), np.concatenate(strengths)
    if not len(sizes):
        return float(max(3, min(values.shape) / 8))
    weight = strength * np.sqrt(sizes)
    kept = weight >= KEPT * (np.percentile(weight, 95) if len(weight) > 20 else weight.max())
    sizes, weight = sizes[kept], strength[kept] * sizes[kept]
    order = np.argsort(sizes, kind="stable")
    total = np.cumsum(weight[order])
    return float(sizes[order][np.searchsorted(total, total[-1] / 2)])


def _blob_responses(values: np.ndarray) -> list[tuple[float, np.ndarray]]:
    """Diameter of the blob and response map of each scale; the maps shrink with the octaves."""
    current = cv2.GaussianBlur(values, (0, 0), FINEST)
    here = total = FINEST  # sigma in pixels of the present copy, and of the picture
    scales: list[tuple[float, np.ndarray]] = []
    widest = MOST * min(values.shape)
    while total < widest or not scales:
        wider = cv2.GaussianBlur(current, (0, 0), here * math.sqrt(STEP**2 - 1))
        sigma = total * math.sqrt((1 + STEP**2) / 2)
        scales.append((2 * math.sqrt(2) * sigma, current - wider))
        current, here, total = wider, here * STEP, total * STEP
        if here >= 4 * FINEST and min(current.shape) > 24:
            height, width = current.shape
            current = cv2.resize(current, (width // 2, height // 2), interpolation=cv2.INTER_AREA)
            here /= 2
    return scales
