"""What LLaVA's programs can load: haotian-liu/LLaVA c121f04 with transformers 4.37.2, which it pins.

They have classes for Llama, Mistral and MPT (not supported here). Keys of config.json that these classes don't read are
ignored: a model that depends on one would silently compute something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llavactl.core.errors import ModelError

HINT = "use `--format hf`; `-t strict=false` writes it for programs with newer versions of transformers"

_SHARED = frozenset({
    "vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "hidden_act", "initializer_range", "rms_norm_eps", "use_cache",
    "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_theta", "attention_dropout",
})  # fmt: skip
READS: Mapping[str, frozenset[str]] = {
    "llama": _SHARED | {"pretraining_tp", "rope_scaling", "attention_bias"},
    "mistral": _SHARED | {"sliding_window"},
}
"""The keys that transformers 4.37.2 reads, by ``model_type``."""

CONTEXT = 2048
"""The longest context in LLaVA's programs, in tokens. They ignore sliding windows, so a smaller window is refused."""

SCALINGS: Mapping[str, frozenset[str]] = {
    "llama": frozenset({"default", "linear"}),
    "mistral": frozenset({"default"}),
}
"""Supported types of rotary position embeddings. In 4.37.2, dynamic ones depend on the longest earlier text."""

_NEUTRAL = frozenset({
    "transformers_version", "architectures", "output_hidden_states", "return_dict", "dtype", "chunk_size_feed_forward",
    "is_encoder_decoder", "id2label", "label2id", "problem_type", "_name_or_path", "model_type", "output_attentions",
    "rope_parameters", "head_dim",
})  # fmt: skip
"""Keys that change no result, or that ``older_config`` translates."""

_HUB_PREFIXES = ("openai", "laion")
"""Prefixes of the vision encoders that LLaVA's programs load from the hub; any other must be a path."""


def loads_tower(name: str) -> bool:
    """Whether LLaVA's programs load the vision encoder ``name`` (``mm_vision_tower``).

    Tensors written by transformers 5 have names that transformers 4.37 doesn't know: it would load none of them.
    """
    if not Path(name).exists():
        return name.startswith(_HUB_PREFIXES)
    from llavactl.components.formats.weights import names

    return any("vision_model." in tensor for tensor in names(Path(name)))


def uses_fast_tokenizer(model_type: str) -> bool:
    """Whether LLaVA's programs load the tokenizer of such a language model with ``use_fast``."""
    return model_type != "llama"


def older_config(config: Mapping[str, Any], *, strict: bool) -> dict[str, Any]:
    """Keys to add to the language model's ``config`` for LLaVA's programs: positions under their older names.

    Without these keys they would use a theta of 10,000 and no scaling. {} for a model that they can't load and not
    ``strict``.

    Raises:
        ModelError: ``strict``, and they can't load it.
    """
    why = _config_fault(config)
    if why and strict:
        raise ModelError(f"LLaVA's programs can't load the language model: {why}", hint=HINT)
    if why:
        return {}
    rope = config["rope_parameters"]
    kind = rope.get("rope_type", "default")
    scaling = {} if kind == "default" else {"rope_scaling": {"type": kind, "factor": rope["factor"]}}
    return {"rope_theta": rope["rope_theta"], "rope_scaling": None, **scaling}


def _config_fault(config: Mapping[str, Any]) -> str:
    """Why LLaVA's programs can't load a language model with this ``config``; "" if they can."""
    from transformers import AutoConfig

    kind = str(config["model_type"])
    if kind not in READS:
        return f"its type is {kind} (supported: {', '.join(READS)})"
    scaling = config["rope_parameters"].get("rope_type", "default")
    if scaling not in SCALINGS[kind]:
        return f"its position embeddings are of type {scaling} (supported: {', '.join(sorted(SCALINGS[kind]))})"
    width, heads, head = config["hidden_size"], config["num_attention_heads"], config.get("head_dim")
    if head and head * heads != width:
        return f"its attention heads have width {head} (supported: hidden_size / num_attention_heads)"
    if (window := config.get("sliding_window")) and window < CONTEXT:
        return f"its sliding window has {window} tokens (supported: {CONTEXT} or more)"
    defaults = AutoConfig.for_model(kind).to_dict()
    for key in sorted(defaults.keys() - READS[kind] - _NEUTRAL):
        if config.get(key) != defaults[key]:
            return f"they ignore `{key}`, which is {config[key]}"
    return ""
