"""What turns a batch of normalised images into probabilities."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from checkpoint import ModelConfig, load_checkpoint
from model import build_model, to_probabilities

Forward = Callable[[np.ndarray], np.ndarray]


def torch_forward(model: nn.Module, device: str, activation: str = "auto") -> Forward:
    """Make the function that predicts with PyTorch.

    It runs in float32 without autocast, on channels-last images whatever the layout of the weights, and leaves the
    network in evaluation mode, so the same weights give the same counts in training, validate and predict.

    Returns:
        A function from (N, C, h, w) float32 to probabilities (N, K, h, w) float32.

    Raises:
        RuntimeError: the device is out of memory; the message names size and batch.
    """
    model.to(device)

    @torch.inference_mode()
    def forward(batch: np.ndarray) -> np.ndarray:
        model.eval()
        images = torch.from_numpy(batch).to(device).contiguous(memory_format=torch.channels_last)
        try:
            with torch.autocast(torch.device(device).type, enabled=False):
                probs = to_probabilities(model(images), activation)
        except torch.cuda.OutOfMemoryError as error:
            raise RuntimeError(out_of_memory(batch.shape)) from error
        return probs.contiguous().cpu().numpy()

    return forward


def load_forward(path: Path, device: str) -> tuple[ModelConfig, Forward]:
    """Read a checkpoint and make the function that predicts with it; nothing is downloaded.

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
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return config, torch_forward(network, device, config.activation)


def out_of_memory(shape: tuple[int, ...]) -> str:
    """What to tell a user whose batch (N, C, H, W) did not fit into the device."""
    return (
        f"out of memory with a batch of {shape[0]} images of {shape[2]}x{shape[3]}: "
        "lower -b, or the size (--image-size, --tile-size)"
    )
