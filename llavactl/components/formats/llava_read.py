"""Reading checkpoints of the original LLaVA: full, LoRA with ``non_lora_trainables.bin``, or a projector alone.

Every tensor must belong to the language model (transformers decides), the connector or the vision encoder. Any other
is refused by name, as is an unknown key of config.json (``known.py``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.components.formats.adapter import copy_adapter
from llavactl.components.formats.llava_vision import contained
from llavactl.components.formats.native import adopt, connector_of, restored, shape_of
from llavactl.components.formats.supported_keys import refuse_unknown_llava, tuned
from llavactl.components.formats.weights import files, read, tensors, unused
from llavactl.components.languages.llava_checkpoint import inside
from llavactl.core.errors import ModelError
from llavactl.core.library_errors import reason
from llavactl.core.model_files import local_folder
from llavactl.core.paths import read_json

if TYPE_CHECKING:
    import torch

PROJECTOR_FILE, ADAPTER_FILE = "mm_projector.bin", "non_lora_trainables.bin"
OWN = "llavactl"
"""A key of config.json for settings that the layout itself doesn't have; LLaVA preserves and ignores it."""

_CONNECTOR = re.compile(r"^(base_model\.model\.)?(model\.)?mm_projector\.")
_ENCODER = re.compile(r"^(base_model\.model\.)?(model\.)?vision_tower\.vision_tower\.")
_PARTS = (_CONNECTOR, _ENCODER)


@dataclass(frozen=True)
class _Found:
    """The weights of a checkpoint's connector and vision encoder, without the prefixes of their names."""

    connector: Mapping[str, torch.Tensor]
    encoder: Mapping[str, torch.Tensor]

    @classmethod
    def among(cls, weights: Mapping[str, torch.Tensor], where: Path | str) -> _Found:
        """The parts in ``weights`` of ``where``; raises ModelError for any other tensor."""
        if others := sorted(name for name in weights if not any(p.match(name) for p in _PARTS)):
            more = f" and {len(others) - 3} more" if len(others) > 3 else ""
            raise ModelError(
                f"{where}: tensors of no language model, connector or vision encoder: {', '.join(others[:3])}{more}",
                hint="llavactl reads plain LLaVA v1 and v1.5",
            )
        return cls(*({p.sub("", name): each for name, each in weights.items() if p.match(name)} for p in _PARTS))

    def over(self, other: _Found) -> _Found:
        """Its own parts if it has them, else those of ``other``."""
        return _Found(self.connector or other.connector, self.encoder or other.encoder)


def read_llava(folder: Path, model: Path) -> None:
    """Converts the checkpoint in ``folder`` to the model folder ``model``.

    Raises:
        ModelError: it needs something that llavactl doesn't support, such as tokens around an image.
    """
    config = {key: value for key, value in read_json(folder / "config.json").items() if value is not None}
    refuse_unknown_llava(config, folder)
    lora = (folder / "adapter_config.json").is_file()
    if lora and (files(folder) or "mm_vision_tower" not in config):
        what = "both an adapter and full weights" if files(folder) else "an adapter without LLaVA's config.json"
        raise ModelError(
            f"{folder}: {what}", hint="a LoRA folder has the adapter without full weights, and LLaVA's config.json"
        )
    language = _language(config, folder, lora)
    found = _found(folder, language, lora)
    if not found.connector:
        raise ModelError(f"{folder}: no connector: neither mm_projector in its weights nor {PROJECTOR_FILE}")
    connector = connector_of(found.connector, folder)
    _refuse_mismatch(config, connector["name"], found.connector, folder)
    if "mm_vision_tower" not in config:  # the recipe sets the vision encoder and the rest
        nothing = dict.fromkeys(("vision", "shape", "template", "precision"))
        adopt(model, found.connector, {"connector": connector, "language": language, **nothing})
        return
    if lora:
        copy_adapter(folder, model / "adapter", language["model"] if language else None)
    named = _near(config["mm_vision_tower"], folder)
    vision = {
        "name": "clip",
        "model": named,
        "layer": config.get("mm_vision_select_layer", -2),
        "select": "cls-patch" if config.get("mm_vision_select_feature") == "cls_patch" else "patch",
        "image": "pad" if config.get("image_aspect_ratio") == "pad" else "square",
    }
    if found.encoder:
        vision["model"] = str(contained(vision, found.encoder, model, folder) or named)
    elif key := tuned(config):
        raise ModelError(
            f"{folder}: its vision encoder was trained ({key} is {config[key]}), but its weights are missing",
            hint="expected tensors model.vision_tower.vision_tower.*: the checkpoint may be incomplete",
        )
    description = {
        "method": "lora" if lora else "connector",
        "vision": vision,
        "shape": shape_of(vision),
        "connector": connector,
        "language": language,
        "template": None,
        "precision": str(config.get("dtype") or config.get("torch_dtype") or "float32"),
    }
    sources = [named, language["model"] if language else None]
    adopt(model, found.connector, restored(description, config.get(OWN, {})), sources=sources)


def _found(folder: Path, language: Mapping[str, str] | None, lora: bool) -> _Found:
    """Connector and vision encoder, from the weights and from separate files."""
    file = folder / (ADAPTER_FILE if lora else PROJECTOR_FILE)
    if lora and not file.is_file():
        raise ModelError(f"{folder}: an adapter without a connector: no {ADAPTER_FILE}")
    beside = _Found.among(read(file) if file.is_file() else {}, file)
    if language is None:
        return beside
    within = _within(language["model"], folder)
    return within.over(beside) if language["model"] == str(folder.absolute()) else beside.over(within)


def _within(language: str, folder: Path) -> _Found:
    """Connector and vision encoder in the checkpoint ``language``, which is ``folder`` itself or its base.

    Raises:
        ModelError: it has other tensors, or can't be read.
    """
    from transformers import AutoModelForCausalLM, PreTrainedConfig

    place = Path(language)
    if (place / "adapter_config.json").is_file():
        raise ModelError(f"{folder}: its base {place} is itself an adapter", hint="merge the base's adapter first")
    if place.is_dir():
        tensors(place, ())  # its error names a file that is missing or truncated
    try:
        config, _ = PreTrainedConfig.get_config_dict(language)
        if "mm_vision_tower" in config and place != folder.absolute():
            refuse_unknown_llava(config, place)
        names = unused(AutoModelForCausalLM, language, **inside(language))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: its language model {language}: {reason(error)}", hint=_BASE) from error
    local = place if place.is_dir() else local_folder(language)
    return _Found.among(tensors(local, names) if names and local else {}, language)


_BASE = "config.json (`_name_or_path`) or adapter_config.json (`base_model_name_or_path`) must name it by id or folder"


def _refuse_mismatch(
    config: Mapping[str, Any], connector: str, weights: Mapping[str, torch.Tensor], folder: Path
) -> None:
    """Raises ModelError unless the connector's weights have the type and width of the configuration."""
    kind = config.get("mm_projector_type")
    if kind is not None and kind.replace("_", "-") != connector:
        raise ModelError(f"{folder}: mm_projector_type is {kind}, but its tensors are those of {connector}")
    width = weights["weight" if connector == "linear" else "0.weight"].shape[1]
    if width != config.get("mm_hidden_size", width):
        raise ModelError(f"{folder}: mm_hidden_size is {config['mm_hidden_size']}, but mm_projector takes {width}")


def _language(config: Mapping[str, Any], folder: Path, lora: bool) -> dict[str, str] | None:
    """The language model: the weights in ``folder``, or the base that the checkpoint names; None if it names none."""
    base: Any = folder.absolute()
    if lora:
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    elif not files(folder):
        base = config.get("_name_or_path") if "mm_vision_tower" in config else None
    return {"name": "hf", "model": _near(str(base), folder)} if base else None


def _near(model: str, folder: Path) -> str:
    """``model`` as a path below the checkpoint's ``folder`` if it exists there; otherwise unchanged.

    An absolute path that doesn't exist is looked for there by its last part: the checkpoint may have been moved.
    """
    path = Path(model)
    if path.is_absolute() and path.exists():
        return model
    beside = folder / (path.name if path.is_absolute() else path)
    return str(beside.resolve()) if (beside / "config.json").is_file() else model
