"""The benchmark of draft labels runs on a few drawn pictures and scores what it should."""

import cv2
import numpy as np
import pytest

import cli
from annotation.scoring import score_labels
from benchmarks import annotate as bench
from image_io import write_image, write_mask


def draw_nuclei(seed, bright=False, size=(96, 128)):
    """Discs that do not touch, light on dark or dark on white, and their label map."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(size, np.uint16)
    for number, (x, y) in enumerate([(x, y) for x in range(20, 120, 28) for y in range(20, 90, 28)], 1):
        cv2.circle(labels, (x, y), int(rng.integers(6, 10)), number, -1)
    light = np.where(labels > 0, 160, 40) + rng.normal(scale=3, size=size)
    light = 255 - light if bright else light
    return np.clip(np.repeat(light[..., None], 3, axis=2), 0, 255).astype(np.uint8), labels


def draw_bubbles(seed, size=(128, 160)):
    """Bright rings around dark insides, and their label map."""
    rng = np.random.default_rng(seed)
    labels, light = np.zeros(size, np.uint16), np.full(size, 10, np.uint8)
    for number, (x, y) in enumerate([(x, y) for x in range(20, 150, 36) for y in range(20, 120, 36)], 1):
        radius = int(rng.integers(8, 14))
        cv2.circle(labels, (x, y), radius, number, -1)
        cv2.circle(light, (x, y), radius - 1, 200, 2)
    return light[..., None], labels


@pytest.fixture
def data(tmp_path):
    """Two pictures of nuclei, one of each kind in a split of its own, and three of bubbles."""
    for number, split in enumerate(("train", "val")):
        image, labels = draw_nuclei(number, bright=split == "val")
        write_image(tmp_path / "nuclei" / split / "images" / "one.png", image)
        write_mask(tmp_path / "nuclei" / split / "gt" / "one.png", labels)
    for number in range(3):
        image, labels = draw_bubbles(number)
        write_image(tmp_path / "bubbles" / "images" / f"b{number}.tif", image)
        write_mask(tmp_path / "bubbles" / "gt" / f"b{number}.png", labels)
    return tmp_path


def rows_of(text):
    """Rows of the table of quality: (set, way) to (images, F1)."""
    found = {}
    for line in text.splitlines():
        for way in (*bench.WAYS, bench.PLAIN):
            head, middle, tail = line.partition(f"  {way} ")
            if middle and head[:1] != " " and len(tail.split()) == 7:
                found[head[:21].strip(), way] = int(head[21:28]), float(tail.split()[0])
    return found


def test_quality_scores_each_set_and_way_in_one_table(data, capsys):
    bench.main(["quality", f"--data={data}", "--repeats=1", "--worst=1"])
    text = capsys.readouterr().out
    rows = rows_of(text)
    sets = {"nuclei": 2, "nuclei fluorescence": 1, "nuclei stained": 1, "bubbles": 3}
    assert {key: images for key, (images, _) in rows.items()} == {
        (name, way): images for name, images in sets.items() for way in (*bench.WAYS, bench.PLAIN)
    }
    assert all(rows[name, "default"][1] > 0.9 and rows[name, bench.PLAIN][1] > 0.9 for name in sets)
    assert "objects for" in text.splitlines()[-1]


def test_tuning_looks_at_pairs_and_scores_on_the_others(data, capsys):
    bench.main(["tune", f"--data={data}", "--pairs=2", "--trials=3", "--workers=1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("3 pictures, 2 ways to choose two")
    assert [line.split()[:2] for line in lines[2:4]] == [["b0", "b1"], ["b1", "b2"]]
    tuned = [float(line.split()[4]) for line in lines[2:4]]
    assert float(lines[4].split()[3]) == pytest.approx(sum(tuned) / 2, abs=0.002)
    assert lines[-1].startswith("better than the default: ")


def test_speed_of_the_engine_by_size_beside_floors(data, capsys):
    args = bench.build_parser().parse_args(["speed", f"--data={data}", "--repeats=1", "--side=128"])
    sources = bench.pick_sources(bench.read_sets(args), 2)
    assert {group: len(images) for group, images in sources.items()} == {"nuclei": 2, "bubbles": 2}
    bench.engine_table("nuclei", sources["nuclei"], args)
    text = capsys.readouterr().out
    for name in (
        "engine 64",
        "engine 128",
        "engine 256",
        "distanceTransform",
        "watershed",
        "GaussianBlur",
        "256 / at 64",
    ):
        assert name in text


@pytest.mark.slow
def test_speed_of_the_command(data, capsys):
    bench.main(["speed", f"--data={data}", "--repeats=1", "--side=128", "--count=2"])
    text = capsys.readouterr().out
    assert all(f"    {group} -w{workers} " in text for group in bench.SETS for workers in (1, 2))


def test_a_mosaic_is_the_picture_mirrored():
    image = np.arange(12, dtype=np.uint8).reshape(3, 4, 1)
    mosaic = bench.make_mosaic(image, 8)[..., 0]
    assert mosaic.shape == (8, 8)
    assert (mosaic[:3, :4] == image[..., 0]).all() and (mosaic[:3, 4:] == image[:, ::-1, 0]).all()
    assert (mosaic[3:6, :4] == image[::-1, :, 0]).all() and (mosaic[6:, :4] == image[:2, :, 0]).all()


@pytest.mark.parametrize("bright", [False, True])
def test_plain_lines_find_objects_of_either_polarity(bright):
    image, labels = draw_nuclei(7, bright)
    assert bench.is_bright(image) == bright
    assert score_labels(bench.plain_labels(image, "nuclei"), labels).f1() == 1


def test_without_data_it_says_what_is_expected(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(["quality", f"--data={tmp_path}"])
    assert stopped.value.code == 2
    assert "no pictures of nuclei or bubbles in" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def quiet_cores(monkeypatch):
    """The settings of threads are the process's, which other tests share."""
    monkeypatch.setattr(cli, "share_cores", lambda: None)
