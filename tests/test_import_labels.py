"""Labels that people made elsewhere come back without loss, and annotate.py leaves them alone afterwards."""

import csv
import json

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from annotation.files import write_image_files
from annotation.instances import gap_mask, number_instances
from annotation.records import FileOptions, hold_folder, is_done, is_edited, list_records, read_record
from annotation.report import write_tables
from dataset_utils import import_labels
from geojson import GeoJsonWriter
from image_io import read_mask, write_image, write_mask
from polygons import trace_labels

SIZE = (60, 80)


def squares(*boxes):
    """Label map of squares (left, top, side); later ones over earlier ones."""
    labels = np.zeros(SIZE, np.int32)
    for number, (left, top, side) in enumerate(boxes, start=1):
        labels[top : top + side, left : left + side] = number
    return labels


OLD = squares((5, 5, 10), (15, 5, 10), (40, 30, 20))
NEW = squares((5, 5, 12), (30, 8, 9), (50, 40, 7), (60, 10, 15))


@pytest.fixture
def labelled(tmp_path):
    """An output of annotate.py with the images a, b and c."""
    options = FileOptions(tmp_path / "out")
    found = number_instances(OLD, 0.7, "watershed")
    records = []
    for stem in "abc":
        path = tmp_path / "pictures" / f"{stem}.png"
        image = np.random.default_rng(ord(stem)).integers(0, 255, (*SIZE, 3), np.uint8)
        write_image(path, image)
        records.append(
            write_image_files(options, path, image, found, {"watershed": found}, "s", 0.0, image_digest=stem)
        )
    write_tables(options, records, {"settings": {"preset": "grains"}})
    return options.folder


def run(out, *words):
    import_labels.main([*map(str, words), "-o", str(out)])


def refused(capsys, out, *words):
    """Exit status 1 and what the message says."""
    with pytest.raises(SystemExit) as stop:
        run(out, *words)
    captured = capsys.readouterr()
    assert stop.value.code == 1 and "Traceback" not in captured.err, captured
    return captured.err


def labels_of(out, stem="a"):
    return read_mask(out / "labels" / f"{stem}.png")


def gt_of(out, stem="a"):
    return read_mask(out / "gt" / f"{stem}.png")


def same_objects(values, expected):
    """Whether two label maps show the same objects, whatever their numbers."""
    pairs = np.unique(np.stack([values.ravel(), expected.ravel()]).astype(np.int64), axis=1)
    return pairs.shape[1] == len(np.unique(expected)) == len(np.unique(values))


def coco_file(path, annotations, images=None):
    images = images or [{"id": 7, "file_name": "a.png", "height": SIZE[0], "width": SIZE[1]}]
    for number, annotation in enumerate(annotations):
        annotation.setdefault("id", number + 1)
        annotation.setdefault("image_id", 7)
        annotation.setdefault("category_id", 1)
    document = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "nucleus"}]}
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def test_label_maps_come_back_exactly_and_gt_follows(tmp_path, labelled):
    values = NEW * 100
    write_mask(tmp_path / "mine" / "a.tif", values.astype(np.uint32))
    run(labelled, tmp_path / "mine")
    np.testing.assert_array_equal(labels_of(labelled), values)
    np.testing.assert_array_equal(gt_of(labelled), gap_mask(NEW, 1))
    np.testing.assert_array_equal(labels_of(labelled, "b"), OLD)


def test_annotate_leaves_alone_what_came_in(tmp_path, labelled):
    write_mask(tmp_path / "mine" / "a.png", NEW.astype(np.uint8))
    run(labelled, tmp_path / "mine")
    options = FileOptions(labelled)
    assert is_edited(options, "a") and not is_edited(options, "b")
    assert is_done(options, "a", "a", "s") and is_done(options, "b", "b", "s")
    before = (labelled / "labels" / "a.png").read_bytes()
    path, found = tmp_path / "pictures" / "a.png", number_instances(OLD, 0.9, "sam")
    write_image_files(options, path, np.zeros((*SIZE, 3), np.uint8), found, {"sam": found}, "other", 0.0)
    assert (labelled / "labels" / "a.png").read_bytes() == before


def test_labels_accepted_as_they_are_count_as_a_persons(tmp_path, labelled):
    run(labelled, labelled)
    options = FileOptions(labelled)
    assert all(is_edited(options, stem) for stem in "abc")
    assert read_record(options, "a")["table"]["engine"] == ["watershed"] * 3
    np.testing.assert_array_equal(labels_of(labelled), OLD)
    np.testing.assert_array_equal(gt_of(labelled), gap_mask(OLD, 1))


def test_tables_keep_their_units_and_their_decimal_sign(tmp_path, labelled):
    options = FileOptions(labelled, mm_per_pixel=0.5, decimal="dot")
    flags = {"flags": {"mm_per_pixel": 0.5, "decimal": "dot"}}
    write_tables(options, list_records(options), {"settings": flags})
    write_mask(tmp_path / "mine" / "b.png", NEW.astype(np.uint8))
    for words, scale in (([], 0.5), (["--mm-per-pixel", 0.1], 0.1)):
        run(labelled, tmp_path / "mine", *words)
        with (labelled / "objects.csv").open() as file:
            rows = list(csv.DictReader(file, delimiter=";"))
        for row in rows:
            assert float(row["area_mm2"]) == pytest.approx(int(row["area"]) * scale**2, rel=1e-3)
        assert json.loads((labelled / "report.json").read_text())["settings"] == flags


def test_tables_follow_and_keep_what_the_report_said(tmp_path, labelled):
    write_mask(tmp_path / "mine" / "b.png", NEW.astype(np.uint8))
    run(labelled, tmp_path / "mine", "--decimal", "dot")
    with (labelled / "objects.csv").open() as file:
        rows = list(csv.DictReader(file, delimiter=";"))
    assert [row["image"] for row in rows] == ["a.png"] * 3 + ["b.png"] * 4 + ["c.png"] * 3
    assert {row["engine"] for row in rows if row["image"] == "b.png"} == {"edited"}
    report = json.loads((labelled / "report.json").read_text())
    assert report["settings"] == {"preset": "grains"} and report["edited"] == 1 and report["images"] == 3
    assert len(report["per_image"]) == 3
    assert len(json.loads((labelled / "annotations.json").read_text())["annotations"]) == 10
    assert len((labelled / "yolo" / "b.txt").read_text().splitlines()) == 4


def test_masks_keep_the_objects_that_they_do_not_change(tmp_path, labelled):
    mask = gap_mask(OLD, 1)
    mask[0:3, 70:75] = 255
    mask[OLD == 3] = 0
    write_mask(tmp_path / "mine" / "a.png", mask // 255)
    run(labelled, tmp_path / "mine")
    np.testing.assert_array_equal(gt_of(labelled), mask)
    values = labels_of(labelled)
    expected = np.where(OLD == 3, 0, OLD)
    expected[0:3, 70:75] = 3
    assert same_objects(values, expected)
    assert read_record(FileOptions(labelled), "a")["table"]["engine"].count("watershed") == 2


def test_a_plain_data_set_gets_labels_and_gt(tmp_path):
    root = tmp_path / "set"
    for stem in ("a", "b"):
        write_image(root / "images" / f"{stem}.jpg", np.zeros((*SIZE, 3), np.uint8))
    write_mask(tmp_path / "mine" / "a.png", NEW.astype(np.uint16))
    write_mask(tmp_path / "mine" / "b.png", ((NEW > 0) * 255).astype(np.uint8))
    run(root, tmp_path / "mine", "--gap", "3")
    np.testing.assert_array_equal(labels_of(root), NEW)
    np.testing.assert_array_equal(gt_of(root), gap_mask(NEW, 3))
    np.testing.assert_array_equal(gt_of(root, "b") > 0, NEW > 0)
    assert sorted(path.name for path in root.iterdir()) == ["gt", "images", "labels"]


def test_coco_of_every_notation(tmp_path, labelled):
    annotations = []
    for number in range(1, 5):
        mask = np.asfortranarray((NEW == number).astype(np.uint8))
        left, top, width, height = cv2.boundingRect(mask)
        corners = [left, top, left + width, top, left + width, top + height, left, top + height]
        rle = coco_mask.encode(mask)
        flat = mask.ravel(order="F")
        places = np.flatnonzero(np.diff(flat, prepend=0))
        counts = np.diff([0, *places, flat.size]).tolist()
        forms = [
            {"size": list(SIZE), "counts": rle["counts"].decode()},
            {"size": list(SIZE), "counts": counts},
            [corners],
            [corners[:4] + corners[4:6], corners[:2] + corners[4:]],  # two triangles
        ]
        annotations.append({"segmentation": forms[number - 1]})
    run(labelled, coco_file(tmp_path / "any.json", annotations))
    assert same_objects(labels_of(labelled), NEW)
    assert set(np.unique(labels_of(labelled))) == {0, 1, 2, 3, 4}


def test_what_annotate_wrote_as_coco_comes_back(tmp_path, labelled):
    again = tmp_path / "again"
    for stem in "abc":
        write_image(again / "images" / f"{stem}.png", np.zeros((*SIZE, 3), np.uint8))
    run(again, labelled / "annotations.json")
    for stem in "abc":
        np.testing.assert_array_equal(labels_of(again, stem), OLD)


def test_geojson_with_holes_and_classes(tmp_path, labelled):
    labels = NEW.copy()
    labels[14:18, 64:68] = 0
    path = tmp_path / "a.png.geojson"
    with GeoJsonWriter(path) as writer:
        for polygon in trace_labels(labels.astype(np.uint32)):
            writer.write(polygon, "Tumor" if polygon.label < 4 else "Stroma")
    run(labelled, path)
    assert same_objects(labels_of(labelled), labels)
    run(labelled, path, "--only", "Tumor", "--overwrite")
    assert same_objects(labels_of(labelled), np.where(labels < 4, labels, 0))


def test_of_overlapping_objects_the_smaller_keeps_the_pixels(tmp_path, labelled, capsys):
    def box(left, top, side):
        return {"segmentation": [[left, top, left + side, top, left + side, top + side, left, top + side]]}

    run(labelled, coco_file(tmp_path / "x.json", [box(10, 10, 5), box(5, 5, 30), box(30, 30, 10)]))
    values = labels_of(labelled)
    assert np.bincount(values.ravel())[1:].tolist() == [25, 900 - 25 - 25, 100]
    assert "3 objects, 1 partly under smaller ones" in capsys.readouterr().out


def test_a_label_of_two_pieces_stays_one_label(tmp_path, labelled):
    values = squares((5, 5, 10))
    values[40:50, 40:50] = 1
    values[20:25, 60:65] = 2
    write_mask(tmp_path / "mine" / "a.png", values.astype(np.uint8))
    run(labelled, tmp_path / "mine")
    np.testing.assert_array_equal(labels_of(labelled), values)
    np.testing.assert_array_equal(gt_of(labelled) > 0, values > 0)
    assert read_record(FileOptions(labelled), "a")["table"]["id"] == [1, 2, 1]


def test_objects_smaller_than_a_pixel_are_one_pixel(tmp_path, labelled):
    tiny = {"segmentation": [[20.1, 30.1, 20.3, 30.1, 20.3, 30.3]]}
    run(labelled, coco_file(tmp_path / "x.json", [tiny]))
    assert np.argwhere(labels_of(labelled)).tolist() == [[30, 20]]


# ---- nothing is lost ----


def test_a_persons_labels_are_kept_unless_asked_and_then_kept_aside(tmp_path, labelled, capsys):
    write_mask(tmp_path / "first" / "a.png", NEW.astype(np.uint8))
    run(labelled, tmp_path / "first")
    before = (labelled / "labels" / "a.png").read_bytes()
    write_mask(tmp_path / "second" / "a.png", np.roll(NEW, 3, axis=1).astype(np.uint8))
    message = refused(capsys, labelled, tmp_path / "second")
    assert "would replace labels of 'a'" in message and "--overwrite" in message
    assert (labelled / "labels" / "a.png").read_bytes() == before
    run(labelled, tmp_path / "first")  # the same again is no harm
    run(labelled, tmp_path / "second", "--overwrite")
    np.testing.assert_array_equal(labels_of(labelled), np.roll(NEW, 3, axis=1))
    (kept,) = (labelled / ".annotate" / "replaced" / "labels").iterdir()
    assert kept.read_bytes() == before


def test_masks_of_a_plain_data_set_are_a_persons(tmp_path, capsys):
    root = tmp_path / "set"
    write_image(root / "images" / "a.png", np.zeros((*SIZE, 3), np.uint8))
    write_mask(root / "gt" / "a.tif", (OLD > 0).astype(np.uint8))
    write_mask(tmp_path / "mine" / "a.png", NEW.astype(np.uint8))
    assert "--overwrite" in refused(capsys, root, tmp_path / "mine")
    assert not (root / "labels").exists() and list((root / "gt").iterdir()) == [root / "gt" / "a.tif"]
    run(root, tmp_path / "mine", "--overwrite")
    assert [path.name for path in (root / "gt").iterdir()] == ["a.png"]
    (kept,) = (root / ".annotate" / "replaced" / "gt").iterdir()
    np.testing.assert_array_equal(read_mask(kept) > 0, OLD > 0)
    write_mask(tmp_path / "mine" / "a.png", (OLD > 0).astype(np.uint8))
    run(root, tmp_path / "mine", "--overwrite")  # what is kept there makes it no folder of annotate.py
    assert {path.name for path in root.iterdir()} == {"images", "gt", "labels", ".annotate"}


def test_files_without_objects_do_not_clear_an_image_by_accident(tmp_path, labelled, capsys):
    path = tmp_path / "a.geojson"
    path.write_text('{"type": "FeatureCollection", "features": []}')
    assert "holds no object for 'a', which has some" in refused(capsys, labelled, path)
    np.testing.assert_array_equal(labels_of(labelled), OLD)
    run(labelled, path, "--empty")
    assert not labels_of(labelled).any() and not gt_of(labelled).any()
    assert read_record(FileOptions(labelled), "a")["flags"] == ["empty", "edited"]


# ---- bad input ----


def test_unknown_names_are_named_and_the_rest_goes_in(tmp_path, labelled, capsys):
    write_mask(tmp_path / "mine" / "a.png", NEW.astype(np.uint8))
    write_mask(tmp_path / "mine" / "bb.png", NEW.astype(np.uint8))
    message = refused(capsys, labelled, tmp_path / "mine")
    assert "1 finding, the rest is done" in message
    assert "for the image 'bb', which images/ does not hold; did it mean 'b'?" in message
    np.testing.assert_array_equal(labels_of(labelled), NEW)


def test_sizes_that_differ_are_named(tmp_path, labelled, capsys):
    write_mask(tmp_path / "mine" / "a.png", np.ones((30, 40), np.uint8))
    message = refused(capsys, labelled, tmp_path / "mine")
    assert "is 40 x 30 pixels, its image 80 x 60; expected the same size" in message
    images = [{"id": 7, "file_name": "C:\\data\\a.png", "height": 6, "width": 8}]
    message = refused(capsys, labelled, coco_file(tmp_path / "x.json", [], images))
    assert "image 'a.png' is 8 x 6 pixels there, the file 80 x 60" in message
    np.testing.assert_array_equal(labels_of(labelled), OLD)


def test_null_geometry_outside_and_lines_are_findings(tmp_path, labelled, capsys):
    def feature(geometry):
        return {"type": "Feature", "properties": {}, "geometry": geometry}

    good = {"type": "Polygon", "coordinates": [[[5, 5], [15, 5], [15, 15], [5, 15], [5, 5]]]}
    outside = {"type": "Polygon", "coordinates": [[[500, 500], [510, 500], [510, 510], [500, 500]]]}
    line = {"type": "LineString", "coordinates": [[0, 0], [5, 5]]}
    features = [feature(None), feature(good), feature(outside), feature(line)]
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    message = refused(capsys, labelled, path)
    assert "feature 1: has the geometry null" in message.replace("None", "null")
    assert "feature 3: lies wholly outside the image" in message and "feature 4: is a" in message
    assert np.count_nonzero(labels_of(labelled)) == 100


def test_broken_annotations_are_findings(tmp_path, labelled, capsys):
    annotations = [
        {"segmentation": [[5, 5, 15, 5, 15, 15, 5, 15]]},
        {"segmentation": None},
        {"bbox": [1, 2, 3, 4]},
        {"segmentation": {"size": [6, 8], "counts": [48]}},
        {"segmentation": [[1, 2, 3]]},
        {"segmentation": [[1, 1, 5, 1, 5, 5]], "iscrowd": 1},
        {"segmentation": [[1, 1, 5, 1, 5, 5]], "image_id": 99},
        {"segmentation": [[5, 5, 15, 5, 15, 15, 5, 15]]},
    ]
    message = refused(capsys, labelled, coco_file(tmp_path / "x.json", annotations))
    for text in (
        "annotation 2 has the segmentation None",
        "annotation 3 has the segmentation None",
        "annotation 4 has run lengths of size [6, 8]",
        "annotation 5 has a polygon",
        "annotation 6 is a crowd",
        "1 annotations are of image 99",
        "annotation 1 lies wholly under",
    ):
        assert text in message, message
    assert np.count_nonzero(labels_of(labelled)) == 100


def test_ids_of_any_kind_do_not_stop_the_rest(tmp_path, labelled, capsys):
    shape = [[5, 5, 15, 5, 15, 15, 5, 15]]
    annotations = [
        {"segmentation": shape, "id": {"a": 1}, "category_id": []},
        {"segmentation": shape, "image_id": [7]},
        {"segmentation": 5, "iscrowd": 1},
        {"segmentation": "x"},
        {"segmentation": {"size": [60, 80], "counts": [2**70]}},
        {"segmentation": [[1e300, 1e300, -1e300, 5, 7, 9]]},
    ]
    message = refused(capsys, labelled, coco_file(tmp_path / "x.json", annotations))
    assert "1 annotations are of image [7]" in message and message.count("annotation") >= 4
    assert labels_of(labelled)[10, 10] == 1
    message = refused(capsys, labelled, coco_file(tmp_path / "y.json", annotations), "--only", "nucleus")
    assert "holds no object" in message or "would replace" in message


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.png", b"not a picture", "a.png"),
        ("a.json", b"", "is empty"),
        ("a.json", b'{"images": 3, "annotations": []}', "images that are no list"),
        ("a.json", b'{"images": [{"id": 1, "file_name": "a.png"', "ends too early"),
        ("a.geojson", b"[1, 2]", "feature 1"),
        ("a.txt", b"0 0.5 0.5 1 1", "has the suffix '.txt'; expected labels"),
    ],
)
def test_broken_files_are_named(tmp_path, labelled, capsys, name, content, text):
    path = tmp_path / name
    path.write_bytes(content)
    message = refused(capsys, labelled, path)
    assert text in message and str(path) in message
    np.testing.assert_array_equal(labels_of(labelled), OLD)


def test_colours_are_no_labels(tmp_path, labelled, capsys):
    write_image(tmp_path / "a.png", np.random.default_rng(0).integers(0, 255, (*SIZE, 3), np.uint8))
    assert "RGB mask" in refused(capsys, labelled, tmp_path / "a.png")


def test_folders_that_are_none(tmp_path, labelled, capsys):
    assert "has no images/" in refused(capsys, tmp_path, tmp_path)
    assert "does not exist" in refused(capsys, labelled, tmp_path / "nowhere")
    (tmp_path / "void").mkdir()
    assert "hold no masks" in refused(capsys, labelled, tmp_path / "void")


def test_two_files_for_one_image_are_named(tmp_path, labelled, capsys):
    for folder, labels in (("one", NEW), ("two", OLD)):
        write_mask(tmp_path / folder / "a.png", labels.astype(np.uint8))
    message = refused(capsys, labelled, tmp_path / "one", tmp_path / "two")
    assert "is for 'a', as" in message
    np.testing.assert_array_equal(labels_of(labelled), NEW)


def test_an_output_that_another_process_writes_to_is_left_alone(tmp_path, labelled, capsys):
    write_mask(tmp_path / "mine" / "a.png", NEW.astype(np.uint8))
    with hold_folder(labelled):
        assert "in use by another process" in refused(capsys, labelled, tmp_path / "mine")
    np.testing.assert_array_equal(labels_of(labelled), OLD)
