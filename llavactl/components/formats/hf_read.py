"""Reading checkpoints of ``LlavaForConditionalGeneration`` (transformers) with their processor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.components.formats.native import adopt, restored, shape_of
from llavactl.components.formats.supported_keys import refuse_unknown_hf
from llavactl.components.formats.weights import files, tensors, unused
from llavactl.components.languages.image_token import ORIGIN
from llavactl.core.errors import ModelError
from llavactl.core.paths import read_json

if TYPE_CHECKING:
    import torch

_PROJECTOR = ("model.multi_modal_projector.", "multi_modal_projector.")


def read_hf(folder: Path, model: Path) -> None:
    """Converts the checkpoint in ``folder`` to the model folder ``model``.

    Raises:
        ModelError: it is incomplete, or not a plain LLaVA v1 or v1.5.
    """
    from transformers import LlavaForConditionalGeneration

    config, origin = read_json(folder / "config.json"), read_json(folder / ORIGIN)
    processor = _processor(folder)
    if not processor:
        raise ModelError(
            f"{folder}: no processor, so the image preprocessing is unknown",
            hint="expected processor_config.json or preprocessor_config.json beside the weights",
        )
    refuse_unknown_hf(config, processor, folder, origin)
    if (folder / "adapter_config.json").is_file():  # transformers would load the adapter on the base that it names
        raise ModelError(f"{folder}: both an adapter and full weights", hint="move one of the two to another folder")
    if not files(folder):
        raise ModelError(f"{folder}: no weights", hint="the download may be incomplete: download it again")
    name, weights = _projection(tensors(folder, _PROJECTOR), config, folder)
    if others := unused(LlavaForConditionalGeneration, str(folder)):
        raise ModelError(
            f"{folder}: {len(others)} unexpected tensors for LlavaForConditionalGeneration, such as {others[0]}",
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
        if (prefix := shape_of(vision)["prefix"]) != 1:
            raise ModelError(
                f"{folder}: it drops the first token per image, but the encoder has {prefix} that are not patches",
                hint="llavactl drops all tokens that are not patches, or none",
            )
        vision["select"] = "patch"
    text = config.get("text_config") or {}
    description = {
        "vision": vision,
        "shape": shape_of(vision),
        "connector": {"name": name},
        "language": {"name": "hf", "model": str(folder.absolute())},
        "template": "tokenizer",
        "precision": str(config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or "float32"),
    }
    adopt(model, weights, restored(description, origin))


def _projection(
    found: Mapping[str, torch.Tensor], config: Mapping[str, Any], folder: Path
) -> tuple[str, dict[str, torch.Tensor]]:
    """The connector's name, and its weights under LLaVA's names."""
    import torch

    weights = {name[next(len(p) for p in _PROJECTOR if name.startswith(p)) :]: each for name, each in found.items()}
    wanted = {f"linear_{layer}.{what}" for layer in (1, 2) for what in ("weight", "bias")}
    if weights.keys() != wanted:
        raise ModelError(
            f"{folder}: expected a projector of two linear layers with bias, found "
            f"{', '.join(sorted(weights)) or 'no weights'}",
            hint="llavactl reads plain LLaVA v1 and v1.5",
        )
    act = config.get("projector_hidden_act", "gelu")
    second, bias = weights["linear_2.weight"], weights["linear_2.bias"]
    if act == "linear" and torch.equal(second, torch.eye(len(bias), dtype=second.dtype)) and not bias.any():
        return "linear", {"weight": weights["linear_1.weight"], "bias": weights["linear_1.bias"]}
    if act != "gelu":
        raise ModelError(f"{folder}: projector activation {act} is not supported", hint="llavactl supports gelu")
    numbers = {"linear_1": "0", "linear_2": "2"}
    return "mlp2x-gelu", {f"{numbers[name[:8]]}{name[8:]}": weight for name, weight in weights.items()}


def _processor(folder: Path) -> dict[str, Any]:
    """The settings of processor and image processor; newer versions of transformers keep both in one file."""
    image = read_json(folder / "preprocessor_config.json")
    whole = read_json(folder / "processor_config.json")
    return {**image, **whole.get("image_processor", {}), **{k: v for k, v in whole.items() if k != "image_processor"}}
