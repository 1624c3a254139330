"""Tokenizers for transformers' processors: the image token, and the separator between it and the text after it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from llavactl.components.languages.image_token import image_token
from llavactl.components.languages.sentencepiece_spaces import SPACES, omits_space_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

IMAGE, PAD = "<image>", "<pad>"


def add_image_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """Adds an image token and a padding token if they are missing; returns the image token."""
    token = image_token(tokenizer) or getattr(tokenizer, "image_token", None)
    if token not in {added.content for added in tokenizer.added_tokens_decoder.values()}:
        token = IMAGE
        tokenizer.add_tokens([_special(token)], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD})
    tokenizer.image_token = token
    return str(token)


def separator(tokenizer: PreTrainedTokenizerBase, after: str) -> str:
    """The text to insert between an image and the text ``after`` it for a processor, to get the ids of training.

    ``tokenizer`` has an image token. A processor tokenizes the text after it as a continuation; LLaVA tokenizes it
    separately, and SentencePiece vocabularies then prepend a space (id 29871 before the newline in Llama's).
    """
    if image_token(tokenizer) is not None or not after:
        return ""
    prefix = " " if after.startswith(SPACES) and omits_space_prefix(tokenizer) else ""
    separate = tokenizer(prefix + after, add_special_tokens=False)["input_ids"]
    for space in ("", " "):
        joined = tokenizer(tokenizer.image_token + space + after, add_special_tokens=False)["input_ids"]
        if joined[1:] == separate:
            return space
    log.warning(
        "the tokenizer encodes %r after an image differently than in training; verification shows the effect", after
    )
    return ""


def _special(text: str) -> Any:
    from transformers import AddedToken

    return AddedToken(text, normalized=False, special=True)
