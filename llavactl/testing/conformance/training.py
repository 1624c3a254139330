"""Checks of optimizers and learning-rate schedules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from llavactl.core.protocols import Schedule, UpdateRule, Weight
from llavactl.core.protocols.returned import returned_fault
from llavactl.testing.conformance.boundary import conformance_check, returned_problem

if TYPE_CHECKING:
    import torch

    from llavactl.training.optimizer import Optimizer

_RATE = 1e-2


@conformance_check("optimizers")
def check_optimizer(rule: UpdateRule) -> list[str]:
    """Checks that the rule changes weights, that its state can be restored, and that ``scope`` is true."""
    import torch

    from llavactl.training.update_rules import probe_groups

    parts = get_args(get_type_hints(Weight)["part"])
    examples = [Weight(f"{part}.{len(shape)}", shape, part) for part in parts for shape in ((8, 6), (8,))]
    selections = [rule.selects(weight) for weight in examples]
    answers = zip(selections, examples, strict=True)
    if problem := next(filter(None, (returned_problem("optimizers", "selects", *answer) for answer in answers)), None):
        return [problem]
    shapes = {weight.name: weight.shape for weight, selected in zip(examples, selections, strict=True) if selected}
    if not shapes:
        return ["selects() is False for every kind of weight"]
    groups = probe_groups()
    if problem := returned_problem("optimizers", "build", rule.build(groups), groups):
        return [problem]
    torch.manual_seed(0)
    values, gradients = ({name: torch.randn(shape) for name, shape in shapes.items()} for _ in range(2))
    return [*_update_problems(rule, values, gradients)]


def _update_problems(
    rule: UpdateRule, values: Mapping[str, torch.Tensor], gradients: Mapping[str, torch.Tensor]
) -> Iterator[str]:
    import torch

    optimizer = _after_a_step(rule, values, gradients)
    for name, value in values.items():
        if torch.equal(optimizer.masters[name], value):
            yield f"a step with a gradient doesn't change a weight of shape {tuple(value.shape)}"
            return
    state = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    restored = _optimizer(rule, values)
    restored.load(state.keys(), lambda tensors: [tensor.copy_(state[name]) for name, tensor in tensors.items()])
    for each in (optimizer, restored):
        _step(each, gradients)
    if any(not torch.equal(optimizer.masters[name], restored.masters[name]) for name in values):
        yield "a step after the state is restored differs from one without a break"
    if rule.scope != "all" and len(values) > 1:
        name = next(iter(values))
        alone = _after_a_step(rule, {name: values[name]}, {name: gradients[name]})
        together = _after_a_step(rule, values, gradients)
        if not torch.equal(alone.masters[name], together.masters[name]):
            yield f"scope is {rule.scope}, but the update of a weight depends on other weights"
    if rule.scope == "element":
        name, value = next(iter(values.items()))
        half = len(value) // 2
        shard = _after_a_step(rule, {name: value[:half]}, {name: gradients[name][:half]})
        whole = _after_a_step(rule, {name: value}, {name: gradients[name]})
        if not torch.allclose(shard.masters[name], whole.masters[name][:half], rtol=1e-5, atol=1e-7):
            yield "scope is element, but the update of a part of a weight depends on the rest of it"


def _after_a_step(
    rule: UpdateRule, values: Mapping[str, torch.Tensor], gradients: Mapping[str, torch.Tensor]
) -> Optimizer:
    optimizer = _optimizer(rule, values)
    _step(optimizer, gradients)
    return optimizer


def _optimizer(rule: UpdateRule, values: Mapping[str, torch.Tensor]) -> Optimizer:
    """An optimizer of weights with these ``values`` by name, all updated by ``rule``."""
    from torch import nn

    from llavactl.training.optimizer import Optimizer
    from llavactl.training.update_rules import AssignedWeights

    model = nn.Module()
    for name, value in values.items():
        part, _, index = name.partition(".")
        if not hasattr(model, part):
            model.add_module(part, nn.Module())
        model.get_submodule(part).register_parameter(index, nn.Parameter(value.clone()))
    return Optimizer(model, dict.fromkeys(values, _RATE), [AssignedWeights(rule, tuple(values))], 0.0)


def _step(optimizer: Optimizer, gradients: Mapping[str, torch.Tensor]) -> None:
    for name, gradient in gradients.items():
        optimizer.masters[name].grad = gradient.clone()
    optimizer.step(1.0)


@conformance_check("schedules")
def check_schedule(schedule: Schedule) -> list[str]:
    """Checks that the fractions are numbers of at least 0 that depend on step and number of steps only."""
    places = [(step, steps) for steps in (1, 2, 100) for step in range(steps)]
    fractions: Sequence[Any] = [schedule.fraction(*place) for place in places]
    for place, value in zip(places, fractions, strict=True):
        if why := returned_fault("schedules", "fraction", value, *place):
            return [f"fraction{place} {why}"]
    again = [schedule.fraction(*place) for place in reversed(places)][::-1]
    problems = [] if again == list(fractions) else ["fraction() depends on earlier calls"]
    return problems if any(fractions) else [*problems, "fraction() is 0 in every step"]
