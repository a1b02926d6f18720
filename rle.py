"""Run-length encoding of masks: "start length" pairs, 1-based, down each column and then on to the next one.

Masks come and go as bands or windows: neither the encoder nor the reader ever holds the raster, only its runs, as
numbers of 4 or 8 bytes.
"""

import math
import re
from collections.abc import Iterator

import numpy as np

FLUSH_ROWS = 256  # rows are gathered before their runs are cut out: runs end at each seam
CHUNK_RUNS = 1 << 18  # runs that are put in order and written at once


def encode_rle(mask: np.ndarray) -> str:
    """The runs of a mask (H, W), bool or numbers that are 0 outside; empty for an empty mask."""
    encoder = RleEncoder(*mask.shape)
    encoder.append(mask)
    return "".join(encoder.finish())


class RleEncoder:
    """Encode a mask that comes as bands; the text is that of encode_rle for the whole."""

    def __init__(self, height: int, width: int) -> None:
        """Start a mask of height x width pixels."""
        self.height, self.width = height, width
        self.rows_done = 0
        self._waiting: list[np.ndarray] = []
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []  # starts and lengths of each flush, ascending
        self._start_type = np.uint32 if height * width < 1 << 32 else np.int64

    def append(self, rows: np.ndarray) -> None:
        """Add the next rows, (h, W) bool or numbers that are 0 outside.

        Raises:
            ValueError: the rows have another width, or are more than the mask has left.
        """
        waiting = sum(map(len, self._waiting))
        if rows.ndim != 2 or rows.shape[1] != self.width:
            raise ValueError(f"rows have shape {rows.shape}, expected (h, {self.width}): a mask has one width")
        if self.rows_done + waiting + len(rows) > self.height:
            raise ValueError(
                f"row {self.rows_done + waiting + len(rows)} came for a mask of {self.height} rows: give each row once"
            )
        for start in range(0, len(rows), FLUSH_ROWS):
            self._waiting.append(rows[start : start + FLUSH_ROWS] != 0)  # a copy: bands may be reused
            if sum(map(len, self._waiting)) >= FLUSH_ROWS:
                self._flush()

    def finish(self) -> Iterator[str]:
        """The text in pieces; joined without anything between they are the whole.

        Raises:
            ValueError: rows are missing.
        """
        self._flush()
        if self.rows_done != self.height:
            raise ValueError(f"{self.rows_done} rows came for a mask of {self.height}: append all rows before finish")
        return self._write()

    def _flush(self) -> None:
        if not self._waiting:
            return
        columns = np.ascontiguousarray(np.concatenate(self._waiting).T)  # (W, h)
        height = columns.shape[1]
        steps = np.zeros((self.width, height + 1), bool)
        steps[:, 0], steps[:, height] = columns[:, 0], columns[:, -1]
        np.not_equal(columns[:, 1:], columns[:, :-1], out=steps[:, 1:height])
        edges = np.flatnonzero(steps)
        column, row = np.divmod(edges[::2], height + 1)
        starts = column * self.height + row + self.rows_done
        lengths = edges[1::2] - edges[::2]
        self._runs.append((starts.astype(self._start_type), lengths.astype(np.uint16)))
        self.rows_done += height
        self._waiting = []

    def _write(self) -> Iterator[str]:
        """Sort and join the runs of a few columns at a time; the last run waits, it may go on in the next column."""
        count = sum(len(starts) for starts, _ in self._runs)
        step = max(1, self.width * CHUNK_RUNS // max(1, count))
        last, space = np.zeros((0, 2), np.int64), ""
        for left in range(0, self.width, step):
            bounds = np.array([left, left + step]) * self.height
            pieces = [last]
            for starts, lengths in self._runs:
                low, high = np.searchsorted(starts, np.minimum(bounds, self.height * self.width).astype(starts.dtype))
                pieces.append(np.stack([starts[low:high].astype(np.int64), lengths[low:high]], axis=1))
            runs = join_runs(np.concatenate(pieces))
            runs, last = runs[:-1], runs[-1:]
            if len(runs):
                yield space + format_runs(runs)
                space = " "
        if len(last):
            yield space + format_runs(last)


def join_runs(runs: np.ndarray) -> np.ndarray:
    """Disjoint runs (n, 2) int64, start and length, in order, those that touch made one."""
    runs = runs[np.argsort(runs[:, 0], kind="stable")]
    ends = runs.sum(axis=1)
    first = np.flatnonzero(np.concatenate([[True], runs[1:, 0] != ends[:-1]])[: len(runs)])
    last = np.concatenate([first[1:], [len(runs)]])[: len(first)] - 1
    return np.stack([runs[first, 0], ends[last] - runs[first, 0]], axis=1)


def format_runs(runs: np.ndarray) -> str:
    """Runs (n, 2) with 0-based starts as text with 1-based ones."""
    return " ".join(map(str, (runs + (1, 0)).ravel().tolist()))


def parse_rle(text: str | float | None, height: int, width: int) -> np.ndarray:
    """Read the runs of a mask.

    Args:
        text: pairs of a 1-based start and a length; disjoint runs may come in any order. None, NaN or nothing but
            spaces is an empty mask.
        height, width: of the mask in pixels.

    Returns:
        (n, 2) int64: 0-based start and length, in order, joined where they touch.

    Raises:
        ValueError: the text is not such pairs, or runs leave the mask or overlap.
    """
    if text is None or (isinstance(text, float) and math.isnan(text)) or str(text).strip().lower() in ("", "nan"):
        return np.zeros((0, 2), np.int64)
    numbers = _parse_numbers(str(text))
    if len(numbers) % 2:
        raise ValueError(
            f'RLE holds {len(numbers)} numbers, expected an even count, pairs "start length": the text may be cut off'
        )
    runs = numbers.reshape(-1, 2)
    _check_runs(runs, height, width)
    return join_runs(runs - (1, 0))


def _parse_numbers(text: str) -> np.ndarray:
    """The whole numbers of a text, (n,) int64."""
    tokens = text.split()
    if not re.search(r"[^-+0-9\s]", text):  # int would take 1_000 and digits of any script
        try:
            return np.array(list(map(int, tokens)), np.int64)
        except (ValueError, OverflowError):
            pass
    wrong = next(token for token in tokens if not re.fullmatch(r"[-+]?[0-9]{1,18}", token))
    raise ValueError(f'RLE holds {wrong[:40]!r}, expected whole numbers in pairs "start length" with spaces between')


def _check_runs(runs: np.ndarray, height: int, width: int) -> None:
    """Refuse runs (n, 2) with 1-based starts that are not disjoint parts of a mask."""
    starts, lengths = runs.T
    size = f"a mask of {height} x {width} pixels (height x width)"
    for wrong, expected in (
        (starts < 1, "expected starts from 1"),
        (lengths < 1, "expected lengths from 1"),
        (starts - 1 > height * width - lengths, f"expected runs within {size}: compare the sizes of image and mask"),
    ):
        if wrong.any():
            number = int(wrong.argmax())
            start, length = runs[number].tolist()
            raise ValueError(f'RLE run {number + 1} is "{start} {length}", {expected}')
    order = np.argsort(starts, kind="stable")
    overlap = starts[order][1:] < (starts + lengths)[order][:-1]
    if overlap.any():
        number = int(overlap.argmax())
        (start, length), (other, other_length) = runs[order[number : number + 2]].tolist()
        raise ValueError(
            f'RLE runs "{start} {length}" and "{other} {other_length}" overlap, expected each pixel in one run at '
            "most: encode the mask again"
        )


def decode_rle(text: str | float | None, height: int, width: int) -> np.ndarray:
    """The mask (height, width) bool of a text; see parse_rle for what it may hold and which errors it raises."""
    return RleRaster(text, height, width).read(0, 0, height, width)


class RleRaster:
    """Windows of a mask that is given as runs, whatever its size.

    Attributes:
        area: pixels in the mask.
    """

    def __init__(self, text: str | float | None, height: int, width: int) -> None:
        """Parse the text; see parse_rle for the arguments and errors."""
        runs = parse_rle(text, height, width)
        self.height, self.width, self.area = height, width, int(runs[:, 1].sum())
        self._starts, self._ends = runs[:, 0].copy(), runs.sum(axis=1)

    def read(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """The pixels (height, width) bool of a window, which must lie inside the mask.

        Raises:
            ValueError: it does not.
        """
        if top < 0 or left < 0 or height < 0 or width < 0 or top + height > self.height or left + width > self.width:
            raise ValueError(
                f"window of {height} x {width} pixels at row {top}, column {left}, expected one inside the mask of "
                f"{self.height} x {self.width} pixels"
            )
        begin = (np.arange(left, left + width) * self.height + top)[:, None]  # of the window's part of each column
        first = np.searchsorted(self._ends, begin[:, 0], "right")
        counts = np.maximum(np.searchsorted(self._starts, begin[:, 0] + height, "left") - first, 0)
        column = np.repeat(np.arange(width), counts)
        run = np.arange(counts.sum()) + np.repeat(first - np.cumsum(counts) + counts, counts)
        steps = np.zeros((width, height + 1), np.int8)  # the joined runs neither start nor end twice at one place
        steps[column, np.clip(self._starts[run] - begin[column, 0], 0, height)] = 1
        steps[column, np.clip(self._ends[run] - begin[column, 0], 0, height)] = -1
        inside = np.cumsum(steps[:, :height], axis=1, dtype=np.int8)
        return np.ascontiguousarray(inside.T).view(bool)
