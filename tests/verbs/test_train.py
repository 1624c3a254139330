"""``train`` beyond the training loop: optional outputs, and adapters on ``stage2.init``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from llavactl.core.errors import DataError
from llavactl.model import folder as model_folder
from llavactl.report.plots import log_missing_plots
from llavactl.testing import run_cli
from llavactl.verbs import train
from llavactl.verbs.doctor import doctor

QUICK = (
    "-o",
    "features.mode=live",
    "-o",
    "stage1.max_steps=1",
    "-o",
    "stage2.max_steps=1",
    "-o",
    "stage2.init=scratch",
)


def trained(recipe: Path, stage: int, *options: str) -> Any:
    done = run_cli("train", "--stage", str(stage), "-r", str(recipe), *QUICK, *options, "--json")
    assert done.exit_code == 0, done.stderr
    return done.json()


@pytest.mark.parametrize("function", ["_write_sample_answers", "plot_loss", "write_report"])
@pytest.mark.parametrize("error", [RuntimeError("cannot reshape tensor of 0 elements"), DataError("image gone")])
def test_errors_in_optional_outputs_do_not_fail_the_stage(
    toy: Path, function: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(train, function, fail)
    done = run_cli("train", "--stage", "1", "-r", str(toy / "recipe.yaml"), *QUICK, "--json")
    assert done.exit_code == 0
    assert str(error) in done.stderr
    assert Path(done.json()["model"], "connector.safetensors").is_file()
    assert trained(toy / "recipe.yaml", 1)["finished_before"] is True


def test_without_matplotlib_a_note_is_logged_once(
    toy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    log_missing_plots.cache_clear()
    done = run_cli("train", "--stage", "1", "-r", str(toy / "recipe.yaml"), *QUICK, "--json")
    assert done.exit_code == 0, done.stderr
    assert done.stderr.count("pip install 'llavactl[plots]'") == 1
    assert "could not be written" not in done.stderr
    caplog.clear()
    log_missing_plots()
    assert not caplog.records
    folder = toy / "runs/toy"
    assert not (folder / "stage1/loss.png").exists()
    assert (folder / "stage1/model").is_dir()
    assert "llavactl[plots]" in (folder / "report.html").read_text()
    (finding,) = [each for each in doctor().findings if each.what == "plots"]
    assert not finding.works
    assert "llavactl[plots]" in finding.why


def test_an_adapter_is_applied_to_the_model_that_it_was_trained_on(toy: Path) -> None:
    """With ``stage2.init`` this is not the recipe's language model."""
    recipe = toy / "recipe.yaml"
    first = trained(recipe, 2, "-o", "name=first")["model"]
    lora = ("-o", f"stage2.init={first}", "-o", "stage2.method=lora", "-o", "name=second")
    adapted = Path(trained(recipe, 2, *lora)["model"])
    description = json.loads((adapted / "llavactl.json").read_text(encoding="utf-8"))
    assert description["language"]["model"] == str(Path(first) / "language")
    base = model_folder.load(adapted).bundle.model.language.get_base_model()
    original = model_folder.load(Path(first)).bundle.model.language
    assert base.lm_head.weight.equal(original.lm_head.weight)


def test_the_modules_in_a_saved_adapter_configuration_are_sorted(toy: Path) -> None:
    """peft keeps them in a set, whose order depends on the hash seed: equal runs would write different files."""
    model = Path(trained(toy / "recipe.yaml", 2, "-o", "stage2.method=lora")["model"])
    modules = json.loads((model / "adapter/adapter_config.json").read_text(encoding="utf-8"))["target_modules"]
    assert len(modules) == 14, "seven linear layers in each of two decoder layers"
    assert modules == sorted(modules)


def test_an_adapter_on_an_adapter_is_refused_before_training(toy: Path) -> None:
    recipe, lora = toy / "recipe.yaml", ("-o", "stage2.method=lora")
    first = trained(recipe, 2, "-o", "name=first", *lora)["model"]
    again = ("-o", f"stage2.init={first}", "-o", "name=second")
    done = run_cli("train", "--stage", "2", "-r", str(recipe), *QUICK, *lora, *again)
    assert done.exit_code == 1
    assert "adapter" in done.stderr
    assert "export" in done.stderr
    assert trained(recipe, 2, *again)["finished_before"] is False


def test_a_template_that_writes_a_token_without_an_embedding_is_refused(toy: Path) -> None:
    file = toy / "language/tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    beyond = len(tokenizer["model"]["vocab"])
    tokenizer["model"]["vocab"]["<|im_start|>"] = beyond
    for token in tokenizer["added_tokens"]:
        token["id"] = beyond if token["content"] == "<|im_start|>" else token["id"]
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    (toy / "language/chat_template.jinja").unlink()
    command = ("train", "--stage", "2", "-r", str(toy / "recipe.yaml"), *QUICK)
    done = run_cli(*command, "-o", "stage2.template=chatml")
    assert done.exit_code == 1
    assert f"<|im_start|>, id {beyond}" in done.stderr
    assert run_cli(*command, "-o", "stage2.template=vicuna-v1").exit_code == 0
