import math

import pytest
import segmentation_models_pytorch.losses as smp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segmentation_models_pytorch.losses._functional import softmax_focal_loss_with_logits
from torch.nn import functional as F  # noqa: N812

import losses
from losses import IGNORE_INDEX, build_loss

ALL_NAMES = list(losses.LOSSES)
REGION = {"dice": smp.DiceLoss, "jaccard": smp.JaccardLoss, "tversky": smp.TverskyLoss}
seeds = st.integers(0, 10_000)


def random_batch(seed, num_logits, ignored=0.2, dtype=torch.float32, size=(2, 6, 5)):
    """Logits and a mask in which every class occurs."""
    generator = torch.Generator().manual_seed(seed)
    num_classes = max(2, num_logits)
    logits = 3 * torch.randn(size[0], num_logits, *size[1:], generator=generator, dtype=dtype)
    mask = torch.randint(0, num_classes, size, generator=generator)
    mask[torch.rand(size, generator=generator) < ignored] = IGNORE_INDEX
    mask.view(-1)[:num_classes] = torch.arange(num_classes)
    return logits, mask


@settings(max_examples=25, deadline=None)
@given(seeds, st.sampled_from([1, 2, 3, 5]), st.sampled_from(sorted(REGION)), st.sampled_from([0.0, 0.3]))
def test_region_losses_equal_smp(seed, num_logits, name, ignored):
    logits, mask = random_batch(seed, num_logits, ignored)
    kwargs = {"alpha": 0.3, "beta": 0.7} if name == "tversky" else {}
    mode = "binary" if num_logits == 1 else "multiclass"
    expected = REGION[name](mode, ignore_index=IGNORE_INDEX, **kwargs)(logits, mask)
    torch.testing.assert_close(build_loss(name, num_logits=num_logits)(logits, mask), expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(seeds, st.sampled_from([1, 2, 4]), st.sampled_from([0.0, 0.3]))
def test_pixel_losses_equal_smp(seed, num_logits, ignored):
    logits, mask = random_batch(seed, num_logits, ignored)
    share = (mask != IGNORE_INDEX).float().mean()  # smp divides by all pixels, ignored ones too
    if num_logits == 1:
        expected = smp.SoftBCEWithLogitsLoss(ignore_index=IGNORE_INDEX)(logits, mask[:, None].float()) / share
        focal = smp.FocalLoss("binary", gamma=1.5, ignore_index=IGNORE_INDEX)(logits, mask)
    else:
        expected = smp.SoftCrossEntropyLoss(smooth_factor=0.0, ignore_index=IGNORE_INDEX)(logits, mask) / share
        values = logits.permute(0, 2, 3, 1)[mask != IGNORE_INDEX]
        focal = softmax_focal_loss_with_logits(values, mask[mask != IGNORE_INDEX], gamma=1.5)
    torch.testing.assert_close(build_loss("ce", num_logits=num_logits)(logits, mask), expected)
    got = build_loss("focal(gamma=1.5)", num_logits=num_logits)(logits, mask)
    torch.testing.assert_close(got, focal, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_logits", [2, 4])
def test_class_weights_equal_torch(num_logits):
    logits, mask = random_batch(3, num_logits)
    weights = torch.rand(num_logits) + 0.1
    expected = F.cross_entropy(logits, mask, weights, ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(build_loss("ce", num_logits=num_logits, class_weights=weights)(logits, mask), expected)


def test_binary_class_weights_by_hand():
    logits = torch.tensor([0.0, math.log(3.0)]).reshape(1, 1, 1, 2)  # p = 0.5, 0.75
    mask = torch.tensor([[[0, 1]]])
    weights = torch.tensor([1.0, 4.0])
    expected = (math.log(2) + 4 * math.log(4 / 3)) / 5
    for name in ("bce", "ce"):
        assert float(build_loss(name, num_logits=1, class_weights=weights)(logits, mask)) == pytest.approx(expected)


@settings(max_examples=25, deadline=None)
@given(seeds, st.sampled_from([2, 3, 5]), st.floats(0.01, 0.9))
def test_label_smoothing_equals_torch(seed, num_logits, smoothing):
    logits, mask = random_batch(seed, num_logits)
    expected = torch.nn.CrossEntropyLoss(ignore_index=IGNORE_INDEX, label_smoothing=smoothing)(logits, mask)
    ours = build_loss("ce", num_logits=num_logits, label_smoothing=smoothing)
    torch.testing.assert_close(ours(logits, mask), expected)


@settings(max_examples=25, deadline=None)
@given(seeds, st.floats(0.01, 0.9), st.sampled_from([None, (1.0, 4.0), (0.5, 0.0)]))
def test_label_smoothing_of_one_class_equals_a_slow_loop(seed, smoothing, weights):
    logits, mask = random_batch(seed, 1)
    total = whole = 0.0
    for logit, truth in zip(logits.flatten().tolist(), mask.flatten().tolist(), strict=True):
        if truth == IGNORE_INDEX:
            continue
        costs = (math.log1p(math.exp(logit)), math.log1p(math.exp(-logit)))  # of calling it background, object
        weight = (weights or (1.0, 1.0))[truth]
        total += weight * ((1 - smoothing) * costs[truth] + smoothing * (costs[0] + costs[1]) / 2)
        whole += weight
    given = None if weights is None else torch.tensor(weights)
    ours = build_loss("bce", num_logits=1, class_weights=given, label_smoothing=smoothing)
    assert float(ours(logits, mask)) == pytest.approx(total / whole, rel=1e-4)


@pytest.mark.parametrize("num_logits", [1, 3])
@pytest.mark.parametrize("truth", [0, 1])
def test_smoothing_asks_for_the_true_class_however_rare_the_others_are(num_logits, truth):
    """The loss is lowest where the true class has 1 - smoothing plus its own part of what is spread."""
    classes = max(2, num_logits)
    weights = torch.tensor([0.5, 50.0, 200.0][:classes])
    loss = build_loss("ce", num_logits=num_logits, class_weights=weights, label_smoothing=0.06)
    aim = torch.full((classes,), 0.06 / classes)
    aim[truth] += 0.94
    logits = aim.log()[None, :, None, None] if num_logits > 1 else (aim[1] / aim[0]).log().reshape(1, 1, 1, 1)
    logits.requires_grad_()
    loss(logits, torch.full((1, 1, 1), truth)).backward()
    assert logits.grad.abs().max() < 1e-5


def test_pixels_of_a_class_without_weight_cost_nothing_when_smoothed():
    loss = build_loss("bce", num_logits=1, class_weights=torch.tensor([0.0, 1.0]), label_smoothing=0.1)
    assert float(loss(torch.randn(1, 1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long))) == 0


def test_smoothed_sums_of_two_batches_add_up():
    loss = build_loss("ce+dice", num_logits=3, class_weights=torch.tensor([1.0, 2.0, 3.0]), label_smoothing=0.2)
    logits, mask = random_batch(4, 3, size=(4, 6, 5))
    whole, parts = loss(logits, mask), loss.sums(logits[:1], mask[:1]) + loss.sums(logits[1:], mask[1:])
    torch.testing.assert_close(loss.from_sums(parts), whole)


def test_smoothing_is_of_ce_and_bce_alone():
    logits, mask = random_batch(2, 3)
    plain, smooth = (build_loss("focal+ce", num_logits=3, label_smoothing=x)(logits, mask) for x in (0.0, 0.3))
    ce = [build_loss("ce", num_logits=3, label_smoothing=x)(logits, mask) for x in (0.0, 0.3)]
    torch.testing.assert_close(smooth - plain, ce[1] - ce[0], atol=1e-5, rtol=1e-5)
    for expression in ("dice", "focal", "focal+jaccard"):
        with pytest.raises(ValueError, match="does not use --label-smoothing, only bce and ce do"):
            build_loss(expression, num_logits=3, label_smoothing=0.1)
    for value in (1.0, -0.1, 2.0):
        with pytest.raises(ValueError, match="label smoothing is .*, expected 0 or more and less than 1"):
            build_loss("ce", num_logits=3, label_smoothing=value)


@pytest.mark.parametrize("num_logits", [1, 3])
def test_bce_and_ce_are_one_loss(num_logits):
    logits, mask = random_batch(1, num_logits, ignored=0.2)
    first, second = (build_loss(name, num_logits=num_logits)(logits, mask) for name in ("bce", "ce"))
    assert float(first) == float(second) > 0


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        # p = 0.5, 0.75 on truth 0, 1 : overlap 0.75, predicted 1.25, true 1.
        ("dice", 1 - 2 * 0.75 / 2.25),
        ("jaccard", 1 - 0.75 / 1.5),
        ("tversky(alpha=0.3,beta=0.7)", 1 - 0.75 / (0.75 + 0.3 * 0.5 + 0.7 * 0.25)),
        ("ce", (math.log(2) + math.log(4 / 3)) / 2),
        ("focal(gamma=2)", (0.25 * math.log(2) + 0.0625 * math.log(4 / 3)) / 2),
        ("0.3*ce+0.7*dice", 0.15 * (math.log(2) + math.log(4 / 3)) + 0.7 * (1 - 1.5 / 2.25)),
    ],
)
def test_numbers_by_hand(expression, expected):
    logits = torch.tensor([0.0, math.log(3.0), 9.0]).reshape(1, 1, 1, 3)
    mask = torch.tensor([[[0, 1, IGNORE_INDEX]]])
    assert float(build_loss(expression, num_logits=1)(logits, mask)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("num_logits", [1, 2])
def test_focal_is_exact_for_easy_pixels(num_logits):
    logits = torch.zeros(1, num_logits, 1, 1)
    logits[:, -1] = 9.0
    miss = 1 / (1 + math.exp(9))
    expected = miss * -math.log1p(-miss)
    loss = build_loss("focal(gamma=1)", num_logits=num_logits)(logits, torch.ones(1, 1, 1, dtype=torch.long))
    assert loss.item() == pytest.approx(expected, rel=1e-3)


def test_absent_class_is_left_out_of_the_mean():
    logits = torch.zeros(1, 3, 1, 2)  # p = 1/3 everywhere
    mask = torch.tensor([[[0, 1]]])  # class 2 does not occur
    dice = 1 - 2 * (1 / 3) / (2 / 3 + 1)
    assert float(build_loss("dice", num_logits=3)(logits, mask)) == pytest.approx(dice)


@pytest.mark.parametrize("name", sorted(REGION))
def test_batch_without_object_costs_the_mean_probability(name):
    logits = torch.tensor([0.0, math.log(3.0), 50.0]).reshape(1, 1, 1, 3).requires_grad_()
    loss = build_loss(name, num_logits=1)(logits, torch.tensor([[[0, 0, IGNORE_INDEX]]]))
    loss.backward()
    assert loss.item() == pytest.approx((0.5 + 0.75) / 2)
    assert (logits.grad.flatten()[:2] > 0.05).all()
    assert logits.grad.flatten()[2] == 0


@pytest.mark.parametrize("name", ALL_NAMES)
@pytest.mark.parametrize("num_logits", [1, 2, 4])
def test_gradients_in_float64(name, num_logits):
    for ignored, seed in ((0.0, 0), (0.5, 1)):
        logits, mask = random_batch(seed, num_logits, ignored, torch.float64, (2, 3, 2))
        function = build_loss(name, num_logits=num_logits)
        logits.requires_grad_()
        assert torch.autograd.gradcheck(lambda x, f=function, m=mask: f(x, m), logits)
    mask = torch.zeros_like(mask)  # one class only
    assert torch.autograd.gradcheck(lambda x: function(x, mask), logits)


@pytest.mark.parametrize("name", ALL_NAMES)
@pytest.mark.parametrize("num_logits", [1, 3])
def test_ignored_pixels_change_nothing(name, num_logits):
    logits, mask = random_batch(5, num_logits, ignored=0.4)
    function = build_loss(name, num_logits=num_logits)
    expected = function(logits, mask)
    noisy = logits.masked_fill((mask == IGNORE_INDEX)[:, None], float("nan")).requires_grad_()
    loss = function(noisy, mask)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected, atol=0, rtol=0)
    assert noisy.grad.isfinite().all()
    assert (noisy.grad * (mask == IGNORE_INDEX)[:, None] == 0).all()


@pytest.mark.parametrize("name", ALL_NAMES)
@pytest.mark.parametrize("num_logits", [1, 3])
def test_all_ignored_is_zero_with_a_gradient(name, num_logits):
    logits = torch.randn(2, num_logits, 4, 4, requires_grad=True)
    loss = build_loss(name, num_logits=num_logits)(logits, torch.full((2, 4, 4), IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("name", [*ALL_NAMES, "focal(gamma=0.5)"])
@pytest.mark.parametrize("num_logits", [1, 3])
@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_logits_stay_finite(name, num_logits, scale):
    logits = torch.zeros(1, num_logits, 2, 2)
    logits[:, -1] = scale
    logits.requires_grad_()
    loss = build_loss(name, num_logits=num_logits)(logits, torch.tensor([[[0, 1], [1, 0]]]))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("name", ALL_NAMES)
@pytest.mark.parametrize("num_logits", [1, 3])
def test_autocast_computes_in_float32(name, num_logits):
    logits, mask = random_batch(2, num_logits, size=(4, 40, 40))
    half = logits.bfloat16()
    function = build_loss(name, num_logits=num_logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = function(half, mask)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, function(half.float(), mask), atol=0, rtol=0)


def test_added_sums_give_the_loss_of_the_joined_batch():
    function = build_loss("ce + focal + 0.5*dice + tversky", num_logits=3)
    logits, mask = random_batch(8, 3, size=(5, 6, 6))
    mask[3] = IGNORE_INDEX  # shares of unequal weight
    logits.requires_grad_()
    whole = function(logits, mask)
    parts = function.from_sums(sum(function.sums(logits[i : i + 1], mask[i : i + 1]) for i in range(5)))
    torch.testing.assert_close(parts, whole)
    expected, got = (torch.autograd.grad(value, logits)[0] for value in (whole, parts))
    torch.testing.assert_close(got, expected)
    means = sum(function(logits[i : i + 1], mask[i : i + 1]) for i in range(5)) / 5
    assert not torch.isclose(means, whole)  # so the sums do matter


def test_losses_can_be_learned_from():
    for name in ALL_NAMES:
        logits, mask = random_batch(4, 3)
        logits.requires_grad_()
        function = build_loss(name, num_logits=3)
        optimiser = torch.optim.Adam([logits], lr=0.3)
        for _ in range(60):
            optimiser.zero_grad()
            function(logits, mask).backward()
            optimiser.step()
        keep = mask != IGNORE_INDEX
        assert (logits.argmax(1) == mask)[keep].float().mean() == 1, name


@pytest.mark.parametrize(
    ("expression", "same"),
    [
        ("DiceLoss", "dice"),
        ("dice_loss", "dice"),
        ("JaccardLoss", "jaccard"),
        ("BCE", "bce"),
        (" 3e-1 * ce + .7*dice ", "0.3*ce+0.7*dice"),
        ("focal", "focal(gamma=2)"),
        ("focal()", "focal(gamma=2)"),
        ("FocalLoss( gamma = 2.0 )", "focal"),
        ("tversky(beta=0.7,alpha=3e-1)", "tversky"),
    ],
)
def test_spellings(expression, same):
    assert losses.parse_loss(expression) == losses.parse_loss(same)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("lovasz", "unknown name 'lovasz'.*dice, jaccard, tversky, bce, ce, focal"),
        ("ce+", "can't read ''"),
        ("", "can't read ''.*Losses: dice"),
        ("ce dice", "can't read 'ce dice'"),
        ("ce-dice", "can't read 'ce-dice'"),
        ("-1*ce", "can't read"),
        ("0*ce", "factor 0 of 'ce' must be positive"),
        ("1e999*ce", "factor 1e999"),
        ("dice(gamma=2)", "can't use 'gamma=2' in 'dice'. Its parameters: none"),
        ("focal(alpha=2)", "Its parameters: gamma=2"),
        ("focal(2)", "can't use '2' in 'focal'"),
        ("focal(gamma=-1)", "can't use"),
        ("tversky(alpha=0,beta=0)", "alpha \\+ beta"),
        ("__import__('os')", "unknown name '__import__'"),
    ],
)
def test_bad_expressions(expression, message):
    with pytest.raises(ValueError, match=message):
        build_loss(expression, num_logits=1)


def test_bad_shapes_and_values():
    function = build_loss("dice", num_logits=3)
    logits, mask = random_batch(0, 3)
    with pytest.raises(ValueError, match=r"expected floats \(N, 3, H, W\)"):
        function(logits[:, :2], mask)
    with pytest.raises(ValueError, match=r"expected class indices \(2, 6, 5\)"):
        function(logits, mask[:, :-1])
    with pytest.raises(ValueError, match="expected class indices"):
        function(logits, mask[:, None])
    with pytest.raises(ValueError, match="torch.float32"):
        function(logits, mask.float())
    mask[0, 0, 0] = 7
    with pytest.raises(ValueError, match="holds class 7, expected 0 to 2 or 255"):
        function(logits, mask)
    with pytest.raises(ValueError, match="num_logits is 0"):
        build_loss("dice", num_logits=0)


def test_bad_class_weights():
    with pytest.raises(ValueError, match=r"shape \(3,\), expected \(2,\)"):
        build_loss("bce", num_logits=1, class_weights=torch.ones(3))
    with pytest.raises(ValueError, match="not negative"):
        build_loss("bce", num_logits=1, class_weights=torch.tensor([-1.0, 1.0]))
    with pytest.raises(ValueError, match="does not use class weights"):
        build_loss("dice", num_logits=1, class_weights=torch.ones(2))
