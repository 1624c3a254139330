"""Estimates of tokens, cost and time of the requests that are still to be sent."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from llavactl.core.protocols import Limits
from llavactl.teaching.budget import BYTES_PER_TOKEN, Budget
from llavactl.teaching.journal import AverageReply, Journal
from llavactl.teaching.keyed import KeyedRequest, request_size
from llavactl.teaching.messages import Prompts

ASSUMED_TOKENS_PER_S = 50.0
ASSUMED_REPLY_TOKENS = 300
"""For a kind without examples."""

ASSUMED = (
    f"{BYTES_PER_TOKEN} bytes per token, replies as long as those of the examples, "
    f"{ASSUMED_TOKENS_PER_S:g} tokens per second"
)


@dataclass(frozen=True)
class Estimate:
    """The estimate for ``requests`` pending requests; ``kept`` others are already answered.

    Costs are None without a price; ``basis`` names the source of the estimate.
    """

    requests: int
    kept: int
    tokens_in: int
    tokens_out: int
    cost: float | None
    cost_at_most: float | None
    currency: str
    seconds: float
    basis: str


def estimate(
    pending: Sequence[KeyedRequest],
    kept: int,
    limits: Limits,
    prompts: Prompts,
    budget: Budget,
    journal: Journal | None,
    currency: str,
) -> Estimate:
    """Estimates from the average of earlier replies, or else from the lengths of the requests and of the examples."""
    averages: dict[str, AverageReply | None] = defaultdict(lambda: None)
    for kind in {keyed.request.kind for keyed in pending} if journal else ():
        average = journal.average(kind) if journal else None
        averages[kind] = average if average and average.replies else None
    tokens_in = tokens_out = seconds = max_cost = 0.0
    for keyed in pending:
        average, size = averages[keyed.request.kind], request_size(keyed.request)
        read = size.estimated_tokens if average is None or average.tokens_in is None else average.tokens_in
        if average is None or average.tokens_out is None:
            written = _reply_tokens(keyed, prompts, limits)
        else:
            written = average.tokens_out
        duration = written / ASSUMED_TOKENS_PER_S if average is None or average.seconds is None else average.seconds
        tokens_in, tokens_out, seconds = tokens_in + read, tokens_out + written, seconds + duration
        max_cost += budget.max_request_cost(size, limits) or 0.0
    measured = sum(average.replies for average in averages.values() if average)
    price, bounded = budget.price, limits.max_tokens is not None
    return Estimate(
        requests=len(pending),
        kept=kept,
        tokens_in=round(tokens_in),
        tokens_out=round(tokens_out),
        cost=round(price.cost(tokens_in, tokens_out), 4) if price else None,
        cost_at_most=round(max_cost, 4) if price and bounded else None,
        currency=currency,
        seconds=round(_with_limits(seconds / limits.concurrency, len(pending), tokens_in + tokens_out, limits), 1),
        basis=f"{measured} stored replies" if measured else ASSUMED,
    )


def _reply_tokens(keyed: KeyedRequest, prompts: Prompts, limits: Limits) -> float:
    kind = keyed.request.kind
    lengths = [
        len(example.reply) for name, prompt in prompts.kinds.items() if name == kind for example in prompt.examples
    ]
    tokens = sum(lengths) / len(lengths) / BYTES_PER_TOKEN if lengths else ASSUMED_REPLY_TOKENS
    return min(tokens, limits.max_tokens or tokens)


def _with_limits(seconds: float, requests: int, tokens: float, limits: Limits) -> float:
    """``seconds``, or longer if the rate limits require it; the first minute's requests are sent at once."""
    by_requests = (requests / limits.requests_per_minute - 1) * 60 if limits.requests_per_minute else 0.0
    by_tokens = (tokens / limits.tokens_per_minute - 1) * 60 if limits.tokens_per_minute else 0.0
    return max(seconds, by_requests, by_tokens)
