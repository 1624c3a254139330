"""Reads tensors of other programs' checkpoints; from pickles, only tensors are loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    paths = weight_files(folder)
    check_files(paths)
    return paths


def read_tensors(folder: Path, prefixes: Sequence[str]) -> dict[str, torch.Tensor]:
    """The tensors of ``folder`` whose names begin with one of ``prefixes``; opens every weight file."""
    tensors: dict[str, torch.Tensor] = {}
    for file in files(folder):
        tensors |= read_file(file, prefixes)
    return tensors


def tensor_names(folder: Path) -> set[str]:
    """The names of the tensors in ``folder``; no weights are read."""
    import torch
    from safetensors import safe_open

    names: set[str] = set()
    for file in files(folder):
        with reading(file):
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as opened:
                    names.update(opened.keys())
            else:
                names.update(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
    return names


def read_file(file: Path, prefixes: Sequence[str] = ("",)) -> dict[str, torch.Tensor]:
    """The tensors in ``file`` whose names begin with one of ``prefixes``.

    Raises:
        ModelError: the file can't be read, or contains something other than tensors.
    """
    import torch
    from safetensors import safe_open

    check_files([file])
    with reading(file):
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys() if _has_prefix(name, prefixes)}  # noqa: SIM118
        state: Mapping[str, torch.Tensor] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(state, Mapping) or not all(isinstance(weight, torch.Tensor) for weight in state.values()):
        raise ModelError(f"{file}: expected a mapping from names to tensors")
    return {name: weight for name, weight in state.items() if _has_prefix(name, prefixes)}


def unexpected_tensors(model_class: Any, model: str, **load_options: Any) -> list[str]:
    """The names of the tensors of checkpoint ``model`` that ``model_class`` doesn't use.

    transformers, which converts older tensor names, loads the checkpoint on the meta device, without weights in memory.

    Raises:
        ModelError: tensors are missing or have another shape, or the checkpoint can't be read.
    """
    with loading("checkpoint", model, weights=True):
        loaded, info = model_class.from_pretrained(
            model, device_map="meta", output_loading_info=True, trust_remote_code=False, **load_options
        )
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{model}: {len(missing)} tensors of {type(loaded).__name__} are missing, such as {missing[0]}"
        )
    return sorted(info["unexpected_keys"])


def _has_prefix(name: str, prefixes: Sequence[str]) -> bool:
    return name.startswith(tuple(prefixes))
