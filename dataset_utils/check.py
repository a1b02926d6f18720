"""Look at a labelled data set before training on it: what is wrong with it, and what is there.

Example:
    python -m dataset_utils.check -d data/sample

It is the check that train.py starts with, alone: the same flags, the same findings, the same cache. Exit status 1 when
there are errors, which are those that training would stop on.
"""

import argparse
from collections.abc import Iterable, Sequence

import numpy as np

import cli
from image_io import IGNORE_INDEX
from scan import Checked, PairFacts, check_from_flags, label_counts

LABELS_SHOWN = 20


def build_parser() -> argparse.ArgumentParser:
    """Flags of dataset_utils.check."""
    parser = cli.make_parser("Look at a labelled data set: what is wrong with it, and what is there.")
    cli.add_data_args(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Check, print the findings and the tables."""
    parser = build_parser()
    args = cli.parse(parser, argv)
    with cli.plain_errors(parser, interrupted="what was read so far is remembered"):
        checked = check_from_flags(args)
        for kind, messages in (("note", checked.notes), ("warning", checked.warnings), ("error", checked.errors)):
            for message in messages:
                print(f"{kind}: {message}")
        print(f"{len(checked.errors)} errors, {len(checked.warnings)} warnings\n")
        print(file_table(checked))
        print(f"\n{label_table(checked)}")
    if checked.errors:
        parser.exit(1)


def file_table(checked: Checked) -> str:
    """How many images of which size, channels and type each split has."""
    rows = [("split", "images", "height x width", "channels", "type")]
    for split, facts in (("training", checked.train), ("validation", checked.val)):
        readable = [item for item in facts if not item.layers[0].error]
        channels = {"+".join(str(layer.channels) for layer in item.layers) for item in readable}
        kinds = {layer.dtype for item in readable for layer in item.layers if layer.dtype}
        rows.append((split, str(len(facts)), _sizes(readable), ", ".join(sorted(channels)), ", ".join(sorted(kinds))))
    return _table(rows)


def _sizes(facts: Sequence[PairFacts]) -> str:
    sizes = sorted({item.layers[0].size for item in facts})
    if len(sizes) < 4:
        return ", ".join(f"{height}x{width}" for height, width in sizes)
    low, high = np.min(sizes, axis=0), np.max(sizes, axis=0)
    return f"{low[0]}x{low[1]} to {high[0]}x{high[1]} ({len(sizes)} sizes)"


def label_table(checked: Checked) -> str:
    """Share of the pixels that each mask value has in each split, and the class that learns it."""
    splits = [label_counts(checked.train), label_counts(checked.val)]
    labels = sorted({*splits[0], *splits[1]})
    rows = [["label", "class", "training", "validation"]]
    for label in labels[:LABELS_SHOWN]:
        shares = [_share(counts[label], counts.total()) for counts in splits]
        rows.append([str(label), _class_name(checked, label), *shares])
    more = len(labels) - LABELS_SHOWN
    return _table(rows) + (f"\n... and {more} more labels" if more > 0 else "")


def _share(count: int, total: int) -> str:
    return f"{100 * count / total:.3g} %" if count else "-"


def _class_name(checked: Checked, label: int) -> str:
    if checked.classes is None:
        return "?"
    index = int(checked.classes.indices(np.array([label]))[0])
    names = checked.classes.names
    return names[index] if index < len(names) else "ignored" if index == IGNORE_INDEX else "none"


def _table(rows: Iterable[Sequence[str]]) -> str:
    """Rows as text in columns of equal width."""
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    main()
