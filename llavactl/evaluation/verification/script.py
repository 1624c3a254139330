"""Runs a format's verification script (``Format.reload``) in a Python process that can't import llavactl.

    python SCRIPT EXPORT PROMPTS.json OUT.safetensors

The script loads the export in float32 on the CPU and runs every prompt. ``PROMPTS.json`` is
``{"prompts": [...], "max_new_tokens": n}``. A prompt has:

  messages        the conversation for ``apply_chat_template``: roles, and content as lists of ``image`` and ``text``
  images          the paths of its images, in order
  text            the rendered conversation, for programs that split it at ``<image>`` and tokenize the pieces
  processor_text  the rendered conversation, for processors that tokenize it with image tokens

``OUT.safetensors`` has these tensors for prompt ``i`` (I images, T tokens, V vocabulary, N generated tokens):

  {i}.ids       [T]           token ids of the prompt; at image positions, one id that no text token has
  {i}.pixels    [I, 3, H, W]  preprocessed images; omitted without images
  {i}.logits    [T, V]        logits at every position of the prompt
  {i}.said      [N]           token ids of the greedy answer
  {i}.together  [N]           token ids of the greedy answer in a padded batch with another prompt; optional

Its metadata key ``stated`` is a JSON object of settings in the export's files, all of them optional:

  eos      end token ids in generation_config.json
  padding  padding side of the tokenizer
  dtype    list: the dtype in config.json
  saved    list: the dtypes of the language model's saved weights
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.core.errors import ModelError

if TYPE_CHECKING:
    import torch

MAX_NEW_TOKENS = 32

BLOCK_LLAVACTL = """\
import runpy, sys
sys.modules["llavactl"] = None
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script with ``import llavactl`` blocked, however llavactl is installed: an export must not depend on it."""

ScriptRunner = Callable[..., subprocess.CompletedProcess[str]]


@dataclass(frozen=True)
class ScriptOutputs:
    """The tensors that a verification script wrote, and the settings that it read from the export's files."""

    tensors: Mapping[str, torch.Tensor]
    stated: Mapping[str, Any]


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
        ModelError: the script failed; the message has the last line of its stderr.
    """
    from safetensors import safe_open

    prompts_file, out = folder / "prompts.json", folder / "out.safetensors"
    document = {"prompts": prompts, "max_new_tokens": MAX_NEW_TOKENS}
    prompts_file.write_text(json.dumps(document), encoding="utf-8")
    process = run(script, export, prompts_file, out)
    if process.returncode or not out.is_file():
        last_line = (process.stderr.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
        raise ModelError(f"{export}: a process without llavactl can't load it: {last_line}")
    with safe_open(out, "pt") as opened:
        stated = json.loads((opened.metadata() or {}).get("stated", "{}"))
        return ScriptOutputs({name: opened.get_tensor(name) for name in opened.keys()}, stated)  # noqa: SIM118
