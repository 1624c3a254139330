"""Export as the last step of a run, verified with the recipe's images; the model card; modules to train."""

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
    assert "exact" in ran.stdout
    assert "greedy answers" in ran.stdout
    record = json.loads((toy / "out/hf/llavactl_export.json").read_text())
    assert record["verified"]["images"] == 3
    assert not record["verified"]["faults"]
    monkeypatch.setattr("llavactl.verbs.export.verify", None)  # a verified export is not verified again
    again = run_cli("run", "-r", str(recipe), "--json").json()["export"][0]
    assert again["finished_before"]
    assert again["verified"] == record["verified"]
    card = (toy / "out/hf/README.md").read_text()
    assert card.startswith("---\npipeline_tag: image-text-to-text\n")
    for entry in ("# toy", "6 steps", "`llava-json`", "vicuna-v1", "transformers", "records.json"):
        assert entry in card
    origin = "runs/toy/stage2/model"
    assert f"llavactl export --model {origin} --format hf" in card
    assert "exact in transformers" in card
    assert card.count("| image embeddings |") == 2
    assert str(toy) not in card


def test_recipe_check_reports_an_unknown_format(toy: Path) -> None:
    recipe = toy / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "export: [{format: onnx, to: out/}]\n")
    checked = run_cli("recipes", "check", str(recipe))
    assert checked.exit_code == 1
    assert "export.0.format: unknown format 'onnx'" in checked.stdout + checked.stderr


def test_stage_2_trains_only_the_named_modules(toy: Path) -> None:
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
    unmatched = run_cli("train", "--stage", "2", "-r", recipe, *live, "-o", "stage2.trainable_modules=[query]")
    assert unmatched.exit_code == 1
    assert "query" in unmatched.stderr
