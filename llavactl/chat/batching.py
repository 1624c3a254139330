"""Continuous batching: conversations that arrive at any time join the running batch between two steps.

Except for rounding, answers are the same as from ``Assistant.answer`` with one conversation. If joining a batch would
change a model's logits (``Exact.joined``), conversations are answered one after another.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from llavactl.chat.context import context_length
from llavactl.chat.decoders import Decoder, JoinedDecoder, SingleDecoder
from llavactl.chat.detokenizer import Detokenizer, Stops
from llavactl.core.errors import ModelError
from llavactl.core.library_errors import out_of_memory
from llavactl.data.batches import collate
from llavactl.model.inputs import to_device

if TYPE_CHECKING:
    from llavactl.chat.assistant import Assistant
    from llavactl.core.schema import Encoded
    from llavactl.model.generate import Sampling

_JOIN_TIMEOUT_S = 10


class Finish(NamedTuple):
    """The end of an answer by a stop token or string, or by the token limit (``length``); ``tokens`` were generated."""

    reason: Literal["stop", "length"]
    tokens: int


Event = str | Finish | Exception
"""New text of an answer, or its last event: a ``Finish`` or an error."""


@dataclass(eq=False)
class Generation:
    """An answer in a ``Batcher``; ``emit`` is called with its events in the batcher's thread."""

    prompt: Encoded
    sampling: Sampling
    output: Detokenizer
    emit: Callable[[Event], object]
    tokens: int = 0
    ended: bool = False

    def cancel(self) -> None:
        """Ends the answer after the current step; no events follow."""
        self.ended = True

    def fail(self, error: Exception) -> None:
        """Ends the answer with ``error``."""
        if not self.ended:
            self.ended = True
            self.emit(error)

    def advance(self, token: int | None) -> None:
        """Adds the next token to the answer; None: a stop token."""
        if self.ended:
            return
        self.tokens += token is not None
        text = self.output.add(token)
        stopped = self.output.done
        if full := not stopped and self.tokens >= self.sampling.max_new_tokens:
            text += self.output.add(None)
        if text:
            self.emit(text)
        if stopped or full:
            self.ended = True
            self.emit(Finish("length" if full else "stop", self.tokens))


class Batcher:
    """Answers with ``assistant`` in a separate thread, at most ``max_batch`` conversations at once.

    Only this thread uses the model; ``close`` ends it.
    """

    def __init__(self, assistant: Assistant, max_batch: int = 8) -> None:
        self.assistant = assistant
        self.max_batch = max_batch if assistant.exact.joined else 1
        self._waiting: deque[Generation] = deque()
        self._running: list[Generation] = []
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """The number of conversations that wait for a place in the batch."""
        return sum(not each.ended for each in tuple(self._waiting))

    @property
    def running(self) -> int:
        """The number of conversations in the batch."""
        return sum(not each.ended for each in self._running)

    @property
    def context_length(self) -> int | None:
        """The maximum number of tokens of prompt and answer together; None if the model has no limit."""
        return context_length(self.assistant.model.language)

    def submit(
        self, prompt: Encoded, sampling: Sampling, emit: Callable[[Event], object], *, until: Sequence[str] = ()
    ) -> Generation:
        """Queues ``prompt`` (see ``Assistant.prompt``); its answer is truncated at the first of the strings ``until``.

        ``emit`` is called with each new piece of text, then with a ``Finish`` or an error. It must not block.
        """
        own = self.assistant.stops
        stops = Stops(own.ids, (*own.texts, *filter(None, until)))
        generation = Generation(prompt, sampling, Detokenizer(self.assistant.encoding.tokenizer, stops), emit)
        with self._changed:
            if not self._closed:
                self._waiting.append(generation)
                self._changed.notify()
                return generation
        generation.fail(_closed_error())
        return generation

    def close(self, *, wait: bool = True) -> None:
        """Ends all answers with an error, and the thread after its current step; ``wait``: for it, at most 10 s."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            generations = [*self._waiting, *self._running]
        for generation in generations:
            generation.fail(_closed_error())
        if wait:
            self._thread.join(_JOIN_TIMEOUT_S)

    def _work(self) -> None:
        decoder = self._decoder()
        while True:
            self._running = [each for each in self._running if not each.ended]
            try:
                decoder.keep(self._running)
                # One prompt per step, so that running answers continue while many conversations arrive.
                if (generation := self._next()) is not None:
                    self._start(generation, decoder)
                elif self._closed:
                    return
                for each, token in decoder.step():
                    _add(each, token)
            except Exception as error:  # noqa: BLE001 - ends these answers, not the thread
                decoder, error = self._decoder(), _explained(error)
                for each in self._running:
                    each.fail(error)

    def _next(self) -> Generation | None:
        """The next conversation to start, if there is a place for it; waits for one if none is running."""
        with self._changed:
            while not self._closed:
                while self._waiting and len(self._running) < self.max_batch:
                    generation = self._waiting.popleft()
                    if not generation.ended:
                        self._running.append(generation)
                        return generation
                if self._running:
                    break
                self._changed.wait()
        return None

    def _decoder(self) -> Decoder[Generation]:
        model, stop_ids, exact = self.assistant.model, self.assistant.stops.ids, self.assistant.exact
        return JoinedDecoder(model, stop_ids) if exact.joined else SingleDecoder(model, stop_ids, cached=exact.cached)

    def _start(self, generation: Generation, decoder: Decoder[Generation]) -> None:
        """Processes the prompt of ``generation``; an error ends it alone."""
        try:
            if generation.prompt.ids:
                batch = collate([generation.prompt], self.assistant.features)
                decoder.start(generation, to_device(batch, self.assistant.model.device), generation.sampling)
            else:
                generation.advance(None)
        except Exception as error:  # noqa: BLE001 - of any component
            generation.fail(_explained(error))


def _add(generation: Generation, token: int | Exception | None) -> None:
    try:
        if isinstance(token, Exception):
            generation.fail(token)
        else:
            generation.advance(token)
    except Exception as error:  # noqa: BLE001 - of the tokenizer
        generation.fail(error)


def _explained(error: Exception) -> Exception:
    if out_of_memory(error):
        # Without the traceback, which refers to tensors.
        return ModelError("out of memory while generating answers", hint="answer fewer conversations at once")
    return error


def _closed_error() -> ModelError:
    return ModelError("the model is closed and answers no more requests")
