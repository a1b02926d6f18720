"""A tiny network with random weights in a checkpoint, and pictures on which its answer has objects."""

import cv2
import numpy as np
import tifffile
import torch

from checkpoint import Geometry, ModelConfig, save_checkpoint
from model import build_model

CLASSES = {1: ("background", "object"), 4: ("background", "one", "two", "three")}


def write_checkpoint(path, *, classes=1, seed=0, state=None, **changes):
    """Write a plain U-Net whose normalisation statistics are random too, so that its answers vary; return the config.

    Args:
        state: weights of another network instead.
    """
    values = {
        "architecture": "plain-unet",
        "encoder": "plain-8",
        "labels": (1,) if classes == 1 else (10, 20, 30),
        "class_names": CLASSES[classes],
        "channels": ("red", "green", "blue"),
        "mean": (120.0, 120.0, 120.0),
        "std": (40.0, 40.0, 40.0),
        "geometry": Geometry("crops", (64, 64), 64, 16, 4),
        "stride": 16,
        "min_side": 16,
        "batch": 4,
    }
    config = ModelConfig(**(values | changes))
    if state is None:
        state = random_network(config, seed).state_dict()
    save_checkpoint(path, config, state)
    return config


def random_network(config, seed):
    torch.manual_seed(seed)
    network = build_model(
        config.architecture, config.encoder, in_channels=len(config.channels), num_logits=config.num_logits
    )
    for layer in network.modules():
        if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
            layer.running_mean.normal_(0, 0.3)
            layer.running_var.uniform_(0.5, 2)
            layer.weight.data.uniform_(0.5, 1.5)
            layer.bias.data.normal_(0, 0.2)
    return network


def blobs(height, width, seed=0, channels=3, dtype=np.uint8):
    """Smooth random colours (height, width, channels) around the middle of the type's range."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(height, width, channels)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 6).reshape(height, width, channels)
    values = np.clip(127 + smooth / max(float(smooth.std()), 1e-6) * 50, 0, 255)
    return (values * (np.iinfo(dtype).max / 255)).astype(dtype)


def write_slide(path, pixels, *, tile=64, **options):
    """Write a tiled, compressed TIFF."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"tile": tile and (tile, tile), "compression": "zlib", "photometric": "rgb", "metadata": None} | options
    tifffile.imwrite(path, pixels, **options)
    return path


def write_split(folder, count=2, size=(70, 90)):
    """Images with masks whose object is what is bright."""
    for name in ("images", "gt"):
        (folder / name).mkdir(parents=True)
    for number in range(count):
        image = blobs(*size, seed=number)
        cv2.imwrite(str(folder / "images" / f"{number}.png"), image[..., ::-1])
        cv2.imwrite(str(folder / "gt" / f"{number}.png"), (image.mean(axis=2) > 130).astype(np.uint8))
    return folder
