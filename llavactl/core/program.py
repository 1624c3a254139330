"""The command that runs this installation of llavactl, for messages that suggest a command."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path


def command_line(*arguments: str) -> str:
    """``llavactl ARGUMENTS`` for a shell, with its path if another llavactl, or none, is on PATH."""
    return shlex.join([*_program(), *arguments])


def _program() -> list[str]:
    python = Path(sys.executable)
    script = python.parent / "llavactl"
    if shutil.which("llavactl") == str(script):
        return ["llavactl"]
    if script.is_file():
        return [shown_path(script)]
    return [shown_path(python), "-m", "llavactl"]


def shown_path(path: Path) -> str:
    """``path``, relative to the working directory if it is below it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
