"""How the batches of an epoch are drawn, and which part of them one of several processes takes."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np

Drawn = TypeVar("Drawn")


def draw_batches(
    groups: Iterable[list[Drawn]],
    rng: np.random.Generator,
    *,
    batch: int,
    enough: int,
    let_go: Callable[[list[Drawn]], list[Drawn]],
) -> Iterator[list[Drawn]]:
    """Draw batches at random from a pool that groups fill in turn; a batch keeps the order of the pool.

    Args:
        groups: the samples of each image, or what stands for them: what is drawn depends on their numbers alone.
        batch: samples of a batch; the last ones may be fewer.
        enough: samples in the pool from which on a batch is drawn.
        let_go: is given what is left in the pool after a batch, and returns as many.
    """
    pool: list[Drawn] = []

    def draw() -> list[Drawn]:
        chosen = set(rng.permutation(len(pool))[:batch].tolist())
        drawn = [item for place, item in enumerate(pool) if place in chosen]
        pool[:] = let_go([item for place, item in enumerate(pool) if place not in chosen])
        return drawn

    for group in groups:
        pool += group
        while len(pool) >= enough:
            yield draw()
    while pool:
        yield draw()


def part_of(length: int, rank: int, world: int) -> slice:
    """The consecutive part of `length` things that process `rank` of `world` takes.

    Parts differ by at most one, the first ones are the larger; together they are everything, once.
    """
    least, more = divmod(length, world)
    begin = rank * least + min(rank, more)
    return slice(begin, begin + least + (rank < more))
