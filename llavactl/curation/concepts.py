"""LLaVA's concept balance: which of many captions are kept, so that no noun phrase outnumbers the others.

The paper (arXiv 2304.08485, appendix on CC3M) counts the captions that each noun phrase is in, skips phrases in fewer
than 3, and from the rarest phrase up takes all captions of a phrase, or 100 of them at random where it is in more.
Each phrase draws from all its captions, whatever others took before, so the order of phrases changes nothing here.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Concepts:
    """Which phrases are in which captions: 12 bytes for each time that one is, and nothing else, is kept."""

    captions: int = 0
    _phrases: array[int] = field(default_factory=lambda: array("Q"))
    _captions: array[int] = field(default_factory=lambda: array("I"))

    def add(self, keys: Iterable[int]) -> None:
        """The phrases of the next caption, by their keys; one that is in it twice counts once."""
        distinct = set(keys)
        self._phrases.extend(distinct)
        self._captions.extend([self.captions] * len(distinct))
        self.captions += 1

    def kept(self, at_least: int, at_most: int, seed: int) -> Kept:
        """Captions by their phrases: all of those in ``at_least`` captions, ``at_most`` drawn with ``seed`` if in more.

        A draw takes the captions of lowest hash of seed, phrase and caption: the same on any machine.
        """
        phrases = np.frombuffer(self._phrases, dtype=np.uint64)
        captions = np.frombuffer(self._captions, dtype=np.uint32)
        chosen = np.zeros(self.captions, dtype=bool)
        if not len(phrases):
            return Kept(chosen, 0, 0, 0)
        _, inverse, counts = np.unique(phrases, return_inverse=True, return_counts=True)
        often = counts[inverse]
        chosen[captions[(often >= at_least) & (often <= at_most)]] = True
        many = np.flatnonzero(often > max(at_most, at_least - 1))
        draw = _mixed(phrases[many] ^ _mixed(captions[many].astype(np.uint64) + np.uint64(seed % 2**64)))
        order = np.lexsort((draw, inverse[many]))
        group = inverse[many][order]
        first = np.flatnonzero(np.r_[True, group[1:] != group[:-1]]) if len(group) else np.array([], dtype=np.int64)
        rank = np.arange(len(group)) - np.repeat(first, np.diff(np.r_[first, len(group)]))
        chosen[captions[many[order[rank < at_most]]]] = True
        return Kept(chosen, len(counts), int((counts < at_least).sum()), int((counts > at_most).sum()))


@dataclass(frozen=True)
class Kept:
    """``chosen`` bool [captions]; of the distinct ``phrases`` how many were too ``rare``, and how many drawn from."""

    chosen: np.ndarray
    phrases: int
    rare: int
    frequent: int


def phrase_key(phrase: str) -> int:
    """64 bits that stand for ``phrase``: among ten million phrases two share one with a chance of 3 in a million."""
    return int.from_bytes(hashlib.blake2b(phrase.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _mixed(values: np.ndarray) -> np.ndarray:
    """Each 64-bit number scattered (the finalizer of splitmix64; Steele, Lea and Flood 2014)."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    scattered: np.ndarray = mixed ^ (mixed >> np.uint64(31))
    return scattered
