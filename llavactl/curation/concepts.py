"""LLaVA's concept balance: selects captions such that frequent noun phrases don't dominate.

The paper (arXiv 2304.08485, appendix on CC3M) counts the captions that contain each noun phrase, skips phrases in fewer
than 3, and, beginning with the rarest phrase, adds all captions of a phrase, or 100 random ones of a more frequent
phrase. Here each phrase samples from all its captions, so the order of phrases doesn't matter.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Concepts:
    """The phrases of each caption, in 12 bytes per occurrence."""

    captions: int = 0
    _phrases: array[int] = field(default_factory=lambda: array("Q"))
    _captions: array[int] = field(default_factory=lambda: array("I"))

    def add(self, keys: Iterable[int]) -> None:
        """Adds the phrases of the next caption, by their keys; a repeated phrase counts once."""
        distinct = set(keys)
        self._phrases.extend(distinct)
        self._captions.extend([self.captions] * len(distinct))
        self.captions += 1

    def select(self, at_least: int, at_most: int, seed: int) -> Selection:
        """All captions of phrases in ``at_least`` to ``at_most`` captions, ``at_most`` per more frequent phrase.

        The latter are those with the lowest hash of seed, phrase and caption, on any machine the same.
        """
        phrases = np.frombuffer(self._phrases, dtype=np.uint64)
        captions = np.frombuffer(self._captions, dtype=np.uint32)
        selected = np.zeros(self.captions, dtype=bool)
        if not len(phrases):
            return Selection(selected, 0, 0, 0)
        _, inverse, counts = np.unique(phrases, return_inverse=True, return_counts=True)
        frequency = counts[inverse]
        selected[captions[(frequency >= at_least) & (frequency <= at_most)]] = True
        many = np.flatnonzero(frequency > max(at_most, at_least - 1))
        draw = _mixed(phrases[many] ^ _mixed(captions[many].astype(np.uint64) + np.uint64(seed % 2**64)))
        order = np.lexsort((draw, inverse[many]))
        group = inverse[many][order]
        first = np.flatnonzero(np.r_[True, group[1:] != group[:-1]]) if len(group) else np.array([], dtype=np.int64)
        rank = np.arange(len(group)) - np.repeat(first, np.diff(np.r_[first, len(group)]))
        selected[captions[many[order[rank < at_most]]]] = True
        return Selection(selected, len(counts), int((counts < at_least).sum()), int((counts > at_most).sum()))


@dataclass(frozen=True)
class Selection:
    """``selected`` bool [captions]; the numbers of distinct ``phrases``, of ``rare`` and of ``frequent`` ones."""

    selected: np.ndarray
    phrases: int
    rare: int
    frequent: int


def phrase_key(phrase: str) -> int:
    """A 64-bit hash of ``phrase``; a collision among ten million phrases has a probability of 3e-6."""
    return int.from_bytes(hashlib.blake2b(phrase.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _mixed(values: np.ndarray) -> np.ndarray:
    """Hashes of 64-bit integers (the finalizer of splitmix64; Steele, Lea and Flood 2014)."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    hashes: np.ndarray = mixed ^ (mixed >> np.uint64(31))
    return hashes
