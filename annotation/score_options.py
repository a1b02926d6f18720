"""What drafts are compared with, and the flags of that. Imports nothing heavy."""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

import cli

KINDS = ("auto", "labels", "masks")


@dataclass(frozen=True)
class ScoreOptions:
    """What labels are compared with, and how.

    Attributes:
        folder: references by stem, or a folder with labels/, gt/ or masks/; None: nothing is scored.
        kind: labels (every value is one object), masks (objects are components), or auto: files of one value beside 0
            are masks.
        value: the mask value that is the object, the others are background; None: any but 0.
        min_area: objects with fewer pixels are left out on both sides.
        group_pattern: images whose stems agree in its first group get scores of their own.
    """

    folder: Path | None = None
    kind: str = "auto"
    value: int | None = None
    min_area: int = 0
    group_pattern: str | None = None


def add_score_args(parser: argparse.ArgumentParser) -> None:
    """Add what labels are compared with."""
    group = parser.add_argument_group("scores against references")
    group.add_argument("--against", type=Path, metavar="DIR", help="compare with masks or label maps of the same stems")
    group.add_argument(
        "--against-kind", choices=KINDS, default="auto", help="auto: files of one value beside 0 are masks"
    )
    group.add_argument(
        "--against-value", type=cli.positive_int, metavar="N", help="of masks with several values, the object's"
    )
    group.add_argument(
        "--score-min-area",
        type=cli.natural,
        default=0,
        metavar="N",
        help="objects of fewer pixels are left out on both sides",
    )
    group.add_argument(
        "--group-pattern", metavar="REGEX", help="scores for each group of file names that agree in its first group"
    )


def options_from(args: argparse.Namespace) -> ScoreOptions:
    """The options behind the flags of add_score_args.

    Raises:
        cli.UsageError: the pattern is not a regular expression, or a flag is given that needs --against.
    """
    if args.against is None and (args.against_kind != "auto" or args.against_value is not None):
        raise cli.UsageError("--against-kind and --against-value say how references are read: give --against DIR too")
    if args.against_kind == "labels" and args.against_value is not None:
        raise cli.UsageError("--against-value picks a value of masks, in label maps every value is one object")
    if args.group_pattern is not None:
        try:
            re.compile(args.group_pattern)
        except re.error as error:
            raise cli.UsageError(f"--group-pattern {args.group_pattern!r} is no regular expression: {error}") from error
    return ScoreOptions(args.against, args.against_kind, args.against_value, args.score_min_area, args.group_pattern)
