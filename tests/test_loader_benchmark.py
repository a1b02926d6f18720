"""The benchmark of augmentation and loading runs, and its lists are the library's."""

import numpy as np
import pytest

import slide_windows
from augmentations import PRESETS
from benchmarks import loader

pytestmark = pytest.mark.filterwarnings("ignore:This augmenter is very slow")  # the library's own opinion


def test_presets_are_timed_beside_the_plain_lists(capsys):
    loader.main(["presets", "--only", "safe", "medium", "--images", "2", "--size", "64", "--all-formats"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["preset", "format", "ours", "slowest", "plain", "no", "fog", "ratio"]
    rows = [line.split() for line in lines[2:]]
    assert [row[:3] for row in rows[:2]] == [["safe", "uint8", "x3"], ["safe", "uint16", "x3"]]
    assert len(rows) == 2 * 9 and all(float(row[3]) > 0 for row in rows)
    refused = {tuple(row[:3]) for row in rows if row[5] == "-"}
    assert ("medium", "uint16", "x3") in refused and ("medium", "uint8", "x3") not in refused


def test_files_become_samples_both_ways(capsys, monkeypatch):
    monkeypatch.setattr(loader, "SLIDE_SIDE", 256)
    monkeypatch.setattr(slide_windows, "SLIDE_PIXELS", 20_000)
    words = ["files", "--only", "safe", "--images", "16", "--size", "32", "--source", "64", "--crops", "2"]
    loader.main(words)
    lines = capsys.readouterr().out.splitlines()[2:]
    rows = [(line[11:23].strip(), line[23:40].strip(), *line[40:].split()) for line in lines]
    assert [row[:2] for row in rows] == [
        *(("resize", name) for name in loader.FILES),
        *(("2 crops", name) for name in (*loader.FILES, "slide")),
    ]
    assert all(float(row[2]) > 0 for row in rows)
    assert {row[1] for row in rows if row[3] != "-"} == {"png", "jpg", "tif"}, "it takes no others"
    assert all(float(value) > 0 for row in rows if row[3] != "-" for value in row[3:])


def test_only_the_library_may_refuse():
    def fails(*_):
        raise ValueError("no")

    def works(image, mask, _):
        return image, mask

    image, mask = loader.draw(8)
    taken = loader.time_in_turns([works, fails], image, mask, 2)
    assert np.isfinite(taken[:, 0]).all() and np.isnan(taken[:, 1]).all()
    with pytest.raises(ValueError, match="no"):
        loader.time_in_turns([fails, works], image, mask, 2)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_a_plain_list_that_runs(preset):
    image, mask = loader.draw(64)
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8 and set(np.unique(mask)) == {0, 1}
    changed = 0
    for seed in range(3):
        out, labels = loader.plain(preset, 3, fog=False)(image, mask, seed)
        assert out.shape == image.shape and labels.shape == mask.shape
        changed += not np.array_equal(out, image)
    assert changed >= 2 if preset not in ("none", "safe") else True
