"""Architectures with encoders of every kind export and agree; what cannot be built or exported says why."""

import pytest

import onnx_export
from benchmarks import export as bench
from benchmarks.export import Case, Outcome, list_cases, try_case
from model import SMP_CLASSES

QUICK = (
    Case("unet", "resnet18"),
    Case("linknet", "tu-mobilenetv3_small_100"),
    Case("fpn", "mit_b0"),
    Case("deeplabv3+", "efficientnet-b0", 1, 4),
    Case("segformer", "resnet18", 5, 1),
)
UNBUILT = {("unetplusplus", "mit_b0"), ("linknet", "mit_b0"), ("deeplabv3", "mit_b0"), ("deeplabv3+", "mit_b0"),
           ("pan", "mit_b0")}  # fmt: skip
VIT = "tu-vit_tiny_patch16_224"


@pytest.fixture
def older(monkeypatch):
    """The older exporter alone, which takes a second where the other one takes ten."""
    monkeypatch.setattr(onnx_export, "_export_program", onnx_export._export_script)


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_a_pair_exports_and_agrees(case, older):
    found = try_case(case)
    assert found.form and found.megabytes > 1, found.remark


@pytest.mark.slow
@pytest.mark.parametrize("case", [*list_cases((*SMP_CLASSES,), bench.ENCODERS)], ids=str)
def test_every_pair_that_smp_builds_exports(case):
    found = try_case(case)
    built = (case.architecture, case.encoder) not in UNBUILT and (case.encoder == VIT) == (case.architecture == "dpt")
    assert bool(found.form) == built, found.remark
    assert built or found.remark.startswith("not built: ")


def test_a_pair_that_smp_does_not_build_says_why():
    found = try_case(Case("unetplusplus", "mit_b0"))
    assert found.form == "" and found.remark.startswith("not built: ") and "mit" in found.remark.lower()


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
    cases = [*list_cases(("unet", "fpn"), ("resnet18", "mit_b0"))]
    assert len(cases) == len(set(cases)) == 6
    assert str(cases[1]) == "unet resnet18 1 channels, 1 classes" and str(cases[-1]) == "fpn mit_b0"


def test_latency_names_all_four_ways_and_the_instructions(older, capsys):
    bench.main(["latency", "-m", "plain-unet", "--encoder", "plain-8", "--size", "32", "--repeats", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("plain-unet plain-8, 1x3x32x32, ") and lines[1].startswith("int8 products: ")
    assert [line[:26].rstrip() for line in lines[3:]] == [
        *("PyTorch", "PyTorch, channels last", "ONNX Runtime", "int8 static"),
    ]
    assert lines[3].split()[2] == "1.00" and lines[5].split()[-2] == "1.00"
