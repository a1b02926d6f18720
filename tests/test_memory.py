"""The estimate of a step's memory: what is kept for the backward pass, copies of the weights, what is free."""

import copy

import pytest
import torch
from discs import write_dataset
from torch import nn

import memory
import optim
import train
from model import build_model

SHAPE = (2, 3, 64, 64)


def real_bytes(network, shape):
    """The same count in a forward pass that computes."""
    own = {memory.storage_id(tensor) for tensor in (*network.parameters(), *network.buffers())}
    found, held = {}, []

    def keep(tensor):
        found[memory.storage_id(tensor)] = tensor.untyped_storage().nbytes()
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network.train()(torch.rand(*shape))
    return sum(size for key, size in found.items() if key not in own)


def test_what_a_convolution_and_a_relu_keep():
    network = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU())
    pixels = 2 * 64 * 64 * 4
    assert memory.saved_bytes(network, SHAPE) == (3 * pixels + 5 * pixels, 5 * pixels, 5 * pixels)
    need = memory.estimate_step(network, SHAPE, optimiser="AdamW", workers=0)
    weights = 4 * (5 * 3 * 9 + 5)
    assert need.weights == 4 * weights, "weights, gradients, two moments"
    assert need.activations == round(memory.OVERHEAD * (3 + 5 + 2 * 5 + memory.LOSS_COPIES * 5) * pixels)
    assert need.step == need.weights + need.activations and need.loader == 3 * pixels
    assert memory.estimate_step(network, SHAPE, averaged=True).weights == 5 * weights
    assert memory.estimate_step(network, SHAPE, amp=True).activations < need.activations


def test_frozen_weights_need_neither_gradient_nor_state():
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 1, 1))
    network[0].requires_grad_(False)
    assert memory.estimate_step(network, SHAPE).weights == 4 * (5 * 27 + 5) + 4 * 4 * (5 + 1)


@pytest.mark.parametrize(
    ("architecture", "encoder"), [("plain-unet", "plain-8"), ("unet", "resnet18"), ("deeplabv3+", "mobilenet_v2")]
)
def test_meta_keeps_what_computing_keeps(architecture, encoder):
    network = build_model(architecture, encoder, in_channels=3, num_logits=2)
    assert memory.saved_bytes(network, SHAPE)[0] == pytest.approx(real_bytes(network, SHAPE), rel=0.02)


@pytest.mark.parametrize("name", optim.OPTIMISERS)
def test_copies_of_the_weights_are_those_of_the_optimiser(name):
    network = nn.Conv2d(8, 8, 3)
    optimiser = optim.build_optimiser(name, network, lr=1e-3, weight_decay=0, momentum=0.9)
    network(torch.rand(1, 8, 9, 9)).sum().backward()
    optimiser.step()
    states = [value for state in optimiser.state.values() for value in state.values() if torch.is_tensor(value)]
    kept = sum(memory.size_of(value) for value in states if value.numel() > 1)
    weights = sum(memory.size_of(weight) for weight in network.parameters())
    assert memory.estimate_step(network, (1, 8, 9, 9), optimiser=name.lower()).weights == 2 * weights + kept


def test_the_network_stays_as_it_is():
    network = build_model("plain-unet", "plain-8", in_channels=3, num_logits=1).eval()
    before = copy.deepcopy(network.state_dict())
    memory.estimate_step(network, SHAPE)
    assert not any(module.training for module in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(weight.grad is None and weight.device.type == "cpu" for weight in network.parameters())


def test_more_pixels_need_more():
    network = build_model("plain-unet", "plain-8", in_channels=3, num_logits=1)
    one, four = (memory.estimate_step(network, (count, 3, 64, 64)) for count in (1, 4))
    assert four.activations == pytest.approx(4 * one.activations, rel=0.01) and four.weights == one.weights
    assert memory.estimate_step(network, SHAPE, workers=3).loader > 3 * memory.WORKER


# ---- what is free ----


def kernel(tmp_path, **files):
    for name, text in files.items():
        (tmp_path / name.replace("_", ".")).write_text(text)
    facts = tmp_path / "meminfo"
    facts.write_text("MemTotal:       8000 kB\nMemFree: 1 kB\nMemAvailable:    3000 kB\nEmpty\n")
    return {"group": tmp_path, "facts": facts}


def test_free_memory_is_what_the_system_or_the_container_leaves(tmp_path):
    assert memory.free_bytes("cpu", **kernel(tmp_path)) == 3000 * 1024
    limited = kernel(
        tmp_path, memory_max="1000000\n", memory_current="900000\n", memory_stat="anon 5\ninactive_file 50000\n"
    )
    assert memory.free_bytes("cpu", **limited) == 150000
    assert memory.free_bytes("cpu", **kernel(tmp_path, memory_max="max\n")) == 3000 * 1024
    nothing = {"group": tmp_path / "none", "facts": tmp_path / "none"}
    assert memory.free_bytes("cpu", **nothing) is None or memory.free_bytes("cpu", **nothing) > 1 << 28
    assert memory.free_bytes("cpu") > 0


def lines(monkeypatch, free, network=None, device="cpu", **options):
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    network = network or nn.Conv2d(3, 5, 3)
    return memory.step_lines(network, (8, 3, 512, 512), device, options, workers=0)


def test_a_line_and_a_warning_where_memory_is_short(monkeypatch):
    (line,) = lines(monkeypatch, 64 << 30)
    assert line.startswith("memory: a step takes about ") and line.endswith("68.7 GB are free") and " MB" in line
    line, warning = lines(monkeypatch, 100 << 20)
    assert "105 MB are free" in line
    assert warning.startswith("warning: ") and "-b" in warning and "--image-size" in warning and "105 MB" in warning
    assert len(lines(monkeypatch, None)) == 1 and "free" not in lines(monkeypatch, None)[0]
    assert len(lines(monkeypatch, 1, device="mps")) == 1


def test_a_graphics_card_does_not_hold_what_is_read_ahead(monkeypatch):
    need = memory.estimate_step(nn.Conv2d(3, 5, 3), (8, 3, 512, 512))
    assert len(lines(monkeypatch, need.step + 1, device="cuda")) == 1
    assert len(lines(monkeypatch, need.step + 1)) == 2


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 1, 1)

    def forward(self, images):
        return self.layer(images) if images.sum().item() > 0 else images


def test_a_network_that_reads_values_is_not_estimated(monkeypatch):
    (line,) = lines(monkeypatch, 1 << 30, Reader())
    assert line.startswith("memory: no estimate")


def test_training_says_it_before_the_first_epoch(tmp_path, capsys):
    data = write_dataset(tmp_path / "data", train=2, val=1)
    words = ["-d", data, "-m", "plain-unet", "--encoder", "plain-8", "--image-size", 32, "-e", 1, "-w", 0, "-b", 2]
    train.main([str(word) for word in [*words, "-log", tmp_path, "--exp-name", "run", "--cpu", "-a", "none"]])
    out = capsys.readouterr().out
    assert "memory: a step takes about " in out.split("epoch 1")[0] and "epoch 1" in out
