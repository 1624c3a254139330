"""Learning-rate schedules; which weights Muon updates, and the size of its updates."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import get_scheduler

from llavactl.core.errors import RecipeError
from llavactl.core.schema import FeatureShape
from llavactl.model.build import build
from llavactl.model.llava import LlavaModel
from llavactl.recipe.stages import Stage2
from llavactl.testing import run_cli
from llavactl.training.learning_rate import learning_rate_schedule
from llavactl.training.optimizer import Optimizer
from llavactl.training.trainable import configure_trainable
from llavactl.training.update_rules import assign_update_rules

RATE = 0.01


@pytest.fixture
def model(toys: Path) -> LlavaModel:
    language = {"name": "hf", "model": str(toys / "language")}
    return build({"name": "mlp2x-gelu"}, language, FeatureShape((2, 2), 32), dtype="float32").model


@pytest.mark.parametrize(
    ("cooldown", "name"), [(None, "cosine"), (0.25, "warmup_stable_decay"), (0.0, "constant_with_warmup")]
)
def test_schedules_equal_those_of_transformers(cooldown: float | None, name: str) -> None:
    steps, warmup_steps = 40, 4
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    options = {"num_decay_steps": 10, "decay_type": "linear"} if name == "warmup_stable_decay" else {}
    scheduler = get_scheduler(name, optimizer, warmup_steps, steps, options)
    rate = learning_rate_schedule(Stage2(warmup=warmup_steps / steps, cooldown=cooldown))
    for step in range(steps):
        expected = scheduler.get_last_lr()[0]
        assert rate(step, steps) == pytest.approx(expected, abs=1e-9)
        optimizer.step()
        scheduler.step()


def muon(**settings: Any) -> Stage2:
    return Stage2(optimizer="muon", learning_rate=RATE, connector_learning_rate=RATE / 10, **settings)


def one_step(model: LlavaModel, stage: Stage2) -> tuple[list[str], dict[str, torch.Tensor]]:
    """The parameters for Muon, and the update of each trainable parameter for random gradients."""
    rates = configure_trainable(model, stage, seed=0)
    assignments = assign_update_rules(model, stage)
    optimizer = Optimizer(model, rates, assignments, weight_decay=0.0)
    initial = {name: parameter.detach().clone() for name, parameter in optimizer.parameters.items()}
    torch.manual_seed(0)
    for parameter in optimizer.parameters.values():
        parameter.grad = torch.randn_like(parameter)
    assert optimizer.step(1.0) == RATE
    return list(assignments[-1].names), {name: p.detach() - initial[name] for name, p in optimizer.parameters.items()}


def test_updates_do_not_depend_on_the_number_of_threads(model: LlavaModel) -> None:
    previous = torch.get_num_threads()
    updates = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            updates.append(one_step(copy.deepcopy(model), muon())[1])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(previous)
    configure_trainable(model, muon(), seed=0)
    matrices = assign_update_rules(model, muon())[-1].names
    assert len(matrices) > 3
    for name in matrices:
        assert torch.equal(updates[0][name], updates[1][name]), name


def test_muon_updates_are_nearly_orthogonal_and_others_are_those_of_adam(model: LlavaModel) -> None:
    matrices, updates = one_step(model, muon())
    inner = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert matrices
    assert matrices == [name for name in updates if any(part in name for part in inner)]
    for name, update in updates.items():
        if name in matrices:
            singular_values = torch.linalg.svdvals(update) / (0.2 * math.sqrt(max(update.shape)) * RATE)
            assert singular_values.quantile(0.1) > 0.5, name  # the iteration doesn't converge for very small ones
            assert singular_values.max() < 1.4, name
        else:
            rate = RATE / 10 if name.startswith("connector.") else RATE
            assert torch.allclose(update.abs(), torch.full_like(update, rate), rtol=1e-3), name


def test_muon_updates_the_matrices_of_adapters(model: LlavaModel) -> None:
    matrices, updates = one_step(model, muon(method="lora"))
    assert matrices == [name for name in updates if ".lora_" in name]


def test_muon_without_trainable_matrices_is_refused(model: LlavaModel) -> None:
    stage = muon(trainable_modules=("norm",))
    configure_trainable(model, stage, seed=0)
    with pytest.raises(RecipeError, match="optimizer: muon"):
        assign_update_rules(model, stage)


def test_norms_and_biases_have_no_weight_decay_as_in_transformers(model: LlavaModel) -> None:
    from transformers.trainer_pt_utils import get_parameter_names

    stage = Stage2(batch_size=2, micro_batch_size=1, weight_decay=0.1)
    rates = configure_trainable(model, stage, 0)
    optimizer = Optimizer(model, rates, assign_update_rules(model, stage), stage.weight_decay)
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


def test_max_grad_norm_clips_like_torch(model: LlavaModel) -> None:
    largest = []
    for limit in (None, 0.5):
        copied = copy.deepcopy(model)
        rates = dict.fromkeys(dict(copied.named_parameters()), RATE)
        optimizer = Optimizer(copied, rates, assign_update_rules(copied, Stage2()), 0.0)
        for master in optimizer.masters.values():
            master.grad = torch.ones_like(master)
        norm = math.sqrt(sum(master.numel() for master in optimizer.masters.values()))
        with torch.no_grad():
            expected = next(iter(optimizer.masters.values())).grad.clone() * (1 if limit is None else limit / norm)
        gradients: list[torch.Tensor] = []
        optimizer.algorithms[0].register_step_pre_hook(
            lambda adamw, *_, gradients=gradients: gradients.append(adamw.param_groups[0]["params"][0].grad.clone())
        )
        assert float(optimizer.grad_norm()) == pytest.approx(norm)
        optimizer.step(1.0, limit)
        assert torch.allclose(gradients[0].max(), expected.max())
        largest.append(gradients[0].max())
    assert largest[0] > largest[1]


@pytest.mark.parametrize(
    ("method", "precision"),
    [
        ("full", "bfloat16"),
        ("lora", "float32"),
        pytest.param("full", "float32", marks=pytest.mark.slow),
        pytest.param("lora", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_optimizer_state_in_host_memory_changes_no_bit(toy: Path, precision: str, method: str) -> None:
    results = {}
    for place in ("device", "host"):
        options = [f"stage2.precision={precision}", f"stage2.method={method}", f"optimizer_state={place}"]
        options += ["stage2.init=scratch", "stage2.max_steps=3", "features.mode=live", f"run_dir={toy}/{place}"]
        words = [word for option in options for word in ("-o", option)]
        assert run_cli("train", "--stage", "2", "-r", str(toy / "recipe.yaml"), *words).exit_code == 0
        files = sorted((toy / place / "stage2").rglob("*.safetensors"))
        results[place] = {f"{file.name}:{name}": w for file in files for name, w in load_file(file).items()}
    assert results["device"].keys() == results["host"].keys()
    assert any(name.endswith("exp_avg.connector.0.weight") for name in results["host"])
    for name, weight in results["device"].items():
        assert torch.equal(weight, results["host"][name]), name


def test_with_optimizer_state_in_host_memory_every_master_is_a_copy_there(model: LlavaModel) -> None:
    rates = dict.fromkeys(dict(model.named_parameters()), RATE)
    optimizer = Optimizer(model, rates, assign_update_rules(model, Stage2()), 0.0, on_host=True)
    for name, master in optimizer.masters.items():
        assert master is not optimizer.parameters[name]
        assert (master.device.type, master.dtype) == ("cpu", torch.float32)
