"""Pretrained weights: they land where they should, messages say what to do."""

import pytest
import torch
from safetensors.torch import save_file

from model import build_model
from weights import init_from, load_encoder_weights


def small(architecture="unet", encoder="tu-test_resnet", in_channels=3, num_logits=1):
    return build_model(architecture, encoder, in_channels=in_channels, num_logits=num_logits)


def weights_of(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


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
