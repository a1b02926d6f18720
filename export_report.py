"""The figures of an export: size, latency and IoU of everything that was made of a checkpoint, printed and kept."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import cli
from backends import Forward, onnx_forward, torch_forward
from checkpoint import ModelConfig
from export_file import Export, Source
from export_graph import Shell, file_runner, frame_of, pad_to
from export_measure import REPEATS, Tile, make_input, score_tiles, time_calls
from export_proof import model_runner
from image_io import write_text
from spool import FolderLock, JobError
from torchscript import script_runner

LONGEST_WAIT = 20  # seconds for other exports into the folder; each holds the report for milliseconds


def measure(source: Source, exports: Mapping[str, Path], made: Export, tiles: Sequence[Tile]) -> list[dict[str, Any]]:
    """Size, latency of one tile and IoU of the checkpoint and of everything that was made of it.

    Args:
        exports: variant and file; torchscript is a file of PyTorch, the others are ONNX.
    """
    config, shell = made.config, made.shell
    first = "torch" if source.bare is None else "original"
    taken = make_input(config, shell, tiles)
    image = make_input(config, replace(shell, pixels=""), tiles)
    run = padded(torch_forward(source.network, "cpu", config.activation), config, shell)
    forwards, calls, files = {first: run}, {first: partial(run, image)}, {first: source.path, **exports}
    for name, file in exports.items():
        if name == "torchscript":
            forwards[name] = file_runner(script_runner(file.read_bytes()), config, shell)
            calls[name] = partial(script_runner(file.read_bytes()), taken)
        else:
            forwards[name] = onnx_forward(file, "cpu")[1]
            calls[name] = partial(model_runner(file.read_bytes()), taken)
    seconds = time_calls(calls)
    rows = []
    for name, file in files.items():
        iou = score_tiles(forwards[name], tiles, config, shell.threshold)
        rows.append(
            {
                "checkpoint": str(source.path.absolute()),
                "file": str(file.absolute()),
                "variant": name,
                "bytes": file.stat().st_size,
                "seconds": seconds[name],
                "calls": REPEATS,
                "input": list(taken.shape),
                "threads": torch.get_num_threads(),
                "iou": iou,
                "tiles": len(tiles),
                "proof": asdict(made.proof) if name in ("onnx", "torchscript") else None,
                "shell": None if name == first else shell.metadata(),
                "metadata": {key: made.metadata[key] for key in ("exporter", "failed", "opset", "torch", "commit")},
            }
        )
    return rows


def padded(forward: Forward, config: ModelConfig, shell: Shell) -> Forward:
    """PyTorch on the sides that a file of a fixed size sees, so that both answer the same question."""
    if not shell.size:
        return forward
    size = frame_of(shell.size, replace(config, min_side=config.stride))
    return lambda batch: forward(pad_to(batch, size))[..., : batch.shape[2], : batch.shape[3]]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The figures, one line for each file."""
    lines = [("file", "variant", "MB", f"ms ({REPEATS})", "IoU")]
    for row in rows:
        iou = "-" if row["iou"] is None else f"{row['iou']:.4f}"
        lines.append(
            (Path(row["file"]).name, row["variant"], f"{row['bytes'] / 1e6:.2f}", f"{1000 * row['seconds']:.1f}", iou)
        )
    widths = [max(len(line[place]) for line in lines) for place in range(5)]
    text = ["  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    sizes = ", ".join(dict.fromkeys("x".join(map(str, row["input"])) for row in rows))
    notes = f"ms: median of {REPEATS} calls with {sizes}, in turns, {rows[-1]['threads']} threads"
    if any(row["tiles"] for row in rows):
        counts = " or ".join(dict.fromkeys(str(row["tiles"]) for row in rows))
        notes += f"; IoU: of {counts} tiles, each from the middle of an image"
    return "\n".join([*text, notes])


def write_report(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    """Write the figures; those of other files that an earlier run left there, or another is writing now, stay.

    Returns:
        What is to be said about it: where it is, or that a file that is no such report was left alone.
    """
    try:
        with hold(path):
            return _write_report(path, rows)
    except JobError as error:
        return f"warning: {path} is not written, the figures are printed alone: {error}"


@contextmanager
def hold(path: Path) -> Iterator[None]:
    """Wait until nobody else rewrites a file, and keep others from it.

    Raises:
        JobError: another process holds it longer than LONGEST_WAIT.
    """
    work, end, lock = path.with_name(f".{path.name}.lock"), time.monotonic() + LONGEST_WAIT, None
    while lock is None:
        try:
            work.mkdir(parents=True, exist_ok=True)
            lock = FolderLock(work)
        except FileNotFoundError:  # whoever was before us removed the folder after we had made it
            continue
        except JobError:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)
        except OSError:  # a disk without locks, on which one export at a time is safe
            break
    try:
        yield
    finally:
        if lock:
            lock.release(remove=True)
        with suppress(OSError):  # somebody else waits in it
            work.rmdir()


def _write_report(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    kept: list[dict[str, Any]] = []
    try:
        kept = [row for row in json.loads(path.read_text(encoding="utf-8"))["exports"] if isinstance(row, dict)]
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError):
        return f"warning: {path} is there and is no report of exports; it stays, the figures are printed alone"
    new = {row["file"] for row in rows}
    exports = [row for row in kept if row.get("file") not in new] + list(rows)
    write_text(path, json.dumps({"exports": exports, "environment": cli.environment()}, indent=2) + "\n")
    return f"report in {path}"
