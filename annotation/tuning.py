"""Search for the parameters of engines on a few pictures with references.

Random settings, half of each left as it is by default, are tried on crops, then mixtures of the best. The best part
goes on to whole pictures, the best of them to changed copies too (turned, brighter or darker, larger or smaller), for
what is good on two pictures alone is often luck. The default setting is among those that reach the end.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from annotation.instances import Instances
from annotation.scoring import References, score_labels
from annotation.tune_options import OBJECTIVES, TuneOptions
from annotation.tuning_views import Sample, View, make_rungs
from image_io import ImageError, read_image, write_text
from tables import format_csv

Settings = dict[str, Any]  # name of a flag to its value; what is absent is as by default
Range = tuple[float, float, str]  # lowest, highest, "log" or "linear"; of whole numbers when both ends are
Space = Mapping[str, Sequence[Any] | Range]
# Image (H, W, C), settings, and a dictionary that lives as long as the image: an engine keeps there what does not
# change between settings, such as encodings, boxes or filtered pictures.
Segment = Callable[[np.ndarray, Settings, dict[Any, Any]], Instances]

PARENTS = 6  # settings that are mixed
WORTH = 0.01  # of the score: what a parameter must gain to be changed


@dataclass
class Trial:
    """One setting and how it did.

    Attributes:
        number: 0 is the default. scores: of each rung, mean over its views; seconds: for an image, there.
        failure: why it was given up.
    """

    number: int
    settings: Settings
    scores: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    failure: str = ""

    @property
    def last(self) -> float:
        """The score on the last rung it reached; below everything when it failed."""
        return -1.0 if self.failure or not self.scores else self.scores[-1]

    @property
    def final(self) -> float:
        """Of one that reached the last rung, the mean over whole pictures and their copies."""
        return (self.scores[1] + self.scores[2]) / 2

    @property
    def rungs(self) -> int:
        """Rungs it reached."""
        return len(self.scores)


@dataclass
class Tuning:
    """The result of a search.

    Attributes:
        best: the chosen setting; empty when nothing beat the default.
        trials: all settings, in the order in which they were drawn.
    """

    best: Trial
    trials: list[Trial]
    objective: str

    @property
    def default(self) -> Trial:
        """The setting without any change."""
        return self.trials[0]


# ----------------------------------------------------------------------------------------------------------------------
# Settings


def draw_settings(space: Space, rng: np.random.Generator, keep: float) -> Settings:
    """A random setting; each parameter is absent, as by default, with the chance `keep`, but never all of them.

    Choices between words or switches change half as often as numbers: most of them are wrong for a kind of picture.
    """
    names = sorted(space)
    chance = {name: (1 - keep) * (1 if _is_range(space[name]) else 0.5) for name in names}
    changed = [name for name in names if rng.random() < chance[name]] or [names[int(rng.integers(len(names)))]]
    return {name: draw_value(space[name], rng) for name in changed}


def draw_value(space: Sequence[Any] | Range, rng: np.random.Generator) -> Any:
    """A random value of one parameter.

    Raises:
        ValueError: a range whose ends or scale make no sense.
    """
    if not _is_range(space):
        return space[int(rng.integers(len(space)))]
    low, high, scale = space
    if scale not in ("log", "linear") or not low <= high or (scale == "log" and low <= 0):
        raise ValueError(f"range is {space}, expected (low, high, 'log' or 'linear') with low <= high, above 0 for log")
    value = math.exp(rng.uniform(math.log(low), math.log(high))) if scale == "log" else rng.uniform(low, high)
    if isinstance(low, int) and isinstance(high, int):
        return min(max(round(value), low), high)
    return min(max(float(f"{value:.3g}"), low), high)


def _is_range(space: Sequence[Any] | Range) -> bool:
    return isinstance(space, tuple) and len(space) == 3 and isinstance(space[2], str)


def draw_trials(space: Space, options: TuneOptions) -> list[Trial]:
    """The default setting and random ones, all different; fewer when the space has no more."""
    rng = np.random.default_rng(options.seed)
    trials, seen = [Trial(0, {})], {"{}"}
    for _ in range(20 * options.trials if space else 0):
        if len(trials) == options.trials:
            break
        settings = draw_settings(space, rng, options.keep)
        if _key(settings) not in seen:
            seen.add(_key(settings))
            trials.append(Trial(len(trials), settings))
    return trials


def draw_children(trials: Sequence[Trial], space: Space, options: TuneOptions) -> list[Trial]:
    """Settings that mix two of the best so far: of each parameter the value of one of them, and at times a new one."""
    rng = np.random.default_rng([options.seed, len(trials)])
    best = sorted((trial for trial in trials if not trial.failure), key=lambda t: (-t.last, t.number))[:PARENTS]
    seen, children = {_key(trial.settings) for trial in trials}, list[Trial]()
    for _ in range(20 * options.trials if space and len(trials) > 1 else 0):
        if len(children) == options.trials // options.halving:
            break
        one, other = (best[int(rng.integers(len(best)))].settings for _ in range(2))
        settings = {}
        for name in sorted(space):
            source = one if rng.random() < 0.5 else other
            if name in source:
                settings[name] = source[name]
        if rng.random() < 0.5:
            name = sorted(space)[int(rng.integers(len(space)))]
            settings[name] = draw_value(space[name], rng)
        if _key(settings) not in seen:
            seen.add(_key(settings))
            children.append(Trial(len(trials) + len(children), settings))
    return children


def _key(settings: Settings) -> str:
    return json.dumps(settings, sort_keys=True, default=str)


# ----------------------------------------------------------------------------------------------------------------------
# The search


def tune(
    segment: Segment,
    space: Space,
    samples: Sequence[Sample],
    options: TuneOptions,
    *,
    tell: Callable[[str], None] | None = None,
) -> Tuning:
    """Search settings on pictures with references.

    Args:
        segment: the engine; see Segment. With the settings {} it is the default.
        space: what may change, see Space.
        samples: pictures with references.
        tell: called with a line after each rung.

    Returns:
        The chosen setting and all that were tried. The same seed, pictures and engine give the same result.

    Raises:
        ValueError: no pictures, or the default setting fails.
    """
    if not samples:
        raise ValueError("no pictures to tune on; expected at least one with a reference")
    trials = draw_trials(space, options)
    alive = trials
    rungs = make_rungs(samples, options.seed)
    for number, views in enumerate(rungs):
        for trial in alive:
            _try(trial, segment, views, options)
            if trials[0].failure:
                raise ValueError(f"the default setting fails on the pictures to tune on: {trials[0].failure}")
        if number == 0:
            children = draw_children(trials, space, options)
            for trial in children:
                _try(trial, segment, views, options)
            alive = trials = [*trials, *children]
        for view in views:
            view.cache.clear()
        if tell:
            best = max(alive, key=lambda trial: trial.last)
            tell(
                f"rung {number + 1} of {len(rungs)}: {len(alive)} settings, best {best.last:.3f}, "
                f"default {trials[0].last:.3f}"
            )
        alive = survivors(alive, options.halving) if number < len(rungs) - 1 else alive
    best, tried = simplify(choose(trials), trials, segment, rungs, options)
    return Tuning(best, trials + tried, options.objective)


def _try(trial: Trial, segment: Segment, views: Sequence[View], options: TuneOptions) -> None:
    """Score a setting on the views of a rung."""
    scores, begin = [], time.perf_counter()
    try:
        for view in views:
            found = segment(view.image, trial.settings, view.cache)
            score = score_labels(found.labels, view.labels, options.min_area).f1(OBJECTIVES[options.objective])
            scores.append(1.0 if score is None else score)
    except (ValueError, RuntimeError, cv2.error) as error:
        trial.failure = str(error)
        return
    trial.seconds.append((time.perf_counter() - begin) / len(views))
    trial.scores.append(sum(scores) / len(scores))


def survivors(trials: Sequence[Trial], halving: int) -> list[Trial]:
    """The best part of the settings, the default always among them, in their order."""
    known = [trial for trial in trials if not trial.failure]
    count = max(2, math.ceil(len(known) / halving))
    best = sorted(known, key=lambda trial: (-trial.last, trial.number))[:count]
    return [trial for trial in known if trial in best or trial.number == 0]


def choose(trials: Sequence[Trial]) -> Trial:
    """The setting to use: of those that reached the last rung the best over whole pictures and their copies.

    It must not be below the default on the whole pictures themselves.

    Args:
        trials: the default first.
    """
    default = trials[0]
    finalists = [t for t in trials if not t.failure and t.rungs == default.rungs]
    able = [t for t in finalists if t.scores[1] >= default.scores[1]]
    return max(able, key=lambda t: (t.final, -t.number))


def simplify(
    best: Trial, trials: Sequence[Trial], segment: Segment, rungs: Sequence[Sequence[View]], options: TuneOptions
) -> tuple[Trial, list[Trial]]:
    """Bring parameters of the best setting back to their default, one after the other, where that costs little.

    What a parameter gains on few pictures it may lose on others: one that gains less than WORTH stays as by default,
    and all together must gain that much for each of them.

    Args:
        trials: all so far, the default first.

    Returns:
        The setting to use, and those that were tried on the way.
    """
    chosen, tried, default = best, list[Trial](), trials[0]
    for name in sorted(best.settings):
        trial = Trial(len(trials) + len(tried), {key: v for key, v in chosen.settings.items() if key != name})
        if trial.settings:
            tried.append(trial)
            for views in rungs:
                _try(trial, segment, views, options)
                for view in views:
                    view.cache.clear()
        else:
            trial = default
        if not trial.failure and trial.final > chosen.final - WORTH and trial.scores[1] >= default.scores[1]:
            chosen = trial
    enough = chosen.final >= default.final + WORTH * len(chosen.settings)
    return chosen if enough else default, tried


# ----------------------------------------------------------------------------------------------------------------------
# Files


def write_tuning(folder: Path, tuning: Tuning, fixed: Mapping[str, Any] | None = None, decimal: str = "comma") -> Path:
    """Write tune.csv, a row for each setting and rung, and tuned.json, which --settings loads.

    Args:
        fixed: flags that the search started from and that the settings file should hold too.

    Returns:
        The settings file.
    """
    names = sorted({name for trial in tuning.trials for name in trial.settings})
    rows = [
        {
            "setting": trial.number,
            "seconds": trial.seconds[rung] if rung < trial.rungs else None,
            "rung": rung + 1,
            tuning.objective: trial.scores[rung] if rung < trial.rungs else None,
            "chosen": int(trial is tuning.best),
            "failure": trial.failure if rung == trial.rungs else "",
            **{name: trial.settings.get(name) for name in names},
        }
        for trial in tuning.trials
        for rung in range(trial.rungs + bool(trial.failure))
    ]
    columns = ["setting", "seconds", "rung", tuning.objective, "chosen", "failure", *names]
    write_text(folder / "tune.csv", format_csv(columns, rows, decimal))
    path = folder / "tuned.json"
    result = {
        "flags": {**(fixed or {}), **tuning.best.settings},
        "objective": tuning.objective,
        "scores": tuning.best.scores,
        "default_scores": tuning.default.scores,
        "seconds_per_image": tuning.best.seconds[-1],
    }
    write_text(path, json.dumps(result, indent=1, default=str) + "\n")
    return path


def read_samples(images: Mapping[str, Path], references: References, count: int) -> tuple[list[Sample], list[str]]:
    """Read the pictures to tune on: `count` of those with a reference that has objects, spread evenly over their names.

    Returns:
        The pictures, and what could not be read; another picture takes its place.

    Raises:
        ImageError: none can be read, or none has a reference.
    """
    stems = [stem for stem in images if stem in references]
    samples, failures = list[Sample](), list[str]()
    chosen = pick_samples(stems, count)
    for stem in [*chosen, *(stem for stem in sorted(stems) if stem not in chosen)]:
        if len(samples) == count:
            break
        try:
            image = read_image(images[stem])
            labels = references.read(stem, (image.shape[0], image.shape[1]))
        except (OSError, ImageError) as error:
            failures.append(str(error))
            continue
        if labels.any():
            samples.append(Sample(stem, image, labels))
    if not samples:
        reasons = "; ".join(failures[:3]) or "their references hold no object"
        raise ImageError(
            f"no image of {references.folder} can be tuned on: {reasons}; expected references with objects"
        )
    return sorted(samples, key=lambda sample: sample.name), failures


def pick_samples(stems: Sequence[str], count: int) -> list[str]:
    """Which pictures are tuned on: `count` of them, spread evenly over their names.

    Raises:
        ImageError: there are none.
    """
    if not stems:
        raise ImageError("no image has a reference to tune on; expected files of the same stem in --against")
    names = sorted(stems)
    places = (
        np.linspace(0, len(names) - 1, min(count, len(names)) + 2)[1:-1] if count < len(names) else range(len(names))
    )
    return [names[int(round(place))] for place in places]
