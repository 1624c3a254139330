"""The package as a plugin: what it registers and imports, conformance, its recipe, and training with the toy models."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from llavactl_sketches.source import SketchesOptions, sketches

from llavactl import load_recipe
from llavactl.testing import check_plugin, run_cli, toy_recipe

HEAVY = ["torch", "transformers", "numpy", "PIL", "scipy"]


@pytest.mark.parametrize("module", ["llavactl_sketches", "llavactl_sketches.source", "llavactl_sketches.task"])
def test_the_entry_point_and_the_options_import_nothing_heavy(module: str):
    code = f"import {module}, sys; print([name for name in {HEAVY} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_all_components_conform():
    assert check_plugin("sketches", {"sketches": {"count": 6}, "sketch-to-html": {"count": 6, "browser": "none"}}) == []
    checked = run_cli("plugins", "check", "sketches", "--json")
    assert checked.exit_code == 0, checked.stderr
    assert checked.json()["ok"]
    assert {"conformance", "recipe"} <= {each["check"] for each in checked.json()["checks"]}


def test_a_model_is_trained_on_sketches_and_evaluated(tmp_path: Path):
    """The whole pipeline with the toy models; the report names the protocol."""
    recipe = toy_recipe(tmp_path)
    settings = [
        "data.stage1=[{name: sketches, count: 8}]",
        "data.stage2=[{name: sketches, count: 8}]",
        "eval={tasks: [{name: sketch-to-html, count: 3, browser: none}], max_new_tokens: 4}",
        f"run_dir={tmp_path}/run",
        "stage1.max_steps=1",
        "stage2.max_steps=1",
        "stage1.max_length=2048",
        "stage2.max_length=2048",
    ]
    result = run_cli("run", "-r", str(recipe), *(word for each in settings for word in ("-o", each)))
    assert result.exit_code == 0, result.stderr
    report = json.loads((tmp_path / "run/eval/sketch-to-html.json").read_text(encoding="utf-8"))
    assert (report["protocol"], report["n"]) == ("dom", 3)
    assert {"structure", "structure_text", "structure_exact", "structure_valid"} <= report["scores"].keys()
    assert "layout" not in report["scores"]


def test_stored_answers_are_scored_without_a_model(tmp_path: Path):
    answers = tmp_path / "answers.jsonl"
    samples = sketches(SketchesOptions(count=5, split="test"))
    lines = [json.dumps({"id": sample.id, "text": sample.turns[1].text}) for sample in samples]
    answers.write_text("\n".join(lines), encoding="utf-8")
    options = ["-t", "count=5", "-t", "browser=none", "--answers", str(answers), "--json"]
    scored = run_cli("eval", "sketch-to-html", *options)
    assert scored.exit_code == 0, scored.stderr
    assert scored.json()["protocol"] == "dom"
    assert scored.json()["scores"]["structure"] == 100


@pytest.mark.skipif(find_spec("llavactl_demo") is None, reason="the recipe uses the models of llavactl-demo")
def test_the_recipe_trains_on_other_sketches_than_it_evaluates():
    shown = run_cli("recipes", "show", "sketch-demo")
    assert shown.exit_code == 0, shown.stderr
    assert shown.stdout.startswith("# llavactl run -r sketch-demo\n")
    recipe = load_recipe("sketch-demo")
    specs = [spec.spec() for spec in (*recipe.data.stage1, *recipe.data.stage2)]
    assert all(spec["name"] == "sketches" and spec.get("split", "train") == "train" for spec in specs)
    (task,) = (spec.spec() for spec in recipe.eval.tasks)
    assert task["name"] == "sketch-to-html"
    assert {spec["prompt"] for spec in specs} == {task["prompt"]}
    assert recipe.eval.blind_baseline
