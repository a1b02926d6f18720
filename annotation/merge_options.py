"""What can be set about merging the objects of several engines, and its flags. Imports nothing heavy."""

import argparse
from dataclasses import dataclass

import cli

RULES = ("sam_first", "unite", "vote")
SPACE: dict[str, list[str] | tuple[float, float, str]] = {  # flags that can be tuned: see annotation.tuning
    "combine": list(RULES),
    "max_covered": (0.3, 0.8, "linear"),
}


@dataclass(frozen=True)
class MergeOptions:
    """How the objects of several engines become one set.

    Attributes:
        rule: sam_first: what the first engine found stays as it is, the others fill up; unite: all of them count alike,
            the better score goes first; vote: what enough engines found, with the mean of their outlines.
        duplicate_iou: two objects of two engines that overlap more than this are the same one.
        max_covered: an object with a larger share of its pixels under better ones is dropped.
        min_votes: engines that must have found an object under vote, at most all of them; None: more than half.
    """

    rule: str = "sam_first"
    duplicate_iou: float = 0.5
    max_covered: float = 0.5
    min_votes: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if self.rule not in RULES:
            raise ValueError(f"rule of merging is {self.rule!r}, expected one of {', '.join(RULES)}")
        if not 0 <= self.duplicate_iou <= 1:
            raise ValueError(f"duplicate_iou is {self.duplicate_iou}, expected a share from 0 to 1")
        if not 0 < self.max_covered < 1:
            raise ValueError(f"max_covered is {self.max_covered}, expected a share between 0 and 1, neither of them")
        if self.min_votes is not None and self.min_votes < 1:
            raise ValueError(f"min_votes is {self.min_votes}, expected at least 1")


def add_merge_args(parser: argparse.ArgumentParser) -> None:
    """Add how the objects of several engines are merged."""
    group = parser.add_argument_group("several engines")
    group.add_argument(
        "--combine",
        choices=RULES,
        default="sam_first",
        help="sam_first: the first engine's objects stay as they are; unite: the better score goes first; vote: what "
        "most engines found",
    )
    group.add_argument(
        "--duplicate-iou",
        type=cli.share,
        default=0.5,
        metavar="X",
        help="objects of two engines that overlap more than this are one",
    )
    group.add_argument(
        "--max-covered",
        type=cli.inner_share,
        default=0.5,
        metavar="X",
        help="drop objects covered more than this by better",
    )
    group.add_argument(
        "--min-votes", type=cli.positive_int, metavar="N", help="engines that agree under vote; default: most of them"
    )


def options_from(args: argparse.Namespace) -> MergeOptions:
    """The options behind the flags of add_merge_args.

    Raises:
        cli.UsageError: a flag is out of its range.
    """
    try:
        return MergeOptions(args.combine, args.duplicate_iou, args.max_covered, args.min_votes)
    except ValueError as error:
        raise cli.UsageError(str(error)) from error
