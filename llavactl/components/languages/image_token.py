"""Whether text with images is tokenized as in LLaVA's code or as in transformers' processors.

LLaVA splits the text at ``<image>`` and tokenizes each piece separately. A processor of transformers tokenizes the
complete text, in which an image is a token. The ids differ if a tokenizer prepends something to a text (SentencePiece's
space). A model needs the ids that it was trained with, so this is a property of its tokenizer and saved with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llavactl.components.languages.llava_checkpoint import in_hf_llava
from llavactl.core import hub

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXPORT_RECORD = "llavactl_export.json"
"""The file of llavactl's exports for settings that their format can't store."""

_KEY = "llavactl_images"
"""Key of tokenizer_config.json. (transformers would read a key that ends in ``_token`` as a special token.)"""


def image_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The token for an image in text for ``tokenizer``; None if text is split at images."""
    token = tokenizer.init_kwargs.get(_KEY)
    return token if isinstance(token, str) else None


def set_image_token(tokenizer: PreTrainedTokenizerBase, model: str) -> None:
    """Sets the image token of the ``tokenizer`` of ``model`` if this is a LLaVA checkpoint of transformers.

    llavactl's exports keep the tokenization that they were trained with.
    """
    token = image_token(tokenizer) or _processor_image_token(tokenizer, model)
    if token is not None:
        tokenizer.init_kwargs[_KEY] = token
        tokenizer.image_token = token


def _processor_image_token(tokenizer: PreTrainedTokenizerBase, model: str) -> str | None:
    """The image token if ``model`` is a LLaVA checkpoint of transformers."""
    if not in_hf_llava(model) or hub.has_file(EXPORT_RECORD, model):
        return None
    config = hub.model_config(model)
    token_id = config.get("image_token_index", config.get("image_token_id"))
    added = tokenizer.added_tokens_decoder.get(token_id)  # other tokens are not always found in text
    return None if added is None else added.content
