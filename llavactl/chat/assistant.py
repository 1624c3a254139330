"""A model ready to answer: the model, how conversations become tokens, and where features come from."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from llavactl.chat.prefix import shared, signature, split
from llavactl.components.templates.ends import stops
from llavactl.core.schema import IGNORE, Encoded, Turn
from llavactl.data.batches import FeatureLookup, collate
from llavactl.data.encode import Encoding
from llavactl.data.image_order import arrange
from llavactl.model.exactness import Exact, exactness
from llavactl.model.generate import GREEDY, Sampling, generate, read
from llavactl.model.inputs import to_device

if TYPE_CHECKING:
    from llavactl.core.schema import Batch
    from llavactl.model.llava import LlavaModel

WORTH_SHARING = 16


@dataclass
class Assistant:
    """Answers conversations that end with the user's turn."""

    model: LlavaModel
    encoding: Encoding
    features: FeatureLookup
    image_order: Literal["first", "random", "as-data"] = "first"
    name: str = ""

    def prompt(self, turns: Sequence[Turn]) -> Encoded:
        """The encoded prompt; if it is empty, the tokenizer's begin or end token, or nothing if it has neither.

        The template ``plain`` omits questions, so a question without an image gives an empty prompt.
        """
        encoded, tokenizer = self.encode(turns), self.encoding.tokenizer
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return encoded if encoded.ids or first is None else Encoded((first,), (IGNORE,))

    def encode(self, turns: Sequence[Turn]) -> Encoded:
        """The prompt as the template writes it; with ``image_order: random`` the image comes before the question."""
        order: Literal["first", "as-data"] = "as-data" if self.image_order == "as-data" else "first"
        return self.encoding.encode(arrange(turns, order, ""), generate=True)

    @cached_property
    def exact(self) -> Exact:
        """Which optimisations leave the answers unchanged."""
        return exactness(self.model.language)

    @cached_property
    def stops(self) -> Stops:
        return Stops.of(self.encoding, _eos_ids(self.model))

    def answer(self, conversations: Sequence[Sequence[Turn]], sampling: Sampling = GREEDY) -> list[str]:
        """One answer per conversation, generated in one left-padded batch unless padding would change them.

        A common prefix, such as an image, is processed once.
        """
        prompts = [self.prompt(turns) for turns in conversations]
        writers = [Writer(self.encoding.tokenizer, self.stops) for _ in conversations]
        asked = [(prompt, writer) for prompt, writer in zip(prompts, writers, strict=True) if prompt.ids]
        for batch in [asked] if self.exact.padded else [[each] for each in asked]:
            if batch:
                self._write([prompt for prompt, _ in batch], [writer for _, writer in batch], sampling)
        return [writer.text.strip() for writer in writers]

    def _write(self, prompts: Sequence[Encoded], writers: Sequence[Writer], sampling: Sampling) -> None:
        batch, cache = self._batch(prompts)
        for tokens in generate(self.model, batch, sampling, self.stops.ids, cache, cached=self.exact.cached):
            for writer, token in zip(writers, tokens, strict=True):
                writer.take(token)
            if all(writer.done for writer in writers):
                break
        for writer in writers:
            writer.take(None)

    def _batch(self, prompts: Sequence[Encoded]) -> tuple[Batch, Any]:
        """The prompts as a batch without their common prefix, and a key/value cache of it (None: prefix too short).

        Padding then lies between prefix and rest, where it would fill part of a sliding window, for example.
        """
        per_image, device = self.encoding.image_tokens, self.model.device
        places = [signature(prompt, per_image) for prompt in prompts]
        keep = min((shared(places[0], other) for other in places[1:]), default=0)
        if keep < WORTH_SHARING or not self.exact.shared:
            return to_device(collate(prompts, self.features, side="left"), device), None
        halves = [split(prompt, keep, per_image) for prompt in prompts]
        cache = read(self.model, to_device(collate([halves[0][0]], self.features), device))
        cache.batch_repeat_interleave(len(prompts))
        return to_device(collate([rest for _, rest in halves], self.features, side="left"), device), cache


@dataclass(frozen=True)
class Stops:
    """What ends an answer: tokens, and texts that no single token stands for."""

    ids: frozenset[int]
    texts: tuple[str, ...]

    @classmethod
    def of(cls, encoding: Encoding, also: Collection[int] = ()) -> Stops:
        """The stops of the template and tokenizer of ``encoding``, and the token ids ``also``."""
        ids, texts = stops(encoding.template, encoding.tokenizer)
        return cls(ids | frozenset(also), texts)


def _eos_ids(model: LlavaModel) -> frozenset[int]:
    """The end-of-sequence token ids of the language model's generation config."""
    found = getattr(getattr(model.language, "generation_config", None), "eos_token_id", None)
    return frozenset([found] if isinstance(found, int) else found or ())


@dataclass
class Writer:
    """Tokens to text as they come; text is final once a character is whole.

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

    def take(self, token: int | None) -> str:
        """Adds the next token (None: the answer has ended or reached its limit) and returns the text that it adds."""
        if self.done:
            return ""
        if token is None:
            self.done = True
        else:
            self.ids.append(token)
        self._decode()
        whole = self._decoded
        ends = [at for stop in self.stops.texts if (at := whole.find(stop)) >= 0]
        if ends:
            whole, self.done = whole[: min(ends)], True
        elif not self.done:
            whole = whole[: len(whole) - self._begun(whole)]
        added, self.text = whole[len(self.text) :], whole
        return added

    def _decode(self) -> None:
        """Adds the text of the tokens from ``_end``, decoded with the last ones before (from ``_start``) as context.

        An incomplete UTF-8 character decodes to U+FFFD: held back until complete, dropped if it never is.
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

    def _begun(self, text: str) -> int:
        """How many characters at the end of ``text`` may be the beginning of what ends the answer."""
        longest = max(map(len, self.stops.texts), default=0)
        at_most = range(min(longest - 1, len(text)), 0, -1)
        return next((n for n in at_most if any(stop.startswith(text[-n:]) for stop in self.stops.texts)), 0)


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of ``ids`` without special tokens and without an incomplete last character."""
    writer = Writer(tokenizer, Stops(frozenset(), ()))
    for token in (*ids, None):
        writer.take(token)
    return writer.text
