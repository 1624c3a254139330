"""Compiled decoding: one step with a key/value cache of fixed size, which runs as a CUDA graph on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch

from llavactl.model.generate import Sampling, last_logits, mask_and_state, next_tokens
from llavactl.model.inputs import image_features
from llavactl.model.packed import packing_blocker

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llavactl.core.schema import Batch
    from llavactl.model.llava import LlavaModel

MIN_SIZE = 1024
"""Tokens; a cache that is too small is replaced by a larger one, and the step is compiled again."""


def compile_blocker(language: PreTrainedModel) -> str:
    """Why decoding of ``language`` can't be compiled; "" if it can.

    A cache of fixed size is exact for models that can be packed: they attend to all earlier tokens.
    """
    if getattr(language, "is_quantized", False) or getattr(language.config, "quantization_config", None):
        return "its weights are quantized"
    reason = packing_blocker(language)
    return reason.replace("sequence packing", "compiled decoding")


class CompiledDecoder:
    """Computes the logits of one conversation token by token."""

    def __init__(self, language: PreTrainedModel, compiler: Callable[..., Any] | None = None) -> None:
        """``compiler`` replaces ``torch.compile`` in the mode that uses CUDA graphs."""
        self.language = language
        compiler = compiler or (lambda step: torch.compile(step, mode="reduce-overhead", fullgraph=True, dynamic=False))
        self._compiled = compiler(self._logits)
        self._static: Any = None

    def load(self, cache: Any, tokens: int) -> None:
        """Copies the keys and values of the dynamic ``cache``; there is room for ``tokens`` more."""
        length = cache.get_seq_length()
        if self._static is None or self._static.layers[0].max_cache_len < length + tokens:
            self._static = self._new_cache(cache, length + tokens)
        for static, layer in zip(self._static.layers, cache.layers, strict=True):
            static.keys[:, :, :length].copy_(layer.keys)
            static.values[:, :, :length].copy_(layer.values)
            static.cumulative_length.fill_(length)

    def logits(self, embeds: torch.Tensor) -> torch.Tensor:
        """Logits [1, V] float32 after the next token, whose embedding is ``embeds`` [1, 1, Dl]."""
        torch.compiler.cudagraph_mark_step_begin()
        logits: torch.Tensor = self._compiled(embeds).float().clone()  # the next step overwrites it
        return logits

    def store(self, cache: Any, length: int) -> None:
        """Copies the first ``length`` keys and values back to the dynamic ``cache``."""
        for static, layer in zip(self._static.layers, cache.layers, strict=True):
            layer.keys = static.keys[:, :, :length].clone()
            layer.values = static.values[:, :, :length].clone()

    def _logits(self, embeds: torch.Tensor) -> torch.Tensor:
        output = self.language(inputs_embeds=embeds, past_key_values=self._static, use_cache=True)
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def _new_cache(self, cache: Any, tokens: int) -> Any:
        from transformers import StaticCache

        size = MIN_SIZE
        while size < tokens:
            size *= 2
        static = StaticCache(self.language.config, max_cache_len=size)
        for layer, dynamic in zip(static.layers, cache.layers, strict=True):
            layer.lazy_initialization(dynamic.keys[:, :, :1], dynamic.values[:, :, :1])
        return static


@torch.inference_mode()
def generate_compiled(
    decoder: CompiledDecoder,
    model: LlavaModel,
    batch: Batch,
    sampling: Sampling,
    stop: Collection[int],
    cache: Any,
) -> Iterator[list[int | None]]:
    """As ``generate`` for a single conversation; only the prompt is processed without ``decoder``.

    ``cache`` has its final state when the iterator ends or is closed.
    """
    mask, state = mask_and_state(batch, cache)
    generator = torch.Generator(device=batch.ids.device).manual_seed(sampling.seed)
    logits = last_logits(model.language, model.embed(batch.ids, image_features(batch)), mask, state)
    length = cache.get_seq_length()
    decoder.load(cache, sampling.max_new_tokens)
    try:
        for remaining in reversed(range(sampling.max_new_tokens)):
            chosen = next_tokens(logits, sampling, generator)
            token = int(chosen)
            yield [None if token in stop else token]
            if token in stop or not remaining:
                return
            logits = decoder.logits(model.embed(chosen[:, None], None))
            length += 1
    finally:
        decoder.store(cache, length)
