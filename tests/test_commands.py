"""The chain train -> validate, through main([...]), on files."""

import csv
import json
import re
import shutil

import cv2
import numpy as np
import pytest
import torch
from discs import write_dataset, write_split
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
import validate
from checkpoint import load_checkpoint
from image_io import read_image, read_mask, write_mask
from pairing import Pair
from postprocess import Filters, filter_mask

SMALL = ["-m", "plain-unet", "--encoder", "plain-8", "--image-size", "32", "-b", "3", "-a", "safe", "-w", "0", "--cpu"]


def run_train(data, logs, *more, epochs=2, name="run"):
    train.main(["-d", str(data), "-log", str(logs), "--exp-name", name, "-e", str(epochs), *SMALL, *map(str, more)])
    return logs / name


def run_validate(*words):
    validate.main([*map(str, words), "--cpu", "-w", "0"])


def read_events(folder):
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
    events.Reload()
    return events


def read_csv(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter=";"))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Commands write to ./logs by default: keep that out of the repository."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def discs(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "discs")


@pytest.fixture(scope="module")
def trained(discs, tmp_path_factory):
    """A run of two epochs on binary discs."""
    return run_train(discs, tmp_path_factory.mktemp("logs"), "--seed", 1)


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Three classes, labels 10 20 30, images of three sizes that are no multiples of anything."""
    root = tmp_path_factory.mktemp("data") / "colours"
    return write_dataset(root, labels=(0, 10, 20, 30), sizes=((33, 47), (40, 32), (64, 51)))


@pytest.fixture(scope="module")
def crops_run(colours, tmp_path_factory):
    """A crops network on three classes; images are larger than a tile."""
    logs = tmp_path_factory.mktemp("logs")
    return run_train(colours, logs, "--class-list", "10 20 30", "--crops", 2, "--image-size", 16, "--loss", "ce")


# ---- what training leaves behind ----


def test_run_folder_has_the_files_of_the_predecessor(trained):
    names = {path.name for path in trained.iterdir()}
    assert {"run.pth", "last_checkpoint", "args.json", "metrics.jsonl", "_iou_per_epoch_val.csv"} <= names
    assert {"loss.png", "iou.png", "learning_rate.png"} <= names
    assert [path.name for path in trained.glob("*.pth")] == ["run.pth"]
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    lines = (trained / "_iou_per_epoch_val.csv").read_text().splitlines()
    assert lines[0] == "epoch; iou" and re.fullmatch(r"1; 0,\d{4}", lines[1]) and len(lines) == 3
    assert lines[2] == f"2; {rows[1]['val']['discs']['iou']:.4f}".replace(".", ",")
    record = json.loads((trained / "args.json").read_text())
    assert record["flags"]["batch"] == 3 and "--image-size 32" in record["command"]
    assert {"commit", "torch", "python"} <= record["environment"].keys()


def test_checkpoints_are_plain_and_describe_the_network(trained, discs):
    config, saved = load_checkpoint(trained / "last_checkpoint")
    assert (config.architecture, config.encoder, config.labels) == ("plain-unet", "plain-8", (255,))
    assert config.class_names == ("background", "object") and config.channels == ("red", "green", "blue")
    assert config.geometry.kind == "resize" and config.geometry.size == (32, 32)
    assert saved["epoch"] == 2 and saved["optimizer_name"] == "AdamW"
    assert {"optimizer_state_dict", "scheduler_state_dict", "scaler_state_dict", "rng"} <= saved.keys()
    best = load_checkpoint(trained / "run.pth")[1]
    assert "optimizer_state_dict" not in best and 1 <= best["epoch"] <= 2
    assert set(torch.load(trained / "run.pth", weights_only=True)["config"]["thresholds"]) == {"default", "best"}


def test_tensorboard_has_the_tags_of_the_predecessor(trained):
    events = read_events(trained)
    scalars = set(events.Tags()["scalars"])
    assert {"Accuracy/train", "Loss/train", "Learning rate", "discs iou", "discs loss"} <= scalars
    assert {"discs class iou/background", "discs class iou/object"} <= scalars
    # The layout's tags are searched for in all tags: only the set's own curve may answer.
    assert [tag for tag in scalars if "discs iou" in tag] == ["discs iou"]
    assert [event.step for event in events.Scalars("discs iou")] == [1, 2]
    layout = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    for word in (b"Validation", b"Loss", b"IOU", b"discs iou", b"discs loss"):
        assert word in layout
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= set(events.summary_metadata)
    assert "flags/text_summary" in events.Tags()["tensors"]
    assert {"worst discs/1", "worst discs/3"} <= set(events.Tags()["images"])
    assert [event.step for event in events.Images("worst discs/1")] == [1, 2]


def test_worst_images_stay_narrow_in_event_files(tmp_path):
    from run_folder import EVENT_WIDTH, RunFolder

    run = RunFolder(tmp_path / "run", epoch=0, val_names=["x"])
    run.log_images("worst x", [np.zeros((500, 3000, 3), np.uint8), np.zeros((50, 300, 3), np.uint8)], 1)
    run.close()
    events = read_events(tmp_path / "run")
    assert (events.Images("worst x/1")[0].width, events.Images("worst x/1")[0].height) == (EVENT_WIDTH, 200)
    assert (events.Images("worst x/2")[0].width, events.Images("worst x/2")[0].height) == (300, 50)


def test_training_prints_the_score_and_where_the_log_is(discs, tmp_path, capsys):
    run_train(discs, tmp_path / "my logs", "--baselines", epochs=1)
    out = capsys.readouterr().out
    assert "device: cpu" in out and "6 training and 3 validation images" in out
    assert "no --class-list: the masks hold 0 and 255, so 255 is the object" in out
    assert re.search(r"epoch 1/1 .* discs iou improved, saved run\.pth", out)
    assert "for comparison: all foreground IoU 0." in out and "for comparison: Otsu IoU 0." in out
    assert f"tensorboard --logdir '{tmp_path / 'my logs'}'" in out


# ---- validate.py ----


def test_training_and_validation_count_the_same_pixels(trained, discs, tmp_path, capsys):
    """The row of the best epoch, the table printed by train.py and validate.py agree to the last pixel."""
    best = load_checkpoint(trained / "run.pth")[1]["epoch"]
    row = json.loads((trained / "metrics.jsonl").read_text().splitlines()[best - 1])
    run_validate("-d", discs / "val", "-cd", trained, "-o", tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "_metrics.json").read_text())
    assert summary["iou"] == row["val"]["discs"]["iou"] and summary["dice"] == row["val"]["discs"]["dice"]
    assert summary["pixels"] == 3 * 32 * 32


@pytest.mark.parametrize("more", [("-b", 1), ("-b", 2), ("--worst", 0)])
def test_batch_size_does_not_change_the_counts(trained, discs, tmp_path, more):
    for name, flags in (("a", ()), ("b", more)):
        run_validate("-d", discs / "val", "-cd", trained, "-o", tmp_path / name, "--com", *flags)
    tables = [json.loads((tmp_path / name / "_metrics.json").read_text())["confusion"] for name in "ab"]
    assert tables[0] == tables[1]


def test_crops_network_counts_the_same_pixels(crops_run, colours, tmp_path):
    """Several classes, odd sizes, images larger than a tile."""
    best = load_checkpoint(crops_run / "run.pth")[1]["epoch"]
    row = json.loads((crops_run / "metrics.jsonl").read_text().splitlines()[best - 1])["val"]["colours"]
    tables = []
    for batch in (3, 1, 5):
        run_validate("-d", colours, "--split", "val", "-cd", crops_run, "-o", tmp_path / "out", "-b", batch)
        summary = json.loads((tmp_path / "out" / "_metrics.json").read_text())
        tables.append(summary["confusion"])
        assert {item["name"]: item["iou"] for item in summary["per_class"]} == row["classes"]
    assert tables[0] == tables[1] == tables[2]
    for path in (colours / "val" / "gt").iterdir():
        written = read_mask(tmp_path / "out" / "masks" / path.name)
        assert written.shape == read_mask(path).shape and set(np.unique(written)) <= {0, 10, 20, 30}


def test_resized_odd_images_count_the_same_pixels(colours, tmp_path):
    """Probabilities are resized back: counts are those of the original sizes, whatever the layout in training."""
    more = ("--class-list", "10 20 30", "--loss", "0.5*ce+0.5*dice", "--no-channels-last")
    run = run_train(colours, tmp_path / "logs", *more, epochs=1)
    row = json.loads((run / "metrics.jsonl").read_text())["val"]["colours"]
    run_validate("-d", colours / "val", "-cd", run, "-o", tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "_metrics.json").read_text())
    assert {item["name"]: item["iou"] for item in summary["per_class"]} == row["classes"]
    assert summary["pixels"] == 33 * 47 + 40 * 32 + 64 * 51


def test_dataset_and_checkpoint_as_the_predecessor_wrote_them(trained, discs, capsys, monkeypatch):
    """`-d val -cd ckpt` from inside the data set; outputs go beside the checkpoint."""
    monkeypatch.chdir(discs)
    run_validate("-d", "val", "-cd", trained)
    folder = trained / "discs_val_thres_0.5"
    assert {path.name for path in folder.iterdir()} == {"_metrics.csv", "_metrics.json", "_thresholds.csv", "masks"}
    out = capsys.readouterr().out
    assert str(trained / "run.pth") in out and "threshold 0.5" in out
    shutil.rmtree(folder)
    shutil.rmtree(discs / "logs")


def test_csv_and_json_agree(trained, discs, tmp_path):
    run_validate("-d", discs / "val", "-cd", trained, "-o", tmp_path, "--metrics-json", tmp_path / "all.json", "--com")
    rows = read_csv(tmp_path / "_metrics.csv")
    summary = json.loads((tmp_path / "all.json").read_text())
    assert list(rows[0]) == ["file", "iou", "dice", "precision", "recall", "accuracy"]
    assert [row["file"] for row in rows] == ["b0", "b1", "b2", "mean_vals", "pooled"]
    number = {row["file"]: float(row["iou"].replace(",", ".")) for row in rows}
    assert number["mean_vals"] == pytest.approx(np.mean([number[f"b{i}"] for i in range(3)]), abs=1e-4)
    assert number["pooled"] == pytest.approx(summary["iou"], abs=1e-4)
    assert summary["images"] == 3 and summary["checkpoint"].endswith("run.pth") and summary["empty"] == "skip"
    sweep = read_csv(tmp_path / "_thresholds.csv")
    assert len(sweep) == len(summary["sweep"]) and sweep[0]["threshold"].startswith("0,0")
    assert not (tmp_path / "_metrics.json").exists()


def test_decimal_dot(trained, discs, tmp_path):
    run_validate("-d", discs / "val", "-cd", trained, "-o", tmp_path, "--com", "--decimal", "dot")
    assert re.fullmatch(r"\d\.\d{4}", read_csv(tmp_path / "_metrics.csv")[0]["iou"])


def test_raw_holds_probabilities_and_is_never_stretched(trained, discs, tmp_path):
    run_validate("-d", discs / "val", "-cd", trained, "-o", tmp_path, "--raw", "--binary")
    from backends import load_forward
    from classes import ClassMap
    from dataset import EvaluationSet
    from evaluation import predict_samples
    from pairing import FileOptions, find_split

    config, forward, _ = load_forward(trained / "run.pth", "cpu")
    data = EvaluationSet(find_split(discs / "val", None, FileOptions()).pairs, ClassMap.from_config(config), config)
    for prediction in predict_samples(forward, data, workers=0):
        name = prediction.sample.pair.name
        raw = read_image(tmp_path / "raw" / f"{name}.png")
        assert raw.dtype == np.uint16
        np.testing.assert_array_equal(raw[:, :, 0], np.round(prediction.probs[0] * 65535).astype(np.uint16))
        assert 0 < prediction.probs.min() and raw.max() < 65535, "a stretched map would reach both ends"
        pred = prediction.probs[0] >= 0.5
        np.testing.assert_array_equal(read_mask(tmp_path / f"{name}.png"), pred * np.uint8(255))
        np.testing.assert_array_equal(read_mask(tmp_path / "masks" / f"{name}.png"), pred * np.uint8(255))


def test_raw_of_several_classes_has_a_band_for_each(crops_run, colours, tmp_path):
    run_validate("-d", colours / "val", "-cd", crops_run, "-o", tmp_path, "--raw")
    raw = read_image(tmp_path / "raw" / "b2.tif")
    assert raw.shape == (64, 51, 4) and raw.dtype == np.uint16
    np.testing.assert_allclose(raw.sum(axis=2, dtype=np.int64), 65535, atol=3)


def test_without_masks_it_predicts_and_says_so(trained, discs, tmp_path, capsys):
    shutil.copytree(discs / "val" / "images", tmp_path / "new" / "images")
    run_validate("-d", tmp_path / "new", "-cd", trained, "-o", tmp_path / "out", "--plots")
    assert f"no gt/ or masks/ in {tmp_path / 'new'}: predicted without metrics" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"masks", "plots"}
    assert {path.name for path in (tmp_path / "out" / "plots").iterdir()} == {"b0.png", "b1.png", "b2.png"}


def test_only_metrics(trained, discs, tmp_path):
    run_validate("-d", discs / "val", "-cd", trained, "-o", tmp_path / "out", "--com", "--plots", "--raw", "--binary")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"_metrics.csv", "_metrics.json", "_thresholds.csv"}


def test_only_plots(trained, discs, tmp_path):
    run_validate("-d", discs / "val", "-cd", trained, "-o", tmp_path / "out", "--only-plots")
    assert not (tmp_path / "out" / "masks").exists()
    names = sorted(path.name for path in (tmp_path / "out" / "plots").iterdir())
    assert len(names) == 3 and re.fullmatch(r"b0_iou_\d\.\d\d_acc_\d\.\d\d\.png", names[0])


def test_no_plots_wins_over_an_earlier_plots(trained, discs, tmp_path):
    run_validate("-d", discs / "val", "-cd", trained, "-o", tmp_path / "out", "--plots", "--no-plots")
    assert not (tmp_path / "out" / "plots").exists()


def test_best_threshold_of_the_checkpoint(trained, discs, tmp_path, capsys):
    best = load_checkpoint(trained / "run.pth")[0].thresholds["best"]
    run_validate("-d", discs / "val", "-cd", trained, "-t", "best", "--com")
    assert f"threshold {best:g}" in capsys.readouterr().out
    summary = json.loads((trained / f"discs_val_thres_{best:g}" / "_metrics.json").read_text())
    assert summary["threshold"] == best and summary["iou"] == pytest.approx(summary["best"]["iou"])


def test_baselines_of_several_classes_are_left_out_aloud(crops_run, colours, tmp_path, capsys):
    run_validate("-d", colours / "val", "-cd", crops_run, "-o", tmp_path, "--baselines")
    shutil.copytree(crops_run, tmp_path / "logs" / "run")
    classes = ["--class-list", "10 20 30", "--crops", 2, "--image-size", 16, "--loss", "ce"]
    run_train(colours, tmp_path / "logs", *classes, "--baselines")
    assert capsys.readouterr().out.count("baselines are left out: they are for one class") == 2


def test_best_threshold_of_several_classes_is_an_error(crops_run, colours, capsys):
    with pytest.raises(SystemExit) as stop:
        run_validate("-d", colours / "val", "-cd", crops_run, "-t", "best")
    assert stop.value.code == 2 and "the checkpoint stores no best threshold" in capsys.readouterr().err


def test_a_threshold_for_several_classes_is_an_error(crops_run, colours, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run_validate("-d", colours / "val", "-cd", crops_run, "-t", 0.3, "-o", tmp_path / "out")
    assert stop.value.code == 2 and "-t 0.3 is for one class" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_binary_of_several_classes_is_an_error(crops_run, colours, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run_validate("-d", colours / "val", "-cd", crops_run, "--binary", "-o", tmp_path / "out")
    assert stop.value.code == 2 and "--binary is for one class" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_broken_file_does_not_stop_the_rest(trained, discs, tmp_path, capsys):
    shutil.copytree(discs / "val", tmp_path / "val")
    whole = (tmp_path / "val" / "images" / "b1.png").read_bytes()
    (tmp_path / "val" / "images" / "b1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "val" / "gt" / "b2.png").unlink()
    with pytest.raises(SystemExit) as stop:
        run_validate("-d", tmp_path / "val", "-cd", trained, "-o", tmp_path / "out")
    said = capsys.readouterr()
    assert stop.value.code == 1 and "2 " in said.err
    assert "b1.png" in said.out and "'b2'" in said.out
    assert {path.name for path in (tmp_path / "out" / "masks").iterdir()} == {"b0.png"}
    assert [row["file"] for row in read_csv(tmp_path / "out" / "_metrics.csv")] == ["b0", "mean_vals", "pooled"]


def test_nothing_usable_is_an_error_that_lists_all(trained, discs, tmp_path, capsys):
    shutil.copytree(discs / "val" / "images", tmp_path / "val" / "images")
    for path in (tmp_path / "val" / "images").iterdir():
        path.write_text("no image")
    with pytest.raises(SystemExit) as stop:
        run_validate("-d", tmp_path / "val", "-cd", trained, "-o", tmp_path / "out")
    error = capsys.readouterr().err
    assert stop.value.code == 1 and all(f"b{i}.png" in error for i in range(3))
    assert not (tmp_path / "out").exists()


def test_another_number_of_channels_is_named(trained, tmp_path, capsys):
    write_split(tmp_path / "val", ["grey"], channels=1)
    with pytest.raises(SystemExit) as stop:
        run_validate("-d", tmp_path / "val", "-cd", trained)
    assert stop.value.code == 1
    assert "grey.png has 1 channels, the network takes 3" in capsys.readouterr().err


def test_outputs_have_the_size_of_the_image(trained, tmp_path):
    write_split(tmp_path / "val", ["x", "y"], sizes=((50, 31), (17, 90)))
    run_validate("-d", tmp_path / "val", "-cd", trained, "-o", tmp_path / "out", "--raw")
    for name, size in (("x", (50, 31)), ("y", (17, 90))):
        assert read_mask(tmp_path / "out" / "masks" / f"{name}.png").shape == size
        assert read_image(tmp_path / "out" / "raw" / f"{name}.png").shape == (*size, 1)


def test_another_size_is_warned_about(trained, discs, tmp_path, capsys):
    run_validate("-d", discs / "val", "-cd", trained, "-o", tmp_path, "--com", "--tile-size", 64)
    assert "warning: the network was trained on images resized to (32, 32), now (64, 64)" in capsys.readouterr().out


def test_filters_change_masks_and_scores_alike(trained, discs, tmp_path, capsys):
    """The score is that of the masks that are written, but the sweep belongs to the probabilities."""
    summaries = []
    for name, flags in (("plain", ()), ("filtered", ("--closing", 3, "--fill-holes", -1, "--keep-largest"))):
        run_validate("-d", discs / "val", "-cd", trained, "-o", tmp_path / name, "--raw", "-t", 0.3, *flags)
        summaries.append(json.loads((tmp_path / name / "_metrics.json").read_text()))
    filters = Filters(closing=3, fill_holes=-1, keep_largest=True)
    confusion = np.zeros((2, 2), int)
    for path in sorted((tmp_path / "filtered" / "masks").iterdir()):
        found, truth = read_mask(path) > 0, read_mask(discs / "val" / "gt" / path.name) > 0
        plain = read_mask(tmp_path / "plain" / "masks" / path.name) > 0
        np.testing.assert_array_equal(found, filter_mask(plain, filters))
        confusion += np.array([[np.sum((truth == t) & (found == p)) for p in (0, 1)] for t in (0, 1)])
    assert summaries[1]["confusion"] == confusion.tolist() != summaries[0]["confusion"]
    assert summaries[1]["sweep"] == summaries[0]["sweep"]


def test_tile_flags_reach_validation(crops_run, colours, tmp_path, capsys):
    """Other tiles, windows and views give other probabilities; numbers that do not fit are a usage error."""
    seen = {}
    for name, flags in (
        ("as trained", ()),
        ("views", ("--tta", "d4")),
        ("window", ("--tile-size", 32, "--overlap", 0.5, "--blend", "constant", "--halo", 0)),
    ):
        words = ("-d", colours, "--split", "val", "-cd", crops_run, "-o", tmp_path / name, "--raw")
        run_validate(*words, *flags)
        files = sorted((tmp_path / name / "raw").iterdir())
        seen[name] = np.concatenate([read_image(path).ravel() for path in files]).astype(int)
    assert "the tile was 64 in the evaluation of training, now 32" in capsys.readouterr().out
    for name in ("views", "window"):
        difference = np.abs(seen[name] - seen["as trained"])
        assert difference.max() > 100, name
    with pytest.raises(SystemExit) as stop:
        run_validate("-d", colours, "--split", "val", "-cd", crops_run, "--overlap", 10, "--halo", 8)
    assert stop.value.code == 2
    assert "overlap 10 is less than twice the halo 8" in capsys.readouterr().err


def test_validation_logs_to_tensorboard(trained, discs, tmp_path):
    run_validate(
        *("-d", discs / "val", "-cd", trained, "-o", tmp_path / "out", "--com", "-log", tmp_path / "tb"),
        *("--exp-name", "check"),
    )
    events = read_events(tmp_path / "tb" / "check")
    assert {"validate/iou", "validate/auc", "validate class iou/object"} <= set(events.Tags()["scalars"])
    assert len(events.Scalars("validate/iou by threshold in percent")) == 19
    assert "validate worst/1" in events.Tags()["images"]


def test_grey_masks_under_a_threshold_are_no_instance_maps(tmp_path):
    grey = np.zeros((8, 8), np.uint8)
    grey[2:6, 2:6] = np.arange(240, 256).reshape(4, 4)
    cv2.imwrite(str(tmp_path / "a.png"), grey)
    pair = Pair("a", tmp_path / "a.png", tmp_path / "a.png")
    counts = {}
    for instances in (True, False):
        extra = validate.ExtraScores(objects=True, cldice=False)
        inside = (grey > 127).astype(np.uint8)
        validate.score_extra(extra, pair, inside, inside, instances=instances)
        counts[instances] = extra.object_sums.summary()["true"]
    assert counts == {True: 16, False: 1}


def test_object_scores_are_one_readable_line(trained, discs, tmp_path, capsys):
    run_validate("-d", discs / "val", "-cd", trained, "-o", tmp_path, "--com", "--objects", "--cldice")
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if line.startswith("objects: "))
    assert " predicted, " in line and " at IoU 0.5, " in line and "{" not in line
    assert any(line.startswith("clDice ") for line in lines)


def test_objects_and_centre_lines(trained, discs, tmp_path):
    run_validate("-d", discs / "val", "-cd", trained, "-o", tmp_path, "--com", "--objects", "--cldice")
    summary = json.loads((tmp_path / "_metrics.json").read_text())
    assert summary["objects"] and 0 <= summary["cldice"] <= 1


def test_five_bands_of_16_bit(tmp_path, capsys):
    data = write_dataset(tmp_path / "bands", train=3, val=2, channels=5, dtype=np.uint16)
    run = run_train(data, tmp_path / "logs", epochs=1)
    config = load_checkpoint(run / "run.pth")[0]
    assert len(config.channels) == 5 and config.dtype == "uint16" and max(config.mean) > 1000
    run_validate("-d", data / "val", "-cd", run, "--plots")
    assert "warning" not in capsys.readouterr().out


def test_unlike_images_are_warned_about(trained, tmp_path, capsys):
    write_split(tmp_path / "val", ["x"], dtype=np.uint16)
    run_validate("-d", tmp_path / "val", "-cd", trained, "--com")
    out = capsys.readouterr().out
    assert "warning: images are uint16, the network was trained on uint8" in out


def test_cyrillic_path_with_spaces(tmp_path):
    data = write_dataset(tmp_path / "пузыри и камни", train=2, val=1)
    run = run_train(data, tmp_path / "журналы мои", epochs=1, name="опыт 1")
    assert (run / "опыт 1.pth").is_file()
    run_validate("-d", data / "val", "-cd", run, "--plots", "--raw")
    folder = run / "пузыри и камни_val_thres_0.5"
    assert (folder / "masks" / "b0.png").is_file() and len(list((folder / "plots").iterdir())) == 1


def test_region_of_interest_is_kept_from_training(discs, tmp_path, capsys):
    """Pixels outside the region count neither in training's evaluation nor in validation."""
    data = tmp_path / "roi"
    shutil.copytree(discs, data)
    for split in ("train", "val"):
        (data / split / "fov").mkdir()
        for path in (data / split / "gt").iterdir():
            region = np.zeros((32, 32), np.uint8)
            region[8:24, 4:28] = 255
            cv2.imwrite(str(data / split / "fov" / path.name), region)
    run = run_train(data, tmp_path / "logs", "--roi-dir", "fov", epochs=1)
    run_validate("-d", data / "val", "-cd", run, "-o", tmp_path / "out", "--com")
    summary = json.loads((tmp_path / "out" / "_metrics.json").read_text())
    row = json.loads((run / "metrics.jsonl").read_text())
    assert summary["pixels"] == 3 * 16 * 24 and summary["iou"] == row["val"]["roi"]["iou"]
    shutil.rmtree(data / "val" / "fov")
    run_validate("-d", data / "val", "-cd", run, "--com")
    assert "all pixels count, though the network was trained on that region" in capsys.readouterr().out


def test_a_run_without_a_name_refuses_another_data_set(tmp_path, capsys):
    for place in ("x", "y"):
        write_dataset(tmp_path / place / "data")
    train.main(["-d", str(tmp_path / "x" / "data"), "-e", "1", *SMALL])
    with pytest.raises(SystemExit) as stop:
        train.main(["-d", str(tmp_path / "y" / "data"), "-e", "2", *SMALL])
    message = capsys.readouterr().err
    assert stop.value.code == 1 and "holds a run on" in message and "--exp-name" in message


def test_a_network_of_one_size_takes_no_crops(discs, tmp_path, capsys, monkeypatch):
    import model

    monkeypatch.setattr(model, "stride_and_min_side", lambda *_: (224, 224))
    with pytest.raises(SystemExit) as stop:
        run_train(discs, tmp_path, "--crops", 2, "--image-size", 224)
    assert stop.value.code == 1 and "takes images of 224x224 only: leave --crops out" in capsys.readouterr().err


def test_labels_that_the_network_does_not_know_are_named(trained, discs, tmp_path, capsys):
    folder = tmp_path / "more" / "val"
    shutil.copytree(discs / "val", folder)
    path = next((folder / "gt").iterdir())
    mask = read_mask(path).copy()
    mask[0, :2] = 7
    write_mask(path, mask)
    run_validate("-d", folder, "-cd", trained, "-o", tmp_path / "out")
    assert "labels the network does not know, they count as background: 7" in capsys.readouterr().out
