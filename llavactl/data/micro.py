"""A process's share of a global batch, as the batches that are in memory one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llavactl.core.schema import Batch
from llavactl.data.batches import collate, pack
from llavactl.data.rows import RowLimits, rows

if TYPE_CHECKING:
    from llavactl.core.schema import Encoded
    from llavactl.data.training_set import TrainingSet

ALIKE = 0.75
"""A row shorter than this share of the longest begins a batch of its own: padding costs as much as text."""

Members = Sequence[tuple[int, int]]
"""(epoch, sample index) of each member of a global batch."""


@dataclass(frozen=True)
class Share:
    """What ``process`` of ``processes`` takes of a global batch, in batches within ``limits``."""

    limits: RowLimits
    process: int = 0
    processes: int = 1


def packed(data: TrainingSet, members: Members, share: Share) -> list[Batch]:
    """Rows of many samples without padding, planned over the whole global batch."""
    items = [data.encoded(*member) for member in members]
    planned = rows(items, data.encoding.image_tokens, share.limits, share.processes)
    return [
        pack(
            [(family.shared, [items[number] for number in family.members]) for family in row],
            data.features,
            names=[data.samples[members[number][1]].id for family in row for number in family.members],
        )
        for row in planned[share.process :: share.processes]
        if row
    ]


def padded(data: TrainingSet, members: Members, share: Share) -> list[Batch]:
    """A sample a row, longest first, the rows of a batch alike in length."""
    mine = members[share.process :: share.processes]
    encoded = sorted(((data.encoded(*member), member) for member in mine), key=lambda item: -len(item[0]))
    groups: list[list[tuple[Encoded, tuple[int, int]]]] = []
    for item in encoded:
        group = groups[-1] if groups else []
        longest = len(group[0][0]) if group else 0
        fits = share.limits.allow(len(group) + 1, (len(group) + 1) * longest)
        if group and fits and len(item[0]) >= ALIKE * longest:
            group.append(item)
        else:
            groups.append([item])
    return [
        collate([one for one, _ in group], data.features, names=[data.samples[at].id for _, (_, at) in group])
        for group in groups
    ]
