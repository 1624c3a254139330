"""The language model as a GGUF file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from llavactl import ModelError
from llavactl_gguf.file import FILE_TYPES, HINT, Key, StoredTensor, TensorType

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class Architecture(NamedTuple):
    """A language model of transformers in llama.cpp.

    llama.cpp rotates neighboring values of a head (``interleaved``) or, as transformers, one of each half. Biases are
    those that it reads.
    """

    name: str
    interleaved: bool
    ropes: frozenset[str]
    biases: frozenset[str]


_LLAMA = Architecture(
    "llama", True, frozenset({"default", "linear", "llama3"}), frozenset({"attention_bias", "mlp_bias"})
)
ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": Architecture("qwen2", False, frozenset({"default", "linear"}), frozenset()),
    "Qwen3ForCausalLM": Architecture("qwen3", False, frozenset({"default", "linear"}), frozenset()),
}
"""By class of transformers."""

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Names of modules in transformers and llama.cpp; those of a block without ``model.layers.N`` and ``blk.N``."""


def refuse_language(language: PreTrainedModel) -> None:
    """Raises ModelError for a language model that the format can't represent exactly."""
    kind, config = type(language), language.config
    architecture = ARCHITECTURES.get(kind.__name__)
    if architecture is None or not kind.__module__.startswith("transformers."):
        supported = ", ".join(name.removesuffix("ForCausalLM") for name in ARCHITECTURES)
        raise ModelError(
            f"format gguf can't represent a language model of class {kind.__name__} (supported: {supported})", hint=HINT
        )
    rope = config.rope_parameters
    problems = {
        f"rope_type {rope.get('rope_type')}": rope.get("rope_type", "default") not in architecture.ropes,
        f"partial_rotary_factor {rope.get('partial_rotary_factor')}": rope.get("partial_rotary_factor", 1) != 1,
        f"hidden_act {config.hidden_act}": config.hidden_act != "silu",
        **{
            f"{key} {getattr(config, key, False)}": bool(getattr(config, key, False)) and key not in architecture.biases
            for key in ("attention_bias", "mlp_bias")
        },
    }
    if found := [problem for problem, is_one in problems.items() if is_one]:
        raise ModelError(f"format gguf can't represent a {config.model_type} model with {', '.join(found)}", hint=HINT)
    if unknown := sorted(name for name in language.state_dict() if _name(name) is None):
        raise ModelError(f"format gguf can't represent the language model's weight {unknown[0]}", hint=HINT)


def architecture_of(language: PreTrainedModel) -> Architecture:
    """The architecture of ``language``, which ``refuse_language`` accepted."""
    return ARCHITECTURES[type(language).__name__]


def language_keys(language: PreTrainedModel, kind: TensorType) -> Iterator[Key]:
    """The metadata of ``language``, without its tokenizer."""
    from gguf import LlamaFileType

    config, name = language.config, architecture_of(language).name
    head = _head_width(config)
    yield "general.type", "model"
    yield "general.file_type", int(LlamaFileType[FILE_TYPES[kind]])
    yield "general.quantization_version", 2
    # Within its sliding window, attention is the same without one.
    windows = [window for window in (getattr(config, "sliding_window", None),) if window]
    yield f"{name}.context_length", min([config.max_position_embeddings, *windows])
    yield f"{name}.embedding_length", config.hidden_size
    yield f"{name}.block_count", config.num_hidden_layers
    yield f"{name}.feed_forward_length", config.intermediate_size
    yield f"{name}.attention.head_count", config.num_attention_heads
    yield f"{name}.attention.head_count_kv", config.num_key_value_heads
    yield f"{name}.attention.key_length", head
    yield f"{name}.attention.value_length", head
    yield f"{name}.attention.layer_norm_rms_epsilon", float(config.rms_norm_eps)
    yield f"{name}.rope.dimension_count", head
    yield f"{name}.rope.freq_base", float(config.rope_parameters["rope_theta"])
    if config.rope_parameters.get("rope_type") == "linear":
        yield f"{name}.rope.scaling.type", "linear"
        yield f"{name}.rope.scaling.factor", float(config.rope_parameters["factor"])


def language_tensors(language: PreTrainedModel, kind: TensorType) -> Iterator[StoredTensor]:
    """The weights of ``language``."""
    config, interleaved = language.config, architecture_of(language).interleaved
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    tied = language.get_output_embeddings().weight is language.get_input_embeddings().weight
    for name, weight in language.state_dict().items():
        module = name.rpartition(".")[0]
        part = _block(module)[1]
        if module == "lm_head" and tied:
            continue
        if interleaved and part in heads:
            yield StoredTensor.of(str(_name(name)), weight, kind, partial(_interleaved, heads=heads[part]))
        else:
            yield StoredTensor.of(str(_name(name)), weight, kind)
    if config.rope_parameters.get("rope_type") == "llama3":
        yield StoredTensor.of("rope_freqs.weight", _frequency_divisors(language), "f32")


def _name(name: str) -> str | None:
    """The name in llama.cpp of the weight ``name`` of transformers; None if it has none."""
    module, _, kind = name.rpartition(".")
    block, part = _block(module)
    known = _NAMES.get(part)
    return None if known is None else f"{block}{known}.{kind}"


def _block(module: str) -> tuple[str, str]:
    """The prefix ``blk.N.`` of ``module`` and its name in the block; outside of blocks "" and ``module``."""
    if not module.startswith("model.layers."):
        return "", module
    number, _, part = module.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.", part


def _head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of ``weight`` [heads * width, …] in the order in which llama.cpp rotates them: the halves alternate."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def _frequency_divisors(language: PreTrainedModel) -> torch.Tensor:
    """What llama.cpp divides the frequencies of rotary embeddings by, for scalings that depend on the frequency."""
    import torch

    rotary: Any = language.base_model.rotary_emb
    width = _head_width(language.config)
    exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
    plain = float(language.config.rope_parameters["rope_theta"]) ** -exponents
    return (plain / rotary.inv_freq.double().cpu()).float()
