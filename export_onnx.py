"""Export checkpoints as ONNX files that are proved equal to PyTorch and run wherever a checkpoint does.

Examples:
    python export_onnx.py -cd logs/myrun -ds data/mine
    python export_onnx.py -c logs/myrun/myrun.pth -o deploy/mine.onnx --with-preprocessing --with-postprocessing mask
    python export_onnx.py -c theirs.onnx -o ours.onnx --mean 123.7 116.3 103.5 --std 58.4 57.1 57.4 --class-list 255

A file takes any batch, height and width: it pads to the sides that the network needs and cuts the result again. It is
written only after it gave what PyTorch gives. Its metadata hold the whole description of the network, so that
validate.py and predict.py take it in place of the checkpoint. report.json beside it holds the figures of the table. An
ONNX file of another project becomes such a file when flags say what is not in it.
"""

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cli

if TYPE_CHECKING:
    from checkpoint import ModelConfig
    from export_file import Export, Source
    from export_graph import Shell
    from export_measure import Tile
    from foreign_onnx import Facts

OPSETS = (13, 23)
REPORT = "report.json"


def build_parser() -> argparse.ArgumentParser:
    """Flags of export_onnx.py."""
    parser = cli.make_parser("Export checkpoints as ONNX files that are proved equal to PyTorch.")
    cli.add_checkpoint_args(parser, every=True)
    cli.add_threshold_args(parser)
    add_file_args(parser)
    add_quantise_args(parser)
    add_proof_args(parser)
    add_foreign_args(parser)
    return parser


def add_file_args(parser: argparse.ArgumentParser) -> None:
    """Add what the file holds and where it goes."""
    group = parser.add_argument_group("file")
    group.add_argument(
        "-o", "--output", type=Path, metavar="PATH", help="FILE.onnx, or a folder; default: beside the checkpoint"
    )
    group.add_argument(
        "--fixed-size",
        nargs="+",
        type=cli.positive_int,
        metavar="N",
        help="one image of this side, or height and width",
    )
    cli.add_switch(group, "--with-preprocessing", help="take raw pixels (N, H, W, C); normalisation is in the file")
    group.add_argument(
        "--input-dtype", choices=("uint8", "uint16", "float32"), help="type of raw pixels; default: the training's"
    )
    group.add_argument(
        "--with-postprocessing",
        nargs="?",
        const="probabilities",
        choices=("probabilities", "mask"),
        help="give probabilities, or a mask of class indices, in place of logits",
    )
    group.add_argument("--opset", type=opset, default=18, metavar="N", help="version of ONNX's operators, 13 to 23")
    cli.add_switch(group, "--torchscript", help="also write FILE.pt, the same as TorchScript")
    cli.add_switch(group, "--replace", help="replace a file that is no export of Tessera")


def add_quantise_args(parser: argparse.ArgumentParser) -> None:
    """Add what is written in fewer bits, and when it is kept."""
    group = parser.add_argument_group("fewer bits")
    group.add_argument(
        "--quantize",
        choices=("int8-static", "int8-dynamic", "fp16"),
        help="also write FILE.KIND.onnx, if it is faster and loses little IoU on -ds",
    )
    group.add_argument(
        "--calibration-method",
        choices=("min-max", "entropy", "percentile"),
        default="percentile",
        help="how int8-static finds the range of activations",
    )
    group.add_argument(
        "--max-iou-drop", type=cli.share, default=0.01, metavar="X", help="IoU that may be lost; layers stay in float"
    )
    group.add_argument(
        "--for",
        dest="target",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda: fp16, measured on the GPU; without one it is written as unmeasured",
    )


def add_proof_args(parser: argparse.ArgumentParser) -> None:
    """Add what the file is compared and timed on."""
    group = parser.add_argument_group("proof and report")
    group.add_argument(
        "-ds", "--real-images", type=Path, metavar="DIR", help="real images; with masks the report holds IoU too"
    )
    group.add_argument(
        "--calibration",
        type=Path,
        metavar="DIR",
        help="training images that int8-static looks at; default: those of -ds",
    )
    group.add_argument("--tiles", type=cli.positive_int, default=16, metavar="N", help="images of -ds to try it on")


def add_foreign_args(parser: argparse.ArgumentParser) -> None:
    """Add what an ONNX file of another project does not say about itself."""
    group = parser.add_argument_group("ONNX file of another project, with -c FILE.onnx")
    group.add_argument(
        "--mean",
        nargs="+",
        type=float,
        metavar="X",
        help="of each channel in its training, in units of the pixels, so 255 times that of images of 0 to 1",
    )
    group.add_argument(
        "--std",
        nargs="+",
        type=cli.positive_float,
        metavar="X",
        help="standard deviations likewise",
    )
    group.add_argument(
        "--like", type=Path, metavar="FILE", help="checkpoint or ONNX file whose whole description fits, but for flags"
    )
    cli.add_label_args(group)
    group.add_argument(
        "--image-size",
        type=cli.positive_int,
        nargs="+",
        metavar="S",
        help="it sees whole images resized to this side, or height and width; without it tiles at native scale",
    )
    cli.add_tile_side_args(group)
    group.add_argument(
        "--gives", choices=("logits", "probabilities"), help="what its output holds; default: told by the values"
    )
    group.add_argument("--output-name", default="", metavar="NAME", help="its output; default: the first that fits")
    cli.add_switch(group, "--bgr", help="its channels, --mean and --std are in the order blue, green, red")


def opset(text: str) -> int:
    """Argparse type: a version of ONNX that can be written."""
    number = cli.positive_int(text)
    if not OPSETS[0] <= number <= OPSETS[1]:
        raise argparse.ArgumentTypeError(f"opset {text} cannot be written; expected {OPSETS[0]} to {OPSETS[1]}")
    return number


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, export each checkpoint, print the table."""
    parser = build_parser()
    args = cli.parse(parser, argv)
    with cli.plain_errors(parser, interrupted="files that were finished are whole"):
        failures = run(args)
    cli.exit_with_findings(parser, failures)


def run(args: argparse.Namespace) -> list[str]:
    """Export every checkpoint of the flags; return what went wrong with those of a folder."""
    from export_report import table, write_report

    check_flags(args)
    paths = find_paths(args)
    targets = [find_target(path, args) for path in paths]
    check_targets(paths, targets)
    failures: list[str] = []
    rows: list[dict[str, Any]] = []
    for path, target in zip(paths, targets, strict=True):
        try:
            made = export_one(path, target, args)
        except (OSError, ValueError, RuntimeError) as error:
            if len(paths) == 1:
                raise
            failures.append(f"{path}: {cli.plain_message(error)}")
            continue
        rows += made
        print(write_report(target.parent / REPORT, made))
    if rows:
        print(table(rows))
    return failures


# ----------------------------------------------------------------------------------------------------------------------
# Flags and files


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that do not go together.

    Raises:
        cli.UsageError: see the messages.
    """
    if args.input_dtype and not args.with_preprocessing:
        raise cli.UsageError("--input-dtype is the type of raw pixels: give --with-preprocessing too")
    if args.thres != 0.5 and args.with_postprocessing != "mask":
        raise cli.UsageError("-t decides masks: give --with-postprocessing mask too, or leave it out")
    if args.target == "cuda" and args.quantize not in (None, "fp16"):
        raise cli.UsageError(f"--for cuda writes fp16, found --quantize {args.quantize}: use fp16, or --for cpu")
    blind = False
    if args.target == "cuda":
        from onnx_export import runs_on

        blind = not runs_on("cuda")
    if (args.quantize or args.target == "cuda") and not (args.real_images or blind):
        flag = "--quantize" if args.quantize else "--for cuda"
        raise cli.UsageError(f"{flag} needs -ds DIR: images with masks, to see what it costs")
    if args.calibration and args.quantize != "int8-static":
        raise cli.UsageError("--calibration is for --quantize int8-static: give it too, or leave it out")
    check_partners(args)
    if args.fixed_size and len(args.fixed_size) > 2:
        raise cli.UsageError(f"--fixed-size takes a side, or height and width; found {len(args.fixed_size)} numbers")


def check_partners(args: argparse.Namespace) -> None:
    """Refuse flags that would change nothing, for want of another.

    Raises:
        cli.UsageError: names both.
    """
    partners = {
        "calibration_method": (args.quantize == "int8-static", "--quantize int8-static"),
        "max_iou_drop": (bool(args.quantize) or args.target == "cuda", "--quantize KIND"),
        "tiles": (bool(args.real_images), "-ds DIR"),
    }
    parser = build_parser()
    for name, (there, partner) in partners.items():
        if not there and getattr(args, name) != parser.get_default(name):
            raise cli.UsageError(
                f"--{name.replace('_', '-')} does nothing without {partner}: give it too, or leave it out"
            )


def find_paths(args: argparse.Namespace) -> list[Path]:
    """The checkpoints of the flags.

    Raises:
        cli.UsageError: the file is an export already, or flags are for another kind of file. FileNotFoundError: there
            is none.
    """
    from checkpoint import find_checkpoint, list_checkpoints
    from onnx_export import is_ours

    if args.dir:
        return list_checkpoints(args.dir)
    path = args.check_path or find_checkpoint(args.check_dir)
    if path.suffix.lower() == ".onnx":
        if is_ours(path):
            raise cli.UsageError(f"{path} is an export already; expected the checkpoint (.pth) that it was made from")
        check_foreign_flags(path, args)
    else:
        check_no_foreign_flags(path, args)
    return [path]


def check_foreign_flags(path: Path, args: argparse.Namespace) -> None:
    """Refuse what is missing, or cannot be, for an ONNX file of another project.

    Raises:
        cli.UsageError: see the messages.
    """
    from foreign_onnx import describe_ends

    if not args.like and not (args.mean and args.std):
        raise cli.UsageError(
            f"{path} is an ONNX file of another project ({describe_ends(path)}), and nothing says how its images were "
            "normalised: give --mean and --std, a number for each channel in units of the pixels. Of a network for "
            "images divided by 255 they are 255 times its own; where it knows none, --mean 0 0 0 --std 255 255 255. "
            "Or --like CHECKPOINT"
        )
    if bool(args.mean) != bool(args.std) or len(args.mean or ()) != len(args.std or ()):
        counts = f"{len(args.mean or ())} and {len(args.std or ())}"
        raise cli.UsageError(f"--mean and --std have {counts} numbers; expected one of each for each channel")
    if not all(map(math.isfinite, args.mean or ())):
        raise cli.UsageError(f"--mean {' '.join(map(str, args.mean))}: expected finite numbers")
    if args.output is None:
        raise cli.UsageError(f"-o FILE.onnx is needed: {path} stays as it is")
    if args.torchscript:
        raise cli.UsageError(f"--torchscript needs a checkpoint, and {path} is an ONNX file: leave it out")
    if len(args.image_size or ()) > 2 or (args.image_size and (args.tile_size or args.overlap is not None)):
        raise cli.UsageError("--image-size takes a side, or height and width, and no --tile-size or --overlap with it")


# Of a description that another file is to be like: what its graph does not say.
LIKE = (
    *("geometry", "mask_threshold", "max_mask_val", "roi_dir", "preprocess", "dtype", "value_range"),
    *("batch", "val_share", "group_pattern", "tissue", "thresholds"),
)
FOREIGN_ALONE = ("mean", "std", "like", "gives", "output_name", "bgr")
FOREIGN_SHARED = ("class_list", "class_names", "ignore_label", "add_dirs", "image_size", "tile_size", "overlap")


def check_no_foreign_flags(path: Path, args: argparse.Namespace) -> None:
    """Refuse flags that say what a checkpoint says itself; those of a settings file of training are named.

    Raises:
        cli.UsageError: see the message.
    """
    alone, shared = (
        [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) not in (None, False, "", [])]
        for names in (FOREIGN_ALONE, FOREIGN_SHARED)
    )
    if alone:
        raise cli.UsageError(
            f"{' '.join(alone)} describe an ONNX file of another project; {path} says all this itself: leave them out"
        )
    if shared:
        print(f"warning: {path} says itself what {' '.join(shared)} would say; not looked at")


def find_target(path: Path, args: argparse.Namespace) -> Path:
    """Where a checkpoint's export goes.

    Raises:
        cli.UsageError: -o names one file for several checkpoints.
        FileExistsError: something else is there.
    """
    from backends import is_onnx

    stem = path.stem if path.suffix in (".pth", ".onnx") else path.name
    out = args.output or path.parent
    if is_onnx(out) and args.dir:
        raise cli.UsageError(f"-o {out} is one file and -d exports all checkpoints of a folder: give a folder")
    if not is_onnx(out) and out.is_file():
        raise cli.UsageError(f"-o {out} is a file whose name does not end in .onnx; expected FILE.onnx or a folder")
    target = out if is_onnx(out) else out / f"{stem}.onnx"
    for place in (target, *beside(target, args)):
        check_place(place, path, replace_any=args.replace)
    return target


def beside(target: Path, args: argparse.Namespace) -> list[Path]:
    """The other files that may be written."""
    from fewer_bits import place_beside

    files = [target.with_suffix(".pt")] if args.torchscript else []
    kind = args.quantize or ("fp16" if args.target == "cuda" else "")
    return [*files, place_beside(target, kind)] if kind else files


def check_place(place: Path, path: Path, *, replace_any: bool) -> None:
    """Refuse to write over what is no export.

    Raises:
        cli.UsageError: the checkpoint is there. FileExistsError: something else is there.
    """
    import torchscript
    from backends import is_onnx
    from onnx_export import read_description

    if place.resolve() == path.resolve():
        raise cli.UsageError(f"{place} would replace {path} itself: give another name or folder to -o")
    if not place.exists() or replace_any:
        return
    reason: Exception | None = None
    if is_onnx(place):
        try:
            read_description(place)
        except (OSError, ValueError) as error:
            reason = error
        else:
            return
    elif torchscript.is_ours(place):
        return
    raise FileExistsError(
        f"{place} is there and is no export of Tessera; expected a free name or an older export. Give another "
        "-o, or --replace to put this one in its place"
    ) from reason


def check_targets(paths: Sequence[Path], targets: Sequence[Path]) -> None:
    """Refuse checkpoints of one name that would go into one file.

    Raises:
        cli.UsageError: names them.
    """
    first: dict[Path, Path] = {}
    for path, target in zip(paths, targets, strict=True):
        other = first.setdefault(target.resolve(), path)
        if other != path:
            raise cli.UsageError(
                f"{other} and {path} would both become {target}; expected a name for each: leave out -o, then each "
                "goes beside its checkpoint, or export them one by one with -c and -o"
            )


def shell_of(args: argparse.Namespace, config: "ModelConfig") -> "Shell":
    """What goes around the network, from the flags.

    Raises:
        cli.UsageError: preprocessing that no ONNX operator computes, or a threshold for several classes.
    """
    from export_graph import Shell

    if args.with_preprocessing and config.preprocess:
        raise cli.UsageError(
            f"--with-preprocessing: the network was trained with --preprocess {' '.join(config.preprocess)}, which "
            "cannot be put into the file; leave the flag out, then every command does these steps before it"
        )
    threshold = cli.pick_threshold(args.thres, config.thresholds, config.num_logits)
    pixels = (args.input_dtype or config.dtype) if args.with_preprocessing else ""
    output = args.with_postprocessing or ("probabilities" if config.activation == "none" else "logits")
    return Shell(pixels, output, threshold, fixed_size(args))


def fixed_size(args: argparse.Namespace) -> tuple[int, int] | None:
    """The fixed size of the flags; None: any."""
    return (args.fixed_size[0], args.fixed_size[-1]) if args.fixed_size else None


# ----------------------------------------------------------------------------------------------------------------------
# Export


def export_one(path: Path, target: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Export, prove, write and measure one checkpoint; returns the rows of its table."""
    from export_file import (
        describe_outside,
        describe_proof,
        describe_source,
        describe_way,
        doubts,
        load_source,
        make_export,
        make_script,
    )
    from export_graph import fit_config
    from export_measure import load_tiles
    from export_report import measure
    from fewer_bits import BitOptions, write_in_fewer_bits
    from image_io import atomic_write

    source, size = adopt_file(path, args) if path.suffix.lower() == ".onnx" else (load_source(path), fixed_size(args))
    shell = replace(shell_of(args, source.config), size=size)
    print(describe_source(source))
    fitted = fit_config(source.config, shell.size) if shell.size else source.config
    for text in doubts(source.config, fitted):
        print(f"warning: {text}")
    tiles = load_tiles(args.real_images, fitted, args.tiles, say=print) if args.real_images else []
    check_pixels(tiles, shell)
    pixels = [tile.pixels for tile in tiles]
    made = make_export(source, shell, args.opset, pixels)
    if "fixed_because" in made.metadata:
        only = made.metadata["size"]
        print(f"warning: free sides do not work ({made.metadata['fixed_because']}); exported for {only} alone")
    exports = {"onnx": target}
    with atomic_write(target) as file:
        file.write(made.model)
    print(f"{target}: {describe_outside(made.shell)}, {describe_way(made)}; {describe_proof(made.proof)}")
    if args.torchscript:
        exports["torchscript"] = target.with_suffix(".pt")
        content = make_script(source, made, pixels)
        with atomic_write(exports["torchscript"]) as file:
            file.write(content)
        print(f"{exports['torchscript']}: TorchScript, the same proof")
    if args.quantize or args.target == "cuda":
        kind = args.quantize or "fp16"
        options = BitOptions(kind, args.target, args.max_iou_drop, args.calibration_method)
        place = write_in_fewer_bits(target, source.config, made, tiles, calibration_tiles(args, made), options, print)
        exports |= {kind: place} if place else {}
    return measure(source, exports, made, tiles)


def adopt_file(path: Path, args: argparse.Namespace) -> tuple["Source", tuple[int, int] | None]:
    """An ONNX file of another project with a description from the flags, and the only size that it takes, if any.

    Raises:
        cli.UsageError, ValueError: file and flags do not go together; the message says which flag to give.
    """
    from export_file import foreign_source, own_size
    from foreign_onnx import adopt
    from predictor import geometry_from_flags

    like, facts = foreign_facts(args)
    adopted = adopt(path, facts)
    for note in adopted.notes:
        print(f"{path}: {note}")
    config = adopted.config
    if like:
        config = replace(config, **{name: getattr(like, name) for name in LIKE})
    if args.image_size:
        size = args.image_size[0], args.image_size[-1]
        config = replace(config, geometry=replace(config.geometry, kind="resize", size=size))
    flags = argparse.Namespace(tile_size=args.tile_size, overlap=args.overlap, halo=None, blend=None, tta=None)
    config = replace(config, geometry=geometry_from_flags([config], flags)[0], dtype=args.input_dtype or config.dtype)
    size_alone = adopted.size or (own_size(config) if adopted.single else None)
    return foreign_source(path, adopted, config), size_alone


def foreign_facts(args: argparse.Namespace) -> tuple["ModelConfig | None", "Facts"]:
    """What the flags say about a file of another project, and the description that it is to be like."""
    from backends import load_config
    from classes import ClassMap, ClassOptions, resolve_classes
    from foreign_onnx import Facts, bgr_order

    like = load_config(args.like) if args.like else None
    classes = ClassMap.from_config(like) if like else None
    if args.class_list or args.class_names or args.ignore_label is not None:
        names = tuple(args.class_names or ())
        classes = resolve_classes(ClassOptions(args.class_list or "nonzero", names, args.ignore_label), Counter())
    mean, std = args.mean, args.std
    if like and not mean:
        order = bgr_order(len(like.mean)) if args.bgr else range(len(like.mean))
        mean, std = [like.mean[place] for place in order], [like.std[place] for place in order]
    add_dirs = tuple(args.add_dirs) or (like.add_dirs if like else ())
    facts = Facts(
        tuple(mean), tuple(std), classes, add_dirs, args.gives or "", args.bgr, args.output_name, fixed_size(args)
    )
    return like, facts


def check_pixels(tiles: Sequence["Tile"], shell: "Shell") -> None:
    """Refuse real images that a file with preprocessing could not take.

    Raises:
        ValueError: they are of another type.
    """
    import numpy as np

    for tile in tiles:
        if shell.pixels and not np.can_cast(tile.pixels.dtype, shell.pixels):
            raise ValueError(
                f"-ds: {tile.name} has {tile.pixels.dtype} pixels and the file is to take {shell.pixels}; give "
                f"--input-dtype {tile.pixels.dtype}, or images as the file will see them"
            )


# ----------------------------------------------------------------------------------------------------------------------
# Fewer bits


def calibration_tiles(args: argparse.Namespace, made: "Export") -> list["Tile"]:
    """Training tiles for int8; none where nothing is calibrated."""
    from export_measure import load_tiles

    if args.quantize != "int8-static":
        return []
    folder = args.calibration or args.real_images
    if not args.calibration and folder.resolve().name in ("train", "val", "test"):
        print(
            f"warning: int8 is calibrated on the images of {folder} that it is scored on, which flatters it; give "
            "--calibration DIR with training images, or -ds with a folder that holds train/ and val/"
        )
    return load_tiles(folder, made.config, args.tiles, split="train", say=print)


if __name__ == "__main__":
    main()
