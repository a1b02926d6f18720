"""Presets keep shape, dtype, range and classes, move image and mask together, and depend on the seed alone."""

import multiprocessing
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import augmentations
from augmentations import LOCAL, PRESETS, Augmentation

pytestmark = pytest.mark.filterwarnings("error")

TOPS = {np.uint8: 255, np.uint16: 65535, np.float32: 1.0}


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


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_a_scaled_picture_with_a_scaled_range_gives_the_scaled_result(preset, channels):
    image, mask = picture(np.float32, channels), blocks()
    for seed in range(15):
        small, _ = run(preset, image, mask, seed)
        large, _ = run(preset, image * 4000 - 1000, mask, seed, value_range=(-1000, 3000))
        assert np.abs((large + 1000) / 4000 - small).mean() < 2e-3  # CLAHE may round a level differently.


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


@pytest.mark.parametrize(("dtype", "channels"), [(np.float32, 3), (np.float32, 5), (np.uint16, 5)])
@pytest.mark.parametrize("preset", PRESETS[1:])
def test_mask_moves_with_a_picture_of_coordinates(preset, dtype, channels):
    side, size = 128, 16
    coordinates = np.indices((side, side)).transpose(1, 2, 0)
    image = (np.concatenate([coordinates] * 3, axis=2)[..., -channels:] * 500).astype(dtype)
    augmentation, mask = Augmentation(preset, rgb=False, value_range=(0, side * 500)), blocks(side, size)
    moved = 0
    for seed in range(20):
        out, out_mask = augmentation.geometric(image, mask, seed)
        found = out[..., -2:] / 500  # (row, column) that each pixel came from
        source = np.clip(np.rint(found).astype(int), 0, side - 1)
        centre = np.abs((found + 0.5) % size - size / 2).max(axis=2) < size / 2 - 2  # away from the edges of cells
        inside = (out_mask != 255) | (mask[source[..., 0], source[..., 1]] == 255)
        assert (mask[source[..., 0], source[..., 1]] == out_mask)[inside & centre].all(), seed
        assert inside.mean() > 0.6
        moved += not np.array_equal(out, image)
    assert moved >= 10


@pytest.mark.parametrize("preset", PRESETS)
def test_what_comes_from_outside_is_ignored_and_never_black(preset):
    image, mask = np.full((96, 96, 5), 300, np.float32), np.zeros((96, 96), np.uint8)
    augmentation = Augmentation(preset, rgb=True, value_range=(200, 400))
    outside = 0
    for seed in range(60):
        out, out_mask = augmentation.geometric(image, mask, seed)
        assert set(np.unique(out_mask)) <= {0, 255}
        np.testing.assert_allclose(out, 300, rtol=1e-5)
        assert (out_mask == 255).mean() < 0.45
        outside += out_mask.any()
    assert outside >= 10 if preset not in ("none", "safe", "one") else outside == 0


def test_colours_leave_extra_channels_alone_and_are_only_for_rgb():
    steps = {step for chances in LOCAL.values() for chance in chances for step in chance.steps}
    assert {step.on for step in steps} == {"all", "colour", "light", "bands", "mask"}
    for step in steps:
        expected = {"all": 5, "mask": 5, "colour": 3, "light": 3, "bands": 3}[step.on]
        assert step.channels(5, rgb=True) == expected
        assert step.channels(5, rgb=False) == {"all": 5, "mask": 5, "bands": 5}.get(step.on, 0)
        assert step.channels(1, rgb=False) == {"all": 1, "mask": 1, "light": 1}.get(step.on, 0)
    only = [augmentations.Chance(1, (step,)) for step in steps if step.on in ("colour", "light", "bands")]
    for dtype in TOPS:
        image, mask = picture(dtype, 5), blocks()
        for chance in only:
            augmentation = Augmentation("none", rgb=True, value_range=(0, TOPS[dtype]))
            augmentation.changes = (chance,)
            out, _ = augmentation.local(image, mask, 3)
            np.testing.assert_allclose(
                out[..., 3:], image[..., 3:], atol=0 if dtype == np.uint8 else 1e-5 * TOPS[dtype]
            )
            assert np.abs(out[..., :3].astype(float) - image[..., :3]).mean() > 0.002 * TOPS[dtype]


@pytest.mark.parametrize("preset", ["medium", "hard"])
def test_holes_are_ignored_if_asked(preset):
    image, mask = np.full((96, 96, 3), 128, np.uint8), np.zeros((96, 96), np.uint8)
    plain, careful = (
        Augmentation(preset, rgb=True, value_range=(0, 255), ignore_holes=ignored) for ignored in (False, True)
    )
    sent, found = pickle.loads(pickle.dumps(careful)), 0
    for seed in range(60):
        out, labels = careful.local(image, mask, seed)
        assert np.array_equal(labels, sent.local(image, mask, seed)[1]), "a started loader process gets a copy"
        same, kept = plain.local(image, mask, seed)
        assert np.array_equal(out, same) and not kept.any()
        found += labels.any()
        assert not labels.any() or np.median(out[labels == 255]) < 0.5 * np.median(out[labels == 0])
    assert found >= 8


def test_training_needs_no_augmentation_library():
    code = "import augmentations, sys; assert 'albumentations' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(augmentations.__file__).parent)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("dtype", TOPS)
def test_every_step_shows_and_keeps_type_range_and_classes(dtype, channels):
    image, mask, top = picture(dtype, channels), blocks(), TOPS[dtype]
    seen = set()
    for preset in PRESETS:
        for name, step in Augmentation(preset, rgb=channels == 3, value_range=(0, top)).single_steps(channels):
            shown, seen = 0.0, seen | {name}
            for seed in range(6):
                out, labels = step.local(*step.geometric(image, mask, seed), seed)
                assert (out.shape, out.dtype, labels.dtype) == (image.shape, image.dtype, np.uint8), name
                assert 0 <= out.min() and out.max() <= top and set(np.unique(labels)) <= {0, 3, 7, 255}, name
                shown = max(shown, np.abs(out.astype(float) - image).mean() / top)
            assert shown > 0.012, (preset, name)
    everywhere = {"turn", "affine", "elastic", "holes", "shuffle_cells", "gaussian_noise", "gamma", "blur", "downscale"}
    assert everywhere <= seen
    assert ("stain_shift" in seen) == (channels == 3) and ("clahe" in seen) == (channels < 5)
