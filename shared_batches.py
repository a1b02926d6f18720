"""What one of several processes takes of the batches to learn from and of the images to score.

Batches are drawn as one process draws them, with the same random numbers; each process then loads its own part of
every one. So the batches of a run, and what augmentation makes of each sample, do not depend on the processes.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.utils.data import Sampler

from dataset import Batch, EpochSampler, EvaluationSet, Slot, TrainingBatches, TrainingSet, let_go
from image_io import IGNORE_INDEX
from shares import part_of

Place = tuple[int, int]  # of a sample: its item of the sampler, and which slot of it


def part_of_set(data: EvaluationSet, rank: int, world: int) -> EvaluationSet:
    """The images and slides that process `rank` of `world` predicts, in batches that are smaller by as much."""
    if world == 1:
        return data
    images, slides = data.without_slides().pairs, data.slide_pairs()
    pairs = [*images[part_of(len(images), rank, world)], *slides[part_of(len(slides), rank, world)]]
    config = replace(data.config, batch=-(-data.config.batch // world))
    return EvaluationSet(pairs, data.classes, config, with_images=data.with_images)


class SharedBatches(TrainingBatches):
    """The part of every batch that one of several processes learns from.

    The names of a batch are those of all its samples, also of the other processes'. A part without samples, in a last
    batch that is smaller than the number of processes, is one image whose pixels are all ignored.

    Args:
        batch: samples of a batch of all processes together.
        rank: number of this process out of `world`.
    """

    def __init__(
        self,
        data: TrainingSet,
        sampler: EpochSampler,
        *,
        batch: int,
        workers: int,
        pin: bool,
        rank: int,
        world: int,
    ) -> None:
        self.share, self.rank, self.world = _Share(), rank, world
        super().__init__(data, sampler, batch=batch, workers=workers, pin=pin)

    def order(self) -> Sampler[tuple[Slot, ...]]:
        """What is loaded, item by item."""
        return self.share

    def __iter__(self) -> Iterator[Batch]:
        items = list(self.sampler)
        places = ([(item, slot) for slot in range(len(slots))] for item, slots in enumerate(items))
        batches: list[list[Place]] = list(self.draw(places, list))
        own = [drawn[part_of(len(drawn), self.rank, self.world)] for drawn in batches]
        slots_of: dict[int, list[int]] = {}
        for item, slot in sorted(place for drawn in own for place in drawn):
            slots_of.setdefault(item, []).append(slot)
        self.share.items = [
            tuple(replace(items[item][slot], item=items[item][0].augmented) for slot in slots)
            for item, slots in slots_of.items()
        ]
        known: dict[Place, tuple[Batch, int]] = {}
        loaded, coming = iter(self.loader), iter(slots_of.items())
        for drawn, mine in zip(batches, own, strict=True):
            while any(place not in known for place in mine):
                (item, slots), samples = next(coming), next(loaded)
                known |= {(item, slot): (samples, row) for row, slot in enumerate(slots)}
            names = tuple(self.data.pairs[items[item][slot].image].name for item, slot in drawn)
            yield self._stack([known.pop(place) for place in mine], names)
            known = dict(zip(known, let_go(list(known.values())), strict=True))
        deque(loaded, maxlen=0)  # to its end, which loader processes that stay wait for

    def _stack(self, samples: list[tuple[Batch, int]], names: tuple[str, ...]) -> Batch:
        """A batch of samples out of what was loaded."""
        if samples:
            images = torch.stack([loaded.images[row] for loaded, row in samples])
            masks = torch.stack([loaded.masks[row] for loaded, row in samples])
        else:
            config = self.data.config
            images = torch.zeros(1, len(config.channels), *config.geometry.size)
            masks = torch.full((1, *config.geometry.size), IGNORE_INDEX, dtype=torch.uint8)
        batch = Batch(images, masks, names)
        return batch.pin_memory() if self.pin else batch


class _Share(Sampler[tuple[Slot, ...]]):
    """The items of this process in an epoch."""

    def __init__(self) -> None:
        self.items: list[tuple[Slot, ...]] = []

    def __iter__(self) -> Iterator[tuple[Slot, ...]]:
        return iter(self.items)
