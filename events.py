"""TensorBoard events of commands that do without PyTorch, whose own writer takes a second to load."""

import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from image_io import resize_image

WIDTH = 1200  # pixels of a picture in an event file
BINS = 40


class EventWriter:
    """Writes scalars, pictures and histograms into a folder; a context manager."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._file = EventFileWriter(str(folder))

    def __enter__(self) -> "EventWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add_scalar(self, tag: str, value: float, step: int = 0) -> None:
        """A number."""
        self._add(step, tag=tag, simple_value=float(value))

    def add_image(self, tag: str, image: np.ndarray, step: int = 0) -> None:
        """A picture (H, W, 3) uint8 RGB, made no wider than WIDTH."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        height, width = image.shape[:2]
        if width > WIDTH:
            image = resize_image(image, (max(1, round(height * WIDTH / width)), WIDTH))
        data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()
        shown = Summary.Image(height=image.shape[0], width=image.shape[1], colorspace=3, encoded_image_string=data)
        self._add(step, tag=tag, image=shown)

    def add_histogram(self, tag: str, values: np.ndarray, step: int = 0) -> None:
        """The distribution of some numbers, (n,), at least one."""
        from tensorboard.compat.proto.summary_pb2 import HistogramProto

        counts, edges = np.histogram(values, bins=BINS)
        histogram = HistogramProto(
            min=float(values.min()),
            max=float(values.max()),
            num=len(values),
            sum=float(values.sum()),
            sum_squares=float(np.square(values, dtype=np.float64).sum()),
            bucket_limit=edges[1:].tolist(),
            bucket=counts.tolist(),
        )
        self._add(step, tag=tag, histo=histogram)

    def _add(self, step: int, **value: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(**value)])
        self._file.add_event(Event(wall_time=time.time(), step=step, summary=summary))
