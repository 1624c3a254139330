"""Detects tokenizers that can't be used with a language model, which would otherwise train on meaningless tokens."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_HINT = (
    "the tokenizer must be that of the language model: "
    "`AutoTokenizer.from_pretrained(ID).save_pretrained(FOLDER)` saves it to the model's folder"
)

_SENTENCE = "The quick brown fox jumps over the lazy dog: 0123456789."

_MAX_WORDS = 1000
"""Tokens of the vocabulary that are tried as text."""


def tokenizer_fault(tokenizer: PreTrainedTokenizerBase, embeddings: int | None) -> str:
    """Why ``tokenizer`` can't be used with a model of that many ``embeddings`` (None: unknown); "" if it can."""
    if not any(_has_regular_tokens(tokenizer, text) for text in _texts(tokenizer)):
        return "the tokenizer has an empty vocabulary: it encodes any text as nothing or as unknown tokens"
    highest = max(tokenizer.get_vocab().values())
    if embeddings is not None and highest >= embeddings:
        return f"the tokenizer has ids up to {highest}, the language model has embeddings for {embeddings} tokens"
    return ""


def _texts(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """A sentence, then tokens of the vocabulary: a small one may contain no word of the sentence."""
    yield _SENTENCE
    special = set(tokenizer.all_special_tokens)
    for token in islice((token for token in tokenizer.get_vocab() if token not in special), _MAX_WORDS):
        yield tokenizer.convert_tokens_to_string([token])


def _has_regular_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    special = set(tokenizer.all_special_ids)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return bool(str(tokenizer.decode([id_ for id_ in ids if id_ not in special])).strip())
