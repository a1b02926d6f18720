"""Folds: nobody is split, parts are alike, what was held out stays so; pooled counts are those of the parts."""

import csv
import json
import statistics
from pathlib import Path

import numpy as np
import pytest
from discs import write_dataset, write_split
from hypothesis import given, settings
from hypothesis import strategies as st
from test_resume import assert_same_run

import folds
import scan
import train
import validate
from checkpoint import load_checkpoint
from classes import ClassMap
from facts import ImageFacts, MaskFacts, PairFacts
from image_io import write_mask
from pairing import DatasetError, Pair

CLASSES = ClassMap((1, 2), ("background", "one", "two"))


def facts_of(contents, tmp_path="."):
    """Facts of images by name: pixels of background, first and second class."""
    made = []
    for name, pixels in contents.items():
        labels = [[value, count] for value, count in enumerate(pixels) if count]
        pair = Pair(name, Path(tmp_path) / f"{name}.png", Path(tmp_path) / f"{name}_mask.png")
        made.append(PairFacts(pair, [ImageFacts((8, 8), 3, "uint8")], MaskFacts((8, 8), labels=labels), None))
    return made


def random_contents(seed, patients=12, most=4):
    rng = np.random.default_rng(seed)
    contents = {}
    for patient in range(patients):
        for image in range(int(rng.integers(1, most + 1))):
            one, two = rng.integers(0, 500, 2) * (rng.random(2) < (0.7, 0.25))
            contents[f"p{patient:02}_{image}"] = (1000, int(one), int(two))
    return contents


# ---- who is held out ----


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6))
def test_no_group_is_split_and_no_fold_is_empty(seed, count):
    contents = random_contents(seed)
    chosen = folds.choose_folds(facts_of(contents), CLASSES, r"^(p\d+)", count)
    assert chosen.keys() == contents.keys() and set(chosen.values()) == set(range(count))
    by_patient = {}
    for name, fold in chosen.items():
        by_patient.setdefault(name[:3], set()).add(fold)
    assert all(len(found) == 1 for found in by_patient.values())


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000))
def test_the_order_of_files_does_not_matter(seed):
    contents = random_contents(seed)
    shuffled = dict(np.random.default_rng(seed).permutation(np.array([*contents.items()], dtype=object)).tolist())
    first, second = (folds.choose_folds(facts_of(c), CLASSES, r"^(p\d+)", 3) for c in (contents, shuffled))
    assert first == second


def test_equal_images_are_dealt_out_evenly():
    chosen = folds.choose_folds(facts_of({f"i{k}": (50, 50, 0) for k in range(11)}), CLASSES, None, 4)
    sizes = sorted(list(chosen.values()).count(fold) for fold in range(4))
    assert sizes == [2, 3, 3, 3]


def test_a_rare_class_is_in_every_fold():
    contents = {f"i{k}": (900, 100, 10 if k < 3 else 0) for k in range(12)}
    chosen = folds.choose_folds(facts_of(contents), CLASSES, None, 3)
    assert {chosen[f"i{k}"] for k in range(3)} == {0, 1, 2}


def unevenness(contents, chosen, count):
    """How far the folds' shares of images, of images with each class and of areas are from equal ones."""
    columns = {name: [1, one > 0, two > 0, one / 1000, two / 1000] for name, (_, one, two) in contents.items()}
    table = np.zeros((count, 5))
    for name, values in columns.items():
        table[chosen[name]] += values
    return float(((table / table.sum(0) - 1 / count) ** 2).sum())


def test_folds_are_more_alike_than_by_chance():
    ours, chance = [], []
    for seed in range(20):
        contents = random_contents(seed, patients=20)
        ours.append(unevenness(contents, folds.choose_folds(facts_of(contents), CLASSES, r"^(p\d+)", 4), 4))
        places = np.random.default_rng(seed).permutation(np.arange(20) % 4)
        chance.append(unevenness(contents, {name: places[int(name[1:3])] for name in contents}, 4))
    assert statistics.mean(ours) < 0.4 * statistics.mean(chance)
    assert all(own < other for own, other in zip(ours, chance, strict=True))


def test_too_many_folds_are_refused():
    contents = random_contents(0, patients=3)
    with pytest.raises(DatasetError, match=r"--folds 4 .* there are 3 groups of --group-pattern .* Give --folds 3 or"):
        folds.choose_folds(facts_of(contents), CLASSES, r"^(p\d+)", 4)
    with pytest.raises(DatasetError, match=r"--folds 9 .* there are 2 images"):
        folds.choose_folds(facts_of({"a": (1, 1, 0), "b": (1, 1, 0)}), CLASSES, None, 9)
    with pytest.raises(DatasetError, match="does not match the file name"):
        folds.choose_folds(facts_of(contents), CLASSES, r"^(q\d+)", 2)


def test_folds_stay_as_they_were_written(tmp_path):
    path, contents = tmp_path / "run_folds" / "folds.json", random_contents(1)
    facts = facts_of(contents)
    first = folds.load_or_choose_folds(path, facts, CLASSES, r"^(p\d+)", 3)
    swapped = {name: (1000, two, one) for name, (_, one, two) in contents.items()}
    assert folds.load_or_choose_folds(path, facts_of(swapped), CLASSES, r"^(p\d+)", 3) == first
    for change, part in (
        ({"facts": facts[1:]}, "1 came or went, such as 'p00_0'"),
        ({"count": 4}, "holds 3 folds"),
        ({"pattern": r"^(p\d)"}, "now it is 3 with"),
    ):
        values = {"facts": facts, "pattern": r"^(p\d+)", "count": 3} | change
        with pytest.raises(ValueError, match=part) as error:
            folds.load_or_choose_folds(path, values["facts"], CLASSES, values["pattern"], values["count"])
        assert str(path) in str(error.value) and "another --exp-name" in str(error.value)
    path.write_text("{}")
    with pytest.raises(ValueError, match="folds.json is damaged"):
        folds.load_or_choose_folds(path, facts, CLASSES, None, 3)


def test_a_fold_says_what_was_chosen_for_all_of_them(tmp_path):
    write_split(tmp_path / "train", ["a1", 'b"2', "c3"])
    write_split(tmp_path / "val", ["d1"])
    args = train.build_parser().parse_args(["-d", str(tmp_path), "--folds", "3", "--fold", "1"])
    checked = scan.check_from_flags(args, folds=True)
    chosen = {"a1": 0, 'b"2': 1, "c3": 2}
    notes = folds.hold_out(checked, chosen, 1).notes
    assert notes[0] == "fold 1 of 0 to 2 is held out" and f"{tmp_path / 'val'} takes no part" in notes
    assert any("no --class-list: the masks hold 0 and 255" in note for note in notes)
    train.prepare_fold(args, tmp_path / "fold", folds.hold_out(checked, chosen, 1))
    assert held_out(tmp_path / "fold") == ['b"2']


# ---- the command ----

NETWORK = ["-m", "plain-unet", "--encoder", "plain-8", "--image-size", "32", "-b", "2", "-a", "light", "--worst", "0"]


def words_for(root, logs, *more):
    given = ["-d", root, "-log", logs, "--exp-name", "cv", "-w", "0", "--cpu", *NETWORK, "-e", "1", *more]
    return [str(word) for word in given]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Three folds of seven images of four patients, all trained."""
    base = tmp_path_factory.mktemp("folds")
    write_split(base / "discs", ["a1", "a2", "b1", "b2", "c1", "d1", "d2"])
    words = words_for(base / "discs", base / "logs", "--folds", 3, "--group-pattern", "^([a-d])")
    train.main(words)
    return base, words


def held_out(folder):
    return [row["id"] for row in csv.DictReader((folder / "held_out.csv").open())]


def test_each_image_is_held_out_once_and_with_its_group(trained):
    logs = trained[0] / "logs"
    parts = [held_out(logs / f"cv_fold_{fold}") for fold in range(3)]
    assert sorted(name for part in parts for name in part) == ["a1", "a2", "b1", "b2", "c1", "d1", "d2"]
    for part in parts:
        letters = {name[0] for name in part}
        assert len(part) == sum(1 if letter == "c" else 2 for letter in letters)
    flags = json.loads((logs / "cv_fold_1" / "args.json").read_text())["flags"]
    assert (flags["folds"], flags["fold"], flags["exp_name"]) == (3, "1", "cv")
    rows = [json.loads(line) for line in (logs / "cv_fold_1" / "metrics.jsonl").read_text().splitlines()]
    assert [list(row["val"]) for row in rows] == [["discs"]]
    assert not (trained[0] / "discs" / "mean_vals.txt").exists(), "statistics of a part are not those of the data set"


def test_pooled_counts_are_those_of_the_held_out_parts(trained, tmp_path):
    base, _ = trained
    pooled = json.loads((base / "logs" / "cv_folds" / "out_of_fold.json").read_text())
    total, ious = np.zeros((2, 2), int), []
    for fold in range(3):
        folder = base / "logs" / f"cv_fold_{fold}"
        words = ["-d", base / "discs", "--ids", folder / "held_out.csv", "-cd", folder, "-o", tmp_path / str(fold)]
        validate.main([*map(str, words), "--com", "--cpu", "-log", str(tmp_path / "logs")])
        scores = json.loads((tmp_path / str(fold) / "_metrics.json").read_text())
        total += np.array(scores["confusion"])
        ious.append(scores["iou"])
        row = pooled["folds"][fold]
        assert (row["iou"], row["fold"], row["images"]) == (scores["iou"], f"cv_fold_{fold}", scores["images"])
        assert row["epoch"] == load_checkpoint(folder / f"{folder.name}.pth")[1]["epoch"]
    assert pooled["pooled"]["confusion"] == total.tolist()
    assert pooled["pooled"]["iou"] == pytest.approx(total[1, 1] / (total.sum() - total[0, 0]))
    assert pooled["over_folds"]["iou"]["mean"] == pytest.approx(statistics.mean(ious))
    assert pooled["over_folds"]["iou"]["deviation"] == pytest.approx(statistics.stdev(ious))
    assert pooled["threshold"] == pooled["pooled"]["best"]["threshold"]


def test_a_share_of_the_images_is_not_taken_for_what_a_fold_held_out(trained, tmp_path, capsys):
    base, folder = trained[0], trained[0] / "logs" / "cv_fold_0"
    words = ["-d", base / "discs", "--split", "val", "-cd", folder, "-o", tmp_path / "out", "--cpu"]
    with pytest.raises(SystemExit) as ended:
        validate.main([*map(str, words), "-log", str(tmp_path / "logs")])
    error = capsys.readouterr().err
    assert ended.value.code == 1 and "held out no share" in error and "held_out.csv" in error
    assert not (tmp_path / "out").exists()


def test_one_fold_alone_is_the_same_fold(trained, tmp_path, capsys):
    base, words = trained
    alone = [str(tmp_path / "logs") if word == str(base / "logs") else word for word in words]
    train.main([*alone, "--fold", "2"])
    assert "the same command with --fold all" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {"cv_fold_2", "cv_folds"}
    assert_same_run(tmp_path / "logs" / "cv_fold_2", base / "logs" / "cv_fold_2")
    train.main(alone)
    assert_same_run(tmp_path / "logs" / "cv_fold_0", base / "logs" / "cv_fold_0")
    name = "logs/cv_folds/out_of_fold.json"
    assert (tmp_path / name).read_text() == (base / name).read_text()


def test_the_same_command_trains_nothing_and_shows_the_table(trained, capsys):
    base, words = trained
    kept = (base / "logs" / "cv_fold_0" / "cv_fold_0.pth").read_bytes()
    train.main(words)
    said = capsys.readouterr().out
    assert said.count("the run is complete") == 3
    assert "cv_fold_2" in said.split("every image scored")[1] and "pooled pixels" in said
    assert (base / "logs" / "cv_fold_0" / "cv_fold_0.pth").read_bytes() == kept


def refused(words, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(words)
    assert stop.value.code == 1
    return capsys.readouterr().err


def test_an_image_that_came_later_is_refused(trained, tmp_path, capsys):
    write_split(tmp_path / "discs", ["a1", "b1", "c1"])
    words = words_for(tmp_path / "discs", tmp_path / "logs", "--folds", 2, "--fold", 0)
    train.main(words)
    write_split(tmp_path / "discs", ["e1"])
    error = refused(words, capsys)
    assert "1 came or went, such as 'e1'" in error and "cv_folds" in error


def test_more_folds_than_groups(tmp_path, capsys):
    write_split(tmp_path / "discs", ["a1", "a2", "b1"])
    error = refused(words_for(tmp_path / "discs", tmp_path / "logs", "--folds", 3, "--group-pattern", "^(.)"), capsys)
    assert "--folds 3 needs a group" in error and "there are 2 groups" in error and "Give --folds 2" in error
    assert not (tmp_path / "logs").exists()


def test_a_fold_without_anything_to_learn(tmp_path, capsys):
    root = write_split(tmp_path / "discs", ["a1", "b1"])
    write_mask(root / "gt" / "b1.png", np.zeros((32, 32), np.uint8))
    error = refused(words_for(root, tmp_path / "logs", "--folds", 2, "--class-list", 255), capsys)
    assert "training of fold" in error and "no mask holds any of the labels 255" in error


def test_val_stays_out_and_can_be_scored_beside(tmp_path, capsys):
    root = write_dataset(tmp_path / "discs", train=3, val=2)
    words = words_for(root, tmp_path / "logs", "--folds", 2, "--fold", 0, "--add-val-dirs", root / "val")
    train.main(words)
    (row,) = [json.loads(line) for line in (tmp_path / "logs" / "cv_fold_0" / "metrics.jsonl").read_text().splitlines()]
    assert list(row["val"]) == ["discs", "discs-2"]
    assert set(held_out(tmp_path / "logs" / "cv_fold_0")) < {"a0", "a1", "a2"}
