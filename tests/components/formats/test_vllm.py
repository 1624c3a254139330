"""Exports that vLLM can't serve are named in the log and on the model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llavactl.components.formats.vllm import vllm_limits
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


@pytest.mark.parametrize(("connector", "served"), [("linear", False), ("mlp2x-gelu", True)])
def test_an_export(native: Make, tmp_path: Path, connector: str, served: bool) -> None:
    to = ("--format", "hf", "--to", str(tmp_path / "out"), "--no-verify")
    result = run_cli("export", "--model", str(native("ours", connector=connector)), *to)
    assert result.exit_code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("vLLM" in result.stderr, "vLLM" in card) == (not served, not served)
