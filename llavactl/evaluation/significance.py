"""Confidence intervals of scores, and paired significance tests of two models."""

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
"""The 97.5 % quantile of the standard normal distribution."""


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of ``right`` out of ``n`` > 0, in percent (Wilson 1927)."""
    proportion, correction = right / n, Z95**2 / n
    center = (proportion + correction / 2) / (1 + correction)
    half_width = Z95 / (1 + correction) * sqrt(proportion * (1 - proportion) / n + correction / (4 * n))
    # Exactly 0 and 1 at the ends, where the difference has a rounding error.
    low, high = center - half_width if right else 0.0, center + half_width if right < n else 1.0
    return 100 * low, 100 * high


def intervals(questions: Sequence[Question], scores: Scores) -> dict[str, tuple[float, float]]:
    """95 % intervals of ``accuracy`` and of each category, if the task sets ``Scores.right``.

    ``Scores.about`` replaces the categories, if the task sets it. Questions about one image are treated as
    independent, so intervals are slightly too narrow if whole images are easy or hard.
    """
    ids_by_score = scores.about or _ids_by_category(questions)
    right_by_score = {
        name: [scores.right[question_id] for question_id in ids if question_id in scores.right]
        for name, ids in ids_by_score.items()
    }
    return {name: wilson(sum(right), len(right)) for name, right in right_by_score.items() if right}


def _ids_by_category(questions: Sequence[Question]) -> dict[str, list[str]]:
    ids: dict[str, list[str]] = defaultdict(list)
    for question in questions:
        ids["accuracy"].append(question.id)
        if question.category:
            ids[question.category].append(question.id)
    return ids


@dataclass(frozen=True)
class Difference:
    """Candidate ``b`` minus candidate ``a`` on the same questions.

    ``difference`` of the means in percentage points, with its 95 % ``interval`` (paired bootstrap). ``only_a`` and
    ``only_b``: questions that only one of them answered correctly; None for graded answers. ``p``: the probability of a
    difference at least as large if both are equally good, by McNemar's exact test of these two counts, or for graded
    answers by ``sign_flips``.
    """

    a: str
    b: str
    difference: float
    interval: tuple[float, float]
    only_a: int | None
    only_b: int | None
    p: float


def paired(a: str, b: str, grades_a: Mapping[str, float], grades_b: Mapping[str, float]) -> Difference:
    """Compares the grades (0 to 1, by question id) of the candidates named ``a`` and ``b``."""
    differences = [grades_b[question_id] - grades_a[question_id] for question_id in grades_a]
    only_a, only_b = (sum(difference == sign for difference in differences) for sign in (-1, 1))
    is_binary = all(grade in (0.0, 1.0) for grades in (grades_a, grades_b) for grade in grades.values())
    counts = (only_a, only_b, mcnemar(only_a, only_b)) if is_binary else (None, None, sign_flips(differences))
    return Difference(a, b, 100 * fmean(differences), bootstrap(differences), *counts)


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p value of McNemar's test (1947): a binomial test of ``only_a`` against ``only_b``."""
    n = only_a + only_b
    tail = sum(comb(n, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, float(Fraction(2 * tail, 2**n)))


def sign_flips(differences: Sequence[float], draws: int = 100_000, seed: int = 0) -> float:
    """The two-sided p value of the paired permutation test of the mean of ``differences`` (Fisher 1935).

    Each difference keeps or changes its sign with equal probability; for differences of -1, 0 and 1 this is McNemar's
    exact test. Equal differences are drawn together from their binomial distribution.
    """
    import numpy as np

    values, counts = np.unique(np.abs(np.asarray(differences, dtype=float)), return_counts=True)
    generator = np.random.default_rng(seed)
    sums = sum(
        value * (2 * generator.binomial(n, 0.5, size=draws) - n) for value, n in zip(values, counts, strict=True)
    )
    extreme = np.count_nonzero(np.abs(sums) >= abs(sum(differences)) - 1e-9)
    return float((1 + extreme) / (1 + draws))


def holm(p_values: Sequence[float]) -> list[float]:
    """``p_values`` of several tests, adjusted: the chance of any false one below 0.05 is at most 5 % (Holm 1979)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def bootstrap(differences: Sequence[float], draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of ``differences``, in percent (Efron 1979).

    Questions are resampled with the answers of both candidates, so that the difficulty of a question cancels out. Equal
    differences are drawn together from their multinomial distribution, which is equivalent and faster.
    """
    import numpy as np

    values, counts = np.unique(np.asarray(differences, dtype=float), return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(differences), counts / len(differences), size=draws)
    low, high = np.quantile(drawn @ values / len(differences), [0.025, 0.975])
    return 100 * float(low), 100 * float(high)
