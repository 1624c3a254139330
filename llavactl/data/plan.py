"""Which samples make which optimiser step: planned before the run, from the seed alone.

A position is all there is to resume from: step k of a plan is the same on any number of processes and
after any interruption.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence

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


class BatchPlan:
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


def connected(keys: Sequence[Iterable[Hashable]]) -> list[int]:
    """The group number for each of ``keys``: members that share a key, directly or through others, form a group."""
    parents = list(range(len(keys)))

    def group(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    first: dict[Hashable, int] = {}
    for index, each in enumerate(keys):
        for key in each:
            one, other = group(index), group(first.setdefault(key, index))
            parents[max(one, other)] = min(one, other)
    return [group(index) for index in range(len(keys))]


def held_out(groups: Iterable[str], share: float, seed: int, sizes: Mapping[str, int] | None = None) -> set[str]:
    """The ``groups`` held out for validation: ``share`` of all images (``sizes``: images per group, default 1).

    A group is held out as a whole or not at all; one larger than the remaining share is skipped. With ten images or
    more and a share above 0 at least one group is held out, unless the smallest is more than a tenth of all images and
    twice the share; never all. The choice is by hash, so that adding records moves few images between the sets.
    """
    distinct = sorted(set(groups), key=lambda group: hashlib.sha256(f"{seed}\0{group}".encode()).digest())
    size = dict.fromkeys(distinct, 1) | {group: n for group, n in (sizes or {}).items() if group in set(distinct)}
    total = sum(size.values())
    wanted = round(total * share)
    if share and not wanted and total >= 10:
        wanted = 1
    found: set[str] = set()
    left = wanted
    for group in distinct:
        if size[group] <= left and len(found) + 1 < len(distinct):
            found.add(group)
            left -= size[group]
    if wanted and not found and len(distinct) > 1:
        smallest = min(distinct, key=size.__getitem__)
        found = {smallest} if size[smallest] <= max(total / 10, 2 * wanted) else set()
    return found
