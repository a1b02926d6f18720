"""Pairs of files -> samples: reading, cropping, and the data sets that the loaders read.

Randomness of a sample is a function of seed, epoch and position, so worker processes do not matter.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from checkpoint import ModelConfig
from classes import ClassMap
from crops import crop_corner, cut_window
from image_io import (
    IGNORE_INDEX,
    ImageError,
    normalise,
    preprocess,
    read_image,
    read_mask,
    read_valid,
    resize_image,
    resize_mask,
)
from mixing import Mixing
from pairing import DatasetError, Pair
from shares import Drawn, draw_batches
from slide_index import open_places
from slide_windows import SlideOptions, is_slide

if TYPE_CHECKING:
    from augmentations import Augmentation  # only training pays for its libraries

BATCH_IMAGES = 4  # images whose crops are mixed with each other
SHRUNK_FIRST = 2  # times the size of the network, from which on an image is shrunk before it is moved
WHOLE_SLIDE = "a network that sees whole images resized cannot learn from it; take crops, such as --crops 64"
SLIDE_SLOTS = 4  # windows of a slide that are read together
POOL_BYTES = 256 << 20  # of samples that wait to be mixed; where an image has more crops, it is decoded again for them


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
    """One training sample of an epoch: which image, the seed of its randomness, the class its crop must hold.

    draw: other numbers augment the same crop anew. item: the seed of its whole item, of which only a part is loaded.
    """

    image: int
    seed: int
    wanted: int | None = None
    draw: int = 0
    item: int | None = None

    @property
    def augmented(self) -> int:
        """The seed of what is done to the crop."""
        return self.seed + self.draw


class EpochSampler(Sampler[tuple[Slot, ...]]):
    """The slots of an epoch, those of one image together: it is decoded once for all of them.

    Args:
        present: for each image the class indices that a forced crop may be asked to hold.
        crops: slots an image gets in an epoch (1 for the resize geometry).
        quota: share of the slots that must hold a labelled pixel. They are taken from images that have one; only when
            these are too few do images without one pass slots on to them.
        slides: which of the images are slides. Nothing is saved by reading all windows of a slide together, so their
            slots come a few at a time, mixed with those of other slides.
    """

    def __init__(
        self,
        present: Sequence[Sequence[int]],
        *,
        crops: int,
        quota: float,
        seed: int,
        slides: Sequence[bool] = (),
    ) -> None:
        self.present = [tuple(classes) for classes in present]
        self.crops, self.quota, self.seed = crops, quota, seed
        self.most = crops  # slots of an image that come together
        self.slides = [*slides] or [False] * len(self.present)
        self.labelled = [index for index, classes in enumerate(self.present) if classes]
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose slots come next."""
        self.epoch = epoch

    @property
    def samples(self) -> int:
        """Samples in one epoch."""
        return len(self.present) * self.crops

    @property
    def together(self) -> int:
        """Most slots of one image that come together."""
        return self.most if not all(self.slides) else min(self.crops, SLIDE_SLOTS)

    def limit(self, sample_bytes: int) -> None:
        """Let so few slots come together that the samples of BATCH_IMAGES images fit into POOL_BYTES."""
        self.most = min(self.crops, max(SLIDE_SLOTS, POOL_BYTES // (BATCH_IMAGES * sample_bytes)))

    def __iter__(self) -> Iterator[tuple[Slot, ...]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        images = np.repeat(rng.permutation(len(self.present)), self.crops).tolist()
        seeds = rng.integers(0, 2**31, self.samples).tolist()
        forced = self._forced(images, rng)
        together: dict[int, list[Slot]] = {}
        for place, (image, seed) in enumerate(zip(images, seeds, strict=True)):
            wanted = None
            if place in forced:
                if not self.present[image]:
                    image = int(rng.choice(self.labelled))
                wanted = int(rng.choice(self.present[image]))
            together.setdefault(image, []).append(Slot(image, seed, wanted))
        if not any(self.slides) and self.most == self.crops:
            yield from map(tuple, together.values())
            return
        images = [*together]
        for start in range(0, len(images), BATCH_IMAGES):
            pieces = [p for image in images[start : start + BATCH_IMAGES] for p in self._pieces(image, together[image])]
            yield from (pieces[place] for place in rng.permutation(len(pieces)).tolist())

    def _pieces(self, image: int, slots: Sequence[Slot]) -> list[tuple[Slot, ...]]:
        """The slots of an image as they are read: all together, or of a slide some at a time."""
        step = SLIDE_SLOTS if self.slides[image] else self.most if self.most < self.crops else max(1, len(slots))
        return [tuple(slots[start : start + step]) for start in range(0, len(slots), step)]

    def _forced(self, images: Sequence[int], rng: np.random.Generator) -> set[int]:
        """Places of the slots that must hold a labelled pixel: those of labelled images before those of others."""
        count = math.ceil(self.quota * len(images) - 1e-9) if self.labelled else 0
        shuffled = rng.permutation(len(images)).tolist()
        return set(sorted(shuffled, key=lambda place: not self.present[images[place]])[:count])


@dataclass(frozen=True)
class Batch:
    """Training batch: images (N, C, H, W) float32, masks (N, H, W) uint8 with 255 ignored, names of the images.

    One of several processes has its own part of the images and masks, and the names of all.
    """

    images: torch.Tensor
    masks: torch.Tensor
    names: tuple[str, ...]

    def only(self, row: int) -> "Batch":
        """One of the samples, in memory of its own."""
        return Batch(self.images[row : row + 1].clone(), self.masks[row : row + 1].clone(), self.names[row : row + 1])

    def pin_memory(self) -> "Batch":
        """Called by the loader when it pins memory."""
        return Batch(self.images.pin_memory(), self.masks.pin_memory(), self.names)


class TrainingSet(Dataset[list[tuple[str, np.ndarray, np.ndarray]]]):
    """Augmented samples; an item is a tuple of slots of one image, so several crops cost one decode.

    Args:
        mixing: how samples are mixed with others, after they were moved and before their values are changed; a sample
            that would lose the class it must hold stays as it is. None: not at all.

    Raises:
        DatasetError: a slide in the resize geometry, or objects to be pasted where no class is background.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        classes: ClassMap,
        config: ModelConfig,
        augmentation: "Augmentation",
        mixing: Mixing | None = None,
    ) -> None:
        self.pairs, self.classes, self.config, self.augmentation = list(pairs), classes, config, augmentation
        self.mixing = mixing
        if mixing is not None and mixing.kind == "copy-paste" and not classes.has_background:
            raise DatasetError(
                "every class of this data set is labelled and none is background, so copy-paste cannot tell objects "
                "from what lies behind them; use --mix mosaic or cutmix"
            )
        self.options = SlideOptions.from_config(config)
        self.slides = [is_slide(pair, self.options) for pair in self.pairs]
        if any(self.slides) and config.geometry.kind != "crops":
            raise DatasetError(f"{self.pairs[self.slides.index(True)].image} is a slide: {WHOLE_SLIDE}")

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def sample_bytes(self) -> int:
        """Memory that a sample takes on its way to a batch."""
        return math.prod(self.config.geometry.size) * (4 * len(self.config.channels) + 1)

    def varied(self, augmentation: "Augmentation", *, mixed: bool) -> "TrainingSet":
        """The same set with another augmentation, and mixed with every sample or not at all."""
        other = copy.copy(self)
        other.augmentation = augmentation
        other.mixing = replace(self.mixing, probability=1) if self.mixing and mixed else None
        return other

    def __getitem__(self, slots: tuple[Slot, ...]) -> list[tuple[str, np.ndarray, np.ndarray]]:
        """Samples (name, tensor (C, H, W) float32, mask (H, W) uint8), one for each slot."""
        own, samples = slots[0].image, []
        name, sources = self.pairs[own].name, {own: self._source(own)}

        def take(image: int, seed: int, wanted: int | None) -> tuple[np.ndarray, np.ndarray]:
            if image not in sources:
                sources[image] = self._source(image)
            return sources[image](Slot(image, seed, wanted))

        shared = slots[0].augmented if slots[0].item is None else slots[0].item
        for slot in slots:
            part = sources[own](slot)
            if self.mixing is not None:
                mixed = self.mixing.mix(part, own, (slot.augmented, shared), take)
                if slot.wanted is None or (mixed[1] == slot.wanted).any():
                    part = mixed
            pixels, indices = self.augmentation.local(*part, slot.augmented + 1)
            samples.append((name, normalise(pixels, self.config.mean, self.config.std), indices))
        return samples

    def _source(self, number: int) -> Callable[[Slot], tuple[np.ndarray, np.ndarray]]:
        """What gives samples of an image, before their values are changed; whole images are decoded here, once."""
        pair = self.pairs[number]
        if self.slides[number]:
            return partial(self._slide_window, pair)
        image, mask, _ = load_pair(pair, self.classes, self.config)
        if mask is None:
            raise DatasetError(f"{pair.image} has no mask; expected one of its name in gt/ or masks/")
        return partial(self._crop if self.config.geometry.kind == "crops" else self._resized, image, mask)

    def _resized(self, image: np.ndarray, mask: np.ndarray, slot: Slot) -> tuple[np.ndarray, np.ndarray]:
        size = self.config.geometry.size
        factor = min(side / wanted for side, wanted in zip(mask.shape, size, strict=True))
        if factor >= SHRUNK_FIRST and self.augmentation.moves:  # elastic of some pixels would be lost, and slow
            smaller = (round(mask.shape[0] / factor), round(mask.shape[1] / factor))
            image, mask = resize_image(image, smaller), resize_mask(mask, smaller)
        image, mask = self.augmentation.geometric(image, mask, slot.augmented)
        return resize_image(image, size), resize_mask(mask, size)

    def _crop(self, image: np.ndarray, mask: np.ndarray, slot: Slot) -> tuple[np.ndarray, np.ndarray]:
        """Deform a window of twice the size, then cut its middle: artefacts of the border stay outside."""
        rng = np.random.default_rng(slot.seed)
        corner = crop_corner(mask, self.config.geometry.size, slot.wanted, rng)
        return self._deform(cut_window(image, mask, *self._doubled(corner)), slot, rng)

    def _slide_window(self, pair: Pair, slot: Slot) -> tuple[np.ndarray, np.ndarray]:
        """As _crop, of a slide whose windows are read one by one."""
        places = open_places(pair, self.options, self.classes, self.config.mean)
        rng = np.random.default_rng(slot.seed)
        corner = places.corner(self.config.geometry.size, slot.wanted, rng)
        return self._deform(places.slide.window(self.classes, *self._doubled(corner)), slot, rng)

    def _doubled(self, corner: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Corner and size of the window of twice the size round a crop."""
        double, middle = self._middle()
        return (corner[0] - middle[0], corner[1] - middle[1]), (double, double)

    def _middle(self) -> tuple[int, tuple[int, int]]:
        """Side of a window of twice the size of a crop, and where the crop lies in it."""
        size = self.config.geometry.size
        double = 2 * max(size)
        return double, ((double - size[0]) // 2, (double - size[1]) // 2)

    def _deform(
        self, window: tuple[np.ndarray, np.ndarray], slot: Slot, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """The middle of a window of twice the size after the geometric augmentations."""
        size, middle = self.config.geometry.size, self._middle()[1]
        crop = self.augmentation.geometric(*window, slot.augmented, (*middle, *size))
        if slot.wanted is None or (crop[1] == slot.wanted).any():
            return crop
        warped = self.augmentation.geometric(*window, slot.augmented)
        if (warped[1] == slot.wanted).any():  # the object was moved out of the middle: follow it
            return cut_window(*warped, crop_corner(warped[1], size, slot.wanted, rng), size)
        return cut_window(*window, middle, size)  # a tiny object fell between the pixels of the deformed mask


def stack_samples(samples: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> Batch:
    """Samples of one image as one batch: two tensors on their way between processes instead of many."""
    images = torch.from_numpy(np.stack([pixels for _, pixels, _ in samples]))
    masks = torch.from_numpy(np.stack([indices for _, _, indices in samples]))
    return Batch(images, masks, tuple(name for name, _, _ in samples))


class TrainingBatches:
    """Batches for training; the samples of several images are mixed.

    Each image is decoded once an epoch, in a loader process, and gives all its samples there. Here they wait in a pool
    of BATCH_IMAGES images, and every batch is drawn from it at random.
    """

    collate: Callable[[Any], Any] = staticmethod(stack_samples)  # of the samples of an item

    def __init__(self, data: TrainingSet, sampler: EpochSampler, *, batch: int, workers: int, pin: bool) -> None:
        self.data, self.sampler, self.batch, self.workers, self.pin = data, sampler, batch, workers, pin
        sampler.limit(data.sample_bytes)
        self.loader = DataLoader(
            data,
            sampler=self.order(),
            batch_size=None,  # an item is one image with all its samples
            num_workers=workers,
            collate_fn=self.collate,
            persistent_workers=workers > 0,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # nothing is drawn from the generator that dropout uses: resume stays exact
        )

    def __len__(self) -> int:
        return -(-self.sampler.samples // self.batch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that comes next."""
        self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[Batch]:
        groups = ([(samples, row) for row in range(len(samples.names))] for samples in self.loader)
        for drawn in self.draw(groups, let_go):
            batch = Batch(
                torch.stack([samples.images[row] for samples, row in drawn]),
                torch.stack([samples.masks[row] for samples, row in drawn]),
                tuple(samples.names[row] for samples, row in drawn),
            )
            yield batch.pin_memory() if self.pin else batch

    def order(self) -> Sampler[tuple[Slot, ...]]:
        """What is loaded, item by item."""
        return self.sampler

    def draw(self, groups: Iterable[list[Drawn]], let_go: Callable[[list[Drawn]], list[Drawn]]) -> Iterator:
        """The batches of the epoch out of the samples of each item, or of what stands for them; see draw_batches."""
        rng = np.random.default_rng([self.sampler.seed, self.sampler.epoch, 1])
        enough = max(self.batch, BATCH_IMAGES * self.sampler.together)
        return draw_batches(groups, rng, batch=self.batch, enough=enough, let_go=let_go)


def let_go(pool: Sequence[tuple[Batch, int]]) -> list[tuple[Batch, int]]:
    """Samples as rows of batches, copied where half of a batch is gone: one row keeps the memory of all of them."""
    left = Counter(id(samples) for samples, _ in pool)
    return [
        (samples.only(row), 0) if 1 < len(samples.names) >= 2 * left[id(samples)] else (samples, row)
        for samples, row in pool
    ]


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
        self.options = SlideOptions.from_config(config)
        self.slides = [is_slide(pair, self.options) for pair in self.pairs]

    def __len__(self) -> int:
        return len(self.pairs)

    def without_slides(self) -> "EvaluationSet":
        """The images that are decoded whole."""
        whole = [pair for pair, is_slide in zip(self.pairs, self.slides, strict=True) if not is_slide]
        if len(whole) == len(self.pairs):
            return self
        return EvaluationSet(whole, self.classes, self.config, with_images=self.with_images)

    def slide_pairs(self) -> list[Pair]:
        """The slides, which are predicted band by band."""
        return [pair for pair, is_slide in zip(self.pairs, self.slides, strict=True) if is_slide]

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
