"""The vision encoder included in a LLaVA checkpoint: identical to the one that config.json names, or fine-tuned."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.components.formats.native import exportable_vision
from llavactl.core.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn

FOLDER = "vision"
"""The subfolder of a model folder for a fine-tuned vision encoder."""


def save_if_fine_tuned(
    vision: Mapping[str, Any], weights: Mapping[str, torch.Tensor], model: Path, checkpoint: Path
) -> Path | None:
    """Saves the vision encoder ``weights`` of ``checkpoint`` in the model folder ``model`` and returns its path.

    Returns None if ``weights``, which have the encoder's own tensor names, equal the backbone ``vision`` within the
    precision that they were trained and saved in.

    Raises:
        ModelError: ``weights`` don't match the architecture of ``vision``.
    """
    from safetensors.torch import save_file

    backbone = exportable_vision(vision)
    original = backbone.whole()
    folder = model / FOLDER
    folder.mkdir(parents=True)
    save_file(
        {name: weight.contiguous().clone() for name, weight in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    original.config.save_pretrained(folder)
    _set_dtype(folder / "config.json", next(iter(weights.values())).dtype)
    backbone.processor.save_pretrained(folder)
    included = _load(type(original), folder, checkpoint)
    if not _equal(included, original):
        return folder
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    return None


def _load(model_class: Any, folder: Path, checkpoint: Path) -> nn.Module:
    try:
        encoder: nn.Module
        encoder, info = model_class.from_pretrained(folder, output_loading_info=True, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{checkpoint}: vision_tower tensors: {str(error).strip().splitlines()[0]}") from error
    unexpected = [name for name in info["unexpected_keys"] if not name.endswith("position_ids")]  # constant
    for problem, names in (("missing", info["missing_keys"]), ("unexpected", unexpected)):
        if names:
            raise ModelError(
                f"{checkpoint}: vision_tower tensors don't match the encoder that mm_vision_tower names: "
                f"{len(names)} {problem}, such as {min(names)}",
                hint="check that mm_vision_tower in config.json is the encoder that the model was trained with",
            )
    return encoder


def _equal(included: nn.Module, original: nn.Module) -> bool:
    import torch

    original_weights = original.state_dict()

    def equal(name: str, weight: torch.Tensor) -> bool:
        # A frozen weight may have been rounded twice, for example if trained in bfloat16 and saved in float16.
        dtypes = (weight.dtype, torch.bfloat16, torch.float16)
        return any(torch.equal(weight, original_weights[name].to(dtype).to(weight.dtype)) for dtype in dtypes)

    return all(equal(name, weight) for name, weight in included.state_dict().items())


def _set_dtype(file: Path, dtype: torch.dtype) -> None:
    config = json.loads(file.read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    file.write_text(json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")}, indent=2), encoding="utf-8")
