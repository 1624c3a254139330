"""The benchmark of start-up names functions that exist, and its data can be trained on."""

from __future__ import annotations

import importlib
import json
from functools import reduce
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(name)


def test_the_function_of_each_phase_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    for target in module("growth", monkeypatch).PHASES.values():
        name, path = target.split(":")
        assert callable(reduce(getattr, path.split("."), importlib.import_module(name)))


def test_records_have_the_shape_of_the_mix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mix = module("mix", monkeypatch)
    if not mix.LLAVA_DATA.is_dir():
        pytest.skip("no ../shared/data")
    images = mix.write_records(tmp_path / "records.json", 400, tmp_path / "images", seed=1)
    records = json.loads((tmp_path / "records.json").read_text())
    assert set(images) == {record["image"] for record in records if "image" in record}
    assert all((tmp_path / "images" / name).is_file() for name in images)
    assert len(set(images.values())) == len(images)
    assert 0.4 < len(images) / len(records) < 0.7
    assert all(turn["value"].strip() for record in records for turn in record["conversations"])
    assert 8 < sum(len(record["conversations"]) for record in records) / len(records) < 15
