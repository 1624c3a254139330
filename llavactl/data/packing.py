"""Plans sequence packing: which samples of a global batch are packed into the same sequence.

The plan depends only on the encoded samples, so every process computes the same one.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from llavactl.core.schema import IGNORE, IMAGE_TOKEN, Encoded

PAD_MULTIPLE = 16
"""Samples are padded to a multiple of this many tokens; samples that share a prefix are padded together.

With arbitrary lengths oneDNN creates a kernel per length, and the C heap fragments: a training step of the demo took
twice as long after 60 steps.
"""


def padding_for(tokens: int) -> int:
    """The number of padding tokens after ``tokens`` tokens."""
    return -tokens % PAD_MULTIPLE


@dataclass(frozen=True)
class MicroBatchLimits:
    """The maximum size of a micro-batch: ``samples`` and ``tokens`` (None: no limit).

    A single sample may exceed ``tokens``.
    """

    samples: int
    tokens: int | None = None

    def allow(self, samples: int, tokens: int) -> bool:
        """Whether ``samples`` samples with ``tokens`` tokens in total fit in one micro-batch."""
        return samples <= self.samples and (self.tokens is None or tokens <= self.tokens)


@dataclass(frozen=True)
class PrefixGroup:
    """Samples, by index, that share their first ``prefix_length`` tokens.

    ``tokens`` counts the prefix once, and padding.
    """

    samples: tuple[int, ...]
    prefix_length: int
    tokens: int


@dataclass(frozen=True)
class SampleLength:
    """The number of tokens of a sample, and the prefix that it can share.

    ``prefix`` is equal for samples with the same first ``prefix_length`` tokens; without a prefix it is None.
    """

    tokens: int
    prefix_length: int = 0
    prefix: Hashable = None

    def __len__(self) -> int:
        return self.tokens


def sample_length(item: Encoded, image_tokens: int) -> SampleLength:
    """The length of ``item``, whose prefix ends with its first image of ``image_tokens`` tokens."""
    length = prefix_length(item, image_tokens)
    return SampleLength(len(item), length, (item.ids[:length], item.images[0]) if length else None)


def plan_sequences(
    items: Sequence[Encoded], image_tokens: int, limits: MicroBatchLimits, processes: int = 1
) -> list[list[PrefixGroup]]:
    """``plan_lengths`` of encoded samples."""
    return plan_lengths([sample_length(item, image_tokens) for item in items], limits, processes)


def plan_lengths(
    items: Sequence[SampleLength], limits: MicroBatchLimits, processes: int = 1
) -> list[list[PrefixGroup]]:
    """Packs ``items`` into as few sequences as ``limits`` allow, a multiple of ``processes``, of similar lengths.

    Each group, longest first, is added to the shortest sequence with space left. With sequences of different lengths
    processes would wait for each other, and the longest would determine peak memory. Sequence k belongs to process
    k modulo ``processes``.
    """
    groups = sorted(prefix_groups(items, limits), key=lambda group: (-group.tokens, group.samples))
    count = math.ceil(len(items) / limits.samples)
    if limits.tokens is not None:
        count = max(count, math.ceil(sum(group.tokens for group in groups) / limits.tokens))
    while True:
        count = math.ceil(count / processes) * processes
        if (sequences := _distributed(groups, count, limits)) is not None:
            return sequences
        count += 1


def _distributed(groups: Sequence[PrefixGroup], count: int, limits: MicroBatchLimits) -> list[list[PrefixGroup]] | None:
    """``groups`` distributed over ``count`` sequences; None if they don't fit."""
    sequences: list[list[PrefixGroup]] = [[] for _ in range(count)]
    samples, tokens = [0] * count, [0] * count
    for group in groups:
        candidates = [
            index
            for index in range(count)
            if not sequences[index] or limits.allow(samples[index] + len(group.samples), tokens[index] + group.tokens)
        ]
        if not candidates:
            return None
        shortest = min(candidates, key=tokens.__getitem__)
        sequences[shortest].append(group)
        samples[shortest] += len(group.samples)
        tokens[shortest] += group.tokens
    return sequences


def prefix_groups(items: Sequence[SampleLength], limits: MicroBatchLimits) -> list[PrefixGroup]:
    """``items`` grouped by their tokens up to the end of the first image; no group exceeds ``limits``."""
    indices_by_prefix: dict[Hashable, list[int]] = {}
    for index, item in enumerate(items):
        indices_by_prefix.setdefault(index if item.prefix is None else item.prefix, []).append(index)
    groups: list[PrefixGroup] = []
    for first, *others in indices_by_prefix.values():
        length = items[first].prefix_length
        group, suffix_tokens = _single_sample(first, items), len(items[first]) - length
        for index in others:
            extended = suffix_tokens + len(items[index]) - length
            tokens = length + extended + padding_for(extended)
            if limits.allow(len(group.samples) + 1, tokens):
                group, suffix_tokens = PrefixGroup((*group.samples, index), length, tokens), extended
            else:
                groups.append(group)
                group, suffix_tokens = _single_sample(index, items), len(items[index]) - length
        groups.append(group)
    return groups


def _single_sample(index: int, items: Sequence[SampleLength]) -> PrefixGroup:
    tokens = len(items[index])
    return PrefixGroup((index,), 0, tokens + padding_for(tokens))


def prefix_length(item: Encoded, image_tokens: int) -> int:
    """The number of tokens up to the end of the first image; 0 without an image or if some of them are targets."""
    if not item.images:
        return 0
    end = item.ids.index(IMAGE_TOKEN) + image_tokens
    return end if all(label == IGNORE for label in item.labels[:end]) else 0
