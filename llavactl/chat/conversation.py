"""A conversation of several turns that keeps its keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llavactl.chat.assistant import Assistant, Writer
from llavactl.core.schema import IMAGE_TOKEN, Content, Encoded, Turn
from llavactl.data.batches import collate
from llavactl.model.generate import GREEDY, Sampling, generate

if TYPE_CHECKING:
    from llavactl.core.schema import Batch


class Conversation:
    """Several turns with one assistant; what a new prompt begins with and was read before is not read again."""

    def __init__(self, assistant: Assistant, system: str | None = None) -> None:
        self.assistant = assistant
        self.turns: list[Turn] = [Turn("system", (system,))] if system else []
        self._cache: Any = None
        self._read: list[Any] = []

    def ask(self, *content: Content, sampling: Sampling = GREEDY) -> Iterator[str]:
        """Says ``content`` (text and images) and yields the answer in pieces as it is written."""
        self.turns.append(Turn("user", content))
        writer = Writer(self.assistant.encoding.tokenizer, self.assistant.stops)
        try:
            for token in self._tokens(sampling):
                if piece := writer.take(token):
                    yield piece
                if writer.done:
                    break
        except KeyboardInterrupt:
            self._cache = None  # some layers may have one token more than others
            raise
        finally:
            self.turns.append(Turn("assistant", (writer.text.strip(),)))

    def _tokens(self, sampling: Sampling) -> Iterator[int | None]:
        from transformers import DynamicCache

        encoded = self.assistant.encode(self.turns)
        wanted = _signature(encoded, self.assistant.encoding.image_tokens)
        cache, keep = self._cache, 0
        if cache is not None:
            keep = _keep(self._read[: cache.get_seq_length()], wanted)
        if keep:
            if surplus := cache.get_seq_length() - keep:
                cache.crop(-surplus)
        else:
            cache = DynamicCache()
        self._cache, self._read = cache, wanted
        model = self.assistant.model
        batch = self._rest(encoded, keep).to(model.device)
        for (token,) in generate(model, batch, sampling, self.assistant.stops.ids, cache):
            if token is not None:
                self._read = [*self._read, token]
            yield token

    def _rest(self, encoded: Encoded, keep: int) -> Batch:
        """What is left to read behind the first ``keep`` tokens, which end no image halfway."""
        per_image = max(self.assistant.encoding.image_tokens, 1)
        seen = sum(token == IMAGE_TOKEN for token in encoded.ids[:keep]) // per_image
        rest = Encoded(encoded.ids[keep:], encoded.labels[keep:], encoded.images[seen:])
        return collate([rest], self.assistant.features, side="left")


def _signature(encoded: Encoded, per_image: int) -> list[Any]:
    """The tokens, each image token as (which image, place in it): equal for the same image alone."""
    signature: list[Any] = []
    count = 0
    for token in encoded.ids:
        if token == IMAGE_TOKEN:
            signature.append((encoded.images[count // per_image], count % per_image))
            count += 1
        else:
            signature.append(token)
    return signature


def _keep(read: list[Any], wanted: list[Any]) -> int:
    """How many tokens of ``wanted`` were read already: not all (the last gives the next), no image halfway."""
    keep = 0
    while keep < min(len(read), len(wanted) - 1) and read[keep] == wanted[keep]:
        keep += 1
    while keep and isinstance(wanted[keep], tuple) and wanted[keep][1] > 0:
        keep -= 1
    return keep
