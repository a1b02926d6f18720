"""Which frames of videos are taken, and the flags of that. Imports nothing heavy."""

import argparse
from dataclasses import dataclass

import cli


@dataclass(frozen=True)
class FrameOptions:
    """Which frames of a video are taken, and how they are stored.

    Attributes:
        step: take every step-th frame.
        fps: take this many frames for each second instead; all frames where the video has fewer.
        skip_similar: leave a frame out when no spot of it (1/64 of its longer side) differs from the last one taken by
            more grey levels in any colour; 0 leaves out exact repetitions alone. None: keep all.
        suffix: ".png", or ".jpg" for a tenth of the disk space and small losses.
    """

    step: int = 1
    fps: float | None = None
    skip_similar: float | None = None
    suffix: str = ".png"

    def __post_init__(self) -> None:
        if self.step < 1 or (self.fps is not None and not 0 < self.fps < float("inf")):
            raise ValueError(f"step {self.step} and fps {self.fps}: expected a step of 1 or more, or frames per second")
        if self.step > 1 and self.fps is not None:
            raise ValueError(f"step {self.step} and fps {self.fps:g} exclude each other; expected one of the two")
        if self.skip_similar is not None and self.skip_similar < 0:
            raise ValueError(f"skip_similar is {self.skip_similar}, expected grey levels of 0 or more")
        if self.suffix not in (".png", ".jpg"):
            raise ValueError(f"frames were to be written as {self.suffix!r}, expected .png or .jpg")


def add_frame_args(parser: argparse.ArgumentParser) -> None:
    """Add which frames of a video are taken."""
    group = parser.add_argument_group("frames of videos")
    which = group.add_mutually_exclusive_group()
    which.add_argument("--step", type=cli.positive_int, default=1, metavar="N", help="take every N-th frame")
    which.add_argument("--fps", type=cli.positive_float, metavar="X", help="take X frames for each second instead")
    group.add_argument(
        "--skip-similar",
        type=cli.not_negative,
        metavar="X",
        help="leave out frames in which no spot (1/64 of the longer side) differs by more than X grey levels from the "
        "last one taken; 4 suits most cameras",
    )
