"""What is doubtful about the labels of an image: numbers, flags, and which image a person should look at first."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from annotation.edits import EDITED
from annotation.instances import Instances, find_runs

EMPTY = "empty"
FULL = "nearly full"
TOUCHING = "too many touching"
LOW_SCORE = "low score"
DISAGREE = "engines disagree"
COUNT = "unusual count"
SIZE = "unusual size"
FLAGS = (EMPTY, FULL, TOUCHING, LOW_SCORE, DISAGREE, COUNT, SIZE, EDITED)

FULL_COVERAGE = 0.95
FULL_OBJECT = 0.5  # share of the image below one object
TOUCHING_SHARE, TOUCHING_OBJECTS = 0.8, 10
LOW_MEAN_SCORE = 0.5
LOW_AGREEMENT = 0.5
FEW_IMAGES = 5  # below them nothing is unusual
UNUSUAL = 3.0  # robust standard deviations of the logarithm
LEAST_RATIO = 1.5  # to the median: less is not unusual, however alike the other images are
WEIGHTS = {LOW_SCORE: 0.7, DISAGREE: 0.7, COUNT: 0.5, SIZE: 0.5, TOUCHING: 0.3}


def summarise(found: Instances, objects: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Numbers about one image.

    Args:
        found: its objects.
        objects: columns area and equivalent_diameter of instances.object_rows.

    Returns:
        objects, coverage (share of the pixels below objects), largest (below the largest one), touching (share of
        the objects that touch another), mean_score, lowest_score (a tenth of the objects score lower),
        median_diameter (equivalent, in pixels); None where there is no object.
    """
    return summarise_objects(objects, found.scores, count_touching(found.labels), found.labels.size)


def summarise_objects(
    objects: Mapping[str, list[Any]], scores: np.ndarray, touching: int, pixels: int
) -> dict[str, Any]:
    """As summarise, from how many objects touch another and how many pixels the image has."""
    areas = np.array(objects["area"], np.float64)
    summary = {
        "objects": len(areas),
        "coverage": round(float(areas.sum() / pixels), 6),
        "largest": round(float(areas.max(initial=0) / pixels), 6),
    }
    if not len(areas):
        return summary | dict.fromkeys(("touching", "mean_score", "lowest_score", "median_diameter"))
    return summary | {
        "touching": round(touching / len(areas), 4),
        "mean_score": round(float(scores.mean()), 4),
        "lowest_score": round(float(np.quantile(scores, 0.1)), 4),
        "median_diameter": round(float(np.median(objects["equivalent_diameter"])), 3),
    }


def count_touching(labels: np.ndarray) -> int:
    """How many objects of a label map (H, W) share an edge of a pixel with another one."""
    width = labels.shape[1]
    runs = find_runs(labels)
    touching = np.zeros(int(runs.values.max(initial=0)) + 1, bool)
    beside = (runs.values[1:] > 0) & (runs.values[:-1] > 0) & (runs.columns[1:] > 0)
    touching[runs.values[1:][beside]] = touching[runs.values[:-1][beside]] = True
    places = np.flatnonzero(labels[1:] != labels[:-1])
    flat = labels.reshape(-1)
    above, below = flat[places], flat[places + width]
    both = (above > 0) & (below > 0)
    touching[above[both]] = touching[below[both]] = True
    return int(touching.sum())


def flags_of(record: Mapping[str, Any]) -> list[str]:
    """What a person should look at in an image, from its record alone; nothing when nothing strikes."""
    some = record["objects"] > 0
    agreement = record["agreement"]
    strikes = {
        EMPTY: not some,
        FULL: record["coverage"] >= FULL_COVERAGE or record["largest"] >= FULL_OBJECT,
        TOUCHING: record["objects"] >= TOUCHING_OBJECTS and record["touching"] >= TOUCHING_SHARE,
        LOW_SCORE: some and record["mean_score"] < LOW_MEAN_SCORE,
        DISAGREE: agreement is not None and agreement < LOW_AGREEMENT,
        EDITED: any(record["edited"].values()),
    }
    return [flag for flag, is_so in strikes.items() if is_so]


def strangeness(values: Sequence[float | None]) -> list[float]:
    """How far each number is from the others, in robust standard deviations of their logarithms; 0 when not known.

    Args:
        values: at least 0, one for each image. None counts nowhere.
    """
    known = np.array([np.nan if value is None else np.log1p(value) for value in values], np.float64)
    if np.isfinite(known).sum() < FEW_IMAGES:
        return [0.0] * len(values)
    apart = np.abs(known - np.nanmedian(known))
    spread = max(1.4826 * float(np.nanmedian(apart)), 0.1)
    result = np.where(apart >= np.log(LEAST_RATIO), apart / spread, 0)
    return np.nan_to_num(result).tolist()


def rank_doubts(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Order images by doubt.

    Each reason gives a number from 0 to 1: how low the mean score is, how little engines agree, how unusual count and
    median size are beside the other images, which share of the objects touch. The doubt is the chance that at least
    one of them is right, weighed by WEIGHTS; it is 1 for empty and nearly full images, and 0 for those that a person
    edited.

    Args:
        records: of all images.

    Returns:
        {"record": the record, "doubt": 0..1, "flags": those of the record, COUNT and SIZE}; the most doubtful first.
    """
    counts = strangeness([record["objects"] for record in records])
    sizes = strangeness([record["median_diameter"] for record in records])
    entries = []
    for record, count, size in zip(records, counts, sizes, strict=True):
        flags = list(record["flags"])
        flags += [name for name, strange in ((COUNT, count), (SIZE, size)) if strange >= UNUSUAL]
        reasons = {
            LOW_SCORE: 1 - (1.0 if record["mean_score"] is None else record["mean_score"]),
            DISAGREE: 1 - (1.0 if record["agreement"] is None else record["agreement"]),
            COUNT: min(1.0, count / (2 * UNUSUAL)),
            SIZE: min(1.0, size / (2 * UNUSUAL)),
            TOUCHING: record["touching"] or 0.0,
        }
        doubt = 1 - float(np.prod([1 - WEIGHTS[name] * reason for name, reason in reasons.items()]))
        if EMPTY in flags or FULL in flags:
            doubt = 1.0
        if EDITED in flags:
            doubt = 0.0
        entries.append({"record": record, "doubt": round(doubt, 4), "flags": sorted(flags, key=FLAGS.index)})
    return sorted(entries, key=lambda entry: (-entry["doubt"], entry["record"]["stem"]))
