"""The command line: parse, call the verb, print. Here is its one error boundary.

stdout has results and nothing else; logs, progress and errors go to stderr. Exit codes: 0 done,
1 a typed error, 2 usage, 130 Ctrl-C, 143 SIGTERM. What isn't a ``LlavactlError`` is a defect and keeps its traceback.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

import click

from llavactl.cli.root import root
from llavactl.core import stopping
from llavactl.core.errors import LlavactlError, RecipeError


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point: runs ``llavactl ARGUMENTS`` and exits."""
    _hush_libraries()
    _speak_utf8()
    _log_to_stderr()
    with stopping.signals():
        code = _run(sys.argv[1:] if arguments is None else arguments)
    sys.exit(code)


def _hush_libraries() -> None:
    """What they advise is for programmers, and nothing that who reads it here could do."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # asks for kernels from a hub at every import
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft asks it by its old name
    warnings.filterwarnings("ignore", module=r"PIL\b")  # odd images are read all the same, or listed


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
    except LlavactlError as error:
        _report(error)
        return 1
    except OSError as error:
        if error.filename is None or error.strerror is None:
            return _defect()
        _report(LlavactlError(f"{error.filename}: {error.strerror}", hint="free some disk, or mend its permissions"))
        return 1
    except Exception:  # noqa: BLE001 - the one boundary; what arrives here is a defect
        return _defect()


def _defect() -> int:
    traceback.print_exc()
    click.echo("this is a defect of llavactl or of a plugin named above: please report it with these lines", err=True)
    return 1


def _report(error: LlavactlError) -> None:
    """One line a problem, and one with the way out."""
    problems = [str(problem) for problem in error.problems] if isinstance(error, RecipeError) else []
    for problem in problems or [error.message]:
        click.echo(f"error: {_line(problem)}", err=True)
    if error.hint:
        click.echo(f"hint: {_line(error.hint)}", err=True)


class _Stderr(logging.Handler):
    """One line a record, on whatever stderr is now."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(f"llavactl: {_line(self.format(record))}", err=True)


def _log_to_stderr() -> None:
    log = logging.getLogger("llavactl")
    log.handlers = [_Stderr()]
    log.setLevel(logging.INFO)


def _line(text: str) -> str:
    return " ".join(text.split())
