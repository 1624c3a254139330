"""Data sets of made-up samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from llavactl.core.registry import registry
from llavactl.core.schema import ImageContents, Sample
from llavactl.data.encode import Encoding
from llavactl.data.sample_table import SampleTable
from llavactl.data.split import DataSplit, load_split
from llavactl.recipe.specs import SourceSpec
from llavactl.recipe.stages import Stage

LoadSamples = Callable[..., DataSplit]


@pytest.fixture(scope="module")
def tokenizer(toys: Path) -> Any:
    return registry().create("languages", {"name": "hf", "model": str(toys / "language")}).tokenizer()


@pytest.fixture
def load_samples(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> LoadSamples:
    """Splits ``samples`` as a stage with these settings (default: no validation, random image order) would."""

    def load(
        samples: Sequence[Sample],
        unreadable: Mapping[Any, str] | None = None,
        contents: Mapping[Any, str] | None = None,
        split_turns: bool = False,
        **stage: Any,
    ) -> DataSplit:
        monkeypatch.setattr("llavactl.data.split.sample_table", lambda spec, _on_chunk: SampleTable.of(samples))
        settings = Stage(**{"validation": 0.0, "image_order": "random", **stage})
        template = registry().create("templates", {"name": "vicuna-v1"})
        encoding = Encoding(template, tokenizer, 4, settings.max_length)
        features: Any = None
        image_contents = ImageContents(dict(contents or {}), unreadable or {})
        spec = SourceSpec(name="any", split_turns=split_turns)
        return load_split([spec], settings, encoding, features, lambda _images: image_contents, 0)

    return load
