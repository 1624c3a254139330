"""The image token of tokenizers for transformers' processors, and the text after it."""

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
    """Adds the tokens for images and padding where they are missing; returns the image token."""
    token = image_token(tokenizer) or getattr(tokenizer, "image_token", None)
    if token not in {each.content for each in tokenizer.added_tokens_decoder.values()}:
        token = IMAGE
        tokenizer.add_tokens([_special(token)], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD})
    tokenizer.image_token = token
    return str(token)


def separator(tokenizer: PreTrainedTokenizerBase, after: str) -> str:
    """The text to insert between an image and the text ``after`` it, so that a processor's ids equal those of training.

    ``tokenizer`` has an image token. A processor tokenises the text after it as a continuation. LLaVA tokenises it
    separately, and SentencePiece vocabularies then prepend a space (29871 before the newline in Llama's).
    """
    if image_token(tokenizer) is not None or not after:
        return ""
    prefix = " " if after.startswith(SPACES) and omits_space_prefix(tokenizer) else ""
    alone = tokenizer(prefix + after, add_special_tokens=False)["input_ids"]
    for space in ("", " "):
        joined = tokenizer(tokenizer.image_token + space + after, add_special_tokens=False)["input_ids"]
        if joined[1:] == alone:
            return space
    log.warning("this tokenizer encodes %r after an image differently than alone; verification shows the effect", after)
    return ""


def _special(text: str) -> Any:
    from transformers import AddedToken

    return AddedToken(text, normalized=False, special=True)
