"""Unlabelled images: which files are taken, what is left out and said, and batches that do not depend on processes."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from image_io import write_image, write_mask
from normalisation import load_or_compute_statistics, statistics
from pairing import DatasetError
from selfsupervised.images import (
    UnlabelledSet,
    ViewBatches,
    Views,
    check_images,
    find_images,
    usual_range,
)
from selfsupervised.views import ViewMaker, ViewOptions
from slide_index import close_places
from slide_windows import SlideOptions
from tests.slides import draw_slide, write_slide


def write(folder: Path, names="abcd", size=(70, 90), channels=3, dtype=np.uint8, suffix=".png"):
    """Images of coloured waves, each with its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        rows, columns = np.indices(size)
        bands = [np.sin(rows / (4 + k + number)) * np.cos(columns / (5 + k)) for k in range(channels)]
        image = 0.5 + 0.35 * np.stack(bands, axis=2)
        top = 1 if dtype == np.float32 else np.iinfo(dtype).max
        write_image(folder / f"{name}{suffix}", (image * top).astype(dtype))
    return folder


def build(found, preset="microscopy", steps=(), slides=None, **options):
    """The set of views of what was found, and its statistics."""
    mean, std = statistics(found.facts)
    low = [0.0] * len(mean)
    maker = ViewMaker(
        preset, ViewOptions(**{"size": 24, **options}), rgb=found.rgb, value_range=(low, [255.0] * len(mean))
    )
    how = {} if slides is None else {"slides": slides}
    return UnlabelledSet(found.pairs, maker, found.channels, mean, std, steps=steps, **how)


def load(*words, **options):
    return build(check_images(find_images([Path(word) for word in words])), **options)


def batches_of(data, *, batch=4, crops=4, seed=0, workers=0, spawn=False, epoch=1, **processes):
    batches = ViewBatches(data, batch=batch, crops=crops, seed=seed, workers=workers, **processes)
    if spawn:
        batches.loader.multiprocessing_context = "spawn"
    batches.set_epoch(epoch)
    return list(batches)


def same(one: Views, other: Views) -> bool:
    parts = ("view_a", "view_b", "places")
    return one.names == other.names and all(torch.equal(getattr(one, part), getattr(other, part)) for part in parts)


# ----------------------------------------------------------------------------------------------------------------------
# Files


def test_a_folder_with_images_in_it_means_those_alone(tmp_path):
    write(tmp_path / "train" / "images", "ab")
    (tmp_path / "train" / "gt").mkdir()
    for name in "ab":
        write_mask(tmp_path / "train" / "gt" / f"{name}.png", np.ones((70, 90), np.uint8))
    write(tmp_path / "train", "z")  # beside images/
    pairs = find_images([tmp_path / "train"])
    assert [pair.name for pair in pairs] == ["a", "b"]
    assert {pair.image.parent.name for pair in pairs} == {"images"}
    assert all(pair.mask is None and not pair.extras for pair in pairs)


def test_a_plain_folder_is_taken_without_the_folders_in_it(tmp_path):
    write(tmp_path, ["b", "a_mask", ".hidden"])
    write(tmp_path / "deeper", "c")
    (tmp_path / "notes.txt").write_text("no image")
    assert [pair.image.name for pair in find_images([tmp_path])] == ["a_mask.png", "b.png"]


def test_files_and_folders_of_any_name_are_taken_once(tmp_path):
    folder = write(tmp_path / "Bläschen 泡" / "schäumend", ["Übersicht", "ñ"])
    other = write(tmp_path / "two", ["Übersicht"])
    cv2.imwrite(str(other / "ñ.jpg"), np.zeros((9, 9, 3), np.uint8))
    pairs = find_images([folder, folder / "ñ.png", other, folder / ".." / "schäumend"])
    assert len(pairs) == 4 and len({pair.name for pair in pairs}) == 4
    assert sorted(pair.name for pair in pairs) == sorted(
        ["schäumend/Übersicht.png", "two/Übersicht.png", "schäumend/ñ.png", "two/ñ.jpg"]
    )
    assert len(check_images(pairs).pairs) == 4


def test_names_stay_different_when_folders_share_theirs_too(tmp_path):
    words = [write(tmp_path / part / "images", "a") for part in ("x", "y", "z")]
    assert [pair.name for pair in find_images(words)] == ["images/a.png", "images/a.png-2", "images/a.png-3"]


def test_images_of_one_stem_are_all_taken(tmp_path):
    write(tmp_path, "a")
    write(tmp_path, "a", suffix=".bmp")
    assert len(find_images([tmp_path])) == 2


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda path: None, ("no file or folder", "expected images", "check --images")),
        (lambda path: path.mkdir(), ("holds no images; expected png", "another folder")),
        (
            lambda path: write(path / "train" / "images", "a"),
            ("holds no images itself", "not searched", "give them, such as --images", "rd/train"),
        ),
        (lambda path: (path / "images").mkdir(parents=True), ("images holds no images; expected",)),
    ],
)
def test_words_that_name_no_images_are_refused(tmp_path, make, parts):
    word = tmp_path / "wörd"
    make(word)
    with pytest.raises(DatasetError) as caught:
        find_images([word])
    assert str(word) in str(caught.value) and all(part in str(caught.value) for part in parts), str(caught.value)


def test_of_a_whole_data_set_its_parts_are_named(tmp_path):
    for split in ("train", "val"):
        write(tmp_path / split / "images", "a")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "read.me").write_text("")
    with pytest.raises(DatasetError) as caught:
        find_images([tmp_path])
    assert str(caught.value).endswith(f"--images {tmp_path / 'train'} {tmp_path / 'val'}")


def test_unreadable_files_are_left_out_listed_and_not_touched(tmp_path):
    write(tmp_path, "ab")
    broken = (tmp_path / "a.png").read_bytes()[:400]
    (tmp_path / "cut.png").write_bytes(broken)
    (tmp_path / "empty.tif").write_bytes(b"")
    (tmp_path / "words.jpg").write_text("not a picture")
    holed = np.full((30, 40, 3), 0.5, np.float32)
    holed[3, 4] = np.nan
    tifffile.imwrite(tmp_path / "nan.tif", holed, photometric="rgb")
    found = check_images(find_images([tmp_path]))
    assert [pair.name for pair in found.pairs] == ["a", "b"]
    reasons = {path.name: why for path, why in found.left_out}
    assert set(reasons) == {"cut.png", "empty.tif", "words.jpg", "nan.tif"}
    assert all(name in why for name, why in reasons.items()), "each reason names its file"
    assert "NaN" in reasons["nan.tif"] and "expected PNG, JPEG" in reasons["words.jpg"]
    assert (tmp_path / "cut.png").read_bytes() == broken
    assert len(batches_of(build(found), batch=4)) == 2


def test_a_folder_of_nothing_but_unreadable_files_is_refused(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(b"x")
    with pytest.raises(DatasetError, match=r"none of 3 images can be used; expected at least one\. .*a\.png"):
        check_images(find_images([tmp_path]))


def test_images_of_other_channels_or_bit_depths_are_named(tmp_path):
    write(tmp_path, "ab")
    write(tmp_path, "c", channels=5, suffix=".tif")
    with pytest.raises(DatasetError) as caught:
        check_images(find_images([tmp_path]))
    message = str(caught.value)
    assert "images differ in channels: 3 channels: 2 images" in message and "5 channels: 1 images" in message
    assert str(tmp_path / "c.tif") in message and "same number everywhere" in message
    (tmp_path / "c.tif").unlink()
    write(tmp_path, "d", dtype=np.uint16)
    with pytest.raises(DatasetError) as caught:
        check_images(find_images([tmp_path]))
    message = str(caught.value)
    assert "images differ in pixel types: uint8: 2 images" in message and str(tmp_path / "d.png") in message
    assert "convert them to one scale" in message


def test_grey_images_among_rgb_ones_are_rgb_of_equal_channels(tmp_path):
    write(tmp_path, "ab")
    write(tmp_path, ["grey"], channels=1)
    found = check_images(find_images([tmp_path]))
    assert found.notes == ["1 of 3 images are grey; they are taken as RGB of three equal channels"] and found.rgb
    pixels = np.concatenate(
        [
            np.broadcast_to(cv2.imread(str(pair.image), -1).reshape(70 * 90, -1)[:, ::-1], (6300, 3))
            for pair in found.pairs
        ]
    )
    mean, std = statistics(found.facts)
    np.testing.assert_allclose(mean, pixels.mean(axis=0))
    np.testing.assert_allclose(std, pixels.std(axis=0))
    for views in batches_of(build(found, "none"), batch=3, crops=2):
        for row, name in enumerate(views.names):
            raw = views.view_a[row] * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
            assert (raw.amax(dim=0) - raw.amin(dim=0)).max() < 1e-3 or name != "grey"


def test_many_constant_images_are_warned_about_shortly(tmp_path):
    for number in range(9):
        cv2.imwrite(str(tmp_path / f"{number}.png"), np.full((20, 20, 3), number, np.uint8))
    found = check_images(find_images([tmp_path]))
    assert len(found.pairs) == 9 and len(found.warnings) == 6
    assert "0.png is constant: every pixel is 0" in found.warnings[0]
    assert found.warnings[-1] == "... and 4 more of such warnings"
    assert all(views.view_a.isfinite().all() for views in batches_of(build(found), batch=9))


def test_grey_images_alone_stay_grey(tmp_path):
    found = check_images(find_images([write(tmp_path, channels=1)]))
    assert found.channels == ("grey",) and not found.rgb and not found.notes
    assert batches_of(build(found))[0].view_a.shape == (4, 1, 24, 24)


def test_exif_rotation_is_applied(tmp_path):
    upright = np.zeros((40, 80, 3), np.uint8)
    upright[:, :40] = 200
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90 degrees
    Image.fromarray(np.rot90(upright)).save(tmp_path / "a.jpg", exif=exif, quality=100)
    data = load(tmp_path, preset="none", size=16, window=0)
    (views,) = batches_of(data, batch=1, crops=1)
    left, right = views.view_a[0, 0, :, 2].mean(), views.view_a[0, 0, :, -3].mean()
    assert left > right + 1.5
    assert views.places[0, 0, 0, 0] == 80 / 16 and views.places[0, 0, 1, 1] == 40 / 16


def test_statistics_are_kept_in_the_run_folder_alone(tmp_path):
    folder, run = write(tmp_path / "data"), tmp_path / "run"
    run.mkdir()
    before = sorted(folder.iterdir())
    found = check_images(find_images([folder]))
    first = load_or_compute_statistics(run, run, found.facts, ())
    assert load_or_compute_statistics(run, run, found.facts, ()).mean == first.mean
    assert sorted(folder.iterdir()) == before and (run / "mean_vals.txt").is_file()


def test_the_usual_range_is_not_decided_by_one_hot_pixel(tmp_path):
    rng = np.random.default_rng(0)
    image = rng.normal(1000, 100, (200, 200, 5)).astype(np.uint16)
    image[5, 5] = 65535
    write_image(tmp_path / "hot.tif", image)
    found = check_images(find_images([tmp_path]))
    given = load_or_compute_statistics(tmp_path, tmp_path, found.facts, ())
    low, high = usual_range(given)
    assert low == (0,) * 5 and all(1300 < end < 4000 for end in high)
    write_image(tmp_path / "hot.tif", np.where(image == 65535, -9999, image / 1000 - 1).astype(np.float32))
    found = check_images(find_images([tmp_path]))
    low, high = usual_range(load_or_compute_statistics(tmp_path / "run", tmp_path / "run", found.facts, ()))
    assert all(-400 < end < -0.5 for end in low) and all(0 < end < 1 for end in high)
    write(tmp_path / "eight")
    found = check_images(find_images([tmp_path / "eight"]))
    given = load_or_compute_statistics(tmp_path / "eight", tmp_path, found.facts, ())
    assert usual_range(given) == ((0, 0, 0), (255, 255, 255))


def test_windows_lie_where_there_is_data(tmp_path):
    image = np.zeros((120, 400), np.uint8)
    image[:, 300:] = 90
    image[::2, 300:] = 140
    tifffile.imwrite(tmp_path / "map.tif", image, extratags=[(42113, "s", 0, "0", True)])
    data = load(tmp_path, preset="none", size=24)
    middles = [
        places[0, 0, 2].item() + 11.5 for views in batches_of(data, batch=8, crops=64) for places in views.places
    ]
    assert len(middles) == 64 and np.mean(np.array(middles) > 295) > 0.95


# ----------------------------------------------------------------------------------------------------------------------
# Batches


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_views_of_all_formats_are_normalised(tmp_path, dtype, channels):
    suffix = ".tif" if channels == 5 or dtype == np.float32 else ".png"
    found = check_images(find_images([write(tmp_path, channels=channels, dtype=dtype, suffix=suffix)]))
    given = load_or_compute_statistics(tmp_path, tmp_path, found.facts, ())
    for preset in ("none", "multispectral", "natural"):
        maker = ViewMaker(preset, ViewOptions(size=24), rgb=found.rgb, value_range=usual_range(given))
        data = UnlabelledSet(found.pairs, maker, found.channels, given.mean, given.std)
        everything = batches_of(data)
        assert len(everything) == len(ViewBatches(data, batch=4, crops=4, seed=0, workers=0)) == 4
        for views in everything:
            for view in (views.view_a, views.view_b):
                assert view.shape == (4, channels, 24, 24) and view.dtype == torch.float32 and view.isfinite().all()
            assert views.places.shape == (4, 2, 2, 3) and views.places.dtype == torch.float32 and len(views.names) == 4
        pixels = torch.cat([views.view_a for views in everything])
        assert abs(pixels.mean()) < 0.6 and 0.4 < pixels.std() < 1.6


def test_places_lead_to_the_source_pixels(tmp_path):
    """Plain views of a smooth picture, un-normalised, are the picture at the places they say."""
    data = load(write(tmp_path), preset="none")
    images = {pair.name: cv2.imread(str(pair.image))[..., ::-1].astype(np.float32) for pair in data.pairs}
    mean, std = np.array(data.mean), np.array(data.std)
    for views in batches_of(data):
        for row, name in enumerate(views.names):
            left, top = views.places[row, 0, :, 2].round().int().tolist()
            raw = views.view_a[row].numpy().transpose(1, 2, 0) * std + mean
            np.testing.assert_allclose(raw, images[name][top : top + 24, left : left + 24], atol=1e-3)


def test_batches_are_full_and_mix_images(tmp_path):
    data = load(write(tmp_path, [f"i{k}" for k in range(12)]))
    everything = batches_of(data, batch=10, crops=4)
    assert [len(views.names) for views in everything] == [10] * 4, "the last 8 of 48 pairs are left"
    assert all(len(set(views.names)) >= 5 for views in everything)
    counts = np.unique([name for views in everything for name in views.names], return_counts=True)[1]
    assert counts.max() == 4


def test_epochs_and_seeds_differ_and_repeat(tmp_path):
    data = load(write(tmp_path))
    first = batches_of(data, epoch=1)[0]
    assert same(first, batches_of(data, epoch=1)[0])
    assert not same(first, batches_of(data, epoch=2)[0]) and not same(first, batches_of(data, seed=1)[0])
    batches = ViewBatches(data, batch=4, crops=4, seed=0, workers=0)
    seen = []
    for epoch in (1, 2, 1):
        batches.set_epoch(epoch)
        seen.append(list(batches))
    assert all(same(one, other) for one, other in zip(seen[0], seen[2], strict=True))
    assert not same(seen[0][0], seen[1][0])


@pytest.mark.parametrize("spawn", [False, pytest.param(True, id="spawned")])
def test_workers_give_the_batches_of_this_process(tmp_path, spawn):
    if not spawn and not hasattr(os, "fork"):
        pytest.skip("needs fork")
    write(tmp_path / "few", "abc")
    write_slide(tmp_path / "few" / "slide.svs", draw_slide(1)[0])
    data = load(tmp_path / "few")
    own = batches_of(data, workers=0)
    other = batches_of(data, workers=2, spawn=spawn)
    close_places()
    assert len(own) == len(other) == 4
    assert all(same(one, two) for one, two in zip(own, other, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="slow where processes are started anew")
def test_workers_that_stay_give_every_epoch_its_own_batches(tmp_path):
    data = load(write(tmp_path, "abcde"))
    batches = ViewBatches(data, batch=4, crops=3, seed=0, workers=2)
    for epoch in (1, 2, 1):
        batches.set_epoch(epoch)
        expected = batches_of(data, batch=4, crops=3, epoch=epoch)
        assert all(same(one, other) for one, other in zip(batches, expected, strict=True))


@pytest.mark.parametrize("world", [2, 4])
def test_processes_have_together_what_one_has(tmp_path, world):
    data = load(write(tmp_path, "abcde"))
    whole = batches_of(data, batch=8, crops=5)
    parts = [batches_of(data, batch=8, crops=5, rank=rank, world=world) for rank in range(world)]
    assert len(whole) == 3 and all(len(part) == 3 for part in parts)
    for number, views in enumerate(whole):
        own = [part[number] for part in parts]
        joined = Views(*(torch.cat([getattr(v, p) for v in own]) for p in ("view_a", "view_b", "places")), own[0].names)
        assert same(views, joined) and all(v.names == views.names for v in own)
        assert all(len(v.view_a) == 8 // world for v in own)


def test_a_pair_is_alone_in_its_memory():
    views = Views(torch.zeros(3, 1, 2, 2), torch.ones(3, 1, 2, 2), torch.zeros(3, 2, 2, 3), ("a", "b", "c"))
    one = views.only(1)
    one.view_a.fill_(5)
    assert one.names == ("b",) and one.view_b.shape == (1, 1, 2, 2) and views.view_a.sum() == 0


def test_what_cannot_be_batched_is_refused(tmp_path):
    data = load(write(tmp_path))
    with pytest.raises(DatasetError) as caught:
        ViewBatches(data, batch=64, crops=4, seed=0, workers=0)
    message = str(caught.value)
    assert "4 images with 4 crops each give 16 pairs" in message and "--crops 16" in message and "-b 16" in message
    with pytest.raises(DatasetError, match="a batch of 7 cannot be shared by 2 processes.*-b 6 or 8"):
        ViewBatches(data, batch=7, crops=4, seed=0, workers=0, world=2)


@pytest.mark.parametrize("size", [(1, 1), (5, 60), (30, 40)])
@pytest.mark.parametrize("views_from", ["crop", "neighbours"])
def test_one_image_however_small_gives_batches(tmp_path, size, views_from):
    data = load(write(tmp_path, "a", size=size), size=32, views_from=views_from)
    for views in batches_of(data, batch=4, crops=8):
        assert views.view_a.shape == (4, 3, 32, 32) and views.view_a.isfinite().all() and views.view_b.isfinite().all()


def test_preprocessing_is_done_before_views_are_cut(tmp_path):
    write(tmp_path)
    found = check_images(find_images([tmp_path]), steps=("stretch",))
    plain = build(check_images(find_images([tmp_path])), "none")
    stretched = UnlabelledSet(found.pairs, plain.maker, found.channels, plain.mean, plain.std, steps=("stretch",))
    one, other = batches_of(plain)[0], batches_of(stretched)[0]
    assert torch.equal(one.places, other.places) and other.view_a.std() > 1.05 * one.view_a.std()


# ----------------------------------------------------------------------------------------------------------------------
# Slides


@pytest.mark.parametrize("views_from", ["crop", "neighbours"])
@pytest.mark.parametrize("reduction", [1.0, 2.0])
def test_views_of_slides_are_those_of_the_decoded_picture(tmp_path, views_from, reduction):
    picture = draw_slide(3)[0]
    write_slide(tmp_path / "a.svs", picture)
    slides = SlideOptions(reduction=reduction)
    found = check_images(find_images([tmp_path]), slides=slides)
    data = build(found, "histology", slides=slides, size=64, views_from=views_from)
    plain = build(found, "none", slides=slides, size=64, views_from=views_from)
    mean, std = np.array(data.mean), np.array(data.std)
    image = picture[:: int(reduction), :: int(reduction)]
    for views in batches_of(plain, batch=8, crops=16):
        for row in range(8):
            left, top = views.places[row, 0, :, 2].round().int().tolist()
            raw = views.view_a[row].numpy().transpose(1, 2, 0) * std + mean
            np.testing.assert_allclose(raw, image[top : top + 64, left : left + 64], atol=1e-3)
    for views in batches_of(data, batch=8, crops=16):
        assert views.view_a.isfinite().all() and (views.places[:, 0] != views.places[:, 1]).any()
    close_places()


def test_windows_of_slides_lie_in_tissue(tmp_path):
    write_slide(tmp_path / "a.svs", draw_slide(4, size=(1200, 1600))[0])
    shares = {}
    for tissue in ("none", "saturation"):
        slides = SlideOptions(tissue=tissue)
        data = build(check_images(find_images([tmp_path]), slides=slides), "none", slides=slides, size=48)
        coloured = [
            (view[1] < view[0] - 0.3).any() for views in batches_of(data, batch=8, crops=64) for view in views.view_a
        ]
        shares[tissue] = np.mean(coloured)
        close_places()
    assert shares["saturation"] > 0.85 > 0.7 > shares["none"]


def test_a_slide_smaller_than_a_view_is_reflected(tmp_path):
    write_slide(tmp_path / "a.svs", draw_slide(5, size=(130, 150), radius=(4, 9))[0], levels=1)
    data = load(tmp_path, preset="histology", size=200)
    (views,) = batches_of(data, batch=2, crops=2)
    assert views.view_a.shape == (2, 3, 200, 200) and views.view_a.isfinite().all()
    close_places()


def test_a_slide_and_views_of_whole_images_are_refused(tmp_path):
    write_slide(tmp_path / "a.svs", draw_slide(6)[0])
    with pytest.raises(DatasetError, match=r"a\.svs is a slide, and views come from whole images; .*--window 1\.5"):
        load(tmp_path, window=0)
