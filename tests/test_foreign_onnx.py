"""ONNX files of other projects: adopted with any outside, run by validate and predict, or refused with reasons."""

import json

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny_runs import blobs, random_network, write_checkpoint, write_split
from torch import nn

import backends
import export_onnx
import onnx_export
import predict
import validate
from checkpoint import Geometry, ModelConfig
from image_io import normalise, read_mask

MEAN, STD = (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)
STATISTICS = ["--mean", *map(str, MEAN), "--std", *map(str, STD)]


class Theirs(nn.Module):
    """A network with another outside: channels last, probabilities, a smaller answer, other outputs before it."""

    def __init__(self, network, *, last=False, act=None, low=1, more=False, strict=1):
        super().__init__()
        self.network, self.last, self.act, self.low, self.more, self.strict = network, last, act, low, more, strict

    def forward(self, image):
        if self.last:
            image = image.permute(0, 3, 1, 2)
        if self.strict > 1:  # sides that are no multiple fail, as in networks that halve and join
            half = nn.functional.max_pool2d(image, self.strict)
            image = image + 0 * nn.functional.interpolate(half, scale_factor=self.strict)
        values = self.network(image)
        if self.act:
            values = values.sigmoid() if self.act == "sigmoid" else values.softmax(1)
        if self.low > 1:
            values = nn.functional.avg_pool2d(values, self.low)
        values = values.permute(0, 2, 3, 1) if self.last else values
        return (image.mean((2, 3)), nn.functional.avg_pool2d(image, 16), values) if self.more else values


def write_theirs(path, *, classes=1, channels=3, size=None, batch="n", opset=17, **outside):
    """Write a file as other projects do; fixed sides where `size` is given."""
    config = ModelConfig(
        "plain-unet",
        "plain-8",
        (1,) if classes == 1 else tuple(range(1, classes)),
        tuple(map(str, range(max(classes, 2)))),
        tuple(map(str, range(channels))),
        (0.0,) * channels,
        (1.0,) * channels,
        Geometry("crops", (64, 64), 64),
    )
    network = Theirs(random_network(config, 0).eval(), **outside).eval()
    last = outside.get("last", False)
    strict = outside.get("strict", 16)
    shape = [1 if batch == 1 else 2, *(size or (3 * strict, 5 * strict))]
    shape.insert(3 if last else 1, channels)
    free = {} if size else {axis: f"side{axis}" for axis in ((1, 2) if last else (2, 3))}
    free |= {} if batch == 1 else {0: "n"}
    names = ["pooled", "coarse", "mask:0"] if outside.get("more") else ["mask:0"]
    torch.onnx.export(
        network,
        (torch.zeros(shape),),
        str(path),
        dynamo=False,
        opset_version=opset,
        input_names=["serving.1"],
        output_names=names,
        dynamic_axes={"serving.1": free, names[-1]: free},
    )
    return path


def theirs_says(path, image, mean=MEAN, std=STD, *, last=False, bgr=False, output="mask:0"):
    """Values (K, H, W) that the file gives for raw pixels (H, W, C) R G B, by hand."""
    pixels = image[..., [2, 1, 0]] if bgr else image
    values = ((pixels.astype(np.float64) - mean) / std).astype(np.float32)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    batch = values[None] if last else values.transpose(2, 0, 1)[None]
    found = session.run([output], {"serving.1": np.ascontiguousarray(batch)})[0][0]
    return found.transpose(2, 0, 1) if last else found


def adopt(path, *words):
    """Run the command; the file that it wrote."""
    out = path.with_name("ours") / path.name
    export_onnx.main(["-c", str(path), "-o", str(out), *map(str, words)])
    return out


OUTSIDES = {
    "plain": ({}, {}, []),
    "sigmoid": ({"act": "sigmoid"}, {}, ["--gives", "probabilities"]),
    "several classes": ({"classes": 4}, {}, ["--class-list", "0 1 2 3"]),
    "softmax last": ({"classes": 4, "act": "softmax", "last": True}, {"last": True}, ["--class-list", "1 2 3"]),
    "blue first": ({}, {"bgr": True}, ["--bgr"]),
    "one at a time": ({"batch": 1}, {}, []),
    "other outputs": ({"more": True, "classes": 4}, {}, ["--class-list", "1 2 3", "--output-name", "mask:0"]),
    "old opset": ({"opset": 11}, {}, []),
}


@pytest.mark.parametrize("name", OUTSIDES)
def test_every_size_gives_what_their_file_gives(tmp_path, capsys, name):
    made, read, words = OUTSIDES[name]
    path = write_theirs(tmp_path / "theirs.onnx", **made)
    ours = adopt(path, *STATISTICS, *words, "--tile-size", 64)
    assert "differs by at most 0.0e+00" in capsys.readouterr().out or name == "old opset"
    config, forward = backends.onnx_forward(ours, "cpu")
    for size in ((1, 1), (33, 50), (64, 96)):
        for count in (1, 3):
            images = [blobs(*size, seed=seed) for seed in range(count)]
            expected = np.stack([theirs_says(path, image, **read) for image in images])
            if "act" not in made:
                values = torch.from_numpy(expected)
                expected = (values.sigmoid() if values.shape[1] == 1 else values.softmax(1)).numpy()
            found = forward(np.stack([normalise(image, config.mean, config.std) for image in images]))
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert path.exists() and onnx_export.read_description(ours).metadata["exporter"] == "another project"


def test_only_their_size(tmp_path):
    path = write_theirs(tmp_path / "theirs.onnx", size=(64, 96), batch=1, classes=4)
    ours = adopt(path, *STATISTICS, "--class-list", "1 2 3", "--with-preprocessing", "--with-postprocessing", "mask")
    description = onnx_export.read_description(ours)
    assert description.metadata["size"] == "64x96" and description.config.geometry.tile == 64
    image = blobs(64, 96)
    session = onnxruntime.InferenceSession(str(ours), providers=["CPUExecutionProvider"])
    found = session.run(["mask"], {"image": image[None]})[0][0]
    np.testing.assert_array_equal(found, theirs_says(path, image).argmax(0))


def test_an_answer_that_is_smaller_is_enlarged(tmp_path, capsys):
    path = write_theirs(tmp_path / "theirs.onnx", low=4)
    ours = adopt(path, *STATISTICS, "--tile-size", 64)
    assert "its output is 4 times smaller: enlarged bilinearly" in capsys.readouterr().out
    config, forward = backends.onnx_forward(ours, "cpu")
    image = blobs(48, 80)
    low = theirs_says(path, image)[0]
    expected = 1 / (1 + np.exp(-cv2.resize(low, (80, 48), interpolation=cv2.INTER_LINEAR)))
    found = forward(normalise(image, config.mean, config.std)[None])[0, 0]
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("stride", [4, 32])
def test_the_stride_is_tried(tmp_path, stride):
    path = write_theirs(tmp_path / "theirs.onnx", strict=stride)
    config = onnx_export.read_description(adopt(path, *STATISTICS, "--tile-size", 70)).config
    assert (config.stride, config.min_side, config.geometry.tile) == (stride, stride, -(-70 // stride) * stride)


def test_validate_and_predict_run_it_as_a_plain_computation_does(tmp_path, capsys):
    path = write_theirs(tmp_path / "theirs.onnx")
    split = write_split(tmp_path / "val", size=(61, 90))
    ours = adopt(path, *STATISTICS, "--class-list", "1", "--tile-size", 128, "-ds", split, "--with-preprocessing")
    rows = json.loads((ours.parent / "report.json").read_text())["exports"]
    assert [row["variant"] for row in rows] == ["original", "onnx"] and rows[0]["iou"] == rows[1]["iou"]
    predict.main(["-c", str(ours), "-i", str(split / "images"), "-o", str(tmp_path / "masks")])
    validate.main(["-c", str(ours), "-d", str(split), "-o", str(tmp_path / "val_out"), "-log", str(tmp_path / "logs")])
    hits = either = 0
    for place in range(2):
        image = cv2.imread(str(split / "images" / f"{place}.png"))[..., ::-1]
        truth = cv2.imread(str(split / "gt" / f"{place}.png"), cv2.IMREAD_UNCHANGED) == 1
        sure = np.abs(values := theirs_says(path, image)[0]) > 1e-4
        mask = values >= 0
        found = [read_mask(file) > 0 for file in sorted((tmp_path / "masks").glob(f"**/{place}.png"))]
        assert len(found) == 1 and sure.mean() > 0.99
        np.testing.assert_array_equal(found[0][sure], mask[sure])
        hits, either = hits + (mask & truth).sum(), either + (mask | truth).sum()
    written = json.loads(next((tmp_path / "val_out").glob("**/*.json")).read_text())
    assert written["iou"] == pytest.approx(hits / either, abs=1e-3)
    assert rows[0]["iou"] == pytest.approx(hits / either, abs=1e-3)


def test_like_a_checkpoint_and_resized(tmp_path):
    like = write_checkpoint(tmp_path / "like.pth", classes=4)
    path = write_theirs(tmp_path / "theirs.onnx", classes=4)
    config = onnx_export.read_description(adopt(path, "--like", tmp_path / "like.pth")).config
    for name in ("labels", "class_names", "channels", "mean", "std", "geometry", "thresholds"):
        assert getattr(config, name) == getattr(like, name)
    words = ["--replace", "--like", tmp_path / "like.pth", "--image-size", 48, 80]
    geometry = onnx_export.read_description(adopt(path, *words)).config.geometry
    assert (geometry.kind, geometry.size) == ("resize", (48, 80))


# ---- bad input ----


def refusal(capsys, words):
    """Exit status and message of a call that must fail."""
    with pytest.raises(SystemExit) as exit_:
        export_onnx.main([str(word) for word in words])
    return exit_.value.code, " ".join(capsys.readouterr().err.split())


def graph_file(path, inputs, outputs, nodes, opset=17):
    """A file of one's own making."""
    make = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(nodes, "g", [make(*each) for each in inputs], [make(*each) for each in outputs])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def test_flags_that_are_missing_or_too_many(tmp_path, capsys):
    path, out = write_theirs(tmp_path / "theirs.onnx"), tmp_path / "ours.onnx"
    write_checkpoint(tmp_path / "run.pth")
    cases = [
        (["-c", path], "serving.1 float32 (n, 3, side2, side3) to mask:0 float32"),
        (["-c", path], "give --mean and --std, a number for each channel in units of the pixels"),
        (
            ["-c", path],
            "divided by 255 they are 255 times its own; where it knows none, --mean 0 0 0 --std 255 255 255",
        ),
        (["-c", path, "--mean", 1, 2, 3], "give --mean and --std"),
        (["-c", path, *STATISTICS[:4], "--std", 1], "--mean and --std have 3 and 1 numbers"),
        (["-c", path, "--mean", "nan", 1, 1, "--std", 1, 1, 1], "expected finite numbers"),
        (["-c", path, "--mean", 1, 1, 1, "--std", 1, 1, 0], "expected a number above 0"),
        (["-c", path, *STATISTICS], "-o FILE.onnx is needed"),
        (["-c", path, "-o", path, *STATISTICS], "would replace"),
        (["-c", path, "-o", out, *STATISTICS, "--torchscript"], "--torchscript needs a checkpoint"),
        (["-c", path, "-o", out, *STATISTICS, "--image-size", 1, 2, 3], "--image-size takes a side, or height and"),
        (["-c", path, "-o", out, *STATISTICS, "--image-size", 64, "--tile-size", 64], "no --tile-size or --overlap"),
        (
            ["-c", path, "-o", out, *STATISTICS, "--overlap", 600],
            "--tile-size, --overlap and --halo do not go together",
        ),
        (["-c", tmp_path / "run.pth", *STATISTICS, "--bgr"], "--mean --std --bgr describe an ONNX file of another"),
    ]
    for words, message in cases:
        code, text = refusal(capsys, words)
        assert code == 2 and message in text, text
    assert not out.exists()


def test_flags_of_a_settings_file_are_named_with_a_checkpoint(tmp_path, capsys):
    path = tmp_path / "run.pth"
    write_checkpoint(path)
    args = argparse_of(["-c", str(path), "--class-list", "1", "--tile-size", "64"])
    assert export_onnx.find_paths(args) == [path]
    assert "says itself what --class-list --tile-size would say; not looked at" in capsys.readouterr().out


def argparse_of(words):
    return export_onnx.build_parser().parse_args(words)


def test_what_is_in_the_file_does_not_fit(tmp_path, capsys):
    out = tmp_path / "ours.onnx"
    one = write_theirs(tmp_path / "one.onnx")
    four = write_theirs(tmp_path / "four.onnx", classes=4)
    fixed = write_theirs(tmp_path / "fixed.onnx", size=(64, 96))
    strict = write_theirs(tmp_path / "strict.onnx", strict=48)
    cases = [
        (
            [one, "--mean", 1, 2, "--std", 1, 2],
            "takes serving.1 float32 (n, 3, side2, side3), and --mean and --std name 2",
        ),
        (
            [one, *STATISTICS, "--class-list", "1 2"],
            "has 1 channel, and the classes ask for 3 channels (background, 1, 2)",
        ),
        ([four, *STATISTICS], "nothing says which mask label each of them stands for: give --class-list, such as"),
        (
            [four, *STATISTICS, "--class-list", "255"],
            "has 4 channels, and the classes ask for 1 channel, for the object",
        ),
        ([four, *STATISTICS, "--gives", "probabilities", "--class-list", "1 2 3"], "expected 0 to 1 of --gives prob"),
        ([one, *STATISTICS, "--output-name", "x"], "has no output 'x', found mask:0: give one to --output-name"),
        ([fixed, *STATISTICS, "--fixed-size", 32], "takes 64x96 alone"),
        ([strict, *STATISTICS], "any of the sizes that were tried; give --fixed-size: found an error with"),
        ([one, *STATISTICS, "--add-dirs", "a", "b", "c"], "--add-dirs names 3 channels and"),
    ]
    for (path, *words), message in cases:
        code, text = refusal(capsys, ["-c", path, "-o", out, *words])
        assert code == 1 and message in text, text
    assert not out.exists()


def test_files_that_are_nothing_of_the_kind(tmp_path, capsys):
    float_, int_ = onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8
    image, mask = ("i", float_, ("n", 3, "h", "w")), ("o", float_, ("n", 1, "h", "w"))
    node = onnx.helper.make_node
    pooled = [node("GlobalAveragePool", ["i"], ["o"])]
    add = [node("Add", ["i", "j"], ["o"])]
    raw = ("i", int_, ("n", 3, "h", "w"))
    cases = {
        "two inputs": ([image, ("j", *image[1:])], [mask], add, "has 2 inputs (i float32 (n, 3, h, w); j float32"),
        "bytes": ([raw], [("o", float_, None)], [node("Cast", ["i"], ["o"], to=1)], "takes i uint8 (n, 3, h, w), exp"),
        "a vector": ([image], [("o", float_, ("n", 3, 1, 1))], pooled, "gives no segmentation of an image of any"),
        "classes": ([image], [("o", 7, None)], [node("ArgMax", ["i"], ["o"], axis=1)], "found o int64 (1, 1, 65, 67)"),
        "four at once": (
            [("i", float_, (4, 3, 8, 8))],
            [mask],
            [node("Relu", ["i"], ["o"])],
            "takes 4 images at a time",
        ),
        "unknown operator": ([image], [mask], [node("Magic", ["i"], ["o"], domain="x")], "cannot load the network"),
    }
    for name, (inputs, outputs, nodes, message) in cases.items():
        path = graph_file(tmp_path / f"{name}.onnx", inputs, outputs, nodes)
        code, text = refusal(capsys, ["-c", path, "-o", tmp_path / "ours.onnx", *STATISTICS])
        assert code == 1 and message in text, text
    late = graph_file(tmp_path / "late.onnx", [image], [mask], [node("Relu", ["i"], ["o"])], opset=99)
    code, text = refusal(capsys, ["-c", late, "-o", tmp_path / "ours.onnx", *STATISTICS])
    assert code == 1 and "Expected operators and an opset that it knows" in text
    (tmp_path / "cut.onnx").write_bytes(write_theirs(tmp_path / "whole.onnx").read_bytes()[:5000])
    for name, message in (("cut.onnx", "is truncated or not an ONNX file"), ("none.onnx", "no ONNX file")):
        code, text = refusal(capsys, ["-c", tmp_path / name, "-o", tmp_path / "ours.onnx", *STATISTICS])
        assert code == 1 and message in text, text


def test_an_export_is_not_exported_again(tmp_path, capsys):
    path = write_theirs(tmp_path / "theirs.onnx")
    ours = adopt(path, *STATISTICS, "--tile-size", 64)
    code, text = refusal(capsys, ["-c", ours, "-o", tmp_path / "x.onnx"])
    assert code == 2 and "is an export already; expected the checkpoint" in text


@pytest.mark.parametrize("command", [predict, validate])
def test_other_commands_name_the_one_that_takes_it(tmp_path, capsys, command):
    path = write_theirs(tmp_path / "theirs.onnx")
    split = write_split(tmp_path / "val", count=1)
    images = ["-d", str(split)] if command is validate else ["-i", str(split / "images")]
    with pytest.raises(SystemExit) as exit_:
        command.main(["-c", str(path), *images, "-o", str(tmp_path / "out"), "--cpu"])
    text = " ".join(capsys.readouterr().err.split())
    assert exit_.value.code == 1
    assert f"python export_onnx.py -c {path} -o OURS.onnx --mean R G B --std R G B --class-list" in text
