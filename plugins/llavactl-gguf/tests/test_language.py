"""Language models have the same logits in llama.cpp as in transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from llavactl import ModelError, open_model
from llavactl.testing import toy_tokenizer

from .conftest import TOKENS, WIDTH, Toys, causal_lm, difference, llama, logits

TEXT = "USER: What is it, 12 red? ASSISTANT:"
LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"head_dim": 32}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", rope("linear", factor=2.0)),
        ("llama", rope("llama3", factor=8.0, **LLAMA_3)),
        ("mistral", {"sliding_window": 64}),
        ("qwen2", {}),
        ("qwen2", rope("linear", factor=2.0)),
        ("qwen3", {"head_dim": 32}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)) or "default",
)
def test_logits(toys: Toys, tmp_path: Path, model_type: str, settings: dict[str, Any]) -> None:
    language = causal_lm(tmp_path / "language", model_type, **settings)
    toy_tokenizer(language)
    model = toys.model(language=language)
    program = llama(toys.export(model))
    outputs = program.run(TEXT * 3, [], 4)
    expected = logits(model, outputs["ids"].tolist())
    assert 40 < len(expected) < 64
    assert difference(outputs["logits"], expected) < 1e-5
    assert outputs["said"][0] == expected[-1].argmax()
    if model_type == "mistral":  # beyond its window, attention would differ
        assert program.lib.llama_model_n_ctx_train(program.model) == 64


@pytest.mark.parametrize(("kind", "largest"), [("f16", 2e-3), ("bf16", 2e-2), ("q8_0", 5e-2)])
def test_types(toys: Toys, kind: str, largest: float) -> None:
    model = toys.model()
    export = toys.export(model, type=kind, mmproj_type="f32")
    assert {file.name for file in export.glob("*.gguf")} == {f"model-{kind}.gguf", "mmproj-f32.gguf"}
    outputs = llama(export).run(TEXT, [], 1)
    assert 1e-5 < difference(outputs["logits"], logits(model, outputs["ids"].tolist())) < largest
    assert (export / f"model-{kind}.gguf").stat().st_size < (toys.export(model) / "model-f32.gguf").stat().st_size


def test_rows_that_are_not_a_multiple_of_a_block_are_stored_in_float16(toys: Toys, tmp_path: Path) -> None:
    language = causal_lm(tmp_path / "language", intermediate_size=WIDTH + 8)
    toy_tokenizer(language)
    model = toys.model(language=language)
    outputs = llama(toys.export(model, type="q8_0")).run(TEXT, [], 1)
    assert difference(outputs["logits"], logits(model, outputs["ids"].tolist())) < 5e-2


def test_an_adapter_is_merged(toys: Toys, parts: dict[str, Path], tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(parts["language"])
    adapted: Any = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    model = toys.model(adapter=tmp_path / "adapter")
    outputs = llama(toys.export(model)).run(TEXT, [], 1)
    tokens = outputs["ids"].tolist()
    with torch.no_grad():
        expected = adapted(torch.tensor([tokens])).logits[0]
    assert difference(outputs["logits"], expected) < 1e-5
    assert difference(outputs["logits"], logits(toys.model(), tokens)) > 0.1


@pytest.mark.parametrize(
    ("model_type", "settings", "named"),
    [
        ("gemma", {}, "GemmaForCausalLM"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", rope("dynamic", factor=2.0), "dynamic"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("qwen3", rope("llama3", factor=8.0, **LLAMA_3), "llama3"),
    ],
)
def test_other_language_models_are_refused(
    toys: Toys, tmp_path: Path, model_type: str, settings: dict[str, Any], named: str
) -> None:
    language = causal_lm(tmp_path / "language", model_type, **settings)
    toy_tokenizer(language)
    with pytest.raises(ModelError, match=named):
        toys.export(toys.model(language=language))
    assert not list(tmp_path.glob("model-*-export-*/*"))


def test_there_are_as_many_tokens_as_embeddings(toys: Toys) -> None:
    model = toys.model()
    program = llama(toys.export(model))
    assert program.tokens == TOKENS > len(open_model(model).tokenizer())
