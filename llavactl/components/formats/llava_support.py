"""The language models and vision encoders that LLaVA's code loads: haotian-liu/LLaVA c121f04, transformers 4.37.2.

It has classes for Llama, Mistral and MPT (not supported here), which ignore unknown keys of config.json: a model that
depends on such a key would silently compute something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llavactl.core.errors import ModelError

HINT = "use `--format hf`, or pass `-t strict=false` to write files for newer versions of transformers"

_SHARED = frozenset({
    "vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "hidden_act", "initializer_range", "rms_norm_eps", "use_cache",
    "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_theta", "attention_dropout",
})  # fmt: skip
CONFIG_KEYS: Mapping[str, frozenset[str]] = {
    "llama": _SHARED | {"pretraining_tp", "rope_scaling", "attention_bias"},
    "mistral": _SHARED | {"sliding_window"},
}
"""The keys that transformers 4.37.2 reads, by ``model_type``."""

CONTEXT = 2048
"""The longest context in LLaVA's code, in tokens. It ignores sliding windows, so a smaller window is refused."""

SCALINGS: Mapping[str, frozenset[str]] = {
    "llama": frozenset({"default", "linear"}),
    "mistral": frozenset({"default"}),
}
"""Supported types of rotary position embeddings. In 4.37.2, dynamic ones depend on the longest earlier input."""

_NEUTRAL = frozenset({
    "transformers_version", "architectures", "output_hidden_states", "return_dict", "dtype", "chunk_size_feed_forward",
    "is_encoder_decoder", "id2label", "label2id", "problem_type", "_name_or_path", "model_type", "output_attentions",
    "rope_parameters", "head_dim",
})  # fmt: skip
"""Keys that don't affect results, or that ``older_rope_keys`` translates."""

_HUB_PREFIXES = ("openai", "laion")
"""Prefixes of the vision encoders that LLaVA's code loads from the hub; any other must be a path."""


def loads_vision_encoder(name: str) -> bool:
    """Whether LLaVA's code loads the vision encoder ``name`` (``mm_vision_tower``).

    transformers 4.37 would load no tensor that transformers 5 saved, because their names differ.
    """
    if not Path(name).exists():
        return name.startswith(_HUB_PREFIXES)
    from llavactl.components.formats.weights import tensor_names

    return any("vision_model." in tensor for tensor in tensor_names(Path(name)))


def uses_fast_tokenizer(model_type: str) -> bool:
    """Whether LLaVA's code loads the tokenizer of such a language model with ``use_fast``."""
    return model_type != "llama"


def older_rope_keys(config: Mapping[str, Any], *, strict: bool) -> dict[str, Any]:
    """Older keys for rotary position embeddings, to add to the language model's ``config``.

    Without these keys LLaVA's code would use a theta of 10,000 and no scaling. {} if it can't load the model and
    ``strict`` is false.

    Raises:
        ModelError: LLaVA's code can't load the model and ``strict`` is true.
    """
    reason = _unsupported_reason(config)
    if reason and strict:
        raise ModelError(f"LLaVA's code can't load the language model: {reason}", hint=HINT)
    if reason:
        return {}
    rope = config["rope_parameters"]
    kind = rope.get("rope_type", "default")
    scaling = {} if kind == "default" else {"rope_scaling": {"type": kind, "factor": rope["factor"]}}
    return {"rope_theta": rope["rope_theta"], "rope_scaling": None, **scaling}


def _unsupported_reason(config: Mapping[str, Any]) -> str:
    """Why LLaVA's code can't load a language model with this ``config``; "" if it can."""
    from transformers import AutoConfig

    kind = str(config["model_type"])
    if kind not in CONFIG_KEYS:
        return f"model_type is {kind} (supported: {', '.join(CONFIG_KEYS)})"
    scaling = config["rope_parameters"].get("rope_type", "default")
    if scaling not in SCALINGS[kind]:
        return f"rope_type is {scaling} (supported: {', '.join(sorted(SCALINGS[kind]))})"
    width, heads, head = config["hidden_size"], config["num_attention_heads"], config.get("head_dim")
    if head and head * heads != width:
        return f"head_dim is {head} (supported: hidden_size / num_attention_heads)"
    if (window := config.get("sliding_window")) and window < CONTEXT:
        return f"sliding_window is {window} (supported: {CONTEXT} or more)"
    defaults = AutoConfig.for_model(kind).to_dict()
    for key in sorted(defaults.keys() - CONFIG_KEYS[kind] - _NEUTRAL):
        if config.get(key) != defaults[key]:
            return f"it ignores key {key}, which is {config[key]}"
    return ""
