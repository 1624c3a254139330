"""Statistics of training records: lengths, turns, images, and the first words of questions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llavactl.core.schema import Sample

_WORD = re.compile(r"\w+(?:['’-]\w+)*")
_OPENING_WORDS = 2

MEASURES: Mapping[str, str] = {
    "tokens": "tokens per sample",
    "question words": "words per question",
    "answer words": "words per answer",
    "characters": "characters per sample",
    "turns": "question-answer pairs per sample",
    "images": "images per sample",
    "samples per image": "samples per image",
}
"""The measures with their descriptions, in the order of reports."""


@dataclass(frozen=True)
class Distribution:
    """The mean and quantiles of ``n`` integers."""

    n: int
    mean: float
    min: int
    p5: int
    median: int
    p95: int
    max: int


def summary(counts: Mapping[int, int]) -> Distribution:
    """The distribution of ``{value: count}``; a quantile is the smallest value that covers its share of all values."""
    n = sum(counts.values())
    values = sorted(counts)

    def quantile(share: float) -> int:
        covered = 0
        for value in values:
            covered += counts[value]
            if covered >= share * n:
                return value
        return values[-1]

    mean = sum(value * count for value, count in counts.items()) / n
    return Distribution(n, round(mean, 2), values[0], quantile(0.05), quantile(0.5), quantile(0.95), values[-1])


@dataclass
class Statistics:
    """Distributions as ``{value: count}``: memory grows with distinct values and images, not with records."""

    samples: int = 0
    distributions: dict[str, Counter[int]] = field(default_factory=dict)
    openings: Counter[str] = field(default_factory=Counter)
    _samples_by_image: Counter[int] = field(default_factory=Counter)

    def add(self, sample: Sample, tokens: int | None = None) -> None:
        """Adds ``sample``, with its length in ``tokens`` if known."""
        self.samples += 1
        questions = [turn.text.strip() for turn in sample.turns if turn.role == "user"]
        answers = [turn.text for turn in sample.turns if turn.role == "assistant"]
        if tokens is not None:
            self._count("tokens", [tokens])
        self._count("question words", map(_words, questions))
        self._count("answer words", map(_words, answers))
        self._count("characters", [sum(len(turn.text) for turn in sample.turns)])
        self._count("turns", [len(answers)])
        self._count("images", [len(sample.images)])
        self.openings.update(filter(None, map(opening, questions)))
        self._samples_by_image.update(hash(image) for image in sample.images)

    def _count(self, name: str, values: Iterable[int]) -> None:
        self.distributions.setdefault(name, Counter()).update(values)

    def finished(self) -> dict[str, Counter[int]]:
        """The distributions with at least one value, in the order of MEASURES."""
        complete = {**self.distributions, "samples per image": Counter(self._samples_by_image.values())}
        return {name: complete[name] for name in MEASURES if complete.get(name)}


def opening(question: str) -> str:
    """The first words of a question, in lower case: ``what is``."""
    return " ".join(word.lower() for word in _WORD.findall(question[:80])[:_OPENING_WORDS])


def _words(text: str) -> int:
    return len(_WORD.findall(text))
