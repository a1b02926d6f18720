"""The engine `model`: a network that train.py made, as a checkpoint or an ONNX file, gives objects with scores.

Pixels meet the network as in predict.py: statistics, preprocessing, tile and reduction are those of the checkpoint.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np

import cli
from annotation.instances import Instances, number_instances
from annotation.merging import boxes_of
from annotation.trained_options import TrainedOptions
from backends import Forward, load_forward
from checkpoint import ModelConfig
from image_io import ImageError, preprocess, resize_image
from outputs import decide
from pairing import Pair
from predictor import Picture, TileOptions, Whole, plan_picture, predict_picture
from unlike import Moments, Told

ENGINE = "model"


class MemoryPicture(Picture):
    """A picture that is in memory already."""

    def __init__(self, image: np.ndarray, valid: np.ndarray | None, config: ModelConfig) -> None:
        self.pair, self.configs, self.notes = Pair("image", Path("the image")), [config], []
        self.seen = Moments()
        self.slide: Any = SimpleNamespace(path=self.pair.image)  # named in messages
        self.sources = [Whole(image, valid)]
        self.height, self.width, self.scale = *image.shape[:2], 1.0

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""


@dataclass
class Trained:
    """A network that is ready; call it with images.

    Attributes:
        note: what runs the network. notes: what is to be said about images so far, each kind once.
    """

    options: TrainedOptions
    config: ModelConfig
    forward: Forward
    note: str
    notes: list[str] = field(default_factory=list)
    told: Told = field(default_factory=Told)

    def __post_init__(self) -> None:
        self.threshold = cli.pick_threshold(self.options.threshold, self.config.thresholds, self.config.num_logits)
        self.class_indices = pick_classes(self.config, self.options.classes)

    def segment(self, image: np.ndarray, cache: dict[Any, Any] | None = None) -> Instances:
        """The objects of an image (H, W, C) uint8, uint16 or float32, NaN where nothing is known.

        Args:
            cache: keeps the probabilities of this image for other options of the same network.

        Raises:
            ImageError: another number of channels than the network takes.
            ValueError: probabilities are not finite. RuntimeError: out of memory.
        """
        cache = {} if cache is None else cache
        if self.options.path not in cache:
            cache[self.options.path] = self.predict(image)
        return self.decide(cache[self.options.path])

    def with_options(self, options: TrainedOptions) -> "Trained":
        """The same network with other rules for its answer.

        Raises:
            cli.UsageError: see load_trained.
        """
        return replace(self, options=replace(options, path=self.options.path))

    def predict(self, image: np.ndarray) -> np.ndarray:
        """Probabilities (K, H, W) float32 of an image; what segment has from the network, for any threshold."""
        config = self.config
        if image.ndim != 3 or image.shape[2] != len(config.channels):
            raise ImageError(
                f"the image has the shape {image.shape}, {self.options.path} takes (H, W, {len(config.channels)}): "
                f"{' '.join(config.channels)}; convert the image, or use a network trained on such images"
            )
        if image.dtype.name != config.dtype:
            self._say(f"{self.options.path} was trained on {config.dtype}, images are {image.dtype}")
        pixels, valid = known_pixels(image)
        pixels = preprocess(pixels, config.preprocess)
        size, reduction = pixels.shape[:2], config.geometry.reduction
        if reduction != 1:
            small = tuple(max(1, round(side / reduction)) for side in size)
            pixels = resize_image(pixels, (small[0], small[1]))
            valid = None if valid is None else cv2.resize(valid.view(np.uint8), small[::-1]).view(bool)
        probs = self._run(pixels, valid)
        if reduction != 1:
            planes = [cv2.resize(plane, size[::-1], interpolation=cv2.INTER_LINEAR) for plane in probs]
            probs = np.stack(planes)
        return probs

    def _run(self, pixels: np.ndarray, valid: np.ndarray | None) -> np.ndarray:
        tiles = TileOptions.from_config(self.config)
        if self.options.batch:
            tiles = replace(tiles, batch=self.options.batch)
        with MemoryPicture(pixels, valid, self.config) as picture:
            plan = plan_picture(picture, tiles)
            probs = np.empty((self.config.num_logits, *pixels.shape[:2]), np.float32)
            with closing(predict_picture(picture, self.forward, plan, tiles)) as bands:
                for top, band in bands:
                    probs[:, top : top + band.shape[1]] = band
            if pixels.dtype.name == self.config.dtype:
                whose = f"an image unlike those that {self.options.path} was trained on"
                for finding in picture.seen.findings(self.config):
                    self.told.tell(self.notes.append, whose, finding)
        return probs

    def decide(self, probs: np.ndarray) -> Instances:
        """The objects behind probabilities (K, H, W).

        An object is a 4-connected piece of one class, or a part of one; its score is the mean probability of its
        class.
        """
        chosen = np.zeros(256, np.int32)
        chosen[self.class_indices] = np.arange(1, len(self.class_indices) + 1)
        classes = chosen[decide(probs, self.threshold)]
        found = number_instances(classes, 1.0, ENGINE, pieces="all")
        if self.options.split:
            labels = split_necks(found.labels, self.options.split_depth)
            found = number_instances(labels, 1.0, ENGINE, pieces="all")
        own = probs[0] if len(probs) == 1 else np.take_along_axis(probs, self._planes(classes), axis=0)[0]
        areas = np.bincount(found.labels.ravel(), minlength=len(found) + 1)
        sums = np.bincount(found.labels.ravel(), own.ravel(), minlength=len(found) + 1)
        scores = np.clip(sums[1:] / np.maximum(areas[1:], 1), 0, 1).astype(np.float32)
        return Instances(found.labels, scores, found.engines)

    def _planes(self, classes: np.ndarray) -> np.ndarray:
        """The plane of each pixel's class, (1, H, W); any of them for the background."""
        return np.array([0, *self.class_indices], np.int64)[classes][None]

    def _say(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


def load_trained(options: TrainedOptions, device: str, *, megapixels: float | None = None) -> Trained:
    """Read the network of the options.

    Args:
        megapixels: what it is to see in all, for the backend auto.

    Raises:
        FileNotFoundError, ValueError, RuntimeError: see backends.load_forward; cli.UsageError: an unknown class, or a
            threshold that does not fit the network; ImageError: it needs extra channels.
    """
    config, forward, note = load_forward(options.path, device, backend=options.backend, megapixels=megapixels)
    if config.add_dirs:
        raise ImageError(
            f"{options.path} also takes the channels {' '.join(config.add_dirs)}, which pictures alone do not have; "
            "use a network without them, or predict.py -d"
        )
    trained = Trained(options, config, forward, note)
    for assumption in config.assumptions:
        trained._say(f"{options.path} is {assumption}")
    if config.geometry.mpp:
        trained._say(
            f"{options.path} was trained at {config.geometry.mpp:g} um per pixel: images are taken as they are"
        )
    return trained


def pick_classes(config: ModelConfig, names: Sequence[str]) -> list[int]:
    """Class indices of names; of none all but the background.

    Raises:
        cli.UsageError: a name is unknown, or every pixel belongs to a class and none is named.
    """
    known = config.class_names
    unknown = [name for name in names if name not in known]
    if unknown:
        raise cli.UsageError(f"--model-classes {' '.join(unknown)}: the network knows {', '.join(known)}")
    if names:
        return [known.index(name) for name in dict.fromkeys(names)]
    if 0 in config.labels:
        raise cli.UsageError(
            f"the network has no background, its classes are {', '.join(known)}: say which are objects with "
            "--model-classes"
        )
    return list(range(1, len(known)))


def known_pixels(image: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """An image with 0 for what is not finite, and where it is, (H, W) bool; None: everywhere."""
    if image.dtype.kind != "f":
        return image, None
    finite = np.isfinite(image)
    if finite.all():
        return image, None
    return np.where(finite, image, 0).astype(image.dtype), finite.all(axis=2)


# ----------------------------------------------------------------------------------------------------------------------
# Objects that touch


COMPACT = 0.97  # objects that fill this share of their convex hull have no neck


def split_necks(labels: np.ndarray, depth: float) -> np.ndarray:
    """Part each object at its necks, by the watershed of the distance to its outline.

    Args:
        labels: (H, W) int32, 0 background, objects 1..n.
        depth: a neck is where the inscribed radius falls by more than this share of the smaller part's radius.

    Returns:
        (H, W) int32 with the same pixels above 0; numbers without gaps, in no order.
    """
    count = int(labels.max(initial=0))
    result, last = labels.copy(), count
    for number, (top, left, bottom, right) in enumerate(boxes_of(labels, count).tolist(), 1):
        window = np.s_[top:bottom, left:right]
        mask = labels[window] == number
        if not _may_have_neck(mask):
            continue
        parts = _split_one(mask, depth)
        extra = parts > 1
        result[window][extra] = last + parts[extra] - 1
        last += int(parts.max()) - 1
    return result


def _may_have_neck(mask: np.ndarray) -> bool:
    contours = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]
    area = cv2.contourArea(cv2.convexHull(np.concatenate(contours)))
    return sum(cv2.contourArea(contour) for contour in contours) < COMPACT * area


def _split_one(mask: np.ndarray, depth: float) -> np.ndarray:
    """Parts of one object (h, w) bool as 1..n, (h, w) int32."""
    from skimage.morphology import local_maxima, reconstruction
    from skimage.segmentation import watershed

    framed = np.pad(mask, 1).astype(np.uint8)
    distance = cv2.distanceTransform(framed, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    distance = np.where(framed > 0, cv2.GaussianBlur(distance, (0, 0), 0.7), 0)
    peaks = local_maxima(reconstruction(distance * (1 - depth), distance), connectivity=2) & (framed > 0)
    seeds = cv2.connectedComponents(peaks.astype(np.uint8), connectivity=8, ltype=cv2.CV_32S)[1]
    return watershed(-distance, seeds, mask=framed > 0).astype(np.int32)[1:-1, 1:-1]
