"""What can be set about the SAM engine, and its flags. Imports nothing heavy, so that --help stays quick."""

import argparse
from dataclasses import dataclass, fields
from pathlib import Path

import cli

SAM_TYPES = ("auto", "vit_b", "vit_l", "vit_h", "sam2")


@dataclass(frozen=True)
class SamOptions:
    """Settings of the SAM engine; None is automatic.

    Attributes:
        sam_type: what the checkpoint must be; auto takes what it is.
        points: give the middle of each box as a point too.
        chunk: prompts decoded at a time; memory grows with it.
        window: side in pixels of the windows that large pictures are encoded in; 0 encodes the picture whole.
        min_iou: masks with a lower predicted IoU are dropped; None: 0.88 without boxes, 0 with them.
        min_stability: the same for the stability; None: 0.95 without boxes, 0 with them.
        max_share: boxes and masks whose box covers more than this share of the picture are dropped.
        narrowing: rim to remove, as a share of each object's inscribed radius.
        grow_back: grow narrowed objects back along the edges of the picture.
        points_per_side: of the grid of points where there are no boxes.
        cache: folder of encoded pictures; None: sam/ in the user's cache.
        cache_gb: size it may have; 0 keeps nothing.
    """

    sam_type: str = "auto"
    points: bool = False
    chunk: int = 16
    window: int = 0
    min_iou: float | None = None
    min_stability: float | None = None
    max_share: float = 0.9
    narrowing: float = 0.0
    grow_back: bool = True
    points_per_side: int = 32
    cache: Path | None = None
    cache_gb: float = 4.0


SPACE: dict[str, list[bool] | tuple[float, float, str]] = {
    "sam_points": [False, True],
    "sam_min_iou": (0.3, 0.95, "linear"),
    "sam_min_stability": (0.3, 0.97, "linear"),
    "sam_max_share": (0.02, 0.9, "log"),
}


def add_sam_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the SAM engine, one for each field of SamOptions, and --sam for the weights."""
    group = parser.add_argument_group("sam")
    group.add_argument(
        "--sam",
        type=Path,
        metavar="PATH",
        help="weights of SAM: .pth of segment-anything (vit_b, vit_l, vit_h), or a folder of transformers (SAM, SAM 2)",
    )
    group.add_argument("--sam-type", choices=SAM_TYPES, default="auto", help="what the weights must be")
    cli.add_switch(group, "--sam-points", help="give SAM the middle of each box as a point too")
    group.add_argument(
        "--sam-chunk", type=cli.positive_int, default=16, metavar="N", help="prompts decoded at a time; less: memory"
    )
    group.add_argument(
        "--sam-window",
        type=cli.natural,
        default=0,
        metavar="N",
        help="encode large pictures in windows of N pixels too, for small objects; 0: whole pictures alone",
    )
    group.add_argument(
        "--sam-min-iou",
        type=cli.share,
        metavar="X",
        help="drop masks that SAM itself expects to be worse; default: 0.88 without a detector, 0 with one",
    )
    group.add_argument(
        "--sam-min-stability",
        type=cli.share,
        metavar="X",
        help="drop masks that change more with SAM's threshold; default: 0.95 without a detector, 0 with one",
    )
    group.add_argument(
        "--sam-max-share", type=cli.share, default=0.9, metavar="X", help="drop what covers more of the picture"
    )
    group.add_argument(
        "--sam-narrowing",
        type=cli.share,
        default=0.0,
        metavar="X",
        help="remove rims as wide as this share of each object's inscribed radius; below 1",
    )
    cli.add_switch(
        group, "--sam-grow-back", default=True, help="grow narrowed objects back along the edges of the picture"
    )
    group.add_argument(
        "--sam-points-per-side",
        type=cli.positive_int,
        default=32,
        metavar="N",
        help="without a detector SAM is asked at N x N points",
    )
    group.add_argument("--sam-cache", type=Path, metavar="DIR", help="where encoded pictures are kept; default: cache")
    group.add_argument(
        "--sam-cache-gb", type=cli.not_negative, default=4.0, metavar="GB", help="size of that folder; 0 keeps none"
    )


def options_from(args: argparse.Namespace) -> SamOptions:
    """The options behind the flags of add_sam_args.

    Raises:
        UsageError: a narrowing that leaves nothing.
    """
    if args.sam_narrowing >= 1:
        raise cli.UsageError("--sam-narrowing 1 leaves nothing of any object; expected a number below 1, such as 0.2")
    names = [field.name for field in fields(SamOptions)]
    return SamOptions(**{name: getattr(args, name if name == "sam_type" else f"sam_{name}") for name in names})
