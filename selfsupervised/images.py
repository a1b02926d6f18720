"""Unlabelled images and slides: which files they are, whether they can be read, and batches of pairs of views of them.

Example:
    found = check_images(find_images([Path("data/train")]))
    maker = ViewMaker("microscopy", ViewOptions(128), rgb=found.rgb, value_range=usual_range(statistics))
    data = UnlabelledSet(found.pairs, maker, found.channels, statistics.mean, statistics.std)
    batches = ViewBatches(data, batch=64, crops=4, seed=0, workers=2, pin=False)
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from dataset import POOL_BYTES, EpochSampler, Slot, load_image
from facts import PairFacts
from image_io import IMAGE_SUFFIXES, ImageError, file_stem, normalise
from normalisation import Statistics, channel_names
from pairing import SLIDE_SUFFIXES, DatasetError, Pair, list_beside, unpaired
from scan import find_problems, scan_pairs
from selfsupervised.views import ViewMaker
from shared_batches import SharedBatches
from shares import Drawn, draw_batches
from slide_index import draw_corner, open_places
from slide_windows import AS_STORED, SlideOptions, is_slide

SUFFIXES = (*IMAGE_SUFFIXES, *SLIDE_SUFFIXES)
SHOWN = 5  # unreadable files that a message names
USUAL = 4  # deviations from the mean within which values are usual
DRAWS = 20  # windows of an image with gaps that are tried until the middle of one holds data


# ----------------------------------------------------------------------------------------------------------------------
# Files


def find_images(words: Sequence[Path], add_dirs: Sequence[str] = ()) -> list[Pair]:
    """The images that --images names, each once, by name.

    Args:
        words: files, and folders: of one that holds images/ that is meant, so a labelled split gives its images alone.
            Folders inside a folder are not searched.
        add_dirs: folders beside that of the images with one extra channel each, paired by stem as in pairing.

    Returns:
        Pairs without masks. Their names are the stems of the files, with the folder before it where two are the same.

    Raises:
        DatasetError: a word that is no file or folder, a folder without images, or an image without its extra channels.
    """
    paths = list({path.resolve(): path for word in words for path in _images_of(Path(word))}.values())
    extras = _find_extras(words, paths, add_dirs) if add_dirs else {}
    stems = Counter(file_stem(path) for path in paths)
    named: dict[str, Path] = {}
    for path in paths:
        stem = file_stem(path)
        name = wanted = stem if stems[stem] == 1 else f"{path.parent.name}/{path.name}"
        number = 1
        while name in named:
            number += 1
            name = f"{wanted}-{number}"
        named[name] = path
    return [Pair(name, path, extras=extras.get(path, ())) for name, path in sorted(named.items())]


def _find_extras(words: Sequence[Path], paths: Sequence[Path], add_dirs: Sequence[str]) -> dict[Path, tuple[Path, ...]]:
    """The extra channels of each image. Of folders that are taken whole, no extra channel may be left over either."""
    whole = {_folder_of(Path(word)).resolve() for word in words if Path(word).is_dir()}
    folders: dict[Path, tuple[Path, dict[str, Path]]] = {}
    errors = []
    for path in paths:
        folder = path.parent if path.parent.name not in ("", "..") else path.parent.resolve()  # one with a parent
        _, images = folders.setdefault(folder.resolve(), (folder, {}))
        other = images.setdefault(file_stem(path), path)
        if other != path:
            errors.append(
                f"{other} and {path} have one stem, by which the files of {' '.join(add_dirs)} pair with them; "
                "expected one image for each stem: rename or remove one"
            )
    extras = {}
    for real, (folder, images) in folders.items():
        beside = []
        for name in add_dirs:
            found = list_beside(folder, name)
            wanted = found if real in whole else {stem: path for stem, path in found.items() if stem in images}
            errors += unpaired(folder, name, images, wanted)
            beside.append(found)
        for stem, path in images.items():
            extras[path] = tuple(found[stem] for found in beside if stem in found)
    if errors:
        raise DatasetError("\n".join(errors))
    return extras


def _folder_of(word: Path) -> Path:
    """The folder of images that a folder of --images means."""
    return word / "images" if (word / "images").is_dir() else word


def _images_of(word: Path) -> list[Path]:
    if word.is_file():
        return [word]
    if not word.is_dir():
        raise DatasetError(f"no file or folder {word}; expected images, or a folder that holds them: check --images")
    folder = _folder_of(word)
    found = [
        path
        for path in sorted(folder.iterdir(), key=lambda path: path.name)
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    ]
    if found:
        return found
    inside = sorted(
        {path.parent for path in folder.glob("*/images")}
        | {path.parent for path in folder.glob("*/*.*") if path.suffix.lower() in SUFFIXES}
    )
    hint = "png, jpg, tif, bmp, gif or webp files, or slides"
    if inside:
        listed = " ".join(map(str, inside[:SHOWN]))
        raise DatasetError(
            f"{folder} holds no images itself; expected {hint}. Folders inside it are not searched: give them, such as "
            f"--images {listed}"
        )
    raise DatasetError(f"{folder} holds no images; expected {hint}: give another folder to --images")


@dataclass
class CheckedImages:
    """Unlabelled images that were looked at.

    pairs and facts: of the images that can be used. left_out: files that cannot be read, and why. channels: names, in
    network order. warnings and notes are for the user.
    """

    pairs: list[Pair]
    facts: list[PairFacts]
    channels: tuple[str, ...]
    left_out: list[tuple[Path, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def rgb(self) -> bool:
        """Whether the first channels are red, green and blue."""
        return self.channels[:3] == ("red", "green", "blue")


def check_images(
    pairs: Sequence[Pair],
    *,
    add_dirs: Sequence[str] = (),
    steps: Sequence[str] = (),
    slides: SlideOptions = AS_STORED,
    workers: int | None = None,
    progress: bool = False,
) -> CheckedImages:
    """Read every image once (see scan.scan_pairs); leave out those that cannot be read.

    Grey images among RGB ones count as RGB of three equal channels.

    Args:
        add_dirs: names of the extra channels that the pairs have.

    Raises:
        DatasetError: no image can be used, they differ in channels or in pixel type, or an extra channel has another
            size than its image.
    """
    facts = scan_pairs(pairs, steps=steps, slides=slides, workers=workers, progress=progress)
    broken = [(item, _broken(item)) for item in facts]
    left_out = [why for _, why in broken if why]
    used = [item for item, why in broken if not why]
    if not used:
        listed = "; ".join(why for _, why in left_out[:SHOWN])
        raise DatasetError(f"none of {len(facts)} images can be used; expected at least one. {listed}")
    used, notes = _greys_as_rgb(used)
    errors, warnings = find_problems([], used)
    errors += [message for message in warnings if message.startswith("images differ in pixel types")]
    if errors:
        raise DatasetError("\n".join(errors))
    if len(warnings) > SHOWN:
        warnings = [*warnings[:SHOWN], f"... and {len(warnings) - SHOWN} more of such warnings"]
    return CheckedImages([item.pair for item in used], used, channel_names(used, add_dirs), left_out, warnings, notes)


def _broken(item: PairFacts) -> tuple[Path, str] | None:
    """The first file that keeps an image from being used, and what is wrong with it."""
    for path, layer in zip(item.pair.layers, item.layers, strict=True):
        if layer.error or not layer.pixels:
            return path, layer.error or f"{path} has no pixel with data; check its nodata value"
    return None


def _greys_as_rgb(facts: list[PairFacts]) -> tuple[list[PairFacts], list[str]]:
    """The facts of grey images as of RGB ones, where there are both and nothing else."""
    greys = sum(item.channels == 1 for item in facts)
    if {item.channels for item in facts} != {1, 3}:
        return facts, []
    spread = []
    for item in facts:
        layer = item.layers[0]
        if item.channels == 1:
            grey = replace(layer, channels=3, means=layer.means * 3, spreads=layer.spreads * 3)
            item = replace(item, layers=[grey, *item.layers[1:]])
        spread.append(item)
    return spread, [f"{greys} of {len(facts)} images are grey; they are taken as RGB of three equal channels"]


def usual_range(statistics: Statistics) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Smallest and largest usual value of each channel, for ViewMaker: 0 and 255 for 8 bit.

    Of other types one hot pixel, or one of -9999, decides how far the values of a whole data set reach; "20 % of the
    range" would then drown everything. So the range ends at USUAL deviations from the mean. From 0 on it begins at 0.
    """
    low, high = statistics.value_range
    ends = [
        _usual_ends(*values) for values in zip(low, high, statistics.mean, statistics.std, strict=True)
    ]  # one for each channel
    return tuple(least for least, _ in ends), tuple(most for _, most in ends)


def _usual_ends(least: float, most: float, mean: float, std: float) -> tuple[float, float]:
    if (least, most) == (0.0, 255.0):
        return least, most
    low, high = max(least, mean - USUAL * std) if least < 0 else least, min(most, mean + USUAL * std)
    return (low, high) if low < high else (least, most)


# ----------------------------------------------------------------------------------------------------------------------
# Views


@dataclass(frozen=True)
class Views:
    """Pairs of views: view_a and view_b (N, C, S, S) float32, normalised, and where they lie.

    places: (N, 2, 2, 3) float32, for each view the matrix that takes a place (x, y, 1) of it to its place in the
    source image; the middles of pixels are whole numbers. names: of the images. One of several processes has its own
    part of the views and places, and the names of all.
    """

    view_a: torch.Tensor
    view_b: torch.Tensor
    places: torch.Tensor
    names: tuple[str, ...]

    def only(self, row: int) -> "Views":
        """One of the pairs, in memory of its own."""
        rows = slice(row, row + 1)
        return Views(self.view_a[rows].clone(), self.view_b[rows].clone(), self.places[rows].clone(), self.names[rows])

    def pin_memory(self) -> "Views":
        """Called by the loader when it pins memory."""
        return Views(self.view_a.pin_memory(), self.view_b.pin_memory(), self.places.pin_memory(), self.names)


Sample = tuple[str, np.ndarray, np.ndarray, np.ndarray]


def stack_views(samples: Sequence[Sample]) -> Views:
    """Samples of one image as one batch."""
    columns = [torch.from_numpy(np.stack(parts)) for parts in list(zip(*samples, strict=True))[1:]]
    return Views(columns[0], columns[1], columns[2], tuple(sample[0] for sample in samples))


class UnlabelledSet(Dataset[list[Sample]]):
    """Pairs of views; an item is a tuple of slots of one image, which is decoded once for all of them.

    Args:
        pairs: see find_images. channels: names of the channels. mean, std: in raw units. steps: preprocessing.
        slides: how slides are read.

    Raises:
        DatasetError: a slide, and views of whole images.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        maker: ViewMaker,
        channels: Sequence[str],
        mean: Sequence[float],
        std: Sequence[float],
        *,
        steps: Sequence[str] = (),
        slides: SlideOptions = AS_STORED,
    ) -> None:
        self.pairs, self.maker, self.channels, self.mean, self.std = list(pairs), maker, tuple(channels), mean, std
        self.steps, self.options = tuple(steps), slides
        self.slides = [is_slide(pair, slides) for pair in self.pairs]
        if any(self.slides) and not maker.options.window:
            raise DatasetError(
                f"{self.pairs[self.slides.index(True)].image} is a slide, and views come from whole images; expected "
                "windows of it: --window 1.5"
            )

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def sample_bytes(self) -> int:
        """Memory that a pair of views takes on its way to a batch."""
        return 2 * 4 * self.maker.options.size**2 * len(self.channels)

    def __getitem__(self, slots: tuple[Slot, ...]) -> list[Sample]:
        """Samples (name, view (C, S, S) float32, the other view, their places (2, 2, 3) float32), one for each slot."""
        pair, number = self.pairs[slots[0].image], slots[0].image
        take = partial(self._of_slide, pair) if self.slides[number] else self._of_image(pair)
        samples = []
        for slot in slots:
            cuts, matrices = take(slot.augmented)
            views = self.maker.change(cuts, slot.augmented)
            first, second = (normalise(view, self.mean, self.std) for view in views)
            samples.append((pair.name, first, second, matrices.astype(np.float32)))
        return samples

    def _of_image(self, pair: Pair) -> Callable[[int], tuple[list[np.ndarray], np.ndarray]]:
        image, valid = load_image(pair, (), self.steps)
        image = self._as_expected(image, pair)
        size = image.shape[:2]

        def take(seed: int) -> tuple[list[np.ndarray], np.ndarray]:
            rng, region = np.random.default_rng([seed, 0]), self.maker.region(size)
            corner = draw_corner(size, region, None, rng)
            for _ in range(DRAWS):
                if valid is None or valid[_middle(corner, region, size)]:
                    break
                corner = draw_corner(size, region, None, rng)
            matrices = self.maker.draw(size, corner, seed)
            return [self.maker.cut(image, matrix, size) for matrix in matrices], matrices

        return take

    def _of_slide(self, pair: Pair, seed: int) -> tuple[list[np.ndarray], np.ndarray]:
        places = open_places(pair, self.options, None, self.mean)
        slide = places.slide
        size = slide.height, slide.width
        corner = places.corner(self.maker.region(size), None, np.random.default_rng([seed, 0]))
        matrices = self.maker.draw(size, corner, seed)
        box = self.maker.needed(matrices, size)
        pixels = self._as_expected(slide.pixels(*box), pair)
        return [self.maker.cut(pixels, matrix, size, box[:2]) for matrix in matrices], matrices

    def _as_expected(self, image: np.ndarray, pair: Pair) -> np.ndarray:
        """The image with the channels of all: a grey one among RGB is RGB of equal channels."""
        wanted, extras = len(self.channels), len(pair.extras)
        if image.shape[2] - extras == 1 and wanted - extras == 3:
            return np.concatenate([np.repeat(image[:, :, :1], 3, axis=2), image[:, :, 1:]], axis=2)
        if image.shape[2] != wanted:
            raise ImageError(
                f"{pair.image} has {image.shape[2]} channels, expected {wanted} ({' '.join(self.channels)})"
            )
        return image


def _middle(corner: tuple[int, int], region: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The pixel of an image in the middle of a region, or the nearest one to it."""
    row, column = (min(max(corner[axis] + region[axis] // 2, 0), size[axis] - 1) for axis in (0, 1))
    return row, column


class ViewBatches(SharedBatches):
    """Full batches of pairs of views, drawn from a pool of samples of many images; see TrainingBatches.

    Args:
        batch: pairs of a batch of all processes together, a multiple of `world`.
        crops: pairs of views that an image gives in an epoch.
        rank: number of this process out of `world`.

    Raises:
        DatasetError: fewer pairs in an epoch than in a batch, or a batch that the processes cannot share evenly.
    """

    collate = staticmethod(stack_views)

    def __init__(
        self,
        data: UnlabelledSet,
        *,
        batch: int,
        crops: int,
        seed: int,
        workers: int,
        pin: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch % world:
            raise DatasetError(
                f"a batch of {batch} cannot be shared by {world} processes evenly; expected a multiple of {world}: "
                f"-b {batch - batch % world or world} or {batch + world - batch % world}"
            )
        if len(data) * crops < batch:
            raise DatasetError(
                f"{len(data)} images with {crops} crops each give {len(data) * crops} pairs of views, a batch is "
                f"{batch}; expected at least one batch: more images, --crops {-(-batch // max(1, len(data)))} or "
                f"-b {len(data) * crops}"
            )
        sampler = EpochSampler([()] * len(data), crops=crops, quota=0, seed=seed, slides=data.slides)
        super().__init__(data, sampler, batch=batch, workers=workers, pin=pin, rank=rank, world=world)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return self.sampler.samples // self.batch

    def __iter__(self) -> Iterator[Views]:  # type: ignore[override]
        return super().__iter__()  # type: ignore[return-value]

    def draw(self, groups: Iterable[list[Drawn]], let_go: Callable[[list[Drawn]], list[Drawn]]) -> Iterator:
        """The full batches of the epoch.

        The crops of one image shall not be one batch, where they would be told from each other by nothing but their
        place, so the pool is as many batches as an image has crops, if memory holds them.
        """
        rng = np.random.default_rng([self.sampler.seed, self.sampler.epoch, 1])
        enough = max(self.batch, min(self.batch * self.sampler.crops, POOL_BYTES // self.data.sample_bytes))
        drawn = draw_batches(groups, rng, batch=self.batch, enough=enough, let_go=let_go)
        return (samples for samples in drawn if len(samples) == self.batch)

    def _stack(self, samples: list[tuple[Views, int]], names: tuple[str, ...]) -> Views:  # type: ignore[override]
        first, second, places = (
            torch.stack([getattr(loaded, part)[row] for loaded, row in samples])
            for part in ("view_a", "view_b", "places")
        )
        views = Views(first, second, places, names)
        return views.pin_memory() if self.pin else views
