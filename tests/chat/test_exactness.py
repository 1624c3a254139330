"""Batched answers equal single ones: sliding windows, chunked attention, states, length-dependent positions."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from llavactl.chat.assistant import Assistant
from llavactl.chat.decoders import JoinedDecoder
from llavactl.core.schema import IGNORE, Encoded
from llavactl.data.batches import collate
from llavactl.model import generate
from llavactl.model.exactness import Exact, is_causal
from llavactl.model.generate import Sampling
from llavactl.model.llava import LlavaModel

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 200,
    "max_position_embeddings": 256,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "head_dim": 16}
LIMIT = 29
"""Sequence length beyond which positions change: one prompt starts below it, and its answer ends above."""
ROPE = {"rope_theta": 1e4, "original_max_position_embeddings": LIMIT}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, **ROPE}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "dynamic-rope": ("LlamaForCausalLM", {"rope_parameters": DYNAMIC, "max_position_embeddings": LIMIT}),
    "dynamic-by-layer": (
        "Gemma3ForCausalLM",
        {
            **LAYERS,
            "max_position_embeddings": LIMIT,
            "rope_parameters": {
                "full_attention": DYNAMIC,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "longrope": ("LlamaForCausalLM", {"rope_parameters": LONGROPE}),
    "yarn": ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, **ROPE}}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 8}),
    "qwen2-window": ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "phi3-longrope": ("Phi3ForCausalLM", {"rope_parameters": LONGROPE, "pad_token_id": 0, **ROPE}),
    "starcoder2": ("Starcoder2ForCausalLM", {"sliding_window": 8}),
    "cohere2": ("Cohere2ForCausalLM", LAYERS),
    "gemma2": ("Gemma2ForCausalLM", {"sliding_window": 8, "head_dim": 16}),
    "gemma3": ("Gemma3ForCausalLM", LAYERS),
    "gpt-oss": ("GptOssForCausalLM", {**LAYERS, **EXPERTS}),
    "llama4": (
        "Llama4ForCausalLM",
        {**EXPERTS, "head_dim": 16, "attention_chunk_size": 8, "intermediate_size_mlp": 64, "num_hidden_layers": 4},
    ),
    "mixtral": ("MixtralForCausalLM", EXPERTS),
    "gpt-neo": (
        "GPTNeoForCausalLM",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    ),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
    "opt": ("OPTForCausalLM", {"ffn_dim": 64, "word_embed_proj_dim": 64}),
    "mpt": ("MptForCausalLM", {"d_model": 64, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 256}),
    "bloom": ("BloomForCausalLM", {"n_layer": 2, "n_head": 4}),
    "bart": (
        "BartForCausalLM",
        {"d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "is_decoder": True},
    ),
    "mamba": ("MambaForCausalLM", {"state_size": 8}),
    "jamba": ("JambaForCausalLM", {**EXPERTS, "num_hidden_layers": 8, "mamba_d_state": 8, "mamba_dt_rank": 8}),
    "qwen3-next": (
        "Qwen3NextForCausalLM",
        {
            **EXPERTS,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "shared_expert_intermediate_size": 32,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
    ),
    "recurrent-gemma": ("RecurrentGemmaForCausalLM", {"lru_width": 64, "attention_window_size": 8, "head_dim": 16}),
    "rwkv": ("RwkvForCausalLM", {"attention_hidden_size": 64}),
    "falcon": ("FalconForCausalLM", {"alibi": True}),
}
STEPS = 5
TOLERANCE = 1e-4


def language_of(kind: str) -> Any:
    """A tiny model of ``kind`` with random weights."""
    name, own = KINDS[kind]
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**{**COMMON, **own})).eval()
    for each, weight in model.named_parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=1.0 if "emb" in each or "wte" in each else 0.2)
    return model


def assistant_of(language: Any) -> Assistant:
    model = LlavaModel(nn.Linear(4, 64), language)
    encoding: Any = SimpleNamespace(image_tokens=4, tokenizer=None, template=None)
    return Assistant(model, encoding, None)  # type: ignore[arg-type]


def prompts(*lengths: int, shared: int) -> list[Encoded]:
    chance = torch.Generator().manual_seed(1)
    start, *rest = (torch.randint(2, 200, (n,), generator=chance).tolist() for n in (shared, *lengths))
    return [Encoded((*start, *each), (IGNORE,) * (shared + len(each))) for each in rest]


def logits(assistant: Assistant, batch: Sequence[Encoded], monkeypatch: pytest.MonkeyPatch) -> list[list[torch.Tensor]]:
    """For each prompt, the logits of each step of ``Assistant.answer``."""
    recorded: list[torch.Tensor] = []
    choose = generate.next_tokens

    def record(logits: torch.Tensor, *rest: Any) -> torch.Tensor:
        recorded.append(logits.clone())
        return choose(logits, *rest)

    class IgnoredOutput:
        done = False

        def add(self, token: int | None) -> None:
            pass

    rows: list[list[torch.Tensor]] = []
    with monkeypatch.context() as patch:
        patch.setattr(generate, "next_tokens", record)
        patch.setattr(Assistant, "stops", SimpleNamespace(ids=frozenset()))
        for chunk in [batch] if assistant.exact.padded else [[each] for each in batch]:
            outputs: Any = [IgnoredOutput() for _ in chunk]
            assistant._generate(chunk, outputs, Sampling(max_new_tokens=STEPS))
            rows += [[step[row] for step in recorded] for row in range(len(chunk))]
            recorded.clear()
    return rows


JOINED_KINDS = {
    *("llama", "mistral", "qwen2-window", "starcoder2", "cohere2", "gemma2", "gemma3", "gpt-oss", "mixtral"),
    *("gpt-neo", "gpt2", "opt", "mpt", "bloom", "falcon", "llama4"),
}


@pytest.mark.parametrize(
    ("kind", "shared"),
    [
        *((kind, 24) for kind in KINDS),
        # Without a common start, the next test compares the others.
        *(pytest.param(kind, 0, marks=pytest.mark.slow if kind in JOINED_KINDS else ()) for kind in KINDS),
    ],
)
def test_batched_answers_equal_single_ones(kind: str, shared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    language = language_of(kind)
    assistant = assistant_of(language)
    assert is_causal(language)
    batch = prompts(3, 40, 9, shared=shared)
    for prompt, steps in zip(batch, logits(assistant, batch, monkeypatch), strict=True):
        ids = list(prompt.ids)
        language = language_of(kind)  # some models keep state between calls
        for step_logits in steps:
            with torch.no_grad():
                embeds = language.get_input_embeddings()(torch.tensor([ids]))
                expected = language(inputs_embeds=embeds, use_cache=False).logits[0, -1]
            assert (step_logits - expected).abs().max() <= TOLERANCE * expected.abs().max()
            ids.append(int(step_logits.argmax()))


@pytest.mark.parametrize("kind", KINDS)
def test_answers_in_a_batch_that_others_join_and_leave_equal_single_ones(kind: str) -> None:
    """One prompt joins at each step, the longest one second; answers end at different steps."""
    assistant = assistant_of(language_of(kind))
    if not assistant.exact.joined:
        assert kind not in JOINED_KINDS
        return
    decoder: JoinedDecoder[int] = JoinedDecoder(assistant.model, frozenset())
    waiting = dict(enumerate(prompts(9, 40, 3, 20, shared=0)))
    ids = {key: list(prompt.ids) for key, prompt in waiting.items()}
    for step in range(8):
        decoder.keep(running := [key for key in ids if key not in waiting and step < key + 3 + 2 * (key != 1)])
        if step in waiting:
            prompt = waiting.pop(step)
            decoder.start(step, collate([prompt], assistant.features), Sampling())
            running.append(step)
        tokens = dict(decoder.step())
        assert list(tokens) == running
        for key, row in zip(running, decoder.rows.logits, strict=True):
            language = language_of(kind)  # some models keep state between calls
            with torch.no_grad():
                embeds = language.get_input_embeddings()(torch.tensor([ids[key]]))
                expected = language(inputs_embeds=embeds, use_cache=False).logits[0, -1]
            assert (row - expected).abs().max() <= TOLERANCE * expected.abs().max()
            ids[key].append(tokens[key])


def test_inexact_optimizations_are_detected() -> None:
    exact = {kind: assistant_of(language_of(kind)).exact for kind in ("llama", "mistral", "gpt-neo", "mpt", "bart")}
    assert exact["llama"] == Exact()
    for kind in ("mistral", "gpt-neo", "mpt"):
        assert exact[kind] == Exact(shared=False)
    assert exact["bart"] == Exact(padded=False, shared=False, joined=False)
    assert not assistant_of(language_of("rwkv")).exact.cached


def test_models_that_see_later_tokens_are_not_causal() -> None:
    config = transformers.BertConfig(**COMMON)
    assert not is_causal(transformers.BertLMHeadModel(config).eval())
    config.is_decoder = True
    assert is_causal(transformers.BertLMHeadModel(config).eval())
