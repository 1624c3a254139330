"""Tiny language models of many families with random weights and the toy tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 401,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
HEADS = {"num_key_value_heads": 4}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-rope": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "phi": ("Phi", HEADS),
    "phi3": ("Phi3", {"sliding_window": 8}),
    "granite": (
        "Granite",
        {
            "logits_scaling": 8.0,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.1,
            "tie_word_embeddings": True,
        },
    ),
    "granite-unscaled": ("Granite", {"embedding_multiplier": 12.0, "residual_multiplier": 0.22}),
    "cohere": ("Cohere", {"logit_scale": 0.0625}),
    "cohere-unscaled": ("Cohere", {"logit_scale": 1.0}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 8}),
    "gemma2-uncapped": ("Gemma2", {"head_dim": 16, "sliding_window": 8, "final_logit_softcapping": None}),
    "gemma3": ("Gemma3", {"head_dim": 16, **LAYERS}),
    "gemma3-capped": ("Gemma3", {"head_dim": 16, **LAYERS, "final_logit_softcapping": 5.0}),
    "stablelm": ("StableLm", {"use_qkv_bias": True}),
    "olmo2": ("Olmo2", {}),
    "smollm3": ("SmolLM3", {}),
    "minicpm-like": (
        "MiniCPM3",
        {
            **HEADS,
            "dim_model_base": 16,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "gpt2": ("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024}),
    "gpt2-untied": (
        "GPT2",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024, "tie_word_embeddings": False},
    ),
    "gpt-neo": (
        "GPTNeo",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    ),
    "gpt-neox": ("GPTNeoX", HEADS),
    "gpt-neox-tied": ("GPTNeoX", {**HEADS, "tie_word_embeddings": True}),
    "gptj": ("GPTJ", {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 1024}),
    "opt": ("OPT", {"ffn_dim": 64, "word_embed_proj_dim": 64, "pad_token_id": 1}),
    "opt-projected": ("OPT", {"ffn_dim": 64, "word_embed_proj_dim": 32, "pad_token_id": 1}),
    "bloom": ("Bloom", {"n_layer": 2, "n_head": 4}),
    "mpt": ("Mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 1024}),
    "falcon": ("Falcon", {"new_decoder_architecture": False, "multi_query": True}),
    "gpt-oss": ("GptOss", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, **LAYERS}),
}

FAST = {
    "llama", "llama-tied", "llama-rope", "mistral", "qwen2", "gemma3", "granite-unscaled", "gpt2", "gpt-neox", "mpt",
    "gpt-oss", "phi", "cohere", "minicpm-like", "opt-projected",
}  # fmt: skip
"""Families that differ most: in names of tensors, tied heads, attention, scales, and the reason of a refusal."""


def families(names: Collection[str] = FAMILIES) -> list[Any]:
    """Parameters of a test: ``names``, slow except those in ``FAST``."""
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in sorted(names)]


def language_of(family: str, toy: Path, folder: Path, dtype: str = "float32", **more: Any) -> Path:
    """A language model of ``family`` with the tokenizer of ``toy``; all weights, biases and norms are random."""
    import torch
    import transformers

    name, settings = FAMILIES[family]
    suffix = "TextConfig" if name == "Gemma3" else "Config"
    config = getattr(transformers, name + suffix)(**{**SMALL, **settings, **more})
    class_name = {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
    torch.manual_seed(5)
    model = getattr(transformers, class_name)(config)
    for parameter, weight in model.named_parameters():
        std = 0.3 if weight.dim() > 1 else 0.5
        is_norm = weight.dim() == 1 and parameter.endswith("weight") and "norm" in parameter.replace("ln_", "norm")
        torch.nn.init.normal_(weight, mean=1.0 if is_norm else 0.0, std=std)
    model.tie_weights()
    shutil.copytree(
        toy, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json", "generation_config.json")
    )
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


EAGER = {"gemma2", "gemma2-uncapped", "gpt-neo", "gptj", "bloom", "mpt", "gpt-oss"}
"""Families without scaled-dot-product attention in transformers."""

REFUSED = {
    "phi": "bias",
    "gptj": "bias",
    "granite": "logits",
    "cohere": "logits",
    "gemma2": "logits",
    "gemma3-capped": "logits",
    "minicpm-like": "scales",
    "opt-projected": "head",
}
"""Families that format hf can't represent, with a term of the error message."""
