"""The probe: what it scores when features tell all or nothing, what it leaves untouched, what it refuses."""

import json

import cv2
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional

import pretrain
from classes import ClassOptions
from pairing import DatasetError
from selfsupervised import probe_heads
from selfsupervised.encoders import build_encoder, feature_maps
from selfsupervised.probe import Probe, ProbeOptions
from selfsupervised.probe_heads import LinearHead

RGB = ("red", "green", "blue")
SIDE = 64


def write(root, *, parts=("train", "val"), count=4, classes=2, channels=3, ignored=False, size=(80, 90), masks=True):
    """Discs whose grey value is 40 times their class, on black."""
    rng = np.random.default_rng(0)
    for part in parts:
        for folder in ("images", "gt") if masks else ("images",):
            (root / part / folder).mkdir(parents=True)
        for number in range(count):
            mask = np.zeros(size, np.uint8)
            for label in range(1, classes):
                for _ in range(3):
                    place = tuple(int(rng.integers(15, side - 15)) for side in size[::-1])
                    cv2.circle(mask, place, 12, label, -1)
            image = 40 * np.repeat(mask[..., None], channels, axis=2)
            if ignored:
                mask[:, : size[1] // 2] = 9
                image[:, : size[1] // 2] = rng.integers(0, 255, image[:, : size[1] // 2].shape)
            cv2.imwrite(str(root / part / "images" / f"{number}.png"), image.squeeze())
            if masks:
                cv2.imwrite(str(root / part / "gt" / f"{number}.png"), mask)
    return root


@pytest.fixture
def few_steps(monkeypatch):
    """Of the decoder, where its score does not matter."""
    monkeypatch.setattr(probe_heads, "STEPS", 10)


def options(root, **more):
    values = {"channels": RGB, "mean": (0.0,) * 3, "std": (1.0,) * 3, "side": SIDE}
    return ProbeOptions(root, **{**values, **more})


class Oracle(nn.Module):
    """Its only feature is the label itself, one plane for each class; of 40 a class."""

    def __init__(self, classes, stride=1):
        super().__init__()
        self.weight, self.classes, self.stride = nn.Parameter(torch.zeros(1)), classes, stride

    def forward(self, images):
        label = (images[:, 0] / 40).round().long().clamp(0, self.classes - 1)
        planes = functional.one_hot(label, self.classes).permute(0, 3, 1, 2).float()
        return [images, functional.avg_pool2d(planes, self.stride)]


class Noise(nn.Module):
    """Features that have nothing to do with the image."""

    def __init__(self, value=None):
        super().__init__()
        self.weight, self.value = nn.Parameter(torch.zeros(1)), value

    def forward(self, images):
        maps = torch.randn(len(images), 8, SIDE // 4, SIDE // 4)
        return [images, maps if self.value is None else torch.full_like(maps, self.value)]


@pytest.mark.parametrize("head", ["linear", "decoder"])
@pytest.mark.parametrize("classes", [2, 4])
def test_a_feature_that_is_the_label_scores_one(tmp_path, head, classes):
    labels = " ".join(map(str, range(1, classes)))
    probe = Probe(options(write(tmp_path, classes=classes), classes=ClassOptions(labels), head=head))
    scores = probe.score(Oracle(classes))
    least = 0.995 if head == "linear" else 0.75  # the decoder works at stride 4, which rounds small discs off
    assert scores["IoU"] > least
    assert scores["Dice"] == pytest.approx(2 * scores["IoU"] / (1 + scores["IoU"]), abs=0.01)


@pytest.mark.parametrize("head", ["linear", "decoder"])
def test_noise_scores_chance(tmp_path, head):
    probe = Probe(options(write(tmp_path), head=head))
    share = float((probe.val.masks == 1).float().mean())
    score = probe.score(Noise())["IoU"]
    assert score < share + 0.05, "no better than calling everything the object"
    constant = probe.score(Noise(value=3.0))["IoU"]
    assert constant == 0 or constant == pytest.approx(share, abs=1e-6), "one answer for all pixels"


def test_features_that_are_not_finite_have_no_score(tmp_path):
    root = write(tmp_path)
    for head in ("linear", "decoder"):
        assert Probe(options(root, head=head)).score(Noise(value=float("nan"))) == {"IoU": None, "Dice": None}


def test_ignored_pixels_count_nowhere(tmp_path):
    """Half of each image is noise whose label is to be ignored: the rest is learned and scored as if it were alone."""
    probe = Probe(options(write(tmp_path, ignored=True), classes=ClassOptions("1", ignore_label=9)))
    assert (probe.train.masks == 255).float().mean() > 0.2
    assert probe.score(Oracle(2))["IoU"] > 0.99


def test_an_image_that_is_smaller_than_the_window(tmp_path):
    probe = Probe(options(write(tmp_path, size=(40, 50))))
    assert (probe.val.masks == 255).any(dim=(1, 2)).all(), "what is reflected does not count"
    assert probe.score(Oracle(2))["IoU"] > 0.99


def test_a_linear_head_is_a_logistic_regression_on_enlarged_features():
    """The same loss, at its minimum, as one written with whole enlarged features."""
    torch.manual_seed(0)
    maps = [torch.randn(2, 3, 16, 16), torch.randn(2, 2, 4, 4)]
    wide = torch.cat([functional.interpolate(m, (16, 16), mode="bilinear", align_corners=False) for m in maps], dim=1)
    masks = (wide[:, 0] + wide[:, 3] > 0.3).to(torch.uint8)
    head = LinearHead(2, 16, seed=0)
    assert head.fit([maps], masks)
    logits = torch.einsum("kc,bchw->bkhw", head.weight, wide) + head.bias[:, None, None]
    assert torch.equal(head.predict(maps), logits.argmax(dim=1).to(torch.uint8))
    assert float((head.predict(maps) == masks).float().mean()) > 0.97


@pytest.mark.parametrize("head", ["linear", "decoder"])
def test_nothing_of_the_encoder_or_of_randomness_is_touched(tmp_path, head, few_steps):
    torch.manual_seed(3)
    encoder = build_encoder("plain-8", 3).train()
    encoder.stages[1].eval()  # modes that differ are kept as they are
    feature_maps(encoder, torch.randn(4, 3, 32, 32))[-1].sum().backward()
    modes = [module.training for module in encoder.modules()]
    state = {key: value.clone() for key, value in encoder.state_dict().items()}
    gradients = [weight.grad.clone() for weight in encoder.parameters()]
    probe = Probe(options(write(tmp_path), head=head, mean=(40.0,) * 3, std=(30.0,) * 3))
    np.random.seed(5)  # noqa: NPY002 - the old global state may be somebody's
    before, old = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    scores = probe.score(encoder)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == old).all()  # noqa: NPY002
    assert [module.training for module in encoder.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in encoder.state_dict().items())
    assert all(torch.equal(w.grad, g) for w, g in zip(encoder.parameters(), gradients, strict=True))
    assert all(weight.requires_grad for weight in encoder.parameters())
    torch.manual_seed(99)
    assert probe.score(encoder) == scores, "the same encoder, the same score, whatever the state of randomness"


def test_an_encoder_with_an_error_gets_its_mode_back(tmp_path):
    class Broken(Noise):
        def forward(self, images):
            raise RuntimeError("no")

    probe, encoder = Probe(options(write(tmp_path))), Broken().train()
    with pytest.raises(RuntimeError, match="no"):
        probe.score(encoder)
    assert encoder.training


def test_the_same_files_give_the_same_windows(tmp_path):
    root = write(tmp_path)
    one, other, third = (Probe(options(root, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(one.train.images, other.train.images)
    assert not torch.equal(one.train.images, third.train.images)


def test_a_data_set_without_val_is_split_by_name(tmp_path):
    probe = Probe(options(write(tmp_path, parts=("train",), count=10)))
    assert set(probe.train.names).isdisjoint(probe.val.names)
    assert len(set(probe.val.names)) == 2


@pytest.mark.parametrize(
    ("made", "asked", "expected"),
    [
        ({"channels": 1}, {}, "1 channels, expected 3"),
        ({"masks": False}, {}, "has no gt/"),
        ({"parts": ("train",), "count": 1}, {}, "cannot be split"),
        ({}, {"classes": ClassOptions("77")}, "no mask holds"),
        ({"classes": 3}, {}, "class-list"),
    ],
)
def test_bad_data_is_refused_with_the_flag_and_the_way_on(tmp_path, made, asked, expected):
    with pytest.raises(DatasetError, match=expected) as caught:
        Probe(options(write(tmp_path, **made), **asked))
    assert str(caught.value).startswith(f"--probe {tmp_path}: ")


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(DatasetError, match="--probe .*nothing.*no folder"):
        Probe(options(tmp_path / "nothing"))


def test_images_of_another_depth_are_warned_about(tmp_path):
    assert any("uint16" in text for text in Probe(options(write(tmp_path), dtype="uint16")).warnings)


def test_training_with_a_probe_is_training_without_one(tmp_path, tiny_dataset, few_steps, monkeypatch, capsys):
    """Weights, queue, optimiser and randomness of a run are the same, bit by bit."""
    from selfsupervised import run_log

    monkeypatch.setattr(run_log, "pretraining_curves", lambda *_: None)
    words = ["--images", str(tiny_dataset / "train"), "--method", "moco", "--encoder", "plain-8", "--image-size", "32"]
    words += ["-b", "8", "--crops", "2", "--cpu", "-w", "0", "-e", "2", "--probe-every", "1", "-log", str(tmp_path)]
    pretrain.main([*words, "--exp-name", "without"])
    for head in ("linear", "decoder"):
        probe = ["--probe", str(tiny_dataset), "--probe-head", head]
        pretrain.main([*words, "--exp-name", head, *probe])
    assert "probe IoU" in capsys.readouterr().out
    saved = [torch.load(tmp_path / name / "last_checkpoint") for name in ("without", "linear", "decoder")]
    for other in saved[1:]:
        assert_same(other["model_state_dict"], saved[0]["model_state_dict"])
        assert_same(other["optimizer_state_dict"], saved[0]["optimizer_state_dict"])
        assert_same(other["rng"], saved[0]["rng"])
    rows = [json.loads(line) for line in (tmp_path / "linear" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= row["probe"]["IoU"] <= 1 for row in rows)
    events = EventAccumulator(str(tmp_path / "linear")).Reload()
    assert {"Probe/IoU", "Probe/Dice"} <= set(events.Tags()["scalars"])
    assert {"Dense features/1", "Nearest neighbours/1"} <= set(events.Tags()["images"])


def assert_same(one, other):
    """Nested dicts and lists of tensors and plain values."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    else:
        assert one == other
