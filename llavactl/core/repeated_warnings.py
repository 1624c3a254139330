"""Each warning is printed once per command, although several steps read the same data and warn about it."""

from __future__ import annotations

import logging
from collections.abc import Callable


def without_repeated_warnings() -> Callable[[logging.LogRecord], bool]:
    """A filter for a log handler: rejects a warning with the text of an earlier one."""
    printed: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING:
            return True
        text = record.getMessage()
        if text in printed:
            return False
        printed.add(text)
        return True

    return is_new
