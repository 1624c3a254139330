"""QLoRA: adapters train on a language model in 4 bits and are merged into the full-precision one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llavactl.model.folder import describe, load
from llavactl.testing import run_cli
from llavactl.training.metrics import read

OPTIONS = ["method=qlora", "lora={r: 4, alpha: 8, dropout: 0.0}", "init=scratch", "epochs=4"]
OPTIONS += ["validation=0.2", "learning_rate=1e-2"]


def train(toy: Path, *settings: str) -> Any:
    words = [word for each in (*OPTIONS, *settings) for word in ("-o", f"stage2.{each}")]
    live = ["-o", "features.mode=live", "-o", f"run_dir={toy}/run", "--json"]
    return run_cli("train", "--stage", "2", "-r", str(toy / "recipe.yaml"), *words, *live)


def test_without_bitsandbytes_the_error_names_the_extra(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    result = train(toy)
    assert result.exit_code == 1
    assert "stage2.method: qlora" in result.stderr
    assert "llavactl[qlora]" in result.stderr


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_adapters_train_after_a_validation_and_merge_into_the_full_precision_model(toy: Path, precision: str) -> None:
    pytest.importorskip("bitsandbytes")
    result = train(toy, f"precision={precision}")
    assert result.exit_code == 0, result.stderr
    report = result.json()
    losses = [line["loss"] for line in read(toy / "run/stage2/metrics.jsonl") if "loss" in line]
    assert losses[-1] < losses[0] - 0.3
    assert report["packing"] == "packed"
    model = toy / "run/stage2/model"
    assert (describe(model)["method"], describe(model)["quantised"]) == ("lora", "nf4")
    adapter = load_file(model / "adapter/adapter_model.safetensors")
    assert any("layers.1" in name and weight.abs().max() > 0 for name, weight in adapter.items() if "lora_B" in name)
    layer = "model.layers.1.mlp.up_proj"
    base = load_file(toy / "language/model.safetensors")[f"{layer}.weight"]
    down, up = (adapter[f"base_model.model.{layer}.lora_{part}.weight"].float() for part in "AB")
    merged = load(model, dtype="float32").bundle.model.language.merge_and_unload()
    torch.testing.assert_close(merged.get_submodule(layer).weight.detach(), base.float() + 2 * up @ down)
