"""Take labels that people corrected or drew elsewhere back into a data set: masks, label maps, COCO, QuPath GeoJSON.

Example:
    python annotate.py --images pictures -o labelled
    python -m dataset_utils.import_labels corrected/ -o labelled
    python -m dataset_utils.import_labels annotations.json slide_7.geojson -o labelled

The output is a folder of annotate.py or any data set with images/; labels/ (an instance map for each image) and gt/
(0 and 255) are written there. A folder of annotate.py also gets its tables, overlays and texts anew, and annotate.py
never overwrites what came in. Files belong to the image of their name; COCO files name their images. Where objects
overlap the smaller keeps the pixels. Files that a person made and that would be replaced stay, unless --overwrite is
given; then they are kept in .annotate/replaced/.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cli

if TYPE_CHECKING:
    from annotation.importing import Labels
    from annotation.records import FileOptions


def build_parser() -> argparse.ArgumentParser:
    """Flags of dataset_utils.import_labels."""
    parser = cli.make_parser("Take corrected labels back in: masks, label maps, COCO json, QuPath GeoJSON.")
    group = parser.add_argument_group("labels")
    group.add_argument(
        "sources", nargs="+", type=Path, metavar="FILE", help="files or folders of masks, label maps, .json, .geojson"
    )
    group.add_argument(
        "-o", "--output-dir", type=Path, required=True, metavar="DIR", help="data set that holds images/"
    )
    group.add_argument(
        "--kind",
        choices=("auto", "masks", "labels"),
        default="auto",
        help="what single-channel files are; auto: masks where all objects have one value",
    )
    group.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="take only these classes of COCO and GeoJSON files"
    )
    cli.add_switch(group, "--empty", help="take files without any object as labels of images without any")
    cli.add_switch(group, "--overwrite", help="replace labels that a person made; they are kept in .annotate/replaced/")
    group = parser.add_argument_group("files")
    group.add_argument(
        "--gap", type=cli.natural, metavar="N", help="pixels between objects in gt/; without it as the folder has, or 1"
    )
    group.add_argument(
        "--mm-per-pixel",
        type=cli.positive_float,
        metavar="MM",
        help="millimetres in objects.csv; without it as the folder has them",
    )
    group.add_argument(
        "--decimal", choices=("comma", "dot"), help="sign in csv files; without it as the folder has, or comma"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Import all sources."""
    parser = build_parser()
    args = cli.parse(parser, argv)
    with cli.plain_errors(parser, interrupted="the same command does it again from the start"):
        findings = run(args)
    cli.exit_with_findings(parser, findings)


def run(args: argparse.Namespace) -> list[str]:
    """Import all sources; return what was left out and why."""
    from annotation.records import hold_folder

    if not (args.output_dir / "images").is_dir():
        raise FileNotFoundError(
            f"{args.output_dir} has no images/; expected a data set or an output of annotate.py: give a split, such as "
            "train, of a data set that has splits"
        )
    with hold_folder(args.output_dir):
        return import_all(args)


def import_all(args: argparse.Namespace) -> list[str]:
    """Import all sources into an output that nobody else writes to; return what was left out and why."""
    from annotation.importing import Reader
    from annotation.records import RECORDS, FileOptions, list_records
    from annotation.report import read_about, write_tables
    from image_io import list_images

    images = list_images(args.output_dir / "images")
    reader = Reader(_Sizes(images), args.kind, frozenset(args.only))
    is_annotated = any((args.output_dir / RECORDS).glob("*.json"))  # what was replaced is kept there in any data set
    about = read_about(FileOptions(args.output_dir))
    tables, count = table_options(args, about), 0
    for labels in reader.read(args.sources):
        options = options_for(args, tables, labels.stem)
        try:
            message = take_in(options, labels, images[labels.stem], empty=args.empty, overwrite=args.overwrite)
            if is_annotated:
                refresh(options, labels.stem, images[labels.stem])
        except (OSError, ValueError) as error:
            reader.findings.append(cli.plain_message(error))
            continue
        count += 1
        print(message)
    if is_annotated and count:
        write_tables(options_for(args, tables, ""), list_records(tables), about)
    print(f"{count} images have new labels in {args.output_dir}")
    return reader.findings


class _Sizes(dict):
    """Stem to (height, width) of images, which are looked at when somebody asks for them."""

    def __init__(self, images: dict[str, Path]) -> None:
        super().__init__(dict.fromkeys(images))
        self.images = images

    def __getitem__(self, stem: str) -> tuple[int, int]:
        from image_io import read_image

        if super().__getitem__(stem) is None:
            self[stem] = read_image(self.images[stem]).shape[:2]
        return super().__getitem__(stem)


def table_options(args: argparse.Namespace, about: Mapping[str, Any]) -> "FileOptions":
    """How the tables are written: as the flags say, or else as the report says that they were."""
    from annotation.records import FileOptions

    before = about.get("settings", {}).get("flags", {})
    return FileOptions(
        args.output_dir,
        mm_per_pixel=args.mm_per_pixel or before.get("mm_per_pixel"),
        decimal=args.decimal or before.get("decimal", "comma"),
    )


def options_for(args: argparse.Namespace, options: "FileOptions", stem: str) -> "FileOptions":
    """How the files of an image were written, so that they are written again in that way."""
    from annotation.records import read_record

    record = read_record(options, stem) or {}
    made = dict(record.get("made", options.made))
    if args.gap is not None:
        made["gap"] = args.gap
    made |= {kind: (args.output_dir / kind).is_dir() for kind in ("overlays", "panels", "geojson")}
    return replace(options, **made)


def take_in(options: "FileOptions", labels: "Labels", image: Path, *, empty: bool, overwrite: bool) -> str:
    """Write labels/ and gt/ of one image; a line about it.

    Raises:
        ValueError: it would replace a person's work or all objects, and that was not asked for.
    """
    import numpy as np

    from annotation.edits import follow_gt
    from annotation.files import store_edited
    from annotation.instances import gap_mask, number_instances
    from annotation.records import is_edited, list_label_files
    from image_io import read_mask

    before = list_label_files(options.folder, "labels", labels.stem)
    has_objects = any(read_mask(path).any() for path in [*before, *list_label_files(options.folder, "gt", labels.stem)])
    if not labels.values.any() and has_objects and not empty:
        raise ValueError(
            f"{labels.source} holds no object for {labels.stem!r}, which has some; expected labels: give --empty if "
            "there is nothing in the picture"
        )
    if is_edited(options, labels.stem) and not overwrite and not _is_same(options, labels):
        raise ValueError(
            f"{labels.source} would replace labels of {labels.stem!r} in {options.folder} that a person made; expected "
            "such as annotate.py made: give --overwrite to keep those in .annotate/replaced/ and take these"
        )
    if labels.is_mask:
        known = read_mask(before[0]) if before else None
        if known is not None and known.shape != labels.values.shape:
            known = None
        gt = np.where(labels.values > 0, np.uint8(255), np.uint8(0))
        values = follow_gt(gt, known, options.gap)
        store_edited(options, labels.stem, values, gt, "gt")
    else:
        values = labels.values
        pieces = number_instances(values, 1.0, "", pieces="all").labels
        store_edited(options, labels.stem, values, gap_mask(pieces, options.gap), "labels")
    found = len(np.unique(values[values > 0]))
    hidden = f", {labels.overlapping} partly under smaller ones" if labels.overlapping else ""
    return f"{labels.stem}: {found} objects{hidden} from {labels.source}"


def _is_same(options: "FileOptions", labels: "Labels") -> bool:
    """Whether the labels are in place already."""
    import numpy as np

    from annotation.records import list_label_files
    from image_io import read_mask

    paths = list_label_files(options.folder, "gt" if labels.is_mask else "labels", labels.stem)
    if len(paths) != 1:
        return False
    present = read_mask(paths[0])
    return np.array_equal(present > 0, labels.values > 0) if labels.is_mask else np.array_equal(present, labels.values)


def refresh(options: "FileOptions", stem: str, image: Path) -> None:
    """Make overlay, text and record of an image of annotate.py anew from its labels."""
    from annotation.files import write_edited
    from annotation.records import read_record
    from image_io import read_image

    record = read_record(options, stem) or {}
    write_edited(
        options,
        image,
        read_image(image),
        record.get("settings", "imported"),
        image_digest=record.get("image_digest"),
    )


if __name__ == "__main__":
    main()
