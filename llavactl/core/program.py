"""The command that runs this installation of llavactl, for messages that suggest a command."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path


def command_line(*arguments: str) -> str:
    """``llavactl ARGUMENTS`` for a shell; ``make demo`` doesn't put llavactl on the path."""
    return shlex.join([*_program(), *arguments])


def _program() -> list[str]:
    if shutil.which("llavactl"):
        return ["llavactl"]
    python = Path(sys.executable)
    return [str(python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python), "-m", "llavactl"]
