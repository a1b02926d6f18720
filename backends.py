"""What turns a batch of normalised images into probabilities: PyTorch or ONNX Runtime."""

import hashlib
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import nn

import cli
import onnx_export
from checkpoint import ModelConfig, load_checkpoint
from export_graph import Shell, file_runner
from image_io import atomic_write, cache_dir
from model import build_model, shorten_error, to_probabilities
from onnx_export import EXPORT_SECONDS, ExportError
from tiling import TTA

Forward = Callable[[np.ndarray], np.ndarray]

BACKENDS = ("auto", "torch", "onnx")
PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FEW_TILES = 8  # trying a tile twice would be a good part of the work itself
RECORDED_AFTER = 3  # calls with one shape: the first ones prepare kernels
CACHE = "cache"  # the origin of an export that was made on the way, and may be replaced


# ----------------------------------------------------------------------------------------------------------------------
# PyTorch


class Replay:
    """What a network does to one shape of batch, recorded once as a CUDA graph and then replayed.

    Launched from Python, most kernels take less time than their launch, and while other threads read and write, each
    launch waits for Python's lock. A smaller batch, the last of a picture, is filled up. Tiles of another size, and
    networks that cannot be recorded, run as ever.
    """

    def __init__(self, run: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.run = run
        self.calls: Counter[tuple[int, ...]] = Counter()
        self.shape: tuple[int, ...] = ()
        self.possible = True

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Run on (N, C, h, w); the answer is overwritten by the next call."""
        shape = tuple(images.shape)
        self.calls[shape] += 1
        if self.possible and not self.shape and self.calls[shape] == RECORDED_AFTER:
            self._record(images)
        if shape[1:] != self.shape[1:] or len(images) > self.shape[0]:
            return self.run(images)
        self.images[: len(images)] = images
        self.graph.replay()
        return self.probs[: len(images)]

    def _record(self, images: torch.Tensor) -> None:
        self.images, self.graph = images.clone(), torch.cuda.CUDAGraph()
        torch.cuda.synchronize(images.device)
        try:
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # other threads may use the GPU
                self.probs = self.run(self.images)
        except RuntimeError:  # what it does hangs on values, or there is no room for a second set of activations
            self.possible = False
        else:
            self.shape = tuple(images.shape)


def torch_forward(
    model: nn.Module, device: str, activation: str = "auto", *, amp: str = "no", fixed: bool = False
) -> Forward:
    """Make the function that predicts with PyTorch.

    It runs on channels-last images whatever the layout of the weights, and leaves the network in evaluation mode. In
    float32, without autocast, the same weights give the same counts in training, validate and predict.

    Args:
        amp: no, or fp16 or bf16 inside autocast (GPU); probabilities are computed in float32 in any case.
        fixed: the weights stay where they are, so that the work may be recorded (GPU), see Replay.

    Returns:
        A function from (N, C, h, w) float32 to probabilities (N, K, h, w) float32.

    Raises:
        RuntimeError: the device is out of memory, the message names size and batch; or float16 is too narrow.
    """
    model.to(device)
    kind = torch.device(device).type

    def run(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(kind, enabled=amp != "no", dtype=None if amp == "no" else PRECISIONS[amp]):
            logits = model(images)
        with torch.autocast(kind, enabled=False):
            return to_probabilities(logits, activation).contiguous()

    predict = Replay(run) if fixed and kind == "cuda" else run

    @torch.inference_mode()
    def forward(batch: np.ndarray) -> np.ndarray:
        model.eval()
        try:
            probs = _to_numpy(predict(_to_device(batch, device)))
        except torch.cuda.OutOfMemoryError as error:
            raise RuntimeError(out_of_memory(batch.shape)) from error
        if amp == "fp16" and not np.isfinite(probs.sum()) and np.isfinite(batch).all():
            raise RuntimeError(
                "the network's numbers left the range of float16 (65504) and its probabilities became NaN; "
                "expected a network that fits into it. Use --amp bf16, or --amp no"
            )
        return probs

    return forward


def _to_device(batch: np.ndarray, device: str) -> torch.Tensor:
    """A batch on the device, channels last; page-locked memory is what a GPU copies from fastest."""
    images = torch.from_numpy(batch)
    if torch.device(device).type == "cuda":
        images = images.pin_memory()
    return images.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)


def _to_numpy(probs: torch.Tensor) -> np.ndarray:
    """Probabilities as an array of the CPU; the array owns its memory."""
    if probs.device.type != "cuda":
        return probs.cpu().numpy()
    result = torch.empty(probs.shape, dtype=probs.dtype, pin_memory=True)
    result.copy_(probs, non_blocking=True)
    torch.cuda.current_stream(probs.device).synchronize()
    return result.numpy()


def load_network(path: Path) -> tuple[ModelConfig, nn.Module]:
    """Rebuild the network of a checkpoint on the CPU; nothing is downloaded.

    Raises:
        FileNotFoundError, ValueError: see load_checkpoint; ValueError too when weights and description disagree.
    """
    config, saved = load_checkpoint(path)
    network = build_model(
        config.architecture, config.encoder, in_channels=len(config.channels), num_logits=config.num_logits
    )
    try:
        network.load_state_dict(saved["model_state_dict"])
    except RuntimeError as error:
        raise ValueError(
            f"{path}: its weights do not fit the {config.architecture} {config.encoder} that it describes: {error}"
        ) from error
    return config, network.eval()


def out_of_memory(shape: tuple[int, ...]) -> str:
    """What to tell a user whose batch (N, C, H, W) did not fit into the device."""
    return (
        f"out of memory with a batch of {shape[0]} images of {shape[2]}x{shape[3]}: "
        "lower -b, or the size (--image-size, --tile-size)"
    )


# ----------------------------------------------------------------------------------------------------------------------
# ONNX Runtime


def onnx_forward(model: Path | bytes, device: str) -> tuple[ModelConfig, Forward]:
    """Read an ONNX file of Tessera and make the function that predicts with it; no checkpoint is needed.

    Args:
        model: the file, or its content.
        device: cpu, cuda, cuda:N, tensorrt or tensorrt:N.

    Raises:
        FileNotFoundError, ValueError: no such file, not one of Tessera, or ONNX Runtime cannot run it on the device.
    """
    return _open_onnx(model, device)[:2]


def _open_onnx(model: Path | bytes, device: str) -> tuple[ModelConfig, Forward, Shell]:
    path = model if isinstance(model, Path) else Path("the export")
    content = onnx_export.read_onnx(model) if isinstance(model, Path) else model
    description = onnx_export.read_description(path, content)
    config = description.config
    onnx_export.find_provider(device)
    try:
        shell = Shell.from_metadata(description.metadata)
        session = onnx_export.make_session(content, device)
    except ValueError as error:
        raise ValueError(f"{path}: {error}. Use its checkpoint (.pth) with --backend torch") from error
    inputs, outputs = ([value.name for value in values] for values in (session.get_inputs(), session.get_outputs()))
    if (inputs, outputs) != ([onnx_export.INPUT], [shell.output]):
        raise ValueError(
            f"{path} maps {', '.join(inputs)} to {', '.join(outputs)}, expected {onnx_export.INPUT} to "
            f"{shell.output}. Use its checkpoint (.pth) instead"
        )
    run = file_runner(onnx_export.session_runner(session), config, shell)

    def forward(batch: np.ndarray) -> np.ndarray:
        try:
            return run(batch)
        except ValueError as error:  # pixels or sizes that the file is not for
            raise ValueError(f"{path}: {error}") from error
        except Exception as error:  # its errors have no common class
            if "alloc" in str(error).lower():
                raise RuntimeError(out_of_memory(batch.shape)) from error
            raise RuntimeError(f"{path} cannot take a batch of {batch.shape}: {shorten_error(error)}") from error

    return config, forward, shell


# ----------------------------------------------------------------------------------------------------------------------
# Exports that are kept


def export_places(path: Path, digest: str) -> tuple[Path, Path]:
    """Where the export of a checkpoint may lie: beside it, and in the user's cache."""
    stem = path.stem if path.suffix == ".pth" else path.name
    return path.with_name(f"{stem}.onnx"), cache_dir() / "onnx" / f"{digest}.onnx"


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, as hexadecimal digits.

    Raises:
        FileNotFoundError: there is no such checkpoint.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}; train.py writes it, -cd DIR finds the newest in a folder")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_export(path: Path, digest: str, device: str) -> tuple[ModelConfig, Forward, Path] | None:
    """The export of exactly this checkpoint that somebody made before, if there is one that runs."""
    for place in export_places(path, digest):
        with suppress(OSError, ValueError, ImportError):  # not there, broken, somebody else's: another one is made
            metadata = onnx_export.read_description(place).metadata
            current = (metadata.get("digest"), metadata.get("revision")) == (digest, str(onnx_export.REVISION))
            if current and Shell.from_metadata(metadata) == Shell() and "quantised" not in metadata:
                return *onnx_forward(place, device), place
    return None


def export_checkpoint(path: Path, digest: str) -> tuple[bytes, Path | None]:
    """Export a checkpoint, prove it, and keep the result where the next command finds it.

    Returns:
        The ONNX file, and where it was written; None when neither folder can be written to.

    Raises:
        FileNotFoundError, ValueError: see load_network.
        ExportError: see onnx_export.export_network.
    """
    config, network = load_network(path)
    model = onnx_export.export_network(network, config, digest=digest, origin=CACHE)
    beside, cached = export_places(path, digest)
    for place in (beside, cached):
        if place == cached or may_replace(place):
            with suppress(OSError), atomic_write(place) as file:
                file.write(model)
                return model, place
    return model, None


def may_replace(place: Path) -> bool:
    """Whether a name is free, or holds an export that was made on the way; what a user put there is never replaced."""
    if not (place.exists() or place.is_symlink()):
        return True
    try:
        return onnx_export.read_description(place).metadata.get("origin") == CACHE
    except (OSError, ValueError):
        return False


# ----------------------------------------------------------------------------------------------------------------------
# Either


def pick_device(name: str, cpu: bool, path: Path | None) -> str:
    """See cli.pick_device; where `path` of -c is an ONNX file, auto takes what ONNX Runtime has too."""
    device = cli.pick_device(name, cpu)
    if name != "auto" or not (path and is_onnx(path)):
        return device
    try:
        onnx_export.find_provider(device)
    except ValueError:  # Apple's GPU, or the package without CUDA
        return "cpu"
    return device


def load_config(path: Path) -> ModelConfig:
    """The description in a checkpoint or an ONNX file.

    Raises:
        FileNotFoundError, ValueError: see load_checkpoint and onnx_export.read_description.
    """
    return onnx_export.read_description(path).config if is_onnx(path) else load_checkpoint(path)[0]


def is_onnx(path: Path) -> bool:
    """Whether a file is ONNX by its name."""
    return path.suffix.lower() == ".onnx"


def load_forward(
    path: Path, device: str, *, backend: str = "torch", megapixels: float | None = None, amp: str = "no"
) -> tuple[ModelConfig, Forward, str]:
    """Read a checkpoint or an ONNX file and make the function that predicts with it; nothing is downloaded.

    Args:
        path: .pth or .onnx.
        device: cpu, cuda, cuda:N, mps, or of ONNX Runtime tensorrt.
        backend: torch, onnx (exports the checkpoint unless that was done before), or auto: on a CPU ONNX Runtime when
            an export of this checkpoint exists or when PyTorch would need longer than an export takes, else PyTorch.
        megapixels: what the network is to see: every tile, in every view; auto exports nothing without it.
        amp: precision inside autocast, for PyTorch on a GPU; see torch_forward.

    Returns:
        The description, the function, and what runs and why in a few words, fit to be printed.

    Raises:
        FileNotFoundError, ValueError: the file is missing, damaged or no checkpoint, or the backend cannot run there.
        RuntimeError: backend is onnx and the export failed.
    """
    _check_choices(path, backend, amp)
    if device.startswith("tensorrt") and not is_onnx(path):
        if backend == "torch":
            raise ValueError("--device tensorrt runs ONNX files: use --backend onnx, or --device cuda")
        backend = "onnx"
    if is_onnx(path):
        config, forward, shell = _open_onnx(path, device)
        return config, forward, f"ONNX Runtime on {device}{_decided(config, shell)}"
    if backend == "torch" or (backend == "auto" and (device != "cpu" or amp != "no")):
        return *_load_torch(path, device, amp), f"PyTorch on {device}"
    onnx_export.find_provider(device)
    digest = file_digest(path)
    found = find_export(path, digest, device)
    if found:
        return found[0], found[1], f"ONNX Runtime on {device}, {found[2]}"
    if backend == "onnx":
        try:
            return _load_exported(path, digest, device)
        except ExportError as error:
            raise RuntimeError(f"{path} cannot be exported for ONNX Runtime: {error}. Use --backend torch") from error
    return _load_faster(path, digest, device, megapixels)


def _decided(config: ModelConfig, shell: Shell) -> str:
    """What a user must know of a file that gives no probabilities."""
    if shell.output != "mask":
        return ""
    where = f" decided at {shell.threshold:g}" if config.num_logits == 1 else ""
    return f", which gives masks{where} and no probabilities: -t, AUC and best thresholds mean nothing with it"


def _check_choices(path: Path, backend: str, amp: str) -> None:
    for name, value, known in (("backend", backend, BACKENDS), ("precision", amp, (*PRECISIONS,))):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}, expected one of {', '.join(known)}")
    if is_onnx(path) and backend == "torch":
        raise ValueError(f"{path} is an ONNX file, which --backend torch cannot run: use auto, or its checkpoint")
    if amp != "no" and (is_onnx(path) or backend == "onnx"):
        raise ValueError(f"{path}: precision {amp} is for PyTorch, ONNX Runtime runs in that of the file: use no")


def _load_faster(path: Path, digest: str, device: str, megapixels: float | None) -> tuple[ModelConfig, Forward, str]:
    """PyTorch, or ONNX Runtime when the work is longer than the export that it needs."""
    config, forward = _load_torch(path, device, "no")
    if megapixels is None or seconds_for(forward, config, megapixels) <= EXPORT_SECONDS:
        return config, forward, f"PyTorch on {device}"
    try:
        return _load_exported(path, digest, device)
    except ExportError as error:
        return config, forward, f"PyTorch on {device}, for the export to ONNX failed: {error}"


def _load_torch(path: Path, device: str, amp: str) -> tuple[ModelConfig, Forward]:
    config, network = load_network(path)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return config, torch_forward(network, device, config.activation, amp=amp, fixed=True)


def _load_exported(path: Path, digest: str, device: str) -> tuple[ModelConfig, Forward, str]:
    begin = time.perf_counter()
    model, place = export_checkpoint(path, digest)
    seconds = time.perf_counter() - begin
    kept = place or "not kept: no folder can be written to"
    return *onnx_forward(model, device), f"ONNX Runtime on {device}, exported in {seconds:.0f} s, {kept}"


def megapixels_seen(config: ModelConfig, pixels: float, images: int = 1) -> float:
    """About how many megapixels a network sees of images with so many pixels: with overlaps, in every view."""
    geometry = config.geometry
    if geometry.kind == "resize":
        return images * geometry.size[0] * geometry.size[1] / 1e6
    again = (geometry.tile / (geometry.tile - geometry.overlap)) ** 2
    return pixels / geometry.reduction**2 * again * len(TTA[geometry.tta]) / 1e6


def seconds_for(forward: Forward, config: ModelConfig, megapixels: float) -> float:
    """How long a network needs to see so many megapixels, judged by one tile; 0 when they are too few to try."""
    geometry = config.geometry
    height, width = (geometry.tile, geometry.tile) if geometry.kind == "crops" else geometry.size
    tiles = megapixels * 1e6 / (height * width)
    if tiles <= FEW_TILES:
        return 0.0
    batch = np.zeros((1, len(config.channels), height, width), np.float32)
    forward(batch)  # the first call prepares kernels
    begin = time.perf_counter()
    forward(batch)
    return (time.perf_counter() - begin) * tiles
