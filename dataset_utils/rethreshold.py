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
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cli

if TYPE_CHECKING:
    import numpy as np

    from checkpoint import ModelConfig
    from result_record import Record
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
    with cli.plain_errors(parser, interrupted="the same command goes on with the first picture that is not done"):
        failures = run(args)
    cli.exit_with_findings(parser, failures)


def run(args: argparse.Namespace) -> list[str]:
    """Go through raw/; return what went wrong."""
    from image_io import file_stem
    from pictures import list_pictures
    from result_record import find_done, merge_run_lengths
    from results import ResultOptions, filters_of
    from spool import FULL

    if args.output_dir.resolve() == args.results.resolve():
        raise cli.UsageError(f"-o {args.output_dir} is the folder of the results themselves; give another one")
    if not (args.results / "raw").is_dir():
        raise FileNotFoundError(
            f"{args.results} has no raw/ with probabilities; predict.py --save prob and validate.py --raw write it"
        )
    paths = list_pictures([str(args.results / "raw")])
    config, rows = read_description(args.results, paths)
    threshold = cli.pick_threshold(args.thres, config.thresholds, config.num_logits)
    options = ResultOptions(
        args.output_dir, args.save, args.format, threshold, filters_of(args), args.decimal, args.geo
    )
    pictures = {file_stem(path): path for path in paths}
    digests = {name: picture_digest(path, options, rows.get(name, [])) for name, path in pictures.items()}
    done = find_done(args.output_dir, digests, args.save, overwrite=args.overwrite, report=print)
    for name in sorted(done):
        print(f"{name}: already done")
    failures: list[str] = []
    for name in sorted(pictures.keys() - done):
        try:
            failures += decide_again(pictures[name], name, config, options, digests[name], rows.get(name, []))
        except (OSError, ValueError, RuntimeError) as error:
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            text = cli.plain_message(error)
            failures.append(text if str(pictures[name]) in text else f"{pictures[name]}: {text}")
            print(f"{name}: failed")
    if "rle" in args.save:
        merge_run_lengths(args.output_dir)
    print(f"threshold {threshold:g}, {len(pictures)} pictures, results in {args.output_dir}")
    return failures


def picture_digest(path: Path, options: "ResultOptions", rows: Sequence[dict[str, Any]]) -> str:
    """Of the file of probabilities and of every flag but the kinds: the same digest gives the same results."""
    status = path.stat()
    choices = [asdict(replace(options, folder=Path(), kinds=())), place_of(rows)]
    facts = [str(path.resolve()), status.st_size, status.st_mtime_ns, choices]
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()


def place_of(rows: Sequence[dict[str, Any]]) -> tuple[float, tuple[float, float] | None]:
    """Level-0 pixels for each pixel of the probabilities and micrometres for each, as predict.py noted them."""
    row = next((row for row in rows if "prob" in row["kinds"]), {})
    return row.get("scale", 1.0), row.get("mpp") and tuple(row["mpp"])


def read_description(folder: Path, paths: Sequence[Path]) -> tuple["ModelConfig", "Record"]:
    """What the classes are, and what predict.py noted about each picture.

    Without predict.json, as beside the files of validate.py, one band of probabilities means one class.

    Raises:
        ValueError: several bands, and nothing says what they are.
    """
    from checkpoint import Geometry, ModelConfig, config_from_dict
    from result_record import DESCRIPTION, RECORD, read_record
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
    path: Path,
    name: str,
    config: "ModelConfig",
    options: "ResultOptions",
    digest: str,
    rows: Sequence[dict[str, Any]],
) -> list[str]:
    """Write the results of one picture; return what could not be decoded."""
    from result_record import begin_record, end_record
    from results import Frame, Results
    from slide_io import Georeference, open_slide

    with open_slide(path) as slide:
        grid = slide.grid()
        if grid.channels != config.num_logits:
            raise ValueError(f"{path} has {grid.channels} bands, the description names {config.num_logits} classes")
        scale, mpp = place_of(rows)
        geo = slide.geo and Georeference(tuple(slide.geo.scaled(1 / scale)))  # of level 0, as in predict.py
        frame = Frame(name, slide.height, slide.width, scale, mpp or slide.mpp_xy, geo)
        with Results(frame, config, options, digest) as results:
            begin_record(options.folder, name, digest, options.kinds, {"scale": scale, "mpp": frame.mpp})
            for probs in read_bands(grid, results.first_row):
                results.note_damage(grid.damage)
                results.add(probs)
            summary = results.finish()
            facts = {"damage": results.damage, "scale": scale, "mpp": frame.mpp}
            end_record(options.folder, name, digest, options.kinds, summary.files, facts, durable=False)
            results.remove()
        print(f"{name}: {summary.text()}")
        return results.damage


def read_bands(grid: "Grid", first_row: int) -> Iterator["np.ndarray"]:
    """Probabilities (K, h, W) float32 from a row on."""
    import numpy as np

    top = np.float32(np.iinfo(grid.dtype).max)
    for row in range(first_row, grid.height, BAND_ROWS):
        values = grid.read(row, 0, min(BAND_ROWS, grid.height - row), grid.width)
        yield np.ascontiguousarray(values.transpose(2, 0, 1)) / top


if __name__ == "__main__":
    main()
