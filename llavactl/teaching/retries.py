"""Retries of failed requests: limits, exponential backoff with jitter, and the queue of waiting attempts.

No retry library is used: it would sleep inside a concurrency slot, invisible to budget and rate limit.
"""

from __future__ import annotations

import heapq
from random import Random
from typing import Generic, TypeVar

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0

MAX_RETRY_AFTER_S = 600.0
"""The run stops if the endpoint asks for a longer wait; stored replies are kept."""

MAX_CONSECUTIVE_FAILURES = 3
"""After this many consecutive requests that failed in every attempt, the endpoint counts as down."""

MAX_INITIAL_REFUSALS = 5
"""After this many refusals without any reply, the cause must be common to all requests."""

T = TypeVar("T")


def backoff_s(tries: int, retry_after_s: float | None, rng: Random) -> float:
    """Seconds to the next attempt after ``tries`` failures: exponential with jitter, at least ``retry_after_s``."""
    longest = min(FIRST_WAIT_S * 2 ** min(tries - 1, 10), LONGEST_WAIT_S)
    return max(retry_after_s or 0.0, longest * rng.uniform(0.5, 1.0))


class RetryQueue(Generic[T]):
    """Failed attempts by the time of their retry; ties are resolved by the attempt's number."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, T]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, due: float, number: int, attempt: T) -> None:
        """Adds ``attempt``, to be sent again at ``due``."""
        heapq.heappush(self._heap, (due, number, attempt))

    def pop_due(self, now: float) -> T | None:
        """Removes and returns the first attempt that is due."""
        return heapq.heappop(self._heap)[2] if self._heap and self._heap[0][0] <= now else None

    def wait_s(self, now: float) -> float | None:
        """Seconds until the next attempt is due; None if the queue is empty."""
        return self._heap[0][0] - now if self._heap else None
