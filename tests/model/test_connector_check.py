"""Connectors that violate a rule of the protocol are detected; valid ones pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import nn

from llavactl.core.protocols import GridConnector
from llavactl.core.schema import FeatureShape
from llavactl.model.build import grid_fault
from llavactl.model.connector_check import connector_fault
from llavactl.testing import check_connector

SHAPE, WIDTH = FeatureShape((2, 3), 8), 12


class Base(nn.Module):
    """A projection; subclasses modify its output."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(SHAPE.width, WIDTH)
        self.calls = 0

    def forward(self, features: torch.Tensor) -> Any:
        self.calls += self.training
        return self.modify(self.projection(features))

    def modify(self, output: torch.Tensor) -> Any:
        return output


class Double(Base):
    def modify(self, output: torch.Tensor) -> Any:
        return output.double()


class Lazy(Base):
    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.LazyLinear(WIDTH)


class Statistics(Base):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def modify(self, output: torch.Tensor) -> Any:
        return self.norm(output.transpose(1, 2)).transpose(1, 2)


class Replaced(Base):
    """Replaces its buffer by a new tensor."""

    mean: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def modify(self, output: torch.Tensor) -> Any:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * output.detach().mean((0, 1))
        return output - self.mean


class Shared(Base):
    def __init__(self) -> None:
        super().__init__()
        self.twin = nn.Linear(SHAPE.width, WIDTH)
        self.twin.weight = self.projection.weight


class Frozen(Base):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)


class ExtraState(Base):
    """Python state in the state dict."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor(self.calls)

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.calls = int(state)

    def modify(self, output: torch.Tensor) -> Any:
        return output * (1 + self.calls)


class Dropout(Base):
    def modify(self, output: torch.Tensor) -> Any:
        return nn.functional.dropout(output, 0.5, self.training)


class IntegerParameter(Base):
    """Integer parameters come before floating-point ones."""

    def __init__(self) -> None:
        super().__init__()
        projection, self.projection = self.projection, nn.Identity()  # type: ignore[assignment]
        self.order = nn.Parameter(torch.arange(SHAPE.width), requires_grad=False)
        self.last = projection

    def modify(self, output: torch.Tensor) -> Any:
        return self.last(output[..., self.order])


@pytest.mark.parametrize(
    "kind", [Base, Double, Lazy, Statistics, Replaced, Shared, Frozen, ExtraState, Dropout, IntegerParameter]
)
def test_valid_connectors_pass(kind: type[nn.Module]) -> None:
    assert not connector_fault(Connector(kind), SHAPE, WIDTH, ("float32", "bfloat16"))


class Narrow(Base):
    def modify(self, output: torch.Tensor) -> Any:
        return output[..., 1:]


class Flat(Base):
    def modify(self, output: torch.Tensor) -> Any:
        return output.flatten(0, 1)


class Tuple(Base):
    def modify(self, output: torch.Tensor) -> Any:
        return (output,)


class Complex(Base):
    def modify(self, output: torch.Tensor) -> Any:
        return output.to(torch.complex64)


class FewerInTraining(Base):
    def modify(self, output: torch.Tensor) -> Any:
        return output[:, 1:] if self.training else output


class NarrowInTraining(Base):
    def modify(self, output: torch.Tensor) -> Any:
        return output[..., 1:] if self.training else output


class NotFinite(Base):
    def modify(self, output: torch.Tensor) -> Any:
        return output.log()


class OnAnotherDevice(Base):
    def modify(self, output: torch.Tensor) -> Any:
        return output.to("meta")


class Reversed(Base):
    def modify(self, output: torch.Tensor) -> Any:
        return output.flip(0)


class BatchDependent(Base):
    def modify(self, output: torch.Tensor) -> Any:
        return output - output.mean((0, 1))


class Random(Base):
    def modify(self, output: torch.Tensor) -> Any:
        return nn.functional.dropout(output, 0.5, training=True)


class FailsForOneImage(Base):
    def modify(self, output: torch.Tensor) -> Any:
        return output.squeeze(0)


class FailsForOneImageInTraining(Base):
    def modify(self, output: torch.Tensor) -> Any:
        assert len(output) > 1 or not self.training
        return output


class InPlace(Base):
    def forward(self, features: torch.Tensor) -> Any:
        return super().forward(features.mul_(2))


class Detached(Base):
    def modify(self, output: torch.Tensor) -> Any:
        return output.detach()


class Unused(Base):
    """Its output has a gradient, but none of its own parameters does."""

    def modify(self, output: torch.Tensor) -> Any:
        return torch.zeros_like(output, requires_grad=self.training) + output.detach()


class NewParameter(Base):
    def modify(self, output: torch.Tensor) -> Any:
        if self.training:
            self.added = nn.Parameter(torch.zeros(()))
        return output


class Growing(Base):
    memory: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.zeros(0))

    def modify(self, output: torch.Tensor) -> Any:
        if self.training:
            self.memory = torch.cat([self.memory, output.detach().flatten()])
        return output


class Counting(Base):
    def modify(self, output: torch.Tensor) -> Any:
        return output * (1 + self.calls)


class CountingInTraining(Base):
    def modify(self, output: torch.Tensor) -> Any:
        return output * (1 + self.calls) if self.training else output


class NotSaved(Replaced):
    def __init__(self) -> None:
        super().__init__()
        self._non_persistent_buffers_set.add("mean")


class OwnGenerator(Base):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def modify(self, output: torch.Tensor) -> Any:
        return output * torch.rand(WIDTH, generator=self.generator) if self.training else output


class NonTensorState(Base):
    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


class UnloadableState(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("wide", torch.ones(1).expand(WIDTH))


class Float32Only(Base):
    """Supports only float32."""

    def modify(self, output: torch.Tensor) -> Any:
        return output @ torch.eye(WIDTH)


BROKEN = [
    Narrow,
    Flat,
    Tuple,
    Complex,
    FewerInTraining,
    NarrowInTraining,
    NotFinite,
    OnAnotherDevice,
    Reversed,
    BatchDependent,
    Random,
]
BROKEN += [
    FailsForOneImage,
    FailsForOneImageInTraining,
    InPlace,
    Detached,
    Unused,
    NewParameter,
    Growing,
    Counting,
    CountingInTraining,
]
BROKEN += [NotSaved, OwnGenerator, NonTensorState, UnloadableState, Float32Only]


@pytest.mark.parametrize("kind", BROKEN)
def test_violations_are_detected(kind: type[nn.Module]) -> None:
    assert connector_fault(Connector(kind), SHAPE, WIDTH, ("bfloat16",))
    if kind is Float32Only:
        assert not connector_fault(Connector(kind), SHAPE, WIDTH)


@pytest.mark.parametrize("tokens", [0, -1, 6.0, None, "6", 5, ValueError("none")])
def test_invalid_token_counts_are_detected(tokens: Any) -> None:
    def token_count(_shape: FeatureShape) -> Any:
        if isinstance(tokens, Exception):
            raise tokens
        return tokens

    assert connector_fault(Connector(Base, token_count), SHAPE, WIDTH)


@pytest.mark.parametrize(
    ("grid", "valid"),
    [((1, 6), True), ((2, 3), True), ((4, 1), False), ([2, 3], False), ((2,), False), ((0, 6), False)],
)
def test_invalid_grids_are_detected(grid: Any, valid: bool) -> None:
    connector = Connector(Base)
    connector.grid = lambda _shape: grid  # type: ignore[attr-defined]
    assert connector.tokens(SHAPE) == 6
    assert bool(connector_fault(connector, SHAPE, WIDTH)) is not valid
    connector.grid = 12  # type: ignore[attr-defined]
    assert connector_fault(connector, SHAPE, WIDTH)


@pytest.mark.parametrize(("tokens", "valid"), [(24, True), (25, True), (48, True), (49, True), (26, False), (1, False)])
def test_a_grid_connector_keeps_or_drops_the_tokens_before_the_patches(tokens: int, valid: bool) -> None:
    connector = Connector(Base, lambda _shape: tokens)
    connector.grid = lambda shape: shape.grid  # type: ignore[attr-defined]
    assert bool(grid_fault(cast(GridConnector, connector), FeatureShape((4, 6), 8, prefix=1))) is not valid


@pytest.mark.parametrize("build", [lambda: torch.relu, lambda: None, lambda: 1 / 0])
def test_non_modules_are_detected(build: Callable[[], Any]) -> None:
    assert connector_fault(Connector(build), SHAPE, WIDTH)


def test_random_states_are_restored() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    connector_fault(Connector(Base), SHAPE, WIDTH)
    assert torch.equal(torch.rand(3), expected)


def test_check_connector_accepts_frozen_weights_and_names_those_without_a_gradient() -> None:
    class WithSpareLayer:
        def tokens(self, shape: FeatureShape) -> int:
            return shape.patches

        def build(self, shape: FeatureShape, language_width: int) -> nn.Module:
            module = nn.Linear(shape.width, language_width)
            module.spare = nn.Linear(2, 2).requires_grad_(self.frozen)
            return module

        frozen = False

    assert check_connector(WithSpareLayer()) == []
    WithSpareLayer.frozen = True
    assert [fault.split()[1] for fault in check_connector(WithSpareLayer())] == ["spare.weight", "spare.bias"]


class Connector:
    """Builds the result of ``make``."""

    def __init__(
        self, make: Callable[[], Any], tokens: Callable[[FeatureShape], Any] = lambda shape: shape.patches
    ) -> None:
        self.make, self.tokens = make, tokens

    def build(self, shape: FeatureShape, language_width: int) -> Any:
        return self.make()
