"""From files and checkpoints to bands of probabilities: how predict.py sees one image, of whatever size.

A Picture reads windows of an image (with its extra channels) as the network's numbers; predict_picture runs the network
over it, row band after row band. Nothing here holds a whole image, except where a checkpoint asks for it: networks of
the resize geometry, and preprocessing that looks at all pixels.
"""

import math
import time
import unicodedata
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from backends import Forward
from checkpoint import Geometry, ModelConfig
from cli import UsageError
from dataset import both_hold, load_image
from image_io import ImageError, file_stem, list_images, normalise, resize_image
from outputs import clear_outside
from pairing import Pair
from pictures import list_pictures
from slide_io import Slide, open_slide
from slide_windows import SCALE_DRIFT
from tiling import TTA, Axis, plan_axis, predict_bands, round_up, run_ahead
from tissue import Tissue, find_tissue
from unlike import Moments

MUCH_SMALLER = 4  # images this many times as long as what a network sees are warned about
UPSCALED_ROWS = 256  # rows that are enlarged at a time
ASKED_COLUMNS = 512  # of tissue that are asked for their data at a time

Bands = Generator[tuple[int, np.ndarray], None, None]  # first row, probabilities (K, h, W)


def pair_channels(folder: Path, add_dirs: Sequence[str]) -> tuple[list[Pair], list[str]]:
    """The images of a folder with images/ and one folder for each extra channel; masks are not looked at.

    Returns:
        The images that have all their channels, and what is missing of the others.

    Raises:
        FileNotFoundError: a folder is missing or images/ is empty.
    """
    if not (folder / "images").is_dir():
        raise FileNotFoundError(f"no folder {folder / 'images'}; expected images in it, or give a folder with -dir")
    beside = [list_images(folder / name) for name in add_dirs]
    pairs, missing = [], []
    for path in list_pictures([str(folder / "images")]):
        name = file_stem(path)
        stem = unicodedata.normalize("NFC", name)
        lacking = [str(folder / name) for name, found in zip(add_dirs, beside, strict=True) if stem not in found]
        if lacking:
            missing.append(f"{path} has no partner in {' and '.join(lacking)}; expected a file of the same stem there")
        else:
            pairs.append(Pair(name, path, extras=tuple(found[stem] for found in beside)))
    return pairs, missing


class Source(Protocol):
    """What windows are read from: slide_io.Grid, or an image in memory."""

    @property
    def height(self) -> int:
        """Pixels of the grid."""

    @property
    def width(self) -> int:
        """Pixels of the grid."""

    @property
    def scale(self) -> float:
        """Level-0 pixels for each pixel of the grid."""

    def read(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Pixels (height, width, C) of a window."""

    def valid(self, top: int, left: int, height: int, width: int) -> np.ndarray | None:
        """Where a window holds data, (height, width) bool; None: everywhere."""


@dataclass
class Whole:
    """An image (H, W, C) in memory, and where it holds data."""

    image: np.ndarray
    holds: np.ndarray | None
    scale: float = 1.0

    @property
    def height(self) -> int:
        return self.image.shape[0]

    @property
    def width(self) -> int:
        return self.image.shape[1]

    def read(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        return self.image[top : top + height, left : left + width]

    def valid(self, top: int, left: int, height: int, width: int) -> np.ndarray | None:
        return None if self.holds is None else self.holds[top : top + height, left : left + width]


@dataclass(frozen=True)
class ReadOptions:
    """At which scale a slide is read, and how; at most one of reduce, level and mpp. None of them: the training's."""

    reduce: float | None = None
    level: int | None = None
    mpp: float | None = None
    max_decoded_gb: float = 4.0
    fill: float | None = None


class Picture:
    """One image with its extra channels at one scale; a context manager.

    Attributes:
        slide: the image file itself, level 0. sources: what is read, one for each file.
        height, width: pixels of the grid that is predicted. scale: level-0 pixels for each of them.
        notes: what a user should know about how this image is read. seen: moments of what was read so far.
    """

    def __init__(self, pair: Pair, configs: Sequence[ModelConfig], options: ReadOptions) -> None:
        self.pair, self.configs, self.notes, self.seen = pair, list(configs), list[str](), Moments()
        with ExitStack() as stack:
            slides = [
                stack.enter_context(open_slide(path, max_decoded_gb=options.max_decoded_gb)) for path in pair.layers
            ]
            self.slide = slides[0]
            self.sources = self._open_sources(slides, options)
            self._check_sizes(pair)
            self._files = stack.pop_all()
        self.height, self.width, self.scale = self.sources[0].height, self.sources[0].width, self.sources[0].scale
        geometry = self.configs[0].geometry
        if geometry.kind == "resize" and max(self.height, self.width) > MUCH_SMALLER * max(geometry.size):
            self.notes.append(
                f"the network sees the whole {self.height}x{self.width} resized to {geometry.size[0]}x"
                f"{geometry.size[1]}; networks for images this large are trained with --crops"
            )

    def __enter__(self) -> "Picture":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def _open_sources(self, slides: Sequence[Slide], options: ReadOptions) -> list[Source]:
        config = self.configs[0]
        scale = self._scale(config.geometry, options)
        if self.slide.dtype.name != config.dtype:
            self.notes.append(f"its pixels are {self.slide.dtype}, the network was trained on {config.dtype}")
        if config.preprocess:
            if scale:
                raise ImageError(
                    f"{self.slide.path}: the network was trained with --preprocess {' '.join(config.preprocess)}, "
                    f"which needs the whole image at its own scale, and {_spell(scale)} was given; leave it out"
                )
            image, valid = load_image(self.pair, config.channels, config.preprocess)
            return [Whole(image, valid)]
        fill = config.mean if options.fill is None else [options.fill] * len(config.channels)
        sources: list[Source] = []
        for number, slide in enumerate(slides):
            base = len(config.channels) - len(slides) + 1
            own = fill[:base] if number == 0 else fill[base + number - 1 : base + number]
            if options.fill is None and slide.dtype.kind == "u":  # the mean of other pixels may not fit these
                own = np.clip(own, 0, np.iinfo(slide.dtype).max).tolist()
            expected = base if number == 0 else 1
            if slide.channels != expected and (number == 0 or slide.channels < 3):
                raise ImageError(
                    f"{slide.path} has {slide.channels} channels, the network takes {expected} "
                    f"({' '.join(config.channels)}); convert the image, or use a checkpoint trained on such images"
                )
            sources.append(slide.grid(**scale, fill=own if slide.channels == expected else own[0]))
        return sources

    def _scale(self, geometry: Geometry, options: ReadOptions) -> dict[str, Any]:
        """The scale asked for, else the one that training used; and what is to be said about it."""
        asked = {name: getattr(options, name) for name in ("reduce", "level", "mpp")}
        given = {name: value for name, value in asked.items() if value is not None}
        trained: dict[str, Any] = {}
        if geometry.mpp and self.slide.mpp:
            trained = self._nearest_scale(geometry.mpp, self.slide.mpp, given)
        elif geometry.reduction != 1:
            trained = {"reduce": geometry.reduction}
        if geometry.mpp and self.slide.mpp and given:
            mpp = self.slide.grid(**given).mpp or geometry.mpp
            if max(mpp, geometry.mpp) / min(mpp, geometry.mpp) > SCALE_DRIFT:
                self.notes.append(f"read at {mpp:.3g} um per pixel, the network was trained at {geometry.mpp:.3g}")
        elif geometry.mpp and not given:
            if not self.slide.mpp:
                self.notes.append(
                    f"the network was trained at {geometry.mpp:.3g} um per pixel, the file does not say what its "
                    f"pixels measure: read with {_spell(trained) if trained else 'its own pixels'}"
                )
        return given or trained

    def _nearest_scale(self, wanted: float, own: float, given: dict[str, Any]) -> dict[str, Any]:
        """How a slide of `own` micrometres per pixel is read for a network that was trained at `wanted`.

        Raises:
            ImageError: the slide is too coarse for this network, and no scale was given.
        """
        if own <= wanted:
            return {"mpp": wanted}
        if own / wanted > SCALE_DRIFT and not given:
            raise ImageError(
                f"{self.slide.path} has {own:.4g} um per pixel, the network was trained at {wanted:.4g}; expected a "
                "slide as fine as that: use a network trained on coarser pixels, or give --reduce 1 to try it as it is"
            )
        return {"reduce": 1.0}  # scanners differ a little: 0.2527 is what others call 0.25

    def _check_sizes(self, pair: Pair) -> None:
        first = self.sources[0]
        for source, path in zip(self.sources[1:], pair.extras, strict=False):
            if (source.height, source.width) != (first.height, first.width):
                raise ImageError(
                    f"{path} is {source.height}x{source.width}, its image {pair.image} is "
                    f"{first.height}x{first.width}; sizes must agree"
                )

    def pixels(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """A window (height, width, C) in raw units, channels in network order; it counts in `seen`."""
        window = self._window(top, left, height, width)
        self.seen.add(window)
        return window

    def _window(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        layers = [source.read(top, left, height, width) for source in self.sources]
        if len(layers) == 1:
            return layers[0]
        kind = layers[0].dtype if len({layer.dtype for layer in layers}) == 1 else np.dtype(np.float32)
        extras = [self._one_channel(layer, path) for layer, path in zip(layers[1:], self.pair.extras, strict=True)]
        return np.concatenate([layer.astype(kind, copy=False) for layer in (layers[0], *extras)], axis=2)

    @staticmethod
    def _one_channel(layer: np.ndarray, path: Path) -> np.ndarray:
        if layer.shape[2] > 1 and (layer != layer[:, :, :1]).any():
            raise ImageError(f"{path} has {layer.shape[2]} channels that differ; expected one: save it as a grey image")
        return layer[:, :, :1]

    def read(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """A window as the networks' numbers: (C, height, width) float32; for M networks (M * C, height, width)."""
        pixels = self.pixels(top, left, height, width)
        parts = [normalise(pixels, config.mean, config.std) for config in self.configs]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def valid(self, top: int, height: int, left: int = 0, width: int | None = None) -> np.ndarray | None:
        """Where rows, or some columns of them, hold data in every layer: (height, width) bool; None: everywhere."""
        result = None
        for source in self.sources:
            result = both_hold(result, source.valid(top, left, height, self.width if width is None else width))
        return result

    @property
    def findings(self) -> list[str]:
        """What is unlike the training in the pixels read so far; nothing of another type, which is in the notes."""
        config = self.configs[0]
        return [] if self.slide.dtype.name != config.dtype else self.seen.findings(config)

    @property
    def damage(self) -> list[str]:
        """What could not be decoded so far."""
        return [message for source in self.sources for message in getattr(source, "damage", [])]


def _spell(scale: dict[str, Any]) -> str:
    return " ".join(f"--{name} {value:g}" for name, value in scale.items())


@dataclass(frozen=True)
class TileOptions:
    """How an image is cut: see tiling.predict_bands. tissue: a rule of tissue.RULES, or empty for none."""

    tile: int
    overlap: int
    halo: int
    window: str = "hann"
    tta: str = "none"
    batch: int = 1
    tissue: str = ""
    ahead: int = 2

    @classmethod
    def from_config(cls, config: ModelConfig) -> "TileOptions":
        """The way of a checkpoint, without tissue."""
        geometry = config.geometry
        tile = geometry.tile or max(geometry.size)  # of networks that see whole images nothing is cut
        return cls(tile, geometry.overlap, geometry.halo, geometry.window, geometry.tta, batch=config.tile_batch)


def geometry_from_flags(configs: Sequence[ModelConfig], flags: Any) -> tuple[Geometry, list[str]]:
    """How pixels meet the network: the checkpoint's way, and what the flags of cli.add_tile_args change about it.

    Another tile brings an overlap of a quarter and a halo of a sixteenth with it, unless these are given too.

    Returns:
        The geometry, and what is to be said about it.

    Raises:
        UsageError: tile, overlap and halo do not go together, or they are meant for another kind of network.
    """
    geometry = configs[0].geometry
    stride, min_side = common_sides(configs)
    side = round_up(max(flags.tile_size or geometry.tile, min_side), stride)
    if geometry.kind == "resize":
        for name in ("overlap", "halo", "blend", "tta"):
            if getattr(flags, name) is not None:
                raise UsageError(f"--{name} is for networks trained on crops; this one sees whole images resized")
        if not flags.tile_size:
            return geometry, _assumptions(configs[0])
        stated = configs[0].with_size((side, side))
        if (side, side) == geometry.size or stated.assumed != configs[0].assumed:
            return stated.geometry, _assumptions(stated)
        note = f"the network was trained on images resized to {geometry.size}, now {(side, side)}"
        return stated.geometry, [note, *_assumptions(stated)]
    changed = side != geometry.tile
    overlap = side // 4 if changed else geometry.overlap
    if flags.overlap is not None:
        overlap = round(flags.overlap * side) if flags.overlap < 1 else int(flags.overlap)
    halo = min(side // 16 if changed else geometry.halo, overlap // 2) if flags.halo is None else flags.halo
    window, tta = flags.blend or geometry.window, flags.tta or geometry.tta
    try:
        plan_axis(side, tile=side, overlap=overlap, halo=halo, stride=stride, min_side=min_side, window=window)
    except ValueError as error:
        raise UsageError(f"--tile-size, --overlap and --halo do not go together: {error}") from error
    notes = [f"the tile was {geometry.tile} in the evaluation of training, now {side}"] if changed else []
    return replace(geometry, tile=side, overlap=overlap, halo=halo, window=window, tta=tta), notes


@dataclass(frozen=True)
class Plan:
    """Which tiles of a picture are predicted, and how large the result is."""

    rows: Axis
    cols: Axis
    keep: np.ndarray | None
    tissue: Tissue | None
    height: int  # of the result: of the grid, or of level 0 with full_size
    width: int
    full_size: bool = False

    @property
    def tiles(self) -> int:
        """How many tiles are predicted."""
        return len(self.rows.origins) * len(self.cols.origins) if self.keep is None else int(self.keep.sum())


def _assumptions(config: ModelConfig) -> list[str]:
    return [f"the network comes from {text}" for text in config.assumptions]


def common_sides(configs: Sequence[ModelConfig]) -> tuple[int, int]:
    """Stride and smallest side that suit all networks of an ensemble."""
    stride = math.lcm(*(config.stride for config in configs))
    return stride, max(config.min_side for config in configs)


def plan_picture(picture: Picture, options: TileOptions, *, full_size: bool = False) -> Plan:
    """Lay the tiles over a picture, and look for tissue where that is asked for."""
    stride, min_side = common_sides(picture.configs)
    rows, cols = (
        plan_axis(
            size,
            tile=options.tile,
            overlap=options.overlap,
            halo=options.halo,
            stride=stride,
            min_side=min_side,
            window=options.window,
        )
        for size in (picture.height, picture.width)
    )
    tissue = keep = None
    if options.tissue:
        tissue = find_tissue(picture.slide, picture.sources[0], options.tissue)  # type: ignore[arg-type]
        keep = tissue.tiles(rows, cols)
    size = (picture.slide.height, picture.slide.width) if full_size else (picture.height, picture.width)
    return Plan(rows, cols, keep, tissue, *size, full_size)


def predict_picture(
    picture: Picture,
    forward: Forward,
    plan: Plan,
    options: TileOptions,
    *,
    first_row: int = 0,
    count: Callable[[int], None] | None = None,
) -> Bands:
    """Predict a picture from a row of the result on.

    Reading, the network and the caller work at the same time: each in a thread of its own. Close it before the picture.

    Args:
        count: called with the number of pixels of the grid that were finished.

    Yields:
        (first row, probabilities (K, h, plan.width) float32), background where there is no data or no tissue. The
        array is overwritten once the next one is asked for.
    """
    config = picture.configs[0]
    same_size = not plan.full_size or picture.scale == 1
    begin = first_row
    if not same_size:
        begin = min(max(0, math.floor(_centres(np.array(first_row), picture.scale))), picture.height - 1)
    bands = _counted(_cleared(_native_bands(picture, forward, plan, options, begin), picture, plan.tissue), count)
    if not same_size:
        bands = enlarge_bands(
            bands, (picture.height, picture.width), (plan.height, plan.width), picture.scale, first_row
        )
    if config.geometry.kind == "resize" or plan.tiles <= options.batch:  # nothing to do beside the only batch
        return bands
    return run_ahead(bands, 1)


def _native_bands(
    picture: Picture, forward: Forward, plan: Plan, options: TileOptions, first_row: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Bands (first row, (K, h, W) float32) of the grid; see predict_bands for how long they hold."""
    config = picture.configs[0]
    if config.geometry.kind == "resize":
        yield first_row, _predict_resized(picture, forward)[:, first_row:]
        return
    yield from predict_bands(
        picture.read,
        forward,
        plan.rows,
        plan.cols,
        batch_size=options.batch,
        tta=options.tta,
        keep=plan.keep,
        channels=config.num_logits,
        first_row=first_row,
        ahead=options.ahead if plan.tiles > options.batch else 0,
        buffers=2,  # one is made while the caller has the other
    )


def _predict_resized(picture: Picture, forward: Forward) -> np.ndarray:
    """Probabilities (K, H, W) of a network that sees every image resized to one size."""
    pixels = resize_image(picture.pixels(0, 0, picture.height, picture.width), picture.configs[0].geometry.size)
    parts = [normalise(pixels, config.mean, config.std) for config in picture.configs]
    probs = forward(np.concatenate(parts)[None])[0]
    if not np.isfinite(probs).all():
        raise ValueError(f"{picture.slide.path}: the network's probabilities are not finite")
    return np.ascontiguousarray(
        resize_image(probs.transpose(1, 2, 0), (picture.height, picture.width)).transpose(2, 0, 1)
    )


def _cleared(
    bands: Iterator[tuple[int, np.ndarray]], picture: Picture, tissue: Tissue | None
) -> Iterator[tuple[int, np.ndarray]]:
    """Make background of what holds no data or no tissue."""
    has_background = 0 not in picture.configs[0].labels
    for top, band in bands:
        region = picture.valid(top, band.shape[1]) if tissue is None else _tissue_with_data(picture, tissue, top, band)
        if region is not None:
            clear_outside(band, region, has_background=has_background)
        yield top, band


def _tissue_with_data(picture: Picture, tissue: Tissue, top: int, band: np.ndarray) -> np.ndarray:
    """Where a band has tissue and data, (h, W) bool; what has no tissue is not decoded to know that."""
    inside = tissue.rows(top, band.shape[1]).astype(bool)
    for left in range(0, inside.shape[1], ASKED_COLUMNS):
        part = inside[:, left : left + ASKED_COLUMNS]
        valid = picture.valid(top, part.shape[0], left, part.shape[1]) if part.any() else None
        if valid is not None:
            part &= valid
    return inside


def _counted(bands: Iterator[tuple[int, np.ndarray]], count: Callable[[int], None] | None) -> Bands:
    for top, band in bands:
        yield top, band
        if count:
            count(band.shape[1] * band.shape[2])


def _centres(places: np.ndarray, scale: float) -> np.ndarray:
    """Where the centres of pixels of level 0 lie among those of pixels `scale` times as large."""
    return (places + 0.5) / scale - 0.5


def enlarge_bands(
    bands: Iterator[tuple[int, np.ndarray]],
    present: tuple[int, int],
    wanted: tuple[int, int],
    scale: float,
    first_row: int = 0,
) -> Bands:
    """Enlarge bands of probabilities linearly; the result does not hang on where the bands part.

    Args:
        bands: (top, (K, h, w) float32) of a picture of size `present`, from the row on that `first_row` needs.
        present: (height, width) that comes in.
        wanted: (height, width) that goes out, at least as large.
        scale: pixels that go out for each that comes in, along either side.
        first_row: first row wanted of the enlarged picture.

    Yields:
        (top, (K, h, wanted width) float32), at most UPSCALED_ROWS rows at a time.
    """
    columns = np.clip(_centres(np.arange(wanted[1]), scale), 0, present[1] - 1)
    left = np.minimum(columns.astype(np.int64), max(present[1] - 2, 0))
    right, part = np.minimum(left + 1, present[1] - 1), (columns - left).astype(np.float32)
    held: np.ndarray | None = None  # rows of the small picture that are still needed
    begin, row = 0, first_row
    for top, band in bands:
        if held is None:
            held, begin = band, top
        else:
            held = np.concatenate([held, band], axis=1)
        known = begin + held.shape[1]
        while row < wanted[0]:
            last = min(row + UPSCALED_ROWS, wanted[0])
            places = np.clip(_centres(np.arange(row, last), scale), 0, present[0] - 1)
            upper = np.minimum(places.astype(np.int64), max(present[0] - 2, 0))
            lower = np.minimum(upper + 1, present[0] - 1)
            if lower[-1] >= known:
                break
            weight = (places - upper).astype(np.float32)[:, None]
            rows = held[:, upper - begin] * (1 - weight) + held[:, lower - begin] * weight
            yield row, rows[:, :, left] * (1 - part) + rows[:, :, right] * part
            row = last
        if row < wanted[0]:
            needed = max(math.floor(_centres(np.array(row), scale)), 0)
            drop = min(max(needed - begin, 0), max(held.shape[1] - 1, 0))
            held, begin = held[:, drop:].copy(), begin + drop


def thumbnail(slide: Slide, height: int, width: int, step: int) -> np.ndarray:
    """A slide with one pixel for every step x step pixels of a raster (height, width) that covers it: (h, w, C)."""
    size = -(-height // step), -(-width // step)
    grid = slide.grid(reduce=max(1.0, min(slide.height / size[0], slide.width / size[1])))
    return resize_image(grid.read(0, 0, grid.height, grid.width), size)


def memory_needed(picture: Picture, plan: Plan, options: TileOptions) -> int:
    """Bytes that strips, bands and decoded pixels of a picture take, on top of the network's own."""
    classes = picture.configs[0].num_logits
    if picture.configs[0].geometry.kind == "resize":
        return picture.height * picture.width * 4 * (classes + len(picture.configs[0].channels))
    strip = plan.rows.tile * plan.cols.frame * classes * 4
    band = strip * max(1, round(plan.width * plan.height / picture.width / picture.height))
    decoded = (2 * plan.rows.tile + 1024) * picture.width * picture.slide.channels * picture.slide.dtype.itemsize
    batches = 4 * options.batch * plan.rows.tile * plan.cols.tile * 4 * len(picture.configs[0].channels)
    return round(1.5 * strip) + 3 * band + decoded + batches


def tile_seconds(configs: Sequence[ModelConfig], options: TileOptions, forward: Forward) -> float:
    """Seconds that one tile takes, measured on random pixels after a warm-up."""
    config = configs[0]
    size = config.geometry.size if config.geometry.kind == "resize" else (options.tile, options.tile)
    channels = len(config.channels) * len(configs)
    batch = np.random.default_rng(0).normal(size=(options.batch, channels, *size)).astype(np.float32)
    forward(batch)
    begin = time.perf_counter()
    for _ in range(2):
        forward(batch)
    return (time.perf_counter() - begin) / 2 / options.batch * len(TTA[options.tta])


def mean_of(forwards: Sequence[Forward], channels: int) -> Forward:
    """The mean of what several networks say; each takes its own part of the batch's channels, see Picture.read."""
    if len(forwards) == 1:
        return forwards[0]

    def forward(batch: np.ndarray) -> np.ndarray:
        parts = [np.ascontiguousarray(batch[:, k * channels : (k + 1) * channels]) for k in range(len(forwards))]
        total = forwards[0](parts[0]).copy()
        for member, part in zip(forwards[1:], parts[1:], strict=True):
            total += member(part)
        return total / np.float32(len(forwards))

    return forward
