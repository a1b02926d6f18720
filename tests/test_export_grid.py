"""Architectures with encoders of every kind export and agree; what cannot be built or exported says why."""

import numpy as np
import pytest
from tiny_runs import blobs, random_network, write_checkpoint, write_split

import export_onnx
import onnx_export
import predict
import validate
from benchmarks import export as bench
from benchmarks.export import Case, Outcome, list_cases, try_case
from checkpoint import Geometry, save_checkpoint
from export_proof import randomise_statistics, reference
from image_io import read_mask
from model import ARCHITECTURES, SMP_CLASSES
from networks.plain_unet import PLAIN_WIDTHS

QUICK = (
    Case("unet", "resnet18"),
    Case("linknet", "tu-mobilenetv3_small_100"),
    Case("fpn", "mit_b0"),
    Case("deeplabv3+", "efficientnet-b0", 1, 4),
    Case("segformer", "resnet18", 5, 1),
)
VIT = "tu-vit_tiny_patch16_224"
# What smp does not build, in its own words. MiT has no features at half size. A vision transformer has one scale alone,
# which DPT is for; but of encoders that are not timm's DPT takes none.
UNBUILT = {
    ("unetplusplus", "mit_b0"): "UnetPlusPlus is not support encoder_name=mit_b0",
    ("linknet", "mit_b0"): "Encoder `mit_b0` is not supported for Linknet",
    **{(name, VIT): "Unsupported model downsampling pattern" for name in SMP_CLASSES if name != "dpt"},
    **{("dpt", name): "Only Timm encoders are supported for DPT" for name in bench.ENCODERS if name[:3] != "tu-"},
}


@pytest.fixture
def older(monkeypatch):
    """The older exporter alone, which takes a second where the other one takes ten."""
    monkeypatch.setattr(onnx_export, "_export_program", onnx_export._export_script)


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_a_pair_exports_and_agrees(case, older):
    found = try_case(case)
    assert (found.form, found.remark) == ("free", "") and found.megabytes > 1


@pytest.mark.slow
@pytest.mark.parametrize("case", [*list_cases(ARCHITECTURES, bench.ENCODERS)], ids=str)
def test_every_pair_that_smp_builds_exports_with_free_sides(case):
    found = try_case(case)
    if (case.architecture, case.encoder) in UNBUILT:
        assert found.form == "" and found.remark.startswith("not built: ")
    else:
        assert found.form == "free", found.remark


@pytest.mark.parametrize("pair", UNBUILT, ids=" ".join)
def test_a_pair_that_smp_does_not_build_says_why(pair):
    found = try_case(Case(*pair))
    assert found.form == "" and found.remark.startswith("not built: ") and UNBUILT[pair] in found.remark


def test_the_grid_prints_each_case_and_then_the_failures(monkeypatch, capsys):
    answers = {
        "unet": Outcome("free", "TorchScript", 2.0, 3.0, "torch.export: no"),
        "fpn": Outcome("", remark="broken"),
    }
    monkeypatch.setattr(bench, "try_case", lambda case: answers[case.architecture])
    bench.main(["grid", "--only", "unet", "fpn", "--encoders", "resnet50"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["unet", "resnet50", "free", "TorchScript", "2.0", "3.0"]
    assert lines[2].split() == ["fpn", "resnet50", "-", "-", "0.0", "0.0"]
    assert lines[3:] == ["", "unet resnet50: free", "  torch.export: no", "", "fpn resnet50: no file", "  broken"]


def test_cases_are_all_pairs_and_more_channels_on_some():
    cases = [*list_cases(("unet", "plain-unet", "fpn"), ("resnet18", "mit_b0"))]
    assert len(cases) == len(set(cases)) == 6 + len(PLAIN_WIDTHS)
    assert str(cases[1]) == "unet resnet18 1 channels, 1 classes" and str(cases[-1]) == "fpn mit_b0"


def test_latency_names_all_four_ways_and_the_instructions(older, capsys):
    bench.main(["latency", "-m", "plain-unet", "--encoder", "plain-8", "--size", "32", "--repeats", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("plain-unet plain-8, 1x3x32x32, ") and lines[1].startswith("int8 products: ")
    assert [line[:26].rstrip() for line in lines[3:]] == [
        *("PyTorch", "PyTorch, channels last", "ONNX Runtime", "int8 static"),
    ]
    assert lines[3].split()[2] == "1.00" and lines[5].split()[-2] == "1.00"


# ---- files of networks that look at the whole of what they see, through the commands ----


def write_pspnet(path, geometry):
    """A checkpoint whose answers vary on blobs, half of them objects."""
    path.parent.mkdir(parents=True)
    changes = {"architecture": "pspnet", "encoder": "tu-mobilenetv3_small_100", "geometry": geometry}
    config = write_checkpoint(path, stride=8, min_side=8, **changes)
    network = randomise_statistics(random_network(config, 0).eval(), config).eval()
    network.segmentation_head[0].bias.data -= float(np.median(reference(network, config, [blobs(64, 64)])))
    save_checkpoint(path, config, network.state_dict())


def all_masks(folder):
    return [read_mask(path) for path in sorted(folder.glob("**/*.png"))]


@pytest.mark.parametrize("kind", ["crops", "resize"])
@pytest.mark.parametrize("sides", ["free", "fixed because nothing else works"])
def test_a_file_gives_the_results_of_its_checkpoint(tmp_path, monkeypatch, kind, sides):
    """Images are no smaller than a tile: a smaller one is padded further for a fixed size, and its means change."""
    genuine = onnx_export._export_script

    def export(network, config, form):
        if sides != "free" and not form.size:
            raise RuntimeError("sides are constants here")
        return genuine(network, config, form)

    for name in ("_export_program", "_export_script"):
        monkeypatch.setattr(onnx_export, name, export)
    path, out = tmp_path / "run" / "run.pth", tmp_path / "out" / "net.onnx"
    write_pspnet(path, Geometry(kind, (64, 64), 64, 16, 4))
    split = write_split(tmp_path / "val", size=(70, 150))
    export_onnx.main(["-c", str(path), "-o", str(out)])
    metadata = onnx_export.read_description(out).metadata
    assert metadata.get("size") == (None if sides == "free" else "64x64")
    assert ("constants here" in metadata.get("fixed_because", "")) == (sides != "free")
    for model, backend in ((path, "torch"), (out, "auto")):
        common = ["-c", str(model), "--backend", backend]
        predict.main([*common, "-i", str(split / "images"), "-o", str(tmp_path / backend / "predict")])
        folder = tmp_path / backend / "validate"
        validate.main([*common, "-d", str(split), "-o", str(folder), "-log", str(tmp_path / "logs")])
    expected, found = all_masks(tmp_path / "torch"), all_masks(tmp_path / "auto")
    assert len(expected) == len(found) == 4 and all(0.1 < (mask > 0).mean() < 0.9 for mask in expected)
    assert np.mean([(a == b).mean() for a, b in zip(expected, found, strict=True)]) >= 0.9999
