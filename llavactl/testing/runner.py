"""Runs the command line in this process."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavactl.core import plugin_files, plugins


@dataclass(frozen=True)
class Result:
    """The ``exit_code`` of a command, ``stdout`` and ``stderr``; ``json()`` is the document on stdout."""

    exit_code: int
    stdout: str
    stderr: str

    def json(self) -> Any:
        """The JSON document on stdout (``--json``)."""
        return json.loads(self.stdout)


def run_cli(*arguments: str, cwd: Path | None = None, stdin: str = "") -> Result:
    """Runs ``llavactl ARGUMENTS`` in ``cwd``, including error handling; never raises SystemExit."""
    from llavactl.cli import run_command

    out, err = io.StringIO(), io.StringIO()
    before, argv, real_in, files = Path.cwd(), sys.argv, sys.stdin, os.environ.get(plugin_files.VARIABLE)
    try:
        if cwd is not None:
            os.chdir(cwd)
        sys.argv, sys.stdin = ["llavactl", *arguments], io.StringIO(stdin)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run_command(arguments)
    finally:
        os.chdir(before)
        sys.argv, sys.stdin = argv, real_in
        if os.environ.get(plugin_files.VARIABLE) != files:  # option --plugin
            os.environ.pop(plugin_files.VARIABLE)
            os.environ.update({} if files is None else {plugin_files.VARIABLE: files})
            plugins.reload()
    return Result(code, out.getvalue(), err.getvalue())
