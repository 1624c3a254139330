"""Confidence intervals and paired tests against published figures and their definitions."""

from __future__ import annotations

import itertools
from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavactl.core.protocols import Scores
from llavactl.core.schema import Question
from llavactl.evaluation.significance import bootstrap, holm, intervals, mcnemar, paired, sign_flips, wilson


@given(st.integers(0, 12), st.integers(0, 12))
def test_mcnemar_equals_its_definition(a: int, b: int) -> None:
    n = a + b
    if n <= 10:
        splits = [abs(2 * sum(tosses) - n) for tosses in itertools.product((0, 1), repeat=n)]
        assert mcnemar(a, b) == pytest.approx(sum(each >= abs(a - b) for each in splits) / 2**n)
    assert mcnemar(a, b) == mcnemar(b, a)


def test_mcnemar_of_known_counts() -> None:
    assert mcnemar(0, 0) == 1
    assert mcnemar(5, 5) == 1
    assert mcnemar(1, 9) == pytest.approx(22 / 1024)
    assert mcnemar(2000, 2400) == pytest.approx(1.8e-9, rel=0.05)


def test_the_bootstrap_of_a_large_sample_is_close_to_the_normal_interval() -> None:
    differences = [1.0] * 300 + [-1.0] * 200 + [0.0] * 500
    low, high = bootstrap(differences)
    half = 1.96 * sqrt((0.5 - 0.1**2) / 1000)
    assert low == pytest.approx(100 * (0.1 - half), abs=0.4)
    assert high == pytest.approx(100 * (0.1 + half), abs=0.4)
    assert bootstrap(differences) == (low, high)
    assert bootstrap([0.0, 0.0]) == (0, 0)


def test_paired() -> None:
    a, b = {"1": 1.0, "2": 0.0, "3": 1.0}, {"3": 1.0, "2": 1.0, "1": 1.0}
    difference = paired("a", "b", a, b)
    assert (difference.only_a, difference.only_b, difference.p) == (0, 1, 1)
    assert difference.difference == pytest.approx(100 / 3)
    graded = paired("a", "b", {**a, "1": 0.3}, b)
    assert (graded.only_a, graded.only_b) == (None, None)
    assert graded.p == pytest.approx(1 / 2, abs=0.01)  # .7 and 1: both signs of the larger one, with the other
    assert graded.difference == pytest.approx(100 * 1.7 / 3)


def test_wilson_of_newcombes_example() -> None:
    """81 of 263: .2553 to .3662 (Newcombe 1998, table I, method 3)."""
    low, high = wilson(81, 263)
    assert (round(low, 2), round(high, 2)) == (25.53, 36.62)


def test_a_task_may_name_the_questions_of_each_score() -> None:
    questions = [Question(str(at), (), category="c") for at in range(4)]
    right = {str(at): at < 2 for at in range(4)}
    assert intervals(questions, Scores({}, 0, right)) == {"accuracy": wilson(2, 4), "c": wilson(2, 4)}
    about = {"first": ["0"], "none": [], "unknown": ["9"]}
    assert intervals(questions, Scores({}, 0, right, about)) == {"first": wilson(1, 1)}
    assert intervals(questions, Scores({})) == {}


@given(st.lists(st.sampled_from([-1.0, -2 / 3, -1 / 3, 0.0, 1 / 3, 2 / 3, 1.0]), min_size=1, max_size=8))
def test_sign_flips_equals_its_definition(differences: list[float]) -> None:
    sums = [
        sum(sign * each for sign, each in zip(signs, differences, strict=True))
        for signs in itertools.product((-1, 1), repeat=len(differences))
    ]
    exact = sum(abs(each) >= abs(sum(differences)) - 1e-9 for each in sums) / len(sums)
    assert sign_flips(differences) == pytest.approx(exact, abs=0.01)


def test_sign_flips_of_right_and_wrong_answers_is_mcnemars_test() -> None:
    differences = [1.0] * 14 + [-1.0] * 4 + [0.0] * 60
    assert sign_flips(differences) == pytest.approx(mcnemar(4, 14), abs=0.002)
    assert sign_flips([0.0, 0.0]) == 1
    assert sign_flips([1.0] * 40) == pytest.approx(1e-5, rel=0.01)  # the smallest value of 100,000 draws


def test_holm_of_a_calculation_by_hand() -> None:
    """Sorted: .005 × 4, .01 × 3, then .03 × 2, and .04 × 1 is at least the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_is_between_the_value_and_bonferronis(values: list[float]) -> None:
    for value, adjusted in zip(values, holm(values), strict=True):
        assert value <= adjusted <= min(1.0, len(values) * value) or adjusted == 1.0


def test_wilson_is_exact_at_the_ends() -> None:
    for n in range(1, 200):
        assert (wilson(0, n)[0], wilson(n, n)[1]) == (0, 100)
