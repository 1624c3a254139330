"""Determines by test runs which inference optimizations leave a language model's logits unchanged."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from llavactl.core.library_errors import out_of_memory
from llavactl.model.llava import positions
from llavactl.model.packed import PACKABLE_MODEL_TYPES, has_limited_attention
from llavactl.model.rotary import length_dependent_rope

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCES = {torch.float32: 1e-3}
"""Relative to the largest logit. Inexact optimizations change logits by tenths of the largest one."""
HALF_PRECISION_TOLERANCE = 5e-2
LONG, SHORT, START = 9, 5, 3
"""The lengths of the two test sequences, and of their common prefix."""

_WINDOW_KEYS = re.compile("window|chunk|local")


@dataclass(frozen=True)
class Exact:
    """Whether logits are the same as in one forward pass over the unpadded sequence without a cache.

    ``cached``: token by token with a key/value cache. ``resumed``: several tokens at once after a cache. ``padded``:
    left-padded, in a batch with a longer sequence. ``shared``: with padding between the cache of a common prefix
    and the rest. ``joined``: token by token in a batch that other sequences join and leave (``Rows``).
    """

    cached: bool = True
    resumed: bool = True
    padded: bool = True
    shared: bool = True
    joined: bool = True


def exactness(language: PreTrainedModel) -> Exact:
    """What is exact for ``language``; an exception means not exact. Packable (Llama-like) models need no test run."""
    windowed = has_limited_attention(language) or _may_have_window(language)
    length_bound = bool(length_dependent_rope(language))
    if language.config.model_type in PACKABLE_MODEL_TYPES:
        shared = not windowed and not length_bound
        return Exact(resumed=not length_bound, padded=not length_bound, shared=shared, joined=not length_bound)
    probe = _LanguageProbe(language)
    cached = probe.passes(probe.cached)
    resumed = cached and not length_bound and probe.passes(probe.resumed)
    padded = not length_bound and probe.passes(lambda: probe.padded(through_cache=cached))
    shared = resumed and padded and not windowed and probe.passes(probe.shared)
    return Exact(cached, resumed, padded, shared, joined=cached and padded and probe.passes(probe.joined))


def is_causal(language: PreTrainedModel) -> bool:
    """Whether the logits at a token don't depend on later tokens."""
    if language.config.model_type in PACKABLE_MODEL_TYPES:
        return True
    probe = _LanguageProbe(language)
    return _close(probe.logits(probe.long[:, :SHORT]), probe.long_logits[:, :SHORT])


def new_cache(language: PreTrainedModel) -> Any:
    """An empty cache for ``language``; it can be cropped unless it contains recurrent states."""
    from transformers import DynamicCache

    configured = DynamicCache(config=language.config)
    kinds = {type(layer).__name__ for layer in configured.layers}
    # Sliding-window layers would drop earlier tokens and couldn't be cropped; attention masks suffice.
    return DynamicCache() if kinds <= {"DynamicLayer", "DynamicSlidingWindowLayer"} else configured


def is_resumable(cache: Any) -> bool:
    """Whether ``cache`` can be cropped and continued."""
    return {type(layer).__name__ for layer in cache.layers} <= {"DynamicLayer"}


def truncate(cache: Any, length: int) -> None:
    """Keeps ``length`` tokens of the resumable ``cache``, even if an interrupted step left its layers uneven."""
    for layer in cache.layers:
        if layer.get_seq_length() > length:
            layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]


def _may_have_window(language: PreTrainedModel) -> bool:
    """Whether an integer in its configuration may limit how far back a token attends.

    Some model types have a custom key, like ``window_size`` of GPT-Neo. A false positive only costs time.
    """
    config = language.config.get_text_config()
    if getattr(config, "layer_types", None) or config.model_type in PACKABLE_MODEL_TYPES:
        return False
    return any(
        _WINDOW_KEYS.search(key) and isinstance(value, int) and value > 0 for key, value in config.to_dict().items()
    )


class _LanguageProbe:
    """Runs a language model on two sequences of random tokens with a common prefix."""

    @torch.inference_mode()
    def __init__(self, language: PreTrainedModel) -> None:
        self.language, self.mode = language, language.training
        table = language.get_input_embeddings()
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(len(table.weight), (1, LONG), generator=generator).to(table.weight.device)
        self.long = table(ids)
        self.short = self.long[:, :SHORT]
        self.long_logits = self.logits(self.long)
        self.short_logits = self.logits(self.short)

    @torch.inference_mode()
    def logits(self, embeds: torch.Tensor, mask: torch.Tensor | None = None, cache: Any = None) -> torch.Tensor:
        """Logits [B, T, V] of ``embeds`` [B, T, Dl] after ``cache``; ``mask`` covers both."""
        inputs = {} if mask is None else {"attention_mask": mask.long(), "position_ids": positions(mask)}
        if mask is not None:
            inputs["position_ids"] = inputs["position_ids"][:, -embeds.shape[1] :]
        state = {"use_cache": False} if cache is None else {"use_cache": True, "past_key_values": cache}
        self.language.eval()
        try:
            logits: torch.Tensor = self.language(inputs_embeds=embeds, **inputs, **state).logits
        finally:
            self.language.train(self.mode)
        return logits

    def passes(self, rule: Callable[[], bool]) -> bool:
        """Whether ``rule`` holds; False if the model raises."""
        try:
            return rule()
        except Exception as error:
            if out_of_memory(error):
                raise
            return False

    def cached(self) -> bool:
        cache, mask = new_cache(self.language), self._mask(1, LONG)
        equal = _close(self.logits(self.long[:, :SHORT], mask[:, :SHORT], cache)[:, -1], self.long_logits[:, SHORT - 1])
        for at in range(SHORT, LONG):
            logits = self.logits(self.long[:, at : at + 1], mask[:, : at + 1], cache)
            equal = equal and _close(logits[:, -1], self.long_logits[:, at])
        return equal

    def resumed(self) -> bool:
        cache, mask = new_cache(self.language), self._mask(1, LONG)
        self.logits(self.long[:, :START], mask[:, :START], cache)
        return _close(self.logits(self.long[:, START:], mask, cache)[:, -1], self.long_logits[:, -1])

    def padded(self, *, through_cache: bool) -> bool:
        rows, mask = self._rows(0, LONG - 1)
        cache = new_cache(self.language) if through_cache else None
        equal = self._last_equal(self.logits(rows, mask, cache), LONG - 2)
        last = torch.cat([self.long[:, -1:], self.long[:, SHORT - 1 : SHORT]])
        mask = torch.cat([mask, self._mask(2, 1)], dim=1)
        if cache is None:
            return equal and self._last_equal(self.logits(torch.cat([rows, last], dim=1), mask), LONG - 1)
        return equal and self._last_equal(self.logits(last, mask, cache), LONG - 1)

    def shared(self) -> bool:
        cache = new_cache(self.language)
        self.logits(self.long[:, :START], None, cache)
        cache.batch_repeat_interleave(2)
        rows, mask = self._rows(START, LONG)
        return self._last_equal(self.logits(rows, torch.cat([self._mask(2, START), mask], dim=1), cache), LONG - 1)

    def joined(self) -> bool:
        """A longer sequence joins a shorter one, which ends first."""
        from llavactl.model.rows import Rows

        if not is_resumable(new_cache(self.language)):
            return False
        rows = Rows(self.language)
        rows.add(rows.prefill(self.short[:, :-1]))
        rows.add(rows.prefill(self.long[:, :-2]))
        rows.extend(torch.cat([self.short[:, -1:], self.long[:, -2:-1]]))
        equal = _close(rows.logits[:1], self.short_logits[:, -1]) and _close(rows.logits[1:], self.long_logits[:, -2])
        rows.keep([1])
        rows.extend(self.long[:, -1:])
        return equal and _close(rows.logits, self.long_logits[:, -1])

    def _rows(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The long sequence from ``start`` to ``end``, and the short one, left-padded, cut equally far from its end."""
        short = self.short[:, start : SHORT - (LONG - end)]
        pad = end - start - short.shape[1]
        mask = self._mask(2, end - start)
        mask[1, :pad] = False
        return torch.cat([self.long[:, start:end], torch.cat([self.long[:, :pad], short], dim=1)]), mask

    def _last_equal(self, logits: torch.Tensor, at: int) -> bool:
        """Whether the last ``logits`` [2, T, V] match the long sequence at ``at``, and the short one, aligned right."""
        short = self.short_logits[:, SHORT - LONG + at]
        return _close(logits[:1, -1], self.long_logits[:, at]) and _close(logits[1:, -1], short)

    def _mask(self, rows: int, length: int) -> torch.Tensor:
        return torch.ones(rows, length, dtype=torch.bool, device=self.long.device)


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    tolerance = TOLERANCES.get(other.dtype, HALF_PRECISION_TOLERANCE)
    return float((one - other).abs().max()) <= tolerance * float(other.abs().max())
