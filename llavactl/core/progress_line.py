"""A progress bar as text: one line that fits the width of a terminal, and a complete line for pipes and log files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TextIO

from tqdm import tqdm
from tqdm.utils import disp_len, disp_trim

from llavactl.core.quantities import BYTE, duration, quantity, speed

GAP = "  "
"""Between the parts of a line on a terminal."""

IMPORTANT = ("time", "loss", "speed", "memory", "percent", "bar")
"""Parts of a line, the most important one first; the other values follow."""

_BLOCKS = 10
"""The width of the bar itself."""

WIDTH = 80
"""Of a terminal that doesn't report its width."""


@dataclass(frozen=True)
class Status:
    """The state of a progress bar. ``rate`` is in units per second, 0 if unknown; ``facts``: see ``Progress``.

    ``seconds``: the time since the bar was shown.
    """

    what: str
    done: int
    total: int
    unit: str
    facts: Mapping[str, str]
    rate: float
    seconds: float

    @property
    def time(self) -> str:
        """The remaining time, or the elapsed time after the last unit; empty if it can't be estimated."""
        if self.total and self.done >= self.total:
            return f"in {duration(self.seconds)}"
        return f"{duration((self.total - self.done) / self.rate)} left" if self.rate and self.total else ""

    @property
    def speed(self) -> str:
        return speed(self.rate, self.unit) if self.rate else ""


def log_line(status: Status) -> str:
    """``status`` with all its parts, for a log."""
    done = f"{status.done:,}" if status.total and status.unit != BYTE else quantity(status.done, status.unit)
    of_total = f" of {quantity(status.total, status.unit)}" if status.total else ""
    facts = (f"{name} {value}" for name, value in status.facts.items())
    parts = (f"{status.what}: {done}{of_total}", status.speed, *facts, status.time)
    return ", ".join(filter(None, parts))


def terminal_line(status: Status, width: int, *, ascii_only: bool = False) -> str:
    """``status`` in at most ``width`` columns: its least important parts are left out."""
    if status.total and status.unit != BYTE:
        done = f"{status.done:,}/{status.total:,}"
    elif status.total:
        done = f"{quantity(status.done, BYTE)}/{quantity(status.total, BYTE)}"
    else:
        done = quantity(status.done, status.unit)
    share = min(status.done / status.total, 1.0) if status.total else 0.0
    parts = {
        "bar": f"|{_blocks(share, ascii_only=ascii_only)}|" if status.total else "",
        "percent": f"{share:3.0%}" if status.total else "",
        "done": done,
        "speed": status.speed,
        "time": status.time,
        **{name: f"{name} {value}" for name, value in status.facts.items()},
    }
    shown = {"done"}
    left = width - disp_len(status.what) - len(GAP + done)
    for name in dict.fromkeys((*IMPORTANT, *status.facts)):
        text = parts.get(name, "")
        if text and disp_len(GAP + text) <= left:
            left -= disp_len(GAP + text)
            shown.add(name)
    what = status.what if left >= 0 else disp_trim(status.what, max(disp_len(status.what) + left - 1, 0)) + "…"
    return disp_trim(GAP.join([what, *(text for name, text in parts.items() if name in shown)]), width)


def _blocks(share: float, *, ascii_only: bool) -> str:
    full, part = divmod(round(share * _BLOCKS * 8), 8)
    if ascii_only:
        return ("#" * full).ljust(_BLOCKS)
    return ("█" * full + " ▏▎▍▌▋▊▉"[part]).ljust(_BLOCKS)[:_BLOCKS]


class TerminalLine(tqdm):  # type: ignore[type-arg]
    """A tqdm bar that shows ``terminal_line`` in the current width of the terminal.

    tqdm smooths the rate, limits the refreshes, stacks nested bars, and hides them while others print.
    """

    def __init__(self, status: Callable[[float, float], Status], total: int, start: int, file: TextIO) -> None:
        """``status`` returns the state at a rate and after a number of seconds."""
        self._status = status
        self._ascii_only = "utf" not in (file.encoding or "").lower()
        # Without `disable`, the variable TQDM_DISABLE would decide.
        super().__init__(total=total or None, initial=start, file=file, leave=None, smoothing=0.05, disable=False)

    def __str__(self) -> str:
        state = self.format_dict
        seconds = state["elapsed"]
        rate = state["rate"] or ((self.n - self.initial) / seconds if seconds else 0.0)
        return terminal_line(self._status(rate, seconds), _width(self.fp), ascii_only=self._ascii_only)

    @staticmethod
    def status_printer(file):  # type: ignore[no-untyped-def]
        """Overwrites the line up to the current width: tqdm pads to the previous length, which may be wider."""

        def show(text: str) -> None:
            file.write(f"\r{text}{' ' * (_width(file) - disp_len(text))}\r{text}")
            file.flush()

        return show


def _width(file: TextIO) -> int:
    """The current width of the terminal ``file``, less the cursor and the ``^C`` that it shows for Ctrl-C."""
    try:
        width = os.get_terminal_size(file.fileno()).columns or WIDTH
    except (OSError, ValueError):
        width = WIDTH
    return max(width - 3, 1)
