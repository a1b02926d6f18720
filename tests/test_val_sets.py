"""Several validation sets: names, when they are scored, what decides, and what is written about them."""

import json
import math

import numpy as np
import pytest
from discs import write_dataset, write_split
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_resume import assert_same_run

import train
import trainer
import validate
from evaluation import Evaluation, weighted_mean
from learner import FitOptions, Progress
from metrics import Scorer
from pairing import DatasetError, FileOptions, find_further, unique_names
from run_folder import RunFolder


def words_for(root, logs, *more, epochs=3):
    network = ["-m", "plain-unet", "--encoder", "plain-8", "--image-size", "32", "-b", "2", "-a", "light", "-w", "0"]
    given = ["-d", root, "-log", logs, "--exp-name", "run", "--cpu", "--worst", "0", "-e", epochs, *network, *more]
    return [str(word) for word in given]


def read_rows(logs):
    return [json.loads(line) for line in (logs / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set, another of the same name elsewhere, and a flat one."""
    base = tmp_path_factory.mktemp("data")
    write_dataset(base / "discs", train=4, val=2)
    write_split(base / "other" / "discs" / "val", ["x1"])
    write_split(base / "far", ["y1", "y2", "y3"])
    return base


# ---- names and folders ----


@settings(deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "a-2", "a-3", "c"]), max_size=12))
def test_names_become_unique_and_the_first_ones_stay(names):
    unique = unique_names(names)
    assert len(set(unique)) == len(names) == len(unique)
    for place, (name, new) in enumerate(zip(names, unique, strict=True)):
        assert new == name or (new.startswith(f"{name}-") and name in unique[:place])


def test_folders_and_lists_of_folders(data, tmp_path):
    (data / "sets.txt").write_text(f"\n{data / 'other' / 'discs'}\n\n  far  \n\n", encoding="utf-8")
    found = find_further([data / "sets.txt", data / "discs" / "val"], FileOptions())
    assert [listing.folder for listing in found] == [
        data / "other" / "discs" / "val",
        data / "far",
        data / "discs" / "val",
    ]
    assert [len(listing.pairs) for listing in found] == [1, 3, 2]
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DatasetError, match=r"empty\.txt is empty; expected the folder"):
        find_further([tmp_path / "empty.txt"], FileOptions())
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(DatasetError, match=r"binary\.txt is not UTF-8 text"):
        find_further([tmp_path / "binary.txt"], FileOptions())
    with pytest.raises(DatasetError, match="no folder .*absent"):
        find_further([tmp_path / "absent"], FileOptions())


# ---- what decides ----


def evaluation_of(seed, images, loss):
    rng, scorer = np.random.default_rng(seed), Scorer(("background", "object"), binary=True)
    for place in range(images):
        mask = (rng.random((6, 6)) < 0.4).astype(np.uint8)
        scorer.update(f"i{place}", np.clip(mask * 0.4 + rng.random((6, 6)) * 0.6, 0, 1)[None].astype(np.float32), mask)
    return Evaluation(loss, scorer.summary(), scorer=scorer)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_weights_of_the_mean_sum_to_one(sizes):
    results = {f"s{place}": evaluation_of(place, 2, 0.1 * place) for place in range(len(sizes))}
    mean = weighted_mean(results, {f"s{place}": size for place, size in enumerate(sizes)})
    for key in ("iou", "dice"):
        expected = sum(size * results[f"s{place}"].summary[key] for place, size in enumerate(sizes)) / sum(sizes)
        assert mean.summary[key] == pytest.approx(expected)
    assert mean.loss == pytest.approx(sum(size * 0.1 * place for place, size in enumerate(sizes)) / sum(sizes))
    pooled = sum(np.array(result.summary["confusion"]) for result in results.values())
    assert mean.summary["confusion"] == pooled.tolist()


def test_an_undefined_score_is_left_out_of_the_mean():
    first, second = evaluation_of(0, 1, None), evaluation_of(1, 1, 0.5)
    first.summary["iou"] = None
    mean = weighted_mean({"a": first, "b": second}, {"a": 5, "b": 1})
    assert mean.summary["iou"] == second.summary["iou"] and mean.loss == 0.5
    assert mean.summary["dice"] == pytest.approx((5 * first.summary["dice"] + second.summary["dice"]) / 6)
    second.summary["iou"] = second.loss = None
    mean = weighted_mean({"a": first, "b": second}, {"a": 5, "b": 1})
    assert mean.summary["iou"] is None and mean.loss is None


def test_an_epoch_without_scores_is_neither_good_nor_bad():
    class Seen:
        values, best, progress = [], None, Progress()
        schedule = property(lambda self: self)

        def after_epoch(self, value):
            self.values.append(value)

    learner, options = Seen(), FitOptions(monitor="loss", weighted=True)
    results = [None, Evaluation(0.5, {}), None, Evaluation(0.7, {}), Evaluation(0.4, {})]
    improved = [trainer.note_epoch(learner, result, options) for result in results]
    assert improved == [False, True, False, False, True]
    assert learner.values == [0.5, 0.7, 0.4] and learner.progress.epoch == learner.progress.best_epoch == 5


# ---- the command ----


def test_further_sets_are_scored_every_few_epochs_and_in_the_last(data, tmp_path, capsys):
    more = ["--add-val-dirs", data / "other" / "discs", data / "far", "--adv-freq", 2, "--decimal", "dot"]
    train.main(words_for(data / "discs", tmp_path, *more))
    rows, said = read_rows(tmp_path), capsys.readouterr().out
    assert [list(row["val"]) for row in rows] == [["discs"], *[["discs", "discs-2", "far"]] * 2]
    lines = (tmp_path / "run" / "_iou_per_epoch_val.csv").read_text().splitlines()
    assert lines[0] == "epoch; iou; discs-2; far" and lines[1].endswith("; nan; nan")
    last = rows[-1]["val"]
    assert lines[3] == "; ".join(["3", *(f"{last[name]['iou']:.4f}" for name in ("discs", "discs-2", "far"))])
    assert f"further validation sets discs-2: 1 images of {data / 'other' / 'discs' / 'val'}; far: 3 images" in said
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    for name, steps in (("discs", [1, 2, 3]), ("discs-2", [2, 3]), ("far", [2, 3])):
        for key in ("iou", "loss"):
            seen = events.Scalars(f"{name} {key}")
            assert [event.step for event in seen] == steps
            assert seen[-1].value == pytest.approx(last[name][key], rel=1e-5)
    best = max(rows, key=lambda row: row["val"]["discs"]["iou"])
    assert f"best epoch {best['epoch']} of 3" in said, "the main set decides"


def test_each_set_has_the_score_it_has_alone(data, tmp_path):
    more = ["--add-val-dirs", data / "other" / "discs", data / "far"]
    train.main(words_for(data / "discs", tmp_path, *more, epochs=1))
    (row,) = read_rows(tmp_path)
    folders = {"discs": data / "discs" / "val", "discs-2": data / "other" / "discs" / "val", "far": data / "far"}
    for name, folder in folders.items():
        words = ["-d", folder, "-cd", tmp_path / "run", "-o", tmp_path / name, "--com", "--cpu", "-log", tmp_path]
        validate.main([str(word) for word in words])
        scores = json.loads((tmp_path / name / "_metrics.json").read_text())
        assert row["val"][name]["iou"] == pytest.approx(scores["iou"], abs=1e-12)


def test_without_a_main_set_the_weighted_mean_decides(data, tmp_path, capsys):
    write_split(tmp_path / "flat", ["a1", "a2", "a3"])
    more = ["--add-val-dirs", data / "other" / "discs", data / "far", "--use-only-add-val", "--decimal", "dot"]
    train.main(words_for(tmp_path / "flat", tmp_path, *more, "-lr", 0.01, epochs=4))
    rows, said = read_rows(tmp_path), capsys.readouterr().out
    assert "3 training and 4 validation images; no main validation set" in said, "nothing is held out"
    for row in rows:
        assert list(row["val"]) == ["discs", "far"]
        for key in ("iou", "dice", "loss"):
            expected = row["val"]["discs"][key] / 4 + 3 * row["val"]["far"][key] / 4
            assert row["score"][key] == pytest.approx(expected)
    best = max(rows, key=lambda row: row["score"]["iou"])
    assert f"best epoch {best['epoch']} of 4" in said
    assert f"the mean over sets that decides: IoU {best['score']['iou']:.4f}" in said
    lines = (tmp_path / "run" / "_iou_per_epoch_val.csv").read_text().splitlines()
    assert lines[0] == "epoch; iou; discs; far"
    assert [line.split("; ")[1] for line in lines[1:]] == [f"{row['score']['iou']:.4f}" for row in rows]
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert [event.value for event in events.Scalars("weighted mean iou")] == pytest.approx(
        [row["score"]["iou"] for row in rows]
    )
    capsys.readouterr()
    train.main(words_for(tmp_path / "flat", tmp_path, *more, "-lr", 0.01, epochs=4))
    again = capsys.readouterr().out
    assert said.split("best epoch")[1] == again.split("best epoch")[1], "scored again, the same"


def test_epochs_without_scores_go_on_bit_for_bit(data, tmp_path, monkeypatch):
    more = ["--add-val-dirs", data / "far", "--use-only-add-val", "--adv-freq", 3, "-sc", "plateau"]
    more += ["--plateau-patience", 0, "--ema", 0.9]
    train.main(words_for(data / "discs", tmp_path / "whole", *more, epochs=5))
    rows = read_rows(tmp_path / "whole")
    assert [list(row["val"]) for row in rows] == [[], [], ["far"], [], ["far"]]
    assert [row["score"] is None for row in rows] == [True, True, False, True, False]
    lines = (tmp_path / "whole" / "run" / "_iou_per_epoch_val.csv").read_text().splitlines()
    assert [line.endswith("nan; nan") for line in lines[1:]] == [True, True, False, True, False]
    log = RunFolder.log_epoch

    def stop(self, row):
        log(self, row)
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "log_epoch", stop)
    with pytest.raises(SystemExit):
        train.main(words_for(data / "discs", tmp_path / "halves", *more, epochs=5))
    monkeypatch.undo()
    assert not (tmp_path / "halves" / "run" / "run.pth").exists()
    train.main(words_for(data / "discs", tmp_path / "halves", *more, epochs=5))
    assert_same_run(tmp_path / "halves" / "run", tmp_path / "whole" / "run")


def test_findings_of_a_further_set_stop_the_run_before_it_begins(data, tmp_path, capsys):
    write_split(tmp_path / "grey", ["g1"], channels=1)
    (tmp_path / "bare" / "images").mkdir(parents=True)
    (tmp_path / "bare" / "images" / "n.png").write_bytes((data / "far" / "images" / "y1.png").read_bytes())
    for folder, parts in (
        (tmp_path / "grey", ["images differ in channels", "g1.png"]),
        (tmp_path / "bare", ["bare has no gt/ (or masks/): validation needs a mask"]),
        (tmp_path / "absent", ["no folder"]),
    ):
        with pytest.raises(SystemExit) as ended:
            train.main(words_for(data / "discs", tmp_path / "logs", "--add-val-dirs", folder))
        error = capsys.readouterr().err
        assert ended.value.code == 1 and all(part in error for part in parts), error
    assert not (tmp_path / "logs").exists()


def test_training_images_in_a_further_set_are_warned_about(data, tmp_path, capsys):
    train.main(words_for(data / "discs", tmp_path, "--add-val-dirs", data / "discs" / "train", epochs=1))
    assert "4 images are in training and validation both" in capsys.readouterr().out
    assert not math.isnan(read_rows(tmp_path)[0]["val"]["discs-2"]["iou"])
