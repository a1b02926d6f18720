"""MoCo v2: a query is nearer to the key of its own image than to the keys of earlier batches.

References:
    - He et al. 2020, Momentum Contrast: https://arxiv.org/abs/1911.05722
    - Chen et al. 2020, Improved Baselines (the MLP head): https://arxiv.org/abs/2003.04297
    - Cai et al. 2021, EMAN (see teacher.py): https://arxiv.org/abs/2101.08482
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from gathering import gather_over, in_full
from selfsupervised.heads import build_head, pooled_features
from selfsupervised.interface import Method, MethodOptions, Step
from selfsupervised.teacher import STATISTICS_BATCHES, Teacher


class KeyQueue(nn.Module):
    """The last K keys, (K, D), in a ring; random directions until real ones come."""

    keys: Tensor
    place: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("keys", functional.normalize(torch.randn(size, width), dim=1))
        self.register_buffer("place", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def add(self, keys: Tensor) -> None:
        """Put keys (N, D) of length 1 in the place of the oldest; of more than K the last ones stay."""
        size, count = len(self.keys), len(keys)
        kept = min(size, count)
        places = (self.place + torch.arange(count - kept, count, device=keys.device)) % size
        self.keys[places] = keys[count - kept :].to(self.keys.dtype)
        self.place.copy_((self.place + count) % size)


class MomentumContrast(Method):
    """A student that finds the teacher's key of the other view among those of earlier batches.

    Gradients of smaller batches add up to those of one: keys are queued after the step, so all of its batches are
    compared with the same queue. Batch normalisation of the student has the statistics of each smaller batch.

    Args:
        features: channels of the encoder's coarsest map.
        projector: widths of the projector, which has no normalisation.
    """

    warmed: Tensor

    def __init__(self, encoder: nn.Module, features: int, projector: Sequence[int], options: MethodOptions) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = build_head(features, projector, norm=False)
        self.teacher = Teacher(encoder, self.projector)
        self.queue = KeyQueue(options.queue, projector[-1])
        self.temperature, self.momentum = options.temperature, options.momentum
        self.register_buffer("warmed", torch.zeros((), dtype=torch.long))
        self.statistics_batches = STATISTICS_BATCHES if self.teacher.has_statistics else 0
        self.warm_steps = self.statistics_batches + -(-options.queue // (2 * options.batch))
        self._waiting: list[Tensor] = []  # keys of this step; empty between steps

    def forward(self, view_a: Tensor, view_b: Tensor, places: Tensor) -> Step:
        """Queries of view a, keys of view b; see Method.forward, the places are not looked at."""
        embedded = in_full(self.projector(pooled_features(self.encoder, view_a)))
        keys = functional.normalize(in_full(self.teacher(view_b)), dim=1)
        loss, scores = queue_loss(functional.normalize(embedded, dim=1), keys, self.queue.keys, self.temperature)
        if self.training:
            self._waiting.append(keys)
        return Step(loss, embedded.detach(), scores)

    @torch.no_grad()
    def warm(self, view_a: Tensor, view_b: Tensor) -> None:
        """Take the teacher's statistics from the first batches, then fill the queue with keys of both views."""
        images, done = torch.cat((view_a, view_b)), int(self.warmed)
        if done < self.statistics_batches:
            self.teacher.observe(images, first=done == 0)
            if done == self.statistics_batches - 1:
                self.teacher.hand_statistics(self.encoder, self.projector)
        else:
            for keys in functional.normalize(in_full(self.teacher(images)), dim=1).chunk(2):
                self.queue.add(gather_over(keys))
        self.warmed += 1

    def after_step(self, done: float) -> None:
        """Move the teacher, queue the keys of the step."""
        self.teacher.follow(self.encoder, self.projector, self.momentum)
        if self._waiting:
            self.queue.add(gather_over(torch.cat(self._waiting)))
            self._waiting.clear()


def queue_loss(
    queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of finding each query's own key (InfoNCE), the mean over the queries of this process.

    Args:
        queries: (N, D) of length 1, float32. keys: their own keys, (N, D). negatives: keys of others, (K, D).

    Returns:
        The loss, and for the log `queue top-1`, the share of queries nearest to their own key, and the means of
        `positive similarity` and `negative similarity`.
    """
    with torch.autocast(queries.device.type, enabled=False):
        positive = (queries * keys).sum(1, keepdim=True)  # (N, 1)
        others = queries @ negatives.T  # (N, K)
        logits = torch.cat((positive, others), dim=1) / temperature
        loss = functional.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))
    scores = {
        "queue top-1": (positive > others.amax(1, keepdim=True)).float().mean(),
        "positive similarity": positive.detach().mean(),
        "negative similarity": others.detach().mean(),
    }
    return loss, scores


def choose_queue(windows: int, batch: int, largest: int = 16384) -> int:
    """A queue that seldom holds a key of the very image that is asked for, in whole batches, one at least.

    Args:
        windows: images of one epoch, crops counted; half of it is the longest queue.
        batch: images of all processes in one step.
    """
    return max(1, min(windows // 2, largest) // batch) * batch
