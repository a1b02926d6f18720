import cv2
import numpy as np
import pytest
from scipy import ndimage

from annotation.narrowing import grow_back, narrow


def disc_map(size, *discs):
    """Label map with discs (row, column, radius) numbered in order."""
    labels = np.zeros(size, np.int32)
    rows, columns = np.ogrid[: size[0], : size[1]]
    for number, (row, column, radius) in enumerate(discs, start=1):
        labels[(rows - row) ** 2 + (columns - column) ** 2 <= radius**2] = number
    return labels


def slow_narrow(labels, share):
    """Distance of each object alone, on a frame of its own pixels; the largest piece."""
    cores = np.zeros_like(labels)
    for label in np.unique(labels[labels > 0]):
        mask = labels == label
        if mask.all():
            cores[mask] = label
            continue
        distance = ndimage.distance_transform_edt(mask)
        core = distance > share * distance.max()
        pieces, count = ndimage.label(core)
        sizes = ndimage.sum_labels(core, pieces, np.arange(1, count + 1))
        cores[pieces == 1 + np.argmax(sizes)] = label
    return cores


def random_map(seed, size=(60, 80)):
    """Voronoi cells, many of which touch, some cut by the frame, with background between others."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(0, 1, (14, 2)) * size
    rows, columns = np.indices(size)
    distance = np.hypot(rows[..., None] - points[:, 0], columns[..., None] - points[:, 1])
    labels = (distance.argmin(-1) + 1).astype(np.int32)
    labels[distance.min(-1) > rng.uniform(5, 14)] = 0
    return labels


@pytest.mark.parametrize(("share", "kept"), [(0.1, 0.835), (0.2, 0.658)])
def test_a_disc_keeps_the_square_of_what_is_left_of_its_radius(share, kept):
    labels = disc_map((240, 240), (120, 120, 100))
    assert np.count_nonzero(narrow(labels, share)) / np.count_nonzero(labels) == pytest.approx(kept, abs=0.03)


def test_the_rim_is_relative_to_each_object():
    labels = disc_map((200, 400), (100, 100, 80), (100, 300, 20))
    before, after = np.bincount(labels.ravel())[1:], np.bincount(narrow(labels, 0.3).ravel())[1:]
    assert after / before == pytest.approx([0.49, 0.49], abs=0.07)


def test_touching_objects_are_narrowed_like_lone_ones():
    labels = np.zeros((40, 80), np.int32)
    labels[5:35, 5:40], labels[5:35, 40:75] = 1, 2
    cores = narrow(labels, 0.4)
    assert len(set(cores[20, 30:50])) == 3  # 1, background, 2: they have parted
    alone = narrow(np.where(labels == 1, labels, 0), 0.4)
    np.testing.assert_array_equal(cores == 1, alone == 1)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.95])
def test_narrow_agrees_with_a_slow_reference(seed, share):
    labels = random_map(seed)
    got, expected = narrow(labels, share), slow_narrow(labels, share)
    assert np.count_nonzero(got != expected) <= 2  # rounding of equal distances
    assert set(np.unique(got)) == set(np.unique(labels))  # none vanished
    for label in np.unique(got)[1:]:
        assert cv2.connectedComponents((got == label).view(np.uint8), connectivity=4)[0] == 2


def test_nothing_to_narrow():
    labels = random_map(3)
    np.testing.assert_array_equal(narrow(labels, 0), labels)
    whole = np.ones((5, 7), np.int32)
    np.testing.assert_array_equal(narrow(whole, 0.9), whole)
    np.testing.assert_array_equal(narrow(np.zeros((1, 1), np.int32), 0.5), [[0]])
    thin = np.zeros((5, 9), np.int32)
    thin[2, 1:8] = 4  # a line of one pixel, and a number with gaps before it
    np.testing.assert_array_equal(narrow(thin, 0.8), thin)
    with pytest.raises(ValueError, match="narrowing 1 was asked for, expected a share"):
        narrow(whole, 1)


@pytest.mark.parametrize("seed", range(6))
def test_cores_fill_the_limit_again(seed):
    labels = random_map(seed)
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (*labels.shape, 3), np.uint8)
    cores = narrow(labels, 0.5)
    grown = grow_back(cores, image, labels > 0)
    np.testing.assert_array_equal(grown > 0, labels > 0)
    np.testing.assert_array_equal(grown[cores > 0], cores[cores > 0])
    for label in np.unique(grown)[1:]:
        assert cv2.connectedComponents((grown == label).view(np.uint8), connectivity=4)[0] == 2


def test_lone_objects_come_back_as_they_were():
    labels = disc_map((100, 200), (50, 50, 30), (50, 150, 40))
    image = np.random.default_rng(0).integers(0, 65536, labels.shape, np.uint16)
    np.testing.assert_array_equal(grow_back(narrow(labels, 0.6), image, labels > 0), labels)


def test_the_line_between_neighbours_follows_the_edge_of_the_picture():
    labels = np.zeros((50, 100), np.int32)
    labels[10:40, 10:45], labels[10:40, 45:90] = 1, 2  # cut at 45 where the picture has its edge at 52
    image = np.zeros((50, 100, 3), np.uint8)
    image[:, :52], image[:, 52:] = 90, 160
    grown = grow_back(narrow(labels, 0.7), image, labels > 0)
    borders = (grown[12:38] == 1).sum(axis=1) + 10
    assert np.abs(borders - 52).max() <= 1


def test_labels_do_not_pass_where_the_limit_is_closed():
    cores = np.zeros((30, 60), np.int32)
    cores[15, 5] = 1
    limit = np.zeros((30, 60), bool)
    limit[5:25, 2:20], limit[5:25, 30:58] = True, True
    cores[6, 50] = 2
    grown = grow_back(cores, np.zeros((30, 60), np.uint8), limit)
    assert (grown[5:25, 2:20] == 1).all() and (grown[5:25, 30:58] == 2).all()
    assert not grown[~limit].any()
    cores[6, 50] = 0  # a part without a core stays empty
    assert not grow_back(cores, np.zeros((30, 60), np.uint8), limit)[:, 30:].any()


def test_the_limit_as_a_distance():
    cores = np.zeros((41, 41), np.int32)
    cores[20, 20] = 7
    grown = grow_back(cores, np.zeros((41, 41), np.float32), 10)
    rows, columns = np.ogrid[:41, :41]
    np.testing.assert_array_equal(grown == 7, np.hypot(rows - 20, columns - 20) <= 10)
    assert not grow_back(np.zeros((4, 4), np.int32), np.zeros((4, 4), np.uint8), 3).any()
    np.testing.assert_array_equal(grow_back(np.ones((1, 1), np.int32), np.zeros((1, 1), np.uint8), 3), [[1]])


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match=r"picture is \(4, 5\) and the label map \(4, 4\)"):
        grow_back(np.zeros((4, 4), np.int32), np.zeros((4, 5), np.uint8), 3)
    with pytest.raises(ValueError, match=r"limit is \(2, 2\)"):
        grow_back(np.zeros((4, 4), np.int32), np.zeros((4, 4), np.uint8), np.ones((2, 2), bool))
