"""The config.json keys and values of plain LLaVA checkpoints; any other key or value is refused.

This is an allowlist because checkpoints that compute something other than LLaVA v1 or v1.5 state it in config.json,
with keys that change from model to model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from llavactl.components.languages.llava_checkpoint import language_type
from llavactl.core.errors import ModelError

_BOOKKEEPING = frozenset({
    "_name_or_path", "_commit_hash", "_attn_implementation_autoset", "attn_implementation", "auto_map", "dtype",
    "torch_dtype", "transformers_version", "tokenizer_class", "rope_theta", "rope_scaling", "pretraining_tp",
    "max_sequence_length", "chunk_size_feed_forward", "id2label", "label2id", "return_dict", "use_cache",
    "output_attentions", "output_hidden_states", "_flash_attn_2_enabled", "_attn_implementation", "vocab_size",
    "partial_rotary_factor", "architectures", "model_type", "head_dim", "attention_bias", "mlp_bias",
    "attention_dropout",
})  # fmt: skip
"""Keys of any version of transformers that don't affect results, that every class reads, or that the tensors show."""

_LLAVA_ANY = frozenset({
    # Training settings.
    "tune_mm_mlp_adapter", "freeze_mm_mlp_adapter", "freeze_mm_vision_resampler", "freeze_backbone",
    "pretrain_mm_mlp_adapter", "mm_projector_lr", "mm_vision_tower_lr", "tokenizer_padding_side",
    "tokenizer_model_max_length", "vision_tower",
    # The weights show whether the vision encoder was fine-tuned.
    "unfreeze_mm_vision_tower", "unfreeze_vision_tower", "tune_vision_tower", "tune_mm_vision_tower",
    "mm_tunable_parts",
    # Only used together with another key, such as image_aspect_ratio: anyres.
    "image_grid_pinpoints", "image_crop_resolution", "image_split_resolution", "pos_skipping_range",
    # Written by llavactl.
    "llavactl", "image_grid",
})  # fmt: skip

_LLAVA: Mapping[str, tuple[Any, ...]] = {
    "image_aspect_ratio": ("pad", "square"),
    "mm_projector_type": ("linear", "mlp2x_gelu"),
    "mm_vision_select_feature": ("patch", "cls_patch"),
    "mm_patch_merge_type": ("flat",),
    "use_mm_proj": (True,),
}
_LLAVA_TYPES: Mapping[str, type] = {"mm_vision_tower": str, "mm_vision_select_layer": int, "mm_hidden_size": int}

_HF_ANY = frozenset({"text_config", "vision_config", "ignore_index", "image_token_id", "image_token_index"})
_HF: Mapping[str, tuple[Any, ...]] = {
    "architectures": (["LlavaForConditionalGeneration"],),
    "projector_hidden_act": ("gelu", "linear"),
    "multimodal_projector_bias": (True,),
    "vision_feature_select_strategy": ("default", "full"),
}
_PROCESSORS = ("CLIP", "Siglip", "Llava", "ViT", "Bit")
"""The image processors of transformers that return one square image per input."""

BASE_KEYS = "base_keys"
"""Key of an export's settings for its ``ignored_keys``, which are accepted when llavactl reads the export."""


def ignored_keys(config: Mapping[str, Any], kind: str) -> list[str]:
    """Keys of a language model's ``config`` that transformers' class of type ``kind`` doesn't have and ignores."""
    supported = _class_keys(kind)
    return sorted(key for key, value in config.items() if value and key not in supported)


def refuse_unsupported_llava(config: Mapping[str, Any], folder: Path) -> None:
    """Raises ModelError unless ``config`` of a LLaVA checkpoint is one of plain LLaVA v1 or v1.5.

    The message names the key and its value, or the architecture.
    """
    kind = language_type(config, str(folder)) if "mm_vision_tower" in config else config.get("model_type")
    base_keys = config.get("llavactl", {}).get(BASE_KEYS, ())
    supported = {*_LLAVA_ANY, *_LLAVA_TYPES, *_class_keys(kind), *base_keys}
    _refuse_unsupported(config, folder / "config.json", supported, _LLAVA, "plain LLaVA v1 and v1.5")
    for key, expected in _LLAVA_TYPES.items():
        if (value := config.get(key)) is not None and (not isinstance(value, expected) or isinstance(value, bool)):
            raise _unsupported_value(folder / "config.json", key, value, f"{key} of type {expected.__name__}")


def refuse_unsupported_hf(
    config: Mapping[str, Any], processor: Mapping[str, Any], folder: Path, record: Mapping[str, Any]
) -> None:
    """Raises ModelError unless ``config`` of a transformers checkpoint is one of plain LLaVA v1 or v1.5.

    ``record`` is the ``llavactl_export.json`` of an export by llavactl. The message names the key and its value.
    """
    from transformers import CONFIG_MAPPING, LlavaConfig

    file = folder / "config.json"
    plain = "LlavaForConditionalGeneration as of LLaVA v1 and v1.5"
    _refuse_unsupported(config, file, _HF_ANY | LlavaConfig().to_dict().keys() | _class_keys(None), _HF, plain)
    for part, default in (("text_config", "llama"), ("vision_config", "clip_vision_model")):
        inner = config.get(part) or {}
        if (kind := inner.get("model_type", default)) not in CONFIG_MAPPING:
            raise _unsupported_value(file, f"{part}.model_type", kind, "model types of transformers")
        base_keys = record.get(BASE_KEYS, ()) if part == "text_config" else ()
        _refuse_unsupported(inner, file, {*_class_keys(kind), *base_keys}, {}, plain, prefix=f"{part}.")
    image_processor = str(processor.get("image_processor_type", "CLIPImageProcessor"))
    if not image_processor.startswith(tuple(f"{name}ImageProcessor" for name in _PROCESSORS)):
        supported = "image processors that return one square image per input"
        raise _unsupported_value(folder, "image_processor_type", image_processor, supported)
    if processor.get("image_grid_pinpoints"):
        raise _unsupported_value(folder, "image_grid_pinpoints", processor["image_grid_pinpoints"], plain)


def tuned_vision_key(config: Mapping[str, Any]) -> str:
    """The key of LLaVA's ``config`` which states that the vision encoder was fine-tuned; "" if none does."""
    keys = ("unfreeze_mm_vision_tower", "unfreeze_vision_tower", "tune_vision_tower", "tune_mm_vision_tower")
    if enabled := next((key for key in keys if config.get(key)), ""):
        return enabled
    return "mm_tunable_parts" if "mm_vision_tower" in str(config.get("mm_tunable_parts")) else ""


def _class_keys(kind: Any) -> Set[str]:
    """The keys of transformers' configuration class for ``kind``, and the keys that are accepted for every class."""
    from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig

    keys = AutoConfig.for_model(kind).to_dict().keys() if kind in CONFIG_MAPPING else frozenset()
    return {*_BOOKKEEPING, *GenerationConfig().to_dict(), *keys}


def _refuse_unsupported(
    config: Mapping[str, Any],
    file: Path,
    keys: Set[str],
    values: Mapping[str, tuple[Any, ...]],
    supported: str,
    prefix: str = "",
) -> None:
    """Raises ModelError for a key other than ``keys``, unless it has one of its ``values``.

    Empty values, such as null and false, are accepted: the feature is off.
    """
    for key, value in config.items():
        if key in values and value is not None and value not in values[key]:
            raise _unsupported_value(file, prefix + key, value, f"{key}: {' or '.join(map(str, values[key]))}")
        if key not in values.keys() | keys and value:
            raise _unsupported_value(file, prefix + key, value, supported)


def _unsupported_value(path: Path, key: str, value: Any, supported: str) -> ModelError:
    text = json.dumps(value, ensure_ascii=False)
    return ModelError(
        f"{path}: {key}: {text if len(text) <= 60 else text[:60] + '…'} is not supported",
        hint=f"llavactl reads {supported}",
    )
