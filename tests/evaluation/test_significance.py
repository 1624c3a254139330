"""Confidence intervals and paired tests against published figures and their definitions."""

from __future__ import annotations

import itertools
from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavactl.core.protocols import Scores
from llavactl.core.schema import Question
from llavactl.evaluation.significance import bootstrap, intervals, mcnemar, paired, wilson


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
    assert graded.p is None
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
