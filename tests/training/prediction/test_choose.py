"""The fastest choice that fits, and the alternatives to one that doesn't."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaPreTrainedModel

from llavactl.core.errors import PredictionError, RecipeError
from llavactl.core.schema import FeatureShape
from llavactl.recipe.load import load_recipe
from llavactl.testing import toy_language
from llavactl.training.placement import Placement
from llavactl.training.prediction import alternatives as alternatives_module
from llavactl.training.prediction import choices as choices_module
from llavactl.training.prediction import settle as settle_module
from llavactl.training.prediction.alternatives import Alternative, alternatives
from llavactl.training.prediction.choices import choices
from llavactl.training.prediction.choose import choose
from llavactl.training.prediction.predict import Choice, StagePredictor
from llavactl.training.prediction.settle import choice_for_training, choice_on, settled
from llavactl.training.prediction.target import Target
from llavactl.verbs.plan import _training_data
from llavactl.verbs.train import train

SHAPE, TOKENS = FeatureShape((2, 2), 32), 4
SMALL = ["stage2.init=scratch", "stage2.batch_size=16", "stage2.micro_batch_size=2"]
AUTO = ["stage2.gradient_checkpointing=auto", "stage2.micro_batch_tokens=auto", "stage2.precision=bfloat16"]


@pytest.fixture
def predictor(toy: Path, monkeypatch: pytest.MonkeyPatch):
    toy_language(toy / "wide", width=256)

    monkeypatch.setattr(choices_module, "MICRO_BATCH_TOKENS", (4096, 512))
    monkeypatch.setattr(alternatives_module, "MORE_DEVICES", (4, 8))

    def of(*overrides: str, count: int = 1):
        recipe = load_recipe(
            toy / "recipe.yaml",
            [
                "stage2.init=scratch",
                "stage2.batch_size=16",
                "stage2.micro_batch_size=2",
                *AUTO,
                f"language.model={toy / 'wide'}",
                *overrides,
            ],
        )
        return recipe, StagePredictor(recipe, 2, SHAPE, TOKENS, None, count, cuda=True)

    return of


def test_choices_are_sorted_by_speed(predictor) -> None:
    recipe, _ = predictor()
    ordered = choices(recipe, recipe.stage2, Target(True, 1, 8))
    assert ordered[0] == Choice(Placement(), False, None)
    assert ordered[-1].placement.optimizer_state == "host"
    fast = [choice for choice in ordered if (choice.micro_batch_tokens or 10**9) >= 4096]
    states = [choice.placement.optimizer_state for choice in fast]
    assert states == sorted(states)
    assert len(set(ordered)) == len(ordered) == 2 * 2 * 2 * 3


def test_a_setting_that_is_not_auto_has_one_value(predictor) -> None:
    recipe, _ = predictor(
        "stage2.gradient_checkpointing=true", "stage2.micro_batch_tokens=3000", "sharding=none", "optimizer_state=host"
    )
    assert choices(recipe, recipe.stage2, Target(True, 1, 8)) == [Choice(Placement(False, "host"), True, 3000)]


def test_on_a_cpu_auto_is_the_fastest_choice(predictor) -> None:
    recipe, _ = predictor()
    assert choices(recipe, recipe.stage2, Target(False, 1, 2)) == [Choice(Placement(), False, None)]
    assert settled(recipe.stage(2), Choice(Placement(), True, 7)).settings.micro_batch_tokens == 7


def test_less_memory_leads_to_slower_choices_until_nothing_fits(predictor) -> None:
    recipe, predicts = predictor()
    ordered = choices(recipe, recipe.stage2, Target(True, 1))
    memory, ranks = 10**9, []
    while True:
        prediction, fits = choose(predicts, recipe, Target(True, memory))
        assert fits == Target(True, memory).holds(prediction)
        if not fits:
            break
        ranks.append(ordered.index(prediction.choice))
        memory = prediction.device_bytes  # without the reserve: this choice doesn't fit any more
    assert ranks == sorted(set(ranks))
    assert len(ranks) > 2
    assert not any(Target(True, memory).holds(predicts.predict(choice)) for choice in ordered)


@pytest.mark.slow
def test_alternatives_fit_with_the_options_that_they_name(predictor) -> None:
    fixed = ("stage2.gradient_checkpointing=false", "stage2.micro_batch_tokens=null", "optimizer_state=device")
    fixed += ("stage2.lora={r: 4, alpha: 4}",)
    recipe, predicts = predictor(*fixed)
    needed = predicts.predict(choices(recipe, recipe.stage2, Target(True, 1))[0]).device_bytes
    target = Target(True, 2 * needed // 5)
    assert not choose(predicts, recipe, target)[1]
    found: list[Alternative] = list(alternatives(predicts, recipe, target))
    assert {option.split("=")[0] for each in found for option in each.options} >= {"-o stage2.method"}
    assert any("--devices" in option for each in found for option in each.options)
    for each in found:
        overrides = [option.removeprefix("-o ") for option in each.options if option.startswith("-o ")]
        counts = [int(option.split()[1]) for option in each.options if option.startswith("--devices")]
        count = counts[0] if counts else 1
        again, predicted = predictor(*fixed, *overrides, count=count)
        assert choose(predicted, again, Target(True, target.memory_bytes, count))[1], each.options


@pytest.mark.slow
def test_training_plans_its_steps_only_if_the_longest_micro_batch_would_not_fit(
    toy: Path, predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, longest = predictor("stage2.max_length=300")
    data = _training_data(recipe, 2, TOKENS, [])
    stage = recipe.stage(2)
    planned: list[StagePredictor] = []
    plan = StagePredictor._plan
    monkeypatch.setattr(
        StagePredictor, "_plan", lambda self, limit: (planned.append(self) if self.data else None) or plan(self, limit)
    )
    fastest = choices(recipe, recipe.stage2, Target(True, 1))[0]
    bound = longest.predict(fastest).device_bytes
    assert choice_on(recipe, stage, SHAPE, data, Target(True, 2 * bound)) == fastest
    assert not planned
    # Every sample is much shorter than 300 tokens, so the same choice fits in less memory.
    assert choice_on(recipe, stage, SHAPE, data, Target(True, bound)) == fastest
    assert planned
    with pytest.raises(RecipeError, match="predicted to need") as refused:
        choice_on(recipe, stage, SHAPE, data, Target(True, bound // 50))
    assert refused.value.hint


def test_training_starts_with_the_fastest_choice_if_nothing_can_be_predicted(
    toy: Path, predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, _ = predictor()
    device = SimpleNamespace(total_memory=10**12)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: device)
    fastest = choices(recipe, recipe.stage2, Target(True, 1, 2))[0]
    arguments = (recipe, recipe.stage(2), SHAPE, _training_data(recipe, 2, TOKENS, []), torch.device("cuda"), 2)
    assert choice_for_training(*arguments) == fastest

    def fail(*_args):
        raise failure

    monkeypatch.setattr(settle_module, "choice_on", fail)
    failure: Exception = NotImplementedError("no such kernel")
    assert choice_for_training(*arguments) == fastest
    failure = PredictionError("a training step can't be traced")
    assert choice_for_training(*arguments) == fastest
    failure = RecipeError("it doesn't fit")
    with pytest.raises(RecipeError):
        choice_for_training(*arguments)
    monkeypatch.setattr(settle_module, "language_component", lambda *_args: object())
    assert choice_for_training(*arguments) == fastest


def test_a_model_without_checkpointing_is_predicted_and_trained_without(
    predictor, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaPreTrainedModel, "supports_gradient_checkpointing", False)
    recipe, pred = predictor()
    prediction, fits = choose(pred, recipe, Target(True, 1, 1))
    assert not fits
    assert not prediction.choice.gradient_checkpointing
    recipe, pred = predictor("stage2.gradient_checkpointing=true")
    with pytest.raises(RecipeError, match="doesn't support it for LlamaForCausalLM"):
        choose(pred, recipe, Target(True, 10**12, 1))
    overrides = [*SMALL, "features.mode=live", "stage2.gradient_checkpointing=true"]
    with pytest.raises(RecipeError, match="doesn't support it for LlamaForCausalLM"):
        train(load_recipe(toy / "recipe.yaml", overrides), 2)
