"""What pretraining leaves in its run folder beside weights: metrics.jsonl, curves, TensorBoard events."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from image_io import write_text
from plots import pretraining_curves
from run_folder import CURVES_EVERY, read_history, remove_leftovers, shrink_panel

WATCHED = {
    "spread": "Embeddings/spread (1 healthy, 0 collapsed)",
    "rank": "Embeddings/effective rank",
    "energy": "Embeddings/off-diagonal energy of one view",
    "feature_rank": "Encoder features/effective rank",
}


class RunLog:
    """Writes the course of a run; opening it again cuts everything back to the epoch that is gone on from.

    Args:
        path: logs/<exp>.
        epoch: epochs that are finished, 0 for a new run.
    """

    def __init__(self, path: Path, *, epoch: int) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        self.history = [row for row in read_history(path) if row["epoch"] <= epoch]
        self.drawn = -math.inf  # when the curves were drawn
        self._write_rows()
        self.writer = SummaryWriter(str(path), purge_step=epoch + 1)

    @property
    def encoder_path(self) -> Path:
        """Where the encoder file is kept."""
        return self.path / f"{self.path.name}.pth"

    @property
    def last_path(self) -> Path:
        """Where the state to go on from is kept; no extension, so that *.pth finds only the encoder file."""
        return self.path / "last_checkpoint"

    def log_epoch(self, row: dict[str, Any]) -> None:
        """Add an epoch to TensorBoard, metrics.jsonl and the curves.

        Args:
            row: {"epoch", "lr", "train": {"loss", further scores}, "watch": {...}, "probe": {...} where it was
                measured, "seconds", "waited"}.
        """
        self._log_scalars(row)
        self.history.append(row)
        self._write_rows()
        if time.monotonic() - self.drawn > CURVES_EVERY:
            self._draw()

    def log_images(self, pictures: Mapping[str, Sequence[np.ndarray]], epoch: int) -> None:
        """Add pictures (H, W, 3) uint8 to TensorBoard, numbered under their tags."""
        for tag, panels in pictures.items():
            for place, panel in enumerate(panels):
                self.writer.add_image(f"{tag}/{place + 1}", shrink_panel(panel), epoch, dataformats="HWC")
        self.writer.flush()

    def log_flags(self, flags: Mapping[str, Any]) -> None:
        """Add the flags as a table of text."""
        rows = (f"| {key} | {str(value).replace('|', chr(92) + '|')} |" for key, value in flags.items())
        self.writer.add_text("flags", "\n".join(["| flag | value |", "|---|---|", *rows]))

    def close(self) -> None:
        """Write what is still in memory, and the curves up to the last epoch."""
        if self.history:
            self._draw()
        self.writer.close()

    def _draw(self) -> None:
        pretraining_curves(self.history, self.path)
        self.drawn = time.monotonic()

    def _log_scalars(self, row: dict[str, Any]) -> None:
        epoch, write = row["epoch"], self.writer.add_scalar
        write("Loss/pretraining", row["train"]["loss"], epoch)
        write("Learning rate", row["lr"], epoch)
        for name, value in row["train"].items():
            if name != "loss":
                write(f"Pretraining/{name}", value, epoch)
        for name, value in row["watch"].items():
            write(WATCHED.get(name, f"Embeddings/{name}"), value, epoch)
        for name, value in row.get("probe", {}).items():
            write(f"Probe/{name}", float("nan") if value is None else value, epoch)
        write("Time/seconds an epoch", row["seconds"], epoch)
        self.writer.flush()

    def _write_rows(self) -> None:
        """Rewrite the table whole: a kill leaves the old one or the new one."""
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.history))
