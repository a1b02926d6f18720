"""Engines share their networks, keep what does not change, and treat the windows of a large picture alike."""

import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from annotation import detectors, engines
from annotation.boxes import Boxes
from annotation.detector_options import DetectorOptions
from annotation.engine_options import EngineOptions
from annotation.engines import Engines
from annotation.merge_options import MergeOptions
from annotation.sam_engine import Sam
from annotation.sam_options import SamOptions
from annotation.slicing import SliceOptions
from annotation.trained_options import TrainedOptions
from plots import to_display


class Looks:
    """A detector that notes the pictures it is shown and finds one box."""

    name, names, side, free, batch, note = "looks", ("object",), 64, True, 1, ""

    def __init__(self):
        self.seen = []

    def detect(self, images, side=None):
        self.seen += [image.copy() for image in images]
        return [Boxes(np.array([[5, 5, 15, 15]]), np.array([0.9]), np.array([0])) for _ in images]

    def changed(self, options):
        return self


@pytest.fixture
def looks(monkeypatch):
    detector = Looks()
    monkeypatch.setattr(detectors, "load_detector", lambda options, device: detector)
    return detector


def yolo(**more):
    return EngineOptions(("yolo",), detector=DetectorOptions(Path("x.onnx")), **more)


def test_windows_of_a_deep_picture_are_stretched_alike(looks):
    rng = np.random.default_rng(0)
    picture = rng.normal(1000, 10, (60, 120, 1))
    picture[:, :60] += 20_000 * (rng.random((60, 60, 1)) > 0.5)
    picture = picture.clip(0, 65_535).astype(np.uint16)
    fixed = Engines(yolo(slices=SliceOptions(sizes=(0.0,)))).fixed(picture)
    fixed.changed(yolo(slices=SliceOptions(sizes=(0.0,)))).find(picture[:, 60:])
    assert looks.seen[0].std() < 2  # the dark window stays dark
    np.testing.assert_array_equal(looks.seen[0], detectors.to_rgb8(picture[:, 60:], detectors.display_range(picture)))


@pytest.mark.parametrize("deep", [False, True])
def test_windows_are_shown_to_sam_alike(deep):
    picture = np.full((60, 120, 3), 9, np.uint8)
    picture[:, :60] = 200
    picture[::2, 60:] = 12  # hardly to be seen, unless the window is stretched by itself
    picture = picture * np.uint16(200) if deep else picture
    whole = Engines(EngineOptions(("watershed",)))
    whole._sam, seen = Sam(None, SamOptions(cache_gb=0)), []
    fixed = whole.fixed(picture).changed(whole.options)
    fixed._sam._encode = lambda shown, window: seen.append(shown)
    fixed._sam.encode(picture[:, 60:])
    np.testing.assert_array_equal(seen[0], to_display(picture)[:, 60:])
    assert not np.array_equal(seen[0], to_display(picture[:, 60:]))


def test_boxes_are_kept_while_the_settings_of_the_detector_stay(looks):
    image, cache = np.zeros((40, 40, 3), np.uint8), {}
    loaded = Engines(yolo())
    for options in (yolo(), yolo(merge=MergeOptions("vote")), yolo(sam=SamOptions(points=True))):
        loaded.changed(options).find(image, cache)
    prompted = loaded.changed(yolo())
    assert prompted._boxes("yolo", image, cache).tolist() == [[5, 5, 15, 15]]
    assert len(looks.seen) == 1
    loaded.changed(replace(yolo(), detector=DetectorOptions(Path("x.onnx"), confidence=0.9))).find(image, cache)
    assert len(looks.seen) == 2


def test_what_is_kept_does_not_grow_with_the_settings_that_are_tried(looks):
    image, cache = np.zeros((40, 40, 3), np.uint8), {}
    loaded = Engines(yolo())
    for number in range(20):
        options = replace(yolo(), detector=DetectorOptions(Path("x.onnx"), confidence=number / 20))
        loaded.changed(options).find(image, cache)
    assert sum(len(kept) for kept in cache.values()) == 4  # boxes and objects, of the first settings and the last
    for number, more in ((0, 0), (19, 0), (10, 1)):
        options = replace(yolo(), detector=DetectorOptions(Path("x.onnx"), confidence=number / 20))
        loaded.changed(options).find(image, cache)
        assert len(looks.seen) == 20 + more


def test_a_trained_network_is_asked_once_for_all_its_thresholds(monkeypatch):
    asked = []

    class Network:
        note, notes = "", []

        def __init__(self, options):
            self.options = options

        def with_options(self, options):
            return Network(options)

        def segment(self, image, cache=None):
            if "probabilities" not in cache:
                cache["probabilities"] = asked.append(1) or True
            return engines.Instances(np.zeros(image.shape[:2], np.int32), np.zeros(0, np.float32), ())

    module = types.SimpleNamespace(load_trained=lambda options, device, megapixels=None: Network(options))
    monkeypatch.setitem(__import__("sys").modules, "annotation.trained", module)
    options = EngineOptions(("model",), trained=TrainedOptions(Path("x.pth")))
    loaded, cache = Engines(options), {}
    for threshold in (0.3, 0.5, 0.7):
        changed = replace(options, trained=TrainedOptions(Path("x.pth"), threshold))
        loaded.changed(changed).find(np.zeros((8, 8, 3), np.uint8), cache)
    assert len(asked) == 1


def test_the_digest_follows_the_content_of_weights(tmp_path):
    folder = tmp_path / "sam2"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"one")
    options = EngineOptions(("sam",), sam_path=folder)
    first = options.digest()
    (folder / "README.md").write_text("words")
    assert options.digest() == first
    (folder / "model.safetensors").write_bytes(b"two")  # as long as before
    assert options.digest() != first


def test_the_batch_does_not_change_the_digest(tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(b"weights")
    one, other, third = (
        EngineOptions(("model",), trained=TrainedOptions(path, **more))
        for more in ({}, {"batch": 3}, {"threshold": 0.4})
    )
    assert one.digest() == other.digest() != third.digest()
