"""Reserves standard output for results; all other output goes to stderr."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO

STDOUT, STDERR = 1, 2

_results: TextIO | None = None


def result_stream() -> TextIO:
    """The stream for results: standard output, also within ``stdout_to_stderr``."""
    return _results or sys.stdout


def is_terminal(stream: TextIO) -> bool:
    """Whether ``stream`` is a terminal that can move its cursor."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Redirects standard output to stderr, so that output of plugins and libraries isn't mixed with results.

    If standard output is a real file, its descriptor is redirected, which includes ``os.write``, C libraries and child
    processes. Otherwise (in tests) only ``sys.stdout`` is.
    """
    global _results
    if _results is not None:
        yield
        return
    stdout = sys.stdout
    if not _is_descriptor(stdout):
        _results, sys.stdout = stdout, sys.stderr
        try:
            yield
        finally:
            _results, sys.stdout = None, stdout
        return
    stdout.flush()
    saved = os.dup(STDOUT)
    _results = io.TextIOWrapper(
        open(saved, "wb"),  # noqa: PTH123, SIM115 - a descriptor; closed below
        encoding=stdout.encoding, errors=stdout.errors, line_buffering=True,
    )  # fmt: skip
    os.dup2(STDERR, STDOUT)
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):
            stdout.flush()
        os.dup2(saved, STDOUT)
        written, _results = _results, None
        with contextlib.suppress(OSError):  # closed pipe
            written.close()


@contextlib.contextmanager
def real_stdout() -> Iterator[None]:
    """Restores standard output within ``stdout_to_stderr``, for the prompt and line editing of interactive input."""
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
