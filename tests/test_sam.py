"""The SAM engine with stand-ins for the network: where prompts go, where masks land, what is kept and dropped."""

import argparse
import tracemalloc
from dataclasses import fields

import cv2
import numpy as np
import pytest
import torch
from sam_standins import SIDE, BoxPainter, DiscFinder
from torch.nn import functional

import cli
from annotation.instances import Instances
from annotation.sam_engine import Sam
from annotation.sam_masks import (
    Frame,
    Mask,
    choose_windows,
    clean_boxes,
    drop_duplicates,
    list_windows,
    make_mask,
    resize_logits,
)
from annotation.sam_options import SamOptions, add_sam_args, options_from

SIZES = [(300, 500), (1500, 1100), (64, 64)]


def spread_boxes(height, width, rows=3, columns=4):
    """Boxes (n, 4) with broken coordinates that do not touch."""
    down, across = height / rows, width / columns
    return np.array(
        [
            [column * across + 0.1 * across, row * down + 0.15 * down, (column + 0.8) * across, (row + 0.9) * down]
            for row in range(rows)
            for column in range(columns)
        ]
    )


def picture(height, width, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


def box_of(mask):
    left, top, width, height = cv2.boundingRect(mask.view(np.uint8))
    return left, top, left + width, top + height


@pytest.mark.parametrize("keep_ratio", [True, False])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_labels_lie_where_the_boxes_are(height, width, keep_ratio):
    network = BoxPainter(keep_ratio)
    boxes = spread_boxes(height, width)
    found = Sam(network, SamOptions(chunk=5)).segment_boxes(picture(height, width), boxes)
    assert isinstance(found, Instances) and len(found) == len(boxes) and found.labels.shape == (height, width)
    assert set(found.engines) == {"sam"}
    tolerance = 0.6 + 0.1 * max(height, width) / SIDE  # half a pixel, and a little of the square's
    for label in range(1, len(found) + 1):
        lies = box_of(found.labels == label)
        assert np.abs(boxes - lies).max(axis=1).min() <= tolerance
    assert [len(given) for given in network.boxes] == [5, 5, 2]  # in chunks


@pytest.mark.parametrize("keep_ratio", [True, False])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_prompts_are_scaled_once_and_points_lie_inside_their_boxes(height, width, keep_ratio):
    network = BoxPainter(keep_ratio)
    boxes = spread_boxes(height, width)
    Sam(network, SamOptions(points=True)).segment_boxes(picture(height, width), boxes)
    given, points = np.concatenate(network.boxes), np.concatenate(network.points)[:, 0]
    scale = np.array([SIDE / max(height, width)] * 2) if keep_ratio else np.array([SIDE / width, SIDE / height])
    np.testing.assert_allclose(given, (boxes * np.tile(scale, 2)) - 0.5, atol=0.51)  # the square has whole pixels
    assert (points > given[:, :2]).all() and (points < given[:, 2:]).all()
    np.testing.assert_allclose(points, (given[:, :2] + given[:, 2:]) / 2, atol=1e-3)
    assert (np.concatenate(network.labels) == 1).all()


def test_the_encoder_gets_red_first_and_padding_below():
    network = BoxPainter()
    image = np.zeros((100, 200, 3), np.uint8)
    image[..., 0], image[..., 1] = 250, 100
    Sam(network).encode(image)
    (square,) = network.squares
    assert square.shape == (1, 3, SIDE, SIDE) and square.dtype == np.float32
    np.testing.assert_array_equal(square[0, :, 0, 0], [250, 100, 0])
    assert square[0, :, 127, :].any() and not square[0, :, 128:].any()


@pytest.mark.parametrize("keep_ratio", [True, False])
@pytest.mark.parametrize(("height", "width"), [*SIZES, (1, 1), (3, 900), (37, 41)])
def test_logits_are_those_of_resizing_the_whole_square(height, width, keep_ratio):
    """Against segment-anything's Sam.postprocess_masks and the resizing of SAM 2, written out."""
    cells = torch.from_numpy(np.random.default_rng(1).normal(size=(1, 1, 64, 64)).astype(np.float32))
    frame = Frame((0, 0, width, height), SIDE, keep_ratio)
    if keep_ratio:
        rows, columns = frame.used
        cropped = functional.interpolate(cells, (SIDE, SIDE), mode="bilinear", align_corners=False)
        cropped = cropped[..., :rows, :columns]
    else:
        cropped = cells
    expected = functional.interpolate(cropped, (height, width), mode="bilinear", align_corners=False)[0, 0].numpy()
    for box in [(0, 0, width, height), (width // 3, height // 2, width // 3 + 1 + width // 4, height)]:
        left, top, right, bottom = box
        parts = list(resize_logits(frame, cells[0, 0].numpy(), box))
        np.testing.assert_allclose(
            np.concatenate([part for _, part in parts]), expected[top:bottom, left:right], atol=1e-4
        )


@pytest.mark.parametrize("keep_ratio", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_a_mask_misses_no_pixel_and_its_stability_is_exact(seed, keep_ratio):
    """The part that is looked at holds all that lies above the levels."""
    height, width = 230, 150
    noise = np.random.default_rng(seed).normal(size=(64, 64)).astype(np.float32)
    field = cv2.GaussianBlur(noise, (0, 0), 4)
    field = (field / field.std() - 1) * 3
    frame = Frame((0, 0, width, height), SIDE, keep_ratio)
    whole = np.concatenate([part for _, part in resize_logits(frame, field, (0, 0, width, height))])
    mask = make_mask(frame, field, iou=1.7, prompt=3)
    _, pieces, stats, _ = cv2.connectedComponentsWithStats((whole > 0).view(np.uint8), connectivity=4)
    largest = pieces == 1 + np.argmax(stats[1:, cv2.CC_STAT_AREA])
    assert mask.stability == pytest.approx(np.count_nonzero(whole > 1) / np.count_nonzero(whole > -1))
    assert (mask.iou, mask.prompt, mask.score) == (1, 3, mask.stability)
    pixels = np.zeros((height, width), bool)
    left, top, right, bottom = mask.box
    pixels[top:bottom, left:right] = mask.pixels()
    assert pixels[largest].all() and mask.area == pixels.sum()  # all of it, and filled holes
    assert pixels.sum() - largest.sum() <= 0.3 * largest.sum()


def test_specks_go_and_small_holes_are_filled():
    field = np.full((64, 64), -9, np.float32)
    field[10:40, 10:40], field[50:54, 50:54] = 9, 9
    field[20:23, 20:23] = -9
    mask = make_mask(Frame((0, 0, 256, 256), 256, False), field, iou=0.5, prompt=0)
    assert mask.pixels()[2:-2, 2:-2].all() and abs(mask.height - 120) <= 2
    field[14:36, 14:36] = -9  # a ring, whose hole is most of it
    ring = make_mask(Frame((0, 0, 256, 256), 256, False), field, iou=0.5, prompt=0)
    assert not ring.pixels()[40:80, 40:80].any()
    assert make_mask(Frame((0, 0, 256, 256), 256, False), field - 99, iou=0.5, prompt=0) is None


def test_a_mask_does_not_leave_its_box_by_more_than_a_margin():
    class Flood(BoxPainter):
        def decode(self, *args):
            logits, ious = super().decode(*args)
            return torch.full_like(logits, 5), ious

    found = Sam(Flood()).segment_boxes(picture(400, 400), np.array([[100, 100, 200, 150]]))
    assert box_of(found.labels == 1) == (90, 95, 210, 155)


def test_scores_are_predicted_iou_times_stability():
    sam = Sam(BoxPainter())
    (mask,) = sam.find_in_boxes(picture(256, 256), np.array([[50, 50, 150, 150]]))
    assert mask.iou == pytest.approx(0.9) and mask.stability == pytest.approx((98 / 102) ** 2, abs=0.01)
    found = sam.segment_boxes(picture(256, 256), np.array([[50, 50, 150, 150]]))
    assert found.scores == pytest.approx([mask.iou * mask.stability])
    strict = Sam(BoxPainter(), SamOptions(min_iou=0.95))
    assert len(strict.segment_boxes(picture(256, 256), np.array([[50, 50, 150, 150]]))) == 0


def test_memory_does_not_hold_a_map_for_each_box():
    network = BoxPainter()
    boxes = spread_boxes(2000, 2000, rows=20, columns=20)  # as whole maps of floats: 6.4 GB
    image = picture(2000, 2000)
    sam = Sam(network)
    tracemalloc.start()
    found = sam.segment_boxes(image, boxes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == 400
    assert peak < 250e6
    assert max(map(len, network.boxes)) == 16


# ---- odd pictures and prompts ----


@pytest.mark.parametrize(
    "image",
    [
        picture(60, 80, 1),
        picture(60, 80, 4),
        (picture(60, 80).astype(np.uint16) * 40),
        picture(60, 80).astype(np.float32) / 7 - 3,
        np.where(np.arange(80)[:, None] > 40, np.nan, picture(60, 80)).astype(np.float32),
        np.full((60, 80, 3), np.nan, np.float32),
        np.zeros((60, 80, 3), np.uint8),
    ],
    ids=["grey", "rgba", "16 bit", "float", "nan", "all nan", "black"],
)
def test_any_picture(image):
    network = BoxPainter()
    assert len(Sam(network).segment_boxes(image, np.array([[10, 10, 40, 40]]))) == 1
    assert np.isfinite(network.squares[0]).all()


def test_sixteen_bits_are_stretched():
    network = BoxPainter()
    Sam(network).encode(np.linspace(1000, 3000, 100 * 100).reshape(100, 100, 1).astype(np.uint16))
    assert network.squares[0].min() < 3 and network.squares[0].max() > 252


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 300), (300, 1), (2, 2)])
@pytest.mark.parametrize("keep_ratio", [True, False])
def test_tiny_pictures(height, width, keep_ratio):
    sam = Sam(BoxPainter(keep_ratio), SamOptions(max_share=1, points_per_side=3))
    whole = sam.segment_boxes(picture(height, width), np.array([[0, 0, width, height]]))
    assert whole.labels.shape == (height, width)
    assert len(whole) == 1 or max(height, width) == 300  # thinner than the decoder's cells
    assert len(sam.segment_boxes(picture(height, width), np.array([[5000, 0, 6000, 2]]))) == 0
    sam.segment_everything(picture(height, width))
    assert sam.segment_points(picture(height, width), np.array([[0.5, 0.5]])).labels.shape == (height, width)


@pytest.mark.parametrize(
    "boxes",
    [
        np.zeros((0, 4)),
        [],
        [[-50, -50, -1, -1]],
        [[500, 10, 600, 40]],
        [[20, 20, 20, 60]],
        [[40, 40, 20, 20]],
        [[np.nan, 0, 10, 10]],
        [[0, 0, 100, 80]],
    ],
    ids=["none", "empty list", "left of it", "right of it", "no width", "turned", "nan", "all of it"],
)
def test_useless_boxes_give_nothing_and_encode_nothing(boxes):
    network = BoxPainter()
    found = Sam(network).segment_boxes(picture(80, 100), np.asarray(boxes))
    assert len(found) == 0 and not found.labels.any() and found.labels.shape == (80, 100)
    assert network.squares == []


def test_boxes_are_clipped_and_keep_their_places():
    given = [[-20, -5, 30, 30], [np.inf, 0, 9, 9], [50, 50, 1e9, np.inf], [3, 3, 3, 9]]
    boxes, places = clean_boxes(np.array(given), 80, 100, 0.9)
    np.testing.assert_array_equal(boxes, [[0, 0, 30, 30], [50, 50, 100, 80]])
    assert places.tolist() == [0, 2]
    masks = Sam(BoxPainter()).find_in_boxes(picture(80, 100), np.array(given))
    assert [mask.prompt for mask in masks] == [0, 2]
    with pytest.raises(ValueError, match=r"shape \(2, 3\), expected \(n, 4\)"):
        clean_boxes(np.zeros((2, 3)), 80, 100, 0.9)


def test_two_boxes_on_one_object_give_one():
    boxes = np.array([[20, 20, 80, 80], [21, 21, 81, 81], [120, 20, 180, 80]])
    assert len(Sam(BoxPainter()).segment_boxes(picture(100, 200), boxes)) == 2


def test_not_finite_answers_are_an_error():
    class Broken(BoxPainter):
        def decode(self, *args):
            logits, ious = super().decode(*args)
            return logits * torch.nan, ious

    with pytest.raises(RuntimeError, match="stand-in: its decoder gave numbers that are not finite, expected"):
        Sam(Broken()).segment_boxes(picture(80, 100), np.array([[10, 10, 40, 40]]))


# ---- points and everything ----


def test_points_take_the_best_answer():
    network = BoxPainter(radius=20)
    points = np.array([[100.0, 50.0], [300.0, 120.0], [-4.0, 10.0], [20.0, np.nan]])
    masks = Sam(network).find_at_points(picture(200, 512), points)
    assert [mask.prompt for mask in masks] == [0, 1]
    for mask, (x, y) in zip(masks, points, strict=False):
        left, top, right, bottom = mask.box
        assert ((left + right) / 2, (top + bottom) / 2) == pytest.approx((x, y), abs=1.1)
        assert mask.width == pytest.approx(80, abs=3) and mask.iou == pytest.approx(0.9)
    pairs = np.array([[[100.0, 50.0], [120.0, 60.0]]])
    found = Sam(network).segment_points(picture(200, 512), pairs, np.array([[1, 0]]))
    assert len(found) == 1 and network.labels[-1].tolist() == [[1, 0]]


def test_everything_finds_each_disc_once_and_no_background():
    discs = [(60, 70, 30), (60, 200, 40), (180, 120, 45), (200, 330, 35), (70, 330, 25)]
    frame = Frame((0, 0, 400, 250), SIDE, True)
    sam = Sam(DiscFinder(discs, frame), SamOptions(points_per_side=12))
    masks = sam.find_everything(picture(250, 400))
    assert len(masks) == len(discs)  # the background is too large, loose and badly rated answers are dropped
    found = sam.segment_everything(picture(250, 400))
    for row, column, radius in discs:
        label = found.labels[row, column]
        assert label and np.count_nonzero(found.labels == label) == pytest.approx(np.pi * radius**2, rel=0.05)
    assert found.scores == pytest.approx([0.95] * 5, rel=0.05)
    loose = Sam(DiscFinder(discs, frame), SamOptions(points_per_side=12, min_iou=0.99))
    assert loose.find_everything(picture(250, 400)) == []


@pytest.mark.parametrize("seed", range(4))
def test_duplicates_go_like_in_torchvision(seed):
    from torchvision.ops import nms

    rng = np.random.default_rng(seed)
    corner, size = rng.integers(0, 60, (80, 2)), rng.integers(1, 50, (80, 2))
    scores = rng.permutation(80) / 80
    masks = [Mask(x, y, h, w, b"", 1, s, 1.0, 0) for (x, y), (w, h), s in zip(corner, size, scores, strict=True)]
    boxes = torch.from_numpy(np.concatenate([corner, corner + size], axis=1)).double()
    expected = nms(boxes, torch.from_numpy(scores), 0.4).tolist()
    assert [masks.index(mask) for mask in drop_duplicates(masks, 0.4)] == expected
    assert drop_duplicates([], 0.4) == []


# ---- windows ----


@pytest.mark.parametrize(("height", "width", "side"), [(500, 700, 200), (100, 1000, 300), (201, 200, 200)])
def test_windows_cover_the_picture_and_overlap(height, width, side):
    whole, *windows = list_windows(height, width, side)
    assert whole == (0, 0, width, height)
    covered = np.zeros((height, width), int)
    for left, top, right, bottom in windows:
        assert right - left == min(side, width) and bottom - top == min(side, height)
        covered[top:bottom, left:right] += 1
    assert covered.min() >= 1
    assert list_windows(height, width, 0) == list_windows(height, width, 4000) == [whole]


def test_a_box_goes_to_the_window_where_it_has_most_room():
    windows = list_windows(500, 700, 200)
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 480, (200, 2))
    boxes = np.concatenate([corner, np.minimum(corner + rng.uniform(2, 180, (200, 2)), [700, 500])], axis=1)
    for box, chosen in zip(boxes, choose_windows(boxes, windows, 500, 700).tolist(), strict=True):
        rooms = []
        for left, top, right, bottom in windows[1:]:
            sides = [
                (left, box[0] - left),
                (top, box[1] - top),
                (right - 700, right - box[2]),
                (bottom - 500, bottom - box[3]),
            ]
            rooms.append(min([room for edge, room in sides if edge != 0], default=np.inf))
        assert chosen == (1 + int(np.argmax(rooms)) if max(rooms) > 0 else 0)


def test_windows_show_small_objects_larger():
    image, network = picture(1024, 1024), BoxPainter()
    boxes = np.array([[100, 100, 110, 110], [500, 900, 512, 909], [300, 300, 800, 800]])
    whole = Sam(network, SamOptions(cache_gb=0)).find_in_boxes(image, boxes)
    assert len(network.squares) == 1
    masks = Sam(network, SamOptions(window=256, cache_gb=0)).find_in_boxes(image, boxes)
    assert len(network.squares) == 1 + 3  # two windows and, for the large box, the whole picture
    for mask, box in zip(masks, boxes, strict=True):
        assert np.abs(np.array(mask.box) - box).max() <= (1 if box[2] - box[0] < 50 else 3)
    given = np.concatenate(network.boxes)
    assert given[3, 2] - given[3, 0] == pytest.approx(500 / 4)  # whole pictures first
    assert given[4, 2] - given[4, 0] == pytest.approx(10)
    assert len(whole) == 3


def test_everything_in_windows_drops_what_a_window_cuts():
    discs = [(128, 128, 60)]

    class Windowed(DiscFinder):
        def encode(self, pixels):
            self.frame = frames[len(self.squares)]
            return super().encode(pixels)

        def decode(self, features, boxes, points, labels, several):
            left, top = self.frame.window[:2]
            mine, self.discs = self.discs, [(row - top, column - left, radius) for row, column, radius in self.discs]
            answers = super().decode(features, boxes, points, labels, several)
            self.discs = mine
            return answers

    frames = [Frame(window, SIDE, True) for window in list_windows(256, 400, 200)]
    sam = Sam(Windowed(discs, None), SamOptions(window=200, points_per_side=8, cache_gb=0, max_share=0.5))
    image = picture(256, 400)
    masks = sam.find_everything(image)
    assert len(sam.network.squares) == len(frames)
    assert len(masks) == 1 and masks[0].area == pytest.approx(np.pi * 60**2, rel=0.05)


# ---- narrowing ----


def test_narrowing_and_growing_back():
    boxes, image = np.array([[20, 20, 100, 80], [100, 20, 180, 80]]), picture(100, 200)
    plain = Sam(BoxPainter()).segment_boxes(image, boxes)
    narrow = Sam(BoxPainter(), SamOptions(narrowing=0.3, grow_back=False)).segment_boxes(image, boxes)
    grown = Sam(BoxPainter(), SamOptions(narrowing=0.3)).segment_boxes(image, boxes)
    assert len(plain) == len(narrow) == len(grown) == 2
    assert np.count_nonzero(narrow.labels) < 0.8 * np.count_nonzero(plain.labels)
    np.testing.assert_array_equal(grown.labels > 0, plain.labels > 0)
    assert cv2.connectedComponents((narrow.labels > 0).view(np.uint8))[0] == 3  # apart


# ---- cache ----


def files_of(folder):
    return sorted(folder.iterdir())


def test_pictures_are_encoded_once(tmp_path):
    network, options = BoxPainter(), SamOptions(cache=tmp_path / "kept")
    image, box = picture(90, 120), np.array([[10, 10, 50, 50]])
    sam = Sam(network, options)
    first = sam.segment_boxes(image, box)
    sam.segment_boxes(image, box + 3)
    assert len(network.squares) == 1
    (file,) = files_of(tmp_path / "kept")
    with np.load(file) as stored:
        assert [stored[name].dtype for name in stored.files] == [np.float16]
    again = Sam(network, options).segment_boxes(image.copy(), box)  # another process, another day
    assert len(network.squares) == 1
    np.testing.assert_array_equal(first.labels, again.labels)
    changed = image.copy()
    changed[5, 5, 1] ^= 1
    Sam(network, options).segment_boxes(changed, box)
    assert len(network.squares) == 2


def test_what_changes_the_features_changes_the_key(tmp_path):
    options, image = SamOptions(cache=tmp_path), picture(90, 120)
    for change in ({}, {"digest": "1" * 64}, {"mean": (1.0, 0, 0)}, {"std": (2.0, 1, 1)}, {"side": 128}):
        network = BoxPainter()
        for name, value in change.items():
            setattr(network, name, value)
        Sam(network, options).encode(image)
        assert len(network.squares) == 1, change
    Sam(BoxPainter(keep_ratio=False), options).encode(image)
    Sam(BoxPainter(), options).encode(image.reshape(120, 90, 3))
    assert len(files_of(tmp_path)) == 7


def test_fresh_and_kept_features_are_the_same(tmp_path):
    network, image = BoxPainter(), picture(90, 120)
    fresh = Sam(network, SamOptions(cache_gb=0)).encode(image)
    Sam(network, SamOptions(cache=tmp_path)).encode(image)
    kept = Sam(network, SamOptions(cache=tmp_path)).encode(image)
    assert torch.equal(fresh.features[0], kept.features[0]) and len(network.squares) == 2


@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "bit", "folder"])
def test_a_damaged_file_is_computed_anew(tmp_path, damage):
    network, options, image = BoxPainter(), SamOptions(cache=tmp_path), picture(90, 120)
    Sam(network, options).encode(image)
    (file,) = files_of(tmp_path)
    whole = file.read_bytes()
    bit = bytearray(whole)
    bit[len(bit) // 2] ^= 4
    file.write_bytes({"cut": whole[:500], "noise": b"noise", "empty": b"", "bit": bytes(bit), "folder": b""}[damage])
    if damage == "folder":
        file.unlink()
        file.mkdir()
        with pytest.warns(UserWarning, match="cannot be kept in .*--sam-cache"):
            Sam(network, options).encode(image)
    else:
        Sam(network, options).encode(image)
        Sam(network, options).encode(image)
        assert file.read_bytes() == whole
    assert len(network.squares) == 2


def test_the_folder_stays_within_its_size(tmp_path):
    one = 3 * 64 * 64 * 2
    sam = Sam(BoxPainter(), SamOptions(cache=tmp_path, cache_gb=3.5 * one / 1e9))
    (tmp_path / "mine.npz").write_bytes(bytes(3 * one))  # somebody else's, and older than all of ours
    pictures = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8)
    for image in pictures:
        sam.encode(image)
    assert len(files_of(tmp_path)) == 1 + 3
    assert (tmp_path / "mine.npz").exists()
    sam.network.squares.clear()
    sam.encode(pictures[6])
    assert sam.network.squares == []  # the newest stayed
    small = Sam(BoxPainter(), SamOptions(cache=tmp_path / "small", cache_gb=1e-6))
    small.encode(picture(64, 64))
    assert not (tmp_path / "small").exists()


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path):
    (tmp_path / "file").write_text("")
    sam = Sam(BoxPainter(), SamOptions(cache=tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="cannot be kept in .*file.cache .*--sam-cache") as said:
        for image in np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8):
            sam.encode(image)
    assert len(said) == 1


# ---- flags ----


def test_flags_have_the_defaults_of_the_options():
    parser = cli.make_parser("test")
    add_sam_args(parser)
    assert options_from(parser.parse_args([])) == SamOptions()
    flags = {action.dest for action in parser._actions}
    assert {name if name == "sam_type" else f"sam_{name}" for name in (f.name for f in fields(SamOptions))} <= flags
    words = "--sam-type vit_l --sam-points --sam-chunk 3 --sam-window 512 --sam-min-iou 0.5 --sam-narrowing 0.2"
    args = parser.parse_args([*words.split(), "--no-sam-grow-back", "--sam-cache-gb", "0", "--sam", "x.pth"])
    assert isinstance(args, argparse.Namespace) and str(args.sam) == "x.pth"
    assert options_from(args) == SamOptions("vit_l", True, 3, 512, 0.5, narrowing=0.2, grow_back=False, cache_gb=0)
    with pytest.raises(cli.UsageError, match="--sam-narrowing 1 leaves nothing"):
        options_from(parser.parse_args(["--sam-narrowing", "1"]))
