"""Every rule of a connector is found broken by its trial, and what keeps them all is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from llavactl.core.schema import FeatureShape
from llavactl.model.trial import connector_fault
from llavactl.testing import check_connector

SHAPE, WIDTH = FeatureShape((2, 3), 8), 12


class Base(nn.Module):
    """A projection, whose subclasses do something to it."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(SHAPE.width, WIDTH)
        self.seen = 0

    def forward(self, features: torch.Tensor) -> Any:
        self.seen += self.training
        return self.change(self.projection(features))

    def change(self, made: torch.Tensor) -> Any:
        return made


class Double(Base):
    def change(self, made: torch.Tensor) -> Any:
        return made.double()


class Lazy(Base):
    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.LazyLinear(WIDTH)


class Statistics(Base):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def change(self, made: torch.Tensor) -> Any:
        return self.norm(made.transpose(1, 2)).transpose(1, 2)


class Replaced(Base):
    """Puts a new tensor in a buffer's place."""

    mean: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def change(self, made: torch.Tensor) -> Any:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * made.detach().mean((0, 1))
        return made - self.mean


class Shared(Base):
    def __init__(self) -> None:
        super().__init__()
        self.twin = nn.Linear(SHAPE.width, WIDTH)
        self.twin.weight = self.projection.weight


class Frozen(Base):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)


class Kept(Base):
    """Python state that is in the state dict."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor(self.seen)

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.seen = int(state)

    def change(self, made: torch.Tensor) -> Any:
        return made * (1 + self.seen)


class Dropout(Base):
    def change(self, made: torch.Tensor) -> Any:
        return nn.functional.dropout(made, 0.5, self.training)


class Whole(Base):
    """Numbers that are no weights, before any that is."""

    def __init__(self) -> None:
        super().__init__()
        projection, self.projection = self.projection, nn.Identity()  # type: ignore[assignment]
        self.order = nn.Parameter(torch.arange(SHAPE.width), requires_grad=False)
        self.last = projection

    def change(self, made: torch.Tensor) -> Any:
        return self.last(made[..., self.order])


@pytest.mark.parametrize("kind", [Base, Double, Lazy, Statistics, Replaced, Shared, Frozen, Kept, Dropout, Whole])
def test_what_keeps_the_rules_passes(kind: type[nn.Module]) -> None:
    assert not connector_fault(Connector(kind), SHAPE, WIDTH, ("float32", "bfloat16"))


class Narrow(Base):
    def change(self, made: torch.Tensor) -> Any:
        return made[..., 1:]


class Flat(Base):
    def change(self, made: torch.Tensor) -> Any:
        return made.flatten(0, 1)


class Tuple(Base):
    def change(self, made: torch.Tensor) -> Any:
        return (made,)


class Complex(Base):
    def change(self, made: torch.Tensor) -> Any:
        return made.to(torch.complex64)


class FewerInTraining(Base):
    def change(self, made: torch.Tensor) -> Any:
        return made[:, 1:] if self.training else made


class NarrowInTraining(Base):
    def change(self, made: torch.Tensor) -> Any:
        return made[..., 1:] if self.training else made


class NotFinite(Base):
    def change(self, made: torch.Tensor) -> Any:
        return made.log()


class Elsewhere(Base):
    def change(self, made: torch.Tensor) -> Any:
        return made.to("meta")


class Swapped(Base):
    def change(self, made: torch.Tensor) -> Any:
        return made.flip(0)


class OfTheBatch(Base):
    def change(self, made: torch.Tensor) -> Any:
        return made - made.mean((0, 1))


class Random(Base):
    def change(self, made: torch.Tensor) -> Any:
        return nn.functional.dropout(made, 0.5, training=True)


class NeverOne(Base):
    def change(self, made: torch.Tensor) -> Any:
        return made.squeeze(0)


class NeverOneInTraining(Base):
    def change(self, made: torch.Tensor) -> Any:
        assert len(made) > 1 or not self.training
        return made


class InPlace(Base):
    def forward(self, features: torch.Tensor) -> Any:
        return super().forward(features.mul_(2))


class Detached(Base):
    def change(self, made: torch.Tensor) -> Any:
        return made.detach()


class Unused(Base):
    """Its output has a gradient, but none of its own parameters does."""

    def change(self, made: torch.Tensor) -> Any:
        return torch.zeros_like(made, requires_grad=self.training) + made.detach()


class Late(Base):
    def change(self, made: torch.Tensor) -> Any:
        if self.training:
            self.late = nn.Parameter(torch.zeros(()))
        return made


class Growing(Base):
    memory: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.zeros(0))

    def change(self, made: torch.Tensor) -> Any:
        if self.training:
            self.memory = torch.cat([self.memory, made.detach().flatten()])
        return made


class Counting(Base):
    def change(self, made: torch.Tensor) -> Any:
        return made * (1 + self.seen)


class CountingInTraining(Base):
    def change(self, made: torch.Tensor) -> Any:
        return made * (1 + self.seen) if self.training else made


class NotSaved(Replaced):
    def __init__(self) -> None:
        super().__init__()
        self._non_persistent_buffers_set.add("mean")


class OwnRandomness(Base):
    def __init__(self) -> None:
        super().__init__()
        self.chance = torch.Generator().manual_seed(0)

    def change(self, made: torch.Tensor) -> Any:
        return made * torch.rand(WIDTH, generator=self.chance) if self.training else made


class NotTensors(Base):
    def get_extra_state(self) -> dict[str, int]:
        return {"seen": self.seen}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]


class NotLoading(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("wide", torch.ones(1).expand(WIDTH))


class OneType(Base):
    """Only float32."""

    def change(self, made: torch.Tensor) -> Any:
        return made @ torch.eye(WIDTH)


BROKEN = [
    Narrow,
    Flat,
    Tuple,
    Complex,
    FewerInTraining,
    NarrowInTraining,
    NotFinite,
    Elsewhere,
    Swapped,
    OfTheBatch,
    Random,
]
BROKEN += [NeverOne, NeverOneInTraining, InPlace, Detached, Unused, Late, Growing, Counting, CountingInTraining]
BROKEN += [NotSaved, OwnRandomness, NotTensors, NotLoading, OneType]


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_rule_is_found(kind: type[nn.Module]) -> None:
    assert connector_fault(Connector(kind), SHAPE, WIDTH, ("bfloat16",))
    if kind is OneType:
        assert not connector_fault(Connector(kind), SHAPE, WIDTH)


@pytest.mark.parametrize("tokens", [0, -1, 6.0, None, "6", 5, ValueError("none")])
def test_numbers_of_tokens_that_are_none_are_found(tokens: Any) -> None:
    def answer(_shape: FeatureShape) -> Any:
        if isinstance(tokens, Exception):
            raise tokens
        return tokens

    assert connector_fault(Connector(Base, answer), SHAPE, WIDTH)


@pytest.mark.parametrize("made", [lambda: torch.relu, lambda: None, lambda: 1 / 0])
def test_what_is_no_module_is_found(made: Callable[[], Any]) -> None:
    assert connector_fault(Connector(made), SHAPE, WIDTH)


def test_the_trial_leaves_random_numbers_as_they_were() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    connector_fault(Connector(Base), SHAPE, WIDTH)
    assert torch.equal(torch.rand(3), wanted)


def test_the_kit_takes_a_frozen_connector_and_names_a_weight_without_a_gradient() -> None:
    class Own:
        def tokens(self, shape: FeatureShape) -> int:
            return shape.patches

        def build(self, shape: FeatureShape, language_width: int) -> nn.Module:
            module = nn.Linear(shape.width, language_width)
            module.spare = nn.Linear(2, 2).requires_grad_(self.frozen)
            return module

        frozen = False

    assert check_connector(Own()) == []
    Own.frozen = True
    assert [fault.split()[1] for fault in check_connector(Own())] == ["spare.weight", "spare.bias"]


class Connector:
    """Builds what ``make`` gives."""

    def __init__(
        self, make: Callable[[], Any], tokens: Callable[[FeatureShape], Any] = lambda shape: shape.patches
    ) -> None:
        self.make, self.tokens = make, tokens

    def build(self, shape: FeatureShape, language_width: int) -> Any:
        return self.make()
