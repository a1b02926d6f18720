"""Boxes: overlaps, suppression and merging, against torchvision and against loops over all pairs."""

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from annotation import boxes as module
from annotation.boxes import (
    Boxes,
    choose_owners,
    clip_boxes,
    group_numbers,
    join_boxes,
    match_boxes,
    matching_pairs,
    merge_boxes,
    no_boxes,
    suppress,
)

seeds = st.integers(0, 2**32 - 1)


def all_pairs(xyxy, match, threshold, classes=None):
    parts = list(matching_pairs(xyxy, match, threshold, classes))
    assert all(len(i) <= module.PAIRS_AT_ONCE + len(xyxy) for i, _ in parts)
    return [pair for i, j in parts for pair in zip(i.tolist(), j.tolist(), strict=True)]


def random_boxes(seed: int, count: int, side: float = 100.0, longest: float = 40.0):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, side, (count, 2))
    xyxy = np.hstack([corner, corner + rng.uniform(0.5, longest, (count, 2))])
    return xyxy, rng.random(count).astype(np.float32), rng.integers(0, 3, count)


def slow_match(a, b, match):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height if match == "iou" else min(areas))


@given(seeds, st.integers(0, 60), st.sampled_from(["iou", "ios"]))
@settings(max_examples=40, deadline=None)
def test_pairs_are_those_of_all_pairs(seed, count, match):
    xyxy, _, classes = random_boxes(seed, count)
    expected = {
        (i, j)
        for i in range(count)
        for j in range(i + 1, count)
        if classes[i] == classes[j] and slow_match(xyxy[i], xyxy[j], match) > 0.3
    }
    found = [(min(pair), max(pair)) for pair in all_pairs(xyxy, match, 0.3, classes)]
    assert len(set(found)) == len(found) and set(found) == expected


def test_pairs_in_small_parts_are_the_same(monkeypatch):
    xyxy, _, _ = random_boxes(1, 200)
    whole = all_pairs(xyxy, "iou", 0.2)
    monkeypatch.setattr(module, "PAIRS_AT_ONCE", 7)
    assert sorted(all_pairs(xyxy, "iou", 0.2)) == sorted(whole) and len(whole) > 50


@given(seeds, st.integers(0, 80), st.floats(0.05, 0.95))
@settings(max_examples=60, deadline=None)
def test_suppression_is_that_of_torchvision(seed, count, threshold):
    xyxy, scores, classes = random_boxes(seed, count)
    xyxy = xyxy.astype(np.float32)
    expected = torchvision.ops.nms(torch.from_numpy(xyxy), torch.from_numpy(scores), threshold)
    assert suppress(xyxy, scores, None, threshold).tolist() == expected.tolist()
    found = suppress(xyxy, scores, classes, threshold).tolist()
    alone = []
    for kind in range(3):
        members = np.flatnonzero(classes == kind)
        kept = torchvision.ops.nms(torch.from_numpy(xyxy[members]), torch.from_numpy(scores[members]), threshold)
        alone += members[kept.numpy()].tolist()
    assert sorted(found) == sorted(alone)
    assert (np.diff(scores[found]) <= 0).all()


def test_equal_scores_keep_their_order():
    xyxy = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 60, 60]], np.float32)
    assert suppress(xyxy, np.full(3, 0.5), None, 0.5).tolist() == [0, 2]
    apart = random_boxes(0, 500, 1e6)[0]  # a sort of so many keeps equal ones in order only when asked to
    scores = np.random.default_rng(0).choice([0.25, 0.5, 0.75], 500)
    assert suppress(apart, scores, None, 0.5).tolist() == sorted(range(500), key=lambda i: -scores[i])


@given(seeds, st.integers(0, 40), st.sampled_from(["nms", "greedy_nmm", "nmm"]), st.sampled_from(["iou", "ios"]))
@settings(max_examples=60, deadline=None)
def test_owners_are_those_of_a_loop(seed, count, merge, match):
    xyxy, scores, classes = random_boxes(seed, count)

    def alike(i, j):
        return i != j and classes[i] == classes[j] and slow_match(xyxy[i], xyxy[j], match) > 0.4

    owners, left = {}, sorted(range(count), key=lambda i: (-scores[i], i))
    while left:
        best = left.pop(0)
        members, reached = [best], [best]
        while reached:
            now = reached.pop()
            near = [j for j in left if alike(now, j)]
            left = [j for j in left if j not in near]
            members += near
            reached += near if merge == "nmm" else []
        owners.update(dict.fromkeys(members, best))
    found = choose_owners(xyxy, scores, classes, merge=merge, match=match, threshold=0.4)
    assert found.tolist() == [owners[i] for i in range(count)]


@given(seeds, st.integers(0, 120), st.sampled_from(["iou", "ios"]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_crowds_are_decided_alike(seed, count, match, one_class):
    xyxy, scores, classes = random_boxes(seed, count, 40)
    rules = {"match": match, "threshold": 0.3}
    classes = None if one_class else classes
    listed = choose_owners(xyxy, scores, classes, **rules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "FEW_PAIRS", -1)
        patch.setattr(module, "BLOCK", 8)
        patch.setattr(module, "PAIRS_AT_ONCE", 100)
        blocks = []
        original = module._crowded_owners
        patch.setattr(module, "_crowded_owners", lambda *args: blocks.append(1) or original(*args))
        assert choose_owners(xyxy, scores, classes, **rules).tolist() == listed.tolist()
        assert bool(blocks) == (count > 8)
        joined = choose_owners(xyxy, scores, classes, merge="nmm", **rules)
    assert joined.tolist() == choose_owners(xyxy, scores, classes, merge="nmm", **rules).tolist()


@given(seeds, st.integers(1, 30), st.sampled_from(["greedy_nmm", "nmm"]))
@settings(max_examples=30, deadline=None)
def test_merged_boxes_are_hulls_and_unite_masks(seed, count, merge):
    xyxy, scores, classes = random_boxes(seed, count, 60, 30)
    rng = np.random.default_rng(seed)
    xyxy = np.rint(xyxy) + [0, 0, 1, 1]
    masks = [((int(x1), int(y1)), rng.random((int(y2 - y1), int(x2 - x1))) < 0.5) for x1, y1, x2, y2 in xyxy.tolist()]
    found = merge_boxes(Boxes(xyxy, scores, classes, masks=masks), merge, "ios", 0.5)
    owners = choose_owners(xyxy, scores, classes, merge=merge, match="ios", threshold=0.5)
    assert len(found) == len(set(owners.tolist()))
    for (left, top), crop in found.masks:
        assert crop.dtype == bool and left >= 0 and top >= 0
    for number, owner in enumerate(sorted(set(owners.tolist()), key=lambda i: (-scores[i], i))):
        members = np.flatnonzero(owners == owner)
        hull = [*xyxy[members, :2].min(axis=0), *xyxy[members, 2:].max(axis=0)]
        assert found.xyxy[number].tolist() == hull
        assert found.scores[number] == scores[members].max() and found.classes[number] == classes[owner]
        canvas = np.zeros((100, 100), bool)
        for i in members:
            (left, top), crop = masks[i]
            canvas[top : top + crop.shape[0], left : left + crop.shape[1]] |= crop
        (left, top), crop = found.masks[number]
        assert np.array_equal(canvas[top : top + crop.shape[0], left : left + crop.shape[1]], crop)
        assert crop.sum() == canvas.sum()


def test_suppressed_boxes_leave_the_best_as_it_is():
    boxes = Boxes([[0, 0, 10, 10], [2, 0, 13, 10], [0, 20, 5, 25]], [0.6, 0.9, 0.7], [0, 0, 0])
    found = merge_boxes(boxes, "nms", "iou", 0.5)
    assert found.xyxy.tolist() == [[2, 0, 13, 10], [0, 20, 5, 25]] and found.masks is None


def test_a_box_without_area_matches_nothing():
    flat = np.array([[3.0, 3, 3, 9], [3, 3, 3, 9]])
    assert match_boxes(flat[:1], flat[1:], "iou").tolist() == [0] == match_boxes(flat[:1], flat[1:], "ios").tolist()
    assert suppress(flat, np.ones(2), None, 0.5).tolist() == [0, 1]


def test_boxes_outside_lose_their_area():
    cut = clip_boxes(np.array([[-5.0, -5, 3, 4], [90, 90, 95, 99]]), np.array([0, 0, 50, 40]))
    assert cut.tolist() == [[0, 0, 3, 4], [50, 40, 50, 40]]


def test_groups_have_the_lowest_number():
    assert group_numbers(np.array([4, 2]), np.array([2, 1]), 6).tolist() == [0, 1, 1, 3, 1, 5]


def test_no_boxes_go_through_everything():
    empty = no_boxes(("a", "b"))
    assert len(empty) == 0 and len(merge_boxes(empty, "nmm", "ios", 0.5)) == 0
    joined = join_boxes([empty, empty], ("a", "b"))
    assert joined.xyxy.shape == (0, 4) and joined.names == ("a", "b")
    assert len(empty.moved(3, 4).take(np.zeros(0, bool))) == 0


def test_unknown_rules_are_named():
    with pytest.raises(ValueError, match=r"'soft'.*nms greedy_nmm nmm"):
        choose_owners(np.zeros((0, 4)), np.zeros(0), None, merge="soft")
    with pytest.raises(ValueError, match=r"'giou'.*iou ios"):
        match_boxes(np.zeros((1, 4)), np.zeros((1, 4)), "giou")


def test_many_boxes_take_seconds_not_minutes():
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 10_000, (30_000, 2))
    xyxy = np.hstack([corner, corner + 30])
    kept = suppress(xyxy, rng.random(30_000), None, 0.5)
    assert 25_000 < len(kept) < 30_000
