"""Budget and rate limit of requests. Requests in flight count with their maximum cost."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from llavactl.core.errors import RecipeError
from llavactl.core.protocols import Limits
from llavactl.teaching.prices import Price

WINDOW_S = 60.0
OVERHEAD_TOKENS = 16
"""Tokens that a chat template adds per message, at most."""

BYTES_PER_TOKEN = 4
"""Of English text, approximately; used for estimates, never for limits."""


@dataclass(frozen=True)
class RequestSize:
    """The size of a request: bytes of its text, and number of messages."""

    content_bytes: int
    messages: int

    @property
    def max_tokens(self) -> int:
        """An upper bound for any tokenizer: one token per byte, plus the chat template."""
        return self.content_bytes + OVERHEAD_TOKENS * (self.messages + 1)

    @property
    def estimated_tokens(self) -> int:
        """The approximate number of tokens."""
        return self.content_bytes // BYTES_PER_TOKEN + 4 * self.messages


@dataclass
class Budget:
    """Money and requests that may still be used.

    ``spent`` is the cost so far, ``reserved`` the maximum cost of the requests in flight. ``max_cost`` limits the total
    cost of an output file over all runs, ``max_requests`` the requests of one run.

    Raises:
        RecipeError: ``max_cost`` is NaN.
    """

    price: Price | None = None
    max_cost: float | None = None
    max_requests: int | None = None
    spent: float = 0.0
    reserved: float = 0.0
    sent: int = 0

    def __post_init__(self) -> None:
        if self.max_cost is not None and math.isnan(self.max_cost):  # every comparison with it would be false
            raise RecipeError("max_cost: expected a number, got nan")

    def max_request_cost(self, size: RequestSize, limits: Limits) -> float | None:
        """The maximum cost of a request; None if it is unknown."""
        if self.price is None or limits.max_tokens is None:
            return None
        return self.price.cost(size.max_tokens, limits.max_tokens)

    def reply_cost(self, tokens_in: int | None, tokens_out: int | None) -> float | None:
        """The cost of a reply; None if the endpoint does not report its tokens."""
        if self.price is None or tokens_in is None or tokens_out is None:
            return None
        return self.price.cost(tokens_in, tokens_out)

    def exceeded_by(self, max_cost: float | None) -> str:
        """The limit that a request of up to ``max_cost`` would exceed, as a message; "" if there is none."""
        if self.max_requests is not None and self.sent >= self.max_requests:
            return f"--max-requests {self.max_requests} reached"
        if self.max_cost is not None and self.spent + self.reserved + (max_cost or 0.0) > self.max_cost:
            return f"max_cost {self.max_cost:g} could be exceeded by the next request; {self.spent:.4g} is spent"
        return ""


class RateLimiter:
    """Delays requests so that no window of 60 seconds exceeds the limits of requests and tokens."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits, self._clock = limits, clock
        self._recent: deque[list[float]] = deque()  # [time, tokens] of each request in the window
        self._not_before = 0.0

    def wait_s(self, tokens: int) -> float:
        """Seconds until a request of ``tokens`` tokens may be sent; 0 if it may be sent now."""
        now = self._clock()
        while self._recent and self._recent[0][0] <= now - WINDOW_S:
            self._recent.popleft()
        waits = [self._not_before - now, 0.0]
        limit = self.limits.requests_per_minute
        if limit is not None and len(self._recent) >= limit:
            waits.append(self._recent[-limit][0] + WINDOW_S - now)
        if (limit := self.limits.tokens_per_minute) is not None:
            waits.append(self._wait_for_tokens(limit - tokens, now))
        return max(waits)

    def _wait_for_tokens(self, available: float, now: float) -> float:
        """Seconds until the window has at most ``available`` tokens; a request above the limit is sent on its own."""
        total = sum(tokens for _, tokens in self._recent)
        for sent, tokens in self._recent:
            if total <= max(available, 0):
                return 0.0
            total -= tokens
            if total <= max(available, 0):
                return sent + WINDOW_S - now
        return 0.0

    def record(self, tokens: int) -> list[float]:
        """Records that a request is sent now; returns the entry for ``correct``."""
        entry = [self._clock(), float(tokens)]
        self._recent.append(entry)
        return entry

    def correct(self, entry: list[float], tokens: int) -> None:
        """Replaces the estimated tokens of ``entry`` by the actual number."""
        entry[1] = float(tokens)

    def pause(self, seconds: float) -> None:
        """Sends nothing for ``seconds``, as requested by the endpoint."""
        self._not_before = max(self._not_before, self._clock() + seconds)
