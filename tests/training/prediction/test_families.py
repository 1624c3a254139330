"""Language models of many families: their decoder layers are found, and their memory is predicted."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llavactl.core.errors import PredictionError
from llavactl.core.schema import FeatureShape
from llavactl.model.decoder import decoder_layers
from llavactl.model.llava import LlavaModel
from llavactl.recipe.load import load_recipe
from llavactl.training.placement import Placement
from llavactl.training.prediction import step
from llavactl.training.prediction.alternatives import alternatives
from llavactl.training.prediction.predict import Choice, StagePredictor
from llavactl.training.prediction.target import Target
from llavactl.training.throughput import training_flops

LAYERS = 6
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": LAYERS}
GROUPED = {**SIZES, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GPT = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 32, "n_layer": LAYERS, "n_head": 4},
    "cohere": GROUPED,
    "falcon": SIZES,
    "gemma2": {**GROUPED, "head_dim": 8},
    "gemma3_text": {**GROUPED, "head_dim": 8},
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neox": SIZES,
    "llama": GROUPED,
    "mixtral": {**GROUPED, "num_local_experts": 4},
    "mpt": {"d_model": 32, "n_layers": LAYERS, "n_heads": 4},
    "olmo2": GROUPED,
    "opt": {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "phi": SIZES,
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 8},
    "qwen3_moe": {**GROUPED, **EXPERTS, "head_dim": 8},
    "starcoder2": GROUPED,
}


def _config(family: str) -> Any:
    return AutoConfig.for_model(
        family, **FAMILIES[family], vocab_size=400, bos_token_id=0, eos_token_id=1, pad_token_id=None
    )


def _predictor(toy: Path, family: str, *overrides: str) -> StagePredictor:
    """The predictor of stage 2 with a model of ``family``; only its configuration exists."""
    folder = toy / family
    if not folder.exists():
        shutil.copytree(toy / "language", folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
        _config(family).save_pretrained(folder)
    given = ["stage2.init=scratch", "stage2.max_length=64", "stage2.lora={r: 4, alpha: 4, dropout: 0.0}"]
    recipe = load_recipe(toy / "recipe.yaml", [*given, f"language.model={folder}", *overrides])
    return StagePredictor(recipe, 2, FeatureShape((2, 2), 32), 4, None, 1, cuda=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_layers_of_each_family_are_found(family: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_config(family))
    layers = decoder_layers(model)
    assert len(layers) == LAYERS
    assert len({type(layer) for layer in layers}) == 1


def test_the_decoder_layers_of_a_multimodal_model_are_not_those_of_its_vision_encoder() -> None:
    text = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    config = AutoConfig.for_model("gemma4", text_config=text, vision_config={"num_hidden_layers": 3})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert [type(layer).__name__ for layer in decoder_layers(model)] == ["Gemma4TextDecoderLayer"] * 2


CASES = [(family, method) for family in FAMILIES for method in ("full", "lora") if (family, method) != ("mpt", "lora")]
FAST = [("gpt2", "full"), ("mixtral", "lora")]


@pytest.mark.parametrize(
    ("family", "method"), [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow) for case in CASES]
)
def test_the_memory_of_each_family_is_predicted(
    toy: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, family: str, method: str
) -> None:
    predictor = _predictor(toy, family, f"stage2.method={method}", "stage2.precision=float32")
    choices = [Choice(Placement(), checkpointing, None) for checkpointing in (False, True)]
    capfd.readouterr()
    extrapolated = [predictor.predict(choice).device for choice in choices]
    assert "Traceback" not in capfd.readouterr().err
    assert all(parts["activations"] > 0 for parts in extrapolated)
    if family == "gpt2":
        monkeypatch.setattr(step, "TRACED_LAYERS", (100, 101))
        whole = _predictor(toy, family, f"stage2.method={method}", "stage2.precision=float32")
        assert whole.predict(choices[0]).device == extrapolated[0]


def test_a_step_that_fails_is_a_typed_error(toy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    predictor = _predictor(toy, "mpt", "stage2.method=lora")  # peft has no LoRA for it with embeddings as inputs
    with pytest.raises(PredictionError, match="mpt") as failed:
        predictor.predict(Choice(Placement(), False, None))
    assert "\n" not in failed.value.message
    assert failed.value.hint


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mpt", "mixtral"])
def test_no_hint_names_a_method_that_the_model_does_not_have(toy: Path, family: str) -> None:
    predictor = _predictor(toy, family, "stage2.lora.dropout=0.05", "stage2.micro_batch_tokens=64")
    options = [each.options for each in alternatives(predictor, predictor.recipe, Target(True, 400_000))]
    assert not [each for each in options if "-o stage2.method=lora" in each]


def test_a_model_without_attention_heads_has_no_formula_of_training_flops() -> None:
    config = AutoConfig.for_model("rwkv", hidden_size=32, num_hidden_layers=2, vocab_size=400)
    with torch.device("meta"):
        model = LlavaModel(torch.nn.Linear(32, 32), AutoModelForCausalLM.from_config(config))
    assert training_flops(model) is None
