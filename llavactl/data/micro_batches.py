"""Splits a global batch into the micro-batches of a process, packed or padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llavactl.core.schema import Batch
from llavactl.data.batches import collate, pack
from llavactl.data.packing import MicroBatchLimits, plan_sequences

if TYPE_CHECKING:
    from llavactl.core.schema import Encoded
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
    return [
        pack(
            [(group.prefix_length, [items[index] for index in group.samples]) for group in sequence],
            data.features,
            names=[data.samples[indices[index][1]].id for group in sequence for index in group.samples],
        )
        for sequence in sequences[partition.process :: partition.processes]
        if sequence
    ]


def padded_micro_batches(data: SampleSet, indices: BatchIndices, partition: Partition) -> list[Batch]:
    """Micro-batches of samples with similar lengths, longest first, padded to the longest."""
    own_indices = indices[partition.process :: partition.processes]
    items = sorted(((data.encoded(*index), index) for index in own_indices), key=lambda item: -len(item[0]))
    groups: list[list[tuple[Encoded, tuple[int, int]]]] = []
    for item in items:
        group = groups[-1] if groups else []
        longest = len(group[0][0]) if group else 0
        fits = partition.limits.allow(len(group) + 1, (len(group) + 1) * longest)
        if group and fits and len(item[0]) >= MIN_LENGTH_RATIO * longest:
            group.append(item)
        else:
            groups.append([item])
    return [
        collate(
            [encoded for encoded, _ in group],
            data.features,
            names=[data.samples[sample].id for _, (_, sample) in group],
        )
        for group in groups
    ]
