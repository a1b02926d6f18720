import json
import threading

import cv2
import numpy as np
import pytest

import image_io
from dataset_utils import make_sample
from dataset_utils.make_sample import SampleSettings

SMALL = ["--count", "3", "--val-count", "2", "--size", "48", "64"]


def draw(number=0, **settings):
    return make_sample.draw_scene(SampleSettings(**settings), np.random.default_rng([7, number]))


def read_tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def iou(pred, truth):
    return float((pred & truth).sum() / (pred | truth).sum())


def test_brightness_does_not_solve_it_and_background_is_a_good_part():
    scores, covered = [], []
    for number in range(4):
        scene = draw(number)
        truth = scene.mask > 0
        grey = cv2.cvtColor(scene.image, cv2.COLOR_RGB2GRAY)
        bright = cv2.threshold(grey, 0, 1, cv2.THRESH_OTSU)[1] > 0
        scores.append([iou(bright, truth), iou(~bright, truth)])
        covered.append(truth.mean())
    assert np.abs(np.array(covered) - 0.5).max() < 0.03
    assert np.mean(scores, axis=0).max() < 0.6


@pytest.mark.parametrize("density", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("size", [(16, 16), (100, 160)])
def test_density_is_the_covered_share(density, size):
    scene = draw(size=size, density=density)
    assert scene.image.shape == (*size, 3)
    assert abs((scene.mask > 0).mean() - density) < 0.05 + 6 / scene.mask.size


def test_labels_number_the_visible_part_of_each_bubble():
    scene = draw(size=(128, 128), classes=3)
    assert scene.labels.dtype == np.uint16 and scene.mask.dtype == np.uint8
    assert np.array_equal(scene.labels > 0, scene.mask > 0)
    assert np.unique(scene.labels).tolist() == list(range(scene.labels.max() + 1))
    for number in range(1, scene.labels.max() + 1):
        assert len(np.unique(scene.mask[scene.labels == number])) == 1, "a bubble has one class"


def test_near_bubbles_cover_far_ones():
    settings = SampleSettings(size=(128, 128))
    bubbles = make_sample.place_bubbles(settings, np.random.default_rng(1))
    labels = make_sample.draw_labels(bubbles, settings.size)
    hidden = [(labels[b.window][b.rho < 1] != number).sum() for number, b in enumerate(bubbles, start=1)]
    shares = [gone / (b.rho < 1).sum() for gone, b in zip(hidden, bubbles, strict=True)]
    assert max(shares) <= 1 - make_sample.MIN_VISIBLE and sum(gone > 0 for gone in hidden) >= 3


def test_radii_keep_their_range_and_small_ones_prevail():
    settings = SampleSettings(size=(200, 200), radius=(4, 20))
    bubbles = make_sample.place_bubbles(settings, np.random.default_rng(2))
    radii = np.array([bubble.radius for bubble in bubbles])
    assert 4 <= radii.min() and radii.max() <= 20
    assert radii.max() > 12 and np.median(radii) < 8
    for bubble in (b for b in bubbles if b.rho.min() < 0.1 and 0 not in (b.window[0].start, b.window[1].start)):
        assert (bubble.rho < 1).sum() < np.pi * (1.15 * bubble.radius) ** 2


def test_classes_are_told_apart_by_colour():
    masks, images = zip(*[(scene.mask, scene.image) for scene in (draw(n, classes=4) for n in range(2))], strict=True)
    mask, pixels = np.stack(masks), np.stack(images).astype(float)
    assert set(np.unique(mask)) == {0, 1, 2, 3, 4}
    blueness = pixels[..., 2] - pixels[..., 0]
    assert np.median(blueness[mask == 4]) > 20 > abs(np.median(blueness[mask == 1]))
    brightness = [np.median(pixels[mask == number]) for number in (1, 2, 3)]
    assert brightness[2] > 1.3 * max(brightness[:2])


@pytest.mark.parametrize(("bands", "bits"), [(1, 8), (2, 16), (3, 16), (5, 8), (5, 16)])
def test_bands_and_bits(bands, bits, tmp_path):
    make_sample.make_sample(tmp_path / "s", SampleSettings(count=1, val_count=0, size=(96, 80), bands=bands, bits=bits))
    (path,) = (tmp_path / "s" / "train" / "images").iterdir()
    assert path.suffix == (".png" if bands in (1, 3) else ".tif")
    image = image_io.read_image(path)
    assert image.shape == (96, 80, bands) and image.dtype == f"uint{bits}"
    if bits == 16:
        assert 30_000 < image.max() <= 40_000
    truth = image_io.read_mask(tmp_path / "s" / "train" / "gt" / f"{path.stem}.png") == 255
    ratio = [image[truth, band].mean() / image[~truth, band].mean() for band in range(bands)]
    for infrared in ratio[1:] if bands == 2 else ratio[3:]:
        assert infrared > 1.1 * ratio[0], "infrared says more about the material than grey or red"


def test_extra_channels_carry_information(tmp_path):
    make_sample.main(["-o", str(tmp_path / "s"), *SMALL, "--extra", "nir", "kv"])
    for folder in ("nir", "kv"):
        ratio = []
        for stem, path in image_io.list_images(tmp_path / "s" / "train" / folder).items():
            image = image_io.read_image(path)
            assert image.shape == (48, 64, 1) and image.dtype == np.uint8
            truth = image_io.read_mask(tmp_path / "s" / "train" / "gt" / f"{stem}.png") > 0
            ratio.append(image[truth].mean() / image[~truth].mean())
        assert np.mean(ratio) > 1.2


def test_layout_and_equal_bytes_for_equal_settings(tmp_path, capsys):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        make_sample.main(["-o", str(tmp_path / name), *SMALL, "--seed", seed])
    a, b, c = (read_tree(tmp_path / name) for name in "abc")
    stems = [f"train/{{}}/train_000{n}.png" for n in range(3)] + [f"val/{{}}/val_000{n}.png" for n in range(2)]
    assert set(a) == {stem.format(f) for stem in stems for f in ("images", "gt", "labels")} | {"sample.json"}
    assert a == b
    assert len({content for name, content in a.items() if "/images/" in name}) == 5, "every picture is another one"
    assert all(a[name] != c[name] for name in a)
    assert capsys.readouterr().out.splitlines()[0].endswith("a: 3 train and 2 val images, 48 x 64, drawn")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"], "nothing else is left"


def test_more_pictures_do_not_change_the_first(tmp_path):
    make_sample.main(["-o", str(tmp_path / "few"), *SMALL])
    make_sample.main(["-o", str(tmp_path / "more"), *SMALL, "--count", "4"])
    few, more = read_tree(tmp_path / "few"), read_tree(tmp_path / "more")
    assert len(more) == len(few) + 3
    assert all(more[name] == content for name, content in few.items() if name != "sample.json")


def test_a_sample_that_is_there_is_left_alone(tmp_path, capsys):
    out = tmp_path / "Пузыри и пена"
    make_sample.main(["-o", str(out), *SMALL])
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    make_sample.main(["-o", str(out), *SMALL])
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert "already there" in capsys.readouterr().out


def test_empty_folder_is_used(tmp_path):
    (tmp_path / "out").mkdir()
    make_sample.main(["-o", str(tmp_path / "out"), *SMALL])
    assert (tmp_path / "out" / "val" / "gt" / "val_0001.png").exists()


def refused(out, *flags):
    """The message of a run that must end with exit code 1, without a change to the folder."""
    before = read_tree(out) if out.is_dir() else out.read_bytes()
    with pytest.raises(SystemExit) as stop:
        make_sample.main(["-o", str(out), *SMALL, *flags])
    assert before == (read_tree(out) if out.is_dir() else out.read_bytes())
    return str(stop.value)  # sys.exit(text) prints the text and exits 1


def test_other_files_are_never_touched(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").write_bytes(b"precious")
    assert "mine holds other files; a sample is drawn into a new or empty folder only" in refused(tmp_path / "mine")
    (tmp_path / "file").write_text("precious")
    assert "file is a file, expected a folder" in refused(tmp_path / "file")
    make_sample.main(["-o", str(tmp_path / "s"), *SMALL])
    message = refused(tmp_path / "s", "--seed", "5", "--density", "0.4")
    assert "s is a sample with other settings (density 0.5 there, 0.4 asked; seed 0 there, 5 asked)" in message
    (tmp_path / "s" / "val" / "gt" / "val_0001.png").unlink()
    message = refused(tmp_path / "s")
    assert "1 of 16 files of the sample" in message and "first: val/gt/val_0001.png" in message


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    drawn, lock = [], threading.Lock()
    original = make_sample.draw_scene

    def failing(settings, rng):
        with lock:
            drawn.append(1)
            if len(drawn) > limit:
                raise OSError(28, "No space left on device")
        return original(settings, rng)

    monkeypatch.setattr(make_sample, "draw_scene", failing)
    limit = 2
    with pytest.raises(SystemExit, match="No space left"):
        make_sample.main(["-o", str(tmp_path / "s"), *SMALL])
    assert not (tmp_path / "s").exists(), "nothing half-written under the name that was asked for"
    (tmp_path / ".s.partial" / "train" / "images" / ".0123.tmp").write_bytes(b"of a killed run")
    drawn.clear()
    limit = 99
    make_sample.main(["-o", str(tmp_path / "s"), *SMALL])
    assert len(drawn) == 3, "what was drawn is kept"
    make_sample.main(["-o", str(tmp_path / "whole"), *SMALL])
    assert read_tree(tmp_path / "s") == read_tree(tmp_path / "whole")
    assert not (tmp_path / ".s.partial").exists()


def test_rest_of_a_run_with_other_settings_is_redone(tmp_path):
    partial = tmp_path / ".s.partial"
    (partial / "train" / "images").mkdir(parents=True)
    (partial / "train" / "images" / "train_0000.png").write_bytes(b"old")
    with pytest.raises(SystemExit, match=r"\.s\.partial holds other files"):
        make_sample.main(["-o", str(tmp_path / "s"), *SMALL])
    (partial / "sample.json").write_text(json.dumps({"format": 1, "seed": 9}))
    make_sample.main(["-o", str(tmp_path / "s"), *SMALL])
    assert image_io.read_image(tmp_path / "s" / "train" / "images" / "train_0000.png").shape == (48, 64, 3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--size", "8"], "size is 8, expected 16 to 16384"),
        (["--size", "64", "64", "3"], "--size: 3 numbers, expected height and width or one for both"),
        (["--count", "0"], "count is 0, expected 1 to"),
        (["--density", "0.95"], "density is 0.95, expected 0.05 to 0.8"),
        (["--density", "nan"], "density is nan, expected 0.05 to 0.8"),
        (["--classes", "9"], "classes is 9, expected 1 to 8"),
        (["--bands", "0"], "bands is 0, expected 1 to"),
        (["--bits", "12"], "--bits: invalid choice"),
        (["--radius", "9", "5"], "radius is 9 to 5, expected 2 <= smallest <= largest <= 24"),
        (["--radius", "5", "90"], "radius is 5 to 90"),
        (["--extra", "gt"], "extra folder 'gt'"),
        (["--extra", "../nir"], "extra folder '../nir'"),
        (["--extra", "nir", "NIR"], "extra folders nir NIR: expected each name once"),
        (["--cou", "3"], "unrecognized arguments"),
    ],
)
def test_bad_flags_are_named_before_anything_is_written(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        make_sample.main(["-o", str(tmp_path / "s"), *SMALL, *flags])
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_every_flag_has_help():
    assert all(action.help for action in make_sample.build_parser()._actions)
