"""Splits a global batch into the micro-batches of a process, packed or padded.

Every process gets the same number of micro-batches, because sharded processes run each forward and backward pass
together. Processes with fewer get ``empty`` ones in addition, with a loss of zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from llavactl.core.schema import IGNORE, Batch, Span
from llavactl.data.batches import collate, pack
from llavactl.data.packing import MicroBatchLimits, plan_sequences

if TYPE_CHECKING:
    from llavactl.data.sample_set import SampleSet

MIN_LENGTH_RATIO = 0.75
"""A sample shorter than this fraction of the longest starts a new micro-batch: padding costs as much as text."""

BatchIndices = Sequence[tuple[int, int]]
"""(epoch, sample index) of each sample of a global batch."""


@dataclass(frozen=True)
class Partition:
    """The micro-batches of ``process`` out of ``processes``, each within ``limits``."""

    limits: MicroBatchLimits
    process: int = 0
    processes: int = 1


def packed_micro_batches(data: SampleSet, indices: BatchIndices, partition: Partition) -> list[Batch]:
    """Micro-batches of one packed sequence each, planned over the whole global batch."""
    items = [data.encoded(*index) for index in indices]
    sequences = plan_sequences(items, data.encoding.image_tokens, partition.limits, partition.processes)
    used = max(index for index, sequence in enumerate(sequences) if sequence) + 1
    rounds = math.ceil(used / partition.processes)
    return [
        pack(
            [(group.prefix_length, [items[index] for index in group.samples]) for group in sequence],
            data.features,
            names=[data.samples[indices[index][1]].id for group in sequence for index in group.samples],
        )
        if sequence
        else empty(packed=True)
        for sequence in sequences[partition.process :: partition.processes][:rounds]
    ]


def padded_micro_batches(data: SampleSet, indices: BatchIndices, partition: Partition) -> list[Batch]:
    """Micro-batches of samples with similar lengths, longest first, padded to the longest."""
    items = [data.encoded(*index) for index in indices]
    groups = [
        similar_lengths(items, range(process, len(items), partition.processes), partition.limits)
        for process in range(partition.processes)
    ]
    batches = [
        collate(
            [items[index] for index in group],
            data.features,
            names=[data.samples[indices[index][1]].id for index in group],
        )
        for group in groups[partition.process]
    ]
    return batches + [empty(packed=False)] * (max(map(len, groups)) - len(batches))


def similar_lengths(items: Sequence[Sized], indices: Iterable[int], limits: MicroBatchLimits) -> list[list[int]]:
    """``indices`` of ``items`` in groups of similar length within ``limits``, longest first."""
    groups: list[list[int]] = []
    for index in sorted(indices, key=lambda index: -len(items[index])):
        group = groups[-1] if groups else []
        longest = len(items[group[0]]) if group else 0
        fits = limits.allow(len(group) + 1, (len(group) + 1) * longest)
        if group and fits and len(items[index]) >= MIN_LENGTH_RATIO * longest:
            group.append(index)
        else:
            groups.append([index])
    return groups


def empty(*, packed: bool) -> Batch:
    """A micro-batch of one token, without samples and targets: its loss and gradients are zero."""
    ids, mask = torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool)
    return Batch(ids, mask, torch.full_like(ids, IGNORE), None, spans=(Span(1),) if packed else ())
