"""What a person's edit of a label map or of a binary mask means for the objects."""

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
from scipy.ndimage import find_objects

from annotation.coco import encode_objects
from annotation.instances import Instances, find_runs, gap_mask, number_instances

EDITED = "edited"  # the engine of objects that a person made or changed


def values_of(values: np.ndarray, found: Instances) -> np.ndarray:
    """The value in a label file of every object, (n,)."""
    runs = find_runs(found.labels)
    result = np.zeros(len(found) + 1, np.int64)
    result[runs.values] = values.reshape(-1)[runs.places]
    return result[1:]


def follow_gt(gt: np.ndarray, before: np.ndarray | None, gap: int) -> np.ndarray:
    """Label map of an edited gt (H, W), from the label map before the edit; see files.write_edited."""
    inside = gt > 0
    if before is None:
        return number_instances(gt, 1.0, EDITED, pieces="all").labels
    old = number_instances(before, 1.0, EDITED, pieces="all").labels
    expected = gap_mask(old, gap) > 0
    labels = _erase(old, expected, inside)
    added = inside & (labels == 0)
    if added.any():
        # Numbers of the new pieces follow the old ones; what touches an object becomes part of the nearest.
        count, pieces = cv2.connectedComponents(added.view(np.uint8), connectivity=4)
        around = cv2.dilate(
            np.minimum(labels, 1).astype(np.uint8), np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], np.uint8)
        )
        touches = np.zeros(count, bool)
        touches[pieces[added & (around > 0)]] = True
        joined = added & touches[pieces]
        nearest = _nearest(labels, labels > 0) if joined.any() else labels
        labels = np.where(joined, nearest, np.where(added, pieces + int(old.max()), labels))
    return number_instances(labels, 1.0, EDITED, pieces="all").labels


def _erase(old: np.ndarray, shown: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Labels (H, W) without what was erased from a gt, and without the pixels of the gap that lay beside it.

    Args:
        old: labels before the edit. shown: the pixels that gt had of them, (H, W) bool; the rest of an object is a gap
            that nobody could erase, and follows its nearest pixel that was shown.
        inside: the edited gt, (H, W) bool.
    """
    erased = shown & ~inside
    labels = np.where(erased, 0, old)
    changed = np.zeros(int(old.max(initial=0)) + 1, bool)
    changed[old[erased]] = True
    changed[0] = False
    places = find_objects(old)
    for label in np.flatnonzero(changed).tolist():
        window = places[label - 1]
        own, seen = old[window] == label, shown[window] & (old[window] == label)
        labels[window][own & ~seen & ~inside[window] & _nearest(erased[window], seen)] = 0
    return labels


def _nearest(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Each pixel's value (H, W) at the nearest of some known pixels, (H, W) bool with at least one."""
    free = (~known).view(np.uint8)
    _, place = cv2.distanceTransformWithLabels(free, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    found = np.zeros(int(place.max()) + 1, values.dtype)
    found[place[known]] = values[known]
    return found[place]


def keep_scores(found: Instances, previous: Mapping[str, Any] | None) -> Instances:
    """Objects that the record holds pixel by pixel keep the engine and the score they have there."""
    if previous is None or not len(found) or previous["size"] != list(found.labels.shape):
        return found
    rows = previous["table"]
    known = dict(zip(rows["counts"], zip(rows["engine"], rows["score"], strict=True), strict=True))
    kept = [known.get(counts, (EDITED, 1.0)) for counts in encode_objects(found.labels)]
    scores = np.array([score for _, score in kept], np.float32)
    return Instances(found.labels, scores, tuple(engine for engine, _ in kept))
