"""Checkpoints: what goes in comes out, and files that are not ours do no harm."""

import errno
import io
import json
import os
import pickle
import zipfile
from dataclasses import replace

import pytest
import torch

import image_io
from checkpoint import (
    FORMAT,
    Geometry,
    ModelConfig,
    config_from_dict,
    config_to_dict,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)

CONFIG = ModelConfig(
    architecture="plain-unet",
    encoder="plain-8",
    labels=(64, 128),
    class_names=("background", "кость", "b"),
    channels=("red", "green", "blue", "nir"),
    mean=(1.5, 2.0, 3.0, 4.0),
    std=(1.0, 1.0, 1.0, 0.5),
    geometry=Geometry("crops", (64, 96), tile=256, overlap=64, halo=16),
    ignore_label=11,
    add_dirs=("nir",),
    preprocess=("clahe",),
    value_range=((0.0, 0.0, 0.0, 0.0), (255.0, 255.0, 255.0, 4000.0)),
    thresholds={"default": 0.5, "best": 0.41},
)
WEIGHTS = {"head.weight": torch.arange(6.0).reshape(2, 3)}


class Harmful:
    """Unpickling it makes a file, which stands for any code."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "run" / "run.pth"
    save_checkpoint(path, CONFIG, WEIGHTS, epoch=3)
    return path


def test_what_goes_in_comes_out(saved):
    config, content = load_checkpoint(saved)
    assert config == CONFIG
    assert torch.equal(content["model_state_dict"]["head.weight"], WEIGHTS["head.weight"]) and content["epoch"] == 3
    assert content["format"] == FORMAT
    assert [path.name for path in saved.parent.iterdir()] == ["run.pth"], "no temporary file is left"
    torch.load(saved, weights_only=True)


def test_the_description_fits_json():
    text = json.dumps(config_to_dict(CONFIG))
    assert config_from_dict(json.loads(text)) == CONFIG


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        ((255,), ("background", "255"), 1),
        ((), ("background", "object"), 1),
        ((0, 1), ("road", "sky"), 2),
        ((1, 2), ("background", "1", "2"), 3),
    ],
)
def test_one_logit_for_one_class(labels, names, expected):
    assert replace(CONFIG, labels=labels, class_names=names).num_logits == expected


def test_entries_of_a_later_version_are_left_out_and_missing_ones_named():
    values = config_to_dict(CONFIG)
    assert config_from_dict({**values, "novelty": 1}) == CONFIG
    with pytest.raises(ValueError, match="its format is 99, this version reads up to 1: update Tessera"):
        config_from_dict({**values, "format": 99})
    for name in ("encoder", "geometry"):
        with pytest.raises(ValueError, match=rf"its description is incomplete or not one of Tessera \(.*{name}"):
            config_from_dict({key: value for key, value in values.items() if key != name})
    for damage in ({"geometry": [1, 2]}, {"geometry": {"sort": "crops"}}, {"format": "new"}):
        with pytest.raises(ValueError, match="its description is incomplete or not one of Tessera"):
            config_from_dict({**values, **damage})


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*none.pth; train.py writes it"):
        load_checkpoint(tmp_path / "none.pth")


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": WEIGHTS},
        {"epoch": 1, "model_state_dict": WEIGHTS},
        WEIGHTS,
        [1, 2],
        torch.zeros(3),
    ],
)
def test_a_checkpoint_of_another_project(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    message = r"other.pth: it has no .config. entry: it is not a checkpoint written by train"
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "other.pth")


@pytest.mark.parametrize("config", ["unet", ["a"], {"lr": 0.1}])
def test_a_config_of_another_project(tmp_path, config):
    torch.save({"config": config, "model_state_dict": WEIGHTS}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth: its description is incomplete or not one of Tessera"):
        load_checkpoint(tmp_path / "other.pth")


def test_every_truncation_is_named(saved, tmp_path):
    data, path = saved.read_bytes(), tmp_path / "cut.pth"
    for length in range(0, len(data), max(1, len(data) // 60)):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"cut.pth is truncated or not a checkpoint \(.*Use another copy"):
            load_checkpoint(path)


def test_any_bytes_are_refused_with_the_path(tmp_path):
    old = io.BytesIO()
    torch.save({"a": torch.zeros(10)}, old, _use_new_zipfile_serialization=False)
    generator = torch.Generator().manual_seed(0)
    contents = [bytes(torch.randint(256, (n,), generator=generator).tolist()) for n in range(1, 200, 2)]
    contents += [old.getvalue()[:length] for length in range(0, len(old.getvalue()), 5)]
    contents += [b"", b"plain text\n", b"version https://git-lfs.github.com/spec/v1\n", pickle.dumps({"a": 1})]
    for content in contents:
        (tmp_path / "x.pth").write_bytes(content)
        with pytest.raises(
            ValueError, match=r"x\.pth (is truncated or not|is not a checkpoint|is refused|it has no 'config')"
        ):
            load_checkpoint(tmp_path / "x.pth")


def test_other_archives_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("notes.txt", "hello")
    with pytest.raises(ValueError, match=r"x.pth is truncated or not a checkpoint"):
        load_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize("form", ["archive", "pickle 2", "pickle 4"])
def test_code_in_a_file_is_not_run(tmp_path, form):
    trap, path = tmp_path / "trap", tmp_path / "evil.pth"
    content = {"config": config_to_dict(CONFIG), "model_state_dict": WEIGHTS, "loss": Harmful(trap)}
    if form == "archive":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(Harmful(trap), protocol=int(form[-1])))
    with pytest.raises(ValueError) as caught:
        load_checkpoint(path)
    assert not trap.exists(), "the code in the file was run"
    message = str(caught.value)
    assert message.startswith(str(path)) and "weights_only" not in message, "no advice to load it unsafely"
    if form != "pickle 4":
        assert "is refused: loading it would run code (posix.mkdir), and nothing in a file is executed" in message
    pickle.loads(pickle.dumps(Harmful(trap)))
    assert trap.exists(), "the trap itself works"


class FullDisk(io.BufferedIOBase):
    """A file that takes some bytes, then none."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def fileno(self):
        return self.file.fileno()

    def flush(self):
        self.file.flush()

    def close(self):
        self.file.close()


@pytest.mark.parametrize("room", [0, 100, 1000])
def test_a_full_disk_leaves_the_old_file_whole(saved, monkeypatch, room):
    before, real = saved.read_bytes(), type(saved).open
    monkeypatch.setattr(type(saved), "open", lambda path, mode="r", **how: FullDisk(real(path, mode, **how), room))
    with pytest.raises(OSError, match="No space left on device") as caught:
        save_checkpoint(saved, CONFIG, WEIGHTS, epoch=4)
    monkeypatch.undo()
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(saved)
    assert saved.read_bytes() == before and load_checkpoint(saved)[1]["epoch"] == 3
    assert [path.name for path in saved.parent.iterdir()] == ["run.pth"]


def test_a_disk_that_fills_while_syncing_leaves_the_old_file_whole(saved, monkeypatch):
    def refuse(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = saved.read_bytes()
    monkeypatch.setattr(image_io.os, "fsync", refuse)
    with pytest.raises(OSError, match=r"No space left on device; nothing was saved here: '.*run.pth'"):
        save_checkpoint(saved, CONFIG, WEIGHTS, epoch=4)
    assert saved.read_bytes() == before and len(list(saved.parent.iterdir())) == 1


def test_a_folder_that_cannot_be_written(saved, monkeypatch):
    def refuse(path, *_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(type(saved), "open", refuse)
    with pytest.raises(PermissionError, match=r"Permission denied; nothing was saved here: '.*run.pth'"):
        save_checkpoint(saved, CONFIG, WEIGHTS)


def test_trouble_of_pytorch_itself_is_not_hidden(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("a tensor without data")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="a tensor without data"):
        save_checkpoint(tmp_path / "a.pth", CONFIG, WEIGHTS)
    assert list(tmp_path.iterdir()) == []


def test_the_newest_best_is_found(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*logs to look for checkpoints in"):
        find_checkpoint(tmp_path / "logs")
    for age, name in enumerate(("new", "old")):
        path = tmp_path / "logs" / name / f"{name}.pth"
        save_checkpoint(path, CONFIG, WEIGHTS)
        (path.parent / "last_checkpoint").write_bytes(b"")
        os.utime(path, (1000 - age, 1000 - age))
    assert find_checkpoint(tmp_path / "logs").name == "new.pth"
    assert find_checkpoint(tmp_path / "logs" / "old").name == "old.pth"
    (tmp_path / "logs" / "old" / "old.pth").unlink()
    with pytest.raises(FileNotFoundError, match=r"no \*.pth in .*old or in the folders inside it"):
        find_checkpoint(tmp_path / "logs" / "old")
