"""Which samples make which optimiser step: planned before the run, from the seed alone.

A position is all there is to resume from: step k of a plan is the same on any number of processes and
after any interruption.
"""

from __future__ import annotations

import hashlib
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
    """The sample indices of one epoch, shuffled; a weight of 1.5 is one copy and, for half of the samples, another.

    With ``phases`` (a number a sample) those of a lower phase come before those of a higher one. With ``groups`` (a
    number from 0 a sample) the groups are shuffled, and within a phase each stays together.
    """
    generator = np.random.default_rng([seed, epoch])
    share = np.asarray(weights, dtype=np.float64)
    copies = np.floor(share).astype(np.int64)
    copies += generator.random(len(share)) < share - copies
    shuffled = generator.permutation(np.repeat(np.arange(len(share)), copies))
    if groups is not None:
        ranks = generator.permutation(max(groups, default=-1) + 1)
        shuffled = shuffled[np.argsort(ranks[np.asarray(groups)[shuffled]], kind="stable")]
    return shuffled if phases is None else shuffled[np.argsort(np.asarray(phases)[shuffled], kind="stable")]


class Plan:
    """The global batches of a run: ``epochs`` over samples with ``weights`` (copies an epoch)."""

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
        rounds = [order(weights, epoch, seed, phases, groups) for epoch in range(math.ceil(epochs))]
        if rounds and epochs % 1:
            rounds[-1] = rounds[-1][: math.ceil(len(rounds[-1]) * (epochs % 1))]
        self._samples = np.concatenate(rounds)
        self._epochs = np.repeat(np.arange(len(rounds)), [len(each) for each in rounds])
        self.batch_size = batch_size
        steps = math.ceil(len(self._samples) / batch_size)
        self.steps = steps if max_steps is None else min(steps, max_steps)

    def batch(self, step: int) -> list[tuple[int, int]]:
        """(epoch, sample index) of each member of ``step`` (from 0); the last one may be smaller."""
        at = slice(step * self.batch_size, (step + 1) * self.batch_size)
        return list(zip(self._epochs[at].tolist(), self._samples[at].tolist(), strict=True))


def held_out(groups: Sequence[str], share: float, seed: int) -> set[str]:
    """The ``share`` of distinct ``groups`` (images) kept for validation: no image is on both sides.

    At least one where a share is asked for and ten are there; chosen by hash, so that adding records
    moves few images across.
    """
    distinct = sorted(set(groups), key=lambda group: hashlib.sha256(f"{seed}\0{group}".encode()).digest())
    count = round(len(distinct) * share)
    if share and not count and len(distinct) >= 10:
        count = 1
    return set(distinct[:count])
