"""QLoRA: adapters train on a language model in 4 bits and are merged into the full-precision one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llavactl.core.errors import ModelError, RecipeError
from llavactl.core.model_description import read_description
from llavactl.core.registry import registry
from llavactl.model.folder import load
from llavactl.model.llava import LlavaModel
from llavactl.model.quantized import load_quantized
from llavactl.recipe.stages import Lora, Stage2
from llavactl.testing import run_cli
from llavactl.training.metrics import read
from llavactl.training.optimizer import Optimizer
from llavactl.training.trainable import configure_trainable
from llavactl.training.update_rules import assign_update_rules

OPTIONS = ["method=qlora", "lora={r: 4, alpha: 8, dropout: 0.0}", "init=scratch", "epochs=4"]
OPTIONS += ["validation=0.2", "learning_rate=1e-2"]


def train(toy: Path, *settings: str) -> Any:
    words = [word for each in (*OPTIONS, *settings) for word in ("-o", f"stage2.{each}")]
    live = ["-o", "features.mode=live", "-o", f"run_dir={toy}/run", "--json"]
    return run_cli("train", "--stage", "2", "-r", str(toy / "recipe.yaml"), *words, *live)


def quantized(toy: Path, dtype: str = "bfloat16") -> Any:
    pytest.importorskip("bitsandbytes")
    return load_quantized(registry().create("languages", {"name": "hf", "model": str(toy / "language")}), dtype, "cpu")


def test_linear_layers_are_loaded_in_4_bits_and_all_other_weights_in_precision(toys: Path) -> None:
    language = quantized(toys)
    four_bits = {name for name, weight in language.named_parameters() if weight.dtype == torch.uint8}
    assert len(four_bits) == 7 * language.config.num_hidden_layers
    assert all("layers." in name and "norm" not in name for name in four_bits)
    others = {weight.dtype for name, weight in language.named_parameters() if name not in four_bits}
    assert others == {torch.bfloat16}
    layer = "model.layers.1.mlp.up_proj"
    weight = language.get_submodule(layer).weight
    assert (weight.quant_state.quant_type, weight.quant_state.nested) == ("nf4", True)
    original = load_file(toys / "language/model.safetensors")[f"{layer}.weight"]
    restored = pytest.importorskip("bitsandbytes").functional.dequantize_4bit(weight.data, weight.quant_state)
    assert 0 < (restored.float() - original).norm() < 0.25 * original.norm()


def test_the_logits_of_a_llava_checkpoint_are_checked_in_4_bits(toys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llavactl.components.languages.causal_lm.in_hf_llava", lambda model: True)
    language = quantized(toys)
    language(torch.tensor([[1, 2, 3]])).logits.sum().backward()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_found_in_4_bits(toy: Path, value: float) -> None:
    file = toy / "language/model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.up_proj.weight"][5, 7] = value
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj.*not finite"):
        quantized(toy)


def test_a_language_model_that_cannot_be_quantized_is_named() -> None:
    class Plain:
        def tokenizer(self) -> Any:
            raise NotImplementedError

        def load(self, dtype: str) -> Any:
            raise NotImplementedError

    with pytest.raises(RecipeError, match=r"Plain.*load_quantized"):
        load_quantized(Plain(), "bfloat16", "cpu")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_adapters_have_the_precision_and_float32_masters(
    toys: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Also with versions of peft that create adapters of layers in 4 bits in float32."""
    adapted = peft.get_peft_model

    def in_float32(*arguments: Any, **options: Any) -> Any:
        model = adapted(*arguments, **options)
        for name, weight in model.named_parameters():
            weight.data = weight.data.float() if "lora_" in name else weight.data
        return model

    monkeypatch.setattr(peft, "get_peft_model", in_float32)
    dtype = getattr(torch, precision)
    model = LlavaModel(nn.Linear(4, 48).to(dtype), quantized(toys, precision))
    settings = Stage2(method="qlora", lora=Lora(r=4, alpha=8), precision=precision)  # type: ignore[arg-type]
    rates = configure_trainable(model, settings, seed=0)
    assert any("lora_A" in name for name in rates)
    optimizer = Optimizer(model, rates, assign_update_rules(model, settings), 0.0)
    assert {optimizer.parameters[name].dtype for name in rates} == {dtype}
    assert {master.dtype for master in optimizer.masters.values()} == {torch.float32}


def test_without_bitsandbytes_the_error_names_the_extra(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    result = train(toy)
    assert result.exit_code == 1
    assert "stage2.method: qlora" in result.stderr
    assert "llavactl[qlora]" in result.stderr


@pytest.mark.parametrize("precision", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_adapters_train_after_a_validation_and_merge_into_the_full_precision_model(toy: Path, precision: str) -> None:
    pytest.importorskip("bitsandbytes")
    result = train(toy, f"precision={precision}")
    assert result.exit_code == 0, result.stderr
    report = result.json()
    losses = [line["loss"] for line in read(toy / "run/stage2/metrics.jsonl") if "loss" in line]
    assert losses[-1] < losses[0] - 0.3
    assert report["packing"] == "packed"
    model = toy / "run/stage2/model"
    assert (read_description(model)["method"], read_description(model)["quantised"]) == ("lora", "nf4")
    adapter = load_file(model / "adapter/adapter_model.safetensors")
    assert any("layers.1" in name and weight.abs().max() > 0 for name, weight in adapter.items() if "lora_B" in name)
    layer = "model.layers.1.mlp.up_proj"
    base = load_file(toy / "language/model.safetensors")[f"{layer}.weight"]
    down, up = (adapter[f"base_model.model.{layer}.lora_{part}.weight"].float() for part in "AB")
    merged = load(model, dtype="float32").bundle.model.language.merge_and_unload()
    torch.testing.assert_close(merged.get_submodule(layer).weight.detach(), base.float() + 2 * up @ down)
