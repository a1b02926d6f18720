"""Real tiles for an export: what it is compared on, scored on, calibrated with and timed with."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from checkpoint import ModelConfig
from classes import ClassMap
from dataset import load_pair
from evaluation import build_scorer
from export_graph import Shell
from image_io import normalise, resize_image, resize_mask
from pairing import SPLITS, DatasetError, FileOptions, find_split
from slide_windows import SlideOptions, is_slide
from tiling import reflect_index, round_up

REPEATS = 20  # calls whose median is a latency

Forward = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Tile:
    """Raw pixels (H, W, C) as the network's tiles show them, and class indices (H, W) uint8 where there is a mask."""

    name: str
    pixels: np.ndarray
    mask: np.ndarray | None


def load_tiles(
    folder: Path, config: ModelConfig, count: int, *, split: str = "val", say: Callable[[str], None] | None = None
) -> list[Tile]:
    """One tile from the middle of each of so many images, evenly spread over a split in the order of their names.

    Args:
        folder: a split folder, all of which is taken, or the root of a data set. One without val/ is split by name as
            in training.
        split: train or val, of a root.
        say: takes a line for each image that cannot be used while others can.

    Raises:
        DatasetError: no image there can be used; says why for each.
    """
    options = FileOptions(config.add_dirs, val_share=config.val_share, group_pattern=config.group_pattern)
    try:
        listing = find_split(folder, None if folder.resolve().name in SPLITS else split, options)
    except DatasetError:
        if not (folder / "images").is_dir():
            raise
        listing = find_split(folder, None, options)  # too few images to keep some for validation
    slides, classes = SlideOptions.from_config(config), ClassMap.from_config(config)
    last = len(listing.pairs) - 1
    chosen = sorted({round(place) for place in np.linspace(0, last, count)}) if listing.pairs else []
    tiles, problems = [], list(listing.errors)
    for pair in (listing.pairs[place] for place in chosen):
        if is_slide(pair, slides):
            problems.append(f"{pair.image} is a slide: give a folder of tiles, such as tile_slides.py cuts")
            continue
        try:
            image, mask, _ = load_pair(pair, classes, config)
        except (OSError, ValueError) as error:
            problems.append(str(error))
            continue
        tiles.append(_cut(pair.name, image, mask, config))
    if not tiles:
        listed = "\n".join(f"  - {message}" for message in problems)
        raise DatasetError(
            f"{folder} has no image to try the export on; expected images/ that the network takes\n{listed}".rstrip()
        )
    for message in problems if say else ():
        say(f"warning: not looked at: {message}")  # type: ignore[misc]
    return tiles


def _cut(name: str, image: np.ndarray, mask: np.ndarray | None, config: ModelConfig) -> Tile:
    geometry = config.geometry
    if geometry.kind == "resize":
        return Tile(
            name, resize_image(image, geometry.size), None if mask is None else resize_mask(mask, geometry.size)
        )
    side = geometry.tile
    top, left = (max(0, (length - side) // 2) for length in image.shape[:2])
    window = slice(top, top + side), slice(left, left + side)
    return Tile(name, np.ascontiguousarray(image[window]), None if mask is None else np.ascontiguousarray(mask[window]))


def score_tiles(forward: Forward, tiles: Sequence[Tile], config: ModelConfig, threshold: float = 0.5) -> float | None:
    """IoU over all tiles with a mask; None without any. Sides are padded here as tiling.py pads them.

    Args:
        forward: normalised images (N, C, h, w) -> probabilities (N, K, h, w).
    """
    scorer = build_scorer(config, threshold=threshold)
    scored = False
    for tile in tiles:
        if tile.mask is not None:
            height, width = tile.mask.shape
            probs = forward(pad_tile(tile.pixels, config))[0, :, :height, :width]
            scorer.update(tile.name, np.ascontiguousarray(probs), tile.mask)
            scored = True
    return scorer.summary()["iou"] if scored else None


def pad_tile(pixels: np.ndarray, config: ModelConfig) -> np.ndarray:
    """A tile (H, W, C) as a normalised batch of one whose sides the bare network takes."""
    batch = normalise(pixels, config.mean, config.std)[None]
    for axis in (2, 3):
        side = batch.shape[axis]
        frame = round_up(max(side, config.min_side), config.stride)
        if frame != side:
            batch = batch.take(reflect_index(side, frame), axis=axis)
    return np.ascontiguousarray(batch, np.float32)


def make_input(config: ModelConfig, shell: Shell, tiles: Sequence[Tile]) -> np.ndarray:
    """A batch of one for a file: the first real tile, or grey, of the size that the network's tiles have."""
    geometry = config.geometry
    size = shell.size or (geometry.size if geometry.kind == "resize" else (geometry.tile, geometry.tile))
    pixels = np.broadcast_to(np.asarray(config.mean, np.float32), (*size, len(config.mean)))
    if tiles:
        pixels = tiles[0].pixels
        rows, cols = (reflect_index(side, wanted) for side, wanted in zip(pixels.shape[:2], size, strict=True))
        pixels = pixels[rows][:, cols]
    if shell.pixels:
        return np.ascontiguousarray(pixels.astype(shell.pixels))[None]
    return np.ascontiguousarray(normalise(pixels, config.mean, config.std)[None], np.float32)


def time_calls(calls: Mapping[str, Callable[[], object]], repeats: int = REPEATS) -> dict[str, float]:
    """Median seconds of each call, run in turns, so that a busy moment falls on all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()  # the first one prepares kernels
    for _ in range(repeats):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begin)
    return {name: float(np.median(each)) for name, each in seconds.items()}
