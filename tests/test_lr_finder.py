"""The range test: smoothing and suggestions on curves worked out by hand, and what it leaves alone."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from discs import write_dataset
from torch import nn

import lr_finder
import train
from dataset import Batch
from learner import FitOptions
from losses import build_loss


class Noise:
    """Batches of noise whose masks a 1x1 convolution can learn; counts how often it is gone through."""

    def __init__(self, length=3):
        self.length, self.epochs = length, []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __iter__(self):
        rng = torch.Generator().manual_seed(self.epochs[-1])
        for _ in range(self.length):
            images = torch.randn(2, 3, 8, 8, generator=rng)
            yield Batch(images, (images[:, 0] > 0).to(torch.uint8), ("a", "b"))


def linear_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 1, 1))


def search(steps=60, network=None, batches=None, **options):
    network, batches = network or linear_network(), batches or Noise()
    chosen = FitOptions(**{"optimiser": "SGD", "momentum": 0, **options})
    loss = build_loss("bce", num_logits=1)
    return lr_finder.find_rate(network, batches, loss, chosen, 1, device="cpu", steps=steps)


def test_rates_rise_evenly_in_their_logarithm():
    rates = lr_finder.rising_rates(50)
    assert rates[0] == 1e-7 and rates[-1] == pytest.approx(10)
    assert np.diff(np.log(rates)) == pytest.approx(math.log(1e8) / 49)


@pytest.mark.parametrize("deviation", [1.0, 5.0])
def test_smoothing_is_a_weighted_mean_without_delay(deviation):
    values = np.random.default_rng(0).normal(size=30).tolist()
    for place, smoothed in enumerate(lr_finder.smooth(values, deviation)):
        weights = [math.exp(-((other - place) ** 2) / (2 * deviation**2)) for other in range(30)]
        assert smoothed == pytest.approx(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))
    valley = [abs(place - 15) for place in range(31)]
    assert int(np.argmin(lr_finder.smooth(valley, deviation))) == 15
    assert lr_finder.smooth([], deviation) == []


def curve(flat, low, top=1.0):
    """Loss 1 until the rate `flat`, falling to 0.2 at `low` (fastest in the middle), then rising."""
    rates = lr_finder.rising_rates(400)
    values = []
    for rate in rates:
        along = (math.log(rate) - math.log(flat)) / (math.log(low) - math.log(flat))
        values.append(0.6 + 0.4 * math.cos(math.pi * min(max(along, 0), 1)) if along <= 1 else 0.2 + (along - 1) * top)
    return rates, values


def test_suggestions_of_a_known_curve():
    rates, values = curve(1e-4, 1e-1)
    steepest, suggestion = lr_finder.suggest(rates, values)
    assert suggestion == pytest.approx(1e-2, rel=0.06)
    assert steepest == pytest.approx(math.sqrt(1e-4 * 1e-1), rel=0.06)


@pytest.mark.parametrize("values", [[1.0] * 40, list(np.linspace(1, 3, 40)), [1.0, 0.995] * 20, [1.0, 0.5]])
def test_a_loss_that_does_not_fall_gives_no_suggestion(values):
    rates = lr_finder.rising_rates(max(10, len(values)))[: len(values)]
    assert lr_finder.suggest(rates, values) == (None, None)


def test_a_rate_that_explodes_ends_the_search_and_is_far_above_the_suggestion():
    network = linear_network()
    before, batches = copy.deepcopy(network.state_dict()), Noise()
    result = search(steps=120, network=network, batches=batches)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert batches.epochs == list(range(len(batches.epochs))) and len(batches.epochs) > 10
    assert len(result.rates) == len(result.losses) == len(result.smoothed) <= 120
    assert result.losses[0] == pytest.approx(search(steps=10).losses[0]), "the first step is not affected by others"
    assert 0.01 < result.suggestion < result.rates[-1]
    assert min(result.losses) < 0.7 * result.losses[0]


def test_what_is_not_finite_ends_the_search():
    class Bursts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.calls = nn.Conv2d(3, 1, 1), 0

        def forward(self, image):
            self.calls += 1
            return self.layer(image) * (math.nan if self.calls > 7 else 1.0)

    assert len(search(network=Bursts()).rates) == 7


def test_accumulated_batches_are_one_step():
    single, double = search(steps=12, batches=Noise(4)), search(steps=12, batches=Noise(4), accumulate=2)
    assert double.losses[0] == pytest.approx((single.losses[0] + single.losses[1]) / 2, rel=1e-4)


@pytest.fixture
def run(tmp_path):
    root = write_dataset(tmp_path / "discs", train=4, val=2)
    network = ["-m", "plain-unet", "--encoder", "plain-8", "--image-size", "32", "-b", "2", "-a", "safe", "-w", "0"]
    return [*map(str, ["-d", root, "-log", tmp_path / "logs", "--exp-name", "run", "--cpu", *network])]


def test_the_command_leaves_a_run_as_it_is(run, tmp_path, capsys):
    train.main([*run, "-e", "1"])
    folder = tmp_path / "logs" / "run"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    train.main([*run, "--lr-find", "30", "--optim", "Adam"])
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert after.keys() - before.keys() == {"lr_find.png", "lr_find.json"}
    assert {name: after[name] for name in before} == before
    said, found = capsys.readouterr().out, json.loads(after["lr_find.json"])
    assert "lr_find.png" in said and f"suggested: -lr {found['suggestion']:.1g}" in said
    assert after["lr_find.png"].startswith(b"\x89PNG")


def test_the_command_starts_no_run(run, tmp_path, capsys):
    train.main([*run, "--lr-find", "12", "--freeze-encoder", "1", "--encoder-lr-scale", "0.1", "-b", "auto"])
    assert {path.name for path in (tmp_path / "logs" / "run").iterdir()} == {"lr_find.png", "lr_find.json"}
    assert "epoch" not in capsys.readouterr().out
