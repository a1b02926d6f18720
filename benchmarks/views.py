"""What a view for self-supervised learning costs on one core, beside lightly's SimCLR transform.

Example:
    python -m benchmarks.views

Milliseconds of processor time a view, from a decoded picture to a normalised tensor: crop, resampling, changes of
values, normalising. "window" cuts views from windows of 1.5 sides, the default of pretrain.py; "whole" from the whole
picture, as lightly's transform does, which reads a PIL image of the same pixels. All three take turns on every picture,
so they see the same load of the computer. lightly takes 8-bit RGB alone; a dash stands for the rest.
lightly is no part of requirements.txt: pip install -r requirements-dev.txt.
"""

import argparse
import time
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import torch
from lightly.transforms import SimCLRTransform
from PIL import Image

import cli
from image_io import normalise
from selfsupervised.views import VIEWS, ViewMaker, ViewOptions

FORMATS = (("uint8", 3), ("uint16", 5))
TOPS = {"uint8": 255, "uint16": 65535}
SPARE = 3  # pairs of views made before the clock starts
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as lightly has them
COLUMNS = f"{'preset':<15}{'format':<13}{'window':>9}{'slowest':>9}{'whole':>9}{'lightly':>9}{'ratio':>8}"
Way = Callable[[int], object]


def build_parser() -> argparse.ArgumentParser:
    """Flags of this benchmark."""
    parser = cli.make_parser("Cost of views for self-supervised learning, beside lightly's SimCLR transform.")
    parser.add_argument("--only", nargs="+", choices=VIEWS, default=VIEWS, metavar="PRESET", help="presets")
    parser.add_argument("--size", type=cli.positive_int, default=224, metavar="S", help="side of a view")
    parser.add_argument("--source", type=cli.positive_int, default=512, metavar="S", help="side of the pictures")
    parser.add_argument("--images", type=cli.positive_int, default=40, metavar="N", help="pictures for each mean")
    return parser


def draw(side: int, kind: str, channels: int, seed: int) -> np.ndarray:
    """A picture (side, side, channels) of soft blobs with fine noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 1, (max(2, side // 24), max(2, side // 24), channels)).astype(np.float32)
    smooth = cv2.merge([cv2.resize(band, (side, side), interpolation=cv2.INTER_CUBIC) for band in cv2.split(coarse)])
    noisy = smooth.reshape(side, side, channels) + rng.normal(0, 0.03, (side, side, channels))
    return (np.clip(noisy, 0, 1) * TOPS[kind]).astype(kind)


def ours(preset: str, picture: np.ndarray, size: int, window: float) -> Way:
    """Makes both views of a picture from a seed."""
    top, channels = TOPS[str(picture.dtype)], picture.shape[2]
    maker = ViewMaker(preset, ViewOptions(size, window), rgb=channels == 3, value_range=(0, top))
    mean, std = [0.5 * top] * channels, [0.25 * top] * channels

    def make(seed: int) -> object:
        first, second, matrices = maker.make_views(picture, seed)
        return normalise(first, mean, std), normalise(second, mean, std), matrices

    return make


def lightlys(picture: np.ndarray, size: int) -> Way | None:
    """The same by lightly, whose views are drawn from torch's generator; None: it does not take such pictures."""
    if picture.dtype != np.uint8 or picture.shape[2] != 3:
        return None
    transform, image = SimCLRTransform(size, normalize={"mean": [*MEAN], "std": [*STD]}), Image.fromarray(picture)
    return lambda seed: transform(image)


def time_views(preset: str, kind: str, channels: int, args: argparse.Namespace) -> list[list[float]]:
    """Milliseconds a view of each picture: from windows, from whole pictures, and lightly's, which may be empty."""
    found: list[list[float]] = [[], [], []]
    for seed in range(args.images + SPARE):
        picture = draw(args.source, kind, channels, seed % 4)
        ways = (
            ours(preset, picture, args.size, 1.5),
            ours(preset, picture, args.size, 0),
            lightlys(picture, args.size),
        )
        for place, way in enumerate(ways):
            if way is None:
                continue
            begin = time.process_time()
            way(seed)
            if seed >= SPARE:
                found[place].append(500 * (time.process_time() - begin))  # two views
    return found


def measure(args: argparse.Namespace) -> None:
    """Print the table."""
    print(f"ms a view of {args.size} px and core, from pictures of {args.source} px; means of {args.images} pairs")
    print(COLUMNS)
    for preset in args.only:
        for kind, channels in FORMATS:
            window, whole, other = time_views(preset, kind, channels, args)
            numbers = np.mean(window), max(window), np.mean(whole), np.mean(other) if other else np.nan
            row = f"{preset:<15}{f'{kind} x{channels}':<13}" + "".join(f"{number:>9.2f}" for number in numbers[:3])
            tail = f"{numbers[3]:>9.2f}{numbers[3] / numbers[2]:>8.1f}" if other else f"{'-':>9}{'-':>8}"
            print(row + tail, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and measure."""
    parser = build_parser()
    args = cli.parse(parser, argv)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    with cli.plain_errors(parser):
        measure(args)


if __name__ == "__main__":
    main()
