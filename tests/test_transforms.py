"""Changes of values are visible, keep shape, type and range, and are the same on 8 bit and on floats."""

from functools import partial

import cv2
import numpy as np
import pytest

import transforms as t

TOPS = {np.uint8: 255, np.float32: 1.0}
ANY = {  # on any number of channels
    "brightness_contrast": t.brightness_contrast,
    "gamma": t.gamma,
    "rgb_shift": t.rgb_shift,
    "blur": t.blur,
    "median": t.median,
    "downscale": t.downscale,
    "gaussian_noise": t.gaussian_noise,
    "sensor_noise": t.sensor_noise,
    "haze": t.haze,
    "shadow": t.shadow,
    "uneven_light": t.uneven_light,
    "band_gains": t.band_gains,
    "grain": t.grain,
    "solarise": t.solarise,
}
RGB = {
    "clahe": t.clahe,
    "hue_saturation": t.hue_saturation,
    "colour_jitter": t.colour_jitter,
    "pca_shift": t.pca_shift,
    "stain_shift": t.stain_shift,
    "to_grey": t.to_grey,
    "shuffle_channels": t.shuffle_channels,
}
PLACES = ["clahe-1", "pca_shift-5", "shuffle_channels-5"]
CASES = [f"{name}-{count}" for name in ANY for count in (1, 3, 5)] + [f"{name}-3" for name in RGB] + PLACES
TABLES = ("brightness_contrast", "gamma", "rgb_shift", "pca_shift")


def picture(dtype=np.uint8, channels=3, side=96):
    """Smooth coloured blobs with fine noise between 5 and 85 percent of the range, (side, side + 16, channels)."""
    generator = np.random.default_rng(channels)
    rows, columns = np.indices((side, side + 16))
    waves = [np.sin(rows / (5 + k)) * np.cos(columns / (7 - k)) for k in range(channels)]
    image = 0.45 + 0.3 * np.stack(waves, axis=2) + generator.uniform(-0.1, 0.1, (side, side + 16, channels))
    return (image * TOPS[dtype]).astype(dtype)


def pick(case):
    name, channels = case.split("-")
    return (ANY | RGB)[name], int(channels)


def apply(run, image, seed):
    return run(image, np.random.default_rng(seed))


@pytest.mark.parametrize("dtype", TOPS)
@pytest.mark.parametrize("case", CASES)
def test_changes_show_and_keep_shape_type_and_range(case, dtype):
    run, channels = pick(case)
    image = picture(dtype, channels)
    kept, shown = image.copy(), 0
    for seed in range(20):
        out = apply(run, image, seed)
        assert (out.shape, out.dtype) == (image.shape, image.dtype)
        assert out.flags.c_contiguous and np.isfinite(out).all()
        assert 0 <= out.min() and out.max() <= TOPS[dtype]
        assert np.array_equal(out, apply(run, image, seed)), "the seed alone decides"
        shown += np.abs(out.astype(float) - image).mean() > 0.01 * TOPS[dtype]
    assert shown >= 14
    assert np.array_equal(image, kept)


@pytest.mark.parametrize("case", CASES)
def test_changes_of_nothing_but_black_or_white_stay_finite(case):
    run, channels = pick(case)
    for dtype, top in TOPS.items():
        for value in (0, top):
            out = apply(run, np.full((24, 24, channels), value, dtype), 1)
            assert np.isfinite(out).all() and 0 <= out.min() and out.max() <= top


@pytest.mark.parametrize("case", [case for case in CASES if "noise" not in case and "grain" not in case])
def test_8_bit_and_float_agree(case):
    run, channels = pick(case)
    image = picture(np.uint8, channels)
    image[0, 0], image[0, 1] = 0, 255  # CLAHE of floats works between the darkest and the brightest
    for seed in range(12):
        coarse, fine = (apply(run, same, seed) for same in (image, (image / np.float32(255)).astype(np.float32)))
        assert np.abs(fine * 255 - coarse).mean() < (2.5 if "clahe" in case else 1.5), seed


def test_tables_equal_the_formula_on_each_pixel():
    """A table gives what rounding the formula's result on a float image gives, but for what rounds at a half."""
    image = picture()
    fine = (image / np.float32(255)).astype(np.float32)
    for name in TABLES:
        for seed in range(8):
            expected = np.rint(apply((ANY | RGB)[name], fine, seed) * 255)
            difference = np.abs(apply((ANY | RGB)[name], image, seed) - expected)
            assert difference.max() <= 1 and (difference > 0).mean() < 0.05, name


def test_a_table_is_the_formula_at_every_level():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    weights = np.array([0.5, 1, 2], np.float32)
    out = t.map_values(ramp, lambda values, weight: values**2 * weight, weights)
    expected = np.array([[min(255, round(255 * (v / 255) ** 2 * w)) for w in weights.tolist()] for v in range(256)])
    assert np.abs(out.reshape(256, 3) - expected).max() == 0


def test_brightness_is_that_of_the_picture_and_not_of_the_range():
    dim = (picture() // 8).astype(np.uint8)
    for seed in range(20):
        out = apply(t.brightness_contrast, dim, seed)
        assert 0.5 < out.mean() / dim.mean() < 1.6


def test_hue_turns_and_grey_stays_grey():
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 200
    grey = np.full((8, 8, 3), 90, np.uint8)
    hues = set()
    for seed in range(10):
        hues.add(int(cv2.cvtColor(apply(t.hue_saturation, red, seed), cv2.COLOR_RGB2HSV)[0, 0, 0]))
        assert np.ptp(apply(t.hue_saturation, grey, seed)) == 0
    assert len(hues) > 6 and all(hue <= 20 or hue >= 160 for hue in hues)


def jitter_by_steps(image, seed):
    """Brightness, contrast, saturation, hue one after the other on values of 0 to 1, as their names say."""
    rng, luma = np.random.default_rng(seed), np.array([0.299, 0.587, 0.114])
    lighter, harder, richer = (1 + rng.uniform(-limit, limit) for limit in (0.4, 0.4, 0.2))
    angle = np.deg2rad(rng.uniform(-36, 36))
    out = image * lighter
    middle = (out @ luma).mean()
    out = middle + harder * (out - middle)
    grey = (out @ luma)[..., None]
    out = grey + richer * (out - grey)
    in_phase = out @ (0.596, -0.274, -0.322)
    quadrature = out @ (0.211, -0.523, 0.312)
    around = np.exp(1j * angle) * (in_phase + 1j * quadrature)
    solved = np.linalg.inv([luma, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    return np.stack([out @ luma, around.real, around.imag], axis=2) @ solved.T


def test_one_matrix_is_jitter_step_by_step_and_greys_stay_grey():
    image = picture(np.float32)
    grey = image[..., :1].repeat(3, axis=2)
    for seed in range(10):
        expected = np.clip(jitter_by_steps(image.astype(float), seed), 0, 1)
        np.testing.assert_allclose(apply(t.colour_jitter, image, seed), expected, atol=2e-5)
        assert np.ptp(apply(t.colour_jitter, grey, seed), axis=2).max() < 1e-5


def test_band_gains_are_each_bands_own_and_keep_its_pattern():
    image = picture(np.float32, channels=5)
    image = 0.4 + 0.2 * image  # far from both ends, where values are cut
    for seed in range(6):
        out = apply(t.band_gains, image, seed)
        slopes = [np.polyfit(image[..., band].ravel(), out[..., band].ravel(), 1)[0] for band in range(5)]
        assert all(0.69 < slope < 1.31 for slope in slopes) and np.std(slopes) > 0.03
        for band in range(5):
            assert np.corrcoef(image[..., band].ravel(), out[..., band].ravel())[0, 1] > 0.999


def test_solarise_turns_what_is_lighter_than_the_middle():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    assert apply(t.solarise, ramp, 0).ravel().tolist() == [
        value if value < 128 else 255 - value for value in range(256)
    ]
    dim = (ramp / np.float32(2550)).astype(np.float32)  # 16 bits of which a tenth is used
    out = apply(t.solarise, dim, 0)
    assert out.min() == 0 and abs(out.max() - 0.05) < 1e-3, "dim pictures stay dim"
    assert np.abs(out - dim).max() > 0.09


@pytest.mark.parametrize("dtype", TOPS)
def test_grain_is_a_share_of_the_pictures_own_spread(dtype):
    bright = picture(dtype)
    dim = (bright * 0.2).astype(dtype)
    for image in (bright, dim):
        for seed in range(6):
            change = apply(t.grain, image, seed).astype(float) - image
            assert 0.025 < change.std() / image.std() < 0.17


def test_uneven_light_is_smooth_and_the_same_factor_for_all_channels():
    image = np.full((96, 96, 3), 0.5, np.float32)
    for seed in range(6):
        out = apply(t.uneven_light, image, seed)
        assert np.ptp(out, axis=2).max() < 1e-6 and 0.03 < np.ptp(out) < 0.31
        assert np.abs(np.diff(out, axis=0)).max() < 0.01 and np.abs(np.diff(out, axis=1)).max() < 0.01


def test_pca_shifts_along_the_colours_that_are_there():
    """Pixels that vary along one line of colour are shifted along that line and by less than twice half the spread."""
    rng, line = np.random.default_rng(0), np.array([3, 2, 1]) / np.sqrt(14)
    image = (0.5 + 0.1 * rng.standard_normal((64, 64, 1)) * line).clip(0.02, 0.98).astype(np.float32)
    for seed in range(10):
        shift = (apply(t.pca_shift, image, seed) - image).mean(axis=(0, 1))
        along = shift @ line
        assert np.linalg.norm(shift - along * line) < 0.003 and abs(along) < 0.06
    assert len({apply(t.pca_shift, image, seed).tobytes() for seed in range(10)}) == 10


def test_stains_change_each_for_itself():
    """A picture of eosin alone keeps its colour direction in optical density when only factors change."""
    amounts = np.random.default_rng(0).uniform(0.2, 0.7, (32, 32, 1))
    image = np.exp(-amounts * t.STAINS[1]).astype(np.float32)
    for seed in range(8):
        out = apply(partial(t.stain_shift, offset=0), image, seed)
        density = -np.log((out * 255 + 1) / 256)
        ratio = density / (amounts * t.STAINS[1])
        assert 0.7 < np.median(ratio[..., 1]) < 1.3
        np.testing.assert_allclose(ratio[..., 1], np.median(ratio[..., 1]), rtol=0.04)


def test_noise_is_normal_of_the_wanted_strength_and_its_own_everywhere():
    rng = np.random.default_rng(0)
    noise = t.normal_noise(rng, (400, 500, 3), 2.0)
    assert noise.shape == (400, 500, 3) and noise.dtype == np.float32
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 2) < 0.02
    inside = [(np.abs(noise) < 2 * width).mean() for width in (1, 2, 3)]
    np.testing.assert_allclose(inside, [0.6827, 0.9545, 0.9973], atol=0.002)
    flat = noise[..., 0] / 2
    assert abs((flat[1:] * flat[:-1]).mean()) < 0.01 and abs((flat[:, 1:] * flat[:, :-1]).mean()) < 0.01
    assert abs((noise[..., 0] * noise[..., 1]).mean()) < 0.04
    assert not np.array_equal(noise, t.normal_noise(rng, (400, 500, 3), 2.0))


@pytest.mark.parametrize("dtype", TOPS)
def test_gaussian_noise_has_the_strength_it_says(dtype):
    image = np.full((128, 128, 3), 0.5 * TOPS[dtype], dtype)
    for seed in range(6):
        change = (apply(t.gaussian_noise, image, seed).astype(float) - image) / TOPS[dtype]
        assert 0.011 < change.std() < 0.042 and abs(change.mean()) < 0.002


def test_sensor_noise_grows_with_the_signal_and_has_no_specks():
    dark, light = (np.full((128, 128, 3), value, np.uint8) for value in (40, 160))
    for seed in range(10):
        change = [apply(t.sensor_noise, image, seed).astype(float) - image for image in (dark, light)]
        assert 0.3 < change[0].std() < 15
        assert 1.7 < change[1].std() / change[0].std() < 2.3  # the root of 160 / 40
        assert np.abs(change[0]).max() < 7 * change[0].std()
        assert np.corrcoef(change[1][..., 0].ravel(), change[1][..., 1].ravel())[0, 1] > 0.05


def test_haze_only_lightens_and_shadow_only_darkens_a_part():
    image = picture()
    for seed in range(10):
        assert (apply(t.haze, image, seed) >= image).all()
        change = apply(t.shadow, image, seed).astype(int) - image
        assert (change <= 0).all() and 0.05 < (change < -2).any(axis=2).mean() < 0.95


def test_blur_and_downscale_take_detail_away():
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    for run in (t.blur, t.median, t.downscale):
        for seed in range(5):
            out = apply(run, image, seed)
            assert (
                np.abs(np.diff(out.astype(float), axis=1)).mean()
                < 0.85 * np.abs(np.diff(image.astype(float), axis=1)).mean()
            )


def test_fine_steps_of_floats_stay():
    ramp = np.linspace(0.1, 0.2, 64 * 64, dtype=np.float32).reshape(64, 64, 1).repeat(3, axis=2)
    for name, run in (ANY | RGB).items():
        if name not in ("clahe", "shadow", "solarise"):  # these make equal values differ
            assert len(np.unique(apply(run, ramp, 2))) > 800, name


@pytest.mark.parametrize("ignored", [False, True])
def test_holes_are_black_and_ignored_only_if_asked(ignored):
    image, mask = np.full((100, 150, 3), 90, np.uint8), np.tile(np.arange(150) // 50, (100, 1)).astype(np.uint8)
    for seed in range(20):
        out, labels = t.holes(image, mask, np.random.default_rng(seed), ignored=ignored)
        black = (out == 0).all(axis=2)
        assert ((out == 90).all(axis=2) | black).all()
        assert 0.0003 < black.mean() <= 8 * 0.0064 * 1.2
        assert np.array_equal(labels, np.where(black & ignored, 255, mask))
    assert (image == 90).all() and (mask != 255).all()


def test_shuffled_cells_keep_every_pixel_with_its_label():
    image = np.arange(50 * 64).reshape(50, 64, 1).astype(np.uint16)
    mask = (image[..., 0] % 251).astype(np.uint8)
    orders = set()
    for seed in range(10):
        out, labels = t.shuffle_cells(image, mask, np.random.default_rng(seed))
        assert np.array_equal(np.sort(out.ravel()), np.sort(image.ravel()))
        assert np.array_equal(labels, (out[..., 0] % 251).astype(np.uint8))
        assert np.array_equal(out[48:], image[48:]) and np.array_equal(out[:, 63:], image[:, 63:])
        for row in range(3):
            for column in range(3):
                cell = out[row * 16 : row * 16 + 16, column * 21 : column * 21 + 21, 0].astype(int)
                assert (np.diff(cell, axis=1) == 1).all() and (np.diff(cell, axis=0) == 64).all()
        orders.add(out.tobytes())
    assert len(orders) == 10
