"""The run folder logs/<exp>/: metrics.jsonl, the csv of scores, learning curves, TensorBoard events."""

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from image_io import resize_image, write_text
from plots import learning_curves
from tracking import Tracking

CSV_NAME = "_iou_per_epoch_val.csv"
MEAN_NAME = "weighted mean"  # of validation sets without a main one
EVENT_WIDTH = 1200  # pixels
CURVES_EVERY = 10  # seconds at least between two drawings, which cost a fifth of a second
LEFTOVER = re.compile(r"\.[0-9a-f]{32}\.tmp")  # of image_io.atomic_write


class RunFolder:
    """Writes what a training run leaves behind; opening it again cuts everything back to the checkpoint's epoch.

    Args:
        path: logs/<exp>.
        epoch: epochs that the checkpoint has finished, 0 for a new run.
        val_names: names of the validation sets, the main one first unless `weighted`.
        weighted: the weighted mean over the sets takes the place of the main one.
        decimal: decimal sign of the csv file, "comma" or "dot".
    """

    def __init__(
        self, path: Path, *, epoch: int, val_names: Sequence[str], decimal: str = "comma", weighted: bool = False
    ) -> None:
        self.path, self.decimal, self.val_names, self.weighted = path, decimal, tuple(val_names), weighted
        path.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        self.history = [row for row in read_history(path) if row["epoch"] <= epoch]
        self._write_tables()
        self.tracking: Tracking | None = None  # also told of flags and epochs
        self.drawn = -math.inf  # when the learning curves were drawn
        self.writer = SummaryWriter(str(path), purge_step=epoch + 1)
        self._layout()

    @property
    def best_path(self) -> Path:
        """Where the best checkpoint is kept."""
        return self.path / f"{self.path.name}.pth"

    @property
    def last_path(self) -> Path:
        """Where the state to go on from is kept; no extension, so that *.pth finds only the best."""
        return self.path / "last_checkpoint"

    def log_epoch(self, row: dict[str, Any]) -> None:
        """Add an epoch to TensorBoard, metrics.jsonl, the csv file and the learning curves.

        Args:
            row: {"epoch", "lr", "train": {"loss", "iou"}, "val": {set name: {"loss", "iou", "dice", ...}}, ...}. Sets
                that were not scored in this epoch are absent; "score" holds the weighted mean where that decides.
        """
        self._log_scalars(row)
        self.history.append(row)
        self._write_tables()
        if self.tracking:
            self.tracking.log_epoch(row)
        if time.monotonic() - self.drawn > CURVES_EVERY:
            self._draw_curves()

    def log_images(self, tag: str, panels: Sequence[np.ndarray], epoch: int) -> None:
        """Add pictures (H, W, 3) uint8 to TensorBoard, numbered under one tag."""
        for place, panel in enumerate(panels):
            self.writer.add_image(f"{tag}/{place + 1}", shrink_panel(panel), epoch, dataformats="HWC")

    def log_flags(self, flags: Mapping[str, Any]) -> None:
        """Add the flags as a table of text."""
        rows = (f"| {key} | {str(value).replace('|', chr(92) + '|')} |" for key, value in flags.items())
        self.writer.add_text("flags", "\n".join(["| flag | value |", "|---|---|", *rows]))
        if self.tracking:
            self.tracking.log_flags(flags, self.best_path)

    def log_result(self, flags: Mapping[str, Any], scores: Mapping[str, float | None]) -> None:
        """Add the flags as hyper-parameters beside the final scores."""
        plain = {key: value for key, value in flags.items() if isinstance(value, (int, float, str, bool))}
        for summary in hparams(plain, {key: _number(value) for key, value in scores.items()}):
            self.writer._get_file_writer().add_summary(summary)

    def close(self) -> None:
        """Write what is still in memory, and the curves up to the last epoch."""
        if self.history:
            self._draw_curves()
        self.writer.close()
        if self.tracking:
            self.tracking.close()

    def _draw_curves(self) -> None:
        learning_curves(self.history, self.path)
        self.drawn = time.monotonic()

    def _layout(self) -> None:
        names = [*([MEAN_NAME] if self.weighted else []), *self.val_names]
        charts = {
            "Loss": ["Multiline", [f"{name} loss" for name in names]],
            "IOU": ["Multiline", [f"{name} iou" for name in names]],
        }
        self.writer.add_custom_scalars({"Validation": charts})

    def _log_scalars(self, row: dict[str, Any]) -> None:
        epoch, write = row["epoch"], self.writer.add_scalar
        write("Accuracy/train", _number(row["train"]["iou"]), epoch)
        write("Loss/train", row["train"]["loss"], epoch)
        write("Learning rate", row["lr"], epoch)
        means = {MEAN_NAME: {**row["score"], "classes": {}}} if row.get("score") else {}
        for name, scores in {**means, **row["val"]}.items():
            write(f"{name} iou", _number(scores["iou"]), epoch)
            write(f"{name} loss", _number(scores["loss"]), epoch)
            write(f"{name} dice", _number(scores["dice"]), epoch)
            for class_name, value in scores["classes"].items():
                write(f"{name} class iou/{class_name}", _number(value), epoch)
        write("Time/seconds an epoch", row["seconds"], epoch)
        self.writer.flush()

    def _write_tables(self) -> None:
        """Rewrite both tables whole: a kill leaves the old ones or the new ones."""
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.history))
        further = self.val_names if self.weighted else self.val_names[1:]
        lines = ["; ".join(["epoch", "iou", *(name.replace(";", ",") for name in further)])]
        for row in self.history:
            scored = row["val"]
            first = row.get("score") if self.weighted else scored.get(self.val_names[0])
            values = [(scores or {}).get("iou") for scores in (first, *(scored.get(name) for name in further))]
            lines.append("; ".join([str(row["epoch"]), *(self._decimal(value) for value in values)]))
        write_text(self.path / CSV_NAME, "\n".join(lines) + "\n")

    def _decimal(self, value: float | None) -> str:
        text = f"{_number(value):.4f}"
        return text.replace(".", ",") if self.decimal == "comma" else text


def shrink_panel(panel: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) no wider than EVENT_WIDTH: TensorBoard keeps those of every epoch in its event files."""
    height, width = panel.shape[:2]
    if width <= EVENT_WIDTH:
        return panel
    return resize_image(panel, (max(1, round(height * EVENT_WIDTH / width)), EVENT_WIDTH))


def remove_leftovers(path: Path) -> None:
    """Delete the hidden files that a kill in the middle of a save left in a run folder."""
    for file in path.glob(".*.tmp"):
        if LEFTOVER.fullmatch(file.name):
            file.unlink(missing_ok=True)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def read_history(path: Path) -> list[dict[str, Any]]:
    """Rows of a run's metrics.jsonl; a last line cut short by a kill is left out."""
    file = path / "metrics.jsonl"
    if not file.is_file():
        return []
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
