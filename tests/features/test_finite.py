"""Features that are not finite are found, in every image, value and scale; the largest finite ones are not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from llavactl import FeatureShape
from llavactl.features import finite
from llavactl.features.fingerprint import Fingerprint
from llavactl.features.finite import non_finite_features
from llavactl.features.manifest import read_manifest
from llavactl.features.shards import PartialShard, Shard, checksum
from llavactl.testing import run_cli
from llavactl.verbs.extract import extract
from tests.features.test_recompute import Load, folder_of

_SHAPE = FeatureShape((2, 3), 8)


def shard_of(path: Path, dtype: str, features: np.ndarray) -> Path:
    partial = PartialShard(path, Fingerprint({"dtype": dtype}), _SHAPE, len(features))
    partial.append([f"{index:064x}" for index in range(len(features))], features)
    partial.finish()
    return path


@pytest.mark.parametrize("block", [1, 1 << 20])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("dtype", "column"), [("float16", "features"), ("int8", "scales"), ("int8", "scales of channels")]
)
def test_values_that_are_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, column: str, value: float, block: int
) -> None:
    monkeypatch.setattr(finite, "COPY_BYTES", block)
    features = np.random.default_rng(0).normal(size=(5, 6, 8)).astype(np.float16)
    path = shard_of(tmp_path / "x.h5", dtype, features)
    assert non_finite_features(Shard.open(path)) == ""
    with h5py.File(path, "r+") as file:
        for image in (3, 4):
            file[column.split()[0]][(image, 1, 2) if dtype == "float16" else (image, -1 if " " in column else 0)] = (
                value
            )
    reason = non_finite_features(Shard.open(path))
    assert "2 of 5" in reason
    assert f"{3:064x}" in reason


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_the_largest_finite_features(tmp_path: Path, dtype: str) -> None:
    features = np.ones((2, 6, 8), np.float16)
    features[1, 2, 3], features[1, 4, 5] = 65504, -65504
    assert non_finite_features(Shard.open(shard_of(tmp_path / "x.h5", dtype, features))) == ""


def test_finite_scales_whose_product_is_not(tmp_path: Path) -> None:
    path = shard_of(tmp_path / "x.h5", "int8", np.ones((2, 6, 8), np.float16))
    with h5py.File(path, "r+") as file:
        file["scales"][1] *= 300
    assert "1 of 2" in non_finite_features(Shard.open(path))


def test_verify_sets_them_aside(recipe: Load) -> None:
    extract(recipe())
    folder = folder_of(recipe())
    with h5py.File(folder / "shard-00001.h5", "r+") as shard:
        shard["features"][0, 0, 0] = np.nan
    manifest = read_manifest(folder)
    assert manifest
    shards = [replace(entry, sha256=checksum(folder / entry.file)) for entry in manifest.shards]
    replace(manifest, shards=tuple(shards)).write(folder)
    result = run_cli("cache", "verify", "--json")
    assert result.exit_code == 1
    assert [fault["file"] for fault in result.json()["damaged"]] == ["shard-00001.h5"]
    assert extract(recipe()).encoded == 5
    assert run_cli("cache", "verify").exit_code == 0
