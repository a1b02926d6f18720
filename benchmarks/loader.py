"""What augmentation and loading cost on one core, beside the plain albumentations list of the same preset.

Examples:
    python -m benchmarks.loader presets
    python -m benchmarks.loader presets --only medium hard --images 100
    python -m benchmarks.loader files --only none hard

`presets` augments one drawn picture in memory, in every format; `files` reads a drawn data set from disk and makes
training batches of it. Ours and the plain list take turns on every image, so both see the same load of the computer.
The plain lists are the predecessor's sets as one would write them for albumentations 2.0.8; "no fog" leaves RandomFog
out, which alone takes seconds when its coefficient is small. Where the library refuses a format, a dash stands.
The library is no part of requirements.txt: pip install -r requirements-dev.txt.
"""

import argparse
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile

import cli
from augmentations import PRESETS, Augmentation
from checkpoint import Geometry, ModelConfig
from classes import ClassMap
from dataset import EpochSampler, TrainingBatches, TrainingSet
from image_io import normalise, write_image, write_mask
from pairing import Pair

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # otherwise the import asks PyPI for a newer version
import albumentations as A  # noqa: E402

FORMATS = [(kind, channels) for channels in (3, 1, 5) for kind in ("uint8", "uint16", "float32")]
# Name of a row: suffix, type and channels of its files.
FILES = {
    "png": (".png", "uint8", 3),
    "jpg": (".jpg", "uint8", 3),
    "tif": (".tif", "uint8", 3),
    "png, 16 bit": (".png", "uint16", 3),
    "tif, 5 x 16 bit": (".tif", "uint16", 5),
    "tif, 5 floats": (".tif", "float32", 5),
}
SLIDE, SLIDE_SIDE = "slide", 10240  # large enough to be read by windows
PLAIN = ("png", "jpg", "tif")  # what the plain way takes: 8-bit RGB that is decoded whole
TOPS = {"uint8": 255, "uint16": 65535, "float32": 1.0}
Way = Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]
COLUMNS = f"{'preset':<11}{'format':<13}{'ours':>8}{'slowest':>9}{'plain':>9}{'no fog':>9}{'ratio':>8}"


def build_parser() -> argparse.ArgumentParser:
    """Flags of this benchmark."""
    parser = cli.make_parser("Cost of augmentation and loading, beside plain albumentations lists.")
    parser.add_argument("part", choices=("presets", "files"), help="transforms in memory, or files to batches")
    parser.add_argument("--only", nargs="+", choices=PRESETS, default=PRESETS, metavar="PRESET", help="presets")
    parser.add_argument("--size", type=cli.positive_int, default=512, metavar="S", help="side of what the network sees")
    parser.add_argument("--source", type=cli.positive_int, default=1024, metavar="S", help="side of the files")
    parser.add_argument("--crops", type=cli.positive_int, default=8, metavar="N", help="crops of one file")
    parser.add_argument("--images", type=cli.positive_int, default=40, metavar="N", help="images for each mean")
    parser.add_argument("--all-formats", action="store_true", help="16 bit, floats, 1 and 5 channels as well")
    return parser


# ----------------------------------------------------------------------------------------------------------------------
# The plain lists


def plain_list(preset: str, channels: int, *, fog: bool) -> list[Any]:
    """The predecessor's set, or for a preset that it had not, the same steps of the library at the same strength."""
    reflect: dict[str, Any] = {"border_mode": cv2.BORDER_REFLECT_101}
    turns = [A.RandomRotate90(p=1), A.Transpose()]
    colour, own = channels == 3, _plain_geometry(reflect)
    contrast = [A.RandomBrightnessContrast(), A.RandomGamma()]
    colours = [A.CLAHE(), A.HueSaturationValue(), A.RGBShift()] if colour else []
    pca = [A.FancyPCA()] if colour else []
    fogs = [A.RandomFog(fog_coef_range=(0.3, 1), p=0.1)] if fog and colour else []
    thin_fogs = [A.RandomFog(fog_coef_range=(0.01, 0.3), p=0.1)] if fog and colour else []
    grey = [A.ToGray(p=0.6), A.ChannelShuffle(p=0.4), A.RGBShift(30, 20, 30, p=0.6)] if colour else []
    some = [A.HueSaturationValue(25, 25, 20), A.CLAHE(5.0)] if colour else []
    return {
        "none": [],
        "safe": turns,
        "light": [A.Downscale((0.3, 0.3), p=1), *turns, A.RandomBrightnessContrast(), _plain_affine(0.05, 15)],
        "medium": [
            A.HorizontalFlip(),
            _plain_affine(0.1, 15),
            A.OneOf([A.GaussianBlur(), A.NoOp()]),
            A.OneOf([A.CoarseDropout(), A.NoOp()]),
            A.GaussNoise(),
            A.OneOf([*contrast, *colours]),
            *thin_fogs,
        ],
        "hard": [
            *turns,
            A.OneOf([_plain_affine(0.2, 45, **reflect), A.ElasticTransform(**reflect)]),
            A.OneOf([*contrast, *colours, *pca]),
            A.OneOf([A.RandomGridShuffle(), A.CoarseDropout()]),
            A.OneOf([A.GaussianBlur(), A.GaussNoise()]),
            *fogs,
        ],
        "one": [*turns, *contrast, *pca, *colours],
        "vessel": [
            A.HorizontalFlip(),
            A.VerticalFlip(p=0.2),
            *([A.ISONoise(p=0.1), A.CLAHE()] if colour else []),
            A.ElasticTransform(p=0.2),
            A.GridDistortion(p=0.2),
            A.OpticalDistortion(p=0.2),
            *[A.RandomBrightnessContrast(), A.RandomGamma(p=0.2)],
        ],
        "histology": [
            *[A.HorizontalFlip(p=0.6), A.VerticalFlip(p=0.6), A.RandomRotate90(p=0.6), A.Perspective(p=0.6)],
            *[_plain_affine(0.3, 35, p=0.6, **reflect), *grey, A.MedianBlur(3, p=0.6)],
            A.OneOf(own),
            A.OneOf([A.AdditiveNoise(), A.GaussNoise()] if colour else [A.GaussNoise()]),
            A.OneOf([*some, *contrast]),
        ],
        "aerial": [
            *[*turns, _plain_affine(0.25, 45, **reflect), A.OneOf([*contrast, *colours[1:]])],
            *([A.RandomShadow(p=0.2)] if colour else []),
            *[A.OneOf([A.GaussianBlur(), A.GaussNoise(), A.Downscale((0.5, 0.9))], p=0.3), *fogs],
        ],
    }[preset]


def _plain_geometry(border: dict[str, Any]) -> list[Any]:
    return [A.OpticalDistortion(**border), A.GridDistortion(**border), A.PiecewiseAffine(**border)]


def _plain_affine(scale: float, degrees: float, p: float = 0.5, **border: Any) -> Any:
    shift = (-0.0625, 0.0625)
    return A.Affine(scale=(1 - scale, 1 + scale), translate_percent=shift, rotate=(-degrees, degrees), p=p, **border)


def plain(preset: str, channels: int, *, fog: bool) -> Way:
    """The plain list as a function of image, mask and seed."""
    pipeline = A.Compose(plain_list(preset, channels, fog=fog))

    def apply(image: np.ndarray, mask: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
        result = pipeline(image=image, mask=mask)
        return result["image"], result["mask"]

    return apply


def ours(preset: str, kind: str, channels: int) -> Way:
    """Our preset as a function of image, mask and seed."""
    augmentation = Augmentation(preset, rgb=channels == 3, value_range=(0, TOPS[kind]))

    def apply(image: np.ndarray, mask: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        return augmentation.local(*augmentation.geometric(image, mask, seed), seed)

    return apply


# ----------------------------------------------------------------------------------------------------------------------
# In memory


def draw(size: int, kind: str = "uint8", channels: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Discs on a shaded ground with grain (size, size, channels), in the range of a kind, and their mask."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((size, size), np.uint8)
    for x, y in rng.integers(0, size, (30, 2)).tolist():
        cv2.circle(mask, (x, y), int(rng.integers(size // 40 + 2, size // 12 + 3)), 1, -1)
    coarse = rng.uniform(0.2, 0.6, (8, 8, channels)).astype(np.float32)
    ground = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC).reshape(size, size, channels)
    image = ground + 0.3 * mask[..., None] + 0.03 * rng.standard_normal((size, size, channels), np.float32)
    return (np.clip(image, 0, 1) * TOPS[kind]).astype(kind), mask


def time_in_turns(ways: Sequence[Way], image: np.ndarray, mask: np.ndarray, turns: int) -> np.ndarray:
    """Milliseconds (turns, ways), NaN where a way but the first (ours) raises; a first call of each is not counted."""
    taken = np.full((turns + 1, len(ways)), np.nan)
    for turn in range(turns + 1):
        for place, way in enumerate(ways):
            begin = time.perf_counter()
            try:
                way(image, mask, turn)
            except Exception:  # noqa: BLE001, S112 - the library's refusals have no class of their own
                if place == 0:
                    raise
                continue
            taken[turn, place] = 1000 * (time.perf_counter() - begin)
    return taken[1:]


def measure_presets(args: argparse.Namespace) -> None:
    """Print the table of milliseconds an image."""
    print(f"ms an image of {args.size} px on one core, mean of {args.images}; albumentations {A.__version__}")
    print(COLUMNS)
    for preset in args.only:
        for kind, channels in FORMATS if args.all_formats else FORMATS[:1]:
            image, mask = draw(args.size, kind, channels)
            ways = [ours(preset, kind, channels), *(plain(preset, channels, fog=fog) for fog in (True, False))]
            with np.errstate(all="ignore"):
                taken = time_in_turns(ways, image, mask, args.images)
            own, listed, thin = taken.mean(axis=0)
            print(
                f"{preset:<11}{f'{kind} x{channels}':<13}{own:>8.2f}{taken[:, 0].max():>9.1f}"
                f"{_number(listed)}{_number(thin)}{_number(thin / max(own, 1e-3), 8)}",
                flush=True,
            )


def _number(value: float, width: int = 9) -> str:
    return f"{value:>{width}.1f}" if np.isfinite(value) else f"{'-':>{width}}"


# ----------------------------------------------------------------------------------------------------------------------
# From files


def write_files(folder: Path, name: str, side: int, count: int) -> list[Pair]:
    """Drawn pictures with masks as files of one row of FILES."""
    suffix, kind, channels = FILES[name]
    pairs = []
    for number in range(count):
        image, mask = draw(side, kind, channels, seed=number)
        pair = Pair(f"{number}", folder / f"{name}_{number}{suffix}", folder / f"{name}_{number}_mask.png")
        write_image(pair.image, image)
        write_mask(folder / f"{name}_{number}_mask.png", mask)
        pairs.append(pair)
    return pairs


def write_slides(folder: Path, side: int, count: int) -> list[Pair]:
    """Slides in JPEG tiles with masks, made of one drawn picture again and again."""
    image, mask = draw(side)
    pairs, times = [], -(-SLIDE_SIDE // side)
    for number in range(count):
        paths = folder / f"slide_{number}.tif", folder / f"slide_{number}_mask.tif"
        for path, pixels, how in ((paths[0], image, "jpeg"), (paths[1], mask, "deflate")):
            whole = np.tile(pixels, (times, times, 1)[: pixels.ndim])[:SLIDE_SIDE, :SLIDE_SIDE]
            photometric = "rgb" if whole.ndim == 3 else "minisblack"
            tifffile.imwrite(path, whole, tile=(256, 256), compression=how, photometric=photometric)
        pairs.append(Pair(f"{number}", *paths))
    return pairs


def load_ours(pairs: Sequence[Pair], preset: str, size: int, crops: int, row: str) -> Iterator[int]:
    """Samples in each batch that our loader makes in this process; crops 0: whole images resized."""
    _, kind, channels = FILES.get(row, FILES["tif"])
    statistics: dict[str, Any] = {"mean": (0.5 * TOPS[kind],) * channels, "std": (0.2 * TOPS[kind],) * channels}
    config = ModelConfig(
        architecture="unet",
        encoder="resnet18",
        labels=(1,),
        class_names=("background", "1"),
        channels=tuple("RGBNM"[:channels]),
        geometry=Geometry("crops", (size, size), tile=2 * size) if crops else Geometry("resize", (size, size)),
        **statistics,
    )
    augmentation = Augmentation(preset, rgb=channels == 3, value_range=(0, TOPS[kind]))
    data = TrainingSet(pairs, ClassMap((1,), config.class_names), config, augmentation)
    quota = 0.33 if crops else 0
    sampler = EpochSampler(
        [(1,)] * len(pairs), crops=max(1, crops), quota=quota, seed=0, slides=[row == SLIDE] * len(pairs)
    )
    for batch in TrainingBatches(data, sampler, batch=4, workers=0, pin=False):
        yield len(batch.names)


def load_plain(pairs: Sequence[Pair], preset: str, size: int, crops: int) -> Iterator[int]:
    """Samples as the predecessor makes them: every one decodes its image, augments all of it, then resizes or cuts."""
    steps = A.Compose(
        [*plain_list(preset, 3, fog=False), A.RandomCrop(size, size) if crops else A.Resize(size, size, p=1)]
    )
    for pair in pairs:
        for _ in range(max(1, crops)):
            assert pair.mask is not None
            image, mask = cv2.imread(str(pair.image)), cv2.imread(str(pair.mask), cv2.IMREAD_GRAYSCALE)
            result = steps(image=image, mask=mask)
            normalise(result["image"], (120.0,) * 3, (60.0,) * 3)
            yield 1


def measure_files(args: argparse.Namespace) -> None:
    """Print the table of samples a second and worker."""
    count = max(2, args.images // 8)
    print(f"samples of {args.size} px a second and worker; files of {args.source} px, {count} of each format")
    print(f"{'preset':<11}{'geometry':<12}{'files':<17}{'ours':>8}{'plain':>9}{'ratio':>8}")
    with tempfile.TemporaryDirectory() as folder:
        files = {name: write_files(Path(folder), name, args.source, count) for name in FILES}
        files[SLIDE] = write_slides(Path(folder), args.source, 2)
        for preset in args.only:
            for crops in (0, args.crops):
                for name, pairs in files.items():
                    if name == SLIDE and not crops:
                        continue
                    own, listed = _rates(pairs, preset, args.size, crops, name)
                    geometry = f"{args.crops} crops" if crops else "resize"
                    ratio = _number(own / listed, 8)
                    print(f"{preset:<11}{geometry:<12}{name:<17}{own:>8.1f}{_number(listed)}{ratio}", flush=True)


def _rates(pairs: Sequence[Pair], preset: str, size: int, crops: int, row: str) -> tuple[float, float]:
    """Samples a second of ours and of the plain way, a pair of files at a time in turns; NaN where it takes none."""
    seconds, samples = np.zeros(2), np.zeros(2)
    ways: list[Callable[[Sequence[Pair]], Iterator[int]]] = [
        lambda part: load_ours(part, preset, size, crops, row),
        lambda part: load_plain(part, preset, size, crops),
    ]
    if row == SLIDE:
        sum(ways[0](pairs))  # where its classes lie is found once and kept
    for start in range(0, len(pairs) - 1, 2):
        for place, load in enumerate(ways if row in PLAIN else ways[:1]):
            begin = time.perf_counter()
            samples[place] += sum(load(pairs[start : start + 2]))
            seconds[place] += time.perf_counter() - begin
    with np.errstate(invalid="ignore"):
        return tuple((samples / seconds).tolist())


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and measure."""
    parser = build_parser()
    args = cli.parse(parser, argv)
    cv2.setNumThreads(0)
    with cli.plain_errors(parser):
        {"presets": measure_presets, "files": measure_files}[args.part](args)


if __name__ == "__main__":
    main()
