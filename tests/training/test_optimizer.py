"""The learning rate over a run; which weights Muon updates, and how far: as AdamW would in the mean square."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from llavactl.core.errors import RecipeError
from llavactl.core.schema import FeatureShape
from llavactl.model.build import build
from llavactl.model.llava import LlavaModel
from llavactl.recipe.stages import Stage2
from llavactl.training.optimizer import Optimizer, schedule
from llavactl.training.stages import configure_trainable, muon_matrices

RATE = 0.01


@pytest.fixture
def model(toys: Path) -> LlavaModel:
    language = {"name": "hf", "model": str(toys / "language")}
    return build({"name": "mlp2x-gelu"}, language, FeatureShape((2, 2), 32), dtype="float32").model


@pytest.mark.parametrize(
    ("cooldown", "theirs"), [(None, "cosine"), (0.25, "warmup_stable_decay"), (0.0, "constant_with_warmup")]
)
def test_rates_are_those_of_transformers(cooldown: float | None, theirs: str) -> None:
    steps, rising = 40, 4
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    more = {"num_decay_steps": 10, "decay_type": "linear"} if theirs == "warmup_stable_decay" else {}
    scheduler = get_scheduler(theirs, optimizer, rising, steps, more)
    for step in range(steps):
        assert schedule(step, steps, rising / steps, cooldown) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        scheduler.step()


def muon(**settings: Any) -> Stage2:
    return Stage2(optimizer="muon", learning_rate=RATE, connector_learning_rate=RATE / 10, **settings)


def one_step(model: LlavaModel, stage: Stage2) -> tuple[list[str], dict[str, torch.Tensor]]:
    """What Muon updates, and how far each trained weight went, its gradients drawn at random."""
    rates = configure_trainable(model, stage, seed=0)
    found = muon_matrices(model, stage)
    optimizer = Optimizer(model, rates, weight_decay=0.0, matrices=found)
    before = {name: parameter.detach().clone() for name, parameter in optimizer.parameters.items()}
    torch.manual_seed(0)
    for parameter in optimizer.parameters.values():
        parameter.grad = torch.randn_like(parameter)
    assert optimizer.step(1.0) == RATE
    return found, {name: p.detach() - before[name] for name, p in optimizer.parameters.items()}


def test_any_number_of_threads_makes_the_same_steps(model: LlavaModel) -> None:
    threads = torch.get_num_threads()
    made = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            made.append(one_step(copy.deepcopy(model), muon())[1])
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    found = muon_matrices(model, muon())
    assert len(found) > 3
    for name in found:
        assert torch.equal(made[0][name], made[1][name]), name


def test_matrices_go_as_far_in_every_direction_and_all_else_as_adam_goes(model: LlavaModel) -> None:
    found, went = one_step(model, muon())
    inner = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert found
    assert found == [name for name in went if any(part in name for part in inner)]
    for name, update in went.items():
        if name in found:
            directions = torch.linalg.svdvals(update) / (0.2 * math.sqrt(max(update.shape)) * RATE)
            assert directions.quantile(0.1) > 0.5, name  # its iteration misses directions with next to no gradient
            assert directions.max() < 1.4, name
        else:
            rate = RATE / 10 if name.startswith("connector.") else RATE
            assert torch.allclose(update.abs(), torch.full_like(update, rate), rtol=1e-3), name


def test_the_matrices_of_adapters_are_its(model: LlavaModel) -> None:
    found, went = one_step(model, muon(method="lora"))
    assert found == [name for name in went if ".lora_" in name]


def test_it_is_for_nothing_where_no_matrix_is_trained(model: LlavaModel) -> None:
    stage = muon(trainable_modules=("norm",))
    configure_trainable(model, stage, seed=0)
    with pytest.raises(RecipeError, match=r"stage2\.optimizer: muon"):
        muon_matrices(model, stage)


def test_norms_and_biases_are_spared_weight_decay_as_transformers_spares_them(model: LlavaModel) -> None:
    from transformers.trainer_pt_utils import get_parameter_names

    stage = Stage2(batch_size=2, micro_batch_size=1, weight_decay=0.1)
    rates = configure_trainable(model, stage, 0)
    optimizer = Optimizer(model, rates, stage.weight_decay)
    names = {id(master): name for name, master in optimizer.masters.items()}
    decayed = {
        names[id(each)]
        for algorithm in optimizer.algorithms
        for group in algorithm.param_groups
        for each in group["params"]
        if group["weight_decay"]
    }
    norms = [type(module) for module in model.modules() if "Norm" in type(module).__name__]
    assert decayed == {name for name in get_parameter_names(model, norms) if "bias" not in name}


def test_the_gradient_is_clipped_as_torch_clips_it(model: LlavaModel) -> None:
    steps = []
    for limit in (None, 0.5):
        made = copy.deepcopy(model)
        optimizer = Optimizer(made, dict.fromkeys(dict(made.named_parameters()), RATE), 0.0)
        for master in optimizer.masters.values():
            master.grad = torch.ones_like(master)
        length = math.sqrt(sum(master.numel() for master in optimizer.masters.values()))
        with torch.no_grad():
            wanted = next(iter(optimizer.masters.values())).grad.clone() * (1 if limit is None else limit / length)
        seen: list[torch.Tensor] = []
        first = optimizer.algorithms[0]
        first.register_step_pre_hook(
            lambda own, *_, seen=seen: seen.append(own.param_groups[0]["params"][0].grad.clone())
        )
        optimizer.step(1.0, limit)
        assert torch.allclose(seen[0].max(), wanted.max())
        steps.append(seen[0].max())
    assert steps[0] > steps[1]
