"""How far a score may be off: intervals of shares."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import sqrt

from llavactl.core.schema import Question

Z95 = 1.959963984540054
"""The standard normal quantile that leaves 2.5 % on either side."""


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % interval of ``right`` out of ``n`` > 0, in percent (Wilson 1927, the score interval)."""
    share, spread = right / n, Z95**2 / n
    middle = (share + spread / 2) / (1 + spread)
    half = Z95 / (1 + spread) * sqrt(share * (1 - share) / n + spread / (4 * n))
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


def intervals(questions: Sequence[Question], right: Mapping[str, bool]) -> dict[str, tuple[float, float]]:
    """The 95 % interval of ``accuracy`` and of each category, where the task says which answers are right.

    Questions about one picture are taken as independent, so an interval is a little too narrow where a
    picture as a whole is easy or hard.
    """
    by_name: dict[str, list[bool]] = defaultdict(list)
    for question in questions:
        if question.id in right:
            by_name["accuracy"].append(right[question.id])
            if question.category:
                by_name[question.category].append(right[question.id])
    return {name: wilson(sum(all_), len(all_)) for name, all_ in by_name.items()}
