import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rle
from rle import RleEncoder, RleRaster, decode_rle, encode_rle


def random_mask(seed, height, width, share):
    """Vertical stripes of random lengths, or speckle."""
    rng = np.random.default_rng(seed)
    flat = rng.random(height * width) < share
    return np.repeat(flat, rng.integers(1, 9))[: height * width].reshape(width, height).T


def slow_encode(mask):
    """Walk down each column in turn."""
    pairs, previous = [], False
    for place, inside in enumerate(mask.T.ravel().tolist(), start=1):
        if inside and not previous:
            pairs.append([place, 0])
        if inside:
            pairs[-1][1] += 1
        previous = inside
    return " ".join(f"{start} {length}" for start, length in pairs)


def slow_decode(text, height, width):
    flat = np.zeros(height * width, bool)
    numbers = [int(number) for number in text.split()]
    for start, length in zip(numbers[::2], numbers[1::2], strict=True):
        flat[start - 1 : start - 1 + length] = True
    return flat.reshape(width, height).T


masks = st.builds(
    random_mask, st.integers(0, 10_000), st.integers(1, 30), st.integers(1, 30), st.sampled_from((0, 0.1, 0.5, 0.9, 1))
)


@settings(max_examples=80, deadline=None)
@given(masks, st.sampled_from((1, 2, 3, 7, 1000)), st.sampled_from((1, 4, 256)), st.sampled_from((1, 10, 1 << 20)))
def test_bands_give_the_text_of_the_whole(mask, height, flush_rows, chunk_runs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rle, "FLUSH_ROWS", flush_rows)
        patch.setattr(rle, "CHUNK_RUNS", chunk_runs)
        encoder = RleEncoder(*mask.shape)
        for top in range(0, len(mask), height):
            encoder.append(mask[top : top + height])
        text = "".join(encoder.finish())
    assert text == slow_encode(mask)
    assert encode_rle(mask.astype(np.uint8) * 3) == text
    np.testing.assert_array_equal(decode_rle(text, *mask.shape), mask)
    np.testing.assert_array_equal(slow_decode(text, *mask.shape), mask)


@settings(max_examples=80, deadline=None)
@given(masks, st.data())
def test_a_window_is_a_cut_out_of_the_whole(mask, data):
    top, left = (data.draw(st.integers(0, side - 1)) for side in mask.shape)
    height, width = (data.draw(st.integers(0, side - at)) for side, at in zip(mask.shape, (top, left), strict=True))
    raster = RleRaster(slow_encode(mask), *mask.shape)
    window = raster.read(top, left, height, width)
    assert window.dtype == bool
    np.testing.assert_array_equal(window, mask[top : top + height, left : left + width])
    assert raster.area == mask.sum()


def test_the_convention_is_one_based_and_goes_down_the_columns():
    mask = np.zeros((3, 4), bool)
    mask[1:, 1] = True
    mask[0, 2] = True
    mask[0, 0] = mask[2, 3] = True
    assert encode_rle(mask) == "1 1 5 3 12 1"


def test_reused_bands_are_copied():
    mask = random_mask(1, 12, 9, 0.5)
    encoder, buffer = RleEncoder(12, 9), np.zeros((4, 9), bool)
    for top in range(0, 12, 4):
        buffer[:] = mask[top : top + 4]
        encoder.append(buffer)
    buffer[:] = True
    assert "".join(encoder.finish()) == slow_encode(mask)


@pytest.mark.parametrize("text", ["", "  \n", None, float("nan"), "nan", "NaN"])
def test_nothing_is_an_empty_mask(text):
    mask = decode_rle(text, 3, 5)
    assert mask.shape == (3, 5)
    assert not mask.any()
    assert encode_rle(mask) == ""


def test_disjoint_runs_may_come_in_any_order_and_touch():
    expected = decode_rle("2 5 9 2", 4, 3)
    np.testing.assert_array_equal(decode_rle("9 2 4 3 2 2", 4, 3), expected)
    np.testing.assert_array_equal(decode_rle("9\t2\n+2 5", 4, 3), expected)
    assert expected.sum() == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2 3", 'RLE holds 3 numbers, expected an even count, pairs "start length": the text may be cut off'),
        ("1 x", "RLE holds 'x', expected whole numbers"),
        ("1.0 2", "RLE holds '1.0', expected whole numbers"),
        ("1 +-2", "RLE holds '+-2', expected whole numbers"),
        ("1 \u0664", "RLE holds '\u0664', expected whole numbers"),
        ("1_0 2", "RLE holds '1_0', expected whole numbers"),
        ("1,2", "RLE holds '1,2', expected whole numbers in pairs \"start length\" with spaces between"),
        ("1 2 3 99999999999999999999", "RLE holds '99999999999999999999'"),
        ("5 2 0 1", 'RLE run 2 is "0 1", expected starts from 1'),
        ("-3 2", 'RLE run 1 is "-3 2", expected starts from 1'),
        ("3 0", 'RLE run 1 is "3 0", expected lengths from 1'),
        ("3 -2", 'RLE run 1 is "3 -2", expected lengths from 1'),
        ("1 2 12 2", 'RLE run 2 is "12 2", expected runs within a mask of 3 x 4 pixels .height x width.: compare'),
        ("9000000000000000000 9000000000000000000", 'RLE run 1 is "9000000000000000000 .* expected runs within'),
        ("13 1", 'RLE run 1 is "13 1", expected runs within'),
        ("7 2 1 3 3 2", 'RLE runs "1 3" and "3 2" overlap, expected each pixel in one run at most'),
        ("2 2 2 2", 'RLE runs "2 2" and "2 2" overlap'),
        ("1 12 5 1 8 1", 'RLE runs "1 12" and "5 1" overlap'),
    ],
)
def test_wrong_texts_say_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        decode_rle(text, 3, 4)


def test_rows_that_do_not_fit_are_refused():
    encoder = RleEncoder(4, 5)
    with pytest.raises(ValueError, match=r"rows have shape \(2, 6\), expected \(h, 5\)"):
        encoder.append(np.ones((2, 6), bool))
    encoder.append(np.ones((3, 5), bool))
    with pytest.raises(ValueError, match="3 rows came for a mask of 4: append all rows before finish"):
        encoder.finish()
    with pytest.raises(ValueError, match="row 5 came for a mask of 4 rows"):
        encoder.append(np.ones((2, 5), bool))


@pytest.mark.parametrize("window", [(-1, 0, 1, 1), (0, 0, 4, 1), (0, 3, 1, 2), (2, 2, -1, 1)])
def test_windows_outside_the_mask_are_refused(window):
    with pytest.raises(ValueError, match="expected one inside the mask of 3 x 4 pixels"):
        RleRaster("1 2", 3, 4).read(*window)


def test_a_slide_of_many_gigapixels_takes_the_memory_of_its_runs():
    height, width = 90_000, 80_000
    raster = RleRaster(f"{height - 1} 4 {height * width} 1", height, width)
    assert raster.read(height - 3, 0, 3, 2).tolist() == [[False, False], [True, False], [True, False]]
    assert raster.read(0, 0, 3, 2).tolist() == [[False, True], [False, True], [False, False]]
    assert raster.read(height - 1, width - 2, 1, 2).tolist() == [[False, True]]


def test_places_beyond_32_bits_are_kept():
    width = (1 << 31) + 5
    encoder = RleEncoder(2, width)
    encoder._runs = [(np.array([2 * width - 2], encoder._start_type), np.array([1], np.uint16))]
    encoder.rows_done = 2
    assert "".join(encoder.finish()) == f"{2 * width - 1} 1"
