"""Take pictures out of videos: every N-th frame or so many a second, named so that they can be annotated and traced.

Example:
    python -m dataset_utils.video_frames -i videos -o frames --fps 2 --skip-similar 4
    python annotate.py --images frames

Frames are named <video>_<frame number>, and frames.csv says which is which and when it was. Videos are decoded from
their beginning, without seeking. A run that was killed goes on with the same command and ends with the same files.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import cli
from annotation.frame_options import FrameOptions, add_frame_args
from annotation.video import (
    VideoError,
    extract_frames,
    list_videos,
    write_manifest,
)


def build_parser() -> argparse.ArgumentParser:
    """Flags of dataset_utils.video_frames."""
    parser = cli.make_parser("Take pictures out of videos, every N-th frame or so many a second.")
    group = parser.add_argument_group("videos")
    group.add_argument(
        "-i", "--videos", type=Path, nargs="+", required=True, metavar="PATH", help="videos, or folders with videos"
    )
    group.add_argument("-o", "--output-dir", type=Path, required=True, metavar="DIR", help="where the frames go")
    add_frame_args(parser)
    group = parser.add_argument_group("files")
    group.add_argument(
        "--format", choices=("png", "jpg"), default="png", help="jpg takes a tenth of the space, with small losses"
    )
    group.add_argument("--decimal", choices=("comma", "dot"), default="comma", help="decimal sign in csv files")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Go through the videos; those that cannot be read are named at the end."""
    parser = build_parser()
    args = cli.parse(parser, argv)
    with cli.plain_errors(parser, interrupted="the same command goes on"):
        findings = run(args)
    cli.exit_with_findings(parser, findings)


def run(args: argparse.Namespace) -> list[str]:
    """Write the frames and the manifest; return what went wrong."""
    options = FrameOptions(args.step, args.fps, args.skip_similar, f".{args.format}")
    videos = list_videos(args.videos)
    findings: list[str] = []
    total = 0
    for path in videos:
        try:
            extracted = extract_frames(path, args.output_dir, options)
        except VideoError as error:
            findings.append(str(error))
            print(f"{path.name}: failed")
            continue
        total += len(extracted.rows)
        findings += extracted.findings
        print(f"{path.name}: {len(extracted.rows)} frames{', already done' if extracted.was_done else ''}")
        write_manifest(args.output_dir, args.decimal)
    print(f"{total} frames of {len(videos)} videos in {args.output_dir}")
    return findings


if __name__ == "__main__":
    main()
