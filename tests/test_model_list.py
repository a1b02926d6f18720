"""The list of networks: names and sizes that are true, filtered, with what a network is not on file for."""

import subprocess
import sys
from pathlib import Path

import pytest

import model_list
import train
from model import ARCHITECTURES, build_model, count_parameters

SIZES = model_list.read_sizes()


@pytest.fixture
def on_file(monkeypatch):
    """Replaces what is on file; with the versions of what is installed, nothing else is asked."""

    def replace(encoders, **architectures):
        versions = {name: model_list.importlib.metadata.version(name) for name in ("timm", "torch")}
        sizes = {"versions": versions, "architectures": architectures, "encoders": encoders}
        monkeypatch.setattr(model_list, "read_sizes", lambda: sizes)

    return replace


def test_every_architecture_is_on_file_with_its_size():
    assert list(SIZES["architectures"]) == list(ARCHITECTURES)
    for name in ("unet", "plain-unet", "fpn"):
        encoder = model_list.REFERENCE_ENCODER.get(name, "resnet34")
        network = build_model(name, encoder, in_channels=3, num_logits=1)
        assert SIZES["architectures"][name] == count_parameters(network) == model_list.measure_architecture(name)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet-b0", "mit_b0"])
def test_sizes_on_file_are_those_of_the_encoders(name):
    network = build_model("unet", name, in_channels=3, num_logits=1)
    assert SIZES["encoders"][name] == [count_parameters(network.encoder), "all"]


def test_what_an_encoder_fits():
    assert model_list.measure_encoder("tu-vit_tiny_patch16_224")[1] == "dpt"
    assert model_list.measure_encoder("tu-resnet10t")[1] == "all"
    assert model_list.measure_encoder("tu-nothing") == (0, "none")


def test_names_are_filtered(on_file):
    encoders = {"resnet18": (11_200_000, "all"), "tu-vit_tiny": (5_700, "dpt"), "tu-odd_resnet": (1, "none")}
    on_file(encoders, unet=24_400_000, fpn=900_000)
    lines = model_list.list_models("ResNet")
    assert [line.split()[:3] for line in lines[1:]] == [["resnet18", "11.2", "M"], ["tu-odd_resnet", "0", "k"]]
    assert lines[2].endswith("no architecture takes its features")
    assert model_list.list_models("tu-*tiny")[1].split() == ["tu-vit_tiny", "6", "k", "-m", "dpt", "only"]
    assert model_list.list_models("fpn")[1].split() == ["fpn", "900", "k", "with", "resnet34"]


def test_without_a_name_architectures_and_families(on_file):
    encoders = {f"resnet{depth}": (depth * 1_000_000, "all") for depth in (18, 34, 50)}
    on_file({**encoders, "tu-resnet10t": (500_000, "all"), "vgg11": (9_000_000, "all")}, **{"plain-unet": 926_065})
    lines = model_list.list_models("")
    assert lines[1].split() == ["plain-unet", "926", "k", "with", "plain-16,", "our", "own"]
    assert ["resnet", "4", "500", "k", "to", "50.0", "M"] in [line.split() for line in lines]
    assert ["vgg", "1", "9.0", "M"] in [line.split() for line in lines]


def test_a_name_that_is_nowhere_gives_the_nearest(on_file):
    on_file({"resnet18": (1, "all"), "vgg11": (1, "all")}, unet=1)
    assert model_list.list_models("resnt18") == [
        "no architecture and no encoder has a name with 'resnt18'; the nearest are resnet18"
    ]


def test_what_is_not_on_file_is_counted_where_it_is_little(on_file, monkeypatch):
    on_file({f"resnet{depth}": (0, "") for depth in (18, 34)})
    assert model_list.list_models("resnet18")[1].split() == ["resnet18", "11.2", "M"]
    monkeypatch.setattr(model_list, "MEASURED", 1)
    assert model_list.list_models("resnet")[1].endswith("not counted: give more of its name")


def test_of_other_versions_the_installed_libraries_are_asked(monkeypatch):
    sizes = {"versions": {"timm": "0"}, "architectures": {}, "encoders": {"resnet18": (1, "all"), "gone": (1, "all")}}
    known = model_list.known_encoders(sizes)
    assert known["resnet18"] == (1, "all") and known["tu-resnet10t"] == (0, "") and "gone" not in known


def test_the_command_lists_and_leaves(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--list-models", "plain"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "our own" in out
    assert ["plain-16", "589", "k", "-m", "plain-unet", "only"] in [line.split() for line in out.splitlines()]


def test_nothing_is_loaded_for_the_flag():
    code = "import sys, train; train.build_parser(); print({'torch', 'timm'} & set(sys.modules))"
    root = Path(train.__file__).parent
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
