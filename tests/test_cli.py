"""Flags: the same everywhere, checked before any file is read, from a settings file, and help at once."""

import argparse
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from discs import write_dataset

import cli
import train
import validate

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = sorted(path.stem for path in ROOT.glob("*.py") if "def build_parser" in path.read_text(encoding="utf-8"))
MODULES = [
    f"dataset_utils.{path.stem}"
    for path in sorted((ROOT / "dataset_utils").glob("*.py"))
    if "def build_parser" in path.read_text(encoding="utf-8")
]


def refused(command, words, capsys):
    """What a command prints to stderr before it ends with status 2."""
    with pytest.raises(SystemExit) as stop:
        command.main([str(word) for word in words])
    error = capsys.readouterr().err
    assert stop.value.code == 2, error
    assert "Traceback" not in error
    return error


# ---- help and version ----


def test_there_are_commands():
    assert {"train", "validate"} <= set(COMMANDS) and "dataset_utils.make_sample" in MODULES


@pytest.mark.parametrize("name", [*COMMANDS, *MODULES])
def test_every_flag_has_a_help_text(name):
    for action in importlib.import_module(name).build_parser()._actions:
        assert action.help, f"{name}: {action.option_strings} has no help"
        assert not action.help.endswith("."), f"{name}: {action.option_strings}"


# What they act on differs.
OWN_WORDS = {
    *("amp", "batch", "workers", "dataset_dir", "group_pattern", "image_size", "output_dir", "overwrite"),
    "tile_size",
    # of pretrain.py beside train.py
    *(
        "images",
        "encoder",
        "encoder_weights",
        "crops",
        "lr",
        "optim",
        "weight_decay",
        "warmup",
        "accumulate",
        "sync_bn",
    ),
}


def test_a_flag_means_the_same_in_every_command():
    seen = {}
    for name in [*COMMANDS, "dataset_utils.check"]:
        for action in importlib.import_module(name).build_parser()._actions:
            words = "" if action.dest in OWN_WORDS else action.help
            kind = cli.positive_int if action.type is cli.count_or_auto else action.type  # auto is of training alone
            meaning = (action.option_strings, kind, action.choices, action.nargs, words)
            assert seen.setdefault(action.dest, meaning) == meaning, f"{name} redefines {action.option_strings}"


def test_short_flags_of_the_predecessor_stay():
    def options(module):
        return {option for action in module.build_parser()._actions for option in action.option_strings}

    short = {"-m", "-d", "-b", "-lr", "-e", "-a", "-w", "-log", "-val", "-sc"}
    assert short | {"--encoder", "--image-size", "--exp-name", "--class-list", "--add-dirs", "--seed"} <= options(train)
    ours = {"-c", "-cd", "-t", "-d", "-o", "--vis", "--plots", "--no-plots", "--only-plots", "--binary", "--raw"}
    assert ours | {"--com", "--calc-only-metrics", "--tile-size", "--cpu", "--device"} <= options(validate)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_from_another_folder_is_quick(name, tmp_path):
    begin = time.perf_counter()
    command = [sys.executable, str(ROOT / f"{name}.py"), "--help"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and "--settings" in result.stdout, result.stderr
    assert time.perf_counter() - begin < 5, "half a second when quiet"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_loads_nothing_heavy(name):
    code = f"import sys, {name}; {name}.build_parser().format_help(); print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for library in ("torch", "cv2", "PIL", "tensorboard"):
        assert f"'{library}'" not in loaded, f"{name} loads {library} for --help"


def test_version_names_commit_and_libraries(capsys):
    with pytest.raises(SystemExit) as stop:
        validate.main(["--version"])
    lines = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines())
    assert stop.value.code == 0
    assert lines["tessera"] == cli.VERSION and lines["torch"].startswith(torch.__version__.split("+")[0])
    assert {"commit", "python", "timm", "segmentation-models-pytorch"} <= lines.keys()


# ---- flags that cannot be ----


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["-m", "unett"], ["unett", "unet"]),
        (["--encoder", "resnet19"], ["resnet19", "resnet18"]),
        (["-m", "plain-unet", "--encoder", "plain-9"], ["plain-9", "plain-8"]),
        (["-m", "UnetPlusPlus", "--encoder", "mit_b0"], ["unetplusplus", "mit_b0"]),
        (["--loss", "dise"], ["dise", "dice"]),
        (["--loss", "0.3*ce+*dice"], ["0.3*ce+*dice"]),
        (["-a", "harder"], ["harder", "hard"]),
        (["--optim", "lbfgs"], ["--optim LBFGS cannot train here", "AdamW Adam SGD"]),
        (["--optim", "SparseAdam"], ["--optim SparseAdam cannot train here", "gradients", "dense"]),
        (["--optim", "Adan"], ["'Adan' is unknown", "AdamW Adam SGD NAdam"]),
        (["-sc", "CyclicLR"], ["CyclicLR", "cosine plateau one-cycle poly step constant"]),
        (["--step-factor", "1"], ["--step-factor 1", "less than 1"]),
        (["--poly-power", "0"], ["--poly-power", "above 0"]),
        (["--encoder-lr-scale", "0"], ["--encoder-lr-scale", "above 0"]),
        (["--ema", "1"], ["--ema", "between 0 and 1"]),
        (["--freeze-encoder", "-1"], ["--freeze-encoder", "out of range"]),
        (["--label-smoothing", "0.1"], ["loss 'DiceLoss' does not use --label-smoothing"]),
        (["--label-smoothing", "1", "--loss", "ce"], ["label smoothing is 1", "less than 1"]),
        (["--lr-find", "5"], ["--lr-find 5", "10 steps or more"]),
        (["--lr-find", "--optim", "Rprop"], ["--lr-find has no use for Rprop"]),
        (["--lr-find", "--folds", "3"], ["--lr-find looks at one training", "--fold 0"]),
        (["--folds", "1"], ["--folds 1 leaves nothing to train on", "2 or more"]),
        (["--folds", "3", "--fold", "3"], ["--fold 3", "from 0 to 2"]),
        (["--folds", "3", "--fold", "some"], ["--fold", "'some' is not a whole number"]),
        (["--fold", "0"], ["--fold 0 of how many", "--folds K"]),
        (["--folds", "3", "-val", "y"], ["--val-dir and --folds"]),
        (["--folds", "3", "--use-only-add-val", "--add-val-dirs", "x"], ["--use-only-add-val and --folds"]),
        (["-b", "0"], ["--batch", "out of range"]),
        (["--use-only-add-val"], ["--use-only-add-val leaves no validation set", "--add-val-dirs"]),
        (["--use-only-add-val", "--add-val-dirs", "x", "-val", "y"], ["--val-dir names a main", "leave one out"]),
        (
            ["--use-only-add-val", "--add-val-dirs", "x", "--adv-freq", "5", "--early-stop", "3"],
            ["--early-stop 3 would end the run between", "--early-stop 5 or more"],
        ),
        (["--plateau-factor", "1"], ["--plateau-factor 1", "less than 1"]),
        (["--step-factor", "0"], ["--step-factor 0 would end all learning", "more than 0"]),
        (["--class-weights", "1", "two"], ["--class-weights '1 two'", "a number for each class, or auto"]),
        (["--class-weights", "auto", "--loss", "dice"], ["loss 'dice' does not use class weights", "0.5*ce+0.5*dice"]),
        (["--image-size", "1", "2", "3"], ["--image-size", "found 3"]),
        (["--image-size", "0"], ["--image-size", "0 is out of range"]),
        (["-e", "0"], ["--epochs", "out of range"]),
        (["-b", "many"], ["--batch", "'many' is not a whole number"]),
        (["-lr", "0"], ["-lr", "above 0"]),
        (["-lr", "inf"], ["-lr", "out of range"]),
        (["--clip", "-1"], ["--clip"]),
        (["--warmup", "nan"], ["--warmup", "out of range"]),
        (["--foreground-quota", "1.5"], ["--foreground-quota", "from 0 to 1"]),
        (["--amp", "fp16", "--cpu"], ["--amp fp16 needs a GPU", "bf16"]),
        (["--device", "gpu"], ["--device gpu is unknown", "cuda:N"]),
        (["--device", "cuda:x"], ["--device cuda:x", "'x' is no number"]),
        (["--val-share", "1"], ["--val-share", "leaves one side empty"]),
        (["--init-from", "absent.pth"], ["--init-from absent.pth", "no such file"]),
        (["--encoder-weights", "absent.pth"], ["--encoder-weights absent.pth", "no such file"]),
        (["--optimiser", "Adam"], ["unrecognized arguments: --optimiser"]),
        (["--epoch", "3"], ["unrecognized arguments: --epoch"]),
    ],
)
def test_bad_flags_of_training_end_before_any_file_is_read(flags, parts, capsys, tmp_path):
    """The data set is absent: a message about it would mean that files were looked at first."""
    error = refused(train, ["-d", tmp_path / "absent", "-log", tmp_path / "logs", *flags], capsys)
    for part in parts:
        assert part in error, error
    assert "absent/" not in error and not list(tmp_path.iterdir())


def test_cuda_without_a_gpu_is_an_error(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    words = ["-d", tmp_path / "absent", "--device", "cuda"]
    for command, more in ((train, ["-log", tmp_path / "logs"]), (validate, ["-cd", tmp_path])):
        error = refused(command, [*words, *more], capsys)
        assert "--device cuda: PyTorch sees 0 CUDA devices; use --device auto or --cpu" in error
    assert not list(tmp_path.iterdir())
    assert cli.pick_device("cuda:1", cpu=True) == "cpu"


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ([], "one of the arguments -c/--check-path/-check/-m/--model -cd/--check-dir is required"),
        (["-c", "a", "-cd", "b"], "not allowed with argument"),
        (["-c", "a", "-t", "1.5"], "out of range"),
        (["-c", "a", "-t", "good"], "is not a number"),
        (["-c", "a", "--empty", "two"], "invalid choice: 'two'"),
    ],
)
def test_bad_flags_of_validation(flags, part, capsys):
    assert part in refused(validate, ["-d", "absent", *flags], capsys)


def test_a_missing_data_set_leaves_nothing_behind(capsys, tmp_path):
    words = [
        "-d",
        str(tmp_path / "нет такого"),
        "-log",
        str(tmp_path / "logs"),
        "-m",
        "plain-unet",
        "--encoder",
        "plain-8",
    ]
    with pytest.raises(SystemExit) as stop:
        train.main([*words, "--cpu"])
    assert stop.value.code == 1 and f"no folder {tmp_path / 'нет такого'}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_size_that_the_network_cannot_take_is_named(capsys, tmp_path):
    data = write_dataset(tmp_path / "data", train=1, val=1)
    words = ["-d", str(data), "-log", str(tmp_path / "logs"), "-m", "plain-unet", "--encoder", "plain-8", "--cpu"]
    with pytest.raises(SystemExit):
        train.main([*words, "--image-size", "50"])
    assert "--image-size 50: plain-unet takes multiples of 16 from 16 on; try 48" in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code of the file was run')",))


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "no checkpoint"),
        (b"", "truncated or not a checkpoint"),
        (b"some text, no checkpoint at all", "not a checkpoint"),
        ({"state_dict": {"weight": torch.zeros(2)}}, "not a checkpoint written by train.py"),
        ({"model": Evil()}, "is refused"),
    ],
)
def test_foreign_checkpoints_are_refused(content, part, tmp_path, capsys):
    path = tmp_path / "foreign.pth"
    if isinstance(content, dict):
        torch.save(content, path)
    elif content is not None:
        path.write_bytes(content)
    data = write_dataset(tmp_path / "data", train=1, val=1)
    with pytest.raises(SystemExit) as stop:
        validate.main(["-d", str(data / "val"), "-c", str(path), "-o", str(tmp_path / "out"), "--cpu"])
    error = capsys.readouterr().err
    assert stop.value.code == 1 and part in error and "foreign.pth" in error
    assert not (tmp_path / "out").exists()


# ---- settings ----


def parse(flags, words, tmp_path, command=train):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(flags), encoding="utf-8")
    return cli.parse(command.build_parser(), ["--settings", str(path), *map(str, words)])


def test_args_json_of_an_earlier_run_fits(tmp_path):
    words = [
        "-d",
        "мои данные",
        "-lr",
        "0.01",
        "--image-size",
        "64",
        "96",
        "--add-dirs",
        "nir",
        "kv",
        "--no-channels-last",
    ]
    words += ["--class-list", "64 128", "--exp-name", "a b", "--cpu", "-b", "3", "--mask-threshold", "-1.5"]
    first = cli.parse(train.build_parser(), words)
    record = json.loads(json.dumps(cli.run_record(first, words)))
    again = vars(parse(record, [], tmp_path))
    assert {key: value for key, value in again.items() if key != "settings"} == {
        key: value for key, value in vars(first).items() if key != "settings"
    }


def test_the_command_line_wins(tmp_path):
    flags = {
        "batch": 4,
        "cpu": True,
        "image-size": [64],
        "--encoder": "resnet34",
        "lr": 0.5,
        "m": "fpn",
        "dataset": "x",
    }
    args = parse(flags, ["-b", 5, "--no-cpu", "--image-size", 32, 48, "-d", "y"], tmp_path)
    assert (args.batch, args.cpu, args.image_size, args.dataset) == (5, False, [32, 48], Path("y"))
    assert (args.encoder, args.lr, args.model) == ("resnet34", 0.5, "fpn")


def test_the_command_line_wins_over_a_flag_that_excludes_it(tmp_path):
    flags = {"check_path": "old.pth", "dataset_dir": "x"}
    args = parse(flags, ["-cd", "runs"], tmp_path, validate)
    assert args.check_path is None and args.check_dir == Path("runs")
    assert parse(flags, [], tmp_path, validate).check_path == Path("old.pth")


def test_lists_and_texts_of_labels(tmp_path):
    for value in ([64, 128], "64 128", ["64 128"]):
        assert parse({"class_list": value, "dataset": "x"}, [], tmp_path).class_list == "64 128"
    for words in (["64", "128"], ["64 128"]):
        assert parse({"dataset": "x"}, ["--class-list", *words], tmp_path).class_list == "64 128"
        assert parse({"dataset": "x"}, ["--add-dirs", *words], tmp_path).add_dirs == ["64", "128"]


def test_flags_of_another_command_in_its_record_are_left_out_aloud(tmp_path, capsys):
    flags = {"dataset_dir": "x", "check_dir": "y", "epochs": 3, "lr": 1}
    args = parse({"flags": flags, "command": "train.py"}, [], tmp_path, validate)
    assert args.dataset_dir == Path("x")
    assert "left out, for they are no flags of" in (error := capsys.readouterr().err) and "epochs" in error


def refused_settings(flags, capsys, tmp_path, words=()):
    with pytest.raises(SystemExit) as stop:
        parse(flags, words, tmp_path)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "settings.json" in error
    return error


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({"epoch": 3}, ["epoch (did you mean epochs?)"]),
        ({"--image_sise": 3, "zzz": 1}, ["--image_sise (did you mean image_size?)", "zzz."]),
        ({"settings": "other.json"}, ["no flag of", "settings"]),
        ({"epochs": "many"}, ["-e/--epochs", "'many' is not a whole number"]),
        ({"epochs": True}, ["epochs is true", "expected a number"]),
        ({"epochs": [3, 4]}, ["-e/--epochs", "'3 4' is not a whole number"]),
        ({"lr": {"a": 1}}, ['lr is {"a": 1}', "expected a number"]),
        ({"image_size": []}, ["--image-size", "expected at least one argument"]),
        ({"cpu": "false"}, ['cpu is "false"', "expected true or false"]),
        ({"monitor": "f1"}, ["--monitor", "'f1'", "iou"]),
        ({"e": 3, "epochs": 4}, ["sets one flag twice: 'e' and 'epochs'"]),
        ({"mpp": 1, "reduce": 4}, ["not allowed with"]),
    ],
)
def test_what_settings_cannot_be(flags, parts, tmp_path, capsys):
    if "reduce" in flags:  # found by the parser itself, which does not know where the words come from
        with pytest.raises(SystemExit):
            parse(flags, [], tmp_path)
        error = capsys.readouterr().err
    else:
        error = refused_settings(flags, capsys, tmp_path)
    assert all(part in error for part in parts), error


def test_settings_are_checked_as_if_typed(tmp_path):
    flags = {
        "no-cpu": True,
        "--no-channels-last": False,
        "image_size": [64, 96],
        "d": "x",
        "lr": "1e-2",
        "roi_dir": None,
    }
    args = parse(flags, [], tmp_path)
    assert (args.cpu, args.channels_last, args.image_size, args.lr, args.roi_dir) == (False, True, [64, 96], 0.01, None)


def test_a_file_satisfies_required_flags_and_groups(tmp_path):
    assert parse({"check_dir": "a", "dataset_dir": "b"}, [], tmp_path, validate).check_dir == Path("a")


def test_lists_of_a_file_do_not_take_positional_words(tmp_path):
    parser = argparse.ArgumentParser()
    for name, options in (("what", {}), ("--many", {"nargs": "+"}), ("--one", {}), ("--settings", {})):
        parser.add_argument(name, **options)
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"one": "x", "many": [1, 2]}))
    args = cli.parse(parser, ["--settings", str(path), "speed"])
    assert (args.what, args.many, args.one) == ("speed", ["1", "2"], "x")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "is not JSON"),
        ("[1]", "holds a list; expected an object"),
        ('{"flags": 3}', "holds a int"),
        (None, "cannot be read"),
    ],
)
def test_bad_settings(text, part, tmp_path, capsys):
    path = tmp_path / "settings.json"
    if text is not None:
        path.write_text(text)
    error = refused(train, ["--settings", path, "-d", "x"], capsys)
    assert part in error and "settings.json" in error


# ---- errors ----


def ended(error, monkeypatch, capsys, **how):
    monkeypatch.delenv("TESSERA_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as stop, cli.plain_errors(argparse.ArgumentParser(prog="x.py"), **how):
        raise error
    return stop.value.code, capsys.readouterr().err


def test_errors_are_one_message(monkeypatch, capsys):
    assert ended(ValueError("bad mask"), monkeypatch, capsys) == (1, "x.py: error: bad mask\n")
    code, text = ended(FileNotFoundError(2, "No such file", "a.png"), monkeypatch, capsys)
    assert code == 1 and "a.png" in text
    code, text = ended(cli.UsageError("bad flag"), monkeypatch, capsys)
    assert code == 2 and text.endswith("x.py: error: bad flag\n")
    code, text = ended(KeyboardInterrupt(), monkeypatch, capsys, interrupted="again")
    assert (code, text) == (130, "x.py: interrupted; again\n")
    with pytest.raises(KeyError), cli.plain_errors(argparse.ArgumentParser()):
        raise KeyError("a mistake in the program is not hidden")


def test_a_traceback_is_shown_on_wish(monkeypatch):
    monkeypatch.setenv("TESSERA_TRACEBACK", "1")
    with pytest.raises(ValueError, match="bad mask"), cli.plain_errors(argparse.ArgumentParser()):
        raise ValueError("bad mask")


class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise ValueError("b07.png is truncated: 3 of 40 rows.\nUse another copy.")


def test_errors_of_loader_processes_lose_their_traceback():
    with pytest.raises(ValueError, match="Original Traceback") as caught:
        next(iter(torch.utils.data.DataLoader(Broken(), num_workers=1)))
    assert cli.plain_message(caught.value) == "b07.png is truncated: 3 of 40 rows.\nUse another copy."
    assert cli.plain_message(ValueError("Caught a fish")) == "Caught a fish"


def test_the_learning_rate_has_a_long_spelling():
    assert train.build_parser().parse_args(["-d", "a", "--lr", "0.5"]).lr == 0.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epohcs", "3"], "unrecognized arguments: --epohcs 3; did you mean --epochs?"),
        (["--epohcs=3", "--no-cpus", "xyz"], "--epohcs=3 --no-cpus xyz; did you mean --epochs --no-cpu?"),
        (["--qqqq", "3"], "unrecognized arguments: --qqqq 3\n"),
        (["-e", "many"], "argument -e/--epochs: 'many' is not a whole number"),
    ],
)
def test_a_wrong_word_is_said_in_one_line_with_what_is_near(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse(train.build_parser(), ["-d", "data", *words])
    text = capsys.readouterr().err
    assert stop.value.code == 2 and message in text
    assert len(text.splitlines()) == 2 and text.endswith("(--help lists all flags)\n")
