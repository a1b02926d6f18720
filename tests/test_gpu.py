"""What only a CUDA device can show: the same answers as the CPU, no waiting at each step, memory that runs out."""

import json
import warnings

import numpy as np
import pytest
import torch
from discs import write_dataset
from tiny_runs import blobs, random_network, write_checkpoint, write_slide

import predict
import train
import validate
from backends import load_forward, torch_forward
from checkpoint import load_checkpoint
from dataset import Batch
from image_io import read_mask
from learner import FitOptions, build_learner
from losses import LOSSES, build_loss
from optim import ScheduleOptions
from trainer import TrainingStopped, add_counts, train_one_epoch

pytestmark = pytest.mark.gpu

SMALL = ["-m", "plain-unet", "--encoder", "plain-8", "--image-size", "32", "-b", "2", "-a", "light", "--worst", "1"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def network_and_config(tmp_path, classes=1, seed=0):
    config = write_checkpoint(tmp_path / "run.pth", classes=classes, seed=seed)
    return random_network(config, seed).to(memory_format=torch.channels_last), config


def write_path(tmp_path):
    write_checkpoint(tmp_path / "run.pth")
    return tmp_path / "run.pth"


def make_learner(network, device="cuda", **options):
    chosen = FitOptions(**{"schedule": ScheduleOptions("constant"), **options})
    return build_learner(network, chosen, device=device, steps=1), chosen


def random_batch(seed, size=2, side=32):
    rng = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, side, side, generator=rng)
    masks = (images[:, 0] > 0.3).to(torch.uint8)
    return Batch(images, masks, tuple(f"image{seed}_{i}" for i in range(size))).pin_memory()


def noise(*shape):
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


# ---- prediction ----


@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize(("amp", "gap"), [("no", 5e-3), ("fp16", 2e-2), ("bf16", 1e-1)])
def test_probabilities_are_those_of_the_cpu(tmp_path, classes, amp, gap):
    network, _ = network_and_config(tmp_path, classes)
    batch = noise(3, 3, 48, 80)
    exact = torch_forward(network, "cpu")(batch)
    rough = load_forward(tmp_path / "run.pth", "cuda", amp=amp)[1](batch)
    assert rough.shape == exact.shape == (3, classes, 48, 80) and rough.dtype == np.float32
    assert 0 < np.abs(rough - exact).max() < gap
    if classes > 1:
        np.testing.assert_allclose(rough.sum(1), 1, atol=1e-5)


@pytest.mark.parametrize("amp", ["no", "fp16"])
def test_recorded_work_is_the_work_done_step_by_step(tmp_path, amp):
    network, _ = network_and_config(tmp_path)
    plain, recorded = torch_forward(network, "cuda", amp=amp), torch_forward(network, "cuda", amp=amp, fixed=True)
    rng = np.random.default_rng(0)
    for call in range(10):
        batch = rng.standard_normal((1 if call % 4 == 3 else 2, 3, 64, 64)).astype(np.float32)
        np.testing.assert_allclose(recorded(batch), plain(batch), atol=1e-6 if amp == "no" else 5e-3)


def test_work_that_cannot_be_recorded_is_done_step_by_step():
    class Waits(torch.nn.Module):
        def forward(self, x):
            return x[:, :1] * float(x.mean())  # its value comes back to the CPU in between

    forward, batch = torch_forward(Waits(), "cuda", fixed=True), noise(1, 3, 8, 8)
    exact = torch_forward(Waits(), "cpu")(batch)
    for _ in range(6):
        np.testing.assert_allclose(forward(batch), exact, atol=1e-6)


def test_what_was_returned_is_not_written_over(tmp_path):
    forward = load_forward(write_path(tmp_path), "cuda", amp="fp16")[1]
    batches = [noise(2, 3, 32, 32) * scale for scale in (1, 2, 3)]
    first = [forward(batch) for batch in batches]
    kept = [probs.copy() for probs in first]
    for _ in range(20):
        forward(batches[0])
    for probs, copy in zip(first, kept, strict=True):
        np.testing.assert_array_equal(probs, copy)
        probs += 1  # the array is the caller's
    assert not np.array_equal(kept[0], kept[1])


def test_layouts_of_arrays_do_not_matter(tmp_path):
    forward = load_forward(write_path(tmp_path), "cuda")[1]
    batch = noise(2, 3, 32, 64)
    turned = np.ascontiguousarray(batch.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(forward(turned), forward(batch), atol=1e-6)
    np.testing.assert_allclose(forward(batch[:, :, :, :48]), forward(batch[:, :, :, :48].copy()), atol=1e-6)


@pytest.mark.parametrize("more", [(), ("--amp", "fp16"), ("--amp", "bf16"), ("--tta", "d4"), ("-b", "1")])
def test_slides_get_the_masks_of_the_cpu(tmp_path, more):
    path, slide = write_path(tmp_path), write_slide(tmp_path / "slide.tif", blobs(300, 420))
    common = ["-c", str(path), "-i", str(slide), "--backend", "torch", "--thumbnails", "0"]
    masks = []
    for device in ("cuda", "cpu"):
        own = [] if device == "cpu" and "--amp" in more else more  # precision is for GPUs
        out = tmp_path / device
        predict.main([*common, "--save", "mask,labels,geojson", "-o", str(out), "--device", device, *own])
        masks.append(read_mask(out / "masks" / "slide.png"))
        assert (out / "geojson" / "slide.geojson").is_file()
    assert 0.05 < (masks[1] > 0).mean() < 0.95
    assert (masks[0] == masks[1]).mean() > (0.97 if "bf16" in more else 0.99)


def test_numbers_too_large_for_float16_are_told_from_bad_pixels(tmp_path):
    network, _ = network_and_config(tmp_path)
    with torch.no_grad():
        next(network.parameters()).mul_(1e6)
    batch = noise(1, 3, 32, 32)
    assert np.isfinite(torch_forward(network, "cuda", amp="bf16")(batch)).all()
    forward = torch_forward(network, "cuda", amp="fp16")
    with pytest.raises(RuntimeError, match="left the range of float16 .* --amp bf16, or --amp no"):
        forward(batch)
    batch[0, 0, 3, 3] = np.nan
    assert np.isnan(forward(batch)).any(), "whoever cut the tile says which one it is"


def test_memory_that_runs_out_is_named_and_the_next_batch_works(tmp_path):
    forward = load_forward(write_path(tmp_path), "cuda")[1]
    learner, options = make_learner(random_network(load_checkpoint(tmp_path / "run.pth")[0], 0))
    loss = build_loss("dice", num_logits=1)
    expected = forward(noise(1, 3, 64, 64))
    large = [np.zeros((4, 3, 2048, 2048), np.float32), np.zeros((8, 3, 4096, 4096), np.float32)]
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + 600e6) / total))
    try:
        for batch in large:  # the network has no room, then the batch itself
            size = f"batch of {len(batch)} images of {batch.shape[2]}x{batch.shape[2]}: lower -b"
            with pytest.raises(RuntimeError, match=size):
                forward(batch)
            labelled = Batch(torch.from_numpy(batch), torch.zeros(batch[:, 0].shape, dtype=torch.uint8), ("a",))
            with pytest.raises(TrainingStopped, match=size):
                train_one_epoch(learner, [labelled], loss, options, 1)
        np.testing.assert_allclose(forward(noise(1, 3, 64, 64)), expected, atol=1e-5)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


# ---- training ----


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("weighted", [False, True])
def test_losses_are_those_of_the_cpu(name, weighted):
    classes = 1 if name == "bce" else 3
    weights = torch.arange(1.0, max(classes, 2) + 1) if weighted and name in ("bce", "ce", "focal") else None
    try:
        loss = build_loss(name, num_logits=classes, class_weights=weights)
    except ValueError:
        pytest.skip("this loss takes no weights of this kind")
    rng = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, classes, 24, 40, generator=rng)
    mask = torch.randint(0, max(classes, 2), (2, 24, 40), generator=rng, dtype=torch.uint8)
    mask[:, :3] = 255
    values, slopes = [], []
    for device in ("cpu", "cuda"):
        inputs = logits.detach().clone().to(device).requires_grad_()
        value = loss(inputs, mask.to(device))
        value.backward()
        values.append(value.item())
        slopes.append(inputs.grad.cpu())
    assert values[1] == pytest.approx(values[0], rel=1e-5)
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("classes", [1, 2, 21])
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 33, 47), (4, 256, 256)])
def test_counts_are_those_of_the_cpu(classes, size):
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(size[0], classes, *size[1:], generator=rng)
    masks = torch.randint(0, max(classes, 2), size, generator=rng)
    masks[torch.rand(size, generator=rng) < 0.2] = 255
    tables = []
    for device in ("cpu", "cuda"):
        counts = torch.ones(max(classes, 2) + 1, max(classes, 2), dtype=torch.int64, device=device)
        for _ in range(2):
            add_counts(counts, logits.to(device), masks.to(device))
        tables.append(counts.cpu())
    assert torch.equal(*tables) and int(tables[0].sum()) == 2 * masks.numel() + tables[0].numel()


@pytest.mark.parametrize("amp", ["no", "bf16", "fp16"])
def test_learning_in_every_precision(tmp_path, amp):
    network, config = network_and_config(tmp_path)
    learner, options = make_learner(network, amp=amp, lr=0.01, clip=1.0, accumulate=2)
    loss, batches = build_loss("0.5*bce+0.5*dice", num_logits=1), [random_batch(seed) for seed in range(4)]
    losses = [train_one_epoch(learner, batches, loss, options, config.num_logits)["loss"] for _ in range(15)]
    assert losses[-1] < 0.6 * losses[0] and all(np.isfinite(losses))
    assert all(parameter.dtype == torch.float32 for parameter in learner.network.parameters())
    assert all(parameter.is_cuda for parameter in learner.network.parameters())
    state = learner.state()
    assert len(state["rng"]["cuda"]) == 1 and bool(state["scaler_state_dict"]) == (amp == "fp16")


@pytest.mark.parametrize("amp", ["no", "fp16"])
def test_steps_do_not_wait_for_the_device(tmp_path, amp):
    """float16 waits once a step, where its scaler asks whether a gradient is infinite."""
    network, _ = network_and_config(tmp_path)
    learner, options = make_learner(network, amp=amp)
    loss, batches = build_loss("0.5*bce+0.5*dice", num_logits=1), [random_batch(seed) for seed in range(15)]
    train_one_epoch(learner, batches, loss, options, 1)  # the optimiser makes its state
    waits = []
    for count in (5, 15):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            train_one_epoch(learner, batches[:count], loss, options, 1)
            torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchroniz" in str(item.message) for item in caught))
    assert waits[1] - waits[0] <= (0 if amp == "no" else 10), waits
    assert 0 < waits[0] < 12


def test_a_run_on_a_cpu_leaves_the_gpu_alone(tmp_path):
    learner, _ = make_learner(network_and_config(tmp_path)[0], device="cpu")
    assert learner.state()["rng"]["cuda"] == []


@pytest.mark.parametrize("amp", ["no", "fp16", "bf16"])
def test_a_stopped_run_goes_on_and_its_checkpoint_works_on_a_cpu(tmp_path, amp, capsys):
    data, run = write_dataset(tmp_path / "discs", train=6, val=3), tmp_path / "logs" / "run"
    words = ["-d", str(data), "-log", str(tmp_path / "logs"), "--exp-name", "run", *SMALL, "--amp", amp]
    words += ["-lr", "0.01", "--class-weights", "auto", "--loss", "0.5*bce+0.5*dice", "--device", "cuda"]
    train.main([*words, "-w", "0", "-e", "2"])
    before = load_checkpoint(run / "last_checkpoint")[1]
    train.main([*words, "-w", "2", "-e", "4"])
    assert f"going on in {run} after epoch 2" in capsys.readouterr().out
    after = load_checkpoint(run / "last_checkpoint")[1]
    assert after["progress"]["step"] == 2 * before["progress"]["step"] == 12
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    scores = []
    for device in ("cuda", "cpu"):
        found = tmp_path / f"{device}.json"
        words = ["-d", str(data / "val"), "-cd", str(run), "--device", device, "--backend", "torch"]
        validate.main([*words, "--metrics-json", str(found)])
        scores.append(json.loads(found.read_text()))
    best = max(row["val"]["discs"]["iou"] or 0 for row in rows)
    assert scores[0]["iou"] == pytest.approx(best, abs=1e-6), "training scores as validate.py does, whatever --amp"
    assert scores[1]["iou"] == pytest.approx(best, abs=0.01)


def test_scores_of_a_training_in_half_precision_are_in_float32(tmp_path):
    network, _ = network_and_config(tmp_path)
    batch = noise(2, 3, 64, 64)
    exact = torch_forward(network, "cuda")(batch)
    learner, _ = make_learner(network, amp="fp16")
    np.testing.assert_allclose(torch_forward(learner.network, "cuda")(batch), exact, atol=1e-6)
