"""Runs a format's verification script (``Format.reload``) in a Python process that can't import llavactl.

    python SCRIPT EXPORT PROMPTS.json OUT.safetensors

The script loads the export in float32 on the CPU and runs every prompt. ``PROMPTS.json`` is
``{"prompts": [...], "max_new_tokens": n}``. A prompt has:

  messages        the conversation for ``apply_chat_template``: roles, and content as lists of ``image`` and ``text``
  images          the paths of its images, in order
  text            the rendered conversation, for programs that split it at ``<image>`` and tokenize the pieces
  processor_text  the rendered conversation, for processors that tokenize it with image tokens

``outputs`` documents ``OUT.safetensors``. The script exits with status 69 (EX_UNAVAILABLE of sysexits.h) if the program
that loads the export isn't installed; the last line of its stderr then states how to install it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llavactl.core.errors import ModelError, ProgramMissingError
from llavactl.evaluation.verification.outputs import ScriptOutputs, read_outputs

MAX_NEW_TOKENS = 32

PROGRAM_MISSING = 69
"""Exit status of a script whose program isn't installed; os.EX_UNAVAILABLE, which Windows lacks."""

BLOCK_LLAVACTL = """\
import runpy, sys
sys.modules["llavactl"] = None
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script with ``import llavactl`` blocked, however llavactl is installed: an export must not depend on it."""

ScriptRunner = Callable[..., subprocess.CompletedProcess[str]]


def run_isolated(script: Path, *arguments: Path) -> subprocess.CompletedProcess[str]:
    """Runs ``script`` in a separate Python process with the same packages except llavactl."""
    command = [sys.executable, "-P", "-c", BLOCK_LLAVACTL, str(script), *map(str, arguments)]
    return subprocess.run(  # noqa: S603 - our own script
        command, capture_output=True, encoding="utf-8", errors="replace", check=False
    )


def run_script(
    run: ScriptRunner, script: Path, export: Path, prompts: Sequence[Mapping[str, Any]], folder: Path
) -> ScriptOutputs:
    """The outputs of ``script`` for ``prompts``; ``folder`` holds its input and output files.

    Raises:
        ProgramMissingError: the program that loads the export isn't installed.
        ModelError: the script failed, with the last line of its stderr, or its outputs aren't those of a verification
            script.
    """
    prompts_file, out = folder / "prompts.json", folder / "out.safetensors"
    document = {"prompts": prompts, "max_new_tokens": MAX_NEW_TOKENS}
    prompts_file.write_text(json.dumps(document), encoding="utf-8")
    process = run(script, export, prompts_file, out)
    last_line = (process.stderr.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
    if process.returncode == PROGRAM_MISSING:
        raise ProgramMissingError(last_line)
    if process.returncode:
        raise ModelError(f"{export}: a process without llavactl can't load it: {last_line}")
    return read_outputs(script.name, out, [len(prompt["images"]) for prompt in prompts])
