"""Networks: every name builds and learns, weights land where they should, messages say what to do."""

import copy
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import model as networks
from model import (
    ARCHITECTURES,
    build_model,
    count_parameters,
    init_from,
    load_encoder_weights,
    resolve_architecture,
    resolve_encoder,
    stride_and_min_side,
    to_probabilities,
    tolerate_single_values,
)

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
        small(architecture, encoder)


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


# ------------------------------------------------------------------ encoder weights


@pytest.fixture(scope="module")
def donor():
    torch.manual_seed(1)
    return small()


def as_encoder_file(donor):
    return {"encoder_state_dict": donor.encoder.state_dict(), "encoder": donor.encoder_name, "in_channels": 3}


def as_checkpoint(donor):
    state = {f"module.{key}": tensor for key, tensor in donor.state_dict().items()}
    return {"format": 1, "model_state_dict": state, "config": {"encoder": "test_resnet"}}


def as_plain(donor):
    return dict(donor.encoder.state_dict())


def as_timm(donor):
    return {key.removeprefix("model."): tensor for key, tensor in donor.encoder.state_dict().items()}


def as_lightning(donor):
    return {"state_dict": {f"model.{key}": tensor for key, tensor in donor.state_dict().items()}}


@pytest.mark.parametrize("form", [as_encoder_file, as_checkpoint, as_plain, as_timm, as_lightning])
def test_encoder_files_of_every_form(form, donor, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(form(donor), path)
    model = small()
    report = load_encoder_weights(model, str(path), in_channels=3)
    for key, tensor in donor.encoder.state_dict().items():
        assert torch.equal(model.encoder.state_dict()[key], tensor), key
    total = sum(not key.endswith("num_batches_tracked") for key in donor.encoder.state_dict())
    assert f"{total} of {total} tensors matched, 0 missing, 0 unexpected" in report
    assert str(path) in report


def test_safetensors(donor, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(as_timm(donor), path)
    model = small()
    assert "0 missing" in load_encoder_weights(model, str(path), in_channels=3)
    assert torch.equal(next(model.encoder.parameters()), next(donor.encoder.parameters()))


def renamed(donor):
    state = [pair for pair in donor.encoder.state_dict().items() if not pair[0].endswith("num_batches_tracked")]
    return {f"_layer{i}.{key.rsplit('.', 1)[-1]}": tensor for i, (key, tensor) in enumerate(state)}


def test_other_names_same_order(donor, tmp_path):
    path = tmp_path / "weights.pt"
    state = renamed(donor)
    torch.save({**state, "_fc.weight": torch.zeros(10, 7)}, path)
    model = small()
    report = load_encoder_weights(model, str(path), in_channels=3)
    assert f"{len(state)} of {len(state)} tensors matched by their order" in report
    assert "1 unexpected (first _fc.weight)" in report
    for key, tensor in donor.encoder.state_dict().items():
        assert torch.equal(model.encoder.state_dict()[key], tensor), key


def test_other_names_in_another_order_match_nothing(donor, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(dict(reversed(renamed(donor).items())), path)
    model = small()
    before = weights_of(model)
    with pytest.raises(ValueError, match=r"weights\.pt: none of its \d+ tensors fits the encoder tu-test_resnet"):
        load_encoder_weights(model, str(path), in_channels=3)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_first_convolution_is_adapted(channels, donor, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(as_encoder_file(donor), path)
    model = small(in_channels=channels)
    report = load_encoder_weights(model, str(path), in_channels=channels)
    assert f"first convolution adapted from 3 to {channels} channels" in report
    assert "0 missing" in report
    ours, theirs = next(model.encoder.parameters()), next(donor.encoder.parameters())
    if channels == 1:
        assert torch.allclose(ours, theirs.sum(dim=1, keepdim=True))
    else:
        for channel in range(channels):
            assert torch.allclose(ours[:, channel], theirs[:, channel % 3] * 3 / channels)


def test_every_convolution_that_sees_the_image_is_adapted(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(small(encoder="mobileone_s0").encoder.state_dict(), path)  # its stem has two parallel convolutions
    report = load_encoder_weights(small(encoder="mobileone_s0", in_channels=5), str(path), in_channels=5)
    assert "0 missing" in report
    assert report.count("adapted from 3 to 5 channels") == 1


def test_plain_unet_encoder_goes_round(tmp_path):
    path = tmp_path / "weights.pth"
    donor = small("plain-unet", "plain-8")
    torch.save(donor.state_dict(), path)
    model = small("plain-unet", "plain-8", num_logits=3)
    assert "50 of 50 tensors matched" in load_encoder_weights(model, str(path), in_channels=3)
    assert torch.equal(model.encoder.stages[4][3].weight, donor.encoder.stages[4][3].weight)


@pytest.mark.parametrize("form", [as_encoder_file, as_checkpoint])
def test_a_file_of_another_encoder_is_named(form, donor, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(form(donor), path)
    with pytest.raises(ValueError, match="test_resnet, the network has resnet18: pass --encoder (tu-)?test_resnet"):
        load_encoder_weights(small(encoder="resnet18"), str(path), in_channels=3)


class Foreign:
    pass


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"not weights", ["cannot be read as weights", "not a file of torch.save"]),
        (b"", ["cannot be read as weights"]),
        ([1, 2], ["holds a list", "expected a dict of tensors"]),
        ({"epoch": 3}, ["holds no tensors", "epoch", "encoder_state_dict"]),
        ({"loss": Foreign()}, ["cannot be read as weights", "Foreign", "not loaded"]),
        ({"a.weight": torch.zeros(2)}, ["none of its 1 tensors fits the encoder tu-test_resnet", "a.weight"]),
    ],
)
def test_bad_files_are_explained(content, words, tmp_path):
    path = tmp_path / "веса 1.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError) as caught:
        load_encoder_weights(small(), str(path), in_channels=3)
    for word in [*words, str(path)]:
        assert word in str(caught.value)


def test_bad_safetensors_are_explained(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"not weights at all")
    with pytest.raises(ValueError, match="weights.safetensors cannot be read as weights"):
        load_encoder_weights(small(), str(path), in_channels=3)


def test_truncated_file_is_explained(donor, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(donor.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match="weights.pth cannot be read as weights"):
        load_encoder_weights(small(), str(path), in_channels=3)


def test_missing_file_is_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file. Expected imagenet, none or"):
        load_encoder_weights(small(), str(tmp_path / "nothing.pth"), in_channels=3)
    with pytest.raises(FileNotFoundError, match="but a folder"):
        load_encoder_weights(small(), str(tmp_path), in_channels=3)


def test_channels_must_be_the_networks(tmp_path):
    with pytest.raises(ValueError, match="in_channels=4"):
        load_encoder_weights(small(), "imagenet", in_channels=4)


@pytest.mark.parametrize("encoder", ["resnet18", "tu-resnet18"])
def test_failed_download_names_the_ways_on(encoder, monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError) as caught:
        load_encoder_weights(small(encoder=encoder), "imagenet", in_channels=3)
    for word in ("imagenet", encoder, "--encoder-weights none", "--encoder-weights FILE", "HF_HUB_OFFLINE=1"):
        assert word in str(caught.value)


def test_weights_that_nobody_publishes():
    for architecture, encoder in (("plain-unet", "plain-8"), ("unet", "tu-convnext_atto_rms")):
        with pytest.raises(ValueError, match="no imagenet weights of.*--encoder-weights none"):
            load_encoder_weights(small(architecture, encoder), "imagenet", in_channels=3)
    with pytest.raises(ValueError, match=r"dpn68b, only imagenet\+5k \(--encoder-weights imagenet\+5k\)"):
        load_encoder_weights(small("unet", "dpn68b"), "imagenet", in_channels=3)


# ------------------------------------------------------------------ init_from


def test_whole_network_from_another(donor):
    model = small()
    report = init_from(model, {f"module.{key}": tensor for key, tensor in donor.state_dict().items()})
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in donor.state_dict().items())
    assert "0 missing, 0 unexpected" in report
    assert "head" not in report


def test_head_of_other_classes_is_skipped_whole(donor):
    model = small(num_logits=4, in_channels=5)
    before = weights_of(model)
    report = init_from(model, donor.state_dict())
    after = model.state_dict()
    assert "head skipped" in report
    assert "(1, 16, 3, 3) there and (4, 16, 3, 3) here" in report
    assert "first convolution adapted from 3 to 5 channels" in report
    assert "another shape" not in report
    for key in after:
        if key.startswith("segmentation_head."):
            assert torch.equal(after[key], before[key])
        elif key.startswith("decoder."):
            assert torch.equal(after[key], donor.state_dict()[key])


def test_init_from_another_network_is_an_error(donor):
    model = small("plain-unet", "plain-8")
    before = weights_of(model)
    with pytest.raises(ValueError, match="--init-from: none of the .* Pass the -m and --encoder"):
        init_from(model, donor.state_dict())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_partly_matching_network_is_said():
    report = init_from(small("fpn", "tu-test_resnet"), small("unet", "tu-test_resnet").state_dict())
    assert "missing (first decoder." in report


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
