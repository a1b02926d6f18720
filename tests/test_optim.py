"""Learning rates at points worked out by hand, plateau against PyTorch, groups of weights."""

import math

import pytest
import torch
from torch import nn

from optim import Schedule, ScheduleOptions, build_optimiser, check_names, cosine, one_cycle


def make_schedule(name="cosine", epochs=10, steps=10, lr=1.0, more_is_better=False, **options):
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=123.0)
    shape = ScheduleOptions(name, **options)
    return Schedule(optimiser, shape, lr=lr, epochs=epochs, steps=steps, more_is_better=more_is_better)


def test_cosine_at_known_points():
    schedule = make_schedule(lr=0.4)
    assert schedule.at(0) == 0.4
    assert schedule.at(50) == pytest.approx(0.2)
    assert schedule.at(25) == pytest.approx(0.4 * (1 + math.cos(math.pi / 4)) / 2)
    assert schedule.at(100) == 0.0 and schedule.at(10_000) == 0.0


def test_one_cycle_at_known_points():
    schedule = make_schedule("one-cycle")
    assert schedule.at(0) == pytest.approx(1 / 25)
    assert schedule.at(15) == pytest.approx((1 + 1 / 25) / 2)
    assert schedule.at(30) == pytest.approx(1.0)
    assert schedule.at(65) == pytest.approx(0.5, abs=1e-5)
    assert schedule.at(100) == pytest.approx(1 / 250_000)


def test_one_cycle_is_that_of_pytorch():
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=1.0, total_steps=101, cycle_momentum=False)
    ours = make_schedule("OneCycleLR")
    for step in range(101):
        # PyTorch turns one step early: its rise ends at step 0.3 * 101 - 1.
        assert ours.at(step) == pytest.approx(optimiser.param_groups[0]["lr"], abs=0.03)
        optimiser.step()
        if step < 100:
            theirs.step()


def test_shapes_are_continuous_and_end_low():
    for shape in (cosine, one_cycle):
        values = [shape(k / 1000) for k in range(1001)]
        assert max(abs(b - a) for a, b in zip(values, values[1:], strict=False)) < 0.01
        assert max(values) == pytest.approx(1.0) and values[-1] < 1e-5


def test_constant_stays():
    assert {make_schedule("constant", lr=0.3).at(step) for step in range(200)} == {0.3}


def test_warm_up_rises_in_even_steps_and_the_shape_follows():
    schedule = make_schedule(warmup=0.5)  # 5 of 100 steps
    assert [schedule.at(step) for step in range(6)] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0])
    assert schedule.at(5 + 95 // 2) == pytest.approx(0.5, abs=0.01) and schedule.at(100) == 0.0


def test_warm_up_longer_than_the_run_only_rises():
    schedule = make_schedule(warmup=20)
    rates = [schedule.at(step) for step in range(100)]
    assert rates == sorted(rates) and rates[-1] < 0.51


def test_more_epochs_follow_the_longer_curve():
    short, long = make_schedule(epochs=10), make_schedule(epochs=20)
    assert long.at(100) == pytest.approx(0.5) and short.at(100) == 0.0
    assert long.at(50) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_before_step_sets_every_group():
    schedule = make_schedule()
    schedule.optimiser.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    schedule.before_step(50)
    assert [group["lr"] for group in schedule.optimiser.param_groups] == pytest.approx([0.5, 0.5])


VALUES = [1.0, 0.9, 0.9, 0.91, 0.92, 0.89, 0.95, 0.95, 0.95, 0.95, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("more_is_better", [False, True])
@pytest.mark.parametrize(("factor", "patience", "cooldown"), [(0.1, 2, 0), (0.5, 0, 1), (0.3, 1, 2)])
def test_plateau_is_that_of_pytorch(more_is_better, factor, patience, cooldown):
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.2)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimiser, "max" if more_is_better else "min", factor=factor, patience=patience, cooldown=cooldown
    )
    ours = make_schedule(
        "plateau", lr=0.2, factor=factor, patience=patience, cooldown=cooldown, more_is_better=more_is_better
    )
    rates = []
    for epoch, value in enumerate(VALUES):
        theirs.step(value)
        ours.after_epoch(value)
        rates.append(ours.at(10 * (epoch + 1)))
        assert rates[-1] == pytest.approx(optimiser.param_groups[0]["lr"])
    assert rates[-1] < 0.2


def test_plateau_waits_for_a_score_that_rises():
    """A score that falls a little is no improvement, though its negative would pass PyTorch's relative threshold."""
    schedule = make_schedule("plateau", patience=1, more_is_better=True)
    for value in (0.5, 0.49999, 0.49998):
        schedule.after_epoch(value)
    assert schedule.at(30) == pytest.approx(0.1)


def test_plateau_goes_on_from_its_state():
    first, second = make_schedule("plateau", patience=1), make_schedule("plateau", patience=1)
    for value in VALUES[:5]:
        first.after_epoch(value)
    second.load_state_dict(first.state_dict())
    for value in VALUES[5:]:
        first.after_epoch(value)
        second.after_epoch(value)
        assert first.at(0) == second.at(0)


def test_others_have_nothing_to_restore():
    schedule = make_schedule()
    assert schedule.state_dict() == {}
    schedule.load_state_dict(make_schedule("plateau").state_dict())
    schedule.after_epoch(1.0)
    assert schedule.at(50) == pytest.approx(0.5)


@pytest.mark.parametrize(("name", "kind"), [("AdamW", torch.optim.AdamW), ("adam", torch.optim.Adam)])
def test_optimisers_by_name(name, kind):
    assert type(build_optimiser(name, nn.Linear(2, 2), lr=0.1, weight_decay=0, momentum=0.9)) is kind


def test_sgd_has_momentum():
    (group,) = build_optimiser("SGD", nn.Linear(2, 2, bias=False), lr=0.1, weight_decay=0, momentum=0.8).param_groups
    assert group["momentum"] == 0.8 and group["nesterov"]
    (group,) = build_optimiser("sgd", nn.Linear(2, 2, bias=False), lr=0.1, weight_decay=0, momentum=0).param_groups
    assert group["momentum"] == 0 and not group["nesterov"]


def test_biases_and_normalisation_are_not_decayed():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model[0].weight.requires_grad_(True)
    decayed, free = build_optimiser("AdamW", model, lr=0.1, weight_decay=0.01, momentum=0).param_groups
    assert decayed["weight_decay"] == 0.01 and [p.shape for p in decayed["params"]] == [(4, 3, 3, 3)]
    assert free["weight_decay"] == 0 and len(free["params"]) == 3


def test_frozen_weights_are_left_out():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    (group,) = build_optimiser("Adam", model, lr=0.1, weight_decay=0, momentum=0).param_groups
    assert len(group["params"]) == 1


def test_unknown_names_say_what_is_known():
    with pytest.raises(ValueError, match="--optim 'LBFGS' is unknown; expected one of AdamW Adam SGD"):
        check_names("LBFGS", "cosine")
    with pytest.raises(ValueError, match="--scheduler 'step' is unknown; expected one of cosine plateau"):
        check_names("SGD", "step")
    for name in ("CosineAnnealingLR", "ReduceLROnPlateau"):
        check_names("Adam", name)
