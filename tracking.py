"""Flags and scores of a training run for ClearML or MLflow, for those who have one; neither is needed.

Both are imported only when --track asks for them. What is in the run folder stays whole whatever becomes of them.
"""

import argparse
import importlib.util
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import cli

TRACKERS = ("clearml", "mlflow")
PROJECT = "tessera"
STATE_FILE = "tracking.json"  # in the run folder: whose run it is there, so that a resumed one goes on in it
LONGEST = 500  # characters of a value that MLflow takes


class Tracker(Protocol):
    """Takes what a run has to tell. run_id: what finds the run again."""

    run_id: str

    def __init__(self, title: str, run_id: str | None) -> None:
        """Begin a run, or go on with the one of this id."""

    @staticmethod
    def errors() -> tuple[type[Exception], ...]:
        """What it raises when it cannot be reached, besides OSError, RuntimeError and ValueError."""

    def log_flags(self, flags: Mapping[str, Any], best: Path) -> None:
        """Take the flags, and where the best checkpoint will lie."""

    def log_epoch(self, scores: Mapping[str, float], epoch: int) -> None:
        """Take the scores of an epoch by their names."""

    def close(self) -> None:
        """End the run."""


def add_track_args(parser: argparse.ArgumentParser) -> None:
    """Add the choice of a tracker."""
    parser.add_argument_group("tracking").add_argument(
        "--track", choices=TRACKERS, help="also send flags and scores there, to where its own settings say"
    )


def check_installed(name: str | None) -> None:
    """Refuse a tracker that is not there, before any work is done.

    Raises:
        cli.UsageError: says how to install it.
    """
    if name and importlib.util.find_spec(name) is None:
        raise cli.UsageError(
            f"--track {name}: the package {name} is not installed; pip install {name}, or leave it out"
        )


class Tracking:
    """A run as a tracker sees it; where that fails after the start, it is said once and the training goes on."""

    def __init__(self, tracker: Tracker, say: Callable[[str], None]) -> None:
        self.tracker, self.say, self.works = tracker, say, True

    def log_flags(self, flags: Mapping[str, Any], best: Path) -> None:
        """Send the flags and the path of the best checkpoint; raises what the tracker raises."""
        self.tracker.log_flags({name: spell_value(value) for name, value in flags.items()}, best.resolve())

    def log_epoch(self, row: Mapping[str, Any]) -> None:
        """Send the scores of an epoch, a row as RunFolder.log_epoch takes it."""
        self._try(lambda: self.tracker.log_epoch(flat_scores(row), int(row["epoch"])))

    def close(self) -> None:
        """End the run."""
        self._try(self.tracker.close)

    def _try(self, send: Callable[[], None]) -> None:
        if not self.works:
            return
        expected = known_errors(self.tracker)
        try:
            send()
        except expected as error:
            self.works = False
            reason = " ".join(str(error).split())[:200]
            self.say(f"warning: tracking has ended ({type(error).__name__}: {reason}); the run folder has everything")


def known_errors(tracker: Tracker | type[Tracker]) -> tuple[type[Exception], ...]:
    """What a tracker raises when it cannot be reached."""
    return (*tracker.errors(), OSError, RuntimeError, ValueError)


def open_tracking(name: str | None, run_dir: Path, say: Callable[[str], None]) -> Tracking | None:
    """Begin or go on with a run in a tracker; None without a name.

    Raises:
        RuntimeError: it cannot be reached; names it and the reason.
        ValueError: the file that says in which run to go on is damaged.
    """
    if not name:
        return None
    from image_io import write_text

    build: type[Tracker] = ClearmlTracker if name == "clearml" else MlflowTracker
    path, expected = run_dir / STATE_FILE, known_errors(build)
    try:
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(
            f"{path} should say in which run of {name} to go on, and cannot be read ({error}). Delete it, and another "
            "run begins there, or leave --track out"
        ) from error
    try:
        tracker = build(run_dir.name, known.get(name))
    except expected as error:
        raise RuntimeError(
            f"--track {name}: no run could be begun ({type(error).__name__}: {error}). Check its settings, or leave "
            "--track out"
        ) from error
    write_text(path, json.dumps({**known, name: tracker.run_id}) + "\n")
    return Tracking(tracker, say)


class MlflowTracker:
    """MLflow, at MLFLOW_TRACKING_URI or in the working folder."""

    def __init__(self, title: str, run_id: str | None) -> None:
        import mlflow

        self.mlflow, self.resumed = mlflow, run_id is not None
        mlflow.set_experiment(PROJECT)
        run = mlflow.start_run(run_id=run_id) if run_id else mlflow.start_run(run_name=title)
        self.run_id: str = run.info.run_id

    @staticmethod
    def errors() -> tuple[type[Exception], ...]:
        """All of MLflow's own."""
        import mlflow

        return (mlflow.exceptions.MlflowException,)

    def log_flags(self, flags: Mapping[str, Any], best: Path) -> None:
        """Flags are parameters, which MLflow never changes: those of a resumed run are a tag."""
        if self.resumed:
            self.mlflow.set_tag("resumed with", json.dumps(flags)[: 10 * LONGEST])
        else:
            self.mlflow.log_params({name: str(value)[:LONGEST] for name, value in flags.items()})
        self.mlflow.set_tag("best checkpoint", str(best))

    def log_epoch(self, scores: Mapping[str, float], epoch: int) -> None:
        """Names have only the characters that MLflow takes."""
        self.mlflow.log_metrics({re.sub(r"[^\w\-. /]", "_", name): value for name, value in scores.items()}, step=epoch)

    def close(self) -> None:
        """Mark the run as finished."""
        self.mlflow.end_run()


class ClearmlTracker:
    """ClearML, at the server of its own settings; nothing is uploaded."""

    def __init__(self, title: str, run_id: str | None) -> None:
        from clearml import Task

        # Without these ClearML would patch torch.save and argparse, and upload every checkpoint.
        options = {"auto_connect_frameworks": False, "auto_connect_arg_parser": False, "output_uri": False}
        self.task = Task.init(
            project_name=PROJECT, task_name=title, continue_last_task=run_id, reuse_last_task_id=False, **options
        )
        self.run_id: str = self.task.id

    @staticmethod
    def errors() -> tuple[type[Exception], ...]:
        """A server that refuses; missing settings are a ValueError."""
        from clearml.backend_api.session.session import LoginError

        return (LoginError,)

    def log_flags(self, flags: Mapping[str, Any], best: Path) -> None:
        """Flags are parameters of the task."""
        self.task.set_parameters_as_dict({"flags": dict(flags)})
        self.task.set_user_properties(best_checkpoint=str(best))

    def log_epoch(self, scores: Mapping[str, float], epoch: int) -> None:
        """One plot for each kind of score, a line for each set."""
        for name, value in scores.items():
            series, _, title = name.rpartition("/")
            self.task.get_logger().report_scalar(title, series or "run", value, iteration=epoch)

    def close(self) -> None:
        """Send what waits, and mark the task as completed."""
        self.task.close()


def flat_scores(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an epoch by names such as train/loss and val/iou; without those that are missing."""
    found: dict[str, float] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                add(f"{name}/{key}" if name else str(key), inner)
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            found[name] = float(value)

    add("", {key: value for key, value in row.items() if key not in ("epoch", "val")})
    add("", row.get("val", {}))
    return found


def spell_value(value: Any) -> Any:
    """A flag as a number or a text."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return value if isinstance(value, (bool, int, float)) else "" if value is None else str(value)
