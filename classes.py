"""Mask values on disk -> class indices, and the flags that choose the classes."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from checkpoint import ModelConfig
from image_io import IGNORE_INDEX
from pairing import DatasetError

UNLISTED = 254  # marks a mask value that no class takes, while a mask is turned into class indices
MAX_LABEL = 65535  # of labels that can be named; larger values in a uint32 map are objects or background
MANY_CLASSES = 250  # class indices are 8 bit, and some of them mean something else
BACKGROUND, OBJECT = "background", "object"  # names of classes that were given none
SHOWN = 20  # labels that a message lists


@dataclass(frozen=True)
class ClassMap:
    """Turns mask values into class indices.

    labels: mask values to learn, in order. Every other value is background, class 0, unless the list holds 0:
        then there is no implicit background. Empty: any non-zero value is the object.
    mask_threshold: values above it are the object, whatever the labels.
    max_mask_val: largest value a mask may hold; 0 is no limit.
    """

    labels: tuple[int, ...]
    names: tuple[str, ...]
    ignore_label: int | None = None
    mask_threshold: float | None = None
    max_mask_val: int = 0

    @classmethod
    def from_config(cls, config: ModelConfig) -> "ClassMap":
        """The classes that a checkpoint was trained on."""
        return cls(config.labels, config.class_names, config.ignore_label, config.mask_threshold, config.max_mask_val)

    @property
    def has_background(self) -> bool:
        """Whether class 0 stands for every value that is not listed."""
        return 0 not in self.labels

    @cached_property
    def table(self) -> np.ndarray:
        """Class index for each mask value from 0 to 65535, uint8: 255 is ignored, 254 is taken by no class."""
        values = np.arange(MAX_LABEL + 1)
        if self.mask_threshold is not None:
            table = (values > self.mask_threshold).astype(np.uint8)
        elif not self.labels:
            table = (values > 0).astype(np.uint8)
        else:
            table = np.full(len(values), self._unlisted(0), np.uint8)
            table[list(self.labels)] = np.arange(len(self.labels)) + self.has_background
        if self.max_mask_val:
            table[self.max_mask_val + 1 :] = UNLISTED
        if self.ignore_label is not None:
            table[self.ignore_label] = IGNORE_INDEX
        return table

    def _unlisted(self, value: int) -> int:
        return UNLISTED if not self.has_background or 0 < self.max_mask_val < value else 0

    @property
    def annotations(self) -> "AnnotationLabels":
        """Which mask values stand for the classes that polygons and run lengths name."""
        names = self.names[int(self.has_background) :]
        any_value = MAX_LABEL if self.mask_threshold is not None else 1
        return AnnotationLabels(() if names == (OBJECT,) else names, self.labels or (any_value,))

    def indices(self, values: np.ndarray) -> np.ndarray:
        """Class index uint8 of each mask value, of any shape; 254 where no class takes it."""
        if values.dtype.itemsize <= 2:
            return self.table[values]
        beyond = 1 if not self.labels or self.mask_threshold is not None else self._unlisted(MAX_LABEL + 1)
        return np.where(values > MAX_LABEL, np.uint8(beyond), self.table[np.minimum(values, MAX_LABEL)])

    def encode(self, values: np.ndarray, path: Path) -> np.ndarray:
        """Class indices (H, W) uint8, 255 where ignored, from mask values (H, W).

        Raises:
            DatasetError: a value that no class takes; `path` is named.
        """
        mask = self.indices(values)
        if (mask == UNLISTED).any():
            bad = np.unique(values[mask == UNLISTED])[:8].tolist()
            good = np.flatnonzero(self.table != UNLISTED)[:20].tolist()
            raise DatasetError(f"mask {path} holds the labels {bad}, out of range; expected {good}")
        return mask


@dataclass(frozen=True)
class AnnotationLabels:
    """Mask values of annotations that name their class, as GeoJSON does.

    names: of the labels, in their order; none: whatever is annotated is the one object.
    """

    names: tuple[str, ...]
    labels: tuple[int, ...]

    @classmethod
    def from_options(cls, options: "ClassOptions") -> "AnnotationLabels":
        """What the flags say, before any mask was looked at."""
        names = options.names[1:] if options.names[:1] == (BACKGROUND,) else options.names
        if options.labels and options.labels != "nonzero":
            labels = _listed(options.labels, options.ignore_label)
        elif options.mask_threshold is not None:
            labels = (MAX_LABEL,)
        else:
            labels = tuple(range(1, (options.max_mask_val or len(names) or 1) + 1))
        return cls(names or (tuple(map(str, labels)) if len(labels) > 1 else ()), labels)

    def values(self, found: Iterable[str | None], path: Path) -> dict[str | None, int]:
        """The mask value of each name that annotations have; None stands for those without a name.

        Raises:
            DatasetError: a name that no class has; `path` is named.
        """
        table: dict[str | None, int] = dict(zip(self.names, self.labels, strict=False))
        if len(self.names) < 2:
            table[None] = self.labels[0]
        found = [*found]
        if not self.names:
            return dict.fromkeys(found, self.labels[0])
        table.setdefault(BACKGROUND, 0)
        unknown = [name for name in found if name not in table]
        if unknown:
            shown = ", ".join("no class at all" if name is None else repr(name) for name in unknown[:SHOWN])
            raise DatasetError(
                f"the annotations of {path} name {shown}; expected {', '.join(map(repr, self.names))}: add the others "
                "to --class-names, or rename or delete them in the file"
            )
        return {name: table[name] for name in found}


@dataclass(frozen=True)
class ClassOptions:
    """Which mask values are learned.

    labels: such as "64 128", or "nonzero", or None: masks of 0 and x mean x. max_mask_val: learn 1 to N instead.
    mask_threshold: values above it are the object instead. ignore_label: a value that counts nowhere.
    """

    labels: str | None = None
    names: tuple[str, ...] = ()
    ignore_label: int | None = None
    mask_threshold: float | None = None
    max_mask_val: int = 0


def resolve_classes(options: ClassOptions, counts: Counter[int]) -> ClassMap:
    """Turn options into a ClassMap.

    Args:
        counts: pixels of each value in the training masks.

    Raises:
        DatasetError: labels that cannot be, a list that is needed, or names that do not fit.
    """
    if options.ignore_label is not None and not 0 <= options.ignore_label <= MAX_LABEL:
        raise DatasetError(f"--ignore-label {options.ignore_label} is out of range, expected 0 to {MAX_LABEL}")
    if options.mask_threshold is not None and (options.labels or options.max_mask_val):
        other = "--class-list" if options.labels else "--max-mask-val"
        raise DatasetError(f"--mask-threshold makes two classes of any mask, {other} chooses labels: give one of them")
    labels = _labels(options, counts)
    if len(labels) > MANY_CLASSES:
        raise DatasetError(f"{len(labels)} labels to learn, at most {MANY_CLASSES} are possible")
    implicit = [] if 0 in labels else [BACKGROUND]
    classes = [*implicit, *(map(str, labels) if len(labels) > 1 or not implicit else [OBJECT])]
    if len(classes) < 2:
        raise DatasetError("--class-list 0 alone leaves nothing to tell it from; add the labels of the other classes")
    if options.names:
        given = [*options.names] if len(options.names) == len(classes) else [*implicit, *options.names]
        if len(given) != len(classes) or len(set(given)) != len(given):
            expected = len(classes) - len(implicit)
            raise DatasetError(f"--class-names {' '.join(options.names)}: expected {expected} different names")
        classes = given
    return ClassMap(labels, tuple(classes), options.ignore_label, options.mask_threshold, options.max_mask_val)


def _labels(options: ClassOptions, counts: Counter[int]) -> tuple[int, ...]:
    ignored = options.ignore_label
    if options.mask_threshold is not None:
        return ()
    if options.max_mask_val:
        return tuple(label for label in range(1, options.max_mask_val + 1) if label != ignored)
    if options.labels == "nonzero":
        return ()
    if options.labels:
        return _listed(options.labels, ignored)
    values = sorted(value for value in counts if value not in (0, ignored))
    if len(values) == 1:
        return (values[0],) if values[0] <= MAX_LABEL else ()
    if not values:
        raise DatasetError("every mask is empty (only label 0): there is nothing to learn; check the masks in gt/")
    raise DatasetError(f"the masks hold the labels 0 {list_labels(values)}, which needs a choice: {_ways(values)}")


def list_labels(values: Sequence[int]) -> str:
    """Labels as text; of very many the first ones and the last."""
    return " ".join(map(str, values[:SHOWN])) + (f" ... {values[-1]}" if len(values) > SHOWN else "")


def _ways(values: Sequence[int]) -> str:
    """Flags that choose among mask values, the likeliest first."""
    flags = ["--class-list nonzero for instance maps", "--mask-threshold 127 for grey or JPEG masks"]
    if len(values) <= SHOWN:
        flags.insert(0, f"--max-mask-val {values[-1]} for all up to it")
        flags.insert(0, f'--class-list "{list_labels(values)}" (or a part of it) for classes')
    return ", ".join(flags)


def _listed(class_list: str, ignore_label: int | None) -> tuple[int, ...]:
    try:
        labels = tuple(int(word) for word in class_list.replace(",", " ").split())
    except ValueError:
        raise DatasetError(f'--class-list {class_list!r} must be labels such as "64 128", or nonzero') from None
    wrong = [label for label in labels if not 0 <= label <= MAX_LABEL]
    if wrong or not labels:
        found = f"label {wrong[0]} out of range" if wrong else "no label in it"
        raise DatasetError(f"--class-list {class_list!r}: {found}, expected 0 to {MAX_LABEL}")
    if len(set(labels)) != len(labels) or ignore_label in labels:
        raise DatasetError(f"--class-list {class_list!r} names a label twice, or the one of --ignore-label")
    return labels
