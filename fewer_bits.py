"""Write an exported network in int8 or float16 beside its file, if that pays where it is to run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from checkpoint import ModelConfig
from export_file import Export
from export_graph import Shell, file_runner, frame_of, pad_to, wrap_network
from export_measure import Tile, pad_tile, score_tiles
from export_proof import agree_in_half, model_runner
from image_io import atomic_write
from onnx_export import DESCRIPTION, describe, read_metadata, runs_on
from quantisation import compare_speed, find_vnni, quantise, to_half

LEAST_HALF = 0.99  # of mask pixels that float16 decides as float32 does, where IoU and speed cannot be measured


@dataclass(frozen=True)
class BitOptions:
    """What is written and when it is kept.

    kind: one of quantisation.KINDS. target: cpu or cuda, where it is timed. max_drop: IoU that may be lost. method: how
    int8-static finds the range of activations, one of quantisation.METHODS.
    """

    kind: str
    target: str = "cpu"
    max_drop: float = 0.01
    method: str = "percentile"


def place_beside(target: Path, kind: str) -> Path:
    """Where the network in fewer bits goes."""
    return target.with_name(f"{target.stem}.{kind}.onnx")


def write_in_fewer_bits(
    target: Path,
    config: ModelConfig,
    made: Export,
    tiles: Sequence[Tile],
    calibration: Sequence[Tile],
    options: BitOptions,
    say: Callable[[str], None],
) -> Path | None:
    """Write the network in fewer bits beside its file if that pays; what was measured is said in both cases.

    Args:
        config: of the network, whereas that of `made` fits its size.
        tiles: with masks, to see what it costs. calibration: training tiles, for int8-static.

    Returns:
        The file, or None when it does not pay.

    Raises:
        ValueError: no masks to measure it with, or no tiles to calibrate it on.
    """
    place = place_beside(target, options.kind)
    if options.kind == "fp16" and options.target == "cuda" and not runs_on("cuda"):
        bare, measured = _half_unmeasured(config, made, tiles, say)
    else:
        bare, measured = _reduce_bits(config, made, tiles, calibration, options, say)
    if bare is None:
        if place.exists():
            say(f"warning: {place} is of an earlier export and stays as it is, perhaps of another network")
        return None
    metadata = {**read_metadata(bare), **made.shell.metadata(), "measured": measured, "quantised": options.kind}
    metadata.pop(DESCRIPTION)
    with atomic_write(place) as file:
        file.write(describe(wrap_network(bare, config, made.shell), made.config, **metadata))
    say(f"{place}: {measured}")
    return place


def _half_unmeasured(
    config: ModelConfig, made: Export, tiles: Sequence[Tile], say: Callable[[str], None]
) -> tuple[bytes | None, str]:
    """The network in float16, for a GPU that is not here; nothing, with the reason said, when it is too narrow."""
    size = frame_of(made.shell.size, config) if made.shell.size else None
    model = to_half(made.bare)
    share = agree_in_half(made.bare, model, config, [pad_tile(tile.pixels, made.config) for tile in tiles], size)
    if not share >= LEAST_HALF:
        say(
            f"fp16 is refused: {share:.2%} of mask pixels are those of float32, expected {LEAST_HALF:.0%} or more: the "
            "network's numbers leave the range of float16. Use the float file"
        )
        return None, ""
    return model, "unmeasured: fp16 for CUDA, and there is no GPU here"


def _reduce_bits(
    config: ModelConfig,
    made: Export,
    tiles: Sequence[Tile],
    calibration: Sequence[Tile],
    options: BitOptions,
    say: Callable[[str], None],
) -> tuple[bytes | None, str]:
    """The network in fewer bits and what was measured, or nothing with the reason said."""
    size = frame_of(made.shell.size, config) if made.shell.size else None

    def score(model: bytes) -> float:
        forward = file_runner(model_runner(model), config, Shell(size=size))
        iou = score_tiles(forward, tiles, made.config, made.shell.threshold)
        if iou is None:
            raise ValueError("--quantize: the images of -ds have no masks; expected some, to see what fewer bits cost")
        return iou

    batches = [pad_tile(tile.pixels, made.config) for tile in calibration or tiles]
    batches = [pad_to(batch, size) for batch in batches] if size else batches
    result = quantise(
        made.bare,
        config,
        options.kind,
        calibration=batches,
        measure=score,
        max_drop=options.max_drop,
        method=options.method,
        race=partial(compare_speed, device=options.target),
    )
    say(f"{result.reason}; VNNI: {find_vnni()}")
    figures = f"IoU {result.iou_before:.4f} to {result.iou_after:.4f}, {result.seconds_before:.4f} to "
    return (result.model if result.kept else None), f"{figures}{result.seconds_after:.4f} s on {options.target}"
