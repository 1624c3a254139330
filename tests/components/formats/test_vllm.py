"""Exports that vLLM can't serve are named in the log and on the model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llavactl.components.formats.vllm import VISION_TYPES, vllm_limits
from llavactl.testing import run_cli

from .conftest import Make


def config(**changed: Any) -> dict[str, Any]:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    return LlavaConfig(vision_config=CLIPVisionConfig(), text_config=LlamaConfig()).to_dict() | changed


def test_a_llava_1_5_model_can_be_served() -> None:
    assert vllm_limits(config()) == []
    assert vllm_limits(config(vision_feature_layer=[-2], vision_feature_select_strategy="full")) == []
    assert vllm_limits(config(vision_config={"model_type": "siglip_vision_model"})) == []


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"vision_config": {"model_type": "dinov2"}}, "dinov2"),
        ({"vision_feature_layer": [-2, -5]}, "2"),
        ({"vision_feature_select_strategy": "class"}, "class"),
        ({"projector_hidden_act": "linear"}, "linear"),
        ({"projector_hidden_act": "mish"}, "mish"),
    ],
)
def test_what_vllm_lacks(changed: dict[str, Any], named: str) -> None:
    (limit,) = vllm_limits(config(**changed))
    assert named in limit


@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_the_config_of_an_export_has_what_vllm_reads(native: Make, tmp_path: Path, vision: str) -> None:
    """vLLM chooses the class of the vision encoder by ``vision_config.model_type``."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    model = native("ours")
    if vision == "siglip":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
        encoder = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=28, patch_size=14))
        encoder.save_pretrained(tmp_path / "siglip")
        description = json.loads((model / "llavactl.json").read_text())
        description["vision"] |= {"model": str(tmp_path / "siglip")}
        description["shape"]["prefix"] = 0
        (model / "llavactl.json").write_text(json.dumps(description))
    to = tmp_path / "out"
    result = run_cli("export", "--model", str(model), "--format", "hf", "--to", str(to), "--no-verify")
    assert result.exit_code == 0, result.stderr
    exported = json.loads((to / "config.json").read_text())
    assert exported["architectures"] == ["LlavaForConditionalGeneration"]
    assert exported["vision_config"]["model_type"] == f"{vision}_vision_model"
    assert exported["vision_config"]["model_type"] in VISION_TYPES
    assert vllm_limits(exported) == []


def test_pixtral_is_a_type_of_vllm() -> None:
    from transformers import LlamaConfig, LlavaConfig, PixtralVisionConfig

    exported = LlavaConfig(vision_config=PixtralVisionConfig(), text_config=LlamaConfig(), vision_feature_layer=-1)
    assert exported.to_dict()["vision_config"]["model_type"] in VISION_TYPES
    assert vllm_limits(exported.to_dict()) == []


@pytest.mark.parametrize(("connector", "served"), [("linear", False), ("mlp2x-gelu", True)])
def test_an_export(native: Make, tmp_path: Path, connector: str, served: bool) -> None:
    to = ("--format", "hf", "--to", str(tmp_path / "out"), "--no-verify")
    result = run_cli("export", "--model", str(native("ours", connector=connector)), *to)
    assert result.exit_code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("vLLM" in result.stderr, "vLLM" in card) == (not served, not served)
