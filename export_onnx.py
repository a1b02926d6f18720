"""Export checkpoints as ONNX files that are proved equal to PyTorch and run wherever a checkpoint does.

Examples:
    python export_onnx.py -cd logs/myrun -ds data/mine
    python export_onnx.py -c logs/myrun/myrun.pth -o deploy/mine.onnx --with-preprocessing --with-postprocessing mask

A file takes any batch, height and width: it pads to the sides that the network needs and cuts the result again. It is
written only after it gave what PyTorch gives. Its metadata hold the whole description of the network, so that
validate.py and predict.py take it in place of the checkpoint. report.json beside it holds the figures of the table.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cli

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from checkpoint import ModelConfig
    from export_graph import Shell
    from export_measure import Tile
    from export_proof import Proof

OPSETS = (13, 23)
ORIGIN = "export_onnx.py"
REPORT = "report.json"


def build_parser() -> argparse.ArgumentParser:
    """Flags of export_onnx.py."""
    parser = cli.make_parser("Export checkpoints as ONNX files that are proved equal to PyTorch.")
    cli.add_checkpoint_args(parser, every=True)
    cli.add_threshold_args(parser)
    add_file_args(parser)
    add_quantise_args(parser)
    add_proof_args(parser)
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
        default="min-max",
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
        help="training images that --quantize looks at; default: those of -ds",
    )
    group.add_argument("--tiles", type=cli.positive_int, default=16, metavar="N", help="images of -ds to try it on")


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
    check_flags(args)
    paths = find_paths(args)
    targets = [find_target(path, args) for path in paths]
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
        write_report(target.parent / REPORT, made)
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
    if args.quantize and args.target == "cpu" and not args.real_images:
        raise cli.UsageError("--quantize needs -ds DIR: images with masks, to see what it costs")
    if args.calibration and not args.quantize:
        raise cli.UsageError("--calibration is for --quantize: give it too, or leave it out")
    if args.fixed_size and len(args.fixed_size) > 2:
        raise cli.UsageError(f"--fixed-size takes a side, or height and width; found {len(args.fixed_size)} numbers")


def find_paths(args: argparse.Namespace) -> list[Path]:
    """The checkpoints of the flags.

    Raises:
        cli.UsageError: the file is an export already. FileNotFoundError: there is none.
    """
    from checkpoint import find_checkpoint, list_checkpoints

    if args.dir:
        return list_checkpoints(args.dir)
    path = args.check_path or find_checkpoint(args.check_dir)
    if path.suffix.lower() == ".onnx":
        raise cli.UsageError(f"{path} is an ONNX file already; expected the checkpoint (.pth) that it was made from")
    return [path]


def find_target(path: Path, args: argparse.Namespace) -> Path:
    """Where a checkpoint's export goes.

    Raises:
        cli.UsageError: -o names one file for several checkpoints.
        FileExistsError: something else is there.
    """
    from backends import is_onnx
    from onnx_export import read_description

    stem = path.stem if path.suffix == ".pth" else path.name
    out = args.output or path.parent
    if is_onnx(out) and args.dir:
        raise cli.UsageError(f"-o {out} is one file and -d exports all checkpoints of a folder: give a folder")
    if not is_onnx(out) and out.is_file():
        raise cli.UsageError(f"-o {out} is a file whose name does not end in .onnx; expected FILE.onnx or a folder")
    target = out if is_onnx(out) else out / f"{stem}.onnx"
    if target.exists() and not args.replace:
        try:
            read_description(target)
        except (OSError, ValueError) as error:
            raise FileExistsError(
                f"{target} is there and is no export of Tessera; expected a free name or an older export. Give another "
                "-o, or --replace to put this one in its place"
            ) from error
    return target


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
    return Shell(pixels, args.with_postprocessing or "logits", threshold, pick_size(args, config, forced=False))


def pick_size(args: argparse.Namespace, config: "ModelConfig", *, forced: bool) -> tuple[int, int] | None:
    """The fixed size of the flags, or with `forced` that of the network's tiles; None: any."""
    if args.fixed_size:
        return args.fixed_size[0], args.fixed_size[-1]
    geometry = config.geometry
    if not forced:
        return None
    return geometry.size if geometry.kind == "resize" else (geometry.tile, geometry.tile)


# ----------------------------------------------------------------------------------------------------------------------
# Export


@dataclass(frozen=True)
class Export:
    """A finished file that is not written yet. bare: the network alone; config: what the metadata say."""

    model: bytes
    bare: bytes
    config: "ModelConfig"
    shell: "Shell"
    proof: "Proof"
    metadata: dict[str, str]


def export_one(path: Path, target: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Export, prove, write and measure one checkpoint; returns the rows of its table."""
    from backends import file_digest, load_network
    from export_graph import fit_config
    from export_measure import load_tiles
    from image_io import atomic_write

    config, network = load_network(path)
    shell = shell_of(args, config)
    print(f"checkpoint {path}: {config.architecture} {config.encoder}, {config.geometry.kind}")
    fitted = fit_config(config, shell.size) if shell.size else config
    tiles = load_tiles(args.real_images, fitted, args.tiles) if args.real_images else []
    check_pixels(tiles, shell)
    made = export_network(network, config, shell, args, tiles, file_digest(path))
    with atomic_write(target) as file:
        file.write(made.model)
    print(
        f"{target}: {describe_outside(made.shell)}, exported by {made.metadata['exporter']}; {proof_line(made.proof)}"
    )
    script = None
    if args.torchscript:
        script = write_script(target.with_suffix(".pt"), network, config, made, tiles)
    smaller = quantised_file(target, config, made, args, tiles) if args.quantize or args.target == "cuda" else {}
    return measure(path, {"onnx": target, **smaller}, network, made, tiles, script)


def export_network(
    network: "nn.Module",
    config: "ModelConfig",
    shell: "Shell",
    args: argparse.Namespace,
    tiles: Sequence["Tile"],
    digest: str,
) -> Export:
    """Export with free sides, or with a fixed size where the flags say so or nothing else works; prove the whole file.

    Raises:
        onnx_export.ExportError: no exporter made a file that agrees.
    """
    import onnx_export

    entries = {"digest": digest, "origin": ORIGIN}
    if shell.size is None:
        try:
            return finish(network, config, shell, args.opset, tiles, entries)
        except onnx_export.ExportError as error:
            size = pick_size(args, config, forced=True)
            assert size is not None
            print(f"warning: free sides do not work ({error}); exporting for {size[0]}x{size[1]} alone")
            shell, entries = replace(shell, size=size), {**entries, "fixed_because": str(error)}
    return finish(network, config, shell, args.opset, tiles, entries)


def finish(
    network: "nn.Module",
    config: "ModelConfig",
    shell: "Shell",
    opset: int,
    tiles: Sequence["Tile"],
    entries: dict[str, str],
) -> Export:
    """Export in one way, put the shell around it and prove it."""
    import onnx_export
    from export_graph import fit_config, frame_of, wrap_network
    from export_proof import ENOUGH_SPREAD, randomise_statistics

    form = onnx_export.Form(opset, frame_of(shell.size, config) if shell.size else None)
    fitted = fit_config(config, shell.size) if shell.size else config
    bare = onnx_export.export_network(network, config, form, **entries)
    metadata = {**onnx_export.read_metadata(bare), **shell.metadata()}
    metadata.pop(onnx_export.DESCRIPTION)
    metadata |= {"tile": str(fitted.geometry.tile), "overlap": str(fitted.geometry.overlap)}
    model = onnx_export.describe(wrap_network(bare, config, shell), fitted, **metadata)
    proof = prove(model, bare, network, config, shell, [tile.pixels for tile in tiles])
    if proof.spread < ENOUGH_SPREAD:
        varied = randomise_statistics(network, config)
        again = onnx_export.export_network(varied, config, form)
        prove(wrap_network(again, config, shell), again, varied, config, shell, ())
    return Export(model, bare, fitted, shell, proof, metadata)


def prove(
    model: bytes, bare: bytes, network: "nn.Module", config: "ModelConfig", shell: "Shell", tiles: Sequence[Any]
) -> "Proof":
    """Prove the file itself, and its logits where it gives something else; the latter are the figures."""
    from export_graph import wrap_network
    from export_proof import model_runner, prove_file

    proof = prove_file(model_runner(model), network, config, shell, tiles)
    if shell.output == "logits":
        return proof
    logits = replace(shell, output="logits")
    return prove_file(model_runner(wrap_network(bare, config, logits)), network, config, logits, tiles)


def describe_outside(shell: "Shell") -> str:
    """What a file takes and gives, in a few words."""
    pixels = f"raw {shell.pixels} (N, H, W, C)" if shell.pixels else "normalised float32 (N, C, H, W)"
    size = f"one image of {shell.size[0]}x{shell.size[1]}" if shell.size else "any size"
    return f"{pixels}, {size}, to {shell.output}"


def proof_line(proof: "Proof") -> str:
    """The proof in a few words."""
    return (
        f"differs by at most {proof.largest:.1e} and on average {proof.mean:.1e} of the logits' spread, which is "
        f"{proof.spread:.2g}; {proof.agreement:.4%} of {proof.pixels} mask pixels agree"
    )


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


def write_script(
    path: Path, network: "nn.Module", config: "ModelConfig", made: Export, tiles: Sequence["Tile"]
) -> Path:
    """Write TorchScript beside the ONNX file, after the same proof."""
    from export_proof import prove_file
    from image_io import atomic_write
    from torchscript import export_script, script_runner

    content = export_script(network, config, made.shell, made.metadata)
    prove_file(script_runner(content), network, config, made.shell, [tile.pixels for tile in tiles])
    with atomic_write(path) as file:
        file.write(content)
    print(f"{path}: TorchScript, the same proof")
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Fewer bits


def quantised_file(
    target: Path, config: "ModelConfig", made: Export, args: argparse.Namespace, tiles: Sequence["Tile"]
) -> dict[str, Path]:
    """Write the network in fewer bits beside its file if that pays; returns variant and file, or nothing.

    Raises:
        cli.UsageError, ValueError: no masks to measure it with, or no tiles to calibrate it on.
    """
    from export_graph import wrap_network
    from image_io import atomic_write
    from onnx_export import DESCRIPTION, describe, read_metadata

    kind = args.quantize or "fp16"
    bare, entries = (
        half_unmeasured(made) if kind == "fp16" and unmeasured(args) else reduce_bits(config, made, args, tiles)
    )
    if bare is None:
        return {}
    metadata = {**read_metadata(bare), **made.shell.metadata(), **entries, "quantised": kind}
    metadata.pop(DESCRIPTION)
    place = target.with_name(f"{target.stem}.{kind}.onnx")
    with atomic_write(place) as file:
        file.write(describe(wrap_network(bare, config, made.shell), made.config, **metadata))
    print(f"{place}: {entries['measured']}")
    return {kind: place}


def unmeasured(args: argparse.Namespace) -> bool:
    """Whether a file for a GPU is asked for and there is none to measure it on."""
    import onnxruntime

    return args.target == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers()


def half_unmeasured(made: Export) -> tuple[bytes, dict[str, str]]:
    """The network in float16, for a GPU that is not here."""
    from quantisation import to_half

    return to_half(made.bare), {"measured": "unmeasured: fp16 for CUDA, and there is no GPU here"}


def reduce_bits(
    config: "ModelConfig", made: Export, args: argparse.Namespace, tiles: Sequence["Tile"]
) -> tuple[bytes | None, dict[str, str]]:
    """The network in fewer bits and what was measured, or nothing with the reason printed."""
    from export_graph import Shell, file_runner, frame_of, pad_to
    from export_measure import load_tiles, pad_tile, score_tiles
    from export_proof import model_runner
    from quantisation import compare_speed, find_vnni, quantise

    size = frame_of(made.shell.size, config) if made.shell.size else None

    def score(model: bytes) -> float:
        forward = file_runner(model_runner(model), config, Shell(size=size))
        iou = score_tiles(forward, tiles, made.config, made.shell.threshold)
        if iou is None:
            raise ValueError(f"--quantize: {args.real_images} has no masks; expected some, to see what fewer bits cost")
        return iou

    chosen = load_tiles(args.calibration or args.real_images, made.config, args.tiles, split="train")
    batches = [pad_tile(tile.pixels, made.config) for tile in chosen]
    batches = [pad_to(batch, size) for batch in batches] if size else batches
    result = quantise(
        made.bare,
        config,
        args.quantize or "fp16",
        calibration=batches,
        measure=score,
        max_drop=args.max_iou_drop,
        method=args.calibration_method,
        race=partial(compare_speed, device=args.target),
    )
    print(f"{args.quantize or 'fp16'} {'kept' if result.kept else 'refused'}: {result.reason}; VNNI: {find_vnni()}")
    figures = f"IoU {result.iou_before:.4f} to {result.iou_after:.4f}, {result.seconds_before:.4f} to "
    entries = {
        "measured": f"{figures}{result.seconds_after:.4f} s on {args.target}",
        "float_layers": " ".join(result.float_layers),
        "vnni": find_vnni(),
    }
    return (result.model if result.kept else None), entries


# ----------------------------------------------------------------------------------------------------------------------
# Report


def measure(
    path: Path,
    exports: dict[str, Path],
    network: "nn.Module",
    made: Export,
    tiles: Sequence["Tile"],
    script: Path | None,
) -> list[dict[str, Any]]:
    """Size, latency of one tile and IoU of the checkpoint and of everything that was made of it."""
    import torch

    from backends import onnx_forward, torch_forward
    from export_measure import make_input, score_tiles, time_calls
    from export_proof import model_runner
    from torchscript import script_runner

    config, shell = made.config, made.shell
    taken = make_input(config, shell, tiles)
    image = make_input(config, replace(shell, pixels=""), tiles)
    torch_run = padded(torch_forward(network, "cpu", config.activation), config, shell)
    forwards = {"torch": torch_run, **{name: onnx_forward(file, "cpu")[1] for name, file in exports.items()}}
    files = {"torch": path, **exports}
    calls: dict[str, Callable[[], object]] = {"torch": partial(torch_run, image)}
    calls |= {name: partial(model_runner(file.read_bytes()), taken) for name, file in exports.items()}
    if script:
        files["torchscript"] = script
        calls["torchscript"] = partial(script_runner(script.read_bytes()), taken)
    seconds = time_calls(calls)
    rows = []
    for name, file in files.items():
        iou = score_tiles(forwards[name], tiles, config, shell.threshold) if name in forwards else None
        rows.append(
            {
                "checkpoint": str(path),
                "file": str(file),
                "variant": name,
                "bytes": file.stat().st_size,
                "seconds": seconds[name],
                "input": list(taken.shape),
                "threads": torch.get_num_threads(),
                "iou": iou,
                "tiles": len(tiles),
                "proof": None if name == "torch" else asdict(made.proof),
                "shell": None if name == "torch" else shell.metadata(),
                "metadata": {key: made.metadata[key] for key in ("exporter", "failed", "opset", "torch", "commit")},
            }
        )
    return rows


def padded(
    forward: Callable[["np.ndarray"], "np.ndarray"], config: "ModelConfig", shell: "Shell"
) -> Callable[["np.ndarray"], "np.ndarray"]:
    """PyTorch on the sides that a file of a fixed size sees, so that both answer the same question."""
    from export_graph import frame_of, pad_to

    if not shell.size:
        return forward
    size = frame_of(shell.size, replace(config, min_side=config.stride))
    return lambda batch: forward(pad_to(batch, size))[..., : batch.shape[2], : batch.shape[3]]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The figures, one line for each file."""
    from export_measure import REPEATS

    lines = [("file", "variant", "MB", f"ms ({REPEATS})", "IoU")]
    for row in rows:
        iou = "-" if row["iou"] is None else f"{row['iou']:.4f}"
        lines.append(
            (Path(row["file"]).name, row["variant"], f"{row['bytes'] / 1e6:.2f}", f"{1000 * row['seconds']:.1f}", iou)
        )
    widths = [max(len(line[place]) for line in lines) for place in range(5)]
    text = ["  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    size = "x".join(map(str, rows[-1]["input"]))
    return "\n".join([*text, f"ms: median of {REPEATS} calls with {size}, in turns, {rows[-1]['threads']} threads"])


def write_report(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the figures; those of other files that an earlier run left there stay.

    A file that is no such report is left alone, and said so.
    """
    from image_io import write_text

    kept: list[dict[str, Any]] = []
    try:
        kept = [row for row in json.loads(path.read_text(encoding="utf-8"))["exports"] if isinstance(row, dict)]
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError):
        print(f"warning: {path} is there and is no report of exports; it stays, the figures are printed alone")
        return
    new = {row["file"] for row in rows}
    exports = [row for row in kept if row.get("file") not in new] + list(rows)
    write_text(path, json.dumps({"exports": exports, "environment": cli.environment()}, indent=2) + "\n")
    print(f"report in {path}")


if __name__ == "__main__":
    main()
