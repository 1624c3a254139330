"""Connectors of others: what is wrong is found before training; all of their state is trained, kept and restored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from llavactl.core.registry import Registration, registry
from llavactl.core.schema import FeatureShape
from llavactl.testing import run_cli
from llavactl.training import loop

HERE = __name__


class Module(nn.Module):
    """Normalised features, projected; with statistics that training moves and a scale that is frozen."""

    def __init__(self, width: int, language_width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, affine=False)
        self.scale = nn.Parameter(torch.full((width,), 0.5), requires_grad=False)
        self.projection = nn.Linear(width, language_width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        normed = self.norm(features.transpose(1, 2)).transpose(1, 2)
        projected: torch.Tensor = self.projection(normed * self.scale)
        return projected


class Statistics:
    """A connector with a buffer and a frozen parameter."""

    def __init__(self, options: Any) -> None:
        pass

    def tokens(self, shape: FeatureShape) -> int:
        return shape.patches

    def build(self, shape: FeatureShape, language_width: int) -> nn.Module:
        return Module(shape.width, language_width)


class Wide(Statistics):
    """One embedding wider than the language model."""

    def build(self, shape: FeatureShape, language_width: int) -> nn.Module:
        return nn.Linear(shape.width, language_width + 1)


class Fewer(Statistics):
    """A token less than promised."""

    def tokens(self, shape: FeatureShape) -> int:
        return shape.patches - 1


class Fixed(Statistics):
    """Nothing to train."""

    def build(self, shape: FeatureShape, language_width: int) -> nn.Module:
        return super().build(shape, language_width).requires_grad_(False)


class Replacing(nn.Module):
    """Puts a new tensor in a buffer's place, and has two names for one parameter."""

    mean: torch.Tensor

    def __init__(self, width: int, language_width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.projection = nn.Linear(width, language_width)
        self.twin = nn.Linear(width, language_width)
        self.twin.weight = self.projection.weight

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * features.detach().mean((0, 1))
        made: torch.Tensor = self.projection(features - self.mean) + self.twin(features)
        return made


class Replaced(Statistics):
    """Its buffer is another tensor after each step."""

    def build(self, shape: FeatureShape, language_width: int) -> nn.Module:
        return Replacing(shape.width, language_width)


class Counting(Statistics):
    """Depends on how often it ran, which its state dict doesn't say."""

    def build(self, shape: FeatureShape, language_width: int) -> nn.Module:
        class Counted(nn.Linear):
            runs = 0

            def forward(self, features: torch.Tensor) -> torch.Tensor:
                self.runs += self.training
                return super().forward(features) * (1 + self.runs)

        return Counted(shape.width, language_width)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "connectors_of_a_test", sys.modules[HERE])
    for name in ("Statistics", "Wide", "Fewer", "Fixed", "Replaced", "Counting"):
        entry = Registration("connectors", name.lower(), f"connectors_of_a_test:{name}", None, "", "stranger")
        monkeypatch.setitem(registry().entries["connectors"], name.lower(), entry)


def train(recipe: Path, connector: str, *options: str, stage: int = 1) -> Any:
    chosen = ("-o", f"connector={{name: {connector}}}", "-o", "features.mode=live", "-o", "stage2.init=scratch")
    return run_cli("train", "--stage", str(stage), "-r", str(recipe), *chosen, *options, "--json")


@pytest.mark.parametrize("wrong", ["wide", "fewer", "counting"])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_connector_that_breaks_a_rule_is_refused_before_training(toy: Path, wrong: str, stage: int) -> None:
    checked = run_cli("recipes", "check", str(toy / "recipe.yaml"), "-o", f"connector={{name: {wrong}}}", "--json")
    (problem,) = checked.json()["problems"]
    assert problem["key"] == "connector"
    assert wrong in problem["why"]
    assert "stranger" in problem["why"]
    done = train(toy / "recipe.yaml", wrong, stage=stage)
    assert done.exit_code == 1
    assert wrong in done.stderr
    assert "stranger" in done.stderr
    assert not (toy / "runs/toy" / f"stage{stage}" / "metrics.jsonl").exists()


def test_a_connector_with_nothing_to_train_is_refused_in_stage_1_alone(toy: Path) -> None:
    assert train(toy / "recipe.yaml", "fixed").exit_code == 1
    assert train(toy / "recipe.yaml", "fixed", "-o", "stage2.max_steps=1", stage=2).exit_code == 0


def whole_and_cut(
    recipe: Path, connector: str, stage: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, torch.Tensor], ...]:
    """The connector of an uninterrupted run, and that of one that died after step 3 and resumed after step 2."""
    state = []
    for name in ("whole", "cut"):
        if name == "cut":
            with monkeypatch.context() as patch:
                ours, steps = loop._step, iter(range(100))

                def dies(*given: Any, ours: Any = ours, steps: Any = steps) -> Any:
                    if next(steps) == 3:  # behind the checkpoint of step 2
                        raise KeyboardInterrupt
                    return ours(*given)

                patch.setattr(loop, "_step", dies)
                assert train(recipe, connector, "-o", f"name={name}", stage=stage).exit_code != 0
        done = train(recipe, connector, "-o", f"name={name}", stage=stage)
        assert done.exit_code == 0, done.stderr
        report = done.json()
        assert report["resumed_from"] == (2 if name == "cut" else 0)
        state.append(load_file(Path(report["model"]) / "connector.safetensors"))
    return tuple(state)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("connector", ["statistics", "replaced"])
def test_resumed_equals_uninterrupted_whatever_state_a_connector_has(
    toy: Path, connector: str, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = whole_and_cut(toy / "recipe.yaml", connector, stage, monkeypatch)
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    if connector == "statistics":
        assert whole["norm.running_mean"].any()
        assert torch.equal(whole["scale"], torch.full_like(whole["scale"], 0.5))
    else:
        assert whole["mean"].any()
        assert torch.equal(whole["projection.weight"], whole["twin.weight"])


def test_a_micro_batch_without_an_image_trains(toy: Path) -> None:
    file = toy / "records.json"
    records = json.loads(file.read_text())
    for record in records[::2]:
        del record["image"]
        record["conversations"][0]["value"] = "What colour is it?"
    file.write_text(json.dumps(records))
    for packing in ("never", "auto"):
        options = (
            "-o",
            "stage1.micro_batch_size=1",
            "-o",
            f"stage1.packing={packing}",
            "-o",
            "stage1.template=vicuna-v1",
        )
        done = train(toy / "recipe.yaml", "mlp2x-gelu", *options)
        assert done.exit_code == 0, done.stderr


def test_a_first_stage_without_any_image_is_refused(toy: Path) -> None:
    file = toy / "records.json"
    records = json.loads(file.read_text())
    for record in records:
        del record["image"]
        record["conversations"][0]["value"] = "What colour is it?"
    file.write_text(json.dumps(records))
    done = train(toy / "recipe.yaml", "mlp2x-gelu", "-o", "stage1.template=vicuna-v1")
    assert done.exit_code == 1
    assert "image" in done.stderr
