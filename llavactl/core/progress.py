"""How far a long work is: a bar on a terminal's stderr, sparse log lines elsewhere; with rate and time left."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from llavactl.core.typed import Typed

log = logging.getLogger(__name__)

LINE_EVERY_S = 30.0


@dataclass(frozen=True)
class Progress(Typed):
    """``done`` of ``total`` (0: unknown) ``unit``s of the work ``what``, ``start`` of them before this run.

    ``facts`` are current values, such as the loss.
    """

    what: str
    done: int
    total: int
    unit: str
    start: int
    facts: Mapping[str, str]


_listener: ContextVar[Callable[[Progress], object] | None] = ContextVar("listener", default=None)


@contextmanager
def reporting_to(listener: Callable[[Progress], object] | None) -> Iterator[None]:
    """Calls ``listener`` at every update of a bar within the context; None keeps the current listener."""
    token = _listener.set(listener) if listener is not None else None
    try:
        yield
    finally:
        if token is not None:
            _listener.reset(token)


class Bar:
    """Counts what is done of ``total``."""

    def __init__(self, inner: Any, what: str, unit: str, total: int, start: int) -> None:
        self._inner, self._what, self._unit, self._total = inner, what, unit, total
        self._start = self._done = start
        self._began = self._said = time.perf_counter()

    def show(self, count: int = 1, **facts: str) -> None:
        """``count`` more are done; ``facts`` stand behind the bar."""
        self._done += count
        if (listener := _listener.get()) is not None:
            listener(Progress(self._what, self._done, self._total, self._unit, self._start, facts))
        if not self._inner.disable:
            self._inner.set_postfix(facts, refresh=False)
            self._inner.update(count)
        elif (now := time.perf_counter()) - self._said >= LINE_EVERY_S:
            self._said = now
            self._line((self._done - self._start) / (now - self._began), facts)

    def _line(self, rate: float, facts: dict[str, str]) -> None:
        left = f", {(self._total - self._done) / rate:.0f} s left" if rate else ""
        also = "".join(f", {name} {value}" for name, value in facts.items())
        unit = f"{self._unit}s"
        log.info("%s: %d of %d %s, %.2g a second%s%s", self._what, self._done, self._total, unit, rate, also, left)


@contextmanager
def bar(total: int, what: str, unit: str, start: int = 0) -> Iterator[Bar]:
    """A bar of ``total`` ``unit``s, of which ``start`` are done already."""
    from tqdm import tqdm

    off = not (sys.stderr.isatty() and total)
    with tqdm(total=total, desc=what, unit=unit, initial=start, file=sys.stderr, disable=off, smoothing=0.05) as inner:
        yield Bar(inner, what, unit, total, start)


def calm_transformers() -> None:
    """Bars of transformers, here and in what follows, show on a terminal alone, and only for what takes seconds."""
    from transformers.utils import logging as transformers_logging

    def patient(make: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        return make(*args, **{"delay": 2, "disable": None, **options})

    transformers_logging.set_tqdm_hook(patient)
