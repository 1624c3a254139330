"""Attention over a packed row as a CPU likes it: a few matrix products for each block of tokens with the same keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from llavactl.core.schema import Span

SHORT = 1024
"""Up to so many queries matrix products are what a CPU does; beyond it their memory is too much, which grows as T².

Measured forward and backward, 9 heads of 64, bfloat16, one thread: 120 queries 0.7 ms against 2.8 of torch's fused
attention, 330: 11 against 20, 924: 60 against 90; 30 behind a prefix of 576: 0.7 against 2.4.
"""

CROWD = 512
"""Up to so many tokens of spans behind the same one are a block: what they would not see of each other costs less to
compute and hide than a product for each. Twelve questions of 22 tokens behind a picture of 80: a training step of
SmolLM2-135M took 10 % less.
"""


@dataclass(frozen=True)
class Block:
    """Tokens side by side with the same keys: a span, or several that go on from the same one.

    ``lengths`` are those of its spans, ``after`` is the number of the block that they go on from.
    """

    lengths: tuple[int, ...]
    after: int | None

    @property
    def length(self) -> int:
        return sum(self.lengths)


class Layout:
    """The spans of a packed row, and what attention works out from them: once a forward, not in every layer."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self.spans = spans
        self.blocks = _blocks(spans)
        self._hidden: dict[tuple[int, torch.dtype], list[torch.Tensor | None]] = {}

    def hidden(self, like: torch.Tensor, heads: int) -> list[torch.Tensor | None]:
        """For each block [``heads`` * S, K]: minus infinity where a query doesn't see a key, else 0, as ``like``.

        A block of more than ``SHORT`` queries has [S, K], or None where it is all of its keys.
        """
        key = (heads, like.dtype)
        if key not in self._hidden:
            self._hidden[key] = [
                None
                if block.after is None and block.length > SHORT
                else like.new_zeros(mask.shape)
                .masked_fill_(mask, float("-inf"))
                .repeat(heads if len(mask) <= SHORT else 1, 1)
                for block, mask in ((block, self._mask(block, like.device)) for block in self.blocks)
            ]
        return self._hidden[key]

    def _mask(self, block: Block, device: torch.device) -> torch.Tensor:
        """[S, K], true where a query doesn't see a key: what comes later, and what is of another span of the block."""
        before = 0 if block.after is None else self.blocks[block.after].length
        lengths = torch.tensor(block.lengths, device=device)
        begins = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        places = torch.arange(block.length, device=device)
        keys = torch.arange(-before, block.length, device=device)
        return (keys > places[:, None]) | ((keys >= 0) & (keys < begins[:, None]))


def _blocks(spans: Sequence[Span]) -> list[Block]:
    found: list[Block] = []
    number: list[int] = []
    for span in spans:
        after = None if span.after is None else number[span.after]
        last = found[-1] if found else None
        if last is not None and after is not None and last.after == after and last.length + span.length <= CROWD:
            found[-1] = replace(last, lengths=(*last.lengths, span.length))
        else:
            found.append(Block((span.length,), after))
        number.append(len(found) - 1)
    return found


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scaling: float
) -> torch.Tensor:
    """query [H, T, D], key and value [Hk, T, D] to [T, H, D]."""
    # Split, not sliced: the backward of a slice fills a whole row with zeros, once a block.
    lengths = [block.length for block in layout.blocks]
    queries, keys, values = (tensor.split(lengths, dim=1) for tensor in (query, key, value))
    hidden = layout.hidden(query, len(query) // len(key))
    seen = []
    for at, block in enumerate(layout.blocks):
        k, v = keys[at], values[at]
        if block.after is not None:
            k, v = torch.cat([keys[block.after], k], dim=1), torch.cat([values[block.after], v], dim=1)
        mask = hidden[at]
        if mask is None or block.length > SHORT:
            seen.append(_fused(queries[at], k, v, mask, scaling))
        else:
            seen.append(_products(queries[at], k, v, mask, scaling))
    return torch.cat(seen, dim=1).transpose(0, 1).contiguous()


def _products(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor, scaling: float) -> torch.Tensor:
    """q [H, S, D], k, v [Hk, K, D]. Heads with the same keys are one taller matrix: no key is copied."""
    heads, length, width = q.shape
    scores = torch.baddbmm(hidden, q.reshape(len(k), -1, width), k.transpose(1, 2), alpha=scaling)
    return torch.bmm(scores.softmax(-1), v).view(heads, length, width)


def _fused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    return functional.scaled_dot_product_attention(
        q[None], k[None], v[None], attn_mask=hidden, is_causal=hidden is None, scale=scaling, enable_gqa=True
    )[0]
