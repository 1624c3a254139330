"""Stop criteria: the tokens and strings that end an answer."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedTokenizerBase

    from llavactl.core.protocols import Template

_TURNS = ("<|im_start|>", "<|im_end|>")


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The added tokens of ``tokenizer`` with their ids, special or not."""
    added = {token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items()}
    return {**added, **dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))}


def any_of_pattern(names: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern that matches any of ``names``, longest first; None if there are none."""
    longest_first = sorted(filter(None, names), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def stop_criteria(template: Template, tokenizer: PreTrainedTokenizerBase) -> tuple[frozenset[int], tuple[str, ...]]:
    """The token ids that end an answer, including the tokenizer's end-of-sequence token, and the stop strings."""
    added = added_tokens(tokenizer)
    pattern = any_of_pattern(added)
    ids, texts = {tokenizer.eos_token_id}, []
    for stop in template.stop(tokenizer):
        tokens = pattern.findall(stop) if pattern is not None else []
        ids.update(added[token] for token in tokens)
        if stop and not tokens:
            texts.append(stop)
    return frozenset(ids - {None}), tuple(texts)


def fallback_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The name of a template that can render any conversation with this tokenizer."""
    ids = [tokenizer.convert_tokens_to_ids(token) for token in _TURNS]
    return "chatml" if all(token_id not in (None, tokenizer.unk_token_id) for token_id in ids) else "vicuna-v1"
