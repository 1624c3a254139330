"""The generation config of an export: the model's end tokens and greedy decoding."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

COPIED_KEYS = (
    *("bos_token_id", "decoder_start_token_id", "max_length", "max_new_tokens", "use_cache", "cache_implementation"),
)
"""Settings of the language model that don't affect the choice of tokens."""

SET_KEYS = ("eos_token_id", "pad_token_id", "do_sample")


def generation_config(
    language: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Iterable[int],
    stop_strings: Iterable[str],
) -> GenerationConfig:
    """The generation config of ``language`` with greedy decoding and with the end tokens ``stop_ids``.

    Sampling settings and penalties are left out and logged, because llavactl doesn't use them. So are ``stop_strings``:
    with them, ``generate`` requires the tokenizer, which neither transformers' pipeline nor its server passes.
    """
    from transformers import GenerationConfig

    original: dict[str, Any] = language.generation_config.to_diff_dict() if language.generation_config else {}
    for text in stop_strings:
        log.warning(
            "stop string %r is not a single token and isn't stored in generation_config.json: in other programs, "
            "pass it as in `generate(…, stop_strings=[%r], tokenizer=processor.tokenizer)`",
            text,
            text,
        )
    eos = original.get("eos_token_id")
    enabled = {key for key, value in original.items() if value not in (None, False)}
    if dropped := sorted(enabled - {*COPIED_KEYS, *SET_KEYS, "transformers_version", "_from_model_config"}):
        log.info("the export uses greedy decoding; generation settings left out: %s", ", ".join(dropped))
    return GenerationConfig(
        **{key: original[key] for key in COPIED_KEYS if key in original},
        eos_token_id=sorted({*stop_ids, *([eos] if isinstance(eos, int) else eos or ())}),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else original.get("pad_token_id"),
        do_sample=False,
    )
