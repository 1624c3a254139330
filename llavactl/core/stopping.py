"""Clean shutdown on Ctrl-C and on SIGTERM, which Slurm, `docker stop` and spot instances send.

Both raise KeyboardInterrupt, so that clean-up code for Ctrl-C also runs after SIGTERM. Work that should stop only at
certain points, such as the end of a training step, defers the first signal. Only the exit codes differ.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_SIGNALS = signal.SIGINT, signal.SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM was received. A subclass, since Python may exit with 130 after a plain KeyboardInterrupt."""


_received: list[int] = []
"""The signals received within ``signals``."""


@contextlib.contextmanager
def signals() -> Iterator[None]:
    """In this context SIGTERM stops the program as Ctrl-C does; in the main thread only, unless it is ignored."""
    _received.clear()
    with _handling((signal.SIGTERM,), _raise):
        yield


def exit_code() -> int:
    """The conventional exit code: 143 after SIGTERM, else 130."""
    return 128 + (signal.SIGTERM if terminated() else signal.SIGINT)


def terminated() -> bool:
    """Whether SIGTERM was received: then ask the user nothing, and start no further work."""
    return signal.SIGTERM in _received


@dataclass
class Stop:
    """``asked``: a signal was received, and the work should end."""

    asked: bool = False


@contextlib.contextmanager
def deferred(land: Callable[[], object] = lambda: None) -> Iterator[Stop]:
    """In this context the first Ctrl-C or SIGTERM only calls ``land``; a second one raises at once.

    The code inside checks the ``Stop`` and ends early.

    Raises:
        KeyboardInterrupt: at the end, if a signal was received.
    """
    stop = Stop()

    def first(number: int, _frame: object) -> None:
        if stop.asked:
            _raise(number, _frame)
        _received.append(number)
        stop.asked = True
        land()

    with _handling(_SIGNALS, first):
        yield stop
    if stop.asked:
        raise KeyboardInterrupt


def _raise(number: int, _frame: object) -> None:
    _received.append(number)
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


@contextlib.contextmanager
def _handling(numbers: tuple[int, ...], handler: Callable[[int, object], None]) -> Iterator[None]:
    """Installs ``handler``, except for signals that the program was started to ignore."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {each: signal.getsignal(each) for each in numbers}
    before = {each: old for each, old in before.items() if old not in (signal.SIG_IGN, None)}
    try:
        for each in before:
            signal.signal(each, handler)
        yield
    finally:
        for each, old in before.items():
            signal.signal(each, old)
