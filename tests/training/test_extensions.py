"""Plugins in training: an optimizer, a schedule, and observers that control a stage; parts of the connector."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llavactl.core.errors import PluginError, RecipeError
from llavactl.core.schema import FeatureShape
from llavactl.model.build import build
from llavactl.model.llava import LlavaModel
from llavactl.recipe.stages import Stage2
from llavactl.testing import run_cli
from llavactl.training.learning_rate import learning_rate_schedule
from llavactl.training.optimizer import Optimizer
from llavactl.training.trainable import UntrainedState, configure_trainable
from llavactl.training.update_rules import AssignedWeights, assign_update_rules

PLUGIN = """
import json
import torch
from llavactl import Options, Weight, hookimpl


class Lion:
    scope = "element"
    moments = ("exp_avg",)

    class Options(Options):
        beta: float = 0.9

    def __init__(self, options):
        self.beta = options.beta

    def selects(self, weight: Weight):
        return weight.part != "connector"

    def build(self, groups):
        return LionOptimizer(groups, {"lr": 0.0, "beta": self.beta})


class LionOptimizer(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["exp_avg"] = torch.zeros_like(weight)
                state["exp_avg"].lerp_(weight.grad, 1 - group["beta"])
                weight.sub_(group["lr"] * state["exp_avg"].sign())


class Steps:
    class Options(Options):
        fractions: tuple[float, ...] = (1.0, 0.5)

    def __init__(self, options):
        self.fractions = options.fractions

    def fraction(self, step, steps):
        return self.fractions[step * len(self.fractions) // steps]


@hookimpl
def register_optimizers(register):
    register("lion", "extra:Lion")


@hookimpl
def register_schedules(register):
    register("steps", "extra:Steps")


class Rules(Options):
    stop_at: int = 0
    stop_at_validation: int = 0
    evaluate_at: int = 0


@hookimpl
def plugin_options():
    return "extra:Rules"


@hookimpl
def control_training(stage, lines, options):
    last = lines[-1]
    if options.evaluate_at and last["step"] == options.evaluate_at and "loss" in last:
        return "evaluate"
    if options.stop_at and last["step"] >= options.stop_at and "loss" in last:
        return ["stop"]
    if options.stop_at_validation and sum("val_loss" in line for line in lines) >= options.stop_at_validation:
        return "stop"


@hookimpl
def train_failed(stage, folder, error, interrupted, recipe):
    with open(recipe["run_dir"] + "/failed.jsonl", "a") as file:
        json.dump({"stage": stage, "folder": str(folder), "error": error, "interrupted": interrupted}, file)
"""


@pytest.fixture
def extra(toy: Path) -> Path:
    """The toy recipe's folder with a plugin file ``extra.py``."""
    (toy / "extra.py").write_text(PLUGIN, encoding="utf-8")
    return toy


def train(folder: Path, run: str, *overrides: str, stage: str = "1", code: int = 0) -> dict[str, Any]:
    options = [f"run_dir={folder}/{run}", "features.mode=live", *overrides]
    words = [word for option in options for word in ("-o", option)]
    plugin = str(folder / "extra.py")
    recipe = str(folder / "recipe.yaml")
    result = run_cli("--plugin", plugin, "train", "--stage", stage, "-r", recipe, *words, "--json")
    assert result.exit_code == code, result.stderr
    return result.json() if code == 0 else {"stderr": result.stderr}


def lines(stage: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]


def weights(stage: Path) -> dict[str, torch.Tensor]:
    files = (stage / "model").rglob("*.safetensors")
    return {f"{file.name}:{name}": weight for file in files for name, weight in load_file(file).items()}


def test_a_plugins_optimizer_and_schedule_train_and_resume_bit_for_bit(extra: Path) -> None:
    options = ["stage2.optimizer.name=lion", "stage2.optimizer.beta=0.8", "stage2.init=scratch", "stage2.warmup=0"]
    options += ["stage2.schedule={name: steps, fractions: [1.0, 0.25]}"]
    whole = train(extra, "whole", *options, stage="2")
    train(extra, "parts", *options, stage="2")
    last = sorted((extra / "parts/stage2/checkpoints").glob("step-*"))[-1]
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    (extra / "parts/stage2/report.json").unlink()
    again = train(extra, "parts", *options, stage="2")
    assert 0 < again["resumed_from"] < whole["steps"]
    expected = weights(extra / "whole/stage2")
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(extra / "parts/stage2").items())
    rates = [line["learning_rate"] for line in lines(extra / "whole/stage2") if "loss" in line]
    assert {rate / max(rates) for rate in rates} == {1.0, 0.25}
    other = train(extra, "other", *options, "stage2.optimizer.beta=0.9", stage="2")
    assert other["digest"] != whole["digest"]


def test_a_wrong_optimizer_or_schedule_is_a_problem_of_its_key(extra: Path) -> None:
    text = (extra / "recipe.yaml").read_text()
    (extra / "recipe.yaml").write_text(
        text.replace("stage2: {", "stage2: {optimizer: lionn, schedule: {name: steps, a: 1}, ")
    )
    result = run_cli("--plugin", str(extra / "extra.py"), "recipes", "check", str(extra / "recipe.yaml"), "--json")
    assert result.exit_code == 1
    assert {problem["key"] for problem in result.json()["problems"]} == {"stage2.optimizer", "stage2.schedule.a"}


def test_settings_of_earlier_versions_have_the_same_digest() -> None:
    """A stage with today's defaults must not count as changed."""
    from llavactl.recipe.stages import Stage1
    from llavactl.training.digest import newer_defaults

    assert newer_defaults(Stage1()) == {"train_connector", "schedule", "optimizer"}
    assert newer_defaults(Stage2()) == {"train_connector", "schedule"}
    assert newer_defaults(Stage2(train_connector=False, schedule="linear")) == set()


def test_an_observer_can_end_a_stage_early(extra: Path) -> None:
    whole = train(extra, "whole", "stage1.validation=0.2")
    stopped = train(extra, "stopped", "stage1.validation=0.2", "plugins.extra.stop_at=3")
    assert (stopped["steps"], stopped["stopped_by"], whole["stopped_by"]) == (3, ["extra"], [])
    assert whole["steps"] > 3
    assert stopped["val_loss"] is not None
    losses = {
        run: [line["loss"] for line in lines(extra / run / "stage1") if "loss" in line] for run in ("whole", "stopped")
    }
    assert losses["stopped"] == losses["whole"][:3]
    again = train(extra, "stopped", "stage1.validation=0.2", "plugins.extra.stop_at=3")
    assert again["finished_before"]
    later = train(extra, "stopped", "stage1.validation=0.2", "plugins.extra.stop_at=4")
    assert (later["steps"], later["finished_before"]) == (4, False)


def test_a_stage_that_was_killed_after_its_early_end_does_not_go_on(extra: Path) -> None:
    options = ["stage1.validation=0.2", "plugins.extra.stop_at_validation=2"]
    whole = train(extra, "whole", *options)
    (extra / "whole/stage1/report.json").unlink()
    again = train(extra, "whole", *options)
    assert again["steps"] == again["resumed_from"] == whole["steps"]
    assert again["model_sha256"] == whole["model_sha256"]
    assert again["stopped_by"] == ["extra"]


def test_an_observer_can_ask_for_an_evaluation(extra: Path) -> None:
    options = ["stage1.validation=0.2", "stage1.checkpoint_every=100"]
    train(extra, "plain", *options)
    train(extra, "asked", *options, "plugins.extra.evaluate_at=2")
    validated = {
        run: [line["step"] for line in lines(extra / run / "stage1") if "val_loss" in line]
        for run in ("plain", "asked")
    }
    assert validated["asked"] == [2, *validated["plain"]]
    expected, validated = (weights(extra / run / "stage1") for run in ("plain", "asked"))
    assert all(torch.equal(expected[name], validated[name]) for name in expected)


def test_a_wrong_request_is_reported_once_and_training_goes_on(extra: Path) -> None:
    code = PLUGIN.replace('return ["stop"]', 'return "halt"').replace("extra:", "halting:")
    (extra / "halting.py").write_text(code, encoding="utf-8")
    result = run_cli(
        *("--plugin", str(extra / "halting.py"), "train", "--stage", "1", "-r", str(extra / "recipe.yaml"), "--json"),
        *("-o", "features.mode=live", "-o", "plugins.halting.stop_at=1"),
    )
    assert result.json()["steps"] > 1
    assert result.stderr.count("'halt'") == 1


def test_train_failed_names_stage_and_error(extra: Path) -> None:
    train(extra, "failed", "stage1.learning_rate=1e30", "stage1.warmup=0", code=1)
    told = json.loads((extra / "failed/failed.jsonl").read_text())
    assert (told["stage"], told["interrupted"], Path(told["folder"]).name) == (1, False, "stage1")
    assert told["error"].startswith("ModelError: not finite")


@pytest.fixture
def model(toys: Path) -> LlavaModel:
    language = {"name": "hf", "model": str(toys / "language")}
    return build({"name": "mlp2x-gelu"}, language, FeatureShape((2, 2), 32), dtype="float32").model


@pytest.mark.parametrize(
    ("selection", "names"),
    [(False, []), (("2.",), ["2.weight", "2.bias"]), (True, ["0.weight", "0.bias", "2.weight", "2.bias"])],
)
def test_train_connector_selects_its_weights(model: LlavaModel, selection: Any, names: list[str]) -> None:
    settings = Stage2(train_connector=selection, trainable_modules=("norm",))
    rates = configure_trainable(model, settings, seed=0)
    assert [name.removeprefix("connector.") for name in rates if name.startswith("connector.")] == names
    untrained = UntrainedState(model, settings.train_connector).state()
    assert untrained.keys() == dict(model.connector.named_parameters()).keys() - names


def test_a_name_that_the_connector_lacks_is_refused(model: LlavaModel) -> None:
    with pytest.raises(RecipeError, match="train_connector"):
        configure_trainable(model, Stage2(train_connector=("attention",)), seed=0)


def test_a_frozen_connector_is_saved_as_it_was(extra: Path) -> None:
    train(extra, "run", stage="1")
    train(extra, "run", "stage2.train_connector=false", stage="2")
    before, after = (weights(extra / "run" / stage) for stage in ("stage1", "stage2"))
    assert before
    assert all(torch.equal(before[name], after[name]) for name in before)


class KeptElsewhere(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        self.param_groups[0]["count"] = 1
        return super().step(closure)


class KeptUndeclared(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for weight in group["params"]:
                self.state[weight]["sum"] = torch.zeros_like(weight)
        return super().step(closure)


@pytest.mark.parametrize(
    ("kind", "declared"), [(KeptElsewhere, ()), (KeptUndeclared, ()), (torch.optim.SGD, ("momentum_buffer",))]
)
def test_state_is_what_the_rule_declares_after_the_first_step(
    model: LlavaModel, kind: Any, declared: tuple[str, ...]
) -> None:
    """Checkpoints would lose other state, and memory would be predicted for state that isn't kept."""

    class Rule:
        scope = "element"
        moments = declared

        def selects(self, weight: Any) -> bool:
            return True

        def build(self, groups: Any) -> torch.optim.Optimizer:
            optimizer: torch.optim.Optimizer = kind(groups, lr=0.0)
            return optimizer

    rates = configure_trainable(model, Stage2(), seed=0)
    optimizer = Optimizer(model, rates, [AssignedWeights(Rule(), tuple(rates))], 0.0)
    with pytest.raises(PluginError):
        optimizer.step(1.0)


@pytest.mark.parametrize(("name", "end"), [("cosine", 0.1), ("linear", 0.1), ("constant", 1.0)])
def test_built_in_schedules_warm_up_and_end_at_their_minimum(name: str, end: float) -> None:
    spec: Any = name if name == "constant" else {"name": name, "minimum": 0.1}
    rate = learning_rate_schedule(Stage2(schedule=spec, warmup=0.1))
    assert [rate(step, 100) for step in (0, 5, 10)] == pytest.approx([0.0, 0.5, 1.0])
    assert rate(99, 100) == pytest.approx(end, abs=0.02)
    values = [rate(step, 100) for step in range(10, 100)]
    assert values == sorted(values, reverse=True)


def test_cosine_without_minimum_is_the_default() -> None:
    plain, named = (learning_rate_schedule(Stage2(schedule=schedule)) for schedule in (None, "cosine"))
    assert [plain(step, 50) for step in range(50)] == [named(step, 50) for step in range(50)]


def test_each_trainable_weight_has_one_rule(model: LlavaModel) -> None:
    for settings in (Stage2(), Stage2(optimizer="muon"), Stage2(method="lora", optimizer="muon")):
        rates = configure_trainable(model, settings, seed=0)
        names = [name for each in assign_update_rules(model, settings) for name in each.names]
        assert sorted(names) == sorted(rates)
