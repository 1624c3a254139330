"""Clean shutdown on Ctrl-C and SIGTERM (sent by Slurm, `docker stop` and spot instances).

Both raise KeyboardInterrupt, so clean-up code runs in both cases; only the exit codes differ. Work that may stop only
at certain points, such as the end of a training step, defers the first signal.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_SIGNALS = signal.SIGINT, signal.SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM was received. A subclass because Python may exit with 130 after a plain KeyboardInterrupt."""


_received: list[int] = []
"""The signals received within ``signals_as_interrupts``."""

_recording = False
"""Whether all signals since the start of the command are in ``_received``."""


@contextlib.contextmanager
def signals_as_interrupts() -> Iterator[None]:
    """Makes SIGTERM raise KeyboardInterrupt as Ctrl-C does, in the main thread, unless the signal is ignored."""
    global _recording
    _received.clear()
    before, _recording = _recording, True
    try:
        with _handling(_SIGNALS, _raise):
            yield
    finally:
        _recording = before


def without_signal() -> bool:
    """Whether a KeyboardInterrupt was raised by code: signals are recorded, and none was received."""
    return _recording and not _received


def interrupted(error: BaseException) -> bool:
    """Whether ``error`` is Ctrl-C or SIGTERM: a KeyboardInterrupt that code raises by itself is its fault."""
    return isinstance(error, KeyboardInterrupt) and not without_signal()


def exit_code() -> int:
    """The conventional exit code: 143 after SIGTERM, else 130."""
    return 128 + (signal.SIGTERM if terminated() else signal.SIGINT)


def terminated() -> bool:
    """Whether SIGTERM was received; then don't prompt the user or start new work."""
    return signal.SIGTERM in _received


@dataclass
class Stop:
    """``requested``: a signal was received; work should end at the next safe point."""

    requested: bool = False


@contextlib.contextmanager
def deferred_interrupt(on_request: Callable[[], object] = lambda: None) -> Iterator[Stop]:
    """Defers the first Ctrl-C or SIGTERM to the end of the context; a second one raises at once.

    The first signal calls ``on_request`` and sets ``Stop.requested``, which the code inside checks to end early.

    Raises:
        KeyboardInterrupt: at the end of the context, if a signal was received.
    """
    stop = Stop()

    def handle(number: int, _frame: object) -> None:
        if stop.requested:
            _raise(number, _frame)
        _received.append(number)
        stop.requested = True
        on_request()

    with _handling(_SIGNALS, handle):
        yield stop
    if stop.requested:
        raise KeyboardInterrupt


def _raise(number: int, _frame: object) -> None:
    _received.append(number)
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


@contextlib.contextmanager
def _handling(numbers: tuple[int, ...], handler: Callable[[int, object], None]) -> Iterator[None]:
    """Installs ``handler`` within the context, except for signals that are ignored."""
    previous = {}
    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.getsignal(number) for number in numbers}
    previous = {number: old for number, old in previous.items() if old not in (signal.SIG_IGN, None)}
    try:
        for number in previous:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


class Interrupts:
    """Ctrl-C raises KeyboardInterrupt once after each ``arm``, and is ignored otherwise.

    For a program that continues after Ctrl-C: pressed several times, it interrupts neither cleaning up after the first
    one nor what follows.
    """

    def __init__(self) -> None:
        self._armed = False

    def arm(self) -> None:
        """The next Ctrl-C raises KeyboardInterrupt."""
        self._armed = True

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Handles Ctrl-C within the context."""
        with _handling((signal.SIGINT,), self._handle):
            yield

    def _handle(self, _number: int, _frame: object) -> None:
        if self._armed:
            self._armed = False
            raise KeyboardInterrupt
