"""Learning by overfitting, steps against a plain loop, evaluation, and what stops a run."""

import copy
import math

import numpy as np
import pytest
import torch
from discs import write_dataset, write_split
from torch import nn

import baselines
import evaluation
import train
import trainer
from augmentations import Augmentation
from backends import torch_forward
from checkpoint import Geometry, ModelConfig
from classes import ClassMap
from dataset import Batch, EpochSampler, EvaluationSet, TrainingBatches, TrainingSet
from evaluation import Evaluation
from image_io import write_image, write_mask
from learner import FitOptions, Progress, build_learner
from losses import build_loss
from metrics import confusion_matrix
from model import build_model
from optim import ScheduleOptions
from pairing import FileOptions, Pair, find_split
from trainer import TrainingStopped, train_one_epoch


def make_config(labels=(255,), geometry=None, channels=3):
    names = ("background", *map(str, labels))
    return ModelConfig(
        architecture="plain-unet",
        encoder="plain-8",
        labels=labels,
        class_names=names,
        channels=tuple("rgbxy"[:channels]),
        mean=(100.0,) * channels,
        std=(50.0,) * channels,
        geometry=geometry or Geometry("resize", (32, 32)),
        stride=16,
        min_side=16,
    )


def make_network(num_logits=1, seed=0):
    torch.manual_seed(seed)
    return build_model("plain-unet", "plain-8", in_channels=3, num_logits=num_logits)


def make_learner(network, steps=1, **options):
    chosen = FitOptions(**{"schedule": ScheduleOptions("constant"), **options})
    return build_learner(network, chosen, device="cpu", steps=steps), chosen


def random_batch(seed, size=2, names=None):
    rng = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, 16, 16, generator=rng)
    masks = torch.randint(0, 2, (size, 16, 16), generator=rng, dtype=torch.uint8)
    return Batch(images, masks, names or tuple(f"image{seed}_{i}" for i in range(size)))


def summary_of(**values):
    return {"iou": None, "dice": None, "best": None, "per_class": [], **values}


# ---- learning ----


@pytest.mark.parametrize(
    ("labels", "loss", "geometry"),
    [
        ((255,), "dice", Geometry("resize", (32, 32))),
        ((10, 20), "ce", Geometry("resize", (32, 32))),
        ((10, 20), "0.5*ce+0.5*dice", Geometry("crops", (32, 32), tile=32, overlap=16, halo=0)),
    ],
)
def test_four_images_are_learned_by_heart(tmp_path, labels, loss, geometry):
    folder = write_split(tmp_path / "four", "abcd", labels=(0, *labels), sizes=((32, 32), (36, 40)))
    config = make_config(labels, geometry)
    pairs, classes = find_split(folder, None, FileOptions()).pairs, ClassMap.from_config(config)
    sampler = EpochSampler([(1,)] * 4, crops=1, quota=0, seed=0)
    none = Augmentation("none", rgb=True, value_range=(0, 255))
    batches = TrainingBatches(TrainingSet(pairs, classes, config, none), sampler, batch=4, workers=0, pin=False)
    learner, options = make_learner(make_network(config.num_logits), lr=0.01)
    function = build_loss(loss, num_logits=config.num_logits)
    for epoch in range(60):
        sampler.set_epoch(epoch)
        first_or_last = train_one_epoch(learner, batches, function, options, config.num_logits)
    forward = torch_forward(learner.model, "cpu")
    predictions = evaluation.predict_samples(forward, EvaluationSet(pairs, classes, config), workers=0)
    result = evaluation.evaluate(predictions, evaluation.build_scorer(config), loss=function, keep_worst=1)
    assert result.summary["iou"] > 0.9, result.summary
    assert first_or_last["iou"] > 0.9 and result.loss < 0.3
    assert all(row["iou"] > 0.85 for row in result.summary["per_class"])


def test_the_same_seed_gives_the_same_losses():
    losses = []
    for _ in range(2):
        learner, options = make_learner(make_network(seed=3), lr=0.01)
        batches = [random_batch(seed) for seed in range(3)]
        function, seen = build_loss("dice", num_logits=1), []

        def watched(logits, masks, function=function, seen=seen):
            value = function(logits, masks)
            seen.append(value.item())
            return value

        train_one_epoch(learner, batches, watched, options, 1)
        losses.append(seen)
    assert losses[0] == losses[1] and len(set(losses[0])) == 3


# ---- steps against a plain loop ----


def plain_steps(network, groups, lr, clip=0.0):
    """SGD where the gradient of each group is that of the mean over its samples, one sample at a time."""
    network.train()
    for group in groups:
        network.zero_grad()
        samples = [(image, mask) for batch in group for image, mask in zip(batch.images, batch.masks, strict=True)]
        for image, mask in samples:
            loss = nn.functional.binary_cross_entropy_with_logits(network(image[None])[0, 0], mask.float())
            (loss / len(samples)).backward()
        if clip:
            nn.utils.clip_grad_norm_(network.parameters(), clip)
        with torch.no_grad():
            for weight in network.parameters():
                weight -= lr * weight.grad


def simple_network():
    """Two convolutions and no normalisation, so that samples do not see each other."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1))


@pytest.mark.parametrize(
    ("sizes", "accumulate", "groups"),
    [
        ([1] * 7, 3, [[0, 1, 2], [3, 4, 5], [6]]),
        ([3, 3, 1], 3, [[0, 1, 2]]),
        ([2, 2, 2, 1], 1, [[0], [1], [2], [3]]),
    ],
)
def test_accumulation_is_the_mean_over_samples(sizes, accumulate, groups):
    batches = [random_batch(seed, size) for seed, size in enumerate(sizes)]
    ours, theirs = simple_network(), simple_network()
    learner, options = make_learner(ours, optimiser="SGD", momentum=0, weight_decay=0, lr=0.5, accumulate=accumulate)
    result = train_one_epoch(learner, batches, build_loss("bce", num_logits=1), options, 1)
    plain_steps(theirs, [[batches[place] for place in group] for group in groups], 0.5)
    for ours_weight, theirs_weight in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours_weight, theirs_weight, atol=1e-6, rtol=1e-5)
    assert learner.progress.step == len(groups) and 0 < result["loss"] < 2


def test_clipping_limits_the_norm_of_the_whole_gradient():
    batches, clip = [random_batch(0)], 1e-3
    ours, theirs, start = simple_network(), simple_network(), simple_network()
    learner, options = make_learner(ours, optimiser="SGD", momentum=0, weight_decay=0, lr=0.5, clip=clip)
    train_one_epoch(learner, batches, build_loss("bce", num_logits=1), options, 1)
    plain_steps(theirs, [batches], 0.5, clip)
    moved = [(a - b).detach() for a, b in zip(ours.parameters(), start.parameters(), strict=True)]
    assert math.sqrt(sum(float((part**2).sum()) for part in moved)) == pytest.approx(0.5 * clip, rel=1e-3)
    for ours_weight, theirs_weight in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours_weight, theirs_weight)


def test_the_learning_rate_follows_the_schedule_within_an_epoch():
    learner, options = make_learner(simple_network(), steps=2, epochs=2, lr=1.0, schedule=ScheduleOptions("cosine"))
    seen = []
    learner.optimiser.optimizer.register_step_post_hook(lambda inner, *_: seen.append(inner.param_groups[0]["lr"]))
    for epoch in range(2):
        learner.progress.epoch = epoch
        train_one_epoch(learner, [random_batch(0), random_batch(1)], build_loss("bce", num_logits=1), options, 1)
    assert seen == pytest.approx([(1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)])


def test_half_precision_trains():
    learner, options = make_learner(make_network(), lr=0.01, amp="bf16")
    first = train_one_epoch(learner, [random_batch(0)], build_loss("dice", num_logits=1), options, 1)["loss"]
    for _ in range(10):
        last = train_one_epoch(learner, [random_batch(0)], build_loss("dice", num_logits=1), options, 1)["loss"]
    assert last < first and next(learner.model.parameters()).dtype == torch.float32


def test_memory_layout_is_a_choice():
    for wanted in (True, False):
        learner, options = make_learner(make_network(), channels_last=wanted)
        torch_forward(learner.model, "cpu")  # evaluation between epochs must not change it
        weight = learner.model.encoder.stages[1][0].weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == wanted


def test_a_network_that_learns_in_half_precision_is_scored_in_float32():
    network, image = make_network(), np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    expected = torch_forward(copy.deepcopy(network), "cpu")(image)
    learner, _ = make_learner(network, amp="bf16")
    np.testing.assert_array_equal(torch_forward(learner.network, "cpu")(image), expected)


def test_training_on_a_cpu_leaves_the_gpus_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *_: pytest.fail("a GPU was started"))
    learner, _ = make_learner(make_network())
    saved = {"model_state_dict": learner.network.state_dict(), **learner.state()}
    learner.restore(saved)
    assert saved["rng"]["cuda"] == []


def test_forward_does_not_depend_on_the_layout_of_weights():
    network = make_network()
    image = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    plain = torch_forward(copy.deepcopy(network), "cpu")(image)
    np.testing.assert_array_equal(plain, torch_forward(network.to(memory_format=torch.channels_last), "cpu")(image))


# ---- what stops a run ----


def test_a_loss_that_is_not_finite_names_step_rate_and_files():
    learner, options = make_learner(make_network(), lr=0.0625)
    good, bad = random_batch(0, names=("a", "b")), random_batch(1, names=("spoiled", "spoiled"))
    bad.images[:] = math.inf
    with pytest.raises(TrainingStopped, match="became nan at step 1, learning rate 0.0625, with the files spoiled"):
        train_one_epoch(learner, [good, bad, good], build_loss("dice", num_logits=1), options, 1)


@pytest.mark.parametrize("more", [[], ["--crops", "1", "--foreground-quota", "0"]])
def test_weights_that_went_to_infinity_in_the_last_step_say_what_to_lower(tmp_path, capsys, more):
    """The loss was a number, which is that of the weights before the step; scoring is the first to see the others."""
    data = write_dataset(tmp_path / "data", train=2, val=1)
    words = ["-d", data, "-m", "plain-unet", "--encoder", "plain-8", "--image-size", 32, "-e", 1, "-w", 0, "-b", 2]
    words += ["--optim", "SGD", "-lr", 1e30, "-a", "none", "-log", tmp_path, "--exp-name", "run", "--cpu", *more]
    with pytest.raises(SystemExit) as ended:
        train.main([str(word) for word in words])
    error = capsys.readouterr().err
    assert ended.value.code == 1 and "after the training of epoch 1" in error and str(data) in error, error
    assert "Lower -lr, add --clip 1 or --warmup 1" in error


def test_out_of_memory_names_size_and_flag():
    class Greedy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 1, 1)

        def forward(self, image):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    learner, options = make_learner(Greedy())
    with pytest.raises(TrainingStopped, match="batch of 2 images of 16x16: lower -b"):
        train_one_epoch(learner, [random_batch(0)], build_loss("dice", num_logits=1), options, 1)
    with pytest.raises(RuntimeError, match="batch of 1 images of 16x16: lower -b"):
        torch_forward(Greedy(), "cpu")(np.zeros((1, 3, 16, 16), np.float32))


@pytest.mark.parametrize(
    ("monitor", "values", "improved"),
    [
        ("iou", [0.0, 0.5, 0.5, None, 0.6], [True, True, False, False, True]),
        ("dice", [None, 0.0], [True, True]),
        ("loss", [0.7, 0.8, 0.6, None], [True, False, True, False]),
    ],
)
def test_what_is_monitored_decides_what_is_best(monitor, values, improved):
    learner, options = make_learner(simple_network(), monitor=monitor)
    for value, expected in zip(values, improved, strict=True):
        result = (
            Evaluation(value, summary_of()) if monitor == "loss" else Evaluation(1.0, summary_of(**{monitor: value}))
        )
        assert trainer.note_epoch(learner, result, options) == expected
    assert learner.progress.epoch == len(values)
    assert learner.progress.best_epoch == 1 + max(place for place, yes in enumerate(improved) if yes)


def test_plateau_sees_the_monitored_value():
    shape = ScheduleOptions("plateau", patience=0)
    for monitor, rising in (("iou", True), ("loss", False)):
        learner, options = make_learner(simple_network(), monitor=monitor, schedule=shape, lr=1.0)
        rates = []
        for value in (0.1, 0.2, 0.3):
            trainer.note_epoch(learner, Evaluation(value, summary_of(iou=value)), options)
            rates.append(learner.schedule.at(0))
        assert rates == ([1.0, 1.0, 1.0] if rising else pytest.approx([1.0, 0.1, 0.01]))


@pytest.mark.parametrize(
    ("progress", "patience", "finished"),
    [
        (Progress(epoch=9, best_epoch=1), 0, False),
        (Progress(epoch=10, best_epoch=9), 0, True),
        (Progress(epoch=4, best_epoch=1), 3, True),
        (Progress(epoch=4, best_epoch=2), 3, False),
        (Progress(), 1, False),
    ],
)
def test_early_stopping(progress, patience, finished):
    assert trainer.is_finished(progress, FitOptions(epochs=10, patience=patience)) == finished


# ---- evaluation ----


@pytest.mark.parametrize("num_logits", [1, 2, 4])
def test_counts_are_those_of_a_confusion_matrix(num_logits):
    rng = np.random.default_rng(0)
    classes = max(2, num_logits)
    logits = rng.normal(size=(3, num_logits, 9, 7)).astype(np.float32)
    masks = rng.integers(0, classes, (3, 9, 7))
    masks[rng.random(masks.shape) < 0.2] = 255
    counts = torch.zeros(classes + 1, classes, dtype=torch.int64)
    trainer.add_counts(counts, torch.from_numpy(logits), torch.from_numpy(masks))
    pred = (logits[:, 0] > 0).astype(np.uint8) if num_logits == 1 else logits.argmax(1).astype(np.uint8)
    expected = confusion_matrix(pred, masks.astype(np.uint8), classes)
    np.testing.assert_array_equal(counts[:-1].numpy(), expected)
    hits = expected.diagonal()
    iou = hits / (expected.sum(0) + expected.sum(1) - hits)
    assert trainer.train_iou(counts, binary=num_logits == 1) == pytest.approx(iou[1] if num_logits == 1 else iou.mean())


def test_training_iou_of_nothing_is_undefined():
    assert trainer.train_iou(torch.zeros(3, 2, dtype=torch.int64), binary=True) is None


@pytest.mark.parametrize(("num_logits", "name"), [(1, "bce"), (1, "dice"), (3, "ce"), (3, "dice")])
def test_loss_from_probabilities_is_that_of_logits(num_logits, name):
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(1, num_logits, 8, 8, generator=rng)
    mask = torch.randint(0, max(2, num_logits), (8, 8), generator=rng)
    probs = logits.sigmoid() if num_logits == 1 else logits.softmax(1)
    loss = build_loss(name, num_logits=num_logits)
    value = evaluation.loss_of_probs(loss, probs[0].numpy(), mask.byte().numpy())
    assert value == pytest.approx(float(loss(logits, mask[None])), rel=1e-4)


def test_the_worst_images_are_kept_in_order(tmp_path):
    config = make_config()
    predictions = []
    for place, share in enumerate((0.9, 0.1, 0.5, 0.3)):
        mask = np.ones((10, 10), np.uint8)
        probs = np.zeros((1, 10, 10), np.float32)
        probs[0].flat[: int(100 * share)] = 1
        sample = evaluation.Sample(Pair(f"i{place}", tmp_path), (10, 10), torch.zeros(3, 1, 1), None)
        predictions.append(evaluation.Prediction(sample, probs, mask))
    result = evaluation.evaluate(iter(predictions), evaluation.build_scorer(config), keep_worst=2)
    assert [(item[1].name, item[0]) for item in result.worst] == [("i1", 0.1), ("i3", 0.3)]
    assert result.loss is None and result.summary["iou"] == pytest.approx(0.45)


def test_probabilities_that_are_not_finite_name_the_image(tmp_path):
    folder = write_split(tmp_path / "x", ["spoiled"])
    for geometry in (Geometry("resize", (32, 32)), Geometry("crops", (16, 16), tile=32, overlap=8, halo=0)):
        config = make_config(geometry=geometry)
        data = EvaluationSet(find_split(folder, None, FileOptions()).pairs, ClassMap.from_config(config), config)

        def broken(batch):
            return np.full((len(batch), 1, *batch.shape[2:]), np.nan, np.float32)

        with pytest.raises((ValueError, RuntimeError), match=r"spoiled\.png.*finite|spoiled\.png.*NaN"):
            list(evaluation.predict_samples(broken, data, workers=0))


def test_baselines_need_no_network(tmp_path):
    folder = tmp_path / "x"
    image, mask = np.full((20, 20, 3), 40, np.uint8), np.zeros((20, 20), np.uint8)
    image[:10], mask[:10] = 200, 255
    for name, picture in (("bright", image), ("dark", 255 - image)):
        write_image(folder / "images" / f"{name}.png", picture)
        write_mask(folder / "gt" / f"{name}.png", mask)
    config = make_config()
    data = EvaluationSet(find_split(folder, None, FileOptions()).pairs, ClassMap.from_config(config), config)
    scores = baselines.score_baselines(data, empty="skip")
    assert scores["all foreground"]["iou"] == 0.5 and scores["Otsu"]["iou"] == 1.0


def test_one_line_says_what_an_epoch_brought():
    row = {
        "epoch": 2,
        "lr": 0.001,
        "train": {"loss": 0.5, "iou": None},
        "val": {"rocks": {"loss": 0.25, "iou": 0.75, "dice": 0.8}},
        "seconds": 3.21,
    }
    line = trainer.epoch_line(row, 9, "rocks", "run.pth", "iou")
    assert line == (
        "epoch 2/9  lr 1.00e-03  train loss 0.5000 iou -  rocks loss 0.2500 iou 0.7500 dice 0.8000  3.2 s  "
        "rocks iou improved, saved run.pth"
    )
    assert "improved" not in trainer.epoch_line(row, 9, "rocks", None, "iou")


# ---- odd data sets, through the command ----


def run(root, logs, *more, name="run"):
    import train

    flags = ["-m", "plain-unet", "--encoder", "plain-8", "--image-size", "32", "-w", "0", "--cpu", "-a", "safe"]
    train.main(["-d", str(root), "-log", str(logs), "--exp-name", name, *flags, *map(str, more)])
    return logs / name


@pytest.mark.parametrize("more", [(), ("--crops", 2)])
def test_one_odd_image_in_batches_of_one(tmp_path, more):
    root = write_dataset(tmp_path / "one", train=1, val=1, sizes=((37, 21),))
    folder = run(root, tmp_path / "logs", "-b", 1, "-e", 1, *more)
    assert (folder / "run.pth").is_file()


def test_a_16_pixel_map_of_one_value_trains(tmp_path):
    """At 16 px the deepest map of the plain U-Net is 1x1: in a batch of one it has no spread."""
    root = write_dataset(tmp_path / "one", train=1, val=1, sizes=((16, 16),))
    with pytest.warns(UserWarning, match="one value per channel"):
        folder = run(root, tmp_path / "logs", "-b", 1, "-e", 1, "--image-size", 16)
    assert (folder / "run.pth").is_file()


def test_early_stopping_ends_the_run_and_says_so(tmp_path, capsys):
    root = write_dataset(tmp_path / "x", train=2, val=1)
    more = ("-e", 50, "--early-stop", 1, "-lr", 1e-12, "-b", 2, "--worst", 0)
    run(root, tmp_path / "logs", *more)
    lines = (tmp_path / "logs" / "run" / "metrics.jsonl").read_text().splitlines()
    assert 2 <= len(lines) < 10
    capsys.readouterr()
    run(root, tmp_path / "logs", *more)
    assert f"the run is complete: {len(lines)} epochs are done and early stopping ended it" in capsys.readouterr().out


def test_an_exploding_run_stops_with_a_message_and_keeps_the_last_epoch(tmp_path, capsys):
    root = write_dataset(tmp_path / "x", train=4, val=1)
    run(root, tmp_path / "logs", "-e", 1, "-b", 2, "--loss", "bce", "--optim", "SGD")
    kept = (tmp_path / "logs" / "run" / "last_checkpoint").read_bytes()
    with pytest.raises(SystemExit) as stop:
        run(root, tmp_path / "logs", "-e", 9, "-b", 2, "--loss", "bce", "--optim", "SGD", "-lr", 1e30)
    said = capsys.readouterr()
    assert stop.value.code == 1
    assert "the loss became" in said.err and "with the files a" in said.err and "--clip 1" in said.err
    assert "warning: lr was 0.001 when this run began, it goes on with 1e+30" in said.out
    assert (tmp_path / "logs" / "run" / "last_checkpoint").read_bytes() == kept


def test_a_mask_without_any_counted_pixel_is_no_error(tmp_path):
    root = write_dataset(tmp_path / "x", train=2, val=1)
    write_mask(root / "val" / "gt" / "b0.png", np.full((32, 32), 9, np.uint8))
    folder = run(
        root, tmp_path / "logs", "-e", 1, "-b", 2, "--class-list", "255", "--ignore-label", 9, name="all ignored"
    )
    assert (folder / "all ignored.pth").is_file() and "nan" in (folder / "_iou_per_epoch_val.csv").read_text()
