"""What every test gets: its own cache, one thread, a fresh Accelerate, and a small data set to read."""

import sys
from pathlib import Path

import cv2
import pytest
import torch
from discs import write_dataset


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Small arrays do not gain from threads, and other processes lose by them."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Scans of the user's own data sets are neither read nor added to."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch):
    """Accelerate keeps device and precision in a state that all its objects share."""
    monkeypatch.delenv("ACCELERATE_TORCH_DEVICE", raising=False)
    yield
    if "accelerate.state" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(True)


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory) -> Path:
    """Root of a data set with 8 training and 4 validation images of discs, 32 x 32; read it only."""
    return write_dataset(tmp_path_factory.mktemp("data") / "discs", train=8, val=4)
