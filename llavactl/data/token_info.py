"""Lists the tokens of an encoded conversation for inspection."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llavactl.core.schema import IGNORE, IMAGE_TOKEN

if TYPE_CHECKING:
    from llavactl.core.schema import Turn
    from llavactl.data.encode import Encoding


@dataclass(frozen=True)
class TokenInfo:
    """A token and its characters, or all ``tokens`` of an ``image`` (its name).

    ``position`` counts tokens from 0. ``target``: a target of the loss. ``truncated``: beyond ``max_length``.
    """

    position: int
    text: str
    id: int
    target: bool
    truncated: bool
    tokens: int = 1
    image: str = ""


def token_info(encoding: Encoding, turns: Sequence[Turn]) -> list[TokenInfo]:
    """The tokens of ``turns`` as training uses them, followed by those beyond ``max_length``."""
    kept = len(encoding.encode(turns))
    unlimited = replace(encoding, max_length=None)
    encoded, texts = unlimited.encode(turns), unlimited.texts(turns)
    images = iter(encoded.images)

    def tokens() -> Iterator[TokenInfo]:
        position = 0
        while position < len(encoded):
            token, target, truncated = encoded.ids[position], encoded.labels[position] != IGNORE, position >= kept
            if token == IMAGE_TOKEN:
                yield TokenInfo(position, "", token, target, truncated, encoding.image_tokens, next(images).name)
                position += encoding.image_tokens
            else:
                yield TokenInfo(position, texts[position], token, target, truncated)
                position += 1

    return list(tokens())
