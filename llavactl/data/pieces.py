"""A conversation token by token, to be looked at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llavactl.core.schema import IGNORE, IMAGE_TOKEN

if TYPE_CHECKING:
    from llavactl.core.schema import Turn
    from llavactl.data.encode import Encoding


@dataclass(frozen=True)
class Piece:
    """One token and the characters it stands for, or all ``tokens`` of an ``image`` (its name).

    ``position`` counts tokens from 0. ``cut``: beyond ``max_length``.
    """

    position: int
    text: str
    id: int
    trained: bool
    cut: bool
    tokens: int = 1
    image: str = ""


def pieces(encoding: Encoding, turns: Sequence[Turn]) -> list[Piece]:
    """``turns`` as training sees them, and behind that what ``max_length`` cuts off."""
    kept = len(encoding.encode(turns))
    whole = replace(encoding, max_length=None)
    encoded, texts = whole.encode(turns), whole.texts(turns)
    images = iter(encoded.images)

    def found() -> Iterator[Piece]:
        at = 0
        while at < len(encoded):
            token, trained, cut = encoded.ids[at], encoded.labels[at] != IGNORE, at >= kept
            if token == IMAGE_TOKEN:
                yield Piece(at, "", token, trained, cut, encoding.image_tokens, next(images).name)
                at += encoding.image_tokens
            else:
                yield Piece(at, texts[at], token, trained, cut)
                at += 1

    return list(found())
