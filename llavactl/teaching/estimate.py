"""What asking would take, before anything is asked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from llavactl.core.protocols import Limits
from llavactl.teaching.asking import Keyed, size
from llavactl.teaching.budget import BYTES_A_TOKEN, Budget
from llavactl.teaching.journal import Journal, Usual
from llavactl.teaching.messages import Prompts

ASSUMED_TOKENS_PER_S = 50.0
UNTOLD_TOKENS = 300
ASSUMED = f"{BYTES_A_TOKEN} bytes a token, replies as long as the examples', {ASSUMED_TOKENS_PER_S:g} tokens a second"


@dataclass(frozen=True)
class Estimate:
    """Of the requests still to be sent: tokens, cost and its bound (None: no price), seconds; ``basis`` says of what.

    ``kept`` have an answer from before.
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
    todo: Sequence[Keyed],
    kept: int,
    limits: Limits,
    told: Prompts,
    budget: Budget,
    journal: Journal | None,
    currency: str,
) -> Estimate:
    """From what earlier replies of a kind took, else from the length of the texts and of the examples' replies."""
    measured: dict[str, Usual | None] = defaultdict(lambda: None)
    for kind in {keyed.request.kind for keyed in todo} if journal else ():
        usual = journal.usual(kind) if journal else None
        measured[kind] = usual if usual and usual.replies else None
    tokens_in = tokens_out = seconds = most = 0.0
    for keyed in todo:
        usual, weight = measured[keyed.request.kind], size(keyed.request)
        read = weight.tokens if usual is None or usual.tokens_in is None else usual.tokens_in
        written = _written(keyed, told, limits) if usual is None or usual.tokens_out is None else usual.tokens_out
        slow = written / ASSUMED_TOKENS_PER_S if usual is None or usual.seconds is None else usual.seconds
        tokens_in, tokens_out, seconds = tokens_in + read, tokens_out + written, seconds + slow
        most += budget.most(weight, limits) or 0.0
    known = sum(usual.replies for usual in measured.values() if usual)
    price, bounded = budget.price, limits.max_tokens is not None
    return Estimate(
        requests=len(todo),
        kept=kept,
        tokens_in=round(tokens_in),
        tokens_out=round(tokens_out),
        cost=round(price.of(tokens_in, tokens_out), 4) if price else None,
        cost_at_most=round(most, 4) if price and bounded else None,
        currency=currency,
        seconds=round(_with_limits(seconds / limits.concurrency, len(todo), tokens_in + tokens_out, limits), 1),
        basis=f"{known} replies kept from before" if known else ASSUMED,
    )


def _written(keyed: Keyed, told: Prompts, limits: Limits) -> float:
    kind = keyed.request.kind
    examples = [
        len(example.reply) for name, prompt in told.kinds.items() if name == kind for example in prompt.examples
    ]
    usual = sum(examples) / len(examples) / BYTES_A_TOKEN if examples else UNTOLD_TOKENS
    return min(usual, limits.max_tokens or usual)


def _with_limits(seconds: float, requests: int, tokens: float, limits: Limits) -> float:
    """The first minute's worth goes at once."""
    by_requests = (requests / limits.requests_per_minute - 1) * 60 if limits.requests_per_minute else 0.0
    by_tokens = (tokens / limits.tokens_per_minute - 1) * 60 if limits.tokens_per_minute else 0.0
    return max(seconds, by_requests, by_tokens)
