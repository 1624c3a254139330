"""The configuration keys and values of a plain LLaVA checkpoint.

A checkpoint that computes anything else than LLaVA v1 or v1.5 says so with some key of config.json, and every new model
brings new keys. So this is an allowlist: any other key or value is refused by name, and no unknown key is ignored.
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
"""Keys of transformers, of any version, that change no result, that every class reads, or that the tensors show."""

_LLAVA_ANY = frozenset({
    # Training settings.
    "tune_mm_mlp_adapter", "freeze_mm_mlp_adapter", "freeze_mm_vision_resampler", "freeze_backbone",
    "pretrain_mm_mlp_adapter", "mm_projector_lr", "mm_vision_tower_lr", "tokenizer_padding_side",
    "tokenizer_model_max_length", "vision_tower",
    # Whether the checkpoint has the vision encoder's weights is checked in the weights themselves.
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
"""The image processors of transformers that give one square image per input."""


BASE_KEYS = "base_keys"
"""An export's note of ``foreign_keys``, which are no refusal when llavactl reads it again."""


def foreign_keys(config: Mapping[str, Any], kind: str) -> list[str]:
    """Keys of a language model's ``config`` that transformers' class of type ``kind`` doesn't have, and ignores."""
    known = _class_keys(kind)
    return sorted(key for key, value in config.items() if value and key not in known)


def refuse_unknown_llava(config: Mapping[str, Any], folder: Path) -> None:
    """Refuses an original-layout ``config`` of anything but a plain LLaVA v1 or v1.5.

    Raises:
        ModelError: names the key and its value, or the architecture.
    """
    kind = language_type(config, str(folder)) if "mm_vision_tower" in config else config.get("model_type")
    known = _LLAVA_ANY | _LLAVA_TYPES.keys() | _class_keys(kind) | {*config.get("llavactl", {}).get(BASE_KEYS, ())}
    _refuse(config, folder / "config.json", known, _LLAVA, "plain LLaVA v1 and v1.5")
    for key, wanted in _LLAVA_TYPES.items():
        if (value := config.get(key)) is not None and (not isinstance(value, wanted) or isinstance(value, bool)):
            raise _refusal(folder / "config.json", key, value, f"{key} of type {wanted.__name__}")


def refuse_unknown_hf(
    config: Mapping[str, Any], processor: Mapping[str, Any], folder: Path, own: Mapping[str, Any]
) -> None:
    """Refuses a ``config`` of transformers' layout of anything but a plain ``LlavaForConditionalGeneration``.

    ``own`` is what llavactl's export stored beside it.

    Raises:
        ModelError: names the key and its value.
    """
    from transformers import CONFIG_MAPPING, LlavaConfig

    file = folder / "config.json"
    plain = "LlavaForConditionalGeneration as of LLaVA v1 and v1.5"
    _refuse(config, file, _HF_ANY | LlavaConfig().to_dict().keys() | _class_keys(None), _HF, plain)
    for part, default in (("text_config", "llama"), ("vision_config", "clip_vision_model")):
        inner = config.get(part) or {}
        if (kind := inner.get("model_type", default)) not in CONFIG_MAPPING:
            raise _refusal(file, f"{part}.model_type", kind, "model types of transformers")
        ours = own.get(BASE_KEYS, ()) if part == "text_config" else ()
        _refuse(inner, file, {*_class_keys(kind), *ours}, {}, plain, within=f"{part}.")
    maker = str(processor.get("image_processor_type", "CLIPImageProcessor"))
    if not maker.startswith(tuple(f"{name}ImageProcessor" for name in _PROCESSORS)):
        raise _refusal(folder, "image_processor_type", maker, "image processors that give one square image")
    if processor.get("image_grid_pinpoints"):
        raise _refusal(folder, "image_grid_pinpoints", processor["image_grid_pinpoints"], plain)


def tuned(config: Mapping[str, Any]) -> str:
    """The key of an original-layout ``config`` that says that the vision encoder was trained; "" if there is none."""
    keys = ("unfreeze_mm_vision_tower", "unfreeze_vision_tower", "tune_vision_tower", "tune_mm_vision_tower")
    if found := next((key for key in keys if config.get(key)), ""):
        return found
    return "mm_tunable_parts" if "mm_vision_tower" in str(config.get("mm_tunable_parts")) else ""


def _class_keys(kind: Any) -> Set[str]:
    """The keys of transformers' configuration class for ``kind``, and those that are ignored everywhere."""
    from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig

    own = AutoConfig.for_model(kind).to_dict().keys() if kind in CONFIG_MAPPING else frozenset()
    return {*_BOOKKEEPING, *GenerationConfig().to_dict(), *own}


def _refuse(
    config: Mapping[str, Any],
    file: Path,
    known: Set[str],
    allowed: Mapping[str, tuple[Any, ...]],
    plain: str,
    within: str = "",
) -> None:
    for key, value in config.items():
        if key in allowed and value is not None and value not in allowed[key]:
            raise _refusal(file, within + key, value, f"{key}: {' or '.join(map(str, allowed[key]))}")
        if key not in allowed.keys() | known and value:  # null, false and the like: a feature that is off
            raise _refusal(file, within + key, value, plain)


def _refusal(where: Path, key: str, value: Any, wanted: str) -> ModelError:
    text = json.dumps(value, ensure_ascii=False)
    return ModelError(
        f"{where}: {key}: {text if len(text) <= 60 else text[:60] + '…'} is not supported",
        hint=f"llavactl reads {wanted}",
    )
