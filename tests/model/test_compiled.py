"""Decoding with a cache of fixed size equals decoding without a cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llavactl.model import compiled
from llavactl.model.compiled import CompiledDecoder, compile_blocker
from llavactl.model.exactness import new_cache

SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
MIN_SIZE = 32
COMPILERS: dict[str, Callable[[Any], Any]] = {
    "not compiled": lambda step: step,
    "graph": lambda step: torch.compile(step, backend="eager", fullgraph=True, dynamic=False),
}


def language(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZE, num_key_value_heads=2, head_dim=8, **options)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager" if kind == "gemma2" else "sdpa").eval()


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@torch.inference_mode()
def test_logits_equal_those_of_one_pass(kind: str, compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In two turns, of which the second needs a larger cache, and after a shorter prefix."""
    monkeypatch.setattr(compiled, "MIN_SIZE", MIN_SIZE)
    model = language(kind, max_position_embeddings=4 * MIN_SIZE)
    decoder = CompiledDecoder(model, COMPILERS[compiler])
    length = MIN_SIZE + 20
    embeds = model.get_input_embeddings()(torch.randint(99, (1, length)))
    expected = model(inputs_embeds=embeds, use_cache=False).logits[0]
    cache = new_cache(model)
    done = 0
    for prompt, end in ((10, 14), (MIN_SIZE + 10, length)):
        model(inputs_embeds=embeds[:, done:prompt], past_key_values=cache, use_cache=True)
        decoder.load(cache, end - prompt)
        for at in range(prompt, end):
            torch.testing.assert_close(decoder.logits(embeds[:, at : at + 1])[0], expected[at], atol=1e-5, rtol=1e-4)
        decoder.store(cache, end)
        assert cache.get_seq_length() == end
        done = end
    shorter = new_cache(model)
    model(inputs_embeds=embeds[:, :5], past_key_values=shorter, use_cache=True)
    decoder.load(shorter, 1)
    torch.testing.assert_close(decoder.logits(embeds[:, 5:6])[0], expected[5], atol=1e-5, rtol=1e-4)


def test_models_that_cannot_be_compiled_have_a_reason(toys: Path) -> None:
    assert compile_blocker(language("llama")) == ""
    assert "sliding" in compile_blocker(language("mistral", sliding_window=8))
    assert "gemma2" in compile_blocker(language("gemma2"))
