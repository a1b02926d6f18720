"""Label maps and objects as the content of files: PNG, TIFF, text for YOLO, GeoJSON for QuPath."""

import contextlib
import io
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from annotation.instances import Instances
from geojson import GeoJsonWriter
from image_headers import ImageError
from polygons import trace_labels
from tiff_io import write_tiff

PNG_LABELS = 65_535  # objects that a 16-bit label map holds


def encode(array: np.ndarray) -> bytes:
    """A PNG, grey or BGR; OpenCV's own settings are near the fastest and the smallest for masks and for pictures."""
    written, data = cv2.imencode(".png", array)
    if not written:
        raise ImageError(f"an array of shape {array.shape} could not be encoded as PNG; expected fewer pixels")
    return data.tobytes()


def encode_labels(labels: np.ndarray, count: int) -> tuple[str, bytes]:
    """Suffix and content of a label file: PNG of 16 bits, or TIFF of 32 when there are more objects."""
    if count <= PNG_LABELS:
        return ".png", encode(labels.astype(np.uint16))
    return ".tif", encode_tiff(labels)


def encode_tiff(labels: np.ndarray) -> bytes:
    data = io.BytesIO()
    write_tiff(data, labels.astype(np.uint32)[..., None])
    return data.getvalue()


def write_quickly(path: Path, data: bytes) -> None:
    """Write a file that can be made again, whole or not at all, but without waiting for the disk."""
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(error.errno, f"{error.strerror or error}; nothing was saved here", str(path)) from error


def yolo_text(objects: Mapping[str, list[Any]], size: tuple[int, int], *, outlines: bool) -> str:
    """A line for each object: class, then centre and size of the box, or the outline; in shares of the image."""
    height, width = size
    if outlines:
        return "".join(f"0 {_shares(outline, height, width)}\n" for outline in objects["outline"])
    boxes = zip(*(objects[f"box_{side}"] for side in ("left", "top", "width", "height")), strict=True)
    return "".join(
        f"0 {(x + w / 2) / width:.6f} {(y + h / 2) / height:.6f} {w / width:.6f} {h / height:.6f}\n"
        for x, y, w, h in boxes
    )


def write_geojson(path: Path, found: Instances) -> None:
    """The outlines of the objects as QuPath reads them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with GeoJsonWriter(path) as writer:
        for polygon in trace_labels(found.labels.view(np.uint32)):
            score = float(found.scores[polygon.label - 1])
            writer.write(polygon, "object", measurements={"Area px^2": polygon.area, "Score": round(score, 4)})


def _shares(outline: list[int], height: int, width: int) -> str:
    """An outline x, y, x, y, ... without its steps, at most a pixel beside it, in shares of the image."""
    points = np.array(outline, np.int32).reshape(-1, 1, 2)
    plain = cv2.approxPolyDP(points, 1.0, True)
    shares = (plain if len(plain) > 2 else points)[:, 0] / (width, height)
    return " ".join(f"{value:.6f}" for value in shares.reshape(-1).tolist())
