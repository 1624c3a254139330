"""The command that runs this installation of llavactl, for messages that suggest a command."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

from llavactl.core.locations import shown_path


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
