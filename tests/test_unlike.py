"""Pictures unlike those of the training: type, brightness, nothing in them; each kind once, and no false alarm."""

import cv2
import numpy as np
import pytest
from discs import write_dataset
from tiny_runs import blobs, write_checkpoint

import predict
import train
import unlike
import validate
from annotation.trained import TrainedOptions, load_trained
from checkpoint import config_from_dict, config_to_dict, load_checkpoint

MEANS = ((100.0, 90.0, 80.0), (140.0, 130.0, 120.0))


@pytest.fixture
def config(tmp_path):
    return write_checkpoint(tmp_path / "net.pth", image_means=MEANS)  # std 40, mean 120


def warnings(text):
    return [line for line in text.splitlines() if line.startswith("warning: ")]


# ---- moments ----


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_moments_are_those_of_the_pixels(dtype):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 200, (160, 200, 3)).astype(dtype)
    seen = unlike.Moments()
    for top in range(0, 160, 40):
        for left in range(0, 200, 50):
            seen.add(image[top : top + 40, left : left + 50])
    assert seen.total / seen.count == pytest.approx(image.mean(axis=(0, 1)), abs=200 / np.sqrt(12) * 4 / 40)
    assert (seen.low < seen.high).all()


def test_one_other_pixel_makes_a_picture_that_is_not_constant():
    for place in [(0, 0), (3, 5), (63, 63)]:
        image = np.full((64, 64, 1), 7, np.uint8)
        image[place] = 8
        seen = unlike.Moments()
        for top in (0, 32):
            seen.add(image[top : top + 32])
        assert seen.low[0] == 7 and seen.high[0] == 8


# ---- rules ----


def test_inside_the_range_and_a_deviation_beyond_nothing_is_said(config):
    for mean in ([100, 90, 80], [140, 130, 120], [61, 90, 80], [100, 90, 159]):
        assert unlike.intensity_findings(config, np.array(mean), constant=False) == []


def test_further_out_the_channel_and_both_numbers_are_named(config):
    (text,) = unlike.intensity_findings(config, np.array([100, 90, 199.0]), constant=False)
    for part in ("mean of blue is 199", "training images are 80 to 120", "vary by 40"):
        assert part in text
    assert unlike.intensity_findings(config, np.array([58.0, 90, 80]), constant=False)


def test_of_an_older_file_only_the_mean_of_all_is_known(tmp_path):
    old = write_checkpoint(tmp_path / "old.pth")
    assert unlike.intensity_findings(old, np.array([1.0, 120, 239]), constant=False) == []
    old = write_checkpoint(tmp_path / "old.pth", mean=(50.0,) * 3)
    (text,) = unlike.intensity_findings(old, np.array([50.0, 50, 171]), constant=False)
    assert "mean of blue is 171, that of the training images is 50" in text


def test_another_number_of_channels_is_no_intensity(config):
    assert unlike.intensity_findings(config, np.array([5.0]), constant=False) == []


def test_the_range_of_means():
    assert unlike.mean_range([[1, 8], [3, 2], [2, 5]]) == ((1, 2), (3, 8))


def test_the_description_keeps_the_means(config):
    values = config_to_dict(config)
    assert config_from_dict(values).image_means == MEANS
    del values["image_means"]
    assert config_from_dict(values).image_means is None


def test_each_kind_is_told_once_and_counted():
    told, said = unlike.Told(), []
    for name, text in [("a", "mean 1.5"), ("b", "mean 22"), ("a", "empty"), ("c", "mean 3")]:
        told.tell(said.append, name, text)
    assert said == ["warning: a: mean 1.5", "warning: a: empty"]
    assert told.summary() == ["warning: 3 pictures are like a: mean 1.5"]


# ---- commands ----


def write(folder, **images):
    folder.mkdir()
    for name, image in images.items():
        cv2.imwrite(str(folder / f"{name}.png"), image)
    return folder


def test_predict_says_each_kind_once(tmp_path, config, capsys):
    bright = np.clip(blobs(90, 80) // 8 + 220, 0, 255).astype(np.uint8)
    usual = (blobs(90, 80) // 2 + 50).astype(np.uint8)
    deep = np.full((70, 70, 3), 30000, np.uint16)
    pictures = {"a": bright, "b": usual, "c": bright, "d": bright[:64], "e": np.full((50, 50, 3), 110, np.uint8)}
    folder = write(tmp_path / "in", **pictures, f=deep, g=deep)
    predict.main(["-c", str(tmp_path / "net.pth"), "-i", str(folder), "-o", str(tmp_path / "out"), "--cpu"])
    lines = warnings(capsys.readouterr().out)
    assert [line.split(":")[1].strip() for line in lines[:3]] == ["a", "e", "f"]
    assert "expect worse results" in lines[0] and "every pixel is 110 110 110" in lines[1]
    assert "its pixels are uint16, the network was trained on uint8" in lines[2]
    assert [line.split(":")[1].strip() for line in lines[3:]] == [
        "3 pictures are like a",
        "2 pictures are like f",
    ]


def test_validate_counts_them(tmp_path, config, capsys):
    data = write_dataset(tmp_path / "data", train=1, val=4)
    images = sorted((data / "val" / "images").iterdir())
    for path in images[:2]:
        image = cv2.imread(str(path))
        cv2.imwrite(str(path), np.clip(image.astype(int) // 16 + 239, 0, 255).astype(np.uint8))
    words = ["-d", data / "val", "-c", tmp_path / "net.pth", "-o", tmp_path / "out", "--cpu"]
    validate.main([str(word) for word in words])
    found = [line for line in warnings(capsys.readouterr().out) if "the mean of" in line]
    assert len(found) == 1 and f"2 of 4 images, such as {images[0].stem}: the mean of" in found[0]


def test_the_engine_of_annotations_says_it_once(tmp_path, config):
    trained = load_trained(TrainedOptions(tmp_path / "net.pth"), "cpu")
    for value in (1, 2):
        trained.segment(np.clip(blobs(64, 64) // 16 + 230 + value, 0, 255).astype(np.uint8))
    assert len(trained.notes) == 1 and "net.pth was trained on" in trained.notes[0]


@pytest.mark.parametrize("crops", [0, 2])
def test_no_alarm_on_the_training_images(tmp_path, crops, capsys):
    data = write_dataset(tmp_path / "data", train=4, val=2)
    for number, path in enumerate(sorted((data / "train" / "images").iterdir())):  # as unlike as can be
        cv2.imwrite(str(path), (cv2.imread(str(path)) // 4 + 60 * number).astype(np.uint8))
    words = ["-d", data, "-m", "plain-unet", "--encoder", "plain-8", "--image-size", 32, "--crops", crops, "-e", 1]
    train.main([str(word) for word in [*words, "-log", tmp_path, "--exp-name", "run", "--cpu", "-w", 0, "-a", "none"]])
    low, high = load_checkpoint(tmp_path / "run" / "run.pth")[0].image_means
    assert all(a + 100 < b for a, b in zip(low, high, strict=True))
    capsys.readouterr()
    validate.main([str(word) for word in ["-d", data / "train", "-cd", tmp_path / "run", "--cpu"]])
    predict.main([str(word) for word in ["-cd", tmp_path / "run", "-i", data / "train" / "images", "--cpu"]])
    assert warnings(capsys.readouterr().out) == []
