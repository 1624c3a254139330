"""Budget and rate limits hold for any sequence of requests, with a simulated clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavactl.core.errors import RecipeError
from llavactl.core.protocols import Limits
from llavactl.teaching.budget import Budget, RateLimiter, RequestSize
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
def test_no_minute_exceeds_the_limits(requests: int, tokens: int, events: list[tuple[int, int, float]]) -> None:
    clock = Clock()
    rate = RateLimiter(Limits(requests_per_minute=requests, tokens_per_minute=tokens), clock)
    sent: list[tuple[float, int]] = []
    for estimated, actual, gap in events:
        clock.now += gap
        while (pause := rate.wait_s(estimated)) > 0:
            clock.now += pause
        entry = rate.record(estimated)
        rate.correct(entry, min(actual, estimated))
        sent.append((clock.now, min(actual, estimated)))
        last = [(when, n) for when, n in sent if when > clock.now - 59.999]
        assert len(last) <= requests
        assert sum(n for _, n in last) <= tokens or len(last) == 1


def test_a_pause_delays_every_request() -> None:
    clock = Clock()
    rate = RateLimiter(Limits(), clock)
    assert rate.wait_s(10) == 0
    rate.pause(7)
    assert rate.wait_s(10) == 7
    clock.now += 8
    assert rate.wait_s(10) == 0


def test_requests_in_flight_count_with_their_maximum_cost() -> None:
    limits = Limits(model="m", max_tokens=100)
    budget = Budget(Price(**{"in": 1e6, "out": 1e6}), max_cost=1000)
    size = RequestSize(content_bytes=84, messages=0)
    assert budget.max_request_cost(size, limits) == 84 + 16 + 100
    budget.spent, budget.reserved = 500, 300
    assert budget.exceeded_by(200) == ""
    assert "max_cost 1000" in budget.exceeded_by(201)
    assert "--max-requests 2" in Budget(max_requests=2, sent=2).exceeded_by(None)


@given(st.text(min_size=1))
def test_the_token_bound_is_at_least_the_number_of_bytes(text: str) -> None:
    """A byte-level tokenizer has at most one token per byte."""
    assert (
        RequestSize(len(text.encode()), 1).max_tokens
        > len(text.encode())
        >= RequestSize(len(text.encode()), 0).estimated_tokens
    )


def test_nan_is_not_a_limit() -> None:
    with pytest.raises(RecipeError, match="nan"):
        Budget(Price(**{"in": 1, "out": 1}), float("nan"))
