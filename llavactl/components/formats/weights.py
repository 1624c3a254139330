"""Some of the tensors of a checkpoint that another program wrote; pickles are read as tensors and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llavactl.core.errors import ModelError

if TYPE_CHECKING:
    import torch

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WHOLE = ("model.safetensors", "pytorch_model.bin")


def files(folder: Path) -> list[Path]:
    """The weight files of ``folder``.

    Raises:
        ModelError: one that the index names is missing.
    """
    for name in INDEXES:
        if (index := folder / name).is_file():
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            if missing := [shard for shard in shards if not (folder / shard).is_file()]:
                raise ModelError(f"{folder}: {len(missing)} weight files are missing, such as {missing[0]}")
            return [folder / shard for shard in shards]
    return [folder / name for name in WHOLE if (folder / name).is_file()][:1]


def tensors(folder: Path, prefixes: Sequence[str]) -> dict[str, torch.Tensor]:
    """The tensors of ``folder`` whose names begin with one of ``prefixes``."""
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
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys() if _begins(name, prefixes)}  # noqa: SIM118
        held: Mapping[str, torch.Tensor] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, SafetensorError, RuntimeError, pickle.UnpicklingError, ValueError) as error:
        raise ModelError(f"{file}: {str(error).strip().splitlines()[0]}", hint="is the download whole?") from error
    return {name: weight for name, weight in held.items() if _begins(name, prefixes)}


def stamps(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of the weight files: they change when the weights may have."""
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files(folder)]


def _begins(name: str, prefixes: Sequence[str]) -> bool:
    return name.startswith(tuple(prefixes))
