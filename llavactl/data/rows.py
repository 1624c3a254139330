"""Which samples of a global batch share a row: planned from their lengths alone, the same on every process."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from llavactl.core.schema import IGNORE, IMAGE_TOKEN, Encoded

MULTIPLE = 16
"""What attention computes together, a sample or those behind one image, is filled up to a multiple of so many tokens.

Ever other lengths need a new oneDNN kernel each, and leave holes of ever other sizes in the C library's heap: a step of
the demo took twice as long after 60 steps.
"""


def filling(tokens: int) -> int:
    """How much padding follows ``tokens`` tokens that are computed together."""
    return -tokens % MULTIPLE


@dataclass(frozen=True)
class RowLimits:
    """What a row holds at most: ``samples``, and ``tokens`` where that is not None (a longer sample is alone)."""

    samples: int
    tokens: int | None = None

    def allow(self, samples: int, tokens: int) -> bool:
        """Whether so many samples of so many tokens together are a row."""
        return samples <= self.samples and (self.tokens is None or tokens <= self.tokens)


@dataclass(frozen=True)
class Family:
    """Samples, by number, whose first ``shared`` tokens are the same; ``tokens`` counts those once, and padding."""

    members: tuple[int, ...]
    shared: int
    tokens: int


def rows(items: Sequence[Encoded], image_tokens: int, limits: RowLimits, processes: int = 1) -> list[list[Family]]:
    """``items`` in as few rows as ``limits`` allow, equally many for each process, of much the same length.

    Each family, longest first, goes where least is yet: rows that differ in length would have processes wait, and
    take the memory of the longest. Row k belongs to process k modulo ``processes``.
    """
    ordered = sorted(families(items, image_tokens, limits), key=lambda family: (-family.tokens, family.members))
    count = math.ceil(len(items) / limits.samples)
    if limits.tokens is not None:
        count = max(count, math.ceil(sum(family.tokens for family in ordered) / limits.tokens))
    while True:
        count = math.ceil(count / processes) * processes
        if (placed := _placed(ordered, count, limits)) is not None:
            return placed
        count += 1


def _placed(ordered: Sequence[Family], count: int, limits: RowLimits) -> list[list[Family]] | None:
    """``ordered`` in ``count`` rows, or None where they don't fit."""
    placed: list[list[Family]] = [[] for _ in range(count)]
    samples, tokens = [0] * count, [0] * count
    for family in ordered:
        fits = [
            row
            for row in range(count)
            if not placed[row] or limits.allow(samples[row] + len(family.members), tokens[row] + family.tokens)
        ]
        if not fits:
            return None
        row = min(fits, key=tokens.__getitem__)
        placed[row].append(family)
        samples[row] += len(family.members)
        tokens[row] += family.tokens
    return placed


def families(items: Sequence[Encoded], image_tokens: int, limits: RowLimits) -> list[Family]:
    """``items`` by what they begin with up to the end of their first image; none larger than ``limits``."""
    alike: dict[Hashable, list[int]] = {}
    for number, item in enumerate(items):
        shared = _opening(item, image_tokens)
        alike.setdefault((item.ids[:shared], item.images[0]) if shared else number, []).append(number)
    found: list[Family] = []
    for first, *others in alike.values():
        shared = _opening(items[first], image_tokens)
        family, own = _alone(first, items), len(items[first]) - shared
        for number in others:
            together = own + len(items[number]) - shared
            tokens = shared + together + filling(together)
            if limits.allow(len(family.members) + 1, tokens):
                family, own = Family((*family.members, number), shared, tokens), together
            else:
                found.append(family)
                family, own = _alone(number, items), len(items[number]) - shared
        found.append(family)
    return found


def _alone(number: int, items: Sequence[Encoded]) -> Family:
    tokens = len(items[number])
    return Family((number,), 0, tokens + filling(tokens))


def _opening(item: Encoded, image_tokens: int) -> int:
    """How many tokens ``item`` has up to the end of its first image; 0 without one, or where some are targets."""
    if not item.images:
        return 0
    end = item.ids.index(IMAGE_TOKEN) + image_tokens
    return end if all(label == IGNORE for label in item.labels[:end]) else 0
