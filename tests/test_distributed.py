"""Several processes give what one gives: batches, losses with gradients, scores, whole runs; what ends all of them."""

import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from discs import write_dataset, write_split
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset

import evaluation
import processes
import train_options
from augmentations import Augmentation
from checkpoint import Geometry, ModelConfig
from classes import ClassMap
from cli import UsageError
from dataset import EpochSampler, EvaluationSet, TrainingBatches, TrainingSet
from image_io import IGNORE_INDEX
from learner import has_idle_weights
from losses import build_loss
from mixing import Mixing
from model import build_model
from pairing import FileOptions, find_split
from shared_batches import SharedBatches, part_of_set
from shares import part_of

ROOT = Path(__file__).resolve().parent.parent
GROUPS = ["-m", "plain-unet", "--encoder", "plain-8-gn", "--encoder-weights", "none"]
COMMON = ["--image-size", "32", "-a", "light", "--cpu", "--worst", "2", "-e", "3"]

# Runs jobs, each in so many forks that see what torchrun tells its processes; the imports are paid for once.
DRIVER = """
import json, os, signal, socket, sys
import matplotlib.backends.backend_agg
import torch, torch._dynamo, torch.utils.tensorboard
torch.set_num_threads(1)
import augmentations, checkpoint, evaluation, losses, model, run_folder, shares, train, trainer
import processes as team

def gradients(out):
    shared, results = json.load(open(out)), {}
    with team.join_processes("cpu") as processes:
        for name, (expression, num_logits, weights, smoothing) in shared["losses"].items():
            weights = torch.tensor(weights) if weights else None
            loss = losses.build_loss(
                expression, num_logits=num_logits, class_weights=weights, label_smoothing=smoothing
            )
            logits, mask = torch.load(shared["tensors"], weights_only=True)[str(num_logits)]
            rows = shares.part_of(len(logits), processes.rank, processes.world)
            own = logits[rows].clone().requires_grad_()
            value = processes.shared_loss(loss)(own, mask[rows])
            value.backward()
            results[name] = (value.detach(), own.grad / processes.world)
        torch.save(results, f"{out}.{processes.rank}")

def in_the_second_epoch_of_rank_1(end, words):
    score, calls = evaluation.score_set, []
    def ending(*args, processes, **options):
        calls.append(1)
        if len(calls) == 2 and processes.rank == 1:
            end()
        return score(*args, processes=processes, **options)
    trainer.score_set = ending
    train.main(words)

def broken():
    raise ValueError("val/images/b6.png: broken in the middle of the run")

def killed():
    os.kill(os.getpid(), signal.SIGKILL)

def late(words):
    def failing(*_):
        raise RuntimeError("the best network cannot be scored again")
    train.finish = failing
    train.main(words)

def work(words):
    if words[0] == "gradients":
        gradients(words[1])
    elif words[0] in ("broken", "killed"):
        in_the_second_epoch_of_rank_1(globals()[words[0]], words[1:])
    elif words[0] == "late":
        late(words[1:])
    else:
        train.main(words)

for name, (world, words) in json.load(open(sys.argv[1])).items():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children, log = [], sys.argv[1] + "." + name
    for rank in range(world):
        child = os.fork()
        if child == 0:
            for number in (1, 2):
                os.dup2(os.open(f"{log}.{rank}.{number}", os.O_CREAT | os.O_WRONLY, 0o644), number)
            if world > 1:
                told = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
                told |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
                os.environ.update({key: str(value) for key, value in told.items()})
            status = 0
            try:
                work(words)
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


def start(folder, jobs):
    """Run jobs {name: (processes, words)}; the exit status of every process, by job."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", DRIVER, str(path)], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    return {name: [int(status) for status in statuses] for name, *statuses in lines}


def said(folder, name, rank, stream):
    """What a process of a job wrote: stream 1 is stdout, 2 stderr."""
    return (folder / f"jobs.json.{name}.{rank}.{stream}").read_text()


def words_for(data, logs, name, *more):
    return [str(word) for word in ["-d", data, "-log", logs, "--exp-name", name, *GROUPS, *COMMON, "-w", 0, *more]]


# ---- parts ----


@given(st.integers(0, 40), st.integers(1, 9))
def test_parts_are_everything_once_and_alike(length, world):
    parts = [list(range(length))[part_of(length, rank, world)] for rank in range(world)]
    assert [item for part in parts for item in part] == list(range(length))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


def make_config(**changes):
    values = {
        "architecture": "plain-unet",
        "encoder": "plain-8-gn",
        "labels": (255,),
        "class_names": ("background", "255"),
        "channels": tuple("rgb"),
        "mean": (100.0,) * 3,
        "std": (50.0,) * 3,
        "geometry": Geometry("resize", (32, 32)),
        "stride": 16,
        "min_side": 16,
    }
    return ModelConfig(**(values | changes))


CROPS = Geometry("crops", (16, 16), tile=32, overlap=16, halo=0)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    ("images", "batch", "crops", "workers", "mix"),
    [(7, 4, 0, 0, None), (8, 3, 0, 0, "cutmix"), (5, 4, 6, 0, "mosaic"), (5, 7, 6, 2, None), (2, 3, 1, 0, None)],
)
def test_processes_share_the_very_batches_of_one(tmp_path, world, images, batch, crops, workers, mix):
    folder = write_split(tmp_path / "split", [f"i{i}" for i in range(images)])
    config = make_config(geometry=CROPS) if crops else make_config()
    classes, present = ClassMap.from_config(config), [(1,)] * images
    mixing = Mixing(mix, 0.7, present, together=crops > 0) if mix else None
    augmentation = Augmentation("hard", rgb=True, value_range=(0, 255))
    data = TrainingSet(find_split(folder, None, FileOptions()).pairs, classes, config, augmentation, mixing)
    options = {"batch": batch, "workers": workers, "pin": False}

    def sampler():
        return EpochSampler(present, crops=max(1, crops), quota=0.4, seed=3)

    whole = TrainingBatches(data, sampler(), **options)
    shares = [SharedBatches(data, sampler(), **options, rank=rank, world=world) for rank in range(world)]
    for epoch in (0, 1):
        for batches in (whole, *shares):
            batches.set_epoch(epoch)
        seen = 0
        for one, *parts in zip(whole, *shares, strict=True):
            assert {part.names for part in parts} == {one.names}
            filled = [rank < len(one.names) for rank in range(world)]
            full = [part for part, is_full in zip(parts, filled, strict=True) if is_full]
            assert torch.equal(torch.cat([part.images for part in full]), one.images)
            assert torch.equal(torch.cat([part.masks for part in full]), one.masks)
            for part in parts[sum(filled) :]:
                assert part.images.shape[0] == 1 and (part.masks == IGNORE_INDEX).all()
            seen += len(one.names)
        assert seen == images * max(1, crops)
        assert [len(batches) for batches in shares] == [len(whole)] * world


def test_each_process_loads_its_own_samples_alone():
    """Every sample is loaded once by all processes together, and waits for no more than its batch."""
    loaded = []

    class Numbered(Dataset):
        sample_bytes = 1
        pairs = [type("Pair", (), {"name": str(number)})() for number in range(9)]

        def __getitem__(self, slots):
            loaded.extend((slot.image, slot.seed) for slot in slots)
            return [(str(slot.image), np.zeros((1, 2, 2), np.float32), np.zeros((2, 2), np.uint8)) for slot in slots]

    for rank in range(2):
        sampler = EpochSampler([(1,)] * 9, crops=4, quota=0, seed=0)
        deepest = 0
        for number, _ in enumerate(
            SharedBatches(Numbered(), sampler, batch=4, workers=0, pin=False, rank=rank, world=2), 1
        ):
            deepest = max(deepest, len(loaded) - 18 * rank - 2 * number)
        assert deepest <= 20
    assert len(loaded) == len(set(loaded)) == 36


# ---- losses ----

LOSSES = {
    "bce": ("bce", 1, None, 0),
    "weighted": ("bce", 1, [0.3, 2.0], 0),
    "smoothed": ("0.5*ce+dice", 3, [1.0, 2.0, 0.5], 0.1),
    "focal": ("focal(gamma=2)", 3, None, 0),
    "dice": ("dice", 1, None, 0),
    "dice of classes": ("dice", 3, None, 0),
    "jaccard": ("jaccard", 3, None, 0),
    "tversky": ("tversky(alpha=0.3, beta=0.7)", 1, None, 0),
    "all": ("0.3*ce+0.7*dice+0.2*jaccard+focal", 3, [1.0, 2.0, 0.5], 0),
}


def write_tensors(folder, world):
    """Logits and masks of five images, of which the processes count different numbers of pixels."""
    rng, tensors = torch.Generator().manual_seed(0), {}
    for num_logits in (1, 3):
        logits = torch.randn(5, num_logits, 8, 8, generator=rng) * 2
        mask = torch.randint(0, max(2, num_logits), (5, 8, 8), generator=rng)
        mask[0, :7] = mask[3, :2] = IGNORE_INDEX
        if world == 3:
            mask[4:] = IGNORE_INDEX  # the last of three counts none at all
        mask[:3][mask[:3] == num_logits - 1] = 0  # this class is in the part of the last ones only
        tensors[str(num_logits)] = (logits, mask)
    torch.save(tensors, folder / f"tensors{world}")
    content = {"losses": LOSSES, "tensors": str(folder / f"tensors{world}")}
    (folder / f"out{world}").write_text(json.dumps(content))
    return ["gradients", str(folder / f"out{world}")]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_the_mean_gradient_over_processes_is_that_of_one(runs, name, world):
    folder, statuses = runs
    assert statuses[f"gradients{world}"] == [0] * world, said(folder, f"gradients{world}", 0, 2)
    tensors = torch.load(folder / f"tensors{world}", weights_only=True)
    results = [torch.load(folder / f"out{world}.{rank}", weights_only=True)[name] for rank in range(world)]
    expression, num_logits, weights, smoothing = LOSSES[name]
    weights = torch.tensor(weights) if weights else None
    loss = build_loss(expression, num_logits=num_logits, class_weights=weights, label_smoothing=smoothing)
    logits, mask = tensors[str(num_logits)]
    logits = logits.clone().requires_grad_()
    value = loss(logits, mask)
    value.backward()
    for theirs, _ in results:
        torch.testing.assert_close(theirs, value.detach())
    torch.testing.assert_close(torch.cat([gradient for _, gradient in results]), logits.grad)
    means = [loss(logits[part], mask[part]).item() for part in (slice(0, 3), slice(3, 5))]
    assert abs(np.mean(means) - value.item()) > 1e-5  # the mean of the processes' losses would be another


# ---- scores ----


class Recorded(processes.Processes):
    """One of several processes, of which each is evaluated in turn, and then again with what all of them gave."""

    def __init__(self, rank, world, given):
        self.rank, self.world, self.given = rank, world, given

    def gather(self, value):
        if len(self.given) < self.world:
            self.given.append(copy.deepcopy(value))
        return copy.deepcopy(self.given)


@pytest.mark.parametrize("world", [2, 3, 9])
def test_images_are_scored_once_by_all_processes(tmp_path, world):
    pairs = find_split(
        write_split(tmp_path / "split", "abcdefg", sizes=((32, 32), (40, 36))), None, FileOptions()
    ).pairs
    config = make_config(batch=3)
    data = EvaluationSet(pairs, ClassMap.from_config(config), config)

    def forward(images):
        return 1 / (1 + np.exp(-images[:, :1].astype(np.float64))).astype(np.float32)

    options = {"workers": 0, "empty": "skip", "loss": build_loss("dice", num_logits=1), "keep_worst": 3}
    one, given = evaluation.score_set(forward, data, **options), []
    for rank in range(world):
        evaluation.score_set(forward, data, **options, processes=Recorded(rank, world, given))
    assert [len(scorer.names) for _, scorer in given] == [
        len(part_of_set(data, rank, world).pairs) for rank in range(world)
    ]
    shown = []
    for rank in range(world):
        several = evaluation.score_set(forward, data, **options, processes=Recorded(rank, world, given))
        assert several.loss == one.loss and several.summary == one.summary
        assert several.scorer.names == one.scorer.names == [pair.name for pair in pairs]
        evaluation.shared_panels(several.worst, config, Recorded(rank, world, shown), 3)
    panels = evaluation.shared_panels([], config, Recorded(0, world, shown), 3)
    expected = evaluation.worst_panels(one.worst, config)
    assert len(panels) == 3 and all(np.array_equal(a, b) for a, b in zip(panels, expected, strict=True))


# ---- whole runs ----

# Rounding grows in training: Adam makes a whole step of a gradient that is nothing but rounding, and a ReLU that it
# turns changes gradients at once. One process that computes each batch in halves differs from itself by as much.
SGD = ["--optim", "SGD", "-lr", 0.01]
RUNS = {  # images, words
    "bce": (7, ["--loss", "bce", "-b", 3]),  # batches of 3, 3, 1: one process has nothing of the last
    "dice": (8, ["--loss", "dice", "-b", 4, "-sc", "constant", *SGD]),
    "more": (
        7,
        ["--loss", "0.5*ce+0.5*jaccard", "-b", 3, "--ema", 0.9, "--freeze-encoder", 1, "--accumulate", 2, *SGD],
    ),
}
GATHERED = ["--loss", "dice", "-b", 3, "--encoder", "plain-8", *SGD]  # batches of 3, 3, 2: parts differ
LONGER = {
    f"{loss}-{images}-{batch}": (images, ["--loss", loss, "-b", batch, *more, *SGD])
    for loss in ("bce", "dice", "jaccard", "tversky", "focal", "0.3*ce+0.7*dice")
    for images, batch, more in ((7, 4, ["--clip", 0.1]), (8, 3, ["--crops", 3]), (8, 8, ["--encoder-lr-scale", 0.1]))
}


def write_data(folder):
    """Data sets of 7 and 8 images, of each of which another part counts."""
    data = {images: write_dataset(folder / f"data{images}", images, 7) for images in (7, 8)}
    for root in data.values():
        for place, path in enumerate(sorted((root / "train" / "gt").iterdir())):
            write_roi(root / "train" / "fov" / path.name, place)
        for path in (root / "val" / "gt").iterdir():
            write_roi(root / "val" / "fov" / path.name, 1)
    return data


def pairs_of_runs(data, logs, runs, worlds):
    """Jobs that train the same with different numbers of processes."""
    return {
        f"{name}{world}": (world, words_for(data[images], logs, f"{name}{world}", *words, "--roi-dir", "fov"))
        for name, (images, words) in runs.items()
        for world in worlds
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    data, logs = write_data(folder), folder / "logs"
    jobs = {f"gradients{world}": (world, write_tensors(folder, world)) for world in (2, 3)}
    jobs |= pairs_of_runs(data, logs, RUNS, (1, 2))
    again = words_for(data[8], logs, "resumed", *RUNS["dice"][1], "--roi-dir", "fov")
    jobs["resumed2"] = (2, [*again, "-e", "2"])
    jobs["resumed1"] = (1, again)
    once = [*words_for(data[7], logs, "batchnorm", "-b", 3), "-e", "1"]
    jobs["batchnorm"] = (2, [*once, "--encoder", "plain-8", "-w", "2"])
    for world, more in ((1, []), (2, ["--sync-bn"])):
        gathered = words_for(data[8], logs, f"gathered{world}", *GATHERED, "--roi-dir", "fov", *more)
        jobs[f"gathered{world}"] = (world, gathered)
    jobs["apart2"] = (2, [*words_for(data[8], logs, "apart2", *GATHERED, "--roi-dir", "fov"), "-e", "1"])
    jobs["few"] = (2, words_for(data[7], logs, "few", "-b", 1))
    jobs["unknown"] = (2, words_for(data[7], logs, "unknown", "--loss", "nothing"))
    jobs["misspelt"] = (2, words_for(data[7], logs, "misspelt", "--los", "bce"))
    for name in ("broken", "killed"):
        jobs[name] = (2, [name, *words_for(data[7], logs, name, "-b", 3)])
    jobs["late"] = (2, ["late", *words_for(data[7], logs, "late", "-b", 3), "-e", "1"])
    return folder, start(folder, jobs)


def write_roi(path, place):
    from image_io import write_mask

    roi = np.zeros((32, 32), np.uint8)
    roi[: 32 - 4 * place] = 255
    write_mask(path, roi)


def read_rows(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("seconds", "waited")} for row in rows]


SCORES = ("iou", "dice", "classes", "best")  # ratios of numbers of pixels


def assert_near(ours, theirs, where=""):
    """Everything the same, numbers to 1e-4, scores to two of some 1300 object pixels, which may round."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert list(ours) == list(theirs), where
        for key in ours:
            assert_near(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), where
        for place, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_near(a, b, f"{where}/{place}")
    elif isinstance(ours, torch.Tensor) and ours.dtype != torch.uint8:
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0, msg=where)
    elif isinstance(ours, float):
        counted = any(part in SCORES for part in where.split("/"))
        assert ours == pytest.approx(theirs, abs=1.5e-3 if counted else 1e-4), where


def assert_same_run(logs, ours, theirs):
    assert len(read_rows(logs / ours)) == 3
    assert_near(read_rows(logs / ours), read_rows(logs / theirs))
    first, second = (torch.load(logs / name / "last_checkpoint", weights_only=True) for name in (ours, theirs))
    for key in ("model_state_dict", "ema_state_dict", "progress"):
        assert_near(
            {k: v for k, v in first[key].items() if k != "seconds"},
            {k: v for k, v in second[key].items() if k != "seconds"},
            key,
        )


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(runs, name):
    folder, statuses = runs
    assert statuses[f"{name}1"] == [0] and statuses[f"{name}2"] == [0, 0], said(folder, f"{name}2", 0, 2)
    assert_same_run(folder / "logs", f"{name}1", f"{name}2")


def test_gathered_statistics_make_batch_normalisation_that_of_one_process(runs):
    folder, statuses = runs
    assert statuses["gathered1"] == [0] and statuses["gathered2"] == [0, 0], said(folder, "gathered2", 0, 2)
    assert_same_run(folder / "logs", "gathered1", "gathered2")
    with pytest.raises(AssertionError):  # without them it is another
        assert_near(*(read_rows(folder / "logs" / name)[:1] for name in ("gathered1", "apart2")))


@pytest.mark.slow
def test_more_processes_and_losses_train_as_one(tmp_path):
    data, logs = write_data(tmp_path), tmp_path / "logs"
    statuses = start(tmp_path, pairs_of_runs(data, logs, LONGER, (1, 2, 3)))
    for name in LONGER:
        for world in (2, 3):
            assert statuses[f"{name}{world}"] == [0] * world, said(tmp_path, f"{name}{world}", 0, 2)
            assert_same_run(logs, f"{name}1", f"{name}{world}")


@pytest.mark.slow
def test_folds_are_trained_by_several_processes(tmp_path):
    root, logs = write_data(tmp_path)[8] / "train", tmp_path / "logs"
    jobs = {
        f"cv{world}": (world, words_for(root, logs, f"cv{world}", "-b", 3, "--folds", 2, "--loss", "bce"))
        for world in (1, 2)
    }
    assert start(tmp_path, jobs) == {"cv1": [0], "cv2": [0, 0]}, said(tmp_path, "cv2", 0, 2)
    for fold in (0, 1):
        one, two = sorted(path for path in logs.iterdir() if path.name.endswith(str(fold)))
        assert_near(read_rows(one), read_rows(two))
    assert said(tmp_path, "cv2", 0, 1).count("every image scored by the network that was not shown it") == 1


def test_a_run_goes_on_with_another_number_of_processes(runs):
    folder, statuses = runs
    assert statuses["resumed2"] == [0, 0] and statuses["resumed1"] == [0]
    assert_same_run(folder / "logs", "dice1", "resumed")


def test_the_first_process_alone_speaks_and_writes(runs):
    folder, _ = runs
    assert said(folder, "bce2", 0, 1).count("epoch 3/3") == 1 and "2 processes" in said(folder, "bce2", 0, 1)
    assert said(folder, "bce2", 1, 1) == said(folder, "bce2", 1, 2) == ""
    one, two = (
        sorted(path.name.split(".")[0].replace(name, "") for path in (folder / "logs" / name).iterdir())
        for name in ("bce1", "bce2")
    )
    assert one == two and "last_checkpoint" in two


def test_batch_normalisation_learns_from_each_process_alone(runs):
    folder, statuses = runs
    assert statuses["batchnorm"] == [0, 0], said(folder, "batchnorm", 0, 2)
    (row,) = read_rows(folder / "logs" / "batchnorm")
    assert np.isfinite(row["train"]["loss"])


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("few", 2, "-b 1 is the batch of all 2 processes together"),
        ("unknown", 2, "unknown name 'nothing'"),
        ("misspelt", 2, "unrecognized arguments: --los bce"),
    ],
)
def test_wrong_flags_are_said_once(runs, name, status, message):
    folder, statuses = runs
    assert statuses[name][0] == status and message in said(folder, name, 0, 2)
    assert said(folder, name, 1, 1) == said(folder, name, 1, 2) == ""


def test_an_error_of_one_process_ends_all_with_its_message(runs):
    folder, statuses = runs
    assert statuses["broken"] == [1, 1]
    assert "b6.png: broken in the middle of the run" in said(folder, "broken", 1, 2)
    assert said(folder, "broken", 0, 2) == ""
    assert len(read_rows(folder / "logs" / "broken")) == 1


def test_an_error_after_the_last_epoch_is_not_put_on_those_that_are_done(runs):
    folder, statuses = runs
    assert statuses["late"] == [1, 1]
    assert said(folder, "late", 0, 2).strip().endswith("error: the best network cannot be scored again")


def test_a_killed_process_ends_all(runs):
    folder, statuses = runs
    assert statuses["killed"] == [1, -9]
    message = said(folder, "killed", 0, 2)
    assert "error: process 1 (pid " in message and ") of 2 ended without a word: killed, or" in message
    assert "the same command goes on from the last finished epoch" in message and message.count("error") == 1
    run = folder / "logs" / "killed"
    assert len(read_rows(run)) == torch.load(run / "last_checkpoint", weights_only=True)["epoch"] == 1
    assert not list(run.glob(".*"))


# ---- what is refused, and what DDP must know ----


def options_of(**changes):
    words = {"batch": 4, "sync_bn": False, "lr_find": False}
    return type("Args", (), words | changes)()


def several(world=2):
    team = processes.Processes()
    team.world = team.on_machine = world
    return team


@pytest.mark.parametrize(
    ("device", "world", "changes", "message"),
    [
        ("cpu", 1, {"sync_bn": True}, "start them with torchrun"),
        ("mps", 2, {}, "each process takes a GPU of its own"),
        ("cuda:1", 2, {}, "each process takes a GPU of its own"),
        ("cuda", 99, {"batch": 99}, "99 processes on a machine with"),
        ("cpu", 5, {}, "give -b 5 or more"),
    ],
)
def test_what_processes_cannot_do_is_refused(device, world, changes, message):
    with pytest.raises(UsageError, match=message):
        train_options.check_processes(options_of(**changes), device, several(world))


def test_loader_processes_are_divided():
    assert [several(world).workers(wanted) for world, wanted in ((1, 5), (2, 4), (2, 5), (4, 1), (2, 0))] == [
        5,
        2,
        3,
        1,
        0,
    ]


def test_weights_that_nothing_uses_are_noticed():
    used = build_model("plain-unet", "plain-8", in_channels=3, num_logits=1)
    assert not has_idle_weights(used, (3, 32, 32)) and used.training
    used.spare = torch.nn.Linear(2, 2)
    assert has_idle_weights(used, (3, 32, 32))


# ---- a killed process ----


@pytest.mark.slow
def test_torchrun_ends_when_a_process_is_killed(tmp_path):
    data = write_dataset(tmp_path / "data", 7, 3)
    words = [*words_for(data, tmp_path / "logs", "run", "-b", 3), "-e", "1000"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    with (tmp_path / "out").open("w") as out:
        torchrun = subprocess.Popen([*command, "train.py", *words], cwd=ROOT, stdout=out, stderr=out)
    try:
        wait_for(lambda: "epoch 2/1000" in (tmp_path / "out").read_text() or torchrun.poll() is not None)
        import psutil

        children = psutil.Process(torchrun.pid).children()
        (victim,) = [child for child in children if child.environ().get("RANK") == "1"]
        victim.kill()
        assert torchrun.wait(timeout=60) == 1
    finally:
        torchrun.kill()
    text = (tmp_path / "out").read_text()
    assert f"train.py: error: process 1 (pid {victim.pid}) of 2 ended without a word" in text
    assert "the same command goes on from the last finished epoch" in text and text.count("train.py: error") == 1
    assert not list((tmp_path / "logs" / "run").glob(".*"))
    epochs = [row["epoch"] for row in read_rows(tmp_path / "logs" / "run")]
    saved = torch.load(tmp_path / "logs" / "run" / "last_checkpoint", weights_only=True)["epoch"]
    assert epochs == list(range(1, len(epochs) + 1)) and saved in (len(epochs), len(epochs) - 1)


def wait_for(condition, seconds=120):
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds
        time.sleep(0.05)
