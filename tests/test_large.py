"""Large pictures: the same files, record and objects as a picture that is looked at as a whole."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from slides import write_slide

import annotate
from annotation import large
from annotation.coco import encode_objects, outlines_of
from annotation.edits import EDITED
from annotation.engine_options import EngineOptions
from annotation.engines import Engines
from annotation.files import write_image_files
from annotation.instances import Instances, gap_mask, number_instances, object_rows
from annotation.large import annotate_large
from annotation.overlays import overlay
from annotation.presets import WatershedOptions
from annotation.records import FileOptions, digest_file, is_done, is_edited, list_label_files, read_record
from annotation.report import write_tables
from annotation.tiled import TileOptions
from annotation.tiled_rows import ObjectCounts
from geojson import read_geojson
from image_io import read_image, read_mask, write_image
from object_metrics import object_scores
from pairing import list_pairs
from polygons import rasterise
from slide_io import open_slide

SIZE = (260, 330)
TILES = TileOptions(64, 48)
OPTIONS = {"panels": True, "geojson": True, "yolo": "segment", "coco": "polygons"}


def components(image: np.ndarray, level: int = 127) -> Instances:
    """What is brighter than a level, in 4-connected pieces."""
    inside = (image[..., 0] > level).astype(np.uint8)
    _, labels = cv2.connectedComponents(inside, connectivity=4)
    return number_instances(labels, 0.75, "watershed")


class Bright(Engines):
    """Engines that need no choice: what is bright."""

    def __init__(self, *names: str) -> None:
        self.options = EngineOptions(names=names or ("watershed",))
        self.windows = 0
        self.stop, self.level = -1, 127

    def fixed(self, sample: np.ndarray) -> "Bright":
        return self

    def find(self, image: np.ndarray, cache=None):
        if self.windows == self.stop:
            raise KeyboardInterrupt
        self.windows += 1
        found = components(image, self.level)
        return found, dict.fromkeys(self.options.names, found)


def draw(seed=0, size=SIZE, count=60, radius=(2, 14)) -> np.ndarray:
    """Discs, a ring with a hole and a bar through the whole picture, (H, W, 3)."""
    rng = np.random.default_rng(seed)
    image = np.full((*size, 3), 30, np.uint8)
    for _ in range(count):
        centre = int(rng.integers(0, size[1])), int(rng.integers(0, size[0]))
        cv2.circle(image, centre, int(rng.integers(*radius)), (220, 200, 160), -1)
    cv2.circle(image, (size[1] // 2, size[0] // 2), 30, (255, 255, 255), 4)
    cv2.line(image, (0, size[0] - 5), (size[1], size[0] - 60), (200, 255, 255), 5)
    return image


@pytest.fixture
def picture(tmp_path) -> Path:
    """A tiled TIFF."""
    path = tmp_path / "pictures" / "p.tif"
    path.parent.mkdir()
    tifffile.imwrite(path, draw(), tile=(64, 64), photometric="rgb", compression="deflate")
    return path


def make(options: FileOptions, path: Path, engines=None, settings="s", **more):
    return annotate_large(options, path, engines or Bright(), settings, digest_file(path), tiles=TILES, **more)


def done(options: FileOptions, path: Path, settings="s") -> bool:
    return is_done(options, path.stem, digest_file(path), settings)


def labels_of(options: FileOptions, stem="p") -> np.ndarray:
    (path,) = list_label_files(options.folder, "labels", stem)
    return read_mask(path).astype(np.int32)


# ---- the same as an ordinary picture ----


def test_files_and_record_are_those_of_an_ordinary_picture(tmp_path, picture):
    whole, parts = (FileOptions(tmp_path / name, **OPTIONS) for name in ("whole", "parts"))
    image = read_image(picture)
    found = components(image)
    write_image_files(whole, picture, image, found, {"watershed": found}, "s", 0.1, image_digest=digest_file(picture))
    record = make(parts, picture)
    np.testing.assert_array_equal(labels_of(parts), found.labels)
    gt = [read_mask(list_label_files(options.folder, "gt", "p")[0]) for options in (whole, parts)]
    np.testing.assert_array_equal(*gt)
    one, other = read_record(whole, "p"), read_record(parts, "p")
    assert {name: value for name, value in other.items() if name != "table"} == record
    assert other.pop("damage") == []
    assert list(one) == list(other) and list(one["table"]) == list(other["table"])
    for name in set(one) - {"table", "seconds", "written", "label_file"}:
        assert one[name] == other[name], name
    for name, column in one["table"].items():
        if isinstance(column[0], float):
            assert other["table"][name] == pytest.approx(column, rel=1e-5, abs=1e-5), name
        else:
            assert other["table"][name] == column, name
    for kind in ("yolo", "overlays", "panels", "geojson"):
        here, there = whole.place(kind, "p").read_bytes(), parts.place(kind, "p").read_bytes()
        assert (here == there) or kind == "geojson"
    assert done(parts, picture) and not is_edited(parts, "p")
    assert not (parts.folder / ".annotate" / "p.work").exists()


@pytest.mark.parametrize("name", ["p.svs", "p.ome.tif", "p.png", "p.jpg"])
def test_the_output_is_a_data_set_of_slides(tmp_path, name, monkeypatch):
    """Masks pair with what they were made of; a pyramid gives the overlay from its smaller level."""
    monkeypatch.setattr(large, "OVERLAY_SIDE", 170)
    path, options = tmp_path / "pictures" / name, FileOptions(tmp_path / "out")
    path.parent.mkdir()
    if name.endswith(("svs", "tif")):
        write_slide(path, draw())
    else:
        write_image(path, draw())
    record = make(options, path)
    listing = list_pairs(options.folder)
    assert [(pair.name, pair.image.name, str(pair.mask)[-8:]) for pair in listing.pairs] == [("p", name, "gt/p.tif")]
    assert not listing.errors and record["objects"] > 20 and record["image"] == name
    assert read_image(options.place("overlays", "p")).shape == (130, 165, 3)
    with tifffile.TiffFile(options.folder / "labels" / "p.tif") as tif:
        assert tif.pages[0].is_tiled and tif.pages[0].dtype == np.uint32


def test_tables_and_coco_hold_the_objects(tmp_path, picture):
    options = FileOptions(tmp_path / "out", decimal="dot")
    write_tables(options, [make(options, picture)])
    labels = labels_of(options)
    coco = COCO(str(options.folder / "annotations.json"))
    assert len(coco.anns) == labels.max()
    for number, annotation in coco.anns.items():
        np.testing.assert_array_equal(coco_mask.decode(annotation["segmentation"]) > 0, labels == number)
    assert len((options.folder / "objects.csv").read_text().splitlines()) == labels.max() + 1


def test_geojson_is_the_label_map(tmp_path, picture):
    options = FileOptions(tmp_path / "out", geojson=True)
    make(options, picture)
    shapes, findings = read_geojson(options.place("geojson", "p"))
    labels = labels_of(options)
    assert not findings and len(shapes) == labels.max()
    np.testing.assert_array_equal(rasterise(shapes, 0, 0, *SIZE), labels > 0)
    assert "counts" in read_record(options, "p")["table"] and "outline" not in read_record(options, "p")["table"]


@pytest.mark.parametrize("height", [1, 7, 64, 300])
def test_run_lengths_come_as_objects_end(height):
    found = components(draw(3))
    counter = ObjectCounts(*SIZE, len(found))
    strings: dict[int, str] = {}
    for top in range(0, SIZE[0], height):
        numbers, texts = counter.add(top, found.labels[top : top + height].astype(np.uint32))
        assert not set(numbers) & set(strings)
        strings |= dict(zip(numbers, texts, strict=True))
    assert [strings[number + 1] for number in range(len(found))] == encode_objects(found.labels)


def test_no_object_at_all(tmp_path):
    path = tmp_path / "p.tif"
    tifffile.imwrite(path, np.zeros((100, 90), np.uint8))
    options = FileOptions(tmp_path / "out", **OPTIONS)
    record = make(options, path)
    assert record["objects"] == 0 and record["flags"] == ["empty"] and done(options, path)
    write_tables(options, [record])
    assert options.place("yolo", "p").read_text() == ""


def test_several_engines_give_their_shares_and_agreement(tmp_path, picture):
    record = make(FileOptions(tmp_path / "out"), picture, Bright("watershed", "model"))
    assert record["agreement"] == 1.0 and record["engines"] == {"watershed": record["objects"], "model": 0}


@pytest.mark.parametrize("step", [2, 3, 7])
def test_overlays_are_reduced_and_lose_no_object(tmp_path, picture, monkeypatch, step):
    monkeypatch.setattr(large, "OVERLAY_SIDE", -(-330 // step))
    options = FileOptions(tmp_path / "out", panels=True)
    seen = []
    monkeypatch.setattr(large, "overlay", lambda image, labels: seen.append((image, labels)) or overlay(image, labels))
    record = make(options, picture)
    ((image, labels),) = seen
    shape = read_image(options.place("overlays", "p")).shape
    assert image.shape == shape == (*labels.shape, 3) and max(shape) <= -(-330 // step)
    assert labels.max() == record["objects"]
    whole = labels_of(options)
    small = cv2.resize(whole.astype(np.float32), labels.shape[::-1], interpolation=cv2.INTER_NEAREST)
    assert np.mean((small > 0) != (labels > 0)) < 0.15  # the sampled pixels differ by a part of a step
    if step == 2:
        assert set(np.unique(labels)) == set(range(record["objects"] + 1))


@pytest.mark.parametrize(("given", "expected"), [(None, 1800 * 2600), (500, 500)])
def test_the_sample_does_not_limit_the_area_of_objects(tmp_path, given, expected):
    path = tmp_path / "p.tif"
    tifffile.imwrite(path, draw(4, (1800, 2600), 900)[..., 0])
    engines = Engines(EngineOptions(watershed=WatershedOptions(preset="fluorescence", max_area=given)))
    with open_slide(path) as slide:
        fixed = large._fix(engines, slide.grid()).options.watershed
    assert fixed.max_area == expected and None not in vars(fixed).values()


def test_windows_of_the_watershed_agree_with_the_whole(tmp_path):
    """With options chosen on the same sample, at windows with a margin of several objects."""
    path = tmp_path / "p.tif"
    image = cv2.GaussianBlur(draw(6, (700, 900), 300, (6, 14)), (0, 0), 1.5)[..., 0]
    tifffile.imwrite(path, image)
    engines, options = Engines(EngineOptions(watershed=WatershedOptions(preset="fluorescence"))), tmp_path / "out"
    with open_slide(path) as slide:
        whole = large._fix(engines, slide.grid()).find(image[..., None])[0]
    files = FileOptions(options)
    record = annotate_large(files, path, engines, "s", digest_file(path), tiles=TileOptions(256, 128))
    labels = labels_of(files)
    shared = object_scores(whole.labels, labels).matched[0]
    assert abs(record["objects"] - len(whole)) <= 2 and shared >= len(whole) - 2 > 100
    assert np.mean((labels > 0) != (whole.labels > 0)) < 0.005


# ---- kills ----


@pytest.mark.parametrize("stop", [1, 8, 25])
def test_a_killed_run_goes_on(tmp_path, picture, stop):
    options, engines = FileOptions(tmp_path / "out"), Bright()
    engines.stop = stop
    with pytest.raises(KeyboardInterrupt):
        make(options, picture, engines)
    assert not done(options, picture) and not (options.folder / "labels").exists()
    again, fresh = Bright(), FileOptions(tmp_path / "fresh")
    make(options, picture, again)
    assert again.windows == 30 - stop // 6 * 6  # whole rows of six windows are not looked at again
    make(fresh, picture)
    for kind in ("labels", "gt"):
        assert (options.folder / kind / "p.tif").read_bytes() == (fresh.folder / kind / "p.tif").read_bytes()


@pytest.mark.parametrize("name", ["write_text", "write_quickly", "_draw", "_put_in_place"])
def test_a_kill_at_the_end_loses_no_window_and_edits_nothing(tmp_path, picture, monkeypatch, name):
    options = FileOptions(tmp_path / "out")
    older = Bright()
    older.level = 210  # not the bar
    make(options, picture, older, settings="old")

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(large, name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            make(options, picture)
    assert not done(options, picture) and not is_edited(options, "p")
    again = Bright()
    make(options, picture, again)
    assert again.windows == 0 and done(options, picture)


def test_a_kill_between_labels_and_gt_is_no_edit(tmp_path, picture, monkeypatch):
    options = FileOptions(tmp_path / "out")
    older = Bright()
    older.level = 210  # not the bar
    make(options, picture, older, settings="old")
    before, replace, calls = digest_file(options.folder / "labels" / "p.tif"), Path.replace, []

    def stopping(path, target):
        if path.suffix == ".tif" and path.parent.name == "p.work":
            calls.append(path)
            if len(calls) == 2:
                raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", stopping)
    with pytest.raises(KeyboardInterrupt):
        make(options, picture)
    assert digest_file(options.folder / "labels" / "p.tif") == before
    assert not is_edited(options, "p") and not done(options, picture)
    make(options, picture)
    assert done(options, picture)


# ---- edits ----


def test_edited_labels_stay_and_all_follows(tmp_path, picture):
    options = FileOptions(tmp_path / "out", decimal="dot")
    first = make(options, picture)
    labels = labels_of(options).astype(np.uint32)
    labels[labels == 3] = 0
    labels[100:140, 60:75] = 70_000
    tifffile.imwrite(options.folder / "labels" / "p.tif", labels, tile=(64, 64))
    edited = digest_file(options.folder / "labels" / "p.tif")
    assert is_edited(options, "p") and not done(options, picture)
    engines = Bright()
    record = make(options, picture, engines)
    assert engines.windows == 0 and record["edited"] == {"gt": None, "labels": edited}
    assert digest_file(options.folder / "labels" / "p.tif") == edited and done(options, picture)
    assert record["flags"][-1] == EDITED and record["written"]["labels"] == []
    expected = number_instances(labels, 1.0, EDITED, pieces="all")
    table = read_record(options, "p")["table"]
    rows = object_rows(expected, read_image(picture))
    assert table["area"] == [row["area"] for row in rows] and 70_000 in table["id"] and 3 not in table["id"]
    assert table["mean_intensity"] == pytest.approx([row["mean_intensity"] for row in rows], rel=1e-5)
    assert table["counts"] == encode_objects(expected.labels)
    kept = [score for score, engine in zip(table["score"], table["engine"], strict=True) if engine == "watershed"]
    assert set(kept) == {0.75} and len(kept) >= first["objects"] - 8
    assert ((read_mask(options.folder / "gt" / "p.tif") > 0) <= (labels > 0)).all()


def test_an_edited_gt_stays_and_labels_follow(tmp_path, picture):
    options = FileOptions(tmp_path / "out")
    make(options, picture)
    gt = read_mask(options.folder / "gt" / "p.tif")
    gt[:, :100] = 0
    gt[20:30, 40:60] = 255
    cv2.imwrite(str(options.folder / "gt" / "p.png"), gt)
    (options.folder / "gt" / "p.tif").unlink()
    record = make(options, picture)
    assert record["edited"]["gt"] == digest_file(options.folder / "gt" / "p.png") and not record["edited"]["labels"]
    labels = labels_of(options)
    assert ((gt > 0) <= (labels > 0)).all()
    np.testing.assert_array_equal(gap_mask(labels, 1), gt)
    assert labels[25, 50] > 0 and done(options, picture)
    assert not (options.folder / "gt" / "p.tif").exists()


def test_an_edited_file_of_another_size_is_refused(tmp_path, picture):
    options = FileOptions(tmp_path / "out")
    make(options, picture)
    cv2.imwrite(str(options.folder / "gt" / "p.png"), np.zeros((50, 60), np.uint8))
    (options.folder / "gt" / "p.tif").unlink()
    with pytest.raises(Exception, match=r"p\.png is 50x60, its slide .* expected"):
        make(options, picture)
    assert (options.folder / "gt" / "p.png").is_file()


def test_a_label_of_a_smaller_limit_is_replaced(tmp_path, picture):
    options, image = FileOptions(tmp_path / "out"), read_image(picture)
    found = components(image)
    write_image_files(options, picture, image, found, {"watershed": found}, "old", 0.1)
    make(options, picture)
    assert [path.name for path in sorted((options.folder / "labels").iterdir())] == ["p.tif"]
    assert [path.name for path in sorted((options.folder / "gt").iterdir())] == ["p.tif"] and done(options, picture)


# ---- the command ----


def break_tile(path: Path, place: int) -> None:
    with tifffile.TiffFile(path) as tif:
        page = tif.pages[0]
        offset, count = page.dataoffsets[place], page.databytecounts[place]
    data = bytearray(path.read_bytes())
    data[offset : offset + count] = b"\xff" * count
    path.write_bytes(bytes(data))


def run(folder: Path, *words: str, capsys) -> tuple[int, str]:
    more = ["-w", "1", "--preset", "fluorescence", "--log-dir", str(folder / "logs"), "--cpu"]
    status = 0
    try:
        annotate.main(["--images", str(folder / "pictures"), "-o", str(folder / "out"), *more, *words])
    except SystemExit as error:
        status = int(error.code or 0)
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def test_the_command_takes_large_pictures_window_by_window(tmp_path, picture, capsys):
    whole = tmp_path / "pictures" / "q.png"
    cv2.imwrite(str(whole), draw(5, (150, 120))[..., ::-1])
    status, printed = run(tmp_path, "--max-megapixels", "0.05", capsys=capsys)
    assert status == 0, printed
    out = tmp_path / "out"
    assert (out / "labels" / "p.tif").is_file() and (out / "labels" / "q.png").is_file()
    report = json.loads((out / "report.json").read_text())
    assert report["images"] == 2 and report["objects"] == sum(each["objects"] for each in report["per_image"]) > 20
    status, printed = run(tmp_path, "--max-megapixels", "0.05", capsys=capsys)
    assert status == 0 and "2 already done" in printed
    status, printed = run(tmp_path, "--max-megapixels", "0.01", capsys=capsys)  # a PNG is decoded at once
    assert status == 0 and (out / "labels" / "q.tif").is_file() and not (out / "labels" / "q.png").exists(), printed


def test_a_damaged_tile_is_named_and_the_rest_is_done(tmp_path, picture, capsys):
    break_tile(picture, 8)
    status, printed = run(tmp_path, "--max-megapixels", "0.05", capsys=capsys)
    assert status == 1 and "p.tif" in printed and "row" in printed
    labels = read_mask(tmp_path / "out" / "labels" / "p.tif")
    assert labels.max() > 10 and not labels[64:128, 128:192].any()
    assert read_record(FileOptions(tmp_path / "out"), "p")["damage"]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["images"] == 1
    again, printed = run(tmp_path, "--max-megapixels", "0.05", capsys=capsys)
    assert again == 1 and "p.tif" in printed and "1 already done" in printed


def test_a_truncated_large_picture_does_not_stop_the_others(tmp_path, picture, capsys):
    data = picture.read_bytes()
    (tmp_path / "pictures" / "z.tif").write_bytes(data[: len(data) // 2])
    status, printed = run(tmp_path, "--max-megapixels", "0.05", capsys=capsys)
    assert status == 1 and "z.tif" in printed and (tmp_path / "out" / "labels" / "p.tif").is_file()


# ---- memory ----


@pytest.mark.slow
def test_memory_does_not_follow_the_height(tmp_path):
    """The peak of a picture four times as high is the same within 15 %."""
    block = cv2.GaussianBlur(draw(1, (1024, 4096), 500, (8, 20))[..., :1], (0, 0), 2).reshape(1024, 4096)
    peaks = []
    for blocks in (3, 12):
        path = tmp_path / f"{blocks}.tif"
        tiles = (block[row : row + 512, column : column + 512] for _ in range(blocks) for row in (0, 512)
                 for column in range(0, 4096, 512))  # fmt: skip
        how = {"shape": (1024 * blocks, 4096), "dtype": np.uint8, "tile": (512, 512), "compression": "deflate"}
        tifffile.imwrite(path, tiles, photometric="minisblack", **how)
        program = Path(__file__).parent / "large_memory.py"
        command = [sys.executable, str(program), str(path), str(tmp_path / f"out{blocks}")]
        result = subprocess.run(command, cwd=program.parent.parent, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        peak, objects = result.stdout.split()
        assert int(objects) > 100 * blocks
        peaks.append(float(peak))
    assert peaks[1] < 1.15 * peaks[0], f"{peaks[0]:.0f} MB, then {peaks[1]:.0f} MB"


def test_outlines_are_those_of_the_label_map(tmp_path, picture):
    options = FileOptions(tmp_path / "out", yolo="segment")
    make(options, picture)
    outlines, holes = outlines_of(labels_of(options))
    table = read_record(options, "p")["table"]
    assert table["outline"] == outlines and table["holes"] == holes and any(holes)
