"""A conversation of several turns that keeps the key/value cache of earlier turns."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.chat.common_prefix import common_prefix_length, split_prompt, token_keys
from llavactl.chat.context import after_system, context_length, fit
from llavactl.chat.detokenizer import Detokenizer
from llavactl.chat.inputs import open_image as read_image
from llavactl.core.errors import LlavactlError
from llavactl.core.schema import Content, Encoded, ImageRef, Turn
from llavactl.data.batches import collate
from llavactl.model.compiled import generate_compiled
from llavactl.model.exactness import is_resumable, new_cache, truncate
from llavactl.model.generate import Sampling, generate
from llavactl.model.inputs import to_device

if TYPE_CHECKING:
    import numpy as np

    from llavactl.chat.assistant import Assistant

log = logging.getLogger(__name__)


class AnswerStream(Iterator[str]):
    """An answer that is generated as it is iterated over, in pieces of text; ``text`` is all of it."""

    def __init__(self, pieces: Generator[str]) -> None:
        self._pieces = pieces
        self._received: list[str] = []

    def __next__(self) -> str:
        piece = next(self._pieces)
        self._received.append(piece)
        return piece

    @property
    def text(self) -> str:
        """The complete answer without surrounding whitespace; generates what is missing."""
        for _ in self:
            pass
        return "".join(self._received).strip()

    def __str__(self) -> str:
        return self.text

    def close(self) -> None:
        """Stops the answer; its text so far stays in the conversation."""
        self._pieces.close()


class Conversation:
    """Several turns with one assistant; only the part of a prompt that is not in the key/value cache is processed.

    Not thread-safe. Conversations of different threads may share an assistant.
    """

    def __init__(self, assistant: Assistant, system: str | None = None, turns: Sequence[Turn] = ()) -> None:
        """``system`` replaces the template's system prompt; ``turns`` continues an earlier conversation.

        ``left_out`` is the number of oldest turns that are left out because the model's context is exceeded.
        """
        self.assistant = assistant
        self.turns: list[Turn] = [*([Turn("system", (system,))] if system else []), *turns]
        self._arrays: dict[ImageRef, tuple[np.ndarray, ...]] = {}
        self.left_out = 0
        self._answer: AnswerStream | None = None
        self._cache: Any = None
        self._cached_keys: list[Any] = []

    def open_image(self, image: str | Path | ImageRef) -> ImageRef:
        """``image`` for ``ask``: a file, a URL or base64, or a reference; it is read, decoded and encoded once.

        Raises:
            DataError: it can't be read.
        """
        opened = read_image(str(image)) if isinstance(image, str | Path) else image
        self.arrays(opened)
        return opened

    def arrays(self, image: ImageRef) -> tuple[np.ndarray, ...]:
        """The features of ``image`` (see ``FeatureLookup``), kept for all images of the conversation."""
        if image not in self._arrays:
            self._arrays[image] = self.assistant.features.arrays(image)
        return self._arrays[image]

    def ask(self, *content: Content, sampling: Sampling | None = None) -> AnswerStream:
        """Adds ``content`` (text and images) as a user turn; the answer is generated while it is iterated over.

        ``sampling`` defaults to the model's. An answer that is still being generated is ended first. If
        generation fails, the turn is removed. If it is interrupted or closed, the partial answer is kept, if there is
        any.
        """
        return self._start(Turn("user", content), None, sampling)

    def retry(self, sampling: Sampling | None = None) -> AnswerStream:
        """Answers the last question again; if that fails, the former answer is kept.

        Raises:
            LlavactlError: there is no question.
        """
        self._end_answer()
        if not any(turn.role == "user" for turn in self.turns):
            raise LlavactlError("no question to answer again")
        answer = self.turns.pop() if self.turns[-1].role == "assistant" else None
        return self._start(self.turns.pop(), answer, sampling)

    def undo(self) -> tuple[Content, ...]:
        """Removes the last question and its answer, and returns the question's content; () without a question."""
        self._end_answer()
        if not any(turn.role == "user" for turn in self.turns):
            return ()
        if self.turns[-1].role == "assistant":
            self.turns.pop()
        content = self.turns.pop().content
        self.left_out = min(self.left_out, len(after_system(self.turns)))
        return content

    @property
    def system(self) -> str:
        """The system prompt that replaces the template's; "" if the template's is used."""
        return self.turns[0].text if self.turns and self.turns[0].role == "system" else ""

    @system.setter
    def system(self, text: str) -> None:
        self._end_answer()
        self.turns[:] = [*([Turn("system", (text,))] if text else []), *after_system(self.turns)]

    def _end_answer(self) -> None:
        """Ends the answer that is being generated.

        Raises:
            LlavactlError: another thread is generating it.
        """
        answer, self._answer = self._answer, None
        if answer is not None:
            try:
                answer.close()
            except ValueError:  # Python: generator already executing
                self._answer = answer
                raise LlavactlError(
                    "this conversation is answering in another thread", hint="use one conversation per thread"
                ) from None

    def _start(self, question: Turn, former_answer: Turn | None, sampling: Sampling | None) -> AnswerStream:
        self._end_answer()
        self._answer = AnswerStream(self._pieces(question, former_answer, sampling or self.assistant.sampling))
        return self._answer

    def _pieces(self, question: Turn, former_answer: Turn | None, sampling: Sampling) -> Generator[str]:
        self.turns.append(question)
        output = Detokenizer(self.assistant.encoding.tokenizer, self.assistant.stops)
        finished = failed = False
        try:
            for token in self._tokens(sampling):
                if piece := output.add(token):
                    yield piece
                if output.done:
                    break
            if piece := output.add(None):
                yield piece
            finished = True
        except Exception:
            failed = True
            raise
        finally:
            text = output.text.strip()
            if finished or (text and not failed):
                self.turns.append(Turn("assistant", (text,)))
            elif former_answer is not None:
                self.turns.append(former_answer)
            else:
                self.turns.pop()

    def _tokens(self, sampling: Sampling) -> Iterator[int | None]:
        model, encoded = self.assistant.model, self._prompt(sampling.max_new_tokens)
        if not encoded.ids:
            return
        per_image = self.assistant.encoding.image_tokens
        keys = token_keys(encoded, per_image)
        length = common_prefix_length(self._cached_keys, keys) if self._is_cache_usable() else 0
        if length:
            truncate(self._cache, length)
        else:
            self._cache = new_cache(model.language) if self.assistant.exact.cached else None
        self._cached_keys = keys[:length]
        rest = split_prompt(encoded, length, per_image)[1]
        batch = to_device(collate([rest], self, side="left"), model.device)
        if limit := context_length(model.language):
            sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, limit - len(encoded)))
        stop, decoder = self.assistant.stops.ids, self.assistant.decoder
        if decoder is None:
            steps = generate(model, batch, sampling, stop, self._cache, cached=self.assistant.exact.cached)
        else:
            steps = generate_compiled(decoder, model, batch, sampling, stop, self._cache)
        processed = keys[length:]
        for (token,) in steps:
            self._cached_keys += processed
            processed = [token]
            yield token

    def _prompt(self, max_new_tokens: int) -> Encoded:
        prompt, left_out = fit(self.assistant, self.turns, self.left_out, max_new_tokens)
        if left_out > self.left_out:
            log.warning(
                "the conversation exceeds the model's context of %s tokens: its oldest %d turns are left out, except "
                "their images",
                f"{context_length(self.assistant.model.language):,}",
                left_out,
            )
        self.left_out = left_out
        return prompt

    def _is_cache_usable(self) -> bool:
        return self._cache is not None and is_resumable(self._cache) and self.assistant.exact.resumed
