"""A network with its shell as TorchScript, for programs that load PyTorch models and not ONNX."""

import copy
import io
import json
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from checkpoint import ModelConfig, config_to_dict
from export_graph import Shell, frame_of
from export_layers import make_exportable
from model import shorten_error
from onnx_export import ExportError
from tiling import round_up

DESCRIPTION = "tessera.json"  # the extra file in the archive that holds description and metadata


class _Shelled(nn.Module):
    """The same as export_graph.wrap_network, in PyTorch; scripted, so that sizes stay free."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, config: ModelConfig, shell: Shell) -> None:
        super().__init__()
        self.network = network
        self.stride, self.least = config.stride, round_up(config.min_side, config.stride)
        self.raw, self.output, self.threshold = bool(shell.pixels), shell.output, float(np.float32(shell.threshold))
        self.alone = config.num_logits == 1
        self.sigmoid = config.activation == "sigmoid" or (config.activation == "auto" and self.alone)
        self.register_buffer("mean", torch.tensor(config.mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(config.std, dtype=torch.float32).clamp_min(1e-6))

    def forward(self, image: Tensor) -> Tensor:
        """Logits or probabilities (N, K, H, W), or a mask (N, H, W), of (N, C, H, W) or, raw, (N, H, W, C)."""
        if self.raw:
            image = ((image.to(torch.float32) - self.mean) / self.std).permute(0, 3, 1, 2)
        height, width = image.shape[2], image.shape[3]
        image = image.index_select(2, self.index(height, image)).index_select(3, self.index(width, image))
        values = self.network(image.contiguous())[:, :, :height, :width]
        if self.output == "logits":
            return values
        values = values.sigmoid() if self.sigmoid else values.softmax(dim=1)
        if self.output == "probabilities":
            return values
        mask = values[:, 0] >= self.threshold if self.alone else values.argmax(dim=1)
        return mask.to(torch.uint8)

    def index(self, size: int, image: Tensor) -> Tensor:
        """See tiling.reflect_index."""
        frame = (max(size, self.least) + self.stride - 1) // self.stride * self.stride
        period = max(2 * (size - 1), 1)
        place = torch.arange(frame, device=image.device) % period
        return torch.minimum(place, (2 * (size - 1) - place).clamp_min(0))


def export_script(network: nn.Module, config: ModelConfig, shell: Shell, metadata: dict[str, str]) -> bytes:
    """Trace a network and script what goes around it.

    Args:
        network: on the CPU, in evaluation mode. metadata: goes into the file beside the description of the network.

    Returns:
        The content of a file for torch.jit.load.

    Raises:
        ExportError: PyTorch cannot trace it.
    """
    network = make_exportable(copy.deepcopy(network).float()).eval()
    sides = frame_of(shell.size, config) if shell.size else (max(config.min_side, 3 * config.stride),) * 2
    sample = torch.zeros(1 if shell.size else 2, len(config.channels), *sides)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(network, sample, check_trace=False)
            script = torch.jit.script(_Shelled(traced, config, shell).eval())  # type: ignore[arg-type]
            content = json.dumps({"config": config_to_dict(config), **metadata}, ensure_ascii=False)
            file = io.BytesIO()
            torch.jit.save(script, file, _extra_files={DESCRIPTION: content})
    except Exception as error:  # tracing runs the network's own Python
        raise ExportError(f"TorchScript: {shorten_error(error)}") from error
    return file.getvalue()


def is_ours(path: Path) -> bool:
    """Whether a file is one of `export_script`, by the names in its archive; nothing in it is run."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(f"/extra/{DESCRIPTION}") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def script_runner(content: bytes) -> Callable[[np.ndarray], np.ndarray]:
    """What TorchScript makes of a file's input on the CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.load(io.BytesIO(content), map_location="cpu").eval()

    def run(batch: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return script(torch.from_numpy(batch)).numpy()

    return run
