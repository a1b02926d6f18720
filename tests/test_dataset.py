"""Pairing, splits, classes, and the samples that networks are fed with."""

import csv
import hashlib
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dataset
from augmentations import PRESETS, Augmentation
from checkpoint import Geometry, ModelConfig
from classes import UNLISTED, ClassMap
from crops import crop_corner, cut_window
from dataset import (
    EpochSampler,
    EvaluationSet,
    Slot,
    TrainingBatches,
    TrainingSet,
    evaluation_loader,
    load_image,
    load_mask,
    load_region,
)
from image_io import IGNORE_INDEX, ImageError, write_image, write_mask
from mixing import Mixing
from pairing import (
    DatasetError,
    FileOptions,
    Pair,
    find_split,
    find_splits,
    list_pairs,
    read_ids,
    share_by_name,
    split_folder,
)

BINARY = ClassMap((255,), ("background", "object"))
ANYWHERE = Path("somewhere.png")


def make_config(**changes):
    values = {
        "architecture": "plain-unet",
        "encoder": "plain-8",
        "labels": (255,),
        "class_names": ("background", "object"),
        "channels": ("red", "green", "blue"),
        "mean": (100.0, 100.0, 100.0),
        "std": (50.0, 50.0, 50.0),
        "geometry": Geometry("crops", (32, 32), tile=64),
    }
    return ModelConfig(**{**values, **changes})


def write_files(folder, names, size=(8, 8), masks="gt", suffix=".png"):
    """Plain pictures with masks that have one object pixel."""
    mask = np.zeros(size, np.uint8)
    mask[0, 0] = 255
    for name in names:
        write_image(folder / "images" / f"{name}{suffix}", np.full((*size, 3), 7, np.uint8))
        if masks:
            write_mask(folder / masks / f"{name}.png", mask)
    return folder


def names_of(listing):
    return [pair.name for pair in listing.pairs]


def write_ids(path, names, column="id", delimiter=","):
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, delimiter=delimiter)
        rows.writerows([[column, "note"], *([name, 1] for name in names)])
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Files


def test_pairs_by_stem_whatever_the_suffix(tmp_path):
    write_files(tmp_path, ["a"], suffix=".png", masks="masks")
    write_files(tmp_path, ["b"], suffix=".JPG", masks="masks")
    write_files(tmp_path, ["c"], suffix=".TIFF", masks="masks")
    (tmp_path / "masks" / "c.png").rename(tmp_path / "masks" / "c.PNG")
    (tmp_path / "images" / "notes.txt").write_text("no image")
    listing = list_pairs(tmp_path)
    assert names_of(listing) == ["a", "b", "c"] and listing.errors == [] and listing.has_masks
    assert [pair.image.suffix for pair in listing.pairs] == [".png", ".JPG", ".TIFF"]
    assert [pair.mask.name for pair in listing.pairs] == ["a.png", "b.png", "c.PNG"]


def test_gt_goes_before_masks(tmp_path):
    write_files(tmp_path, ["a"], masks="masks")
    write_files(tmp_path, ["a"], masks="gt")
    assert list_pairs(tmp_path).pairs[0].mask == tmp_path / "gt" / "a.png"


def test_extras_and_roi_belong_to_the_pair(tmp_path):
    write_files(tmp_path, ["a", "b"])
    for folder in ("nir", "fov"):
        for name in "ab":
            write_mask(tmp_path / folder / f"{name}.tif", np.ones((8, 8), np.uint8))
    (tmp_path / "fov" / "b.tif").unlink()
    listing = list_pairs(tmp_path, ["nir"], "fov")
    assert listing.pairs == [
        Pair(
            "a",
            tmp_path / "images/a.png",
            tmp_path / "gt/a.png",
            (tmp_path / "nir/a.tif",),
            tmp_path / "fov/a.tif",
        )
    ]
    assert listing.errors == [
        f"1 of 2 files in {tmp_path}/images have no partner in {tmp_path}/fov, first: 'b'. Files pair by stem."
    ]
    with pytest.raises(DatasetError, match=r"no folder .*depth, asked for as 'depth'; expected beside"):
        list_pairs(tmp_path, ["depth"])


def test_images_and_masks_without_partner_are_both_found(tmp_path):
    write_files(tmp_path, ["a", "b", "c"])
    (tmp_path / "gt" / "b.png").unlink()
    (tmp_path / "images" / "c.png").rename(tmp_path / "images" / "d.png")
    listing = list_pairs(tmp_path)
    assert names_of(listing) == ["a"]
    assert listing.errors == [
        f"2 of 3 files in {tmp_path}/images have no partner in {tmp_path}/gt, first: 'b'. Files pair by stem.",
        f"1 of 2 files in {tmp_path}/gt have no partner in {tmp_path}/images, first: 'c'. Files pair by stem.",
    ]


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(DatasetError, match=r"no folder .*nowhere; expected a data set with train/ and val/"):
        find_splits(tmp_path / "nowhere", FileOptions())
    with pytest.raises(DatasetError, match=r"has no images/ and no split in it. Expected .*images with .*gt"):
        find_splits(tmp_path, FileOptions())
    (tmp_path / "train" / "images").mkdir(parents=True)
    with pytest.raises(DatasetError, match=r"train/images holds no images; expected png, jpg"):
        find_splits(tmp_path, FileOptions())
    (tmp_path / "train").rename(tmp_path / "test")
    with pytest.raises(DatasetError, match=r"has the splits test; expected .*train/images"):
        find_splits(tmp_path, FileOptions())


def test_nested_and_flat_layouts(tmp_path):
    nested = tmp_path / "water"
    write_files(nested / "train", ["a", "b", "c"])
    write_files(nested / "val", ["d"])
    train, val, note = find_splits(nested, FileOptions())
    assert names_of(train) == ["a", "b", "c"] and names_of(val) == ["d"]
    assert val.name == "water" and note == f"validation on {nested / 'val'}"
    assert names_of(find_split(nested, "val", FileOptions())) == ["d"]
    assert names_of(find_split(nested / "val", None, FileOptions())) == ["d"]
    assert names_of(find_split(nested / "val", "val", FileOptions())) == ["d"], "a split folder is not split again"
    flat = write_files(tmp_path / "flat", [f"{i:02}" for i in range(20)])
    train, val, note = find_splits(flat, FileOptions())
    assert len(train.pairs) == 16 and len(val.pairs) == 4 and val.name == "flat"
    assert "4 of 20 images, chosen by name, are kept for it" in note
    assert names_of(find_split(flat, "val", FileOptions())) == names_of(val)
    assert names_of(find_split(flat, "train", FileOptions())) == names_of(train)
    assert len(find_split(flat, None, FileOptions()).pairs) == 20


def test_train_without_val_is_split_as_training_split_it(tmp_path):
    write_files(tmp_path / "train", [f"{i}" for i in range(10)])
    _, val, _ = find_splits(tmp_path, FileOptions(val_share=0.3))
    assert len(val.pairs) == 3
    assert names_of(find_split(tmp_path, "val", FileOptions(val_share=0.3))) == names_of(val)


def test_a_split_that_is_not_there(tmp_path):
    write_files(tmp_path, ["a", "b"])
    assert split_folder(tmp_path, "test") is None
    with pytest.raises(DatasetError, match="has no test/images"):
        find_split(tmp_path, "test", FileOptions())
    write_files(tmp_path / "root" / "train", ["a"])
    with pytest.raises(DatasetError, match=r"has the splits train; give the folder of one, such as .*train"):
        find_split(tmp_path / "root", None, FileOptions())


def test_val_dir_elsewhere_is_a_split_or_a_root(tmp_path):
    write_files(tmp_path / "one", ["a", "b"])
    write_files(tmp_path / "two" / "val", ["c"])
    for given_dir in (tmp_path / "two", tmp_path / "two" / "val"):
        train, val, _ = find_splits(tmp_path / "one", FileOptions(), val_dir=given_dir)
        assert (names_of(train), names_of(val)) == (["a", "b"], ["c"])
    with pytest.raises(DatasetError, match="no folder .*three"):
        find_splits(tmp_path / "one", FileOptions(), val_dir=tmp_path / "three")


def test_path_with_cyrillic_letters_and_spaces_works(tmp_path):
    folder = write_files(tmp_path / "Мои снимки 2024" / "train", ["пузырь й 1", "b"])
    decomposed = unicodedata.normalize("NFD", "пузырь й 1")  # as macOS spells it
    assert decomposed != "пузырь й 1"
    (folder / "gt" / "пузырь й 1.png").rename(folder / "gt" / f"{decomposed}.png")
    listing = list_pairs(folder)
    assert listing.errors == [] and names_of(listing) == ["b", "пузырь й 1"]
    image, _ = load_image(listing.pairs[1], (), ())
    assert image.shape == (8, 8, 3) and load_mask(listing.pairs[1], BINARY, load_region(listing.pairs[1])).sum() == 1


# ----------------------------------------------------------------------------------------------------------------------
# Ids and shares


@pytest.mark.parametrize("delimiter", [",", ";"])
def test_ids_select(tmp_path, delimiter):
    write_files(tmp_path, ["a.1", "b", "c"])
    (tmp_path / "gt" / "c.png").unlink()
    ids = write_ids(tmp_path / "ids.csv", ["a.1", "b.jpg", " "], delimiter=delimiter)
    assert read_ids(ids) == {"a.1", "b"}, "a dot in a name is no suffix"
    listing = list_pairs(tmp_path, ids=ids)
    assert names_of(listing) == ["a.1", "b"] and listing.errors == [], "c was not asked for, so it may lack a mask"


def test_val_ids_leave_the_training_images(tmp_path):
    write_files(tmp_path, "abcd")
    val_ids = write_ids(tmp_path / "val.csv", "bd")
    train, val, note = find_splits(tmp_path, FileOptions(), val_ids=val_ids)
    assert names_of(train) == ["a", "c"] and names_of(val) == ["b", "d"]
    assert note == f"validation on the 2 images of {val_ids}"
    write_ids(val_ids, ["b", "z"])
    _, val, _ = find_splits(tmp_path, FileOptions(), val_ids=val_ids)
    assert val.errors == [f"1 ids of {val_ids} have no file in {tmp_path}, first: 'z'"]


def test_ids_of_both_splits_are_no_error(tmp_path):
    write_files(tmp_path / "train", "ab")
    write_files(tmp_path / "val", "cd")
    options = FileOptions(ids=write_ids(tmp_path / "ids.csv", "ac"))
    train, val, _ = find_splits(tmp_path, options)
    assert (names_of(train), names_of(val), train.errors + val.errors) == (["a"], ["c"], [])
    assert find_split(tmp_path, "val", options).errors == []
    write_ids(options.ids, ["a", "c", "x", "y"])
    train, val, _ = find_splits(tmp_path, options)
    assert train.errors == [f"2 ids of {options.ids} have no file in {tmp_path}/train, first: 'x'"]


def test_ids_that_cannot_be_read(tmp_path):
    with pytest.raises(DatasetError, match=r"none.csv cannot be read: .*; expected a csv file with a column id"):
        read_ids(tmp_path / "none.csv")
    with pytest.raises(DatasetError, match=r"has the columns \['name', 'note'\]; expected one named id"):
        read_ids(write_ids(tmp_path / "ids.csv", "a", column="name"))
    (tmp_path / "ids.csv").write_bytes(b"id\n\xff\xfe")
    with pytest.raises(DatasetError, match="is not UTF-8 text"):
        read_ids(tmp_path / "ids.csv")


def make_pairs(names):
    return [Pair(name, Path(f"{name}.png")) for name in names]


def test_share_by_name_is_stable():
    pairs = make_pairs(f"img{i:02}" for i in range(20))
    train, val = share_by_name(pairs, 0.2, None)
    assert len(train) == 16 and len(val) == 4
    first = sorted((f"img{i:02}" for i in range(20)), key=lambda name: hashlib.sha256(name.encode()).hexdigest())[:4]
    assert [pair.name for pair in val] == sorted(first), "the rule is the hash of the name, on every machine"
    again, _ = share_by_name(pairs[::-1], 0.2, None)
    assert set(again) == set(train), "whatever the order of the files"


@given(st.lists(st.integers(0, 9), min_size=2, max_size=40), st.floats(0.0, 1.0))
@settings(deadline=None, max_examples=60)
def test_groups_stay_together_and_no_side_is_empty(groups, share):
    pairs = make_pairs(f"patient{group}_{place}" for place, group in enumerate(groups))
    if len(set(groups)) < 2:
        with pytest.raises(DatasetError, match="1 group of images cannot be split .*one group.*; give --val-dir"):
            share_by_name(pairs, share, r"^patient(\d+)")
        return
    train, val = share_by_name(pairs, share, r"^patient(\d+)")
    sides = [{pair.name.split("_")[0] for pair in side} for side in (train, val)]
    assert train and val and not sides[0] & sides[1] and len(train) + len(val) == len(pairs)


def test_group_patterns_that_cannot_be():
    with pytest.raises(DatasetError, match="does not match the file name 'b'"):
        share_by_name(make_pairs(["a1", "b"]), 0.5, r"a\d")
    with pytest.raises(DatasetError, match="is not a regular expression"):
        share_by_name(make_pairs("ab"), 0.5, "(")


# ----------------------------------------------------------------------------------------------------------------------
# Classes


def encode_slowly(classes, values):
    """The rules of the design, one pixel at a time."""
    result = np.zeros(values.shape, np.uint8)
    for place, value in np.ndenumerate(values):
        value = int(value)
        if value == classes.ignore_label:
            index = IGNORE_INDEX
        elif classes.mask_threshold is not None:
            index = int(value > classes.mask_threshold)
        elif classes.max_mask_val and value > classes.max_mask_val:
            index = UNLISTED
        elif not classes.labels:
            index = int(value != 0)
        elif value in classes.labels:
            index = classes.labels.index(value) + (0 not in classes.labels)
        else:
            index = UNLISTED if 0 in classes.labels else 0
        result[place] = index
    return result


CLASS_MAPS = {
    "list": ClassMap((64, 3), ("background", "64", "3")),
    "list and ignored": ClassMap((64, 3), ("background", "64", "3"), ignore_label=7),
    "list with 0": ClassMap((3, 0, 1, 2, 64, 7, 300, 65535), tuple("abcdefgh")),
    "list with 0 and ignored": ClassMap((3, 0), ("3", "0"), ignore_label=1),
    "nonzero": ClassMap((), ("background", "object")),
    "nonzero and ignored": ClassMap((), ("background", "object"), ignore_label=7),
    "largest": ClassMap((1, 2, 3), ("background", "1", "2", "3"), max_mask_val=3),
    "largest and ignored": ClassMap((1, 2, 3), ("background", "1", "2", "3"), ignore_label=64, max_mask_val=3),
    "threshold": ClassMap((), ("background", "object"), mask_threshold=63.5),
    "threshold and ignored": ClassMap((), ("background", "object"), ignore_label=64, mask_threshold=2),
    "last of 16 bit": ClassMap((65535,), ("background", "65535")),
}


@pytest.mark.parametrize("name", CLASS_MAPS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_classes_follow_the_rules(name, dtype):
    classes = CLASS_MAPS[name]
    values = [value for value in (0, 1, 2, 3, 7, 63, 64, 65, 255, 300, 65535, 65536, 4_000_000_000)]
    mask = np.array([value for value in values if value <= np.iinfo(dtype).max], dtype)[None].repeat(2, axis=0)
    expected = encode_slowly(classes, mask)
    assert np.array_equal(classes.indices(mask), expected) and classes.indices(mask).dtype == np.uint8
    if (expected == UNLISTED).any():
        with pytest.raises(DatasetError, match=r"mask somewhere.png holds the labels \[.*\], out of range; expected"):
            classes.encode(mask, ANYWHERE)
    else:
        assert np.array_equal(classes.encode(mask, ANYWHERE), expected)


def test_label_out_of_range_names_file_and_label():
    with pytest.raises(DatasetError) as caught:
        CLASS_MAPS["largest"].encode(np.array([[0, 1, 9, 9, 200]], np.uint8), ANYWHERE)
    assert str(caught.value) == "mask somewhere.png holds the labels [9, 200], out of range; expected [0, 1, 2, 3]"


# ----------------------------------------------------------------------------------------------------------------------
# Pixels


def test_channels_follow_the_image(tmp_path):
    rng = np.random.default_rng(0)
    image, nir = rng.integers(0, 255, (6, 5, 3), np.uint8), rng.integers(0, 255, (6, 5), np.uint8)
    write_image(tmp_path / "a.png", image)
    write_image(tmp_path / "nir.png", nir)
    pair = Pair("a", tmp_path / "a.png", extras=(tmp_path / "nir.png",))
    loaded, valid = load_image(pair, ("red", "green", "blue", "nir"), ())
    assert np.array_equal(loaded, np.dstack([image, nir])) and loaded.dtype == np.uint8 and valid is None
    with pytest.raises(ImageError, match=r"a.png has 4 channels, expected 3 \(red green blue\)"):
        load_image(pair, ("red", "green", "blue"), ())
    write_image(tmp_path / "nir.png", nir[:5])
    with pytest.raises(ImageError, match=r"nir.png is 5x5, its image .*a.png is 6x5; sizes must agree"):
        load_image(pair, (), ())
    write_image(tmp_path / "nir.png", image)
    with pytest.raises(ImageError, match=r"nir.png has 3 channels that differ; expected one"):
        load_image(pair, (), ())


def test_each_layer_is_preprocessed_at_its_own_depth(tmp_path):
    rng = np.random.default_rng(0)
    write_image(tmp_path / "a.png", rng.integers(40, 90, (16, 16), np.uint8))
    write_image(tmp_path / "deep.png", rng.integers(400, 900, (16, 16), np.uint16))
    image, _ = load_image(Pair("a", tmp_path / "a.png", extras=(tmp_path / "deep.png",)), (), ["stretch"])
    assert image.dtype == np.float32
    assert image[..., 0].max() == 255 and image[..., 1].max() == 65535 and image.min() == 0


def test_pixels_without_data_and_outside_the_region_are_ignored(tmp_path):
    values = np.full((4, 4), 9, np.float32)
    values[0, 0] = -1
    tifffile.imwrite(tmp_path / "a.tif", values, extratags=[(42113, "s", 0, "-1", False)])
    extra = np.full((4, 4), 5, np.float32)
    extra[1, 1] = np.nan
    tifffile.imwrite(tmp_path / "b.tif", extra, extratags=[(42113, "s", 0, "nan", False)])
    write_mask(tmp_path / "mask.png", np.full((4, 4), 255, np.uint8))
    roi = np.ones((4, 4), np.uint8)
    roi[3] = 0
    write_mask(tmp_path / "roi.png", roi)
    pair = Pair("a", tmp_path / "a.tif", tmp_path / "mask.png", (tmp_path / "b.tif",), tmp_path / "roi.png")
    image, valid = load_image(pair, (), ())
    assert np.isfinite(image).all() and image[0, 0, 0] == 0 and image[1, 1, 1] == 0
    mask = load_mask(pair, BINARY, load_region(pair, valid))
    expected = np.ones((4, 4), np.uint8)
    expected[0, 0] = expected[1, 1] = IGNORE_INDEX
    expected[3] = IGNORE_INDEX
    assert np.array_equal(mask, expected)
    write_mask(tmp_path / "roi.png", roi[:3])
    with pytest.raises(ImageError, match=r"roi.png is 3x4, its image .*a.tif is 4x4"):
        load_mask(pair, BINARY, load_region(pair, valid))


# ----------------------------------------------------------------------------------------------------------------------
# Slots


def take_epoch(present, epoch=0, crops=3, quota=0.33, seed=5):
    sampler = EpochSampler(present, crops=crops, quota=quota, seed=seed)
    sampler.set_epoch(epoch)
    return sampler, list(sampler)


PRESENT = st.lists(st.sampled_from([(), (1,), (1, 3), (0, 2)]), min_size=1, max_size=25)


@given(PRESENT, st.integers(1, 6), st.sampled_from([0, 0.07, 0.33, 0.5, 1]), st.integers(0, 999))
@settings(deadline=None, max_examples=150)
def test_every_epoch_keeps_slots_and_quota(present, crops, quota, seed):
    sampler, groups = take_epoch(present, epoch=seed % 3, crops=crops, quota=quota, seed=seed)
    total = len(present) * crops
    slots = [slot for group in groups for slot in group]
    assert sampler.samples == len(slots) == total
    assert all(len({slot.image for slot in group}) == 1 for group in groups)
    assert len({group[0].image for group in groups}) == len(groups), "one decode an image"
    forced = [slot for slot in slots if slot.wanted is not None]
    assert all(slot.wanted in present[slot.image] for slot in forced)
    labelled = sum(bool(classes) for classes in present)
    wanted = int(np.ceil(round(quota * total, 6))) if labelled else 0
    assert len(forced) == wanted
    taken = Counter(slot.image for slot in slots)
    passed_on = max(0, wanted - labelled * crops)
    for image, classes in enumerate(present):
        assert taken[image] >= crops if classes else crops - passed_on <= taken[image] <= crops
    if not passed_on:
        assert all(taken[image] == crops for image in range(len(present)))


def test_slots_are_a_function_of_seed_and_epoch():
    present = [(1,), (), (1, 2)] * 3
    first, again = take_epoch(present)[1], take_epoch(present)[1]
    assert first == again
    sampler, _ = take_epoch(present, epoch=7)
    sampler.set_epoch(0)
    assert list(sampler) == first, "whatever came before"
    assert list(sampler) == first
    assert take_epoch(present, epoch=1)[1] != first
    assert take_epoch(present, seed=6)[1] != first
    seeds = [slot.seed for group in first for slot in group]
    assert len(set(seeds)) == len(seeds)


class NumberedSamples:
    """Stands in for a TrainingSet: a sample holds the seed of its slot, and decodes are counted."""

    sample_bytes = 20

    def __init__(self):
        self.decodes = Counter()

    def __getitem__(self, slots):
        self.decodes[slots[0].image] += 1
        return [(str(s.image), np.full((1, 2, 2), s.seed, np.float32), np.zeros((2, 2), np.uint8)) for s in slots]


@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 7))
@settings(deadline=None, max_examples=60)
def test_batches_hold_every_slot_once_and_mix_images(images, batch, crops):
    data, sampler = NumberedSamples(), EpochSampler([(1,)] * images, crops=crops, quota=0.3, seed=2)
    batches = TrainingBatches(data, sampler, batch=batch, workers=0, pin=False)
    taken = list(batches)
    sizes = [len(part.names) for part in taken]
    assert len(batches) == len(taken) and sizes[:-1] == [batch] * (len(taken) - 1) and 1 <= sizes[-1] <= batch
    seeds = [int(value) for part in taken for value in part.images[:, 0, 0, 0]]
    expected = [int(np.float32(slot.seed)) for group in sampler for slot in group]
    assert sorted(seeds) == sorted(expected)
    assert set(data.decodes.values()) == {1}, "one decode an image"
    assert [part.names for part in batches] == [part.names for part in taken], "the same epoch, the same batches"


def test_waiting_samples_keep_at_most_twice_their_memory(monkeypatch):
    kept, original = [], dataset.let_go

    def watch(pool):
        pool = original(pool)
        held = {samples.images.untyped_storage().data_ptr(): samples.images.nbytes for samples, _ in pool}
        kept.append((sum(held.values()), len(pool)))
        return pool

    monkeypatch.setattr(dataset, "let_go", watch)
    sampler = EpochSampler([(1,)] * 30, crops=20, quota=0, seed=0)
    seeds = [
        int(value)
        for part in TrainingBatches(NumberedSamples(), sampler, batch=3, workers=0, pin=False)
        for value in part.images[:, 0, 0, 0]
    ]
    assert len(set(seeds)) == len(seeds) == 600
    assert all(held <= 2 * 16 * samples for held, samples in kept), "16 bytes a picture"


def test_a_batch_does_not_hold_one_image_alone():
    sampler = EpochSampler([(1,)] * 8, crops=16, quota=0, seed=0)
    for part in TrainingBatches(NumberedSamples(), sampler, batch=16, workers=0, pin=False):
        assert len(set(part.names)) >= 3


# ----------------------------------------------------------------------------------------------------------------------
# Crops


@given(st.integers(1, 12), st.integers(1, 12), st.integers(-15, 15), st.integers(-15, 15), st.integers(1, 20))
@settings(deadline=None, max_examples=100)
def test_windows_against_a_slow_reference(height, width, top, left, side):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (height, width, 2), np.uint8)
    mask = rng.integers(0, 3, (height, width), np.uint8)
    pad = 40
    rows = np.pad(np.arange(height), pad, mode="reflect" if height > 1 else "edge")
    columns = np.pad(np.arange(width), pad, mode="reflect" if width > 1 else "edge")
    expected_mask = np.full((side, side + 1), IGNORE_INDEX, np.uint8)
    expected = np.zeros((side, side + 1, 2), np.uint8)
    for row in range(side):
        for column in range(side + 1):
            at = (top + row, left + column)
            expected[row, column] = image[rows[at[0] + pad], columns[at[1] + pad]]
            if 0 <= at[0] < height and 0 <= at[1] < width:
                expected_mask[row, column] = mask[at]
    pixels, indices = cut_window(image, mask, (top, left), (side, side + 1))
    assert np.array_equal(pixels, expected) and np.array_equal(indices, expected_mask)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 24), st.integers(1, 24), st.integers(0, 10_000))
@settings(deadline=None, max_examples=150)
def test_corners_keep_the_window_in_the_image_and_on_the_object(height, width, crop_height, crop_width, seed):
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.uint8)
    place = (int(rng.integers(height)), int(rng.integers(width)))
    mask[place] = 2
    for wanted in (None, 2):
        corner = crop_corner(mask, (crop_height, crop_width), wanted, rng)
        for first, length, side in zip(corner, mask.shape, (crop_height, crop_width), strict=True):
            assert min(0, length - side) <= first <= max(0, length - side)
    assert all(
        first <= at < first + side for first, at, side in zip(corner, place, (crop_height, crop_width), strict=True)
    )


def test_corners_reach_every_place():
    rng = np.random.default_rng(0)
    mask = np.zeros((6, 5), np.uint8)
    assert {crop_corner(mask, (4, 4), None, rng) for _ in range(200)} == {(r, c) for r in range(3) for c in range(2)}
    mask[3, 2] = 1
    assert {crop_corner(mask, (2, 2), 1, rng) for _ in range(200)} == {(r, c) for r in (2, 3) for c in (1, 2)}


def one_pixel_files(folder, size, places):
    """An image with one 1-pixel object for each label."""
    mask = np.zeros(size, np.uint8)
    for label, place in places.items():
        mask[place] = label
    image = np.random.default_rng(1).integers(0, 255, (*size, 3), np.uint8)
    write_image(folder / "images" / "a.png", image)
    write_mask(folder / "gt" / "a.png", mask)
    return Pair("a", folder / "images" / "a.png", folder / "gt" / "a.png")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    ("size", "places"), [((70, 90), {10: (69, 0), 20: (33, 50)}), ((9, 40), {10: (0, 39), 20: (8, 3)})]
)
def test_a_forced_crop_holds_its_class(tmp_path, preset, size, places):
    pair = one_pixel_files(tmp_path, size, places)
    classes = ClassMap((10, 20), ("background", "10", "20"))
    config = make_config(labels=(10, 20), class_names=classes.names, geometry=Geometry("crops", (24, 32), tile=64))
    data = TrainingSet([pair], classes, config, Augmentation(preset, rgb=True, value_range=(0, 255)))
    for _, pixels, indices in data[tuple(Slot(0, seed, 1 + seed % 2) for seed in range(30))]:
        assert pixels.shape == (3, 24, 32) and pixels.dtype == np.float32 and np.isfinite(pixels).all()
        assert indices.shape == (24, 32) and indices.dtype == np.uint8
    samples = data[tuple(Slot(0, seed, 1 + seed % 2) for seed in range(40))]
    held = [(indices == 1 + seed % 2).any() for seed, (_, _, indices) in enumerate(samples)]
    assert all(held), f"{held.count(False)} of {len(held)} crops lack their class"


def test_crops_move_image_and_mask_together(tmp_path):
    rng = np.random.default_rng(3)
    mask = (rng.random((60, 60)) > 0.5).astype(np.uint8) * 255
    write_image(tmp_path / "images" / "a.png", np.repeat(mask[..., None], 3, axis=2))
    write_mask(tmp_path / "gt" / "a.png", mask)
    pair = Pair("a", tmp_path / "images" / "a.png", tmp_path / "gt" / "a.png")
    config = make_config(mean=(0.0,) * 3, std=(255.0,) * 3)
    data = TrainingSet([pair], BINARY, config, Augmentation("safe", rgb=True, value_range=(0, 255)))
    crops = [indices for _, pixels, indices in data[tuple(Slot(0, seed) for seed in range(12))]]
    for _, pixels, indices in data[tuple(Slot(0, seed) for seed in range(12))]:
        counted = indices != IGNORE_INDEX
        assert counted.any() and np.array_equal(pixels[0][counted], indices[counted].astype(np.float32))
    assert len({crop.tobytes() for crop in crops}) == 12, "every slot has a crop of its own"


def test_resized_samples_have_the_size_of_the_network(tiny_dataset):
    pairs = list_pairs(tiny_dataset / "train").pairs
    config = make_config(geometry=Geometry("resize", (48, 64)))
    data = TrainingSet(pairs, BINARY, config, Augmentation("hard", rgb=True, value_range=(0, 255)))
    name, pixels, indices = data[(Slot(2, 9),)][0]
    assert name == pairs[2].name and pixels.shape == (3, 48, 64) and indices.shape == (48, 64)
    assert set(np.unique(indices)) <= {0, 1, IGNORE_INDEX}


# ----------------------------------------------------------------------------------------------------------------------
# Loaders


@pytest.mark.parametrize("kind", ["crops", "resize"])
def test_workers_do_not_change_samples(tiny_dataset, kind):
    pairs = list_pairs(tiny_dataset / "train").pairs
    config = make_config(geometry=Geometry(kind, (32, 32), tile=64))
    augmentation = Augmentation("hard", rgb=True, value_range=(0, 255))
    seen = []
    for workers in (0, 2):
        sampler = EpochSampler([(1,)] * len(pairs), crops=2, quota=0.33, seed=1)
        sampler.set_epoch(4)
        samples = TrainingSet(pairs, BINARY, config, augmentation)
        loader = TrainingBatches(samples, sampler, batch=5, workers=workers, pin=False)
        torch.manual_seed(workers)  # the global generator has no say
        state = torch.get_rng_state()
        seen.append(list(loader))
        assert torch.equal(torch.get_rng_state(), state), "the loader draws nothing from the global generator"
    assert [len(batch.names) for batch in seen[0]] == [5, 5, 5, 1]
    for one, other in zip(*seen, strict=True):
        assert one.names == other.names
        assert torch.equal(one.images, other.images) and torch.equal(one.masks, other.masks)
    assert seen[0][0].images.shape == (5, 3, 32, 32) and seen[0][0].masks.dtype == torch.uint8


def test_evaluation_reads_whole_images_in_order(tiny_dataset):
    pairs = list_pairs(tiny_dataset / "val").pairs
    data = EvaluationSet(pairs, BINARY, make_config(), with_images=True)
    samples = [sample for group in evaluation_loader(data, batch=3, workers=0) for sample in group]
    assert [sample.pair for sample in samples] == pairs
    for sample in samples:
        image, _ = load_image(sample.pair, (), ())
        assert np.array_equal(sample.image.numpy(), image) and sample.size == (32, 32)
        expected = (image.astype(np.float32) - 100) / 50
        np.testing.assert_allclose(sample.tensor.numpy(), expected.transpose(2, 0, 1), atol=1e-5)
        assert np.array_equal(sample.mask.numpy(), load_mask(sample.pair, BINARY, load_region(sample.pair)))
    resized = EvaluationSet(pairs, BINARY, make_config(geometry=Geometry("resize", (16, 24))))
    groups = list(evaluation_loader(resized, batch=3, workers=0))
    assert [len(group) for group in groups] == [3, 1]
    assert groups[0][0].tensor.shape == (3, 16, 24) and groups[0][0].mask.shape == (32, 32)


def test_evaluation_without_masks(tiny_dataset):
    pairs = [Pair(pair.name, pair.image) for pair in list_pairs(tiny_dataset / "val").pairs]
    assert EvaluationSet(pairs, BINARY, make_config())[0].mask is None
    data = TrainingSet(pairs, BINARY, make_config(), Augmentation("none", rgb=True, value_range=(0, 255)))
    with pytest.raises(DatasetError, match=r"b0.png has no mask; expected one of its name in gt/ or masks/"):
        data[(Slot(0, 1),)]


@pytest.mark.parametrize(("crops", "most"), [(3, 3), (40, 13), (40, 4)])
def test_many_crops_of_large_samples_come_in_pieces_that_fit_the_memory(monkeypatch, crops, most):
    monkeypatch.setattr(dataset, "POOL_BYTES", 4 * 13 * 1000)
    sampler, whole = (EpochSampler([(1,), (1, 2), ()] * 3, crops=crops, quota=0.4, seed=1) for _ in range(2))
    sampler.limit(1000 if most == 13 or most == crops else 100_000)
    pieces = list(sampler)
    assert sampler.together == most == max(map(len, pieces))
    assert all(len({slot.image for slot in piece}) == 1 for piece in pieces)
    key = lambda slot: (slot.image, slot.seed)  # noqa: E731
    assert sorted((slot for piece in pieces for slot in piece), key=key) == sorted(
        (slot for piece in whole for slot in piece), key=key
    )
    if most < crops:
        images = [piece[0].image for piece in pieces[: len(pieces) // 3]]
        assert len(set(images)) == 4 and images != sorted(images, key=images.index), "pieces of images are mixed"


def test_started_processes_give_the_samples_of_this_one(tiny_dataset):
    """Where processes cannot be forked (Windows, macOS) they are started anew and get everything pickled."""
    pairs, seen = list_pairs(tiny_dataset / "train").pairs, []
    for workers in (0, 1):
        mixing = Mixing("cutmix", 0.5, [(1,)] * len(pairs), together=True)
        data = TrainingSet(pairs, BINARY, make_config(), Augmentation("hard", rgb=True, value_range=(0, 255)), mixing)
        sampler = EpochSampler([(1,)] * len(pairs), crops=2, quota=0.33, seed=1)
        batches = TrainingBatches(data, sampler, batch=8, workers=workers, pin=False)
        if workers:
            batches.loader.multiprocessing_context = "spawn"
        seen.append(list(batches))
    for one, other in zip(*seen, strict=True):
        assert one.names == other.names
        assert torch.equal(one.images, other.images) and torch.equal(one.masks, other.masks)
