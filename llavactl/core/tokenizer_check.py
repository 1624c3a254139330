"""Detects tokenizers that can't be used with a language model, which would otherwise train on meaningless tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_HINT = (
    "the tokenizer must be that of the language model: "
    "`AutoTokenizer.from_pretrained(ID).save_pretrained(FOLDER)` saves it to the model's folder"
)

_SENTENCE = "The quick brown fox jumps over the lazy dog: 0123456789."


def tokenizer_fault(tokenizer: PreTrainedTokenizerBase, embeddings: int | None) -> str:
    """Why ``tokenizer`` can't be used with a model of that many ``embeddings`` (None: unknown); "" if it can."""
    if not any(_has_regular_tokens(tokenizer, text) for text in _texts(tokenizer)):
        return "the tokenizer has an empty vocabulary: it encodes any text as nothing or as unknown tokens"
    highest = max(_used_ids(tokenizer))
    if embeddings is not None and highest >= embeddings:
        return f"the tokenizer has ids up to {highest}, the language model has embeddings for {embeddings} tokens"
    return ""


def _texts(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """A sentence, then all tokens of the vocabulary: it may contain no word of the sentence."""
    yield _SENTENCE
    special = set(tokenizer.all_special_tokens)
    for token in tokenizer.get_vocab():
        if token not in special:
            yield tokenizer.convert_tokens_to_string([token])


def _has_regular_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    special = set(tokenizer.all_special_ids)
    try:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    except Exception:  # noqa: BLE001 - raised by tokenizers for an unknown word if there is no token for it
        return False
    return bool(str(tokenizer.decode([id_ for id_ in ids if id_ not in special])).strip())


def _used_ids(tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    """The ids that text is encoded as or the chat template writes.

    Other special tokens may have no embedding, such as ``<image_soft_token>`` of Gemma 3 1B or ``<pad>`` of Llama 2.
    """
    added, chat_template = tokenizer.added_tokens_decoder, str(tokenizer.chat_template)
    always = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    for token, id_ in tokenizer.get_vocab().items():
        special = id_ in added and added[id_].special
        if not special or id_ in always or token in chat_template:
            yield id_
