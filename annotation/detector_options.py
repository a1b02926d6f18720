"""What can be set about detectors and slices, and the flags. Imports nothing heavy, so that --help stays quick."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cli

MATCHES = ("iou", "ios")
MERGES = ("nms", "greedy_nmm", "nmm")
CONFIDENCE = 0.25
IOU = 0.5

DETECTOR_SPACE: dict[str, list[Any] | tuple[float, float, str]] = {
    "detector_confidence": (0.05, 0.6, "log"),
    "detector_iou": [0.3, 0.5, 0.7],
}
SLICE_SPACE: dict[str, list[Any] | tuple[float, float, str]] = {
    "slice": [[0.0], [0.5], [0.33], [0.25], [0.5, 0.25]],
    "slice_scale": [None, 1.0, 2.0, 3.0],
    "slice_overlap": [0.1, 0.2, 0.3, 0.4],
    "slice_merge": list(MERGES),
    "slice_match": list(MATCHES),
    "slice_threshold": [0.3, 0.5, 0.7],
    "slice_whole": [True, False],
}


@dataclass(frozen=True)
class DetectorOptions:
    """Which detector, and which of its boxes count.

    Attributes:
        weights: .onnx or .pt file, None: no detector.
        confidence: lowest score of a box.
        iou: boxes of one class that overlap by more are one object.
        classes: names or numbers of the classes that count; none: all.
        size: longest side of the input, for networks that take any; None: what the file says, or 640.
    """

    weights: Path | None = None
    confidence: float = CONFIDENCE
    iou: float = IOU
    classes: tuple[str, ...] = ()
    size: int | None = None


def add_detector_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags that become DetectorOptions."""
    group = parser.add_argument_group("detector")
    group.add_argument(
        "--detector", type=Path, metavar="FILE", help="YOLO weights: .onnx (v5, v8, v11, YOLOX), or .pt of ultralytics"
    )
    group.add_argument(
        "--detector-confidence", type=cli.share, default=CONFIDENCE, metavar="P", help="lowest score of a box"
    )
    group.add_argument(
        "--detector-iou",
        type=cli.share,
        default=IOU,
        metavar="X",
        help="boxes of one class that overlap by more are one object",
    )
    group.add_argument(
        "--detector-classes", nargs="+", default=[], metavar="NAME", help="only these classes, by name or number"
    )
    group.add_argument(
        "--detector-size",
        type=cli.positive_int,
        metavar="N",
        help="longest side of the network's input, where it takes any; default: what the file says, or 640",
    )


def detector_options_from(args: argparse.Namespace) -> DetectorOptions:
    """The options that the flags of add_detector_args describe."""
    return DetectorOptions(
        args.detector,
        args.detector_confidence,
        args.detector_iou,
        tuple(args.detector_classes),
        args.detector_size,
    )


@dataclass(frozen=True)
class SliceOptions:
    """How a picture is cut for a detector, and how the boxes of the slices become one set.

    Attributes:
        sizes: sides of slices, each size one pass over the picture: in pixels above 1, up to 1 as a share of both
            sides, 0 for no slices; none: the network's own side (by scale) where the picture is larger than 1.5 of it.
        scale: how many times a pixel is enlarged before the network sees it. It sets the size of automatic slices,
            and the input of networks that take any size; a network of fixed size sees each slice at its own size.
        overlap: share of a slice that the next one has too.
        merge: nms, greedy_nmm or nmm, see boxes.choose_owners.
        match: iou or ios, see boxes.match_boxes.
        match_threshold: boxes that match by more are one object.
        whole: whether the whole picture is looked at too, for objects larger than a slice.
        min_side: boxes with a shorter side are dropped, in pixels.
        max_share: boxes of a larger share of the picture are dropped.
    """

    sizes: tuple[float, ...] = ()
    scale: float | None = None
    overlap: float = 0.2
    merge: str = "nms"
    match: str = "ios"
    match_threshold: float = 0.5
    whole: bool = True
    min_side: float = 1.0
    max_share: float = 1.0


def add_slice_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags that become SliceOptions."""
    usual = SliceOptions()
    group = parser.add_argument_group("slices for the detector")
    group.add_argument(
        "--slice",
        nargs="+",
        type=cli.not_negative,
        default=[],
        metavar="X",
        help="sides of slices, in pixels or up to 1 as a share of the picture, each for one pass; 0: no slices; "
        "default: the network's side where the picture is larger",
    )
    group.add_argument(
        "--slice-scale", type=cli.positive_float, metavar="X", help="times that pixels are enlarged for the network"
    )
    group.add_argument(
        "--slice-overlap",
        type=_overlap,
        default=usual.overlap,
        metavar="X",
        help="share that neighbours have in common",
    )
    group.add_argument(
        "--slice-merge",
        choices=MERGES,
        default=usual.merge,
        help="of boxes that match keep the best (nms), or the hull of those that match the best (greedy_nmm) or each "
        "other (nmm)",
    )
    group.add_argument("--slice-match", choices=MATCHES, default=usual.match, help="shared area over union or smaller")
    group.add_argument(
        "--slice-threshold", type=cli.share, default=usual.match_threshold, metavar="X", help="boxes above it match"
    )
    cli.add_switch(group, "--slice-whole", default=usual.whole, help="look at the whole picture too")
    group.add_argument(
        "--box-min-side",
        type=cli.not_negative,
        default=usual.min_side,
        metavar="N",
        help="drop boxes less wide or high",
    )
    group.add_argument(
        "--box-max-share",
        type=cli.share,
        default=usual.max_share,
        metavar="X",
        help="drop boxes of more of the picture",
    )


def _overlap(text: str) -> float:
    """Argparse type: a number from 0 to 0.9."""
    value = cli.share(text)
    if value > 0.9:
        raise argparse.ArgumentTypeError(f"{text} is out of range: expected a number from 0 to 0.9")
    return value


def slice_options_from(args: argparse.Namespace) -> SliceOptions:
    """The options that the flags of add_slice_args describe."""
    return SliceOptions(
        tuple(args.slice),
        args.slice_scale,
        args.slice_overlap,
        args.slice_merge,
        args.slice_match,
        args.slice_threshold,
        args.slice_whole,
        args.box_min_side,
        args.box_max_share,
    )
