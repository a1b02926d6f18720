"""How good drawn labels are: compared with masks or label maps that a person made, object by object and by pixel.

Objects below a least area are left out on both sides before anything is counted. A mask has one value beside 0, such as
255, and its 4-connected components are its objects; in a label map every value is one object.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from annotation.instances import number_instances, number_values
from annotation.score_options import ScoreOptions
from image_io import ImageError, list_images, read_mask, write_text
from object_metrics import OBJECT_IOUS, ObjectScores, object_scores
from pairing import MASK_DIRS
from tables import format_csv

LABEL_DIRS = ("labels", *MASK_DIRS)  # where references lie in a folder that holds none itself
COLUMNS = (
    *("image", "group", "images", "f1", "precision", "recall", "f1_mean", "dice", "predicted", "true", "count_error"),
    *("mean_diameter_predicted", "mean_diameter_true", "diameter_distance"),
)
MANY_PIECES = 3  # for each object of a label map: then its values are rather classes
EVERY = "all"  # name of the row over everything


# ----------------------------------------------------------------------------------------------------------------------
# References


class References:
    """Masks or label maps of a folder, by stem.

    Attributes:
        folder: where the files lie. files: stem to path.
        notes: what is to be said about files that were read.
    """

    def __init__(self, options: ScoreOptions) -> None:
        if options.folder is None:
            raise ValueError("no folder of references is given; expected one")
        self.options, self.notes = options, list[str]()
        self.folder, self.files = _find_references(options.folder)

    def __contains__(self, stem: str) -> bool:
        return stem in self.files

    def read(self, stem: str, shape: tuple[int, int] | None = None) -> np.ndarray:
        """The objects of one image, (H, W) int32, without gaps in their numbers, small ones included.

        Args:
            shape: (height, width) that the image has.

        Raises:
            ImageError: unreadable, of another size than the image, or no mask though it was said to be one.
        """
        path = self.files[stem]
        mask = read_mask(path)
        if shape is not None and mask.shape != tuple(shape):
            raise ImageError(
                f"{path} is {mask.shape[0]}x{mask.shape[1]}, its image is {shape[0]}x{shape[1]}; expected the same "
                "size: a reference is compared pixel by pixel"
            )
        objects = to_objects(mask, self.options.kind, self.options.value)
        if self.options.kind == "auto" and self.options.value is None:
            self._doubt(path, objects)
        return objects

    def _doubt(self, path: Path, objects: np.ndarray) -> None:
        """Say so when a file that is taken as a label map looks like classes: its objects lie in many pieces."""
        count, pieces = int(objects.max(initial=0)), len(number_instances(objects, 1.0, "reference", pieces="all"))
        if count and pieces > MANY_PIECES * count:
            self.notes.append(
                f"{path} is taken as a label map of {count} objects, which lie in {pieces} pieces: if its values are "
                "classes, give --against-kind masks, or the class that counts with --against-value N"
            )

    def common(self, stems: Iterable[str]) -> list[str]:
        """The images that have a reference.

        Raises:
            ValueError: none has.
        """
        stems = list(stems)
        both = [stem for stem in stems if stem in self]
        if not both:
            raise ValueError(
                f"no image has a reference in {self.folder}: the images are {', '.join(sorted(stems)[:3])}, the "
                f"references {', '.join(sorted(self.files)[:3])}; files pair by stem"
            )
        return both

    def missing(self, stems: Iterable[str]) -> list[str]:
        """What has no partner, in words: images without a reference, and references without an image."""
        stems = set(stems)
        messages = []
        for lack, count, what in (
            (stems - self.files.keys(), len(stems), "images have no reference in"),
            (self.files.keys() - stems, len(self.files), "references have no image, from"),
        ):
            if lack:
                names = ", ".join(sorted(lack)[:5]) + (", ..." if len(lack) > 5 else "")
                messages.append(f"{len(lack)} of {count} {what} {self.folder}: {names}; files pair by stem")
        return messages


def _find_references(folder: Path) -> tuple[Path, dict[str, Path]]:
    if not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist; expected a folder with masks or label maps for --against")
    tried = []
    for place in (folder, *(folder / name for name in LABEL_DIRS)):
        if place.is_dir() or place == folder:
            files = list_images(place)
            if files:
                return place, files
            tried.append(str(place))
    raise FileNotFoundError(f"no masks in {' or '.join(tried)}; expected png or tif files with the stems of the images")


def to_objects(mask: np.ndarray, kind: str = "auto", value: int | None = None) -> np.ndarray:
    """Number the objects of a mask or a label map.

    Args:
        mask: (H, W) whole numbers, 0 is background. kind, value: see ScoreOptions.

    Returns:
        (H, W) int32, objects 1..n.
    """
    if value is not None:
        return connected_objects(mask == value)
    if kind == "masks":
        return connected_objects(mask != 0)
    objects = number_values(mask)
    return connected_objects(mask != 0) if kind == "auto" and objects.max(initial=0) == 1 else objects


def connected_objects(mask: np.ndarray) -> np.ndarray:
    """4-connected components of (H, W) bool as (H, W) int32, 1..n by their first pixels in reading order."""
    return cv2.connectedComponents(mask.astype(np.uint8), connectivity=4, ltype=cv2.CV_32S)[1]


def leave_out_small(labels: np.ndarray, min_area: int) -> np.ndarray:
    """Labels (H, W) without the objects that have fewer than `min_area` pixels; numbers keep."""
    if min_area <= 1 or labels.size == 0:
        return labels
    areas = np.bincount(labels.ravel())
    return np.where(areas >= min_area, np.arange(len(areas)), 0).astype(labels.dtype)[labels]


# ----------------------------------------------------------------------------------------------------------------------
# Scores


@dataclass(frozen=True, eq=False)
class LabelScores:
    """How well label maps agree with references; add (+) those of several images before summary().

    Attributes:
        objects: see object_metrics.
        shared, predicted_pixels, true_pixels: pixels of objects on both sides, on ours, on theirs.
    """

    objects: ObjectScores
    shared: int
    predicted_pixels: int
    true_pixels: int

    def __add__(self, other: "LabelScores") -> "LabelScores":
        return LabelScores(
            self.objects + other.objects,
            self.shared + other.shared,
            self.predicted_pixels + other.predicted_pixels,
            self.true_pixels + other.true_pixels,
        )

    @property
    def dice(self) -> float | None:
        """Of the pixels of objects against the rest; None when neither side has any."""
        total = self.predicted_pixels + self.true_pixels
        return 2 * self.shared / total if total else None

    def f1(self, limit: float | None = 0.5) -> float | None:
        """F1 of objects at one limit of the IoU, or its mean over 0.5, 0.55, ... 0.95 (None); None without objects."""
        total = len(self.objects.predicted_diameters) + len(self.objects.true_diameters)
        if not total:
            return None
        matched = self.objects.matched
        if limit is not None:
            matched = matched[OBJECT_IOUS.index(round(100 * limit)) :][:1]
        return float(2 * matched.mean() / total)

    def summary(self) -> dict[str, Any]:
        """JSON-able, None = undefined: that of the objects (see ObjectScores.summary), and dice.

        `f1_50` stands beside f1, which is the mean over all limits.
        """
        return {"dice": self.dice, "f1_50": self.f1(), **self.objects.summary()}


def score_labels(labels: np.ndarray, reference: np.ndarray, min_area: int = 0) -> LabelScores:
    """Compare the labels of one image with its reference.

    Args:
        labels, reference: (H, W) integers, 0 is background, every other value is one object.
        min_area: objects with fewer pixels are left out on both sides.

    Raises:
        ValueError: shapes differ, or values are not whole or negative.
    """
    labels, reference = leave_out_small(labels, min_area), leave_out_small(reference, min_area)
    objects = object_scores(labels, reference)
    ours, theirs = labels != 0, reference != 0
    counts = (np.count_nonzero(side) for side in (ours & theirs, ours, theirs))
    return LabelScores(objects, *(int(count) for count in counts))


class ScoreBoard:
    """Scores of images one by one, of groups and of everything.

    Attributes:
        images: name to (group or None, scores).
        notes: doubts about references, to be said.
    """

    def __init__(self, group_pattern: str | None = None) -> None:
        self.group_pattern = group_pattern
        self.images: dict[str, tuple[str | None, LabelScores]] = {}
        self.notes: list[str] = []

    def add(self, stem: str, scores: LabelScores) -> None:
        """Take the scores of an image.

        Raises:
            DatasetError: the pattern does not match its name.
        """
        from pairing import group_name

        group = None if self.group_pattern is None else group_name(stem, self.group_pattern)
        self.images[stem] = group, scores

    @property
    def groups(self) -> dict[str, LabelScores]:
        """Sums over each group, in order of name; empty without a pattern."""
        found: dict[str, LabelScores] = {}
        for group, scores in self.images.values():
            if group is not None:
                found[group] = found[group] + scores if group in found else scores
        return dict(sorted(found.items()))

    @property
    def total(self) -> LabelScores | None:
        """The sum over everything; None without images."""
        total = None
        for _, scores in self.images.values():
            total = scores if total is None else total + scores
        return total

    def summary(self) -> dict[str, Any]:
        """JSON-able: `all` and `groups` as LabelScores.summary gives them, with the mean of images' F1 in each."""
        if not self.images:
            return {EVERY: None, "groups": {}}
        parts = {EVERY: list(self.images.values())}
        for name in self.groups:
            parts[name] = [item for item in self.images.values() if item[0] == name]
        means = {name: _mean(scores.f1() for _, scores in items) for name, items in parts.items()}
        assert self.total is not None
        groups = {name: {**scores.summary(), "f1_50_per_image": means[name]} for name, scores in self.groups.items()}
        return {EVERY: {**self.total.summary(), "f1_50_per_image": means[EVERY]}, "groups": groups}

    def rows(self) -> list[dict[str, Any]]:
        """A row of COLUMNS for each image, then for each group, then for everything."""
        rows = [_row(stem, group, scores) for stem, (group, scores) in self.images.items()]
        rows += [_row("", group, scores) for group, scores in self.groups.items()]
        return rows + ([_row(EVERY, None, self.total)] if self.total else [])

    def lines(self) -> list[str]:
        """The scores of groups and of everything in words."""
        named = {**self.groups, **({EVERY: self.total} if self.total else {})}
        return [_spell(name, scores) for name, scores in named.items() if scores is not None]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _row(image: str, group: str | None, scores: LabelScores) -> dict[str, Any]:
    summary = scores.summary()
    at = summary["at"][0]
    return {
        **{name: summary[name] for name in COLUMNS if name in summary},
        "image": image,
        "group": group,
        "f1": at["f1"],
        "precision": at["precision"],
        "recall": at["recall"],
        "f1_mean": summary["f1"],
    }


def _spell(name: str, scores: LabelScores) -> str:
    summary = scores.summary()

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    words = (
        f"{name}: F1@0.5 {number(summary['f1_50'])}, F1@0.5:0.95 {number(summary['f1'])}, "
        f"Dice {number(summary['dice'])}, {summary['predicted']} objects for {summary['true']}"
    )
    if summary["mean_diameter_error"] is not None:
        words += f", mean diameter {100 * summary['mean_diameter_error']:+.0f} %"
    return f"{words} ({summary['images']} images)"


def write_scores(folder: Path, board: ScoreBoard, decimal: str = "comma") -> Path:
    """Write scores.csv into a folder: a row for each image, each group and everything."""
    path = folder / "scores.csv"
    write_text(path, format_csv(COLUMNS, board.rows(), decimal))
    return path


def score_files(found: Mapping[str, Path], options: ScoreOptions) -> tuple[ScoreBoard, list[str]]:
    """Compare label maps on disk with references, one image at a time.

    Args:
        found: stem to label map.

    Returns:
        The scores, and what could not be compared: missing pairs and unreadable files.

    Raises:
        FileNotFoundError: there are no references.
        ValueError: the group pattern does not match a name, or no image at all has a reference.
    """
    references = References(options)
    failures = references.missing(found)
    both = references.common(found)
    board = ScoreBoard(options.group_pattern)
    for stem in both:
        try:
            labels = number_values(read_mask(found[stem]))
            board.add(stem, score_labels(labels, references.read(stem, labels.shape), options.min_area))
        except (OSError, ImageError) as error:
            failures.append(str(error))
    board.notes += references.notes
    return board, failures
