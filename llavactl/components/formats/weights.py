"""Some of the tensors of a checkpoint that another program wrote; pickles are read as tensors and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.core import progress
from llavactl.core.errors import ModelError
from llavactl.core.library_errors import loading, reading
from llavactl.core.model_files import check_files, weight_files

if TYPE_CHECKING:
    import torch


def files(folder: Path) -> list[Path]:
    """The weight files of ``folder``.

    Raises:
        ModelError: the index can't be read, or a file is missing or a Git LFS pointer.
    """
    found = weight_files(folder)
    check_files(found)
    return found


def tensors(folder: Path, prefixes: Sequence[str]) -> dict[str, torch.Tensor]:
    """The tensors of ``folder`` whose names begin with one of ``prefixes``; opens every weight file."""
    found: dict[str, torch.Tensor] = {}
    for file in files(folder):
        found |= read(file, prefixes)
    return found


def names(folder: Path) -> set[str]:
    """The names of the tensors in ``folder``; no weights are read."""
    import torch
    from safetensors import safe_open

    found: set[str] = set()
    for file in files(folder):
        with reading(file):
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as opened:
                    found.update(opened.keys())
            else:
                found.update(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
    return found


def read(file: Path, prefixes: Sequence[str] = ("",)) -> dict[str, torch.Tensor]:
    """The tensors of one file whose names begin with one of ``prefixes``.

    Raises:
        ModelError: it can't be read, or holds more than tensors.
    """
    import torch
    from safetensors import safe_open

    check_files([file])
    with reading(file):
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys() if _begins(name, prefixes)}  # noqa: SIM118
        held: Mapping[str, torch.Tensor] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(held, Mapping) or not all(isinstance(weight, torch.Tensor) for weight in held.values()):
        raise ModelError(f"{file}: expected a mapping from names to tensors")
    return {name: weight for name, weight in held.items() if _begins(name, prefixes)}


def unused(kind: Any, model: str, **how: Any) -> list[str]:
    """The names of the tensors of checkpoint ``model`` that a model of class ``kind`` doesn't use.

    Decided by transformers, which knows older tensor names; loaded on the meta device, without weights in memory.

    Raises:
        ModelError: tensors are missing or have another shape, or the checkpoint can't be read.
    """
    from transformers.utils import logging

    progress.quiet_transformers()
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it would print these names as a table
    try:
        with loading("checkpoint", model, weights=True):
            made, info = kind.from_pretrained(
                model, device_map="meta", output_loading_info=True, trust_remote_code=False, **how
            )
    finally:
        logging.set_verbosity(level)
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"{model}: {len(missing)} tensors of {type(made).__name__} are missing, such as {missing[0]}")
    return sorted(info["unexpected_keys"])


def _begins(name: str, prefixes: Sequence[str]) -> bool:
    return name.startswith(tuple(prefixes))
