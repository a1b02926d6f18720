"""Merging of what several engines found: borders, duplicates, covered objects, votes, and that no object is lost."""

import argparse
from itertools import permutations

import cv2
import numpy as np
import pytest

import cli
from annotation.instances import Instances, empty_instances, number_instances
from annotation.merge_options import MergeOptions, add_merge_args, options_from
from annotation.merging import agreement, mean_shape, merge

SHAPE = (80, 100)


def discs(engine, *circles, shape=SHAPE, scores=0.5):
    """Instances of discs (x, y, radius); a later one lies over an earlier one."""
    labels = np.zeros(shape, np.int32)
    for number, (x, y, radius) in enumerate(circles, 1):
        cv2.circle(labels, (x, y), radius, number, -1)
    return number_instances(labels, scores, engine)


def random_discs(rng, engine, count=14):
    circles = [(rng.integers(4, 96), rng.integers(4, 76), rng.integers(2, 14)) for _ in range(count)]
    return discs(engine, *circles, scores=rng.random(count).astype(np.float32))


def masks_of(found):
    return [found.labels == number for number in range(1, len(found) + 1)]


def is_valid(found):
    """The form that Instances promises, looked at object by object."""
    values, firsts = np.unique(found.labels, return_index=True)
    assert values[values > 0].tolist() == list(range(1, len(found) + 1))
    assert np.all(np.diff(firsts[values > 0]) > 0)
    for mask in masks_of(found):
        assert cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)[0] == 2
    assert found.labels.dtype == np.int32 and found.scores.shape == (len(found),)
    return np.all((found.scores >= 0) & (found.scores <= 1))


@pytest.mark.parametrize("rule", ["sam_first", "unite"])
def test_two_overlapping_discs_stay_two_objects(rule):
    merged = merge([discs("sam", (35, 40, 20)), discs("watershed", (65, 40, 20))], rule)
    assert is_valid(merged) and len(merged) == 2 and merged.engines == ("sam", "watershed")
    union = (discs("a", (35, 40, 20)).labels > 0) | (discs("a", (65, 40, 20)).labels > 0)
    assert np.array_equal(merged.labels > 0, union)


def test_the_border_of_equal_discs_is_their_chord():
    merged = merge([discs("a", (35, 40, 20)), discs("b", (65, 40, 20))], "unite")
    rows, columns = np.nonzero(merged.labels == 1)
    assert columns.max() in (49, 50)
    rows, columns = np.nonzero(merged.labels == 2)
    assert columns.min() in (50, 51)


def test_the_border_of_unequal_discs_runs_through_the_crossings_of_their_outlines():
    merged = merge([discs("a", (35, 40, 25)), discs("b", (65, 40, 15))], "unite")
    assert len(merged) == 2
    x = (65**2 - 35**2 + 25**2 - 15**2) / (2 * (65 - 35))  # of the crossings
    half = np.sqrt(25**2 - (x - 35) ** 2)
    for y in (40 - half, 40 + half):
        row, column = round(y), round(x)
        near = merged.labels[row - 2 : row + 3, column - 2 : column + 3]
        assert {0, 1, 2} <= set(near.ravel().tolist())
    assert merged.labels[40, 52] == 1 or merged.labels[40, 55] == 2


def test_the_first_engine_keeps_its_pixels_under_sam_first():
    sam, watershed = discs("sam", (35, 40, 20)), discs("watershed", (62, 40, 20))
    merged = merge([sam, watershed], "sam_first")
    assert np.array_equal(merged.labels == merged.labels[40, 35], sam.labels > 0)
    merged = merge([watershed, sam], "sam_first")
    assert np.array_equal(merged.labels == merged.labels[40, 62], watershed.labels > 0)


@pytest.mark.parametrize("rule", ["sam_first", "unite"])
def test_duplicates_are_removed(rule):
    first, second = discs("sam", (40, 40, 20), scores=0.4), discs("watershed", (43, 40, 20), (85, 15, 8), scores=0.9)
    merged = merge([first, second], rule)
    assert is_valid(merged) and len(merged) == 2
    best = first if rule == "sam_first" else second
    number = merged.labels[40, 40]
    assert np.array_equal(merged.labels == number, best.labels == best.labels[40, 40])
    assert merged.engines[number - 1] == "sam+watershed"
    assert merged.scores[number - 1] == pytest.approx(0.4 if rule == "sam_first" else 0.9)


def test_an_object_that_better_ones_cover_is_dropped():
    blob = discs("sam", (50, 40, 30), scores=0.9)
    parts = discs("watershed", (40, 40, 9), (60, 40, 9), (90, 70, 8), scores=0.5)
    for rule in ("sam_first", "unite"):
        merged = merge([blob, parts], rule)
        assert sorted(merged.engines) == ["sam", "watershed"]
    assert len(merge([parts, blob], "sam_first")) == 4  # the parts cover less than half of the blob
    assert len(merge([parts, discs("sam", (45, 40, 12))], "sam_first")) == 3


def test_a_better_object_inside_a_larger_one_keeps_its_pixels():
    small, large = discs("a", (50, 40, 8), scores=0.9), discs("b", (50, 40, 30), scores=0.3)
    merged = merge([large, small], "unite")
    assert is_valid(merged) and len(merged) == 2
    assert np.array_equal(merged.labels == merged.labels[40, 50], small.labels > 0)


@pytest.mark.parametrize("rule", ["sam_first", "unite"])
@pytest.mark.parametrize("seed", range(12))
def test_no_object_is_lost_unless_a_duplicate_or_covered(rule, seed):
    rng = np.random.default_rng(seed)
    found = [random_discs(rng, name) for name in ("a", "b", "c")]
    merged = merge(found, rule)
    assert is_valid(merged)
    union = np.any([each.labels > 0 for each in found], axis=0)
    assert np.all(union[merged.labels > 0])
    for each in found:
        for mask in masks_of(each):
            inside = np.bincount(merged.labels[mask])
            inside[0] = 0
            overlapping = [merged.labels == number for number in np.flatnonzero(inside)]
            ious = [(other & mask).sum() / (other | mask).sum() for other in overlapping]
            mostly_theirs = [(other & mask).sum() / other.sum() > 0.4 for other in overlapping]
            covered = inside.sum() / mask.sum() > 0.4  # by what is there, or it was cut into pieces by it
            assert (ious and max(ious) > 0.3) or any(mostly_theirs) or covered


@pytest.mark.parametrize("rule", ["sam_first", "unite", "vote"])
@pytest.mark.parametrize("seed", range(6))
def test_an_engine_by_itself_and_with_an_empty_one(rule, seed):
    found = random_discs(np.random.default_rng(seed), "a")
    alone = merge([found], rule)
    assert np.array_equal(alone.labels, found.labels)
    beside = merge([found, empty_instances(*SHAPE)], MergeOptions(rule, min_votes=1))
    assert np.array_equal(beside.labels, found.labels) and beside.engines == found.engines
    if rule != "vote":
        assert np.allclose(beside.scores, found.scores)
    assert len(merge([found, empty_instances(*SHAPE)], "vote")) == 0
    twice = merge([found, found], rule)
    assert np.array_equal(twice.labels, found.labels) and np.allclose(twice.scores, found.scores)


@pytest.mark.parametrize("votes", [None, 1, 3])
@pytest.mark.parametrize("seed", range(8))
def test_the_order_of_engines_does_not_matter_for_votes(seed, votes):
    rng = np.random.default_rng(seed)
    truth = [(int(x), int(y), int(r)) for x, y, r in rng.integers((8, 8, 4), (92, 72, 12), (10, 3))]

    def shaken(name):
        circles = [(x + rng.integers(-2, 3), y + rng.integers(-2, 3), r + rng.integers(-1, 2)) for x, y, r in truth]
        return discs(name, *circles, scores=rng.random(10).astype(np.float32))

    found = [shaken(name) for name in ("a", "b", "c")]
    results = [merge(order, MergeOptions("vote", min_votes=votes)) for order in permutations(found)]
    assert is_valid(results[0]) and len(results[0]) > 0
    for other in results[1:]:
        assert np.array_equal(results[0].labels, other.labels)
        assert np.array_equal(results[0].scores, other.scores) and results[0].engines == other.engines


def test_most_votes_win_and_the_score_counts_all_engines():
    a = discs("a", (25, 40, 12), (75, 40, 12), scores=0.6)
    b = discs("b", (26, 40, 12), scores=0.9)
    c = discs("c", (25, 41, 12), (50, 12, 8), scores=0.9)
    merged = merge([a, b, c], "vote")
    assert len(merged) == 1 and merged.engines == ("a+b+c",)
    assert merged.scores[0] == pytest.approx((0.6 + 0.9 + 0.9) / 3)
    assert len(merge([a, b, c], MergeOptions("vote", min_votes=1))) == 3
    assert len(merge([a, b], "vote")) == 1  # most of two are two
    assert merge([a, b], "vote").scores[0] == pytest.approx(0.75)


def test_the_mean_outline_lies_midway():
    small, large = (discs("a", (50, 40, radius)).labels > 0 for radius in (12, 20))
    area = np.count_nonzero(mean_shape([small, large]))
    assert area == pytest.approx(np.pi * 16**2, rel=0.03)
    one = np.zeros((3, 5), bool)
    other = one.copy()
    one[1, :2], other[1, 3:] = True, True
    assert np.count_nonzero(mean_shape([one, other])) > 0
    with pytest.raises(ValueError, match="masks are empty"):
        mean_shape([np.zeros((2, 2), bool), np.zeros((2, 2), bool)])


def test_touching_and_nested_extremes():
    full = number_instances(np.ones(SHAPE, np.int32), 0.2, "a")
    dots = np.zeros(SHAPE, np.int32)
    dots[::9, ::9] = np.arange(1, 1 + dots[::9, ::9].size).reshape(dots[::9, ::9].shape)
    points = number_instances(dots, 0.9, "b")
    merged = merge([full, points], "unite")
    assert is_valid(merged) and len(merged) == 1 + len(points)
    assert len(merge([full, points], "sam_first")) == 1
    tiny = Instances(np.ones((1, 1), np.int32), np.ones(1, np.float32), ("a",))
    assert len(merge([tiny, tiny], "unite")) == 1


def test_agreement():
    a, b = discs("a", (25, 40, 12), (75, 40, 12)), discs("b", (26, 40, 12), (50, 12, 5))
    assert agreement([a, b]) == pytest.approx(0.5)
    assert agreement([a, a]) == 1
    assert agreement([a, a, b]) == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert agreement([a, empty_instances(*SHAPE)]) == 0
    assert agreement([a]) is None and agreement([empty_instances(*SHAPE)] * 2) is None


def test_what_cannot_be_merged():
    with pytest.raises(ValueError, match="at least one engine"):
        merge([], "unite")
    with pytest.raises(ValueError, match=r"\(5, 5\) and \(80, 100\); expected one size"):
        merge([discs("a", (9, 9, 3)), empty_instances(5, 5)])
    with pytest.raises(ValueError, match="'both', expected one of sam_first, unite, vote"):
        merge([discs("a", (9, 9, 3))], "both")


def test_flags():
    parser = argparse.ArgumentParser()
    add_merge_args(parser)
    assert options_from(parser.parse_args([])) == MergeOptions()
    options = options_from(parser.parse_args("--combine vote --min-votes 2 --duplicate-iou 0.4".split()))
    assert (options.rule, options.min_votes, options.duplicate_iou) == ("vote", 2, 0.4)
    with pytest.raises(SystemExit):
        parser.parse_args(["--max-covered", "1"])
    namespace = argparse.Namespace(combine="vote", duplicate_iou=2.0, max_covered=0.5, min_votes=None)
    with pytest.raises(cli.UsageError, match="duplicate_iou is 2.0"):
        options_from(namespace)
