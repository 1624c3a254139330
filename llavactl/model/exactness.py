"""Which ways of computing an answer change nothing for a language model: tried on it, not looked up by its name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from llavactl.core import faults
from llavactl.model.llava import positions
from llavactl.model.packed import LIKE_LLAMA, sees_window
from llavactl.model.rotary import changes_with_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NEAR = {torch.float32: 1e-3}
"""Tolerances relative to the largest logit; what a model does wrong changes logits by tenths."""
NEAR_IN_HALF = 5e-2
LONG, SHORT, START = 9, 5, 3
"""Tokens of the two sequences that are tried, and of the beginning that they have in common."""

_LIMITS = re.compile("window|chunk|local")


@dataclass(frozen=True)
class Exact:
    """Whether logits are those of a pass over one whole sequence without a cache.

    ``cached``: token by token over a key/value cache. ``resumed``: also where several tokens follow on a cache at once.
    ``padded``: beside a longer sequence, padded on the left. ``shared``: with padding between the cache of a common
    beginning and the rest.
    """

    cached: bool = True
    resumed: bool = True
    padded: bool = True
    shared: bool = True


def exactness(language: PreTrainedModel) -> Exact:
    """What is exact for ``language``. What fails is not, whatever the reason; models like Llama are not tried."""
    limited = sees_window(language) or _has_limit(language)
    alone = bool(changes_with_length(language))
    if language.config.model_type in LIKE_LLAMA:
        return Exact(resumed=not alone, padded=not alone, shared=not limited and not alone)
    tried = _Trial(language)
    cached = tried.passes(tried.cached)
    resumed = cached and not alone and tried.passes(tried.resumed)
    padded = not alone and tried.passes(lambda: tried.padded(through_cache=cached))
    return Exact(cached, resumed, padded, resumed and padded and not limited and tried.passes(tried.shared))


def is_causal(language: PreTrainedModel) -> bool:
    """Whether the logits at a token are the same whatever comes after it."""
    if language.config.model_type in LIKE_LLAMA:
        return True
    tried = _Trial(language)
    return _near(tried.logits(tried.long[:, :SHORT]), tried.whole[:, :SHORT])


def new_cache(language: PreTrainedModel) -> Any:
    """An empty cache for ``language``, which can be shortened again unless some layers keep a state."""
    from transformers import DynamicCache

    of_its_own = DynamicCache(config=language.config)
    kinds = {type(layer).__name__ for layer in of_its_own.layers}
    # Layers with a window would forget what is before it, and could not be shortened; their masks are enough.
    return DynamicCache() if kinds <= {"DynamicLayer", "DynamicSlidingWindowLayer"} else of_its_own


def is_resumable(cache: Any) -> bool:
    """Whether ``cache`` can be shortened and continued."""
    return {type(layer).__name__ for layer in cache.layers} <= {"DynamicLayer"}


def _has_limit(language: PreTrainedModel) -> bool:
    """Whether its configuration has a number that may limit how far back a token sees.

    Some models have names of their own for it, as GPT-Neo's ``window_size``. To be wrong here costs only time.
    """
    config = language.config.get_text_config()
    if getattr(config, "layer_types", None) or config.model_type in LIKE_LLAMA:
        return False
    return any(_LIMITS.search(key) and isinstance(value, int) and value > 0 for key, value in config.to_dict().items())


class _Trial:
    """Of a language model, on two sequences of random tokens with a common beginning."""

    @torch.inference_mode()
    def __init__(self, language: PreTrainedModel) -> None:
        self.language, self.mode = language, language.training
        table = language.get_input_embeddings()
        chance = torch.Generator().manual_seed(0)
        ids = torch.randint(len(table.weight), (1, LONG), generator=chance).to(table.weight.device)
        self.long = table(ids)
        self.short = self.long[:, :SHORT]
        self.whole = self.logits(self.long)
        self.part = self.logits(self.short)

    @torch.inference_mode()
    def logits(self, embeds: torch.Tensor, mask: torch.Tensor | None = None, cache: Any = None) -> torch.Tensor:
        """Logits [B, T, V] of ``embeds`` [B, T, Dl], after ``cache``; ``mask`` is that of both."""
        where = {} if mask is None else {"attention_mask": mask.long(), "position_ids": positions(mask)}
        if mask is not None:
            where["position_ids"] = where["position_ids"][:, -embeds.shape[1] :]
        state = {"use_cache": False} if cache is None else {"use_cache": True, "past_key_values": cache}
        self.language.eval()
        try:
            found: torch.Tensor = self.language(inputs_embeds=embeds, **where, **state).logits
        finally:
            self.language.train(self.mode)
        return found

    def passes(self, rule: Callable[[], bool]) -> bool:
        """Whether ``rule`` holds; False if the model can't compute it."""
        try:
            return rule()
        except Exception as error:
            if faults.out_of_memory(error):
                raise
            return False

    def cached(self) -> bool:
        cache, mask = new_cache(self.language), self._mask(1, LONG)
        good = _near(self.logits(self.long[:, :SHORT], mask[:, :SHORT], cache)[:, -1], self.whole[:, SHORT - 1])
        for at in range(SHORT, LONG):
            found = self.logits(self.long[:, at : at + 1], mask[:, : at + 1], cache)
            good = good and _near(found[:, -1], self.whole[:, at])
        return good

    def resumed(self) -> bool:
        cache, mask = new_cache(self.language), self._mask(1, LONG)
        self.logits(self.long[:, :START], mask[:, :START], cache)
        return _near(self.logits(self.long[:, START:], mask, cache)[:, -1], self.whole[:, -1])

    def padded(self, *, through_cache: bool) -> bool:
        rows, mask = self._rows(0, LONG - 1)
        cache = new_cache(self.language) if through_cache else None
        good = self._good(self.logits(rows, mask, cache), LONG - 2)
        last = torch.cat([self.long[:, -1:], self.long[:, SHORT - 1 : SHORT]])
        mask = torch.cat([mask, self._mask(2, 1)], dim=1)
        if cache is None:
            return good and self._good(self.logits(torch.cat([rows, last], dim=1), mask), LONG - 1)
        return good and self._good(self.logits(last, mask, cache), LONG - 1)

    def shared(self) -> bool:
        cache = new_cache(self.language)
        self.logits(self.long[:, :START], None, cache)
        cache.batch_repeat_interleave(2)
        rows, mask = self._rows(START, LONG)
        return self._good(self.logits(rows, torch.cat([self._mask(2, START), mask], dim=1), cache), LONG - 1)

    def _rows(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The long sequence from ``start`` to ``end``, and as much less of the short one, padded on the left."""
        short = self.short[:, start : SHORT - (LONG - end)]
        pad = end - start - short.shape[1]
        mask = self._mask(2, end - start)
        mask[1, :pad] = False
        return torch.cat([self.long[:, start:end], torch.cat([self.long[:, :pad], short], dim=1)]), mask

    def _good(self, logits: torch.Tensor, at: int) -> bool:
        """Whether the last ``logits`` [2, T, V] are those of the long sequence at ``at``, and of the short one."""
        return _near(logits[:1, -1], self.whole[:, at]) and _near(logits[1:, -1], self.part[:, SHORT - LONG + at])

    def _mask(self, rows: int, length: int) -> torch.Tensor:
        return torch.ones(rows, length, dtype=torch.bool, device=self.long.device)


def _near(one: torch.Tensor, other: torch.Tensor) -> bool:
    near = NEAR.get(other.dtype, NEAR_IN_HALF)
    return float((one - other).abs().max()) <= near * float(other.abs().max())
