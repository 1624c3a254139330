"""Streaming detokenization: tokens to text as they are generated, up to a stop token or stop string."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llavactl.components.templates.stop_criteria import stop_criteria

if TYPE_CHECKING:
    from llavactl.data.encode import Encoding


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
    """Converts tokens to text one at a time; returned text is final.

    Only the last few tokens are decoded at a time: a run of byte tokens (SentencePiece's byte fallback) that ends in
    the middle of a character decodes to no characters at all, so that complete ones would be lost.
    """

    tokenizer: Any
    stops: Stops
    ids: list[int] = field(default_factory=list)
    text: str = ""
    done: bool = False
    _decoded: str = ""
    _start: int = 0
    _end: int = 0

    def add(self, token: int | None) -> str:
        """Adds the next token (None: end of the answer, or token limit reached) and returns the new text."""
        if self.done:
            return ""
        if token is None:
            self.done = True
        else:
            self.ids.append(token)
        self._decode()
        text = self._decoded
        stop_positions = [at for stop in self.stops.texts if (at := text.find(stop)) >= 0]
        if stop_positions:
            text, self.done = text[: min(stop_positions)], True
        elif not self.done:
            text = text[: len(text) - self._partial_stop_length(text)]
        added, self.text = text[len(self.text) :], text
        return added

    def _decode(self) -> None:
        """Adds the text of the tokens from ``_end``, decoded with the preceding tokens (from ``_start``) as context.

        An incomplete UTF-8 character (decoded as U+FFFD) is held back until it is complete, or dropped at the end.
        """
        before, now = (
            self.tokenizer.decode(ids, skip_special_tokens=True)
            for ids in (self.ids[self._start : self._end], self.ids[self._start :])
        )
        if self.done:
            now = now.rstrip("\ufffd")
        if len(now) > len(before) and not now.endswith("\ufffd"):
            self._decoded += now[len(before) :]
            self._start, self._end = self._end, len(self.ids)

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
