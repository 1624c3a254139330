"""The generation config of an export: the model's end tokens, and greedy decoding."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llavactl.components.templates.stop_criteria import stop_criteria
from llavactl.core.registry import registry

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

KEPT = ("bos_token_id", "decoder_start_token_id", "max_length", "max_new_tokens", "use_cache", "cache_implementation")
"""Settings of the language model that don't affect which token is chosen."""

OWN = ("eos_token_id", "pad_token_id", "do_sample")


def generation_config(
    language: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, description: Mapping[str, Any]
) -> GenerationConfig:
    """The generation config of ``language``, with its own end tokens and those of the model's template.

    Settings other than greedy decoding (sampling, a repetition penalty) are left out and logged: with them, other
    programs would give other answers than llavactl. Stop strings are left out as well: with them, ``generate`` requires
    the tokenizer, which neither transformers' pipeline nor its server passes.
    """
    from transformers import GenerationConfig

    before: dict[str, Any] = language.generation_config.to_diff_dict() if language.generation_config else {}
    ends, texts = _stops(tokenizer, description)
    for text in texts:
        log.warning(
            "the stop string %r is not a single token and isn't stored in generation_config.json: in other programs, "
            "pass it as in `generate(…, stop_strings=[%r], tokenizer=processor.tokenizer)`",
            text,
            text,
        )
    own = before.get("eos_token_id")
    said = {key for key, value in before.items() if value not in (None, False)}
    if dropped := sorted(said - {*KEPT, *OWN, "transformers_version", "_from_model_config"}):
        log.info("the export uses greedy decoding; generation settings left out: %s", ", ".join(dropped))
    return GenerationConfig(
        **{key: before[key] for key in KEPT if key in before},
        eos_token_id=sorted(ends.union([own] if isinstance(own, int) else own or ())),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else before.get("pad_token_id"),
        do_sample=False,
    )


def stop_strings(tokenizer: PreTrainedTokenizerBase, description: Mapping[str, Any]) -> list[str]:
    """The stop strings that aren't a single token, so that other programs must be given them."""
    return list(_stops(tokenizer, description)[1])


def _stops(
    tokenizer: PreTrainedTokenizerBase, description: Mapping[str, Any]
) -> tuple[frozenset[int], tuple[str, ...]]:
    return stop_criteria(registry().create("templates", description["template"]), tokenizer)
