"""Compare training runs: flags that differ, best scores, mean and spread over seeds and folds.

Examples:
    python -m dataset_utils.compare_runs logs
    python -m dataset_utils.compare_runs logs/a* logs/b --sort dice -o runs.csv --decimal dot

Runs whose flags differ in the seed or the fold alone are one row: means, with the sample standard deviation. Scores are
those of a run's best epoch. Runs that are not finished, or cannot be read, are listed below the table and count in no
mean.
"""

import argparse
import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cli
from tables import format_csv

METRICS = ("iou", "dice", "loss")
SORTS = (*METRICS, "epoch", "epochs", "seconds", "name")
ASCENDING = ("loss", "epoch", "epochs", "seconds")
REPEATED = {"seed", "fold"}  # runs that differ in nothing else repeat each other
# Where a run lies, what it ran on and what it wrote: not how the network was trained.
BESIDE = {"exp_name", "log_dir", "workers", "device", "cpu", "decimal", "worst", "baselines", "track", "list_models"}
BESIDE |= {"dump_augmented"}
UNSET = ("", "False", "0", "0.0", "no", "none")  # a flag that is off, as in a run that did not know it
NO_SET = "no validation set"
WIDEST = 28  # characters of a value in the printed table


@dataclass
class Run:
    """A run folder as far as it can be read.

    scores: of the best epoch, and "epoch"; with "epochs" and "seconds" of the whole run. state: "" when it is finished,
    else what is missing or wrong.
    """

    name: str
    flags: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    state: str = ""


@dataclass
class Group:
    """Runs that differ in seed and fold alone, with the means and the sample standard deviations of their scores."""

    name: str
    runs: list[Run]
    mean: dict[str, float]
    spread: dict[str, float]


def build_parser() -> argparse.ArgumentParser:
    """Flags of dataset_utils.compare_runs."""
    parser = cli.make_parser(
        "Compare training runs: flags that differ, best scores, mean and spread over seeds and folds."
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="run folders, or folders that hold them")
    group = parser.add_argument_group("table")
    group.add_argument("--sort", choices=SORTS, default="iou", help="best first; times: shortest first")
    group.add_argument("--val-set", metavar="NAME", help="validation set whose scores are shown; default: what decided")
    cli.add_switch(group, "--each", help="a row for each run instead of one for each set of flags")
    group.add_argument("-o", "--output", type=Path, metavar="FILE", help="also write the table as csv, with all runs")
    group.add_argument("--decimal", choices=("comma", "dot"), default="comma", help="decimal sign in csv files")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Read every run, print the table, write it."""
    parser = build_parser()
    args = cli.parse(parser, argv)
    with cli.plain_errors(parser):
        runs = [read_run(path, name, args.val_set) for path, name in find_runs(args.folders)]
        finished = [run for run in runs if not run.state]
        if not finished and all(run.state.startswith(NO_SET) for run in runs):
            raise ValueError(f"{runs[0].name}: {runs[0].state}, and no other run has it; correct --val-set")
        groups = sort_groups(group_runs(finished, each=args.each), args.sort)
        print(*table_lines(groups, runs), sep="\n")
        if args.output:
            write_table(args.output, groups, runs, args.decimal)
            print(f"written: {args.output}")


# ------------------------------------------------------------------ reading


def find_runs(folders: Sequence[Path]) -> list[tuple[Path, str]]:
    """Run folders in or below the folders, sorted, each with its name: the path below what was given.

    Raises:
        FileNotFoundError: a folder is missing, or there is no run in any.
    """
    found: dict[Path, str] = {}
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder; expected a run, or a folder of runs such as logs")
        for place, names, files in os.walk(folder):
            names.sort()
            if is_run(files):
                path = Path(place)
                own = path == folder
                found.setdefault(path.resolve(), path.resolve().name if own else path.relative_to(folder).as_posix())
    if not found:
        listed = " ".join(map(str, folders))
        raise FileNotFoundError(f"no run in {listed}; expected folders with args.json and metrics.jsonl of train.py")
    return sorted(found.items(), key=lambda item: item[1])


def is_run(files: Iterable[str]) -> bool:
    """Whether files are those of a training run, even of one that was killed early."""
    return bool({"metrics.jsonl", "last_checkpoint"} & set(files))


def read_run(path: Path, name: str, val_set: str | None) -> Run:
    """A run with its flags and best scores; what is wrong goes into its state, nothing is raised."""
    run = Run(name)
    rows, damage = read_rows(path / "metrics.jsonl")
    try:
        run.flags = dict(json.loads((path / "args.json").read_text(encoding="utf-8"))["flags"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        run.state = f"broken: args.json cannot be read ({type(error).__name__})"
        return run
    if not rows:
        run.state = damage or "no epoch is finished"
        return run
    monitor = str(run.flags.get("monitor", "iou"))
    try:
        if val_set and (absent := missing_set(rows, val_set)):
            run.state = absent
            return run
        run.scores = best_scores(rows, val_set, monitor)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        run.state = f"broken: metrics.jsonl holds no scores ({type(error).__name__} {error})".strip()
        return run
    run.state = damage or unfinished(run)
    return run


def read_rows(path: Path) -> tuple[list[dict[str, Any]], str]:
    """Rows of metrics.jsonl up to a damaged one, and what is wrong; a last line cut short by a kill is not wrong."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        return [], f"broken: metrics.jsonl cannot be read ({type(error).__name__})"
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            return rows, "" if number == len(lines) else f"broken: line {number} of metrics.jsonl"
        if not isinstance(row, dict):
            return rows, f"broken: line {number} of metrics.jsonl"
        rows.append(row)
    return rows, ""


def best_scores(rows: Sequence[Mapping[str, Any]], val_set: str | None, monitor: str) -> dict[str, float]:
    """Scores of the best epoch by what the run watched, its number, and the epochs and seconds of the run.

    Raises:
        ValueError: no epoch has a score.
    """
    found = []
    for row in rows:
        if values := scores_of(row, val_set):
            found.append({**{key: number(values.get(key)) for key in METRICS}, "epoch": float(row["epoch"])})
    key = monitor if monitor in METRICS else "iou"
    scored = [scores for scores in found if not math.isnan(scores[key])]
    if not scored:
        raise ValueError(f"no epoch has a {key}")
    best = (min if key == "loss" else max)(scored, key=lambda scores: scores[key])
    seconds = sum(number(row.get("seconds")) for row in rows)
    return {**best, "epochs": float(rows[-1]["epoch"]), "seconds": seconds}


def scores_of(row: Mapping[str, Any], val_set: str | None) -> Mapping[str, Any] | None:
    """Scores of an epoch: of the set that was asked for, else of what decided; None where it was not scored."""
    sets = row["val"]
    if val_set is None:
        return row["score"] if "score" in row else next(iter(sets.values()), None)
    return sets.get(val_set)


def missing_set(rows: Sequence[Mapping[str, Any]], val_set: str) -> str:
    """What to say of a run that never scored a validation set; empty when it did."""
    names = {name: None for row in rows for name in row["val"]}
    return "" if val_set in names else f"{NO_SET} {val_set!r}, only {', '.join(names) or 'none'}"


def number(value: Any) -> float:
    """A number, NaN for anything else."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def unfinished(run: Run) -> str:
    """How far a run came that did not come to its end; empty when it did."""
    asked, done = int(run.flags.get("epochs") or 0), int(run.scores["epochs"])
    patience = int(run.flags.get("early_stop") or 0)
    if done >= asked or (patience and done - run.scores["epoch"] >= patience):
        return ""
    return f"not finished: {done} of {asked} epochs"


# ------------------------------------------------------------------ comparing


def plain(value: Any) -> str:
    """A flag's value as one text."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None else str(value)


def comparable(value: Any) -> str:
    """A text that is the same for what means the same: nothing, where a flag is off or was not known yet."""
    return "" if plain(value) in UNSET else plain(value)


def differing_flags(runs: Sequence[Run]) -> list[str]:
    """Flags that have more than one value among the runs, besides those about place and machine."""
    names = sorted({name for run in runs for name in run.flags} - BESIDE)
    return [name for name in names if len({comparable(run.flags.get(name)) for run in runs}) > 1]


def group_runs(runs: Sequence[Run], *, each: bool) -> list[Group]:
    """Runs with the same flags besides seed and fold together, or each by itself."""
    flags = [name for name in differing_flags(runs) if name not in REPEATED]
    together: dict[Any, list[Run]] = {}
    for place, run in enumerate(runs):
        key = place if each else tuple(comparable(run.flags.get(name)) for name in flags)
        together.setdefault(key, []).append(run)
    return [summarise(members) for members in together.values()]


def summarise(runs: Sequence[Run]) -> Group:
    """Mean and sample standard deviation of each score; the spread of one run is unknown."""
    mean, spread = dict[str, float](), dict[str, float]()
    for key in runs[0].scores:
        values = [run.scores[key] for run in runs]
        mean[key] = statistics.fmean(values)
        spread[key] = statistics.stdev(values) if len(values) > 1 else math.nan
    names = [run.name for run in runs]
    name = names[0] if len(names) == 1 else f"{os.path.commonprefix(names).rstrip('-_. ')}*"
    return Group(name, list(runs), mean, spread)


def sort_groups(groups: Sequence[Group], by: str) -> list[Group]:
    """Best first, the shortest for times; those without the score last."""
    if by == "name":
        return sorted(groups, key=lambda group: group.name)

    def place(group: Group) -> tuple[bool, float]:
        value = group.mean[by]
        return math.isnan(value), value if by in ASCENDING else -value

    return sorted(groups, key=place)


# ------------------------------------------------------------------ writing


def table_lines(groups: Sequence[Group], runs: Sequence[Run]) -> list[str]:
    """The table as text, then the runs that are in none of its means."""
    finished = [run for group in groups for run in group.runs]
    repeats = any(len(group.runs) > 1 for group in groups)
    flags = [name for name in differing_flags(finished) if not (repeats and name in REPEATED)]
    lines = []
    if groups:
        head = ["run", *(["n"] if repeats else []), *METRICS, "epoch", "epochs", "seconds", *map(spell_flag, flags)]
        rows = [head]
        for group in groups:
            cells = [group.name, *([str(len(group.runs))] if repeats else [])]
            cells += [spell(group, key, 4) for key in METRICS]
            cells += [spell(group, key, 0) for key in ("epoch", "epochs", "seconds")]
            rows.append([*cells, *(shorten(plain(group.runs[0].flags.get(name)) or "-") for name in flags)])
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "-" * min(120, max(map(len, lines))))
        if not flags:
            lines.append("no flag differs between these runs" if len(finished) > 1 else "")
    left_out = [run for run in runs if run.state]
    if left_out:
        lines += ["", f"in no mean, {len(left_out)} of {len(runs)} runs:"]
        lines += [f"  {run.name}: {run.state}{best_so_far(run)}" for run in left_out]
    return lines


def spell(group: Group, key: str, decimals: int) -> str:
    """Mean and, of several runs, the spread."""
    if math.isnan(group.mean[key]):
        return "-"
    text = f"{group.mean[key]:.{decimals}f}"
    return text if math.isnan(group.spread[key]) else f"{text} ± {group.spread[key]:.{decimals}f}"


def best_so_far(run: Run) -> str:
    """The best score of a run that is not finished."""
    return f", best iou {run.scores['iou']:.4f} at epoch {run.scores['epoch']:.0f}" if run.scores else ""


def shorten(text: str) -> str:
    """A value no longer than WIDEST, its end kept: paths differ there."""
    return text if len(text) <= WIDEST else f"...{text[3 - WIDEST :]}"


def write_table(path: Path, groups: Sequence[Group], runs: Sequence[Run], decimal: str) -> None:
    """Write rows of groups with n > 1 or of single runs, then of every run, as csv."""
    from image_io import write_text

    flags = differing_flags(runs)
    numbers = [*METRICS, "epoch", "epochs", "seconds"]
    columns = ["run", "n", "state", *(word for key in numbers for word in (key, f"{key} sd")), *map(spell_flag, flags)]
    rows: list[dict[str, Any]] = []
    for group in groups:
        if len(group.runs) > 1:
            row = csv_row(group.name, len(group.runs), "mean", group.mean, group.spread)
            rows.append(row | flag_cells(group.runs[0], [name for name in flags if name not in REPEATED]))
    for run in runs:
        state = run.state or "finished"
        rows.append(csv_row(run.name, 1, state, run.scores, {}) | flag_cells(run, flags))
    filled = [{column: row.get(column) for column in columns} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, format_csv(columns, filled, decimal))


def spell_flag(name: str) -> str:
    """A flag as it is typed, which tells epochs that were asked for from those that were run."""
    return f"--{name.replace('_', '-')}"


def flag_cells(run: Run, flags: Sequence[str]) -> dict[str, str]:
    """Values of a run's flags by their columns."""
    return {spell_flag(name): plain(run.flags.get(name)) for name in flags}


def csv_row(
    name: str, count: int, state: str, mean: Mapping[str, float], spread: Mapping[str, float]
) -> dict[str, Any]:
    """One row without its flags; a number that is unknown leaves its cell empty."""
    row: dict[str, Any] = {"run": name, "n": count, "state": state}
    for key, value in mean.items():
        row[key] = None if math.isnan(value) else value
    for key, value in spread.items():
        row[f"{key} sd"] = None if math.isnan(value) else value
    return row


if __name__ == "__main__":
    main()
