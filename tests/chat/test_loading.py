"""Models loaded in other precisions than that of their training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import llavactl
from llavactl.chat.assistant import Assistant
from llavactl.core.schema import Turn
from llavactl.model.generate import Sampling
from llavactl.testing import toy_model

QUESTION = (Turn("user", ("What colour is the picture?",)),)


def logits(assistant: Assistant) -> torch.Tensor:
    ids = torch.tensor([assistant.prompt(QUESTION).ids])
    with torch.inference_mode():
        result: torch.Tensor = assistant.model.language(inputs_embeds=assistant.model.embed(ids, None)).logits
    return result.float()


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("method", ["full", "lora", "connector"])
@pytest.mark.parametrize(
    ("options", "bound"),
    [({"dtype": "bfloat16"}, 0.05), ({"quantize": 8}, 0.05), ({"quantize": 4}, 0.6)],
    ids=["bfloat16", "8 bits", "4 bits"],
)
def test_logits_are_close_to_those_in_full_precision(
    tmp_path: Path, method: Any, options: dict[str, Any], bound: float
) -> None:
    if "quantize" in options:
        pytest.importorskip("bitsandbytes")
    folder = toy_model(tmp_path, method=method)
    expected = logits(llavactl.load_model(folder, device="cpu"))
    loaded = llavactl.load_model(folder, device="cpu", **options)
    assert 0 < distance(logits(loaded), expected) < bound
    layers = dict(loaded.model.language.named_modules())
    linear = next(layer for name, layer in layers.items() if name.endswith("up_proj"))
    weight = getattr(linear, "base_layer", linear).weight
    assert weight.dtype == {8: torch.int8, 4: torch.uint8, None: torch.bfloat16}[options.get("quantize")]
    answer = llavactl.Chat(loaded).ask("Hello?", max_new_tokens=3).text
    assert [answer] == loaded.answer([(Turn("user", ("Hello?",)),)], Sampling(max_new_tokens=3))


@pytest.mark.parametrize("options", [{"dtype": "int4"}, {"quantize": 3}, {"quantize": True}])
def test_other_precisions_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(llavactl.RecipeError):
        llavactl.load_model(tmp_path, **options)
