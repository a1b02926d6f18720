"""Small heads that are trained on the features of a frozen encoder: a linear one and a small decoder."""

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from image_io import IGNORE_INDEX

PLACES = 128  # pixels of a window that a linear head learns from
PENALTY = 1e-3  # on the squares of a linear head's weights, for standardised features
ITERATIONS = 100
WIDTH, STEPS, BATCH, RATE = 32, 200, 8, 3e-3  # of the decoder and its training
STRIDE = 4  # of the decoder


class Head(Protocol):
    """A head for windows of one size."""

    def __init__(self, num_classes: int, side: int, seed: int) -> None: ...

    def fit(self, batches: Iterable[list[Tensor]], masks: Tensor) -> bool:
        """Learn from the features of windows, at all scales, and their masks (n, S, S) uint8, 255 ignored.

        Returns:
            Whether the features are finite; else nothing is learned.
        """
        ...

    def predict(self, maps: Sequence[Tensor]) -> Tensor:
        """Classes (B, S, S) uint8 from features at all scales."""
        ...


class LinearHead:
    """One 1x1 convolution at each scale, enlarged to the window and added up; which is one linear layer for each pixel.

    Enlarging is linear too, so it is trained on features that are enlarged at some pixels only: a logistic regression,
    which has one solution and needs neither a rate nor random weights.
    """

    def __init__(self, num_classes: int, side: int, seed: int) -> None:
        self.num_classes, self.side, self.seed = num_classes, side, seed
        self.weight, self.bias, self.widths = torch.zeros(0), torch.zeros(0), list[int]()

    def fit(self, batches: Iterable[list[Tensor]], masks: Tensor) -> bool:
        """See Head."""
        places = self._places(masks)
        targets = masks.flatten(1).gather(1, places).long().flatten()
        rows, done = [], 0
        for maps in batches:
            self.widths = [values.shape[1] for values in maps]
            some = places[done : done + len(maps[0])]
            rows.append(torch.cat([_at(values, some, self.side) for values in maps], dim=1))
            done += len(some)
        features = torch.cat(rows)[targets != IGNORE_INDEX]
        targets = targets[targets != IGNORE_INDEX]
        if not len(features) or not torch.isfinite(features).all():
            return False
        deviation, mean = torch.std_mean(features, dim=0, correction=0)
        scale = torch.where(deviation > 0, 1 / deviation.clamp(min=1e-12), 0)
        weight, bias = self._solve((features - mean) * scale, targets)
        self.weight = weight * scale
        self.bias = bias - self.weight @ mean
        return True

    def _places(self, masks: Tensor) -> Tensor:
        """Pixels of each window to learn from, (n, PLACES), drawn from those that count."""
        rng = np.random.default_rng(self.seed)
        drawn = []
        for mask in masks.flatten(1).numpy():
            counted = np.flatnonzero(mask != IGNORE_INDEX)
            drawn.append(rng.choice(counted, PLACES) if len(counted) else np.zeros(PLACES, np.int64))
        return torch.from_numpy(np.stack(drawn))

    def _solve(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (K, D) and biases (K,) of a logistic regression on features (N, D)."""
        weight = torch.zeros(self.num_classes, features.shape[1], requires_grad=True)
        bias = torch.zeros(self.num_classes, requires_grad=True)
        solver = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            solver.zero_grad()
            with torch.enable_grad():
                loss = functional.cross_entropy(features @ weight.T + bias, targets)
                loss = loss + PENALTY / 2 * weight.square().sum()
                loss.backward()
            return loss.detach()

        solver.step(closure)  # type: ignore[arg-type]
        return weight.detach(), bias.detach()

    def predict(self, maps: Sequence[Tensor]) -> Tensor:
        """See Head."""
        total = self.bias[:, None, None].expand(len(maps[0]), -1, self.side, self.side)  # (B, K, S, S)
        for values, weight in zip(maps, self.weight.split(self.widths, dim=1), strict=True):
            total = total + _enlarge(functional.conv2d(values, weight[:, :, None, None]), self.side)
        return total.argmax(dim=1).to(torch.uint8)


def _at(values: Tensor, places: Tensor, side: int) -> Tensor:
    """Features (B, C, h, w), enlarged to a window, at its pixels of flat index (B, P): (B * P, C)."""
    rows, columns = places // side, places % side
    grid = (2 * torch.stack([columns, rows], dim=-1) + 1) / side - 1  # (B, P, 2), middles of pixels
    taken = functional.grid_sample(values, grid[:, None].float(), padding_mode="border", align_corners=False)
    return taken[:, :, 0].transpose(1, 2).flatten(0, 1)


def _enlarge(values: Tensor, side: int) -> Tensor:
    return functional.interpolate(values, (side, side), mode="bilinear", align_corners=False)


class DecoderHead:
    """All scales brought to stride 4 and added up, a 3x3 convolution, and the classes; trained by AdamW."""

    def __init__(self, num_classes: int, side: int, seed: int) -> None:
        self.num_classes, self.side, self.seed = num_classes, side, seed
        self.network, self.mean, self.scale = nn.Module(), list[Tensor](), list[Tensor]()

    def fit(self, batches: Iterable[list[Tensor]], masks: Tensor) -> bool:
        """See Head."""
        maps = [torch.cat(values) for values in zip(*map(self._smaller, batches), strict=True)]
        if not all(torch.isfinite(values).all() for values in maps):
            return False
        self.mean = [values.mean(dim=(0, 2, 3), keepdim=True) for values in maps]
        self.scale = [
            1 / values.std(dim=(0, 2, 3), keepdim=True, correction=0).clamp(min=1e-6) for values in maps
        ]  # of constant features the difference from the mean is 0 anyway
        torch.default_generator.manual_seed(self.seed)  # whoever calls keeps its state
        self.network = _Decoder([values.shape[1] for values in maps], self.num_classes)
        optimiser = torch.optim.AdamW(self.network.parameters(), lr=RATE)
        rng, targets = np.random.default_rng(self.seed), masks.long()
        with torch.enable_grad():
            for step in range(STEPS):
                rows = torch.from_numpy(rng.choice(len(masks), min(BATCH, len(masks)), replace=False))
                logits = _enlarge(self.network(self._standard([values[rows] for values in maps])), self.side)
                wanted = targets[rows]
                total = functional.cross_entropy(logits, wanted, ignore_index=IGNORE_INDEX, reduction="sum")
                loss = total / (wanted != IGNORE_INDEX).sum().clamp(min=1)
                optimiser.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        return True

    def predict(self, maps: Sequence[Tensor]) -> Tensor:
        """See Head."""
        logits = self.network(self._standard(self._smaller(maps)))
        return _enlarge(logits, self.side).argmax(dim=1).to(torch.uint8)

    def _smaller(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps finer than the decoder's stride, at that stride."""
        side = max(1, self.side // STRIDE)
        return [functional.adaptive_avg_pool2d(values, side) if values.shape[-1] > side else values for values in maps]

    def _standard(self, maps: Sequence[Tensor]) -> list[Tensor]:
        each = zip(maps, self.mean, self.scale, strict=True)
        return [(values - mean) * scale for values, mean, scale in each]


class _Decoder(nn.Module):
    def __init__(self, channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(count, WIDTH, 1) for count in channels)
        self.refine = nn.Sequential(nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.ReLU())
        self.classify = nn.Conv2d(WIDTH, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        side = max(values.shape[-1] for values in maps)
        brought = [_enlarge(lateral(values), side) for lateral, values in zip(self.laterals, maps, strict=True)]
        logits: Tensor = self.classify(self.refine(torch.stack(brought).sum(dim=0)))
        return logits
