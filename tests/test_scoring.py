"""Scores of drawn labels against references: matching, small objects, masks and label maps, groups, missing pairs."""

import argparse

import cv2
import numpy as np
import pytest

import cli
from annotation.score_options import ScoreOptions, add_score_args, options_from
from annotation.scoring import (
    References,
    ScoreBoard,
    leave_out_small,
    score_files,
    score_labels,
    to_objects,
    write_scores,
)
from image_io import ImageError, write_mask


def disc_map(centres, radius=8, shape=(96, 96)):
    labels = np.zeros(shape, np.uint16)
    for number, (x, y) in enumerate(centres, 1):
        cv2.circle(labels, (x, y), radius, number, -1)
    return labels


def slow_f1(labels, reference, limit):
    """Every pair of objects by itself; above an IoU of a half a match is the only one."""
    ours = [labels == value for value in np.unique(labels) if value]
    theirs = [reference == value for value in np.unique(reference) if value]
    matched = sum((a & b).sum() >= limit * (a | b).sum() for a in ours for b in theirs)
    return 2 * matched / (len(ours) + len(theirs))


def random_map(rng, shape=(40, 50)):
    labels = np.zeros(shape, np.uint16)
    for number in range(1, 12):
        top, left = rng.integers(0, 34), rng.integers(0, 44)
        labels[top : top + rng.integers(2, 9), left : left + rng.integers(2, 9)] = number
    return labels


@pytest.mark.parametrize("seed", range(8))
def test_f1_agrees_with_pairs_one_by_one(seed):
    rng = np.random.default_rng(seed)
    reference = random_map(rng)
    labels = np.roll(reference, rng.integers(0, 2, 2), (0, 1))
    scores = score_labels(labels, reference)
    for limit in (0.55, 0.6, 0.75, 0.9):
        assert scores.f1(limit) == pytest.approx(slow_f1(labels, reference, limit))
    all_limits = [scores.f1(limit / 100) for limit in range(50, 100, 5)]
    assert scores.f1(None) == pytest.approx(np.mean(all_limits))
    inside = (labels > 0, reference > 0)
    assert scores.dice == pytest.approx(2 * (inside[0] & inside[1]).sum() / (inside[0].sum() + inside[1].sum()))


def test_the_same_labels_score_one_and_empty_ones_nothing():
    labels = disc_map([(20, 20), (60, 60)])
    assert score_labels(labels, labels).f1() == score_labels(labels, labels).dice == 1
    empty = np.zeros_like(labels)
    assert score_labels(empty, empty).f1() is None and score_labels(empty, empty).dice is None
    assert score_labels(empty, labels).f1() == score_labels(labels, empty).f1() == 0


def test_small_objects_are_left_out_on_both_sides():
    labels, reference = disc_map([(20, 20)]), disc_map([(20, 20)])
    labels[60:63, 60:63] = 2  # 9 pixels, ours alone
    reference[80:84, 10:15] = 2  # 20 pixels, theirs alone
    assert score_labels(labels, reference).f1() == pytest.approx(2 / 4)
    assert score_labels(labels, reference, min_area=20).f1() == pytest.approx(2 / 3)
    exact = score_labels(labels, reference, min_area=21)
    assert exact.f1() == exact.dice == 1
    assert set(np.unique(leave_out_small(labels, 10))) == {0, 1}
    assert leave_out_small(np.zeros((0, 4), np.int32), 9).shape == (0, 4)


def test_a_mask_is_split_into_components_and_a_label_map_is_not():
    mask = np.zeros((10, 12), np.uint8)
    mask[1:4, 1:4] = mask[6:9, 1:4] = 255
    mask[4, 4] = 255  # meets the first by a corner alone
    assert to_objects(mask).max() == 3
    labels = mask.copy()
    labels[1:4, 8:10] = 7  # now two values: every value is one object
    assert to_objects(labels).max() == 2
    assert to_objects(labels, "masks").max() == 4
    assert to_objects(mask, "labels").max() == 1
    assert to_objects(labels, value=7).max() == 1
    assert to_objects(np.full((3, 3), 5, np.uint8)).max() == 1
    assert to_objects(np.zeros((3, 3), np.uint8)).max() == 0


def test_classes_that_touch_are_doubted_too(tmp_path):
    classes = np.full((60, 60), 2, np.uint8)  # rims around everything: the foreground is one piece
    classes[1::6, 1::6] = 1
    write_mask(tmp_path / "rims.png", classes)
    references = References(ScoreOptions(tmp_path))
    references.read("rims")
    assert "label map of 2 objects, which lie in 101 pieces" in references.notes[0]


def test_classes_that_are_taken_as_objects_are_doubted(tmp_path):
    classes = np.zeros((40, 40), np.uint8)
    classes[::5, ::5], classes[20, 20] = 1, 2
    write_mask(tmp_path / "classes.png", classes)
    write_mask(tmp_path / "labels.png", disc_map([(20, 20), (60, 60)]))
    references = References(ScoreOptions(tmp_path))
    assert references.read("labels").max() == 2 and references.notes == []
    assert references.read("classes").max() == 2
    assert "label map of 2 objects, which lie in 64 pieces" in references.notes[0]
    board, failures = score_files({"classes": tmp_path / "classes.png"}, ScoreOptions(tmp_path))
    assert board.notes == references.notes and len(failures) == 1  # that labels.png has no image
    chosen = References(ScoreOptions(tmp_path, value=1))
    assert chosen.read("classes").max() == 63 and chosen.notes == []


def test_large_and_uneven_label_values_keep_their_objects():
    labels = np.zeros((4, 6), np.uint32)
    labels[0, :2], labels[2, :2], labels[2, 4] = 4_000_000_000, 17, 3
    objects = to_objects(labels)
    assert objects.dtype == np.int32 and sorted(np.unique(objects)) == [0, 1, 2, 3]
    assert [(objects == v).sum() for v in (1, 2, 3)] == [1, 2, 2]


def test_groups_and_sums():
    board = ScoreBoard(r"^(p\d)")
    labels, half = disc_map([(20, 20), (60, 60)]), disc_map([(20, 20)])
    board.add("p1_a", score_labels(labels, labels))
    board.add("p1_b", score_labels(half, labels))
    board.add("p2_a", score_labels(np.zeros_like(labels), labels))
    summary = board.summary()
    assert list(summary["groups"]) == ["p1", "p2"]
    assert summary["groups"]["p1"]["f1_50"] == pytest.approx(6 / 7)
    assert summary["groups"]["p2"]["f1_50"] == 0
    assert summary["all"]["f1_50"] == pytest.approx(6 / 9) and summary["all"]["true"] == 6
    assert summary["all"]["f1_50_per_image"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    rows = board.rows()
    assert [row["image"] for row in rows] == ["p1_a", "p1_b", "p2_a", "", "", "all"]
    assert [row["images"] for row in rows[3:]] == [2, 1, 3]
    assert [line.split(":")[0] for line in board.lines()] == ["p1", "p2", "all"]
    with pytest.raises(ValueError, match="does not match the file name 'other'"):
        board.add("other", score_labels(labels, labels))


def test_counts_and_sizes():
    reference = disc_map([(20, 20), (60, 20), (20, 60), (60, 60)], radius=8)
    labels = disc_map([(20, 20), (60, 20)], radius=10)
    summary = score_labels(labels, reference).summary()
    assert summary["count_error"] == -0.5
    assert summary["mean_diameter_error"] == pytest.approx(0.25, abs=0.03)
    assert summary["diameter_distance"] == pytest.approx(4, abs=0.4)


def test_an_empty_board_has_a_summary():
    board = ScoreBoard()
    assert board.total is None and board.rows() == [] and board.lines() == []
    assert board.summary() == {"all": None, "groups": {}}


@pytest.fixture
def folders(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs" / "gt"
    for stem in ("a", "b", "c"):
        write_mask(ours / f"{stem}.png", disc_map([(20, 20), (60, 60)]))
    for stem in ("b", "c", "d"):
        write_mask(theirs / f"{stem}.png", (disc_map([(20, 20), (60, 60)]) > 0).astype(np.uint8) * np.uint8(255))
    return {path.stem: path for path in ours.iterdir()}, theirs


def test_files_are_compared_and_missing_pairs_named(folders, tmp_path):
    ours, theirs = folders
    board, failures = score_files(ours, ScoreOptions(theirs.parent))
    assert sorted(board.images) == ["b", "c"] and board.summary()["all"]["f1_50"] == 1
    assert any(m.startswith("1 of 3 images have no reference") and ": a;" in m for m in failures)
    assert any(m.startswith("1 of 3 references have no image") and ": d;" in m for m in failures)
    path = write_scores(tmp_path, board, "dot")
    lines = path.read_text().splitlines()
    assert lines[0].startswith("image;group;images;f1;") and len(lines) == 4 and lines[-1].startswith("all;;2;1.0000")


@pytest.mark.parametrize("values", [(1, 2), (7, 3_000_000_000), (4_294_967_295, 65_536)])
def test_numbers_of_label_maps_may_be_of_any_size(tmp_path, values):
    labels = disc_map([(20, 20), (60, 60)])
    write_mask(tmp_path / "theirs" / "a.tif", np.array([0, *values], np.uint32)[labels])
    write_mask(tmp_path / "ours.tif", np.array([0, *values[::-1]], np.uint32)[labels])
    board, failures = score_files({"a": tmp_path / "ours.tif"}, ScoreOptions(tmp_path / "theirs", min_area=5))
    assert not failures and board.summary()["all"]["f1"] == 1 and board.summary()["all"]["predicted"] == 2


def test_files_that_cannot_be_compared_do_not_stop_the_rest(folders):
    ours, theirs = folders
    write_mask(theirs / "b.png", disc_map([(20, 20)], shape=(90, 96)))
    (theirs / "a.png").write_bytes(b"no picture")
    board, failures = score_files(ours, ScoreOptions(theirs))
    assert list(board.images) == ["c"]
    assert any("b.png is 90x96, its image is 96x96" in message for message in failures)
    assert any("a.png" in message and "expected" in message for message in failures)


def test_folders_without_references_are_named(tmp_path, folders):
    ours, theirs = folders
    with pytest.raises(FileNotFoundError, match="no masks in .*empty"):
        (tmp_path / "empty").mkdir()
        References(ScoreOptions(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        References(ScoreOptions(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no image has a reference in .*files pair by stem"):
        score_files({"other": ours["a"]}, ScoreOptions(theirs))
    with pytest.raises(ImageError, match="expected the same size"):
        References(ScoreOptions(theirs)).read("b", (1, 1))


def test_flags():
    parser = argparse.ArgumentParser()
    add_score_args(parser)
    words = ["--against", "gt", "--score-min-area", "30", "--group-pattern", "^(a)"]
    options = options_from(parser.parse_args(words))
    assert (str(options.folder), options.min_area, options.group_pattern) == ("gt", 30, "^(a)")
    assert options_from(parser.parse_args([])).folder is None
    for words, message in (
        (["--against", "gt", "--group-pattern", "("], "no regular expression"),
        (["--against-value", "3"], "give --against DIR too"),
        (["--against", "gt", "--against-value", "3", "--against-kind", "labels"], "every value is one object"),
    ):
        with pytest.raises(cli.UsageError, match=message):
            options_from(parser.parse_args(words))
