"""Streaming detokenization: tokens to text as they are generated, up to a stop token or stop string."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llavactl.components.templates.stop_criteria import stop_criteria

if TYPE_CHECKING:
    from llavactl.data.encode import Encoding

MAX_PENDING = 16
"""Tokens; text is held back no longer than this for an incomplete character (4 bytes in UTF-8 at most)."""


@dataclass(frozen=True)
class Stops:
    """The ids of stop tokens, and stop strings (``texts``) that are not a single token."""

    ids: frozenset[int]
    texts: tuple[str, ...]

    @classmethod
    def of(cls, encoding: Encoding, more_ids: Collection[int] = ()) -> Stops:
        """The stop tokens and strings of the template and tokenizer of ``encoding``; ``more_ids`` are added."""
        ids, texts = stop_criteria(encoding.template, encoding.tokenizer)
        return cls(ids | frozenset(more_ids), texts)


@dataclass
class Detokenizer:
    """Converts tokens to text one at a time, in constant time per token; returned text is final.

    Only the last few tokens are decoded at a time: a run of byte tokens (SentencePiece's byte fallback) that ends
    inside a character decodes to nothing, not even its complete characters.
    """

    tokenizer: Any
    stops: Stops
    done: bool = False
    _ids: list[int] = field(default_factory=list)
    """The last tokens: first the context for decoding, then those whose text is incomplete."""
    _context: int = 0
    _held: str = ""
    """Decoded text that may be the beginning of a stop string."""
    _pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All text returned so far."""
        return "".join(self._pieces)

    def add(self, token: int | None) -> str:
        """Adds the next token (None: end of the answer, or token limit reached) and returns the new text."""
        if self.done:
            return ""
        if token is None:
            self.done = True
        else:
            self._ids.append(token)
        text = self._held + self._decode()
        stop_positions = [at for stop in self.stops.texts if (at := text.find(stop)) >= 0]
        if stop_positions:
            piece, self._held, self.done = text[: min(stop_positions)], "", True
        else:
            end = len(text) - (0 if self.done else self._partial_stop_length(text))
            piece, self._held = text[:end], text[end:]
        if piece:
            self._pieces.append(piece)
        return piece

    def _decode(self) -> str:
        """The text of the last tokens, decoded with the preceding ones as context.

        An incomplete UTF-8 character (decoded as U+FFFD) is held back until it is complete, or dropped at the end.
        """
        before, now = (
            self.tokenizer.decode(ids, skip_special_tokens=True) for ids in (self._ids[: self._context], self._ids)
        )
        if self.done:
            now = now.rstrip("\ufffd")
        incomplete = len(now) <= len(before) or now.endswith("\ufffd")
        if incomplete and len(self._ids) - self._context < MAX_PENDING:
            return ""
        self._ids = self._ids[self._context :]
        self._context = len(self._ids)
        return str(now[len(before) :])

    def _partial_stop_length(self, text: str) -> int:
        """The length of the longest suffix of ``text`` that is a prefix of a stop string."""
        longest = max(map(len, self.stops.texts), default=0)
        lengths = range(min(longest - 1, len(text)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self.stops.texts)), 0)


def decode_tokens(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of ``ids`` without special tokens and without an incomplete last character."""
    detokenizer = Detokenizer(tokenizer, Stops(frozenset(), ()))
    for token in (*ids, None):
        detokenizer.add(token)
    return detokenizer.text
