"""The table of objects of a label map that comes in bands: each object is measured when its last row has come."""

from typing import Any

import numpy as np

from annotation.instances import LENGTHS, MM_COLUMNS, ROW_COLUMNS, _ellipses, _hull_pixels, _tidy, find_runs


class ObjectRows:
    """Takes labels and pixels from top to bottom and gives the rows of instances.object_rows of objects that ended.

    What is kept are the runs of the objects that go on, 48 bytes for each row of each.
    """

    def __init__(self, scores: np.ndarray, engines: tuple[str, ...], mm_per_pixel: float | None = None) -> None:
        """Scores and engines of the objects, entry 0 is the background."""
        self._scores, self._engines, self._scale = scores, engines, mm_per_pixel
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
        sums, amounts = _run_intensities(image, runs.places, runs.lengths)
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
        rows, columns, lengths = (column.astype(np.int64) for column in runs[1:4])
        count = len(numbers)
        area = np.bincount(ids, lengths, count)
        middle = columns + (lengths - 1) / 2
        x, y = np.bincount(ids, lengths * middle, count) / area, np.bincount(ids, lengths * rows, count) / area
        low, high = np.full((2, count), np.iinfo(np.int64).max), np.zeros((2, count), np.int64)
        for axis, (first, end) in enumerate(((columns, columns + lengths), (rows, rows + 1))):
            np.minimum.at(low[axis], ids, first)
            np.maximum.at(high[axis], ids, end)
        across, down = middle - x[ids], rows - y[ids]
        xx = np.bincount(ids, lengths * across**2 + lengths * (lengths**2 - 1.0) / 12, count) / area
        yy = np.bincount(ids, lengths * down**2, count) / area
        xy = np.bincount(ids, lengths * across * down, count) / area
        finite = np.bincount(ids, runs[5], count)
        sums = np.bincount(ids, runs[4], count)
        table: dict[str, np.ndarray] = {
            "id": numbers,
            "area": area.astype(np.int64),
            "centroid_x": x,
            "centroid_y": y,
            "box_left": low[0],
            "box_top": low[1],
            "box_width": high[0] - low[0],
            "box_height": high[1] - low[1],
            "equivalent_diameter": 2 * np.sqrt(area / np.pi),
            **_ellipses(xx, yy, xy),
            "solidity": area / _hull_pixels(ids, rows, columns, lengths, count),
            "mean_intensity": np.divide(sums, finite, out=np.full(count, np.nan), where=finite > 0),
            "score": self._scores[numbers].astype(np.float64),
        }
        if self._scale is not None:
            table["area_mm2"] = area * self._scale**2
            table |= {f"{name}_mm": table[name] * self._scale for name in LENGTHS}
        lists = {name: _tidy(values) for name, values in table.items()}
        lists["engine"] = [self._engines[number] for number in numbers.tolist()]
        names = (*ROW_COLUMNS, *(MM_COLUMNS if self._scale is not None else ()))
        return [dict(zip(names, row, strict=True)) for row in zip(*(lists[name] for name in names), strict=True)]


def _run_intensities(image: np.ndarray, places: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the finite values below each run, and how many there are, (m,) each."""
    channels = image.shape[2]
    flat = np.ascontiguousarray(image).reshape(-1)
    if image.dtype.kind != "f":
        return np.add.reduceat(flat, places * channels, dtype=np.uint64), lengths * channels
    finite = np.isfinite(flat)
    sums = np.add.reduceat(np.where(finite, flat, 0), places * channels, dtype=np.float64)
    return sums, np.add.reduceat(finite, places * channels, dtype=np.int64)
