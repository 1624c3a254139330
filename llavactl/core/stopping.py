"""Ctrl-C and SIGTERM, by which Slurm, `docker stop` and spot machines end a program: both stop a command in order.

Either raises KeyboardInterrupt, so that whatever tidies up after Ctrl-C does after SIGTERM, too. Work that is best
stopped at a moment of its own choice, such as the end of a training step, defers the first one. Only the exit code
tells the two apart.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_SIGNALS = signal.SIGINT, signal.SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM has come. A class of its own, for where Python saw a KeyboardInterrupt itself it may exit with 130."""


_received: list[int] = []
"""The signals that came while ``signals`` lasts."""


@contextlib.contextmanager
def signals() -> Iterator[None]:
    """While this lasts, SIGTERM stops the program as Ctrl-C does; only in the main thread, and unless it is ignored."""
    _received.clear()
    with _handling((signal.SIGTERM,), _raise):
        yield


def exit_code() -> int:
    """How shells put it: 143 after a SIGTERM, else 130."""
    return 128 + (signal.SIGTERM if terminated() else signal.SIGINT)


def terminated() -> bool:
    """Whether a SIGTERM has come: then nothing is to be asked and nothing more to be begun."""
    return signal.SIGTERM in _received


@dataclass
class Stop:
    """``asked``: a signal has come, and the work should end."""

    asked: bool = False


@contextlib.contextmanager
def deferred(land: Callable[[], object] = lambda: None) -> Iterator[Stop]:
    """While this lasts, the first Ctrl-C or SIGTERM only calls ``land``; a second one raises at once.

    What is inside looks at the ``Stop`` and ends early.

    Raises:
        KeyboardInterrupt: at the end, if one has come.
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
    """Puts ``handler`` in place, but for signals that this program was started to ignore."""
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
