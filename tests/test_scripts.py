"""The shell scripts, run on fakes: an own folder, own requirements, own commands; nothing is downloaded."""

import base64
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["setup.sh", "train.sh", "validate.sh", "test.sh", ".ci/run"]
ECHO = "import sys\nprint('|'.join(sys.argv[1:]))\n"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


@pytest.fixture
def clone(tmp_path):
    """A copy of the scripts in a folder with a space and Cyrillic letters; its commands print their arguments."""
    root = tmp_path / "моя копия"
    (root / "dataset_utils").mkdir(parents=True)
    for name in ("setup.sh", "train.sh", "validate.sh"):
        shutil.copy(ROOT / name, root / name)
    (root / "requirements.txt").write_text("# nothing\n")
    (root / "requirements-dev.txt").write_text("-r requirements.txt\n")
    for name in ("train.py", "validate.py"):
        (root / name).write_text(ECHO)
    (root / "dataset_utils" / "make_sample.py").write_text(
        "import pathlib, sys\nprint('drawn')\npathlib.Path(sys.argv[2], 'train').mkdir(parents=True)\n"
    )
    return root


def run(script, *args, cwd, **variables):
    """Run a script from a folder with only the given variables besides PATH and HOME."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": path, "HOME": str(cwd), "LC_ALL": "C.UTF-8", **variables}
    command = ["bash", str(script), *args]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def add_package(folder, name, version):
    """Metadata as pip leaves it."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def write_wheel(folder, name, version):
    """A wheel of one module, made by hand."""
    files = {
        f"{name}.py": "VALUE = 1\n",
        f"{name}-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{name}-{version}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(text)}\n"
    files[f"{name}-{version}.dist-info/RECORD"] = record + f"{name}-{version}.dist-info/RECORD,,\n"
    folder.mkdir()
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)


@pytest.mark.parametrize("name", SCRIPTS)
def test_syntax(name):
    result = subprocess.run(["bash", "-n", str(ROOT / name)], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_setup_understands_every_requirement(name):
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    for line in filter(None, lines):
        assert re.fullmatch(r"-r requirements.txt|[\w.-]+([<>=!]=?[\d.]+,?)+", line), line


def test_requirements_leave_out_what_the_licence_forbids():
    assert "ultralytics" not in (ROOT / "requirements.txt").read_text()
    assert "albumentations" not in (ROOT / "requirements.txt").read_text()  # archived; the benchmark alone needs it
    assert "albumentations==2.0.8\n" in (ROOT / "requirements-dev.txt").read_text()


@pytest.mark.parametrize("line", ["one>=1.2,<3", "one", "one==2.0.8", "one!=2.0.7", "one>2.0 # why"])
def test_an_environment_with_the_packages_is_taken(clone, tmp_path, line):
    (clone / "requirements.txt").write_text(f"# a comment\n\n{line}\n")
    add_package(tmp_path / "site", "one", "2.0.8+cpu")
    started = time.monotonic()
    result = run(clone / "setup.sh", cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).samefile(sys.executable)
    assert not (clone / ".venv").exists()
    assert time.monotonic() - started < 5  # 0.1 s on a free computer


def test_dev_packages_count_with_dev_only(clone, tmp_path):
    (clone / "requirements-dev.txt").write_text("-r requirements.txt\ntwo>=1\n")
    assert run(clone / "setup.sh", cwd=tmp_path).returncode == 0
    (clone / ".venv").write_text("a file, where a folder is expected")
    refused = run(clone / "setup.sh", "--dev", cwd=tmp_path, VIRTUAL_ENV=sys.prefix)
    assert refused.returncode == 1
    assert f"the active environment {sys.prefix} lacks two>=1: it is left as it is" in refused.stderr
    assert re.search(rf"neither venv nor virtualenv of \S+ could make {re.escape(str(clone))}/\.venv", refused.stderr)
    assert "apt install python3-venv" in refused.stderr


@pytest.mark.parametrize("line", ["one>=2.1", "one==2.0", "one<2", "one>2.0.8", "one!=2.0.8"])
def test_an_environment_with_another_version_is_left_alone(clone, tmp_path, line):
    (clone / "requirements.txt").write_text(line)
    add_package(tmp_path / "site", "one", "2.0.8")
    holds_files = tmp_path / "documents"
    holds_files.mkdir()
    (holds_files / "letter.txt").write_text("mine")
    variables = {"PYTHONPATH": str(tmp_path / "site"), "TESSERA_VENV": str(holds_files)}
    result = run(clone / "setup.sh", cwd=tmp_path, **variables)
    assert result.returncode == 1
    assert f"{holds_files} (TESSERA_VENV) holds files but no Python >= 3.11" in result.stderr
    assert [path.name for path in holds_files.iterdir()] == ["letter.txt"]


def test_an_environment_is_made_reused_and_repaired(clone, tmp_path):
    (clone / "requirements.txt").write_text("one>=2\n")
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "wheels"), "PIP_CONFIG_FILE": os.devnull}
    failed = run(clone / "setup.sh", cwd=tmp_path, **offline)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert f"pip could not install {clone}/requirements.txt, see above. Started again, it goes on" in failed.stderr

    write_wheel(tmp_path / "wheels", "one", "2.5")
    first = run(clone / "setup.sh", cwd=tmp_path, **offline)
    assert first.returncode == 0, first.stderr
    python = clone / ".venv" / "bin" / "python"
    assert first.stdout.splitlines() == [str(python)]
    second = run(clone / "setup.sh", cwd=clone, **offline)
    assert (second.stdout, second.stderr) == (first.stdout, "")  # pip was not called

    (module,) = clone.glob(".venv/lib/*/site-packages/one.py")
    module.unlink()  # as when the computer went off while pip was copying
    (clone / ".venv" / ".unfinished").touch()
    third = run(clone / "setup.sh", cwd=tmp_path, **offline)
    assert third.returncode == 0, third.stderr
    assert "Repairing one-2.5" in third.stderr
    assert module.exists()
    assert not (clone / ".venv" / ".unfinished").exists()


def test_setup_without_python_says_what_to_install(clone, tmp_path):
    (tmp_path / "bin").mkdir()
    for tool in ("bash", "dirname", "ls", "cat"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    old = tmp_path / "bin" / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    result = run(clone / "setup.sh", cwd=tmp_path, PATH=str(tmp_path / "bin"))
    assert result.returncode == 1
    assert "found no Python >= 3.11" in result.stderr
    assert "PYTHON=/path/to/python" in result.stderr


def test_setup_refuses_other_arguments(clone, tmp_path):
    result = run(clone / "setup.sh", "--all", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert "'--all', expected --dev" in result.stderr


def test_train_draws_the_sample_once_and_flags_go_last(clone, tmp_path):
    first = run(clone / "train.sh", "--epochs", "1", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    drawn, arguments = first.stdout.splitlines()
    assert drawn == "drawn"
    assert arguments.startswith(f"-d|{clone}/data/sample|-m|plain-unet|--encoder|plain-16|")
    assert arguments.endswith(f"|-log|{clone}/logs|--epochs|1")
    assert "--class-list" not in arguments
    assert run(clone / "train.sh", cwd=clone).stdout.count("drawn") == 0


def test_train_takes_variables_and_paths_from_where_the_user_stands(clone, tmp_path):
    variables = {"DATASET": "my rocks", "CLASS_LIST": "64 128", "MODEL": "unet", "ENCODER": "resnet18", "BATCH": "2"}
    variables |= {"EPOCHS": "7", "AUGM": "hard", "IMAGE_SIZE": "128", "EXP_NAME": "rocks"}
    result = run(clone / "train.sh", cwd=tmp_path, **variables)
    assert result.stdout.strip() == (
        "-d|my rocks|-m|unet|--encoder|resnet18|-b|2|-e|7|-a|hard|--image-size|128|--class-list|64 128|"
        f"--exp-name|rocks|--baselines|-log|{clone}/logs"
    )


def test_validate_without_a_run_says_how_to_get_one(clone, tmp_path):
    result = run(clone / "validate.sh", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert f"found no checkpoint (*.pth) in {clone}/logs. Train first (bash train.sh)" in result.stderr


def test_validate_scores_the_newest_run(clone, tmp_path):
    for age, name in enumerate(["new run", "older", "oldest"]):
        folder = clone / "logs" / name
        folder.mkdir(parents=True)
        (folder / f"{name}.pth").touch()
        os.utime(folder / f"{name}.pth", (1e9 - age * 60, 1e9 - age * 60))
        (folder / "last_checkpoint").touch()  # newer than the best of any run, and not what is scored
    result = run(clone / "validate.sh", "-t", "best", cwd=tmp_path)
    assert result.stdout.strip() == f"-d|{clone}/data/sample/val|-log|{clone}/logs|-cd|{clone}/logs/new run|-t|best"
    assert "scoring" in result.stderr
    result = run(clone / "validate.sh", cwd=tmp_path, DATASET="rocks")
    assert result.stdout.startswith("-d|rocks/val|")


def test_validate_takes_a_named_checkpoint(clone, tmp_path):
    for flag in ("-c", "-check", "-m", "--model", "--check-path"):
        by_flag = run(clone / "validate.sh", flag, "a.pth", cwd=tmp_path, DATASET_PATH="split")
        assert by_flag.stdout.strip() == f"-d|split|-log|{clone}/logs|{flag}|a.pth"
    by_variable = run(clone / "validate.sh", cwd=tmp_path, DATASET_PATH="split", CHECK_DIR="run")
    assert by_variable.stdout.strip() == f"-d|split|-log|{clone}/logs|-cd|run"


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("install_all", "bash setup.sh --dev"),
        ("run_training", "bash train.sh --epochs 1"),
        ("run_annotation", "annotate.py --epochs 1"),
        ("test", "bash test.sh --epochs 1"),
    ],
)
def test_make_passes_arguments_on(target, expected):
    command = ["make", "-n", "-C", str(ROOT), target, "ARGS=--epochs 1"]
    assert expected in subprocess.run(command, capture_output=True, text=True, check=True).stdout
