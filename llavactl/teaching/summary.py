"""Statistics of generated records, counted while they are written, so that only a few records are in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

from llavactl.teaching.generate import GeneratedRecord

EXAMPLES, OPENINGS = 10, 15


@dataclass
class GenerationSummary:
    """Counts of written and refused records, lengths in words, how questions begin, and ten random records."""

    seed: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    refused: dict[str, Counter[str]] = field(default_factory=dict)
    words: dict[str, list[int]] = field(default_factory=dict)
    openings: Counter[str] = field(default_factory=Counter)
    examples: list[GeneratedRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rng = Random(f"{self.seed} examples")

    def add(self, generated: GeneratedRecord) -> None:
        """Counts one record."""
        kind = generated.request.kind
        if generated.record is None:
            self.refused.setdefault(generated.category, Counter())[kind] += 1
            return
        self.kinds[kind] += 1
        texts = [turn["value"].replace("<image>\n", "") for turn in generated.record["conversations"]]
        self.words.setdefault(f"{kind}: questions", []).extend(len(text.split()) for text in texts[::2])
        self.words.setdefault(f"{kind}: answers", []).extend(len(text.split()) for text in texts[1::2])
        self.words.setdefault(f"{kind}: turns", []).append(len(texts) // 2)
        if kind != "detail":  # its questions are drawn from a list
            self.openings.update(" ".join(text.lower().split()[:2]) for text in texts[::2])
        # Reservoir sampling (Vitter's algorithm R): every record is kept with the same probability.
        index = self._rng.randrange(self.kinds.total())
        if len(self.examples) < EXAMPLES:
            self.examples.append(generated)
        elif index < EXAMPLES:
            self.examples[index] = generated

    @property
    def reasons(self) -> dict[str, int]:
        """The number of refused records by category."""
        return {category: counts.total() for category, counts in sorted(self.refused.items())}

    def document(self) -> Mapping[str, Any]:
        """The statistics as JSON, the input of ``report.instructions``."""
        return {
            "written": dict(self.kinds),
            "refused": {category: dict(counts) for category, counts in sorted(self.refused.items())},
            "lengths": {name: _quantiles(sorted(counts)) for name, counts in sorted(self.words.items())},
            "openings": dict(self.openings.most_common(OPENINGS)),
        }


def _quantiles(counts: list[int]) -> dict[str, int]:
    def quantile(share: float) -> int:
        return counts[round(share * (len(counts) - 1))]

    return {"min": quantile(0), "median": quantile(0.5), "p90": quantile(0.9), "max": quantile(1)}
