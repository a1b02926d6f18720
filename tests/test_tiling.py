import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tiling

torch.set_num_threads(1)


@st.composite
def geometries(draw, strides=(1, 2, 3, 4, 8)):
    """Any plan that predict_tiled accepts, as its keyword arguments."""
    stride = draw(st.sampled_from(strides))
    halo = draw(st.integers(0, 9))
    overlap = draw(st.integers(2 * halo, 2 * halo + 8))
    return {
        "tile": draw(st.integers(overlap + stride, overlap + stride + 40)),
        "overlap": overlap,
        "halo": halo,
        "stride": stride,
        "min_side": draw(st.sampled_from([0, 1, 5, 16])),
        "window": draw(st.sampled_from(tiling.WINDOWS)),
    }


def sigmoid_of_pixels(batch):
    return 1 / (1 + np.exp(-3 * batch[:, :2]))


def random_image(height, width, channels=2, seed=0):
    return np.random.default_rng(seed).normal(size=(channels, height, width)).astype(np.float32)


@settings(max_examples=300, deadline=None)
@given(geometry=geometries(), size=st.integers(1, 200))
def test_shares_sum_to_one_and_keep_off_inner_edges(geometry, size):
    axis = tiling.plan_axis(size, **geometry)
    stride, halo = geometry["stride"], geometry["halo"]
    assert axis.frame >= max(size, geometry["min_side"]) and axis.frame % stride == 0
    assert axis.frame < max(size, geometry["min_side"], 1) + stride
    assert axis.tile % stride == 0 and all(origin % stride == 0 for origin in axis.origins)
    assert axis.origins[0] == 0 and axis.origins[-1] + axis.tile == axis.frame
    assert all(a < b <= a + axis.tile - geometry["overlap"] for a, b in zip(axis.origins, axis.origins[1:]))  # noqa: B905
    total = np.zeros(axis.frame)
    for number, (origin, share) in enumerate(zip(axis.origins, axis.shares, strict=True)):
        assert share.dtype == np.float32 and (share >= 0).all()
        total[origin : origin + axis.tile] += share
        if number > 0:
            assert (share[:halo] == 0).all()
        if number + 1 < len(axis.origins):
            assert (share[axis.tile - halo :] == 0).all()
    assert np.abs(total - 1).max() <= 1e-6


@settings(max_examples=150, deadline=None)
@given(geometry=geometries(), height=st.integers(1, 130), width=st.integers(1, 130), batch_size=st.integers(1, 9))
def test_pointwise_model_is_the_same_tiled_and_whole(geometry, height, width, batch_size):
    image = random_image(height, width)
    seen = []

    def forward(batch):
        seen.append(batch.shape)
        assert batch.dtype == np.float32
        return sigmoid_of_pixels(batch)

    tiled = tiling.predict_tiled(image, forward, batch_size=batch_size, **geometry)
    assert tiled.shape == (2, height, width) and tiled.dtype == np.float32
    assert np.abs(tiled - sigmoid_of_pixels(image[None])[0]).max() <= 1e-6
    assert all(shape[0] == batch_size for shape in seen[:-1]), "only the last batch may be smaller"
    assert all(side % geometry["stride"] == 0 and side >= geometry["min_side"] for s in seen for side in s[2:])


def conv_network(stride, seed=3):
    """Convolutions only; one output pixel sees 7 (stride 1) or at most 23 (stride 4) input pixels."""
    torch.manual_seed(seed)
    if stride == 1:
        layers = [nn.Conv2d(2, 4, 5, padding=2), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1)]
    else:
        layers = [
            nn.Conv2d(2, 4, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.ConvTranspose2d(6, 3, 4, stride=4),
        ]
    network = nn.Sequential(*layers, nn.Softmax(dim=1)).eval()

    def forward(batch):
        with torch.inference_mode():
            return network(torch.from_numpy(batch)).numpy()

    return forward


@pytest.mark.parametrize(("stride", "halo"), [(1, 3), (4, 12)])
@pytest.mark.parametrize("window", tiling.WINDOWS)
@settings(max_examples=25, deadline=None)
@given(height=st.integers(1, 132), width=st.integers(1, 132), extra=st.integers(0, 10))
def test_convolutions_agree_with_the_whole_frame(stride, halo, window, height, width, extra):
    forward, image = conv_network(stride), random_image(height, width)
    rows, cols = (tiling.reflect_index(n, tiling.round_up(max(n, 8), stride)) for n in (height, width))
    whole = forward(image[None][:, :, rows][:, :, :, cols])[0, :, :height, :width]
    geometry = {"tile": 44, "overlap": 2 * halo + extra, "halo": halo, "stride": stride, "min_side": 8}
    tiled = tiling.predict_tiled(image, forward, batch_size=4, window=window, **geometry)
    assert np.abs(tiled - whole).max() <= 1e-5


def test_convolution_check_notices_a_halo_that_is_too_small():
    forward, image = conv_network(4), random_image(132, 132)
    geometry = {"tile": 44, "overlap": 24, "stride": 4, "min_side": 8, "batch_size": 4}
    whole = forward(image[None])[0]
    assert np.abs(tiling.predict_tiled(image, forward, halo=2, **geometry) - whole).max() > 1e-4
    assert np.abs(tiling.predict_tiled(image, forward, halo=12, **geometry) - whole).max() <= 1e-5


def test_shares_by_hand():
    # Tiles of 4 at 0, 2 and 3: pixels 1-based weights of a constant window count the tiles that cover a pixel.
    axis = tiling.plan_axis(7, tile=4, overlap=2, halo=0, stride=1, min_side=0, window="constant")
    assert axis.origins == (0, 2, 3)
    third = np.float32(1 / 3)
    np.testing.assert_array_equal(axis.shares, [[1, 1, 0.5, third], [0.5, third, 0.5, 0.5], [third, 0.5, 0.5, 1]])


def test_hann_shares_by_hand():
    # Tiles of 4 at 0 and 2: the first falls as sin^2 from its middle, the second rises, and both are flat outside.
    axis = tiling.plan_axis(6, tile=4, overlap=2, halo=0, stride=2, min_side=0, window="hann")
    low, high = np.sin(np.pi / 8) ** 2, np.sin(3 * np.pi / 8) ** 2
    first = [1, 1, high / (high + low), low / (low + high)]
    np.testing.assert_allclose(axis.shares, [first, first[::-1]], rtol=1e-6)


def test_hard_edge_when_overlap_is_two_halos():
    axis = tiling.plan_axis(12, tile=8, overlap=4, halo=2, stride=4, min_side=0, window="hann")
    np.testing.assert_array_equal(axis.shares, [[1] * 6 + [0] * 2, [0] * 2 + [1] * 6])


def test_reflect_index_is_a_triangle_wave():
    assert tiling.reflect_index(4, 12).tolist() == [0, 1, 2, 3, 2, 1, 0, 1, 2, 3, 2, 1]
    assert tiling.reflect_index(1, 3).tolist() == [0, 0, 0]
    assert tiling.reflect_index(5, 7).tolist() == np.pad(np.arange(5), (0, 2), mode="reflect").tolist()


def test_bands_leave_early_and_never_hold_more_than_a_tile():
    image = random_image(400, 50)
    geometry = {"tile": 64, "overlap": 16, "halo": 4, "stride": 8, "min_side": 8, "window": "hann"}
    rows, cols = (tiling.plan_axis(size, **geometry) for size in image.shape[1:])
    drawn = []

    def forward(batch):
        drawn.append(len(batch))
        return sigmoid_of_pixels(batch)

    expected_top = 0
    for top, band in tiling.blend_bands(tiling.forward_tiles(image, forward, rows, cols, 1), rows, cols):
        assert top == expected_top and band.shape[1] <= 64
        finished_rows = sum(origin <= top for origin in rows.origins)
        assert sum(drawn) == finished_rows * len(cols.origins), "a band waits for no tile below it"
        expected_top += band.shape[1]
    assert expected_top == 400


def test_forward_output_is_not_changed():
    kept = np.full((1, 1, 32, 32), 0.5, np.float32)
    kept.setflags(write=False)
    geometry = {"tile": 32, "overlap": 8, "halo": 0, "stride": 1, "min_side": 1, "batch_size": 1}
    assert (tiling.predict_tiled(random_image(50, 50), lambda batch: kept, **geometry) == 0.5).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"overlap": 15}, "overlap 15 is less than twice the halo 8.*16 or more"),
        ({"tile": 20, "overlap": 20}, "tile 20 and overlap 20 leave no step of at least the stride 4.*24 or more"),
        ({"tile": 0}, "tile is 0, expected 1 or more"),
        ({"stride": 0}, "stride is 0, expected 1 or more"),
        ({"halo": -1}, "halo is -1, expected 0 or more"),
        ({"batch_size": 0}, "batch size 0 is too small"),
        ({"window": "hamming"}, "unknown window 'hamming', expected one of hann, gaussian, constant"),
    ],
)
@pytest.mark.parametrize("size", [10, 100])
def test_bad_numbers_are_named_whatever_the_image(change, message, size):
    geometry = {"tile": 64, "overlap": 16, "halo": 8, "stride": 4, "min_side": 8, "batch_size": 2} | change
    with pytest.raises(ValueError, match=message):
        tiling.predict_tiled(random_image(size, size), sigmoid_of_pixels, **geometry)


GEOMETRY = {"tile": 32, "overlap": 8, "halo": 2, "stride": 8, "min_side": 8, "batch_size": 3}


@pytest.mark.parametrize("shape", [(8, 8), (1, 0, 8), (0, 8, 8), (1, 1, 8, 8)])
def test_bad_image_shape(shape):
    with pytest.raises(ValueError, match=r"image has shape .* expected \(C, H, W\)"):
        tiling.predict_tiled(np.zeros(shape, np.float32), sigmoid_of_pixels, **GEOMETRY)


def test_forward_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"forward returned shape \(3, 2, 16, 16\).*expected \(3, K, 32, 32\)"):
        tiling.predict_tiled(random_image(99, 99), lambda batch: sigmoid_of_pixels(batch)[:, :, ::2, ::2], **GEOMETRY)


@pytest.mark.parametrize(("value", "words"), [(np.nan, "NaN"), (np.inf, "infinite")])
def test_non_finite_probabilities_name_the_tile(value, words):
    image = random_image(99, 99)
    image[0, 60, 95] = 50

    def forward(batch):
        probs = sigmoid_of_pixels(batch)
        probs[batch[:, :2] == 50] = value
        return probs

    with pytest.raises(RuntimeError, match=f"tile at row 48, column 72.*32 x 32.*{words}.*input pixels are finite"):
        tiling.predict_tiled(image, forward, **GEOMETRY)


def test_nan_in_the_image_is_said():
    image = random_image(99, 99)
    image[0, 0, 0] = np.nan
    with pytest.raises(RuntimeError, match="tile at row 0, column 0 .*its input pixels hold some too"):
        tiling.predict_tiled(image, sigmoid_of_pixels, **GEOMETRY)
