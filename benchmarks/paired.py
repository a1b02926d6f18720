"""Bookkeeping of a paired comparison: subsets of images, differences, how likely they are by chance, a table."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SCORES = {
    "final": "IoU",
    "settled": "re-estimated",
    "settled_each": "re-estimated, mean of images",
}  # of a run: title in the table


def draw_subset(kinds: Mapping[str, Sequence[str]], count: int, seed: int) -> list[str]:
    """Names of `count` images, of each kind its share of them but at least one; the same for the same seed.

    Args:
        kinds: names of the images of each kind.

    Raises:
        ValueError: there are fewer images, or fewer places than kinds.
    """
    kinds = {kind: sorted(names) for kind, names in kinds.items() if names}
    total = sum(map(len, kinds.values()))
    if not len(kinds) <= count <= total:
        raise ValueError(
            f"a subset of {count} out of {total} images of {len(kinds)} kinds: expected {len(kinds)} or more"
        )
    places = {kind: max(1, round(count * len(names) / total)) for kind, names in kinds.items()}
    while sum(places.values()) != count:  # rounding: the most common kind gives or takes
        step = 1 if sum(places.values()) < count else -1
        able = [kind for kind, names in kinds.items() if 1 <= places[kind] + step <= len(names)]
        places[max(able, key=lambda kind: places[kind])] += step
    rng = np.random.default_rng([seed, count])
    return sorted(
        name for kind in sorted(kinds) for name in rng.choice(kinds[kind], places[kind], replace=False).tolist()
    )


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p of a mean difference: the share of all assignments of signs with a mean at least as far from 0.

    Exact; with n pairs it is at least 2 / 2^n.
    """
    observed = abs(sum(differences))
    sums = [abs(sum(signs)) for signs in itertools.product(*((value, -value) for value in differences))]
    return sum(value >= observed * (1 - 1e-12) for value in sums) / len(sums)


def steps_to(curve: Sequence[Sequence[float]], score: float) -> int | None:
    """Steps of the first point (step, score) of a curve that is at least `score`; None: it stays below."""
    return next((int(step) for step, value in curve if value >= score), None)


def summarise(runs: Mapping[str, Sequence[Mapping[str, Any]]], base: str) -> list[dict[str, Any]]:
    """A row for each initialisation.

    Args:
        runs: for each initialisation its runs, those of one subset at one place, each {"curve": [[step, IoU], ...]}
            with a score for every one of SCORES. base: the initialisation that the others are compared with.

    Returns:
        For each {"name", "runs", and for each score {"mean", "spread"}}, and for all but the base the paired
        differences of each score, "reached": steps to the final score of the base, and their median.
    """
    rows = []
    for name, own in runs.items():
        row: dict[str, Any] = {"name": name, "runs": len(own)}
        for score in SCORES:
            values, others = [run[score] for run in own], [run[score] for run in runs[base]]
            row[score] = {"mean": statistics.fmean(values), "spread": _spread(values)}
            if name != base:
                gains = [value - other for value, other in zip(values, others, strict=True)]
                row[score] |= {"gains": gains, "gain": statistics.fmean(gains), "gain_spread": _spread(gains)}
                row[score] |= {"p": sign_flip_p(gains)}
        if name != base:
            pairs = zip(own, runs[base], strict=True)
            reached = [steps_to(run["curve"], other["final"]) for run, other in pairs]
            row |= {"reached": reached, "median_reached": _median(reached)}
        rows.append(row)
    return rows


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _median(steps: Sequence[int | None]) -> int | None:
    """The upper median of steps, None being more than any number."""
    ranked = sorted(steps, key=lambda step: (step is None, step or 0))
    return ranked[len(ranked) // 2]


def format_rows(rows: Sequence[Mapping[str, Any]], rates: Mapping[str, float], steps: int) -> str:
    """The rows as a table in Markdown; scores in points, of 100.

    Args:
        rates: learning rate of each initialisation. steps: of a whole run.
    """
    titles = [title for name in SCORES.values() for title in (name, "difference")]
    heads = ["start", "rate", *titles, "steps to the final score of random"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [row["name"], f"{rates[row['name']]:g}"]
        for score in SCORES:
            found = row[score]
            cells.append(f"{100 * found['mean']:.1f} ± {100 * found['spread']:.1f}")
            gain = f"{100 * found['gain']:+.1f} ± {100 * found['gain_spread']:.1f}" if "gain" in found else ""
            cells.append(f"{gain} (p {found['p']:.2f})" if gain else "")
        cells.append(_steps_cell(row, steps))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _steps_cell(row: Mapping[str, Any], steps: int) -> str:
    if "reached" not in row:
        return f"{steps}"
    got, never = row["median_reached"], sum(step is None for step in row["reached"])
    share = "not reached" if got is None else f"{got} ({got / steps:.0%})"
    return share + (f", never in {never} of {row['runs']}" if never else "")
