"""The table of runs: differing flags, best scores, means over seeds and folds, runs that are not finished or broken."""

import csv
import json
import statistics

import pytest

from dataset_utils import compare_runs
from run_folder import RunFolder

FLAGS = {"model": "unet", "lr": 0.001, "epochs": 3, "seed": 1, "monitor": "iou", "early_stop": 0, "add_dirs": []}


def write_run(logs, name, ious, *, seconds=2.0, **flags):
    """A run as train.py leaves it, with such an IoU in each epoch."""
    run = RunFolder(logs / name, epoch=0, val_names=["beans"], decimal="dot")
    run.drawn = float("inf")  # no curves
    for epoch, iou in enumerate(ious, start=1):
        scores = {"loss": 1 - (iou or 0), "iou": iou, "dice": iou and 2 * iou / (1 + iou), "classes": {"bean": iou}}
        row = {"epoch": epoch, "lr": 0.001, "train": {"loss": 0.5, "iou": 0.5}, "val": {"beans": scores}}
        run.log_epoch(row | {"seconds": seconds})
    run.writer.close()
    record = {"flags": {**FLAGS, "exp_name": name, **flags}, "command": "train.py", "environment": {}}
    (run.path / "args.json").write_text(json.dumps(record))
    return run.path


def compare(capsys, *words):
    compare_runs.main([str(word) for word in words])
    return capsys.readouterr().out.splitlines()


def refused(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        compare_runs.main([str(word) for word in words])
    return stop.value.code, capsys.readouterr().err


def read_csv(path, decimal=","):
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter=";"))
    return [
        {key: value.replace(decimal, ".") if "--" not in key else value for key, value in row.items()} for row in rows
    ]


def test_the_best_epoch_counts_and_flags_that_differ_are_shown(tmp_path, capsys):
    write_run(tmp_path, "low", [0.1, 0.4, 0.2])
    write_run(tmp_path, "high", [0.3, 0.5, 0.6], lr=0.01, add_dirs=["nir", "kv"], seconds=5)
    lines = compare(capsys, tmp_path)
    assert lines[0].split() == "run iou dice loss epoch epochs seconds --add-dirs --lr".split()
    assert lines[2].split() == "high 0.6000 0.7500 0.4000 3 3 15 nir kv 0.01".split()
    assert lines[3].split() == "low 0.4000 0.5714 0.6000 2 3 6 - 0.001".split()
    assert len(lines) == 4, "nothing is left out"


def test_runs_that_differ_in_seed_and_fold_are_one_row(tmp_path, capsys):
    values = [0.5, 0.7, 0.9]
    for seed, value in enumerate(values):
        write_run(
            tmp_path,
            f"unet-s{seed}",
            [value, 0.1, 0.1],
            seed=seed,
            fold=str(seed),
            device=f"cuda:{seed}",
            dump_augmented=seed,
        )
    write_run(tmp_path, "fpn", [0.1, 0.1, 0.65], model="fpn")
    lines = compare(capsys, tmp_path, "-o", tmp_path / "runs.csv")
    spread = statistics.stdev(values)
    assert lines[2].split()[:5] == ["unet-s*", "3", "0.7000", "±", f"{spread:.4f}"] and lines[2].split()[-1] == "unet"
    assert lines[3].split()[:4] == ["fpn", "1", "0.6500", "0.7879"], "a single run has no spread"
    assert "--seed" not in lines[0] and "--device" not in lines[0]
    rows = read_csv(tmp_path / "runs.csv")
    assert [(row["run"], row["n"], row["state"]) for row in rows] == [
        ("unet-s*", "3", "mean"),
        ("fpn", "1", "finished"),
        *((f"unet-s{seed}", "1", "finished") for seed in range(3)),
    ]
    assert float(rows[0]["iou"]) == pytest.approx(0.7) and float(rows[0]["iou sd"]) == pytest.approx(spread, abs=1e-4)
    assert [row["iou sd"] for row in rows[1:]] == ["", "", "", ""]
    assert [row["--seed"] for row in rows] == ["", "1", "0", "1", "2"]


def test_each_run_by_itself(tmp_path, capsys):
    for seed in (1, 2):
        write_run(tmp_path, f"s{seed}", [0.1 * seed] * 3, seed=seed)
    lines = compare(capsys, tmp_path, "--each")
    assert lines[0].endswith("--seed") and [line.split()[0] for line in lines[2:]] == ["s2", "s1"]


@pytest.mark.parametrize(
    ("sort", "order"),
    [("iou", "bac"), ("dice", "bac"), ("loss", "bac"), ("epoch", "abc"), ("seconds", "cab"), ("name", "abc")],
)
def test_order(sort, order, tmp_path, capsys):
    write_run(tmp_path, "a", [0.5, 0.4, 0.4], lr=1, seconds=3)
    write_run(tmp_path, "b", [0.5, 0.6, 0.4], lr=2, seconds=4)
    write_run(tmp_path, "c", [0.1, 0.2, 0.3], lr=3, seconds=1)
    lines = compare(capsys, tmp_path, "--sort", sort)
    assert "".join(line.split()[0] for line in lines[2:5]) == order


def test_what_a_run_watched_decides_its_best_epoch(tmp_path, capsys):
    path = write_run(tmp_path, "a", [0.5, 0.6, 0.4], monitor="loss")
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    rows[2]["val"]["beans"]["loss"] = 0.01
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert compare(capsys, tmp_path)[2].split()[1:5] == ["0.4000", "0.5714", "0.0100", "3"]


def test_early_stopping_finishes_a_run(tmp_path, capsys):
    write_run(tmp_path, "a", [0.5, 0.4, 0.4], epochs=50, early_stop=2)
    assert len(compare(capsys, tmp_path)) == 4
    write_run(tmp_path, "b", [0.5, 0.4, 0.6], epochs=50, early_stop=2)
    assert "  b: not finished: 3 of 50 epochs, best iou 0.6000 at epoch 3" in compare(capsys, tmp_path)


def test_broken_and_unfinished_runs_are_listed_and_count_nowhere(tmp_path, capsys):
    write_run(tmp_path, "good", [0.5] * 3)
    write_run(tmp_path, "begun", [0.9], seed=2)
    write_run(tmp_path, "empty", [])
    (write_run(tmp_path, "noargs", [0.9] * 3) / "args.json").unlink()
    (write_run(tmp_path, "badargs", [0.9] * 3) / "args.json").write_text("[]")
    (write_run(tmp_path, "cut", [0.9] * 3) / "metrics.jsonl").open("a").write('{"epoch": 4, "va')
    middle = write_run(tmp_path, "middle", [0.9] * 3) / "metrics.jsonl"
    middle.write_text(middle.read_text().replace('{"epoch": 2', "{epoch: 2"))
    (write_run(tmp_path, "alien", [0.9] * 3) / "metrics.jsonl").write_text('{"step": 1}\n')
    (write_run(tmp_path, "bytes", [0.9] * 3) / "metrics.jsonl").write_bytes(b"\xff\xfe\n")
    write_run(tmp_path, "unscored", [None] * 3)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "args.json").write_text("{}")
    lines = compare(capsys, tmp_path, "-o", tmp_path / "t.csv", "--decimal", "dot")
    assert lines[2].split()[1:3] == ["2", "0.7000"], "of good and cut"
    text = "\n".join(lines)
    assert "in no mean, 8 of 10 runs" in text
    for words in (
        "begun: not finished: 1 of 3 epochs",
        "empty: no epoch is finished",
        "noargs: broken: args.json cannot be read (FileNotFoundError)",
        "badargs: broken: args.json",
        "middle: broken: line 2 of metrics.jsonl",
        "alien: broken: metrics.jsonl holds no scores (KeyError 'val')",
        "bytes: broken: metrics.jsonl cannot be read (UnicodeDecodeError)",
        "unscored: broken: metrics.jsonl holds no scores (ValueError no epoch has a iou)",
    ):
        assert words in text
    states = {row["run"]: row["state"] for row in read_csv(tmp_path / "t.csv", ".")}
    assert states["good"] == states["cut"] == "finished" and states["begun"].startswith("not finished")


def test_runs_are_found_below_and_named_by_their_path(tmp_path, capsys):
    write_run(tmp_path / "deep" / "er", "a", [0.5] * 3)
    write_run(tmp_path, "b", [0.6] * 3, lr=2)
    assert [line.split()[0] for line in compare(capsys, tmp_path)[2:]] == ["b", "deep/er/a"]
    assert [line.split()[0] for line in compare(capsys, tmp_path / "b", tmp_path / "deep" / "er")[2:]] == ["b", "a"]


def test_a_flag_that_an_older_run_did_not_know_is_off(tmp_path, capsys):
    write_run(tmp_path, "new", [0.5] * 3, ema=0, clip=0.0, seed=3)
    write_run(tmp_path, "old", [0.7] * 3)
    assert compare(capsys, tmp_path)[2].split()[1:3] == ["2", "0.6000"]


def test_another_validation_set(tmp_path, capsys):
    path = write_run(tmp_path, "a", [0.5] * 3)
    text = (path / "metrics.jsonl").read_text().replace('"val": {', '"val": {"peas": {"iou": 0.25, "dice": 0.4}, ')
    (path / "metrics.jsonl").write_text(text)
    assert compare(capsys, tmp_path)[2].split()[1:4] == ["0.2500", "0.4000", "-"]
    assert compare(capsys, tmp_path, "--val-set", "beans")[2].split()[1] == "0.5000"
    rows = [json.loads(line) for line in text.splitlines()]
    del rows[0]["val"]["peas"], rows[1]["val"]["peas"]  # as with --adv-freq 3
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert compare(capsys, tmp_path, "--val-set", "peas")[2].split()[1:5] == ["0.2500", "0.4000", "-", "3"]
    code, error = refused(capsys, tmp_path, "--val-set", "corn")
    assert code == 1 and "a: no validation set 'corn', only beans, peas, and no other run has it" in error
    write_run(tmp_path, "b", [0.9] * 3)
    assert compare(capsys, tmp_path, "--val-set", "peas")[-1] == "  b: no validation set 'peas', only beans"


def test_a_mean_over_sets_that_decided_is_what_counts(tmp_path, capsys):
    path = write_run(tmp_path, "a", [0.1, 0.2, 0.3])
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    rows[0] |= {"val": {}, "score": None}
    rows[1]["score"] = {"loss": 0.5, "iou": 0.9, "dice": 0.95}
    rows[2]["score"] = {"loss": 0.5, "iou": 0.8, "dice": 0.9}
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert compare(capsys, tmp_path)[2].split()[1:5] == ["0.9000", "0.9500", "0.5000", "2"]
    assert compare(capsys, tmp_path, "--val-set", "beans")[2].split()[1:5] == ["0.3000", "0.4615", "0.7000", "3"]


def test_folders_without_runs(tmp_path, capsys):
    code, error = refused(capsys, tmp_path)
    assert code == 1 and "no run in" in error and "metrics.jsonl" in error
    code, error = refused(capsys, tmp_path / "nowhere")
    assert code == 1 and "nowhere is not a folder" in error
