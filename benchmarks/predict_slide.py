"""What the big-image engine costs beside the network: ratios against a peer and a floor, memory, linear time.

Examples:
    python -m benchmarks.predict_slide peer            # needs MONAI: pip install monai
    python -m benchmarks.predict_slide overhead --side 8192
    python -m benchmarks.predict_slide memory --height 30000
    python -m benchmarks.predict_slide sizes

Slides are drawn: a pattern of blobs, tiled, deflate. Networks have random weights, whose values do not change the time.
`peer` interleaves Tessera and MONAI's SlidingWindowInferer on an array in memory. `overhead` compares a whole run with
its forwards alone. `memory` runs a 1x1 convolution over a slide 30,000 pixels wide in a process of its own and reports
its peak, and its time beside reading and computing alone. `sizes` shows that time is linear in pixels.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from scipy.ndimage import gaussian_filter

import cli

cli.share_cores()  # as predict.py does, and like there before PyTorch is imported by what follows

from checkpoint import Geometry, ModelConfig  # noqa: E402
from image_io import normalise  # noqa: E402
from pairing import Pair  # noqa: E402
from postprocess import Filters  # noqa: E402
from predictor import Picture, ReadOptions, TileOptions, plan_picture, predict_picture  # noqa: E402
from results import Frame, ResultOptions, Results  # noqa: E402

PERIOD, TILE = 2048, 512
ALL_KINDS = ("mask", "prob", "labels", "geojson", "rle")


def build_parser() -> argparse.ArgumentParser:
    """Flags of benchmarks.predict_slide."""
    parser = cli.make_parser("Costs of the big-image engine beside the network: ratios, memory, linear time.")
    parser.add_argument("what", choices=("peer", "overhead", "memory", "sizes", "one"), help="which measurement")
    parser.add_argument("--side", type=cli.positive_int, default=2048, metavar="N", help="side of a square image")
    parser.add_argument("--width", type=cli.positive_int, default=30000, metavar="N", help="of the memory run")
    parser.add_argument("--height", type=cli.positive_int, default=30000, metavar="N", help="of the memory run")
    parser.add_argument("--classes", type=cli.positive_int, default=1, metavar="N", help="of the memory run")
    parser.add_argument("--save", default="mask", metavar="KIND,...", help="what is written; all: every kind")
    parser.add_argument("--repeats", type=cli.positive_int, default=3, metavar="N", help="runs of each; medians count")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="for slides and results; default: a temporary one")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table."""
    args = cli.parse(build_parser(), argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        folder = args.folder or Path(scratch)
        {"peer": peer, "overhead": overhead, "memory": memory, "sizes": sizes, "one": one}[args.what](args, folder)


# ----------------------------------------------------------------------------------------------------------------------
# Slides and networks


def draw_pattern(seed: int = 0) -> np.ndarray:
    """Blobs of some 30 pixels on a grainy ground, periodic: (PERIOD, PERIOD, 3) uint8."""
    rng = np.random.default_rng(seed)
    field = gaussian_filter(rng.normal(size=(PERIOD, PERIOD)), 8, mode="wrap")
    field /= field.std()
    light = 170 - 60 * np.tanh(2 * (field - 1)) + rng.normal(scale=1.5, size=field.shape)
    return np.clip(np.stack([light, 0.8 * light, light + 20], axis=2), 0, 255).astype(np.uint8)


def write_slide(path: Path, height: int, width: int) -> Path:
    """A tiled TIFF of the pattern; every tile is encoded once and written as often as it comes."""
    if path.is_file():
        return path
    pattern, across = draw_pattern(), PERIOD // TILE
    encoded: dict[tuple[int, int], bytes] = {}
    for row in range(across):
        for col in range(across):
            tile = pattern[row * TILE : (row + 1) * TILE, col * TILE : (col + 1) * TILE]
            encoded[row, col] = encode(tile)

    def tiles() -> Iterator[bytes]:
        for row in range(-(-height // TILE)):
            for col in range(-(-width // TILE)):
                yield encoded[row % across, col % across]

    tifffile.imwrite(
        path,
        tiles(),
        shape=(height, width, 3),
        dtype=np.uint8,
        tile=(TILE, TILE),
        compression="zlib",
        predictor=True,
        photometric="rgb",
        bigtiff=True,
        metadata=None,
    )
    return path


def encode(tile: np.ndarray) -> bytes:
    """A tile as TIFF stores it: horizontal differences, deflate."""
    import imagecodecs

    return bytes(imagecodecs.zlib_encode(imagecodecs.delta_encode(tile, axis=1).tobytes(), level=6))


def describe(classes: int, tile: int, overlap: int) -> ModelConfig:
    """A description for networks that are not trained."""
    names = ("background", *(f"class {k}" for k in range(1, max(classes, 2))))  # one class: a sigmoid
    labels = tuple(range(1, len(names)))
    geometry = Geometry("crops", (tile, tile), tile, overlap, 0)
    statistics_ = ((150.0, 120.0, 170.0), (30.0, 25.0, 30.0))
    return ModelConfig("bench", "bench", labels, names, ("red", "green", "blue"), *statistics_, geometry)


def pointwise(classes: int) -> Callable[[np.ndarray], np.ndarray]:
    """A 1x1 convolution of PyTorch as the engine's forward; its classes are steps of darkness."""
    import torch

    from backends import torch_forward

    network = torch.nn.Conv2d(3, classes, 1)
    steps = torch.arange(classes) if classes > 1 else torch.ones(1)
    with torch.no_grad():  # logit k is 2 k u - k^2 of a darkness u, so class k wins for u around k
        network.weight.copy_((-2.2 * 2 / 3 * steps).reshape(-1, 1, 1, 1).expand_as(network.weight))
        network.bias.copy_(2.2 * steps - steps**2)  # type: ignore[union-attr]
    return torch_forward(network.to(memory_format=torch.channels_last), "cpu")  # type: ignore[call-overload]


# ----------------------------------------------------------------------------------------------------------------------
# One run and its parts


def result_options(folder: Path, save: str) -> ResultOptions:
    """Kinds by name; `all` also filters objects."""
    kinds = ALL_KINDS if save == "all" else tuple(save.split(","))
    filters = Filters(closing=3, fill_holes=50, min_area=20) if set(kinds) & {"labels", "geojson"} else Filters()
    return ResultOptions(folder, kinds, "ome", filters=filters)


def run_slide(
    path: Path, config: ModelConfig, forward: Callable[[np.ndarray], np.ndarray], options: ResultOptions, batch: int = 1
) -> tuple[float, int]:
    """Predict a slide to files as predict.py does: (seconds, windows)."""
    geometry = config.geometry
    tiles = TileOptions(geometry.tile, geometry.overlap, geometry.halo, batch=batch)
    begin = time.perf_counter()
    with Picture(Pair(path.stem, path), [config], ReadOptions()) as picture:
        plan = plan_picture(picture, tiles)
        with Results(Frame(path.stem, plan.height, plan.width), config, options, str(time.time())) as results:
            for _, probs in predict_picture(picture, forward, plan, tiles):
                results.add(probs)
            results.finish()
    return time.perf_counter() - begin, plan.tiles


def measure_parts(
    path: Path, config: ModelConfig, forward: Callable[[np.ndarray], np.ndarray], options: ResultOptions
) -> dict[str, float]:
    """Seconds of reading every window, of writing a result, and of computing with pixels that are in memory.

    Computing is normalising, the network, blending and deciding; writing is everything that follows.
    """
    from outputs import decide
    from tiling import predict_bands

    tile = config.geometry.tile
    with Picture(Pair(path.stem, path), [config], ReadOptions()) as picture:
        plan = plan_picture(picture, TileOptions(tile, config.geometry.overlap, 0))
        begin = time.perf_counter()
        for top in plan.rows.origins:
            for left in plan.cols.origins:
                picture.pixels(top, left, min(tile, plan.height - top), min(tile, plan.width - left))
        reading = time.perf_counter() - begin
        resident = picture.pixels(0, 0, tile, tile)
        begin = time.perf_counter()
        for _, band in predict_bands(
            lambda *_: normalise(resident, config.mean, config.std), forward, plan.rows, plan.cols, batch_size=1
        ):
            decide(band)
        computing = time.perf_counter() - begin
        first = next(predict_picture(picture, forward, plan, TileOptions(tile, config.geometry.overlap, 0)))[1]
    begin = time.perf_counter()
    with Results(Frame("written", plan.height, plan.width), config, options, str(time.time())) as results:
        for top in range(0, plan.height, first.shape[1]):
            results.add(first[:, : plan.height - top])
        results.finish()
    return {"reading": reading, "writing": time.perf_counter() - begin, "computing": computing}


def one(args: argparse.Namespace, folder: Path) -> None:
    """A single run in this process, as JSON: seconds, windows, peak memory."""
    path = write_slide(folder / f"slide_{args.height}x{args.width}.tif", args.height, args.width)
    config, forward = describe(args.classes, TILE, TILE // 4), pointwise(args.classes)
    options = result_options(folder / "results", args.save)
    seconds, windows = run_slide(path, config, forward, options)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps({"seconds": seconds, "windows": windows, "peak_gb": peak}))


def run_alone(args: argparse.Namespace, folder: Path, **flags: Any) -> dict[str, Any]:
    """`one` in a process of its own, so that its peak memory is its own."""
    words = [f"--{name}={value}" for name, value in flags.items()]
    command = [sys.executable, "-m", "benchmarks.predict_slide", "one", f"--folder={folder}", *words]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def memory(args: argparse.Namespace, folder: Path) -> None:
    """Peak memory and time of a pointwise network on a wide slide."""
    flags = {"height": args.height, "width": args.width, "classes": args.classes, "save": args.save}
    path = write_slide(folder / f"slide_{args.height}x{args.width}.tif", args.height, args.width)
    found = run_alone(args, folder, **flags)
    config, forward = describe(args.classes, TILE, TILE // 4), pointwise(args.classes)
    parts = measure_parts(path, config, forward, result_options(folder / "parts", args.save))
    io, computing = parts["reading"] + parts["writing"], parts["computing"]
    limit = 1.15 * max(io, computing) + 0.25 * min(io, computing)
    print(f"{args.height} x {args.width}, {args.classes} class(es), {args.save}: {found['windows']} windows")
    print(f"peak memory {found['peak_gb']:.2f} GB, {found['seconds']:.1f} s")
    print(f"alone: reading {parts['reading']:.1f} s, writing {parts['writing']:.1f} s, computing {computing:.1f} s")
    print(f"1.15 max + 0.25 min = {limit:.1f} s; ratio {found['seconds'] / limit:.2f}")


def sizes(args: argparse.Namespace, folder: Path) -> None:
    """Seconds for each megapixel from 4 to 900."""
    print(f"{'pixels':>15} {'MP':>6} {'seconds':>8} {'s/MP':>8} {'peak GB':>8}")
    for side in (2048, 4096, 8192, 16384, 30000):
        found = run_alone(args, folder, height=side, width=side, save=args.save, classes=args.classes)
        pixels = side * side / 1e6
        row = f"{side:>7}x{side:<7} {pixels:>6.0f} {found['seconds']:>8.1f} {found['seconds'] / pixels:>8.4f}"
        print(f"{row} {found['peak_gb']:>8.2f}")


# ----------------------------------------------------------------------------------------------------------------------
# Against a peer and against the forwards alone


def real_network() -> Any:
    """deeplabv3+ / efficientnet-b0 with random weights and the statistics that they make of noise.

    Without these its logits would all be 0, and the export could not be proved equal.
    """
    import torch

    from model import build_model

    torch.manual_seed(0)
    network = build_model("deeplabv3+", "efficientnet-b0", in_channels=3, num_logits=1)
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = None  # the mean over all batches
    with torch.inference_mode():
        for _ in range(3):
            network(torch.randn(4, 3, 128, 128))
    return network.eval()


def real_forwards() -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """The network as the engine runs it: exported to ONNX Runtime, and PyTorch with channels last."""
    import torch

    from backends import torch_forward
    from onnx_export import export_network, make_session, session_runner

    network = real_network()
    run = session_runner(make_session(export_network(network, describe(1, TILE, TILE // 4)), "cpu"))

    def onnx(batch: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-run(batch)))

    return {"onnx": onnx, "torch": torch_forward(network.to(memory_format=torch.channels_last), "cpu")}


def peer(args: argparse.Namespace, folder: Path) -> None:
    """Seconds on an array in memory, Tessera's backends and MONAI in turns."""
    import torch
    from monai.inferers import SlidingWindowInferer

    from tiling import predict_tiled

    image = np.random.default_rng(0).normal(size=(3, args.side, args.side)).astype(np.float32)
    network, forwards = real_network(), real_forwards()
    inferer = SlidingWindowInferer(roi_size=(TILE, TILE), sw_batch_size=4, overlap=0.25, mode="gaussian")

    def monai() -> None:
        with torch.inference_mode():
            torch.sigmoid(inferer(torch.from_numpy(image)[None], network))  # type: ignore[arg-type]

    def tessera(name: str) -> Callable[[], Any]:
        geometry = {"tile": TILE, "overlap": TILE // 4, "halo": 0, "stride": 32, "min_side": 32, "batch_size": 1}
        return lambda: predict_tiled(image, forwards[name], **geometry)  # type: ignore[arg-type]

    times = in_turns({"MONAI": monai, **{name: tessera(name) for name in forwards}}, args.repeats)
    base = statistics.median(times["MONAI"])
    print(f"{'':8} {'seconds':>8} {'MP/s':>6} {'times as fast':>14}")
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        print(f"{name:8} {middle:>8.1f} {args.side**2 / 1e6 / middle:>6.2f} {base / middle:>14.2f}")


def in_turns(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, run in turns so that the machine's drift meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    return times


def overhead(args: argparse.Namespace, folder: Path) -> None:
    """Whole runs against their number of windows times one forward, measured before, between and after."""
    path = write_slide(folder / f"slide_{args.side}x{args.side}.tif", args.side, args.side)
    config, forward = describe(1, TILE, TILE // 4), real_forwards()["onnx"]
    batch = np.random.default_rng(0).normal(size=(1, 3, TILE, TILE)).astype(np.float32)

    def forwards_alone(count: int = 40) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            forward(batch)
        return (time.perf_counter() - begin) / count

    forwards_alone(5)
    for save in ("mask", "mask,labels,geojson"):
        before = forwards_alone()
        seconds, windows = run_slide(path, config, forward, result_options(folder / "results", save))
        floor = windows * (before + forwards_alone()) / 2
        filters = " and filters" if "," in save else ""
        print(f"{save}{filters}: {seconds:.1f} s, {windows} windows, forwards alone {floor:.1f} s")
        print(f"    ratio {seconds / floor:.3f}, {args.side**2 / 1e6 / seconds:.2f} MP/s")


if __name__ == "__main__":
    main()
