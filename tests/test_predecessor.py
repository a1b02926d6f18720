"""Checkpoints of the predecessor: read without running anything in them, and answering as they always did.

With TESSERA_PREDECESSOR=FOLDER, what tests/make_predecessor_checkpoint.py wrote with the libraries of that time is
tried as well. Without it files are made here, with today's network under the old names of its parts.
"""

import collections
import json
import os
import pickle
import sys
import types
from pathlib import Path

import cv2
import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn

import annotate
import export_onnx
import export_report
import onnx_export
import predecessor
import predict
import train
import validate
from backends import load_config, load_forward, load_network
from checkpoint import config_from_dict, config_to_dict, load_checkpoint, save_checkpoint
from classes import ClassMap
from dataset import EvaluationSet
from image_io import read_mask
from model import build_model, to_probabilities
from pairing import FileOptions, find_split

SIDE = 64
LOSSES, BASE = "segmentation_models_pytorch.utils.losses", "segmentation_models_pytorch.base.modules"
MEAN, STD = [60.5, 110.25, 170.0, 90.0], [20.0, 30.0, 40.0, 10.0]  # blue, green, red, then nir
KINDS = {
    "one": {"labels": [64]},
    "one, module": {"labels": [255], "module": True},
    "several": {"labels": [128, 3, 64]},
    "several, module, extra": {"labels": [5, 9], "module": True, "add_dirs": ["nir"]},
}


def old_module(monkeypatch, module, name, base=nn.Module, **members):
    """A class that pickles under an old name."""
    made = type(name, (base,), {"__module__": module, "__qualname__": name, **members})
    place = sys.modules.get(module)
    if not isinstance(place, types.ModuleType) or getattr(place, "real", True):
        place = types.ModuleType(module)
        place.real = False
        monkeypatch.setitem(sys.modules, module, place)
        top = module.partition(".")[0]
        monkeypatch.setitem(sys.modules, top, sys.modules.get(top, types.ModuleType(top)))  # pickle asks for it too
    setattr(place, name, made)
    return made


def old_loss(monkeypatch, name="DiceLoss"):
    """The loss as it is pickled: a module that holds another one, which holds one of PyTorch's."""
    activation = old_module(monkeypatch, BASE, "Activation")()
    activation.activation = nn.Identity()
    loss = old_module(monkeypatch, LOSSES, name)()
    loss._name, loss.eps, loss.beta, loss.ignore_channels = "dice_loss", 1.0, 1.0, None
    loss.activation = activation
    return loss


def random_unet(channels, outputs, seed=0):
    """A network with varied statistics whose answers spread over 0 to 1; it takes B G R."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = smp.Unet("mobilenet_v2", encoder_weights=None, in_channels=channels, classes=outputs)
        batch = torch.randn(4, channels, SIDE, SIDE)
        with torch.no_grad():
            for _ in range(4):
                network.train()(batch)
            for name, weight in network.named_parameters():
                if weight.ndim == 1 and "segmentation" not in name:
                    weight += torch.rand(weight.shape) * 0.2
            logits, head = network.eval()(batch), network.segmentation_head[0]
            scale = 2 / logits.std(dim=(0, 2, 3))
            head.weight *= scale[:, None, None, None]
            head.bias.copy_((head.bias - logits.mean(dim=(0, 2, 3))) * scale)
    return network


def old_content(monkeypatch, network, *, labels, module=False, add_dirs=None, **changes):
    """The entries of an old checkpoint; None leaves one out."""
    optimiser = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=5)
    count = 3 + len(add_dirs or [])
    content = {
        "epoch": 7,
        "model_state_dict": (nn.DataParallel(network) if module else network).state_dict(),
        "optimizer_name": "Adam",
        "optimizer_state_dict": optimiser.state_dict(),
        "scheduler_state_dict": schedule.state_dict(),
        "loss": old_loss(monkeypatch),
        "model_name": "unet",
        "encoder_name": "mobilenet_v2",
        "encoder_weights": "imagenet",
        "activation": "sigmoid",
        "max_score": 0.75,
        "mean_var": {"mean": MEAN[:count], "std": STD[:count]},
        "class_list": labels,
        "add_dirs": add_dirs,
        "device": "cuda" if module else "cpu",
        **changes,
    }
    return {key: value for key, value in content.items() if value is not None or key == "add_dirs"}


def write_data(folder, labels, add_dirs=(), count=3, side=SIDE):
    """A split folder of smooth pictures and masks, written in B G R order as OpenCV does."""
    rng = np.random.default_rng(3)
    values = np.array([0, *labels, 7], np.uint8)
    for number in range(count):
        noise = cv2.GaussianBlur(rng.normal(size=(side, side, 5)).astype(np.float32), (0, 0), 3)
        picture = np.clip(noise / noise.std() * 40 + [60, 110, 170, 90, 0], 0, 255).astype(np.uint8)
        parts = {"images": picture[..., :3], **dict.fromkeys(add_dirs, picture[..., 3])}
        parts["gt"] = values[np.clip(noise[..., 4] / noise.std() + 1.5, 0, len(values) - 1).astype(int)]
        for name, pixels in parts.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(folder / name / f"{number}.png"), pixels)
    return folder


def old_answers(network, folder, add_dirs=()):
    """Probabilities (N, K, S, S) as the predecessor computed them: B G R, background last, sigmoid."""
    answers = []
    for path in sorted((folder / "images").iterdir()):
        layers = [cv2.imread(str(folder / name / path.name), cv2.IMREAD_UNCHANGED) for name in ("images", *add_dirs)]
        pixels = np.dstack(layers).astype(np.float32)
        pixels = (pixels - np.array(MEAN[: pixels.shape[2]])) / np.array(STD[: pixels.shape[2]])
        with torch.no_grad():
            image = torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32))[None]
            answers.append(network(image).sigmoid().numpy()[0])
    return np.stack(answers)


def our_tensors(path, folder, size):
    """Images (C, S, S) as every command gives them to the network, at the size that was its own."""
    config = load_checkpoint(path)[0].with_size(size)
    pairs = find_split(folder, None, FileOptions(add_dirs=config.add_dirs)).pairs
    data = EvaluationSet(pairs, ClassMap.from_config(config), config)
    return [data[number].tensor for number in range(len(data))]


def our_answers(path, folder, size):
    """Probabilities (N, K, S, S) of the network's own size, as PyTorch computes them for the commands."""
    forward = load_forward(path, "cpu", backend="torch")[1]
    return np.concatenate([forward(tensor.numpy()[None]) for tensor in our_tensors(path, folder, size)])


def class_counts(probs, masks, labels):
    """Intersection and union of every class, in the predecessor's order: background last of several."""
    both = np.zeros((2, len(probs[0])), int)
    for answer, mask in zip(probs, masks, strict=True):
        known = [mask == label for label in labels]
        truth = known if len(answer) == 1 else [*known, ~np.any(known, axis=0)]
        largest = answer.argmax(0)
        for place, plane in enumerate(truth):
            found = answer[0] >= 0.5 if len(answer) == 1 else largest == place
            both[:, place] += (found & plane).sum(), (found | plane).sum()
    return both


@pytest.fixture(params=KINDS, ids=str)
def old_run(request, tmp_path, monkeypatch):
    """An old run folder, its network and its data."""
    kind = KINDS[request.param]
    labels, add_dirs = kind["labels"], kind.get("add_dirs", [])
    network = random_unet(3 + len(add_dirs), 1 if len(labels) == 1 else len(labels) + 1)
    path = tmp_path / "run" / "run.pth"
    path.parent.mkdir()
    torch.save(old_content(monkeypatch, network, **kind), path)
    data = write_data(tmp_path / "data" / "val", labels, add_dirs)
    monkeypatch.undo()  # the classes are gone when the file is read
    return path, network, data, labels, add_dirs


@pytest.fixture
def one(tmp_path, monkeypatch):
    """An old run of one class: path, network, data."""
    network = random_unet(3, 1)
    path = tmp_path / "run" / "run.pth"
    path.parent.mkdir()
    torch.save(old_content(monkeypatch, network, labels=[64]), path)
    monkeypatch.undo()
    return path, network, write_data(tmp_path / "data" / "val", [64])


def command(module, *words):
    module.main([str(word) for word in words])


def validated(path, folder, out, *more):
    """Class scores of validate.py."""
    common = ("--cpu", "--tile-size", SIDE, "-o", out, "--metrics-json", out / "m.json", "-log", out / "logs")
    command(
        validate, "-c", path, "-d", folder, "--backend", "torch" if path.suffix == ".pth" else "auto", *common, *more
    )
    return json.loads((out / "m.json").read_text())


# ---- answers ----


def test_old_networks_answer_as_they_did(old_run, tmp_path):
    path, network, data, labels, add_dirs = old_run
    old = old_answers(network, data, add_dirs)
    assert old.std(axis=(0, 2, 3)).min() > 0.1
    ours = our_answers(path, data, (SIDE, SIDE))
    np.testing.assert_allclose(ours, np.roll(old, 1, axis=1), atol=5e-5)  # float32, channels last here
    config, saved = load_checkpoint(path)
    assert config.labels == tuple(labels) and config.activation == "sigmoid"
    assert config.class_names == ("background", *(map(str, labels) if len(labels) > 1 else ["object"]))
    assert config.channels == ("red", "green", "blue", *add_dirs) and config.mean[:3] == tuple(MEAN[2::-1])
    assert config.geometry.kind == "resize" and config.geometry.size == (512, 512)
    assert (config.stride, config.min_side) == (32, 32)
    assert saved["epoch"] == 7 and "optimizer_state_dict" not in saved
    masks = [cv2.imread(str(file), cv2.IMREAD_GRAYSCALE) for file in sorted((data / "gt").iterdir())]
    hits, union = np.roll(class_counts(old, masks, labels), 1, axis=1)
    found = validated(path, data, tmp_path / "out")["per_class"]
    shown = found[1:] if len(labels) == 1 else found
    np.testing.assert_allclose([row["iou"] for row in shown], hits / union, rtol=0, atol=1e-3)  # a pixel
    assert set(np.unique(read_mask(tmp_path / "out" / "masks" / "0.png"))) <= {0, *labels}


def test_the_last_checkpoint_is_read_too(one):
    path, _, data = one
    last = path.rename(path.with_name("last_checkpoint"))
    assert our_answers(last, data, (SIDE, SIDE)).shape == (3, 1, SIDE, SIDE)


def test_the_size_is_assumed_aloud(one, tmp_path, capsys):
    path, _, data = one
    out = tmp_path / "out"
    for file in [*data.glob("*/1.png"), *data.glob("*/2.png")]:
        file.unlink()
    command(validate, "-c", path, "-d", data, "-o", out, "--cpu", "--com", "--backend", "torch", "-log", tmp_path / "l")
    text = capsys.readouterr().out
    assert (
        "an old checkpoint, which does not say the size that images are resized to: 512x512 is assumed, --tile-size S"
        in text
    )
    validated(path, data, out)
    text = capsys.readouterr().out
    assert "is assumed" not in text and "was trained on images resized" not in text


def test_predict_and_annotate_take_them(one, tmp_path, capsys):
    path, network, data = one
    old = old_answers(network, data)[:, 0] >= 0.5
    common = ("-c", path, "--cpu", "--backend", "torch", "-log", tmp_path / "logs")
    command(predict, *common, "-i", data / "images", "-o", tmp_path / "p", "--tile-size", SIDE)
    assert "is assumed" not in capsys.readouterr().out
    for number, truth in enumerate(old):
        found = read_mask(next((tmp_path / "p").rglob(f"*{number}*.png"))) > 0
        assert (found != truth).mean() < 1e-3
    command(predict, *common, "-i", data / "images" / "0.png", "-o", tmp_path / "q")
    assert "512x512 is assumed" in capsys.readouterr().out
    command(
        annotate, "-c", path, "--cpu", "--images", data / "images" / "0.png", "-o", tmp_path / "a", "--engines", "model"
    )
    assert "512x512 is assumed" in capsys.readouterr().out


@pytest.mark.parametrize("labels", [[64], [64, 128]], ids=["one", "several"])
def test_they_export(tmp_path, monkeypatch, labels, capsys):
    monkeypatch.setattr(onnx_export, "_export_program", onnx_export._export_script)
    monkeypatch.setattr(export_report, "time_calls", lambda calls: dict.fromkeys(calls, 1.0))  # 40 images of 512x512
    path, out = tmp_path / "old.pth", tmp_path / "out"
    network = random_unet(3, 1 if len(labels) == 1 else 3)
    with monkeypatch.context() as patch:
        torch.save(old_content(patch, network, labels=labels, module=True), path)
    data = write_data(tmp_path / "data" / "val", labels, count=2)
    command(export_onnx, "-c", path, "-o", tmp_path / "old.onnx", "--with-postprocessing")
    capsys.readouterr()
    found, wanted = (validated(file, data, out)["confusion"] for file in (tmp_path / "old.onnx", path))
    assert found == wanted
    assert load_config(tmp_path / "old.onnx") == load_checkpoint(path)[0], "the file made from it assumes the same"


def test_training_starts_from_them(one, tmp_path, capsys):
    path, network, data = one
    data.parent.joinpath("train").symlink_to(data)
    common = (
        "-d",
        data.parent,
        "-log",
        tmp_path / "logs",
        "-m",
        "unet",
        "--encoder",
        "mobilenet_v2",
        "--image-size",
        SIDE,
    )
    options = ("-e", 1, "-b", 3, "-w", 0, "-lr", 1e-9, "-a", "none", "--class-list", 64, "--cpu", "--exp-name", "new")
    command(train, *common, *options, "--init-from", path)
    assert "network weights" in capsys.readouterr().out
    _, begun = load_network(tmp_path / "logs" / "new" / "new.pth")
    _, old = load_network(path)
    for (name, new), was in zip(begun.named_parameters(), old.parameters(), strict=True):
        torch.testing.assert_close(new, was, atol=1e-5, rtol=0, msg=name)


def test_they_are_no_run_to_go_on_with(one, tmp_path):
    config, saved = load_checkpoint(one[0])
    save_checkpoint(tmp_path / "new.pth", config, saved["model_state_dict"])
    assert load_checkpoint(tmp_path / "new.pth")[0] == config == config_from_dict(config_to_dict(config))
    assert "optimizer_name" not in saved and "loss" not in saved


def test_randomness_is_left_alone(one):
    torch.manual_seed(1)
    first = torch.rand(3)
    torch.manual_seed(1)
    load_checkpoint(one[0])
    assert torch.equal(torch.rand(3), first)


# ---- variants of entries ----


@pytest.fixture(scope="module")
def small():
    """A network of one class, for files that are only read."""
    return random_unet(3, 1)


def write_old(monkeypatch, path, network, **changes):
    with monkeypatch.context() as patch:
        torch.save(old_content(patch, network, **{"labels": [64], **changes}), path)
    return path


@pytest.mark.parametrize(
    ("changes", "field", "expected"),
    [
        (
            {"mean_var": {"mean": np.array(MEAN[:3]), "std": np.array(STD[:3], np.float32)}},
            "mean",
            (170.0, 110.25, 60.5),
        ),
        ({"mean_var": {"mean": [np.float64(1), np.float32(2), 3], "std": STD}}, "mean", (3.0, 2.0, 1.0)),
        ({"mean_var": {"mean": MEAN, "std": STD}}, "std", (40.0, 30.0, 20.0)),
        ({"mean_var": {"mean": [900.0, 2, 3], "std": STD}}, "dtype", "uint16"),
        ({"max_score": np.float32(0.5)}, "labels", (64,)),
        ({"labels": "64"}, "labels", (64,)),
        ({"labels": np.array([64])}, "labels", (64,)),
        ({"labels": [np.int64(64)]}, "labels", (64,)),
        ({"labels": None}, "assumed", ("size", "labels")),
        ({"device": torch.device("cuda")}, "activation", "sigmoid"),
        ({"model_name": "Unet"}, "architecture", "unet"),
    ],
)
def test_entries_are_read_as_they_were_written(tmp_path, monkeypatch, small, changes, field, expected):
    path = write_old(monkeypatch, tmp_path / "old.pth", small, **changes)
    assert getattr(load_checkpoint(path)[0], field) == expected


def test_a_missing_label_is_assumed_aloud(tmp_path, monkeypatch, small):
    config = load_checkpoint(write_old(monkeypatch, tmp_path / "old.pth", small, labels=None))[0]
    assert config.labels == (64,)
    assert "does not say its mask label: 64 is assumed" in config.assumptions[1]
    assert config.with_size((96, 96)).assumptions == config.assumptions[1:]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean_var": None}, "it has no mean_var; expected mean and std .* put the two lines of their mean_vals.txt"),
        ({"mean_var": {"mean": [1, 2], "std": STD}}, r"its mean_var mean is \[1.0, 2.0\] for 3 channels; expected"),
        ({"mean_var": {"mean": MEAN, "std": [1, float("nan"), 1]}}, "its mean_var std is .*nan"),
        ({"mean_var": {"mean": MEAN, "std": [1, -2, 1]}}, "its mean_var std is"),
        ({"mean_var": {"mean": ["a", 1, 2], "std": STD}}, "its mean_var mean cannot be read"),
        ({"add_dirs": ["nir"], "mean_var": {"mean": MEAN, "std": STD}}, "encoder.* is .*3.*, expected .*4.*add_dirs"),
        ({"labels": [64, 128]}, r"its class_list \[64, 128\] needs 3 outputs .* its network has 1; set"),
        ({"labels": [0]}, r"its class_list \[0\] must hold labels from 1 to 65535"),
        ({"labels": ["water"]}, "its class_list .* is not a list of labels"),
        ({"labels": {"a": 1}}, "its class_list is dict, expected a list"),
        ({"activation": "softmax2d"}, "its activation is 'softmax2d' for 1 outputs, expected sigmoid"),
        ({"model_name": "linknett"}, "unknown architecture 'linknett'.*linknet"),
        ({"encoder_name": "mobilenet_v1"}, "unknown encoder 'mobilenet_v1'"),
        (
            {"encoder_name": "resnet18"},
            r"its weights are not those of today's unet resnet18: tensors \d+ missing \(enc",
        ),
        ({"model_name": "fpn"}, "its weights are not those of today's fpn mobilenet_v2"),
        ({"model_state_dict": {}}, "its model_state_dict is no table of tensors"),
        ({"model_state_dict": {"a": 1}}, r"is not that of a segmentation network \(a is no tensor\)"),
        ({"model_state_dict": {"fc.weight": torch.zeros(2)}}, "no segmentation_head.0.weight among fc.weight"),
        (
            {"model_name": "deeplabv3+", "encoder_name": "timm-regnetx_002"},
            "deeplabv3\\+ with encoder timm-regnetx_002 cannot be read: tu-regnetx_002, which took its place, dilates",
        ),
    ],
)
def test_what_cannot_be_translated_is_named(tmp_path, monkeypatch, small, changes, message):
    path = write_old(monkeypatch, tmp_path / "old.pth", small, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_checkpoint(path)
    assert str(caught.value).startswith(str(path))


def test_several_outputs_need_their_labels(tmp_path, monkeypatch):
    path = write_old(monkeypatch, tmp_path / "old.pth", random_unet(3, 3), labels=None)
    with pytest.raises(ValueError, match=r"its class_list \[\] needs 1 outputs|needs .* outputs"):
        load_checkpoint(path)


def test_an_encoder_that_timm_builds_today_gets_its_names():
    target = build_model("unet", "tu-regnetx_002", in_channels=3, num_logits=1)
    stored = {key.replace("encoder.model.", "encoder."): value for key, value in target.state_dict().items()}
    assert "encoder.stem.conv.weight" in stored
    found = predecessor._fit_names(stored, target, "it")
    assert all(found[key] is value or torch.equal(found[key], value) for key, value in target.state_dict().items())


@pytest.mark.parametrize(
    "encoder", ["resnet18", "efficientnet-b0", "mobilenet_v2", "dpn68", "timm-skresnet18", "mit_b0", "tu-resnest14d"]
)
def test_swapping_convolutions_is_swapping_colours(encoder):
    network = build_model("unet", encoder, in_channels=4, num_logits=1) if encoder != "mit_b0" else None
    channels = 4 if network is not None else 3
    network = (network or build_model("unet", encoder, in_channels=3, num_logits=1)).eval()
    image = torch.randn(1, channels, SIDE, SIDE)
    with torch.no_grad():
        expected = network(image)
        weights = dict(network.state_dict())
        predecessor._swap_red_and_blue(weights, network)
        network.load_state_dict(weights)
        found = network(image[:, [2, 1, 0, *range(3, channels)]])
    assert expected.std() > 0
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


# ---- attackers ----


class Harmful:
    """Unpickling it makes a folder, which stands for any code."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "name"),
    [(os.mkdir, "posix.mkdir"), (os.system, "posix.system"), (eval, "eval"), (collections.deque, "collections.deque")],
)
def test_other_names_beside_the_loss_are_refused(tmp_path, monkeypatch, small, function, name):
    trap = tmp_path / "trap"
    words = {
        "posix.mkdir": str(trap),
        "posix.system": f"mkdir {trap}",
        "eval": f"__import__('os').mkdir({str(trap)!r})",
    }
    path = write_old(monkeypatch, tmp_path / "old.pth", small, note=Harmful(function, words.get(name, "ab")))
    with pytest.raises(ValueError, match=rf"old.pth is refused: loading it would run code \({name}\)"):
        load_checkpoint(path)
    assert not trap.exists(), "the code in the file was run"


@pytest.mark.parametrize(
    "name",
    [f"{LOSSES}.FocalLoss", f"{LOSSES}.os", "pytorch_toolbelt.losses.dice.DiceLoss", "torch.nn.modules.conv.Conv2d"],
)
def test_classes_that_are_not_known_are_refused_by_name(tmp_path, monkeypatch, small, name):
    module, _, last = name.rpartition(".")
    with monkeypatch.context() as patch:
        loss = nn.Conv2d(1, 1, 1) if last == "Conv2d" else old_module(patch, module, last)()
        content = {**old_content(patch, small, labels=[64]), "loss": loss}
        torch.save(content, tmp_path / "old.pth")
    with pytest.raises(ValueError, match=rf"is refused: loading it would run code \({name}\)"):
        load_checkpoint(tmp_path / "old.pth")


def test_a_known_name_runs_nothing(tmp_path, monkeypatch, small):
    """Even where a class of that name is loaded, it is neither made nor told its state."""
    called, content = [], old_content(monkeypatch, small, labels=[64])
    made = old_module(
        monkeypatch,
        LOSSES,
        "DiceLoss",
        object,
        __new__=lambda cls, *args: called.append("new") or object.__new__(cls),
        __init__=lambda self, *args: called.append("init"),
        __setstate__=lambda self, state: called.append("state"),
        __reduce__=lambda self: (type(self), ("rm -rf", {"a": 1}), {"b": torch.ones(2)}),
    )
    content["loss"] = made()
    torch.save(content, tmp_path / "old.pth")
    called.clear()
    assert load_checkpoint(tmp_path / "old.pth")[0].labels == (64,)
    assert called == []
    pickle.loads(pickle.dumps(content["loss"]))
    assert called, "the trap itself works"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (np.array([object()]), "an array of O8|is refused"),
        (np.array(["a", "b", "c"]), "an array of U1, expected numbers"),
        (np.array([(1, 2)], [("a", "i4"), ("b", "i4")]), "an array of V8, expected numbers"),
        (np.datetime64("2020-01-01"), "an array of M8, expected numbers"),
        (Harmful(np._core.multiarray._reconstruct, os.mkdir, (0,), b"b"), r"posix.mkdir"),
    ],
)
def test_arrays_of_anything_but_numbers_are_refused(tmp_path, monkeypatch, small, entry, message):
    path = write_old(monkeypatch, tmp_path / "old.pth", small, mean_var={"mean": entry, "std": STD})
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path)


def test_the_stubs_are_for_one_file_only(tmp_path, monkeypatch, small):
    before = set(map(str, torch.serialization.get_safe_globals()))
    path = write_old(monkeypatch, tmp_path / "old.pth", small)
    load_checkpoint(path)
    assert set(map(str, torch.serialization.get_safe_globals())) == before
    with pytest.raises(pickle.UnpicklingError, match="DiceLoss"):
        torch.load(path, weights_only=True)


def test_stubs_in_place_of_weights_are_refused(tmp_path, monkeypatch, small):
    with monkeypatch.context() as patch:
        content = old_content(patch, small, labels=[64])
        loss = content["loss"]
        content["model_state_dict"]["segmentation_head.0.weight"] = loss
        torch.save(content, tmp_path / "a.pth")
        torch.save({**content, "model_state_dict": loss}, tmp_path / "b.pth")
        torch.save(loss, tmp_path / "c.pth")
    for name, message in (("a", "segmentation_head.0.weight is no tensor"), ("b", "no table"), ("c", "but a Stub")):
        with pytest.raises(ValueError, match=message):
            load_checkpoint(tmp_path / f"{name}.pth")


def test_the_format_of_before_1_6(tmp_path, monkeypatch, small):
    with monkeypatch.context() as patch:
        content = old_content(patch, small, labels=[64])
        torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"old.pth is in PyTorch's format of before 1.6 and .* Save it again where"):
        load_checkpoint(tmp_path / "old.pth")
    del content["loss"]
    torch.save(content, tmp_path / "bare.pth", _use_new_zipfile_serialization=False)
    assert load_checkpoint(tmp_path / "bare.pth")[0].labels == (64,)


def test_truncated_old_files_are_named(tmp_path, monkeypatch, small):
    data = write_old(monkeypatch, tmp_path / "old.pth", small).read_bytes()
    for share in (0.01, 0.5, 0.99):
        (tmp_path / "cut.pth").write_bytes(data[: int(len(data) * share)])
        with pytest.raises(ValueError, match=r"cut.pth is truncated or not a checkpoint .* Use another copy"):
            load_checkpoint(tmp_path / "cut.pth")


# ---- other projects ----


def test_files_of_other_projects_are_told_apart(tmp_path, monkeypatch, small):
    weights = small.state_dict()
    contents = {
        "weights alone": weights,
        "one of Lightning": {"pytorch-lightning_version": "2.0", "state_dict": weights},
        "holds weights under 'state_dict'": {"state_dict": weights, "arch": "unet"},
        "a network that was pickled whole": small,
        "a single tensor": torch.zeros(2),
        "holds epoch, config_file": {"epoch": 1, "config_file": "a"},
    }
    detector = old_module(monkeypatch, "ultralytics.nn.tasks", "DetectionModel")()
    contents["detector of YOLO: annotate.py --detector"] = {"model": detector}
    for message, content in contents.items():
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(ValueError, match=message) as caught:
            load_checkpoint(tmp_path / "other.pt")
        assert "other.pt" in str(caught.value) and "train.py" in str(caught.value)


# ---- files of the real thing ----

REAL = os.environ.get("TESSERA_PREDECESSOR", "")
CASES = sorted(path.parent for path in Path(REAL).glob("*/old.npz")) if REAL else []


@pytest.mark.skipif(not REAL, reason="TESSERA_PREDECESSOR names no folder of make_predecessor_checkpoint.py")
def test_there_are_real_files():
    assert len(CASES) >= 5


@pytest.mark.parametrize("folder", CASES, ids=lambda path: path.name)
def test_real_files_answer_as_they_did(folder, tmp_path):
    case, old = json.loads((folder / "case.json").read_text()), np.load(folder / "old.npz")
    path, data, side = folder / f"{folder.name}.pth", folder / "data" / "val", case["side"]
    if not case.get("archive", True):
        with pytest.raises(ValueError, match="format of before 1.6"):
            load_checkpoint(path)
        return
    wanted, tensors = np.roll(old["exact"], 1, axis=1), our_tensors(path, data, (side, side))
    for file in (path, folder / "last_checkpoint"):
        _, network = load_network(file)
        with torch.no_grad():
            exact = np.concatenate([network.double()(tensor[None].double()).sigmoid() for tensor in tensors])
        np.testing.assert_allclose(exact, wanted, atol=1e-9, rtol=0)  # in float64 nothing but its rounding is left
    rounding = np.abs(np.roll(old["probs"], 1, axis=1) - wanted).max()
    assert np.abs(our_answers(path, data, (side, side)) - wanted).max() < max(1e-5, 4 * rounding)
    found = validated(path, data, tmp_path / "out", "--tile-size", side)["per_class"]
    shown = found[1:] if len(case["labels"]) == 1 else found
    np.testing.assert_allclose([row["iou"] for row in shown], np.roll(old["iou"], 1), rtol=0, atol=2e-5)


def test_sigmoid_keeps_classes_apart():
    logits = torch.randn(2, 3, 4, 4)
    assert torch.equal(to_probabilities(logits, "sigmoid"), logits.sigmoid())
