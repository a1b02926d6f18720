"""PyTorch against ONNX Runtime, what an export must prove, and where exports are kept."""

import copy
import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from discs import write_dataset
from torch import nn

import backends
import onnx_export
import validate
from backends import load_config, load_forward, onnx_forward, torch_forward
from checkpoint import Geometry, ModelConfig, load_checkpoint, save_checkpoint
from model import build_model, stride_and_min_side
from onnx_export import ExportError, describe, export_network, prove_equal


def randomise_norms(network, seed=0):
    """Random normalisation statistics and scales: a network that was never trained gives logits that hardly vary."""
    generator = torch.Generator().manual_seed(seed)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1, generator=generator)
            layer.running_var.uniform_(0.5, 1.5, generator=generator)
            layer.weight.data.uniform_(0.5, 1.5, generator=generator)
            layer.bias.data.normal_(0, 0.1, generator=generator)
    return network


def make_network(architecture="plain-unet", encoder="plain-8", names=("background", "object"), channels=3):
    """A network whose logits have a spread above 0.1 on noise, and its description."""
    torch.manual_seed(0)
    logits = 1 if len(names) == 2 else len(names)
    network = build_model(architecture, encoder, in_channels=channels, num_logits=logits).eval()
    randomise_norms(network)
    stride, min_side = stride_and_min_side(architecture, encoder, network)
    noise = torch.randn(2, channels, 3 * stride, 5 * stride)
    with torch.inference_mode():
        spread = network(noise).std()
    head = network.segmentation_head[0]
    head.weight.data *= max(1.0, 0.5 / float(spread))
    with torch.inference_mode():
        assert network(noise).std() > 0.1
    config = ModelConfig(
        *(architecture, encoder, tuple(range(1, len(names))), names, ("red", "green", "blue", "nir")[:channels]),
        *((0.0,) * channels, (1.0,) * channels, Geometry("crops", (32, 32), 32, 16, 4)),
        **{"stride": stride, "min_side": min_side},
    )
    return network, config


def noise(batch, height, width, channels=3):
    return np.random.default_rng(1).standard_normal((batch, channels, height, width)).astype(np.float32)


@pytest.fixture(scope="module")
def plain():
    return make_network()


@pytest.fixture(scope="module")
def exported(plain):
    """What torch.export makes of the plain network."""
    return export_network(*plain, digest="d", origin="cache")


@pytest.fixture
def quick(monkeypatch):
    """The older exporter alone, which takes a tenth of a second; for tests of everything around it."""
    monkeypatch.setattr(onnx_export, "_export_program", onnx_export._export_script)


@pytest.fixture
def checkpoint(plain, tmp_path):
    network, config = plain
    path = tmp_path / "run" / "run.pth"
    save_checkpoint(path, config, network.state_dict())
    return path


def save_plain(path, plain, factor):
    """Another checkpoint of the same network, its last layer scaled."""
    network, config = copy.deepcopy(plain)
    network.segmentation_head[0].weight.data *= factor
    save_checkpoint(path, config, network.state_dict())


# ---- the export computes what the network computes ----


def metadata_of(content):
    return {entry.key: entry.value for entry in onnx.load_model_from_string(content).metadata_props}


def test_metadata_says_what_the_network_is_and_how_it_was_exported(exported, plain):
    metadata = metadata_of(exported)
    assert metadata["exporter"] == "torch.export" and metadata["torch"].startswith(torch.__version__.split("+")[0])
    assert (metadata["tile"], metadata["overlap"], metadata["digest"]) == ("32", "16", "d")
    assert json.loads(metadata["tessera"])["class_names"] == ["background", "object"] and metadata["commit"]
    assert onnx_forward(exported, "cpu")[0] == plain[1]


@pytest.mark.parametrize("size", [(1, 16, 16), (1, 80, 48), (3, 16, 112), (5, 208, 16)], ids=str)
def test_probabilities_agree_at_sizes_never_seen(exported, plain, size):
    batch = noise(*size)
    found, expected = onnx_forward(exported, "cpu")[1](batch), torch_forward(plain[0], "cpu")(batch)
    assert found.dtype == np.float32 and found.shape == expected.shape and expected.std() > 0.02
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("activation", ["auto", "sigmoid"])
def test_several_classes_and_four_channels(quick, activation):
    network, config = make_network(names=("background", "a", "b", "c"), channels=4)
    config = ModelConfig(**{**vars(config), "activation": activation})
    batch = noise(2, 48, 80, channels=4)
    found = onnx_forward(export_network(network, config), "cpu")[1](batch)
    np.testing.assert_allclose(found, torch_forward(network, "cpu", activation)(batch), atol=2e-6)
    assert np.allclose(found.sum(axis=1), 1, atol=1e-5) == (activation == "auto")


def test_the_older_exporter_is_the_way_round_and_metadata_say_so(plain, monkeypatch):
    def fail(*_):
        raise RuntimeError("no")

    monkeypatch.setattr(onnx_export, "_export_program", fail)
    metadata = metadata_of(export_network(*plain))
    assert (metadata["exporter"], metadata["failed"]) == ("TorchScript", "torch.export: no")
    monkeypatch.setattr(onnx_export, "_export_script", fail)
    with pytest.raises(ExportError, match="^torch.export: no; TorchScript: no$"):
        export_network(*plain)


def test_export_is_silent_and_leaves_the_network_alone(plain, capfd):
    network, config = copy.deepcopy(plain)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    export_network(network.train(), config)
    assert capfd.readouterr() == ("", "") and network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def change_one_weight(network):
    network.decoder.blocks[0][0].weight.data[3, 20, 1, 1] += 0.5


def swap_channels(network):
    first = network.encoder.stages[0][0].weight
    first.data = first.data[:, [2, 1, 0]]


def drop_a_layer(network):
    network.decoder.blocks[3][5] = nn.Identity()


@pytest.mark.parametrize("plant", [change_one_weight, swap_channels, drop_a_layer])
def test_a_planted_fault_is_refused(plain, plant, monkeypatch):
    genuine = onnx_export._export_script

    def faulty(network, *more):
        network = copy.deepcopy(network)
        plant(network)
        return genuine(network, *more)

    for name in ("_export_program", "_export_script"):
        monkeypatch.setattr(onnx_export, name, faulty)
    with pytest.raises(ExportError, match="differs from the network by .* of the logits' spread") as error:
        export_network(*plain)
    assert "TorchScript: " in str(error.value)


class Rounded(nn.Module):
    """A network whose answers lose digits."""

    def __init__(self, network, constant):
        super().__init__()
        self.network, self.constant = network, constant

    def forward(self, image):
        return (self.network(image) + self.constant) - self.constant


def test_a_refusal_says_what_rounding_does_to_the_network_itself(plain):
    network, config = plain
    model = describe(onnx_export._export_script(network, config, onnx_export.ANY_SIZE), config)
    assert prove_equal(model, Rounded(network, 0), config) < 1e-4
    with pytest.raises(ExportError, match=r"differs from the network by (.*)e-03 .* itself off by \1e-03"):
        prove_equal(model, Rounded(network, 6e4), config)  # neighbours of 6e4 in float32 are 4e-3 apart


def test_a_graph_of_one_size_is_refused(plain, monkeypatch, tmp_path):
    network, config = plain
    with onnx_export._quiet():
        torch.onnx.export(
            *(network, (torch.zeros(2, 3, 80, 48),), tmp_path / "fixed.onnx"),
            **{"dynamo": False, "input_names": ["image"], "output_names": ["logits"], "opset_version": 18},
        )
    with pytest.raises(Exception, match="(?i)invalid dimensions|expected"):
        prove_equal((tmp_path / "fixed.onnx").read_bytes(), network, config)


@pytest.mark.parametrize("names", [("background", "object"), ("background", "a", "b")])
def test_a_proof_on_logits_that_do_not_vary_is_void(quick, names):
    network, config = make_network(names=names)
    head = network.segmentation_head[0]
    head.weight.data.zero_()
    head.bias.data = torch.arange(len(head.bias)).float()  # the channels differ, the pixels do not
    with pytest.raises(ExportError, match="the proof is void: .* spread of 0.0e\\+00"):
        export_network(network, config)


@pytest.mark.slow
@pytest.mark.parametrize(
    "pair",
    [
        ("deeplabv3+", "efficientnet-b0"),
        ("unet", "resnet34"),
        ("fpn", "resnet18"),
        ("plain-unet", "plain-16"),
        ("unet", "tu-tf_efficientnet_lite0"),
        ("linknet", "resnet18"),
        ("manet", "resnet18"),
        ("unetplusplus", "resnet18"),
    ],
    ids="/".join,
)
def test_networks_that_are_offered_export(pair):
    network, config = make_network(*pair)
    content = export_network(network, config)
    # With random weights the attention of manet enlarges rounding errors to about what the proof allows.
    assert metadata_of(content)["exporter"] == "torch.export" or pair[0] == "manet"
    batch = noise(1, 7 * config.stride, 9 * config.stride)
    found, expected = onnx_forward(content, "cpu")[1](batch), torch_forward(network, "cpu")(batch)
    np.testing.assert_allclose(found, expected, atol=1e-3)


# ---- where exports are kept ----


def test_the_export_lies_beside_its_checkpoint_and_is_used_again(quick, checkpoint, monkeypatch):
    config, forward, note = load_forward(checkpoint, "cpu", backend="onnx")
    place = checkpoint.with_name("run.onnx")
    assert place.is_file() and "exported in" in note and str(place) in note
    assert [path.name for path in checkpoint.parent.iterdir() if path.name[0] == "."] == []
    monkeypatch.setattr(onnx_export, "export_network", None)
    for backend in ("onnx", "auto"):
        again, kept, note = load_forward(checkpoint, "cpu", backend=backend)
        assert note == f"ONNX Runtime on cpu, {place}" and again == config
        np.testing.assert_array_equal(kept(noise(1, 32, 32)), forward(noise(1, 32, 32)))
    assert load_forward(checkpoint, "cpu")[2] == "PyTorch on cpu"


def test_an_export_needs_no_checkpoint(quick, checkpoint):
    config = load_forward(checkpoint, "cpu", backend="onnx")[0]
    checkpoint.unlink()
    place = checkpoint.with_name("run.onnx")
    assert load_config(place) == config
    for backend in ("auto", "onnx"):
        assert load_forward(place, "cpu", backend=backend)[2] == "ONNX Runtime on cpu"


def test_a_checkpoint_that_changed_gets_another_export(quick, checkpoint, plain):
    first = load_forward(checkpoint, "cpu", backend="onnx")[1](noise(1, 32, 32))
    save_plain(checkpoint, plain, 3.0)
    assert load_forward(checkpoint, "cpu", backend="auto")[2] == "PyTorch on cpu", "the old export must not be used"
    _, forward, note = load_forward(checkpoint, "cpu", backend="onnx")
    assert "exported in" in note and np.abs(forward(noise(1, 32, 32)) - first).max() > 0.05
    expected = load_forward(checkpoint, "cpu")[1](noise(1, 32, 32))
    np.testing.assert_allclose(forward(noise(1, 32, 32)), expected, atol=1e-5)
    assert "exported in" not in load_forward(checkpoint, "cpu", backend="auto")[2]


def strip(content, **changed):
    proto = onnx.load_model_from_string(content)
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, changed)
    return proto.SerializeToString()


@pytest.mark.parametrize("kind", ["text", "onnx of another program", "truncated", "exported on purpose", "folder"])
def test_files_of_the_user_are_never_replaced(quick, checkpoint, plain, kind):
    place = checkpoint.with_name("run.onnx")
    if kind == "folder":
        place.mkdir()
        (place / "notes").write_text("mine")
    else:
        whole = describe(
            onnx_export._export_script(*plain, onnx_export.ANY_SIZE),
            plain[1],
            digest="of another",
            origin="export_onnx.py",
        )
        content = {"text": b"mine", "onnx of another program": strip(whole), "truncated": whole[: len(whole) // 2]}
        place.write_bytes(content.get(kind, whole))
    before = place.stat().st_mtime_ns, None if kind == "folder" else place.read_bytes()
    note = load_forward(checkpoint, "cpu", backend="onnx")[2]
    assert (place.stat().st_mtime_ns, None if kind == "folder" else place.read_bytes()) == before
    kept = backends.export_places(checkpoint, backends.file_digest(checkpoint))[1]
    assert kept.is_file() and str(kept) in note
    assert load_forward(checkpoint, "cpu", backend="auto")[2] == f"ONNX Runtime on cpu, {kept}"


def test_a_broken_file_in_the_cache_is_replaced(quick, checkpoint):
    checkpoint.with_name("run.onnx").write_text("mine")
    kept = backends.export_places(checkpoint, backends.file_digest(checkpoint))[1]
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"\x08\x01")
    assert "exported in" in load_forward(checkpoint, "cpu", backend="onnx")[2]
    assert "exported in" not in load_forward(checkpoint, "cpu", backend="onnx")[2]


def test_a_read_only_folder_sends_the_export_to_the_cache(quick, checkpoint, monkeypatch):
    genuine, closed = backends.atomic_write, [checkpoint.parent]

    def refuse(path, *more):
        if any(folder in path.parents for folder in closed):
            raise PermissionError(13, "Permission denied", str(path))
        return genuine(path, *more)

    monkeypatch.setattr(backends, "atomic_write", refuse)
    kept = backends.export_places(checkpoint, backends.file_digest(checkpoint))[1]
    assert str(kept) in load_forward(checkpoint, "cpu", backend="onnx")[2]
    assert not checkpoint.with_name("run.onnx").exists() and kept.is_file()
    kept.unlink()
    closed.append(kept.parent)
    _, forward, note = load_forward(checkpoint, "cpu", backend="onnx")
    assert "not kept" in note and forward(noise(1, 32, 32)).shape == (1, 1, 32, 32)


def test_last_checkpoint_has_an_export_of_its_own(tmp_path):
    assert backends.export_places(tmp_path / "last_checkpoint", "d")[0].name == "last_checkpoint.onnx"
    assert backends.export_places(tmp_path / "run.v2.pth", "d")[0].name == "run.v2.onnx"


@pytest.mark.slow
def test_two_processes_export_at_once(checkpoint):
    code = (
        "import sys; from pathlib import Path; from backends import load_forward; "
        "print(load_forward(Path(sys.argv[1]), 'cpu', backend='onnx')[2])"
    )
    command = [sys.executable, "-c", code, str(checkpoint)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    notes = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0, 0] and all("run.onnx" in note for note in notes)
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["run.onnx", "run.pth"]
    assert onnx_forward(checkpoint.with_name("run.onnx"), "cpu")[0] == load_checkpoint(checkpoint)[0]


# ---- the choice ----


def test_auto_exports_only_when_that_pays(quick, checkpoint, monkeypatch):
    for megapixels in (None, 0.001):
        assert load_forward(checkpoint, "cpu", backend="auto", megapixels=megapixels)[2] == "PyTorch on cpu"
    assert not checkpoint.with_name("run.onnx").exists()
    note = load_forward(checkpoint, "cpu", backend="auto", megapixels=1e6)[2]
    assert note.startswith("ONNX Runtime on cpu, exported in")


def test_time_is_judged_by_the_pixels_that_the_network_sees(plain):
    calls = []

    def forward(batch):
        calls.append(batch.shape)
        until = onnx_export_clock() + 0.02
        while onnx_export_clock() < until:
            pass
        return batch

    onnx_export_clock = backends.time.perf_counter
    config = plain[1]
    seconds = backends.seconds_for(forward, config, 4.096)  # 4000 tiles of 32 x 32
    assert set(calls) == {(1, 3, 32, 32)} and 80 <= seconds < 120
    calls.clear()
    assert backends.seconds_for(forward, config, 0.008) == 0 and not calls, "8 tiles at most are not tried"
    whole = ModelConfig(**{**vars(config), "geometry": Geometry("resize", (64, 32))})
    assert 10 <= backends.seconds_for(forward, whole, 1.024) < 15 and calls[-1] == (1, 3, 64, 32)


def test_a_failed_export_is_a_note_under_auto_and_an_error_under_onnx(checkpoint, monkeypatch):
    def fail(*_):
        raise RuntimeError("aten::no_such_thing is\nnot supported")

    for name in ("_export_program", "_export_script"):
        monkeypatch.setattr(onnx_export, name, fail)
    _, forward, note = load_forward(checkpoint, "cpu", backend="auto", megapixels=1e6)
    assert note.startswith("PyTorch on cpu, for the export to ONNX failed: ") and "\n" not in note
    assert "no_such_thing is not supported" in note
    np.testing.assert_array_equal(forward(noise(1, 32, 32)), load_forward(checkpoint, "cpu")[1](noise(1, 32, 32)))
    with pytest.raises(RuntimeError, match="run.pth cannot be exported .*no_such_thing.* Use --backend torch"):
        load_forward(checkpoint, "cpu", backend="onnx")
    assert [path.name for path in checkpoint.parent.iterdir()] == ["run.pth"]


def test_without_onnx_auto_stays_with_pytorch(checkpoint, monkeypatch):
    for name in ("onnx", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)  # what makes Python say that there is no such module
    assert load_forward(checkpoint, "cpu", backend="auto")[2] == "PyTorch on cpu"
    note = load_forward(checkpoint, "cpu", backend="auto", megapixels=1e6)[2]
    assert note.startswith("PyTorch on cpu, for the export to ONNX failed: ") and "onnx" in note


def test_half_precision_gives_probabilities_in_float32(plain, checkpoint):
    batch = noise(2, 32, 48)
    exact = torch_forward(plain[0], "cpu")(batch)
    rough = load_forward(checkpoint, "cpu", amp="bf16")[1](batch)
    with pytest.raises(ValueError, match="precision bf16 is for PyTorch"):
        load_forward(checkpoint, "cpu", backend="onnx", amp="bf16")
    assert rough.dtype == np.float32 and 1e-5 < np.abs(rough - exact).max() < 0.05


# ---- bad input ----


def test_bad_onnx_files_are_told_apart(exported, tmp_path):
    path = tmp_path / "run.onnx"
    with pytest.raises(FileNotFoundError, match="no ONNX file .*run.onnx; expected"):
        load_forward(path, "cpu", backend="auto")
    for content in (exported[: len(exported) // 2], exported[:-7], b"", b"\x08\x07", b"text, no graph"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="run.onnx is truncated or not an ONNX file .* Use another copy"):
            load_forward(path, "cpu", backend="auto")
    path.write_bytes(strip(exported, author="somebody"))
    with pytest.raises(
        ValueError, match="run.onnx has no metadata of Tessera.* pass the checkpoint .*--mean R G B --std"
    ):
        load_forward(path, "cpu", backend="onnx")
    path.write_bytes(strip(exported, tessera='{"format": 99}'))
    with pytest.raises(ValueError, match="run.onnx: its format is 99, .* update Tessera"):
        load_config(path)
    path.write_bytes(exported.replace(b"logits", b"nonsen"))
    with pytest.raises(ValueError, match="run.onnx maps image to nonsen, expected image to logits. Use its"):
        load_forward(path, "cpu", backend="onnx")


def test_backends_and_devices_that_cannot_be(exported, checkpoint, tmp_path):
    path = tmp_path / "run.onnx"
    path.write_bytes(exported)
    with pytest.raises(ValueError, match="run.onnx is an ONNX file, which --backend torch cannot run"):
        load_forward(path, "cpu", backend="torch")
    for file in (path, checkpoint):
        with pytest.raises(ValueError, match="onnx runs on cpu, cuda and tensorrt, found --device mps: use --cpu"):
            load_forward(file, "mps", backend="onnx")
    with pytest.raises(ValueError, match="unknown backend 'tensorrt', expected one of auto, torch, onnx"):
        load_forward(path, "cpu", backend="tensorrt")
    with pytest.raises(FileNotFoundError, match="no checkpoint .*absent.pth"):
        load_forward(tmp_path / "absent.pth", "cpu", backend="onnx")


def test_a_provider_that_is_not_installed_is_named(exported, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ValueError, match="has CPUExecutionProvider, expected CUDAExecutionProvider. Install onnxrunt"):
        onnx_forward(exported, "cuda")


def test_a_batch_of_another_number_of_channels_is_named(exported):
    with pytest.raises(RuntimeError, match=r"cannot take a batch of \(1, 4, 32, 32\)"):
        onnx_forward(exported, "cpu")[1](noise(1, 32, 32, channels=4))


# ---- validate.py ----


def test_validation_scores_the_same_with_either_backend(quick, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    network, config = make_network()
    config = ModelConfig(**{**vars(config), "labels": (255,), "mean": (90.0,) * 3, "std": (50.0,) * 3})
    save_checkpoint(checkpoint, config, network.state_dict())
    data = write_dataset(tmp_path / "discs", train=1, val=2, sizes=((40, 57), (33, 16)))
    summaries = []
    runs = ((checkpoint, "torch"), (checkpoint, "onnx"), (checkpoint.with_name("run.onnx"), "auto"))
    for number, (file, backend) in enumerate(runs):
        words = ["-d", data / "val", "-c", file, "--backend", backend, "-o", tmp_path / str(number), "--com"]
        validate.main([*map(str, words), "--cpu", "-w", "0"])
        summaries.append(json.loads((tmp_path / str(number) / "_metrics.json").read_text()))
    out = capsys.readouterr().out
    assert "backend: PyTorch on cpu" in out and "backend: ONNX Runtime on cpu, exported in" in out
    assert summaries[0]["iou"] > 0
    for summary in summaries[1:]:
        assert summary["iou"] == pytest.approx(summaries[0]["iou"], abs=1e-4)
    with pytest.raises(SystemExit) as stop:
        validate.main(["-d", str(data / "val"), "-c", str(runs[2][0]), "--backend", "torch", "--cpu"])
    assert stop.value.code == 1 and "which --backend torch cannot run" in capsys.readouterr().err
