"""Progress of long operations on stderr: a bar on a terminal, sparse log lines elsewhere.

Level WARNING of the logger ``llavactl`` hides both (``--quiet``).
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llavactl.core.control_characters import visible
from llavactl.core.memory import memory_bytes
from llavactl.core.processes import is_main_process
from llavactl.core.quantities import gigabytes
from llavactl.core.streams import is_terminal
from llavactl.core.typed import Typed

if TYPE_CHECKING:
    from llavactl.core.progress_line import Status

log = logging.getLogger(__name__)

FIRST_LINE_S = 5.0
LINE_EVERY_S = 30.0

SHORT_S = 1.0
"""A bar that was shown for less time disappears from the terminal."""


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

    def __init__(self, what: str, unit: str, total: int | None, start: int, *, memory: bool) -> None:
        self._what, self._unit, self._total, self._memory = visible(" ".join(what.split())), unit, total or 0, memory
        self._nothing_to_do = total is not None and total <= start
        self._start = self._done = self._logged = start
        self._facts: Mapping[str, str] = {}
        self._began = time.perf_counter()
        self._line: Any = None
        self._next_log = self._began + FIRST_LINE_S

    def advance(self, count: int = 1, **facts: str) -> None:
        """Advances the bar by ``count`` units and shows ``facts`` after it."""
        self._done, self._facts = self._done + count, facts
        if (listener := _listener.get()) is not None:
            listener(Progress(self._what, self._done, self._total, self._unit, self._start, facts))
        if self._line is not None:
            self._line.update(count)
        elif (now := time.perf_counter()) >= self._next_log:
            self._next_log = now + LINE_EVERY_S
            self._log()

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Shows the bar on the terminal, or logs its last state if it took long enough for earlier ones."""
        if not self._nothing_to_do and is_terminal(sys.stderr) and is_main_process() and not _quiet():
            from llavactl.core.progress_line import TerminalLine

            with TerminalLine(self._status, self._total, self._start, sys.stderr) as self._line:
                yield
                if time.perf_counter() < self._began + SHORT_S:
                    self._line.leave = False
            return
        yield
        if self._done != self._logged and time.perf_counter() >= self._began + FIRST_LINE_S:
            self._log()

    def _log(self) -> None:
        from llavactl.core.progress_line import log_line

        self._logged = self._done
        seconds = time.perf_counter() - self._began
        log.info("%s", log_line(self._status((self._done - self._start) / seconds if seconds else 0.0, seconds)))

    def _status(self, rate: float, seconds: float) -> Status:
        from llavactl.core.progress_line import Status

        facts = dict(self._facts)
        if self._memory:
            facts["memory"] = gigabytes(memory_bytes())
        return Status(self._what, self._done, self._total, self._unit, facts, rate, seconds)


@contextmanager
def bar(total: int | None, what: str, unit: str, start: int = 0, *, memory: bool = False) -> Iterator[Bar]:
    """A progress bar of ``total`` ``unit``s (None: unknown), starting at ``start``.

    ``memory``: show the memory of this process as well.
    """
    progress_bar = Bar(what, unit, total, start, memory=memory)
    with progress_bar.shown():
        yield progress_bar


@contextmanager
def bars_hidden() -> Iterator[None]:
    """Hides the progress bars on the terminal, including those of libraries, while something else is printed."""
    module = sys.modules.get("tqdm")
    if module is None:
        yield
        return
    with module.tqdm.external_write_mode(file=sys.stderr):
        yield


def hide_library_bars() -> None:
    """Hides the progress bars of libraries, not llavactl's, in this process and in those that it starts.

    It must be called before tqdm and huggingface_hub are imported, which read these variables. A setting of tqdm
    reaches all bars, also those that have no setting of their own, such as that of a conversion from GGUF.
    """
    os.environ["TQDM_DISABLE"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


def quiet_transformers() -> None:
    """Shows progress bars of transformers only where llavactl shows its own, and only after 2 s.

    Affects the whole process.
    """
    from transformers.utils import logging as transformers_logging

    def delayed(make: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        hidden = _quiet() or not is_terminal(sys.stderr)
        return make(*args, **{"delay": 2, "disable": hidden, "dynamic_ncols": True, "leave": False, **options})

    transformers_logging.set_tqdm_hook(delayed)


def _quiet() -> bool:
    return logging.getLogger("llavactl").level > logging.INFO
