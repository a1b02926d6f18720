"""predict.py from the command line: what it writes agrees, survives being killed, and says what is wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from discs import write_split
from tiny_runs import blobs, write_checkpoint, write_slide

import predict
import trainer
import validate
from backends import load_forward
from classes import ClassMap
from dataset import EvaluationSet
from image_io import read_image, read_mask, write_mask
from image_io import write_image as save
from pairing import FileOptions

ROOT = Path(__file__).resolve().parent.parent
ALL = "mask,prob,overlay,labels,geojson,rle"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """TensorBoard's files go to ./logs by default: keep that out of the repository."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with one checkpoint of one class."""
    folder = tmp_path_factory.mktemp("run")
    write_checkpoint(folder / "best.pth")
    return folder


def flags(run, images, out, *more):
    words = ["-cd", run, "-i", *([images] if isinstance(images, (str, Path)) else images), "-o", out]
    return [str(word) for word in (*words, "--backend", "torch", "--cpu", "--thumbnails", 0, *more)]


def go(run, images, out, *more):
    predict.main(flags(run, images, out, *more))
    return out


def stopped(code, capsys, *words):
    """What is printed to stderr before the command ends with a status."""
    with pytest.raises(SystemExit) as stop:
        predict.main([str(word) for word in words])
    captured = capsys.readouterr()
    assert stop.value.code == code, captured
    assert "Traceback" not in captured.err
    return captured.err


def content(folder):
    """Bytes of every file of a folder but the record of what was done when."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "predict.jsonl"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def hidden(folder):
    return [path.name for path in folder.rglob("*") if path.name.startswith(".")]


# ---- killed and started again ----


def in_child(job):
    """Run a function in a child process; return its exit status, or minus the signal that ended it."""
    number = os.fork()
    if number == 0:
        status = 70
        try:
            job()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        finally:
            os._exit(status)
    _, status = os.waitpid(number, 0)
    return os.waitstatus_to_exitcode(status)


def killed_at(moment, words, report=None):
    """Run predict.py in a child that gets SIGKILL at its n-th step; a step is a call of the network or of the disk."""
    seen = 0

    def step(function):
        def counted(*args, **keywords):
            nonlocal seen
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **keywords)

        return counted

    def job():
        import backends
        import spool

        sys.stdout = sys.stderr = Path(os.devnull).open("w")
        load = backends.load_forward

        def load_counted(*args, **keywords):
            config, forward, note = load(*args, **keywords)
            return config, step(forward), note

        backends.load_forward = load_counted
        for name in ("fsync", "replace", "unlink", "rmdir"):
            setattr(os, name, step(getattr(os, name)))
        spool.write_all = step(spool.write_all)
        predict.main(words)
        if report:
            report.write_text(str(seen))

    return in_child(job)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    "how",
    [
        ["--save", ALL, "--format", "ome", "--closing", "3", "--min-area", "20", "--fill-holes", "30"],
        pytest.param(["--save", ALL, "--format", "flat", "--relative-area", "4"], marks=pytest.mark.slow),
        pytest.param(["--save", ALL, "--format", "png"], marks=pytest.mark.slow),
    ],
    ids=["ome", "flat", "png"],
)
def test_killed_at_any_step_the_files_become_the_same(tmp_path, run, how):
    image = write_slide(tmp_path / "slide.tif", blobs(1100, 90, seed=3))
    assert killed_at(0, flags(run, image, tmp_path / "whole", *how), tmp_path / "steps") == 0
    expected, steps = content(tmp_path / "whole"), int((tmp_path / "steps").read_text())
    assert steps > 30 and not hidden(tmp_path / "whole")
    rng = np.random.default_rng(len(how))
    late = steps - np.array([1, 2, 4, 8, 13, 21])  # while files are finished and the working folder is removed
    moments = [*rng.integers(2, steps, 4).tolist(), int(rng.choice(late))]
    for number, moment in enumerate(moments):
        out = tmp_path / f"killed{number}"
        words = flags(run, image, out, *how)
        assert killed_at(moment, words) == -signal.SIGKILL
        again = int(rng.integers(2, steps // 2))
        if number % 2:
            killed_at(again, words)  # a second time, while it goes on
        assert in_child(lambda words=words: quiet(words)) == 0
        found = content(out)
        if how[-1] == "png":  # a small file that was being written stays for an hour, for it may be another command's
            found = {name: data for name, data in found.items() if not name.endswith(".tmp")}
        others = {name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)}
        assert not others, f"killed at {moment} and {again}"
        assert how[-1] == "png" or not hidden(out), f"killed at {moment} and {again}"


def quiet(words):
    sys.stdout = sys.stderr = Path(os.devnull).open("w")
    predict.main(words)


@pytest.mark.slow
def test_killed_at_random_times_the_files_become_the_same(tmp_path, run):
    image = write_slide(tmp_path / "slide.tif", blobs(3000, 700, seed=5), tile=128)
    how = ["--save", ALL, "--format", "ome", "--min-area", "20", "--closing", "3"]

    def start(out):
        words = [sys.executable, str(ROOT / "predict.py"), *flags(run, image, out, *how)]
        return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    begin = time.monotonic()
    whole = start(tmp_path / "whole")
    while not (tmp_path / "whole" / "predict.jsonl").exists() and whole.poll() is None:
        time.sleep(0.01)
    ready = time.monotonic()
    assert whole.wait() == 0, whole.stderr.read()
    length = time.monotonic() - ready
    assert length > 1, f"{ready - begin:.1f} s to start and only {length:.2f} s of work to be killed in"
    out, kills = tmp_path / "killed", 0
    for part in np.random.default_rng(1).uniform(0.05, 0.9, 5):
        process = start(out)
        time.sleep(ready - begin + part * length)
        process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 3
    last = start(out)
    assert last.wait() == 0, last.stderr.read()
    assert content(out) == content(tmp_path / "whole") and not hidden(out)


def test_ctrl_c_is_said_and_the_run_goes_on(tmp_path, run, capsys, monkeypatch):
    image = write_slide(tmp_path / "slide.tif", blobs(1300, 150, seed=3))
    import results

    add, calls = results.Results.add, []

    def interrupted(self, probs):
        add(self, probs)
        calls.append(1)
        if len(calls) == 15:
            raise KeyboardInterrupt

    monkeypatch.setattr(results.Results, "add", interrupted)
    words = flags(run, image, tmp_path / "out", "--format", "ome")
    error = stopped(130, capsys, *words)
    assert "interrupted; the same command goes on where it stopped" in error
    predict.main(words)
    assert "going on at row 512 of 1300" in capsys.readouterr().out
    monkeypatch.undo()
    os.chdir(tmp_path)
    go(run, image, tmp_path / "whole", "--format", "ome")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


# ---- the same counts everywhere ----


def scored_dataset(root, classes):
    """Images larger than a tile with a region of interest, and one whose corner is declared as no data."""
    labels = (0, 1) if classes == 1 else (0, 10, 20, 30)
    write_split(root, ["a", "b"], labels=labels, sizes=((150, 170), (70, 201)))
    for path in (root / "images").iterdir():
        region = np.zeros(read_image(path).shape[:2], np.uint8)
        region[20:60, 10:] = 255
        write_mask(root / "roi" / f"{path.stem}.png", region)
    pixels = blobs(100, 130, seed=9)
    pixels[:40, :50] = 7
    write_slide(root / "images" / "n.tif", pixels, extratags=[(42113, "s", 0, "7", True)])
    truth = np.array(labels)[np.random.default_rng(1).integers(0, len(labels), (100, 130))]
    write_mask(root / "gt" / "n.png", truth.astype(np.uint8))
    write_mask(root / "roi" / "n.png", np.full((100, 130), 255, np.uint8))
    return root


@pytest.mark.parametrize("classes", [1, 4])
def test_training_validation_and_files_give_the_same_counts(tmp_path, classes, capsys):
    data = scored_dataset(tmp_path / "data", classes)
    config = write_checkpoint(tmp_path / "run" / "best.pth", classes=classes, roi_dir="roi")
    _, forward, _ = load_forward(tmp_path / "run" / "best.pth", "cpu")
    listing = FileOptions(roi_dir="roi").listing(data)
    evaluation = EvaluationSet(listing.pairs, ClassMap.from_config(config), config)
    trained = trainer.build_scorer(config)
    trainer.evaluate(trainer.predict_samples(forward, evaluation, workers=0), trained)

    run = ["-cd", tmp_path / "run", "-d", data, "--cpu", "--backend", "torch"]
    validate.main([str(word) for word in (*run, "-w", 0, "-o", tmp_path / "validated")])
    validated = json.loads((tmp_path / "validated" / "_metrics.json").read_text())

    predict.main([str(word) for word in (*run, "-o", tmp_path / "predicted", "--thumbnails", 0)])
    files = trainer.build_scorer(config)
    values = [0, *config.labels]
    for sample in evaluation:
        written = read_mask(tmp_path / "predicted" / "masks" / f"{sample.pair.name}.png")
        files.update_pred(sample.pair.name, np.searchsorted(values, written).astype(np.uint8), sample.mask.numpy())
    assert (trained.confusion.sum(axis=0) > 0).sum() > 1, "one class alone would prove little"
    np.testing.assert_array_equal(files.confusion, trained.confusion)
    np.testing.assert_array_equal(validated["confusion"], trained.confusion)


def test_nodata_is_background_in_the_files(tmp_path, run):
    pixels = blobs(100, 130, seed=9)
    pixels[:40, :50] = 7
    write_slide(tmp_path / "n.tif", pixels, extratags=[(42113, "s", 0, "7", True)])
    go(run, tmp_path / "n.tif", tmp_path / "out", "-t", "0", "--save", "mask,prob")
    mask = read_mask(tmp_path / "out" / "masks" / "n.png")
    assert (read_image(tmp_path / "out" / "raw" / "n.png")[:40, :50] == 0).all()
    assert mask[40:, 50:].all()


# ---- before and beside ----


def test_a_dry_run_counts_the_windows_and_writes_nothing(tmp_path, run, capsys, monkeypatch):
    image = write_slide(tmp_path / "slide.tif", blobs(500, 333))
    before = sorted(tmp_path.rglob("*"))
    go(run, image, tmp_path / "out", "--dry-run", "--tile-size", 96, "--tta", "flips")
    text = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    row = next(line for line in text.splitlines() if line.startswith("slide "))
    assert "500x333" in row
    windows = int(row.split()[2])
    import predictor

    seen, original = [], predictor.predict_bands

    def counted(read, forward, *args, **keywords):
        def call(batch):
            seen.append(len(batch))
            return forward(batch)

        return original(read, call, *args, **keywords)

    monkeypatch.setattr(predictor, "predict_bands", counted)
    go(run, image, tmp_path / "out", "--tile-size", 96, "--tta", "flips")
    assert sum(seen) == 4 * windows


def test_a_dry_run_names_what_cannot_be_read(tmp_path, run, capsys):
    write_slide(tmp_path / "in" / "good.tif", blobs(90, 70))
    (tmp_path / "in" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nrest")
    error = stopped(1, capsys, *flags(run, tmp_path / "in", tmp_path / "out", "--dry-run"))
    assert "1 finding," in error and "bad.png" in error and not (tmp_path / "out").exists()


def test_a_full_disk_is_seen_before_the_network_runs(tmp_path, run, capsys, monkeypatch):
    import shutil

    image = write_slide(tmp_path / "slide.tif", blobs(300, 200))
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=1000))
    error = stopped(1, capsys, *flags(run, image, tmp_path / "out", "--format", "ome"))
    assert "MB are needed for slide, 0.0 MB are free; make room" in error and str(tmp_path / "out") in error
    monkeypatch.undo()
    os.chdir(tmp_path)
    go(run, image, tmp_path / "out", "--format", "ome")


def test_a_disk_that_fills_stops_the_run_and_the_next_goes_on(tmp_path, run, capsys, monkeypatch):
    import errno

    import spool

    for name in "ab":
        write_slide(tmp_path / "in" / f"{name}.tif", blobs(1300, 120, seed=ord(name)))
    words = flags(run, tmp_path / "in", tmp_path / "out", "--format", "ome", "--save", "mask,prob")
    real, written = spool.write_all, []

    def fill(handle, data):
        written.append(len(data))
        if len(written) > 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle, data)

    monkeypatch.setattr(spool, "write_all", fill)
    error = stopped(1, capsys, *words)
    assert "No space left on device" in error and "make room, then run the same command again" in error
    assert ".a.partial" in error and "findings" not in error, "the run ends with the first"
    assert (tmp_path / "out" / ".a.partial").is_dir()
    monkeypatch.undo()
    os.chdir(tmp_path)
    predict.main(words)
    assert "a: going on at row 512 of 1300" in capsys.readouterr().out
    go(run, tmp_path / "in", tmp_path / "whole", "--format", "ome", "--save", "mask,prob")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_full_disk_under_a_png_says_what_to_do(tmp_path, run, capsys, monkeypatch):
    import errno

    import results

    for name in "ab":
        save(tmp_path / "in" / f"{name}.png", blobs(60, 50))

    def fail(path, image):
        raise OSError(errno.ENOSPC, "No space left on device; nothing was saved here", str(path))

    monkeypatch.setattr(results, "write_image", fail)
    error = stopped(1, capsys, *flags(run, tmp_path / "in", tmp_path / "out"))
    assert "a.png" in error and "make room, then run the same command again" in error and "b.png" not in error


# ---- what is in the way ----


def test_the_same_flags_again_do_nothing_and_other_flags_need_overwrite(tmp_path, run, capsys):
    image = write_slide(tmp_path / "a.tif", blobs(90, 80))
    out = go(run, image, tmp_path / "out", "--save", "mask,labels")
    first = content(out)
    capsys.readouterr()
    go(run, image, out, "--save", "mask,labels")
    assert "a: already done" in capsys.readouterr().out and content(out) == first
    error = stopped(2, capsys, *flags(run, image, out, "--save", "mask,labels", "-t", "0.4"))
    assert "results of other flags or files are in the way, first: " in error and "--overwrite" in error
    assert content(out) == first
    go(run, image, out, "--save", "mask,labels", "-t", "0.4", "--overwrite")
    assert content(out) != first
    go(run, image, out, "--save", "mask", "--format", "tiff", "--overwrite")
    assert [path.name for path in (out / "masks").iterdir()] == ["a.tif"], "one mask, not two that differ"


def test_another_kind_is_added_beside(tmp_path, run, capsys):
    image = write_slide(tmp_path / "a.tif", blobs(90, 80))
    out = go(run, image, tmp_path / "out", "--save", "mask,rle")
    go(run, image, out, "--save", "prob")
    capsys.readouterr()
    go(run, image, out, "--save", "mask,rle")
    assert "already done" in capsys.readouterr().out
    assert (out / "rle.csv").read_text().startswith("id,predicted\na,")


def test_a_touched_file_is_predicted_again_when_told(tmp_path, run, capsys):
    image = write_slide(tmp_path / "a.tif", blobs(90, 80))
    out = go(run, image, tmp_path / "out")
    write_slide(image, blobs(90, 80, seed=1))
    os.utime(image, ns=(1, 1))
    assert "in the way" in stopped(2, capsys, *flags(run, image, out))
    go(run, image, out, "--overwrite")


PLACES = ["masks/a.png", "masks/a.tif", "objects/a.csv", "rle/a.csv", "rle.csv", "predict.json"]


@pytest.mark.parametrize("place", PLACES)
def test_foreign_files_are_never_replaced(tmp_path, run, capsys, place):
    image = write_slide(tmp_path / "a.tif", blobs(90, 80))
    path = tmp_path / "out" / place
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    words = flags(run, image, tmp_path / "out", "--save", "mask,labels,rle")
    error = stopped(2, capsys, *words)
    assert str(path) in error and path.read_text() == "mine"
    predict.main([*words, "--overwrite"])
    assert not path.exists() or path.read_bytes() != b"mine"


def test_rle_of_all_runs_of_a_folder_are_merged(tmp_path, run):
    for name in ("b", "a"):
        image = write_slide(tmp_path / f"{name}.tif", blobs(60, 50, seed=ord(name)))
        go(run, image, tmp_path / "out", "--save", "rle")
    assert [line.split(",")[0] for line in (tmp_path / "out" / "rle.csv").read_text().splitlines()] == ["id", "a", "b"]
