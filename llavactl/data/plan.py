"""Assigns samples to optimizer steps, from the seed, before training starts.

Step k is the same on any number of processes and after any interruption, so a run resumes from a step index.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def order(
    weights: Sequence[float],
    epoch: int,
    seed: int,
    phases: Sequence[int] | None = None,
    groups: Sequence[int] | None = None,
) -> np.ndarray:
    """The shuffled sample indices of one epoch; with weight 1.5, each sample occurs once and half of them twice.

    ``phases`` (one integer per sample): samples of a lower phase come first. ``groups`` (one integer from 0 per
    sample): groups are shuffled instead of samples, and within a phase the samples of a group are consecutive.
    """
    generator = np.random.default_rng([seed, epoch])
    copies_per_sample = np.asarray(weights, dtype=np.float64)
    copies = np.floor(copies_per_sample).astype(np.int64)
    copies += generator.random(len(copies_per_sample)) < copies_per_sample - copies
    shuffled = generator.permutation(np.repeat(np.arange(len(copies_per_sample)), copies))
    if groups is not None:
        ranks = generator.permutation(max(groups, default=-1) + 1)
        shuffled = shuffled[np.argsort(ranks[np.asarray(groups)[shuffled]], kind="stable")]
    return shuffled if phases is None else shuffled[np.argsort(np.asarray(phases)[shuffled], kind="stable")]


class BatchPlan:
    """The global batches of a run: ``epochs`` over samples with ``weights`` (copies per epoch)."""

    def __init__(
        self,
        weights: Sequence[float],
        *,
        epochs: float,
        batch_size: int,
        seed: int,
        max_steps: int | None = None,
        phases: Sequence[int] | None = None,
        groups: Sequence[int] | None = None,
    ) -> None:
        orders = [order(weights, epoch, seed, phases, groups) for epoch in range(math.ceil(epochs))]
        if orders and epochs % 1:
            orders[-1] = orders[-1][: math.ceil(len(orders[-1]) * (epochs % 1))]
        self._samples = np.concatenate(orders)
        self._epochs = np.repeat(np.arange(len(orders)), list(map(len, orders)))
        self.batch_size = batch_size
        steps = math.ceil(len(self._samples) / batch_size)
        self.steps = steps if max_steps is None else min(steps, max_steps)

    def batch(self, step: int) -> list[tuple[int, int]]:
        """(epoch, sample index) of each sample of ``step`` (from 0); the last step may have fewer samples."""
        positions = slice(step * self.batch_size, (step + 1) * self.batch_size)
        return list(zip(self._epochs[positions].tolist(), self._samples[positions].tolist(), strict=True))
