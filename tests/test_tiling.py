import threading
import time

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
    for top, band in tiling.predict_bands(tiling.window_reader(image), forward, rows, cols, batch_size=1):
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


@settings(max_examples=100, deadline=None)
@given(
    geometry=geometries(),
    height=st.integers(1, 130),
    width=st.integers(1, 130),
    batch_size=st.integers(1, 9),
    ahead=st.integers(0, 3),
    part=st.floats(0, 0.99),
)
def test_a_later_start_gives_the_same_bits_and_the_same_batches(geometry, height, width, batch_size, ahead, part):
    image, first_row, seen = random_image(height, width), int(part * height), []

    def forward(batch):
        """Of its own batch: the answer for a tile hangs on the tiles beside it, as rounding can."""
        seen.append(batch.copy())
        return sigmoid_of_pixels(batch) * np.float32(0.5 + 0.01 * len(batch)) + batch.mean() * np.float32(0.01)

    rows, cols = (tiling.plan_axis(size, **geometry) for size in (height, width))
    read = tiling.window_reader(image)

    def collect(**more):
        seen.clear()
        bands = tiling.predict_bands(read, forward, rows, cols, batch_size=batch_size, **more)
        return [(top, band.copy()) for top, band in bands], list(seen)

    (whole, every), (rest, later) = collect(), collect(first_row=first_row, ahead=ahead)
    assert rest[0][0] == first_row
    complete = np.concatenate([band for _, band in whole], axis=1)
    np.testing.assert_array_equal(np.concatenate([band for _, band in rest], axis=1), complete[:, first_row:])
    assert all(np.array_equal(a, b) for a, b in zip(later, every[-len(later) :], strict=True))
    if first_row >= rows.tile and batch_size == 1:
        assert len(later) < len(every), "tiles above the first row are not predicted again"


@settings(max_examples=100, deadline=None)
@given(
    geometry=geometries(),
    height=st.integers(1, 130),
    width=st.integers(1, 130),
    seed=st.integers(0, 9),
    k=st.floats(0, 1),
)
def test_skipped_tiles_count_as_zero_and_leave_their_neighbours_alone(geometry, height, width, seed, k):
    image = random_image(height, width)
    rows, cols = (tiling.plan_axis(size, **geometry) for size in (height, width))
    keep = np.random.default_rng(seed).random((len(rows.origins), len(cols.origins))) < k
    calls = []

    def forward(batch):
        calls.append(len(batch))
        return sigmoid_of_pixels(batch)

    bands = tiling.predict_bands(tiling.window_reader(image), forward, rows, cols, batch_size=3, keep=keep, channels=2)
    found = np.concatenate([band.copy() for _, band in bands], axis=1)
    assert sum(calls) == keep.sum()
    shares = np.zeros((rows.frame, cols.frame), np.float32)
    for row, col in zip(*np.nonzero(keep), strict=True):
        top, left = rows.origins[row], cols.origins[col]
        shares[top : top + rows.tile, left : left + cols.tile] += rows.shares[row][:, None] * cols.shares[col]
    expected = sigmoid_of_pixels(image[None])[0] * shares[:height, :width]
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(("name", "views"), [("none", 1), ("flips", 4), ("d4", 8)])
@pytest.mark.parametrize(("height", "width"), [(50, 70), (9, 40), (1, 1)])
def test_tta_is_the_mean_over_the_group_of_views(name, views, height, width):
    """A network that looks up and left: of every view it sees something else."""
    network = nn.Conv2d(2, 1, 3, padding=1, bias=False)
    with torch.no_grad():
        network.weight.copy_(torch.randn(network.weight.shape, generator=torch.Generator().manual_seed(1)))

    @torch.inference_mode()
    def forward(batch):
        return network(torch.from_numpy(batch)).sigmoid().numpy()

    image = random_image(height, width)
    geometry = {"tile": 24, "overlap": 8, "halo": 2, "stride": 4, "min_side": 8, "batch_size": 3}
    found = tiling.predict_tiled(image, forward, **geometry, tta=name)
    rows, cols = (
        tiling.plan_axis(size, window="hann", **{k: v for k, v in geometry.items() if k != "batch_size"})
        for size in (height, width)
    )
    frame = image[:, tiling.reflect_index(height, rows.frame)[:, None], tiling.reflect_index(width, cols.frame)]
    turns = [(k, flip) for flip in (False, True) for k in range(4)]
    if name != "d4":
        turns = [(0, False), (2, False), (0, True), (2, True)][:views]
    whole = np.zeros((1, rows.frame, cols.frame))
    for k, flip in turns:
        view = np.rot90(frame[:, :, ::-1] if flip else frame, k, (1, 2))
        answer = np.rot90(forward(np.ascontiguousarray(view)[None])[0], -k, (1, 2))
        whole += answer[:, :, ::-1] if flip else answer
    inner = (slice(None), slice(0, max(height - 2, 1)), slice(0, max(width - 2, 1)))
    if height > 2 and width > 2:  # at the frame's edge a convolution pads each tile as it pads the frame
        np.testing.assert_allclose(found[inner], (whole / len(turns))[:, :height, :width][inner], atol=1e-5)
    assert len(tiling.TTA[name]) == views


def test_unknown_tta_is_named():
    with pytest.raises(ValueError, match="unknown TTA 'rotate', expected one of none, flips, d4"):
        tiling.predict_tiled(random_image(9, 9), sigmoid_of_pixels, **GEOMETRY, tta="rotate")


def test_run_ahead_raises_what_making_raised_and_ends_its_thread():
    made, threads = [], threading.active_count()

    def items():
        for number in range(100):
            made.append(number)
            if number == 5:
                raise OSError("disk gone")
            yield number

    got = []
    with pytest.raises(OSError, match="disk gone"):
        for item in tiling.run_ahead(items(), 3):
            got.append(item)
    assert got == [0, 1, 2, 3, 4]
    stopped = tiling.run_ahead(iter(range(1000)), 2)
    assert next(stopped) == 0
    stopped.close()
    assert threading.active_count() == threads


def test_nothing_reads_any_more_when_an_error_arrives():
    axis = tiling.plan_axis(200, tile=32, overlap=8, halo=0, stride=8, min_side=0, window="hann")
    calls = []

    def read(top, left, height, width):
        time.sleep(0.02)
        return np.zeros((1, height, width), np.float32)

    def forward(batch):
        calls.append(len(batch))
        if len(calls) == 2:
            raise RuntimeError("no more")
        return batch

    before = threading.active_count()
    bands = tiling.run_ahead(tiling.predict_bands(read, forward, axis, axis, batch_size=1, ahead=2), 1)
    with pytest.raises(RuntimeError, match="no more") as raised:
        next(bands)
    assert raised.value.__traceback__ and threading.active_count() == before


def test_run_ahead_stays_within_its_depth():
    made = []

    def items():
        for number in range(50):
            made.append(number)
            yield number

    for item in tiling.run_ahead(items(), 4):
        assert len(made) <= item + 1 + 4
    assert len(made) == 50


@pytest.mark.parametrize("buffers", [1, 2, 3])
def test_a_band_holds_until_as_many_more_as_there_are_buffers_were_asked_for(buffers):
    image = random_image(120, 40)
    axes = [
        tiling.plan_axis(size, tile=32, overlap=8, halo=0, stride=1, min_side=1, window="hann") for size in (120, 40)
    ]
    bands = tiling.predict_bands(tiling.window_reader(image), sigmoid_of_pixels, *axes, batch_size=1, buffers=buffers)
    held, overwritten = [], 0
    for _, band in bands:
        held.append((band, band.copy()))
        for kept, content in held[-buffers:]:
            np.testing.assert_array_equal(kept, content)
        overwritten += sum(not np.array_equal(kept, content) for kept, content in held[:-buffers])
    assert len(held) == 5 and overwritten
