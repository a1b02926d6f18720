"""Cut aligned rasters of one scene (image, infrared, mask, ...) into tiles, a folder for each raster.

Examples:
    python -m dataset_utils.split_tiles -i images=rgb.tif nir=nir.tif gt=water.tif -o data/water/train --size 256
    python -m dataset_utils.split_tiles -i images=rgb.tif gt=water.tif -o tiles --shift 128 --min-label gt:64=5898

Tiles of one place share a name, so the folders pair by stem as training wants them. Nothing is lost at the right and
bottom: the last tile is moved in, and a scene that is smaller than a tile gives one tile of its own size. Pixels keep
their type and their place on the map. Rasters are read by windows.
"""

import argparse
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

import cli
from dataset_utils.tile_cutting import plan_origins
from image_io import ImageError, atomic_write, file_stem
from pairing import DatasetError
from slide_io import Georeference, Grid, Slide, open_slide

NODATA_TAG = 42113


@dataclass(frozen=True)
class KeepRule:
    """Keep a tile when more than `count` pixels of the raster `name` hold `label`."""

    name: str
    label: int
    count: int


@dataclass(frozen=True)
class Raster:
    """One of the aligned rasters, open for reading."""

    name: str
    slide: Slide
    grid: Grid
    other: Grid  # the same pixels with another value where they cannot be decoded

    def read(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """The pixels of a window, (height, width, C).

        Raises:
            ImageError: a part of it cannot be decoded.
        """
        window = top, left, height, width
        pixels, valid = self.grid.read(*window), self.grid.valid(*window)
        if valid is None:
            return pixels
        if self.grid.damage and not np.array_equal(pixels, self.other.read(*window)):
            raise ImageError("\n".join(self.grid.damage))
        if self.slide.nodata is not None:
            pixels[~valid] = self.slide.nodata  # readers give 0 there
        return pixels


def build_parser() -> argparse.ArgumentParser:
    """Flags of dataset_utils.split_tiles."""
    parser = cli.make_parser("Cut aligned rasters of one scene into tiles, a folder for each raster.")
    parser.add_argument(
        "-i",
        "--rasters",
        nargs="+",
        required=True,
        type=_named_path,
        metavar="NAME=PATH",
        help="rasters of one size and the folder of each, such as images=rgb.tif gt=water.tif",
    )
    group = parser.add_argument_group("tiles")
    group.add_argument("-o", "--output-dir", type=Path, required=True, metavar="DIR", help="folder of the folders")
    group.add_argument("--size", type=cli.positive_int, default=256, metavar="S", help="side of a tile in pixels")
    group.add_argument(
        "--shift",
        type=cli.positive_int,
        metavar="N",
        help="from tile to tile, less than the size overlaps; default: size",
    )
    group.add_argument("--name", metavar="TEXT", help="begin of the file names; default: stem of the first raster")
    group.add_argument(
        "--names",
        choices=("numbers", "coordinates"),
        default="numbers",
        help="<name>_<n>.tif with n from 1 along the rows, or <name>_x<x>_y<y>.tif",
    )
    group.add_argument(
        "--min-label",
        type=_keep_rule,
        metavar="NAME:LABEL=COUNT",
        help="keep tiles where more than COUNT pixels of a raster hold the label; without NAME: of the last raster",
    )
    group.add_argument(
        "--max-decoded-gb",
        type=cli.positive_float,
        default=4.0,
        metavar="GB",
        help="largest image that is decoded whole, for formats that cannot be read by windows",
    )
    cli.add_switch(group, "--overwrite", help="replace tiles that are there, such as those of a run that was cut off")
    return parser


def _named_path(text: str) -> str:
    """Argparse type: NAME=PATH, kept as text."""
    name, mark, path = text.partition("=")
    if not (mark and path) or not re.fullmatch(r"[\w-]+", name):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a folder's name and a file, such as gt=water.tif")
    return text


def _keep_rule(text: str) -> str:
    """Argparse type: LABEL=COUNT or NAME:LABEL=COUNT, kept as text."""
    if not re.fullmatch(r"([\w-]+:)?\d+=\d+", text):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected a label and a number of pixels, such as 64=100 or gt:64=100"
        )
    return text


def main(argv: Sequence[str] | None = None) -> None:
    """Cut what the flags say."""
    parser = build_parser()
    args = cli.parse(parser, argv)
    with cli.plain_errors(parser, interrupted="--overwrite cuts the tiles anew"):
        failures = run(args)
    cli.exit_with_findings(parser, failures)


def run(args: argparse.Namespace) -> list[str]:
    """Cut all tiles; return what went wrong."""
    paths = {name: Path(path) for name, _, path in (word.partition("=") for word in args.rasters)}
    if len(paths) < len(args.rasters):
        raise cli.UsageError(f"{' '.join(args.rasters)}: two rasters of one name; expected a folder for each")
    rule = keep_rule(args.min_label, list(paths))
    with ExitStack() as stack:
        rasters = [open_raster(name, path, stack, args.max_decoded_gb) for name, path in paths.items()]
        check_sizes(rasters)
        check_rule(rule, rasters)
        stem = args.name or file_stem(rasters[0].slide.path)
        return cut(args, rasters, rule, stem)


def keep_rule(text: str | None, names: Sequence[str]) -> KeepRule | None:
    """The flag --min-label as a rule.

    Raises:
        cli.UsageError: it names no raster.
    """
    if text is None:
        return None
    name, label, count = re.fullmatch(r"(?:([\w-]+):)?(\d+)=(\d+)", text).groups()  # type: ignore[union-attr]
    if name is not None and name not in names:
        raise cli.UsageError(f"--min-label {text}: there is no raster {name!r}; expected one of {', '.join(names)}")
    return KeepRule(name or names[-1], int(label), int(count))


def open_raster(name: str, path: Path, stack: ExitStack, max_decoded_gb: float) -> Raster:
    """Open a raster for as long as the stack lasts.

    Raises:
        ImageError: not an image; OSError: it cannot be read.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected the raster of {name}")
    slide = stack.enter_context(open_slide(path, max_decoded_gb=max_decoded_gb))
    return Raster(name, slide, slide.grid(), slide.grid(fill=1.0))


def check_sizes(rasters: Sequence[Raster]) -> None:
    """Refuse rasters that cannot lie on each other.

    Raises:
        DatasetError: sizes differ.
    """
    if len({(raster.grid.height, raster.grid.width) for raster in rasters}) > 1:
        listed = "; ".join(f"{each.name} {each.slide.path}: {each.grid.height}x{each.grid.width}" for each in rasters)
        raise DatasetError(f"the rasters differ in size: {listed}; expected one size: resample them to one grid first")


def check_rule(rule: KeepRule | None, rasters: Sequence[Raster]) -> None:
    """Refuse to count labels in a picture.

    Raises:
        DatasetError: the raster of the rule has several channels.
    """
    for raster in rasters:
        if rule and raster.name == rule.name and raster.grid.channels != 1:
            raise DatasetError(
                f"--min-label counts labels in {raster.slide.path}, which has {raster.grid.channels} channels; "
                "expected a mask of one channel: name it, as in gt:64=100"
            )


def cut(args: argparse.Namespace, rasters: Sequence[Raster], rule: KeepRule | None, stem: str) -> list[str]:
    """Write the tiles that are kept; return what could not be decoded."""
    from tqdm import tqdm

    height, width = rasters[0].grid.height, rasters[0].grid.width
    rows = plan_origins(height, args.size, args.shift or args.size)
    columns = plan_origins(width, args.size, args.shift or args.size)
    places = [(top, left) for top in rows for left in columns]
    targets = [
        [args.output_dir / raster.name / f"{tile_name(stem, args.names, number, place)}.tif" for raster in rasters]
        for number, place in enumerate(places, 1)
    ]
    there = [path for paths in targets for path in paths if path.exists()]
    if there and not args.overwrite:
        raise FileExistsError(
            f"{len(there)} tiles are there, first: {there[0]}; expected none: give another folder or --name, or "
            "--overwrite to replace them"
        )
    failures: list[str] = []
    kept = 0
    for place, paths in tqdm(list(zip(places, targets, strict=True)), "tiles", leave=False, disable=None, unit="tile"):
        window = (*place, min(args.size, height), min(args.size, width))
        try:
            tiles = [raster.read(*window) for raster in rasters]
        except ImageError as error:
            failures += [f"left out the tile {paths[0].stem}: {line}" for line in str(error).splitlines()[-1:]]
            continue
        if rule is None or is_kept(rule, rasters, tiles):
            kept += 1
            for raster, path, pixels in zip(rasters, paths, tiles, strict=True):
                write_tile(path, pixels, raster.slide, place)
        elif args.overwrite:
            for path in paths:
                path.unlink(missing_ok=True)
    dropped = len(places) - kept - len(failures)
    print(
        f"{len(places)} tiles of {args.size}: {kept} written, {dropped} without enough of the label, "
        f"{len(failures)} unreadable; in {args.output_dir}"
    )
    return failures


def tile_name(stem: str, names: str, number: int, place: tuple[int, int]) -> str:
    """Stem of a tile's files."""
    return f"{stem}_{number}" if names == "numbers" else f"{stem}_x{place[1]}_y{place[0]}"


def is_kept(rule: KeepRule, rasters: Sequence[Raster], tiles: Sequence[np.ndarray]) -> bool:
    """Whether a place has enough of the label."""
    mask = next(tile for raster, tile in zip(rasters, tiles, strict=True) if raster.name == rule.name)
    return int(np.count_nonzero(mask == rule.label)) > rule.count


def write_tile(path: Path, pixels: np.ndarray, slide: Slide, place: tuple[int, int]) -> None:
    """Write (h, w, C) pixels of a raster that were read at (row, column) as a compressed TIFF, atomically."""
    channels = pixels.shape[2]
    colours = 3 if channels >= 3 else 1
    tags: list[Any] = moved_tags(slide.geo, *place) if slide.geo else []
    if slide.nodata is not None:
        text = f"{slide.nodata:.17g}"
        tags.append((NODATA_TAG, 2, len(text) + 1, text, True))
    with atomic_write(path) as handle:
        tifffile.imwrite(
            handle,
            pixels[..., 0] if channels == 1 else pixels,
            photometric="rgb" if colours == 3 else "minisblack",
            planarconfig=None if channels == 1 else "contig",
            extrasamples=["unspecified"] * (channels - colours),
            compression="zlib",
            predictor=pixels.dtype != np.float32,
            metadata=None,
            extratags=tags,
        )


def moved_tags(geo: Georeference, top: int, left: int) -> list[tuple[int, int, int, Any, bool]]:
    """The tags of a raster for a part of it that begins at (top, left), for tifffile's extratags."""
    size = next((tag[3] for tag in geo.tags if tag[0] == 33550), None)
    moved = []
    for code, kind, count, value, once in geo.tags:
        if code == 33922 and len(value) == 6 and size is not None:  # one tie point: put it into the new corner
            i, j, k, x, y, z = value
            value = (0.0, 0.0, k, x + (left - i) * size[0], y - (top - j) * size[1], z)
        elif code == 33922:
            value = tuple(v - (left, top)[i % 6] if i % 6 < 2 else v for i, v in enumerate(value))
        elif code == 34264:
            matrix = np.array(value, np.float64).reshape(4, 4)
            matrix[:, 3] += left * matrix[:, 0] + top * matrix[:, 1]
            value = tuple(matrix.ravel().tolist())
        moved.append((code, kind, count, value, once))
    return moved


if __name__ == "__main__":
    main()
