"""Some of the tensors of a checkpoint that another program wrote; pickles are read as tensors and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.core import progress
from llavactl.core.errors import ModelError

if TYPE_CHECKING:
    import torch

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""In the order in which transformers looks for them: where several lie in a folder, only the first counts."""

_POINTER = b"version https://git-lfs.github.com/spec/"
_POINTER_BYTES = 1024


def files(folder: Path) -> list[Path]:
    """The weight files of ``folder``.

    Raises:
        ModelError: the index can't be read, or one that it names is missing or a Git LFS pointer.
    """
    first = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    found = [] if first is None else [first]
    if first is not None and first.suffix == ".json":
        refuse_pointer(first)
        try:
            shards = sorted(set(json.loads(first.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{first}: not an index of weight files", hint="is the download complete?") from error
        if missing := [shard for shard in shards if not (folder / shard).is_file()]:
            raise ModelError(f"{folder}: {len(missing)} weight files are missing, such as {missing[0]}")
        found = [folder / shard for shard in shards]
    for file in found:
        refuse_pointer(file)
    return found


def refuse_pointer(file: Path) -> None:
    """Raises ModelError where ``file`` is what Git LFS leaves in the place of a file that it did not download."""
    if file.stat().st_size < _POINTER_BYTES and file.read_bytes().startswith(_POINTER):
        raise ModelError(f"{file}: a Git LFS pointer, not the file itself", hint="run `git lfs pull` in its repository")


def tensors(folder: Path, prefixes: Sequence[str]) -> dict[str, torch.Tensor]:
    """The tensors of ``folder`` whose names begin with one of ``prefixes``; every weight file is opened."""
    found: dict[str, torch.Tensor] = {}
    for file in files(folder):
        found |= read(file, prefixes)
    return found


def read(file: Path, prefixes: Sequence[str] = ("",)) -> dict[str, torch.Tensor]:
    """The tensors of one file whose names begin with one of ``prefixes``.

    Raises:
        ModelError: it can't be read, or holds more than tensors.
    """
    import pickle

    import torch
    from safetensors import SafetensorError, safe_open

    try:
        refuse_pointer(file)
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys() if _begins(name, prefixes)}  # noqa: SIM118
        held: Mapping[str, torch.Tensor] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, SafetensorError, RuntimeError, pickle.UnpicklingError, ValueError, EOFError) as error:
        raise ModelError(f"{file}: {_first_line(error)}", hint="is the download complete?") from error
    if not isinstance(held, Mapping) or not all(isinstance(weight, torch.Tensor) for weight in held.values()):
        raise ModelError(f"{file}: holds something else than tensors by name")
    return {name: weight for name, weight in held.items() if _begins(name, prefixes)}


def unused(kind: Any, model: str, **how: Any) -> list[str]:
    """The names of the tensors of checkpoint ``model`` that a model of class ``kind`` has no place for.

    transformers itself decides, which knows older names of its tensors; on the meta device no weights are kept.

    Raises:
        ModelError: tensors are missing or of another shape, or the checkpoint can't be read.
    """
    from safetensors import SafetensorError
    from transformers.utils import logging

    progress.calm_transformers()
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it would print a table of what is asked for here
    try:
        made, info = kind.from_pretrained(model, device_map="meta", output_loading_info=True, **how)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{model}: {_first_line(error)}") from error
    finally:
        logging.set_verbosity(level)
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"{model}: {len(missing)} tensors of {type(made).__name__} are missing, such as {missing[0]}")
    return sorted(info["unexpected_keys"])


def _begins(name: str, prefixes: Sequence[str]) -> bool:
    return name.startswith(tuple(prefixes))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
