"""Contact sheets show every step on the training samples, and train.py writes them and goes on."""

import cv2
import numpy as np
import pytest

import train
from augmentations import LOCAL, PRESETS, Augmentation
from augmented_sheets import DRAWS, write_sheets
from checkpoint import Geometry, ModelConfig
from classes import ClassMap
from dataset import EpochSampler, Slot, TrainingBatches, TrainingSet
from image_io import read_image, write_image, write_mask
from mixing import Mixing
from pairing import Pair


def write_pairs(folder, channels=3, dtype=np.uint8):
    pairs = []
    for number in range(3):
        mask = np.zeros((64, 64), np.uint8)
        cv2.circle(mask, (20 + 8 * number, 30), 10, 255, -1)
        image = np.random.default_rng(number).integers(60, 160, (64, 64, channels)).astype(dtype)
        image[mask > 0] += 60
        pairs.append(Pair(str(number), folder / "images" / f"{number}.tif", folder / "gt" / f"{number}.png"))
        write_image(pairs[-1].image, image * (100 if dtype == np.uint16 else 1))
        write_mask(folder / "gt" / f"{number}.png", mask)
    return pairs


def make_set(folder, preset, kind="resize", channels=3, dtype=np.uint8, mixing=None):
    config = ModelConfig(
        architecture="unet",
        encoder="resnet18",
        labels=(255,),
        class_names=("background", "255"),
        channels=tuple(map(str, range(channels))),
        mean=(110.0,) * channels,
        std=(40.0,) * channels,
        geometry=Geometry(kind, (48, 48), tile=96),
        dtype=np.dtype(dtype).name,
    )
    top = 255 if dtype == np.uint8 else 30000
    augmentation = Augmentation(preset, rgb=channels == 3, value_range=(0, top))
    classes = ClassMap((255,), config.class_names)
    return TrainingSet(write_pairs(folder, channels, dtype), classes, config, augmentation, mixing)


@pytest.mark.parametrize("kind", ["resize", "crops"])
def test_a_sheet_for_every_step_and_one_of_all(tmp_path, kind):
    mixing = Mixing("cutmix", 0.1, [(1,)] * 3, together=False)
    data = make_set(tmp_path, "hard", kind, mixing=mixing)
    paths = write_sheets(tmp_path / "augmented", data, [Slot(0, 5), Slot(2, 6)])
    names = [path.stem[3:] for path in paths]
    assert names[:3] == ["turn", "affine", "elastic"] and names[-3:] == ["haze", "cutmix", "all"]
    assert len(set(paths)) == len(paths) and sorted(paths) == paths
    steps = sum(len(chance.steps) for chance in LOCAL["hard"])
    assert len(paths) == 3 + steps + 2
    for path in paths:
        sheet = read_image(path)
        assert sheet.shape == (26 + 2 * 244, (1 + DRAWS) * 244, 3)
        tiles = [sheet[26 : 26 + 240, 244 * column : 244 * column + 240].astype(int) for column in range(1 + DRAWS)]
        changes = [np.abs(tile - tiles[0]).mean() for tile in tiles[1:]]
        assert max(changes) > 1, path.stem
    values = {path.stem[3:]: read_image(path) for path in paths}
    first = [sheet[27:260, :230] for sheet in values.values()]
    assert all(np.abs(tile.astype(int) - first[0]).mean() < 4 for tile in first), "the same sample, as it is"


def test_other_draws_augment_the_same_crop(tmp_path):
    data = make_set(tmp_path, "none", "crops")
    (_, one, _), (_, other, _), (_, third, _) = data[(Slot(0, 5), Slot(0, 5, draw=3), Slot(0, 8))]
    assert np.array_equal(one, other) and not np.array_equal(one, third)
    hard = make_set(tmp_path, "hard", "crops")
    (_, one, _), (_, other, _) = hard[(Slot(0, 5), Slot(0, 5, draw=3))]
    assert not np.array_equal(one, other)


def test_sheets_of_other_depths_and_channels_leave_out_what_they_do_not_get(tmp_path):
    data = make_set(tmp_path, "histology", channels=5, dtype=np.uint16)
    names = [path.stem[3:] for path in write_sheets(tmp_path / "augmented", data, [Slot(1, 2)])]
    assert "stain_shift" not in names and {"turn", "pca_shift", "gamma", "sensor_noise", "all"} <= set(names)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_steps_to_show(tmp_path, preset):
    steps = Augmentation(preset, rgb=True, value_range=(0, 255)).single_steps(3)
    assert bool(steps) == (preset != "none")
    assert all(name.isidentifier() for name, _ in steps)


def test_the_samples_are_those_that_training_begins_with(tmp_path, monkeypatch):
    seen, data = [], make_set(tmp_path, "hard")
    monkeypatch.setattr("augmented_sheets.write_sheets", lambda folder, data, slots: seen.extend(slots) or [])
    sampler = EpochSampler([(1,)] * 3, crops=2, quota=0.5, seed=4)
    batches = TrainingBatches(data, sampler, batch=2, workers=0, pin=False)
    train.dump_augmented(batches, tmp_path, 2)
    batches.set_epoch(0)  # fit counts from 0
    assert seen == [item[0] for item in sampler][:2]


def test_training_writes_them_and_goes_on(tmp_path, tiny_dataset, capsys):
    words = [
        "-d",
        tiny_dataset,
        "-m",
        "plain-unet",
        "--encoder",
        "plain-8",
        "--image-size",
        32,
        "-e",
        1,
        "-w",
        0,
        "-b",
        4,
    ]
    more = [
        "--dump-augmented",
        2,
        "--mix",
        "copy-paste",
        "-log",
        tmp_path,
        "--exp-name",
        "run",
        "--ignore-holes",
        "--cpu",
    ]
    train.main([*map(str, words), "-a", "safe", *map(str, more)])
    found = sorted(path.name for path in (tmp_path / "run" / "augmented").iterdir())
    assert found == ["01_turn.jpg", "02_copy-paste.jpg", "03_all.jpg"]
    said = capsys.readouterr().out
    assert "3 sheets of 2 augmented samples" in said and "best epoch 1" in said
