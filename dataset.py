"""Files on disk -> samples: pairing, splits, classes, and the data sets that the loaders read.

Randomness of a sample is a function of seed, epoch and position, so worker processes do not matter.
"""

import csv
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from augmentations import Augmentation
from checkpoint import Geometry, ModelConfig
from image_io import (
    IGNORE_INDEX,
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

MASK_DIRS = ("gt", "masks")
UNLISTED = 254  # marks a mask value that no class takes, while a mask is turned into class indices


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
    def files(self) -> list[Path]:
        """Every file of the pair, the image first."""
        return [self.image, *self.extras, *(path for path in (self.mask, self.roi) if path)]


@dataclass
class Listing:
    """The pairs of one split, and what is wrong with its folders."""

    folder: Path
    pairs: list[Pair]
    errors: list[str] = field(default_factory=list)
    has_masks: bool = True

    @property
    def name(self) -> str:
        """Name of the data set: that of its root, so `water` for `water/val`."""
        folder = self.folder.resolve()
        return folder.parent.name if folder.name in ("train", "val", "test") else folder.name


def split_folder(root: Path, split: str | None) -> Path | None:
    """The folder that holds images/ of a split, or None when `root` is flat and has no such split.

    Raises:
        DatasetError: `root` is missing or holds neither images/ nor splits.
    """
    if not root.is_dir():
        raise DatasetError(f"no folder {root}; expected a data set with train/ and val/, or with images/ and gt/")
    if split and (root / split / "images").is_dir():
        return root / split
    if (root / "images").is_dir():
        return None if split else root
    present = sorted(path.parent.name for path in root.glob("*/images"))
    if present and split:
        return None
    found = f"the splits {' '.join(present)}: name one with --split" if present else "no images/ and no split in it"
    raise DatasetError(
        f"{root} has {found}. Expected {root}/images with {root}/gt, or {root}/train/images with {root}/train/gt."
    )


def list_pairs(folder: Path, add_dirs: Sequence[str] = (), roi_dir: str | None = None) -> Listing:
    """Pair the files of one split by stem; extensions may differ.

    Args:
        folder: holds images/, gt/ or masks/, and one folder for each of `add_dirs` and for `roi_dir`.

    Raises:
        DatasetError: images/ is missing or empty, or a folder that was asked for is missing.
    """
    images = list_images(folder / "images")
    if not images:
        raise DatasetError(f"{folder / 'images'} holds no images; expected png, jpg, tif, bmp, gif or webp files")
    mask_dir = next((folder / name for name in MASK_DIRS if (folder / name).is_dir()), None)
    for name in [*add_dirs, *([roi_dir] if roi_dir else [])]:
        if not (folder / name).is_dir():
            raise DatasetError(f"no folder {folder / name}, asked for as {name!r}; expected beside {folder / 'images'}")
    masks = list_images(mask_dir) if mask_dir else {}
    extras = [list_images(folder / name) for name in add_dirs]
    rois = list_images(folder / roi_dir) if roi_dir else {}
    others = {name: found for name, found in zip(add_dirs, extras, strict=True)}
    if roi_dir:
        others[roi_dir] = rois
    if mask_dir:
        others[mask_dir.name] = masks
    errors = [message for name, found in others.items() for message in _unpaired(folder, name, images, found)]
    complete = [stem for stem in images if all(stem in found for found in others.values())]
    pairs = [
        Pair(stem, images[stem], masks.get(stem), tuple(found[stem] for found in extras), rois.get(stem))
        for stem in complete
    ]
    return Listing(folder, pairs, errors, has_masks=mask_dir is not None)


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
        """The pairs of one split folder."""
        return keep_ids(list_pairs(folder, self.add_dirs, self.roi_dir), ids or self.ids)


def find_splits(
    root: Path, options: FileOptions, *, val_dir: Path | None = None, val_ids: Path | None = None
) -> tuple[Listing, Listing, str]:
    """Training and validation pairs of a data set, and a sentence that says where they came from.

    Raises:
        DatasetError: see split_folder, list_pairs and share_by_name.
    """
    folder = split_folder(root, "train") or root
    val_folder = val_dir or split_folder(root, "val")
    train = options.listing(folder)
    if val_folder is not None:
        val = options.listing(split_folder(val_folder, None) or val_folder, val_ids)
        return train, val, f"validation on {val.folder}"
    if val_ids is not None:
        val = options.listing(folder, val_ids)
        chosen = {pair.name for pair in val.pairs}
        train.pairs = [pair for pair in train.pairs if pair.name not in chosen]
        return train, replace(val, errors=[]), f"validation on the {len(val.pairs)} images of {val_ids}"
    kept, held = share_by_name(train.pairs, options.val_share, options.group_pattern)
    val = replace(train, pairs=held, errors=[])
    train.pairs = kept
    return (
        train,
        val,
        f"no val/ in {root}: {len(held)} of {len(kept) + len(held)} images, chosen by name, are kept for it",
    )


def find_split(path: Path, split: str | None, options: FileOptions) -> Listing:
    """The pairs of one split: `path` is its folder, or a root that holds it; a flat root is split by name.

    Raises:
        DatasetError: as find_splits.
    """
    folder = split_folder(path, split) if split or not (path / "images").is_dir() else path
    if folder is not None:
        return options.listing(folder)
    if not (path / "images").is_dir():
        raise DatasetError(f"{path} has no {split}/images; expected one of its splits, or a folder with images/")
    listing = options.listing(path)
    train, val = share_by_name(listing.pairs, options.val_share, options.group_pattern)
    listing.pairs = train if split == "train" else val
    return listing


def read_ids(path: Path) -> set[str]:
    """Image names from column `id` of a csv file; a file extension in them is dropped."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        sample = file.read(4096)
        file.seek(0)
        rows = csv.DictReader(file, delimiter=";" if sample.count(";") > sample.count(",") else ",")
        if "id" not in (rows.fieldnames or []):
            raise DatasetError(f"{path} has the columns {rows.fieldnames}; expected one named id")
        return {Path(row["id"].strip()).stem for row in rows if row["id"] and row["id"].strip()}


def keep_ids(listing: Listing, path: Path | None) -> Listing:
    """Only the pairs named in a csv file; names without a file are an error of the listing."""
    if path is None:
        return listing
    ids = read_ids(path)
    missing = sorted(ids - {pair.name for pair in listing.pairs})
    if missing:
        listing.errors.append(f"{len(missing)} ids of {path} have no file in {listing.folder}, first: {missing[0]!r}")
    listing.pairs = [pair for pair in listing.pairs if pair.name in ids]
    return listing


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
    found = re.search(pattern, name)
    if found is None:
        raise DatasetError(f"--group-pattern {pattern!r} does not match the file name {name!r}")
    return found.group(1) if found.groups() else found.group(0)


# ----------------------------------------------------------------------------------------------------------------------
# Classes


@dataclass(frozen=True)
class ClassMap:
    """Turns mask values into class indices.

    labels: mask values to learn, in order. Every other value is background, class 0, unless the list holds 0:
        then there is no implicit background. Empty: any non-zero value is the object.
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
        """Class index for each mask value from 0 to 65535, uint8."""
        table = np.full(65536, 0 if self.has_background else UNLISTED, np.uint8)
        if self.max_mask_val:
            table[self.max_mask_val + 1 :] = UNLISTED
        if not self.labels:
            table[1:] = 1
        for index, label in enumerate(self.labels):
            table[label] = index + self.has_background
        if self.ignore_label is not None:
            table[self.ignore_label] = IGNORE_INDEX
        return table

    def encode(self, values: np.ndarray, path: Path) -> np.ndarray:
        """Class indices (H, W) uint8, 255 where ignored, from mask values (H, W).

        Raises:
            DatasetError: a value that no class takes; `path` is named.
        """
        if self.mask_threshold is not None:
            return (values > self.mask_threshold).astype(np.uint8)
        if values.dtype.itemsize > 2:
            if not self.labels:
                return (values != 0).astype(np.uint8)
            values = np.where(values > 65535, 65535, values).astype(np.uint16)
        mask = self.table[values]
        if mask.size and UNLISTED in (table := self.table) and (mask == UNLISTED).any():
            bad = np.unique(values[mask == UNLISTED])[:8].tolist()
            good = [int(value) for value in np.flatnonzero(table != UNLISTED)[:20]]
            raise DatasetError(f"mask {path} holds the labels {bad}, out of range; expected {good}")
        return mask


def load_image(pair: Pair, channels: Sequence[str], steps: Sequence[str]) -> tuple[np.ndarray, np.ndarray | None]:
    """Read an image with its extra channels.

    Returns:
        The image (H, W, C) in network order after the `steps` of preprocessing, and where it is valid,
        (H, W) bool, or None when all of it is. Pixels without data hold 0.

    Raises:
        ImageError: unreadable, another number of channels than `channels`, or extras of another size.
    """
    image = read_image(pair.image)
    valid = read_valid(pair.image)
    layers = [image]
    for path in pair.extras:
        extra = read_image(path)[:, :, :1]
        if extra.shape[:2] != image.shape[:2]:
            raise ImageError(f"{path} is {_size(extra)}, its image {pair.image} is {_size(image)}; sizes must agree")
        layers.append(extra)
    if len(layers) > 1:
        kind = image.dtype if len({layer.dtype for layer in layers}) == 1 else np.dtype(np.float32)
        image = np.concatenate([layer.astype(kind, copy=False) for layer in layers], axis=2)
    if channels and image.shape[2] != len(channels):
        raise ImageError(f"{pair.image} has {image.shape[2]} channels, expected {len(channels)} ({' '.join(channels)})")
    if valid is not None:
        image = np.where(valid[:, :, None], image, np.zeros((), image.dtype))
    return (preprocess(image, steps) if steps else image), valid


def _size(image: np.ndarray) -> str:
    return f"{image.shape[0]}x{image.shape[1]}"


def load_mask(pair: Pair, classes: ClassMap, valid: np.ndarray | None = None) -> np.ndarray:
    """Class indices (H, W) uint8 of a pair, 255 outside its region of interest and where the image has no data."""
    if pair.mask is None:
        raise DatasetError(f"{pair.image} has no mask")
    mask = classes.encode(read_mask(pair.mask), pair.mask)
    if pair.roi:
        inside = read_mask(pair.roi)
        if inside.shape != mask.shape:
            raise ImageError(f"{pair.roi} is {_size(inside)}, its mask {pair.mask} is {_size(mask)}; sizes must agree")
        mask[inside == 0] = IGNORE_INDEX
    if valid is not None:
        mask[~valid] = IGNORE_INDEX
    return mask


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

    Args:
        present: for each image the class indices that a forced crop may be asked to hold.
        crops: slots an image gets in an epoch (1 for the resize geometry).
        quota: share of the slots that must hold a labelled pixel; images without one pass theirs on.
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
        """The slots of the epoch in order; those of one image follow each other."""
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.present)).tolist()
        images = [index for index in order for _ in range(self.crops)]
        forced = set(rng.permutation(self.samples)[: self._forced()].tolist())
        seeds = rng.integers(0, 2**31, self.samples).tolist()
        chosen = []
        for place, (image, seed) in enumerate(zip(images, seeds, strict=True)):
            wanted = None
            if place in forced:
                if not self.present[image]:
                    image = int(rng.choice(self.labelled))
                wanted = int(rng.choice(self.present[image]))
            chosen.append(Slot(image, seed, wanted))
        return chosen

    def _forced(self) -> int:
        return int(np.ceil(self.quota * self.samples)) if self.labelled else 0

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
        self, pairs: Sequence[Pair], classes: ClassMap, config: ModelConfig, augmentation: Augmentation
    ) -> None:
        self.pairs, self.classes, self.config, self.augmentation = list(pairs), classes, config, augmentation

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, slots: tuple[Slot, ...]) -> list[tuple[str, np.ndarray, np.ndarray]]:
        """Samples (name, tensor (C, H, W) float32, mask (H, W) uint8), one for each slot."""
        pair = self.pairs[slots[0].image]
        image, valid = load_image(pair, self.config.channels, self.config.preprocess)
        mask = load_mask(pair, self.classes, valid)
        if image.shape[:2] != mask.shape:
            raise ImageError(f"mask {pair.mask} is {_size(mask)}, its image {pair.image} is {_size(image)}")
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
    image: (H, W, C) as on disk if it was asked for.
    """

    pair: Pair
    size: tuple[int, int]
    tensor: torch.Tensor
    mask: torch.Tensor | None
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
        image, valid = load_image(pair, self.config.channels, self.config.preprocess)
        mask = load_mask(pair, self.classes, valid) if pair.mask else None
        if mask is not None and mask.shape != image.shape[:2]:
            raise ImageError(f"mask {pair.mask} is {_size(mask)}, its image {pair.image} is {_size(image)}")
        pixels = resize_image(image, geometry.size) if geometry.kind == "resize" else image
        return Sample(
            pair,
            image.shape[:2],
            torch.from_numpy(normalise(pixels, self.config.mean, self.config.std)),
            None if mask is None else torch.from_numpy(mask),
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


__all__ = ["Batch", "ClassMap", "EpochSampler", "EvaluationSet", "Geometry", "Pair", "Sample", "TrainingSet"]
