"""What tells a collapsed pretraining from a healthy one: values worked out by hand, and when a run is stopped."""

import math

import pytest
import torch

from selfsupervised.watch import (
    FEW,
    PATIENCE,
    CollapseError,
    check_collapse,
    effective_rank,
    is_collapsed,
    measure,
    off_diagonal_energy,
    spread,
)


def normal(samples, dimensions, seed=0):
    return torch.randn(samples, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_spread_is_1_on_the_whole_sphere_and_0_in_one_point():
    assert spread(normal(4000, 64)) == pytest.approx(1, abs=0.02)
    assert spread(torch.ones(50, 64).double()) == 0
    assert spread(normal(4000, 64) * 1e-3 + 1) < 0.01  # of their direction, not of their length
    assert spread(normal(4000, 64) * 1e3) == pytest.approx(spread(normal(4000, 64)))


def test_spread_of_two_opposite_points():
    """Half of the samples at e1, half at -e1: deviation 1 in one of D dimensions."""
    two = torch.zeros(10, 4).double()
    two[:5, 0], two[5:, 0] = 3, -7
    assert spread(two) == pytest.approx(1 / 4 * math.sqrt(4))


def test_effective_rank_counts_directions():
    basis = torch.linalg.qr(normal(40, 10))[0]
    for rank in (1, 3, 10):
        assert effective_rank(basis[:, :rank] @ torch.eye(10).double()[:rank]) == pytest.approx(rank)
    assert effective_rank(torch.zeros(5, 3)) == 0
    assert effective_rank(torch.full((5, 3), math.nan)) == 0
    assert effective_rank(normal(500, 8)) == pytest.approx(8, abs=0.1)
    values = torch.tensor([3.0, 1.0]).double()  # the entropy of 3/4 and 1/4
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert effective_rank(torch.diag(values)) == pytest.approx(expected)


def test_energy_is_the_mean_square_correlation():
    embeddings = normal(300, 5)
    centred = embeddings - embeddings.mean(0)
    correlation = torch.corrcoef(embeddings.T)
    off = correlation[~torch.eye(5, dtype=torch.bool)]
    assert off_diagonal_energy(centred) == pytest.approx(float(off.square().mean()))
    same = normal(300, 1).expand(300, 5)
    assert off_diagonal_energy(same - same.mean(0)) == pytest.approx(1)
    assert off_diagonal_energy(normal(9, 1)) == 0


def test_a_common_offset_is_not_a_direction():
    embeddings = normal(500, 8)
    assert measure(embeddings + 100)["rank"] == pytest.approx(measure(embeddings)["rank"])


@pytest.mark.parametrize(
    ("embeddings", "collapsed"),
    [
        (normal(64, 16), False),
        (normal(64, 16) + 3, False),  # what Barlow Twins takes off again
        (torch.ones(64, 16) + 1e-4 * normal(64, 16), True),
        (normal(64, 1) @ normal(1, 16), True),  # on one line
        (normal(64, 2) @ normal(2, 16), False),
        (normal(4, 1) @ normal(1, 16), False),  # too few to tell
        (torch.zeros(64, 16), True),
    ],
)
def test_what_counts_as_collapsed(embeddings, collapsed):
    assert is_collapsed(measure(embeddings), len(embeddings)) == collapsed
    assert len(embeddings) != 4 or len(embeddings) < FEW


def rows(*collapsed):
    watch = {"spread": 0.001, "rank": 1.2}
    return [{"epoch": place, "collapsed": value, "watch": watch} for place, value in enumerate(collapsed, 1)]


def test_a_run_stops_after_some_collapsed_epochs_in_a_row():
    assert check_collapse(rows(False), allowed=False) == ""
    assert check_collapse(rows(True, True, False), allowed=False) == ""
    assert "collapsed" in check_collapse(rows(True), allowed=False)
    assert "collapsed" in check_collapse(rows(True, True, False, True, True), allowed=False)
    with pytest.raises(CollapseError) as caught:
        check_collapse(rows(False, *[True] * PATIENCE), allowed=False)
    said = str(caught.value)
    for words in ("spread 0.001", "effective rank 1.2", "up to 4", "-lr", "-b", "--exp-name", "--allow-collapse"):
        assert words in said
    assert "collapsed" in check_collapse(rows(*[True] * 9), allowed=True)
