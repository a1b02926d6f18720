"""A run that is killed and started again equals one that was not, bit for bit."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from discs import write_dataset, write_split
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from checkpoint import load_checkpoint
from run_folder import RunFolder

ROOT = Path(__file__).resolve().parent.parent
# Dropout in the ASPP and batch normalisation: the state of the generator and of every buffer matters.
DEEP = ["-m", "deeplabv3+", "--encoder", "timm-mobilenetv3_small_minimal_100", "--encoder-weights", "none"]
DEEP += ["--monitor", "loss", "-lr", "1e-4"]
SMALL = ["-m", "plain-unet", "--encoder", "plain-8"]
COMMON = ["--image-size", "32", "-b", "2", "-a", "light", "--cpu", "--worst", "1"]

# Runs train.py once for each way to die, each in a fork of its own, so that the imports are paid for once.
DRIVER = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
import augmentations, checkpoint, losses, model, run_folder, train, trainer

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def in_the_middle_of_a_step():
    update, calls = trainer._update, []
    def dying(*args):
        calls.append(1)
        if len(calls) == 4:
            die()
        update(*args)
    trainer._update = dying

def between_jsonl_and_checkpoint(epoch=2):
    log = run_folder.RunFolder.log_images
    def dying(self, tag, panels, at):
        if at == epoch:
            die()
        log(self, tag, panels, at)
    run_folder.RunFolder.log_images = dying

def in_the_first_epoch():
    between_jsonl_and_checkpoint(1)

def between_best_and_last():
    save, saved = trainer.save_checkpoint, []
    def dying(path, config, weights, **more):
        if saved and saved[-1].suffix == ".pth" and path.name == "last_checkpoint" and more["epoch"] >= 2:
            die()
        saved.append(path)
        save(path, config, weights, **more)
    trainer.save_checkpoint = dying

def in_the_middle_of_a_save():
    save, calls = torch.save, []
    def dying(content, file):
        calls.append(1)
        if len(calls) == 4:
            file.write(b"half of it")
            file.flush()
            die()
        save(content, file)
    torch.save = dying

for way, words in json.load(open(sys.argv[1])).items():
    child = os.fork()
    if child == 0:
        globals()[way]()
        train.main(words)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print(way, status, flush=True)
"""
WAYS = (
    "in_the_middle_of_a_step",
    "between_jsonl_and_checkpoint",
    "between_best_and_last",
    "in_the_middle_of_a_save",
    "in_the_first_epoch",
)


def words_for(data, logs, name, *more, network=SMALL, epochs=3, workers=0):
    words = ["-d", data, "-log", logs, "--exp-name", name, "-e", epochs, "-w", workers, *network, *COMMON, *more]
    return [str(word) for word in words]


def read_rows(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("seconds", "waited")} for row in rows]


def assert_same_tensors(ours, theirs, where=""):
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert list(ours) == list(theirs), where
        for key in ours:
            assert_same_tensors(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for place, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same_tensors(a, b, f"{where}/{place}")
    elif isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where


def assert_same_run(ours, theirs):
    for pattern in ("*.pth", "last_checkpoint"):
        (config, saved), (other_config, other_saved) = (load_checkpoint(*run.glob(pattern)) for run in (ours, theirs))
        assert config == other_config
        assert_same_tensors(saved, other_saved, pattern)
    assert read_rows(ours) == read_rows(theirs)
    assert (ours / "_iou_per_epoch_val.csv").read_text() == (theirs / "_iou_per_epoch_val.csv").read_text()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "discs", train=4, val=2)


@pytest.fixture(scope="module")
def killed(data, tmp_path_factory):
    """Run folders of every way to die, with the words that go on with them; and the run that was left alone."""
    logs = tmp_path_factory.mktemp("logs")
    jobs = {way: words_for(data, logs, way, network=DEEP, workers=2 * (place % 2)) for place, way in enumerate(WAYS)}
    (logs / "jobs.json").write_text(json.dumps(jobs))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(logs / "cache")}
    with (logs / "out.txt").open("wb") as out:  # no pipe: orphaned loader processes would hold it open
        command = [sys.executable, "-c", DRIVER, str(logs / "jobs.json")]
        subprocess.run(command, cwd=logs, env=environment, stdout=out, stderr=out, check=False, timeout=300)
    said = (logs / "out.txt").read_text()
    for way in WAYS:
        assert f"{way} {int(signal.SIGKILL)}\n" in said, said
    torch.set_num_threads(1)
    train.main(words_for(data, logs, "whole", network=DEEP))
    return logs, jobs


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the driver forks")
@pytest.mark.parametrize("way", WAYS)
def test_killed_and_started_again_equals_uninterrupted(killed, way, capsys):
    logs, jobs = killed
    before = len(read_rows(logs / way)) if (logs / way / "metrics.jsonl").is_file() else 0
    assert before < 3
    train.main(jobs[way])
    out = capsys.readouterr().out
    assert (f"going on in {logs / way} after epoch 1" in out) == (way != "in_the_first_epoch")
    assert_same_run(logs / way, logs / "whole")
    assert not list((logs / way).glob(".*")), "the half-written file is swept away"
    events = EventAccumulator(str(logs / way))
    events.Reload()
    for tag in ("discs iou", "Loss/train", "Learning rate"):
        assert [event.step for event in events.Scalars(tag)] == [1, 2, 3], "TensorBoard shows each epoch once"


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("-sc", "plateau", "--plateau-patience", 0),
        ("--optim", "SGD", "--warmup", 1.5),
        ("--ema", 0.9, "-sc", "one-cycle", "--optim", "RAdam", "--init", "kaiming"),
        ("--freeze-encoder", 1, "--encoder-lr-scale", 0.1, "-sc", "poly", "--warmup", 0.5, "--label-smoothing", 0.1)
        + ("--loss", "ce+dice"),
        ("--freeze-encoder", 2, "--ema", 0.99, "-sc", "step", "--step-every", 1, "--optim", "NAdam"),
    ],
)
def test_stopping_between_epochs_changes_nothing(data, tmp_path, more, monkeypatch):
    """Workers differ too: randomness of a sample does not depend on the process that loads it."""
    train.main(words_for(data, tmp_path, "whole", *more))
    log = RunFolder.log_epoch

    def stop(self, row):
        log(self, row)
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "log_epoch", stop)
    with pytest.raises(SystemExit) as ended:
        train.main(words_for(data, tmp_path, "halves", *more))
    assert ended.value.code == 130
    assert len(read_rows(tmp_path / "halves")) == 2
    assert load_checkpoint(tmp_path / "halves" / "last_checkpoint")[1]["epoch"] == 1
    monkeypatch.undo()
    train.main(words_for(data, tmp_path, "halves", *more, workers=2))
    assert_same_run(tmp_path / "halves", tmp_path / "whole")


def test_more_epochs_follow_the_longer_cosine_and_never_climb(data, tmp_path, capsys):
    train.main(words_for(data, tmp_path, "run", "-lr", 0.5, epochs=2))
    assert "made longer" not in capsys.readouterr().out
    train.main(words_for(data, tmp_path, "run", "-lr", 0.5, epochs=4))
    assert "the run was made longer: its learning rate stays at 0.25" in capsys.readouterr().out
    train.main(words_for(data, tmp_path, "run", "-lr", 0.5, epochs=6))
    rates = [row["lr"] for row in read_rows(tmp_path / "run")]
    expected = [0.5, 0.25]  # the cosine over two epochs
    expected += [0.25, 0.25 * (1 + math.cos(math.pi * 3 / 4))]  # that over four, not above 0.25
    expected += [expected[-1]] * 2  # that over six is higher than where the four had ended, but in its last epoch
    expected[5] = min(expected[3], 0.25 * (1 + math.cos(math.pi * 5 / 6)))
    assert rates == pytest.approx(expected)
    assert rates == sorted(rates, reverse=True)


def test_another_batch_size_keeps_the_place_in_the_schedule(data, tmp_path, capsys):
    train.main(words_for(data, tmp_path, "run", epochs=2))
    train.main(words_for(data, tmp_path, "run", "-b", 1, epochs=4))
    assert "warning: batch was 2 when this run began, it goes on with 1" in capsys.readouterr().out
    assert [row["lr"] for row in read_rows(tmp_path / "run")][2:] == pytest.approx([5e-4, 5e-4 * (1 - math.sqrt(0.5))])


def test_a_complete_run_says_so(data, tmp_path, capsys):
    words = words_for(data, tmp_path, "run", epochs=1)
    train.main(words)
    kept = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if "tfevents" not in path.name}
    capsys.readouterr()
    train.main(words)
    out = capsys.readouterr().out
    assert (
        "the run is complete: 1 epochs are done and --epochs asks for 1; nothing is trained" in out
        and "best epoch 1 of 1" in out
    )
    for name in ("run.pth", "last_checkpoint", "metrics.jsonl", "_iou_per_epoch_val.csv"):
        assert (tmp_path / "run" / name).read_bytes() == kept[name]


def test_the_best_epoch_is_scored_once(data, tmp_path, capsys, monkeypatch):
    import evaluation

    score, calls = evaluation.predict_samples, []

    def counted(*args, **keywords):
        calls.append(1)
        return score(*args, **keywords)

    monkeypatch.setattr(evaluation, "predict_samples", counted)
    words = words_for(data, tmp_path, "run", epochs=2)
    train.main(words)
    known = capsys.readouterr().out.split("best epoch ")[1]
    assert len(calls) == 2, "once an epoch, the best one is not scored again"
    train.main(words)
    assert len(calls) == 3, "nobody remembers what an earlier process counted"
    assert capsys.readouterr().out.split("best epoch ")[1] == known


@pytest.mark.parametrize(
    ("flags", "old", "new"),
    [
        (["-m", "unet", "--encoder", "resnet18"], "architecture plain-unet", "unet"),
        (["--encoder", "plain-12"], "encoder plain-8", "plain-12"),
        (["--class-list", "7"], "labels (255,)", "(7,)"),
        (["--class-list", "7 255"], "labels (255,)", "(7, 255)"),
        (["--class-names", "stone"], "class_names ('background', 'object')", "('background', 'stone')"),
        (["--image-size", "48"], "geometry", "48"),
        (["--crops", "2"], "resize", "crops"),
        (["--optim", "SGD"], "--optim AdamW", "SGD"),
        (["--monitor", "loss"], "--monitor iou", "loss"),
    ],
)
def test_another_network_or_class_list_is_refused(tmp_path, capsys, flags, old, new):
    data = write_dataset(tmp_path / "discs", train=2, val=1, labels=(0, 255, 7))
    name = ("--class-list", "255")
    train.main(words_for(data, tmp_path, "run", *name, epochs=1))
    kept = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main(words_for(data, tmp_path, "run", *name, *flags, epochs=2))
    error = capsys.readouterr().err
    assert stop.value.code == 1
    assert str(tmp_path / "run") in error and old in error and new in error and "--exp-name" in error
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == kept


def test_another_spelling_of_the_network_is_the_same_run(data, tmp_path, capsys):
    train.main(words_for(data, tmp_path, "run", epochs=1))
    train.main(words_for(data, tmp_path, "run", network=["-m", "Plain_UNet", "--encoder", "plain-8"], epochs=2))
    out = capsys.readouterr().out
    assert f"going on in {tmp_path / 'run'} after epoch 1" in out and "warning: model" not in out


def test_changed_flags_count_from_then_on(data, tmp_path):
    first = ("-sc", "plateau", "--plateau-patience", 5, "--optim", "SGD")
    train.main(words_for(data, tmp_path, "run", *first, epochs=1))
    later = ("-sc", "plateau", "--plateau-patience", 0, "--plateau-factor", 0.5, "--optim", "SGD")
    train.main(words_for(data, tmp_path, "run", *later, "-lr", 1e-9, "--weight-decay", 0.5, epochs=4))
    _, saved = load_checkpoint(tmp_path / "run" / "last_checkpoint")
    assert [group["weight_decay"] for group in saved["optimizer_state_dict"]["param_groups"]] == [0.5, 0]
    assert read_rows(tmp_path / "run")[-1]["lr"] < 1e-9  # with the first patience of 5 it would not have fallen


@pytest.mark.parametrize("best_in_its_place", [False, True])
def test_a_run_without_its_state_is_not_written_over(data, tmp_path, capsys, best_in_its_place):
    run = tmp_path / "run"
    train.main(words_for(data, tmp_path, "run", epochs=2))
    (run / "last_checkpoint").unlink()
    if best_in_its_place:
        (run / "last_checkpoint").write_bytes((run / "run.pth").read_bytes())
    kept = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(SystemExit) as stop:
        train.main(words_for(data, tmp_path, "run", epochs=3))
    error = capsys.readouterr().err
    assert stop.value.code == 1 and str(run) in error and "go on from" in error and "--init-from" in error
    assert {path.name: path.read_bytes() for path in run.iterdir()} == kept


def test_changed_training_images_are_warned_about(tmp_path, capsys):
    data = write_dataset(tmp_path / "discs", train=2, val=1)
    train.main(words_for(data, tmp_path, "run", epochs=1))
    write_split(data / "train", ["later"], sizes=((64, 64),))
    train.main(words_for(data, tmp_path, "run", epochs=2))
    assert "warning: the training images changed since this run began" in capsys.readouterr().out


def test_the_history_is_cut_back_to_the_checkpoint(tmp_path):
    rows = [
        {"epoch": k, "lr": 0.1, "train": {"loss": 1.0, "iou": 0.5}, "seconds": 1.0, "waited": 0.0}
        | {"val": {"x": {"loss": 0.5, "iou": 0.25 * k, "dice": 0.5, "classes": {"a": 0.5}}}}
        for k in (1, 2, 3)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text + '{"epoch": 4, "lr"')
    (tmp_path / f".{'0' * 32}.tmp").write_text("left by a kill")
    (tmp_path / ".mine.tmp").write_text("the user's")
    run = RunFolder(tmp_path, epoch=2, val_names=["x"], decimal="dot")
    run.close()
    assert read_rows(tmp_path) == [
        {key: value for key, value in row.items() if key not in ("seconds", "waited")} for row in rows[:2]
    ]
    assert (tmp_path / "_iou_per_epoch_val.csv").read_text() == "epoch; iou\n1; 0.2500\n2; 0.5000\n"
    assert [path.name for path in tmp_path.glob(".*")] == [".mine.tmp"]
