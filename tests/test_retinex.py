import numpy as np
import pytest
from skimage.filters import threshold_otsu
from skimage.morphology import reconstruction

from annotation import retinex, scale, thresholds


@pytest.mark.parametrize("limit", [retinex.PASSES, 8])
def test_reconstruction_is_that_of_scikit_image(monkeypatch, limit):
    monkeypatch.setattr(retinex, "PASSES", limit)
    rng = np.random.default_rng(1)
    mask = rng.random((50, 60)).astype(np.float32)
    mask[5, 3:57] = mask[5:45, 56] = 1.0  # a long path to grow along
    marker = np.zeros_like(mask)
    marker[5, 3] = 1.0
    marker[30:33, 10:12] = 0.5
    marker = np.minimum(marker, mask)
    assert np.array_equal(retinex.reconstruct(marker, mask), reconstruction(marker, mask).astype(np.float32))


def test_spots_go_and_outlines_stay():
    image = np.full((60, 60), 0.5, np.float32)
    image[20:50, 20:50] = 1.0
    clean = image.copy()
    image[5, 5], image[30, 30] = 1.0, 0.0
    assert np.allclose(retinex.remove_spots(image, 5), clean)


def test_retinex_removes_a_slope_of_light_but_no_object():
    rows, columns = np.mgrid[:120, :160].astype(np.float32)
    light = 0.2 + columns / 160
    objects = 1 + 0.5 * (((rows - 60) ** 2 + (columns % 40 - 20) ** 2) < 64)
    flat = retinex.retinex(light * objects, (15.0, 30.0))
    inner = slice(40, 120)
    background = flat[10:20, inner].mean(axis=0)
    assert np.ptp(background) < 0.25 * (flat[60, 60] - background.mean())
    assert not retinex.retinex(np.full((10, 10), 3.0, np.float32), (5.0,)).any()


def test_the_bilateral_filter_works_in_units_of_the_data():
    rng = np.random.default_rng(0)
    step = np.repeat([0.0, 1.0], 40)[None].repeat(80, 0) + rng.normal(0, 0.05, (80, 80))
    for unit in (1.0, 1000.0):
        values = (step * unit).astype(np.float32)
        smooth = retinex.smooth_bilateral(values, 9, 0.5, 3.0) / unit
        assert smooth[:, 10:30].std() < 0.7 * step[:, 10:30].std()
        assert smooth[:, 41].mean() - smooth[:, 38].mean() > 0.9


def test_wide_blurs_are_close_to_exact_ones():
    import cv2

    values = np.random.default_rng(0).random((300, 350)).astype(np.float32)
    exact = cv2.GaussianBlur(values, (0, 0), 40, borderType=cv2.BORDER_REFLECT)
    assert np.abs(retinex.wide_blur(values, 40) - exact).max() < 0.01


def test_otsu_is_that_of_scikit_image():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(50, 10, 3000), rng.normal(150, 20, 1000)]).reshape(40, 100)
    found = thresholds.find_threshold(values, float(values.min()), float(values.max()))
    assert abs(found.at - threshold_otsu(values)) < (values.max() - values.min()) / 100
    assert 0.7 < found.separability < 1


def test_the_weighted_threshold_finds_few_objects_on_much_background():
    rng = np.random.default_rng(0)
    values = rng.normal(50, 8, 40000)
    values[:300] = rng.normal(200, 10, 300)
    values = values.reshape(200, 200)
    assert 70 < thresholds.find_threshold(values, 0, 255, weighted=True).at < 190


def test_weighted_otsu_is_its_formula():
    values = np.random.default_rng(3).integers(0, 256, (64, 64)) ** 2 // 256
    shares = np.bincount(values.ravel(), minlength=256) / values.size
    centres = np.arange(256) + 0.5
    best = max(
        range(255),
        key=lambda t: (
            (1 - shares[t])
            * sum(
                (shares[part] @ centres[part]) ** 2 / max(shares[part].sum(), 1e-9)
                for part in (slice(0, t + 1), slice(t + 1, 256))
            )
        ),
    )
    assert abs(thresholds.find_threshold(values, 0, 256, weighted=True).at - (best + 1)) < 1


@pytest.mark.parametrize("values", [np.zeros((5, 5)), np.full((1, 1), 7.0)])
def test_constant_values_part_nowhere(values):
    found = thresholds.find_threshold(values, float(values.min()), float(values.max()))
    assert found.separability == 0
    assert not (values > found.at).any()


@pytest.mark.parametrize("diameter", [10, 20, 45])
def test_the_size_of_discs_is_found(diameter):
    rng = np.random.default_rng(diameter)
    rows, columns = np.mgrid[:400, :500]
    image = rng.normal(0, 0.03, (400, 500)).astype(np.float32)
    for y in range(50, 380, 80):
        for x in range(50, 480, 80):
            image[(rows - y) ** 2 + (columns - x) ** 2 < (diameter / 2) ** 2] += rng.uniform(0.5, 1)
    assert 0.7 * diameter < scale.estimate_size(np.maximum(image, 0)) < 1.4 * diameter
    assert scale.estimate_size(np.zeros((40, 40), np.float32)) > 0
