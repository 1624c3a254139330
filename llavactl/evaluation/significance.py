"""How far a score may be off, and whether two differ: intervals of shares, paired tests."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import comb, sqrt
from statistics import fmean

from llavactl.core.protocols import Scores
from llavactl.core.schema import Question

Z95 = 1.959963984540054
"""The standard normal quantile that leaves 2.5 % on either side."""


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % interval of ``right`` out of ``n`` > 0, in percent (Wilson 1927, the score interval)."""
    share, spread = right / n, Z95**2 / n
    middle = (share + spread / 2) / (1 + spread)
    half = Z95 / (1 + spread) * sqrt(share * (1 - share) / n + spread / (4 * n))
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


def intervals(questions: Sequence[Question], scored: Scores) -> dict[str, tuple[float, float]]:
    """The 95 % interval of ``accuracy`` and of each category, where the task says which answers are right.

    A task may say itself what each of its shares is about (``Scores.about``). Questions about one picture are
    taken as independent, so an interval is a little too narrow where a picture as a whole is easy or hard.
    """
    about = scored.about or _about(questions)
    known = {name: [scored.right[each] for each in ids if each in scored.right] for name, ids in about.items()}
    return {name: wilson(sum(each), len(each)) for name, each in known.items() if each}


def _about(questions: Sequence[Question]) -> dict[str, list[str]]:
    by_name: dict[str, list[str]] = defaultdict(list)
    for question in questions:
        by_name["accuracy"].append(question.id)
        if question.category:
            by_name[question.category].append(question.id)
    return by_name


@dataclass(frozen=True)
class Difference:
    """Candidate ``b`` against ``a`` on the same questions.

    ``difference`` of the means in points of percent and its 95 % ``interval`` (paired bootstrap); ``only_a`` and
    ``only_b`` count what just one got right, and ``p`` is McNemar's exact test of them: the chance of a split as
    uneven when both are equally good. The three are None where answers are graded, not right or wrong.
    """

    a: str
    b: str
    difference: float
    interval: tuple[float, float]
    only_a: int | None
    only_b: int | None
    p: float | None


def paired(a: str, b: str, first: Mapping[str, float], second: Mapping[str, float]) -> Difference:
    """Compares the grades (0 to 1) of two candidates for the same questions; ``a`` and ``b`` are their names."""
    differences = [second[name] - first[name] for name in first]
    only = [sum(each == sign for each in differences) for sign in (-1, 1)]
    known = all(grade in (0.0, 1.0) for each in (first, second) for grade in each.values())
    counts = (only[0], only[1], mcnemar(*only)) if known else (None, None, None)
    return Difference(a, b, 100 * fmean(differences), bootstrap(differences), *counts)


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p of McNemar's test (1947): a fair coin's for ``only_a`` heads and ``only_b`` tails."""
    n = only_a + only_b
    tail = sum(comb(n, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, float(Fraction(2 * tail, 2**n)))


def bootstrap(differences: Sequence[float], draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of ``differences``, in percent (Efron 1979).

    Questions are drawn anew with all that was said to them, so what is hard for both cancels. Equal differences
    are drawn together, from the multinomial distribution that they have: the same, and quick.
    """
    import numpy as np

    values, counts = np.unique(np.asarray(differences, dtype=float), return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(differences), counts / len(differences), size=draws)
    low, high = np.quantile(drawn @ values / len(differences), [0.025, 0.975])
    return 100 * float(low), 100 * float(high)
