"""``cache verify --recompute``: stored features are compared to the bit with those of images encoded again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from llavactl import StoreError
from llavactl.features import FeatureStore, comparison, recompute, stage_fingerprint
from llavactl.features import conditions as conditions_module
from llavactl.features.manifest import RECOMPUTED, Manifest, ShardEntry, read_manifest, read_recomputed
from llavactl.features.shards import checksum
from llavactl.recipe.frame import Recipe
from llavactl.testing import run_cli
from llavactl.verbs.cache import verify
from llavactl.verbs.extract import extract

Load = Callable[..., Recipe]


def folder_of(recipe: Recipe) -> Path:
    return FeatureStore.open(stage_fingerprint(recipe, 1)).folder


def change_features(folder: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Applies ``change`` to the features of the first image of the first shard; its checksum is valid afterwards."""
    path = folder / "shard-00000.h5"
    with h5py.File(path, "r+") as shard:
        shard["features"][0] = change(shard["features"][0])
    manifest = read_manifest(folder)
    assert manifest
    shards = [replace(entry, sha256=checksum(folder / entry.file)) for entry in manifest.shards]
    replace(manifest, shards=tuple(shards)).write(folder)


def edit_conditions(folder: Path, **changes: Any) -> None:
    manifest = read_manifest(folder)
    assert manifest
    conditions = {file: {**known, **changes} for file, known in manifest.conditions.items()}
    replace(manifest, conditions=conditions).write(folder)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("given", [True, False])
def test_recomputed_features_are_equal_to_the_bit(recipe: Load, dtype: str, given: bool) -> None:
    loaded = recipe(f"features.dtype={dtype}", "features.compute=bfloat16")
    extract(loaded)
    (result,) = verify(loaded if given else None, recompute=100).recomputed
    assert (result.verdict, result.selected, result.compared, result.equal) == ("equal", 12, 12, 12)
    assert (result.dtype, result.compute, result.last_places, result.unavailable) == (dtype, "bfloat16", 0, {})
    assert result.written_with == result.computed_with
    assert {"device", "threads", "torch"} <= set(result.written_with[0])


def test_the_choice_depends_on_the_seed_only(recipe: Load) -> None:
    extract(recipe())
    store = FeatureStore.open(stage_fingerprint(recipe(), 1))
    chosen = [comparison.choose(store, 4, seed) for seed in range(20)]
    assert chosen == [comparison.choose(store, 4, seed) for seed in range(20)]
    assert {key for keys in chosen for key in keys} == set(comparison.choose(store, 12, 0))
    assert {store.shard_of(key) for keys in chosen for key in keys} == {f"shard-{n:05}.h5" for n in range(3)}


def test_recorded_batch_size_and_threads_are_used(recipe: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    extract(recipe())
    edit_conditions(folder_of(recipe()), threads=2, batch_size=3)
    threads: list[int] = []
    batch_sizes: list[int] = []
    real = comparison.encode_images

    def spy(images: Any, backbone: Any, workers: int) -> Any:
        threads.append(torch.get_num_threads())
        batch_sizes.append(backbone.batch_size)
        return real(images, backbone, workers)

    monkeypatch.setattr(comparison, "encode_images", spy)
    before = torch.get_num_threads()
    (result,) = verify(recompute=12).recomputed
    assert (threads, batch_sizes, torch.get_num_threads()) == ([2], [3], before)
    assert result.computed_with[0]["threads"] == 2


@pytest.mark.parametrize("changes", [{"torch": "1.0"}, {"device": "cuda", "device_name": "X"}, None])
def test_a_small_difference_is_rounding_only_if_the_conditions_differ(
    recipe: Load, changes: dict[str, Any] | None
) -> None:
    extract(recipe())
    folder = folder_of(recipe())
    change_features(folder, lambda features: np.nextafter(features, np.float16(np.inf)))
    if changes:
        edit_conditions(folder, **changes)
    report = verify(recompute=12)
    (result,) = report.recomputed
    assert report.sound
    assert result.verdict == ("rounding" if changes else "different")
    assert (result.equal, result.rounding + result.different, result.last_places) == (11, 1, 1)
    assert result.differences[0].image.startswith("photo-")
    assert result.differences[0].values == 4 * 32
    assert run_cli("cache", "verify", "--recompute", "12").exit_code == (0 if changes else 1)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize(("input_error", "verdict"), [("tf32", "rounding"), ("one gray level", "different")])
def test_one_gray_level_is_not_rounding_in_float32(
    recipe: Load, monkeypatch: pytest.MonkeyPatch, dtype: str, input_error: str, verdict: str
) -> None:
    loaded = recipe("features.compute=float32", f"features.dtype={dtype}")
    extract(loaded)
    edit_conditions(folder_of(loaded), device_name="X")
    load = recompute.load_encoder

    def load_changed(*arguments: Any) -> Any:
        encoder = load(*arguments)

        def changed(image: Any) -> np.ndarray:
            if input_error == "tf32":  # its mantissa has 10 bits, as that of float16
                return encoder.preprocess(image).astype(np.float16).astype(np.float32)
            return encoder.preprocess(image.point(lambda value: value + 1 if value < 255 else 254))

        return replace(encoder, preprocess=changed)

    monkeypatch.setattr(recompute, "load_encoder", load_changed)
    (result,) = verify(recompute=12).recomputed
    assert result.verdict == verdict


def test_bounds_grow_with_the_rounding_of_the_types() -> None:
    bounds = comparison.ROUNDING
    for dtype in ("float16", "int8"):
        assert bounds["float32", dtype] <= bounds["float16", dtype] <= bounds["bfloat16", dtype]
    for compute in ("float32", "float16", "bfloat16"):
        assert bounds[compute, "float16"] <= bounds[compute, "int8"]


def test_a_large_difference_is_never_rounding(recipe: Load) -> None:
    extract(recipe())
    folder = folder_of(recipe())
    change_features(folder, lambda features: features * np.float16(1.5))
    edit_conditions(folder, device="cuda")
    result = run_cli("cache", "verify", "--recompute", "12", "--json")
    assert result.exit_code == 1
    (store,) = result.json()["recomputed"]
    assert (store["verdict"], store["equal"], store["different"]) == ("different", 11, 1)
    assert store["differences"][0]["relative"] == pytest.approx(1 / 3, abs=0.01)


def test_stores_of_earlier_versions_have_unknown_conditions(recipe: Load) -> None:
    extract(recipe())
    folder = folder_of(recipe())
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["conditions"], manifest["recipes"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (unknown,) = verify(recompute=1).recomputed
    assert (unknown.verdict, unknown.compared) == ("none", 0)
    assert "-r" in unknown.reason
    assert verify(recipe(), recompute=3).recomputed[0].verdict == "equal"
    change_features(folder, lambda features: np.nextafter(features, np.float16(np.inf)))
    (result,) = verify(recipe(), recompute=12).recomputed
    assert (result.verdict, result.written_with) == ("rounding", ({},))


def test_images_that_are_gone_or_changed_are_counted(recipe: Load, toy: Path) -> None:
    extract(recipe())
    first, second, *_ = sorted((toy / "images").iterdir())
    first.unlink()
    second.write_bytes(second.read_bytes() + b"x")
    (result,) = verify(recompute=12).recomputed
    assert (result.verdict, result.compared, len(result.unavailable)) == ("equal", 10, 2)
    for path in (toy / "images").iterdir():
        path.unlink()
    gone = run_cli("cache", "verify", "--recompute", "5", "--json")
    assert gone.exit_code == 1
    assert gone.json()["recomputed"][0]["verdict"] == "none"


def test_other_weights_are_refused(recipe: Load, toy: Path) -> None:
    from llavactl.testing import toy_clip

    extract(recipe())
    toy_clip(toy / "clip", seed=1)
    (result,) = verify(recompute=1).recomputed
    assert result.verdict == "none"
    assert "fingerprint" in result.reason


def test_a_store_that_cannot_be_recomputed_hides_no_other_result(recipe: Load) -> None:
    extract(recipe())
    extract(recipe("vision.layer=-3"))
    old, other = (folder_of(recipe(*words)) for words in ((), ("vision.layer=-3",)))
    manifest = json.loads((old / "manifest.json").read_text())
    del manifest["recipes"]
    (old / "manifest.json").write_text(json.dumps(manifest))
    (old.parent / "no-manifest").mkdir()
    shard = other / "shard-00001.h5"
    shard.write_bytes(shard.read_bytes()[:-1])
    result = run_cli("cache", "verify", "--recompute", "12", "--json")
    assert result.exit_code == 1
    report = result.json()
    assert [fault["store"] for fault in report["damaged"]] == [other.name]
    assert {store["store"]: store["verdict"] for store in report["recomputed"]} == {
        old.name: "none",
        other.name: "equal",
    }
    assert all(bool(store["reason"]) == (store["verdict"] == "none") for store in report["recomputed"])


@pytest.mark.parametrize("first", [True, False])
def test_an_unreadable_recorded_recipe_does_not_hide_another(recipe: Load, first: bool) -> None:
    extract(recipe())
    manifest = read_manifest(folder_of(recipe()))
    assert manifest
    (record,) = manifest.recipes
    sources = [{"name": "llava-json", "path": "/x", "images": "/x"}]
    gone = {**record, "data": {**record["data"], "stage1": sources, "stage2": sources}}
    others = ({"name": 1}, gone)
    recipes = (*others, record) if first else (record, *others)
    replace(manifest, recipes=recipes).write(folder_of(recipe()))
    (result,) = verify(recompute=12).recomputed
    assert (result.verdict, result.compared) == ("equal", 12)
    replace(manifest, recipes=others).write(folder_of(recipe()))
    (result,) = verify(recompute=12).recomputed
    assert (result.verdict, bool(result.reason)) == ("none", True)


@pytest.mark.parametrize("changes", [{"threads": 0}, {"batch_size": "x"}, {"batch_size": True}, {"torch": ["2"]}])
def test_invalid_conditions_are_refused(recipe: Load, changes: dict[str, Any]) -> None:
    extract(recipe())
    folder = folder_of(recipe())
    edit_conditions(folder, **changes)
    with pytest.raises(StoreError, match=r"manifest\.json") as caught:
        read_manifest(folder)
    assert next(iter(changes)) in caught.value.message


def test_a_seed_without_recompute_is_a_usage_error() -> None:
    assert run_cli("cache", "verify", "--seed", "1").exit_code == 2


def test_two_stores_of_one_recipe_are_recomputed_with_their_own_preprocessing(recipe: Load) -> None:
    extract(recipe("stage1.image=square"))
    results = verify(recompute=12).recomputed
    assert [result.verdict for result in results] == ["equal", "equal"]
    assert len({result.store for result in results}) == 2


def test_the_result_is_kept_for_the_model_card(recipe: Load) -> None:
    extract(recipe())
    folder = folder_of(recipe())
    verify(recompute=3, seed=7)
    text = (folder / RECOMPUTED).read_text()
    kept = json.loads(text)
    assert (kept["verdict"], kept["compared"], kept["seed"]) == ("equal", 3, 7)
    assert "photo-" not in text
    assert read_recomputed(folder) == kept
    assert extract(recipe()).encoded == 0
    assert (folder / RECOMPUTED).exists()
    verify(recompute=12)
    change_features(folder, lambda features: -features)
    assert read_recomputed(folder) == {}


def test_conditions_of_a_removed_shard_are_removed() -> None:
    entries = [ShardEntry(f"shard-{n:05}.h5", 1, 1, "") for n in range(2)]
    manifest = Manifest(shape=None)  # type: ignore[arg-type]
    for entry in entries:
        manifest = manifest.with_shard(entry, {"torch": entry.file})
    kept = manifest.without({"shard-00000.h5"})
    assert (kept.shards, kept.conditions) == ((entries[1],), {"shard-00001.h5": {"torch": "shard-00001.h5"}})


def test_a_recorded_recipe_is_listed_once() -> None:
    manifest = Manifest(shape=None)  # type: ignore[arg-type]
    for name in ("a", "b", "a"):
        manifest = manifest.with_recipe({"name": name})
    assert [recipe["name"] for recipe in manifest.recipes] == ["b", "a"]


def test_conditions_have_the_version_of_a_plugin_and_tolerate_missing_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditions_module, "distributions_of", {"their_plugin": ["their-plugin"]}.__getitem__)

    def version(name: str) -> str:
        if name == "pillow":
            raise PackageNotFoundError(name)
        return "1.2"

    monkeypatch.setattr(conditions_module, "version", version)
    encoder = type("TheirEncoder", (), {"__module__": "their_plugin.encoder"})()
    known = conditions_module.conditions("cpu", 4, encoder)
    assert (known["their-plugin"], known["torch"]) == ("1.2", "1.2")
    assert "pillow" not in known
    assert "their-plugin" not in conditions_module.conditions("cpu", 4, FeatureStore.__new__(FeatureStore))
