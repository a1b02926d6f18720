"""Methods of pretraining: losses against slow references and lightly, teachers, queues, matching places, learning."""

import copy
import itertools
import math

import lightly.loss
import numpy as np
import pytest
import shapely
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from benchmarks import pretrain_step
from model import build_model
from optim import build_optimiser
from selfsupervised.barlow_twins import barlow_loss
from selfsupervised.dense import DenseBarlowTwins, match_points, sample_maps
from selfsupervised.encoders import EncoderError, build_encoder, feature_channels, feature_maps
from selfsupervised.interface import METHODS, Method, MethodOptions
from selfsupervised.methods import build_method, hints
from selfsupervised.moco import KeyQueue, choose_queue, queue_loss
from selfsupervised.moco_v3 import batch_loss, rising_momentum
from selfsupervised.teacher import STATISTICS_BATCHES, Teacher

OPTIONS = MethodOptions(projector=(16, 8), momentum=0.9, queue=12, points=5, local_projector=(12, 6), batch=4)
ENCODERS = (
    "plain-16",
    "resnet18",
    "efficientnet-b0",
    "tu-mobilenetv3_small_100",
    "mit_b0",
    "tu-vit_tiny_patch16_224",
    "tu-convnext_atto",
)


def make(name, encoder="plain-8", options=OPTIONS, channels=3, seed=0):
    torch.manual_seed(seed)
    encoder = "tu-test_vit" if name == "mae" else encoder
    return build_method(name, build_encoder(encoder, channels), options).train()


def make_views(seed=0, count=4, side=32, channels=3):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(count, channels, side, side, generator=generator) for _ in "ab")
    return a, b, torch.eye(2, 3).expand(count, 2, 2, 3).contiguous()


def learner_of(method, lr=0.05):
    return build_optimiser("SGD", method, lr=lr, weight_decay=1e-4, momentum=0.9)


def learn(method, optimiser, seed, done=0.5):
    optimiser.zero_grad()
    step = method(*make_views(seed))
    step.loss.backward()
    optimiser.step()
    method.after_step(done)
    return step


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


# ---- losses ----


def plain_barlow(z_a, z_b, lambda_, epsilon=1e-5):
    """The paper's loss with loops, in float64."""
    a, b = (z.double().numpy() for z in (z_a, z_b))
    count, units = a.shape
    loss = 0.0
    for i, j in itertools.product(range(units), repeat=2):
        x, y = a[:, i] - a[:, i].mean(), b[:, j] - b[:, j].mean()
        scale = math.sqrt(((x**2).mean() + epsilon) * ((y**2).mean() + epsilon))
        c = sum(x[n] * y[n] for n in range(count)) / count / scale
        loss += (1 - c) ** 2 if i == j else lambda_ * c**2
    return loss


@pytest.mark.parametrize(("count", "units"), [(2, 3), (16, 9), (40, 24)])
@pytest.mark.parametrize("lambda_", [0.005, 1.0])
def test_barlow_is_the_papers_and_lightlys(count, units, lambda_):
    torch.manual_seed(count)
    z_a = torch.randn(count, units) * torch.rand(units) * 5 + torch.randn(units) * 3
    z_b = 0.5 * z_a + torch.randn(count, units)
    loss, scores = barlow_loss(z_a, z_b, lambda_)
    assert float(loss) == pytest.approx(plain_barlow(z_a, z_b, lambda_), rel=1e-5)
    assert float(loss) == pytest.approx(float(lightly.loss.BarlowTwinsLoss(lambda_param=lambda_)(z_a, z_b)), rel=1e-5)
    correlation = np.corrcoef(z_a.T.double(), z_b.T.double())[:units, units:]
    off = correlation[~np.eye(units, dtype=bool)]
    assert float(scores["diagonal"]) == pytest.approx(np.diag(correlation).mean(), abs=1e-3)
    assert float(scores["off-diagonal energy"]) == pytest.approx((off**2).mean(), rel=1e-2)


def test_gradients_of_barlow_are_lightlys():
    torch.manual_seed(0)
    slopes = []
    values = torch.randn(2, 20, 7)
    for loss in (lambda a, b: barlow_loss(a, b, 0.005)[0], lightly.loss.BarlowTwinsLoss()):
        z_a, z_b = (each.clone().requires_grad_() for each in values)
        loss(z_a, z_b).backward()
        slopes.append(torch.cat((z_a.grad, z_b.grad)))
    assert torch.allclose(*slopes, rtol=1e-4, atol=1e-6)


def test_samples_that_do_not_count_change_nothing():
    torch.manual_seed(0)
    z_a, z_b = torch.randn(2, 30, 6)
    weights = (torch.arange(30) % 3 > 0).float()
    kept = weights > 0
    expected, _ = barlow_loss(z_a[kept], z_b[kept], 0.01)
    z_a[~kept] = 1e4
    loss, _ = barlow_loss(z_a, z_b, 0.01, weights)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    for few in (0, 1):
        z_a.requires_grad_()
        loss, _ = barlow_loss(z_a, z_b, 0.01, (torch.arange(30) < few).float())
        loss.backward()
        assert float(loss.detach()) == 0 and torch.equal(z_a.grad, torch.zeros_like(z_a))
        z_a = z_a.detach()


def test_queue_loss_is_the_papers_and_lightlys():
    torch.manual_seed(0)
    queries, keys, negatives = (functional.normalize(torch.randn(n, 8), dim=1) for n in (6, 6, 20))
    keys = functional.normalize(queries + 0.5 * keys, dim=1)
    loss, scores = queue_loss(queries, keys, negatives, 0.2)
    plain, nearest = 0.0, 0
    for query, key in zip(queries.double().numpy(), keys.double().numpy(), strict=True):
        positive = query @ key
        others = [query @ negative for negative in negatives.double().numpy()]
        plain += -math.log(math.exp(positive / 0.2) / sum(math.exp(x / 0.2) for x in (positive, *others))) / 6
        nearest += positive > max(others)
    assert float(loss) == pytest.approx(plain, abs=1e-5)
    assert float(scores["queue top-1"]) == pytest.approx(nearest / 6)
    theirs = lightly.loss.NTXentLoss(temperature=0.2, memory_bank_size=(20, 8))
    theirs.memory_bank.bank = negatives.clone()
    assert float(loss) == pytest.approx(float(theirs(queries, keys)), abs=1e-5)


def test_batch_loss_is_the_papers():
    torch.manual_seed(0)
    queries, keys = (functional.normalize(torch.randn(7, 5), dim=1) for _ in range(2))
    loss, scores = batch_loss(queries, keys, 0.3)
    plain, found = 0.0, 0
    for n, query in enumerate(queries.double().numpy()):
        scaled = [math.exp(query @ key / 0.3) for key in keys.double().numpy()]
        plain -= 2 * 0.3 * math.log(scaled[n] / sum(scaled)) / 7
        found += scaled[n] == max(scaled)
    assert float(loss) == pytest.approx(plain, abs=1e-5)
    assert float(scores["batch top-1"]) == pytest.approx(found / 7)


# ---- a step ----


@pytest.mark.parametrize("name", METHODS)
def test_a_step_changes_the_student_and_the_teacher_only_follows(name):
    method = make(name)
    optimiser = learner_of(method)
    learned = {id(weight) for group in optimiser.param_groups for weight in group["params"]}
    for seed in range(method.warm_steps):
        method.warm(*make_views(100 + seed)[:2])
    before = snapshot(method)
    step = method(*make_views())
    assert step.loss.dtype == torch.float32 and step.loss.ndim == 0
    assert step.embeddings.shape[0] == 4 and not step.embeddings.requires_grad
    assert step.scores and all(value.ndim == 0 and not value.requires_grad for value in step.scores.values())
    step.loss.backward()
    optimiser.step()
    for key, weight in method.named_parameters():
        if key.startswith("teacher."):
            assert weight.grad is None and torch.equal(weight, before[key]) and id(weight) not in learned
        elif key.startswith("encoder.model.head."):
            assert weight.grad is None  # classes, which no feature depends on
        else:
            assert weight.grad is not None and not torch.equal(weight, before[key]), key
    if name not in ("moco", "mocov3"):
        return
    momentum = 0.9 if name == "moco" else rising_momentum(0.9, 0.25)
    middle = snapshot(method)
    method.after_step(0.25)
    after = snapshot(method)
    for key in (key for key in after if key.startswith("teacher.")):
        student, old = middle[key.removeprefix("teacher.")], before[key]
        if key.endswith("num_batches_tracked"):
            assert torch.equal(after[key], student)
        else:
            expected = momentum * old.double() + (1 - momentum) * student.double()
            assert torch.allclose(after[key].double(), expected, rtol=1e-5, atol=1e-7), key
            if "running" in key:
                assert not torch.equal(after[key], old)


@pytest.mark.parametrize("name", METHODS)
def test_the_state_dict_resumes_exactly(name):
    method = make(name)
    optimiser = learner_of(method)
    for seed in range(method.warm_steps):
        method.warm(*make_views(100 + seed)[:2])
    for seed in range(2):
        learn(method, optimiser, seed)
    saved = copy.deepcopy((method.state_dict(), optimiser.state_dict()))
    ends = [learn(method, optimiser, seed).loss for seed in (2, 3, 4)]
    other = make(name, seed=9)
    again = learner_of(other)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    assert [learn(other, again, seed).loss for seed in (2, 3, 4)] == ends
    assert all(map(torch.equal, method.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_falls_on_images_that_differ(name):
    """Views of eight textures: colour and frequency tell them apart, noise does not."""
    generator = torch.Generator().manual_seed(0)
    options = MethodOptions(projector=(16, 16), lambda_=0.01, momentum=0.9, queue=32, local_projector=(16, 16), batch=8)
    method = make(name, options=options)
    optimiser = build_optimiser("AdamW", method, lr=3e-3, weight_decay=0, momentum=0)
    waves = torch.linspace(0, 6.3, 16).view(1, 1, 1, 16) * torch.arange(1, 9).view(8, 1, 1, 1)
    if name == "mae":
        waves = waves.repeat(1, 1, 1, 4)  # views of four patches a side
    side = waves.shape[3]
    images = waves.sin().expand(8, 3, side, side) + torch.randn(8, 3, 1, 1, generator=generator)
    places = torch.eye(2, 3).expand(8, 2, 2, 3).contiguous()

    def views():
        return (images + 0.3 * torch.randn(images.shape, generator=generator) for _ in "ab")

    for _ in range(method.warm_steps):
        method.warm(*views())
    losses = []
    for step in range(40):
        loss = method(*views(), places).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        method.after_step(step / 40)
        losses.append(float(loss.detach()))
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5]), (losses[:5], losses[-5:])


# ---- teacher and queue ----


def test_the_key_of_an_image_does_not_depend_on_the_others():
    """With a teacher in training mode it does: its batch's statistics are in it."""
    method = make("moco")
    for seed in range(method.warm_steps):
        method.warm(*make_views(100 + seed)[:2])
    image, teacher = make_views(5, count=1)[0], method.teacher
    batches = [torch.cat((image, factor * make_views(seed, count=7)[0])) for seed, factor in ((6, 1), (7, 3))]

    def keys():
        return [functional.normalize(teacher(batch), dim=1)[0] for batch in batches]

    one, other = keys()
    assert torch.allclose(one, other, atol=1e-6) and torch.allclose(
        one, functional.normalize(teacher(image), dim=1)[0], atol=1e-6
    )
    method.train()
    assert not any(module.training for module in teacher.modules())
    nn.Module.train(teacher)  # as usual
    one, other = keys()
    assert (one - other).abs().max() > 1e-2


def test_a_leak_lets_a_query_find_its_batch():
    """Query and key of quite different images are alike if they come from one batch, unless the teacher has averages.

    Each image is on its own in a batch of one brightness; the batch of the query is guessed from the keys.
    """
    torch.manual_seed(0)
    encoder = build_encoder("plain-8", 3)
    teacher = Teacher(encoder, nn.Flatten())
    base = torch.randn(2, 3, 32, 32)  # two images: one for the query, one for the key
    guessed = {}
    for leaks in (True, False):
        keys = []
        for seed in range(6):
            others = make_views(seed, count=5)[0] * (1 + seed) + seed
            nn.Module.train(teacher, leaks)
            keys.append(teacher(torch.cat((base[1:], others)))[0])
        teacher.eval()
        spread = torch.stack(keys).std(0).mean() / torch.stack(keys).abs().mean()
        guessed[leaks] = float(spread)
    assert guessed[True] > 0.1 and guessed[False] < 1e-5


def test_warming_takes_statistics_and_then_real_keys():
    method = make("moco")
    assert method.warm_steps == STATISTICS_BATCHES + 2  # 12 keys, 8 in a batch of 4 pairs
    batches = [make_views(seed)[:2] for seed in range(method.warm_steps)]
    for a, b in batches[:STATISTICS_BATCHES]:
        method.warm(a, b)
    first = [torch.cat(pair) for pair in batches[:STATISTICS_BATCHES]]
    convolved = [method.teacher.encoder.stages[0][0](images) for images in first]
    mean = torch.stack([each.mean((0, 2, 3)) for each in convolved]).mean(0)
    variance = torch.stack([each.var((0, 2, 3)) for each in convolved]).mean(0)
    for encoder in (method.teacher.encoder, method.encoder):
        assert torch.allclose(encoder.stages[0][1].running_mean, mean, atol=1e-6)
        assert torch.allclose(encoder.stages[0][1].running_var, variance, rtol=1e-5)
        assert encoder.stages[0][1].momentum == 0.1
    weights = snapshot(method)
    for a, b in batches[STATISTICS_BATCHES:]:
        method.warm(a, b)
    keys = [functional.normalize(method.teacher(view), dim=1) for pair in batches[-2:] for view in pair]
    expected = torch.cat((keys[3], *keys[1:3]))  # of 16 keys the first 4 are overwritten
    assert torch.allclose(method.queue.keys, expected, atol=1e-6)
    assert not any(id(keys) == id(value) for value in weights.values())
    assert make("moco", "plain-8-gn").warm_steps == 2  # group normalisation has no statistics


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.lists(st.integers(1, 25), max_size=6))
def test_the_queue_keeps_the_last_keys_in_a_ring(size, counts):
    queue, ring, place, number = KeyQueue(size, 2), {}, 0, 0
    before = queue.keys.clone()
    assert torch.allclose(before.norm(dim=1), torch.ones(size))
    for count in counts:
        keys = torch.arange(number, number + count).float()[:, None].expand(count, 2)
        queue.add(keys)
        for key in keys[:, 0].tolist():
            ring[place] = key
            place, number = (place + 1) % size, number + 1
    for at in range(size):
        assert queue.keys[at].tolist() == ([ring[at]] * 2 if at in ring else before[at].tolist())
    assert int(queue.place) == place


def test_keys_are_queued_after_the_step_and_only_in_training():
    method = make("moco")
    views = make_views()
    before = method.queue.keys.clone()
    method.eval()(*views)
    method.train()(*views)
    assert torch.equal(method.queue.keys, before)
    keys = functional.normalize(method.teacher(views[1]), dim=1)
    method.after_step(0)
    assert torch.equal(method.queue.keys[4:], before[4:]) and torch.allclose(method.queue.keys[:4], keys)
    method.after_step(0)
    assert torch.equal(method.queue.keys[4:], before[4:])


def test_smaller_batches_add_up_where_it_is_said_and_nowhere_else():
    for name in METHODS:
        methods = [make(name, "plain-8-gn").double() for _ in range(2)]
        views = [values.double() for values in make_views()]
        methods[0](*views).loss.backward()
        for part in (slice(0, 2), slice(2, 4)):
            (methods[1](*(values[part] for values in views)).loss / 2).backward()
        for method in methods:
            method.after_step(0)
        slopes = [[w.grad for w in method.parameters() if w.grad is not None] for method in methods]
        same = all(torch.allclose(a, b, rtol=1e-7, atol=1e-10) for a, b in zip(*slopes, strict=True))
        assert same == methods[0].accumulates, name
        assert bool(methods[0].why_not) != methods[0].accumulates
        if name == "moco":
            assert torch.allclose(methods[0].queue.keys, methods[1].queue.keys)


def test_momentum_rises_and_a_queue_is_shorter_than_the_data():
    values = [rising_momentum(0.99, done) for done in np.linspace(0, 1, 11)]
    assert values[0] == pytest.approx(0.99) and values[5] == pytest.approx(0.995) and values[-1] == 1
    assert values == sorted(values)
    assert choose_queue(10**7, 64) == 16384 and choose_queue(1000, 64) == 448 and choose_queue(10, 64) == 64


# ---- small batches, lower precision ----


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("name", METHODS)
def test_small_batches_and_equal_images_give_no_nan(name, count):
    for images in (make_views(0, count), tuple(torch.zeros_like(v) for v in make_views(0, count)[:2])):
        method = make(name, options=MethodOptions(batch=count, queue=16))
        places = make_views(0, count)[2]
        optimiser = learner_of(method, lr=1e-3)
        for _ in range(method.warm_steps):
            method.warm(*images[:2])
        for _ in range(3):
            optimiser.zero_grad()
            loss = method(images[0], images[1], places).loss
            loss.backward()
            slopes = [w.grad for w in method.parameters() if w.grad is not None]
            assert loss.isfinite() and all(slope.isfinite().all() for slope in slopes)
            optimiser.step()
            method.after_step(0.1)
        assert all(value.isfinite().all() for value in method.state_dict().values())


@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_gives_losses_in_float32(name):
    method = make(name)
    with torch.autocast("cpu", torch.bfloat16):
        method.warm(*make_views()[:2])
        low = method(*make_views())
    low.loss.backward()
    assert low.loss.dtype == low.embeddings.dtype == torch.float32 and low.loss.isfinite()
    assert all(w.grad.isfinite().all() for w in method.parameters() if w.grad is not None)
    assert all(value.dtype in (torch.float32, torch.long) for value in method.state_dict().values())
    exact = make(name)
    exact.warm(*make_views()[:2])
    assert low.loss.item() == pytest.approx(exact(*make_views()).loss.item(), rel=0.2)


def test_the_places_are_exact_under_autocast():
    """A shift in a slide of 100000 pixels would be lost in bfloat16."""
    method = make("dense")
    a, b, places = make_views()
    places = places.clone()
    places[..., 2] += 100_000.25
    with torch.autocast("cpu", torch.bfloat16):
        assert float(method(a, b, places).scores["shared"]) == 1


# ---- places ----


class Coordinates(nn.Module):
    """An encoder whose features are the image's channels, averaged to strides 2, 4 and 8."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)

    def forward(self, image):
        return [image, *(functional.avg_pool2d(image, stride) for stride in (2, 4, 8))]


def view_of_plane(matrix, side):
    """What a view shows of an image whose two channels are x and y, (2, S, S)."""
    y, x = torch.meshgrid(torch.arange(side).double(), torch.arange(side).double(), indexing="ij")
    return torch.einsum("ij,jhw->ihw", matrix.double(), torch.stack((x, y, torch.ones_like(x))))


def turned(angle, scale, x, y, mirrored=False):
    turn = scale * torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    if mirrored:
        turn[:, 0] *= -1
    return torch.cat((turn, torch.tensor([[x], [y]])), dim=1)


SIDE = 64
PAIRS = [
    (turned(0, 1, 0, 0), turned(0, 1, 0, 0)),
    (turned(0, 1, 0, 0), turned(0, 1, 10, -7)),
    (turned(0, 1, 1e5, 2e5), turned(0, 1, 1e5 + 3.5, 2e5)),
    (turned(0.5, 0.7, 5, 3), turned(-1.2, 1.4, 20, 40)),
    (turned(0, 1, 70, 0, mirrored=True), turned(math.pi / 2, 0.5, 40, 10)),
]


@pytest.mark.parametrize("pair", PAIRS)
def test_sampled_features_are_of_the_same_places(pair):
    places = torch.stack(pair)[None]
    points_a, points_b, shared = match_points(places, (SIDE, SIDE), 50)
    assert shared.float().mean() >= 0.9
    images = torch.stack([view_of_plane(matrix, SIDE) for matrix in pair])
    maps = feature_maps(Coordinates(), images)
    assert len(maps) == 3
    for values, stride in zip(sample_maps(maps, torch.cat((points_a, points_b)), (SIDE, SIDE)), (2, 4, 8), strict=True):
        margin = max(stride, 4) / 2  # nearer to the border the features at the border stand for the place
        inner = shared[0].clone()
        for points in (points_a[0], points_b[0]):
            inner &= ((points > margin) & (points < SIDE - 1 - margin)).all(1)
        assert inner.sum() >= 5
        here, there = values[0][inner], values[1][inner]
        expected = points_a[0][inner].double() @ pair[0][:, :2].double().T + pair[0][:, 2].double()
        assert torch.allclose(here, there, rtol=1e-6, atol=0.02)
        assert torch.allclose(here, expected, rtol=1e-6, atol=0.02)
    for points in (points_a, points_b):
        inside = ((points > -0.51) & (points < SIDE - 0.49)).all(2)
        assert inside[shared].all()


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(*[st.floats(-3, 3), st.floats(0.5, 2), st.floats(-50, 50), st.floats(-50, 50), st.booleans()] * 2),
)
def test_places_are_shared_if_views_overlap(numbers):
    """Against shapely's intersection, and each place moved by itself."""
    pair = turned(*numbers[:5]), turned(*numbers[5:])
    points_a, points_b, shared = match_points(torch.stack(pair)[None].double(), (SIDE, SIDE), 40)
    inverse = np.linalg.inv(np.vstack((pair[1].double(), [0, 0, 1])))
    moved = inverse @ np.vstack((pair[0].double(), [0, 0, 1])) @ np.vstack((points_a[0].T.double(), np.ones(40)))
    assert np.allclose(points_b[0].T, moved[:2], atol=1e-3)
    in_both = ((moved[:2] > -0.5) & (moved[:2] < SIDE - 0.5)).all(0)
    doubtful = (np.abs(np.abs(moved[:2] - (SIDE - 1) / 2) - SIDE / 2) < 1e-3).any(0)
    assert ((shared[0].numpy() == in_both) | doubtful).all()
    assert ((points_a > -0.501) & (points_a < SIDE - 0.499))[shared].all()
    corners = np.array([[-0.5, SIDE - 0.5, SIDE - 0.5, -0.5], [-0.5, -0.5, SIDE - 0.5, SIDE - 0.5], [1, 1, 1, 1]])
    first, second = (shapely.Polygon((matrix.double().numpy() @ corners).T) for matrix in pair)
    overlap = first.intersection(second).area / first.area
    share = shared.double().mean()
    assert share >= min(1, 4 * overlap) - 0.15  # four times as many places are tried, in a part of view a
    assert overlap > 0 or share == 0


def test_pairs_without_overlap_give_no_local_term():
    method = make("dense", options=MethodOptions(projector=(8, 8), local_projector=(6, 6), batch=4))
    a, b, places = make_views()
    apart = places.clone()
    apart[:, 1, :, 2] = 1000
    step = method(a, b, apart)
    step.loss.backward()
    assert float(step.scores["shared"]) == 0 == float(step.scores["local loss"])
    assert float(step.loss.detach()) == pytest.approx(0.5 * float(step.scores["global loss"]))
    assert all(lateral[1].weight.grad.abs().max() == 0 for lateral in method.laterals)
    half = places.clone()
    half[2:, 1, :, 2] = 1000
    assert float(method(a, b, half).scores["shared"]) == 0.5


def test_dense_learns_all_scales_and_the_global_share_counts():
    for share, reached in ((0.0, False), (1.0, True)):
        options = MethodOptions(projector=(8, 8), local_projector=(6, 6), batch=4, global_weight=share)
        method = make("dense", options=options)
        assert isinstance(method, DenseBarlowTwins) and len(method.laterals) == 5
        method(*make_views()).loss.backward()
        assert (float(method.projector[0].weight.grad.abs().max()) > 0) == reached
        assert all((float(lateral[1].weight.grad.abs().max()) > 0) != reached for lateral in method.laterals)


# ---- encoders ----


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_learn_and_fit_into_train(name):
    encoder = build_encoder(name, 4)
    architecture = {"plain-16": "plain-unet", "tu-vit_tiny_patch16_224": "dpt"}.get(name, "unet")
    theirs = build_model(architecture, name, in_channels=4, num_logits=2).encoder.state_dict()
    assert {key: value.shape for key, value in encoder.state_dict().items()} == {
        key: value.shape for key, value in theirs.items()
    }
    before = snapshot(encoder)
    channels = feature_channels(encoder, 4)
    assert encoder.training and all(map(torch.equal, encoder.state_dict().values(), before.values()))
    images = torch.randn(2, 4, 64, 64)
    maps = feature_maps(encoder, images)
    assert [values.shape[1] for values in maps] == channels and all(values is not images for values in maps)
    strides = [64 // values.shape[-1] for values in maps]
    assert strides == sorted(strides) and strides[-1] >= 16
    for method in ("barlow", "dense"):
        built = build_method(method, encoder, OPTIONS).train()
        built(*make_views(0, count=2, side=64, channels=4)).loss.backward()
        slopes = [weight.grad is not None for weight in encoder.parameters()]
        assert sum(slopes) / len(slopes) > 0.95


def test_encoders_that_cannot_be_pretrained_are_refused(monkeypatch):
    with pytest.raises(EncoderError, match="unknown encoder 'resnet19'.*did you mean.*resnet18"):
        build_encoder("resnet19", 3)
    with pytest.raises(EncoderError, match="--encoder tu-xcit_nano_12_p8_224 cannot be pretrained.*--encoder resnet18"):
        build_encoder("tu-xcit_nano_12_p8_224", 3)

    def frozen(*args, **options):
        network = build_model(*args, **options)
        network.encoder.requires_grad_(False)
        return network

    monkeypatch.setattr("selfsupervised.encoders.build_model", frozen)
    with pytest.raises(EncoderError, match=r"resnet18 cannot be pretrained: it has no weights that learn\. Expected"):
        build_encoder("resnet18", 3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch": 1}, "-b 1: --method barlow compares the images of a batch"),
        ({"projector": (16, 0)}, r"--projector \(16, 0\) cannot be used; expected widths above 0"),
        ({"lambda_": -1.0}, "--lambda -1.0 cannot be used; expected 0 or more"),
        ({"temperature": 0.0}, "--temperature 0.0 cannot be used; expected more than 0"),
        ({"momentum": 1.0}, "--momentum-encoder 1.0 cannot be used"),
        ({"queue": 0}, "--queue 0 cannot be used"),
        ({"points": 0}, "--dense-points 0 cannot be used"),
        ({"mask_share": 1.0}, "--mask-share 1.0 cannot be used; expected a share between 0 and 1"),
    ],
)
def test_options_out_of_range_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        build_method("barlow", build_encoder("plain-8", 1), MethodOptions(**changes))


def test_unknown_methods_are_refused_and_known_ones_keep_the_encoder():
    encoder = build_encoder("plain-8", 1)
    with pytest.raises(ValueError, match="--method 'simclr' is unknown; expected one of barlow, moco, mocov3, dense"):
        build_method("simclr", encoder, OPTIONS)
    for name in METHODS:
        encoder = build_encoder("tu-test_vit" if name == "mae" else "plain-8", 1)
        method = build_method(name, encoder, OPTIONS)
        assert isinstance(method, Method) and method.encoder is encoder


def test_hints_name_what_learns_badly_and_their_advice_is_taken():
    assert not any(hints(name, MethodOptions(queue=1024), 5000) for name in METHODS)
    (loud,) = hints("barlow", MethodOptions(projector=(512, 8192), batch=16), 5000)
    assert "8192 units at -b 16" in loud and "2.6 times the diagonal" in loud and "ends with 1024" in loud
    assert not hints("barlow", MethodOptions(projector=(512, 1024), batch=16), 5000)
    (long,) = hints("moco", MethodOptions(queue=4096), 1000)
    assert "--queue 4096 holds keys of most of the 1000 windows" in long and "--queue 448 avoids it" in long
    assert not hints("moco", MethodOptions(queue=448), 1000)
    (few,) = hints("mocov3", MethodOptions(batch=8), 5000)
    assert "told from 7 others" in few


def test_correlations_by_chance_are_what_the_hint_says():
    torch.manual_seed(0)
    z_a, z_b = torch.randn(2, 16, 400)
    _, scores = barlow_loss(z_a, z_b, 0.005)
    assert float(scores["off-diagonal energy"]) == pytest.approx(1 / 16, rel=0.15)


def test_the_benchmark_compares_all_methods_with_lightly(capsys):
    pretrain_step.main(["--cpu", "--encoder", "plain-8", "-b", "2", "--size", "16", "--turns", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert "plain-8, 2 pairs of 16 px" in lines[0]
    assert [line.split()[0] for line in lines[2:]] == ["lightly", "lightly,", *METHODS[:-1]]
    assert float(lines[2].split()[-1]) == 1 and all(float(line.split()[-1]) > 0 for line in lines[3:])
