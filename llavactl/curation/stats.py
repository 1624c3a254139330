"""Counts over training records: how long, how many turns and images, and what questions begin with."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llavactl.core.schema import Sample

_WORD = re.compile(r"\w+(?:['’-]\w+)*")
_OPENING = 2

MEASURES: Mapping[str, str] = {
    "tokens": "tokens a sample",
    "question words": "words a question",
    "answer words": "words an answer",
    "characters": "characters a sample",
    "turns": "questions with an answer, a sample",
    "images": "images a sample",
    "samples an image": "samples an image",
}
"""What is measured, in the order that it is shown."""


@dataclass(frozen=True)
class Distribution:
    """A distribution of whole numbers: ``n`` of them, their mean and quantiles."""

    n: int
    mean: float
    min: int
    p5: int
    median: int
    p95: int
    max: int


def summary(counts: Mapping[int, int]) -> Distribution:
    """The summary of values given as ``{value: how often}``; a quantile is the smallest value that reaches it."""
    n = sum(counts.values())
    steps = sorted(counts)

    def quantile(share: float) -> int:
        passed = 0
        for value in steps:
            passed += counts[value]
            if passed >= share * n:
                return value
        return steps[-1]

    mean = sum(value * count for value, count in counts.items()) / n
    return Distribution(n, round(mean, 2), steps[0], quantile(0.05), quantile(0.5), quantile(0.95), steps[-1])


@dataclass
class Statistics:
    """Distributions as ``{value: how often}``: memory grows with distinct values and images, not with records."""

    samples: int = 0
    distributions: dict[str, Counter[int]] = field(default_factory=dict)
    openings: Counter[str] = field(default_factory=Counter)
    _shared: Counter[int] = field(default_factory=Counter)

    def add(self, sample: Sample, tokens: int | None = None) -> None:
        """Counts ``sample``, of ``tokens`` tokens if they are known."""
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
        self._shared.update(hash(image) for image in sample.images)

    def _count(self, name: str, values: Iterable[int]) -> None:
        self.distributions.setdefault(name, Counter()).update(values)

    def finished(self) -> dict[str, Counter[int]]:
        """The distributions that have a value, in the order of MEASURES."""
        whole = {**self.distributions, "samples an image": Counter(self._shared.values())}
        return {name: whole[name] for name in MEASURES if whole.get(name)}


def opening(question: str) -> str:
    """The first words of a question, in lower case: ``what is``."""
    return " ".join(word.lower() for word in _WORD.findall(question[:80])[:_OPENING])


def _words(text: str) -> int:
    return len(_WORD.findall(text))
