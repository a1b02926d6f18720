"""pretrain.py as a whole: it learns, goes on exactly, shares its work over processes, and says what is wrong."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from discs import write_dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import blobs, write_slide

import pretrain
import train
import weights
from model import build_model
from selfsupervised import pretrainer, run_log
from selfsupervised.encoders import build_encoder

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("barlow", "moco", "mocov3", "dense", "mae")
SMALL = ["--encoder", "plain-8", "--image-size", "32", "-b", "8", "--crops", "2", "--cpu", "-w", "0", "-e", "3"]
SMALL += ["--views", "microscopy", "--probe-every", "2", "--projector", "32-32", "-lr", "0.032"]

# Runs jobs one after another, each process of a job in a fork of its own, so that the imports are paid for once.
DRIVER = """
import json, os, signal, socket, sys
import matplotlib.backends.backend_agg
import torch, torch._dynamo, torch.utils.tensorboard
torch.set_num_threads(1)
import pretrain, selfsupervised.images, selfsupervised.methods
from selfsupervised import pretrainer, run_log
run_log.pretraining_curves = lambda *_: None  # with pictures half of the time of such short runs
pretrain.build_pictures = lambda _: []

def die_at(name, call):
    function, calls = getattr(pretrainer, name), []
    def dying(*args, **options):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)
    setattr(pretrainer, name, dying)

for name, (world, way, words) in json.load(open(sys.argv[1])).items():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            for number in (1, 2):
                path = f"{sys.argv[1]}.{name}.{rank}.{number}"
                os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644), number)
            if world > 1:
                told = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
                told |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
                os.environ.update({key: str(value) for key, value in told.items()})
            if way:
                die_at(*way)
            status = 0
            try:
                pretrain.main(words)
            except SystemExit as end:
                status = end.code or 0
            except BaseException:
                import traceback
                traceback.print_exc()
                status = 99
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        children.append(child)
    print(name, *(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children), flush=True)
"""
# Where a run of three epochs of three steps is killed: before its n-th call of a function of the loop.
WAYS = {
    "in the first epoch": ("_update", 2),
    "in the second epoch": ("_update", 5),
    "before the state of the second epoch": ("write_content", 2),
}


def ways_of(method):
    """All ways for the method with most state, one for others."""
    return {
        "moco": tuple(WAYS),
        "barlow": ("in the second epoch",),
        "mocov3": ("before the state of the second epoch",),
        "dense": ("in the second epoch",),
        "mae": ("in the second epoch",),
    }[method]


def draw_images(folder, count=12, side=44, **options):
    folder.mkdir(parents=True)
    for number in range(count):
        cv2.imwrite(str(folder / f"{number}.png"), blobs(side, side, seed=number, **options)[..., ::-1])
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return draw_images(tmp_path_factory.mktemp("images") / "unlabelled")


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """They take half of the time of such short runs."""
    if request.node.name != "test_what_a_run_leaves_behind":
        monkeypatch.setattr(run_log, "pretraining_curves", lambda *_: None)
        monkeypatch.setattr(pretrain, "build_pictures", lambda _: [])


def words_for(images, logs, name, *more):
    return [str(word) for word in ["--images", images, "-log", logs, "--exp-name", name, *SMALL, *more]]


def read_rows(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("seconds", "waited")} for row in rows]


def load(path):
    return torch.load(path, weights_only=True)


def assert_same(ours, theirs, where=""):
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert list(ours) == list(theirs), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), where
        for place, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(a, b, f"{where}/{place}")
    elif isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where


def refused(capsys, words, *expected, status=1):
    with pytest.raises(SystemExit) as caught:
        pretrain.main([str(word) for word in words])
    said = capsys.readouterr()
    assert caught.value.code == status, said.err
    message = " ".join(said.err.split())
    for text in expected:
        assert text in message, message
    return said.out


# ---- jobs in forks: kills, several processes ----

GROUPS = ["--encoder", "plain-8-gn"]
# AdamW makes whole steps of gradients that are rounding alone, and what diverges magnifies rounding.
STEADY = ["--optim", "SGD", "--momentum", "0", "-e", "2"]
TRANSFORMER = ["--encoder", "tu-test_vit"]
RATES = {"mae": "8", "barlow": "0.002", "dense": "0.05", "moco": "0.2", "mocov3": "0.2"}
SHARED = {
    "barlow": ["--method", "barlow", *GROUPS],
    "dense": ["--method", "dense", *GROUPS],
    "moco sync": ["--method", "moco", "--sync-bn"],
    "mocov3": ["--method", "mocov3", *GROUPS],
    "mae": ["--method", "mae", *TRANSFORMER],
}


@pytest.fixture(scope="module")
def runs(images, tmp_path_factory):
    """The logs folder of all jobs, and the exit status of every process by job."""
    logs, jobs = tmp_path_factory.mktemp("logs"), {}

    def job(name, world, way, *more):
        jobs[f"{name}{' killed' if way else ''}"] = (world, way, words_for(images, logs, name, *more))

    for place, method in enumerate(METHODS):
        own = ["--method", method, *(TRANSFORMER if method == "mae" else [])]
        job(f"whole {method}", 1, None, *own, "-w", place % 2)
        for why in ways_of(method):
            job(f"{method} {why}", 1, WAYS[why], *own)
            job(f"{method} {why}", 1, None, *own)
    for name, more in SHARED.items():
        for count, world in ((1, "one"), (2, "two")):
            own = [word for word in more if count > 1 or word != "--sync-bn"]
            job(f"{world} {name}", count, None, *own, *STEADY, "-lr", RATES[name.split()[0]])
    job("two odd", 2, None, "-b", "9")
    job("two collapse", 2, None, "-lr", "1e9", "-e", "9", "--optim", "SGD")
    (logs / "jobs.json").write_text(json.dumps(jobs))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(logs / "cache")}
    command = [sys.executable, "-c", DRIVER, str(logs / "jobs.json")]
    result = subprocess.run(command, cwd=logs, capture_output=True, text=True, env=environment, timeout=400)
    assert result.returncode == 0, result.stderr
    statuses = {}
    for line in result.stdout.splitlines():
        name = next(name for name in sorted(jobs, key=len, reverse=True) if line.startswith(f"{name} "))
        statuses[name] = [int(word) for word in line[len(name) :].split()]
    return logs, statuses


def said(logs, name, rank=0, stream=2):
    return (logs / f"jobs.json.{name}.{rank}.{stream}").read_text()


@pytest.mark.parametrize(("method", "why"), [(method, why) for method in METHODS for why in ways_of(method)])
def test_a_killed_run_that_goes_on_equals_one_that_was_left_alone(runs, method, why):
    logs, statuses = runs
    name = f"{method} {why}"
    assert statuses[f"{name} killed"] == [-signal.SIGKILL]
    assert statuses[name] == [0], said(logs, name)
    assert ("going on in" in said(logs, name, stream=1)) == ("second" in why)
    ours, theirs = logs / name, logs / f"whole {method}"
    assert read_rows(ours) == read_rows(theirs)
    assert_same(load(ours / "last_checkpoint"), load(theirs / "last_checkpoint"))
    assert_same(load(ours / f"{name}.pth"), load(theirs / f"whole {method}.pth"))


def test_state_of_a_queue_is_kept(runs):
    state = load(runs[0] / "whole moco" / "last_checkpoint")["model_state_dict"]
    keys = state["queue.keys"]
    torch.testing.assert_close(keys.norm(dim=1), torch.ones(len(keys)))
    assert any(key.startswith("teacher.") for key in state)


@pytest.mark.parametrize("name", SHARED)
def test_two_processes_give_what_one_gives(runs, name):
    logs, statuses = runs
    assert statuses[f"two {name}"] == [0, 0], said(logs, f"two {name}") + said(logs, f"two {name}", 1)
    one, two = read_rows(logs / f"one {name}"), read_rows(logs / f"two {name}")
    assert len(one) == len(two) == 2
    for ours, theirs in zip(two, one, strict=True):
        assert ours["train"] == pytest.approx(theirs["train"], abs=1e-4, rel=1e-4)
        assert ours["watch"].keys() == theirs["watch"].keys()
    ours, theirs = (load(logs / f"{world} {name}" / f"{world} {name}.pth") for world in ("two", "one"))
    torch.manual_seed(42)
    begin = build_encoder(theirs["encoder"], 3).state_dict()
    learned = 0.0
    for key, tensor in theirs["encoder_state_dict"].items():
        torch.testing.assert_close(ours["encoder_state_dict"][key], tensor, rtol=1e-4, atol=1e-4, msg=key)
        if key.endswith("weight"):
            learned = max(learned, float((tensor - begin[key]).abs().max()))
    assert learned > 2e-3  # so that an error of a tenth would be seen
    assert said(logs, f"two {name}", 1, 1) == ""  # the first process alone prints


def test_a_batch_that_cannot_be_shared_evenly_is_refused(runs):
    logs, statuses = runs
    assert 0 not in statuses["two odd"][:1]
    assert "-b 8 or 10" in said(logs, "two odd", 0) + said(logs, "two odd", 1)


def test_collapse_ends_all_processes_with_one_message(runs):
    logs, statuses = runs
    words = said(logs, "two collapse", 0) + said(logs, "two collapse", 1)
    assert statuses["two collapse"][0] == 1, words
    assert words.count("error:") == 1 and ("collapsed" in words or "loss became" in words), words


# ---- what a run leaves ----


@pytest.mark.parametrize("method", METHODS)
def test_it_learns(images, tmp_path, method, monkeypatch):
    """The loss falls within a few epochs of three steps, and all weights of the encoder move."""
    built = []
    build = pretrain.build_method
    monkeypatch.setattr(pretrain, "build_method", lambda *a, **k: built.append(build(*a, **k)) or built[-1])
    begin = {}
    fit = pretrainer.fit

    def watched(learner, *args, **options):
        begin.update({key: value.clone() for key, value in learner.network.encoder.named_parameters()})
        fit(learner, *args, **options)

    monkeypatch.setattr(pretrainer, "fit", watched)
    own = [*TRANSFORMER, "-e", "16"] if method == "mae" else ["-e", "8"]
    pretrain.main(words_for(images, tmp_path, "run", "--method", method, *own, "-lr", "0.06"))
    losses = [row["train"]["loss"] for row in read_rows(tmp_path / "run")]
    assert np.mean(losses[-2:]) < 0.97 * losses[0], losses
    for key, value in built[0].encoder.named_parameters():
        if key.startswith("model.head."):
            continue  # classes of a vision transformer, which no feature depends on
        assert not torch.equal(value, begin[key]), key


def test_what_a_run_leaves_behind(images, tmp_path, capsys):
    pretrain.main(words_for(images, tmp_path, "run"))
    run, out = tmp_path / "run", capsys.readouterr().out
    found = {path.name for path in run.iterdir() if not path.name.startswith("events")}
    pictures = {"loss.png", "learning_rate.png", "effective_rank.png"}
    assert found == {"run.pth", "last_checkpoint", "args.json", "metrics.jsonl", "mean_vals.txt", *pictures}
    assert "learning rate: 0.001 for steps of 8 images (-lr 0.032 is for 256)" in out
    lines = [line for line in out.splitlines() if line.startswith("epoch ")]
    assert [line.split("  ")[0] for line in lines] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    assert ["saved run.pth" in line for line in lines] == [False, True, True]
    assert f"--encoder plain-8 --encoder-weights {run / 'run.pth'}" in out
    saved = load(run / "run.pth")
    network = build_model("plain-unet", "plain-8", in_channels=3, num_logits=1)
    assert saved["encoder_state_dict"].keys() == network.encoder.state_dict().keys()  # no projector
    assert (saved["method"], saved["images"], saved["image_size"], saved["epochs"]) == ("barlow", 12, 32, 3)
    flags = json.loads((run / "args.json").read_text())["flags"]
    assert flags["method"] == "barlow" and flags["lr"] == 0.032
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"Loss/pretraining", "Learning rate", "Embeddings/effective rank", "Time/seconds an epoch"} <= tags
    assert "Embeddings/spread (1 healthy, 0 collapsed)" in tags and "Encoder features/effective rank" in tags
    assert {"Dense features/1", "Nearest neighbours/1"} <= set(events.Tags()["images"])
    assert [event.step for event in events.Scalars("Loss/pretraining")] == [1, 2, 3]
    assert [event.step for event in events.Scalars("Encoder features/effective rank")] == [2, 3]


def test_the_advised_command_reads_images_as_this_run_did(images, tmp_path, capsys):
    import train

    def advised(name, *more):
        pretrain.main(words_for(images, tmp_path, name, "-e", "1", *more))
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("train with it: "))
        args = train.build_parser().parse_args(shlex.split(line.split("python train.py ")[1]))
        assert args.image_size == [32]
        return args.crops, args.preprocess, args.reduce, args.mpp

    assert advised("plain") == (2, [], None, None)
    assert advised("whole", "--window", "0") == (0, [], None, None)
    assert advised("prepared", "--preprocess", "clahe", "stretch") == (2, ["clahe", "stretch"], None, None)
    assert advised("smaller", "--reduce", "1.5") == (2, [], 1.5, None)


def test_train_takes_the_encoder_and_validate_refuses_it(images, tmp_path, capsys):
    import validate

    pretrain.main(words_for(images, tmp_path, "run", "-e", "1"))
    file, data = tmp_path / "run" / "run.pth", write_dataset(tmp_path / "data", train=2, val=2)
    words = ["-d", data, "-m", "plain-unet", "--encoder", "plain-8", "--encoder-weights", file, "-e", "1", "-b", "2"]
    words += ["-log", tmp_path, "--exp-name", "t", "--cpu", "-w", "0", "--image-size", "32", "--preprocess", "stretch"]
    train.main([str(word) for word in words])
    out = capsys.readouterr().out
    count = len(weights._counted(load(file)["encoder_state_dict"]))
    assert f"encoder weights {file}: {count} of {count} tensors matched, 0 missing, 0 unexpected" in out
    assert "warning" in out and "preprocessing none, these have stretch" in out
    with pytest.raises(SystemExit):
        validate.main(["-cd", str(tmp_path / "run"), "-d", str(data / "val"), "--cpu"])
    assert "an encoder file of pretrain.py" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main([str(word) for word in [*words, "--exp-name", "run"]])
    assert "--exp-name of its own" in capsys.readouterr().err
    assert load(file)["method"] == "barlow"


def test_a_probe_is_scored_on_the_way_and_changes_nothing(images, tmp_path, capsys):
    data = write_dataset(tmp_path / "data", train=4, val=2)
    words = words_for(images, tmp_path, "probed", "--probe", data, "--class-list", "255", "-e", "2")
    pretrain.main([*words, "--probe-every", "1"])
    out = capsys.readouterr().out
    assert "probe: linear head" in out and "probe before the first epoch: IoU " in out
    assert "--class-list 255" in out.split("train with it: ")[1]
    pretrain.main([*words, "--exp-name", "known", "-e", "1", "--images", str(data / "train"), str(data / "val")])
    out = capsys.readouterr().out
    assert f"2 of the 2 images that are validated on are among --images, such as {data / 'val'}" in out
    rows, run = read_rows(tmp_path / "probed"), tmp_path / "probed"
    assert all(0 <= value <= 1 for row in rows for value in row["probe"].values()) and len(rows) == 2
    tags = EventAccumulator(str(run)).Reload().Tags()["scalars"]
    assert {f"Probe/{name}" for name in rows[0]["probe"]} <= set(tags)
    pretrain.main(words_for(images, tmp_path, "alone", "-e", "2"))
    assert_same(load(run / "last_checkpoint"), load(tmp_path / "alone" / "last_checkpoint"))
    refused(capsys, [*words, "-e", "3", "--probe", "nowhere"], "--probe", "nowhere")


@pytest.mark.parametrize("more", [["--amp", "bf16"], ["--clip", "0.1"], ["--optim", "LARS", "-lr", "0.5"]])
def test_precision_clipping_and_other_optimisers(images, tmp_path, more):
    pretrain.main(words_for(images, tmp_path, "run", "-e", "2", *more))
    losses = [row["train"]["loss"] for row in read_rows(tmp_path / "run")]
    assert len(losses) == 2 and np.isfinite(losses).all()
    assert {tensor.dtype for tensor in load(tmp_path / "run" / "run.pth")["encoder_state_dict"].values()} == {
        torch.float32,
        torch.int64,
    }


@pytest.mark.parametrize("own", [["--method", "moco"], ["--method", "mae", "--encoder", "tu-test_vit"]])
def test_accumulated_batches_are_a_step_where_the_loss_allows_it(images, tmp_path, capsys, own):
    pretrain.main(words_for(images, tmp_path, "run", "-e", "1", *own, "-b", "4", "--accumulate", "4"))
    assert "for steps of 16 images" in capsys.readouterr().out
    assert load(tmp_path / "run" / "last_checkpoint")["progress"]["step"] == 2  # 6 batches: 4 and 2


@pytest.mark.parametrize("method", ["barlow", "mocov3", "dense"])
def test_accumulation_is_refused_where_it_would_be_another_loss(images, tmp_path, capsys, method):
    words = words_for(images, tmp_path, "run", "--method", method, "--accumulate", "2")
    refused(capsys, words, "--accumulate 2", status=2)


@pytest.mark.parametrize("channels", [1, 5])
def test_other_channels_and_16_bits(tmp_path, channels):
    import tifffile

    plan = "contig" if channels > 1 else None
    (tmp_path / "i").mkdir()
    for number in range(4):
        pixels = blobs(40, 40, seed=number, channels=channels, dtype=np.uint16)
        tifffile.imwrite(
            tmp_path / "i" / f"{number}.tif", np.squeeze(pixels), photometric="minisblack", planarconfig=plan
        )
    words = words_for(tmp_path / "i", tmp_path, "run", "-e", "1", "--views", "auto")
    pretrain.main(words)
    saved = load(tmp_path / "run" / "run.pth")
    assert len(saved["channels"]) == len(saved["mean"]) == channels and saved["dtype"] == "uint16"


def test_slides_are_read_by_windows(tmp_path):
    rng = np.random.default_rng(0)
    write_slide(tmp_path / "i" / "slide.tif", rng.integers(0, 255, (400, 300, 3), np.uint8))
    pretrain.main(words_for(tmp_path / "i", tmp_path, "run", "-e", "1", "--crops", "8", "--tissue", "none"))
    assert load(tmp_path / "run" / "run.pth")["images"] == 1


# ---- going on ----


def test_a_complete_run_trains_nothing_and_a_longer_one_goes_on(images, tmp_path, capsys):
    words = words_for(images, tmp_path, "run", "-e", "2")
    pretrain.main(words)
    before = (tmp_path / "run" / "last_checkpoint").read_bytes()
    capsys.readouterr()
    pretrain.main(words)
    assert "the run is complete: 2 epochs are done" in capsys.readouterr().out
    assert (tmp_path / "run" / "last_checkpoint").read_bytes() == before
    record = (tmp_path / "run" / "args.json").read_bytes()
    pretrain.main([*words, "-e", "1", "-b", "4"])
    out = capsys.readouterr().out
    assert "complete: 2 epochs are done and --epochs asks for 1" in out
    assert "warning" not in out and "made longer" not in out and "learning rate" not in out
    assert (tmp_path / "run" / "args.json").read_bytes() == record
    encoder = tmp_path / "copy.pth"
    encoder.write_bytes((tmp_path / "run" / "run.pth").read_bytes())
    pretrain.main([*words, "-e", "3", "--lambda", "0.01", "--encoder-weights", str(encoder)])
    out = capsys.readouterr().out
    assert "going on in" in out and "after epoch 2" in out
    assert "the run was made longer: its learning rate stays at 0.000" in out
    assert f"--encoder-weights {tmp_path / 'run' / 'run.pth'} and another --exp-name" in out
    assert "lambda_ was 0.005 when this run began, it goes on with 0.01" in out
    assert f"--encoder-weights {encoder} is for a new run; this one began with none" in out
    assert json.loads((tmp_path / "run" / "args.json").read_text())["flags"]["encoder_weights"] == "none"
    assert [row["epoch"] for row in read_rows(tmp_path / "run")] == [1, 2, 3]


def test_another_run_in_the_same_folder_is_refused(images, tmp_path, capsys):
    words = words_for(images, tmp_path, "run", "-e", "1")
    pretrain.main(words)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    again = [*words, "-e", "2"]
    refused(capsys, [*again, "--method", "moco"], "method barlow, now it is moco", "--exp-name")
    refused(capsys, [*again, "--encoder", "plain-12"], "encoder plain-8, now it is plain-12", "--exp-name")
    refused(capsys, [*again, "--projector", "16-16"], "--projector 32-32, now it is 16-16", "--exp-name")
    refused(capsys, [*again, "--optim", "SGD"], "--optim AdamW, now it is SGD")
    unchanged = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert unchanged == before
    other = draw_images(tmp_path / "other", 11)
    again[again.index("--images") + 1] = str(other)
    refused(capsys, again, "12 images (digest ", "now they are 11 (digest ", "--exp-name")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_the_folder_of_a_training_is_refused(images, tmp_path, capsys):
    data = write_dataset(tmp_path / "data", train=2, val=2)
    words = ["-d", data, "-m", "plain-unet", "--encoder", "plain-8", "-e", "1", "-b", "2", "-log", tmp_path]
    train.main([str(w) for w in [*words, "--exp-name", "t", "--cpu", "-w", "0", "--image-size", "32"]])
    refused(capsys, words_for(images, tmp_path, "t"), "not the state of a pretraining", "--exp-name")
    assert (tmp_path / "t" / "t.pth").is_file()


def test_a_run_whose_state_is_gone_is_not_written_over(images, tmp_path, capsys):
    words = words_for(images, tmp_path, "run", "-e", "2")
    pretrain.main(words)
    (tmp_path / "run" / "last_checkpoint").unlink()
    refused(capsys, words, "holds a run of 2 epochs and no last_checkpoint", "--exp-name")


# ---- bad input ----


def test_fewer_pairs_than_a_batch(images, tmp_path, capsys):
    refused(capsys, words_for(images, tmp_path, "run", "-b", "25"), "12 images with 2 crops", "24", "--crops", "-b 24")


def test_one_image(tmp_path, capsys):
    one = draw_images(tmp_path / "one", 1)
    refused(capsys, words_for(one, tmp_path, "run"), "1 images with 2 crops", "--crops 8", "-b 2")
    pretrain.main(words_for(one, tmp_path, "run", "--crops", "8", "-e", "1"))
    assert (tmp_path / "run" / "run.pth").is_file()


def test_files_by_a_glob(images, tmp_path):
    pretrain.main(words_for(images / "1*.png", tmp_path, "run", "-e", "1", "-b", "4"))
    assert load(tmp_path / "run" / "run.pth")["images"] == 3  # 1, 10, 11


def test_another_optimiser_needs_a_rate(images, tmp_path, capsys):
    words = words_for(images, tmp_path, "run", "--optim", "NAdam")
    place = words.index("-lr")
    refused(capsys, words[:place] + words[place + 2 :], "--optim NAdam", "give -lr", status=2)


def test_images_smaller_than_a_view(tmp_path):
    small = draw_images(tmp_path / "small", 8, side=9)
    pretrain.main(words_for(small, tmp_path, "run", "-e", "1"))
    assert (tmp_path / "run" / "run.pth").is_file()


def test_an_unreadable_file_is_listed_and_left_alone(images, tmp_path, capsys):
    folder = draw_images(tmp_path / "some", 8)
    broken = folder / "broken.png"
    broken.write_bytes((folder / "1.png").read_bytes()[:200])
    before = broken.read_bytes()
    pretrain.main(words_for(folder, tmp_path, "run", "-e", "1"))
    out = capsys.readouterr().out
    assert "1 of 9 files are left out" in out and "broken.png" in out and "8 images" in out
    header, row = (tmp_path / "run" / "unreadable.csv").read_text().splitlines()
    assert header == "file;reason" and row.startswith(f"{broken};")
    assert broken.read_bytes() == before


@pytest.mark.parametrize(
    ("more", "expected", "status"),
    [
        (["--encoder", "nosuchnet"], ["unknown encoder 'nosuchnet'"], 2),
        (["--encoder-weights", "no/file.pth"], ["no/file.pth: no such file"], 2),
        (["--projector", "12-x"], ["--projector", "12-x", "1024-1024-1024"], 2),
        (["--window", "0.5"], ["0.5", "smaller than the view"], 2),
        (["--window", "0", "--views-from", "neighbours"], ["whole image has no neighbour"], 2),
        (["--class-list", "1"], ["--class-list", "--probe DIR"], 2),
        (["--reduce", "0.5"], ["--reduce 0.5 would enlarge"], 2),
        (["--image-size", "32", "64"], ["--image-size 32 64", "square"], 2),
        (["--crops", "0"], ["--crops 0", "1 or more"], 2),
        (["--optim", "LBFGS"], ["--optim LBFGS cannot train here"], 2),
        (["--amp", "fp16"], ["--amp fp16 needs a GPU"], 2),
        (["-b", "1"], ["-b 1 leaves a process a single image", "-b 16"], 2),
        (["-b", "1", "--method", "moco"], ["-b 1 leaves a process a single image", "-b 16"], 2),
        (["--sync-bn"], ["--sync-bn joins the batches of several processes", "torchrun"], 2),
        (
            ["--encoder", "tu-vit_small_patch14_dinov2", "--image-size", "64"],
            [
                "--image-size 64: tu-vit_small_patch14_dinov2 does not take it",
                "a multiple of 14, the side of its patches",
            ],
            2,
        ),
        (["--method", "mae"], ["--method mae hides patches", "--encoder tu-vit_tiny_patch16_224"], 2),
        (
            ["--method", "mae", "--encoder", "tu-test_vit", "--image-size", "16"],
            ["--image-size 16 leaves a single patch", "--image-size 96"],
            2,
        ),
        (["--encoder", "tu-xcit_nano_12_p8_224"], ["tu-xcit_nano_12_p8_224 cannot be pretrained", "resnet18"], 1),
        (["--images", "nowhere"], ["no file or folder nowhere"], 1),
    ],
)
def test_flags_that_cannot_be(images, tmp_path, capsys, more, expected, status):
    refused(capsys, words_for(images, tmp_path, "run", *more), *expected, status=status)


@pytest.mark.parametrize(
    ("words", "partner", "line"),
    [
        (["--lambda", "1"], ["--method", "dense"], "without --method barlow or dense nothing is done with --lambda"),
        (["--queue", "8"], ["--method", "moco"], "without --method moco nothing is done with --queue"),
        (["--temperature", "1"], ["--method", "mocov3"], "nothing is done with --temperature"),
        (["--momentum-encoder", "0.9"], ["--method", "moco"], "nothing is done with --momentum-encoder"),
        (["--dense-points", "9", "--dense-global", "0"], ["--method", "dense"], "with --dense-points --dense-global"),
        (["--momentum", "0.5"], ["--optim", "sgd"], "without --optim SGD or LARS nothing is done with --momentum"),
        (["--mask-share", "0.5"], ["--method", "mae"], "without --method mae nothing is done with --mask-share"),
        (["--probe-head", "decoder"], ["--probe", "data"], "without --probe DIR nothing is done with --probe-head"),
        (["--warmup", "100"], ["-e", "101"], "--warmup 100 takes all of --epochs 100"),
    ],
)
def test_flags_that_change_nothing_are_named(words, partner, line):
    def idle(*more):
        start = [] if "--lambda" not in words else ["--method", "moco"]
        args = pretrain.build_parser().parse_args(["--images", "x", *start, *more])
        pretrain.options.check_flags(args)
        return pretrain.options.idle_flags(args, pretrain.build_parser())

    (said,) = idle(*words)
    assert said.startswith("warning: ") and line in said
    assert idle(*words, *partner) == [] == idle()


def test_a_flag_that_changes_nothing_is_said_by_the_page(images, tmp_path, capsys):
    pretrain.main(words_for(images, tmp_path, "run", "-e", "1", "--queue", "8"))
    assert "warning: without --method moco nothing is done with --queue" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("froth.v2", "barlow_resnet18_froth.v2"),
        ("nuclei/train/images", "barlow_resnet18_nuclei_train_images"),
        ("nuclei/train/images/1.png", "barlow_resnet18_nuclei_train_images"),
        ("froth.v2/*.png", "barlow_resnet18_froth.v2"),
        ("froth.v2/**/*.png", "barlow_resnet18_froth.v2"),
    ],
)
def test_a_run_is_named_after_a_folder(tmp_path, word, name):
    for folder in ("froth.v2", "nuclei/train/images"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "1.png").touch()
    args = pretrain.build_parser().parse_args(["--images", str(tmp_path / word)])
    assert pretrain.default_name(args) == name


def test_weights_behind_finer_features_alone_are_warned_of(images, tmp_path, capsys):
    words = words_for(images, tmp_path, "run", "-e", "1", "--encoder", "tu-hrnet_w18_small")
    pretrain.main(words)
    out = capsys.readouterr().out
    assert "tensors of the encoder (first model.stage4.0." in out and "--method dense compares features at all" in out
    saved = load(tmp_path / "run" / "last_checkpoint")
    listed = sum(len(group["params"]) for group in saved["optimizer_state_dict"]["param_groups"])
    assert listed == len(saved["optimizer_state_dict"]["state"])  # the same weights as in several processes
    method = pretrain.build_method(pretrain.build_parser().parse_args([*words, "--method", "dense"]), 3, 24, fresh=True)
    assert pretrainer.freeze_idle_weights(method, (3, 32, 32)) == []


def test_an_encoder_that_cannot_be_pretrained(images, tmp_path, capsys):
    words = words_for(images, tmp_path, "run", "--encoder", "tu-vit_tiny_patch16_224", "--image-size", "30")
    refused(capsys, words, "--image-size 30", "tu-vit_tiny_patch16_224", "does not take it", status=2)


def test_a_loss_that_is_not_finite_stops_with_advice(images, tmp_path, capsys, monkeypatch):
    words = words_for(images, tmp_path, "run", "-e", "1")
    pretrain.main(words)
    backward = pretrainer._backward

    def broken(*args, **options):
        step = backward(*args, **options)
        step.loss = step.loss * float("nan")
        return step

    monkeypatch.setattr(pretrainer, "_backward", broken)
    refused(capsys, [*words, "-e", "2"], "the loss became nan at step 3", "the files 1, 10", "-lr", "--clip 1")
    assert load(tmp_path / "run" / "last_checkpoint")["epoch"] == 1


def test_collapse_stops_with_advice_unless_it_is_allowed(images, tmp_path, capsys):
    """A rate that is far too high brings all embeddings onto one line."""
    words = words_for(images, tmp_path, "run", "-e", "7", "--method", "moco", "-lr", "30", "--warmup", "0")
    out = refused(capsys, words, "the embeddings have collapsed", "-lr", "--exp-name", "--allow-collapse")
    assert out.count("warning: the embeddings have collapsed") >= 2
    rows = read_rows(tmp_path / "run")
    assert [row["collapsed"] for row in rows[-3:]] == [True] * 3 and len(rows) < 7
    pretrain.main([*words, "--allow-collapse"])
    assert len(read_rows(tmp_path / "run")) == 7


def test_an_encoder_to_which_all_images_are_the_same_is_warned_of(tmp_path, capsys):
    (tmp_path / "flat").mkdir()
    for number in range(8):
        cv2.imwrite(str(tmp_path / "flat" / f"{number}.png"), np.full((40, 40, 3), 90, np.uint8))
    pretrain.main(words_for(tmp_path / "flat", tmp_path, "run", "-e", "1"))
    assert "warning: the encoder's features of all windows are the same" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("encoder", "architecture"),
    [("plain-8", "plain-unet"), ("tu-test_resnet", "unet"), ("tu-vit_tiny_patch16_224", "dpt")],
)
def test_the_architecture_that_is_advised_takes_the_encoder(encoder, architecture):
    assert pretrain.architecture_for(encoder) == architecture


def test_an_encoder_file_starts_another_pretraining(images, tmp_path, capsys):
    pretrain.main(words_for(images, tmp_path, "first", "-e", "1"))
    file = tmp_path / "first" / "first.pth"
    pretrain.main(words_for(images, tmp_path, "second", "-e", "1", "--encoder-weights", file, "-lr", "1e-12"))
    out = capsys.readouterr().out
    assert f"encoder weights {file}" in out and "was pretrained on" not in out
    pretrain.main(words_for(images, tmp_path, "other", "-e", "1", "--encoder-weights", file, "--preprocess", "stretch"))
    assert "preprocessing none, these have stretch" in capsys.readouterr().out
    ours, theirs = (load(tmp_path / name / f"{name}.pth")["encoder_state_dict"] for name in ("second", "first"))
    for key in (key for key in ours if key.endswith("weight")):
        torch.testing.assert_close(ours[key], theirs[key])


def test_weights_that_no_loss_reaches_are_found(images):
    from selfsupervised.interface import MethodOptions
    from selfsupervised.methods import build_method

    torch.manual_seed(0)
    encoder = build_encoder("plain-8", 3)
    encoder.idle = torch.nn.Linear(2, 2)
    method = build_method("barlow", encoder, MethodOptions(projector=(8, 8)))
    state, before = torch.get_rng_state(), {key: value.clone() for key, value in method.state_dict().items()}
    assert pretrainer.freeze_idle_weights(method, (3, 32, 32)) == []  # no features depend on them
    assert torch.equal(torch.get_rng_state(), state)
    frozen = {key for key, value in method.named_parameters() if not value.requires_grad}
    assert frozen == {"encoder.idle.weight", "encoder.idle.bias"}
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())
