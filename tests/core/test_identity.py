"""What identifies a component: whether the models in its options are on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llavactl.core.identity import is_local

MISSING = "someone/model-that-is-not-cached"


@pytest.mark.parametrize(
    "options",
    [
        {"model": MISSING},
        {"parts": [{"name": "clip", "model": MISSING}]},
        {"teacher": {"model": MISSING, "layer": -2}},
    ],
)
def test_a_model_of_the_hub_is_not_local(options: dict[str, Any]) -> None:
    assert not is_local({"name": "toy", **options})


def test_folders_and_other_options_are_local(tmp_path: Path) -> None:
    assert is_local(
        {"name": "toy", "model": str(tmp_path), "parts": [{"model": str(tmp_path), "layer": [1, 2]}], "x": None}
    )
