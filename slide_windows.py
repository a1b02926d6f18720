"""Slides as training and scoring see them: windows of pixels and of class indices at one scale, read on the fly.

A slide is a pair whose image is a slide file (SLIDE_SUFFIXES) or a TIFF of more than SLIDE_PIXELS, or whose mask is
drawn (GeoJSON) or run-length encoded; under --mpp or --reduce every pair is one. Others are decoded whole. Tissue is
looked for in slides that are such by their image alone, so that predict.py, which sees no masks, does the same.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint import ModelConfig
from classes import ClassMap
from image_headers import ImageError
from image_io import IGNORE_INDEX
from pairing import SLIDE_SUFFIXES, Pair
from slide_io import Grid, Slide, open_slide
from slide_masks import MaskSource, Raster, is_annotation, open_mask
from tiff_io import main_pages, open_tiff
from tiling import reflect_index

SLIDE_PIXELS = 100_000_000  # of a TIFF; smaller ones are decoded whole
BAND_ROWS = 256  # rows of a slide's mask that are looked at together
KEPT_BYTES = 24 << 20  # of decoded tiles of a slide
SCALE_DRIFT = 1.3  # pixels up to so many times as large as those asked for are taken as they are


@dataclass(frozen=True)
class SlideOptions:
    """How slides are read: at `mpp` micrometres per pixel, or reduced; where windows are taken.

    mpp: 0 is the slide's own. tissue: a rule of tissue.RULES, or "none" for the whole slide.
    """

    mpp: float = 0.0
    reduction: float = 1.0
    tissue: str = "none"

    @classmethod
    def from_config(cls, config: ModelConfig) -> "SlideOptions":
        """The way that a network was trained."""
        return cls(config.geometry.mpp, config.geometry.reduction, config.tissue)

    @property
    def rescales(self) -> bool:
        """Whether images are read at another scale than their own."""
        return bool(self.mpp) or self.reduction != 1

    def text(self) -> str:
        """For messages and keys of caches."""
        scale = f"{self.mpp:g} um per pixel" if self.mpp else f"reduced by {self.reduction:g}"
        return f"{scale}, tissue {self.tissue}"


AS_STORED = SlideOptions()


def is_slide(pair: Pair, options: SlideOptions) -> bool:
    """Whether a pair is read by windows; see the top of this module."""
    return is_annotation(pair.mask) or is_annotation(pair.roi) or is_slide_image(pair.image, options)


def is_slide_image(path: Path, options: SlideOptions) -> bool:
    """Whether an image is read by windows whatever its mask."""
    return options.rescales or path.suffix.lower() in SLIDE_SUFFIXES or _tiff_pixels(path) > SLIDE_PIXELS


def _tiff_pixels(path: Path) -> int:
    """Pixels of a TIFF, from its header; 0 for other files and those that cannot be read, which are named later."""
    if path.suffix.lower() not in (".tif", ".tiff"):
        return 0
    try:
        with open_tiff(path) as tif:
            page = main_pages(tif, path)[0]
            return int(page.imagelength * page.imagewidth)
    except (ImageError, OSError):
        return 0


class SlidePair:
    """A slide with its extra channels, mask and region of interest, open at one scale; a context manager.

    height, width: pixels of the grid that windows are cut from. scale: level-0 pixels for each of them. options: how
    it is read, without a tissue rule where its image alone makes no slide.
    """

    def __init__(self, pair: Pair, options: SlideOptions, fill: Sequence[float] = ()) -> None:
        """Open the files.

        Args:
            fill: value of pixels that cannot be decoded, one for each channel of all layers; none: 0.

        Raises:
            ImageError: a file cannot be used, sizes do not agree, or the scale cannot be had.
        """
        self.pair = pair
        self.options = options if is_slide_image(pair.image, options) else replace(options, tissue="none")
        with ExitStack() as stack:
            slides = [stack.enter_context(open_slide(path)) for path in pair.layers]
            self.slide, self.grids = slides[0], list[Grid]()
            for place, slide in enumerate(slides):
                grid = slide.grid(**_scale(slide, options), fill=_own_fill(slides, place, fill))
                grid.keep(KEPT_BYTES)
                self.grids.append(grid)
            first = self.grids[0]
            self.height, self.width, self.scale = first.height, first.width, first.scale
            for path, grid in zip(pair.extras, self.grids[1:], strict=True):
                if (grid.height, grid.width) != (self.height, self.width):
                    raise ImageError(
                        f"{path} is {grid.height}x{grid.width}, its slide {pair.image} is {self.height}x{self.width} "
                        "at this scale; sizes must agree"
                    )
            raster = Raster(self.height, self.width, self.scale)
            self.mask, self.roi = (
                None if path is None else open_mask(path, pair.name, self.slide, raster)
                for path in (pair.mask, pair.roi)
            )
            for source in (self.mask, self.roi):
                if source is not None:
                    stack.callback(source.close)
            self._has_nodata = any(slide.nodata is not None for slide in slides)
            self._files = stack.pop_all()

    def __enter__(self) -> "SlidePair":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        self._files.close()

    @property
    def damage(self) -> list[str]:
        """What could not be decoded so far."""
        return [message for grid in self.grids for message in grid.damage]

    def pixels(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """A window (height, width, C) in raw units, channels in network order."""
        layers = [self.grids[0].read(top, left, height, width)]
        for path, grid in zip(self.pair.extras, self.grids[1:], strict=True):
            layer = grid.read(top, left, height, width)
            if layer.shape[2] > 1 and (layer != layer[:, :, :1]).any():
                raise ImageError(f"{path} has {layer.shape[2]} channels that differ; expected one: save it as grey")
            layers.append(layer[:, :, :1])
        if len(layers) == 1:
            return layers[0]
        kind = layers[0].dtype if len({layer.dtype for layer in layers}) == 1 else np.dtype(np.float32)
        return np.concatenate([layer.astype(kind, copy=False) for layer in layers], axis=2)

    def outside(self, top: int, left: int, height: int, width: int, *, decoded: bool = False) -> np.ndarray | None:
        """Where a window does not count: outside the region of interest, or without data. None: nowhere.

        Args:
            decoded: the pixels were read just now, so tiles that turned out damaged do not count either.
        """
        result = None if self.roi is None else self.roi.read(top, left, height, width) == 0
        for grid in self.grids if decoded or self._has_nodata else ():
            known = grid.valid(top, left, height, width)
            if known is not None:
                result = ~known if result is None else result | ~known
        return result

    def labels(self, classes: ClassMap, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Class indices (height, width) uint8 of a window, wherever it counts or not."""
        assert self.mask is not None and self.pair.mask is not None, f"{self.pair.image} has no mask"
        return encode_values(self.mask, self.mask.read(top, left, height, width), classes, self.pair)

    def bands(self) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
        """The mask from top to bottom: first row, values (h, W) as the mask has them, where they do not count."""
        assert self.mask is not None
        for top in range(0, self.height, BAND_ROWS):
            window = top, 0, min(BAND_ROWS, self.height - top), self.width
            yield top, self.mask.read(*window), self.outside(*window)

    def window(
        self, classes: ClassMap, corner: tuple[int, int], size: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """A window as dataset.cut_window cuts it from a whole image: pixels (h, w, C) and class indices (h, w) uint8.

        Outside the slide pixels are reflected and the mask is 255, as it is where pixels do not count.
        """
        rows, columns = (np.arange(first, first + length) for first, length in zip(corner, size, strict=True))
        from_rows, from_columns = _reflected(rows, self.height), _reflected(columns, self.width)
        box = (*_span(from_rows), *_span(from_columns))
        inner = box[0], box[2], box[1], box[3]
        image = self.pixels(*inner)
        mask = self.labels(classes, *inner)
        outside = self.outside(*inner, decoded=True)
        if outside is not None:
            mask[outside] = IGNORE_INDEX
        if from_rows is rows and from_columns is columns:
            return image, mask
        places = np.ix_(from_rows - box[0], from_columns - box[2])
        image, mask = image[places], mask[places]
        mask[(rows < 0) | (rows >= self.height)] = IGNORE_INDEX
        mask[:, (columns < 0) | (columns >= self.width)] = IGNORE_INDEX
        return image, mask


def _scale(slide: Slide, options: SlideOptions) -> dict[str, Any]:
    if options.mpp:
        if slide.mpp is None:
            raise ImageError(
                f"{slide.path} does not say how many micrometres a pixel is; expected that under --mpp "
                f"{options.mpp:g}: give the scale as --reduce instead, or leave the file out"
            )
        if options.mpp < slide.mpp <= SCALE_DRIFT * options.mpp:
            return {"reduce": 1.0}  # scanners differ a little: 0.2527 is what others call 0.25
        return {"mpp": options.mpp}
    return {"reduce": options.reduction} if options.reduction != 1 else {}


def _own_fill(slides: Sequence[Slide], place: int, fill: Sequence[float]) -> Sequence[float] | float:
    """The part of the fill that belongs to one layer; 0 where it does not fit the file."""
    start = slides[0].channels + place - 1
    own = fill[: slides[0].channels] if place == 0 else fill[start : start + 1]
    return own if len(own) in (1, slides[place].channels) else 0.0


def _reflected(places: np.ndarray, length: int) -> np.ndarray:
    if places[0] >= 0 and places[-1] < length:
        return places
    distance = np.abs(places)
    return reflect_index(length, int(distance.max()) + 1)[distance]


def _span(places: np.ndarray) -> tuple[int, int]:
    first = int(places.min())
    return first, int(places.max()) + 1 - first


def encode_values(source: MaskSource, values: np.ndarray, classes: ClassMap, pair: Pair) -> np.ndarray:
    """Values of a mask as class indices uint8; of annotations by the names of their classes.

    Raises:
        DatasetError: a value or a name that no class takes.
    """
    assert pair.mask is not None
    if source.names is not None:
        table = classes.annotations.values(source.names, pair.mask)
        named = np.array([0, *(table[name] for name in source.names)], np.int64)
        return classes.indices(named)[values]
    return classes.encode(values, pair.mask)
