"""How parameters of engines are searched, and the flags of that. Imports nothing heavy."""

import argparse
from dataclasses import dataclass

import cli

OBJECTIVES = {"f1": 0.5, "mean_f1": None}


@dataclass(frozen=True)
class TuneOptions:
    """How long and for what is searched.

    Attributes:
        images: how many pictures with references are used; 0: no tuning.
        trials: settings that are tried, the default one included; mixtures of the best come on top.
        objective: f1 (at IoU 0.5) or mean_f1 (0.5 to 0.95), mean over pictures.
        min_area: objects with fewer pixels are left out on both sides.
        seed: of everything random.
        keep: chance of each parameter to stay as it is by default.
        halving: one in so many settings goes on from a rung to the next.
    """

    images: int = 0
    trials: int = 64
    objective: str = "f1"
    min_area: int = 0
    seed: int = 42
    keep: float = 0.7
    halving: int = 3

    def __post_init__(self) -> None:
        if self.trials < 1 or self.halving < 2 or not 0 <= self.keep < 1:
            raise ValueError(
                f"trials {self.trials}, halving {self.halving}, keep {self.keep}: expected at least 1, at least 2, and "
                "a share from 0 to below 1"
            )
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective is {self.objective!r}, expected one of {', '.join(OBJECTIVES)}")


def add_tune_args(parser: argparse.ArgumentParser) -> None:
    """Add the search for parameters."""
    group = parser.add_argument_group("tuning")
    group.add_argument(
        "--tune",
        type=cli.natural,
        default=0,
        metavar="N",
        help="search the engines' parameters on N images with references in --against, write tune.csv and tuned.json",
    )
    group.add_argument("--tune-trials", type=cli.positive_int, default=64, metavar="N", help="settings that are tried")
    group.add_argument(
        "--tune-for", choices=tuple(OBJECTIVES), default="f1", help="F1 at IoU 0.5, or its mean over 0.5 to 0.95"
    )
    group.add_argument("--tune-seed", type=cli.natural, default=42, metavar="N", help="seed of the search")


def options_from(args: argparse.Namespace) -> TuneOptions:
    """The options behind the flags of add_tune_args and scoring.add_score_args.

    Raises:
        cli.UsageError: there is nothing to compare with.
    """
    if args.tune and args.against is None:
        raise cli.UsageError("--tune needs masks or label maps of the images: give --against DIR")
    return TuneOptions(args.tune, args.tune_trials, args.tune_for, args.score_min_area, args.tune_seed)
