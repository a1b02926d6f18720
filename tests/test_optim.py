"""Learning rates at points worked out by hand, plateau against PyTorch, groups of weights."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from optim import (
    LARS,
    OPTIMISERS,
    Schedule,
    ScheduleOptions,
    build_optimiser,
    cosine,
    one_cycle,
    poly,
    resolve_optimiser,
    resolve_schedule,
)


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


def torch_rates(name, warmup, total, lr, **options):
    """Rates of PyTorch's own schedules at each of `total` steps, after a linear warm-up."""
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    own = torch.optim.lr_scheduler
    after = {
        "cosine": lambda: own.CosineAnnealingLR(optimiser, total - warmup),
        "poly": lambda: own.PolynomialLR(optimiser, total - warmup, options["power"]),
        "step": lambda: own.StepLR(optimiser, options["every"] * 10, options["step_factor"]),
        "constant": lambda: own.ConstantLR(optimiser, 1.0),
    }
    if not warmup:
        schedule = after[name]()
    else:
        rise = own.LinearLR(optimiser, 1 / (warmup + 1), total_iters=warmup)
        schedule = own.SequentialLR(optimiser, [rise, after[name]()], [warmup])
    rates = []
    for _ in range(total):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    return rates


@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize("warmup", [0, 0.5, 3])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cosine", {}),
        ("constant", {}),
        ("poly", {"power": 0.9}),
        ("poly", {"power": 2.5}),
        ("step", {"every": 2, "step_factor": 0.3}),
    ],
)
def test_schedules_are_those_of_pytorch(name, options, warmup):
    ours = make_schedule(name, epochs=8, lr=0.4, warmup=warmup, **options)
    rates = [ours.at(step) for step in range(80)]
    if name == "step" and warmup:  # its steps are counted from the beginning of the run
        plain = torch_rates(name, 0, 80, 0.4, **options)
        rise = [0.4 * (step + 1) / (warmup * 10 + 1) for step in range(int(warmup * 10))]
        expected = rise + plain[len(rise) :]
    else:
        expected = torch_rates(name, int(warmup * 10), 80, 0.4, **options)
    assert rates == pytest.approx(expected, abs=1e-7)


def test_poly_at_known_points():
    assert [poly(after, 1.0) for after in (0, 0.25, 1)] == [1, 0.75, 0]
    assert poly(0.75, 0.5) == 0.5


@pytest.mark.parametrize("name", ["cosine", "poly", "one-cycle"])
@pytest.mark.parametrize("done", [1, 4, 9, 10])
@pytest.mark.parametrize("warmup", [0, 2])
def test_a_longer_run_never_climbs(name, done, warmup):
    short, long = make_schedule(name, epochs=10, warmup=warmup), make_schedule(name, epochs=25, warmup=warmup)
    new = make_schedule(name, epochs=25, warmup=warmup)
    long.load_state_dict(short.state_dict(), epoch=done)
    planned = max(short.at(step) for step in range((done - 1) * 10, 100))
    rates, curve = ([each.at(step) for step in range(done * 10, 250)] for each in (long, new))
    assert rates == pytest.approx([min(planned, rate) for rate in curve]), "the longer curve, cut where it is higher"
    again = make_schedule(name, epochs=25, warmup=warmup)
    again.load_state_dict(long.state_dict(), epoch=done + 3)
    assert [again.at(step) for step in range(250)] == [long.at(step) for step in range(250)]


@pytest.mark.parametrize("name", ["cosine", "poly", "one-cycle", "step", "constant", "plateau"])
def test_the_same_or_a_shorter_run_follows_its_own_curve(name):
    for epochs in (10, 7):
        ours, new = make_schedule(name, epochs=epochs), make_schedule(name, epochs=epochs)
        ours.load_state_dict(make_schedule(name, epochs=10).state_dict(), epoch=3)
        assert ours.limit == 1 and [ours.at(step) for step in range(100)] == [new.at(step) for step in range(100)]


def test_shapes_without_an_end_do_not_mind_more_epochs():
    for name in ("step", "constant", "plateau"):
        longer = make_schedule(name, epochs=20)
        longer.load_state_dict(make_schedule(name, epochs=10).state_dict(), epoch=9)
        assert longer.limit == 1


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


def test_a_state_of_another_schedule_or_of_none_is_no_hindrance():
    schedule = make_schedule()
    schedule.load_state_dict(make_schedule("plateau").state_dict())
    schedule.load_state_dict({})
    schedule.after_epoch(1.0)
    assert schedule.at(50) == pytest.approx(0.5)
    plateau = make_schedule("plateau")
    plateau.load_state_dict(schedule.state_dict())
    assert plateau.at(50) == 1


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("spelling", [str, str.lower, str.upper])
def test_optimisers_by_name(name, spelling):
    """Each one fits a line: the loss falls to less than half."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1, bias=name != "LARS")  # its steps of biases are SGD's, of weights a share of theirs
    lr = {"Adadelta": 30.0, "Adagrad": 0.3, "LARS": 100.0}.get(name, 0.05)
    optimiser = build_optimiser(spelling(name), model, lr=lr, weight_decay=1e-4, momentum=0.5)
    assert type(optimiser) is getattr(torch.optim, name, LARS)
    image = torch.randn(64, 2)
    losses = []
    for _ in range(60):
        loss = ((model(image)[:, 0] - image @ torch.tensor([1.0, -2.0])) ** 2).mean()
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.5 * losses[0], losses[-1]


@pytest.mark.parametrize("name", [name for name in OPTIMISERS if name != "LARS"])
def test_a_step_is_that_of_pytorch(name):
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    one = build_optimiser(name, ours, lr=0.01, weight_decay=0.0, momentum=0.9)
    more = {"momentum": 0.9, "nesterov": True} if name == "SGD" else {}
    if name != "Rprop":
        more["weight_decay"] = 0.0
    other = getattr(torch.optim, name)(theirs.parameters(), lr=0.01, **more)
    for step in range(3):
        for model, optimiser in ((ours, one), (theirs, other)):
            optimiser.zero_grad()
            torch.manual_seed(step)
            (model(torch.randn(4, 3)) ** 2).mean().backward()
            optimiser.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def plain_lars(weights, gradients, velocity, *, lr, momentum, decay, trust=0.001):
    """One step of You et al. 2017 in float64, layer by layer with loops over numbers."""
    for weight, gradient, kept in zip(weights, gradients, velocity, strict=True):
        change = gradient.astype(np.float64)
        if weight.ndim > 1:
            norm, slope = (math.sqrt(sum(x * x for x in each.ravel())) for each in (weight, gradient))
            share = trust * norm / (slope + decay * norm) if norm > 0 and slope > 0 else 1.0
            change = share * (change + decay * weight)
        kept[...] = momentum * kept + lr * change
        weight -= kept


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lars_is_that_of_the_paper(decay):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 36, 2)).double()
    nn.init.zeros_(model[3].weight)  # |w| is 0 at first
    optimiser = build_optimiser("lars", model, lr=0.7, weight_decay=decay, momentum=0.9)
    weights = [weight.detach().numpy().copy() for weight in model.parameters()]
    velocity = [np.zeros_like(weight) for weight in weights]
    for step in range(4):
        optimiser.zero_grad()
        (model(torch.randn(4, 2, 8, 8).double()) - step).square().mean().backward()
        gradients = [weight.grad.numpy().copy() for weight in model.parameters()]
        optimiser.step()
        plain_lars(weights, gradients, velocity, lr=0.7, momentum=0.9, decay=decay)
        for own, plain in zip(model.parameters(), weights, strict=True):
            assert np.allclose(own.detach().numpy(), plain, rtol=1e-10, atol=1e-12)


def encoder_and_head():
    model = nn.Sequential()
    model.encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model.decoder = nn.Conv2d(4, 2, 1)
    return model


def test_the_encoder_has_its_share_of_the_rate():
    model = encoder_and_head()
    optimiser = build_optimiser("AdamW", model, lr=0.1, weight_decay=0.01, momentum=0, encoder_lr_scale=0.25)
    schedule = Schedule(optimiser, ScheduleOptions("cosine", warmup=1), lr=0.4, epochs=10, steps=10)
    own = {id(weight) for weight in model.encoder.parameters()}
    for step in (0, 5, 10, 55, 99):
        schedule.before_step(step)
        for group in optimiser.param_groups:
            (inside,) = {id(weight) in own for weight in group["params"]}
            assert group["lr"] == pytest.approx(schedule.at(step) * (0.25 if inside else 1))
    listed = [weight for group in optimiser.param_groups for weight in group["params"]]
    assert sorted(map(id, listed)) == sorted(map(id, model.parameters())), "each weight once"
    decays = {group["weight_decay"]: {w.ndim > 1 for w in group["params"]} for group in optimiser.param_groups}
    assert decays == {0.01: {True}, 0.0: {False}}


def test_without_a_share_the_groups_are_those_of_earlier_runs():
    optimiser = build_optimiser("AdamW", encoder_and_head(), lr=0.1, weight_decay=0.01, momentum=0)
    assert [len(group["params"]) for group in optimiser.param_groups] == [2, 4]
    assert all("lr_scale" not in group for group in optimiser.param_groups)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_one_kernel_is_asked_for_where_every_version_of_pytorch_has_it_on_gpus(name):
    groups = build_optimiser(name, nn.Linear(2, 2), lr=0.1, weight_decay=0, momentum=0.9, fused=True).param_groups
    assert [bool(group.get("fused")) for group in groups] == [name in ("AdamW", "Adam", "SGD")] * 2


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
    with pytest.raises(ValueError, match="--optim 'Adan' is unknown; expected one of AdamW Adam SGD NAdam"):
        resolve_optimiser("Adan")
    with pytest.raises(ValueError, match="--scheduler 'cyclic' is unknown; expected one of cosine plateau one-cycle"):
        resolve_schedule("cyclic")
    names = ("CosineAnnealingLR", "ReduceLROnPlateau", "OneCycleLR", "PolynomialLR", "StepLR", "Cosine", "one_cycle")
    assert [resolve_schedule(name) for name in names] == [
        *("cosine", "plateau", "one-cycle", "poly", "step", "cosine", "one-cycle")
    ]


@pytest.mark.parametrize(("name", "reason"), [("lbfgs", "another batch at every step"), ("SparseAdam", "dense")])
def test_optimisers_that_cannot_train_say_why(name, reason):
    with pytest.raises(ValueError, match=f"cannot train here: .*{reason}.*Take one of AdamW"):
        resolve_optimiser(name)
