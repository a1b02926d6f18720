"""Rows and run lengths of the objects of a label map that comes in bands: each object's when its last row has come."""

from typing import Any

import numpy as np

from annotation.coco import encode_runs
from annotation.instances import find_runs, list_rows, mean_intensities, measure_runs, sum_intensities


class ObjectRows:
    """Takes labels and pixels from top to bottom and gives the rows of instances.object_rows of objects that ended.

    What is kept are the runs of the objects that go on, 48 bytes for each row of each.
    """

    def __init__(self, scores: np.ndarray, engines: tuple[str, ...]) -> None:
        """Scores and engines of the objects, entry 0 is the background."""
        self._scores, self._engines = scores, engines
        self._open = np.zeros((6, 0))  # id, row, column, length, sum of intensities, finite values

    def add(self, top: int, labels: np.ndarray, image: np.ndarray, *, last: bool) -> list[dict[str, Any]]:
        """The rows of the objects that end in this band, by number.

        Args:
            top: first row of the band.
            labels: (h, W) whole numbers, 0 background.
            image: (h, W, C).
            last: nothing comes after this band.
        """
        runs = find_runs(labels)
        inside = runs.values > 0
        sums, amounts = sum_intensities(image, runs)
        columns = (runs.values, runs.rows + top, runs.columns, runs.lengths, sums, amounts)
        known = np.concatenate([self._open, [column[inside].astype(np.float64) for column in columns]], axis=1)
        going_on = np.zeros(len(self._scores), bool)
        if not last:
            going_on[labels[-1]] = True
        stays = going_on[known[0].astype(np.int64)]
        self._open = known[:, stays]
        return self._measure(known[:, ~stays])

    def _measure(self, runs: np.ndarray) -> list[dict[str, Any]]:
        if not runs.shape[1]:
            return []
        numbers, ids = np.unique(runs[0].astype(np.int64), return_inverse=True)
        count = len(numbers)
        rows, columns, lengths = (column.astype(np.int64) for column in runs[1:4])
        table = {"id": numbers, **measure_runs(ids, rows, columns, lengths, count)}
        table["mean_intensity"] = mean_intensities(ids, runs[4], runs[5], count)
        table["score"] = self._scores[numbers].astype(np.float64)
        return list_rows(table, [self._engines[number] for number in numbers.tolist()])


class ObjectCounts:
    """Takes labels from top to bottom and gives the run lengths of COCO of objects that ended, see coco.encode_objects.

    What is kept are the runs down the columns of the objects that go on, 32 bytes for each column of each band.
    """

    def __init__(self, height: int, width: int, count: int) -> None:
        """Size of the picture, and how many objects there are."""
        self._size, self._count = (height, width), count
        self._open = np.zeros((3, 0), np.int64)  # id, place down the columns, length

    def add(self, top: int, labels: np.ndarray) -> tuple[list[int], list[str]]:
        """Numbers and strings of the objects that end in this band; bands (h, W) come in order."""
        height, width = self._size
        runs = find_runs(np.ascontiguousarray(labels.T))
        inside = runs.values > 0
        places = runs.rows * height + runs.columns + top
        columns = (runs.values, places, runs.lengths)
        known = np.concatenate([self._open, [column[inside].astype(np.int64) for column in columns]], axis=1)
        going_on = np.zeros(self._count + 1, bool)
        if top + len(labels) < height:
            going_on[labels[-1]] = True
        stays = going_on[known[0]]
        self._open = known[:, stays]
        ended = known[:, ~stays]
        if not ended.shape[1]:
            return [], []
        ids, starts, lengths = ended[:, np.lexsort((ended[1], ended[0]))]
        first = np.ones(len(ids), bool)
        first[1:] = (ids[1:] != ids[:-1]) | (starts[1:] != starts[:-1] + lengths[:-1])
        whole = np.flatnonzero(first)
        lengths = np.add.reduceat(lengths, whole)
        numbers, owners = np.unique(ids[whole], return_inverse=True)
        return numbers.tolist(), encode_runs(owners + 1, starts[whole], lengths, height * width)
