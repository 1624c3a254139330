"""How a tokenizer is given a text with images: LLaVA's way, or that of transformers' processors.

LLaVA splits the text at ``<image>`` and tokenises each piece by itself. A processor of transformers gives the tokenizer
the whole text, in which an image is a token. The ids differ where a tokenizer begins a text with something of its own
(SentencePiece's space). A model must be asked as it was trained, so the way is a property of its tokenizer, which is
saved with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llavactl.components.languages.inside import in_llava

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ORIGIN = "llavactl_export.json"
"""The file beside an export of llavactl's."""

_KEY = "llavactl_images"
"""Of tokenizer_config.json. (transformers reads a key that ends in ``_token`` as a special token.)"""


def image_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The token that is an image in the text that ``tokenizer`` is given; None: the text is split at images."""
    found = tokenizer.init_kwargs.get(_KEY)
    return found if isinstance(found, str) else None


def follow_processor(tokenizer: PreTrainedTokenizerBase, model: str) -> None:
    """Gives ``tokenizer``, that of ``model``, the way of the processor if transformers wrote this LLaVA checkpoint.

    An export of llavactl's that was trained in LLaVA's way keeps that.
    """
    token = image_token(tokenizer) or _own(tokenizer, model)
    if token is not None:
        tokenizer.init_kwargs[_KEY] = token
        tokenizer.image_token = token


def _own(tokenizer: PreTrainedTokenizerBase, model: str) -> str | None:
    """The image token of a LLaVA checkpoint that transformers wrote."""
    from transformers import PreTrainedConfig
    from transformers.utils import cached_file

    if not in_llava(model):
        return None
    calm = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    if cached_file(model, ORIGIN, **calm) is not None:
        return None
    config, _ = PreTrainedConfig.get_config_dict(model)
    number = config.get("image_token_index", config.get("image_token_id"))
    added = tokenizer.added_tokens_decoder.get(number)  # any other token isn't kept whole in a text
    return None if added is None else added.content
