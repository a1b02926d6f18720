"""Which networks export, and how fast an exported one is.

Examples:
    python -m benchmarks.export grid
    python -m benchmarks.export grid --only unet segformer
    python -m benchmarks.export latency --size 512
    python -m benchmarks.export latency -c logs/NAME/NAME.pth

`grid` builds every architecture with every one of ENCODERS, gives it random normalisation statistics, exports it and
proves the file equal to the network; where no file with free sides can be made, one of a fixed size is tried. It lists
what failed and why. `latency` interleaves PyTorch in two layouts, the exported file and its int8 version on noise,
whose values do not change the time; medians count.
"""

import argparse
import copy
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import cli

cli.share_cores()  # as predict.py does, and like there before ONNX Runtime is loaded

from torch import nn  # noqa: E402

from backends import load_network  # noqa: E402
from checkpoint import Geometry, ModelConfig  # noqa: E402
from export_measure import REPEATS, time_calls  # noqa: E402
from export_proof import randomise_statistics  # noqa: E402
from model import ARCHITECTURES, PLAIN_UNET, build_model, shorten_error, stride_and_min_side  # noqa: E402
from networks.plain_unet import PLAIN_WIDTHS  # noqa: E402
from onnx_export import (  # noqa: E402
    ExportError,
    Form,
    export_network,
    make_session,
    read_metadata,
    session_runner,
    usable_threads,
)
from quantisation import METHODS, find_vnni, quantise  # noqa: E402

ENCODERS = ("efficientnet-b0", "resnet18", "mit_b0", "tu-mobilenetv3_small_100", "tu-vit_tiny_patch16_224")
WIDTHS = [(1, 1), (5, 4)]  # channels and classes beside three and one, on two pairs
WIDE_PAIRS = (("unet", "resnet18"), ("deeplabv3+", "efficientnet-b0"))
FIXED_SIDE = 256  # of a file that takes one size only
CALIBRATION = 4  # tiles of noise


@dataclass(frozen=True)
class Case:
    """One network of the grid."""

    architecture: str
    encoder: str
    channels: int = 3
    classes: int = 1

    def __str__(self) -> str:
        more = "" if (self.channels, self.classes) == (3, 1) else f" {self.channels} channels, {self.classes} classes"
        return f"{self.architecture} {self.encoder}{more}"


@dataclass(frozen=True)
class Outcome:
    """What became of a case: `form` is free or a size, or "" without a file; `remark` says why not better.

    `seconds` are those of the processor, with the proof.
    """

    form: str
    exporter: str = ""
    seconds: float = 0.0
    megabytes: float = 0.0
    remark: str = ""


def build_parser() -> argparse.ArgumentParser:
    """Flags of benchmarks.export."""
    parser = cli.make_parser("Which networks export, and how fast the exported one is.")
    parser.add_argument("what", choices=("grid", "latency"), help="which measurement")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="grid: architectures")
    parser.add_argument("--encoders", nargs="+", default=ENCODERS, metavar="NAME", help="grid: encoders")
    parser.add_argument("-c", "--check-path", type=Path, metavar="CKPT", help="latency: a checkpoint")
    parser.add_argument("-m", "--model", default="deeplabv3+", metavar="NAME", help="latency: architecture without -c")
    parser.add_argument("--encoder", default="efficientnet-b0", metavar="NAME", help="latency: its encoder")
    parser.add_argument("--size", type=cli.positive_int, default=512, metavar="S", help="latency: side of the tile")
    parser.add_argument("--method", choices=tuple(METHODS), default="percentile", help="latency: calibration of int8")
    parser.add_argument("--repeats", type=cli.positive_int, default=REPEATS, metavar="N", help="latency: runs of each")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table."""
    args = cli.parse(build_parser(), argv)
    {"grid": grid, "latency": latency}[args.what](args)


# ----------------------------------------------------------------------------------------------------------------------
# Networks


def list_cases(architectures: Sequence[str], encoders: Sequence[str]) -> Iterator[Case]:
    """Every pair, and more channels and classes on WIDE_PAIRS; plain-unet comes with encoders of its own."""
    for architecture in architectures:
        for encoder in PLAIN_WIDTHS if architecture == PLAIN_UNET else encoders:
            yield Case(architecture, encoder)
            if (architecture, encoder) in WIDE_PAIRS:
                yield from (Case(architecture, encoder, *width) for width in WIDTHS)


def make_network(case: Case) -> tuple[nn.Module, ModelConfig]:
    """A network with random weights and statistics, and its description.

    Raises:
        ValueError: smp does not build the pair.
    """
    torch.manual_seed(0)
    names = ("background", *(f"class {number}" for number in range(1, max(2, case.classes))))
    logits = 1 if case.classes == 1 else case.classes
    network = build_model(case.architecture, case.encoder, in_channels=case.channels, num_logits=logits).eval()
    stride, side = stride_and_min_side(case.architecture, case.encoder, network)
    channels = tuple(f"channel {number}" for number in range(case.channels))
    config = ModelConfig(
        *(case.architecture, case.encoder, tuple(range(1, len(names))), names, channels),
        *((0.0,) * case.channels, (1.0,) * case.channels),
        Geometry("crops", (FIXED_SIDE, FIXED_SIDE), FIXED_SIDE, FIXED_SIDE // 4, FIXED_SIDE // 16),
        stride=stride,
        min_side=side,
    )
    return randomise_statistics(network, config), config


# ----------------------------------------------------------------------------------------------------------------------
# Grid


def grid(args: argparse.Namespace) -> None:
    """Export every case; print what came out as soon as it is known, then the failures."""
    failed = []
    print(f"{'network':54}{'sides':>9}  {'exporter':14}{'CPU s':>6}{'MB':>7}")
    for case in list_cases(args.only or ARCHITECTURES, args.encoders):
        found = try_case(case)
        print(
            f"{case!s:54}{found.form or '-':>9}  {found.exporter or '-':14}{found.seconds:6.1f}{found.megabytes:7.1f}",
            flush=True,
        )
        if found.remark:
            failed.append((case, found))
    for case, found in failed:
        print(f"\n{case}: {'no file' if not found.form else found.form}\n  {found.remark}")


def try_case(case: Case) -> Outcome:
    """Export with free sides, then of a fixed size; both are proved by onnx_export."""
    try:
        network, config = make_network(case)
    except ValueError as error:
        return Outcome("", remark=f"not built: {shorten_error(error)}")
    side = max(config.min_side, FIXED_SIDE // config.stride * config.stride)
    remarks: list[str] = []
    begin = time.process_time()
    for name, form in (("free", Form()), (f"{side}x{side}", Form(size=(side, side)))):
        try:
            model = export_network(network, config, form)
        except ExportError as error:
            remarks.append(f"{name}: {shorten_error(error)}")
            continue
        metadata = read_metadata(model)
        remarks += [metadata["failed"]] if metadata["failed"] else []
        seconds = time.process_time() - begin
        return Outcome(name, metadata["exporter"], seconds, len(model) / 1e6, "; ".join(remarks))
    return Outcome("", seconds=time.process_time() - begin, remark="; ".join(remarks))


# ----------------------------------------------------------------------------------------------------------------------
# Latency


def latency(args: argparse.Namespace) -> None:
    """PyTorch, PyTorch with channels last, ONNX Runtime, and that in int8, in turns on one tile."""
    if args.check_path:
        config, network = load_network(args.check_path)
    else:
        network, config = make_network(Case(args.model, args.encoder))
    side = max(config.min_side, args.size // config.stride * config.stride)
    rng = np.random.default_rng(0)
    tiles = [rng.standard_normal((1, len(config.channels), side, side), dtype=np.float32) for _ in range(CALIBRATION)]
    model = export_network(network, config)
    small = _in_int8(model, config, tiles, args.method)
    seconds = time_calls(_calls(network, {"ONNX Runtime": model, "int8 static": small}, tiles[0]), args.repeats)
    print(f"{config.architecture} {config.encoder}, 1x{len(config.channels)}x{side}x{side}, {usable_threads()} threads")
    print(f"int8 products: {find_vnni()}; median of {args.repeats} in turns")
    first, last = seconds["PyTorch"], seconds["PyTorch, channels last"]
    print(f"{'':26}{'ms':>8}{'x PyTorch':>11}{'x ch. last':>12}{'x ONNX':>8}{'MB':>7}")
    for name, value in seconds.items():
        size = {"ONNX Runtime": len(model), "int8 static": len(small)}.get(name)
        ratios = f"{first / value:11.2f}{last / value:12.2f}{seconds['ONNX Runtime'] / value:8.2f}"
        print(f"{name:26}{value * 1e3:8.1f}{ratios}{'' if size is None else f'{size / 1e6:7.1f}'}")


def _in_int8(model: bytes, config: ModelConfig, tiles: Sequence[np.ndarray], method: str) -> bytes:
    """The int8 file with all layers in int8, however fast it is."""
    result = quantise(
        *(model, config, "int8-static"),
        calibration=tiles,
        measure=lambda _: 1.0,
        max_drop=0.0,
        method=method,
        race=lambda *_: (2.0, 1.0),
    )
    if not result.kept:
        raise SystemExit(result.reason)
    return result.model


def _calls(network: nn.Module, files: dict[str, bytes], tile: np.ndarray) -> dict[str, Callable[[], object]]:
    plain = network.eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    image = torch.from_numpy(tile)
    calls: dict[str, Callable[[], object]] = {"PyTorch": functools.partial(_infer, plain, image)}
    turned = copy.deepcopy(network).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    last = image.contiguous(memory_format=torch.channels_last)
    calls["PyTorch, channels last"] = functools.partial(_infer, turned, last)
    for name, model in files.items():
        calls[name] = functools.partial(session_runner(make_session(model, "cpu")), tile)
    return calls


@torch.inference_mode()
def _infer(network: nn.Module, image: torch.Tensor) -> torch.Tensor:
    return network(image)


if __name__ == "__main__":
    main()
