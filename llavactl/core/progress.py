"""Progress bars on a terminal, sparse log lines elsewhere, with rate and remaining time; both on stderr."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from llavactl.core.processes import is_main_process
from llavactl.core.quantities import BYTE, duration, quantity, speed
from llavactl.core.typed import Typed

log = logging.getLogger(__name__)

LINE_EVERY_S = 30.0


@dataclass(frozen=True)
class Progress(Typed):
    """Progress of ``what``: ``done`` of ``total`` (0: unknown) ``unit``s, of which ``start`` before this run.

    ``facts`` are current values as formatted strings, such as the loss.
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
    """Calls ``listener`` at each update of a progress bar within the context; None keeps the current listener."""
    token = _listener.set(listener) if listener is not None else None
    try:
        yield
    finally:
        if token is not None:
            _listener.reset(token)


class Bar:
    """A progress bar."""

    def __init__(self, inner: Any, what: str, unit: str, total: int, start: int) -> None:
        self._inner, self._what, self._unit, self._total = inner, what, unit, total
        self._start = self._done = start
        self._began = self._logged = time.perf_counter()

    def advance(self, count: int = 1, **facts: str) -> None:
        """Advances the bar by ``count`` units and shows ``facts`` after it."""
        self._done += count
        if (listener := _listener.get()) is not None:
            listener(Progress(self._what, self._done, self._total, self._unit, self._start, facts))
        if not self._inner.disable:
            self._inner.set_postfix(facts, refresh=False)
            self._inner.update(count)
        elif (now := time.perf_counter()) - self._logged >= LINE_EVERY_S:
            self._logged = now
            self._log_line((self._done - self._start) / (now - self._began), facts)

    def _log_line(self, rate: float, facts: dict[str, str]) -> None:
        of_total = f" of {quantity(self._total, self._unit)}" if self._total else ""
        done = f"{self._done:,}" if self._total and self._unit != BYTE else quantity(self._done, self._unit)
        left = f", {duration((self._total - self._done) / rate)} left" if rate and self._total else ""
        also = "".join(f", {name} {value}" for name, value in facts.items())
        log.info("%s: %s%s, %s%s%s", self._what, done, of_total, speed(rate, self._unit), also, left)


@contextmanager
def bar(total: int | None, what: str, unit: str, start: int = 0) -> Iterator[Bar]:
    """A progress bar of ``total`` ``unit``s (None: unknown), starting at ``start``."""
    from tqdm import tqdm

    disable = not sys.stderr.isatty() or total == 0 or not is_main_process()
    shown: dict[str, Any] = {"unit": "B", "unit_scale": True} if unit == BYTE else {"unit": unit}
    with tqdm(
        total=total, desc=what, initial=start, file=sys.stderr, disable=disable, smoothing=0.05, **shown
    ) as inner:
        yield Bar(inner, what, unit, total or 0, start)


def quiet_transformers() -> None:
    """Shows progress bars of transformers only on a terminal, and only after 2 s; affects the whole process."""
    from transformers.utils import logging as transformers_logging

    def delayed(make: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        return make(*args, **{"delay": 2, "disable": None, **options})

    transformers_logging.set_tqdm_hook(delayed)
