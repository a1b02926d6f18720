"""How much memory a training step takes, found out without taking it, and how much there is."""

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optim import resolve_optimiser

# Copies of the weights that an optimiser keeps besides them and their gradients.
STATES = {"SGD": 1, "Adagrad": 1, "ASGD": 1, "RMSprop": 1, "LARS": 1}
OTHER_STATES = 2
# Autocast keeps about half of what is kept for the backward pass in 16 bits; sums and normalisations stay as they are.
AMP_SHARE = 0.6
OVERHEAD = 1.15  # of the activations: what allocators round up and kernels have in work, measured on five networks
LOSS_COPIES = 6  # of the logits, in the loss and its gradient
WORKER = 250 << 20  # bytes of a loader process besides its batches
BATCHES_AHEAD = 2  # that each loader process holds
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a training step needs at its height.

    weights: parameters, their gradients, the optimiser's state. activations: what the forward pass keeps for the
    backward pass, and what that has in work. loader: batches that are read ahead, in memory of the processor.
    """

    weights: int
    activations: int
    loader: int = 0

    @property
    def step(self) -> int:
        """Bytes where the network is."""
        return self.weights + self.activations


def estimate_step(
    network: nn.Module,
    shape: Sequence[int],
    *,
    optimiser: str = "AdamW",
    averaged: bool = False,
    amp: bool = False,
    workers: int = 0,
) -> StepMemory:
    """Find out what a training step needs by a forward pass on the meta device, which computes nothing.

    Args:
        network: any device; it is not changed.
        shape: of a batch, (N, C, H, W).
        optimiser: its name; decides how many numbers are kept for each weight.
        averaged: a moving average of the weights is kept too.
        workers: loader processes.

    Raises:
        RuntimeError, NotImplementedError: the network needs values, which meta has not.
    """
    learned = sum(size_of(weight) for weight in network.parameters() if weight.requires_grad)
    frozen = sum(size_of(weight) for weight in network.parameters() if not weight.requires_grad)
    copies = 2 + STATES.get(resolve_optimiser(optimiser), OTHER_STATES) + averaged
    kept, largest, logits = saved_bytes(network, shape)
    share = AMP_SHARE if amp else 1.0
    batch = 4 * torch.Size(shape).numel()
    activations = round(OVERHEAD * (share * (kept + 2 * largest) + LOSS_COPIES * logits))
    loader = (workers * BATCHES_AHEAD + 1) * batch + workers * WORKER
    return StepMemory(copies * learned + (1 + averaged) * frozen, activations, loader)


def saved_bytes(network: nn.Module, shape: Sequence[int]) -> tuple[int, int, int]:
    """Bytes that a forward pass keeps for the backward pass, of the largest tensor among them, and of the logits."""
    copied = meta_copy(network).train()
    own = {storage_id(weight) for weight in (*copied.parameters(), *copied.buffers())}
    sizes: dict[int, int] = {}
    held: list[torch.Tensor] = []  # an id is one tensor's as long as that lives

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if storage_id(tensor) not in own:
            sizes[storage_id(tensor)] = tensor.untyped_storage().nbytes()
            held.append(tensor)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = copied(torch.empty(*shape, device="meta"))
    return sum(sizes.values()), max(sizes.values(), default=0), size_of(logits)


def meta_copy(network: nn.Module) -> nn.Module:
    """The same network on the meta device; its weights are never copied."""
    known: dict[int, Any] = {}
    for weight in network.parameters():
        known[id(weight)] = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=weight.requires_grad)
    for buffer in network.buffers():
        known[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(network, known)


def storage_id(tensor: torch.Tensor) -> int:
    """What tells the memory of a tensor from that of others; views share it."""
    return tensor.untyped_storage()._cdata


def size_of(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's own elements."""
    return tensor.numel() * tensor.element_size()


def free_bytes(device: str, *, group: Path = CGROUP, facts: Path = Path("/proc/meminfo")) -> int | None:
    """Memory that is free on a device, None where the system does not say; of the processor what a container leaves."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    found = []
    if facts.is_file():
        lines = dict(line.split(":", 1) for line in facts.read_text().splitlines() if ":" in line)
        if "MemAvailable" in lines:
            found.append(1024 * int(lines["MemAvailable"].split()[0]))
    limit, used = (_number(group / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        # The kernel gives back what it holds of files when a process needs it.
        cached = _number(group / "memory.stat", key="inactive_file") or 0
        found.append(max(0, limit - used + cached))
    if not found and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))  # all that is built in
    return min(found, default=None)


def _number(path: Path, key: str = "") -> int | None:
    """The number in a file of the kernel, or behind the key in it; None where there is none."""
    try:
        words = path.read_text().split()
    except OSError:
        return None
    if key:
        words = words[words.index(key) + 1 :] if key in words else []
    return int(words[0]) if words and words[0].isdecimal() else None


def step_lines(
    network: nn.Module, shape: Sequence[int], device: str, options: Mapping[str, Any], *, workers: int
) -> list[str]:
    """What to say before the first epoch: the estimate beside what is free, and a warning where that is little.

    Args:
        options: for estimate_step: optimiser, averaged, amp.
    """
    try:
        need = estimate_step(network, shape, workers=workers, **options)
    except (RuntimeError, NotImplementedError):
        return ["memory: no estimate of what a step takes, this network computes with the values of images"]
    free = free_bytes(device)
    here = device.startswith("cuda") or device == "mps"  # the network has a memory of its own
    total = need.step if here else need.step + need.loader
    line = (
        f"memory: a step takes about {spell_bytes(need.step)} ({spell_bytes(need.activations)} for the images and what "
        f"is computed from them, {spell_bytes(need.weights)} for weights and optimiser)"
    )
    if need.loader and not here:
        line += f", loading {spell_bytes(need.loader)}"
    if free is None or device == "mps":
        return [line]
    lines = [f"{line}; {spell_bytes(free)} are free"]
    if total > free:
        lines.append(
            f"warning: that is more than the {spell_bytes(free)} that are free: lower -b (--accumulate keeps the size "
            "of a step) or --image-size, take a smaller encoder, or --amp bf16"
        )
    return lines


def spell_bytes(count: int) -> str:
    """A number of bytes in MB or GB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
