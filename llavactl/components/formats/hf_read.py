"""Reads checkpoints of ``LlavaForConditionalGeneration`` (transformers) with their processor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.components.formats.native import exportable_vision
from llavactl.components.formats.supported_keys import refuse_unsupported_hf
from llavactl.components.formats.weights import files, read_tensors, unexpected_tensors
from llavactl.components.languages.image_token import EXPORT_RECORD
from llavactl.core.errors import ModelError
from llavactl.core.paths import read_json

if TYPE_CHECKING:
    import torch

_PROJECTOR = ("model.multi_modal_projector.", "multi_modal_projector.")


def hf_checkpoint(folder: Path) -> dict[str, Any]:
    """The checkpoint in ``folder`` as the arguments of ``save_model`` after the first.

    Raises:
        ModelError: the checkpoint is incomplete, or not a plain LLaVA v1 or v1.5.
    """
    from transformers import LlavaForConditionalGeneration

    config, record = read_json(folder / "config.json"), read_json(folder / EXPORT_RECORD)
    processor = _processor(folder)
    if not processor:
        raise ModelError(
            f"{folder}: no processor configuration, so the image preprocessing is unknown",
            hint="expected processor_config.json or preprocessor_config.json beside the weights",
        )
    refuse_unsupported_hf(config, processor, folder, record)
    if (folder / "adapter_config.json").is_file():  # transformers would load the base that the adapter names
        raise ModelError(f"{folder}: both an adapter and full weights", hint="move one of them to another folder")
    if not files(folder):
        raise ModelError(f"{folder}: no weights", hint="the download may be incomplete: download it again")
    name, weights = _projection(read_tensors(folder, _PROJECTOR), config, folder)
    if unexpected := unexpected_tensors(LlavaForConditionalGeneration, str(folder)):
        raise ModelError(
            f"{folder}: {len(unexpected)} unexpected tensors for LlavaForConditionalGeneration, such as "
            f"{unexpected[0]}",
            hint="llavactl reads plain LLaVA v1 and v1.5",
        )
    vision = {
        "name": "clip",
        "model": str(folder.absolute()),
        "layer": config.get("vision_feature_layer", -2),
        "select": "cls-patch",
        "image": "pad" if processor.get("do_pad") else "square",
    }
    if config.get("vision_feature_select_strategy", "default") == "default":
        if (prefix := exportable_vision(vision).shape().prefix) != 1:
            raise ModelError(
                f"{folder}: vision_feature_select_strategy: default removes the first token per image, but the vision "
                f"encoder has {prefix} tokens before its patches",
                hint="llavactl removes all tokens before the patches, or none",
            )
        vision["select"] = "patch"
    text = config.get("text_config") or {}
    return {
        "connector_weights": weights,
        "vision": vision,
        "connector": {"name": name},
        "language": {"name": "hf", "model": str(folder.absolute())},
        "template": "tokenizer",
        "precision": str(config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or "float32"),
        "settings": record,
    }


def _projection(
    tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], folder: Path
) -> tuple[str, dict[str, torch.Tensor]]:
    """The connector's name, and its weights under LLaVA's names."""
    import torch

    weights = {
        name[next(len(prefix) for prefix in _PROJECTOR if name.startswith(prefix)) :]: weight
        for name, weight in tensors.items()
    }
    expected = {f"linear_{layer}.{parameter}" for layer in (1, 2) for parameter in ("weight", "bias")}
    if weights.keys() != expected:
        raise ModelError(
            f"{folder}: expected a projector of two linear layers with bias, got "
            f"{', '.join(sorted(weights)) or 'no weights'}",
            hint="llavactl reads plain LLaVA v1 and v1.5",
        )
    act = config.get("projector_hidden_act", "gelu")
    second, bias = weights["linear_2.weight"], weights["linear_2.bias"]
    if act == "linear" and torch.equal(second, torch.eye(len(bias), dtype=second.dtype)) and not bias.any():
        return "linear", {"weight": weights["linear_1.weight"], "bias": weights["linear_1.bias"]}
    if act != "gelu":
        raise ModelError(f"{folder}: projector activation {act} is not supported", hint="llavactl supports gelu")
    indices = {"linear_1": "0", "linear_2": "2"}
    return "mlp2x-gelu", {f"{indices[name[:8]]}{name[8:]}": weight for name, weight in weights.items()}


def _processor(folder: Path) -> dict[str, Any]:
    """The settings of the processor and its image processor; newer versions of transformers store both in one file."""
    image_processor = read_json(folder / "preprocessor_config.json")
    processor = read_json(folder / "processor_config.json")
    rest = {key: value for key, value in processor.items() if key != "image_processor"}
    return {**image_processor, **processor.get("image_processor", {}), **rest}
