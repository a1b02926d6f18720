"""The output of annotate.py: files, records, edits, tables; COCO is checked with pycocotools."""

import csv
import json
import os
import time

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from scipy import ndimage

from annotation import encoding, files
from annotation.coco import decode_segmentation, encode_objects, outlines_of, parse_counts
from annotation.doubts import count_touching, flags_of, rank_doubts, strangeness
from annotation.edits import EDITED, follow_gt
from annotation.files import remove_leftovers, write_edited, write_image_files
from annotation.instances import gap_mask, number_instances
from annotation.overlays import overlay, panel
from annotation.records import FileOptions, digest_file, is_done, is_edited, list_records, read_record
from annotation.report import write_tables
from geojson import read_geojson
from image_headers import ImageError
from image_io import list_images, read_image, read_mask, write_image, write_mask
from polygons import rasterise


def scene(seed=0, height=90, width=120, count=25):
    """A picture of discs, some of them touching, and its objects with scores."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    centres = rng.uniform((0, 0), (height, width), (count, 2))
    distances = np.stack([np.hypot(y - row, x - column) for row, column in centres])
    radii = rng.uniform(3, 11, count)
    nearest = distances.argmin(axis=0)
    labels = np.where(distances.min(axis=0) < radii[nearest], nearest + 1, 0).astype(np.int32)
    image = np.where(labels > 0, 170, 60)[..., None] + rng.normal(0, 8, (height, width, 3))
    return image.clip(0, 255).astype(np.uint8), number_instances(
        labels, rng.uniform(0.3, 1, count), ["watershed"] * count
    )


@pytest.fixture
def source(tmp_path):
    """A folder with three pictures, and their objects by stem."""
    found = {}
    for seed, name in enumerate("abc"):
        image, found[name] = scene(seed)
        write_image(tmp_path / "pictures" / f"{name}.png", image)
    return tmp_path / "pictures", found


def annotate(options, source, stems="abc", settings="s1", **more):
    folder, found = source
    records = []
    for stem in stems:
        path = folder / f"{stem}.png"
        parts = {"watershed": found[stem]}
        records.append(write_image_files(options, path, read_image(path), found[stem], parts, settings, 0.1, **more))
    return records


def done(options, source, stem="a", settings="s1"):
    return is_done(options, stem, digest_file(source[0] / f"{stem}.png"), settings)


def interrupt(*_):
    raise KeyboardInterrupt


# ---- the files ----


def test_output_is_a_data_set_for_training(tmp_path, source):
    options = FileOptions(tmp_path / "out", panels=True)
    annotate(options, source)
    assert list(list_images(options.folder / "images")) == list(list_images(options.folder / "gt")) == ["a", "b", "c"]
    for stem, found in source[1].items():
        link = options.folder / "images" / f"{stem}.png"
        assert link.is_symlink() and not link.readlink().is_absolute()
        gt = read_mask(options.folder / "gt" / f"{stem}.png")
        assert gt.dtype == np.uint8 and set(np.unique(gt)) == {0, 255}
        np.testing.assert_array_equal(gt, gap_mask(found.labels, 1))
        labels = read_mask(options.folder / "labels" / f"{stem}.png")
        assert labels.dtype == np.uint16
        np.testing.assert_array_equal(labels, found.labels)
        assert read_image(options.folder / "overlays" / f"{stem}.png").shape == (90, 120, 3)
        assert (options.folder / "panels" / f"{stem}.png").is_file()


def test_links_survive_moving_both_folders(tmp_path, source):
    annotate(FileOptions(tmp_path / "out"), source)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (tmp_path / "out").rename(moved / "out")
    source[0].rename(moved / "pictures")
    assert read_image(moved / "out" / "images" / "a.png").shape == (90, 120, 3)


def test_copies_when_asked_for_and_when_links_are_refused(tmp_path, source, monkeypatch):
    annotate(FileOptions(tmp_path / "copied", copy=True), source)

    def refuse(*_, **__):
        raise OSError("no links here")

    monkeypatch.setattr("pathlib.Path.symlink_to", refuse)
    annotate(FileOptions(tmp_path / "refused"), source)
    for folder in ("copied", "refused"):
        path = tmp_path / folder / "images" / "b.png"
        assert not path.is_symlink() and path.read_bytes() == (source[0] / "b.png").read_bytes()
        assert not list(path.parent.glob(".*"))


def test_a_copy_replaces_a_link_and_stays(tmp_path, source):
    path = tmp_path / "out" / "images" / "a.png"
    for copy, is_link in ((False, True), (True, False), (False, False)):
        annotate(FileOptions(tmp_path / "out", copy=copy), source, "a")
        assert path.is_symlink() == is_link
        assert path.read_bytes() == (source[0] / "a.png").read_bytes()


def test_images_that_lie_in_the_output_stay_themselves(tmp_path, source):
    root = tmp_path / "set"
    root.mkdir()
    source[0].rename(root / "images")
    before = (root / "images" / "a.png").read_bytes()
    annotate(FileOptions(root), (root / "images", source[1]))
    path = root / "images" / "a.png"
    assert not path.is_symlink() and path.read_bytes() == before
    annotate(FileOptions(root, copy=True), (root / "images", source[1]))
    assert path.read_bytes() == before


def test_another_image_of_the_same_name_is_not_replaced(tmp_path, source):
    path = tmp_path / "out" / "images" / "a.png"
    write_image(path, np.zeros((5, 5, 3), np.uint8))
    with pytest.raises(ImageError, match="another image than .* give another output folder"):
        annotate(FileOptions(tmp_path / "out"), source)
    assert read_image(path).shape == (5, 5, 3)


def test_a_changed_source_is_copied_again(tmp_path, source):
    options = FileOptions(tmp_path / "out", copy=True)
    annotate(options, source, "a")
    write_image(source[0] / "a.png", scene(9)[0])
    assert not done(options, source)
    annotate(options, source, "a")
    assert (tmp_path / "out" / "images" / "a.png").read_bytes() == (source[0] / "a.png").read_bytes()


def test_a_picture_without_a_file_is_written(tmp_path):
    image, found = scene()
    options = FileOptions(tmp_path / "out")
    record = write_image_files(options, tmp_path / "frame_7.png", image, found, {}, "s", 0.0, image_digest="video 7")
    assert record["image"] == "frame_7.png"
    np.testing.assert_array_equal(read_image(options.folder / "images" / "frame_7.png"), image)
    assert is_done(options, "frame_7", "video 7", "s")


def test_more_objects_than_16_bits_hold_need_tiff(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "PNG_LABELS", 10)
    image, found = scene()
    options = FileOptions(tmp_path / "out")
    path = tmp_path / "a.png"
    write_image(path, image)
    record = write_image_files(options, path, image, found, {}, "s", 0.0)
    assert record["label_file"] == "a.tif" and not (options.folder / "labels" / "a.png").exists()
    np.testing.assert_array_equal(read_mask(options.folder / "labels" / "a.tif"), found.labels)
    assert is_done(options, "a", digest_file(path), "s")
    monkeypatch.setattr(encoding, "PNG_LABELS", 65535)
    write_image_files(options, path, image, found, {}, "s2", 0.0)
    assert [path.name for path in (options.folder / "labels").iterdir()] == ["a.png"]
    # A kill between the writing of one format and the removal of the other:
    monkeypatch.setattr(encoding, "PNG_LABELS", 10)
    with monkeypatch.context() as patch:
        patch.setattr(files, "_remove_others", lambda _, kept: interrupt() if kept.parent.name == "labels" else None)
        with pytest.raises(KeyboardInterrupt):
            write_image_files(options, path, image, found, {}, "s3", 0.0)
    assert len(list((options.folder / "labels").iterdir())) == 2 and not is_edited(options, "a")
    for _ in range(2):
        write_image_files(options, path, image, found, {}, "s3", 0.0)
        assert [path.name for path in (options.folder / "labels").iterdir()] == ["a.tif"]


@pytest.mark.parametrize(
    "image",
    [
        np.full((1, 1, 1), 7, np.uint8),
        np.zeros((20, 30, 3), np.uint8),
        np.full((20, 30, 1), np.nan, np.float32),
        np.full((20, 30, 4), 60000, np.uint16),
    ],
    ids=["1x1", "black", "nan", "16 bit"],
)
def test_any_image_with_and_without_objects(tmp_path, image):
    options = FileOptions(tmp_path / "out", panels=True, coco="polygons", yolo="segment", mm_per_pixel=0.1)
    empty = number_instances(np.zeros(image.shape[:2], np.int32), 1.0, "x")
    full = number_instances(np.ones(image.shape[:2], np.int32), 1.0, "x")
    records = []
    for name, found in (("empty", empty), ("full", full)):
        records.append(write_image_files(options, tmp_path / name, image, found, {"x": found}, "s", 0.0))
    write_tables(options, records)
    assert records[0]["flags"] == ["empty"] and "nearly full" in records[1]["flags"]
    assert len(COCO_quiet(options.folder / "annotations.json").anns) == 1


def COCO_quiet(path):  # noqa: N802
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


def test_a_read_only_folder_names_the_file(tmp_path, source, monkeypatch):
    (tmp_path / "out").write_text("a file where the folder should be")
    with pytest.raises(OSError, match="out"):
        annotate(FileOptions(tmp_path / "out"), source)


def test_a_link_that_somebody_else_made_is_not_replaced(tmp_path, source):
    folder = tmp_path / "out" / "images"
    folder.mkdir(parents=True)
    other = tmp_path / "other.png"
    write_image(other, scene(9)[0])
    (folder / "a.png").symlink_to(other)
    with pytest.raises(ImageError, match="another image than"):
        annotate(FileOptions(tmp_path / "out"), source, "a")
    assert (folder / "a.png").resolve() == other.resolve()
    other.write_bytes((source[0] / "a.png").read_bytes())  # the same image: the link may lead elsewhere
    annotate(FileOptions(tmp_path / "out"), source, "a")
    assert (folder / "a.png").resolve() == (source[0] / "a.png").resolve()


# ---- done, killed, edited ----


def test_done_means_same_image_settings_and_files(tmp_path, source):
    options = FileOptions(tmp_path / "out")
    assert not done(options, source)
    annotate(options, source)
    assert done(options, source) and not is_edited(options, "a")
    assert not done(options, source, settings="s2")
    assert not is_done(options, "a", "another image", "s1")
    assert not done(FileOptions(tmp_path / "out", gap=2), source)
    assert not done(FileOptions(tmp_path / "out", panels=True), source)
    for kind, name in (("gt", "a.png"), ("labels", "b.png"), ("yolo", "c.txt")):
        (options.folder / kind / name).unlink()
        assert not done(options, source, name[0]) and not is_edited(options, name[0])


@pytest.mark.parametrize("kind", ["overlays", "panels", "geojson"])
def test_drawings_of_an_earlier_run_do_not_count_as_done(tmp_path, source, kind):
    plain = {"overlays": False, "panels": False, "geojson": False}
    without, with_kind = FileOptions(tmp_path / "out", **plain), FileOptions(tmp_path / "out", **plain | {kind: True})
    annotate(with_kind, source)
    assert done(with_kind, source) and done(without, source)
    annotate(without, source, settings="s2")  # leaves the drawings of the objects before
    assert done(without, source, settings="s2") and not done(with_kind, source, settings="s2")
    annotate(with_kind, source, settings="s2")
    assert done(with_kind, source, settings="s2")


@pytest.mark.parametrize("stop_at", range(1, 6))
def test_a_kill_at_any_file_leaves_nothing_that_looks_edited(tmp_path, source, monkeypatch, stop_at):
    options = FileOptions(tmp_path / "out")
    annotate(options, source, "a")
    written = []

    class Killed(BaseException):
        pass

    def counted(function):
        def write(path, *args):
            if len(written) == stop_at - 1:
                raise Killed
            written.append(path)
            return function(path, *args)

        return write

    other = scene(5)[1]
    with monkeypatch.context() as patch:
        for name in ("atomic_write", "write_text", "write_quickly"):
            patch.setattr(files, name, counted(getattr(files, name)))
        with pytest.raises(Killed):
            annotate(options, (source[0], {"a": other}), "a", settings="s2")
    assert not is_edited(options, "a") and not done(options, source, settings="s2")
    annotate(options, (source[0], {"a": other}), "a", settings="s2")
    assert done(options, source, settings="s2")
    np.testing.assert_array_equal(read_mask(options.folder / "labels" / "a.png"), other.labels)


def test_a_kill_of_the_first_run_leaves_nothing_that_looks_edited(tmp_path, source, monkeypatch):
    options = FileOptions(tmp_path / "out")

    with monkeypatch.context() as patch:
        patch.setattr(files, "atomic_write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            annotate(options, source, "a")
    assert not is_edited(options, "a") and not done(options, source)


def edit(path, function):
    values = read_mask(path)
    write_mask(path, function(values).astype(values.dtype))
    return path.read_bytes()


def without_first(values):
    return np.where(values == 1, 0, values)


def test_edited_labels_are_never_overwritten_and_everything_follows_them(tmp_path, source):
    options = FileOptions(tmp_path / "out")
    annotate(options, source)
    path = options.folder / "labels" / "a.png"
    kept = edit(path, lambda values: np.where(values == 1, 0, np.where(values == 2, 900, values)))
    assert is_edited(options, "a") and not done(options, source)
    (record,) = annotate(options, source, "a", settings="s2")  # an engine found the old objects again
    assert path.read_bytes() == kept
    values = read_mask(path)
    assert record["edited"]["labels"] and not record["edited"]["gt"] and "edited" in record["flags"]
    assert set(read_record(options, "a")["table"]["id"]) == set(np.unique(values)) - {0}
    np.testing.assert_array_equal(
        read_mask(options.folder / "gt" / "a.png") > 0, gap_mask(values.astype(np.int32), 1) > 0
    )
    assert done(options, source, settings="s2") and is_edited(options, "a")
    edit(path, lambda values: np.where(values == 900, 0, values))
    assert not done(options, source, settings="s2")
    write_edited(options, source[0] / "a.png", read_image(source[0] / "a.png"), "s2")
    assert 900 not in read_record(options, "a")["table"]["id"]


def test_untouched_objects_keep_engine_and_score(tmp_path, source):
    options = FileOptions(tmp_path / "out")
    annotate(options, source)
    found = source[1]["a"]
    column = int(np.nonzero(found.labels)[1][0])
    edit(options.folder / "labels" / "a.png", lambda values: np.where(np.indices(values.shape)[1] == column, 0, values))
    annotate(options, source, "a")
    table = read_record(options, "a")["table"]
    changed = set(np.unique(found.labels[:, column])) - {0}
    assert changed and len(changed) < len(found)
    for value, engine, score in zip(table["id"], table["engine"], table["score"], strict=True):
        if value in changed:
            assert (engine, score) == (EDITED, 1)
        else:
            assert engine == "watershed" and score == pytest.approx(found.scores[value - 1], abs=1e-6)


def test_edited_gt_is_never_overwritten_and_labels_follow_it(tmp_path, source):
    options = FileOptions(tmp_path / "out")
    annotate(options, source)
    found = source[1]["a"]
    path = options.folder / "gt" / "a.png"
    free = ndimage.distance_transform_cdt(np.pad(found.labels, 1) == 0)[1:-1, 1:-1]
    row, column = np.unravel_index(free[5:-5, 5:-5].argmax(), (80, 110))
    row, column = row + 5, column + 5

    def change(values):
        values = np.where(found.labels == 3, 0, values)
        values[row - 1 : row + 2, column - 1 : column + 2] = 255
        return values

    kept = edit(path, change)
    (record,) = annotate(options, source, "a", settings="s2")
    assert path.read_bytes() == kept and record["edited"]["gt"]
    labels = read_mask(options.folder / "labels" / "a.png")
    assert len(np.unique(labels)) - 1 == record["objects"] == len(found)
    assert labels[row, column] > 0 and (labels == labels[row, column]).sum() == 9
    others = (found.labels != 3) & (labels != labels[row, column])
    np.testing.assert_array_equal((labels > 0)[others], (found.labels > 0)[others])
    assert done(options, source, settings="s2")


def test_masks_without_any_record_are_somebodys(tmp_path, source):
    options = FileOptions(tmp_path / "out")
    gt = np.zeros((90, 120), np.uint8)
    gt[10:20, 10:20] = gt[40:50, 70:90] = 255
    write_mask(options.folder / "gt" / "a.tif", gt)
    assert is_edited(options, "a")
    (record,) = annotate(options, source, "a")
    assert record["objects"] == 2 and not (options.folder / "gt" / "a.png").exists()
    np.testing.assert_array_equal(read_mask(options.folder / "gt" / "a.tif"), gt)
    assert done(options, source)


def test_an_edited_file_of_another_size_is_named(tmp_path, source):
    options = FileOptions(tmp_path / "out")
    annotate(options, source)
    path = options.folder / "labels" / "a.png"
    write_mask(path, np.ones((45, 60), np.uint16))
    with pytest.raises(ImageError, match=r"labels/a.png is 60 x 45 pixels, its image 120 x 90; expected the same size"):
        annotate(options, source, "a")
    assert read_mask(path).shape == (45, 60)


def test_an_edit_saved_in_another_format_counts_and_ours_goes(tmp_path, source):
    options = FileOptions(tmp_path / "out")
    annotate(options, source)
    mine = np.roll(source[1]["a"].labels, 5, axis=0).astype(np.uint32)
    write_mask(options.folder / "labels" / "a.tif", mine)
    assert is_edited(options, "a")
    (record,) = annotate(options, source, "a")
    assert record["label_file"] == "a.tif" and not (options.folder / "labels" / "a.png").exists()
    np.testing.assert_array_equal(read_mask(options.folder / "labels" / "a.tif"), mine)
    assert done(options, source)


def test_two_files_that_a_person_made_for_one_image_are_named(tmp_path, source):
    options = FileOptions(tmp_path / "out")
    annotate(options, source, "a")
    for suffix in (".tif", ".bmp"):
        write_mask(options.folder / "gt" / f"a{suffix}", np.zeros((90, 120), np.uint8))
    with pytest.raises(ImageError, match="gt holds a.tif and a.bmp; expected one file"):
        annotate(options, source, "a")


def test_qupath_reads_the_outlines(tmp_path, source):
    options = FileOptions(tmp_path / "out", geojson=True)
    annotate(options, source, "a")
    assert done(options, source)
    shapes, findings = read_geojson(options.folder / "geojson" / "a.geojson")
    assert len(shapes) == len(source[1]["a"]) and not findings
    np.testing.assert_array_equal(rasterise(shapes, 0, 0, 90, 120), source[1]["a"].labels > 0)


def test_overlays_of_large_images_are_thinned(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "OVERLAY_SIDE", 50)
    image, found = scene()
    options = FileOptions(tmp_path / "out")
    write_image_files(options, tmp_path / "a.png", image, found, {}, "s", 0.0)
    drawn = read_image(options.folder / "overlays" / "a.png")
    assert drawn.shape == (30, 40, 3)
    np.testing.assert_array_equal(drawn[found.labels[::3, ::3] == 0], image[::3, ::3][found.labels[::3, ::3] == 0])


def test_leftovers_of_a_kill_go_and_nothing_else(tmp_path, source):
    options = FileOptions(tmp_path / "out")
    annotate(options, source)
    before = sorted(path for path in options.folder.rglob("*"))
    for kind, age in (("gt", 7200), ("overlays", 7200), (".annotate", 7200), ("labels", 5)):
        path = options.folder / kind / f".{'0' * 32}.tmp"
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)
    remove_leftovers(options)
    assert sorted(path for path in options.folder.rglob("*") if path.parent.name != "labels") == [
        path for path in before if path.parent.name != "labels"
    ]
    assert (options.folder / "labels" / f".{'0' * 32}.tmp").exists()
    assert list(list_images(options.folder / "labels")) == ["a", "b", "c"]


def test_removing_edited_files_has_them_made_anew(tmp_path, source):
    options = FileOptions(tmp_path / "out")
    annotate(options, source)
    edit(options.folder / "labels" / "a.png", without_first)
    annotate(options, source, "a")
    (options.folder / "labels" / "a.png").unlink()
    assert not is_edited(options, "a")
    annotate(options, source, "a")
    np.testing.assert_array_equal(read_mask(options.folder / "labels" / "a.png"), source[1]["a"].labels)


def test_gt_cut_in_two_gives_two_objects_and_growth_joins_its_neighbour():
    labels = np.zeros((20, 40), np.int32)
    labels[5:15, 5:20], labels[5:15, 20:35] = 1, 2
    gt = gap_mask(labels, 1)
    gt[:, 10] = 0
    gt[2:5, 30] = 255
    gt[0, 0] = 255
    result = follow_gt(gt, labels, 1)
    assert result.max() == 4
    assert result[3, 30] == result[8, 30] and result[8, 6] != result[8, 15] and result[8, 10] == 0
    assert result[0, 0] == 1
    assert result[8, 19] == result[8, 18]  # the gap is no edit


@pytest.mark.parametrize("gap", [0, 1, 2, 3, 5])
def test_what_is_erased_from_gt_takes_its_share_of_the_gap_along(gap):
    labels = np.zeros((40, 60), np.int32)
    labels[5:35, 5:30], labels[5:25, 30:50] = 1, 2  # the larger one gives way by the larger half of the gap
    for erased, kept in ((1, 2), (2, 1)):
        gt = gap_mask(labels, gap)
        gt[labels == erased] = 0
        np.testing.assert_array_equal(follow_gt(gt, labels, gap) > 0, labels == kept)
    gt = gap_mask(labels, gap)
    gt[20:] = 0  # the lower part of both
    np.testing.assert_array_equal(follow_gt(gt, labels, gap)[:18], labels[:18])
    assert not follow_gt(gt, labels, gap)[22:].any()


# ---- tables ----


def test_annotations_are_coco_and_equal_the_label_maps(tmp_path, source):
    for kind in ("rle", "polygons"):
        options = FileOptions(tmp_path / kind, coco=kind)
        holed = source[1]["a"].labels.copy()
        inner = np.argwhere(ndimage.binary_erosion(holed == 1, iterations=2))
        holed[tuple(inner[0])] = 0
        found = {**source[1], "a": number_instances(holed, 0.5, "watershed")}
        write_tables(options, annotate(options, (source[0], found)))
        coco = COCO_quiet(options.folder / "annotations.json")
        assert len(coco.anns) == sum(map(len, found.values())) == len(set(coco.anns))
        for image_id, entry in coco.imgs.items():
            labels = read_mask(options.folder / "labels" / entry["file_name"])
            annotations = coco.loadAnns(coco.getAnnIds(image_id))
            assert len(annotations) == labels.max()
            for number, annotation in enumerate(annotations, start=1):
                mask = labels == number
                np.testing.assert_array_equal(coco.annToMask(annotation), mask)
                assert annotation["area"] == mask.sum()
                rows, columns = np.nonzero(mask)
                assert annotation["bbox"] == [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
                assert annotation["score"] == pytest.approx(found[entry["file_name"][0]].scores[number - 1], abs=1e-6)
        kinds = {type(annotation["segmentation"]) for annotation in coco.anns.values()}
        assert kinds == ({dict} if kind == "rle" else {dict, list})


@pytest.mark.parametrize("seed", range(30))
def test_run_lengths_are_those_of_pycocotools(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 60, 2).tolist()
    noise = ndimage.gaussian_filter(rng.standard_normal((height, width)), rng.choice([0, 1, 3]))
    labels = number_instances((noise > 0) * rng.integers(1, 3, (height, width)), 1.0, "x", pieces="all").labels
    strings = encode_objects(labels)
    outlines, holes = outlines_of(labels)
    assert len(strings) == labels.max() == len(outlines)
    for number, counts in enumerate(strings, start=1):
        mask = labels == number
        assert coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode() == counts
        rle = {"size": [height, width], "counts": counts}
        np.testing.assert_array_equal(whole(rle, height, width), mask)
        rle["counts"] = parse_counts(counts).tolist()
        np.testing.assert_array_equal(whole(rle, height, width), mask)
        if not holes[number - 1]:
            np.testing.assert_array_equal(whole([outlines[number - 1]], height, width), mask)
            rles = coco_mask.frPyObjects([outlines[number - 1]], height, width)
            np.testing.assert_array_equal(coco_mask.decode(coco_mask.merge(rles)), mask)
        background = ndimage.label(np.pad(~mask, 1, constant_values=True))[1]
        assert holes[number - 1] == (background > 1)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (None, "expected run lengths"),
        ([], "expected run lengths"),
        ({"size": [9, 9], "counts": "0"}, r"of size \[9, 9\]; expected \[4, 5\]"),
        ({"size": [4, 5], "counts": [3, 4]}, "run lengths of 7 pixels; expected 20"),
        ({"size": [4, 5], "counts": [-3, 23]}, "run lengths of 20 pixels"),
        ({"size": [4, 5], "counts": "P"}, "cut short"),
        ({"size": [4, 5], "counts": "é\n"}, "no run-length string"),
        ({"size": [4, 5], "counts": {}}, "cannot be read"),
        ([[1, 2, 3, 4]], "polygon of 2 points"),
        ([[1, 2, 3, "x", 5, 6]], "no list of numbers"),
        ([[1, 2, 3, float("nan"), 5, 6]], "finite"),
        ([[1, 2, 3]], "no list of numbers"),
    ],
)
def test_broken_segmentations_are_named(segmentation, message):
    with pytest.raises(ImageError, match=message):
        decode_segmentation(segmentation, 4, 5)


def whole(segmentation, height, width):
    """The pixels of an annotation in the whole image."""
    (left, top), crop = decode_segmentation(segmentation, height, width)
    mask = np.zeros((height, width), bool)
    mask[top : top + crop.shape[0], left : left + crop.shape[1]] = crop
    return mask


def read_table(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter=";"))


def test_objects_csv_has_a_row_for_each_object(tmp_path, source):
    options = FileOptions(tmp_path / "out", mm_per_pixel=0.5, decimal="dot")
    write_tables(options, annotate(options, source))
    rows = read_table(options.folder / "objects.csv")
    assert len(rows) == sum(map(len, source[1].values()))
    first = rows[0]
    assert (first["image"], first["id"], first["engine"]) == ("a.png", "1", "watershed")
    assert int(first["area"]) == (source[1]["a"].labels == 1).sum()
    assert float(first["area_mm2"]) == pytest.approx(int(first["area"]) / 4, abs=1e-3)
    assert float(first["ellipse_major_mm"]) == pytest.approx(float(first["ellipse_major"]) / 2, abs=1e-3)
    tiny = FileOptions(options.folder, mm_per_pixel=0.00025, decimal="dot")  # a slide
    write_tables(tiny, list_records(tiny))
    first = read_table(tiny.folder / "objects.csv")[0]
    assert float(first["area_mm2"]) == pytest.approx(int(first["area"]) * 0.00025**2, rel=1e-3)
    assert float(first["equivalent_diameter_mm"]) == pytest.approx(
        float(first["equivalent_diameter"]) * 0.00025, rel=1e-3
    )
    comma = FileOptions(options.folder)
    write_tables(comma, list_records(comma))
    assert "," in read_table(comma.folder / "objects.csv")[0]["centroid_x"]
    assert "area_mm2" not in read_table(comma.folder / "objects.csv")[0]


def test_yolo_text_gives_boxes_back(tmp_path, source):
    options = FileOptions(tmp_path / "out")
    annotate(options, source, "a")
    labels = source[1]["a"].labels
    lines = (options.folder / "yolo" / "a.txt").read_text().splitlines()
    assert len(lines) == labels.max()
    for number, line in enumerate(lines, start=1):
        kind, x, y, w, h = (float(word) for word in line.split())
        rows, columns = np.nonzero(labels == number)
        box = [(x - w / 2) * 120, (y - h / 2) * 90, (x + w / 2) * 120, (y + h / 2) * 90]
        assert kind == 0
        assert box == pytest.approx([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], abs=1e-3)


def test_yolo_segments_cover_the_objects(tmp_path, source):
    options = FileOptions(tmp_path / "out", yolo="segment")
    annotate(options, source, "a")
    labels = source[1]["a"].labels
    lines = (options.folder / "yolo" / "a.txt").read_text().splitlines()
    assert len(lines) == labels.max()
    for number, line in enumerate(lines, start=1):
        points = np.array(line.split()[1:], float).reshape(-1, 2)
        assert len(points) >= 3 and points.min() >= 0 and points.max() <= 1
        mask = whole([(points * (120, 90)).reshape(-1).tolist()], 90, 120)
        truth = labels == number
        if truth.sum() > 60:
            assert (mask & truth).sum() / (mask | truth).sum() > 0.8


def a_record(stem, **values):
    record = {
        "stem": stem,
        "objects": 50,
        "coverage": 0.3,
        "largest": 0.02,
        "touching": 0.2,
        "mean_score": 0.9,
        "lowest_score": 0.8,
        "agreement": None,
        "median_diameter": 12.0,
        "edited": {"gt": None, "labels": None},
    } | values
    return record | {"flags": flags_of(record)}


def test_flags_say_what_strikes():
    assert a_record("fine")["flags"] == []
    nothing = dict.fromkeys(("touching", "mean_score", "median_diameter"))
    assert a_record("x", objects=0, coverage=0, largest=0, **nothing)["flags"] == ["empty"]
    assert a_record("x", coverage=0.97)["flags"] == a_record("x", largest=0.6)["flags"] == ["nearly full"]
    assert a_record("x", touching=0.9)["flags"] == ["too many touching"]
    assert a_record("x", touching=0.9, objects=4)["flags"] == []
    assert a_record("x", mean_score=0.4)["flags"] == ["low score"]
    assert a_record("x", agreement=0.3)["flags"] == ["engines disagree"]
    assert a_record("x", edited={"gt": None, "labels": "1f"})["flags"] == ["edited"]


def test_review_begins_with_the_most_doubtful():
    plain = [a_record(f"p{k}", objects=48 + k) for k in range(8)]
    doubtful = [
        a_record("empty", objects=0, coverage=0, largest=0, touching=None, mean_score=None, median_diameter=None),
        a_record("few", objects=2),
        a_record("large", median_diameter=70.0),
        a_record("unsure", mean_score=0.2),
        a_record("apart", agreement=0.1),
        a_record("seen", mean_score=0.1, edited={"gt": "1f", "labels": None}),
    ]
    ranked = rank_doubts(plain + doubtful)
    order = [entry["record"]["stem"] for entry in ranked]
    assert order[0] == "empty" and order[-1] == "seen" and set(order[1:5]) == {"few", "large", "unsure", "apart"}
    flags = {entry["record"]["stem"]: entry["flags"] for entry in ranked}
    assert flags["few"] == ["unusual count"] and flags["large"] == ["unusual size"] and flags["p0"] == []
    doubts = [entry["doubt"] for entry in ranked]
    assert doubts == sorted(doubts, reverse=True) and doubts[0] == 1 and doubts[-1] == 0


def test_nothing_is_unusual_among_few_or_alike():
    assert strangeness([1, 100, 3]) == [0, 0, 0]
    assert max(strangeness([10, 10, 10, 10, 10, 12])) == 0
    assert strangeness([10, 10, 10, 10, 10, 100, None])[5] > 3


def test_report_and_review_agree(tmp_path, source):
    options = FileOptions(tmp_path / "out", decimal="dot")
    write_tables(options, annotate(options, source), {"settings": {"preset": "nuclei"}})
    report = json.loads((options.folder / "report.json").read_text())
    assert report["images"] == 3 and report["objects"] == sum(map(len, source[1].values()))
    assert report["settings"] == {"preset": "nuclei"} and report["engine_seconds"] == pytest.approx(0.3)
    review = read_table(options.folder / "review.csv")
    assert [row["image"] for row in review] == [entry["image"] for entry in report["per_image"]]
    assert [row["rank"] for row in review] == ["1", "2", "3"]
    assert all(
        (options.folder / row["labels"]).is_file() and (options.folder / row["overlay"]).is_file() for row in review
    )


def test_tables_of_no_image_at_all(tmp_path):
    options = FileOptions(tmp_path / "out")
    write_tables(options, [])
    assert json.loads((options.folder / "annotations.json").read_text())["annotations"] == []
    assert json.loads((options.folder / "report.json").read_text())["images"] == 0
    assert read_table(options.folder / "review.csv") == []


def test_two_engines_agreement_and_panel(tmp_path, source):
    options = FileOptions(tmp_path / "out", panels=True)
    path = source[0] / "a.png"
    found, other = source[1]["a"], scene(7)[1]
    record = write_image_files(options, path, read_image(path), found, {"w": found, "sam": found}, "s", 0.0)
    assert record["agreement"] == 1 and record["engines"] == {"w": len(found), "sam": len(found)}
    two = read_image(options.folder / "panels" / "a.png").shape[1]
    record = write_image_files(options, path, read_image(path), found, {"w": found, "sam": other}, "s", 0.0)
    assert record["agreement"] < 0.5 and "engines disagree" in record["flags"]
    record = write_image_files(options, path, read_image(path), found, {"w": found}, "s", 0.0)
    assert record["agreement"] is None and read_image(options.folder / "panels" / "a.png").shape[1] < two


@pytest.mark.parametrize("seed", range(5))
def test_touching_objects_are_counted(seed):
    labels = scene(seed)[1].labels
    expected = 0
    for number in range(1, labels.max() + 1):
        around = ndimage.binary_dilation(labels == number) & (labels != number) & (labels > 0)
        expected += bool(around.any())
    assert count_touching(labels) == expected > 0


def test_touching_is_not_carried_over_the_ends_of_rows():
    labels = np.array([[0, 0, 1], [2, 0, 0]], np.int32)
    assert count_touching(labels) == 0


# ---- pictures ----


def test_overlay_colours_objects_and_leaves_the_rest():
    image, found = scene()
    drawn = overlay(image, found.labels)
    assert drawn.dtype == np.uint8 and drawn.shape == image.shape
    np.testing.assert_array_equal(drawn[found.labels == 0], image[found.labels == 0])
    edges = np.zeros(found.labels.shape, bool)
    for number in range(1, len(found) + 1):
        mask = np.pad(found.labels == number, 1, mode="edge")
        edges |= (mask & ~ndimage.binary_erosion(mask, border_value=1))[1:-1, 1:-1]
    outline = {number: {tuple(c) for c in drawn[edges & (found.labels == number)]} for number in range(1, 26)}
    assert all(len(colours) <= 1 for colours in outline.values())
    assert len(set().union(*outline.values())) == len(found)
    differing = (drawn.astype(int) - image).any(axis=2)
    assert differing[found.labels > 0].mean() > 0.99


def test_overlay_does_not_change_its_image_and_shows_any_type():
    image, found = scene()
    before = image.copy()
    overlay(image, found.labels)
    overlay(image, np.zeros_like(found.labels))[:] = 0
    np.testing.assert_array_equal(image, before)
    for other in (image.astype(np.uint16) * 100, image[..., :1], image.astype(np.float32), np.dstack([image, image])):
        assert overlay(other, found.labels).shape == image.shape


def test_panel_is_as_wide_as_its_pictures():
    image, found = scene(height=700, width=900, count=40)
    page = panel(image, {"watershed": found.labels, "both": found.labels})
    assert page.shape[1] > 3 * 640 and page.shape[0] > 490
    tiny = panel(np.zeros((3, 2, 1), np.uint8), {"a very long name of an engine": np.ones((3, 2), np.int32)})
    assert tiny.shape[0] > 100 and cv2.countNonZero(255 - tiny[..., 0]) > 0
