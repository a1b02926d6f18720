"""Moves: pixels, extra channels, mask and ignored region go to the same place, in one resampling."""

from functools import partial

import cv2
import numpy as np
import pytest

import warp

MOVES = {
    "turn": warp.turn,
    "flip": warp.flip,
    "affine": partial(warp.affine, scale=0.2, degrees=45),
    "perspective": warp.perspective,
    "elastic": warp.elastic,
    "bend": warp.bend,
    "grid": warp.grid_distortion,
    "optical": warp.optical_distortion,
}
WHOLE = {"turn", "flip"}  # take every pixel to one place
TOPS = {np.uint8: 255, np.uint16: 65535, np.float32: 1.0}


def draw(name, size, seed):
    return MOVES[name](size, np.random.default_rng(seed))


def coordinates(size):
    """Row and column numbers as channels, (H, W, 2) float32."""
    return np.indices(size).transpose(1, 2, 0).astype(np.float32)


def blocks(size, side=16):
    """Square cells of the classes 0, 3, 7 and 255 (ignore)."""
    rows, columns = np.indices(size) // side
    return np.array([0, 3, 7, 255], np.uint8)[(rows + 2 * columns) % 4]


@pytest.mark.parametrize("size", [(128, 128), (96, 160)])
@pytest.mark.parametrize("names", [*([name] for name in MOVES), ["turn", "affine", "perspective", "elastic", "grid"]])
def test_mask_and_extra_channels_move_with_a_picture_of_coordinates(names, size):
    places, mask, side = coordinates(size), blocks(size), 16
    image = np.concatenate([places, places[..., :1], places[..., ::-1]], axis=2)  # five channels
    moved = 0
    for seed in range(12):
        out, out_mask = warp.move(image, mask, [draw(name, size, seed) for name in names])
        assert out.shape == image.shape and out_mask.shape == mask.shape and out.flags.c_contiguous
        np.testing.assert_allclose(out[..., [0, 0, 1]], out[..., [2, 4, 3]], atol=1e-3)
        source = np.rint(out[..., :2]).astype(int)
        middle = np.abs((out[..., :2] + 0.5) % side - side / 2).max(axis=2) < side / 2 - 2  # not at the edge of a cell
        expected = mask[source[..., 0], source[..., 1]]
        outside = (out_mask == 255) & (expected != 255)
        assert (out_mask == expected)[middle & ~outside].all(), seed
        assert not outside[middle].any() or not set(names) <= WHOLE
        assert outside.mean() < 0.35
        moved += not np.array_equal(out, image)
    assert moved >= 7


@pytest.mark.parametrize("dtype", TOPS)
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 7])
def test_every_type_and_number_of_channels_moves_like_each_channel_alone(dtype, channels):
    rng = np.random.default_rng(channels)
    smooth = cv2.GaussianBlur(rng.random((48, 48, channels), np.float32), (0, 0), 2).reshape(48, 48, channels)
    image = (smooth * TOPS[dtype]).astype(dtype)
    for names in (["turn"], ["affine"], ["turn", "elastic"]):
        moves = [draw(name, (48, 48), 5) for name in names]
        out, _ = warp.move(image, blocks((48, 48)), moves)
        assert (out.dtype, out.shape) == (image.dtype, image.shape)
        assert out.min() >= image.min() and out.max() <= image.max()
        for band in range(channels):
            alone, _ = warp.move(np.ascontiguousarray(image[..., band : band + 1]), blocks((48, 48)), moves)
            assert np.array_equal(alone[..., 0], out[..., band])


def reflect(place, side):
    """The pixel that stands at a place outside: the edge itself is not repeated."""
    place = abs(place) % (2 * side - 2)
    return min(place, 2 * side - 2 - place)


def slow_move(image, mask, places):
    """Bilinear pixels and nearest labels, one pixel at a time."""
    height, width = mask.shape
    out, labels = np.zeros(image.shape), np.full(mask.shape, 255, np.uint8)
    for row in range(height):
        for column in range(width):
            x, y = float(places[0][row, column]), float(places[1][row, column])
            left, top = int(np.floor(x)), int(np.floor(y))
            for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
                weight = abs(1 - dy - (y - top)) * abs(1 - dx - (x - left))
                near = reflect(top + dy, height), reflect(left + dx, width)
                out[row, column] += weight * image[near]
            nearest = round(y), round(x)
            if 0 <= nearest[0] < height and 0 <= nearest[1] < width:
                labels[row, column] = mask[nearest]
    return out, labels


def test_moving_equals_a_slow_reference():
    rng = np.random.default_rng(0)
    image, mask = rng.random((20, 26, 3), np.float32), blocks((20, 26), 4)
    for seed in range(3):
        moves = [draw("affine", mask.shape, seed), draw("elastic", mask.shape, seed)]
        matrix, shifts = moves[0], moves[1:]
        places = warp.source_places(mask.shape, matrix, shifts)
        out, labels = warp.move(image, mask, moves)
        expected, expected_labels = slow_move(image, mask, places)
        np.testing.assert_allclose(out, expected, atol=0.03)  # OpenCV's weights may be steps of 1/32
        assert (labels != expected_labels).mean() < 0.005  # a tie falls to either side


def test_matrices_are_composed_in_order():
    """A flip and then a shift to the right is not a shift and then a flip."""
    image, mask = coordinates((8, 8)), np.zeros((8, 8), np.uint8)
    shift, mirror = np.array([[1, 0, -2], [0, 1, 0], [0, 0, 1.0]]), np.diag([-1.0, 1, 1])
    first, _ = warp.move(image, mask, [mirror, shift])
    assert np.array_equal(first[0, 2:, 1], np.arange(7, 1, -1))
    other, labels = warp.move(image, mask, [shift, mirror])
    assert np.array_equal(other[0, :6, 1], np.arange(5, -1, -1))
    assert labels[0].tolist() == [0] * 6 + [255] * 2


def test_turns_are_the_eight_positions_and_only_reorder():
    image = np.random.default_rng(0).integers(0, 255, (6, 6, 3)).astype(np.uint8)
    mask = image[..., 0].copy()
    positions = {np.rot90(image, k).tobytes() for k in range(4)}
    positions |= {np.rot90(image.swapaxes(0, 1), k).tobytes() for k in range(4)}
    found = set()
    for seed in range(100):
        out, labels = warp.move(image, mask, [draw("turn", (6, 6), seed)])
        assert np.array_equal(out[..., 0], labels)
        found.add(out.tobytes())
    assert found == positions
    oblong = image[:4]
    assert {warp.move(oblong, mask[:4], [draw("turn", (4, 6), seed)])[0].tobytes() for seed in range(50)} == {
        view.tobytes() for view in (oblong, oblong[::-1], oblong[:, ::-1], oblong[::-1, ::-1])
    }


@pytest.mark.parametrize("name", MOVES)
def test_the_inputs_are_left_alone(name):
    image, mask = np.random.default_rng(0).random((32, 32, 3), np.float32), blocks((32, 32))
    kept = image.copy(), mask.copy()
    for seed in range(5):
        out, labels = warp.move(image, mask, [draw(name, mask.shape, seed)])
        out[:], labels[:] = 7, 7
    assert np.array_equal(image, kept[0]) and np.array_equal(mask, kept[1])


@pytest.mark.parametrize(("size", "share"), [((128, 128), 1), ((512, 512), 1), ((32, 32), 0.5), ((24, 300), 0.375)])
def test_elastic_moves_visibly_and_never_folds(size, share):
    for seed in range(16):
        right, down = draw("elastic", size, seed)
        assert 2 * share <= np.sqrt((right**2 + down**2).mean()) <= 6.01 * share
        stretch = (1 + np.gradient(right, axis=1)) * (1 + np.gradient(down, axis=0))
        assert (stretch - np.gradient(right, axis=0) * np.gradient(down, axis=1)).min() > 0


@pytest.mark.parametrize("name", ["bend", "grid", "optical", "elastic", "perspective"])
def test_moves_neither_fold_nor_do_nothing(name):
    size = (256, 256)
    for seed in range(10):
        step = draw(name, size, seed)
        matrix, shifts = (np.eye(3), [step]) if isinstance(step, warp.Shift) else (step, [])
        columns, rows = warp.source_places(size, matrix, shifts)
        shift = np.hypot(columns - np.arange(256), rows - np.arange(256)[:, None])
        assert 0.01 < shift.mean() < 0.15 * 256
        turned = np.gradient(columns, axis=1) * np.gradient(rows, axis=0)
        assert (turned - np.gradient(columns, axis=0) * np.gradient(rows, axis=1)).min() > 0


@pytest.mark.parametrize("before", [[], ["flip"], ["turn"], ["turn", "affine", "perspective"]])
@pytest.mark.parametrize("name", ["optical", "grid", "elastic"])
def test_shifts_come_before_the_matrices_of_earlier_moves(name, before):
    """A mirrored barrel is a barrel, and a turned grid keeps its frame."""
    size = (64, 64)
    for seed in range(12):
        matrix = np.eye(3)
        for number, other in enumerate(before):
            matrix = matrix @ draw(other, size, seed + number)
        shift = draw(name, size, seed)
        columns, rows = warp.source_places(size, matrix, [shift])
        for row, column in ((0, 0), (0, 63), (20, 3), (40, 50), (63, 32)):
            right, down = (np.broadcast_to(field, size)[row, column] for field in shift)
            place = matrix @ (column - 31.5 + right, row - 31.5 + down, 1)
            expected = place[:2] / place[2] + 31.5
            assert (columns[row, column], rows[row, column]) == pytest.approx(tuple(expected), abs=1e-3)


@pytest.mark.parametrize("size", [(96, 96), (64, 96)])
def test_perspective_and_grid_bring_in_nothing_from_outside(size):
    mask = np.zeros(size, np.uint8)
    image = coordinates(mask.shape)
    for names in (["perspective"], ["grid"], ["turn", "grid"]):
        for seed in range(20):
            assert not warp.move(image, mask, [draw(name, mask.shape, seed) for name in names])[1].any(), (names, seed)


def test_an_affine_move_keeps_its_limits():
    for seed in range(50):
        matrix = warp.affine((100, 200), np.random.default_rng(seed), scale=0.2, degrees=45)
        factor = 1 / np.sqrt(np.linalg.det(matrix[:2, :2]))
        assert 0.8 <= factor <= 1.2
        assert abs(np.degrees(np.arctan2(matrix[0, 1], matrix[0, 0]))) <= 45
        place = np.linalg.inv(matrix) @ (0, 0, 1)  # where the middle goes
        assert abs(place[0]) <= 0.0625 * 200 and abs(place[1]) <= 0.0625 * 100


@pytest.mark.parametrize("size", [(40, 40), (31, 31), (30, 44)])
@pytest.mark.parametrize("part", [(10, 10, 20, 20), (3, 8, 17, 12), (0, 0, 30, 31), (29, 30, 1, 1)])
def test_a_part_of_the_result_is_that_part(size, part):
    places, mask = coordinates(size), blocks(size, 4)
    top, left, height, width = part
    box = slice(top, top + height), slice(left, left + width)
    for names in ([], ["turn"], ["affine"], ["perspective", "grid"], ["turn", "elastic"]):
        for seed in range(8):
            moves = [draw(name, size, seed) for name in names]
            whole, labels = warp.move(places, mask, moves)
            only, own = warp.move(places, mask, moves, part)
            np.testing.assert_allclose(only, whole[box], atol=1e-3)
            assert np.array_equal(own, labels[box])
            assert only.flags.c_contiguous and not np.shares_memory(only, places)
