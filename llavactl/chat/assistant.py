"""A model ready to answer: the model, how conversations become tokens, and where features come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from llavactl.core.schema import Encoded, Turn
from llavactl.data.batches import Loads, collate
from llavactl.data.encode import Encoding, arrange
from llavactl.model.generate import GREEDY, Sampling, generate

if TYPE_CHECKING:
    from llavactl.model.llava import LlavaModel


@dataclass
class Assistant:
    """Answers conversations that end with the user's turn."""

    model: LlavaModel
    encoding: Encoding
    features: Loads
    image_order: Literal["first", "random", "as-data"] = "first"
    name: str = ""

    def encode(self, turns: Sequence[Turn]) -> Encoded:
        """The prompt: where training may put the image on either side, the question comes after it."""
        order: Literal["first", "as-data"] = "as-data" if self.image_order == "as-data" else "first"
        return self.encoding.encode(arrange(turns, order, ""), generate=True)

    @cached_property
    def stops(self) -> Stops:
        return Stops.of(self.encoding)

    def answer(self, conversations: Sequence[Sequence[Turn]], sampling: Sampling = GREEDY) -> list[str]:
        """One answer a conversation, made together as one left-padded batch."""
        batch = collate([self.encode(turns) for turns in conversations], self.features, side="left")
        writers = [Writer(self.encoding.tokenizer, self.stops) for _ in conversations]
        for tokens in generate(self.model, batch.to(self.model.device), sampling, self.stops.ids):
            for writer, token in zip(writers, tokens, strict=True):
                writer.take(token)
            if all(writer.done for writer in writers):
                break
        return [writer.text.strip() for writer in writers]


@dataclass(frozen=True)
class Stops:
    """What ends an answer: tokens, and texts that no single token stands for."""

    ids: frozenset[int]
    texts: tuple[str, ...]

    @classmethod
    def of(cls, encoding: Encoding) -> Stops:
        tokenizer = encoding.tokenizer
        ids, texts = {tokenizer.eos_token_id}, []
        for stop in encoding.template.stop(tokenizer):
            if stop in tokenizer.all_special_tokens:
                ids.add(tokenizer.convert_tokens_to_ids(stop))
            else:
                texts.append(stop)
        return cls(frozenset(ids), tuple(texts))


@dataclass
class Writer:
    """Tokens to text as they come; text is final once a character is whole."""

    tokenizer: Any
    stops: Stops
    ids: list[int] = field(default_factory=list)
    text: str = ""
    done: bool = False

    def take(self, token: int | None) -> str:
        """Takes the next token (None: the answer has ended) and gives the text that it adds."""
        if self.done:
            return ""
        if token is None:
            self.done = True
        else:
            self.ids.append(token)
        whole = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not self.done and whole.endswith("\ufffd"):
            return ""
        ends = [at for stop in self.stops.texts if (at := whole.find(stop)) >= 0]
        if ends:
            whole, self.done = whole[: min(ends)], True
        added, self.text = whole[len(self.text) :], whole
        return added
