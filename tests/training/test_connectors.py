"""Connectors of plugins: rules are checked before training; all of their state is trained, saved and restored."""

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
    """Normalized features, projected; with running statistics and a frozen scale."""

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
    """Embeddings wider than the language model."""

    def build(self, shape: FeatureShape, language_width: int) -> nn.Module:
        return nn.Linear(shape.width, language_width + 1)


class Fewer(Statistics):
    """Returns one token more than ``tokens`` says."""

    def tokens(self, shape: FeatureShape) -> int:
        return shape.patches - 1


class Fixed(Statistics):
    """No trainable parameters."""

    def build(self, shape: FeatureShape, language_width: int) -> nn.Module:
        return super().build(shape, language_width).requires_grad_(False)


class Replacing(nn.Module):
    """Replaces its buffer by a new tensor, and has two names for one parameter."""

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
        embeddings: torch.Tensor = self.projection(features - self.mean) + self.twin(features)
        return embeddings


class Replaced(Statistics):
    """Its buffer is a different tensor after each step."""

    def build(self, shape: FeatureShape, language_width: int) -> nn.Module:
        return Replacing(shape.width, language_width)


class Counting(Statistics):
    """Depends on the number of calls, which is not in its state dict."""

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

    monkeypatch.setitem(sys.modules, "test_connector_plugin", sys.modules[HERE])
    for name in ("Statistics", "Wide", "Fewer", "Fixed", "Replaced", "Counting"):
        entry = Registration("connectors", name.lower(), f"test_connector_plugin:{name}", None, "", "otherplugin")
        monkeypatch.setitem(registry().entries["connectors"], name.lower(), entry)


def train(recipe: Path, connector: str, *options: str, stage: int = 1) -> Any:
    common = ("-o", f"connector={{name: {connector}}}", "-o", "features.mode=live", "-o", "stage2.init=scratch")
    return run_cli("train", "--stage", str(stage), "-r", str(recipe), *common, *options, "--json")


@pytest.mark.parametrize("connector", ["wide", "fewer", "counting"])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_connector_that_violates_a_rule_is_refused_before_training(toy: Path, connector: str, stage: int) -> None:
    checked = run_cli("recipes", "check", str(toy / "recipe.yaml"), "-o", f"connector={{name: {connector}}}", "--json")
    (problem,) = checked.json()["problems"]
    assert problem["key"] == "connector"
    assert connector in problem["why"]
    assert "otherplugin" in problem["why"]
    done = train(toy / "recipe.yaml", connector, stage=stage)
    assert done.exit_code == 1
    assert connector in done.stderr
    assert "otherplugin" in done.stderr
    assert not (toy / "runs/toy" / f"stage{stage}" / "metrics.jsonl").exists()


def test_a_connector_without_trainable_parameters_is_refused_only_in_stage_1(toy: Path) -> None:
    assert train(toy / "recipe.yaml", "fixed").exit_code == 1
    assert train(toy / "recipe.yaml", "fixed", "-o", "stage2.max_steps=1", stage=2).exit_code == 0


def uninterrupted_and_resumed(
    recipe: Path, connector: str, stage: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, torch.Tensor], ...]:
    """The connectors of an uninterrupted run, and of one that was interrupted after step 3 and resumed after step 2."""
    state = []
    for name in ("uninterrupted", "resumed"):
        if name == "resumed":
            with monkeypatch.context() as patch:
                real_step, calls = loop.accumulate, iter(range(100))

                def interrupted(*args: Any, real_step: Any = real_step, calls: Any = calls) -> Any:
                    if next(calls) == 3:  # after the checkpoint of step 2
                        raise KeyboardInterrupt
                    return real_step(*args)

                patch.setattr(loop, "accumulate", interrupted)
                assert train(recipe, connector, "-o", f"name={name}", stage=stage).exit_code != 0
        done = train(recipe, connector, "-o", f"name={name}", stage=stage)
        assert done.exit_code == 0, done.stderr
        report = done.json()
        assert report["resumed_from"] == (2 if name == "resumed" else 0)
        state.append(load_file(Path(report["model"]) / "connector.safetensors"))
    return tuple(state)


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("connector", ["statistics", "replaced"])
def test_resumed_equals_uninterrupted_for_all_kinds_of_state(
    toy: Path, connector: str, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninterrupted, resumed = uninterrupted_and_resumed(toy / "recipe.yaml", connector, stage, monkeypatch)
    assert uninterrupted.keys() == resumed.keys()
    assert all(torch.equal(uninterrupted[key], resumed[key]) for key in uninterrupted)
    if connector == "statistics":
        assert uninterrupted["norm.running_mean"].any()
        assert torch.equal(uninterrupted["scale"], torch.full_like(uninterrupted["scale"], 0.5))
    else:
        assert uninterrupted["mean"].any()
        assert torch.equal(uninterrupted["projection.weight"], uninterrupted["twin.weight"])


def test_a_micro_batch_without_an_image_trains(toy: Path) -> None:
    file = toy / "records.json"
    records = json.loads(file.read_text())
    for record in records[::2]:
        del record["image"]
        record["conversations"][0]["value"] = "What color is it?"
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


def test_stage_1_without_images_is_refused(toy: Path) -> None:
    file = toy / "records.json"
    records = json.loads(file.read_text())
    for record in records:
        del record["image"]
        record["conversations"][0]["value"] = "What color is it?"
    file.write_text(json.dumps(records))
    done = train(toy / "recipe.yaml", "mlp2x-gelu", "-o", "stage1.template=vicuna-v1")
    assert done.exit_code == 1
    assert "image" in done.stderr
