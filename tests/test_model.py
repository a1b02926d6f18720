"""Networks: every name builds and learns, messages say what to do."""

import copy
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import model as networks
from model import (
    ARCHITECTURES,
    build_model,
    build_outline,
    count_parameters,
    resolve_architecture,
    resolve_encoder,
    stride_and_min_side,
    to_probabilities,
)
from networks.single_values import tolerate_single_values

ROOT = Path(__file__).resolve().parent.parent
CHEAP = {"dpt": "test_vit", "plain-unet": "plain-8", "segformer": "mit_b0"}


def small(architecture="unet", encoder="tu-test_resnet", in_channels=3, num_logits=1):
    return build_model(architecture, encoder, in_channels=in_channels, num_logits=num_logits)


def weights_of(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


# ------------------------------------------------------------------ building


def test_architectures_are_those_of_smp_and_one_more():
    import segmentation_models_pytorch as smp

    ours = {name.replace("+", "plus") for name in ARCHITECTURES}
    assert ours == {*smp.MODEL_ARCHITECTURES_MAPPING, "plain-unet"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_trains(architecture):
    encoder = CHEAP.get(architecture, "tu-test_resnet")
    stride, side = stride_and_min_side(architecture, encoder, small(architecture, encoder))
    assert side % stride == 0
    for channels, logits in ((1, 4), (3, 1), (5, 4)):
        model = small(architecture, encoder, channels, logits)
        image = torch.randn(2, channels, max(side, 32), max(side, 32) + stride)
        out = model(image)
        assert out.shape == (2, logits, *image.shape[-2:])
        out.square().mean().backward()
        first = next(model.encoder.parameters())
        assert first.grad is not None
        assert torch.isfinite(first.grad).all()
        assert first.grad.abs().sum() > 0
        assert {"encoder", "decoder", "segmentation_head"} <= {name for name, _ in model.named_children()}


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("Unet", "unet"),
        ("UnetPlusPlus", "unetplusplus"),
        ("DeepLabV3Plus", "deeplabv3+"),
        ("deeplabv3+", "deeplabv3+"),
        ("MAnet", "manet"),
        ("plain_unet", "plain-unet"),
        (" FPN ", "fpn"),
    ],
)
def test_spellings_of_architectures(spelling, name):
    assert resolve_architecture(spelling) == name


def test_outlines_take_no_memory_and_refuse_what_cannot_be_built():
    outline = build_outline("unet", "resnet18")
    full = build_model("unet", "resnet18", in_channels=3, num_logits=1)
    assert all(weight.is_meta for weight in outline.parameters())
    assert [(name, w.shape) for name, w in outline.named_parameters()] == [
        (n, w.shape) for n, w in full.named_parameters()
    ]
    reads_values = build_outline("unet", "mit_b0")
    assert not any(weight.is_meta for weight in reads_values.parameters())
    with pytest.raises(ValueError, match="linknet cannot be built with encoder mit_b0"):
        build_outline("linknet", "mit_b0")


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("resnet34", "resnet34"),
        ("mit_b0", "mit_b0"),
        ("tu-resnet18", "tu-resnet18"),
        ("convnext_atto", "tu-convnext_atto"),
        ("tf_efficientnet_lite0", "tu-tf_efficientnet_lite0"),
        ("tu-resnet18.a1_in1k", "tu-resnet18.a1_in1k"),
        ("timm-mobilenetv3_small_100", "tu-tf_mobilenetv3_small_100"),
    ],
)
def test_names_of_encoders(name, stored):
    assert resolve_encoder(name) == stored


@pytest.mark.parametrize(
    ("architecture", "encoder", "words"),
    [
        ("unett", "resnet18", ["unknown architecture 'unett'", "did you mean unet", "deeplabv3+", "plain-unet"]),
        ("unet", "resnet-18", ["unknown encoder 'resnet-18'", "did you mean", "resnet18", "timm"]),
        ("unet", "tu-rezznet18", ["unknown encoder 'tu-rezznet18'", "tu-resnet18"]),
        ("unet", "hf-hub:someone/something", ["unknown encoder"]),
        ("unet", "plain-16", ["plain-16", "belongs to plain-unet", "-m plain-unet"]),
        ("plain-unet", "resnet18", ["plain-unet", "resnet18", "plain-8", "plain-64"]),
        ("UnetPlusPlus", "mit_b0", ["unetplusplus", "mit_b0", "half size", "-m unet", "--encoder resnet34"]),
        ("linknet", "mit_b0", ["linknet", "mit_b0", "-m unet"]),
        ("dpt", "resnet18", ["dpt", "resnet18", "vision transformer", "tu-vit_tiny_patch16_224"]),
        ("unet", "test_vit", ["unet", "tu-test_vit", "-m dpt"]),
        ("deeplabv3+", "densenet121", ["deeplabv3+", "densenet121", "dilated", "-m unet"]),
        ("pan", "tu-dla34", ["pan", "tu-dla34", "AssertionError", "dilated"]),
    ],
)
def test_refusals_say_what_and_what_next(architecture, encoder, words):
    with pytest.raises(ValueError) as caught:
        small(architecture, encoder)
    for word in words:
        assert word in str(caught.value)


def test_counts_below_one_are_refused():
    with pytest.raises(ValueError, match="in_channels 0"):
        small(in_channels=0)


def test_building_opens_no_connection(monkeypatch):
    import socket

    def refuse(*_args, **_kwargs):
        raise AssertionError("a connection was opened")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for architecture, encoder in (("unet", "resnet18"), ("unet", "tu-resnet18"), ("dpt", "vit_tiny_patch16_224")):
        assert count_parameters(small(architecture, encoder)) > 0


def test_names_alone_do_not_import_smp():
    code = "import sys, model; sys.exit(any(name.startswith(('timm', 'segmentation_models')) for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# ------------------------------------------------------------------ plain-unet


@pytest.mark.parametrize(("height", "width"), [(1, 1), (16, 16), (17, 45), (5, 32)])
def test_plain_unet_takes_any_size(height, width):
    model = small("plain-unet", "plain-8").eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, height, width)).shape == (1, 1, height, width)


def test_plain_unet_padding_changes_nothing_when_16_divides():
    model = small("plain-unet", "plain-8").eval()
    image = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        inner = model.segmentation_head(model.decoder(model.encoder(image)))
        assert torch.equal(model(image), inner)


def test_plain_widths_follow_the_base_width():
    assert small("plain-unet", "plain-64").encoder.out_channels == (64, 128, 256, 512, 512)
    assert 0.50e6 < count_parameters(small("plain-unet", "plain-12")) < 0.55e6
    assert 0.90e6 < count_parameters(small("plain-unet", "plain-16")) < 0.95e6


def test_plain_unet_learns_four_images():
    torch.manual_seed(0)
    image = torch.randn(4, 1, 32, 32)
    mask = (nn.functional.avg_pool2d(image, 5, 1, 2) > 0.05).float()
    model = small("plain-unet", "plain-8", in_channels=1)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        loss = nn.functional.binary_cross_entropy_with_logits(model(image), mask)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert ((model(image) > 0) == mask.bool()).float().mean() > 0.95


# ------------------------------------------------------------------ sizes


@pytest.mark.parametrize(
    ("architecture", "encoder", "expected"),
    [
        ("unet", "resnet18", (32, 32)),
        ("deeplabv3+", "resnet18", (16, 16)),
        ("pspnet", "resnet18", (8, 8)),
        ("pan", "resnet18", (16, 128)),  # its pyramid halves the stride-16 map three times
        ("plain-unet", "plain-8", (16, 16)),
        ("dpt", "test_vit", (32, 32)),  # patches of 16, but the decoder halves them once more
    ],
)
def test_stride_and_min_side(architecture, encoder, expected):
    model = small(architecture, encoder, in_channels=4)
    before = weights_of(model)
    assert stride_and_min_side(architecture, encoder, model) == expected
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_network_of_one_size_says_so():
    model = small("unet", "coat_lite_tiny")
    with pytest.warns(UserWarning, match="224x224 images only"):
        assert stride_and_min_side("unet", "coat_lite_tiny", model) == (224, 224)


def test_a_network_that_takes_nothing_is_an_error(monkeypatch):
    monkeypatch.setattr(networks, "_keeps_size", lambda *_: False)
    model = small()
    with pytest.raises(ValueError, match="fails on images of every side up to 512.*--encoder"):
        stride_and_min_side("unet", "resnet18", model)


# ------------------------------------------------------------------ small batches


@pytest.mark.parametrize(
    ("architecture", "encoder"),
    [("deeplabv3+", "resnet18"), ("deeplabv3", "tu-test_resnet"), ("pan", "resnet18"), ("plain-unet", "plain-8")],
)
def test_batch_of_one_trains(architecture, encoder):
    model = small(architecture, encoder)
    side = stride_and_min_side(architecture, encoder, model)[1]
    image = torch.randn(1, 3, side, side)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(image)
    tolerate_single_values(model)
    with pytest.warns(UserWarning, match="one value per channel") as seen:
        for _ in range(2):
            loss = model(image).square().mean()
            loss.backward()
    assert len(seen) == 1
    assert torch.isfinite(loss)
    assert all(module.training for module in model.modules())


def test_other_steps_stay_as_they_are():
    plain = small("deeplabv3+", "tu-test_resnet")
    guarded = copy.deepcopy(plain)
    tolerate_single_values(guarded)
    image = torch.randn(2, 3, 32, 32)
    for mode in (True, False):
        outs = []
        for model in (plain, guarded):
            torch.manual_seed(0)
            outs.append(model.train(mode)(image))
        assert torch.equal(*outs)
    pairs = zip(plain.state_dict().items(), guarded.state_dict().items(), strict=True)
    assert all(key == other and torch.equal(one, two) for (key, one), (other, two) in pairs)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm2d(4), (1, 4, 1, 1)),
        (nn.BatchNorm1d(4), (1, 4)),
        (nn.BatchNorm2d(4, track_running_stats=False), (1, 4, 1, 1)),
        (nn.InstanceNorm2d(4), (3, 4, 1, 1)),
        (nn.InstanceNorm2d(4, affine=True, track_running_stats=True), (3, 4, 1, 1)),
    ],
)
def test_single_values_pass_through_fresh_statistics(layer, shape):
    """Running mean 0 and variance 1: the values come out as they went in, and the statistics do not move."""
    network = nn.Sequential(layer)
    with pytest.raises(ValueError):
        network(torch.ones(shape))
    tolerate_single_values(network)
    before = (weights_of(network), {key: layer.__dict__[key] for key in ("training", "track_running_stats")})
    values = torch.randn(shape)
    with pytest.warns(UserWarning, match=type(layer).__name__):
        assert torch.allclose(network(values), values, atol=1e-4)
    state = network.state_dict()
    assert state.keys() == before[0].keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in before[0].items())
    assert before[1] == {key: layer.__dict__[key] for key in before[1]}


def test_timm_layers_are_guarded():
    from timm.layers import BatchNormAct2d

    network = nn.Sequential(BatchNormAct2d(4))
    tolerate_single_values(network)
    with pytest.warns(UserWarning, match="BatchNormAct2d"):
        out = network(torch.tensor([-1.0, 0.0, 1.0, 2.0]).view(1, 4, 1, 1))
    assert torch.allclose(out.flatten(), torch.tensor([0.0, 0.0, 1.0, 2.0]), atol=1e-4)


def test_layer_recovers_from_an_error():
    layer = nn.BatchNorm2d(4)
    tolerate_single_values(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError):
            layer(torch.zeros(1, 7, 1, 1))
    assert layer.training
    assert torch.equal(layer.running_mean, torch.zeros(4))


def test_twice_is_once_and_copies_work():
    model = small("deeplabv3+", "tu-test_resnet")
    keys = list(model.state_dict())
    tolerate_single_values(model)
    tolerate_single_values(model)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert all(len(layer._forward_pre_hooks) == len(layer._forward_hooks) == 1 for layer in layers)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert list(twin.state_dict()) == keys
        guards = {id(hook.__self__) for layer in twin.modules() for hook in layer._forward_pre_hooks.values()}
        assert len(guards) == 1, "one guard, so one warning"
        with pytest.warns(UserWarning, match="one value per channel"):
            twin(torch.randn(1, 3, 32, 32)).sum().backward()


# ------------------------------------------------------------------ probabilities


def test_probabilities_by_hand():
    one = torch.tensor([0.0, 3.0]).view(1, 1, 1, 2)
    assert torch.allclose(to_probabilities(one), torch.tensor([0.5, 0.95257413]).view(1, 1, 1, 2))
    two = torch.tensor([0.0, 0.6931472]).view(1, 2, 1, 1)
    assert torch.allclose(to_probabilities(two), torch.tensor([1 / 3, 2 / 3]).view(1, 2, 1, 1))
    assert torch.allclose(to_probabilities(two, "sigmoid"), torch.tensor([0.5, 2 / 3]).view(1, 2, 1, 1))


def test_probabilities_are_float32():
    assert to_probabilities(torch.zeros(1, 3, 2, 2, dtype=torch.bfloat16)).dtype == torch.float32
    assert to_probabilities(torch.zeros(1, 1, 2, 2, dtype=torch.float16)).dtype == torch.float32


@pytest.mark.parametrize(("channels", "activation"), [(2, "tanh"), (1, "softmax")])
def test_odd_activations_are_refused(channels, activation):
    with pytest.raises(ValueError, match=f"{activation}.*{channels} logits.*expected auto"):
        to_probabilities(torch.zeros(1, channels, 1, 1), activation)
