"""Presets keep shape, dtype, range and classes, move image and mask together, and depend on the seed alone."""

import multiprocessing
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import albumentations as A
import numpy as np
import pytest

import augmentations
from augmentations import PRESETS, Augmentation, OnRGB

pytestmark = pytest.mark.filterwarnings("error")  # The library only warns about arguments it does not know.

TOPS = {np.uint8: 255, np.uint16: 65535, np.float32: 1.0}
PLAIN = [
    augmentations.BrightnessContrast(p=1),
    A.RandomGamma(p=1),
    augmentations.SensorNoise(p=1),
    augmentations.Downscale(scale_range=(0.4, 0.8), p=1),
]
COLOURS = [
    augmentations.Clahe(p=1),
    augmentations.HueSaturationValue(p=1),
    A.RGBShift(p=1),
    A.FancyPCA(alpha=1.0, p=1),
    augmentations.Haze(p=1),
]


def picture(dtype=np.uint8, channels=3, side=64, top=None):
    """Smooth blobs with fine noise between 10 and 80 percent of the range, (side, side, channels)."""
    generator = np.random.default_rng(channels)
    rows, columns = np.indices((side, side))
    waves = [np.sin(rows / (5 + k)) * np.cos(columns / (7 - k)) for k in range(channels)]
    image = 0.45 + 0.3 * np.stack(waves, axis=2) + generator.uniform(-0.05, 0.05, (side, side, channels))
    return (image * (TOPS[dtype] if top is None else top)).astype(dtype)


def blocks(side=64, size=16):
    """Square cells of the classes 0, 3, 7 and 255 (ignore), (side, side) uint8."""
    rows, columns = np.indices((side, side)) // size
    return np.array([0, 3, 7, 255], np.uint8)[(rows + 2 * columns) % 4]


def run(preset, image, mask, seed, **kwargs):
    options = {"rgb": image.shape[2] >= 3, "value_range": (0, TOPS[image.dtype.type])} | kwargs
    augmentation = Augmentation(preset, **options)
    return augmentation.local(*augmentation.geometric(image, mask, seed), seed)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("dtype", TOPS)
@pytest.mark.parametrize("preset", PRESETS)
def test_shape_dtype_range_and_classes_stay(preset, dtype, channels):
    image, mask = picture(dtype, channels), blocks()
    kept = image.copy(), mask.copy()
    augmentation = Augmentation(preset, rgb=channels >= 3, value_range=(0, TOPS[dtype]))
    changed = 0
    for seed in range(25):
        out, out_mask = augmentation.local(*augmentation.geometric(image, mask, seed), seed)
        assert (out.shape, out.dtype) == (image.shape, image.dtype)
        assert (out_mask.shape, out_mask.dtype) == (mask.shape, mask.dtype)
        assert np.isfinite(out).all()
        assert 0 <= out.min() and out.max() <= TOPS[dtype]
        assert set(np.unique(out_mask)) <= {0, 3, 7, 255}
        assert 255 in out_mask
        assert out.flags.c_contiguous
        changed += np.abs(out.astype(float) - image).mean() > 0.01 * TOPS[dtype]
    assert changed == 0 if preset == "none" else changed >= 15
    assert np.array_equal(image, kept[0]) and np.array_equal(mask, kept[1])


@pytest.mark.parametrize(("channels", "low"), [(3, 0), (5, 0), (5, -100)])
@pytest.mark.parametrize("preset", PRESETS[1:])
def test_mask_moves_with_a_picture_of_coordinates(preset, channels, low):
    side, size = 128, 16
    coordinates = np.indices((side, side)).transpose(1, 2, 0).astype(np.float32)
    ones = np.ones((side, side, 1), np.float32)  # Less than 1 afterwards: mixed with the fill from outside.
    image = np.concatenate([coordinates] * (channels // 2) + [ones], axis=2)
    augmentation = Augmentation(preset, rgb=False, value_range=(low, side))
    moved = 0
    for seed in range(25):
        out, out_mask = augmentation.geometric(image, blocks(side, size), seed)
        found, inside = out[..., -3:-1], out[..., -1] > 0.999  # (row, column) that each pixel came from
        source = np.clip(np.rint(found).astype(int), 0, side - 1)
        centre = np.abs((found + 0.5) % size - size / 2).max(axis=2) < size / 2 - 2  # Away from the edges of cells.
        expected = blocks(side, size)[source[..., 0], source[..., 1]]
        assert (expected == out_mask)[inside & centre].all(), seed
        assert (out_mask[out[..., -1] < low + 1e-3] == 255).all(), seed
        assert inside.mean() > 0.7
        moved += not np.array_equal(out, image)
    assert moved >= 12


@pytest.mark.parametrize("preset", ["light", "medium", "vessel"])
@pytest.mark.parametrize("low", [0, -1000, 200])
def test_constant_borders_are_ignored_and_filled_with_the_low_end(preset, low):
    image = np.full((96, 96, 5), low + 300, np.float32)
    augmentation = Augmentation(preset, rgb=True, value_range=(low, low + 400))
    outside = 0
    for seed in range(60):
        out, out_mask = augmentation.geometric(image, np.zeros((96, 96), np.uint8), seed)
        assert set(np.unique(out_mask)) <= {0, 255}
        assert out.min() >= low - 1e-3 and out.max() <= low + 300 + 1e-3
        touched = np.abs(out - (low + 300)).max(axis=2) > 299.9  # Nothing but fill.
        assert not (touched & (out_mask == 0)).any(), seed
        outside += touched.any()
    assert outside >= 3


def test_reflected_borders_bring_in_no_ignored_pixels():
    mask = np.zeros((96, 96), np.uint8)
    image = picture(side=96)
    augmentation = Augmentation("hard", rgb=True, value_range=(0, 255))
    assert all(not augmentation.geometric(image, mask, seed)[1].any() for seed in range(40))


def test_shuffled_cells_move_the_mask_too():
    mask = blocks(96, 32) // 3 % 2
    image = np.repeat((40 + 170 * mask)[..., None], 3, axis=2).astype(np.uint8)
    augmentation = Augmentation("hard", rgb=True, value_range=(0, 255))
    shuffled = 0
    for seed in range(60):
        out, out_mask = augmentation.local(image, mask, seed)
        shuffled += not np.array_equal(out_mask, mask)
        assert np.corrcoef(out.mean(axis=2).ravel(), out_mask.ravel())[0, 1] > 0.75, seed
    assert shuffled >= 5


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("transform", COLOURS, ids=lambda transform: type(transform).__name__)
def test_colour_transforms_leave_extra_channels_alone(transform, dtype):
    image = picture(dtype, 5)
    step = OnRGB(transform, p=1)
    step.set_random_state(np.random.default_rng(3), random.Random(3))
    out = step(image=image)["image"]
    assert out.dtype == dtype
    assert np.array_equal(out[..., 3:], image[..., 3:])
    assert np.abs(out[..., :3].astype(float) - image[..., :3]).mean() > 0.004 * TOPS[dtype]


@pytest.mark.parametrize("preset", PRESETS)
def test_colour_transforms_are_only_used_on_rgb(preset):
    def names(steps):
        for step in steps:
            yield type(step).__name__
            yield from names(getattr(step, "transforms", []))

    bare = {type(transform).__name__ for transform in COLOURS} - {"Clahe"}
    for rgb in (True, False):
        for single in (True, False):
            found = set(names(augmentations._local_steps(preset, rgb, single)))
            assert not found & bare
            assert rgb or "OnRGB" not in found
            assert "Clahe" not in found or single


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_a_scaled_picture_with_a_scaled_range_gives_the_scaled_result(preset, channels):
    image, mask = picture(np.float32, channels), blocks()
    for seed in range(15):
        small, _ = run(preset, image, mask, seed)
        large, _ = run(preset, image * 4000 - 1000, mask, seed, value_range=(-1000, 3000))
        assert np.abs((large + 1000) / 4000 - small).mean() < 2e-3  # CLAHE may round a level differently.


@pytest.mark.parametrize("transform", [*COLOURS[1:], *PLAIN], ids=lambda transform: type(transform).__name__)
def test_8_bit_and_float_agree(transform):
    image = picture()
    for seed in range(20):
        results = []
        for same in (image, (image / np.float32(255)).astype(np.float32)):
            transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
            results.append(transform(image=same)["image"])
        assert np.abs(results[1] * 255 - results[0]).mean() < 1.5, seed


def test_dim_pictures_are_not_blacked_out():
    for dtype, top, presets in ((np.uint8, 60, PRESETS[1:]), (np.uint16, 3000, ("light", "vessel"))):
        image = picture(dtype, top=top)
        for preset in presets:
            for seed in range(20):
                out, out_mask = run(preset, image, np.zeros((64, 64), np.uint8), seed)
                assert (out[out_mask == 0].max(axis=1) == 0).mean() < 0.1, (dtype, preset, seed)


@pytest.mark.parametrize("preset", PRESETS)
def test_five_bands_of_raw_values_are_neither_clipped_nor_stretched(preset):
    image, mask = picture(np.uint16, 5, top=4000), blocks()
    for seed in range(25):
        out, out_mask = run(preset, image, mask, seed, rgb=False, value_range=(0, 4000))
        known = out_mask < 255
        ratio = out[known].mean(axis=0) / image[mask < 255].mean(axis=0)
        assert (0.45 < ratio).all() and (ratio < 1.9).all(), seed
        assert out.max() <= 4000
        assert len(np.unique(out)) > 1000


def test_values_beyond_the_range_are_kept():
    image, mask = picture(np.uint16, 5, top=4000), blocks()
    for seed in range(20):
        assert run("one", image, mask, seed, rgb=False, value_range=(0, 2000))[0].max() > 2000
        low = run("one", image, mask, seed, rgb=False, value_range=(2500, 4000))[0]
        assert low.min() < 1500
        assert len(np.unique(low[low < 2500])) > 500


def test_bands_may_have_ranges_of_their_own():
    image, mask = picture(np.float32, 5), blocks()
    factors = np.array([1, 10, 1000, 0.01, 1], np.float32)
    for seed in range(10):
        expected, _ = run("medium", image, mask, seed, rgb=False)
        out, _ = run("medium", image * factors, mask, seed, rgb=False, value_range=(0, factors.tolist()))
        np.testing.assert_allclose(out / factors, expected, atol=1e-4)


def test_16_bit_keeps_fine_steps():
    ramp = np.linspace(8000, 12000, 64 * 64).reshape(64, 64, 1).repeat(3, axis=2).astype(np.uint16)
    for preset in PRESETS:
        for seed in range(10):
            assert len(np.unique(run(preset, ramp, blocks(), seed)[0])) > 800, (preset, seed)


def test_light_lowers_the_resolution_of_few_samples():
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    augmentation = Augmentation("light", rgb=True, value_range=(0, 255))

    def sharpness(picture):
        return np.abs(np.diff(picture.astype(float), axis=1)).mean() / picture.std()

    blurred = sum(
        sharpness(augmentation.local(image, blocks(), seed)[0]) < 0.75 * sharpness(image) for seed in range(200)
    )
    assert 5 <= blurred <= 40


@pytest.mark.parametrize("side", [128, 512])
def test_elastic_moves_visibly_and_never_folds(side):
    elastic = augmentations.SmoothElastic(p=1)
    rows, columns = np.indices((side, side))
    for seed in range(8):
        elastic.set_random_seed(seed)
        maps = elastic.get_params_dependent_on_data({"shape": (side, side, 3)}, {})
        shift = np.sqrt(((maps["map_x"] - columns) ** 2 + (maps["map_y"] - rows) ** 2).mean())
        assert 2 <= shift <= 6.01
        stretch = np.gradient(maps["map_x"], axis=1) * np.gradient(maps["map_y"], axis=0)
        shear = np.gradient(maps["map_x"], axis=0) * np.gradient(maps["map_y"], axis=1)
        assert (stretch - shear).min() > 0


def test_sensor_noise_has_no_specks():
    image = np.full((128, 128, 3), 60, np.uint8)
    noise = augmentations.SensorNoise(p=1)
    for seed in range(10):
        noise.set_random_seed(seed)
        difference = noise(image=image)["image"].astype(float) - image
        assert 0.3 < difference.std() < 15
        assert np.abs(difference).max() < 7 * difference.std()


def test_flips_are_independent():
    image = np.zeros((8, 12, 3), np.uint8)
    image[0, 0] = 200
    corners = {(0, 0): 0, (0, 11): 0, (7, 0): 0, (7, 11): 0}
    augmentation = Augmentation("safe", rgb=True, value_range=(0, 255))
    for seed in range(200):
        out, _ = augmentation.geometric(image, np.zeros((8, 12), np.uint8), seed)
        corners[tuple(np.argwhere(out[..., 0])[0].tolist())] += 1
    assert min(corners.values()) > 25


def test_square_pictures_get_all_eight_positions():
    image, mask = picture(side=8), np.zeros((8, 8), np.uint8)
    augmentation = Augmentation("safe", rgb=True, value_range=(0, 255))
    assert len({augmentation.geometric(image, mask, seed)[0].tobytes() for seed in range(100)}) == 8


@pytest.mark.parametrize("preset", PRESETS)
def test_oblong_pictures_keep_their_shape(preset):
    image, mask = picture(side=96)[:48], blocks(96)[:48]
    for seed in range(10):
        out, out_mask = run(preset, image, mask, seed)
        assert out.shape == image.shape and out_mask.shape == mask.shape


@pytest.mark.parametrize("preset", PRESETS[1:])
def test_the_seed_alone_decides(preset):
    image, mask = picture(), blocks()
    first = Augmentation(preset, rgb=True, value_range=(0, 255))
    second = pickle.loads(pickle.dumps(first))
    np.random.seed(1)  # noqa: NPY002
    forward = [first.local(*first.geometric(image, mask, seed), seed) for seed in range(12)]
    np.random.seed(2)  # noqa: NPY002
    backward = [second.local(*second.geometric(image, mask, seed), seed) for seed in reversed(range(12))][::-1]
    for (image_a, mask_a), (image_b, mask_b) in zip(forward, backward, strict=True):
        assert np.array_equal(image_a, image_b) and np.array_equal(mask_a, mask_b)
    assert len({out.tobytes() for out, _ in forward}) >= (5 if preset == "safe" else 9)


def test_a_spawned_process_gives_the_same_picture():
    image, mask = picture(), blocks()
    augmentation = Augmentation("hard", rgb=True, value_range=(0, 255))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        out, out_mask = pool.apply(augmentation.geometric, (image, mask, 5))
    expected, expected_mask = augmentation.geometric(image, mask, 5)
    assert np.array_equal(out, expected) and np.array_equal(out_mask, expected_mask)


def test_import_does_not_ask_for_newer_versions():
    code = "import augmentations, albumentations.check_version as check; assert check.opener is None"
    environment = {name: value for name, value in os.environ.items() if name != "NO_ALBUMENTATIONS_UPDATE"}
    root = Path(augmentations.__file__).parent
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=root, env=environment)


def test_unknown_preset_lists_the_names():
    with pytest.raises(ValueError, match="'strong'.*none, safe, light, medium, hard, one, vessel"):
        Augmentation("strong", rgb=True, value_range=(0, 255))


@pytest.mark.parametrize("value_range", [(1, 1), (5, 0), (0, float("nan")), (0, [1, 0])])
def test_empty_range_is_refused(value_range):
    with pytest.raises(ValueError, match="value_range is"):
        Augmentation("hard", rgb=True, value_range=value_range)


@pytest.mark.parametrize(
    ("image", "mask", "message"),
    [
        (np.zeros((8, 8), np.uint8), np.zeros((8, 8), np.uint8), r"expected \(H, W, C\)"),
        (np.zeros((8, 8, 3), np.float64), np.zeros((8, 8), np.uint8), "float64"),
        (np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9), np.uint8), r"expected uint8 \(8, 8\)"),
        (np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.int64), "int64"),
        (np.zeros((8, 8, 1), np.uint8), np.zeros((8, 8), np.uint8), "rgb=True"),
        (np.full((8, 8, 3), np.nan, np.float32), np.zeros((8, 8), np.uint8), "NaN"),
    ],
)
def test_wrong_samples_are_refused(image, mask, message):
    with pytest.raises(ValueError, match=message):
        Augmentation("one", rgb=True, value_range=(0, 255)).local(image, mask, 0)
