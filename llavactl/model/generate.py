"""Generates answers token by token with a key/value cache."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from llavactl.core.errors import ModelError
from llavactl.model.exactness import is_resumable, new_cache
from llavactl.model.inputs import image_features
from llavactl.model.llava import positions
from llavactl.model.rotary import frequency_key

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llavactl.core.schema import Batch
    from llavactl.model.llava import LlavaModel


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 is greedy decoding."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


GREEDY = Sampling()


@torch.inference_mode()
def prefill(model: LlavaModel, batch: Batch) -> Any:
    """Processes ``batch``, which must not be padded, and returns its key/value cache."""
    cache = new_cache(model.language)
    embeds = model.embed(batch.ids, image_features(batch))
    model.language(inputs_embeds=embeds, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def mask_and_state(batch: Batch, cache: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """The mask of ``batch`` with the tokens of ``cache`` before it, and the language model's arguments for ``cache``.

    ``cache`` may be None.
    """
    if cache is None:
        return batch.mask, {"use_cache": False}
    mask = batch.mask
    # A cache that consists of recurrent states only has no sequence length.
    if past := cache.get_seq_length() if is_resumable(cache) else 0:
        mask = torch.cat([mask.new_ones(len(mask), past), mask], dim=1)
    return mask, {"use_cache": True, "past_key_values": cache}


@torch.inference_mode()
def generate(
    model: LlavaModel,
    batch: Batch,
    sampling: Sampling,
    stop: Collection[int],
    cache: Any = None,
    *,
    cached: bool = True,
) -> Iterator[list[int | None]]:
    """Yields the next token of each conversation in ``batch`` (left-padded [B, T]), or None once it has stopped.

    ``cache`` (a transformers ``Cache``) holds the tokens before ``batch``; it is extended by all tokens but the last
    generated one. With ``cached=False``, every step processes the complete sequence without a cache. The complete
    sequence is also processed again at steps where position frequencies change (see ``frequency_key``).
    """
    if cached and cache is None:
        cache = new_cache(model.language)
    mask, state = mask_and_state(batch, cache if cached else None)
    generator = torch.Generator(device=batch.ids.device).manual_seed(sampling.seed)
    embeds = sequence = model.embed(batch.ids, image_features(batch))
    frequencies = frequency_key(model.language, mask.shape[1])
    running = [True] * len(batch.ids)
    for _ in range(sampling.max_new_tokens):
        chosen = next_tokens(last_logits(model.language, embeds, mask, state), sampling, generator)
        tokens = chosen.tolist()
        running = [is_running and token not in stop for is_running, token in zip(running, tokens, strict=True)]
        yield [token if is_running else None for is_running, token in zip(running, tokens, strict=True)]
        if not any(running):
            return
        new = model.embed(chosen[:, None], None)
        sequence = torch.cat([sequence, new], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        previous, frequencies = frequencies, frequency_key(model.language, mask.shape[1])
        embeds = new if cached and frequencies == previous else sequence
        if cached and frequencies != previous:
            state["past_key_values"] = new_cache(model.language)


def last_logits(
    language: PreTrainedModel, embeds: torch.Tensor, mask: torch.Tensor, state: Mapping[str, Any]
) -> torch.Tensor:
    """Logits [B, V] float32 at the last token of ``embeds`` [B, T, Dl], left-padded.

    ``mask`` covers the tokens in the cache of ``state`` (see ``mask_and_state``) and ``embeds``.
    """
    output = language(
        inputs_embeds=embeds,
        attention_mask=mask.long(),
        position_ids=positions(mask)[:, -embeds.shape[1] :],
        logits_to_keep=1,
        **state,
    )
    logits: torch.Tensor = output.logits[:, -1].float()
    return logits


def next_tokens(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """The next tokens [B] from logits [B, V]: greedy, or sampled with temperature and nucleus (``top_p``) sampling."""
    if not torch.isfinite(logits).all():
        raise ModelError("the model's logits are not finite", hint="use bfloat16 or float32; the weights may be broken")
    if sampling.temperature <= 0:
        return logits.argmax(-1)
    # Stable: equal logits, which are common in bfloat16, are in the order of token ids however they were computed.
    probabilities, tokens = (logits / sampling.temperature).softmax(-1).sort(descending=True, stable=True)
    outside = probabilities.cumsum(-1) - probabilities >= sampling.top_p
    sampled = torch.multinomial(probabilities.masked_fill(outside, 0), 1, generator=generator)
    return tokens.gather(-1, sampled)[:, 0]
