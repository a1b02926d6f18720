"""The SAM engine: pictures are encoded once and kept, prompts decoded in chunks, masks pasted into one label map."""

import contextlib
import hashlib
import os
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from annotation.instances import Instances, number_instances, paste_masks
from annotation.narrowing import grow_back, narrow
from annotation.sam_masks import (
    Box,
    Frame,
    Mask,
    choose_windows,
    clean_boxes,
    cut_by_window,
    drop_duplicates,
    grid_points,
    list_windows,
    make_mask,
    margin_box,
)
from annotation.sam_options import SamOptions
from image_io import atomic_write, cache_dir
from plots import to_display

ENGINE = "sam"
REVISION = 1  # of the way pictures are encoded: raise it when that changes
EVERYTHING_IOU, EVERYTHING_STABILITY = 0.88, 0.95  # as segment-anything has them
DUPLICATE_IOU = 0.7  # of boxes, without a detector
KEPT_NAME = re.compile(r"[0-9a-f]{64}\.npz")
DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


class Network(Protocol):
    """What SAM and SAM 2 have in common.

    Attributes:
        name: for messages: the path of the weights.
        digest: of the weights.
        side: of the square that is encoded, in pixels.
        keep_ratio: see Frame.
        mean, std: of the channels R, G, B, for values of 0 to 255.
        device: where it computes.
    """

    name: str
    digest: str
    side: int
    keep_ratio: bool
    mean: Sequence[float]
    std: Sequence[float]
    device: torch.device

    def encode(self, pixels: Tensor) -> list[Tensor]:
        """Features of a square (1, 3, side, side), normalised and padded."""

    def decode(
        self, features: list[Tensor], boxes: Tensor | None, points: Tensor | None, labels: Tensor | None, several: bool
    ) -> tuple[Tensor, Tensor]:
        """Answer prompts given in pixels of the square.

        Args:
            features: of encode.
            boxes: (n, 4) or None.
            points: (n, p, 2) or None.
            labels: (n, p), 1 in the object, 0 outside it.
            several: three answers to each prompt in place of one.

        Returns:
            Logits (n, answers, cells, cells) and the IoU that is expected of them (n, answers).
        """


@dataclass(frozen=True, eq=False)
class Encoding:
    """An encoded window of a picture."""

    frame: Frame
    features: list[Tensor]


class EmbeddingCache:
    """Encoded windows in a folder whose size is bounded: the ones not used for longest go first."""

    def __init__(self, folder: Path, gigabytes: float) -> None:
        self.folder, self.limit = folder, int(gigabytes * 1e9)

    def load(self, key: str) -> list[np.ndarray] | None:
        """Arrays kept under a key, or None; a damaged file counts as missing."""
        path = self._path(key)
        try:
            with np.load(path, allow_pickle=False) as stored:
                arrays = [stored[f"arr_{place}"] for place in range(len(stored.files))]
            os.utime(path)
        except DAMAGE:
            return None
        return arrays or None

    def save(self, key: str, arrays: Sequence[np.ndarray]) -> None:
        """Keep arrays under a key; where that cannot be, a warning says so once."""
        if sum(array.nbytes for array in arrays) > self.limit:
            return
        path = self._path(key)
        try:
            with atomic_write(path) as file:
                np.savez(file, *arrays)
            self._shrink(path)
        except OSError as error:
            warnings.warn(
                f"encoded pictures cannot be kept in {self.folder} ({error.strerror or error}): they are computed anew "
                "each time; name a folder that can be written with --sam-cache, or --sam-cache-gb 0",
                stacklevel=2,
            )
            self.limit = -1

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.npz"

    def _shrink(self, newest: Path) -> None:
        found = []
        for path in self.folder.iterdir():
            if not KEPT_NAME.fullmatch(path.name):  # somebody else's
                continue
            try:
                status = path.stat()
            except FileNotFoundError:  # another process was quicker
                continue
            found.append((path == newest, status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, _, size, _ in found)
        for _, _, size, path in sorted(found):
            if total <= self.limit:
                break
            path.unlink(missing_ok=True)
            total -= size


class Sam:
    """SAM with its settings. Pictures may have any size, number of channels and type (see plots.to_display).

    Attributes:
        limits: display_limits of the whole whose parts are the pictures; None: each picture has its own.
    """

    def __init__(
        self, network: Network, options: SamOptions | None = None, limits: tuple[float, float] | None = None
    ) -> None:
        self.network, self.options, self.limits = network, options or SamOptions(), limits
        folder = self.options.cache or cache_dir() / "sam"
        self.cache = EmbeddingCache(folder, self.options.cache_gb) if self.options.cache_gb else None
        self._last: tuple[str, list[np.ndarray]] | None = None

    # ---- prompts ----

    def segment_boxes(self, image: np.ndarray, boxes: np.ndarray) -> Instances:
        """The object in each box.

        Args:
            image: (H, W, C), RGB then extras.
            boxes: (n, 4) left, top, right, bottom in pixels of the image; the first pixel reaches from 0 to 1.

        Returns:
            Objects; scores are the predicted IoU times the stability. Boxes without an object, outside the image or
            of no area give none, and of boxes of one object the best mask stays.
        """
        return self._finish(image, self.find_in_boxes(image, boxes))

    def segment_points(self, image: np.ndarray, points: np.ndarray, labels: np.ndarray | None = None) -> Instances:
        """The object at each point, the best of three answers.

        Args:
            image: (H, W, C), RGB then extras.
            points: (n, 2) x and y in pixels, an object for each; or (n, p, 2), an object for each p points.
            labels: (n, p), 1: the object, 0: not the object; None: all are the object.
        """
        return self._finish(image, self.find_at_points(image, points, labels))

    def segment_everything(self, image: np.ndarray) -> Instances:
        """All objects, asked for at a grid of points; firm and well-rated masks stay, duplicates go.

        Args:
            image: (H, W, C), RGB then extras.
        """
        return self._finish(image, self.find_everything(image))

    def find_in_boxes(self, image: np.ndarray, boxes: np.ndarray) -> list[Mask]:
        """Masks that may overlap, in the order of their boxes; see segment_boxes."""
        height, width = image.shape[:2]
        boxes, places = clean_boxes(boxes, height, width, self.options.max_share)
        middles = boxes.reshape(-1, 2, 2).mean(axis=1, keepdims=True) if self.options.points else None
        return self._answer(image, boxes, places, boxes, middles, None)

    def find_at_points(self, image: np.ndarray, points: np.ndarray, labels: np.ndarray | None = None) -> list[Mask]:
        """Masks that may overlap, in the order of their points; see segment_points."""
        points = np.asarray(points, np.float64)
        points = points.reshape(-1, 1, 2) if points.ndim < 3 else points
        labels = np.ones(points.shape[:2], np.int64) if labels is None else np.asarray(labels).reshape(points.shape[:2])
        with np.errstate(invalid="ignore"):
            inside = (points >= 0) & (points <= image.shape[1::-1])
        places = np.flatnonzero(inside.all(axis=(1, 2)))
        points, labels = points[places], labels[places]
        around = np.concatenate([points.min(axis=1), points.max(axis=1)], axis=1)
        return self._answer(image, around, places, None, points, labels)

    def find_everything(self, image: np.ndarray) -> list[Mask]:
        """Masks that may overlap by less than duplicates do; see segment_everything."""
        height, width = image.shape[:2]
        picture = to_display(image, self.limits)
        found: list[Mask] = []
        for window in list_windows(height, width, self.options.window):
            encoding = self._encode(picture, window)
            points = grid_points(encoding.frame, self.options.points_per_side)[:, None]
            found += drop_duplicates(list(self._explore(encoding, points, height, width)), DUPLICATE_IOU)
        return drop_duplicates(found, DUPLICATE_IOU)

    # ---- pictures ----

    def encode(self, image: np.ndarray) -> Encoding:
        """Encode a whole picture (H, W, C), or take its features from the cache."""
        return self._encode(to_display(image, self.limits), (0, 0, image.shape[1], image.shape[0]))

    def _encode(self, picture: np.ndarray, window: Box) -> Encoding:
        """Features of a window of an RGB picture (H, W, 3) uint8, always rounded to 16 bit: kept or not, the same."""
        left, top, right, bottom = window
        pixels = np.ascontiguousarray(picture[top:bottom, left:right])
        network = self.network
        frame = Frame(window, network.side, network.keep_ratio)
        key = _encoding_key(pixels, network)
        if self._last is None or self._last[0] != key:
            arrays = self.cache.load(key) if self.cache else None
            if arrays is None:
                arrays = [_to_half(features) for features in self._run_encoder(pixels, frame)]
                if self.cache:
                    self.cache.save(key, arrays)
            self._last = key, arrays
        return Encoding(frame, [torch.from_numpy(array).to(network.device).float() for array in self._last[1]])

    def _run_encoder(self, pixels: np.ndarray, frame: Frame) -> list[Tensor]:
        """Features of a window (h, w, 3) uint8 RGB."""
        rows, columns = frame.used
        resized = Image.fromarray(pixels).resize((columns, rows), Image.Resampling.BILINEAR)
        mean, std = (np.asarray(values, np.float32) for values in (self.network.mean, self.network.std))
        square = np.zeros((1, 3, frame.side, frame.side), np.float32)
        square[0, :, :rows, :columns] = ((np.asarray(resized, np.float32) - mean) / std).transpose(2, 0, 1)
        with torch.inference_mode(), _memory_errors("--device cpu"):
            features = self.network.encode(torch.from_numpy(square).to(self.network.device))
        if not all(bool(torch.isfinite(part).all()) for part in features):
            raise RuntimeError(_not_finite(self.network.name, "encoder"))
        return features

    # ---- answers ----

    def _answer(
        self,
        image: np.ndarray,
        around: np.ndarray,
        places: np.ndarray,
        boxes: np.ndarray | None,
        points: np.ndarray | None,
        labels: np.ndarray | None,
    ) -> list[Mask]:
        """The best mask for each prompt, window by window.

        Args:
            image: (H, W, C).
            around: (n, 4) a box around each prompt, which chooses its window.
            places: (n,) of the prompts among all that were given.
            boxes: (n, 4) or None. points: (n, p, 2) or None. labels: (n, p) or None: all 1.
        """
        if not len(places):
            return []
        height, width = image.shape[:2]
        picture = to_display(image, self.limits)
        windows = list_windows(height, width, self.options.window)
        owners = choose_windows(around, windows, height, width)
        found: list[Mask] = []
        for number in np.unique(owners).tolist():
            encoding = self._encode(picture, windows[number])
            mine = np.flatnonzero(owners == number)
            for some in self._chunks(mine):
                parts = (None if part is None else part[some] for part in (boxes, points, labels))
                logits, ious = self._decode(encoding, *parts, several=boxes is None)
                for place, best in enumerate(ious.argmax(axis=1).tolist()):
                    limits = None if boxes is None else margin_box(boxes[some[place]], encoding.frame)
                    mask = make_mask(
                        encoding.frame,
                        logits[place, best],
                        iou=float(ious[place, best]),
                        prompt=int(places[some[place]]),
                        within=limits,
                    )
                    if mask is not None and self._is_good(mask, 0, 0):
                        found.append(mask)
        return sorted(found, key=lambda mask: mask.prompt)

    def _explore(self, encoding: Encoding, points: np.ndarray, height: int, width: int) -> Iterator[Mask]:
        """Good masks at points (n, 1, 2) of a window, all three answers to each."""
        frame = encoding.frame
        for some in self._chunks(np.arange(len(points))):
            logits, ious = self._decode(encoding, None, points[some], None, several=True)
            least = EVERYTHING_IOU if self.options.min_iou is None else self.options.min_iou
            for place, answer in zip(*np.nonzero(ious >= least), strict=True):
                iou = float(ious[place, answer])
                mask = make_mask(frame, logits[place, answer], iou=iou, prompt=int(some[place]))
                if mask is None or cut_by_window(mask, frame, height, width):
                    continue
                small = mask.height * mask.width <= self.options.max_share * height * width
                if small and self._is_good(mask, EVERYTHING_IOU, EVERYTHING_STABILITY):
                    yield mask

    def _chunks(self, places: np.ndarray) -> Iterator[np.ndarray]:
        for start in range(0, len(places), self.options.chunk):
            yield places[start : start + self.options.chunk]

    def _is_good(self, mask: Mask, least_iou: float, least_stability: float) -> bool:
        options = self.options
        least_iou = least_iou if options.min_iou is None else options.min_iou
        least_stability = least_stability if options.min_stability is None else options.min_stability
        return mask.iou >= least_iou and mask.stability >= least_stability

    def _decode(
        self,
        encoding: Encoding,
        boxes: np.ndarray | None,
        points: np.ndarray | None,
        labels: np.ndarray | None,
        *,
        several: bool,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ask about some prompts at once, in pixels of the picture; the only place where they are scaled.

        Returns:
            Logits (n, answers, cells, cells) float32 and expected IoU (n, answers).
        """
        device, frame = self.network.device, encoding.frame
        given_boxes = given_points = given_labels = None
        if boxes is not None:
            given_boxes = torch.from_numpy(frame.to_square(boxes.reshape(-1, 2, 2)).reshape(-1, 4)).to(device)
        if points is not None:
            given_points = torch.from_numpy(frame.to_square(points)).to(device)
            labels = np.ones(points.shape[:2], np.int64) if labels is None else labels.astype(np.int64)
            given_labels = torch.from_numpy(labels).to(device)
        with torch.inference_mode(), _memory_errors("a smaller --sam-chunk"):
            logits, ious = self.network.decode(encoding.features, given_boxes, given_points, given_labels, several)
            answers = logits.float().cpu().numpy(), ious.float().cpu().numpy()
        if not all(np.isfinite(part).all() for part in answers):
            raise RuntimeError(_not_finite(self.network.name, "decoder"))
        return answers

    def _finish(self, image: np.ndarray, masks: list[Mask]) -> Instances:
        """Masks in one label map, narrowed and grown back if asked for."""
        height, width = image.shape[:2]
        scores = np.array([mask.score for mask in masks], np.float32)
        crops = [((mask.left, mask.top), mask.pixels()) for mask in masks]
        found = paste_masks(crops, scores, height, width, ENGINE)
        if not self.options.narrowing or not len(found):
            return found
        labels = narrow(found.labels, self.options.narrowing)
        if self.options.grow_back:
            labels = grow_back(labels, image, found.labels > 0)
        return number_instances(labels, found.scores, found.engines)


def _encoding_key(pixels: np.ndarray, network: Network) -> str:
    """What the features of a window (h, w, 3) uint8 depend on, as one name."""
    facts = (pixels.shape, network.digest, network.side, network.keep_ratio, tuple(network.mean), tuple(network.std))
    return hashlib.sha256(repr((REVISION, *facts)).encode() + pixels.data).hexdigest()


def _to_half(features: Tensor) -> np.ndarray:
    largest = float(np.finfo(np.float16).max)
    return features.float().clamp(-largest, largest).cpu().numpy().astype(np.float16)


def _not_finite(name: str, part: str) -> str:
    return f"{name}: its {part} gave numbers that are not finite, expected finite ones: are its weights whole?"


@contextlib.contextmanager
def _memory_errors(remedy: str) -> Iterator[None]:
    """Say what helps when the device has too little memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RuntimeError(f"the device has too little memory for SAM: try {remedy}") from error
