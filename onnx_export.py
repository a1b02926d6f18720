"""A network as an ONNX file: exported, described, and proved equal to PyTorch before anybody gets it."""

import contextlib
import copy
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import cli
from checkpoint import ModelConfig, config_from_dict, config_to_dict
from export_layers import make_exportable, share_weights
from model import shorten_error

INPUT, OUTPUT = "image", "logits"
OPSET = 18
REVISION = 1  # of what this module writes; files of another one are exported anew
DESCRIPTION = "tessera"  # the metadata entry that holds the ModelConfig, and by which a file is known as ours
LARGEST_DIFFERENCE = 1e-3  # of the logits, in units of their spread
SMALLEST_SPREAD = 1e-3  # of the logits; below it all probabilities are alike and any two networks would agree
PROOF_BATCHES = (1, 3)
EXPORT_SECONDS = 30  # roughly what an export with its proof takes on two cores

Session = Any  # onnxruntime.InferenceSession, which is imported when one is made


class ExportError(RuntimeError):
    """A network could not be exported, or the export does not compute what the network computes."""


@dataclass(frozen=True)
class Description:
    """What an ONNX file says about itself: the network's description, and the rest of its metadata."""

    config: ModelConfig
    metadata: dict[str, str]


# ----------------------------------------------------------------------------------------------------------------------
# Export


@dataclass(frozen=True)
class Form:
    """How a network is written: the version of ONNX, and (height, width) when only one image of that size is taken."""

    opset: int = OPSET
    size: tuple[int, int] | None = None


ANY_SIZE = Form()


def export_network(network: nn.Module, config: ModelConfig, form: Form = ANY_SIZE, **metadata: str) -> bytes:
    """Export a network, by default with free batch, height and width, and prove the result equal to it.

    torch.export is tried first, then the older TorchScript exporter; the metadata say which one it was, and why not the
    first.

    Args:
        network: on the CPU; images (N, C, H, W), sides multiples of config.stride, to logits (N, K, H, W).
        form: sides of a fixed size are multiples of config.stride too.
        metadata: more entries, such as the digest of the checkpoint.

    Returns:
        An ONNX file with input `image`, output `logits` and the description of the network.

    Raises:
        ExportError: no exporter made a file that agrees; says why for each.
    """
    network = copy.deepcopy(network).float().to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    writable = make_exportable(share_weights(network))
    reasons: list[str] = []
    for name, exporter in (("torch.export", _export_program), ("TorchScript", _export_script)):
        try:
            entries = {"exporter": name, "failed": "; ".join(reasons), **metadata}
            model = describe(exporter(writable, config, form), config, **entries)
            if read_metadata(model)["opset"] != str(form.opset):
                raise ValueError(f"it wrote opset {read_metadata(model)['opset']}, asked for {form.opset}")
            prove_equal(model, network, config, form)
        except Exception as error:  # exporters raise anything
            reasons.append(f"{name}: {shorten_error(error)}")
        else:
            return model
    raise ExportError("; ".join(reasons))


def _export_program(network: nn.Module, config: ModelConfig, form: Form) -> bytes:
    # Sides as stride times a whole number: the exporter can prove that down- and up-sampling meet again.
    units = {axis: config.stride * torch.export.Dim(name, min=1, max=4096) for axis, name in ((2, "rows"), (3, "cols"))}
    shapes = ({0: torch.export.Dim("batch", min=1, max=4096), **units},)
    with _quiet():
        program = torch.onnx.export(
            network,
            (_sample(config, form),),
            dynamo=True,
            dynamic_shapes=None if form.size else shapes,
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=form.opset,
            verbose=False,
        )
    assert program is not None, "torch.onnx.export(dynamo=True) returns a program"
    return program.model_proto.SerializeToString()


def _export_script(network: nn.Module, config: ModelConfig, form: Form) -> bytes:
    axes = {0: "batch", 2: "height", 3: "width"}
    file = io.BytesIO()
    with _quiet():
        torch.onnx.export(
            network,
            (_sample(config, form),),
            file,  # type: ignore[arg-type]
            dynamo=False,
            dynamic_axes=None if form.size else {INPUT: axes, OUTPUT: axes},
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=form.opset,
            verbose=False,
        )
    return file.getvalue()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters print pages of progress and warnings; what matters is in the error."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    sys.stdout.flush()
    shown = os.dup(1)  # what is written below Python, such as the whole graph where an operator is missing
    try:
        with open(os.devnull, "w") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), 1)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(io.StringIO()):
                yield
    finally:
        os.dup2(shown, 1)
        os.close(shown)
        logging.disable(level)


def _sides(config: ModelConfig) -> tuple[int, int, int]:
    """Three odd multiples of the stride that the network takes: a size seen once must not become part of the graph."""
    first = max(-(-config.min_side // config.stride), 3) | 1
    return first * config.stride, (first + 2) * config.stride, (first + 4) * config.stride


def _sample(config: ModelConfig, form: Form) -> Tensor:
    """What the exporter traces: more than one image, for a batch of one would be written into the graph."""
    if form.size:
        return torch.zeros(1, len(config.channels), *form.size)
    short, middle, _ = _sides(config)
    return torch.zeros(2, len(config.channels), middle, short)


def describe(model: bytes, config: ModelConfig, **metadata: str) -> bytes:
    """The same ONNX file with the network's description and more entries in its metadata."""
    import onnx

    proto = onnx.load_model_from_string(model)
    facts = cli.environment()
    entries = {
        DESCRIPTION: json.dumps(config_to_dict(config), ensure_ascii=False),
        "revision": str(REVISION),
        "opset": str(next(each.version for each in proto.opset_import if each.domain in ("", "ai.onnx"))),
        "tile": str(config.geometry.tile),
        "overlap": str(config.geometry.overlap),
        "torch": facts["torch"],
        "version": facts["tessera"],
        "commit": facts["commit"],
        **metadata,
    }
    onnx.helper.set_model_props(proto, entries)
    proto.producer_name, proto.producer_version = "Tessera", facts["tessera"]
    onnx.checker.check_model(proto)
    return proto.SerializeToString()


# ----------------------------------------------------------------------------------------------------------------------
# Proof


def prove_equal(model: bytes, network: nn.Module, config: ModelConfig, form: Form = ANY_SIZE) -> float:
    """Compare an ONNX file with the network it came from, on noise of three sizes and two batches, or of its only size.

    Args:
        network: on the CPU, in evaluation mode.

    Returns:
        Largest difference between two logits, in units of the logits' spread (standard deviation within a channel).

    Raises:
        ExportError: they differ by more than LARGEST_DIFFERENCE, or the logits hardly vary, so the proof is void.
    """
    run = session_runner(make_session(model, "cpu"))
    short, middle, long = _sides(config)
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    sizes = [form.size] if form.size else [(config.min_side, middle), (short, long), (long, middle)]
    for height, width in sizes:
        for batch in (1,) if form.size else PROOF_BATCHES:
            image = torch.randn(batch, len(config.channels), height, width, generator=generator)
            with torch.inference_mode():
                expected = network(image).numpy()
            found, size = run(image.numpy()), f"{batch} images of {height}x{width}"
            if found.shape != expected.shape:
                raise ExportError(f"the export gives {found.shape} for {size}, the network {expected.shape}")
            difference = float(np.abs(found - expected).max()) / _spread(expected, size)
            if not difference <= LARGEST_DIFFERENCE:
                raise ExportError(
                    f"the export differs from the network by {difference:.1e} of the logits' spread on noise ({size}), "
                    f"expected {LARGEST_DIFFERENCE:g} or less{_own_error(expected, network, image)}"
                )
            worst = max(worst, difference)
    return worst


def _spread(expected: np.ndarray, size: str) -> float:
    spread = float(np.sqrt(expected.var(axis=(0, 2, 3), dtype=np.float64).mean()))
    if not spread >= SMALLEST_SPREAD:
        raise ExportError(
            f"the proof is void: on noise ({size}) the logits have a spread of {spread:.1e}, expected "
            f"{SMALLEST_SPREAD:g} or more, as any trained network has"
        )
    return spread


@torch.inference_mode()
def _own_error(expected: np.ndarray, network: nn.Module, image: Tensor) -> str:
    """What PyTorch itself is off in float32, for a message: large products, as of attention, enlarge any rounding."""
    try:
        exact = copy.deepcopy(network).double()(image.double()).numpy()
    except RuntimeError:  # a layer that insists on float32
        return ""
    return f" (PyTorch in float32 is itself off by {np.abs(expected - exact).max() / exact.std():.1e})"


# ----------------------------------------------------------------------------------------------------------------------
# Files and sessions


def read_description(path: Path, content: bytes | None = None) -> Description:
    """What an ONNX file says about itself; the file is not run.

    Args:
        content: of the file, if it has been read already.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: truncated, not ONNX, or without the metadata that Tessera writes.
    """
    proto = _parse(path, read_onnx(path) if content is None else content)
    metadata = _entries(proto)
    if DESCRIPTION not in metadata:
        raise ValueError(
            f"{path} has no metadata of Tessera, such as channels, classes and statistics: expected a file that "
            "export_onnx.py wrote. If it was made from a checkpoint of Tessera, pass the checkpoint (.pth). A file of "
            f"another project becomes one by: python export_onnx.py -c {path} -o OURS.onnx --mean R G B --std R G B "
            '--class-list "LABEL ..." --tile-size S (or --image-size S where whole images are resized); mean and std '
            "are in units of the pixels, 255 times those of images of 0 to 1"
        )
    if any(item.external_data for item in proto.graph.initializer):
        raise ValueError(
            f"{path} names other files for its weights, expected one file that holds them all, as export_onnx.py "
            "writes it. Export the checkpoint (.pth) again, or save it as one: "
            "onnx.save_model(onnx.load(FILE), FILE, save_as_external_data=False)"
        )
    try:
        return Description(config_from_dict(json.loads(metadata[DESCRIPTION])), metadata)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def is_ours(path: Path) -> bool:
    """Whether an ONNX file is an export of Tessera.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is truncated or not ONNX.
    """
    return DESCRIPTION in _entries(_parse(path, read_onnx(path)))


def _parse(path: Path, content: bytes) -> Any:
    """What may be an ONNX file, as onnx.ModelProto."""
    import onnx

    try:
        proto = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's own class of error is not part of its interface
        raise ValueError(_damaged(path, shorten_error(error))) from error
    if not proto.graph.node:
        raise ValueError(_damaged(path, "it holds no graph"))
    return proto


def _entries(proto: Any) -> dict[str, str]:
    return {entry.key: entry.value for entry in proto.metadata_props}


def read_metadata(model: bytes) -> dict[str, str]:
    """The metadata of an ONNX file that is known to be one."""
    import onnx

    return _entries(onnx.load_model_from_string(model))


def read_onnx(path: Path) -> bytes:
    """The content of an ONNX file.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no ONNX file {path}; expected one exported from a checkpoint, or the checkpoint")
    return path.read_bytes()


def _damaged(path: Path, reason: str) -> str:
    return f"{path} is truncated or not an ONNX file ({reason}). Use another copy of it, or its checkpoint (.pth)."


def make_session(model: bytes, device: str) -> Session:
    """Load an ONNX file into ONNX Runtime, on as many threads as PyTorch uses.

    Args:
        device: cpu, cuda, cuda:N or tensorrt.

    Raises:
        ValueError: no such provider in the installed package, or it cannot run the file.
    """
    import onnxruntime

    provider = find_provider(device)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = usable_threads()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4  # its errors come as exceptions too
    # Its threads spin for tens of milliseconds after a run, and would take a core from whatever comes next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = onnxruntime.InferenceSession(model, options, providers=[provider, *_helpers(provider)])
    except Exception as error:  # its errors have no common class
        raise ValueError(f"ONNX Runtime cannot load the network ({shorten_error(error)})") from error
    started = session.get_providers()[0]
    if started != provider[0]:
        raise ValueError(
            f"ONNX Runtime started {started}, expected {provider[0]} for --device {device}: its CUDA libraries do not "
            "load. Use --backend torch, or --cpu"
        )
    return session


def _helpers(provider: tuple[str, dict[str, str]]) -> list[tuple[str, dict[str, str]]]:
    """Who runs the operators that a provider lacks, before the CPU, which is there in any case."""
    return [("CUDAExecutionProvider", provider[1])] if provider[0].startswith("Tensorrt") else []


def runs_on(device: str) -> bool:
    """Whether ONNX Runtime can start on a device: a provider may be installed where its hardware is not."""
    import onnx

    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in (INPUT, OUTPUT)]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", [INPUT], [OUTPUT])], "try", ends[:1], ends[1:])
    opsets = [onnx.helper.make_opsetid("", OPSET)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
    try:
        make_session(model.SerializeToString(), device)
    except ValueError:
        return False
    return True


def find_provider(device: str) -> tuple[str, dict[str, str]]:
    """ONNX Runtime's name of a device, with its options.

    Raises:
        ValueError: the installed package has none for it.
    """
    kind, _, number = device.partition(":")
    if kind == "cpu":
        return "CPUExecutionProvider", {}
    names = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
    if kind not in names:
        raise ValueError(
            f"--backend onnx runs on cpu, cuda and tensorrt, found --device {device}: use --cpu, or a checkpoint with "
            "--backend torch"
        )
    import onnxruntime

    available = onnxruntime.get_available_providers()
    if names[kind] not in available:
        raise ValueError(
            f"--backend onnx on {device}: the installed onnxruntime has {', '.join(available)}, expected "
            f"{names[kind]}. Install onnxruntime-gpu in its place, or use --cpu, or a checkpoint with --backend torch"
        )
    return names[kind], {"device_id": number or "0"}


def usable_threads() -> int:
    """Threads for one network: PyTorch's number, but no more than the cores this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(torch.get_num_threads(), allowed))


def session_runner(session: Session) -> Callable[[np.ndarray], np.ndarray]:
    """A function from a batch of what a file takes to its first output."""
    output = session.get_outputs()[0].name

    def run(batch: np.ndarray) -> np.ndarray:
        return session.run([output], {INPUT: np.ascontiguousarray(batch)})[0]

    return run
