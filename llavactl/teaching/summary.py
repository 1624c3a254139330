"""What a teacher made, in figures: counted while the records go by, so that no more than a few are held."""

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
    """Counts of what was made and refused, lengths in words, how questions begin, and ten records drawn at random."""

    seed: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    refused: dict[str, Counter[str]] = field(default_factory=dict)
    words: dict[str, list[int]] = field(default_factory=dict)
    openings: Counter[str] = field(default_factory=Counter)
    examples: list[GeneratedRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._draw = Random(f"{self.seed} examples")

    def add(self, made: GeneratedRecord) -> None:
        """One more."""
        kind = made.request.kind
        if made.record is None:
            self.refused.setdefault(made.sort, Counter())[kind] += 1
            return
        self.kinds[kind] += 1
        said = [message["value"].replace("<image>\n", "") for message in made.record["conversations"]]
        self.words.setdefault(f"{kind}: questions", []).extend(len(text.split()) for text in said[::2])
        self.words.setdefault(f"{kind}: answers", []).extend(len(text.split()) for text in said[1::2])
        self.words.setdefault(f"{kind}: turns", []).append(len(said) // 2)
        if kind != "detail":  # whose questions are drawn from a list
            self.openings.update(" ".join(text.lower().split()[:2]) for text in said[::2])
        # Each of n records stays with the same chance (reservoir sampling, Vitter's algorithm R).
        place = self._draw.randrange(self.kinds.total())
        if len(self.examples) < EXAMPLES:
            self.examples.append(made)
        elif place < EXAMPLES:
            self.examples[place] = made

    @property
    def reasons(self) -> dict[str, int]:
        """How many records were refused, by the sort of the reason."""
        return {sort: counts.total() for sort, counts in sorted(self.refused.items())}

    def document(self) -> Mapping[str, Any]:
        """The figures as JSON has them; the page of the report is drawn from this."""
        return {
            "made": dict(self.kinds),
            "refused": {sort: dict(counts) for sort, counts in sorted(self.refused.items())},
            "lengths": {name: _quantiles(sorted(counts)) for name, counts in sorted(self.words.items())},
            "openings": dict(self.openings.most_common(OPENINGS)),
        }


def _quantiles(counts: list[int]) -> dict[str, int]:
    def at(share: float) -> int:
        return counts[round(share * (len(counts) - 1))]

    return {"least": at(0), "median": at(0.5), "90 %": at(0.9), "most": at(1)}
