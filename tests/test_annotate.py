"""annotate.py from the command line: what it writes and leaves alone, how it survives, what it says is wrong."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from sam_standins import BoxPainter, build_tiny_segment_anything
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import write_checkpoint

import annotate
import train
from annotation.engines import Engines
from annotation.records import hold_folder
from annotation.sam_engine import Sam
from image_io import read_mask, write_image, write_mask
from object_metrics import object_scores

ROOT = Path(__file__).resolve().parent.parent
SIZE = (96, 128)
TABLES = ("objects.csv", "annotations.json", "report.json", "review.csv", "args.json")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """TensorBoard's files go to ./logs by default: keep that out of the repository."""
    monkeypatch.chdir(tmp_path)


def draw(seed, size=SIZE, spacing=30):
    """A picture (H, W, 3) of bright discs that do not touch, and its label map (H, W)."""
    rng = np.random.default_rng(seed)
    truth = np.zeros(size, np.int32)
    rows, columns = np.indices(size)
    number = 0
    for top in range(0, size[0] - spacing + 1, spacing):
        for left in range(0, size[1] - spacing + 1, spacing):
            if rng.random() < 0.2:
                continue
            number += 1
            row, column = top + spacing / 2 + rng.uniform(-2, 2), left + spacing / 2 + rng.uniform(-2, 2)
            truth[(rows - row) ** 2 + (columns - column) ** 2 < rng.uniform(7, 11) ** 2] = number
    image = cv2.GaussianBlur(np.where(truth > 0, 190, 50).astype(np.float32), (0, 0), 0.8)
    image = image[..., None] + rng.normal(0, 5, (*size, 3))
    return np.clip(image, 0, 255).astype(np.uint8), truth


def write_pictures(folder, count=3, **how):
    """Pictures p0.png, p1.png, ... and their label maps in <folder>_truth."""
    for number in range(count):
        image, truth = draw(number, **how)
        write_image(folder / f"p{number}.png", image)
        write_mask(folder.with_name(f"{folder.name}_truth") / f"p{number}.png", truth.astype(np.uint16))
    return folder


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path / "pictures")


def go(*words):
    annotate.main([str(word) for word in ("-w", 1, *words)])


def stopped(code, capsys, *words):
    """What is printed to stderr before the command ends with a status."""
    with pytest.raises(SystemExit) as stop:
        go(*words)
    captured = capsys.readouterr()
    assert stop.value.code == code, captured
    assert "Traceback" not in captured.err
    return captured.err


def plain(value):
    """JSON without what may differ: seconds, the words of the command, what was written before."""
    if isinstance(value, dict):
        left_out = ("seconds", "engine_seconds", "command", "output_dir", "workers", "written")
        return {name: plain(item) for name, item in value.items() if name not in left_out}
    return [plain(item) for item in value] if isinstance(value, list) else value


def content(folder):
    """Bytes of every file of a folder; of JSON what is not about the run itself."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    return {
        name: json.dumps(plain(json.loads(data))).encode() if name.endswith(".json") else data
        for name, data in found.items()
    }


def exact(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows_of(path):
    """Rows of a csv file with decimal commas."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter=";"))
    return [{name: value.replace(",", ".") for name, value in row.items()} for row in rows]


def report(folder):
    return json.loads((folder / "report.json").read_text())


# ---- what is written ----


def test_pictures_alone_give_a_data_set_and_tables(tmp_path, pictures, capsys):
    before = exact(pictures)
    go("--images", pictures)
    out = tmp_path / "pictures_labels"
    for number in range(3):
        _, truth = draw(number)
        labels = read_mask(out / "labels" / f"p{number}.png")
        gt = read_mask(out / "gt" / f"p{number}.png")
        assert object_scores(labels.astype(np.int64), truth).summary()["at"][0]["f1"] == 1
        assert set(np.unique(gt)) == {0, 255} and not (gt[labels == 0]).any()
        assert (out / "images" / f"p{number}.png").is_symlink()
        assert (out / "overlays" / f"p{number}.png").is_file()
        assert len((out / "yolo" / f"p{number}.txt").read_text().splitlines()) == truth.max()
    rows = rows_of(out / "objects.csv")
    assert len(rows) == sum(draw(number)[1].max() for number in range(3)) == report(out)["objects"]
    for row in rows:
        area = np.count_nonzero(read_mask(out / "labels" / row["image"]) == int(row["id"]))
        assert int(row["area"]) == area and row["engine"] == "watershed" and 0 <= float(row["score"]) <= 1
        assert float(row["equivalent_diameter"]) == pytest.approx(np.sqrt(4 * area / np.pi), rel=1e-3)
    assert {"p0.png", "p1.png", "p2.png"} == {row["image"] for row in rows_of(out / "review.csv")}
    assert len(json.loads((out / "annotations.json").read_text())["annotations"]) == len(rows)
    assert exact(pictures) == before and not list(out.rglob(".*.tmp"))
    captured = capsys.readouterr()
    assert "engines: watershed; 3 pictures" in captured.out and "3 annotated" in captured.out
    (events,) = (tmp_path / "logs").rglob("events.*")
    reader = EventAccumulator(str(events), size_guidance={"images": 0})
    reader.Reload()
    tags = reader.Tags()
    assert [tag for tag in tags["images"] if tag.startswith("annotate/p")] and tags["histograms"]
    assert "annotate/objects" in tags["scalars"]


def test_millimetres_copies_panels_and_outlines(tmp_path, pictures):
    out = tmp_path / "out"
    more = ("--mm-per-pixel", 0.5, "--copy", "--panels", "--geojson", "--yolo", "segment", "--coco", "polygons")
    go("--images", pictures, "-o", out, "--no-overlays", *more)
    rows = rows_of(out / "objects.csv")
    for row in rows:
        assert float(row["area_mm2"]) == pytest.approx(0.25 * int(row["area"]), rel=1e-3)
        assert float(row["equivalent_diameter_mm"]) == pytest.approx(0.5 * float(row["equivalent_diameter"]), rel=1e-3)
    for number in range(3):
        assert not (out / "images" / f"p{number}.png").is_symlink()
        assert (out / "panels" / f"p{number}.png").is_file() and (out / "geojson" / f"p{number}.geojson").is_file()
    assert exact(out / "images") == exact(pictures) and not (out / "overlays").exists()
    first = json.loads((out / "annotations.json").read_text())["annotations"][0]["segmentation"]
    assert isinstance(first, list) and len((out / "yolo/p0.txt").read_text().splitlines()[0].split()) > 5


def test_several_processes_write_the_same(tmp_path, pictures):
    go("--images", pictures, "-o", tmp_path / "one")
    go("--images", pictures, "-o", tmp_path / "two", "-w", 2)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_the_output_trains(tmp_path):
    write_pictures(tmp_path / "pictures", 6)
    go("--images", tmp_path / "pictures", "-o", tmp_path / "out")
    words = ["-d", tmp_path / "out", "-m", "plain-unet", "--encoder", "plain-8", "-e", 1, "-b", 2, "-w", 0, "--cpu"]
    words += ["--image-size", 32, "-a", "safe", "-log", tmp_path / "runs", "--exp-name", "run"]
    train.main([str(word) for word in words])
    assert (tmp_path / "runs" / "run" / "run.pth").is_file()


# ---- again ----


def test_what_is_done_is_not_done_again(tmp_path, pictures, capsys, monkeypatch):
    words = ("--images", pictures, "-o", tmp_path / "out")
    go(*words)
    before = exact(tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "labels").iterdir()}

    def refuse(*_, **__):
        raise AssertionError("an engine was loaded")

    monkeypatch.setattr(Engines, "__init__", refuse)
    capsys.readouterr()
    go(*words)
    assert "3 already done" in capsys.readouterr().out
    assert exact(tmp_path / "out") == before
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "labels").iterdir()} == times


@pytest.mark.parametrize(
    ("more", "changed"),
    [
        (("--ws-min-area", 200), "labels/p0.png"),
        (("--gap", 5), "gt/p0.png"),
        (("--panels",), "panels/p0.png"),
        (("--yolo", "segment"), "yolo/p0.txt"),
    ],
)
def test_other_flags_do_it_anew(tmp_path, more, changed):
    # touching discs, so that the gap shows
    pictures = write_pictures(tmp_path / "pictures", 2, size=(80, 80), spacing=20)
    go("--images", pictures, "-o", tmp_path / "out")
    before = exact(tmp_path / "out")
    go("--images", pictures, "-o", tmp_path / "out", *more)
    after = exact(tmp_path / "out")
    assert before.get(changed) != after[changed]
    go("--images", pictures, "-o", tmp_path / "fresh", *more)
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


def test_a_changed_picture_is_done_anew(tmp_path, pictures, capsys):
    go("--images", pictures, "-o", tmp_path / "out")
    write_image(pictures / "p1.png", draw(9)[0])
    capsys.readouterr()
    go("--images", pictures, "-o", tmp_path / "out")
    out = capsys.readouterr().out
    assert "2 already done" in out and "1 annotated" in out
    go("--images", pictures, "-o", tmp_path / "fresh")
    # the record remembers what it wrote before
    names = [name for name in content(tmp_path / "fresh") if not name.startswith(".")]
    assert [content(tmp_path / "out")[name] for name in names] == [content(tmp_path / "fresh")[name] for name in names]


def test_tables_hold_what_the_folder_holds(tmp_path, pictures, capsys):
    out = tmp_path / "out"
    go("--images", pictures, "-o", out)
    whole = rows_of(out / "objects.csv")
    go("--images", pictures / "p1.png", "-o", out)
    assert "also hold 2 pictures" in capsys.readouterr().out
    assert rows_of(out / "objects.csv") == whole and report(out)["images"] == 3
    (pictures / "p2.png").unlink()  # its link leads nowhere
    go("--images", pictures / "p1.png", "-o", out)
    assert {row["image"] for row in rows_of(out / "objects.csv")} == {"p0.png", "p1.png"}
    images = json.loads((out / "annotations.json").read_text())["images"]
    assert [image["file_name"] for image in images] == ["p0.png", "p1.png"]


@pytest.mark.parametrize("kind", ["gt", "labels"])
def test_edited_files_are_kept_byte_for_byte(tmp_path, pictures, kind, capsys):
    out = tmp_path / "out"
    go("--images", pictures, "-o", out)
    path = out / kind / "p1.png"
    mask = read_mask(path)
    mask[:, : SIZE[1] // 2] = 0
    write_mask(path, mask)
    edited = path.read_bytes()
    for more in ((), ("--ws-min-area", 30), ("--gap", 3), ("--panels",), ("--preset", "nuclei", "-w", 2)):
        go("--images", pictures, "-o", out, *more)
        assert path.read_bytes() == edited, more
        assert report(out)["edited"] == 1
    assert "edited by hand: kept" in capsys.readouterr().out
    labels = read_mask(out / "labels" / "p1.png")
    assert not labels[:, : SIZE[1] // 2].any() and labels.any()
    own = [row for row in rows_of(out / "objects.csv") if row["image"] == "p1.png"]
    assert len(own) == len(np.unique(labels)) - 1


def test_edited_files_survive_a_changed_picture_and_a_lost_record(tmp_path, pictures):
    out = tmp_path / "out"
    go("--images", pictures, "-o", out)
    mask = read_mask(out / "labels" / "p0.png")
    mask[:40] = 0
    write_mask(out / "labels" / "p0.png", mask)
    edited = (out / "labels" / "p0.png").read_bytes()
    write_image(pictures / "p0.png", draw(5)[0])
    go("--images", pictures, "-o", out)
    shutil.rmtree(out / ".annotate")
    untouched = (out / "gt" / "p1.png").read_bytes()
    go("--images", pictures, "-o", out, "--ws-min-area", 30)
    assert (out / "labels" / "p0.png").read_bytes() == edited
    assert (out / "gt" / "p1.png").read_bytes() == untouched


def test_a_data_set_with_masks_of_a_person_gets_labels_for_the_rest(tmp_path):
    whole = tmp_path / "set"
    write_pictures(whole / "images", 3)
    truth = draw(1)[1]
    write_mask(whole / "gt" / "p1.png", np.where(truth > 3, 255, 0).astype(np.uint8))
    before, mask = exact(whole / "images"), (whole / "gt" / "p1.png").read_bytes()
    for more in ((), ("--gap", 2)):
        go("--images", whole / "images", "-o", whole, *more)
        assert exact(whole / "images") == before and (whole / "gt" / "p1.png").read_bytes() == mask
        assert not any(path.is_symlink() for path in (whole / "images").iterdir())
        assert len(np.unique(read_mask(whole / "labels" / "p1.png"))) == len(np.unique(truth)) - 3
        assert read_mask(whole / "labels" / "p0.png").any() and report(whole)["edited"] == 1


def test_what_was_corrected_elsewhere_comes_back_and_stays(tmp_path, pictures):
    from dataset_utils import import_labels, make_yolo

    out = tmp_path / "out"
    go("--images", pictures, "-o", out)
    import_labels.main([str(tmp_path / "pictures_truth"), "-o", str(out)])
    labels = {path.name: path.read_bytes() for path in (out / "labels").iterdir()}
    go("--images", pictures, "-o", out, "--ws-min-area", 250)
    assert {path.name: path.read_bytes() for path in (out / "labels").iterdir()} == labels
    for number in range(3):
        assert np.array_equal(read_mask(out / "labels" / f"p{number}.png") > 0, draw(number)[1] > 0)
    assert report(out)["edited"] == 3 and not any(row["engine"] == "watershed" for row in rows_of(out / "objects.csv"))
    make_yolo.main(["-d", str(out), "-o", str(tmp_path / "yolo")])
    lines = [line for path in (tmp_path / "yolo").rglob("p*.txt") for line in path.read_text().splitlines()]
    assert len(lines) == report(out)["objects"]


def test_damage_is_said_in_every_run_but_not_at_length(tmp_path, capsys):
    image, _ = draw(0, size=(320, 320))
    data = tiff(image, photometric="rgb", tile=(16, 16), compression="zlib")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "cut.tif").write_bytes(data[: len(data) // 2])
    for _ in range(2):
        err = stopped(1, capsys, "--images", tmp_path / "pictures", "-o", tmp_path / "out", "--max-megapixels", 0.01)
        assert err.count("is damaged") == 3 and "more pieces are damaged" in err and "4 findings" in err
        assert report(tmp_path / "out")["images"] == 1


# ---- killed ----


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


def killed_at(moment, words, steps=None):
    """Run annotate.py in a child that gets SIGKILL at its n-th step; a step is an engine's work or one of the disk."""
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
        sys.stdout = sys.stderr = Path(os.devnull).open("w")
        Engines.find = step(Engines.find)
        for name in ("fsync", "replace", "unlink", "symlink"):
            setattr(os, name, step(getattr(os, name)))
        go(*words)
        if steps:
            steps.write_text(str(seen))

    return in_child(job)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_step_the_files_become_the_same(tmp_path, every):
    pictures = write_pictures(tmp_path / "pictures", 2, size=(64, 64))
    words = ("--images", pictures, "--panels", "--geojson")
    assert killed_at(0, (*words, "-o", tmp_path / "whole"), tmp_path / "steps") == 0
    expected, steps = content(tmp_path / "whole"), int((tmp_path / "steps").read_text())
    assert steps > 20
    for moment in range(1, steps + 1, every):
        out = tmp_path / f"killed{moment}"
        assert killed_at(moment, (*words, "-o", out)) == -signal.SIGKILL
        assert killed_at(0, (*words, "-o", out)) == 0
        for path in out.rglob(".*.tmp"):  # so young, it could be another run's
            path.unlink()
        assert content(out) == expected, moment
        assert not report(out)["edited"]


def write_plugin(folder):
    """A package ultralytics that finds what is bright; some pictures end its process."""
    (folder / "ultralytics").mkdir(parents=True)
    (folder / "ultralytics" / "__init__.py").write_text(
        """
import os, pathlib, time
import cv2, numpy as np, torch
from types import SimpleNamespace

class YOLO:
    task, names, overrides = "detect", {0: "disc"}, {}

    def __init__(self, path):
        self.words = pathlib.Path(path).read_text().split()
        if "broken" in self.words:
            raise OSError("these weights are broken")

    def predict(self, image, **flags):
        if "exit" in self.words and image.shape[0] == 33:
            os._exit(9)
        if "exit-always" in self.words:
            os._exit(9)
        if "slow" in self.words:
            pathlib.Path(f"pid{os.getpid()}").touch()
            time.sleep(60)
        if "outside" in self.words:
            rows = [[-50, -50, -10, -10, 0.9, 0], [5, 5, 25, 25, 0.9, 0], [90, 60, 999, 999, 0.8, 0]]
        elif "disc" in self.words:
            rows = [[40, 30, 80, 70, 0.9, 0]]
        else:
            mask = (image.mean(axis=2) > 120).astype(np.uint8)
            found = cv2.connectedComponentsWithStats(mask)[2][1:]
            rows = [[x, y, x + w, y + h, 0.9, 0] for x, y, w, h, area in found if area > 20]
        data = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
        return [SimpleNamespace(boxes=SimpleNamespace(data=data), masks=None)]
"""
    )


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Writes weights for the stand-in of ultralytics, which child processes find too."""
    write_plugin(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "ultralytics", raising=False)
    yield lambda words="": save_text(tmp_path / "weights.pt", words)
    sys.modules.pop("ultralytics", None)


def save_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_killed_process_costs_its_picture_alone(tmp_path, pictures, plugin, capsys):
    write_image(pictures / "p1b.png", draw(7)[0][:33])
    err = stopped(1, capsys, "--images", pictures, "-o", tmp_path / "out", "--detector", plugin("exit"), "-w", 2)
    assert "p1b.png: the process that worked on it was killed" in err and "1 finding," in err
    assert "--max-megapixels" in err
    assert sorted(path.name for path in (tmp_path / "out" / "labels").glob("p*")) == ["p0.png", "p1.png", "p2.png"]
    assert report(tmp_path / "out")["images"] == 3


@pytest.mark.slow
def test_processes_that_are_always_killed_end_the_run(tmp_path, plugin, capsys):
    pictures = write_pictures(tmp_path / "pictures", 5)
    words = ("--images", pictures, "-o", tmp_path / "out", "--detector", plugin("exit-always"), "-w", 2)
    err = stopped(1, capsys, *words)
    assert err.count("was killed from outside or crashed") == 3 and err.count("not done") == 2


def test_weights_that_cannot_be_loaded_are_said_once(tmp_path, pictures, plugin, capsys):
    for workers in (1, 2):
        words = ("--images", pictures, "-o", tmp_path / "out", "--detector", plugin("broken"), "-w", workers)
        err = stopped(1, capsys, *words)
        assert err.count("these weights are broken") == 1 and "weights.pt" in err and "pool" not in err


def alive(number):
    try:
        state = Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("how", ["kill", "interrupt"])
def test_no_process_stays_behind(tmp_path, pictures, plugin, how):
    words = ["--images", pictures, "-o", tmp_path / "out", "--detector", plugin("slow"), "-w", "2"]
    path = os.pathsep.join([str(tmp_path / "site")])
    run = subprocess.Popen(
        [sys.executable, str(ROOT / "annotate.py"), *map(str, words)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,
    )
    deadline = time.monotonic() + 90
    while len(list(tmp_path.glob("pid*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    children = [int(path.name[3:]) for path in tmp_path.glob("pid*")]
    assert len(children) == 2
    if how == "kill":
        run.kill()
    else:
        os.killpg(run.pid, signal.SIGINT)
    error = run.communicate(timeout=20)[1]
    deadline = time.monotonic() + 10
    while any(map(alive, children)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, children))
    if how == "interrupt":
        assert run.returncode == 130 and "interrupted; the same command goes on" in error
        assert "Traceback" not in error


# ---- bad input ----


def encoded(image, kind, **how):
    data = io.BytesIO()
    image.save(data, kind, **how)
    return data.getvalue()


def tiff(pixels, **how):
    data = io.BytesIO()
    tifffile.imwrite(data, pixels, **how)
    return data.getvalue()


GOOD = draw(0)[0]
WITH_NAN = GOOD[..., 0].astype(np.float32) / 255
WITH_NAN[:10, :10] = np.nan
WITH_NAN[90] = np.nan
ODD = {  # file name to content, and how many objects it has: None for any number, text for a message
    "truncated.png": (encoded(Image.fromarray(GOOD), "PNG")[:3000], "truncated.png"),
    "truncated.jpg": (encoded(Image.fromarray(GOOD), "JPEG")[:1500], "truncated.jpg"),
    "noise.png": (b"no picture at all" * 9, "noise.png"),
    "empty.png": (b"", "empty.png"),
    "half.tif": (tiff(GOOD, photometric="rgb")[:9000], "half.tif"),
    "one.png": (encoded(Image.fromarray(GOOD[:1, :1]), "PNG"), 0),
    "line.png": (encoded(Image.fromarray(GOOD[:1]), "PNG"), None),
    "constant.png": (encoded(Image.fromarray(np.full((50, 60), 77, np.uint8)), "PNG"), 0),
    "black.png": (encoded(Image.fromarray(np.zeros((50, 60, 3), np.uint8)), "PNG"), 0),
    "white.png": (encoded(Image.fromarray(np.full((50, 60, 3), 255, np.uint8)), "PNG"), 0),
    "bits.png": (encoded(Image.fromarray(GOOD[..., 0] > 120), "PNG"), 12),
    "deep.png": (encoded(Image.fromarray(GOOD[..., 0].astype(np.uint16) * 200), "PNG"), 12),
    "rgba.png": (encoded(Image.fromarray(np.dstack([GOOD, GOOD[..., 0]])), "PNG"), 12),
    "cmyk.jpg": (encoded(Image.fromarray(GOOD).convert("CMYK"), "JPEG", quality=95), 12),
    "palette.gif": (encoded(Image.fromarray(GOOD[..., 0]), "GIF"), 12),
    "bands.tif": (tiff(np.dstack([GOOD, GOOD[..., 0]]), photometric="rgb", extrasamples=["unspecified"]), 12),
    "nan.tif": (tiff(WITH_NAN), "holds NaN or infinity in"),
    "unknown.tif": (tiff(WITH_NAN[:40], extratags=[(42113, 2, 0, "nan", True)]), None),
    "all_nan.tif": (tiff(np.full((50, 60), np.nan, np.float32)), "holds NaN"),
    "infinite.tif": (tiff(np.full((50, 60), np.inf, np.float32)), "holds NaN"),
    "deep_rgb.tif": (tiff(GOOD.astype(np.uint16) * 257, photometric="rgb"), 12),
}


def test_odd_and_bad_pictures_are_done_or_named(tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, (data, _) in ODD.items():
        (folder / name).write_bytes(data)
    (folder / "notes.txt").write_text("no picture")
    (folder / "folder.png").mkdir()
    (folder / "link.png").symlink_to(tmp_path / "nowhere.png")
    before = exact(folder)
    out = tmp_path / "out"
    # truncated.png and truncated.jpg share a stem
    err = stopped(1, capsys, "--images", folder, "-o", out)
    assert "truncated.jpg" in err and "has the same stem" in err
    messages = [line for line in err.splitlines() if line.startswith("  - ")]
    done = {entry["image"]: entry["objects"] for entry in report(out)["per_image"]}
    discs = int(draw(0)[1].max())
    for name, (_, expected) in ODD.items():
        if isinstance(expected, str):
            assert any(name in line and expected in line for line in messages) and name not in done, (name, messages)
        elif expected is None:
            assert name in done, (name, messages)
        else:
            assert done.get(name) == (discs if expected else 0), (name, done.get(name), messages)
    assert "notes" not in err and exact(folder) == before
    flags = {entry["image"]: entry["flags"] for entry in report(out)["per_image"]}
    assert "empty" in flags["black.png"] and "empty" in flags["one.png"]
    assert rows_of(out / "review.csv")[0]["doubt"] == "1.0000"


def test_nothing_found_at_all_is_a_result(tmp_path):
    write_image(tmp_path / "pictures" / "a.png", np.zeros((40, 50, 3), np.uint8))
    go("--images", tmp_path / "pictures", "-o", tmp_path / "out")
    out = tmp_path / "out"
    assert not rows_of(out / "objects.csv") and report(out)["objects"] == 0 and (out / "yolo/a.txt").read_text() == ""
    assert json.loads((out / "annotations.json").read_text())["annotations"] == []
    assert not read_mask(out / "gt" / "a.png").any()


def test_folders_without_pictures_are_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "holds no image" in stopped(1, capsys, "--images", tmp_path / "empty")
    assert "does not exist" in stopped(1, capsys, "--images", tmp_path / "none")
    assert "names no image" in stopped(1, capsys, "--images", tmp_path / "none*.png")
    assert "notes.txt" in stopped(1, capsys, "--images", save_text(tmp_path / "notes.txt", "no picture"))


def test_an_error_that_nobody_foresaw_costs_its_picture_alone(tmp_path, pictures, capsys, monkeypatch):
    import annotation.watershed

    segment = annotation.watershed.segment

    def fails(image, options):
        if image.shape[0] == 33:
            raise IndexError("index 7 is out of bounds")
        return segment(image, options)

    monkeypatch.setattr(annotation.watershed, "segment", fails)
    write_image(pictures / "p1b.png", draw(7)[0][:33])
    err = stopped(1, capsys, "--images", pictures, "-o", tmp_path / "out")
    assert (
        "p1b.png: IndexError: index 7 is out of bounds; TESSERA_TRACEBACK=1 shows where" in err
        and report(tmp_path / "out")["images"] == 3
    )


def test_two_pictures_of_one_stem(tmp_path, pictures, capsys):
    write_image(pictures / "p0.tif", draw(5)[0])
    other = tmp_path / "other"
    write_image(other / "p1.png", draw(6)[0])
    err = stopped(1, capsys, "--images", pictures, other, "-o", tmp_path / "out")
    assert err.count("has the same stem") == 2 and "rename one" in err
    assert report(tmp_path / "out")["images"] == 3


def test_where_labels_may_not_go(tmp_path, pictures, capsys, monkeypatch):
    before = exact(tmp_path)
    assert "expected another folder" in stopped(2, capsys, "--images", pictures, "-o", pictures)
    gt = pictures.rename(tmp_path / "gt")
    assert "expected another folder" in stopped(2, capsys, "--images", gt, "-o", tmp_path)
    gt.rename(pictures)
    blocked = save_text(tmp_path / "file", "mine")
    err = stopped(1, capsys, "--images", pictures, "-o", blocked)
    assert "name one with -o" in err and blocked.read_text() == "mine"
    blocked.unlink()
    assert exact(tmp_path) == before

    def refuse(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    err = stopped(1, capsys, "--images", pictures)
    assert "Permission denied" in err and "pictures_labels" in err and "-o" in err


def test_labels_inside_the_folder_of_the_pictures(tmp_path, pictures, capsys):
    for _ in range(2):
        go("--images", pictures, "-o", pictures / "out")
    assert "3 already done" in capsys.readouterr().out and report(pictures / "out")["images"] == 3
    go("--images", pictures / "out" / "images", "-o", tmp_path / "other")
    assert report(tmp_path / "other")["images"] == 3
    err = stopped(2, capsys, "--images", pictures / "**" / "*.png", "-o", pictures / "out")
    assert "pictures are read from" in err


def test_a_folder_that_fills_up_names_the_pictures(tmp_path, pictures, capsys, monkeypatch):
    import annotation.files

    put = annotation.files._put

    def full(options, kind, stem, *more):
        if stem == "p1":
            raise OSError(28, "No space left on device", str(options.folder / kind / stem))
        return put(options, kind, stem, *more)

    monkeypatch.setattr(annotation.files, "_put", full)
    err = stopped(1, capsys, "--images", pictures, "-o", tmp_path / "out")
    assert "p1" in err and "No space left" in err and report(tmp_path / "out")["images"] == 2
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    go("--images", pictures, "-o", tmp_path / "out")
    go("--images", pictures, "-o", tmp_path / "fresh")
    names = [name for name in content(tmp_path / "fresh") if not name.startswith(".")]
    assert [content(tmp_path / "out")[name] for name in names] == [content(tmp_path / "fresh")[name] for name in names]


def test_a_log_folder_that_cannot_be_written_is_a_finding(tmp_path, pictures, capsys):
    save_text(tmp_path / "file", "mine")
    err = stopped(1, capsys, "--images", pictures, "-o", tmp_path / "out", "-log", tmp_path / "file")
    assert "give another --log-dir" in err and report(tmp_path / "out")["images"] == 3


def test_odd_names(tmp_path, capsys):
    names = [
        "a b.png",
        "ä#1.png",
        "x[1].png",
        "-w.png",
        "a.b.png",
        "UPPER.PNG",
        "quote'\".png",
        "deep.ome.tif",
        "%d.jpg",
    ]
    for number, name in enumerate(names):
        write_image(tmp_path / "my [pictures]" / name, draw(number)[0])
    write_image(tmp_path / "my [pictures]" / ".hidden.png", draw(1)[0])
    out = tmp_path / "my [pictures]_labels"
    for _ in range(2):
        go("--images", tmp_path / "my [pictures]", "--panels")
        assert {entry["image"] for entry in report(out)["per_image"]} == set(names)
        assert len(list((out / "labels").iterdir())) == len(list((out / "gt").iterdir())) == len(names)
    assert f"{len(names)} already done" in capsys.readouterr().out
    assert {row["image"] for row in rows_of(out / "objects.csv")} == set(names)


# ---- engines ----


@pytest.fixture
def sam(tmp_path, monkeypatch):
    """Weights of a SAM that answers with the boxes themselves."""
    import annotation.sam

    painters = []

    def load(path, device, options):
        assert path.name == "sam.pth"
        painters.append(BoxPainter())
        return Sam(painters[-1], options)

    monkeypatch.setattr(annotation.sam, "load_sam", load)
    return save_text(tmp_path / "sam.pth", "weights"), painters


def test_engines_follow_from_the_weights(tmp_path, pictures, plugin, sam, capsys):
    weights, painters = sam
    out = tmp_path / "yolo"
    go("--images", pictures, "-o", out, "--detector", plugin(), "--cpu")
    assert "engines: yolo;" in capsys.readouterr().out
    assert {row["engine"] for row in rows_of(out / "objects.csv")} == {"yolo"}
    out = tmp_path / "both"
    go("--images", pictures, "-o", out, "--detector", plugin(), "--sam", weights, "--cpu")
    assert "engines: yolo+sam;" in capsys.readouterr().out
    assert {row["engine"] for row in rows_of(out / "objects.csv")} == {"yolo+sam"}
    assert len(painters) == 1 and painters[0].boxes
    for number in range(3):  # the boxes that SAM was asked for are those of the discs
        truth = draw(number)[1]
        labels = read_mask(out / "labels" / f"p{number}.png")
        assert len(np.unique(labels)) == truth.max() + 1
        for label in range(1, truth.max() + 1):
            rows, columns = np.nonzero(truth == label)
            box = labels[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert np.bincount(box.ravel()).argmax() > 0 and (box > 0).mean() > 0.6
    out = tmp_path / "three"
    words = ("--detector", plugin(), "--sam", weights, "--engines", "yolo+sam,watershed", "--panels", "--cpu")
    go("--images", pictures, "-o", out, *words)
    assert report(out)["agreement"]["min"] > 0.5 and (out / "panels" / "p0.png").is_file()
    assert report(out)["per_image"][0]["engines"].keys() == {"yolo+sam", "watershed"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--engines", "magic"), "'magic' is unknown; expected some of watershed"),
        (("--engines", "watershed,watershed"), "each once"),
        (("--engines", ","), "expected one or more"),
        (("--engines", "yolo"), "give --detector FILE"),
        (("--engines", "watershed+sam"), "give --sam PATH"),
        (("--engines", "model"), "give -c FILE or -cd DIR"),
        (("--engines", "watershed", "--detector", "a.pt"), "does not use it"),
        (("--tune", 2), "give --against DIR"),
        (("--against-kind", "masks"), "give --against DIR"),
        (("--against", ".", "--group-pattern", "("), "is no regular expression"),
        (("--step", 2, "--fps", 1), "not allowed with"),
        (("--device", "quantum", "--detector", "a.pt"), "is unknown"),
        (("-w", -1), "out of range"),
        (("--mm-per-pixel", 0), "above 0"),
    ],
)
def test_flags_that_cannot_be(tmp_path, pictures, words, message, capsys):
    assert message in stopped(2, capsys, "--images", pictures, "-o", tmp_path / "out", *words)
    assert not (tmp_path / "out" / "labels").exists()


def save_onnx(path, shape):
    from onnx import TensorProto, helper, numpy_helper, save

    graph = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["output"])],
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, (1, 3, 64, 64))],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.zeros(shape, np.float32), "c")],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(path))
    return path


def test_weights_that_are_something_else(tmp_path, pictures, capsys):
    words = ("--images", pictures, "-o", tmp_path / "out", "--cpu")
    err = stopped(1, capsys, *words, "--detector", save_onnx(tmp_path / "other.onnx", (1, 7, 11)))
    assert "other.onnx" in err and "(1, 7, 11) for an input of 64x64" in err
    assert "no such detector" in stopped(1, capsys, *words, "--detector", "none.onnx")
    err = stopped(1, capsys, *words, "--detector", save_text(tmp_path / "text.onnx", "text"))
    assert "text.onnx" in err
    err = stopped(1, capsys, *words, "--detector", save_text(tmp_path / "net.weights", "text"))
    assert "expected .onnx, or .pt" in err
    assert "no such weights of SAM" in stopped(1, capsys, *words, "--sam", "none.pth")
    err = stopped(1, capsys, *words, "--sam", save_text(tmp_path / "text.pth", "text"))
    assert "text.pth" in err
    err = stopped(1, capsys, *words, "-c", tmp_path / "none.pth")
    assert "none.pth" in err
    assert not (tmp_path / "out" / "labels").exists()


def test_sam_of_another_type(tmp_path, pictures, capsys):
    pytest.importorskip("segment_anything")
    torch.save(build_tiny_segment_anything().state_dict(), tmp_path / "sam.pth")
    words = ("--images", pictures, "-o", tmp_path / "out", "--cpu", "--sam", tmp_path / "sam.pth")
    err = stopped(1, capsys, *words, "--sam-type", "vit_h")
    assert "sam.pth holds" in err and "expected vit_h as --sam-type says" in err
    go(*words, "--engines", "watershed+sam")  # random weights: whatever comes out, it is complete
    assert report(tmp_path / "out")["images"] == 3


def test_a_detector_without_boxes_and_one_with_boxes_outside(tmp_path, pictures, plugin, sam):
    nothing = save_onnx(tmp_path / "nothing.onnx", (1, 5, 84))  # v8: all scores are zero
    go("--images", pictures, "-o", tmp_path / "nothing", "--detector", nothing, "--sam", sam[0], "--cpu")
    assert report(tmp_path / "nothing")["objects"] == 0 and report(tmp_path / "nothing")["flags"]["empty"] == 3
    for name, more in (("outside", ()), ("prompted", ("--sam", sam[0]))):
        out = tmp_path / name
        go("--images", pictures, "-o", out, "--detector", plugin("outside"), "--cpu", *more)
        for number in range(3):
            labels = read_mask(out / "labels" / f"p{number}.png")
            assert labels.max() == 2 and labels[15, 15] == 1 and labels[75, 105] == 2
        for row in rows_of(out / "objects.csv"):
            assert int(row["box_left"]) + int(row["box_width"]) <= SIZE[1]
        boxes = np.array([line.split() for line in (out / "yolo/p0.txt").read_text().splitlines()], float)
        assert boxes[:, 1:].min() >= 0 and boxes[:, 1:].max() <= 1


@pytest.mark.parametrize("rule", ["sam_first", "unite", "vote"])
def test_overlapping_discs_of_two_engines_stay_two(tmp_path, pictures, plugin, rule, monkeypatch):
    import annotation.watershed
    from annotation.instances import number_instances

    def other(image, options):
        rows, columns = np.indices(image.shape[:2])
        inside = (rows - 50) ** 2 + (columns - 90) ** 2 < 20**2
        return number_instances(inside.astype(np.int32), 0.8, "watershed")

    monkeypatch.setattr(annotation.watershed, "segment", other)
    more = ("--engines", "yolo,watershed", "--combine", rule, "--min-votes", 1, "--cpu")
    go("--images", pictures, "-o", tmp_path / "out", "--detector", plugin("disc"), *more)
    labels = read_mask(tmp_path / "out" / "labels" / "p0.png")
    gt = read_mask(tmp_path / "out" / "gt" / "p0.png")
    assert labels.max() == 2 and labels[50, 50] != labels[50, 100] and min(labels[50, 50], labels[50, 100]) > 0
    assert cv2.connectedComponents(gt, connectivity=8)[0] == 3
    assert {row["engine"] for row in rows_of(tmp_path / "out" / "objects.csv")} == {"yolo", "watershed"}


def test_moved_weights_are_the_same_weights(tmp_path, pictures, plugin, capsys):
    go("--images", pictures, "-o", tmp_path / "out", "--detector", plugin(), "--cpu")
    moved = (tmp_path / "weights.pt").rename(tmp_path / "moved.pt")
    go("--images", pictures, "-o", tmp_path / "out", "--detector", moved, "--cpu")
    assert "3 already done" in capsys.readouterr().out
    go("--images", pictures, "-o", tmp_path / "out", "--detector", save_text(moved, "other"), "--cpu")
    assert "3 annotated" in capsys.readouterr().out


def test_a_network_of_ours_labels_and_says_what_runs_it(tmp_path, pictures, capsys):
    write_checkpoint(tmp_path / "net.pth")
    go("--images", pictures, "-o", tmp_path / "out", "-c", tmp_path / "net.pth", "--backend", "torch", "--cpu")
    printed = capsys.readouterr().out
    assert "engines: model;" in printed and printed.count("net.pth: ") == 1
    assert {row["engine"] for row in rows_of(tmp_path / "out" / "objects.csv")} == {"model"}
    with pytest.raises(SystemExit) as stop:
        go("--images", pictures, "-o", tmp_path / "out", "-c", tmp_path / "net.pth", "--model-classes", "x", "-w", 2)
    assert stop.value.code == 2 and "knows background, object" in capsys.readouterr().err


# ---- settings, scores, tuning ----


def test_a_run_is_repeated_from_its_record(tmp_path, pictures):
    out = tmp_path / "out"
    go("--images", pictures, "-o", out, "--preset", "nuclei", "--ws-min-area", 40, "--gap", 2, "--ws-retinex", "15,80")
    expected = content(out)
    saved = shutil.copy(out / "args.json", tmp_path / "args.json")
    assert json.loads(saved.read_text())["flags"] == report(out)["settings"]["flags"]
    assert json.loads(saved.read_text())["environment"]["tessera"]
    shutil.rmtree(out)
    annotate.main(["--settings", str(saved)])
    assert content(out) == expected
    annotate.main(["--settings", str(saved), "-o", str(tmp_path / "other"), "--ws-min-area", "50"])
    assert report(tmp_path / "other")["settings"]["flags"]["ws_min_area"] == 50
    assert report(tmp_path / "other")["settings"]["flags"]["preset"] == "nuclei"


def test_scores_are_those_of_the_label_files(tmp_path, pictures, capsys):
    truth = tmp_path / "pictures_truth"
    (truth / "p2.png").unlink()
    write_mask(truth / "extra.png", np.ones((5, 5), np.uint8))
    out = tmp_path / "out"
    err = stopped(1, capsys, "--images", pictures, "-o", out, "--against", truth, "--ws-min-area", 220)
    assert "have no reference" in err and "p2" in err and "references have no image" in err and "extra" in err
    with pytest.raises(SystemExit):
        go("--images", pictures, "-o", out, "--against", truth, "--ws-min-area", 220)
    printed = capsys.readouterr().out
    total = None
    for stem in ("p0", "p1"):
        labels = read_mask(out / "labels" / f"{stem}.png").astype(np.int64)
        scores = object_scores(labels, read_mask(truth / f"{stem}.png").astype(np.int64))
        total = scores if total is None else total + scores
    f1 = total.summary()["at"][0]["f1"]
    assert 0.2 < f1 < 1
    assert f"all: F1@0.5 {f1:.3f}," in printed
    last = rows_of(out / "scores.csv")[-1]
    assert float(last["f1"]) == pytest.approx(f1, abs=1e-3)


def test_references_that_do_not_fit(tmp_path, pictures, capsys):
    words = ("--images", pictures, "-o", tmp_path / "out", "--against")
    assert "does not exist" in stopped(1, capsys, *words, tmp_path / "none")
    (tmp_path / "void").mkdir()
    assert "no masks in" in stopped(1, capsys, *words, tmp_path / "void")
    assert not (tmp_path / "out" / "labels").exists()  # said before the work
    truth = tmp_path / "pictures_truth"
    write_mask(truth / "p0.png", np.ones((5, 5), np.uint8))
    (truth / "p1.png").write_bytes(b"no mask")
    err = stopped(1, capsys, *words, truth)
    assert "p0.png is 5x5, its image is 96x128" in err and "p1.png" in err
    for path in truth.iterdir():
        path.rename(path.with_name(f"x{path.name}"))
    assert "files pair by stem" in stopped(1, capsys, *words, truth)


def test_tuning_ends_at_or_above_the_default(tmp_path, capsys):
    pictures = write_pictures(tmp_path / "pictures", 3, size=(64, 96))
    truth, out = tmp_path / "pictures_truth", tmp_path / "out"
    poor = ("--ws-min-area", 250)  # where the search starts: most discs are dropped
    words = ("--images", pictures, "-o", out, "--against", truth)
    go(*words, *poor, "--tune", 2, "--tune-trials", 8)
    printed = capsys.readouterr().out
    assert "tuning on p" in printed and "--settings" in printed
    tuned = json.loads((out / "tuned.json").read_text())
    assert tuned["scores"][-1] >= tuned["default_scores"][-1]
    assert tuned["flags"]["ws_min_area"] != 250 or tuned["scores"][-1] == tuned["default_scores"][-1]
    assert (out / "tune.csv").is_file()
    labels = {path.name: path.read_bytes() for path in (out / "labels").iterdir()}
    go("--settings", out / "tuned.json", *words, "-o", tmp_path / "again")
    assert {path.name: path.read_bytes() for path in (tmp_path / "again" / "labels").iterdir()} == labels


@pytest.mark.parametrize("with_sam", [False, True])
def test_detectors_are_tuned_with_their_slices(tmp_path, plugin, sam, with_sam):
    pictures = write_pictures(tmp_path / "pictures", 2, size=(64, 96))
    words = ("--detector", plugin(), *(("--sam", sam[0]) if with_sam else ()), "--cpu", "--tune", 1, "--tune-trials", 6)
    go("--images", pictures, "-o", "out", "--against", "pictures_truth", *words)
    tried = rows_of(Path("out/tune.csv"))
    assert any(name.startswith("slice") for name in tried[0]) and not any(row["failure"] for row in tried)
    tuned = json.loads(Path("out/tuned.json").read_text())
    assert tuned["scores"][-1] >= tuned["default_scores"][-1] and tuned["flags"]["detector"].endswith("weights.pt")


def test_tuned_settings_hold_where_the_search_started(tmp_path, pictures, monkeypatch):
    import annotation.tuning

    def tune(segment, space, samples, options, *, tell=None):
        trial = annotation.tuning.Trial(0, {}, [0.5, 0.5, 0.5], [0.1] * 3)
        best = annotation.tuning.Trial(1, {"ws_blur": 1.7}, [0.6, 0.6, 0.6], [0.1] * 3)
        assert len(segment(samples[0].image, {"ws_blur": 1.7}, {}))
        return annotation.tuning.Tuning(best, [trial, best], "f1")

    monkeypatch.setattr(annotation.tuning, "tune", tune)
    go("--images", pictures, "-o", "out", "--against", "pictures_truth", "--tune", 1, "--preset", "nuclei")
    assert json.loads(Path("out/tuned.json").read_text())["flags"] == {"preset": "nuclei", "ws_blur": 1.7}


# ---- videos ----


def write_clip(path, count=4, fps=5.0):
    """Discs that appear one after another."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), fps, SIZE[::-1])
    assert writer.isOpened()
    for number in range(count):
        frame = np.full((*SIZE, 3), 40, np.uint8)
        for disc in range(number + 1):
            cv2.circle(frame, (16 + 28 * disc, 48), 10, (200, 200, 200), -1)
        writer.write(frame)
    writer.release()
    return path


def test_a_video_gives_frames_counts_over_time_and_a_video(tmp_path, capsys):
    clip = write_clip(tmp_path / "froth.mp4")
    go("--images", clip, "--mm-per-pixel", 0.1)
    (out,) = tmp_path.glob("*_labels")
    rows = rows_of(out / "over_time.csv")
    assert [int(row["objects"]) for row in rows] == [1, 2, 3, 4]
    assert [float(row["seconds"]) for row in rows] == pytest.approx([0, 0.2, 0.4, 0.6], abs=0.01)
    assert float(rows[0]["diameter_mean"]) == pytest.approx(2.1, abs=0.3)
    assert (out / "froth_over_time.png").is_file()
    capture = cv2.VideoCapture(str(out / "froth_overlay.mp4"))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 4
    assert report(out)["images"] == 4 and len(list((out / "labels").iterdir())) == 4
    before = exact(out)
    go("--images", clip, "--mm-per-pixel", 0.1)
    assert "4 already done" in capsys.readouterr().out
    assert {name: data for name, data in exact(out).items() if not name.endswith(".mp4")} == {
        name: data for name, data in before.items() if not name.endswith(".mp4")
    }


def test_videos_beside_pictures_and_bad_ones(tmp_path, pictures, capsys):
    write_clip(pictures / "a.mp4", 4)
    write_clip(tmp_path / "b.mp4", 2)
    (pictures / "bad.mp4").write_bytes(b"no video" * 20)
    out = tmp_path / "out"
    err = stopped(1, capsys, "--images", pictures, "-o", out, "--step", 2)
    assert "bad.mp4 cannot be opened as a video" in err and report(out)["images"] == 5
    assert [row["frame"] for row in rows_of(out / "over_time.csv")] == ["0", "2"]
    go("--images", tmp_path / "b.mp4", "-o", out)  # the table is about what was asked for
    assert [row["video"] + row["objects"] for row in rows_of(out / "over_time.csv")] == ["b.mp41", "b.mp42"]
    err = stopped(1, capsys, "--images", tmp_path / "b.mp4", "-o", out, "--step", 2)
    assert "made from other flags" in err


# ---- as a program ----


def test_help_loads_no_torch():
    code = (
        "import sys, annotate\n"
        "try: annotate.main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert 'torch' not in sys.modules and 'skimage' not in sys.modules, 'slow'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--engines" in done.stdout and "--tune" in done.stdout


def test_as_a_program_with_two_processes(tmp_path, pictures):
    (pictures / "bad.png").write_bytes(b"no picture")
    words = [sys.executable, str(ROOT / "annotate.py"), "--images", "pictures", "-o", "out", "-w", "2"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "bad.png" in done.stderr and "1 finding, the rest is done" in done.stderr
    assert "Traceback" not in done.stderr and "3 annotated" in done.stdout
    assert all((tmp_path / "out" / name).is_file() for name in TABLES)
    (pictures / "bad.png").unlink()
    again = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and "3 already done" in again.stdout


def test_an_output_that_another_process_writes_to_is_left_alone(pictures, tmp_path, capsys):
    folder = tmp_path / "pictures_labels"
    with hold_folder(folder):
        said = stopped(1, capsys, "--images", pictures)
        assert "in use by another process" in said and "another output folder" in said
        assert [path.name for path in folder.iterdir()] == [".annotate"]
    go("--images", pictures)
    assert not (folder / ".annotate" / "lock").exists()
