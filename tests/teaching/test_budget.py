"""Limits hold for any order of events: no clock is waited for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavactl.core.errors import RecipeError
from llavactl.core.protocols import Limits
from llavactl.teaching.budget import Budget, Pace, Size
from llavactl.teaching.prices import Price


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@given(
    st.integers(1, 5),
    st.integers(50, 300),
    st.lists(st.tuples(st.integers(1, 120), st.integers(1, 120), st.floats(0, 30)), min_size=1, max_size=40),
)
def test_no_minute_has_more_than_the_limits_allow(
    requests: int, tokens: int, events: list[tuple[int, int, float]]
) -> None:
    clock = Clock()
    pace = Pace(Limits(requests_per_minute=requests, tokens_per_minute=tokens), clock)
    sent: list[tuple[float, int]] = []
    for guessed, took, gap in events:
        clock.now += gap
        while (pause := pace.wait_s(guessed)) > 0:
            clock.now += pause
        entry = pace.sent(guessed)
        pace.took(entry, min(took, guessed))
        sent.append((clock.now, min(took, guessed)))
        last = [(when, n) for when, n in sent if when > clock.now - 59.999]
        assert len(last) <= requests
        assert sum(n for _, n in last) <= tokens or len(last) == 1


def test_a_pause_holds_for_all() -> None:
    clock = Clock()
    pace = Pace(Limits(), clock)
    assert pace.wait_s(10) == 0
    pace.pause(7)
    assert pace.wait_s(10) == 7
    clock.now += 8
    assert pace.wait_s(10) == 0


def test_what_is_in_flight_counts_with_its_most() -> None:
    limits = Limits(model="m", max_tokens=100)
    budget = Budget(Price(**{"in": 1e6, "out": 1e6}), max_cost=1000)
    size = Size(content_bytes=84, messages=0)
    assert budget.most(size, limits) == 84 + 16 + 100
    budget.spent, budget.flying = 500, 300
    assert budget.refuses(200) == ""
    assert "500 is spent" in budget.refuses(201)
    assert Budget(max_requests=2, sent=2).refuses(None) == "2 requests are sent, as many as --max-requests allows"


@given(st.text(min_size=1))
def test_no_tokenizer_makes_more_tokens_than_bytes(text: str) -> None:
    """Of a real byte-level tokenizer too, but those that know some words make fewer: here each byte is one."""
    assert Size(len(text.encode()), 1).most_tokens > len(text.encode()) >= Size(len(text.encode()), 0).tokens


def test_no_number_is_no_limit() -> None:
    with pytest.raises(RecipeError, match="nan is no amount"):
        Budget(Price(**{"in": 1, "out": 1}), float("nan"))
