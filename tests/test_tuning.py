"""The search for parameters: drawing, rungs, copies, the default as a floor, files that --settings loads, failures."""

import argparse
import csv
import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cli
from annotation.instances import number_instances
from annotation.presets import SPACE as PRESET_SPACE
from annotation.presets import add_watershed_args
from annotation.presets import options_from as watershed_options
from annotation.score_options import ScoreOptions, add_score_args
from annotation.scoring import References, connected_objects, score_labels
from annotation.tune_options import TuneOptions, add_tune_args, options_from
from annotation.tuning import (
    WORTH,
    Trial,
    choose,
    draw_children,
    draw_settings,
    draw_trials,
    draw_value,
    pick_samples,
    read_samples,
    survivors,
    tune,
    write_tuning,
)
from annotation.tuning_views import Sample, View, change_tones, change_view, crop_view, make_rungs, take_window
from annotation.watershed import segment
from image_io import ImageError, list_images, write_image, write_mask

SPACE = {"level": (20, 240, "linear"), "blur": (0.3, 8.0, "log"), "close": [0, 3, 5], "unused": ["a", "b"]}


def scene(seed, level=60, discs=25, shape=(200, 240)):
    """Discs of grey `level` on noise, and their truth."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.int32)
    for number in range(1, discs + 1):
        cv2.circle(labels, (int(rng.integers(5, 235)), int(rng.integers(5, 195))), int(rng.integers(4, 10)), number, -1)
    labels = connected_objects(labels > 0)
    image = np.where(labels > 0, level, 0) + rng.normal(20, 8, shape)
    return Sample(f"scene{seed}", np.clip(image, 0, 255).astype(np.uint8)[..., None], labels)


class Engine:
    """Threshold and components; by default the threshold is far too high."""

    def __init__(self):
        self.calls = []

    def __call__(self, image, settings, cache):
        blur = settings.get("blur", 1.0)
        if ("blurred", blur) not in cache:
            cache["blurred", blur] = cv2.GaussianBlur(image[..., 0], (0, 0), blur)
        self.calls.append((image.shape, dict(settings), len(cache)))
        mask = (cache["blurred", blur] > settings.get("level", 75)).astype(np.uint8)
        if settings.get("close"):
            mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, np.ones((settings["close"],) * 2, np.uint8))
        return number_instances(mask, 0.5, "test", pieces="all")


@given(st.integers(0, 10_000), st.floats(0, 0.99))
def test_drawn_settings_lie_in_their_ranges(seed, keep):
    settings = draw_settings(SPACE, np.random.default_rng(seed), keep)
    assert settings and set(settings) <= set(SPACE)
    assert isinstance(settings.get("level", 20), int) and 20 <= settings.get("level", 20) <= 240
    assert 0.3 <= settings.get("blur", 1) <= 8 and settings.get("close", 0) in (0, 3, 5)


def test_log_ranges_are_drawn_evenly_over_their_octaves():
    rng = np.random.default_rng(0)
    values = np.array([draw_value((1.0, 64.0, "log"), rng) for _ in range(3000)])
    assert abs((values < 8).mean() - 0.5) < 0.04
    for bad in ((0.0, 1.0, "log"), (2.0, 1.0, "linear"), (1.0, 2.0, "cubic")):
        with pytest.raises(ValueError, match="with low <= high, above 0 for log"):
            draw_value(bad, rng)


def test_trials_differ_begin_with_the_default_and_come_again():
    options = TuneOptions(trials=30)
    trials = draw_trials(SPACE, options)
    assert trials[0].settings == {} and len(trials) == 30
    assert len({json.dumps(trial.settings, sort_keys=True) for trial in trials}) == 30
    assert [t.settings for t in draw_trials(SPACE, options)] == [t.settings for t in trials]
    assert [t.settings for t in draw_trials(SPACE, TuneOptions(trials=30, seed=1))] != [t.settings for t in trials]
    assert len(draw_trials({"close": [0, 3]}, options)) == 3  # there are no more
    assert len(draw_trials({}, options)) == 1


def test_the_search_finds_what_the_default_misses_and_it_holds_on_other_pictures():
    engine = Engine()
    tuning = tune(engine, SPACE, [scene(0), scene(1)], TuneOptions(trials=40, min_area=10))
    assert tuning.best.scores[1] > tuning.default.scores[1] + 0.1
    for seed in (5, 6, 7):
        other = scene(seed)
        default, tuned = (
            score_labels(engine(other.image, settings, {}).labels, other.labels, 10).f1()
            for settings in ({}, tuning.best.settings)
        )
        assert tuned > default + 0.1


def test_the_same_seed_gives_the_same_result():
    samples = [scene(0)]
    first, second = (tune(Engine(), SPACE, samples, TuneOptions(trials=12, min_area=10)) for _ in range(2))
    assert first.best.settings == second.best.settings
    assert [t.scores for t in first.trials] == [t.scores for t in second.trials]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("objective", ["f1", "mean_f1"])
def test_the_result_is_never_below_the_default_on_the_pictures(seed, objective):
    space = {"level": (100, 250, "linear")}  # all of it is worse than the default
    tuning = tune(Engine(), space, [scene(seed)], TuneOptions(trials=6, objective=objective, seed=seed, min_area=10))
    assert tuning.best.scores[1] >= tuning.default.scores[1]
    assert tuning.best.number == 0 or tuning.best.scores[2] >= tuning.default.scores[2]


def test_rungs_halve_and_the_default_stays():
    engine = Engine()
    tuning = tune(engine, SPACE, [scene(0), scene(1)], TuneOptions(trials=27, halving=3, min_area=10))
    drawn = tuning.trials[: 27 + 9]  # simpler settings follow
    reached = [sum(trial.rungs > rung for trial in drawn) for rung in range(3)]
    assert reached[0] == 27 + 9 and 12 <= reached[1] <= 13 and 4 <= reached[2] <= 6
    assert len({json.dumps(trial.settings, sort_keys=True) for trial in drawn}) == 36
    assert tuning.default.rungs == 3
    known = [Trial(n, {}, [score]) for n, score in enumerate([0.1, 0.9, 0.5, 0.7, 0.2, 0.3])]
    assert [trial.number for trial in survivors(known, 3)] == [0, 1, 3]


@pytest.mark.parametrize("seed", range(3))
def test_parameters_that_gain_nothing_stay_as_by_default(seed):
    space = {"level": (20, 60, "linear"), "unused": ["a", "b"], "idle": (0.0, 1.0, "linear")}
    tuning = tune(Engine(), space, [scene(seed)], TuneOptions(trials=12, keep=0.0, seed=seed, min_area=10))
    assert set(tuning.best.settings) == {"level"}
    drawn = [trial for trial in tuning.trials[:12] if trial.rungs == 3 and trial.number]
    assert tuning.best.scores[1] >= max(trial.scores[1] for trial in drawn) - 0.1


def test_one_parameter_that_gains_little_gives_way_to_the_default():
    def find(image, settings, cache):
        return Engine()(image, {"level": 45 if settings else 46}, cache)

    tuning = tune(find, {"idle": [1]}, [scene(0)], TuneOptions(trials=2, min_area=10))
    default, other = tuning.trials
    assert tuning.best is (default if other.final < default.final + WORTH else other)


def test_settings_must_gain_for_each_of_their_parameters():
    def find(image, settings, cache):
        both = len(settings) == 2
        return number_instances((image[..., 0] > (50 if both else 62)).astype(np.uint8), 0.5, "test", pieces="all")

    samples = [scene(0)]
    tuning = tune(find, {"a": [1], "b": [1]}, samples, TuneOptions(trials=4, keep=0.0, min_area=10))
    gain = max(trial.final for trial in tuning.trials if trial.rungs == 3) - tuning.default.final
    assert len(tuning.best.settings) == (2 if gain >= 2 * WORTH else 0)


def test_children_mix_the_best():
    space = {name: (0.0, 1.0, "linear") for name in "abcdefgh"}
    trials = draw_trials(space, TuneOptions(trials=60))
    for trial in trials:
        trial.scores = [float(trial.number in (7, 8, 9))]
    trials[9].failure = "broke"
    children = draw_children(trials, space, TuneOptions(trials=60, halving=3))
    assert len(children) == 20 and [child.number for child in children] == list(range(60, 80))
    good = {(name, value) for number in (*range(5), 7, 8) for name, value in trials[number].settings.items()}
    new = [len(set(child.settings.items()) - good) for child in children]
    assert max(new) <= 1 and 0 in new
    assert draw_children(trials[:1], {}, TuneOptions()) == []


def test_an_engine_can_keep_what_does_not_change():
    engine = Engine()
    tune(engine, {"level": (20, 240, "linear")}, [scene(0)], TuneOptions(trials=9, min_area=10))
    assert {entries for _, _, entries in engine.calls} == {1}  # blurred once for each view


def test_a_setting_that_fails_is_given_up_and_one_that_always_fails_is_an_error():
    def fussy(image, settings, cache):
        if settings.get("close") == 5:
            raise ValueError("close 5 cannot be")
        return Engine()(image, settings, cache)

    tuning = tune(fussy, SPACE, [scene(0)], TuneOptions(trials=40, keep=0.3, min_area=10))
    failed = [trial for trial in tuning.trials if trial.failure]
    assert failed and all(trial.settings["close"] == 5 for trial in failed) and tuning.best not in failed
    with pytest.raises(ValueError, match="the default setting fails .*: no weights"):
        tune(broken, SPACE, [scene(0)], TuneOptions(trials=3))
    with pytest.raises(ValueError, match="no pictures to tune on"):
        tune(Engine(), SPACE, [], TuneOptions())


def broken(image, settings, cache):
    raise RuntimeError("no weights")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_copies_have_their_objects_where_the_picture_has_them(dtype):
    sample = scene(3, level=120)
    image = sample.image.astype(dtype) * dtype(257 if dtype == np.uint16 else 1)
    image = np.concatenate([image, image // 2, image // 3], axis=2)
    for scale in (0.8, 1.25):
        view = change_view(View(image, sample.labels), scale, np.random.default_rng(5))
        assert view.image.shape[:2] == view.labels.shape and view.image.dtype == dtype and view.image.shape[2] == 3
        assert sorted(view.labels.shape) == sorted(round(side * scale) for side in sample.labels.shape)
        inside, outside = view.image[..., 0][view.labels > 0].mean(), view.image[..., 0][view.labels == 0].mean()
        assert inside > 2 * outside
        assert (view.labels > 0).mean() == pytest.approx((sample.labels > 0).mean(), rel=0.05)


def test_tones_of_odd_pictures():
    rng = np.random.default_rng(0)
    same = np.full((3, 3, 1), 7, np.uint8)
    assert np.array_equal(change_tones(same, 1.1, 0.1, rng), same)
    holes = np.array([[[np.nan], [0.0]], [[1.0], [0.25]]], np.float32)
    changed = change_tones(holes, 0.5, 0.0, rng)
    assert np.isnan(changed[0, 0, 0]) and changed[:, :, 0].ravel()[1:].tolist() == [0, 1, 0.5]
    assert changed.dtype == np.float32
    assert np.isnan(change_tones(np.full((2, 2, 1), np.nan, np.float32), 1.1, 0, rng)).all()
    ramp = np.linspace(0, 60_000, 90_000).reshape(300, 300, 1).astype(np.uint16)
    noisy = change_tones(ramp, 1.0, 0.02, rng).astype(float) - ramp
    assert noisy[50:250].std() == pytest.approx(1200, rel=0.03)


def test_crops_lie_in_the_picture_and_tiny_pictures_are_taken_whole():
    sample = scene(0)
    for seed in range(5):
        view = crop_view(sample, np.random.default_rng(seed))
        assert view.image.shape[:2] == view.labels.shape == (128, 152) and view.labels.any()
    tiny = Sample("tiny", np.zeros((1, 1, 1), np.uint8), np.zeros((1, 1), np.int32))
    assert [view.labels.shape for rung in make_rungs([tiny], 0) for view in rung] == [(1, 1)] * 4


def test_views_of_a_picture_depend_on_its_name_and_the_seed_alone():
    alone, among = make_rungs([scene(1)], 0), make_rungs([scene(0), scene(1)], 0)
    for first, second in zip(alone, among, strict=True):
        for one, other in zip(first, second[len(second) // 2 :], strict=True):
            assert np.array_equal(one.image, other.image) and np.array_equal(one.labels, other.labels)
    assert not np.array_equal(make_rungs([scene(1)], 1)[0][0].image, alone[0][0].image)


def test_windows_are_where_objects_are_and_as_large_as_asked():
    sample = scene(0)
    sample.labels[:150] = 0
    views = [take_window(sample, (60, 70), np.random.default_rng(seed)) for seed in range(20)]
    assert all(view.labels.shape == view.image.shape[:2] == (60, 70) for view in views)
    assert sum(view.labels.any() for view in views) >= 18
    assert take_window(sample, (9000, 9000), np.random.default_rng(0)).labels.shape == sample.labels.shape


def test_files(tmp_path):
    tuning = tune(Engine(), SPACE, [scene(0)], TuneOptions(trials=8, min_area=10))
    path = write_tuning(tmp_path, tuning, {"preset": "bubbles"}, decimal="dot")
    rows = list(csv.DictReader((tmp_path / "tune.csv").open(), delimiter=";"))
    assert list(rows[0])[:4] == ["setting", "seconds", "rung", "f1"]
    assert len(rows) == sum(trial.rungs for trial in tuning.trials)
    assert {int(row["setting"]) for row in rows if row["chosen"] == "1"} == {tuning.best.number}
    assert all(float(row["seconds"]) >= 0 for row in rows)
    flags = json.loads(path.read_text())["flags"]
    assert flags == {"preset": "bubbles", **tuning.best.settings}


def test_the_settings_file_is_what_settings_loads(tmp_path):
    best = Trial(1, {"level": 40, "blur": 1.5, "sizes": [0.5, 0.25], "whole": False}, [0.5] * 3, [0.1] * 3)
    tuning = type("T", (), {"best": best, "default": Trial(0, {}, [0.4] * 3), "trials": [best], "objective": "f1"})
    path = write_tuning(tmp_path, tuning)
    parser = cli.make_parser("test")
    parser.add_argument("--level", type=int, default=75)
    parser.add_argument("--blur", type=float)
    parser.add_argument("--sizes", type=lambda text: [float(word) for word in text.split()])
    cli.add_switch(parser.add_argument_group("x"), "--whole", default=True, help="x")
    args = cli.parse(parser, ["--settings", str(path), "--blur", "3"])
    assert (args.level, args.blur, args.sizes, args.whole) == (40, 3.0, [0.5, 0.25], False)


def test_what_is_chosen_must_not_be_below_the_default_on_whole_pictures():
    trials = [Trial(0, {}, [0.5, 0.6, 0.5]), Trial(1, {"a": 1}, [0.9, 0.59, 0.9]), Trial(2, {"a": 2}, [0.6, 0.6, 0.6])]
    assert choose(trials).number == 2
    trials[2].failure = "broke"
    assert choose(trials).number == 0


def test_pictures_are_picked_over_all_names():
    names = [f"f{k:02}" for k in range(10)]
    assert len(set(pick_samples(names, 3))) == 3 and pick_samples(names, 3) == sorted(pick_samples(names, 3))
    assert pick_samples(names, 20) == names and pick_samples(names[::-1], 1) == ["f04"]
    with pytest.raises(ValueError, match="no image has a reference"):
        pick_samples([], 2)


def write_scenes(folder, count=4):
    for number in range(count):
        sample = scene(number)
        write_image(folder / "images" / f"s{number}.png", sample.image)
        write_mask(folder / "gt" / f"s{number}.png", sample.labels.astype(np.uint16))
    images = {path.stem: path for path in (folder / "images").iterdir()}
    return images, References(ScoreOptions(folder / "gt"))


def test_pictures_are_read_with_their_references(tmp_path):
    images, references = write_scenes(tmp_path)
    samples, failures = read_samples(images, references, 2)
    assert [sample.name for sample in samples] == ["s1", "s2"] and failures == []
    assert np.array_equal(samples[0].image, scene(1).image)
    assert len(score_labels(samples[0].labels, scene(1).labels).objects.true_diameters) > 5
    assert len(read_samples(images, references, 9)[0]) == 4


def test_others_take_the_place_of_pictures_that_cannot_be_tuned_on(tmp_path):
    images, references = write_scenes(tmp_path)
    images["s1"].write_bytes(b"no picture")
    write_mask(tmp_path / "gt" / "s2.png", np.zeros((200, 240), np.uint8))
    samples, failures = read_samples(images, references, 2)
    assert [sample.name for sample in samples] == ["s0", "s3"]
    assert len(failures) == 1 and "s1.png" in failures[0]
    with pytest.raises(ImageError, match="can be tuned on: .*s1.png"):
        read_samples({"s1": images["s1"]}, references, 2)
    with pytest.raises(ImageError, match="their references hold no object"):
        read_samples({"s2": images["s2"]}, references, 2)
    with pytest.raises(ImageError, match="no image has a reference"):
        read_samples({"other": images["s0"]}, references, 2)


def test_flags():
    parser = argparse.ArgumentParser()
    add_score_args(parser)
    add_tune_args(parser)
    words = "--against gt --tune 2 --tune-trials 9 --tune-for mean_f1 --score-min-area 30".split()
    assert options_from(parser.parse_args(words)) == TuneOptions(2, 9, "mean_f1", 30)
    with pytest.raises(cli.UsageError, match="give --against DIR"):
        options_from(parser.parse_args(["--tune", "2"]))
    for changes in ({"trials": 0}, {"halving": 1}, {"keep": 1.0}, {"objective": "iou"}):
        with pytest.raises(ValueError, match="expected"):
            TuneOptions(**changes)


@pytest.mark.slow
@pytest.mark.skipif("TESSERA_DATA" not in os.environ, reason="needs the folder of real images in TESSERA_DATA")
def test_two_bubble_pictures_tune_the_watershed_for_the_others():
    folder = Path(os.environ["TESSERA_DATA"]) / "bubbles"
    references = References(ScoreOptions(folder / "gt"))
    samples, _ = read_samples(list_images(folder / "images"), references, 6)
    parser = argparse.ArgumentParser()
    add_watershed_args(parser)
    args = parser.parse_args([])

    def find(image, settings, cache):
        return segment(image, watershed_options(argparse.Namespace(**vars(args) | settings)))

    tuning = tune(find, PRESET_SPACE, [samples[0], samples[3]], TuneOptions(trials=24, min_area=30))
    assert tuning.best.scores[1] >= tuning.default.scores[1]
    scores = [
        score_labels(find(samples[k].image, tuning.best.settings, {}).labels, samples[k].labels, 30).f1()
        for k in (1, 2, 4, 5)
    ]
    assert sum(scores) / 4 >= 0.66
