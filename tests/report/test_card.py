"""The model card: whether cached features were encoded again, and with what result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llavactl.core.model_description import DESCRIPTION
from llavactl.core.schema import FeatureShape
from llavactl.features.fingerprint import Fingerprint
from llavactl.features.manifest import RECOMPUTED, Manifest, ShardEntry, store_dir
from llavactl.report.card import card

FIELDS = {"weights": "abc"}
RESULT = {
    "compared": 10, "equal": 8, "rounding": 1, "different": 1, "last_places": 3, "dtype": "float16", "seed": 5,
    "shards": {"shard-00000.h5": "abc"},
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The model folder of a run with cached features."""
    folder = tmp_path / "run/stage1/model"
    folder.mkdir(parents=True)
    (folder / DESCRIPTION).write_text(json.dumps({"fingerprint": FIELDS}))
    (tmp_path / "run/recipe.yaml").write_text("name: x\nfeatures: {mode: cached}\n")
    return folder


def write_result(fields: dict[str, Any], result: dict[str, Any]) -> None:
    folder = store_dir(Fingerprint(fields))
    folder.mkdir(parents=True)
    Manifest(FeatureShape((2, 2), 4), (ShardEntry("shard-00000.h5", 10, 1, "abc"),)).write(folder)
    (folder / RECOMPUTED).write_text(json.dumps(result))


def test_the_card_has_the_result_of_the_store_of_the_model(model: Path) -> None:
    assert "Recomputed" not in card(model, "hf", str(model), [])
    write_result(FIELDS, RESULT)
    section = card(model, "hf", str(model), []).partition("## Recomputed features")[2].partition("##")[0]
    for value in ("10", "8 equal", "1 equal up to rounding", "1 different", "3 units", "seed 5"):
        assert value in section


@pytest.mark.parametrize(
    ("fields", "result", "recipe"),
    [
        ({"weights": "other"}, RESULT, "features: {mode: cached}"),
        (FIELDS, {"compared": 1}, "features: {mode: cached}"),
        (FIELDS, RESULT, "features: {mode: live}"),
        (FIELDS, {**RESULT, "shards": {"shard-00000.h5": "other"}}, "features: {mode: cached}"),
    ],
)
def test_results_of_other_features_are_left_out(
    model: Path, fields: dict[str, Any], result: dict[str, Any], recipe: str
) -> None:
    write_result(fields, result)
    (model.parent.parent / "recipe.yaml").write_text(f"name: x\n{recipe}\n")
    assert "Recomputed" not in card(model, "hf", str(model), [])


def test_a_format_writes_its_own_usage(model: Path) -> None:
    given = card(model, "other", str(model), [], stop_strings=["###"], usage=["```sh", "run-it model", "```"])
    section = given.partition("## Usage\n")[2].partition("\n## ")[0]
    assert section.strip() == "```sh\nrun-it model\n```"
