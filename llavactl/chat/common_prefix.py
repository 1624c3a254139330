"""Common prefixes of prompts, which are processed once: earlier turns, or one image with several questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llavactl.core.schema import IMAGE_TOKEN, Encoded

TokenKeys = Sequence[Any]


def token_keys(encoded: Encoded, tokens_per_image: int) -> list[Any]:
    """One key per token: the token id, or (image, position in the image) for image tokens.

    Image tokens of different images thus differ, although they share one id.
    """
    keys: list[Any] = []
    image_tokens = 0
    for token in encoded.ids:
        if token == IMAGE_TOKEN:
            keys.append((encoded.images[image_tokens // tokens_per_image], image_tokens % tokens_per_image))
            image_tokens += 1
        else:
            keys.append(token)
    return keys


def common_prefix_length(cached: TokenKeys, prompt: TokenKeys) -> int:
    """The number of tokens of the common prefix of ``cached`` and ``prompt``.

    The last token of ``prompt`` is always excluded, since its logits give the next token. The prefix never ends inside
    an image.
    """
    length = 0
    while length < min(len(cached), len(prompt) - 1) and cached[length] == prompt[length]:
        length += 1
    while length and isinstance(prompt[length], tuple) and prompt[length][1] > 0:
        length -= 1
    return length


def split_prompt(encoded: Encoded, length: int, tokens_per_image: int) -> tuple[Encoded, Encoded]:
    """The first ``length`` tokens and the rest, each with its images; ``length`` must not end inside an image."""
    images = sum(token == IMAGE_TOKEN for token in encoded.ids[:length]) // max(tokens_per_image, 1)
    return (
        Encoded(encoded.ids[:length], encoded.labels[:length], encoded.images[:images]),
        Encoded(encoded.ids[length:], encoded.labels[length:], encoded.images[images:]),
    )
