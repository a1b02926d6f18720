"""A network, or a file of another project, as a finished file: exported, with what is around it, and proved."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

import onnx_export
from backends import file_digest, load_network
from checkpoint import ModelConfig
from export_graph import Shell, fit_config, frame_of, wrap_network
from export_proof import ENOUGH_SPREAD, Proof, model_runner, prove_file, randomise_statistics
from foreign_onnx import Adopted, noise_images
from torchscript import export_script, script_runner

ORIGIN = "export_onnx.py"
FOREIGN = "another project"  # in the place of the exporter


@dataclass(frozen=True)
class Source:
    """What a file is made of.

    network: normalised images to logits, what the file is compared with. bare: the graph of a file of another project,
    see foreign_onnx.Adopted; None: the network is exported. entries: of the metadata.
    """

    path: Path
    config: ModelConfig
    network: nn.Module
    entries: dict[str, str]
    bare: bytes | None = None


@dataclass(frozen=True)
class Export:
    """A finished file that is not written yet. bare: the network alone; config: what the metadata say."""

    model: bytes
    bare: bytes
    config: ModelConfig
    shell: Shell
    proof: Proof
    metadata: dict[str, str]


def load_source(path: Path) -> Source:
    """A checkpoint.

    Raises:
        FileNotFoundError, ValueError: see backends.load_network.
    """
    config, network = load_network(path)
    return Source(path, config, network, {"digest": file_digest(path), "origin": ORIGIN})


def foreign_source(path: Path, adopted: Adopted, config: ModelConfig) -> Source:
    """A file of another project; the description is `config`, in which flags had their say."""
    entries = {"digest": file_digest(path), "origin": ORIGIN, "exporter": FOREIGN, "failed": ""}
    return Source(path, config, adopted.original, entries, adopted.bare)


def make_export(source: Source, shell: Shell, opset: int, tiles: Sequence[np.ndarray]) -> Export:
    """Export with free sides, or with a fixed size where the shell says so or nothing else works; prove the whole file.

    Args:
        tiles: real images (H, W, C) of raw pixels.

    Returns:
        The file; `fixed_because` is in its metadata when free sides did not work.

    Raises:
        onnx_export.ExportError: no exporter made a file that agrees.
    """
    if shell.size is None and source.bare is None:
        try:
            return _finish(source, shell, opset, tiles, source.entries)
        except onnx_export.ExportError as error:
            entries = {**source.entries, "fixed_because": str(error)}
            return _finish(source, replace(shell, size=own_size(source.config)), opset, tiles, entries)
    return _finish(source, shell, opset, tiles, source.entries)


def own_size(config: ModelConfig) -> tuple[int, int]:
    """The size of what a network is given by default: its tiles, or whole images resized."""
    geometry = config.geometry
    return geometry.size if geometry.kind == "resize" else (geometry.tile, geometry.tile)


def _finish(source: Source, shell: Shell, opset: int, tiles: Sequence[np.ndarray], entries: dict[str, str]) -> Export:
    """Export in one way, put the shell around it and prove it."""
    config, network = source.config, source.network
    form = onnx_export.Form(opset, frame_of(shell.size, config) if shell.size else None)
    fitted = fit_config(config, shell.size) if shell.size else config
    if source.bare is None:
        bare = onnx_export.export_network(network, config, form, **entries)
    else:
        bare = onnx_export.describe(source.bare, config, **entries)
    metadata = {**onnx_export.read_metadata(bare), **shell.metadata()}
    metadata.pop(onnx_export.DESCRIPTION)
    metadata |= {"tile": str(fitted.geometry.tile), "overlap": str(fitted.geometry.overlap)}
    model = onnx_export.describe(wrap_network(bare, config, shell), fitted, **metadata)
    noise = noise_images(config) if source.bare is not None and not shell.size else []
    proof = _prove(model, bare, source, shell, [*noise, *tiles])
    if proof.spread < ENOUGH_SPREAD and source.bare is None:
        varied = replace(source, network=randomise_statistics(network, config))
        again = onnx_export.export_network(varied.network, config, form)
        _prove(wrap_network(again, config, shell), again, varied, shell, ())
    return Export(model, bare, fitted, shell, proof, metadata)


def _prove(model: bytes, bare: bytes, source: Source, shell: Shell, tiles: Sequence[Any]) -> Proof:
    """Prove the file itself, and its logits where it gives something else; the latter are the figures."""
    config, network = source.config, source.network
    proof = prove_file(model_runner(model), network, config, shell, tiles)
    if shell.output == "logits" or config.activation == "none":
        return proof
    logits = replace(shell, output="logits")
    return prove_file(model_runner(wrap_network(bare, config, logits)), network, config, logits, tiles)


def make_script(source: Source, made: Export, tiles: Sequence[np.ndarray]) -> bytes:
    """The same as TorchScript, after the same proof.

    Raises:
        onnx_export.ExportError: PyTorch cannot trace it, or it differs.
    """
    content = export_script(source.network, source.config, made.shell, made.metadata)
    prove_file(script_runner(content), source.network, source.config, made.shell, tiles)
    return content


def describe_outside(shell: Shell) -> str:
    """What a file takes and gives, in a few words."""
    pixels = f"raw {shell.pixels} (N, H, W, C)" if shell.pixels else "normalised float32 (N, C, H, W)"
    size = f"one image of {shell.size[0]}x{shell.size[1]}" if shell.size else "any size"
    return f"{pixels}, {size}, to {shell.output}"


def describe_way(made: Export) -> str:
    """Who wrote the graph, and why not the first exporter."""
    exporter, failed = made.metadata["exporter"], made.metadata["failed"]
    if exporter == FOREIGN:
        return "the graph of another project"
    return f"exported by {exporter}{f' ({failed})' if failed else ''}"


def describe_proof(proof: Proof) -> str:
    """The proof in a few words."""
    return (
        f"differs by at most {proof.largest:.1e} and on average {proof.mean:.1e} of the logits' spread, which is "
        f"{proof.spread:.2g}; {proof.agreement:.4%} of {proof.pixels} mask pixels agree"
    )


def describe_source(source: Source) -> str:
    """What the file is made of, in a few words."""
    config = source.config
    if source.bare is not None:
        return f"{source.path}: {', '.join(config.channels)} to {', '.join(config.class_names)}"
    return f"checkpoint {source.path}: {config.architecture} {config.encoder}, {config.geometry.kind}"


def doubts(config: ModelConfig, fitted: ModelConfig) -> list[str]:
    """What a user is to know about the description of a file, `fitted`, that is made of a network's."""
    texts = [f"the network comes from {text}" for text in fitted.assumptions]
    (height, width), (rows, cols) = config.geometry.size, fitted.geometry.size
    if config.geometry.kind == "resize" and (height, width) != (rows, cols) and not config.assumptions:
        texts.append(
            f"the network was trained on images resized to {height}x{width}, and this file is for {rows}x{cols}; its "
            "answers may be worse: see the IoU with -ds"
        )
    return texts
