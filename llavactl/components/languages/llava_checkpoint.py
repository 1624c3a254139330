"""Loading the language model from inside a LLaVA checkpoint, of transformers' or the original layout."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llavactl.core.errors import ModelError

_ARCHITECTURE = re.compile(r"(Llava)?(\w+)ForCausalLM")
_ALIASES = {"qwen": "qwen2"}
"""LLaVA-NeXT calls its class for Qwen1.5 and Qwen2 ``LlavaQwenForCausalLM``."""


_UNSCALED = {"final_logit_softcapping": None, "logits_scaling": 1.0, "logit_scale": 1.0}
"""Neutral values of keys that scale or cap logits, which ``LlavaForConditionalGeneration`` ignores."""


def inside(model: str) -> dict[str, Any]:
    """Arguments for ``from_pretrained`` if the language model is part of a LLaVA checkpoint; else empty."""
    from transformers import AutoConfig, PreTrainedConfig

    whole, _ = PreTrainedConfig.get_config_dict(model)
    if "text_config" in whole:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False).get_text_config()
        for key, value in _UNSCALED.items() if _is_llava(whole) else ():
            if config.to_dict().get(key) is not None:
                setattr(config, key, value)
        return {"config": config, "key_mapping": _renamed(config)}
    if "mm_vision_tower" in whole:
        kind = language_type(whole, model)
        known = {key: value for key, value in whole.items() if key not in ("model_type", "architectures", "auto_map")}
        return {"config": AutoConfig.for_model(kind, **known)}
    return {}


def in_llava(model: str) -> bool:
    """Whether the language model is part of a ``LlavaForConditionalGeneration``."""
    from transformers import PreTrainedConfig

    return _is_llava(PreTrainedConfig.get_config_dict(model)[0])


def _is_llava(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "llava" and "text_config" in config


def _renamed(config: Any) -> dict[str, str]:
    """From a LLaVA checkpoint's names of the language model's weights to its own: ``model.…``, for example.

    Two layouts are read: transformers' before 4.52 (still written on save), and since.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    inner = f"{kind.base_model_prefix}."
    return {
        r"^model\.language_model\.": inner,
        rf"^language_model\.(model|{re.escape(inner[:-1])})\.": inner,
        r"^language_model\.lm_head": "lm_head",
    }


def language_type(config: Mapping[str, Any], where: str) -> str:
    """transformers' ``model_type`` of the language model in an original-layout ``config`` of ``where``.

    Taken from ``architectures`` (in a LoRA's config.json that of the base), else from ``model_type``.

    Raises:
        ModelError: the architecture is not LLaVA's, or unknown to transformers.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    architecture, own = next(iter(config.get("architectures") or []), None), config.get("model_type")
    said = _alias(str(own or "llava").removeprefix("llava_"))
    kind = "llama" if said == "llava" else said
    if architecture is not None:
        named = _ARCHITECTURE.fullmatch(str(architecture))
        kind = _alias(named[2].lower()) if named else ""
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or said not in ("llava", kind):
        raise ModelError(
            f"{where}: architecture {architecture} with model_type {own} is not supported",
            hint="supported with mm_vision_tower: Llava<X>ForCausalLM (model_type llava or llava_<x>), where X is a "
            "causal language model of transformers such as Llama, Mistral, Qwen2 or Phi",
        )
    return kind


def _alias(kind: str) -> str:
    return _ALIASES.get(kind, kind)
