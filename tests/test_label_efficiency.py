"""Bookkeeping of the benchmark of few labels: subsets, pairs, chance, parts that are done once; and all of it, tiny."""

import itertools
import json
import time

import numpy as np
import pytest
from scipy import stats

from benchmarks import label_efficiency
from benchmarks.paired import draw_subset, format_rows, sign_flip_p, steps_to, summarise
from benchmarks.part_queue import Commands, Part, run_parts
from image_io import read_image, write_image, write_mask

KINDS = {"dark": [f"d{k:02}" for k in range(76)], "bright": [f"b{k:02}" for k in range(15)]}


@pytest.mark.parametrize(("count", "bright"), [(2, 1), (4, 1), (10, 2), (91, 15)])
def test_subsets_hold_both_kinds_by_their_shares(count, bright):
    for seed in range(20):
        names = draw_subset(KINDS, count, seed)
        assert len(set(names)) == count
        assert sum(name.startswith("b") for name in names) == bright


def test_subsets_depend_on_the_seed_alone():
    assert draw_subset(KINDS, 10, 3) == draw_subset({kind: names[::-1] for kind, names in KINDS.items()}, 10, 3)
    assert len({tuple(draw_subset(KINDS, 10, seed)) for seed in range(50)}) == 50
    drawn = {name for seed in range(200) for name in draw_subset(KINDS, 10, seed)}
    assert drawn == {*KINDS["dark"], *KINDS["bright"]}, "every image can be drawn"


@pytest.mark.parametrize("count", [1, 92])
def test_impossible_subsets(count):
    with pytest.raises(ValueError, match=f"a subset of {count} out of 91"):
        draw_subset(KINDS, count, 0)


def test_one_kind_alone():
    assert len(draw_subset({"dark": ["a", "b", "c"], "bright": []}, 2, 0)) == 2


def test_p_is_the_exact_permutation_test():
    rng = np.random.default_rng(0)
    for count in (3, 6):
        values = rng.normal(0.5, 1, count)
        found = stats.permutation_test(
            (values,), lambda x, axis: x.mean(axis=axis), permutation_type="samples", n_resamples=np.inf
        )
        assert sign_flip_p(values.tolist()) == pytest.approx(found.pvalue)
    assert sign_flip_p([1, 2, 3, 4, 5, 6]) == pytest.approx(2 / 64)
    assert sign_flip_p([0.0, 0.0]) == 1
    assert sign_flip_p([1, -1]) == 1


def test_the_first_point_that_is_as_good():
    curve = [[40, 0.3], [80, 0.5], [120, 0.45], [160, 0.6]]
    assert [steps_to(curve, score) for score in (0.2, 0.5, 0.51, 0.7)] == [40, 80, 160, None]


def run(*scores):
    curve = [[10 * (place + 1), score] for place, score in enumerate(scores)]
    return {"curve": curve, "final": scores[-1], "settled": scores[-1] + 0.05, "settled_each": scores[0]}


def test_rows_compare_runs_of_the_same_subset():
    runs = {
        "random": [run(0.2, 0.5), run(0.3, 0.7), run(0.1, 0.6)],
        "barlow": [run(0.5, 0.6), run(0.4, 0.8), run(0.2, 0.5)],
    }
    base, row = summarise(runs, "random")
    assert "gain" not in base["final"]
    assert base["final"]["mean"] == pytest.approx(0.6)
    assert base["settled"]["mean"] == pytest.approx(0.65)
    final = row["final"]
    assert final["gains"] == pytest.approx([0.1, 0.1, -0.1])
    assert final["gain"] == pytest.approx(0.1 / 3)
    assert final["gain_spread"] == pytest.approx(np.std([0.1, 0.1, -0.1], ddof=1))
    assert final["p"] == 1.0
    assert row["settled_each"]["gains"] == pytest.approx([0.3, 0.1, 0.1])
    assert row["reached"] == [10, 20, None]
    assert row["median_reached"] == 20
    text = format_rows([base, row], {"random": 0.01, "barlow": 0.003}, 20)
    assert "| random | 0.01 | 60.0 ± 10.0 |  | 65.0 ± 10.0 |  | 20.0 ± 10.0 |  | 20 |" in text
    assert "| +3.3 ± 11.5 (p 1.00) | 68.3 ± 15.3 | +3.3 ± 11.5 (p 1.00) | 36.7 ± 15.3 | +16.7 ± 11.5 (p 0.25) |" in text
    assert text.endswith("| 20 (100%), never in 1 of 3 |")
    assert {line.count("|") for line in text.splitlines()} == {10}


def test_parts_are_done_once_in_order_and_as_early_as_they_can(tmp_path):
    order = []

    def work(name, seconds=0.0):
        def run(results):
            order.append(name)
            time.sleep(seconds)
            return {"seen": sorted(results)}

        return Part(name, run, {"c": ("a",), "d": ("b", "c")}.get(name, ()))

    parts = [work("d"), work("a", 0.3), work("b"), work("c"), work("e")]
    said = []
    results = run_parts(parts, tmp_path, jobs=2, report=said.append)
    assert order[:2] == ["a", "b"]
    assert order[2] == "e", "it waits for nothing, while c waits for a"
    assert order[3:] == ["c", "d"]
    assert results["d"]["seen"] == ["a", "b", "c", "e"]
    assert len(said) == 5
    (tmp_path / "c.json").unlink()
    again = run_parts(parts, tmp_path, jobs=1, report=said.append)
    assert order[5:] == ["c"], "only what has no result is done"
    assert again.keys() == results.keys()


def test_a_part_that_fails_keeps_what_is_done_and_ends_what_runs(tmp_path):
    def fail(_):
        raise RuntimeError("no luck")

    stopped = []
    parts = [Part("a", lambda _: 1), Part("b", fail, ("a",)), Part("c", lambda _: 3, ("b",))]
    with pytest.raises(RuntimeError, match="no luck"):
        run_parts(parts, tmp_path, jobs=2, report=lambda _: None, stop=lambda: stopped.append(1))
    assert stopped == [1]
    assert json.loads((tmp_path / "a.json").read_text()) == 1
    assert run_parts(parts[:1], tmp_path, jobs=1, report=lambda _: None) == {"a": 1}


def test_parts_that_wait_for_nothing_that_comes(tmp_path):
    with pytest.raises(ValueError, match="a needs z, which never come"):
        run_parts([Part("a", lambda _: 1, ("z",))], tmp_path, jobs=1, report=print)


def test_a_command_that_fails_shows_its_last_lines(tmp_path):
    commands = Commands(threads=1)
    commands.run(["-c", "import os; print(os.environ['OMP_NUM_THREADS'])"], tmp_path / "log" / "good.txt")
    assert (tmp_path / "log" / "good.txt").read_text() == "1\n"
    with pytest.raises(RuntimeError, match=r"status 3; see .*bad.txt\nthe reason"):
        commands.run(["-c", "import sys; print('the reason'); sys.exit(3)"], tmp_path / "bad.txt")


def write_data(root):
    """Dark and bright images of squares, some of them unlabelled and grey."""
    rng = np.random.default_rng(0)
    for number, place in enumerate(["nuclei/train"] * 8 + ["nuclei/val"] * 2 + ["bubbles", "froth"]):
        mask = np.zeros((40, 48), np.uint16)
        mask[8:20, 10:30] = number + 1
        bright = number % 4 == 1
        image = np.where(mask[..., None] > 0, 120, 210 if bright else 20) + rng.integers(0, 20, (40, 48, 3))
        image = image.astype(np.uint8)
        folder = root / place / "images" if place != "froth" else root / place
        write_image(folder / f"x{number}.png", image[..., :1] if place == "bubbles" else image)
        if place.startswith("nuclei"):
            write_mask(root / place / "gt" / f"x{number}.png", mask)
    return root


class InProcess(Commands):
    """Runs the commands here, where their imports are paid for."""

    calls = ()

    def run(self, words, log):
        import importlib

        InProcess.calls = (*InProcess.calls, list(words))
        importlib.import_module(words[0].removesuffix(".py")).main(list(words[1:]))


@pytest.fixture
def quick(monkeypatch):
    """No curves are drawn, and commands run in this process."""
    import run_folder
    from selfsupervised import run_log

    monkeypatch.setattr(run_log, "pretraining_curves", lambda *_: None)
    monkeypatch.setattr(run_folder, "learning_curves", lambda *_: None, raising=False)
    monkeypatch.setattr(label_efficiency, "Commands", InProcess)
    InProcess.calls = ()


def test_the_whole_of_it_tiny(tmp_path, quick, capsys):
    words = ["--data", str(write_data(tmp_path / "data")), "--out", str(tmp_path / "out"), "--encoder", "plain-8"]
    words += ["--image-size", "32", "--methods", "moco", "--pretrain-steps", "2", "--pretrain-batch", "16"]
    words += ["--steps", "4", "--points", "2", "--subsets", "2:1", "--rates", "0.003", "--jobs", "1"]
    label_efficiency.main(words)
    shown = capsys.readouterr().out
    assert (tmp_path / "out" / "table.md").read_text() in shown
    for start in ("random", "moco"):
        assert f"| {start} | 0.003 | " in shown
    check_pairing([list(call) for call in InProcess.calls])
    assert "The same with 2 steps, beside 4 from scratch:" in shown
    halves = [call for call in InProcess.calls if "half_moco_2_100" in call]
    assert [call[call.index("-e") + 1] for call in halves] == ["1"]
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = {row["name"]: row for row in content["tables"]["2"]}
    parts = [tmp_path / "out" / "parts" / f"train_{start}_2_100.json" for start in ("moco", "random")]
    own, base = (json.loads(path.read_text()) for path in parts)
    for score in ("final", "settled", "settled_each"):
        assert rows["moco"][score]["gains"] == pytest.approx([own[score] - base[score]])
    for name in ("features_bubbles", "features_froth", "predictions_dark", "predictions_bright"):
        assert read_image(tmp_path / "out" / "pictures" / f"{name}.png").shape[2] == 3
    done = len(InProcess.calls)
    label_efficiency.main(words)
    assert len(InProcess.calls) == done, "nothing is done again"
    assert capsys.readouterr().out.endswith(shown[shown.index("plain-unet plain-8, 32") :])
    with pytest.raises(SystemExit):
        label_efficiency.main([*words, "--steps", "6"])
    assert "holds results with steps 4, now it is 6" in capsys.readouterr().err


def check_pairing(calls):
    """Runs of one subset differ in the encoder's weights, their rate and their names alone."""
    trained = [
        call for call in calls if call[0] == "train.py" and call[call.index("--exp-name") + 1].startswith("train")
    ]
    assert len(trained) == 2
    for number, group in itertools.groupby(trained, key=lambda call: call[call.index("--seed") + 1]):
        kept = []
        for call in group:
            for flag in ("--encoder-weights", "-lr", "--exp-name"):
                at = call.index(flag)
                del call[at : at + 2]
            kept.append(call)
        assert all(call == kept[0] for call in kept), f"subset {number}"


def test_scores_without_statistics_stay_as_train_py_gives_them(tmp_path, quick):
    """Group normalisation has none to re-estimate: the second score is that of the last epoch."""
    words = ["--data", str(write_data(tmp_path / "data")), "--out", str(tmp_path / "out"), "--encoder", "plain-8-gn"]
    words += ["--image-size", "32", "--steps", "4", "--points", "2", "--subsets", "4:1"]
    bench = label_efficiency.prepare(label_efficiency.build_parser().parse_args(words))
    assert {kind: len(names) for kind, names in bench.kinds.items()} == {"dark": 6, "stained": 0, "white": 2}
    found = label_efficiency.train(bench, "own", "random", 4, 0, 0.01)
    assert found["settled"] == pytest.approx(found["final"], abs=1e-9)
    assert 0 < found["settled"] < 1
    assert found["settled_each"] != found["settled"]


def test_rates_are_chosen_by_images_that_nothing_else_sees(monkeypatch):
    seen = {}
    monkeypatch.setattr(label_efficiency, "train", lambda *words, held_out: seen.update(words=words, names=held_out))
    args = label_efficiency.build_parser().parse_args(["--data", "d", "--out", "o"])
    label_efficiency.tune(label_efficiency.Bench(args, Commands(1), [], 91, KINDS), "own", "moco", 0.1, {})
    labels, seed = seen["words"][3:5]
    assert (labels, len(seen["names"])) == (10, 28)
    assert not set(seen["names"]) & set(draw_subset(KINDS, labels, seed))
    assert seed not in range(label_efficiency.FIRST, label_efficiency.FIRST + 50)


def test_half_the_steps_of_an_odd_number_of_points_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        label_efficiency.main(["--data", "d", "--out", str(tmp_path), "--points", "5"])
    assert "--points 5: half of the steps need half of them; give an even number" in capsys.readouterr().err


def test_kinds_of_images():
    assert [label_efficiency.kind_of(means) for means in ((20, 20, 20), (90, 20, 200), (190, 150, 200), (212,))] == [
        "dark",
        "dark",
        "stained",
        "white",
    ]


@pytest.mark.parametrize("text", ["10", "10:", "0:3", "a:b", "4:3:2"])
def test_plans_that_cannot_be(text, capsys):
    with pytest.raises(SystemExit):
        label_efficiency.build_parser().parse_args(["--data", "d", "--out", "o", "--subsets", text])
    assert "expected labels and subsets, such as 10:6" in capsys.readouterr().err
