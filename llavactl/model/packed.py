"""Attention over packed rows: each conversation sees itself alone, and what several begin with is computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, cast

import torch

from llavactl.core.schema import Span
from llavactl.model.cpu import block_attention as blocks
from llavactl.model.cpu.block_attention import Layout
from llavactl.model.cpu.last_layer import narrowed
from llavactl.model.rotary import changes_with_length

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

ATTENTION = "llavactl-packed"
"""The name that ``attend`` has among transformers' attention functions."""

LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3")
"""Model types that hand their attention all that decides it, and whose logits are their head's and nothing more."""


def packing_blocker(language: PreTrainedModel) -> str:
    """Why rows for ``language`` can't be packed exactly; "" where they can."""
    config = language.config
    if config.model_type not in LIKE_LLAMA:
        return f"attention of {config.model_type} models is not known to be Llama's"
    if sees_window(language):
        return f"it uses sliding-window attention (window: {getattr(config, 'sliding_window', None) or 'unknown'})"
    if getattr(config, "attention_dropout", 0):
        return "it has dropout within its attention"
    if kind := changes_with_length(language):
        return f"its position embeddings ({kind}) change with the length of the whole row"
    return ""


def sees_window(language: PreTrainedModel) -> bool:
    """Whether some layer of ``language`` doesn't attend to all earlier tokens (sliding window, chunks, or a state).

    Padding between tokens would then change the result: it must be to the left of all tokens.
    """
    config = language.config.get_text_config()
    if kinds := set(getattr(config, "layer_types", None) or ()):
        return kinds != {"full_attention"}
    limits = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return any(limits) and bool(getattr(config, "use_sliding_window", True))


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
    layout: Layout,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, H, T, D], key and value [1, Hk, T, D] to [1, T, H, D], called as transformers calls its own."""
    if query.is_cuda and query.dtype != torch.float32:
        return _varlen(query[0], key[0], value[0], layout.spans, scaling)[None], None
    return blocks.attention(query[0], key[0], value[0], layout, scaling)[None], None


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
