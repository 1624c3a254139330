"""What vLLM requires of a ``LlavaForConditionalGeneration``, as far as ``config.json`` shows it.

Source: ``init_vision_tower_for_llava`` and ``LlavaMultiModalProjector`` in vllm/model_executor/models/llava.py, and the
activation functions in vllm/model_executor/layers/activation.py (2026).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VISION_TYPES = ("clip_vision_model", "siglip_vision_model", "pixtral")

SELECT_STRATEGIES = ("default", "full")

ACTIVATIONS = (
    *("gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh"),
    *("quick_gelu", "relu", "relu2", "sigmoid", "silu", "tanh"),
)


def vllm_limits(config: Mapping[str, Any]) -> list[str]:
    """Why vLLM can't serve a model with this ``config.json``; empty if it can, or if its language model decides."""
    vision = config["vision_config"]
    limits = []
    if vision["model_type"] not in VISION_TYPES:
        limits.append(f"it has no vision encoder of type {vision['model_type']}, only CLIP, SigLIP and Pixtral")
    layers = config["vision_feature_layer"]
    if isinstance(layers, list) and len(layers) > 1:
        limits.append(f"it takes features from one layer of the vision encoder, not from {len(layers)}")
    if (strategy := config["vision_feature_select_strategy"]) not in SELECT_STRATEGIES:
        limits.append(f"it doesn't support vision_feature_select_strategy: {strategy}")
    if (activation := config["projector_hidden_act"]) == "linear":
        limits.append("it supports connector mlp2x-gelu, but not linear")
    elif activation not in ACTIVATIONS:
        limits.append(f"it has no activation function {activation}")
    return limits
