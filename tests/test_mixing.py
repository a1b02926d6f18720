"""Mixed samples: pixels and labels come together from the parts, no class is made up, the seed alone decides."""

import numpy as np
import pytest

from augmentations import Augmentation
from checkpoint import Geometry, ModelConfig
from classes import ClassMap
from dataset import EpochSampler, Slot, TrainingBatches, TrainingSet
from image_io import write_image, write_mask
from mixing import KINDS, Mixing, copy_paste, cutmix, mosaic, whole_objects
from pairing import DatasetError, Pair

SIZE = (60, 80)


def part(number, mask=None):
    """A sample whose values name it and the place: number, row, column."""
    image = np.stack([np.full(SIZE, number), *np.indices(SIZE)], axis=2).astype(np.uint8)
    return image, np.full(SIZE, number, np.uint8) if mask is None else mask


def discs(number, centres, radius=5, value=1, ignored=None):
    rows, columns = np.indices(SIZE)
    mask = np.zeros(SIZE, np.uint8)
    for row, column in centres:
        mask[(rows - row) ** 2 + (columns - column) ** 2 <= radius**2] = value
    if ignored is not None:
        mask[ignored] = 255
    return part(number, mask)


def rng(seed):
    return np.random.default_rng(seed)


def test_mosaic_is_four_quarters_each_with_its_own_pixels_and_labels():
    parts = [part(number) for number in range(4)]
    parts[2][1][:, ::7] = 255
    kept = [(image.copy(), mask.copy()) for image, mask in parts]
    for seed in range(20):
        image, mask = mosaic(parts, rng(seed))
        for number in range(4):
            inside = image[..., 0] == number
            rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
            assert inside.sum() == len(rows) * len(columns), "a rectangle"
            assert 0.05 < inside.mean() < 0.5
            source = image[inside].astype(int)
            assert np.array_equal(mask[inside], parts[number][1][source[:, 1], source[:, 2]])
            assert set(np.diff(image[inside][:, 2].astype(int)).tolist()) <= {1, 1 - len(columns)}, "not rescaled"
        assert (image[0, 0, 0], image[-1, -1, 0]) != (image[-1, 0, 0], image[0, -1, 0])
    for (image, mask), (before, labels) in zip(parts, kept, strict=True):
        assert np.array_equal(image, before) and np.array_equal(mask, labels)


def test_cutmix_is_a_rectangle_at_its_own_place():
    first, second = part(0), part(1)
    second[1][10:20] = 255
    for seed in range(30):
        image, mask = cutmix(first, second, rng(seed))
        inside = image[..., 0] == 1
        rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
        assert inside.sum() == len(rows) * len(columns) and 0.08 < inside.mean() < 0.55
        assert np.array_equal(image[..., 1:], first[0][..., 1:]), "every pixel stays where it was"
        assert np.array_equal(mask, np.where(inside, second[1], 0))
    assert (first[0][..., 0] == 0).all() and not first[1].any()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_pasted_objects_equal_their_source_and_nothing_else_changes(dtype):
    onto = discs(0, [(10, 10), (40, 60)], value=2)
    source = discs(9, [(20, 50)])  # one object, which no other can cover
    onto, source = ((image.astype(dtype), mask) for image, mask in (onto, source))
    pasted = 0
    for seed in range(30):
        image, mask = copy_paste(onto, source, rng(seed))
        assert image.dtype == dtype
        new = mask == 1
        assert set(np.unique(mask)) <= {0, 1, 2}
        assert np.array_equal(image[~new], onto[0][~new]) and np.array_equal(mask[~new], onto[1][~new])
        core = (image[..., 0] == 9) & new
        origin = image[core][:, 1:].astype(int)
        assert (source[1][origin[:, 0], origin[:, 1]] == 1).all(), "pixels are of objects"
        assert new.sum() in (0, (source[1] == 1).sum()) and core.sum() >= 0.4 * new.sum()
        pasted += new.any()
    assert 8 <= pasted <= 22
    assert (onto[0][..., 0] == 0).all() and (source[0][..., 0] == 9).all()


def test_objects_are_whole_and_of_every_class():
    mask = np.zeros(SIZE, np.uint8)
    mask[5:10, 5:10] = 1
    mask[5:10, 10:15] = 2  # touches it, another class
    mask[20:26, 20:26] = 1
    mask[26:30, 26:30] = 1  # touches by a corner only: another object
    mask[0:8, 40:48] = 1  # cut by the border
    mask[40:50, 40:50] = 2
    mask[40:50, 50:52] = 255  # beside it
    mask[55, 5] = 1  # a crumb
    found = whole_objects(mask)
    boxes = sorted((box[0].start, box[1].start, int(inside.sum()), int(mask[box][inside][0])) for box, inside in found)
    assert boxes == [(5, 5, 25, 1), (5, 10, 25, 2), (20, 20, 36, 1), (26, 26, 16, 1)]


def test_nothing_is_pasted_where_the_target_is_ignored():
    hidden = np.zeros(SIZE, bool)
    hidden[:, 40:] = True
    onto, source = discs(0, [], ignored=hidden), discs(9, [(20, 20), (20, 50), (45, 30), (45, 60)])
    some = 0
    for seed in range(20):
        image, mask = copy_paste(onto, source, rng(seed))
        assert (mask[hidden] == 255).all() and np.array_equal(image[hidden], onto[0][hidden])
        some += (mask == 1).any()
    assert some >= 10


def test_a_source_without_objects_changes_nothing():
    onto = discs(0, [(10, 10)])
    image, mask = copy_paste(onto, part(9, np.zeros(SIZE, np.uint8)), rng(0))
    assert np.array_equal(image, onto[0]) and np.array_equal(mask, onto[1])


def test_an_unknown_way_lists_the_names():
    with pytest.raises(ValueError, match="'cutout'.*mosaic, cutmix, copy-paste"):
        Mixing("cutout", 0.5, [(1,)], together=False)


# ----------------------------------------------------------------------------------------------------------------------
# In the data set

CLASSES = ClassMap((10, 20), ("background", "10", "20"))


def write_pairs(folder, count=5):
    """Pictures whose first channel is their number, with two objects of different classes; the last has none."""
    pairs = []
    for number in range(count):
        mask = np.zeros((70, 70), np.uint8)
        if number < count - 1:
            mask[10:25, 15:30], mask[40:52, 30 + number : 45 + number] = 10, 20
        image = np.stack([np.full(mask.shape, 40 * number + 20), mask, 255 - mask], axis=2).astype(np.uint8)
        pair = Pair(f"p{number}", folder / "images" / f"p{number}.png", folder / "gt" / f"p{number}.png")
        write_image(pair.image, image)
        write_mask(folder / "gt" / f"p{number}.png", mask)
        pairs.append(pair)
    return pairs


def make_config(kind, **changes):
    options = {
        "architecture": "unet",
        "encoder": "resnet18",
        "labels": (10, 20),
        "class_names": CLASSES.names,
        "channels": ("R", "G", "B"),
        "mean": (0.0,) * 3,
        "std": (1.0,) * 3,
        "geometry": Geometry(kind, (32, 48), tile=64),
    }
    return ModelConfig(**(options | changes))


def make_set(pairs, kind, way, preset="none", probability=1.0):
    present = [(1, 2)] * (len(pairs) - 1) + [()]
    mixing = Mixing(way, probability, present, together=kind == "crops") if way else None
    return TrainingSet(pairs, CLASSES, make_config(kind), Augmentation(preset, rgb=True, value_range=(0, 255)), mixing)


@pytest.mark.parametrize("kind", ["crops", "resize"])
@pytest.mark.parametrize("way", KINDS)
def test_samples_of_a_set_are_mixed_with_other_images(tmp_path, kind, way):
    pairs = write_pairs(tmp_path)
    data, others, mixed = make_set(pairs, kind, way), 0, 0
    for seed in range(25):
        own = seed % len(pairs)
        ((name, pixels, mask),) = data[(Slot(own, seed),)]
        assert name == f"p{own}" and pixels.shape == (3, 32, 48) and mask.shape == (32, 48)
        assert set(np.unique(mask)) <= {0, 1, 2, 255}
        numbers = set(np.unique(np.rint(pixels[0])).astype(int).tolist())
        sources = {value for value in numbers if (value - 20) % 40 == 0}
        others += len(sources - {40 * own + 20}) > 0
        mixed += len(sources) > 2
        if kind == "crops":  # no pixel is interpolated: the other channels still tell the class
            known = (mask != 255) & np.isin(np.rint(pixels[1]), (0, 10, 20))  # not the soft edge of what was pasted
            assert known.mean() > 0.7 * (mask != 255).mean()
            assert np.array_equal(np.rint(pixels[1][known]), np.array([0, 10, 20])[mask[known]])
    assert others >= (10 if way == "copy-paste" else 20)
    assert mixed >= 8 if (way, kind) == ("mosaic", "resize") else True


@pytest.mark.parametrize("way", KINDS)
def test_forced_crops_hold_their_class_when_mixed(tmp_path, way):
    data = make_set(write_pairs(tmp_path), "crops", way, preset="hard")
    for seed in range(30):
        assert (data[(Slot(1, seed, 1 + seed % 2),)][0][2] == 1 + seed % 2).any(), seed


def test_the_share_of_mixed_samples_is_the_probability(tmp_path):
    pairs = write_pairs(tmp_path)
    plain, sometimes = make_set(pairs, "crops", None), make_set(pairs, "crops", "cutmix", probability=0.3)
    slots = tuple(Slot(0, seed) for seed in range(120))
    same = [np.array_equal(a[1], b[1]) for a, b in zip(plain[slots], sometimes[slots], strict=True)]
    assert 0.15 < 1 - np.mean(same) < 0.45


@pytest.mark.parametrize("kind", ["crops", "resize"])
@pytest.mark.parametrize("way", KINDS)
def test_workers_do_not_change_mixed_samples(tmp_path, kind, way):
    pairs, seen = write_pairs(tmp_path), []
    for workers in (0, 2) if way == "mosaic" else (0, 0):
        sampler = EpochSampler([(1, 2)] * 4 + [()], crops=2, quota=0.33, seed=1)
        data = make_set(pairs, kind, way, preset="medium", probability=0.5)
        seen.append(list(TrainingBatches(data, sampler, batch=4, workers=workers, pin=False)))
    for one, other in zip(*seen, strict=True):
        assert one.names == other.names
        assert (one.images == other.images).all() and (one.masks == other.masks).all()


def test_an_item_of_crops_decodes_one_other_image(tmp_path, monkeypatch):
    import dataset

    read, pairs = [], write_pairs(tmp_path)
    original = dataset.load_pair
    monkeypatch.setattr(dataset, "load_pair", lambda pair, *rest: read.append(pair.name) or original(pair, *rest))
    for way in KINDS:
        read.clear()
        make_set(pairs, "crops", way)[tuple(Slot(2, seed) for seed in range(9))]
        assert len(read) == 2 and read[0] == "p2" and read[1] not in ("p2", "p4" if way == "copy-paste" else "")


def test_copy_paste_needs_a_background(tmp_path):
    pairs, classes = write_pairs(tmp_path), ClassMap((0, 10, 20), ("0", "10", "20"))
    assert not classes.has_background
    mixing = Mixing("copy-paste", 0.5, [(0, 1, 2)] * 5, together=False)
    config = make_config("resize", labels=(0, 10, 20), class_names=classes.names)
    with pytest.raises(DatasetError, match="none is background.*--mix mosaic or cutmix"):
        TrainingSet(pairs, classes, config, Augmentation("none", rgb=True, value_range=(0, 255)), mixing)


def test_large_images_are_shrunk_before_they_are_moved(tmp_path):
    """The same picture four times as large gives nearly the same sample: moves of some pixels keep their size."""
    rng = np.random.default_rng(0)
    small = np.kron(rng.integers(30, 220, (12, 16, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    samples = []
    for name, image in (("a", small), ("b", np.kron(small, np.ones((4, 4, 1), np.uint8)))):
        pair = Pair(name, tmp_path / f"{name}.png", tmp_path / f"{name}_gt.png")
        write_image(pair.image, image)
        write_mask(tmp_path / f"{name}_gt.png", (image[..., 0] > 120).astype(np.uint8) * 10)
        config = make_config("resize", geometry=Geometry("resize", (96, 128)))
        data = TrainingSet([pair], CLASSES, config, Augmentation("vessel", rgb=True, value_range=(0, 255)))
        samples.append([data[(Slot(0, seed),)][0] for seed in range(8)])
    for (_, one, mask), (_, other, large) in zip(*samples, strict=True):
        assert np.abs(one - other).mean() < 4
        assert (mask != large).mean() < 0.05
