"""The command line: parses arguments, calls a verb and prints its report.

Results go to stdout; logs, progress and errors go to stderr. Exit codes: 0 success, 1 error (one line and a hint,
see ``boundary``), 2 usage error, 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from typing import NoReturn

import click

from llavactl.cli import boundary, terminal
from llavactl.cli.root import root
from llavactl.core import stopping
from llavactl.core.network import proxy_error
from llavactl.core.paths import redirect_library_caches
from llavactl.core.plugins import log_failures
from llavactl.core.processes import exit_process, is_logged
from llavactl.core.progress import hide_library_bars
from llavactl.core.repeated_warnings import without_repeated_warnings
from llavactl.core.streams import is_terminal


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The entry point: runs ``llavactl ARGUMENTS`` and exits."""
    exit_process(run_command(sys.argv[1:] if arguments is None else arguments))


def run_command(arguments: Sequence[str]) -> int:
    """Runs ``llavactl ARGUMENTS``; returns the exit code."""
    _configure_libraries()
    _use_utf8()
    _log_to_stderr()
    with stopping.signals_as_interrupts():
        return _invoke(arguments)


def _configure_libraries() -> None:
    """Silences messages of libraries and sets environment variables that they read on import."""
    # These messages are meant for programmers; users of the command line can't act on them.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # reports missing kernels on every import
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft uses the old name
    warnings.filterwarnings("ignore", module=r"PIL\b")  # such images are read anyway, or listed as skipped
    # OpenMP threads that wait sleep at once: beside other load, spinning takes time from the threads they wait for.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if proxy_error():  # cached models of the hub load only in offline mode
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    redirect_library_caches()
    if not is_terminal(sys.stderr):
        hide_library_bars()


def _use_utf8() -> None:
    """Sets UTF-8 in any locale; undecodable bytes of file names are written unchanged."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")


def _invoke(arguments: Sequence[str]) -> int:
    try:
        code = root.main(list(arguments), prog_name="llavactl", standalone_mode=False, color=terminal.color())
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        boundary.report_usage(error)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt) as error:
        interrupt = error.__cause__ if isinstance(error, click.Abort) else error  # None: at a prompt of click
        by_code = isinstance(interrupt, KeyboardInterrupt) and not stopping.interrupted(interrupt)
        if interrupt is not None and by_code and boundary.explained(interrupt):  # a plugin raised it
            boundary.report(interrupt)
            return 1
        click.echo("; ".join(["interrupted", *getattr(interrupt, "__notes__", ())]), err=True)
        return stopping.exit_code()
    except BaseException as error:  # noqa: BLE001 - the error boundary
        if isinstance(error, SystemExit) and boundary.raised_in(error, "click"):  # click exits on a closed pipe
            return int(error.code or 0)
        boundary.report(error)
        return 1
    finally:
        log_failures()


class _StderrHandler(logging.Handler):
    """Prints each record as one line to the current ``sys.stderr``."""

    def __init__(self) -> None:
        super().__init__()
        self.addFilter(is_logged)
        self.addFilter(without_repeated_warnings())

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else "dim"
        verbose = logging.getLogger("llavactl").level <= logging.DEBUG
        at = f" {time.strftime('%H:%M:%S')}.{record.msecs:03.0f}" if verbose else ""
        boundary.message(f"llavactl{at}:", record.getMessage(), style)
        if record.exc_info and record.exc_info[1] is not None:
            boundary.print_traceback(record.exc_info[1])


def _log_to_stderr() -> None:
    """Logs from level INFO on; ``--quiet`` and ``--verbose`` change the level. Completing a word logs nothing."""
    log = logging.getLogger("llavactl")
    log.handlers = [_StderrHandler()]
    log.setLevel(logging.CRITICAL if "_LLAVACTL_COMPLETE" in os.environ else logging.INFO)
