"""Clean a picture before it is cut: even light, less noise, small bright and dark spots removed, range stretched."""

from collections.abc import Sequence

import cv2
import numpy as np

from annotation.thresholds import thin

PASSES = 64  # of geodesic dilation before a reconstruction is left to the queue of scikit-image


def retinex(values: np.ndarray, sigmas: Sequence[float]) -> np.ndarray:
    """Divide by the light: the mean over sigmas of ln I - ln Gauss_sigma(I); one sigma is single-scale retinex.

    Args:
        values: (H, W) float32, finite.
        sigmas: of the Gaussians, in pixels.

    Returns:
        (H, W) float32. Values are shifted to begin at 1 % of their range first, so the darkest pixels, whose logarithm
        is noise, do not rule the result.
    """
    low, high = float(values.min()), float(values.max())
    if not high > low:
        return np.zeros_like(values)
    shifted = (values - np.float32(low)) * np.float32(1 / (high - low)) + np.float32(0.01)
    logs = cv2.log(shifted)
    light = np.zeros_like(logs)
    for sigma in sigmas:
        light += cv2.log(wide_blur(shifted, sigma))
    return logs - light / np.float32(len(sigmas))


def wide_blur(values: np.ndarray, sigma: float) -> np.ndarray:
    """A Gaussian blur in a time that does not grow with sigma: wide ones are taken on a smaller copy."""
    factor = int(sigma // 6)
    if factor < 2 or min(values.shape) < 2 * factor:
        return cv2.GaussianBlur(values, (0, 0), sigma, borderType=cv2.BORDER_REFLECT)
    height, width = values.shape
    small = cv2.resize(values, (-(-width // factor), -(-height // factor)), interpolation=cv2.INTER_AREA)
    small = cv2.GaussianBlur(small, (0, 0), sigma / factor, borderType=cv2.BORDER_REFLECT)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)


def spread(values: np.ndarray) -> float:
    """The standard deviation of the bulk of a map: 1.4826 times the median distance from the median."""
    sample = thin(values)
    return 1.4826 * float(np.median(np.abs(sample - np.median(sample))))


def smooth_bilateral(values: np.ndarray, diameter: int, colour: float, space: float) -> np.ndarray:
    """A bilateral filter whose colour sigma is `colour` times the spread of the values, whatever their unit."""
    sigma = colour * spread(values)
    return cv2.bilateralFilter(values, diameter, sigma, space) if sigma > 0 else values


def reconstruct(marker: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Grey reconstruction by dilation: the marker grows, 8-connected, for as long as it stays below the mask.

    Args:
        marker: (H, W) float32 or uint8, nowhere above the mask.
        mask: (H, W) of the same type.

    Returns:
        (H, W) of that type, the same as skimage.morphology.reconstruction. Dilations by OpenCV do it, in a tenth of
        the time; where something grows along more than PASSES pixels the rest is left to scikit-image.
    """
    square = np.ones((3, 3), np.uint8)
    grown = np.minimum(marker, mask)
    for _ in range(PASSES // 8):
        before = grown
        for _ in range(8):
            grown = np.minimum(cv2.dilate(grown, square), mask)
        if np.array_equal(grown, before):
            return grown
    from skimage.morphology import reconstruction

    return reconstruction(grown, mask).astype(mask.dtype)


def remove_spots(values: np.ndarray, side: int) -> np.ndarray:
    """Remove bright and dark spots smaller than an ellipse, outlines of the rest unchanged.

    It is an opening by reconstruction, then a closing by reconstruction.

    Args:
        values: (H, W) float32.
        side: of the ellipse, odd, in pixels.
    """
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    opened = reconstruct(cv2.erode(values, kernel), values)
    return -reconstruct(-cv2.dilate(opened, kernel), -opened)
