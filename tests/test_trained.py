"""The engine `model`: probabilities as predict.py has them, objects of one and of several classes, parted necks."""

import argparse
from pathlib import Path

import cv2
import numpy as np
import pytest
from tiny_runs import blobs, write_checkpoint

import cli
from annotation.trained import known_pixels, load_trained, split_necks
from annotation.trained_options import TrainedOptions, add_trained_args, options_from
from checkpoint import Geometry
from image_io import ImageError, write_image
from pairing import Pair
from predictor import Picture, ReadOptions, TileOptions, plan_picture, predict_picture


def load(tmp_path, *, options=None, **changes):
    path = tmp_path / "net.pth"
    write_checkpoint(path, **changes)
    return load_trained(TrainedOptions(path, **({"backend": "torch"} | (options or {}))), "cpu")


def through_files(trained, image, tmp_path):
    """What predict.py computes of the same pixels in a file."""
    write_image(tmp_path / "image.png", image)
    tiles = TileOptions.from_config(trained.config)
    with Picture(Pair("image", tmp_path / "image.png"), [trained.config], ReadOptions()) as picture:
        plan = plan_picture(picture, tiles)
        return np.concatenate([b for _, b in predict_picture(picture, trained.forward, plan, tiles)], axis=1)


@pytest.mark.parametrize("geometry", [Geometry("crops", (64, 64), 64, 16, 4), Geometry("resize", (64, 64))], ids=str)
@pytest.mark.parametrize("classes", [1, 4])
def test_probabilities_are_those_of_predict(tmp_path, classes, geometry):
    trained = load(tmp_path, classes=classes, geometry=geometry)
    image = blobs(90, 150)
    assert np.array_equal(trained.predict(image), through_files(trained, image, tmp_path))


@pytest.mark.parametrize("classes", [1, 4])
def test_objects_are_pieces_of_one_class_with_their_mean_probability(tmp_path, classes):
    trained = load(tmp_path, classes=classes)
    image = blobs(90, 120, seed=3)
    probs = trained.predict(image)
    found = trained.segment(image)
    pred = (probs[0] >= 0.5).astype(int) if classes == 1 else probs.argmax(axis=0)
    assert np.array_equal(found.labels > 0, pred > 0) and len(found) > 1
    expected = sum(
        cv2.connectedComponents((pred == c).astype(np.uint8), connectivity=4)[0] - 1 for c in range(1, pred.max() + 1)
    )
    assert len(found) == expected and set(found.engines) == {"model"}
    for number in range(1, len(found) + 1):
        inside = found.labels == number
        (own,) = set(pred[inside].tolist())
        assert found.scores[number - 1] == pytest.approx(probs[0 if classes == 1 else own][inside].mean(), abs=1e-5)


def test_only_the_classes_asked_for_are_objects(tmp_path):
    image = blobs(90, 120, seed=3)
    pred = load(tmp_path, classes=4).predict(image).argmax(axis=0)
    for names, wanted in ((("two",), [2]), (("three", "one"), [1, 3])):
        found = load(tmp_path, classes=4, options={"classes": names}).segment(image)
        assert np.array_equal(found.labels > 0, np.isin(pred, wanted))
    with pytest.raises(cli.UsageError, match="four: the network knows background, one, two, three"):
        load(tmp_path, classes=4, options={"classes": ("four",)})
    with pytest.raises(cli.UsageError, match="say which are objects with --model-classes"):
        load(tmp_path, classes=4, labels=(0, 10, 20, 30))


def test_the_threshold_moves_the_outline(tmp_path):
    image = blobs(90, 120, seed=3)
    low, high = (np.count_nonzero(load(tmp_path, options={"threshold": t}).segment(image).labels) for t in (0.3, 0.7))
    assert low > high
    stored = load(tmp_path, options={"threshold": "best"}, thresholds={"default": 0.5, "best": 0.7}).segment(image)
    assert np.count_nonzero(stored.labels) == high
    with pytest.raises(cli.UsageError, match="is for one class"):
        load(tmp_path, classes=4, options={"threshold": 0.7})


def test_a_cache_spares_the_network(tmp_path):
    trained, image, cache = load(tmp_path), blobs(90, 120, seed=3), {}
    calls = []
    forward = trained.forward
    trained.forward = lambda batch: calls.append(1) or forward(batch)
    first = trained.segment(image, cache)
    seen = len(calls)
    other = trained.with_options(TrainedOptions(Path("ignored"), threshold=0.7)).segment(image, cache)
    assert len(calls) == seen > 0 and np.count_nonzero(other.labels) < np.count_nonzero(first.labels)
    assert np.array_equal(other.labels, load(tmp_path, options={"threshold": 0.7}).segment(image).labels)


def test_unknown_pixels_are_background(tmp_path):
    trained = load(tmp_path, dtype="float32")
    image = blobs(70, 80).astype(np.float32)
    image[10:50, 10:60] = np.nan
    found = trained.segment(image)
    assert not found.labels[10:50, 10:60].any() and found.labels.any()
    everything = trained.segment(np.full((20, 30, 3), np.nan, np.float32))
    assert len(everything) == 0 and everything.labels.shape == (20, 30)
    assert known_pixels(image[:5])[1] is None


def test_a_reduced_network_sees_the_image_smaller_and_answers_in_its_own_pixels(tmp_path):
    trained = load(tmp_path, geometry=Geometry("crops", (64, 64), 64, 16, 4, reduction=2.0))
    image = blobs(91, 121)
    tiles = []
    for network in (trained, load(tmp_path)):
        forward = network.forward
        network.forward = lambda batch, forward=forward: tiles.append(len(batch)) or forward(batch)
        assert network.segment(image).labels.shape == (91, 121)
    assert tiles[0] == 1 and sum(tiles) == 1 + 2 * 3


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (17, 3)])
def test_small_images(tmp_path, size):
    assert load(tmp_path).segment(blobs(*size)).labels.shape == size


def test_images_that_do_not_fit(tmp_path):
    trained = load(tmp_path)
    with pytest.raises(ImageError, match=r"\(20, 20, 1\), .*takes \(H, W, 3\): red green blue"):
        trained.segment(np.zeros((20, 20, 1), np.uint8))
    for _ in range(2):
        trained.segment(np.zeros((20, 20, 3), np.uint16))
    assert trained.notes == [f"{tmp_path / 'net.pth'} was trained on uint8, images are uint16"]
    with pytest.raises(ImageError, match="also takes the channels nir"):
        load(tmp_path, add_dirs=("nir",))
    with pytest.raises(FileNotFoundError):
        load_trained(TrainedOptions(tmp_path / "none.pth"), "cpu")


def dumbbell(gap, radius=(14, 10)):
    """Two discs whose centres lie `gap` apart, as one object, and their truth."""
    mask = np.zeros((50, 90), np.uint8)
    cv2.circle(mask, (25, 25), radius[0], 1, -1)
    cv2.circle(mask, (25 + gap, 25), radius[1], 1, -1)
    return mask.astype(np.int32)


def test_necks_are_parted_and_discs_are_not():
    labels = dumbbell(20)
    parts = split_necks(labels, 0.1)
    assert np.array_equal(parts > 0, labels > 0) and parts.max() == 2
    assert parts[25, 15] != parts[25, 50]
    assert split_necks(dumbbell(0), 0.1).max() == 1
    assert split_necks(dumbbell(8), 0.1).max() == 1  # hardly a waist
    assert split_necks(dumbbell(20), 0.9).max() == 1  # the neck is not that narrow
    ellipse = np.zeros((60, 90), np.int32)
    cv2.ellipse(ellipse, (45, 30), (40, 12), 20, 0, 360, 1, -1)
    assert split_necks(ellipse, 0.1).max() == 1
    assert split_necks(np.zeros((5, 5), np.int32), 0.1).max() == 0


def test_several_objects_keep_their_pixels_and_get_numbers_without_gaps():
    labels = np.zeros((110, 200), np.int32)
    labels[:50, :90] = dumbbell(20)
    labels[:50, 100:190] = dumbbell(0) * 2
    labels[55:105, :90] = dumbbell(22) * 3
    parts = split_necks(labels, 0.1)
    assert np.array_equal(parts > 0, labels > 0)
    assert sorted(np.unique(parts)) == [0, 1, 2, 3, 4, 5]
    for number in range(1, 6):
        assert len(np.unique(labels[parts == number])) == 1


def test_the_network_engine_parts_necks_when_asked(tmp_path):
    probs = np.where(dumbbell(20) > 0, 0.9, 0.1).astype(np.float32)[None]
    whole, parted = (
        load(tmp_path, options={"split": split, "split_depth": 0.1}).decide(probs) for split in (False, True)
    )
    assert (len(whole), len(parted)) == (1, 2)
    assert np.allclose(parted.scores, 0.9) and np.array_equal(whole.labels > 0, parted.labels > 0)


def test_flags(tmp_path):
    parser = argparse.ArgumentParser()
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--check-path", type=Path)
    group.add_argument("--check-dir", type=Path)
    cli.add_threshold_args(parser)
    cli.add_backend_args(parser)
    add_trained_args(parser)
    assert options_from(parser.parse_args([])) is None
    words = ["--check-path", "a.pth", "--model-split", "--model-classes", "one", "two"]
    options = options_from(parser.parse_args(words))
    assert options == TrainedOptions(Path("a.pth"), 0.5, ("one", "two"), True)
    with pytest.raises(FileNotFoundError):
        options_from(parser.parse_args(["--check-dir", str(tmp_path)]))
