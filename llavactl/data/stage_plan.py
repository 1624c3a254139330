"""The plan of a stage from the lengths of its samples: steps, tokens, padding, and the largest micro-batches.

Micro-batches are planned by the functions that training uses (``data.plan``, ``data.packing``, ``data.micro_batches``),
so the counts are exact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llavactl.data.batches import collate, pack
from llavactl.data.micro_batches import similar_lengths
from llavactl.data.packing import MicroBatchLimits, SampleLength, plan_lengths, sample_length
from llavactl.data.table_view import TableView

if TYPE_CHECKING:
    from llavactl.core.schema import Batch, Encoded
    from llavactl.data.batches import FeatureLookup
    from llavactl.data.micro_batches import BatchIndices
    from llavactl.data.plan import BatchPlan
    from llavactl.data.sample_set import SampleSet


@dataclass(frozen=True)
class PlannedSample:
    """The length of a sample, and its numbers of target tokens and images."""

    length: SampleLength
    targets: int
    images: int

    def __len__(self) -> int:
        return len(self.length)


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch: ``groups`` of samples, by index into a global batch, with the length of their common prefix.

    ``positions`` are computed, ``useful`` of them are not padding. ``tokens`` of all samples: a shared prefix counts
    once for each. ``pairs``: pairs of a query and a key in one attention layer, without those of padding.
    """

    groups: tuple[tuple[int, tuple[int, ...]], ...]
    positions: int
    useful: int
    tokens: int
    targets: int
    images: int
    pairs: int

    @property
    def size(self) -> tuple[int, int, int]:
        """The amounts that memory grows with: positions, logits, and keys per query."""
        return self.positions, self.targets, self.pairs


@dataclass(frozen=True)
class StagePlan:
    """The sums over the micro-batches of all steps and processes, and the largest ones by each of ``MicroBatch.size``.

    ``micro_batches`` is their number. ``largest`` are global batches, as (epoch, sample index), and a micro-batch of
    each.
    """

    steps: int
    samples: int
    tokens: int
    positions: int
    useful: int
    targets: int
    images: int
    pairs: int
    images_per_step: int
    micro_batches: int
    largest: tuple[tuple[BatchIndices, MicroBatch], ...] = field(repr=False)

    @property
    def padding(self) -> float:
        """The fraction of the computed positions that are padding."""
        return (self.positions - self.useful) / max(self.positions, 1)

    @property
    def prefix_sharing(self) -> float:
        """The fraction of the tokens that are not computed because of prefix sharing."""
        return 1 - self.useful / max(self.tokens, 1)


_COUNTS = ("tokens", "positions", "useful", "targets", "images", "pairs")
"""The fields of ``MicroBatch`` that ``StagePlan`` has the sums of."""


class PlannedSamples:
    """The planned samples of ``data``, from its ``lengths``; without these, samples are tokenized."""

    def __init__(self, data: SampleSet) -> None:
        self.data = data
        samples = data.samples
        if isinstance(samples, TableView):
            self._first_images: Sequence[Hashable] = samples.first_images().tolist()
        else:
            self._first_images = [sample.images[0] if sample.images else None for sample in samples]

    def __call__(self, epoch: int, index: int) -> PlannedSample:
        """Sample ``index`` in ``epoch`` (from 0)."""
        data, lengths = self.data, self.data.lengths
        if lengths is None:
            return planned(data.encoded(epoch, index), data.encoding.image_tokens)
        at = data.arrangement(epoch, index), index
        prefix_length = lengths.prefix_tokens.item(at)
        prefix = (lengths.prefix_texts.item(at), self._first_images[index]) if prefix_length else None
        length = SampleLength(lengths.tokens.item(at), prefix_length, prefix)
        return PlannedSample(length, lengths.targets.item(at), lengths.images.item(at))


def planned(item: Encoded, image_tokens: int) -> PlannedSample:
    """The planned sample of ``item``."""
    return PlannedSample(sample_length(item, image_tokens), item.target_tokens, len(item.images))


def stage_plan(
    plan: BatchPlan,
    lengths: Callable[[int, int], PlannedSample],
    limits: MicroBatchLimits,
    processes: int,
    *,
    packed: bool,
    advance: Callable[[int], object] = lambda _count: None,
) -> StagePlan:
    """The plan of all steps of ``plan``; ``advance`` is called with 1 after each."""
    samples = images_per_step = count = 0
    totals: Counter[str] = Counter()
    largest: dict[int, tuple[BatchIndices, MicroBatch]] = {}
    for step in range(plan.steps):
        indices = plan.batch(step)
        batches = list(micro_batches([lengths(*index) for index in indices], limits, processes, packed=packed))
        for batch in batches:
            totals.update({name: getattr(batch, name) for name in _COUNTS})
            for kind, size in enumerate(batch.size):
                if kind not in largest or size > largest[kind][1].size[kind]:
                    largest[kind] = indices, batch
        samples += len(indices)
        count += len(batches)
        images_per_step = max(images_per_step, sum(batch.images for batch in batches))
        advance(1)
    distinct = {id(batch): (indices, batch) for indices, batch in largest.values()}
    return StagePlan(
        steps=plan.steps,
        samples=samples,
        images_per_step=images_per_step,
        micro_batches=count,
        largest=tuple(distinct.values()),
        **totals,
    )


def micro_batches(
    items: Sequence[PlannedSample], limits: MicroBatchLimits, processes: int, *, packed: bool
) -> Iterator[MicroBatch]:
    """The micro-batches of a global batch of ``items``, of all processes."""
    if not packed:
        for process in range(processes):
            for group in similar_lengths(items, range(process, len(items), processes), limits):
                yield _padded(items, group)
        return
    for sequence in plan_lengths([item.length for item in items], limits, processes):
        if sequence:
            yield _packed(
                items, [(group.prefix_length, group.samples) for group in sequence], sum(g.tokens for g in sequence)
            )


def _padded(items: Sequence[PlannedSample], group: Sequence[int]) -> MicroBatch:
    lengths = [len(items[index]) for index in group]
    useful, pairs = sum(lengths), sum(map(_causal_pairs, lengths))
    return MicroBatch(((0, tuple(group)),), max(lengths) * len(group), useful, useful, *_counts(items, group), pairs)


def _packed(
    items: Sequence[PlannedSample], groups: Sequence[tuple[int, tuple[int, ...]]], positions: int
) -> MicroBatch:
    samples = [index for _, group in groups for index in group]
    tokens = sum(len(items[index]) for index in samples)
    useful = tokens - sum(prefix * (len(group) - 1) for prefix, group in groups)
    targets, images = _counts(items, samples)
    images -= sum(len(group) - 1 for prefix, group in groups if prefix)
    pairs = sum(_causal_pairs(len(items[index])) for index in samples)
    pairs -= sum(_causal_pairs(prefix) * (len(group) - 1) for prefix, group in groups)
    return MicroBatch(tuple(groups), positions, useful, tokens, targets, images, pairs)


def _counts(items: Sequence[PlannedSample], samples: Iterable[int]) -> tuple[int, int]:
    chosen = [items[index] for index in samples]
    return sum(item.targets for item in chosen), sum(item.images for item in chosen)


def _causal_pairs(tokens: int) -> int:
    return tokens * (tokens + 1) // 2


def built(batch: MicroBatch, items: Sequence[Encoded], features: FeatureLookup, *, packed: bool) -> Batch:
    """``batch`` of the global batch ``items``, for the model."""
    groups = [(prefix, [items[index] for index in group]) for prefix, group in batch.groups]
    return pack(groups, features) if packed else collate(groups[0][1], features)
