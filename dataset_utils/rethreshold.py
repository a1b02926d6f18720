"""Make masks and objects anew from saved probabilities, with another threshold and other filters; no network runs.

Example:
    python predict.py -cd logs/vessels -dir pictures -o results --save mask,prob
    python -m dataset_utils.rethreshold -r results -o results_04 -t 0.4 --closing 3 --relative-area 4

Probabilities are read from <results>/raw (16 bit, 65535 is 1), as predict.py --save prob and validate.py --raw write
them. Pictures of any size are read and written in bands.
"""

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cli

if TYPE_CHECKING:
    import numpy as np

    from checkpoint import ModelConfig
    from results import ResultOptions
    from slide_io import Grid

KINDS = ("mask", "labels", "geojson", "rle")
BAND_ROWS = 512


def build_parser() -> argparse.ArgumentParser:
    """Flags of dataset_utils.rethreshold."""
    parser = cli.make_parser("Masks and objects from saved probabilities, with another threshold and other filters.")
    parser.add_argument_group("probabilities").add_argument(
        "-r", "--results", type=Path, required=True, metavar="DIR", help="folder that holds raw/"
    )
    cli.add_threshold_args(parser)
    cli.add_filter_args(parser)
    cli.add_result_args(parser, kinds=KINDS, required=True)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Decide again about every picture in raw/."""
    parser = build_parser()
    args = cli.parse(parser, argv)
    with cli.plain_errors(parser, interrupted="the same command begins again with the first picture that is not done"):
        failures = run(args)
    if failures:
        listed = "\n".join(f"  - {message}" for message in failures)
        parser.exit(1, f"{parser.prog}: error: {len(failures)} findings, the rest is done:\n{listed}\n")


def run(args: argparse.Namespace) -> list[str]:
    """Go through raw/; return what went wrong."""
    from predictor import list_pictures, result_name
    from results import ResultOptions, existing_files, merge_run_lengths

    if args.output_dir.resolve() == args.results.resolve():
        raise cli.UsageError(f"-o {args.output_dir} is the folder of the results themselves; give another one")
    if not (args.results / "raw").is_dir():
        raise FileNotFoundError(
            f"{args.results} has no raw/ with probabilities; predict.py --save prob and validate.py --raw write it"
        )
    paths = list_pictures([str(args.results / "raw")])
    config, rows = read_description(args.results, paths)
    threshold = cli.pick_threshold(args.thres, config.thresholds)
    if config.num_logits > 1 and threshold != 0.5:
        raise cli.UsageError(f"-t {threshold:g} is for one class; of several the likeliest wins, without a threshold")
    options = ResultOptions(
        args.output_dir, args.save, args.format, threshold, cli.filters(args), args.decimal, args.geo
    )
    names = [result_name(path) for path in paths]
    others = [file for name in names for file in existing_files(args.output_dir, name, args.save)]
    if others and not args.overwrite:
        raise cli.UsageError(
            f"{len(others)} results are in the way, first: {others[0]}; use --overwrite, or another -o"
        )
    failures: list[str] = []
    for name, path in zip(names, paths, strict=True):
        try:
            failures += decide_again(path, name, config, options, rows.get(name, {}))
        except (OSError, ValueError, RuntimeError) as error:
            failures.append(f"{path}: {cli.plain_message(error)}")
    if "rle" in args.save:
        merge_run_lengths(args.output_dir, names)
    print(f"threshold {threshold:g}, {len(names)} pictures, results in {args.output_dir}")
    return failures


def read_description(folder: Path, paths: Sequence[Path]) -> tuple["ModelConfig", dict[str, Any]]:
    """What the classes are, and what predict.py noted about each picture.

    Without predict.json, as beside the files of validate.py, one band of probabilities means one class.

    Raises:
        ValueError: several bands, and nothing says what they are.
    """
    from checkpoint import Geometry, ModelConfig, config_from_dict
    from results import DESCRIPTION, RECORD, read_record
    from slide_io import open_slide

    if (folder / DESCRIPTION).is_file():
        described = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        return config_from_dict(described["config"]), read_record(folder / RECORD)
    with open_slide(paths[0]) as first:
        if first.channels > 1:
            raise ValueError(
                f"{paths[0]} has {first.channels} bands and {folder} has no {DESCRIPTION} that names their classes; "
                "make the probabilities with predict.py --save prob"
            )
    names = ("background", "object")
    return ModelConfig("", "", (), names, ("probability",), (0.0,), (1.0,), Geometry("crops", (0, 0))), {}


def decide_again(
    path: Path, name: str, config: "ModelConfig", options: "ResultOptions", row: dict[str, Any]
) -> list[str]:
    """Write the results of one picture; return what could not be decoded."""
    from results import Frame, Results
    from slide_io import open_slide

    with open_slide(path) as slide:
        grid = slide.grid()
        if grid.channels != config.num_logits:
            raise ValueError(f"it has {grid.channels} bands, the description names {config.num_logits}")
        frame = Frame(name, slide.height, slide.width, row.get("scale", 1.0), slide.mpp_xy, slide.geo)
        status = path.stat()
        facts = [str(path.resolve()), status.st_size, status.st_mtime_ns, repr(options)]
        with Results(frame, config, options, hashlib.sha256(json.dumps(facts).encode()).hexdigest()) as results:
            for probs in read_bands(grid, results.first_row):
                results.add(probs)
            summary = results.finish()
        print(f"{name}: {summary.text()}")
        return [f"{name}: {message}" for message in grid.damage]


def read_bands(grid: "Grid", first_row: int) -> Iterator["np.ndarray"]:
    """Probabilities (K, h, W) float32 from a row on."""
    import numpy as np

    top = np.float32(np.iinfo(grid.dtype).max)
    for row in range(first_row, grid.height, BAND_ROWS):
        values = grid.read(row, 0, min(BAND_ROWS, grid.height - row), grid.width)
        yield np.ascontiguousarray(values.transpose(2, 0, 1)) / top


if __name__ == "__main__":
    main()
