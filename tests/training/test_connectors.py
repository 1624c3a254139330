"""Connectors of others: what is wrong is found before training; all of their state is trained, kept and restored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from llavactl.core.registry import Entry, registry
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


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "connectors_of_a_test", sys.modules[HERE])
    for name in ("Statistics", "Wide", "Fewer", "Fixed"):
        entry = Entry("connectors", name.lower(), f"connectors_of_a_test:{name}", None, "", "stranger")
        monkeypatch.setitem(registry().entries["connectors"], name.lower(), entry)


def train(recipe: Path, connector: str, *options: str, stage: int = 1) -> Any:
    chosen = ("-o", f"connector={{name: {connector}}}", "-o", "features.mode=live", "-o", "stage2.init=scratch")
    return run_cli("train", "--stage", str(stage), "-r", str(recipe), *chosen, *options, "--json")


@pytest.mark.parametrize("wrong", ["wide", "fewer"])
@pytest.mark.parametrize("stage", [1, 2])
def test_embeddings_of_another_shape_are_refused_before_training(toy: Path, wrong: str, stage: int) -> None:
    done = train(toy / "recipe.yaml", wrong, stage=stage)
    assert done.exit_code == 1
    assert wrong in done.stderr
    assert "stranger" in done.stderr
    assert not (toy / "runs/toy" / f"stage{stage}" / "metrics.jsonl").exists()


def test_a_connector_with_nothing_to_train_is_refused_in_stage_1_alone(toy: Path) -> None:
    assert train(toy / "recipe.yaml", "fixed").exit_code == 1
    assert train(toy / "recipe.yaml", "fixed", "-o", "stage2.max_steps=1", stage=2).exit_code == 0


@pytest.mark.parametrize("stage", [1, 2])
def test_buffers_are_saved_and_restored_and_what_is_frozen_stays(
    toy: Path, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, state = toy / "recipe.yaml", {}
    for name in ("whole", "cut"):
        if name == "cut":
            with monkeypatch.context() as patch:
                ours, steps = loop._step, iter(range(100))

                def dies(*given: Any, ours: Any = ours, steps: Any = steps) -> Any:
                    if next(steps) == 3:  # behind the checkpoint of step 2
                        raise KeyboardInterrupt
                    return ours(*given)

                patch.setattr(loop, "_step", dies)
                assert train(recipe, "statistics", "-o", f"name={name}", stage=stage).exit_code != 0
        done = train(recipe, "statistics", "-o", f"name={name}", stage=stage)
        assert done.exit_code == 0, done.stderr
        report = done.json()
        assert report["first_step"] == (2 if name == "cut" else 0)
        state[name] = load_file(Path(report["model"]) / "connector.safetensors")
    assert state["whole"].keys() == state["cut"].keys() >= {"norm.running_mean", "norm.running_var", "scale"}
    assert all(torch.equal(state["whole"][key], state["cut"][key]) for key in state["whole"])
    assert state["whole"]["norm.running_mean"].any()
    assert torch.equal(state["whole"]["scale"], torch.full_like(state["whole"]["scale"], 0.5))


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
