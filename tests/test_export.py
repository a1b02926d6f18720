"""export_onnx.py: what is around the network in a file, its proof, and that other commands run such files."""

import copy
import itertools
import json
import subprocess
import sys

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny_runs import blobs, random_network, write_checkpoint, write_split
from torch import nn

import backends
import export_file
import export_onnx
import export_proof
import fewer_bits
import onnx_export
import predict
import validate
from export_graph import KINDS, PIXEL_TYPES, Shell, fit_config, wrap_network
from export_proof import model_runner, prove_file
from image_io import normalise, read_mask
from onnx_export import ExportError
from outputs import decide
from tiling import plan_axis, reflect_index


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The older exporter alone, which takes a tenth of a second."""
    monkeypatch.setattr(onnx_export, "_export_program", onnx_export._export_script)


def network_of(folder, **changes):
    """A checkpoint, its description and its network."""
    path = folder / "run" / "run.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    config = write_checkpoint(path, **changes)
    return path, config, random_network(config, 0).eval()


@pytest.fixture(scope="module", params=[1, 4], ids=["one class", "four classes"])
def plain(request, tmp_path_factory):
    """A network with its bare export."""
    folder = tmp_path_factory.mktemp("plain")
    path, config, network = network_of(folder, classes=request.param)
    bare = onnx_export._export_script(network, config, onnx_export.ANY_SIZE)
    return config, network, bare


def slow_answer(network, config, image):
    """Probabilities (K, H, W) of a raw image (H, W, C), with padding written as loops."""
    height, width, _ = image.shape

    def places(size):
        frame = max(-(-max(size, config.min_side) // config.stride), 1) * config.stride
        wave = itertools.cycle([*range(size), *range(size - 2, 0, -1)])
        return [next(wave) for _ in range(frame)]

    padded = np.array([[image[y, x] for x in places(width)] for y in places(height)], np.float64)
    padded = (padded - np.array(config.mean)) / np.array(config.std)
    with torch.inference_mode():
        logits = network(torch.from_numpy(padded.transpose(2, 0, 1)[None].astype(np.float32)))[0, :, :height, :width]
    return logits.numpy(), (logits.sigmoid() if len(logits) == 1 else logits.softmax(0)).numpy()


# ---- the graph ----


@pytest.mark.parametrize("size", [(1, 1), (2, 7), (16, 16), (17, 33), (1, 50), (48, 31)], ids=str)
@pytest.mark.parametrize("pixels", ["", *PIXEL_TYPES])
def test_a_file_gives_what_the_network_gives(plain, size, pixels):
    config, network, bare = plain
    kind = pixels or "uint8"
    image = np.random.default_rng(3).integers(0, 256, (*size, 3)).astype(kind)
    logits, probs = slow_answer(network, config, image)
    answers = {"logits": logits, "probabilities": probs, "mask": decide(probs, 0.4)}
    batch = np.stack([image, image[::-1]]) if pixels else normalise(image, config.mean, config.std)[None]
    for output in KINDS:
        run = model_runner(wrap_network(bare, config, Shell(pixels, output, 0.4)))
        found = run(batch)
        assert len(found) == len(batch) and found.dtype == (np.uint8 if output == "mask" else np.float32)
        if output == "mask":
            assert (found[0] == answers["mask"]).mean() > 0.999
        else:
            np.testing.assert_allclose(found[0], answers[output], rtol=1e-3, atol=1e-4)


def test_normalisation_in_the_file_is_that_of_image_io(plain):
    config = plain[0]
    image = np.random.default_rng(0).integers(0, 65536, (16, 16, 3)).astype(np.uint16)
    nothing = onnx.helper.make_model(
        onnx.helper.make_graph(
            [onnx.helper.make_node("Identity", ["image"], ["logits"])],
            "nothing",
            [onnx.helper.make_tensor_value_info("image", 1, ("n", 3, "h", "w"))],
            [onnx.helper.make_tensor_value_info("logits", 1, ("n", 3, "h", "w"))],
        ),
        opset_imports=[onnx.helper.make_opsetid("", 18)],
        ir_version=10,
    ).SerializeToString()
    statistics = {**vars(config), "mean": (12000.5, 3.25, 40000.0), "std": (1234.5, 0.0, 9.75)}
    config = type(config)(**statistics)
    found = model_runner(wrap_network(nothing, config, Shell("uint16")))(image[None])[0]
    np.testing.assert_array_equal(found, normalise(image, config.mean, config.std))


@pytest.mark.parametrize("size", [1, 2, 3, 15, 16, 17, 40])
@pytest.mark.parametrize(("stride", "least"), [(16, 16), (8, 20), (32, 96)])
def test_padding_in_the_file_is_that_of_tiling(plain, size, stride, least):
    config = type(plain[0])(**{**vars(plain[0]), "stride": stride, "min_side": least})
    ramp = np.arange(size, dtype=np.float32)[None, None, :, None].repeat(3, 1)
    graph = wrap_network(plain[2], config, Shell())
    proto = onnx.load_model_from_string(graph)
    proto.graph.output.append(onnx.helper.make_tensor_value_info("network_image", 1, None))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    seen = session.run(["network_image"], {"image": ramp})[0]
    frame = plan_axis(size, tile=least, overlap=0, halo=0, stride=stride, min_side=least, window="hann").frame
    assert seen.shape[2] == frame
    np.testing.assert_array_equal(seen[0, 0, :, 0], reflect_index(size, frame))


# ---- the proof ----


def faults():
    """Ways to build a wrong file out of (bare, config, shell)."""

    def edge(bare, config, shell):  # the last pixel is repeated in place of reflection
        proto = onnx.load_model_from_string(wrap_network(bare, config, shell))
        made = {node.output[0]: node for node in proto.graph.node}
        for node in proto.graph.node:
            if node.op_type == "Min" and node.name.startswith("node_shell"):
                wave = made[made[node.input[1]].input[0]]
                node.input[1] = wave.input[0]
        return proto.SerializeToString()

    def other(**values):
        return lambda bare, config, shell: wrap_network(bare, type(config)(**{**vars(config), **values}), shell)

    return {
        "padding": edge,
        "stride": other(stride=8, min_side=8),
        "swapped channels": other(mean=(90.0, 120.0, 150.0)),
        "deviation": other(std=(40.0, 40.0, 41.0)),
    }


@pytest.mark.parametrize("name", faults())
@pytest.mark.parametrize("output", ["logits", "mask"])
def test_a_planted_fault_is_refused(plain, name, output):
    config, network, bare = plain
    config = type(config)(**{**vars(config), "mean": (150.0, 120.0, 90.0)})
    shell = Shell("uint8", output)
    good = prove_file(model_runner(wrap_network(bare, config, shell)), network, config, shell)
    assert good.agreement >= 0.9999 and good.largest < 1e-4
    with pytest.raises(Exception, match="the file|ONNX|Reshape|Concat|dimension") as error:
        prove_file(model_runner(faults()[name](bare, config, shell)), network, config, shell)
    if name != "stride":
        assert isinstance(error.value, ExportError) and "of mask pixels agree; expected" in str(error.value)


def test_faults_of_the_network_itself_are_refused(plain):
    config, network, bare = plain
    for change in (lambda weight: weight[:, [2, 1, 0]], lambda weight: weight * 1.01):
        wrong = copy.deepcopy(network)
        first = next(layer for layer in wrong.modules() if isinstance(layer, nn.Conv2d))
        first.weight.data = change(first.weight.data)
        with pytest.raises(ExportError, match="logits differ from the network's by .* That file was not written"):
            prove_file(model_runner(wrap_network(bare, config, Shell())), wrong, config, Shell())


def test_the_proof_sees_one_pixel_odd_sides_batches_and_real_tiles(plain):
    config, network, bare = plain
    run, shapes = model_runner(wrap_network(bare, config, Shell("uint8"))), []

    def seen(batch):
        shapes.append(batch.shape)
        return run(batch)

    proof = prove_file(seen, network, config, Shell("uint8"), [blobs(37, 29)])
    assert {shape[0] for shape in shapes} == {1, 3} and (1, 1, 1, 3) in shapes and (1, 37, 29, 3) in shapes
    assert len({shape[1:3] for shape in shapes}) == 4 and any(shape[1] % 2 and shape[1] > 1 for shape in shapes)
    assert proof.pixels > 10000 and proof.spread > 0.1


def test_networks_that_hardly_react_are_also_proved_with_random_statistics(tmp_path, monkeypatch):
    path, config, network = network_of(tmp_path)
    network.segmentation_head[0].weight.data *= 0.01
    write_checkpoint(path, state=network.state_dict())
    seen = []
    genuine = export_proof.randomise_statistics

    def spy(network, config):
        varied = genuine(network, config)
        seen.append(prove_spread(varied, config))
        return varied

    def prove_spread(network, config):
        return export_proof.reference(network, config, export_proof.noise_batches(config, Shell())[-1]).std()

    monkeypatch.setattr(export_file, "randomise_statistics", spy)
    export_onnx.main(["-c", str(path)])
    assert len(seen) == 1 and seen[0] > 0.1


# ---- the command, and the commands that run its files ----


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--with-preprocessing"],
        ["--with-preprocessing", "--input-dtype", "float32", "--with-postprocessing"],
        ["--with-preprocessing", "--with-postprocessing", "mask", "-t", "0.4"],
        ["--fixed-size", "64"],
        ["--fixed-size", "80", "100", "--with-preprocessing", "--with-postprocessing", "probabilities"],
    ],
    ids=" ".join,
)
def test_validate_and_predict_run_the_file(tmp_path, capsys, flags):
    path, config, _ = network_of(tmp_path)
    split, out = write_split(tmp_path / "val"), tmp_path / "deploy" / "net.onnx"
    export_onnx.main(["-c", str(path), "-o", str(out), "-ds", str(split), *flags])
    text = capsys.readouterr().out
    assert "100.0000% of" in text and "ms: median of 20 calls" in text and "IoU" in text
    rows = json.loads((out.parent / "report.json").read_text())["exports"]
    assert [row["variant"] for row in rows] == ["torch", "onnx"]
    assert rows[0]["iou"] == pytest.approx(rows[1]["iou"], abs=1e-4) and rows[1]["bytes"] == out.stat().st_size
    threshold = "0.4" if "-t" in flags else "0.5"
    sizes = ["--tile-size", "80", "--overlap", "20", "--halo", "5"] if "80" in flags else []
    masks = {}
    for name, model in (("torch", path), ("onnx", out)):
        common = ["-c", str(model), "--backend", "torch" if name == "torch" else "auto", "-t", threshold]
        common += sizes if name == "torch" else []
        predict.main([*common, "-i", str(split / "images"), "-o", str(tmp_path / name)])
        validate.main([*common, "-d", str(split), "-o", str(tmp_path / f"{name}_val"), "-log", str(tmp_path / "logs")])
        masks[name] = [read_mask(file) for file in sorted((tmp_path / name).glob("**/*.png"))]
        masks[name] += [read_mask(file) for file in sorted((tmp_path / f"{name}_val").glob("**/*.png"))]
    assert len(masks["onnx"]) == 4
    # Of overlapping tiles masks are averaged and not probabilities; square tiles are filled up to 80 x 100.
    limit = 0.98 if "mask" in flags or "80" in flags else 0.9999
    assert np.mean([(a == b).mean() for a, b in zip(masks["torch"], masks["onnx"], strict=True)]) >= limit
    assert all(0.02 < (mask > 0).mean() < 0.98 for mask in masks["onnx"])


def test_the_first_exporter_writes_what_the_checkpoint_gives(tmp_path, monkeypatch):
    """The command, the file and the commands that run it, with torch.export itself."""
    monkeypatch.undo()
    path, _, _ = network_of(tmp_path)
    split, out = write_split(tmp_path / "val"), tmp_path / "net.onnx"
    export_onnx.main(["-c", str(path), "-o", str(out)])
    assert onnx_export.read_description(out).metadata["exporter"] == "torch.export"
    counts, masks = [], []
    for name, model in (("torch", path), ("onnx", out)):
        common = ["-c", str(model), "--backend", "torch" if name == "torch" else "auto", "--cpu"]
        predict.main([*common, "-i", str(split / "images"), "-o", str(tmp_path / name)])
        folder = tmp_path / f"{name}_val"
        validate.main([*common, "-d", str(split), "-o", str(folder), "-log", str(tmp_path / "logs")])
        summary = json.loads(next(folder.glob("**/*.json")).read_text())
        counts.append({key: summary[key] for key in ("iou", "dice", "precision", "recall")})
        masks.append([read_mask(file) for file in sorted((tmp_path / name).glob("**/*.png"))])
    assert counts[0] == counts[1] and 0 < counts[0]["iou"] < 1
    for left, right in zip(*masks, strict=True):
        np.testing.assert_array_equal(left, right)


def test_the_report_holds_every_variant(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fewer_bits, "compare_speed", lambda *_, **__: (1.0, 0.5))
    path, _, _ = network_of(tmp_path, classes=4)
    split = write_split(tmp_path / "val")
    for file in (split / "gt").iterdir():
        cv2.imwrite(str(file), read_mask(file) * 20)
    words = ["-c", path, "-o", tmp_path / "net.onnx", "-ds", split, "--torchscript", "--quantize", "int8-dynamic"]
    export_onnx.main([str(word) for word in [*words, "--max-iou-drop", 1]])
    text = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    rows = report["exports"]
    assert report["environment"]["torch"] and [row["variant"] for row in rows] == [
        *("torch", "onnx", "torchscript", "int8-dynamic"),
    ]
    for row in rows:
        assert row["bytes"] == (tmp_path / row["file"]).stat().st_size > 1000
        assert row["calls"] == 20 and row["seconds"] > 0 and row["threads"] >= 1 and row["input"] == [1, 3, 64, 64]
        assert 0 <= row["iou"] <= 1 and row["tiles"] == 2 and row["metadata"]["opset"] == "18"
        assert (row["proof"] is None) == (row["variant"] in ("torch", "int8-dynamic"))
        line = next(line for line in text.splitlines() if f" {row['variant']} " in line and f"{row['iou']:.4f}" in line)
        assert f"{row['bytes'] / 1e6:.2f}" in line and f"{1000 * row['seconds']:.1f}" in line
    assert rows[0]["iou"] == pytest.approx(rows[1]["iou"], abs=1e-4) == pytest.approx(rows[2]["iou"], abs=1e-4)
    assert rows[1]["proof"]["agreement"] >= 0.9999 and rows[3]["proof"] is None


def test_metadata_say_what_the_file_holds(tmp_path):
    path, config, _ = network_of(tmp_path)
    out = tmp_path / "net.onnx"
    export_onnx.main(["-c", str(path), "-o", str(out), "--with-preprocessing", "--with-postprocessing", "mask"])
    found = onnx_export.read_description(out)
    assert found.config == config
    assert {key: found.metadata[key] for key in ("layout", "pixels", "output", "threshold", "opset", "origin")} == {
        **{"layout": "NHWC", "pixels": "uint8", "output": "mask"},
        **{"threshold": "0.5", "opset": "18", "origin": "export_onnx.py"},
    }
    assert found.metadata["exporter"] and found.metadata["commit"] and found.metadata["tile"] == "64"
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    image, mask = session.get_inputs()[0], session.get_outputs()[0]
    assert (image.name, image.type, image.shape) == ("image", "tensor(uint8)", ["batch", "height", "width", 3])
    assert (mask.name, mask.type, mask.shape) == ("mask", "tensor(uint8)", ["batch", "height", "width"])


def test_every_checkpoint_of_a_folder(tmp_path, capsys):
    for name in ("a", "b"):
        write_checkpoint(tmp_path / f"{name}.pth", seed=ord(name))
    (tmp_path / "c.pth").write_bytes(b"no")
    with pytest.raises(SystemExit) as exit_:
        export_onnx.main(["-d", str(tmp_path), "-o", str(tmp_path / "out")])
    assert exit_.value.code == 1 and "c.pth is " in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.onnx", "b.onnx", "report.json"]
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["exports"]
    assert {row["variant"] for row in rows} == {"torch", "onnx"} and len(rows) == 4


def test_torchscript_gives_the_same(tmp_path):
    path, config, network = network_of(tmp_path, classes=4)
    out = tmp_path / "net.onnx"
    export_onnx.main(
        ["-c", str(path), "-o", str(out), "--torchscript", "--with-preprocessing", "--with-postprocessing"]
    )
    script = torch.jit.load(out.with_suffix(".pt"))
    for size in ((1, 1), (33, 50)):
        image = blobs(*size)[None]
        found = script(torch.from_numpy(image)).detach().numpy()
        np.testing.assert_allclose(found, model_runner(out.read_bytes())(image), atol=1e-5)


def test_what_cannot_have_free_sides_gets_a_fixed_size(tmp_path, monkeypatch, capsys):
    path, config, _ = network_of(tmp_path)
    genuine = onnx_export._export_script

    def fixed_alone(network, config, form):
        if not form.size:
            raise RuntimeError("sizes are constants here")
        return genuine(network, config, form)

    for name in ("_export_program", "_export_script"):
        monkeypatch.setattr(onnx_export, name, fixed_alone)
    export_onnx.main(["-c", str(path)])
    text = capsys.readouterr().out
    assert "warning: free sides do not work" in text and "sizes are constants here" in text and "64x64 alone" in text
    found = onnx_export.read_description(path.with_suffix(".onnx"))
    assert found.metadata["size"] == "64x64" and "constants" in found.metadata["fixed_because"]
    assert found.config.min_side == found.config.geometry.tile == 64
    assert backends.find_export(path, backends.file_digest(path), "cpu") is None, "auto makes no use of it"


@pytest.mark.parametrize("version", [13, 17, 20])
def test_other_opsets(tmp_path, version):
    path, _, _ = network_of(tmp_path)
    export_onnx.main(["-c", str(path), "--opset", str(version), "--with-postprocessing", "mask"])
    proto = onnx.load(path.with_suffix(".onnx"))
    assert [each.version for each in proto.opset_import if each.domain == ""] == [version]


def test_two_exports_to_one_file_at_once(tmp_path):
    path, config, _ = network_of(tmp_path)
    code = (
        "import sys, onnx_export, export_onnx; onnx_export._export_program = onnx_export._export_script; "
        "export_onnx.main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "-c", str(path), "-o", str(tmp_path / "out" / "net.onnx")]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    ends = [(process.communicate(), process.returncode) for process in started]
    assert [code for _, code in ends] == [0, 0], ends
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["net.onnx", "report.json"]
    assert onnx_export.read_description(tmp_path / "out" / "net.onnx").config == config


def test_fewer_bits_are_kept_beside_the_file_or_refused_with_figures(tmp_path, capsys, monkeypatch):
    path, _, _ = network_of(tmp_path)
    split, out = write_split(tmp_path / "val"), tmp_path / "net.onnx"
    words = ["-c", path, "-o", out, "-ds", split, "--quantize", "int8-dynamic", "--with-preprocessing"]
    words = [*map(str, words), "--max-iou-drop", "0.2"]
    for factor, kept in ((0.5, True), (2.0, False)):
        monkeypatch.setattr(fewer_bits, "compare_speed", lambda *_, factor=factor, **__: (1.0, factor))
        export_onnx.main(words)
        text = capsys.readouterr().out
        place = tmp_path / "net.int8-dynamic.onnx"
        assert f"int8-dynamic is {'kept' if kept else 'refused'}: " in text and "VNNI: " in text
        if kept:
            metadata = onnx_export.read_description(place).metadata
            assert metadata["quantised"] == "int8-dynamic" and "1.0000 to 0.5000 s on cpu" in metadata["measured"]
            predict.main(["-c", str(place), "-i", str(split / "images"), "-o", str(tmp_path / "small")])
            rows = json.loads((tmp_path / "report.json").read_text())["exports"]
            assert [row["variant"] for row in rows] == ["torch", "onnx", "int8-dynamic"]
            assert all(row["iou"] is not None for row in rows)
            place.unlink()
            place.write_bytes((tmp_path / "net.onnx").read_bytes())
        else:
            assert f"{place} is of an earlier export and stays as it is, perhaps of another network" in text


def test_half_precision_for_a_gpu_that_is_not_here_is_marked(tmp_path, capsys, monkeypatch):
    path, _, _ = network_of(tmp_path)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    export_onnx.main(["-c", str(path), "--for", "cuda"])
    assert "unmeasured: fp16 for CUDA" in capsys.readouterr().out
    metadata = onnx_export.read_description(path.with_name("run.fp16.onnx")).metadata
    assert metadata["quantised"] == "fp16" and metadata["measured"].startswith("unmeasured")


# ---- bad input ----


def refusal(capsys, words):
    """Exit status and message of a call that must fail."""
    with pytest.raises(SystemExit) as exit_:
        export_onnx.main([str(word) for word in words])
    return exit_.value.code, " ".join(capsys.readouterr().err.split())


def test_flags_that_do_not_go_together(tmp_path, capsys):
    path, _, _ = network_of(tmp_path)
    cases = [
        (["-c", path, "--input-dtype", "uint8"], "--input-dtype is the type of raw pixels: give --with-preprocessing"),
        (["-c", path, "-t", "0.3"], "-t decides masks: give --with-postprocessing mask"),
        (["-c", path, "--opset", "9"], "opset 9 cannot be written; expected 13 to 23"),
        (["-c", path, "--opset", "99"], "opset 99 cannot be written; expected 13 to 23"),
        (["-c", path, "--fixed-size", "1", "2", "3"], "--fixed-size takes a side, or height and width; found 3"),
        (["-c", path, "--fixed-size", "0"], "expected a number of at least 1"),
        (["-d", path.parent, "-o", tmp_path / "one.onnx"], "is one file and -d exports all checkpoints"),
        (["-c", path, "-o", path], "is a file whose name does not end in .onnx"),
        (["-c", path, "--quantize", "fp16"], "--quantize needs -ds DIR: images with masks"),
        (["-c", path, "--quantize", "int8-static", "--for", "cuda"], "--for cuda writes fp16, found --quantize int8"),
        (["-c", path, "--calibration", path.parent], "--calibration is for --quantize"),
        (
            ["-c", path, "--calibration-method", "entropy"],
            "--calibration-method does nothing without --quantize int8-s",
        ),
        (["-c", path, "--max-iou-drop", "0.5"], "--max-iou-drop does nothing without --quantize KIND"),
        (["-c", path, "--tiles", "4"], "--tiles does nothing without -ds DIR"),
        ([], "one of the arguments -c/--check-path"),
    ]
    for words, message in cases:
        code, text = refusal(capsys, words)
        assert code == 2 and message in text, text


def test_files_that_cannot_be_exported(tmp_path, capsys):
    path, _, _ = network_of(tmp_path)
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pth")
    (tmp_path / "half.pth").write_bytes(path.read_bytes()[:5000])
    (tmp_path / "empty").mkdir()
    cases = [
        (["-c", tmp_path / "none.pth"], "no checkpoint"),
        (["-c", tmp_path / "other.pth"], "has no 'config' entry: it is not a checkpoint written by train.py"),
        (["-c", tmp_path / "half.pth"], "half.pth is truncated or not a checkpoint"),
        (["-cd", tmp_path / "empty"], "no *.pth in"),
        (["-d", tmp_path / "nowhere"], "no folder"),
        (["-c", path, "--fixed-size", "7"], "a fixed size of 7x7 is too small; expected sides of at least 16"),
        (["-c", path, "-ds", tmp_path / "empty"], "empty"),
    ]
    for words, message in cases:
        code, text = refusal(capsys, words)
        assert code == 1 and message in text, text
    assert not path.with_suffix(".onnx").exists()


def test_calibration_without_images_and_scores_without_masks(tmp_path, capsys):
    path, _, _ = network_of(tmp_path)
    split = write_split(tmp_path / "val")
    (tmp_path / "train" / "images").mkdir(parents=True)
    words = ["-c", path, "-o", tmp_path / "net.onnx", "-ds", split, "--quantize", "int8-static"]
    code, text = refusal(capsys, [*words, "--calibration", tmp_path / "train"])
    assert code == 1 and str(tmp_path / "train") in text and "image" in text
    (split / "gt").rename(tmp_path / "elsewhere")
    code, text = refusal(capsys, words)
    assert code == 1 and "-ds have no masks; expected some, to see what fewer bits cost" in text


@pytest.mark.parametrize(("device", "provider"), [("cuda", "CUDAExecution"), ("tensorrt", "TensorrtExecution")])
def test_a_provider_that_is_not_installed(plain, tmp_path, monkeypatch, device, provider):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    path = tmp_path / "net.onnx"
    path.write_bytes(onnx_export.describe(wrap_network(plain[2], plain[0], Shell()), plain[0]))
    with pytest.raises(ValueError, match=f"has CPUExecutionProvider, expected {provider}Provider. Install onnx"):
        backends.load_forward(path, device, backend="auto")


def test_tensorrt_is_for_files_of_onnx(tmp_path):
    path, _, _ = network_of(tmp_path)
    with pytest.raises(ValueError, match="--device tensorrt runs ONNX files: use --backend onnx, or --device cuda"):
        backends.load_forward(path, "tensorrt", backend="torch")


def test_steps_that_no_operator_computes(tmp_path, capsys):
    path, _, _ = network_of(tmp_path, preprocess=("clahe",))
    code, text = refusal(capsys, ["-c", path, "--with-preprocessing"])
    assert code == 2 and "--preprocess clahe, which cannot be put into the file" in text


def test_what_the_user_put_there_stays(tmp_path, capsys):
    path, _, _ = network_of(tmp_path)
    place = path.with_suffix(".onnx")
    place.write_text("mine")
    code, text = refusal(capsys, ["-c", path])
    assert code == 1 and "is there and is no export of Tessera" in text and "--replace" in text
    assert place.read_text() == "mine"
    (path.parent / "report.json").write_text('{"mine": 1}')
    export_onnx.main(["-c", str(path), "--replace"])
    assert "report.json is there and is no report of exports; it stays" in capsys.readouterr().out
    assert (path.parent / "report.json").read_text() == '{"mine": 1}'
    export_onnx.main(["-c", str(path)])


def test_images_of_another_depth_or_number_of_channels(tmp_path, capsys):
    path, _, _ = network_of(tmp_path)
    for kind, message in (
        (np.uint16, "uint16 pixels and the file is to take uint8"),
        (None, "has 1 channels, expected 3"),
    ):
        folder = tmp_path / str(kind)
        (folder / "images").mkdir(parents=True)
        image = blobs(70, 70, channels=1)[..., 0] if kind is None else blobs(70, 70, dtype=np.uint16)
        cv2.imwrite(str(folder / "images" / "a.png"), image)
        code, text = refusal(capsys, ["-c", path, "-ds", folder, "--with-preprocessing"])
        assert code == 1 and message in text, text


def test_pixels_that_a_file_does_not_take(tmp_path, plain):
    config, network, bare = plain
    shell = Shell("uint8", size=(64, 64))
    model = onnx_export.describe(
        wrap_network(bare, config, shell), fit_config(config, (64, 64)), **shell.metadata(), exporter="x"
    )
    forward = backends.onnx_forward(model, "cpu")[1]
    for values, message in ((300.0, "found values from 300"), (0.25, "expected whole numbers of 0 to 255")):
        batch = normalise(np.full((64, 64, 3), values, np.float32), config.mean, config.std)[None]
        with pytest.raises(ValueError, match=f"the file takes uint8 pixels, .*{message}"):
            forward(batch)
    with pytest.raises(ValueError, match="the file takes 64x64 alone, found tiles of 80x64: leave out --tile-size"):
        forward(np.zeros((1, 3, 80, 64), np.float32))
    assert forward(np.zeros((3, 3, 1, 33), np.float32)).shape == (3, config.num_logits, 1, 33)
