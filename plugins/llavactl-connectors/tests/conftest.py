import os
from pathlib import Path
from typing import NamedTuple

import pytest
from llavactl_connectors import components

from llavactl import Connector, FeatureShape, Options

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


class Case(NamedTuple):
    """A connector with small sizes, for a grid of 4x6 patches."""

    name: str
    component: type[Connector]
    options: type[Options]
    values: dict[str, int]
    tokens: int
    keeps_prefix: bool

    def create(self) -> Connector:
        return self.component(self.options(**self.values))


SHAPE = FeatureShape((4, 6), 16)

CASES = [
    Case("average-pooling", components.AveragePooling, components.AveragePoolingOptions, {}, 6, False),
    Case("pixel-shuffle", components.PixelShuffle, components.PixelShuffleOptions, {}, 6, False),
    Case(
        "c-abstractor",
        components.CAbstractor,
        components.CAbstractorOptions,
        {"tokens": 9, "depth": 2, "hidden": 24},
        9,
        False,
    ),
    Case("ldp-v2", components.LdpV2, components.LdpV2Options, {}, 6, False),
    Case(
        "perceiver-resampler",
        components.PerceiverResampler,
        components.PerceiverResamplerOptions,
        {"tokens": 5, "layers": 2, "heads": 2, "head_width": 4},
        5,
        True,
    ),
    Case(
        "q-former",
        components.QFormer,
        components.QFormerOptions,
        {"tokens": 5, "layers": 3, "hidden": 24, "heads": 4},
        5,
        True,
    ),
]


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture
def shape() -> FeatureShape:
    return SHAPE


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVACTL_HOME", str(tmp_path / "home"))
