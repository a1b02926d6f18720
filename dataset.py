"""Files on disk -> samples: pairing, splits, classes, and the data sets that the loaders read.

Randomness of a sample is a function of seed, epoch and position, so worker processes do not matter.
"""

import csv
import hashlib
import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from checkpoint import ModelConfig
from image_io import (
    IGNORE_INDEX,
    IMAGE_SUFFIXES,
    ImageError,
    list_images,
    normalise,
    preprocess,
    read_image,
    read_mask,
    read_valid,
    resize_image,
    resize_mask,
)
from tiling import reflect_index

if TYPE_CHECKING:
    from augmentations import Augmentation  # only training pays for its libraries

MASK_DIRS = ("gt", "masks")
SPLITS = ("train", "val", "test")
UNLISTED = 254  # marks a mask value that no class takes, while a mask is turned into class indices
BATCH_IMAGES = 4  # different images that a batch of crops holds, where there are so many
MAX_LABEL = 65535  # of labels that can be named; larger values in a uint32 map are objects or background


class DatasetError(ValueError):
    """The data set cannot be used; the message lists everything that is wrong."""


# ----------------------------------------------------------------------------------------------------------------------
# Files


@dataclass(frozen=True)
class Pair:
    """One image, its mask and what belongs to it; all share the file stem `name`."""

    name: str
    image: Path
    mask: Path | None = None
    extras: tuple[Path, ...] = ()
    roi: Path | None = None

    @property
    def layers(self) -> list[Path]:
        """The image and its extra channels, in network order."""
        return [self.image, *self.extras]


@dataclass
class Listing:
    """The pairs of one split, and what is wrong with its folders.

    unknown_ids: names asked for with --ids that no file of this data set has.
    """

    folder: Path
    pairs: list[Pair]
    errors: list[str] = field(default_factory=list)
    has_masks: bool = True
    unknown_ids: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """Name of the data set: that of its root, so `water` for `water/val`."""
        folder = self.folder.resolve()
        return folder.parent.name if folder.name in SPLITS else folder.name


@dataclass(frozen=True)
class FileOptions:
    """Which files of a data set are used.

    add_dirs: folders beside images/ with one extra channel each. roi_dir: folder with the region that counts.
    ids: csv file that names the images to use. val_share and group_pattern: see share_by_name.
    """

    add_dirs: tuple[str, ...] = ()
    roi_dir: str | None = None
    ids: Path | None = None
    val_share: float = 0.2
    group_pattern: str | None = None

    def listing(self, folder: Path, ids: Path | None = None) -> Listing:
        """The pairs of one split folder; `ids` goes before self.ids."""
        return list_pairs(folder, self.add_dirs, self.roi_dir, ids or self.ids)

    def shared(self, pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
        """Pairs of a data set without val/ as (train, val)."""
        return share_by_name(pairs, self.val_share, self.group_pattern)


def split_folder(root: Path, split: str | None) -> Path | None:
    """The folder that holds images/ of a split, or None when `root` has no such split.

    Args:
        split: a name from SPLITS, or None for `root` itself.

    Raises:
        DatasetError: `root` is missing or holds neither images/ nor splits.
    """
    if not root.is_dir():
        raise DatasetError(f"no folder {root}; expected a data set with train/ and val/, or with images/ and gt/")
    folder = root / split if split else root
    if (folder / "images").is_dir():
        return folder
    if split and ((root / "images").is_dir() or _splits_of(root)):
        return None
    found = f"the splits {' '.join(_splits_of(root))}" if _splits_of(root) else "no images/ and no split in it"
    raise DatasetError(
        f"{root} has {found}. Expected {root}/images with {root}/gt, or {root}/train/images with {root}/train/gt; "
        "give one of these folders."
    )


def _splits_of(root: Path) -> list[str]:
    return sorted(path.parent.name for path in root.glob("*/images") if path.is_dir())


def _train_folder(root: Path) -> Path:
    """<root>/train, or `root` itself when it is flat."""
    folder = split_folder(root, "train")
    if folder is None and not (root / "images").is_dir():
        raise DatasetError(f"{root} has the splits {' '.join(_splits_of(root))}; expected {root}/train/images")
    return folder or root


def find_splits(
    root: Path, options: FileOptions, *, val_dir: Path | None = None, val_ids: Path | None = None
) -> tuple[Listing, Listing, str]:
    """Training and validation pairs of a data set, and a sentence that says where they came from.

    Args:
        val_dir: a split folder, or a root with val/. val_ids: csv file that names the validation images.

    Raises:
        DatasetError: see split_folder, list_pairs and share_by_name.
    """
    train = options.listing(_train_folder(root))
    val_folder = (split_folder(val_dir, "val") or split_folder(val_dir, None)) if val_dir else split_folder(root, "val")
    if val_folder is not None:
        val = options.listing(val_folder, val_ids)
        note = f"validation on {val_folder}"
    elif val_ids is not None:
        val = options.listing(train.folder, val_ids)
        chosen = {pair.name for pair in val.pairs}
        train.pairs = [pair for pair in train.pairs if pair.name not in chosen]
        note = f"validation on the {len(val.pairs)} images of {val_ids}"
    else:
        total = len(train.pairs)
        train.pairs, held = options.shared(train.pairs)
        val = replace(train, pairs=held)
        note = f"no val/ in {root}: {len(held)} of {total} images, chosen by name, are kept for it"
    if options.ids:
        _add_unknown(train, options.ids, train.unknown_ids & val.unknown_ids if not val_ids else train.unknown_ids)
    if val_ids:
        _add_unknown(val, val_ids, val.unknown_ids)
    return train, val, note


def _add_unknown(listing: Listing, path: Path, names: frozenset[str]) -> None:
    if names:
        listing.errors.append(f"{len(names)} ids of {path} have no file in {listing.folder}, first: {min(names)!r}")


def find_split(path: Path, split: str | None, options: FileOptions) -> Listing:
    """The pairs of one split: `path` is its folder, or a root that holds it; a data set without val/ is split by name.

    Raises:
        DatasetError: as find_splits.
    """
    is_split = path.resolve().name == split and (path / "images").is_dir()
    folder = split_folder(path, None if is_split else split)
    if folder is not None:
        listing = options.listing(folder)
    elif split == "test":
        raise DatasetError(f"{path} has no test/images; expected it, or a folder with images/ and no --split")
    else:
        listing = options.listing(_train_folder(path))
        train, val = options.shared(listing.pairs)
        listing.pairs = train if split == "train" else val
    if options.ids:
        _add_unknown(listing, options.ids, listing.unknown_ids)
    return listing


def list_pairs(
    folder: Path, add_dirs: Sequence[str] = (), roi_dir: str | None = None, ids: Path | None = None
) -> Listing:
    """Pair the files of one split by stem; extensions may differ.

    Args:
        folder: holds images/, gt/ or masks/, and one folder for each of `add_dirs` and for `roi_dir`.
        ids: csv file that names the images to use, see read_ids; files of other names are not looked at.

    Raises:
        DatasetError: images/ is empty, or a folder that was asked for is missing.
    """
    wanted = read_ids(ids) if ids else None
    images = list_images(folder / "images")
    if not images:
        raise DatasetError(f"{folder / 'images'} holds no images; expected png, jpg, tif, bmp, gif or webp files")
    mask_dir = next((name for name in MASK_DIRS if (folder / name).is_dir()), None)
    beside = {name: _list_beside(folder, name) for name in (*add_dirs, roi_dir, mask_dir) if name}
    unknown: frozenset[str] = frozenset()
    if wanted is not None:
        unknown = frozenset(wanted - images.keys())
        unknown -= {name for other in _siblings(folder) for name in list_images(other) if unknown}
        images = {stem: path for stem, path in images.items() if stem in wanted}
        beside = {name: {s: p for s, p in found.items() if s in wanted} for name, found in beside.items()}
    pairs = [
        Pair(
            stem,
            path,
            beside[mask_dir][stem] if mask_dir else None,
            tuple(beside[name][stem] for name in add_dirs),
            beside[roi_dir][stem] if roi_dir else None,
        )
        for stem, path in images.items()
        if all(stem in found for found in beside.values())
    ]
    errors = [message for name, found in beside.items() for message in _unpaired(folder, name, images, found)]
    return Listing(folder, pairs, errors, has_masks=mask_dir is not None, unknown_ids=unknown)


def _list_beside(folder: Path, name: str) -> dict[str, Path]:
    if not (folder / name).is_dir():
        raise DatasetError(f"no folder {folder / name}, asked for as {name!r}; expected beside {folder / 'images'}")
    return list_images(folder / name)


def _siblings(folder: Path) -> list[Path]:
    """images/ of the other splits of the same data set."""
    if folder.name not in SPLITS:
        return []
    others = [folder.parent / name / "images" for name in SPLITS if name != folder.name]
    return [path for path in others if path.is_dir()]


def _unpaired(folder: Path, name: str, images: dict[str, Path], found: dict[str, Path]) -> list[str]:
    messages = []
    for have, lack, left, right in (("images", name, images, found), (name, "images", found, images)):
        missing = sorted(left.keys() - right.keys())
        if missing:
            messages.append(
                f"{len(missing)} of {len(left)} files in {folder / have} have no partner in {folder / lack}, "
                f"first: {missing[0]!r}. Files pair by stem."
            )
    return messages


def read_ids(path: Path) -> set[str]:
    """Image names from column `id` of a csv file; the extension of an image file in them is dropped.

    Raises:
        DatasetError: the file is missing, is no text, or has no such column.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            sample = file.read(4096)
            file.seek(0)
            rows = csv.DictReader(file, delimiter=";" if sample.count(";") > sample.count(",") else ",")
            if "id" not in (rows.fieldnames or []):
                raise DatasetError(f"{path} has the columns {rows.fieldnames}; expected one named id")
            names = [(row["id"] or "").strip() for row in rows]
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}; expected a csv file with a column id") from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not UTF-8 text; expected a csv file with a column id") from error
    plain = (Path(name).stem if Path(name).suffix.lower() in IMAGE_SUFFIXES else name for name in names if name)
    return {unicodedata.normalize("NFC", name) for name in plain}


def share_by_name(pairs: Sequence[Pair], share: float, pattern: str | None) -> tuple[list[Pair], list[Pair]]:
    """Split pairs into (train, val); every group of names falls on one side.

    The choice depends on the names alone: groups are ranked by a hash, so it is the same everywhere.

    Raises:
        DatasetError: the pattern matches no name, or there are too few groups to split.
    """
    group_of = {pair.name: _group(pair.name, pattern) for pair in pairs}
    groups = sorted(set(group_of.values()), key=lambda name: hashlib.sha256(name.encode()).digest())
    if len(groups) < 2:
        raise DatasetError(f"{len(groups)} group of images cannot be split into train and val; give --val-dir")
    chosen = set(groups[: min(max(1, round(share * len(groups))), len(groups) - 1)])
    sides: tuple[list[Pair], list[Pair]] = ([], [])
    for pair in pairs:
        sides[group_of[pair.name] in chosen].append(pair)
    return sides


def _group(name: str, pattern: str | None) -> str:
    if pattern is None:
        return name
    try:
        found = re.search(pattern, name)
    except re.error as error:
        raise DatasetError(f"--group-pattern {pattern!r} is not a regular expression: {error}") from error
    if found is None:
        raise DatasetError(f"--group-pattern {pattern!r} does not match the file name {name!r}")
    return (found.group(1) if found.groups() else None) or found.group(0)


# ----------------------------------------------------------------------------------------------------------------------
# Classes


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


# ----------------------------------------------------------------------------------------------------------------------
# Pixels


def read_layer(path: Path, steps: Sequence[str], *, extra: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
    """Read an image file (H, W, C) after preprocessing, and where it holds data, (H, W) bool or None for everywhere.

    Args:
        steps: preprocessing, done on each file at its own depth; pixels without data count as 0.
        extra: the file is an extra channel: only one is taken.

    Raises:
        ImageError: unreadable, or an extra channel in colour.
    """
    image, valid = read_image(path), read_valid(path)
    if valid is not None:
        image = np.where(valid[:, :, None], image, np.zeros((), image.dtype))
    if extra and image.shape[2] > 1:
        if (image != image[:, :, :1]).any():
            raise ImageError(f"{path} has {image.shape[2]} channels that differ; expected one: save it as a grey image")
        image = image[:, :, :1]
    return preprocess(image, steps), valid


def load_image(pair: Pair, channels: Sequence[str], steps: Sequence[str]) -> tuple[np.ndarray, np.ndarray | None]:
    """Read an image with its extra channels.

    Args:
        channels: names of the channels that are expected; none: any number is right.
        steps: preprocessing.

    Returns:
        The image (H, W, C) in network order, and where every layer of it holds data, (H, W) bool, or None when all
        of it does.

    Raises:
        ImageError: unreadable, another number of channels than `channels`, or extras of another size.
    """
    image, valid = read_layer(pair.image, steps)
    layers = [image]
    for path in pair.extras:
        extra, known = read_layer(path, steps, extra=True)
        if extra.shape[:2] != image.shape[:2]:
            raise ImageError(f"{path} is {_size(extra)}, its image {pair.image} is {_size(image)}; sizes must agree")
        layers.append(extra)
        valid = both_hold(valid, known)
    if len(layers) > 1:
        kind = image.dtype if len({layer.dtype for layer in layers}) == 1 else np.dtype(np.float32)
        image = np.concatenate([layer.astype(kind, copy=False) for layer in layers], axis=2)
    if channels and image.shape[2] != len(channels):
        raise ImageError(f"{pair.image} has {image.shape[2]} channels, expected {len(channels)} ({' '.join(channels)})")
    return image, valid


def both_hold(first: np.ndarray | None, second: np.ndarray | None) -> np.ndarray | None:
    """Where both of two regions (H, W) bool hold; None is everywhere."""
    if first is None or second is None:
        return second if first is None else first
    return first & second


def _size(image: np.ndarray) -> str:
    return f"{image.shape[0]}x{image.shape[1]}"


def load_region(pair: Pair, valid: np.ndarray | None = None) -> np.ndarray | None:
    """Where pixels of a pair count, (H, W) bool: inside its region of interest and where the image has data.

    None: everywhere.
    """
    inside = read_mask(pair.roi) != 0 if pair.roi else None
    if inside is not None and valid is not None and inside.shape != valid.shape:
        raise ImageError(f"{pair.roi} is {_size(inside)}, its image {pair.image} is {_size(valid)}; sizes must agree")
    return both_hold(inside, valid)


def load_mask(pair: Pair, classes: ClassMap, region: np.ndarray | None) -> np.ndarray:
    """Class indices (H, W) uint8 of a pair, 255 outside `region`, see load_region."""
    if pair.mask is None:
        raise DatasetError(f"{pair.image} has no mask; expected one of its name in gt/ or masks/")
    mask = classes.encode(read_mask(pair.mask), pair.mask)
    if region is not None:
        if region.shape != mask.shape:
            raise ImageError(
                f"{pair.roi or pair.image} is {_size(region)}, its mask {pair.mask} is {_size(mask)}; sizes must agree"
            )
        mask[~region] = IGNORE_INDEX
    return mask


def load_pair(
    pair: Pair, classes: ClassMap, config: ModelConfig
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """The image (H, W, C) as the network's channels, its class indices (H, W) uint8 if it has a mask, and its region.

    Raises:
        ImageError: see load_image and load_mask; also files of one pair in two sizes.
    """
    image, valid = load_image(pair, config.channels, config.preprocess)
    region = load_region(pair, valid)
    mask = load_mask(pair, classes, region) if pair.mask else None
    for path, part in ((pair.mask, mask), (pair.roi, region)):
        if part is not None and part.shape != image.shape[:2]:
            raise ImageError(f"{path} is {_size(part)}, its image {pair.image} is {_size(image)}; sizes must agree")
    return image, mask, region


# ----------------------------------------------------------------------------------------------------------------------
# Training samples


@dataclass(frozen=True)
class Slot:
    """One training sample of an epoch: which image, the seed of its randomness, the class its crop must hold."""

    image: int
    seed: int
    wanted: int | None = None


class EpochSampler(Sampler[list[tuple[Slot, ...]]]):
    """Batches of slots; slots of one image in one batch stay together, so the image is decoded once for them.

    A batch mixes at least BATCH_IMAGES images where it can: an image with more crops than its part of a batch comes
    back in a later batch and is decoded again there.

    Args:
        present: for each image the class indices that a forced crop may be asked to hold.
        crops: slots an image gets in an epoch (1 for the resize geometry).
        quota: share of the slots that must hold a labelled pixel. They are taken from images that have one; only when
            these are too few do images without one pass slots on to them.
    """

    def __init__(self, present: Sequence[Sequence[int]], *, batch: int, crops: int, quota: float, seed: int) -> None:
        self.present = [tuple(classes) for classes in present]
        self.batch, self.crops, self.quota, self.seed = batch, crops, quota, seed
        self.labelled = [index for index, classes in enumerate(self.present) if classes]
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose slots come next."""
        self.epoch = epoch

    @property
    def samples(self) -> int:
        """Samples in one epoch."""
        return len(self.present) * self.crops

    def __len__(self) -> int:
        return -(-self.samples // self.batch)

    def slots(self) -> list[Slot]:
        """The slots of the epoch in order; those of one image and one part follow each other."""
        rng = np.random.default_rng([self.seed, self.epoch])
        part = min(self.crops, max(1, self.batch // BATCH_IMAGES))
        images: list[int] = []
        for start in range(0, self.crops, part):
            for index in rng.permutation(len(self.present)).tolist():
                images += [index] * min(part, self.crops - start)
        seeds = rng.integers(0, 2**31, self.samples).tolist()
        forced = self._forced(images, rng)
        slots = []
        for place, (image, seed) in enumerate(zip(images, seeds, strict=True)):
            wanted = None
            if place in forced:
                if not self.present[image]:
                    image = int(rng.choice(self.labelled))
                wanted = int(rng.choice(self.present[image]))
            slots.append(Slot(image, seed, wanted))
        return slots

    def _forced(self, images: Sequence[int], rng: np.random.Generator) -> set[int]:
        """Places of the slots that must hold a labelled pixel: those of labelled images before those of others."""
        count = math.ceil(self.quota * len(images) - 1e-9) if self.labelled else 0
        shuffled = rng.permutation(len(images)).tolist()
        return set(sorted(shuffled, key=lambda place: not self.present[images[place]])[:count])

    def __iter__(self) -> Iterator[list[tuple[Slot, ...]]]:
        slots = self.slots()
        for start in range(0, len(slots), self.batch):
            together: dict[int, list[Slot]] = {}
            for slot in slots[start : start + self.batch]:
                together.setdefault(slot.image, []).append(slot)
            yield [tuple(group) for group in together.values()]


@dataclass(frozen=True)
class Batch:
    """Training batch: images (N, C, H, W) float32, masks (N, H, W) uint8 with 255 ignored, names of the images."""

    images: torch.Tensor
    masks: torch.Tensor
    names: tuple[str, ...]

    def pin_memory(self) -> "Batch":
        """Called by the loader when it pins memory."""
        return Batch(self.images.pin_memory(), self.masks.pin_memory(), self.names)


class TrainingSet(Dataset[list[tuple[str, np.ndarray, np.ndarray]]]):
    """Augmented samples; an item is a tuple of slots of one image, so several crops cost one decode."""

    def __init__(
        self, pairs: Sequence[Pair], classes: ClassMap, config: ModelConfig, augmentation: "Augmentation"
    ) -> None:
        self.pairs, self.classes, self.config, self.augmentation = list(pairs), classes, config, augmentation

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, slots: tuple[Slot, ...]) -> list[tuple[str, np.ndarray, np.ndarray]]:
        """Samples (name, tensor (C, H, W) float32, mask (H, W) uint8), one for each slot."""
        pair = self.pairs[slots[0].image]
        image, mask, _ = load_pair(pair, self.classes, self.config)
        if mask is None:
            raise DatasetError(f"{pair.image} has no mask; expected one of its name in gt/ or masks/")
        take = self._crop if self.config.geometry.kind == "crops" else self._resized
        samples = []
        for slot in slots:
            pixels, indices = take(image, mask, slot)
            pixels, indices = self.augmentation.local(pixels, indices, slot.seed + 1)
            samples.append((pair.name, normalise(pixels, self.config.mean, self.config.std), indices))
        return samples

    def _resized(self, image: np.ndarray, mask: np.ndarray, slot: Slot) -> tuple[np.ndarray, np.ndarray]:
        size = self.config.geometry.size
        image, mask = self.augmentation.geometric(image, mask, slot.seed)
        return resize_image(image, size), resize_mask(mask, size)

    def _crop(self, image: np.ndarray, mask: np.ndarray, slot: Slot) -> tuple[np.ndarray, np.ndarray]:
        """Deform a window of twice the size, then cut its middle: artefacts of the border stay outside."""
        size = self.config.geometry.size
        rng = np.random.default_rng(slot.seed)
        double = 2 * max(size)
        row, column = crop_corner(mask, size, slot.wanted, rng)
        middle = ((double - size[0]) // 2, (double - size[1]) // 2)
        window = cut_window(image, mask, (row - middle[0], column - middle[1]), (double, double))
        warped = self.augmentation.geometric(*window, slot.seed)
        crop = cut_window(*warped, middle, size)
        if slot.wanted is None or (crop[1] == slot.wanted).any():
            return crop
        if (warped[1] == slot.wanted).any():  # the object was moved out of the middle: follow it
            return cut_window(*warped, crop_corner(warped[1], size, slot.wanted, rng), size)
        return cut_window(*window, middle, size)  # a tiny object fell between the pixels of the deformed mask


def crop_corner(
    mask: np.ndarray, size: tuple[int, int], wanted: int | None, rng: np.random.Generator
) -> tuple[int, int]:
    """Upper left corner of a random window of `size` that holds a pixel of class `wanted`, if given.

    The window lies inside the mask; where the mask is smaller, the mask lies inside the window (negative corner).
    """
    low, high = [], []
    for length, side in zip(mask.shape, size, strict=True):
        low.append(min(0, length - side))
        high.append(max(0, length - side))
    if wanted is not None:
        place = divmod(int(rng.choice(np.flatnonzero(mask == wanted))), mask.shape[1])
        low = [max(least, at - side + 1) for least, at, side in zip(low, place, size, strict=True)]
        high = [min(most, at) for most, at in zip(high, place, strict=True)]
    return int(rng.integers(low[0], high[0] + 1)), int(rng.integers(low[1], high[1] + 1))


def cut_window(
    image: np.ndarray, mask: np.ndarray, corner: tuple[int, int], size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Cut a window; outside the image the pixels are reflected and the mask is 255 (not counted).

    Args:
        corner: (row, column) of the window's first pixel, may lie outside the image.
        size: (height, width) of the window.
    """
    (top, left), (height, width) = corner, size
    rows, columns = np.arange(top, top + height), np.arange(left, left + width)
    inside = 0 <= top and 0 <= left and top + height <= image.shape[0] and left + width <= image.shape[1]
    if inside:
        return image[top : top + height, left : left + width], mask[top : top + height, left : left + width]
    window = image[_reflected(rows, image.shape[0])][:, _reflected(columns, image.shape[1])]
    indices = np.full(size, IGNORE_INDEX, np.uint8)
    keep_rows = (rows >= 0) & (rows < mask.shape[0])
    keep_columns = (columns >= 0) & (columns < mask.shape[1])
    if keep_rows.any() and keep_columns.any():
        part = mask[rows[keep_rows]][:, columns[keep_columns]]
        first_row, first_column = int(keep_rows.argmax()), int(keep_columns.argmax())
        indices[first_row : first_row + part.shape[0], first_column : first_column + part.shape[1]] = part
    return window, indices


def _reflected(places: np.ndarray, length: int) -> np.ndarray:
    """Index of the pixel that stands at each place; the wave is even, so places before the image mirror too."""
    distance = np.abs(places)
    return reflect_index(length, int(distance.max()) + 1)[distance]


def _collate_training(items: list[list[tuple[str, np.ndarray, np.ndarray]]]) -> Batch:
    samples = [sample for item in items for sample in item]
    images = torch.from_numpy(np.stack([pixels for _, pixels, _ in samples]))
    masks = torch.from_numpy(np.stack([indices for _, _, indices in samples]))
    return Batch(images, masks, tuple(name for name, _, _ in samples))


# ----------------------------------------------------------------------------------------------------------------------
# Samples to predict


@dataclass(frozen=True)
class Sample:
    """One whole image on its way to a prediction.

    tensor: (C, h, w) float32, normalised; resized to the network's size in the resize geometry.
    mask: (H, W) uint8 at the original size, or None.
    region: (H, W) bool, where pixels count; None: everywhere.
    image: (H, W, C) as on disk if it was asked for.
    """

    pair: Pair
    size: tuple[int, int]
    tensor: torch.Tensor
    mask: torch.Tensor | None
    region: torch.Tensor | None = None
    image: torch.Tensor | None = None


class EvaluationSet(Dataset[Sample]):
    """Whole images in the order of their names, never random, every pixel covered."""

    def __init__(
        self, pairs: Sequence[Pair], classes: ClassMap, config: ModelConfig, *, with_images: bool = False
    ) -> None:
        self.pairs, self.classes, self.config, self.with_images = list(pairs), classes, config, with_images

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        pair, geometry = self.pairs[index], self.config.geometry
        image, mask, region = load_pair(pair, self.classes, self.config)
        pixels = resize_image(image, geometry.size) if geometry.kind == "resize" else image
        return Sample(
            pair,
            image.shape[:2],
            torch.from_numpy(normalise(pixels, self.config.mean, self.config.std)),
            None if mask is None else torch.from_numpy(mask),
            None if region is None else torch.from_numpy(region),
            torch.from_numpy(image) if self.with_images else None,
        )


def _start_worker(_: int) -> None:
    cv2.setNumThreads(0)  # a loader process uses one core; OpenCV's own threads would fight for the others


def _list_of(samples: list[Sample]) -> list[Sample]:
    return samples


def training_loader(data: TrainingSet, sampler: EpochSampler, workers: int, pin: bool) -> DataLoader[Any]:
    """Loader of Batch; workers stay alive between epochs."""
    return DataLoader(
        data,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=_collate_training,
        persistent_workers=workers > 0,
        worker_init_fn=_start_worker,
        pin_memory=pin,
        generator=torch.Generator(),  # loaders draw nothing from the generator that dropout uses: resume stays exact
    )


def evaluation_loader(data: EvaluationSet, batch: int, workers: int) -> DataLoader[Any]:
    """Loader of lists of Sample: `batch` of them in the resize geometry, one in the crops geometry."""
    return DataLoader(
        data,
        batch_size=batch if data.config.geometry.kind == "resize" else 1,
        num_workers=min(workers, len(data)),
        collate_fn=_list_of,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),
    )
