"""Loads the language model of a LLaVA checkpoint, in format hf (transformers) or llava (the original)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llavactl.core import hub
from llavactl.core.errors import ModelError

_ARCHITECTURE = re.compile(r"(Llava)?(\w+)ForCausalLM")
_ALIASES = {"qwen": "qwen2"}
"""LLaVA-NeXT calls its class for Qwen1.5 and Qwen2 ``LlavaQwenForCausalLM``."""

_UNSCALED = {"final_logit_softcapping": None, "logits_scaling": 1.0, "logit_scale": 1.0}
"""Neutral values of keys that scale or cap logits, which ``LlavaForConditionalGeneration`` ignores."""


def load_arguments(model: str) -> dict[str, Any]:
    """Arguments for ``from_pretrained`` if the language model is part of a LLaVA checkpoint; else {}."""
    from transformers import AutoConfig

    checkpoint = hub.model_config(model)
    if "text_config" in checkpoint:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False).get_text_config()
        for key, value in _UNSCALED.items() if _is_hf_llava(checkpoint) else ():
            if config.to_dict().get(key) is not None:
                setattr(config, key, value)
        return {"config": config, "key_mapping": _key_mapping(config)}
    if "mm_vision_tower" in checkpoint:
        excluded = ("model_type", "architectures", "auto_map")
        settings = {key: value for key, value in checkpoint.items() if key not in excluded}
        return {"config": AutoConfig.for_model(language_type(checkpoint, model), **settings)}
    return {}


def in_hf_llava(model: str) -> bool:
    """Whether the language model is part of a ``LlavaForConditionalGeneration``."""
    return _is_hf_llava(hub.model_config(model))


def _is_hf_llava(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "llava" and "text_config" in config


def _key_mapping(config: Any) -> dict[str, str]:
    """Regular expressions for weight names in a LLaVA checkpoint, with the language model's own names (``model.…``).

    Both naming schemes of transformers are supported: before 4.52 (still written on save) and since.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    inner = f"{model_class.base_model_prefix}."
    return {
        r"^model\.language_model\.": inner,
        rf"^language_model\.(model|{re.escape(inner[:-1])})\.": inner,
        r"^language_model\.lm_head": "lm_head",
    }


def language_type(config: Mapping[str, Any], where: str) -> str:
    """transformers' ``model_type`` of the language model in LLaVA's ``config``; ``where`` is the checkpoint.

    Determined by ``architectures`` (the base's in the config.json of a LoRA adapter), else by ``model_type``.

    Raises:
        ModelError: the architecture is not one of LLaVA's, or transformers doesn't have it.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    architecture, model_type = next(iter(config.get("architectures") or []), None), config.get("model_type")
    stated = _canonical_name(str(model_type or "llava").removeprefix("llava_"))
    kind = "llama" if stated == "llava" else stated
    if architecture is not None:
        match = _ARCHITECTURE.fullmatch(str(architecture))
        kind = _canonical_name(match[2].lower()) if match else ""
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or stated not in ("llava", kind):
        raise ModelError(
            f"{where}: architecture {architecture} with model_type {model_type} is not supported",
            hint="supported with mm_vision_tower: Llava<X>ForCausalLM (model_type llava or llava_<x>), where X is a "
            "causal language model of transformers such as Llama, Mistral, Qwen2 or Phi",
        )
    return kind


def _canonical_name(kind: str) -> str:
    return _ALIASES.get(kind, kind)
