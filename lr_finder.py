"""Find a learning rate by trying: a short training whose rate rises from nearly nothing until the loss explodes."""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dataset import Batch, TrainingBatches
from learner import FitOptions, build_learner
from slide_scoring import LossFunction
from trainer import groups_of, train_step

LOWEST, HIGHEST = 1e-7, 10.0  # of the rates that are tried
SMOOTHING = 0.05  # deviation of the bell that losses are averaged with, as a share of all steps
EXPLODED = 4.0  # times the lowest mean of LATEST losses
LATEST = 5
FALL = 0.02  # share of the loss that it must fall by at least


@dataclass(frozen=True)
class RangeTest:
    """What was tried: rates, the loss of each step, its average over the steps around; and what follows from them.

    The average looks to both sides: one over past steps alone would come late by several times the rate.
    steepest: rate where the average falls fastest. suggestion: a tenth of the rate where it is lowest. Both None when
    the loss does not fall.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    steepest: float | None
    suggestion: float | None


def find_rate(
    network: nn.Module,
    batches: TrainingBatches,
    loss: LossFunction,
    options: FitOptions,
    num_logits: int,
    *,
    device: str,
    steps: int,
) -> RangeTest:
    """Train a copy of a network for some steps with rates from LOWEST to HIGHEST, evenly spaced in their logarithm.

    The network itself stays as it is. It ends early when the loss explodes or is not finite.

    Args:
        batches: gone through again when there are fewer than steps need.
        options: of the training that the rate is for; its schedule is not used.
        steps: optimiser steps, at least 10.

    Reference: Smith 2017, Cyclical Learning Rates, https://arxiv.org/abs/1506.01186
    """
    learner = build_learner(copy.deepcopy(network), options, device=device, steps=steps)
    learner.start_training(freeze_encoder=options.freeze_encoder > 0)
    counts = torch.zeros(
        max(2, num_logits) + 1, max(2, num_logits), dtype=torch.int64, device=learner.accelerator.device
    )
    rates: list[float] = []
    losses: list[float] = []
    recent: list[float] = []
    seen: list[Tensor] = []
    for rate, group in zip(rising_rates(steps), _endless(batches, options.accumulate), strict=False):
        for place in learner.optimiser.param_groups:
            place["lr"] = rate * place.get("lr_scale", 1.0)
        seen.clear()
        train_step(learner, group, loss, counts, options, lambda value, _: seen.append(value))
        value = float(torch.stack(seen).mean())
        if not math.isfinite(value):
            break
        rates.append(rate)
        losses.append(value)
        recent.append(sum(losses[-LATEST:]) / len(losses[-LATEST:]))
        if recent[-1] > EXPLODED * min(recent):
            break
    smoothed = smooth(losses, SMOOTHING * steps)
    return RangeTest(rates, losses, smoothed, *suggest(rates, smoothed))


def smooth(values: Sequence[float], deviation: float) -> list[float]:
    """Mean of the values around each, weighted by a bell curve of that deviation in steps, cut off at both ends."""
    steps = np.arange(len(values))
    weights = np.exp(-0.5 * ((steps[:, None] - steps) / deviation) ** 2)  # (S, S)
    return (weights @ np.array(values) / weights.sum(axis=1)).tolist() if len(values) else []


def rising_rates(steps: int) -> list[float]:
    """Rates from LOWEST to HIGHEST, each the same factor above the one before."""
    return [LOWEST * (HIGHEST / LOWEST) ** (step / (steps - 1)) for step in range(steps)]


def suggest(rates: Sequence[float], smoothed: Sequence[float]) -> tuple[float | None, float | None]:
    """Rate where the smoothed loss falls fastest, and a tenth of the one where it is lowest; None: it never falls."""
    if len(rates) < 3:
        return None, None
    lowest = min(range(len(smoothed)), key=smoothed.__getitem__)
    highest_before = max(smoothed[: lowest + 1])
    if lowest == 0 or smoothed[lowest] > highest_before - FALL * abs(highest_before):
        return None, None
    falls = [
        (smoothed[place + 1] - smoothed[place - 1]) / math.log(rates[place + 1] / rates[place - 1])
        for place in range(1, max(2, lowest))
    ]
    return rates[1 + min(range(len(falls)), key=falls.__getitem__)], rates[lowest] / 10


def _endless(batches: TrainingBatches, accumulate: int) -> Iterator[list[Batch]]:
    """Groups of batches, epoch after epoch."""
    epoch = 0
    while True:
        batches.set_epoch(epoch)
        yield from groups_of(batches, accumulate)
        epoch += 1
