"""A conversation of several turns that keeps the key/value cache of earlier turns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llavactl.chat.assistant import Assistant
from llavactl.chat.common_prefix import common_prefix_length, split_prompt, token_keys
from llavactl.chat.detokenizer import Detokenizer
from llavactl.core.schema import Content, Turn
from llavactl.data.batches import collate
from llavactl.model.exactness import is_resumable, new_cache
from llavactl.model.generate import GREEDY, Sampling, generate
from llavactl.model.inputs import to_device


class Conversation:
    """Several turns with one assistant; only the part of a prompt that is not in the key/value cache is processed."""

    def __init__(self, assistant: Assistant, system: str | None = None) -> None:
        self.assistant = assistant
        self.turns: list[Turn] = [Turn("system", (system,))] if system else []
        self._cache: Any = None
        self._cached_keys: list[Any] = []

    def ask(self, *content: Content, sampling: Sampling = GREEDY) -> Iterator[str]:
        """Adds ``content`` (text and images) as a user turn and yields the answer in pieces as it is generated.

        If generation fails, the turn is removed. If it is interrupted, the partial answer is kept.
        """
        turns_before = len(self.turns)
        self.turns.append(Turn("user", content))
        output = Detokenizer(self.assistant.encoding.tokenizer, self.assistant.stops)
        try:
            for token in self._tokens(sampling):
                if piece := output.add(token):
                    yield piece
                if output.done:
                    break
            if piece := output.add(None):
                yield piece
        except (Exception, KeyboardInterrupt) as error:
            self._cache = None  # an interrupted step may have extended only some of its layers
            if not isinstance(error, KeyboardInterrupt):
                del self.turns[turns_before:]
            raise
        finally:
            if len(self.turns) > turns_before:
                self.turns.append(Turn("assistant", (output.text.strip(),)))

    def _tokens(self, sampling: Sampling) -> Iterator[int | None]:
        model, encoded = self.assistant.model, self.assistant.prompt(self.turns)
        if not encoded.ids:
            return
        per_image = self.assistant.encoding.image_tokens
        keys = token_keys(encoded, per_image)
        cache, length = self._cache, 0
        if cache is not None and is_resumable(cache) and self.assistant.exact.resumed:
            length = common_prefix_length(self._cached_keys[: cache.get_seq_length()], keys)
        if length:
            if surplus := cache.get_seq_length() - length:
                cache.crop(-surplus)
        else:
            cache = new_cache(model.language) if self.assistant.exact.cached else None
        self._cache, self._cached_keys = cache, keys
        rest = split_prompt(encoded, length, per_image)[1]
        batch = to_device(collate([rest], self.assistant.features, side="left"), model.device)
        cached = self.assistant.exact.cached
        for (token,) in generate(model, batch, sampling, self.assistant.stops.ids, cache, cached=cached):
            if token is not None:
                self._cached_keys = [*self._cached_keys, token]
            yield token
