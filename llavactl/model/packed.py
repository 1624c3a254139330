"""Lets a language model of transformers process packed sequences, on any device.

Each conversation attends only to itself, and a prefix that several conversations share is computed once. Attention
itself is in ``cpu.block_attention`` and ``cuda.varlen_attention``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from llavactl.core.schema import Batch, Span
from llavactl.model.cpu import block_attention
from llavactl.model.cuda import varlen_attention
from llavactl.model.last_layer import selective_last_layer
from llavactl.model.rotary import length_dependent_rope

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

ATTENTION = "llavactl-packed"
"""The name under which ``attend`` is registered as an attention function of transformers."""

PACKABLE_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose attention is determined by the arguments of the attention function, and whose logits are the output
of their head without scaling or soft caps.
"""


class PackedLayout:
    """The spans of a packed sequence, and index tensors that are computed once per batch, not in every layer."""

    def __init__(self, spans: Sequence[Span], device: torch.device) -> None:
        self.spans = spans
        self.device = device

    @cached_property
    def positions(self) -> torch.Tensor:
        """The position [1, T] of each token in its conversation."""
        return _positions(self.spans)[None].to(self.device)

    @cached_property
    def predictors(self) -> torch.Tensor:
        """For each token the index [T] whose output predicts it: that of the previous token of its conversation."""
        return _predictors(self.spans).to(self.device)

    @cached_property
    def blocks(self) -> block_attention.BlockLayout:
        return block_attention.BlockLayout(self.spans)

    @cached_property
    def varlen(self) -> varlen_attention.VarlenLayout:
        return varlen_attention.varlen_layout(self.spans, self.device)


def packed_layout(batch: Batch) -> PackedLayout | None:
    """The layout of a packed batch; None for a padded one."""
    return PackedLayout(batch.spans, batch.ids.device) if batch.spans else None


def packing_blocker(language: PreTrainedModel) -> str:
    """Why packing is not exact for ``language``; "" if it is."""
    config = language.config
    if config.model_type not in PACKABLE_MODEL_TYPES:
        return f"sequence packing is not supported for model type {config.model_type}"
    if has_limited_attention(language):
        return f"it uses sliding-window attention (window: {getattr(config, 'sliding_window', None) or 'unknown'})"
    if getattr(config, "attention_dropout", 0):
        return "it uses attention dropout"
    if kind := length_dependent_rope(language):
        return f"its position embeddings ({kind}) depend on the length of the whole sequence"
    return ""


def has_limited_attention(language: PreTrainedModel) -> bool:
    """Whether some layer of ``language`` doesn't attend to all earlier tokens (sliding window, chunks, or a state).

    Padding between tokens would change the result of such a layer, so it must be to the left of all tokens.
    """
    config = language.config.get_text_config()
    if layer_types := set(getattr(config, "layer_types", None) or ()):
        return layer_types != {"full_attention"}
    limits = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return any(limits) and bool(getattr(config, "use_sliding_window", True))


@contextmanager
def packed_attention(language: PreTrainedModel) -> Iterator[None]:
    """In this context ``language`` accepts only packed sequences, with ``packed_layout`` as a keyword argument.

    With ``output_indices`` its last layer is computed only at these positions; see ``selective_last_layer``. The
    context must enclose the backward pass as well: with gradient checkpointing it computes attention again.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attend)
    config = language.config
    previous, config._attn_implementation = config._attn_implementation, ATTENTION
    try:
        with selective_last_layer(language):
            yield
    finally:
        config._attn_implementation = previous


def _positions(spans: Sequence[Span]) -> torch.Tensor:
    starts = [0 if span.after is None else spans[span.after].length for span in spans]
    return torch.cat([torch.arange(start, start + span.length) for start, span in zip(starts, spans, strict=True)])


def _predictors(spans: Sequence[Span]) -> torch.Tensor:
    ends = list(accumulate(span.length for span in spans))
    previous = torch.arange(ends[-1]) - 1
    for index, span in enumerate(spans):
        if span.after is not None and span.length:
            previous[ends[index] - span.length] = ends[span.after] - 1
    return previous


def attend(
    _module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: torch.Tensor | None,
    scaling: float,
    *,
    packed_layout: PackedLayout,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, H, T, D], key and value [1, Hk, T, D] to [1, T, H, D]: an attention function of transformers."""
    if uses_varlen_kernel(query):
        return varlen_attention.attention(query[0], key[0], value[0], packed_layout.varlen, scaling)[None], None
    return block_attention.attention(query[0], key[0], value[0], packed_layout.blocks, scaling)[None], None


def uses_varlen_kernel(query: torch.Tensor) -> bool:
    """Whether attention uses torch's kernel for variable lengths, which has no implementation for CPUs and float32."""
    return query.is_cuda and query.dtype != torch.float32
