"""Reads checkpoints of the original LLaVA: full, LoRA with ``non_lora_trainables.bin``, or a bare projector.

Every tensor must belong to the language model (as transformers loads it), the connector or the vision encoder. Any
other tensor is refused, as are unsupported keys of config.json (``supported_keys.py``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.components.formats.adapter import check_adapter
from llavactl.components.formats.connectors import connector_spec
from llavactl.components.formats.llava_vision import save_if_fine_tuned
from llavactl.components.formats.native import save_model
from llavactl.components.formats.supported_keys import refuse_unsupported_llava, tuned_vision_key
from llavactl.components.formats.weights import files, read_file, read_tensors, unexpected_tensors
from llavactl.components.languages.llava_checkpoint import load_arguments
from llavactl.core import hub
from llavactl.core.errors import ModelError
from llavactl.core.library_errors import reason
from llavactl.core.model_files import local_folder
from llavactl.core.paths import read_json

if TYPE_CHECKING:
    import torch

PROJECTOR_FILE, NON_LORA_FILE = "mm_projector.bin", "non_lora_trainables.bin"
SETTINGS_KEY = "llavactl"
"""Key of config.json for settings that LLaVA's format lacks; LLaVA's code ignores it."""

_CONNECTOR = re.compile(r"^(base_model\.model\.)?(model\.)?mm_projector\.")
_ENCODER = re.compile(r"^(base_model\.model\.)?(model\.)?vision_tower\.vision_tower\.")
_PARTS = (_CONNECTOR, _ENCODER)


@dataclass(frozen=True)
class _Weights:
    """The weights of a checkpoint's connector and vision encoder, named without their prefixes."""

    connector: Mapping[str, torch.Tensor]
    encoder: Mapping[str, torch.Tensor]

    @classmethod
    def among(cls, tensors: Mapping[str, torch.Tensor], where: Path | str) -> _Weights:
        """The weights among ``tensors`` of ``where``; raises ModelError for any other tensor."""
        if others := sorted(name for name in tensors if not any(pattern.match(name) for pattern in _PARTS)):
            more = f" and {len(others) - 3} more" if len(others) > 3 else ""
            raise ModelError(
                f"{where}: tensors that belong to no language model, connector or vision encoder: "
                f"{', '.join(others[:3])}{more}",
                hint="llavactl reads plain LLaVA v1 and v1.5",
            )
        return cls(
            *(
                {pattern.sub("", name): tensor for name, tensor in tensors.items() if pattern.match(name)}
                for pattern in _PARTS
            )
        )

    def or_else(self, other: _Weights) -> _Weights:
        """These weights, with parts that are missing replaced by those of ``other``."""
        return _Weights(self.connector or other.connector, self.encoder or other.encoder)


def read_llava(folder: Path, model: Path) -> None:
    """Converts the checkpoint in ``folder`` to the model folder ``model``.

    Raises:
        ModelError: the checkpoint is incomplete, or uses something that llavactl doesn't support.
    """
    config = {key: value for key, value in read_json(folder / "config.json").items() if value is not None}
    refuse_unsupported_llava(config, folder)
    lora = (folder / "adapter_config.json").is_file()
    if lora and (files(folder) or "mm_vision_tower" not in config):
        problem = "both an adapter and full weights" if files(folder) else "an adapter without LLaVA's config.json"
        raise ModelError(
            f"{folder}: {problem}", hint="expected an adapter without full weights, and LLaVA's config.json"
        )
    language = _language_spec(config, folder, lora)
    weights = _weights(folder, language, lora)
    if not weights.connector:
        raise ModelError(f"{folder}: no connector: neither mm_projector tensors nor {PROJECTOR_FILE}")
    connector = connector_spec(weights.connector, folder)
    _refuse_mismatch(config, connector["name"], weights.connector, folder)
    if "mm_vision_tower" not in config:  # these keys are taken from a recipe
        save_model(model, weights.connector, connector=connector, language=language)
        return
    if lora:
        check_adapter(folder, language["model"] if language else None)
    encoder = _existing_path(config["mm_vision_tower"], folder)
    vision = {
        "name": "clip",
        "model": encoder,
        "layer": config.get("mm_vision_select_layer", -2),
        "select": "cls-patch" if config.get("mm_vision_select_feature") == "cls_patch" else "patch",
        "image": "pad" if config.get("image_aspect_ratio") == "pad" else "square",
    }
    if weights.encoder:
        vision["model"] = str(save_if_fine_tuned(vision, weights.encoder, model, folder) or encoder)
    elif key := tuned_vision_key(config):
        raise ModelError(
            f"{folder}: the vision encoder was fine-tuned ({key} is {config[key]}), but its weights are missing",
            hint="expected tensors model.vision_tower.vision_tower.*: the checkpoint may be incomplete",
        )
    save_model(
        model,
        weights.connector,
        connector=connector,
        language=language,
        vision=vision,
        precision=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        adapter=folder if lora else None,
        settings=config.get(SETTINGS_KEY),
        sources=[encoder, *([language["model"]] if language else [])],
    )


def _weights(folder: Path, language: Mapping[str, str] | None, lora: bool) -> _Weights:
    """Connector and vision encoder, from the separate file or from the checkpoint of the language model."""
    file = folder / (NON_LORA_FILE if lora else PROJECTOR_FILE)
    if lora and not file.is_file():
        raise ModelError(f"{folder}: an adapter without a connector: {NON_LORA_FILE} is missing")
    separate = _Weights.among(read_file(file) if file.is_file() else {}, file)
    if language is None:
        return separate
    included = _included_weights(language["model"], folder)
    return included.or_else(separate) if language["model"] == str(folder.absolute()) else separate.or_else(included)


def _included_weights(language: str, folder: Path) -> _Weights:
    """Connector and vision encoder in the checkpoint ``language``, which is ``folder`` itself or its base.

    Raises:
        ModelError: the checkpoint has other tensors, or can't be read.
    """
    from transformers import AutoModelForCausalLM

    path = Path(language)
    if (path / "adapter_config.json").is_file():
        raise ModelError(f"{folder}: its base {path} is itself an adapter", hint="merge the base's adapter first")
    if path.is_dir():
        read_tensors(path, ())  # raises an error that names missing and truncated files
    try:
        config = hub.model_config(language)
        if "mm_vision_tower" in config and path != folder.absolute():
            refuse_unsupported_llava(config, path)
        names = unexpected_tensors(AutoModelForCausalLM, language, **load_arguments(language))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: language model {language}: {reason(error)}", hint=_BASE_HINT) from error
    local = path if path.is_dir() else local_folder(language)
    return _Weights.among(read_tensors(local, names) if names and local else {}, language)


_BASE_HINT = (
    "set `_name_or_path` in config.json or `base_model_name_or_path` in adapter_config.json to its id or folder"
)


def _refuse_mismatch(
    config: Mapping[str, Any], connector: str, weights: Mapping[str, torch.Tensor], folder: Path
) -> None:
    """Raises ModelError unless the connector's weights have the type and width of the configuration."""
    projector_type = config.get("mm_projector_type")
    if projector_type is not None and projector_type.replace("_", "-") != connector:
        raise ModelError(f"{folder}: mm_projector_type is {projector_type}, but the tensors are those of {connector}")
    width = weights["weight" if connector == "linear" else "0.weight"].shape[1]
    if width != config.get("mm_hidden_size", width):
        raise ModelError(
            f"{folder}: mm_hidden_size is {config['mm_hidden_size']}, but the input width of mm_projector is {width}"
        )


def _language_spec(config: Mapping[str, Any], folder: Path, lora: bool) -> dict[str, str] | None:
    """The language model: the weights in ``folder``, or the base that the checkpoint names; None if it names none."""
    base: Any = folder.absolute()
    if lora:
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    elif not files(folder):
        base = config.get("_name_or_path") if "mm_vision_tower" in config else None
    return {"name": "hf", "model": _existing_path(str(base), folder)} if base else None


def _existing_path(model: str, folder: Path) -> str:
    """The path of ``model`` in the checkpoint's ``folder`` if it exists there; otherwise ``model``.

    Of an absolute path that doesn't exist, the last part is looked up there: the checkpoint may have been moved.
    """
    path = Path(model)
    if path.is_absolute() and path.exists():
        return model
    inner = folder / (path.name if path.is_absolute() else path)
    return str(inner.resolve()) if (inner / "config.json").is_file() else model
