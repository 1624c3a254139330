"""Attention over packed rows: each conversation sees itself alone, and what several begin with is computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.nn import functional

from llavactl.core.schema import Span
from llavactl.model.last_layer import narrowed

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

ATTENTION = "llavactl-packed"
"""The name that ``attend`` has among transformers' attention functions."""

LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3")
"""Model types that hand their attention all that decides it, and whose logits are their head's and nothing more."""

SHORT = 1024
"""Up to so many queries matrix products are what a CPU does; beyond it their memory is too much, which grows as T².

Measured forward and backward, 9 heads of 64, bfloat16, one thread: 120 queries 0.7 ms against 2.8 of torch's fused
attention, 330: 11 against 20, 924: 60 against 90; 30 behind a prefix of 576: 0.7 against 2.4.
"""


def refusal(language: PreTrainedModel) -> str:
    """Why rows for ``language`` can't be packed exactly; "" where they can."""
    config = language.config
    if config.model_type not in LIKE_LLAMA:
        return f"attention of {config.model_type} models is not known to be Llama's"
    if (window := getattr(config, "sliding_window", None)) is not None:
        return f"its attention sees a window of {window} tokens"
    if getattr(config, "attention_dropout", 0):
        return "it has dropout within its attention"
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind in ("dynamic", "longrope"):
        return f"its position embeddings ({kind}) change with the length of the whole row"
    return ""


@contextmanager
def packed_attention(language: PreTrainedModel) -> Iterator[None]:
    """While this lasts, ``language`` takes packed rows, and nothing else; with ``places`` its last layer is narrowed.

    Around a whole run, not a forward: with gradient checkpointing the backward pass attends once more.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attend)
    config = language.config
    before, config._attn_implementation = config._attn_implementation, ATTENTION
    try:
        with narrowed(language):
            yield
    finally:
        config._attn_implementation = before


def span_positions(spans: Sequence[Span], device: torch.device) -> torch.Tensor:
    """The position [1, T] of each token in its own conversation."""
    starts = [0 if span.after is None else spans[span.after].length for span in spans]
    each = [torch.arange(at, at + span.length, device=device) for at, span in zip(starts, spans, strict=True)]
    return torch.cat(each)[None]


def predictors(spans: Sequence[Span], device: torch.device) -> torch.Tensor:
    """For each token of the row the place [T] whose output predicts it: the one before it in its conversation."""
    ends = _ends(spans)
    before = torch.arange(ends[-1], device=device) - 1
    for at, span in enumerate(spans):
        if span.after is not None and span.length:
            before[ends[at] - span.length] = ends[span.after] - 1
    return before


def attend(
    _module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: torch.Tensor | None,
    scaling: float,
    *,
    spans: Sequence[Span],
    chosen: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, H, T, D], key and value [1, Hk, T, D] to [1, T, H, D], called as transformers calls its own.

    With ``chosen`` [N], rising, only these tokens look; what the others have instead of an answer means nothing.
    """
    if query.is_cuda and query.dtype != torch.float32:
        return _varlen(query[0], key[0], value[0], spans, scaling)[None], None
    return _span_by_span(query[0], key[0], value[0], spans, scaling, chosen)[None], None


def _span_by_span(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: Sequence[Span],
    scaling: float,
    chosen: torch.Tensor | None = None,
) -> torch.Tensor:
    """[H, T, D] to [T, H, D]."""
    lengths = [span.length for span in spans]
    # Split, not sliced: the backward of a slice fills a whole row with zeros, once a span.
    keys, values = (tensor.split(lengths, dim=1) for tensor in (key, value))
    looking = query if chosen is None else query.index_select(1, chosen)
    rows = _rows(spans, chosen, query.device)
    queries = looking.split([len(each) for each in rows], dim=1)
    seen = []
    for at, span in enumerate(spans):
        k, v = keys[at], values[at]
        if span.after is not None:
            k, v = torch.cat([keys[span.after], k], dim=1), torch.cat([values[span.after], v], dim=1)
        later = _later(rows[at] + (k.shape[1] - span.length), k.shape[1], query)
        seen.append((_products if len(rows[at]) <= SHORT else _fused)(queries[at], k, v, later, scaling))
    found = torch.cat(seen, dim=1)
    if chosen is not None:
        found = torch.zeros_like(query).index_copy(1, chosen, found)
    return found.transpose(0, 1).contiguous()


def _rows(spans: Sequence[Span], chosen: torch.Tensor | None, device: torch.device) -> Sequence[torch.Tensor]:
    """Which tokens of each span look, counted from its beginning."""
    if chosen is None:
        return [torch.arange(span.length, device=device) for span in spans]
    bounds = torch.tensor([0, *_ends(spans)], device=device)
    counts = torch.searchsorted(chosen, bounds).diff()
    return (chosen - bounds[:-1].repeat_interleave(counts)).split(counts.tolist())


def _products(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, later: torch.Tensor, scaling: float) -> torch.Tensor:
    """q [H, S, D], k, v [Hk, K, D], later [S, K]. Heads with the same keys are one taller matrix: no key is copied."""
    heads, length, width = q.shape
    scores = torch.baddbmm(
        later.repeat(heads // len(k), 1), q.reshape(len(k), -1, width), k.transpose(1, 2), alpha=scaling
    )
    return torch.bmm(scores.softmax(-1), v).view(heads, length, width)


def _fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, later: torch.Tensor, scaling: float) -> torch.Tensor:
    whole = q.shape[1] == k.shape[1]
    return functional.scaled_dot_product_attention(
        q[None], k[None], v[None], attn_mask=None if whole else later, is_causal=whole, scale=scaling, enable_gqa=True
    )[0]


def _later(places: torch.Tensor, keys: int, like: torch.Tensor) -> torch.Tensor:
    """[S, K]: minus infinity where a key comes after its query, which is at ``places`` [S] among the keys, else 0."""
    beyond = torch.arange(keys, device=like.device) > places[:, None]
    return like.new_zeros(beyond.shape).masked_fill_(beyond, float("-inf"))


def _varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Sequence[Span], scaling: float
) -> torch.Tensor:
    """[H, T, D] to [T, H, D] in one CUDA kernel, each span's keys behind a copy of those it goes on from.

    It takes half precision alone. Never run on a device yet (tests/gpu), so no recipe gets it without asking.
    """
    from torch.nn.attention.varlen import varlen_attn

    ends = _ends(spans)
    gathered: list[int] = []
    bounds = [0]
    for at, span in enumerate(spans):
        for part in [at] if span.after is None else [span.after, at]:
            gathered.extend(range(ends[part] - spans[part].length, ends[part]))
        bounds.append(len(gathered))
    chosen = torch.tensor(gathered, device=query.device)
    seen = varlen_attn(
        query.transpose(0, 1).contiguous(),
        key.transpose(0, 1)[chosen],
        value.transpose(0, 1)[chosen],
        torch.tensor([0, *ends], dtype=torch.int32, device=query.device),
        torch.tensor(bounds, dtype=torch.int32, device=query.device),
        max(span.length for span in spans),
        max(stop - start for start, stop in pairwise(bounds)),
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=True,
    )
    return cast(torch.Tensor, seen)


def _ends(spans: Sequence[Span]) -> list[int]:
    return list(accumulate(span.length for span in spans))
