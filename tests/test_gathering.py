"""Gathered sums, rows and statistics: two processes give what one gives, gradients included."""

import copy
import subprocess
import sys

import pytest
import ssl_processes
import torch
from torch import nn

from gathering import GatheredBatchNorm, gather_over, gather_statistics, sum_over
from model import build_model
from selfsupervised.encoders import build_encoder
from selfsupervised.interface import METHODS


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, ssl_processes.__file__, str(folder)]
    subprocess.run(command, check=True, timeout=120)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def far(ours, theirs):
    """The largest difference between tensors of the same names, as a share of the largest value."""
    assert ours.keys() == theirs.keys()
    shares = {
        name: float((ours[name].double() - value.double()).abs().max() / value.double().abs().max().clamp_min(1e-3))
        for name, value in theirs.items()
    }
    return max(shares.items(), key=lambda item: item[1])


def test_one_process_alone_gets_back_what_it_gave():
    values = torch.randn(3, 2, requires_grad=True)
    assert sum_over(values) is values and gather_over(values) is values


def test_sums_and_rows_have_the_gradients_of_one_process(two):
    alone = ssl_processes.small_network()
    for rank in range(2):
        assert far(two[rank]["network"], alone)[1] < 1e-12
    assert alone["order"].flatten().tolist() == list(range(8))


@pytest.mark.parametrize("layer", [None, GatheredBatchNorm], ids=["PyTorch", "ours in one process"])
def test_batch_normalisation_of_two_processes_is_that_of_one(two, layer):
    alone = ssl_processes.normalise(layer=layer)
    for rank in range(2):
        name, difference = far(two[rank]["norm"], alone)
        assert difference < 1e-9, name


@pytest.mark.parametrize("groups", ["", " groups"])
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_learn_what_one_learns(two, name, groups):
    """The gradient of the first step, and all weights, statistics and queues after three."""
    alone = ssl_processes.learn(name, encoder="plain-8-gn" if groups else "plain-8", gathered=not groups)
    losses = [two[rank][name + groups]["loss"][""] for rank in range(2)]
    assert float(sum(losses) / 2) == pytest.approx(float(alone["loss"][""]), rel=1e-9)
    for rank in range(2):
        found = two[rank][name + groups]
        assert far(found["warm"], alone["warm"])[1] < 1e-9
        assert alone["gradient"].keys() and far(found["gradient"], alone["gradient"])[1] < 1e-7
        assert far(found["state"], alone["state"])[1] < 1e-6


def test_statistics_of_each_process_still_give_one_teacher(two):
    """Without gathered statistics the students' buffers differ, the teachers are equal."""
    states = [two[rank]["moco alone"]["state"] for rank in range(2)]
    own, teachers = (
        {name: [state[name] for state in states] for name in states[0] if name.startswith(begin)}
        for begin in ("encoder.", "teacher.")
    )
    assert any(not torch.allclose(*pair) for name, pair in own.items() if "running" in name)
    assert all(torch.equal(*pair) for pair in teachers.values())
    assert torch.equal(states[0]["queue.keys"], states[1]["queue.keys"])


@pytest.mark.parametrize("encoder", ["resnet18", "efficientnet-b0", "tu-mobilenetv3_small_100", "tu-efficientnet_b0"])
def test_a_network_stays_the_same(encoder):
    """timm's layers have their activation inside; names of weights, outputs, gradients and statistics stay."""
    torch.manual_seed(0)
    before = build_encoder(encoder, 3)
    for module in before.modules():
        if isinstance(module, nn.Dropout) or "drop" in type(module).__name__.lower():
            module.eval()
    after = gather_statistics(copy.deepcopy(before))
    kinds = [type(m) for m in after.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert kinds and set(kinds) == {GatheredBatchNorm}
    assert list(before.state_dict()) == list(after.state_dict())
    images = torch.randn(3, 3, 64, 64)
    for training in (True, False):
        results = []
        for network in (before, after):
            network.train(training)
            torch.manual_seed(1)
            values = network(images)[-1]
            network.zero_grad()
            values.square().mean().backward()
            results.append((values, [w.grad for w in network.parameters() if w.grad is not None]))
        (one, slopes), (other, others) = results
        assert torch.equal(one, other) and all(map(torch.equal, slopes, others))
    assert all(map(torch.equal, before.state_dict().values(), after.state_dict().values()))


def test_weights_are_shared_and_a_second_call_changes_nothing():
    network = build_model("plain-unet", "plain-8", in_channels=1, num_logits=1)
    weights = [id(weight) for weight in network.parameters()]
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
    assert gather_statistics(network) is network
    modules = [id(module) for module in network.modules()]
    gather_statistics(network)
    assert [id(weight) for weight in network.parameters()] == weights
    assert [id(module) for module in network.modules()] == modules
    assert {id(w) for group in optimiser.param_groups for w in group["params"]} == set(weights)


def test_a_layer_on_its_own_and_one_without_statistics():
    layer = gather_statistics(nn.BatchNorm1d(4, affine=False, track_running_stats=False).eval())
    assert isinstance(layer, GatheredBatchNorm) and layer.running_mean is None and not layer.training
    values = torch.randn(6, 4) + 3
    expected = (values - values.mean(0)) / values.var(0, correction=0).add(1e-5).sqrt()
    assert torch.allclose(layer(values), expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"takes \(N, C, ...\)"):
        layer(torch.zeros(3))


def test_statistics_that_are_not_gathered_are_noticed(two):
    """A test of the test: each process with its own statistics learns something else."""
    assert far(two[0]["barlow alone"]["gradient"], ssl_processes.learn("barlow")["gradient"])[1] > 1e-3
