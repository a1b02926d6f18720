"""What can be set about the engine that is a trained network, and its flags. Imports nothing heavy."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import cli

SPACE: dict[str, list[object] | tuple[float, float, str]] = {  # what can be tuned: see annotation.tuning
    "thres": (0.2, 0.8, "linear"),
    "model_split": [True, False],
    "model_split_depth": (0.05, 0.6, "log"),
}


@dataclass(frozen=True)
class TrainedOptions:
    """Which network, and how its answer becomes objects.

    Attributes:
        path: .pth or .onnx.
        threshold: of one class, in [0, 1], or best: the checkpoint's own.
        classes: names of the classes that are objects; none: all but the background.
        split: part what is joined by a narrow neck, by the watershed of the distance to the outline.
        split_depth: how much narrower than both parts a neck is, as a share of the smaller part's radius.
        backend: auto, torch or onnx; see backends.load_forward.
        batch: tiles at a time; None: as the checkpoint says.
    """

    path: Path
    threshold: float | str = 0.5
    classes: tuple[str, ...] = ()
    split: bool = False
    split_depth: float = 0.25
    backend: str = "auto"
    batch: int | None = None


def add_trained_args(parser: argparse.ArgumentParser) -> None:
    """Add how a network's answer becomes objects; the network, threshold and backend have flags in cli."""
    group = parser.add_argument_group("trained network")
    group.add_argument(
        "--model-classes", nargs="+", default=[], metavar="NAME", help="classes that are objects; default: all"
    )
    cli.add_switch(group, "--model-split", help="part predicted objects that a narrow neck joins")
    group.add_argument(
        "--model-split-depth",
        type=cli.inner_share,
        default=0.25,
        metavar="X",
        help="how much narrower a neck is, as a share of the smaller part's radius",
    )


def options_from(args: argparse.Namespace) -> TrainedOptions | None:
    """The options behind the flags of add_trained_args and cli (checkpoint, threshold, backend); None: no network.

    Raises:
        FileNotFoundError: no checkpoint is in the folder.
    """
    path = args.check_path
    if args.check_dir:
        from checkpoint import find_checkpoint

        path = find_checkpoint(args.check_dir)
    if path is None:
        return None
    return TrainedOptions(
        path,
        args.thres,
        tuple(args.model_classes),
        args.model_split,
        args.model_split_depth,
        args.backend,
        getattr(args, "batch", None),
    )
