"""Where export_onnx.py writes, what it leaves alone, and what it says about a file before and after."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import onnx
import onnxruntime
import pytest
import torch
from tiny_runs import random_network, write_checkpoint, write_split

import annotate
import backends
import export_onnx
import export_report
import fewer_bits
import onnx_export
import predict
import validate
from checkpoint import Geometry
from export_graph import Shell


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The older exporter alone, which takes a tenth of a second."""
    monkeypatch.setattr(onnx_export, "_export_program", onnx_export._export_script)


def write_run(folder, **changes):
    """A checkpoint in a run folder."""
    path = folder / "run" / "run.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(path, **changes)
    return path


def refusal(capsys, words):
    """Exit status and message of a call that must fail."""
    with pytest.raises(SystemExit) as exit_:
        export_onnx.main([str(word) for word in words])
    return exit_.value.code, " ".join(capsys.readouterr().err.split())


def test_files_beside_the_export_that_are_the_users_stay(tmp_path, capsys):
    path = write_run(tmp_path)
    for name, words in (
        ("run.pt", ["--torchscript"]),
        ("run.fp16.onnx", ["--for", "cuda"]),
    ):
        (path.parent / name).write_text("mine")
        code, text = refusal(capsys, ["-c", path, *words])
        assert code == 1 and f"{name} is there and is no export of Tessera" in text and "--replace" in text
        assert (path.parent / name).read_text() == "mine" and not path.with_suffix(".onnx").exists()
    export_onnx.main(["-c", str(path), "--torchscript", "--replace"])
    export_onnx.main(["-c", str(path), "--torchscript"])  # over its own
    torch.save({"a": torch.zeros(1)}, path.parent / "run.pt")  # an archive too
    assert refusal(capsys, ["-c", path, "--torchscript"])[0] == 1


def test_a_checkpoint_is_never_written_over_by_what_was_made_of_it(tmp_path, capsys):
    path = write_run(tmp_path)
    path = path.rename(path.with_suffix(".pt"))
    content = path.read_bytes()
    words = ["-c", path, "-o", path.with_suffix(".onnx"), "--torchscript", "--replace"]
    code, text = refusal(capsys, words)
    assert code == 2 and "run.pt would replace" in text and path.read_bytes() == content


def test_checkpoints_of_one_name_are_not_written_into_one_file(tmp_path, capsys):
    path = write_run(tmp_path)
    other = tmp_path / "another" / path.name
    other.parent.mkdir()
    other.write_bytes(path.read_bytes())
    code, text = refusal(capsys, ["-d", tmp_path, "-o", tmp_path / "out"])
    assert code == 2 and str(path) in text and str(other) in text and "would both become" in text
    assert not (tmp_path / "out").exists()


def test_exports_into_one_folder_at_once_all_stay_in_its_report(tmp_path, monkeypatch):
    write = export_report.write_text

    def slow(path, text):
        time.sleep(0.05)  # everybody else has read by now, unless they wait for their turn
        write(path, text)

    monkeypatch.setattr(export_report, "write_text", slow)
    place = tmp_path / "deploy" / "report.json"
    with ThreadPoolExecutor(5) as pool:
        told = list(pool.map(lambda number: export_report.write_report(place, [{"file": str(number)}]), range(5)))
    rows = json.loads(place.read_text())["exports"]
    assert sorted(row["file"] for row in rows) == ["0", "1", "2", "3", "4"] and told == [f"report in {place}"] * 5
    assert [file.name for file in place.parent.iterdir()] == ["report.json"]


def test_a_report_that_another_process_holds_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(export_report, "LONGEST_WAIT", 0.1)
    with export_report.hold(tmp_path / "report.json"):
        told = export_report.write_report(tmp_path / "report.json", [{"file": "a"}])
    assert "report.json is not written, the figures are printed alone" in told and "in use by another process" in told
    assert export_report.write_report(tmp_path / "report.json", [{"file": "a"}]).startswith("report in ")


def test_the_table_names_every_size_that_was_timed():
    shared = {"variant": "onnx", "bytes": 1, "seconds": 1.0, "iou": None, "threads": 1, "tiles": 0}
    sides = ([1, 3, 64, 64], [1, 3, 64, 64], [1, 3, 96, 32])
    text = export_report.table([{"file": f"{place}.onnx", "input": side, **shared} for place, side in enumerate(sides)])
    assert "calls with 1x3x64x64, 1x3x96x32, in turns" in text


# ---- a GPU that is or is not here ----


def test_a_gpu_that_could_measure_needs_images(tmp_path, capsys, monkeypatch):
    path = write_run(tmp_path)
    monkeypatch.setattr(onnx_export, "runs_on", lambda device: True)
    code, text = refusal(capsys, ["-c", path, "--for", "cuda"])
    assert code == 2 and "--for cuda needs -ds DIR" in text


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_without_its_hardware_does_not_count(monkeypatch):
    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    assert onnx_export.runs_on("cpu") and not onnx_export.runs_on("cuda:99")


@pytest.mark.parametrize("words", [[], ["--fixed-size", "64", "48"]], ids=["any size", "one size"])
def test_half_precision_that_is_too_narrow_is_refused(tmp_path, capsys, words):
    path = write_run(tmp_path)
    saved = torch.load(path, weights_only=True)
    state = saved["model_state_dict"]
    last = [key for key in state if key.endswith("weight") and state[key].ndim == 4][-1]
    state[last] *= 1e5  # of 65504, the largest number of float16
    torch.save(saved, path)
    export_onnx.main(["-c", str(path), "--for", "cuda", *words])
    text = capsys.readouterr().out
    assert "fp16 is refused: " in text and "of mask pixels are those of float32, expected 99% or more" in text
    assert not path.with_name("run.fp16.onnx").exists() and path.with_suffix(".onnx").exists()


def test_what_tensorrt_lacks_runs_on_the_same_gpu(monkeypatch):
    made = []

    class Session:
        def __init__(self, model, options, providers):
            made.append(providers)

        def get_providers(self):
            return [made[-1][0][0]]

    names = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    for device in ("tensorrt:1", "cuda:1", "cpu"):
        onnx_export.make_session(b"", device)
    card = {"device_id": "1"}
    assert made == [
        [("TensorrtExecutionProvider", card), ("CUDAExecutionProvider", card)],
        [("CUDAExecutionProvider", card)],
        [("CPUExecutionProvider", {})],
    ]


# ---- what a file says ----


def test_a_file_that_names_other_files_for_its_weights_is_refused(tmp_path):
    config = write_checkpoint(tmp_path / "run.pth")
    bare = onnx_export._export_script(random_network(config, 0).eval(), config, onnx_export.ANY_SIZE)
    whole = onnx_export.describe(bare, config)
    place = tmp_path / "split.onnx"
    onnx.save_model(
        onnx.load_model_from_string(whole), place, save_as_external_data=True, location="secret", size_threshold=0
    )
    with pytest.raises(ValueError, match="split.onnx names other files for its weights, expected one file"):
        onnx_export.read_description(place)
    onnx.save_model(onnx.load(place), place)
    assert onnx_export.read_description(place).config == config


def test_a_threshold_is_written_to_the_last_digit():
    shell = Shell(output="mask", threshold=0.123456789)
    assert Shell.from_metadata(shell.metadata()) == shell


def test_commands_say_that_a_file_gives_no_probabilities(tmp_path, capsys):
    for classes, words in ((1, "gives masks decided at 0.3 and no probabilities"), (4, "gives masks and no prob")):
        path, split = write_run(tmp_path / str(classes), classes=classes), write_split(tmp_path / f"val{classes}")
        limit = ["-t", "0.3"] if classes == 1 else []
        export_onnx.main(["-c", str(path), "--with-postprocessing", "mask", *limit])
        capsys.readouterr()
        common = ["-c", str(path.with_suffix(".onnx")), "-o", str(tmp_path / f"out{classes}")]
        predict.main([*common, "-i", str(split / "images")])
        validate.main([*common, "-d", str(split), "-log", str(tmp_path / "logs")])
        assert capsys.readouterr().out.count(words) == 2


def test_another_size_than_that_of_training_is_said(tmp_path, capsys):
    path = write_run(tmp_path, geometry=Geometry("resize", (64, 64)))
    for words, warned in ((["--fixed-size", "64"], False), ([], False), (["--fixed-size", "48", "80"], True)):
        export_onnx.main(["-c", str(path), *words])
        text = "warning: the network was trained on images resized to 64x64, and this file is for 48x80"
        assert (text in capsys.readouterr().out) == warned


def test_images_that_cannot_be_tried_are_named(tmp_path, capsys):
    path, split = write_run(tmp_path), write_split(tmp_path / "val")
    (split / "images" / "0.png").write_bytes(b"no picture")
    export_onnx.main(["-c", str(path), "-ds", str(split)])
    text = capsys.readouterr().out
    assert "warning: not looked at: " in text and "0.png" in text and "IoU: of 1 tiles" in text


def test_without_a_device_a_file_runs_on_what_onnx_runtime_has(tmp_path, monkeypatch, capsys):
    path, split = write_run(tmp_path), write_split(tmp_path / "val")
    export_onnx.main(["-c", str(path)])
    file = path.with_suffix(".onnx")
    pick = backends.pick_device
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick("auto", False, path) == "mps" and pick("auto", False, file) == "cpu"
    assert pick("auto", True, path) == "cpu"
    capsys.readouterr()
    predict.main(["-c", str(file), "-i", str(split / "images"), "-o", str(tmp_path / "out")])
    validate.main(["-c", str(file), "-d", str(split), "-o", str(tmp_path / "val_out"), "-log", str(tmp_path / "logs")])
    flags = ["--images", str(split / "images"), "-c", str(file), "--engines", "model", "-o", str(tmp_path / "labels")]
    annotate.main(flags)
    assert capsys.readouterr().out.count("ONNX Runtime on cpu") == 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick("auto", False, path) == "cuda" and pick("auto", False, file) == "cpu"
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    assert pick("auto", False, file) == "cuda"


def test_why_the_first_exporter_did_not_write_a_file_is_said(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(onnx_export, "_export_program", fail)
    export_onnx.main(["-c", str(write_run(tmp_path))])
    assert "exported by TorchScript (torch.export: no such operator); differs by" in capsys.readouterr().out


@pytest.mark.parametrize(("folder", "flags", "warned"), [("val", [], True), ("val", ["train"], False), ("", [], False)])
def test_calibrating_on_what_is_scored_is_said(tmp_path, capsys, monkeypatch, folder, flags, warned):
    path = write_run(tmp_path)
    for name in ("train", "val"):
        write_split(tmp_path / "data" / name)
    seen = []
    monkeypatch.setattr(fewer_bits, "write_in_fewer_bits", lambda *args: seen.append(args[4]))
    words = ["-c", path, "-o", tmp_path / "net.onnx", "-ds", tmp_path / "data" / folder, "--quantize", "int8-static"]
    words += [word for name in flags for word in ("--calibration", tmp_path / "data" / name)]
    export_onnx.main([str(word) for word in words])
    assert ("that it is scored on, which flatters it" in capsys.readouterr().out) == warned
    assert len(seen) == 1 and len(seen[0]) > 0
