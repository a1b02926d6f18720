"""The average of weights against a slow one in float64, and what it does to the network it belongs to."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ema import WeightAverage


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(2, 2))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.floats(0.01, 0.9999), st.integers(0, 1000))
def test_the_average_is_that_of_a_slow_loop(steps, decay, seed):
    model = make_model()
    ours = WeightAverage(model, decay)
    slow = [weight.detach().double().clone() for weight in model.parameters()]
    torch.manual_seed(seed)
    for step in range(1, steps + 1):
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight))
        ours.update()
        kept = min(decay, (1 + step) / (10 + step))
        for place, weight in enumerate(model.parameters()):
            slow[place] = kept * slow[place] + (1 - kept) * weight.detach().double()
    for average, expected in zip(ours.average, slow, strict=True):
        torch.testing.assert_close(average.double(), expected, atol=1e-5, rtol=1e-5)


def test_in_place_swaps_weights_and_leaves_buffers():
    model, image = make_model(), torch.randn(1, 3, 4, 4)
    average = WeightAverage(model, 0.9)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1.0)
    average.update()
    model[1].running_mean.fill_(7.0)
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    kept = [value.clone() for value in average.average]
    trained_answer = model.eval()(image)
    with pytest.raises(KeyError), average.in_place():
        inside = model.state_dict()
        for (name, weight), expected in zip(model.named_parameters(), kept, strict=True):
            assert torch.equal(weight, expected) and torch.equal(inside[name], expected)
        assert torch.equal(inside["1.running_mean"], trained["1.running_mean"])
        assert not torch.equal(model(image), trained_answer)
        raise KeyError  # also after an error the network is as it was
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(average.average, kept, strict=True))
    assert torch.equal(model(image), trained_answer)


def test_training_goes_on_after_a_swap():
    model = nn.Linear(2, 1)
    optimiser, average = torch.optim.SGD(model.parameters(), lr=0.1), WeightAverage(model, 0.5)
    with average.in_place():
        pass
    before = model.weight.detach().clone()
    model(torch.ones(1, 2)).sum().backward()
    optimiser.step()
    torch.testing.assert_close(model.weight.detach(), before - 0.1)
    assert torch.equal(average.average[0], before), "the average is not the weight itself"


def test_state_and_restart():
    model = make_model()
    first, second = WeightAverage(model, 0.9), WeightAverage(make_model(1), 0.9)
    for _ in range(3):
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(2)
        first.update()
    second.load_state_dict(first.state_dict())
    assert second.updates == 3 and second.current_decay == first.current_decay == min(0.9, 5 / 14)
    assert all(torch.equal(a, b) for a, b in zip(first.average, second.average, strict=True))
    first.restart()
    assert first.updates == 0 and torch.equal(first.average[0], model[0].weight)
    assert not torch.equal(first.average[0], second.average[0])
