"""The encoder file: what is in it, its statistics in evaluation mode, and what train.py says of it."""

import copy
import math

import pytest
import torch

import checkpoint
import weights
from checkpoint import Geometry, ModelConfig, find_checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from model import build_model
from selfsupervised.encoder_file import (
    Description,
    describe_change,
    mixed_batches,
    save_encoder,
    settle_statistics,
)
from selfsupervised.encoders import build_encoder, feature_maps


def describe(**changes):
    values = {
        "method": "barlow",
        "encoder": "plain-8",
        "channels": ("red", "green", "blue"),
        "mean": (1.0, 2.0, 3.0),
        "std": (4.0, 5.0, 6.0),
        "preprocess": (),
        "dtype": "uint8",
        "image_size": 32,
        "images": 7,
        "digest": "abc",
        "sizes": {"--projector": "32-32"},
    }
    return Description(**(values | changes))


def config(**changes):
    values = {
        "architecture": "plain-unet",
        "encoder": "plain-8",
        "labels": (1,),
        "class_names": ("background", "object"),
        "channels": ("red", "green", "blue"),
        "mean": (0.0,) * 3,
        "std": (1.0,) * 3,
        "geometry": Geometry("resize", (32, 32)),
    }
    return ModelConfig(**(values | changes))


def windows(count=40, side=16, seed=0):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 3 + 1


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return build_encoder("plain-8", 3)


def test_the_file_is_what_train_loads_whole(tmp_path, encoder):
    path = tmp_path / "e.pth"
    save_encoder(path, encoder.state_dict(), describe(), epochs=4)
    saved = torch.load(path, weights_only=True)
    assert saved["format"] == 1 and saved["epochs"] == 4
    assert saved["channels"] == ["red", "green", "blue"] and saved["mean"] == [1.0, 2.0, 3.0]
    assert {"std", "preprocess", "method", "image_size", "images", "encoder", "dtype"} <= saved.keys()
    network = build_model("plain-unet", "plain-8", in_channels=3, num_logits=1)
    said = weights.load_encoder_weights(network, str(path), in_channels=3)
    count = sum(not key.endswith("num_batches_tracked") for key in encoder.state_dict())
    assert f"{count} of {count} tensors matched, 0 missing, 0 unexpected" in said
    for key, tensor in encoder.state_dict().items():
        assert torch.equal(network.encoder.state_dict()[key], tensor)


def test_another_encoder_is_refused_by_name(tmp_path, encoder):
    path = tmp_path / "e.pth"
    save_encoder(path, encoder.state_dict(), describe(), epochs=4)
    network = build_model("plain-unet", "plain-16", in_channels=3, num_logits=1)
    with pytest.raises(ValueError, match="holds weights of encoder plain-8, the network has plain-16"):
        weights.load_encoder_weights(network, str(path), in_channels=3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        ({"channels": ("grey",)}, ["channels red, green, blue", "these have grey"]),
        ({"dtype": "uint16"}, ["pixel type uint8", "these have uint16"]),
        ({"preprocess": ("clahe", "stretch")}, ["preprocessing none", "these have clahe, stretch"]),
        ({"geometry": Geometry("crops", (64, 64), reduction=4)}, ["the scale --reduce 1, these have --reduce 4"]),
        ({"geometry": Geometry("crops", (64, 64), mpp=0.5)}, ["the scale --reduce 1, these have --mpp 0.5"]),
    ],
)
def test_what_differs_from_the_training_is_named(tmp_path, encoder, changes, words):
    path, state = tmp_path / "e.pth", tmp_path / "last_checkpoint"
    save_encoder(path, encoder.state_dict(), describe(), epochs=4)
    checkpoint.write_content(state, state_of(encoder))
    training = config(**changes)
    lines = weights.encoder_file_differences(str(path), training, training.geometry)
    assert len(lines) == (1 if words else 0)
    assert all(word in lines[0] for word in words)
    said = weights.encoder_file_differences(str(state), training, training.geometry)
    assert said == [line.replace(str(path), str(state)) for line in lines]


def state_of(encoder):
    """What a run of pretraining goes on from, as far as an encoder is taken from it."""
    tensors = {f"encoder.{key}": tensor for key, tensor in encoder.state_dict().items()}
    return {"pretraining": describe().plain(), "model_state_dict": tensors}


def test_the_state_of_a_run_with_another_encoder_is_refused_by_name(tmp_path, encoder):
    path = tmp_path / "last_checkpoint"
    checkpoint.write_content(path, state_of(encoder))
    network = build_model("plain-unet", "plain-16", in_channels=3, num_logits=1)
    with pytest.raises(ValueError, match="holds weights of encoder plain-8, the network has plain-16: pass --encoder"):
        weights.load_encoder_weights(network, str(path), in_channels=3)


def test_other_weights_have_no_known_differences(tmp_path, encoder):
    path = tmp_path / "plain.pth"
    torch.save(encoder.state_dict(), path)
    for source in (str(path), "imagenet"):
        assert weights.encoder_file_differences(source, config(dtype="uint16"), Geometry("resize", (32, 32))) == []


def test_statistics_in_evaluation_mode_are_those_of_the_windows(encoder):
    """One batch: evaluation mode answers as training mode does, but for the unbiased variance."""
    images = windows(16)
    with torch.no_grad():
        trained = [maps.clone() for maps in feature_maps(copy.deepcopy(encoder).train(), images)]
        before = [maps.clone() for maps in feature_maps(encoder.eval(), images)]
        settle_statistics(encoder, images)
        assert not encoder.training
        for ours, theirs, stale in zip(feature_maps(encoder, images), trained, before, strict=True):
            count = ours.shape[0] * ours.shape[2] * ours.shape[3]
            torch.testing.assert_close(ours, theirs, rtol=0, atol=20 / count)
            assert (stale - theirs).abs().max() > 0.5  # statistics of a fresh network


def test_settling_changes_statistics_alone_and_draws_nothing(encoder):
    before, state = copy.deepcopy(encoder.state_dict()), torch.get_rng_state()
    settle_statistics(encoder, windows())
    assert torch.equal(torch.get_rng_state(), state)
    for key, tensor in encoder.state_dict().items():
        statistic = key.rsplit(".", 1)[-1] in ("running_mean", "running_var", "num_batches_tracked")
        assert torch.equal(tensor, before[key]) != statistic, key
    layers = [layer for layer in encoder.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    assert layers and {layer.momentum for layer in layers} == {0.1}
    again = copy.deepcopy(encoder.state_dict())
    settle_statistics(encoder, windows())
    for key, tensor in encoder.state_dict().items():
        torch.testing.assert_close(tensor, again[key], msg=key)


def test_the_first_statistics_are_means_over_all_windows(encoder):
    images = windows(96)
    first = next(layer for layer in encoder.modules() if isinstance(layer, torch.nn.Conv2d))
    settle_statistics(encoder, images)
    norm = next(layer for layer in encoder.modules() if isinstance(layer, torch.nn.BatchNorm2d))
    with torch.no_grad():
        torch.testing.assert_close(norm.running_mean, first(images).mean(dim=(0, 2, 3)), rtol=1e-4, atol=1e-4)


def test_encoders_without_statistics_are_left_alone():
    encoder = build_encoder("plain-8-gn", 3)
    before = copy.deepcopy(encoder.state_dict())
    settle_statistics(encoder, windows())
    assert all(torch.equal(tensor, before[key]) for key, tensor in encoder.state_dict().items())


@pytest.mark.parametrize("count", [1, 2, 31, 32, 33, 65, 100])
def test_batches_hold_every_window_once_and_none_is_alone(count):
    batches = mixed_batches(torch.arange(count))
    assert sorted(torch.cat(batches).tolist()) == list(range(count))
    assert min(map(len, batches)) >= min(count, 32) and max(map(len, batches)) < 64


# ---- commands that want a checkpoint ----


def test_commands_that_want_a_checkpoint_say_what_an_encoder_file_is(tmp_path, encoder):
    path = tmp_path / "run" / "run.pth"
    save_encoder(path, encoder.state_dict(), describe(), epochs=4)
    assert find_checkpoint(tmp_path) == path  # there is nothing else, and reading it says what it is
    with pytest.raises(ValueError) as caught:
        load_checkpoint(path)
    for words in (str(path), "an encoder file of pretrain.py", "plain-8", "train.py", f"--encoder-weights {path}"):
        assert words in str(caught.value)
    state = tmp_path / "run" / "last_checkpoint"
    checkpoint.write_content(state, {"pretraining": describe().plain(), "model_state_dict": {}})
    with pytest.raises(ValueError, match=r"the state of a run of pretrain\.py.*--exp-name of its own"):
        load_checkpoint(state)


def test_a_folder_of_runs_gives_checkpoints_and_no_encoder_files(tmp_path, encoder):
    trained = tmp_path / "trained" / "trained.pth"
    save_checkpoint(trained, config(), {"weight": torch.zeros(2)})
    save_encoder(tmp_path / "run" / "run.pth", encoder.state_dict(), describe(), epochs=4)
    assert list_checkpoints(tmp_path) == [trained] and find_checkpoint(tmp_path) == trained
    (tmp_path / "old").mkdir()
    torch.save({"a": 1}, tmp_path / "old" / "old.pth", _use_new_zipfile_serialization=False)
    assert len(list_checkpoints(tmp_path)) == 2


# ---- what a run may go on with ----


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "moco"}, "method barlow, now it is moco"),
        ({"encoder": "plain-16"}, "encoder plain-8, now it is plain-16"),
        ({"channels": ("grey",)}, "channels red, green, blue, now it is grey"),
        ({"image_size": 64}, "image size 32, now it is 64"),
        ({"preprocess": ("clahe",)}, "preprocess none, now it is clahe"),
        ({"sizes": {"--projector": "64"}}, "--projector 32-32, now it is 64"),
        ({"digest": "def", "images": 8}, "7 images (digest abc), now they are 8 (digest def)"),
    ],
)
def test_changes_are_named_with_both_values(changes, words):
    assert describe_change(describe().plain(), describe(**changes)) == words


def test_no_change_is_no_words():
    now = describe(mean=(math.pi,) * 3)
    assert describe_change(now.plain(), now) == ""
