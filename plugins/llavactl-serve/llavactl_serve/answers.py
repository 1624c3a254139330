"""The events of an answer, from the thread of the model to the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from llavactl import Batcher, Finish, Sampling


class Answer:
    """An answer in progress, read by ``next``; ``on_end`` is called once, when the answer ends.

    Unread text (at most one answer) is kept, so a slow reader delays neither the model nor other answers.
    """

    def __init__(self, on_end: Callable[[Answer], object]) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_end = on_end
        self._generation: Any = None
        self._pieces: list[str] = []
        self._last: Finish | Exception | None = None
        self._changed = asyncio.Event()

    def start(self, batcher: Batcher, prompt: Any, sampling: Sampling, stop: tuple[str, ...]) -> None:
        self._generation = batcher.submit(prompt, sampling, self._emit, until=stop)

    def _emit(self, event: str | Finish | Exception) -> None:
        """Called in the thread of the batcher."""
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            self._loop.call_soon_threadsafe(self._put, event)

    def _put(self, event: str | Finish | Exception) -> None:
        if self._last is None:
            if isinstance(event, str):
                self._pieces.append(event)
            else:
                self._last = event
                self._on_end(self)
            self._changed.set()

    def cancel(self, error: Exception) -> None:
        """Ends the answer with ``error``, if it is still in progress."""
        if self._generation is not None:
            self._generation.cancel()
        self._put(error)

    async def next(self, deadline: float) -> str | Finish:
        """All unread text, or the end.

        Raises:
            TimeoutError: nothing happens before ``deadline``, a time of the event loop.
            Exception: the error that ended the answer.
        """
        async with asyncio.timeout_at(deadline):
            await self._changed.wait()
        if self._pieces:
            text = "".join(self._pieces)
            self._pieces.clear()
            if self._last is None:
                self._changed.clear()
            return text
        assert self._last is not None
        if isinstance(self._last, Exception):
            raise self._last
        return self._last
