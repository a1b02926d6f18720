"""Trackers: imported only when asked for, told of flags and epochs, and never in the way of a training."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from discs import write_dataset

import cli
import tracking
import train
from run_folder import RunFolder

ROW = {
    "epoch": 3,
    "lr": 0.5,
    "train": {"loss": 0.25, "iou": math.nan},
    "val": {"a b": {"iou": 0.75, "dice": None, "classes": {"bean (red)": 0.5}}},
    "note": "text",
}


class Refused(Exception):
    pass


def stand_in(module, monkeypatch, **fails):
    """MLflow or ClearML as far as they are used; calls are kept, and those named in `fails` raise."""
    calls = []

    def record(name):
        def call(*args, **options):
            calls.append((name, *args, *sorted(options.items())))
            if name in fails:
                raise fails[name]

        return call

    fake = ModuleType(module)
    fake.__spec__ = SimpleNamespace(name=module)
    if module == "mlflow":
        for name in ("set_experiment", "set_tag", "log_params", "log_metrics", "end_run"):
            setattr(fake, name, record(name))

        def start_run(**options):
            record("start_run")(**options)
            return SimpleNamespace(info=SimpleNamespace(run_id=options.get("run_id") or "r1"))

        fake.start_run, fake.exceptions = start_run, SimpleNamespace(MlflowException=Refused)
    else:
        logger = SimpleNamespace(report_scalar=record("report_scalar"))
        methods = {name: record(name) for name in ("set_parameters_as_dict", "set_user_properties", "close")}

        def init(**options):
            record("init")(**options)
            return SimpleNamespace(id=options["continue_last_task"] or "t1", get_logger=lambda: logger, **methods)

        fake.Task = SimpleNamespace(init=init)
        parts = [f"clearml.{name}" for name in ("backend_api", "backend_api.session", "backend_api.session.session")]
        for part in parts:
            monkeypatch.setitem(sys.modules, part, ModuleType(part))
        sys.modules[parts[-1]].LoginError = Refused
    monkeypatch.setitem(sys.modules, module, fake)
    return calls


def test_scores_by_name():
    assert tracking.flat_scores(ROW) == {
        "lr": 0.5,
        "train/loss": 0.25,
        "a b/iou": 0.75,
        "a b/classes/bean (red)": 0.5,
    }


@pytest.mark.parametrize("name", tracking.TRACKERS)
def test_a_tracker_that_is_not_installed_is_refused_before_any_work(name, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(cli.UsageError, match=f"pip install {name}"):
        tracking.check_installed(name)
    tracking.check_installed(None)
    with pytest.raises(SystemExit) as stop:
        train.main(["-d", str(tmp_path / "nowhere"), "--track", name, "--encoder-weights", "none"])
    assert stop.value.code == 2 and f"the package {name} is not installed" in capsys.readouterr().err


def test_nothing_is_imported_without_the_flag():
    code = "import sys, train; train.build_parser(); print({'mlflow', 'clearml', 'cv2'} & set(sys.modules))"
    root = Path(train.__file__).parent
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
    assert tracking.open_tracking(None, Path("nowhere"), print) is None


def follow(name, run_dir):
    """What train.py does with a run, as far as a tracker sees it."""
    run = RunFolder(run_dir, epoch=0, val_names=["a b"])
    run.drawn = math.inf
    run.tracking = tracking.open_tracking(name, run_dir, print)
    run.log_flags({"lr": 0.5, "image_size": [64, 96], "class_list": None, "cpu": True})
    run.tracking.log_epoch(ROW)
    run.close()
    return run.best_path.resolve()


def test_mlflow_is_told_everything_and_a_resumed_run_goes_on(tmp_path, monkeypatch):
    calls = stand_in("mlflow", monkeypatch)
    best = follow("mlflow", tmp_path / "run")
    assert calls == [
        ("set_experiment", "tessera"),
        ("start_run", ("run_name", "run")),
        ("log_params", {"lr": "0.5", "image_size": "64 96", "class_list": "", "cpu": "True"}),
        ("set_tag", "best checkpoint", str(best)),
        (
            "log_metrics",
            {"lr": 0.5, "train/loss": 0.25, "a b/iou": 0.75, "a b/classes/bean _red_": 0.5},
            ("step", 3),
        ),
        ("end_run",),
    ]
    calls.clear()
    follow("mlflow", tmp_path / "run")
    assert calls[1] == ("start_run", ("run_id", "r1"))
    assert calls[2][:2] == ("set_tag", "resumed with") and "log_params" not in [call[0] for call in calls]


def test_clearml_is_told_everything_and_patches_nothing(tmp_path, monkeypatch):
    calls = stand_in("clearml", monkeypatch)
    best = follow("clearml", tmp_path / "run")
    names = [call[0] for call in calls]
    assert names == ["init", "set_parameters_as_dict", "set_user_properties", *["report_scalar"] * 4, "close"]
    options = dict(calls[0][1:])
    assert options["auto_connect_frameworks"] is False and options["output_uri"] is False
    assert options["task_name"] == "run" and options["continue_last_task"] is None
    assert calls[1][1] == {"flags": {"lr": 0.5, "image_size": "64 96", "class_list": "", "cpu": True}}
    assert calls[2][1] == ("best_checkpoint", str(best))
    assert calls[3] == ("report_scalar", "lr", "run", 0.5, ("iteration", 3))
    assert calls[6] == ("report_scalar", "bean (red)", "a b/classes", 0.5, ("iteration", 3))
    follow("clearml", tmp_path / "run")
    assert json.loads((tmp_path / "run" / tracking.STATE_FILE).read_text()) == {"clearml": "t1"}
    assert dict(calls[8][1:])["continue_last_task"] == "t1"


def test_a_tracker_that_cannot_be_reached_at_the_start_is_an_error(tmp_path, monkeypatch):
    stand_in("mlflow", monkeypatch, start_run=Refused("no server at 127.0.0.1"))
    with pytest.raises(RuntimeError, match=r"--track mlflow: .*Refused: no server.*leave --track out"):
        follow("mlflow", tmp_path / "run")
    assert not (tmp_path / "run" / tracking.STATE_FILE).exists()


def test_a_damaged_file_of_the_run_before_is_named_and_kept(tmp_path, monkeypatch):
    calls = stand_in("mlflow", monkeypatch)
    path = tmp_path / "run" / tracking.STATE_FILE
    path.parent.mkdir()
    path.write_text('{"mlflow"')
    with pytest.raises(ValueError, match=r"tracking.json should say in which run of mlflow .* Delete it"):
        follow("mlflow", tmp_path / "run")
    assert path.read_text() == '{"mlflow"' and calls == []


@pytest.mark.parametrize("error", [Refused("gone\naway"), OSError("gone away")])
def test_a_tracker_that_fails_later_is_said_once(error, tmp_path, monkeypatch, capsys):
    calls = stand_in("mlflow", monkeypatch, log_metrics=error)
    follow("mlflow", tmp_path / "run")
    assert capsys.readouterr().out.count("warning: tracking has ended") == 1
    assert [call[0] for call in calls][-1] == "log_metrics", "nothing is sent after it"


def test_training_tells_every_epoch(tmp_path, monkeypatch, capsys):
    calls = stand_in("mlflow", monkeypatch)
    data = write_dataset(tmp_path / "data", train=2, val=1)
    words = ["-d", data, "-m", "plain-unet", "--encoder", "plain-8", "--image-size", 32, "-e", 2, "-w", 0, "-b", 2]
    words += ["-log", tmp_path, "--exp-name", "run", "--cpu", "-a", "none", "--track", "mlflow"]
    train.main([str(word) for word in words])
    epochs = [call for call in calls if call[0] == "log_metrics"]
    assert [call[2] for call in epochs] == [("step", 1), ("step", 2)] and calls[-1] == ("end_run",)
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert epochs[0][1]["train/loss"] == logged[0]["train"]["loss"]
    assert "tracking has ended" not in capsys.readouterr().out
