"""How much may be asked, and when: money, requests, and rates a minute. What is in flight counts with its most."""

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
"""What a chat template adds to a message, at most."""

BYTES_A_TOKEN = 4
"""Of English text, roughly; for estimates, never for a limit."""


@dataclass(frozen=True)
class Size:
    """What a request weighs: bytes of its text and messages in it."""

    content_bytes: int
    messages: int

    @property
    def most_tokens(self) -> int:
        """No tokenizer makes more: of every byte a token, and what goes around a message."""
        return self.content_bytes + OVERHEAD_TOKENS * (self.messages + 1)

    @property
    def tokens(self) -> int:
        """About how many tokens it has."""
        return self.content_bytes // BYTES_A_TOKEN + 4 * self.messages


@dataclass
class Budget:
    """What may still be spent. ``spent`` is the cost of all before, ``flying`` the most of what is in flight.

    ``max_cost`` is for all that an ``out`` ever costs, ``max_requests`` for those that one command sends.

    Raises:
        RecipeError: ``max_cost`` is not a number.
    """

    price: Price | None = None
    max_cost: float | None = None
    max_requests: int | None = None
    spent: float = 0.0
    flying: float = 0.0
    sent: int = 0

    def __post_init__(self) -> None:
        if self.max_cost is not None and math.isnan(self.max_cost):  # nothing is ever more than that
            raise RecipeError("max_cost: nan is no amount of money")

    def most(self, size: Size, limits: Limits) -> float | None:
        """The most that a request can cost; None where that isn't known."""
        if self.price is None or limits.max_tokens is None:
            return None
        return self.price.of(size.most_tokens, limits.max_tokens)

    def cost(self, tokens_in: int | None, tokens_out: int | None) -> float | None:
        """What a reply cost; None where the endpoint doesn't say."""
        if self.price is None or tokens_in is None or tokens_out is None:
            return None
        return self.price.of(tokens_in, tokens_out)

    def refuses(self, most: float | None) -> str:
        """Why a request that can cost ``most`` may not be sent; nothing when it may."""
        if self.max_requests is not None and self.sent >= self.max_requests:
            return f"{self.sent} requests are sent, as many as --max-requests allows"
        if self.max_cost is not None and self.spent + self.flying + (most or 0.0) > self.max_cost:
            return f"{self.spent:.4g} is spent, and the next request could cost more than is left of {self.max_cost:g}"
        return ""


class Pace:
    """When the next request may be sent: in no 60 seconds are more requests or tokens than the limits allow."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits, self._clock = limits, clock
        self._recent: deque[list[float]] = deque()  # [when, tokens] of each request of the last minute
        self._not_before = 0.0

    def wait_s(self, tokens: int) -> float:
        """Seconds until a request of so many tokens may go; 0 when it may now."""
        now = self._clock()
        while self._recent and self._recent[0][0] <= now - WINDOW_S:
            self._recent.popleft()
        waits = [self._not_before - now, 0.0]
        most = self.limits.requests_per_minute
        if most is not None and len(self._recent) >= most:
            waits.append(self._recent[-most][0] + WINDOW_S - now)
        if (most := self.limits.tokens_per_minute) is not None:
            waits.append(self._until_room(most - tokens, now))
        return max(waits)

    def _until_room(self, room: float, now: float) -> float:
        """Seconds until the tokens of the window are at most ``room``; a request above the limit goes alone."""
        total = sum(tokens for _, tokens in self._recent)
        for when, tokens in self._recent:
            if total <= max(room, 0):
                return 0.0
            total -= tokens
            if total <= max(room, 0):
                return when + WINDOW_S - now
        return 0.0

    def sent(self, tokens: int) -> list[float]:
        """A request goes now; what is returned is for ``took``."""
        entry = [self._clock(), float(tokens)]
        self._recent.append(entry)
        return entry

    def took(self, entry: list[float], tokens: int) -> None:
        """What the request really took, now that it is known."""
        entry[1] = float(tokens)

    def pause(self, seconds: float) -> None:
        """Nothing goes for so many seconds: the endpoint said so."""
        self._not_before = max(self._not_before, self._clock() + seconds)
