"""Keeps standard output for results: anything else that is printed goes to stderr."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO

STDOUT, STDERR = 1, 2

_results: TextIO | None = None


def results() -> TextIO:
    """The stream for results: standard output, also while it is diverted."""
    return _results or sys.stdout


@contextlib.contextmanager
def diverted() -> Iterator[None]:
    """In this context standard output goes to stderr: what plugins and libraries print isn't mixed with results.

    If standard output is a real file, its descriptor is redirected, which includes ``os.write``, C libraries and child
    processes; otherwise (in tests) only ``sys.stdout`` is.
    """
    global _results
    if _results is not None:
        yield
        return
    ours = sys.stdout
    if not _is_descriptor(ours):
        _results, sys.stdout = ours, sys.stderr
        try:
            yield
        finally:
            _results, sys.stdout = None, ours
        return
    ours.flush()
    kept = os.dup(STDOUT)
    _results = io.TextIOWrapper(
        open(kept, "wb"),  # noqa: PTH123, SIM115 - a descriptor; closed below
        encoding=ours.encoding, errors=ours.errors, line_buffering=True,
    )  # fmt: skip
    os.dup2(STDERR, STDOUT)
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):
            ours.flush()
        os.dup2(kept, STDOUT)
        written, _results = _results, None
        with contextlib.suppress(OSError):  # the reader has closed the pipe
            written.close()


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """The real standard output within ``diverted``: for interactive input, whose prompt and line editing need it."""
    if not isinstance(_results, io.TextIOWrapper) or not _is_descriptor(sys.stdout):
        yield
        return
    _results.flush()
    os.dup2(_results.fileno(), STDOUT)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(STDERR, STDOUT)


def _is_descriptor(stream: TextIO) -> bool:
    """Whether ``stream`` writes to file descriptor 1, and descriptor 2 is open."""
    try:
        os.fstat(STDERR)
        return stream.fileno() == STDOUT
    except (OSError, ValueError, AttributeError):
        return False
