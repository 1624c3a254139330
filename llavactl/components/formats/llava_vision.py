"""The vision encoder in an original-layout checkpoint: identical to the one that it names, or fine-tuned."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.core.errors import ModelError
from llavactl.core.registry import registry

if TYPE_CHECKING:
    import torch
    from torch import nn

FOLDER = "vision"
"""The subfolder of a model folder for a fine-tuned vision encoder."""


def contained(vision: Mapping[str, Any], weights: Mapping[str, torch.Tensor], model: Path, where: Path) -> Path | None:
    """Saves the vision encoder ``weights`` of checkpoint ``where`` in ``model`` and returns its path; None if they
    equal ``vision``.

    ``weights`` have the names that they have in the encoder itself. They are compared within the precision that they
    were trained and saved in.

    Raises:
        ModelError: ``weights`` don't fit the architecture of ``vision``.
    """
    from safetensors.torch import save_file

    backbone = registry().create("vision", vision)
    named = backbone.whole()
    folder = model / FOLDER
    folder.mkdir(parents=True)
    save_file(
        {name: weight.contiguous().clone() for name, weight in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    named.config.save_pretrained(folder)
    _set_dtype(folder / "config.json", next(iter(weights.values())).dtype)
    backbone.processor.save_pretrained(folder)
    own = _loaded(type(named), folder, where)
    if not _equal(own, named):
        return folder
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    return None


def _loaded(kind: Any, folder: Path, where: Path) -> nn.Module:
    try:
        found: nn.Module
        found, info = kind.from_pretrained(folder, output_loading_info=True, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{where}: its vision_tower tensors: {str(error).strip().splitlines()[0]}") from error
    unused = [name for name in info["unexpected_keys"] if not name.endswith("position_ids")]  # constant
    for what, names in (("missing", info["missing_keys"]), ("unexpected", unused)):
        if names:
            raise ModelError(
                f"{where}: its vision_tower tensors don't match the encoder that mm_vision_tower names: "
                f"{len(names)} {what}, such as {min(names)}",
                hint="check that mm_vision_tower in config.json is the encoder that it was trained with",
            )
    return found


def _equal(own: nn.Module, named: nn.Module) -> bool:
    import torch

    there = named.state_dict()

    def same(name: str, weight: torch.Tensor) -> bool:
        # A frozen weight may have been rounded twice, for example if trained in bfloat16 and saved in float16.
        steps = (weight.dtype, torch.bfloat16, torch.float16)
        return any(torch.equal(weight, there[name].to(step).to(weight.dtype)) for step in steps)

    return all(same(name, weight) for name, weight in own.state_dict().items())


def _set_dtype(file: Path, dtype: torch.dtype) -> None:
    config = json.loads(file.read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    file.write_text(json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")}, indent=2), encoding="utf-8")
