"""Export as the last step of a run, verified with the recipe's own photos; and what a card says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llavactl.testing import run_cli


def test_export_is_the_last_step_of_a_run(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = toy / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "export: [{format: hf, to: out/hf}]\n")
    ran = run_cli("run", "-r", str(recipe))
    assert ran.exit_code == 0, ran.stderr
    assert "verified: logits differ by at most" in ran.stdout
    kept = json.loads((toy / "out/hf/llavactl_export.json").read_text())
    assert kept["verified"]["photos"] == 3
    assert not kept["verified"]["faults"]
    monkeypatch.setattr("llavactl.verbs.export.verify", None)  # what is verified isn't verified again
    again = run_cli("run", "-r", str(recipe), "--json").json()["export"][0]
    assert again["finished_before"]
    assert again["verified"] == kept["verified"]
    card = (toy / "out/hf/README.md").read_text()
    assert card.startswith("---\npipeline_tag: image-text-to-text\n")
    for said in ("# toy", "stage1: 6 steps", "`llava-json`", "vicuna-v1", "transformers", "records.json"):
        assert said in card
    assert str(toy) not in card


def test_an_unknown_format_is_found_before_any_work(toy: Path) -> None:
    recipe = toy / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "export: [{format: onnx, to: out/}]\n")
    checked = run_cli("recipes", "check", str(recipe))
    assert checked.exit_code == 1
    assert "export.0.format: unknown format 'onnx'" in checked.stdout + checked.stderr


def test_stage_2_trains_what_only_names(toy: Path) -> None:
    import torch
    from safetensors.torch import load_file

    recipe = str(toy / "recipe.yaml")
    live = ("-o", "features.mode=live", "-o", "stage2.init=scratch", "-o", "stage2.max_steps=2")
    done = run_cli("train", "--stage", "2", "-r", recipe, *live, "-o", "stage2.trainable_modules=[self_attn]")
    assert done.exit_code == 0, done.stderr
    before = load_file(toy / "language/model.safetensors")
    after = load_file(toy / "runs/toy/stage2/model/language/model.safetensors")
    for name, weight in before.items():
        assert torch.equal(weight, after[name]) != ("self_attn" in name), name
    wrong = run_cli("train", "--stage", "2", "-r", recipe, *live, "-o", "stage2.trainable_modules=[query]")
    assert wrong.exit_code == 1
    assert "no weight with 'query' in its name" in wrong.stderr
