"""The command line: parse, call the verb, print.

Results go to stdout; logs, progress and errors go to stderr. Exit codes: 0 success, 1 error (one line and a hint,
see ``boundary``), 2 usage, 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Sequence

import click

from llavactl.cli import boundary
from llavactl.cli.root import root
from llavactl.core import stopping
from llavactl.core.network import proxy_fault
from llavactl.core.paths import redirect_library_caches


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point: runs ``llavactl ARGUMENTS`` and exits."""
    _set_environment()
    _speak_utf8()
    _log_to_stderr()
    with stopping.sigterm_as_interrupt():
        code = _run(sys.argv[1:] if arguments is None else arguments)
    sys.exit(code)


def _set_environment() -> None:
    """Sets what libraries read from the environment when they are imported."""
    # Their advice is meant for programmers; users of the command line can't act on it.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # asks for kernels from a hub at every import
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft asks it by its old name
    warnings.filterwarnings("ignore", module=r"PIL\b")  # odd images are read all the same, or listed
    if proxy_fault():  # offline, cached models of the hub still load
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    redirect_library_caches()


def _speak_utf8() -> None:
    """Answers and paths have signs that a locale may not; what isn't text in a file's name goes through as it is."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")


def _run(arguments: Sequence[str]) -> int:
    try:
        code = root.main(list(arguments), prog_name="llavactl", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; run the same command to resume", err=True)
        return stopping.exit_code()
    except (Exception, SystemExit, GeneratorExit) as error:  # noqa: BLE001 - the one boundary
        if isinstance(error, SystemExit) and boundary.raised_in(error, "click"):  # for a closed pipe
            return int(error.code or 0)
        boundary.report(error)
        return 1


class _Stderr(logging.Handler):
    """One line a record, on whatever stderr is now."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(f"llavactl: {boundary.line(self.format(record))}", err=True)


def _log_to_stderr() -> None:
    log = logging.getLogger("llavactl")
    log.handlers = [_Stderr()]
    log.setLevel(logging.INFO)
