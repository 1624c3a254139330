"""Fused features are those of the parts, side by side for every patch."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from llavactl import ModelError, RecipeError, registry
from llavactl.testing import check_vision

Saved = Callable[[str], Path]


@pytest.fixture
def parts(saved: Saved) -> list[dict[str, Any]]:
    """2×2 patches each, of 20 and 14 pixels: DINOv2 ignores what is left of 40 pixels."""
    dinov2 = {"name": "dinov2", "model": str(saved("dinov2-registers")), "image_size": 40}
    return [dinov2, {"name": "siglip", "model": str(saved("siglip")), "image": "square", "layer": [1, -2]}]


def fuse(parts: list[dict[str, Any]]) -> Any:
    return registry().create("vision", {"name": "fused", "parts": parts})


def test_features_are_those_of_the_parts(parts: list[dict[str, Any]], images: list[Image.Image]) -> None:
    vision = fuse(parts)
    encoder = vision.load("cpu", "float32")
    pixels = torch.from_numpy(np.stack([encoder.preprocess(image) for image in images]))
    expected = []
    for part in parts:
        single = registry().create("vision", part).load("cpu", "float32")
        own_pixels = torch.from_numpy(np.stack([single.preprocess(image) for image in images]))
        expected.append(single.encode(own_pixels))
    features = encoder.encode(pixels)
    assert torch.equal(features, torch.cat(expected, dim=-1))
    assert vision.shape() == encoder.shape
    assert (encoder.shape.grid, encoder.shape.width, encoder.shape.prefix) == ((2, 2), 3 * 32, 0)


def test_conforms(parts: list[dict[str, Any]]) -> None:
    vision = fuse(parts)
    vision.check()
    assert check_vision(vision) == []
    pickle.loads(pickle.dumps(vision.load("cpu", "float32").preprocess))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(parts: list[dict[str, Any]], images: list[Image.Image], dtype: str) -> None:
    exact, half = (fuse(parts).load("cpu", compute) for compute in ("float32", dtype))
    pixels = torch.from_numpy(np.stack([exact.preprocess(image) for image in images]))
    expected, features = exact.encode(pixels), half.encode(pixels)
    assert features.dtype == getattr(torch, dtype)
    assert (features.float() - expected).norm() < 0.05 * expected.norm()


def test_the_identity_depends_on_every_part_and_their_order(parts: list[dict[str, Any]]) -> None:
    dinov2, siglip = parts
    variants = [
        parts,
        [siglip, dinov2],
        [dinov2, dinov2],
        [dinov2, {**siglip, "layer": -2}],
        [dinov2, {**siglip, "image": "pad"}],
        [{**dinov2, "image_size": 41}, siglip],
    ]
    identities = [dict(fuse(variant).identity()) for variant in variants]
    assert all(one != other for index, one in enumerate(identities) for other in identities[:index])
    assert fuse(parts).identity() == identities[0]


def test_the_fingerprint_does_not_depend_on_the_names_of_folders(
    parts: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAVACTL_HOME", str(tmp_path / "home"))
    dinov2, siglip = parts
    shutil.copytree(siglip["model"], tmp_path / "siglip")
    (tmp_path / "siglip" / "tokenizer_config.json").write_text("{}")  # is not read
    moved = [dinov2, {**siglip, "model": str(tmp_path / "siglip")}]
    assert fuse(moved).identity() == fuse(parts).identity()


def test_different_grids_are_refused_and_named(parts: list[dict[str, Any]]) -> None:
    parts[0]["image_size"] = 42
    for method in (fuse(parts).check, fuse(parts).shape, lambda: fuse(parts).load("cpu", "float32")):
        with pytest.raises(ModelError, match=r"dinov2 3×3, siglip 2×2"):
            method()


def test_class_tokens_are_refused(parts: list[dict[str, Any]]) -> None:
    parts[0]["select"] = "cls-patch"
    with pytest.raises(ModelError, match="class tokens: dinov2"):
        fuse(parts).shape()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([{"name": "siglip"}], "2"),
        ([{"name": "siglip"}, {}], "name"),
        ([{"name": "siglip"}, {"name": "siglop"}], "siglop"),
        ([{"name": "siglip"}, {"name": "siglip", "layers": 3}], "layers"),
        ([{"name": "siglip"}, {"name": "dinov2", "image_size": 0}], "image_size"),
        ([{"name": "siglip", "layers": 3}, {"name": "siglop"}], "0: .*layers.*1: .*siglop"),
    ],
)
def test_invalid_parts_are_problems_of_the_recipe(change: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        fuse(change)


def test_the_default_is_prismatics_pair() -> None:
    """Options are complete without the models."""
    options = registry().options("vision", "fused")
    assert [part["name"] for part in options.parts] == ["dinov2", "siglip"]
    assert options.parts[0]["image_size"] == 384
    assert {part["select"] for part in options.parts} == {"patch"}
