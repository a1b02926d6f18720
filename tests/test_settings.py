"""Recipes: each is a command that could be typed, printed in full, and gives way to files and words."""

import importlib
import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cli
import settings
import train
from model import build_model

FLAGS = {name: json.loads((settings.RECIPES / f"{name}.json").read_text())["flags"] for name in settings.recipe_names()}


def parse(*words):
    return cli.parse(train.build_parser(), ["-d", "data", *map(str, words)])


def plain(args):
    return {name: value for name, value in vars(args).items() if name != "recipe"}


def test_the_recipes_are_those_of_the_fields():
    assert {"vessel", "glomeruli", "bubbles", "unet-notebook"} <= set(FLAGS)


@pytest.mark.parametrize("name", FLAGS)
def test_a_recipe_is_the_command_that_is_printed(name, capsys):
    args = parse("--recipe", name, "--seed", 7)
    line = capsys.readouterr().out.strip()
    assert line.startswith(f"recipe {name}: python ")
    words = shlex.split(line.split(": python ", 1)[1])[1:]
    assert "--recipe" not in words
    assert plain(train.build_parser().parse_args(words)) == plain(args)
    for flag, value in FLAGS[name].items():
        assert getattr(args, flag) == value, flag
    typed = {word.split("=")[0].lstrip("-").replace("-", "_") for word in words if word.startswith("--")}
    assert typed == {*FLAGS[name], "seed"}, "in full"


@pytest.mark.parametrize("name", FLAGS)
def test_a_recipe_can_be_trained(name):
    args = parse(f"--recipe={name}", "--encoder-weights", "none")
    train.check_flags(args)
    with torch.device("meta"):
        network = build_model(args.model, args.encoder, in_channels=3, num_logits=1).eval()
        side = args.image_size[0]
        assert network(torch.zeros(1, 3, side, side)).shape == (1, 1, side, side)


def test_files_and_words_win_over_a_recipe(tmp_path, capsys):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"epochs": 3, "lr": 0.5}))
    args = parse("--recipe", "vessel", "--settings", file, "-lr", 0.25)
    line = capsys.readouterr().out
    assert (args.epochs, args.lr, args.model) == (3, 0.25, "manet")
    assert "--epochs=3" in line and "epochs=100" not in line and "--lr" not in line and "-lr 0.25" in line


def test_a_settings_file_may_name_a_recipe(tmp_path, capsys):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"recipe": "bubbles", "epochs": 3}))
    args = parse("--settings", file)
    assert (args.epochs, args.encoder, args.class_list) == (3, "resnet34", "nonzero")
    assert capsys.readouterr().out.startswith("recipe bubbles: ")


def test_the_record_of_a_run_holds_the_flags_and_not_the_recipe(tmp_path, capsys):
    first = parse("--recipe", "vessel", "--epochs", 5)
    record = cli.run_record(first, ["--recipe", "vessel"])
    assert "recipe" not in record["flags"]
    file = tmp_path / "args.json"
    file.write_text(json.dumps(record))
    again = parse("--settings", file)
    assert {**vars(again), "settings": None, "recipe": "vessel"} == vars(first)


@pytest.mark.parametrize("name", ["train", "pretrain", "validate", "predict", "annotate", "export_onnx"])
def test_what_a_command_writes_down_it_can_read(name, tmp_path):
    """The flags of a run with nothing but what is required, as its args.json has them."""
    parser = importlib.import_module(name).build_parser()
    words = {"train": ["-d", "data"], "pretrain": ["--images", "a", "b"], "annotate": ["--images", "a"]}
    words |= {
        "validate": ["-d", "val", "-c", "x.pth"],
        "predict": ["-c", "x.pth", "-i", "a"],
        "export_onnx": ["-c", "x"],
    }
    first = cli.parse(parser, words[name])
    file = tmp_path / "args.json"
    file.write_text(json.dumps(cli.run_record(first, words[name])))
    again = cli.parse(importlib.import_module(name).build_parser(), [*words[name], "--settings", str(file)])
    assert {**vars(again), "settings": None} == {**vars(first), "settings": None}


@pytest.mark.parametrize("where", ["word", "file"])
def test_an_unknown_recipe_is_named_with_the_nearest(where, tmp_path, capsys):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"recipe": "vesel"}))
    with pytest.raises(SystemExit) as stop:
        parse(*(["--recipe", "vesel"] if where == "word" else ["--settings", file]))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "did you mean vessel?" in error and "bubbles" in error


def test_another_command_knows_no_recipes(tmp_path, capsys):
    import validate

    file = Path(tmp_path / "mine.json")
    file.write_text(json.dumps({"recipe": "vessel"}))
    with pytest.raises(SystemExit):
        cli.parse(validate.build_parser(), ["--settings", str(file)])
    assert "no flag of" in capsys.readouterr().err


def idle(*words):
    args = parse("-m", "plain-unet", "--encoder", "plain-8", "--encoder-weights", "none", *words)
    train.check_flags(args)
    return train.idle_flags(args, train.build_parser())


@pytest.mark.parametrize(
    ("words", "partner", "line"),
    [
        (["--mix-share", 0.3], ["--mix", "cutmix"], "without --mix nothing is done with --mix-share"),
        (["--foreground-quota", 0.9], ["--crops", 2], "without --crops N nothing is done with --foreground-quota"),
        (["--plateau-factor", 0.5, "--plateau-patience", 2], ["-sc", "ReduceLROnPlateau"], "without -sc plateau"),
        (["--poly-power", 2], ["-sc", "poly"], "without -sc poly nothing is done with --poly-power"),
        (["--step-every", 2], ["-sc", "step"], "without -sc step nothing is done with --step-every"),
        (["--momentum", 0.5], ["--optim", "sgd"], "without --optim SGD or LARS nothing is done with --momentum"),
        (["--momentum", 0.5], ["--optim", "LARS"], "nothing is done with --momentum"),
        (["--adv-freq", 2], ["--add-val-dirs", "more"], "without --add-val-dirs DIR nothing is done with --adv-freq"),
    ],
)
def test_flags_that_change_nothing_are_named(words, partner, line):
    (said,) = idle(*words)
    assert line in said
    assert idle(*words, *partner) == [] == idle()


def test_what_a_recipe_leaves_without_its_partner_is_named():
    (line,) = idle("--recipe", "unet-notebook", "-sc", "cosine")
    assert line.endswith("--plateau-factor --plateau-patience --plateau-cooldown")


def test_starts_that_a_whole_network_replaces_are_named(tmp_path):
    (tmp_path / "a.pth").touch()
    start = tmp_path / "a.pth"
    start.touch()
    (line,) = idle("--init-from", start, "--init", "xavier", "--encoder-weights", start)
    assert "so nothing is done with --init --encoder-weights" in line
    assert idle("--init-from", start) == []


@pytest.mark.parametrize(
    ("words", "other", "line"),
    [
        (["--warmup", 5, "-e", 5], ["-e", 6], "--warmup 5 takes all of --epochs 5, so the rate never comes to -lr"),
        (["--freeze-encoder", 1], ["--init-from", "START"], "--freeze-encoder keeps random weights as they are"),
        (["--ignore-holes", "-a", "vessel"], ["-a", "medium"], "-a vessel makes no holes, so nothing is done with"),
    ],
)
def test_flags_that_others_thwart_are_named(words, other, line, tmp_path):
    start = tmp_path / "a.pth"
    start.touch()
    (said,) = idle(*words)
    assert said.startswith("warning: ") and line in said
    assert idle(*words, *(start if word == "START" else word for word in other)) == []
    assert idle("--freeze-encoder", 1, "--encoder-weights", "imagenet"), "there are none for plain-unet"


@pytest.mark.parametrize(
    ("name", "said"),
    [("rprop", "warm-up"), ("LARS", "0.1 to 5"), ("asgd", "--ema 0.99 scores and saves an average"), ("adamw", "")],
)
def test_optimisers_say_what_they_make_of_the_flags(name, said, capsys):
    args = parse("-m", "plain-unet", "--encoder", "plain-8", "--optim", name)
    train.check_flags(args)
    train.say_optimisation(SimpleNamespace(schedule=SimpleNamespace(limit=1)), args)
    line = capsys.readouterr().out
    assert said in line and line.startswith("warning: ") == bool(said)
