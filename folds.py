"""Cross-validation: which images each fold holds out, remembered on disk; the scores of all held-out parts together."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from classes import ClassMap
from facts import PairFacts
from image_io import write_text
from metrics import score_text
from pairing import DatasetError, group_name
from scan import Checked, classes_present, find_label_problems

FOLDS_FILE = "folds.json"
POOLED_FILE = "out_of_fold.json"


def fold_name(name: str, fold: int) -> str:
    """Name of the run folder of a fold."""
    return f"{name}_fold_{fold}"


# ----------------------------------------------------------------------------------------------------------------------
# Who is held out where


def choose_folds(facts: Sequence[PairFacts], classes: ClassMap, pattern: str | None, count: int) -> dict[str, int]:
    """The fold that holds each image out, by name; every group of names is in one fold.

    Folds are alike: groups are dealt out, the largest first, so that each fold gets its share of the images, of the
    images with each class, and of the area of each class. It depends on names and masks alone.

    Args:
        pattern: as --group-pattern; None: every image is a group of its own.
        count: number of folds, at least 2.

    Raises:
        DatasetError: there are fewer groups than folds, or the pattern does not fit the names.
    """
    groups: dict[str, list[PairFacts]] = {}
    for item in facts:
        groups.setdefault(group_name(item.pair.name, pattern), []).append(item)
    if len(groups) < count:
        why = f"groups of --group-pattern {pattern!r}" if pattern else "images"
        raise DatasetError(
            f"--folds {count} needs a group of images for each, and there are {len(groups)} {why} among {len(facts)} "
            f"images. Give --folds {len(groups)} or less"
            + (", or a pattern that tells more groups apart" if pattern and len(groups) < len(facts) else "")
        )
    names = sorted(groups, key=lambda name: hashlib.sha256(name.encode()).digest())
    weights = np.array([np.sum([_contents(item, classes) for item in groups[name]], axis=0) for name in names])
    places = deal_out(weights, count)
    return {item.pair.name: int(place) for name, place in zip(names, places, strict=True) for item in groups[name]}


def _contents(item: PairFacts, classes: ClassMap) -> np.ndarray:
    """What an image adds to a fold: one image, whether it has each class, and the share of its area, (1 + 2 K,)."""
    num_classes = len(classes.names)
    present, area = np.zeros(num_classes), np.zeros(num_classes + 256)
    present[list(classes_present(item, classes))] = 1
    labels = item.mask.labels if item.mask else []
    if labels:
        values, pixels = np.array(labels, np.int64).T
        np.add.at(area, classes.indices(values), pixels)
    area = area[:num_classes] / max(1.0, area[:num_classes].sum())
    area[: int(classes.has_background)] = 0  # what is left of the others
    return np.concatenate([[1.0], present, area])


def deal_out(weights: np.ndarray, count: int) -> np.ndarray:
    """Folds of groups, (G,) int, so that the sums of each column of `weights` (G, F) are as even as a greedy rule gets.

    Every fold gets a group. Each group goes where the sum of squares of all folds' shares grows least.
    """
    totals = weights.sum(axis=0)
    shares = weights[:, totals > 0] / totals[totals > 0]  # (G, F)
    filled, members = np.zeros((count, shares.shape[1])), np.zeros(count, int)
    places = np.zeros(len(shares), int)
    order = sorted(range(len(shares)), key=lambda group: -shares[group].max(initial=0))
    for rank, group in enumerate(order):
        cost = filled @ shares[group]
        if count - np.count_nonzero(members) >= len(shares) - rank:
            cost[members > 0] = np.inf  # as many groups are left as folds are empty
        place = min(range(count), key=lambda fold: (cost[fold], members[fold], fold))
        places[group] = place
        filled[place] += shares[group]
        members[place] += 1
    return places


def load_or_choose_folds(
    path: Path, facts: Sequence[PairFacts], classes: ClassMap, pattern: str | None, count: int
) -> dict[str, int]:
    """The folds of choose_folds, or those that an earlier command wrote into `path`: held out stays held out.

    Raises:
        DatasetError: see choose_folds.
        ValueError: the file holds folds of other images, another number or another pattern.
    """
    if not path.is_file():
        chosen = choose_folds(facts, classes, pattern, count)
        content = {"folds": count, "group_pattern": pattern, "images": chosen}
        write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        return chosen
    remedy = "Put that back to go on, or give another --exp-name"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        kept: dict[str, int] = {str(name): int(fold) for name, fold in saved["images"].items()}
        before = saved["folds"], saved["group_pattern"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); it holds which images each fold leaves out. {remedy}"
        ) from error
    if before != (count, pattern):
        raise ValueError(
            f"{path} holds {before[0]} folds with --group-pattern {before[1]!r}, now it is {count} with {pattern!r}. "
            f"{remedy}"
        )
    changed = kept.keys() ^ {item.pair.name for item in facts}
    if changed:
        raise ValueError(
            f"{path} was made for other images: {len(changed)} came or went, such as {min(changed)!r}. Images must not "
            f"move between what a fold learns and what it is scored on. {remedy}"
        )
    return kept


def hold_out(checked: Checked, folds: Mapping[str, int], fold: int) -> Checked:
    """The data set as one fold sees it: the rest to learn from, its images to be scored on.

    Raises:
        DatasetError: the rest holds nothing to learn.
    """
    classes = checked.raise_errors()
    kept = [item for item in checked.train if folds[item.pair.name] != fold]
    held = [item for item in checked.train if folds[item.pair.name] == fold]
    errors, warnings = find_label_problems(classes, kept, f"training of fold {fold}", learns=True)
    notes = [f"fold {fold} of 0 to {max(folds.values())} is held out", *checked.notes]
    part = replace(checked, train=kept, val=held, errors=errors, warnings=warnings, notes=notes)
    part.raise_errors()
    return part


# ----------------------------------------------------------------------------------------------------------------------
# All held-out parts together


def pool_rows(rows: Sequence[Mapping[str, Any]], pooled: Mapping[str, Any]) -> dict[str, Any]:
    """What out_of_fold.json holds: a row for each fold, means and sample deviations over folds, the pooled summary.

    Args:
        rows: {"fold", "images", "epoch", "iou", "dice"} of each fold.
        pooled: summary of the counts of all held-out parts.
    """
    spread = {}
    for key in ("iou", "dice"):
        values = [row[key] for row in rows if row[key] is not None]
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
        spread[key] = {"mean": float(np.mean(values)) if values else None, "deviation": deviation}
    best = pooled["best"]
    return {
        "folds": [dict(row) for row in rows],
        "over_folds": spread,
        "threshold": best["threshold"] if best else None,
        "pooled": dict(pooled),
    }


def pool_table(content: Mapping[str, Any]) -> str:
    """The rows of pool_rows as text."""
    lines = [f"{'fold':<24}{'images':>8}{'epoch':>8}{'IoU':>11}{'Dice':>11}"]
    for row in content["folds"]:
        scores = f"{score_text(row['iou']):>11}{score_text(row['dice']):>11}"
        lines.append(f"{row['fold']:<24}{row['images']:>8}{row['epoch']:>8}{scores}")
    for key, name in (("mean", "mean over folds"), ("deviation", "deviation over folds")):
        scores = "".join(f"{score_text(content['over_folds'][score][key]):>11}" for score in ("iou", "dice"))
        lines.append(f"{name:<24}{'':>16}{scores}")
    pooled = content["pooled"]
    images = sum(row["images"] for row in content["folds"])
    lines.append(
        f"{'pooled pixels':<24}{images:>8}{'':>8}{score_text(pooled['iou']):>11}{score_text(pooled['dice']):>11}"
    )
    return "\n".join(lines)
