"""MoCo v3: both views ask for each other among the images of the batch, with a predictor and without a queue.

Reference: Chen et al. 2021, https://arxiv.org/abs/2104.02057. Its teacher has the statistics of the batch; ours has
averages (see teacher.py), which differ the less the larger the batch. Its frozen patch projection, which keeps large
vision transformers stable, is not here.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from gathering import gather_over, in_full
from selfsupervised.heads import build_head, pooled_features
from selfsupervised.interface import Method, MethodOptions, Step
from selfsupervised.teacher import STATISTICS_BATCHES, Teacher

WHY_NOT = (
    "every image is compared with the others of its batch, and smaller batches have fewer of them. Give a larger -b, "
    "or more processes"
)


class MomentumContrastV3(Method):
    """A student with a predictor, and a teacher whose momentum rises to 1 over the run.

    Both views go through the student together, as in BarlowTwins, and through the teacher.

    Args:
        features: channels of the encoder's coarsest map.
        projector: widths of the projector; the predictor has its first and its last.
    """

    accumulates, why_not = False, WHY_NOT
    warmed: Tensor

    def __init__(self, encoder: nn.Module, features: int, projector: Sequence[int], options: MethodOptions) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = build_head(features, projector, norm_last=True)
        self.predictor = build_head(projector[-1], (projector[0], projector[-1]), norm_last=True)
        self.teacher = Teacher(encoder, self.projector)
        self.temperature, self.momentum = options.temperature, options.momentum
        self.register_buffer("warmed", torch.zeros((), dtype=torch.long))
        self.warm_steps = STATISTICS_BATCHES

    def forward(self, view_a: Tensor, view_b: Tensor, places: Tensor) -> Step:
        """See Method.forward; the places are not looked at. Embeddings are those before the last normalisation."""
        images = torch.cat((view_a, view_b))
        embedded = self.projector[:-1](pooled_features(self.encoder, images))
        queries = self.predictor(self.projector[-1](embedded))  # (2 N, D)
        q_a, q_b = functional.normalize(in_full(queries), dim=1).chunk(2)
        k_a, k_b = functional.normalize(in_full(self.teacher(images)), dim=1).chunk(2)
        loss_a, scores_a = batch_loss(q_a, k_b, self.temperature)
        loss_b, scores_b = batch_loss(q_b, k_a, self.temperature)
        scores = {name: (value + scores_b[name]) / 2 for name, value in scores_a.items()}
        return Step(loss_a + loss_b, in_full(embedded.chunk(2)[0].detach()), scores)

    @torch.no_grad()
    def warm(self, view_a: Tensor, view_b: Tensor) -> None:
        """Take the teacher's statistics from the first batches."""
        done = int(self.warmed)
        self.teacher.observe(torch.cat((view_a, view_b)), first=done == 0)
        if done == self.warm_steps - 1:
            self.teacher.hand_statistics(self.encoder, self.projector)
        self.warmed += 1

    def after_step(self, done: float) -> None:
        """Move the teacher."""
        self.teacher.follow(self.encoder, self.projector, rising_momentum(self.momentum, done))


def batch_loss(queries: Tensor, keys: Tensor, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of finding each query's own key among those of all processes, times 2 * temperature.

    Args:
        queries: (N, D) of length 1, float32. keys: their own keys in the other view, (N, D).

    Returns:
        The loss, a mean over the queries of this process, and for the log `batch top-1` and `positive similarity`.
    """
    with torch.autocast(queries.device.type, enabled=False):
        everyone = gather_over(keys)  # (processes * N, D)
        similarity = queries @ everyone.T
        rank = torch.distributed.get_rank() if len(everyone) > len(keys) else 0
        own = torch.arange(len(queries), device=queries.device) + rank * len(keys)
        loss = functional.cross_entropy(similarity / temperature, own) * 2 * temperature
    found = similarity.detach()
    scores = {
        "batch top-1": (found.argmax(1) == own).float().mean(),
        "positive similarity": found.gather(1, own[:, None]).mean(),
    }
    return loss, scores


def rising_momentum(start: float, done: float) -> float:
    """Half a cosine from the start to 1 over the run; `done` is the share of it that is over."""
    return 1 - (1 - start) * (1 + math.cos(math.pi * done)) / 2
