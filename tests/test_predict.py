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
import tifffile
from discs import write_split
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import blobs, write_checkpoint, write_slide

import predict
import validate
from backends import load_forward
from checkpoint import Geometry
from classes import ClassMap
from dataset import EvaluationSet
from evaluation import build_scorer, evaluate, predict_samples
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

    def wait_for_work(process, out):
        while not (out / "predict.jsonl").exists() and process.poll() is None:
            time.sleep(0.005)
        return time.monotonic()

    whole = start(tmp_path / "whole")
    begin = wait_for_work(whole, tmp_path / "whole")
    assert whole.wait() == 0, whole.stderr.read()
    length, kills = time.monotonic() - begin, 0
    for number, part in enumerate(np.random.default_rng(1).uniform(0.02, 0.85, 5)):
        out = tmp_path / f"killed{number}"
        process = start(out)
        wait_for_work(process, out)
        time.sleep(part * length)
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        last = start(out)
        assert last.wait() == 0, last.stderr.read()
        assert content(out) == content(tmp_path / "whole") and not hidden(out), f"killed after {part:.2f} of the work"
    assert kills >= 3, "the others were done before they were killed"


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
    assert "a picture whose results become PNG begins anew" in error
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
    trained = build_scorer(config)
    evaluate(predict_samples(forward, evaluation, workers=0), trained)

    run = ["-cd", tmp_path / "run", "-d", data, "--cpu", "--backend", "torch"]
    validate.main([str(word) for word in (*run, "-w", 0, "-o", tmp_path / "validated")])
    validated = json.loads((tmp_path / "validated" / "_metrics.json").read_text())

    predict.main([str(word) for word in (*run, "-o", tmp_path / "predicted", "--thumbnails", 0)])
    files = build_scorer(config)
    values = [0, *config.labels]
    for sample in evaluation:
        written = read_mask(tmp_path / "predicted" / "masks" / f"{sample.pair.name}.png")
        files.update_pred(sample.pair.name, np.searchsorted(values, written).astype(np.uint8), sample.mask.numpy())
    assert (trained.confusion.sum(axis=0) > 0).sum() > 1, "one class alone would prove little"
    np.testing.assert_array_equal(files.confusion, trained.confusion)
    np.testing.assert_array_equal(validated["confusion"], trained.confusion)


@pytest.mark.parametrize("rule", ["none", "saturation"])
def test_slides_read_at_another_scale_give_the_same_counts(tmp_path, rule):
    geometry = Geometry("crops", (64, 64), 64, 16, 4, mpp=0.5)
    write_checkpoint(tmp_path / "run" / "best.pth", geometry=geometry, tissue=rule)
    pixels = np.full((500, 600, 3), 240, np.uint8)
    pixels[100:400, 200:500] = blobs(300, 300) // 2 + np.array([100, 0, 100], np.uint8)
    quarter = {"resolution": (4e4, 4e4), "resolutionunit": "CENTIMETER"}
    write_slide(tmp_path / "data" / "images" / "a.tif", pixels, **quarter)
    truth = blobs(500, 600, seed=4)[..., 0] // 128
    write_mask(tmp_path / "data" / "gt" / "a.png", truth)
    words = ["-cd", tmp_path / "run", "-d", tmp_path / "data", "--cpu", "--backend", "torch"]
    validate.main([str(word) for word in (*words, "-w", 0, "-o", tmp_path / "validated")])
    predict.main([str(word) for word in (*words, "-o", tmp_path / "predicted", "--thumbnails", 0)])
    found, wanted = read_mask(tmp_path / "predicted" / "masks" / "a.png"), truth[1::2, 1::2]
    counts = [[int(((wanted == i) & (found == j)).sum()) for j in (0, 1)] for i in (0, 1)]
    assert found.any() and json.loads((tmp_path / "validated" / "_metrics.json").read_text())["confusion"] == counts


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
    error = stopped(1, capsys, *flags(run, image, out, "--save", "mask,labels", "-t", "0.4"))
    assert ": error: 3 results of other flags or files are in the way, first: " in error
    assert "--overwrite" in error and "usage:" not in error
    error = stopped(1, capsys, *flags(run, image, out, "--save", "mask", "-t", "0.4"))
    assert f"error: 1 result of other flags or files is in the way: {out}" in error and "usage:" not in error
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


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.*") if path.parent != folder}


@pytest.mark.parametrize("form", ["png", "ome"])
def test_some_of_the_kinds_that_are_there_are_done(tmp_path, run, capsys, form):
    image = write_slide(tmp_path / "a.tif", blobs(90, 80))
    how = ["--format", form, "--min-area", 5]
    out = go(run, image, tmp_path / "out", "--save", "mask,prob,labels", *how)
    before = times(out)
    for kinds in ("mask", "prob", "labels,mask"):
        capsys.readouterr()
        go(run, image, out, "--save", kinds, *how)
        assert "a: already done" in capsys.readouterr().out and times(out) == before
    next((out / "raw").iterdir()).unlink()
    go(run, image, out, "--save", "mask", *how)
    assert "a: already done" in capsys.readouterr().out, "what is missing was not asked for"
    go(run, image, out, "--save", "mask,prob", *how)
    text = capsys.readouterr().out
    assert "a: mask there, prob missing: predicted again" in text and "already done" not in text
    assert "in the way: " in stopped(1, capsys, *flags(run, image, out, "--save", "mask", *how, "-t", "0.4"))


def test_more_kinds_than_there_are_become_those_of_one_run(tmp_path, run, capsys):
    image = write_slide(tmp_path / "a.tif", blobs(90, 80))
    whole = go(run, image, tmp_path / "whole", "--save", "mask,labels,geojson,rle")
    out = go(run, image, tmp_path / "out", "--save", "labels")
    for kinds in ("geojson", "mask,geojson", "rle,labels,mask"):
        go(run, image, out, "--save", kinds)
    assert content(out) == content(whole)
    capsys.readouterr()
    go(run, image, out, "--save", "mask,labels,geojson,rle")
    assert "a: already done" in capsys.readouterr().out, "kinds of several runs are there together"
    (out / "raw").mkdir()
    (out / "raw" / "a.png").write_text("mine")
    error = stopped(1, capsys, *flags(run, image, out, "--save", "mask,prob"))
    assert f"1 result of other flags or files is in the way: {out / 'raw' / 'a.png'}" in error
    assert (out / "raw" / "a.png").read_text() == "mine"


def test_a_killed_run_of_more_kinds_leaves_none_of_them_done(tmp_path, run, capsys, monkeypatch):
    import results

    image = write_slide(tmp_path / "a.tif", blobs(90, 80))
    out = go(run, image, tmp_path / "out", "--save", "mask,prob")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(results.Results, "add", interrupted)
    stopped(130, capsys, *flags(run, image, out, "--save", "mask,labels"))
    monkeypatch.undo()
    os.chdir(tmp_path)
    go(run, image, out, "--save", "prob")
    assert "a: already done" in capsys.readouterr().out
    go(run, image, out, "--save", "mask")
    assert "already done" not in capsys.readouterr().out, "nobody knows which run wrote it"


def test_a_touched_file_is_predicted_again_when_told(tmp_path, run, capsys):
    image = write_slide(tmp_path / "a.tif", blobs(90, 80))
    out = go(run, image, tmp_path / "out")
    write_slide(image, blobs(90, 80, seed=1))
    os.utime(image, ns=(1, 1))
    assert "in the way" in stopped(1, capsys, *flags(run, image, out))
    go(run, image, out, "--overwrite")


PLACES = ["masks/a.png", "masks/a.tif", "objects/a.csv", "rle/a.csv", "rle.csv", "predict.json"]


@pytest.mark.parametrize("place", PLACES)
def test_foreign_files_are_never_replaced(tmp_path, run, capsys, place):
    image = write_slide(tmp_path / "a.tif", blobs(90, 80))
    path = tmp_path / "out" / place
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    words = flags(run, image, tmp_path / "out", "--save", "mask,labels,rle")
    error = stopped(1, capsys, *words)
    assert str(path) in error and path.read_text() == "mine"
    predict.main([*words, "--overwrite"])
    assert not path.exists() or path.read_bytes() != b"mine"


def test_rle_of_all_runs_of_a_folder_are_merged(tmp_path, run):
    for name in ("b", "a"):
        image = write_slide(tmp_path / f"{name}.tif", blobs(60, 50, seed=ord(name)))
        go(run, image, tmp_path / "out", "--save", "rle")
    assert [line.split(",")[0] for line in (tmp_path / "out" / "rle.csv").read_text().splitlines()] == ["id", "a", "b"]


# ---- bad input ----


def break_tile(path, number):
    """Overwrite the bytes of one tile with nonsense."""
    with tifffile.TiffFile(path) as tif:
        offset, count = tif.pages[0].dataoffsets[number], tif.pages[0].databytecounts[number]
    data = bytearray(path.read_bytes())
    data[offset : offset + count] = b"\xff" * count
    path.write_bytes(data)


@pytest.mark.parametrize("form", ["png", "ome"])
def test_a_damaged_tile_is_named_and_the_rest_is_done(tmp_path, run, capsys, form):
    pixels = blobs(300, 260, seed=2)
    good, bad = (write_slide(tmp_path / name / "slide.tif", pixels) for name in ("good", "bad"))
    break_tile(bad, 7)  # row 1, column 2
    words = flags(run, bad, tmp_path / "out", "--save", "mask,prob", "--format", form)
    error = stopped(1, capsys, *words)
    assert error.count("bad/slide.tif") == 1 and "1 finding, the rest is done" in error
    assert "row 1, column 2" in error and "64" in error
    go(run, good, tmp_path / "whole", "--save", "mask,prob", "--format", form)
    suffix = ".png" if form == "png" else ".ome.tif"
    found, whole = (read_image(tmp_path / name / "raw" / f"slide{suffix}")[..., 0] for name in ("out", "whole"))
    assert (found[64:128, 128:192] == 0).all(), "what cannot be decoded is background"
    far = np.ones((300, 260), bool)
    far[:200, 60:260] = False  # tiles that saw the hole
    np.testing.assert_array_equal(found[far], whole[far])
    capsys.readouterr()
    error = stopped(1, capsys, *words)
    assert "row 1, column 2" in error, "it is tried again"
    bad.write_bytes(good.read_bytes())
    assert "in the way" in stopped(1, capsys, *words)
    predict.main([*words, "--overwrite"])
    np.testing.assert_array_equal(read_image(tmp_path / "out" / "raw" / f"slide{suffix}")[..., 0], whole)


def test_fill_decides_what_the_network_sees_in_a_hole(tmp_path, run, capsys):
    bad = write_slide(tmp_path / "slide.tif", blobs(300, 260, seed=2))
    break_tile(bad, 7)
    found = []
    for value in ("0", "120", None):
        words = flags(run, bad, tmp_path / str(value), "--save", "prob", *(["--fill", value] if value else []))
        stopped(1, capsys, *words)
        found.append(read_image(tmp_path / str(value) / "raw" / "slide.png"))
    assert (found[0] != found[1]).any()
    np.testing.assert_array_equal(found[1], found[2])  # the mean of training is the default
    error = stopped(1, capsys, *flags(run, bad, tmp_path / "x", "--fill", "300"))
    assert "fill [300.0, 300.0, 300.0] does not fit" in error and "slide.tif" in error


def test_damage_that_a_killed_run_met_is_not_forgotten(tmp_path, run, capsys, monkeypatch):
    import results

    bad = write_slide(tmp_path / "slide.tif", blobs(1300, 120, seed=2))
    break_tile(bad, 1)
    words = flags(run, bad, tmp_path / "out", "--format", "ome")
    add, calls = results.Results.add, []

    def interrupted(self, probs):
        add(self, probs)
        calls.append(1)
        if len(calls) == 16:
            raise KeyboardInterrupt

    monkeypatch.setattr(results.Results, "add", interrupted)
    stopped(130, capsys, *words)
    monkeypatch.undo()
    os.chdir(tmp_path)
    error = stopped(1, capsys, *words)
    assert "row 0, column 1" in error


def test_broken_files_in_a_folder_are_named_once_and_the_rest_is_done(tmp_path, run, capsys):
    folder = tmp_path / "in"
    for name in "abc":
        save(folder / f"{name}.png", blobs(60, 50))
    whole = (folder / "b.png").read_bytes()
    (folder / "b.png").write_bytes(whole[: len(whole) // 2])
    slide = write_slide(folder / "d.tif", blobs(200, 150))
    slide.write_bytes(slide.read_bytes()[:-9000])
    write_slide(folder / "e.tif", blobs(90, 80, channels=1)[..., 0], photometric="minisblack")
    error = stopped(1, capsys, *flags(run, folder, tmp_path / "out", "--save", "mask,rle"))
    assert [error.count(f"{name}.") for name in ("b", "e")] == [1, 1]
    assert "e.tif has 1 channels, the network takes 3 (red green blue); convert the image" in error
    done = sorted(path.stem for path in (tmp_path / "out" / "masks").iterdir())
    assert {"a", "c"} <= set(done) and not {"b", "e"} & set(done)
    assert "b.png" in error and "d.tif" in error
    names = [line.split(",")[0] for line in (tmp_path / "out" / "rle.csv").read_text().splitlines()]
    assert names[1:] == done
    (folder / "b.png").write_bytes(whole)
    error = stopped(1, capsys, *flags(run, folder, tmp_path / "out", "--save", "mask,rle"))
    assert (tmp_path / "out" / "masks" / "b.png").is_file() and "b.png" not in error


def test_an_unknown_compression_names_the_package(tmp_path, run, capsys):
    path = tmp_path / "odd.tif"
    write_slide(path, blobs(90, 80), compression=None)
    with tifffile.TiffFile(path, mode="r+b") as tif:
        tif.pages[0].tags[259].overwrite(34676)
    error = stopped(1, capsys, *flags(run, path, tmp_path / "out"))
    assert "odd.tif" in error and "pip install" in error and "imagecodecs" in error


KINDS_OF_TIFF = {
    "rgba": (lambda p: np.dstack([p, p[..., :1]]), {"extrasamples": ["unassalpha"]}, ""),
    "planar": (lambda p: p.transpose(2, 0, 1), {"planarconfig": "separate"}, ""),
    "sixteen": (lambda p: p.astype(np.uint16) * 257, {}, "its pixels are uint16, the network was trained on uint8"),
    "float": (lambda p: p.astype(np.float32), {}, "its pixels are float32"),
    "strips": (lambda p: p, {"tile": None, "rowsperstrip": 7}, ""),
}


@pytest.mark.parametrize("kind", KINDS_OF_TIFF)
def test_kinds_of_tiff_that_work(tmp_path, run, capsys, kind):
    turn, options, note = KINDS_OF_TIFF[kind]
    pixels = blobs(90, 80)
    image = write_slide(tmp_path / "a.tif", turn(pixels), **options)
    go(run, image, tmp_path / "out", "--save", "prob")
    assert note in capsys.readouterr().out
    go(run, write_slide(tmp_path / "plain" / "a.tif", pixels), tmp_path / "plain", "--save", "prob")
    if kind != "sixteen":
        found, plain = (read_image(folder / "raw" / "a.png") for folder in (tmp_path / "out", tmp_path / "plain"))
        np.testing.assert_array_equal(found, plain)


@pytest.mark.parametrize(
    ("shape", "axes", "part"),
    [
        ((2, 1, 3, 64, 64), "TZCYX", "2 points in time"),
        ((1, 5, 3, 64, 64), "TZCYX", "5 slices in depth"),
    ],
)
def test_stacks_are_refused(tmp_path, run, capsys, shape, axes, part):
    tifffile.imwrite(tmp_path / "a.ome.tif", np.zeros(shape, np.uint8), ome=True, metadata={"axes": axes})
    error = stopped(1, capsys, *flags(run, tmp_path / "a.ome.tif", tmp_path / "out"))
    assert "a.ome.tif" in error and part in error and "save each as a file of its own" in error


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (5, 7), (63, 65)])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_small_images(tmp_path, run, size, suffix):
    save(tmp_path / f"a{suffix}", blobs(*size))
    out = go(run, tmp_path / f"a{suffix}", tmp_path / "out", "--save", ALL, "--min-area", 2)
    assert read_mask(out / "masks" / "a.png").shape == size == read_mask(out / "labels" / "a.png").shape
    assert read_image(out / "overlays" / "a.png").shape == (*size, 3)


def test_scales_that_cannot_be(tmp_path, run, capsys):
    image = write_slide(tmp_path / "a.tif", blobs(200, 180))
    words = flags(run, image, tmp_path / "out")
    assert "a.tif does not say how many microns a pixel is" in stopped(1, capsys, *words, "--mpp", "0.5")
    assert "--reduce 0.5 would enlarge the image; expected 1 or more" in stopped(2, capsys, *words, "--reduce", "0.5")
    assert "a.tif has no level 9; expected one of: 0 (200x180" in stopped(1, capsys, *words, "--level", "9")
    assert "not allowed with" in stopped(2, capsys, *words, "--reduce", "2", "--mpp", "0.5")
    assert "expected a number above 0" in stopped(2, capsys, *words, "--mpp", "0")
    go(run, image, tmp_path / "tiny", "--reduce", "500")
    assert read_mask(tmp_path / "tiny" / "masks" / "a.png").shape == (1, 1)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--halo", "20"], "overlap 16 is less than twice the halo 20"),
        (["--overlap", "64"], "tile 64 and overlap 64 leave no step of at least the stride 16. Use a tile of 80"),
        (["--overlap", "0.95"], "tile 64 and overlap 61 leave no step"),
        (["--tile-size", "32", "--overlap", "40"], "tile 32 and overlap 40 leave no step"),
        (["--closing", "4"], "--closing is 4, expected 0 or an odd side"),
        (["--fill-holes", "-3"], "--fill-holes is -3"),
        (["--save", "mask,maks"], "'mask,maks': expected some of mask, prob"),
        (["-t", "best", "--ensemble"], "-t best: the checkpoint stores no best threshold"),
        (["--device", "cuda:99"], "--device cuda:99"),
    ],
)
def test_flags_that_cannot_be(tmp_path, run, capsys, words, part):
    image = write_slide(tmp_path / "a.tif", blobs(90, 80))
    given = [word for word in flags(run, image, tmp_path / "out") if word != "--cpu" or "--device" not in words]
    assert part in stopped(2, capsys, *given, *words)
    assert not (tmp_path / "out").exists()


def test_images_that_are_not_there(tmp_path, run, capsys):
    (tmp_path / "empty").mkdir()
    save(tmp_path / "one" / "a.png", blobs(40, 40))
    save(tmp_path / "two" / "a.png", blobs(40, 40))
    out = tmp_path / "out"
    assert "the folder" in stopped(1, capsys, *flags(run, tmp_path / "empty", out))
    assert "*.jpg names no image or slide" in stopped(1, capsys, *flags(run, tmp_path / "one" / "*.jpg", out))
    error = stopped(2, capsys, *flags(run, [tmp_path / "one", tmp_path / "two"], out))
    assert "would both write results named 'a'" in error and "one/a.png" in error and "two/a.png" in error
    assert not out.exists()
    go(run, tmp_path / "on*" / "*.png", out)
    assert (out / "masks" / "a.png").exists()


def test_extra_channels(tmp_path, capsys):
    write_checkpoint(
        tmp_path / "run" / "best.pth",
        channels=("red", "green", "blue", "nir"),
        add_dirs=("nir",),
        mean=(120.0,) * 4,
        std=(40.0,) * 4,
    )
    for name in "ab":
        save(tmp_path / "data" / "images" / f"{name}.png", blobs(90, 80))
    words = ["-cd", tmp_path / "run", "--cpu", "--backend", "torch", "--thumbnails", 0, "-o", tmp_path / "out"]
    error = stopped(2, capsys, *words, "-i", tmp_path / "data" / "images")
    assert "the network also takes the channels nir: give -d DIR with images/ and nir" in error
    error = stopped(1, capsys, *words, "-d", tmp_path / "data")
    assert "nir does not exist" in error
    save(tmp_path / "data" / "nir" / "a.png", blobs(90, 80, channels=1))
    write_mask(tmp_path / "data" / "gt" / "z.png", np.zeros((9, 9), np.uint8))
    error = stopped(1, capsys, *words, "-d", tmp_path / "data")
    assert "b.png has no partner in" in error and "a.png" not in error
    assert (tmp_path / "out" / "masks" / "a.png").exists(), "that no mask belongs to it does not matter"
    save(tmp_path / "data" / "nir" / "b.png", blobs(91, 80, channels=1))
    error = stopped(1, capsys, *words, "-d", tmp_path / "data")
    assert "b.png is 91x80, its image" in error and "sizes must agree" in error


def test_a_folder_that_cannot_be_written(tmp_path, run, capsys):
    image = write_slide(tmp_path / "a.tif", blobs(90, 80))
    (tmp_path / "file").write_text("")
    error = stopped(1, capsys, *flags(run, image, tmp_path / "file" / "out"))
    assert str(tmp_path / "file") in error and "Not a directory" in error


# ---- several networks, several views ----


def test_an_ensemble_is_the_mean_of_its_members(tmp_path, capsys):
    image = write_slide(tmp_path / "a.tif", blobs(150, 130))
    single = []
    for seed in range(3):
        write_checkpoint(tmp_path / "runs" / f"r{seed}" / "best.pth", seed=seed, mean=(100.0 + 10 * seed,) * 3)
        out = go(tmp_path / "runs" / f"r{seed}", image, tmp_path / f"single{seed}", "--save", "prob")
        single.append(read_image(out / "raw" / "a.png").astype(np.float64))
    out = go(tmp_path / "runs", image, tmp_path / "out", "--save", "prob", "--ensemble")
    found = read_image(out / "raw" / "a.png").astype(np.float64)
    assert np.abs(found - np.mean(single, axis=0)).max() <= 1.01 and np.abs(single[0] - single[1]).max() > 1000
    error = stopped(2, capsys, "-c", tmp_path / "runs" / "r0" / "best.pth", "-i", image, "--ensemble", "--cpu")
    assert "--ensemble averages the checkpoints of a folder: give it with -cd DIR" in error
    write_checkpoint(tmp_path / "runs" / "r3" / "best.pth", classes=4)
    error = stopped(2, capsys, *flags(tmp_path / "runs", image, tmp_path / "x", "--ensemble"))
    assert "r0/best.pth has class_names ('background', 'object')" in error and "r3/best.pth" in error


def test_members_of_other_strides_get_sides_that_suit_all(tmp_path):
    write_checkpoint(tmp_path / "runs" / "a" / "best.pth", seed=0)
    write_checkpoint(tmp_path / "runs" / "b" / "best.pth", seed=1, stride=48, min_side=96)
    import predictor

    seen, original = [], predictor.mean_of

    def spy(forwards, channels):
        forward = original(forwards, channels)
        return lambda batch: (seen.append(batch.shape[2:]), forward(batch))[1]

    predictor.mean_of = spy
    try:
        go(tmp_path / "runs", write_slide(tmp_path / "a.tif", blobs(50, 130)), tmp_path / "out", "--ensemble")
    finally:
        predictor.mean_of = original
    assert set(seen) == {(96, 96)}


@pytest.mark.parametrize("tta", ["flips", "d4"])
def test_views_are_averaged(tmp_path, run, tta):
    pixels = blobs(64, 64)
    write_slide(tmp_path / "a.tif", pixels)
    write_slide(tmp_path / "b.tif", pixels[:, ::-1])
    out = go(run, [tmp_path / "a.tif", tmp_path / "b.tif"], tmp_path / "out", "--save", "prob", "--tta", tta)
    one, other = (read_image(out / "raw" / f"{name}.png").astype(int) for name in "ab")
    assert np.abs(one - other[:, ::-1]).max() <= 2, "a mirrored picture gives the mirrored answer"


def test_whole_image_networks(tmp_path, capsys):
    write_checkpoint(tmp_path / "run" / "best.pth", geometry=Geometry("resize", (64, 96)))
    image = write_slide(tmp_path / "a.tif", blobs(150, 130))
    for words in (["--tta", "flips"], ["--tissue", "otsu"]):
        error = stopped(2, capsys, *flags(tmp_path / "run", image, tmp_path / "out", *words))
        assert f"{words[0]} is for networks trained on crops" in error
    go(tmp_path / "run", image, tmp_path / "out")
    assert read_mask(tmp_path / "out" / "masks" / "a.png").shape == (150, 130)
    error = stopped(1, capsys, *flags(tmp_path / "run", image, tmp_path / "out", "--tile-size", 96))
    assert "in the way" in error, "(96, 96) is another size than (64, 96)"
    go(tmp_path / "run", image, tmp_path / "small", "--tile-size", 32)
    assert "trained on images resized to (64, 96), now (32, 32)" in capsys.readouterr().out
    assert read_mask(tmp_path / "small" / "masks" / "a.png").shape == (150, 130)


def test_onnx_gives_nearly_the_same(tmp_path, run):
    image = write_slide(tmp_path / "a.tif", blobs(150, 130))
    for backend in ("torch", "onnx"):
        go(run, image, tmp_path / backend, "--save", "prob", "--backend", backend)
    one, other = (read_image(tmp_path / name / "raw" / "a.png").astype(int) for name in ("torch", "onnx"))
    assert np.abs(one - other).max() <= 20


def judged_and_seen(monkeypatch, run, image, out, *how):
    """Megapixels by which --backend auto judges the work, and those that the network sees."""
    import backends

    original, judged, seen = backends.load_forward, [], []

    def load(*words, **keywords):
        judged.append(keywords["megapixels"])
        config, forward, note = original(*words, **keywords)

        def counted(batch):
            seen.append(batch[:, 0].size / 1e6)
            return forward(batch)

        return config, counted, note

    monkeypatch.setattr(backends, "load_forward", load)
    words = ["-cd", run, "-i", image, "-o", out, "--cpu", "--thumbnails", 0, "--overwrite", *how]
    predict.main([str(word) for word in words])
    monkeypatch.setattr(backends, "load_forward", original)
    return judged, sum(seen)


@pytest.mark.parametrize(
    "how",
    ["", "--reduce 3", "--level 1", "--mpp 1.3", "--tissue saturation", "--tta flips", "--tile-size 128 --overlap 0.5"],
)
def test_auto_judges_the_work_by_what_is_computed(tmp_path, run, monkeypatch, how):
    pixels = np.full((600, 800, 3), 240, np.uint8)
    pixels[100:300, 300:600] = blobs(200, 300) // 2 + np.array([100, 0, 100], np.uint8)
    quarter = {"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER", "tile": (64, 64), "photometric": "rgb"}
    with tifffile.TiffWriter(tmp_path / "a.tif") as tif:
        tif.write(pixels, metadata=None, **quarter)
        tif.write(pixels[::2, ::2], metadata=None, subfiletype=1, **quarter)
    judged, seen = judged_and_seen(monkeypatch, run, tmp_path / "a.tif", tmp_path / "out", *how.split())
    assert judged == [pytest.approx(seen)]
    save(tmp_path / "b.png", pixels)
    if not {"--level", "--mpp"} & set(how.split()):
        judged, seen = judged_and_seen(monkeypatch, run, tmp_path / "b.png", tmp_path / "out", *how.split())
        assert judged == [pytest.approx(seen, rel=0.15)], "from the header alone"


def test_auto_judges_the_work_by_what_is_left(tmp_path, run, monkeypatch, capsys):
    for name in "ab":
        write_slide(tmp_path / "in" / f"{name}.tif", blobs(90, 80))
    (tmp_path / "in" / "c.tif").write_bytes(b"II*\0rest")
    how = ["-o", tmp_path / "out", "--cpu", "--thumbnails", 0, "--backend", "auto"]
    predict.main([str(word) for word in ["-cd", run, "-i", tmp_path / "in" / "a.tif", *how]])
    import backends

    original, judged = backends.load_forward, []
    monkeypatch.setattr(
        backends, "load_forward", lambda *words, **keywords: (judged.append(keywords), original(*words, **keywords))[1]
    )
    for _ in range(2):
        assert "c.tif" in stopped(1, capsys, "-cd", run, "-i", tmp_path / "in", *how)
    (tmp_path / "in" / "c.tif").unlink()
    predict.main([str(word) for word in ["-cd", run, "-i", tmp_path / "in", *how]])
    assert "checkpoint" not in capsys.readouterr().out, "no network is loaded for what is done"
    assert [each["megapixels"] for each in judged] == [4 * 64 * 64 / 1e6, None]


def test_auto_judges_whole_image_networks_by_the_size_they_see(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "run" / "best.pth", geometry=Geometry("resize", (64, 96)))
    image = write_slide(tmp_path / "a.tif", blobs(300, 330))
    judged, seen = judged_and_seen(monkeypatch, tmp_path / "run", image, tmp_path / "out")
    assert judged == [seen] == [64 * 96 / 1e6]


# ---- tissue, pictures, privacy ----


def test_tissue(tmp_path, run, capsys):
    pixels = np.full((700, 900, 3), 240, np.uint8)
    pixels[200:420, 300:600] = blobs(220, 300) // 2 + np.array([100, 0, 100], np.uint8)
    image = write_slide(tmp_path / "a.tif", pixels)
    go(run, image, tmp_path / "all", "--save", "prob")
    go(run, image, tmp_path / "some", "--save", "prob", "--tissue", "saturation")
    text = capsys.readouterr().out
    assert "a: tissue on " in text and "of the tiles skipped" in text
    whole, some = (read_image(tmp_path / name / "raw" / "a.png")[..., 0] for name in ("all", "some"))
    inside = some > 0
    assert inside[200:420, 300:600].mean() > 0.99 and 0.05 < inside.mean() < 0.4
    np.testing.assert_array_equal(some[inside], whole[inside])
    assert (some[:100] == 0).all() and (some[600:] == 0).all()


def test_reduced_polygons_cover_the_enlarged_mask(tmp_path, run):
    import shapely

    image = write_slide(tmp_path / "a.tif", blobs(401, 300), resolution=(20000, 20000), resolutionunit="CENTIMETER")
    out = go(run, image, tmp_path / "out", "--reduce", "2", "--save", "mask,geojson", "--format", "ome")
    mask = read_mask(out / "masks" / "a.ome.tif")
    assert mask.shape == (201, 150)
    drawn = np.zeros((402, 300), np.uint8)
    for feature in json.loads((out / "geojson" / "a.geojson").read_text())["features"]:
        shape = shapely.geometry.shape(feature["geometry"])
        left, top, right, bottom = map(int, shape.bounds)
        rows, columns = np.mgrid[top:bottom, left:right]
        drawn[top:bottom, left:right] |= shapely.contains_xy(shape, columns + 0.5, rows + 0.5)
    np.testing.assert_array_equal(drawn, mask.repeat(2, axis=0).repeat(2, axis=1))
    with tifffile.TiffFile(out / "masks" / "a.ome.tif") as tif:
        assert 'PhysicalSizeX="1.0"' in tif.ome_metadata
    go(run, image, tmp_path / "full", "--reduce", "2", "--full-size", "--save", "mask")
    assert read_mask(tmp_path / "full" / "masks" / "a.png").shape == (401, 300)


def test_exif_orientation(tmp_path, run):
    from PIL import Image

    pixels = blobs(90, 140)
    turned = Image.fromarray(np.ascontiguousarray(np.rot90(pixels)))
    exif = turned.getexif()
    exif[274] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    save(tmp_path / "plain.png", pixels)
    out = go(run, [tmp_path / "plain.png", tmp_path / "turned.png"], tmp_path / "out")
    np.testing.assert_array_equal(read_mask(out / "masks" / "turned.png"), read_mask(out / "masks" / "plain.png"))


def test_thumbnails_are_in_tensorboard(tmp_path, run):
    save(tmp_path / "in" / "a.png", blobs(90, 140))
    save(tmp_path / "in" / "b.png", blobs(90, 140))
    go(run, tmp_path / "in", tmp_path / "out", "--thumbnails", 1, "-log", tmp_path / "logs", "--exp-name", "seen")
    events = EventAccumulator(str(tmp_path / "logs" / "seen"), size_guidance={"images": 0})
    events.Reload()
    assert events.Tags()["images"] == ["predict/a"]
    picture = events.Images("predict/a")[0]
    assert (picture.height, picture.width) == (90, 140)
    go(run, tmp_path / "in", tmp_path / "out", "-log", tmp_path / "again", "--thumbnails", 1)
    assert not (tmp_path / "again").exists(), "nothing was done, nothing is logged"


def test_a_run_without_any_result_leaves_no_log_and_promises_no_results(tmp_path, run, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nrest")
    words = [*flags(run, tmp_path / "in", tmp_path / "out", "--save", "mask,rle", "-log", tmp_path / "logs")]
    words[words.index("--thumbnails") + 1] = "8"
    with pytest.raises(SystemExit, match="1"):
        predict.main(words)
    text = capsys.readouterr().out
    assert "a: failed" in text and "results in" not in text and "tensorboard" not in text
    assert not (tmp_path / "logs").exists() and not (tmp_path / "out" / "rle.csv").exists()
    save(tmp_path / "in" / "b.png", blobs(60, 50))
    with pytest.raises(SystemExit, match="1"):
        predict.main(words)
    text = capsys.readouterr().out
    assert "results in" in text and "tensorboard" in text and (tmp_path / "out" / "rle.csv").exists()
    with pytest.raises(SystemExit, match="1"):
        predict.main(words)
    text = capsys.readouterr().out
    assert "b: already done" in text and "results in" in text and "tensorboard" not in text


def test_names_of_patients_labels_and_macros_stay_in_the_slide(tmp_path, run, capsys):
    secret = "Jane Doe 1950"
    path = tmp_path / "slide.svs"
    with tifffile.TiffWriter(path) as tif:
        words = f"Aperio Image Library v1\n300x260 |AppMag = 20|MPP = 0.5|Patient = {secret}"
        tags = [(315, "s", 0, secret, True), (316, "s", 0, secret, True)]
        common = {"photometric": "rgb", "metadata": None, "extratags": tags}
        tif.write(blobs(260, 300), tile=(64, 64), compression="zlib", description=words, **common)
        for name in ("label", "macro"):
            colour = np.full((70, 60, 3), (1, 2, 250), np.uint8)
            tif.write(colour, rowsperstrip=70, description=f"Aperio\n{name} 60x70", subfiletype=1, **common)
    save_all = ["--save", ALL, "--thumbnails", 1, "-log", tmp_path / "logs"]
    for form in ("ome", "flat", "tiff", "png"):
        go(run, path, tmp_path / form, "--format", form, *save_all)
    printed = capsys.readouterr()
    assert "Jane" not in printed.out + printed.err
    for file in [*tmp_path.rglob("*")]:
        if file.is_file() and file != path:
            assert b"Jane" not in file.read_bytes(), file
            if file.suffix == ".tif":
                with tifffile.TiffFile(file) as tif:
                    assert all(page.shape != (70, 60, 3) for page in tif.pages) and len(tif.series) == 1
    overlay = read_image(tmp_path / "ome" / "overlays" / "slide.png")
    assert overlay.shape == (260, 300, 3) and not (overlay == (1, 2, 250)).all(axis=2).any()


def test_a_slide_that_another_command_works_on_is_left_alone(tmp_path, run, capsys):
    from spool import FolderLock

    for name in "ab":
        write_slide(tmp_path / "in" / f"{name}.tif", blobs(90, 80))
    working = tmp_path / "out" / ".a.partial" / "predicted"
    working.mkdir(parents=True)
    lock = FolderLock(working)
    error = stopped(1, capsys, *flags(run, tmp_path / "in", tmp_path / "out", "--format", "ome"))
    assert "a.tif: " in error and "b.tif" not in error and (tmp_path / "out" / "masks" / "b.ome.tif").exists()
    lock.release()
    go(run, tmp_path / "in", tmp_path / "out", "--format", "ome")


def test_one_file_under_two_names_is_one(tmp_path, run):
    save(tmp_path / "a.png", blobs(40, 30))
    out = go(run, ["a.png", tmp_path / "a.png", tmp_path / "*.png"], tmp_path / "out")
    assert len(list((out / "masks").iterdir())) == 1


@pytest.mark.parametrize(("own", "size"), [(0.2527, 200), (0.3, 200), (0.125, 100)])
def test_slides_are_read_at_the_scale_of_the_training(tmp_path, own, size):
    write_checkpoint(tmp_path / "run" / "best.pth", geometry=Geometry("crops", (64, 64), 64, 16, 4, mpp=0.25))
    options = {"resolution": (1e4 / own, 1e4 / own), "resolutionunit": "CENTIMETER"}
    image = write_slide(tmp_path / "a.tif", blobs(200, 200), **options)
    out = go(tmp_path / "run", image, tmp_path / "out")
    assert read_mask(out / "masks" / "a.png").shape == (size, size)


def test_a_slide_too_coarse_for_the_network(tmp_path, capsys):
    write_checkpoint(tmp_path / "run" / "best.pth", geometry=Geometry("crops", (64, 64), 64, 16, 4, mpp=0.25))
    options = {"resolution": (1e4, 1e4), "resolutionunit": "CENTIMETER"}
    image = write_slide(tmp_path / "a.tif", blobs(200, 200), **options)
    words = flags(tmp_path / "run", image, tmp_path / "out")
    error = stopped(1, capsys, *words)
    assert "a.tif has 1 um per pixel, the network was trained at 0.25" in error and "--reduce 1" in error
    predict.main([*words, "--reduce", "1"])
    assert "warning: a: read at 1 um per pixel, the network was trained at 0.25" in capsys.readouterr().out
