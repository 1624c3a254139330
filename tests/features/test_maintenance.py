"""Damaged shards are detected, named and set aside; the next extract recomputes only their images."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import filelock
import numpy as np
import pytest

from llavactl import FeatureShape, ImageFile, StoreError
from llavactl.features import FeatureStore, StoreWriter, content_key, open_features, stage_fingerprint
from llavactl.recipe.frame import Recipe
from llavactl.testing import run_cli
from llavactl.verbs.cache import info, prune, verify
from llavactl.verbs.extract import extract

Load = Callable[..., Recipe]


def store_folder(recipe: Recipe) -> Path:
    return FeatureStore.open(stage_fingerprint(recipe, 1)).folder


def all_features(recipe: Recipe, images: list[ImageFile]) -> np.ndarray:
    features = open_features(recipe, 1)
    return np.stack([features.load(image) for image in images])


def flip_bit(path: Path, position: float) -> None:
    """Flip a bit at a relative ``position`` in the file."""
    data = bytearray(path.read_bytes())
    data[int(position * (len(data) - 1))] ^= 4
    path.write_bytes(data)


def truncate(path: Path, _position: float) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def remove(path: Path, _position: float) -> None:
    path.unlink()


DAMAGES = [(flip_bit, 0.0), (flip_bit, 0.3), (flip_bit, 0.9), (flip_bit, 1.0), (truncate, 0.0), (remove, 0.0)]


@pytest.mark.parametrize(("damage", "position"), DAMAGES)
def test_damaged_shard_is_detected_and_recomputed(
    recipe: Load, images: list[ImageFile], damage: Callable[[Path, float], None], position: float
) -> None:
    report = extract(recipe())
    expected = all_features(recipe(), images)
    folder = store_folder(recipe())
    shard_file = folder / "shard-00001.h5"
    others = {path: path.stat().st_ino for path in folder.glob("*.h5") if path != shard_file}
    damage(shard_file, position)
    verified = verify(recipe())
    assert (verified.sound, [shard.file for shard in verified.damaged]) == (False, [shard_file.name])
    assert verified.damaged[0].reason
    assert not shard_file.exists()
    assert shard_file.with_name("shard-00001.h5.damaged").exists() is (damage is not remove)
    assert verify(recipe()).sound
    with pytest.raises(StoreError, match=f"{verified.damaged[0].images} images"):
        open_features(recipe(), 1).contents(images)
    rerun = extract(recipe())
    assert rerun.encoded == verified.damaged[0].images < report.encoded
    assert np.array_equal(all_features(recipe(), images), expected)
    assert {path: path.stat().st_ino for path in others} == others


def test_verify_leaves_a_sound_store_unchanged(recipe: Load) -> None:
    report = extract(recipe())
    before = {path: path.stat().st_mtime_ns for path in store_folder(recipe()).iterdir()}
    verified = verify()
    assert (verified.sound, verified.stores, verified.shards, verified.images) == (True, 1, 3, 12)
    assert verified.bytes == report.bytes
    assert {path: path.stat().st_mtime_ns for path in store_folder(recipe()).iterdir()} == before


def test_verify_covers_all_stores_or_those_of_the_recipe(recipe: Load) -> None:
    extract(recipe("stage1.image=square"))
    extract(recipe("vision.layer=-3"))
    assert verify().stores == 3
    assert verify(recipe("stage1.image=square")).stores == 2
    assert verify(recipe()).stores == 1
    flip_bit(store_folder(recipe("vision.layer=-3")) / "shard-00000.h5", 0.9)
    assert verify(recipe()).sound
    assert not verify().sound


def test_verify_is_refused_while_a_writer_is_active(recipe: Load) -> None:
    extract(recipe())
    fingerprint = stage_fingerprint(recipe(), 1)
    shape = FeatureStore.open(fingerprint).shape
    with StoreWriter(fingerprint, shape, 4), pytest.raises(StoreError, match="another process"):
        verify()


def test_info_lists_stored_and_missing_fingerprints(recipe: Load) -> None:
    assert info().stores == ()
    assert info(recipe()).missing == (stage_fingerprint(recipe(), 1).id,)
    report = extract(recipe())
    listed = info(recipe())
    assert listed == info()
    assert (listed.images, listed.bytes, listed.missing) == (12, report.bytes, ())
    store = listed.stores[0]
    assert (store.images, store.shards, store.undecodable, store.grid, store.width) == (12, 3, 0, (2, 2), 32)
    assert store.fingerprint == stage_fingerprint(recipe(), 1).fields


def test_prune_removes_stores_that_no_recipe_needs(recipe: Load, images: list[ImageFile]) -> None:
    needed, other = recipe("stage1.image=square"), recipe("vision.layer=-3")
    extract(needed)
    extract(other)
    expected = all_features(needed, images)
    unneeded = stage_fingerprint(other, 1).id
    assert prune(needed, dry_run=True).stores == prune(needed).stores == (unneeded,)
    assert {store.id for store in info().stores} == {stage_fingerprint(needed, stage).id for stage in (1, 2)}
    assert np.array_equal(all_features(needed, images), expected)
    assert prune(needed).stores == ()
    extract(other)
    assert prune(needed, other).stores == ()


def test_prune_without_a_recipe_removes_only_unused_files(recipe: Load, images: list[ImageFile]) -> None:
    extract(recipe())
    expected = all_features(recipe(), images)
    for name in ("shard-00007.h5.partial", "shard-00001.h5.damaged", ".manifest.json.x1"):
        (store_folder(recipe()) / name).write_bytes(b"12345")
    planned = prune(dry_run=True)
    assert (planned.stores, len(planned.files), planned.bytes) == ((), 3, 15)
    assert len(info().stores[0].unused_files) == 3
    assert prune().files == planned.files
    assert prune().files == ()
    assert np.array_equal(all_features(recipe(), images), expected)


def test_prune_is_refused_while_a_writer_is_active(recipe: Load) -> None:
    other = recipe("vision.layer=-3")
    extract(other)
    fingerprint = stage_fingerprint(other, 1)
    with StoreWriter(fingerprint, FeatureStore.open(fingerprint).shape, 4) as writer:
        with pytest.raises(StoreError, match="another process"):
            prune(recipe())
        writer.append([content_key(b"x")], np.zeros((1, 4, 32), np.float16))
    assert len(FeatureStore.open(fingerprint)) == 13


def test_shard_of_another_store_is_reported_as_damaged(recipe: Load) -> None:
    with StoreWriter(stage_fingerprint(recipe(), 1), FeatureShape((2, 2), 32), 4) as writer:
        writer.append([content_key(b"x")], np.zeros((1, 4, 32), np.float16))
    extract(recipe("vision.layer=-3"))
    own, foreign = store_folder(recipe()), store_folder(recipe("vision.layer=-3"))
    (own / "shard-00000.h5").write_bytes((foreign / "shard-00000.h5").read_bytes())
    assert not verify(recipe()).sound


def test_folder_with_the_content_of_another_store_is_reported_as_damaged(recipe: Load) -> None:
    extract(recipe())
    extract(recipe("vision.layer=-3"))
    own, foreign = store_folder(recipe()), store_folder(recipe("vision.layer=-3"))
    for path in foreign.iterdir():
        (own / path.name).write_bytes(path.read_bytes())
    with pytest.raises(StoreError, match=r"fingerprint.* layers: "):
        FeatureStore.open(stage_fingerprint(recipe(), 1))
    verified = verify(recipe())
    assert all(foreign.name in shard.reason for shard in verified.damaged)
    assert verified.damaged


@pytest.mark.parametrize("text", ["not JSON", '{"image": "another"}'])
def test_damaged_fingerprint_file_is_rewritten_and_shards_are_kept(recipe: Load, text: str) -> None:
    extract(recipe())
    file = store_folder(recipe()) / "fingerprint.json"
    original = file.read_text()
    file.write_text(text)
    assert verify(recipe()).sound
    assert len(FeatureStore.open(stage_fingerprint(recipe(), 1))) > 0
    assert extract(recipe()).encoded == 0
    (file.parent / "shard-00001.h5").unlink()
    with pytest.raises(StoreError, match=r"shard-00001\.h5 is damaged"):
        extract(recipe())
    verify(recipe())
    extract(recipe())
    assert file.read_text() == original


def test_verify_without_a_manifest_is_an_error(recipe: Load) -> None:
    extract(recipe())
    (store_folder(recipe()) / "manifest.json").unlink()
    with pytest.raises(StoreError, match=r"manifest.* 3 shards"):
        verify(recipe())
    extract(recipe())
    assert verify(recipe()).sound


def test_read_only_store_is_verified_without_a_lock(recipe: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    extract(recipe())
    flip_bit(store_folder(recipe()) / "shard-00001.h5", 0.5)

    def read_only(*_: object, **_options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        patch.setattr(filelock.FileLock, "acquire", read_only)
        patch.setattr(Path, "rename", read_only)
        with pytest.raises(StoreError, match="Read-only file system") as caught:
            verify(recipe())
    assert "shard-00001.h5" in caught.value.hint


def test_prune_keeps_the_stores_of_a_recipes_variants(toy: Path) -> None:
    with (toy / "recipe.yaml").open("a") as file:
        file.write("sweep: {axes: {vision.layer: [-1, -2]}}\n")
    for layer in (-1, -2, 0):
        assert run_cli("extract", "-o", f"vision.layer={layer}", cwd=toy).exit_code == 0
    for arguments in (("-r", "recipe.yaml"), ("recipe.yaml",)):
        planned = run_cli("cache", "prune", *arguments, "--dry-run", "--json", cwd=toy)
        assert planned.exit_code == 0, planned.stderr
        assert len(planned.json()["stores"]) == 1
