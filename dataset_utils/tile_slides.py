"""Cut annotated slides into tiles that train.py reads: images/, gt/ and a table of what is where.

Examples:
    python -m dataset_utils.tile_slides -i slides -a train.csv -o data/tiles --reduce 16 --val-share 0.2
    python -m dataset_utils.tile_slides -i slide.svs -a slide.geojson -o data/tiles --classes tumor=64 vessel=128

Slides are read by windows. Annotations are run lengths (csv with id and encoding), GeoJSON or mask files, in pixels of
the full resolution; tiles have the masks that training straight from slides has there. Tiles cover the whole slide, the
last ones are moved in; a slide that is smaller than a tile gives one tile of its own size, which training pads without
counting the padding. Tiles with annotation are always kept. The same command goes on after a kill; what cannot be used
is named, the rest is done, and the exit status is 1.
"""

import argparse
import csv
import hashlib
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cli
from dataset_utils.tile_cutting import (
    ANNOTATED,
    EMPTY,
    NO_DATA,
    NO_TISSUE,
    UNREADABLE,
    CutOptions,
    Job,
    Layout,
    RowResult,
    Task,
    Tile,
    cut_rows,
    plan_slide,
)
from dataset_utils.tile_journal import Journal, claim_folder, remove_leftovers
from dataset_utils.tile_masks import MAX_VALUE, LabelRule, find_masks
from image_io import IMAGE_SUFFIXES, ImageError, file_stem, write_text
from pairing import SLIDE_SUFFIXES, DatasetError, Pair, share_by_name

MANIFEST = "manifest.csv"
KINDS = (ANNOTATED, EMPTY, NO_TISSUE, NO_DATA, UNREADABLE)
OVER_CAP = "over the cap"


def build_parser() -> argparse.ArgumentParser:
    """Flags of dataset_utils.tile_slides."""
    parser = cli.make_parser("Cut annotated slides into tiles, masks and a table of them.")
    group = parser.add_argument_group("slides")
    group.add_argument(
        "-i", "--images", nargs="+", required=True, metavar="PATH", help="slides or images: files, folders or globs"
    )
    group.add_argument(
        "-a",
        "--annotations",
        type=Path,
        required=True,
        metavar="PATH",
        help="csv file with the columns id and encoding, or a folder with <id>.geojson or mask files",
    )
    group.add_argument("-o", "--output-dir", type=Path, required=True, metavar="DIR", help="folder of the tiles")
    add_grid_args(parser)
    add_keep_args(parser)
    add_mask_args(parser)
    group = parser.add_argument_group("split and run")
    group.add_argument(
        "--val-share", type=cli.inner_share, metavar="X", help="part of the slides whose tiles go to val/, by name"
    )
    group.add_argument(
        "--group-pattern", metavar="REGEX", help="slides that agree in its first group stay on one side of the split"
    )
    group.add_argument("-w", "--workers", type=cli.natural, default=2, metavar="N", help="processes that cut tiles")
    group.add_argument(
        "--max-decoded-gb",
        type=cli.positive_float,
        default=4.0,
        metavar="GB",
        help="largest image that is decoded whole, for formats that cannot be read by windows",
    )
    cli.add_switch(group, "--dry-run", help="read everything, say what would be cut, write nothing")
    return parser


def add_grid_args(parser: argparse.ArgumentParser) -> None:
    """Add size, scale and overlap of tiles."""
    group = parser.add_argument_group("tiles")
    group.add_argument("--size", type=cli.positive_int, default=256, metavar="S", help="side of a tile in pixels")
    scale = group.add_mutually_exclusive_group()
    scale.add_argument("--reduce", type=cli.positive_float, metavar="X", help="read X times smaller, X >= 1")
    scale.add_argument("--level", type=cli.natural, metavar="N", help="read this level of a pyramid; 0 is the largest")
    scale.add_argument("--mpp", type=cli.positive_float, metavar="UM", help="read at so many micrometres per pixel")
    group.add_argument(
        "--overlap",
        type=cli.not_negative,
        default=0,
        metavar="X",
        help="shared by neighbours, in pixels; below 1: part of the tile",
    )


def add_keep_args(parser: argparse.ArgumentParser) -> None:
    """Add which tiles without annotation are kept."""
    group = parser.add_argument_group("tiles without annotation")
    group.add_argument(
        "--tissue",
        choices=("saturation", "otsu", "none"),
        default="saturation",
        help="how tissue is told from glass: by colour, by Otsu's threshold on a thumbnail, or not at all",
    )
    group.add_argument(
        "--min-tissue",
        type=_amount,
        metavar="X",
        help="keep tiles with more pixels of tissue; below 1: share of the tile; default 200 * size / 256 pixels",
    )
    group.add_argument(
        "--max-empty",
        type=_amount,
        metavar="X",
        help="keep at most so many tiles without annotation; with a point: so large a share of all tiles",
    )
    group.add_argument("--seed", type=cli.natural, default=42, metavar="N", help="chooses among them")


def add_mask_args(parser: argparse.ArgumentParser) -> None:
    """Add the values of masks and the names of files."""
    group = parser.add_argument_group("masks")
    group.add_argument(
        "--label",
        type=cli.positive_int,
        metavar="N",
        help=f"mask value of every object, 1 to {MAX_VALUE}; default 255, and mask files keep their values",
    )
    group.add_argument(
        "--classes",
        nargs="+",
        type=_class_value,
        default=[],
        metavar="NAME=N",
        help="mask value of each class instead: a GeoJSON class, a csv class or column, a value of masks; 0: left out",
    )
    group.add_argument(
        "--names",
        choices=("coordinates", "predecessor"),
        default="coordinates",
        help="<id>_x<x>_y<y> in images/ and gt/, or <id>_<n>red<reduce> in images_ and masks_<size>_red<reduce>/",
    )


def _amount(text: str) -> int | float:
    """Argparse type: a whole number, or a share with a point."""
    if text.isdecimal():
        return int(text)
    try:
        return cli.share(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, or a share such as 0.5") from error


def _class_value(text: str) -> str:
    """Argparse type: NAME=N, kept as text so that a settings file can hold it."""
    name, _, value = text.rpartition("=")
    if not name or not value.isdecimal() or int(value) > MAX_VALUE:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a class and its mask value, such as tumor=64")
    return text


def main(argv: Sequence[str] | None = None) -> None:
    """Find slides and annotations, cut, print what came out."""
    parser = build_parser()
    args = cli.parse(parser, argv)
    with cli.plain_errors(parser, interrupted="the same command goes on where it stopped"):
        failures = run(args)
    cli.exit_with_findings(parser, failures)


def run(args: argparse.Namespace) -> list[str]:
    """Cut all slides; return what went wrong."""
    options = cut_options(args)
    slides = find_slides(args.images)
    found = find_masks(args.annotations, slides, options.rule)
    failures = [*found.missing.values(), *found.extra.values()]
    sides = split_slides([*slides, *found.extra], args.val_share, args.group_pattern)
    jobs = [
        Job(name, slides[name], source, args.output_dir / sides[name], options)
        for name, source in sorted(found.sources.items())
    ]
    layouts = []
    for job in jobs:
        try:
            layouts.append(plan_slide(job))
        except (OSError, ImageError) as error:
            failures.append(str(error))
    run = Run(args, layouts, sides)
    run.survey()
    chosen = choose_empty(run.tiles(EMPTY), len(run.tiles(ANNOTATED)), args.max_empty, args.seed)
    if not args.dry_run:
        run.write_chosen(chosen)
        write_text(args.output_dir / MANIFEST, format_manifest(run.written(chosen), sides))
    failures += run.findings
    print(summary(run, chosen))
    if not args.dry_run:
        print_statistics(args, run.written(chosen), sides)
    return list(dict.fromkeys(failures))


def cut_options(args: argparse.Namespace) -> CutOptions:
    """Flags as options.

    Raises:
        cli.UsageError: values that do not go together.
    """
    step = args.size - (round(args.overlap * args.size) if args.overlap < 1 else int(args.overlap))
    if step < 1:
        raise cli.UsageError(f"--overlap {args.overlap:g} leaves no step between tiles of {args.size}; give less")
    if args.reduce and args.reduce < 1:
        raise cli.UsageError(f"--reduce {args.reduce:g} would enlarge the slide; expected 1 or more")
    if args.label and args.classes:
        raise cli.UsageError("--label is for all objects, --classes for each class: give one of them")
    if (args.label or 0) > MAX_VALUE:
        raise cli.UsageError(f"--label {args.label} is out of range, expected 1 to {MAX_VALUE}")
    if args.group_pattern and not args.val_share:
        raise cli.UsageError("--group-pattern is for the split: give --val-share too")
    pairs = [word.rpartition("=") for word in args.classes]
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise cli.UsageError(f"--classes {' '.join(args.classes)} names a class twice")
    limit = 200 * args.size // 256 if args.min_tissue is None else args.min_tissue
    predecessor = args.names == "predecessor"
    label = args.label or (1 if predecessor and not args.classes else None)
    return CutOptions(
        args.size,
        step,
        args.reduce,
        args.level,
        args.mpp,
        args.tissue,
        int(limit * args.size**2) if isinstance(limit, float) else limit,
        LabelRule(label, tuple((name, int(value)) for name, _, value in pairs)),
        predecessor,
        write_empty=args.max_empty is None,
        dry_run=args.dry_run,
        max_decoded_gb=args.max_decoded_gb,
    )


def find_slides(words: Sequence[str]) -> dict[str, Path]:
    """Slides by id, sorted.

    Raises:
        FileNotFoundError: a word stands for nothing.
        ImageError: two files of one id.
    """
    slides: dict[str, Path] = {}
    for word in words:
        path = Path(word).expanduser()
        if path.is_dir():
            kinds = (*IMAGE_SUFFIXES, *SLIDE_SUFFIXES)
            inside = [item for item in path.iterdir() if item.suffix.lower() in kinds and item.name[0] != "."]
        else:
            root = Path(path.anchor)
            inside = [path] if path.exists() else list(root.glob(str(path.relative_to(root))))
        if not inside:
            what = f"the folder {path} holds" if path.is_dir() else f"{word} names"
            raise FileNotFoundError(f"{what} no image or slide; expected files such as *.tif or *.svs")
        for item in sorted(file for file in inside if file.is_file()):
            other = slides.setdefault(file_stem(item), item)
            if other.resolve() != item.resolve():
                raise ImageError(
                    f"{other} and {item} would both give tiles named {file_stem(item)}_...; rename one, or cut them "
                    "into two folders"
                )
    return dict(sorted(slides.items()))


def split_slides(names: Sequence[str], share: float | None, pattern: str | None) -> dict[str, str]:
    """The folder of each slide: "train" or "val", or "" without a split.

    Raises:
        DatasetError: there are too few slides to split.
    """
    if share is None:
        return dict.fromkeys(names, "")
    if len(names) < 2:
        raise DatasetError(
            f"--val-share {share:g}: {len(names)} slide cannot be split; leave the flag out, or add slides"
        )
    train, val = share_by_name([Pair(name, Path(name)) for name in sorted(names)], share, pattern)
    return {pair.name: side for side, pairs in (("train", train), ("val", val)) for pair in pairs}


Placed = tuple[Layout, Tile]


class Run:
    """The state of a run: what is known of each slide, and what went wrong."""

    def __init__(self, args: argparse.Namespace, layouts: Sequence[Layout], sides: Mapping[str, str]) -> None:
        """Take the folder and read what an earlier run did."""
        self.workers, self.dry_run = args.workers, args.dry_run
        self.layouts = {layout.job.name: layout for layout in layouts}
        self.results: dict[str, dict[int, RowResult]] = {name: {} for name in self.layouts}
        self.findings: list[str] = []
        self.journals: dict[str, Journal] = {}
        self.failed: set[str] = set()
        if self.dry_run:
            return
        claim_folder(args.output_dir, recorded_flags(args))
        remove_leftovers(layouts)
        for name, layout in self.layouts.items():
            journal = self.journals[name] = Journal(args.output_dir, layout, sides[name])
            self.results[name] = journal.rows
            if journal.changed:
                print(f"{name}: the slide or its annotation has changed, its tiles are cut anew")

    def survey(self) -> None:
        """Look at every row that is not known yet; write what is kept whatever the other tiles are."""
        from tqdm import tqdm

        known = sum(len(row.tiles) for rows in self.results.values() for row in rows.values())
        total = sum(len(layout.rows) * len(layout.columns) for layout in self.layouts.values())
        with tqdm(total=total, initial=known, desc="tiles", unit="tile", leave=False, disable=None) as bar:
            for result in cut_rows(self._missing_rows(), self.workers):
                bar.update(len(result.tiles))
                if result.error:
                    self._fail(result)
                elif self.dry_run:
                    self.results[result.name][result.row] = result
                else:
                    self.journals[result.name].add(result)
        for rows in self.results.values():
            for row in rows.values():
                self.findings += row.findings
        self.findings = list(dict.fromkeys(self.findings))

    def _missing_rows(self) -> Iterator[Task]:
        for name, layout in self.layouts.items():
            for row in range(len(layout.rows)):
                if name not in self.failed and row not in self.results[name]:
                    yield Task(layout, row)

    def _fail(self, result: RowResult) -> None:
        self.failed.add(result.name)
        self.findings += [*result.findings, f"{result.name}: {result.error}"]

    def tiles(self, kind: str) -> list[Placed]:
        """Tiles of a kind, by slide, row and column."""
        return [
            (self.layouts[name], tile)
            for name, rows in self.results.items()
            for _, row in sorted(rows.items())
            for tile in row.tiles
            if tile.kind == kind
        ]

    def write_chosen(self, chosen: Sequence[Placed]) -> None:
        """Write tiles without annotation that wait for a choice, and remove those that an earlier choice took."""
        from tqdm import tqdm

        wanted: dict[tuple[str, int], list[int]] = {}
        keep = {(layout.job.name, tile.row, tile.column) for layout, tile in chosen}
        for layout, tile in self.tiles(EMPTY):
            name = layout.job.name
            if (name, tile.row, tile.column) not in keep:
                self.journals[name].remove_files([tile])
            elif not all(path.is_file() for path in self.journals[name].files(tile)):
                wanted.setdefault((name, tile.row), []).append(tile.column)
        tasks = [Task(self.layouts[name], row, tuple(columns)) for (name, row), columns in wanted.items()]
        for result in tqdm(
            cut_rows(tasks, self.workers), "tiles without annotation", len(tasks), leave=False, disable=None
        ):
            if result.error:
                self._fail(result)

    def written(self, chosen: Sequence[Placed]) -> list[Placed]:
        """All tiles of the data set, by slide, row and column."""
        placed = [*self.tiles(ANNOTATED), *chosen]
        return sorted(placed, key=lambda each: (each[0].job.name, each[1].row, each[1].column))


def recorded_flags(args: argparse.Namespace) -> dict[str, object]:
    """The flags that tell which tiles a folder holds."""
    names = (
        *("size", "reduce", "level", "mpp", "overlap", "tissue", "min_tissue", "max_empty", "seed", "label"),
        *("classes", "names", "val_share", "group_pattern"),
    )
    return {name: getattr(args, name) for name in names}


def choose_empty(empty: Sequence[Placed], annotated: int, limit: int | float | None, seed: int) -> list[Placed]:
    """The tiles without annotation that are kept: all, at most `limit`, or at most this share of all tiles.

    The choice depends on the seed and on names and places of tiles alone.
    """
    if limit is None or (isinstance(limit, float) and limit >= 1):
        return list(empty)
    count = limit if isinstance(limit, int) else int(annotated * limit / (1 - limit) + 1e-9)

    def rank(placed: Placed) -> bytes:
        layout, tile = placed
        return hashlib.sha256(f"{seed}/{layout.job.name}/{tile.row}/{tile.column}".encode()).digest()

    return sorted(empty, key=rank)[:count]


# ----------------------------------------------------------------------------------------------------------------------
# What came out


def format_manifest(written: Sequence[Placed], sides: Mapping[str, str]) -> str:
    """A row for each tile; x, y, width and height in pixels of the full resolution, labels in pixels of the mask."""
    values = sorted({value for _, tile in written for value in tile.labels})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ["id", "x", "y", "width", "height", "scale", "mpp", "foreground"]
    writer.writerow([*columns, *(f"label_{value}" for value in values), "tissue", "file", "mask"])
    for layout, tile in written:
        height, width = layout.extent()
        corner = [*layout.corner(tile.row, tile.column), width * layout.scale, height * layout.scale, layout.scale]
        numbers = ["" if number is None else f"{number:.10g}" for number in (*corner, layout.mpp)]
        counts = [tile.labels.get(value, 0) for value in values]
        side = sides[layout.job.name]
        files = [
            (Path(side) / path.relative_to(layout.job.folder)).as_posix()
            for path in layout.files(tile.row, tile.column)
        ]
        share = f"{tile.tissue / (height * width):.4f}"
        writer.writerow([layout.job.name, *numbers, sum(counts), *counts, share, *files])
    return text.getvalue()


def summary(run: Run, chosen: Sequence[Placed]) -> str:
    """How many tiles of each kind each slide gave."""
    kept = Counter(layout.job.name for layout, _ in chosen)
    head = ["slide", "tiles", *KINDS, OVER_CAP]
    rows: list[list[Any]] = []
    for name, results in run.results.items():
        counts = Counter(tile.kind for row in results.values() for tile in row.tiles)
        over = counts[EMPTY] - kept[name]
        counts[EMPTY] = kept[name]
        rows.append([name, counts[ANNOTATED] + counts[EMPTY], *(counts[kind] for kind in KINDS), over])
    total = ["all", *(sum(row[i] for row in rows) for i in range(1, len(head)))]
    cells = [[str(cell) for cell in row] for row in (head, *rows, *([total] if len(rows) > 1 else []))]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join(lines)


def print_statistics(args: argparse.Namespace, written: Sequence[Placed], sides: Mapping[str, str]) -> None:
    """Mean and deviation of the training tiles; in mean_vals.txt where training takes these very files."""
    from normalisation import load_or_compute_statistics, statistics
    from scan import scan_pairs

    pairs = [
        Pair(layout.files(tile.row, tile.column)[0].stem, *layout.files(tile.row, tile.column))
        for layout, tile in written
        if sides[layout.job.name] != "val"
    ]
    if not pairs:
        return
    facts = scan_pairs(pairs, workers=max(1, args.workers), progress=True)
    if len({item.channels for item in facts}) > 1:
        print("the slides differ in channels: no statistics")
        return
    if args.val_share and args.names != "predecessor":
        found = load_or_compute_statistics(args.output_dir, args.output_dir, facts, ())
        mean, std, note = found.mean, found.std, found.source
    else:
        values = statistics(facts)
        mean, std, note = tuple(values[0]), tuple(values[1]), "of all tiles; training computes those of its own part"
    numbers = "; ".join(f"{name} {' '.join(f'{v:.4g}' for v in row)}" for name, row in (("mean", mean), ("std", std)))
    print(f"{numbers} ({note})")
    print(f"tiles in {args.output_dir}")
    if not args.val_share and args.names != "predecessor" and len(sides) > 1:
        print(r"to train, keep the tiles of a slide together: --group-pattern '^(.+)_x\d+_y\d+$'")


if __name__ == "__main__":
    main()
