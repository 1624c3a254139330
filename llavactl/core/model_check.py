"""Checks that a model can be loaded, without reading its weights."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from llavactl.core.errors import ModelError
from llavactl.core.hub import download_file
from llavactl.core.library_errors import needs_custom_code
from llavactl.core.model_files import check_files, quantization_method, weight_files
from llavactl.core.paths import read_json

LANGUAGE = "language model"
"""The role of a language model in messages."""


def check_model(
    model: str | Path, what: str, names: Sequence[str] = (), *, weights: bool = False, hint: str = ""
) -> None:
    """Checks that ``model`` (a folder or an id) can be loaded, without reading weights.

    Checks its configuration and those of the files ``names`` that exist; with ``weights``, also the weight files of a
    folder. ``what`` is the role of the model in messages, such as "language model".

    Raises:
        ModelError: a file is missing or broken, the weights are quantized, or the model needs custom code.
    """
    local = Path(model).is_absolute()
    folder = Path(model) if local else _cached_folder(str(model), what, hint)
    if not (folder / "config.json").is_file():
        why = "no config.json" if folder.is_dir() else "no such folder"
        raise ModelError(f"{what} {model}: {why}", hint=hint)
    if any("\ud800" <= sign <= "\udfff" for sign in str(folder)):
        code = sys.getfilesystemencoding()
        raise ModelError(
            f"{what} {folder}: the folder's name is not valid {code}",
            hint="rename the folder" if code == "utf-8" else "set PYTHONUTF8=1, or a UTF-8 locale (LC_ALL=C.UTF-8)",
        )
    checked = ("config.json", "generation_config.json", *names)
    check_files([folder / name for name in checked if os.path.lexists(folder / name)])
    if method := quantization_method(folder):
        also = "; `stage2.method: qlora` quantizes it for training" if what == LANGUAGE else ""
        raise ModelError(f"{what} {model}: quantized weights ({method})", hint=f"use the unquantized model{also}")
    if "/" in str(read_json(folder / "config.json").get("attn_implementation", "")):  # a kernel on the hub
        raise needs_custom_code(what, model)
    if weights and local:
        check_files(weight_files(folder))


def _cached_folder(model: str, what: str, hint: str) -> Path:
    """The folder in the hub's cache with the configuration of ``model``; downloads it if necessary."""
    return download_file("config.json", what, model, hint).parent
