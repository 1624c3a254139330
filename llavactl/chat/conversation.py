"""A conversation of several turns that keeps its keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llavactl.chat.assistant import Assistant, Writer
from llavactl.chat.prefix import shared, signature, split
from llavactl.core.schema import Content, Turn
from llavactl.data.batches import collate
from llavactl.model.exactness import is_resumable, new_cache
from llavactl.model.generate import GREEDY, Sampling, generate
from llavactl.model.inputs import to_device


class Conversation:
    """Several turns with one assistant; what a new prompt begins with and was read before is not read again."""

    def __init__(self, assistant: Assistant, system: str | None = None) -> None:
        self.assistant = assistant
        self.turns: list[Turn] = [Turn("system", (system,))] if system else []
        self._cache: Any = None
        self._read: list[Any] = []

    def ask(self, *content: Content, sampling: Sampling = GREEDY) -> Iterator[str]:
        """Adds ``content`` (text and images) as a user turn and yields the answer in pieces as it is generated.

        If generation fails, the turn is removed. If it is interrupted, the partial answer is kept.
        """
        before = len(self.turns)
        self.turns.append(Turn("user", content))
        writer = Writer(self.assistant.encoding.tokenizer, self.assistant.stops)
        try:
            for token in self._tokens(sampling):
                if piece := writer.take(token):
                    yield piece
                if writer.done:
                    break
            if piece := writer.take(None):
                yield piece
        except (Exception, KeyboardInterrupt) as error:
            self._cache = None  # some layers may have one token more than others
            if not isinstance(error, KeyboardInterrupt):
                del self.turns[before:]
            raise
        finally:
            if len(self.turns) > before:
                self.turns.append(Turn("assistant", (writer.text.strip(),)))

    def _tokens(self, sampling: Sampling) -> Iterator[int | None]:
        model, encoded = self.assistant.model, self.assistant.prompt(self.turns)
        if not encoded.ids:
            return
        per_image = self.assistant.encoding.image_tokens
        wanted = signature(encoded, per_image)
        cache, keep = self._cache, 0
        if cache is not None and is_resumable(cache) and self.assistant.exact.resumed:
            keep = shared(self._read[: cache.get_seq_length()], wanted)
        if keep:
            if surplus := cache.get_seq_length() - keep:
                cache.crop(-surplus)
        else:
            cache = new_cache(model.language) if self.assistant.exact.cached else None
        self._cache, self._read = cache, wanted
        rest = split(encoded, keep, per_image)[1]
        batch = to_device(collate([rest], self.assistant.features, side="left"), model.device)
        cached = self.assistant.exact.cached
        for (token,) in generate(model, batch, sampling, self.assistant.stops.ids, cache, cached=cached):
            if token is not None:
                self._read = [*self._read, token]
            yield token
