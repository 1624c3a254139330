"""Damage is found, named and set aside, and the next extract makes just those images again."""

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
from llavactl.verbs.cache import info, prune, verify
from llavactl.verbs.extract import extract

Load = Callable[..., Recipe]


def folder(recipe: Recipe) -> Path:
    return FeatureStore.open(stage_fingerprint(recipe, 1)).folder


def contents(recipe: Recipe, images: list[ImageFile]) -> np.ndarray:
    features = open_features(recipe, 1)
    return np.stack([features.load(image) for image in images])


def flip(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 4
    path.write_bytes(data)


def truncate(path: Path, _at: float) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def remove(path: Path, _at: float) -> None:
    path.unlink()


HARMS = [(flip, 0.0), (flip, 0.3), (flip, 0.9), (flip, 1.0), (truncate, 0.0), (remove, 0.0)]


@pytest.mark.parametrize(("harm", "at"), HARMS)
def test_damage_is_found_and_remade(
    recipe: Load, images: list[ImageFile], harm: Callable[[Path, float], None], at: float
) -> None:
    report = extract(recipe())
    whole = contents(recipe(), images)
    place = folder(recipe())
    victim = place / "shard-00001.h5"
    others = {path: path.stat().st_ino for path in place.glob("*.h5") if path != victim}
    harm(victim, at)
    found = verify(recipe())
    assert (found.sound, [each.file for each in found.damaged]) == (False, [victim.name])
    assert found.damaged[0].reason
    assert not victim.exists()
    assert victim.with_name("shard-00001.h5.damaged").exists() is (harm is not remove)
    assert verify(recipe()).sound
    with pytest.raises(StoreError, match=f"{found.damaged[0].images} images have no features yet"):
        open_features(recipe(), 1).contents(images)
    again = extract(recipe())
    assert again.encoded == found.damaged[0].images < report.encoded
    assert np.array_equal(contents(recipe(), images), whole)
    assert {path: path.stat().st_ino for path in others} == others


def test_a_sound_store_is_sound_and_untouched(recipe: Load) -> None:
    report = extract(recipe())
    before = {path: path.stat().st_mtime_ns for path in folder(recipe()).iterdir()}
    found = verify()
    assert (found.sound, found.stores, found.shards, found.images) == (True, 1, 3, 12)
    assert found.bytes == report.bytes
    assert {path: path.stat().st_mtime_ns for path in folder(recipe()).iterdir()} == before


def test_verify_without_a_recipe_sees_every_store_and_with_one_its_own(recipe: Load) -> None:
    extract(recipe("stage1.image=square"))
    extract(recipe("vision.layer=-3"))
    assert verify().stores == 3
    assert verify(recipe("stage1.image=square")).stores == 2
    assert verify(recipe()).stores == 1
    flip(folder(recipe("vision.layer=-3")) / "shard-00000.h5", 0.9)
    assert verify(recipe()).sound
    assert not verify().sound


def test_verify_waits_for_no_writer(recipe: Load) -> None:
    extract(recipe())
    made_with = stage_fingerprint(recipe(), 1)
    shape = FeatureStore.open(made_with).shape
    with StoreWriter(made_with, shape, 4), pytest.raises(StoreError, match="another process is writing"):
        verify()


def test_info_shows_what_is_stored_and_what_is_missing(recipe: Load) -> None:
    assert info().stores == ()
    assert info(recipe()).missing == (stage_fingerprint(recipe(), 1).id,)
    report = extract(recipe())
    found = info(recipe())
    assert found == info()
    assert (found.images, found.bytes, found.missing) == (12, report.bytes, ())
    store = found.stores[0]
    assert (store.images, store.shards, store.undecodable, store.grid, store.width) == (12, 3, 0, (2, 2), 32)
    assert store.fingerprint == stage_fingerprint(recipe(), 1).fields


def test_prune_removes_what_no_recipe_needs(recipe: Load, images: list[ImageFile]) -> None:
    ours, other = recipe("stage1.image=square"), recipe("vision.layer=-3")
    extract(ours)
    extract(other)
    whole = contents(ours, images)
    unneeded = stage_fingerprint(other, 1).id
    assert prune(ours, dry_run=True).stores == prune(ours).stores == (unneeded,)
    assert {store.id for store in info().stores} == {stage_fingerprint(ours, stage).id for stage in (1, 2)}
    assert np.array_equal(contents(ours, images), whole)
    assert prune(ours).stores == ()
    extract(other)
    assert prune(ours, other).stores == ()


def test_prune_removes_debris_and_without_a_recipe_nothing_else(recipe: Load, images: list[ImageFile]) -> None:
    extract(recipe())
    whole = contents(recipe(), images)
    for name in ("shard-00007.h5.partial", "shard-00001.h5.damaged", ".manifest.json.x1"):
        (folder(recipe()) / name).write_bytes(b"12345")
    planned = prune(dry_run=True)
    assert (planned.stores, len(planned.files), planned.bytes) == ((), 3, 15)
    assert len(info().stores[0].leftovers) == 3
    assert prune().files == planned.files
    assert prune().files == ()
    assert np.array_equal(contents(recipe(), images), whole)


def test_a_store_being_written_is_not_pruned(recipe: Load) -> None:
    other = recipe("vision.layer=-3")
    extract(other)
    made_with = stage_fingerprint(other, 1)
    with StoreWriter(made_with, FeatureStore.open(made_with).shape, 4) as writer:
        with pytest.raises(StoreError, match="another process is writing"):
            prune(recipe())
        writer.append([content_key(b"x")], np.zeros((1, 4, 32), np.float16))
    assert len(FeatureStore.open(made_with)) == 13


def test_a_shard_swapped_for_another_stores_is_damage(recipe: Load) -> None:
    with StoreWriter(stage_fingerprint(recipe(), 1), FeatureShape((2, 2), 32), 4) as writer:
        writer.append([content_key(b"x")], np.zeros((1, 4, 32), np.float16))
    extract(recipe("vision.layer=-3"))
    here, there = folder(recipe()), folder(recipe("vision.layer=-3"))
    (here / "shard-00000.h5").write_bytes((there / "shard-00000.h5").read_bytes())
    assert not verify(recipe()).sound


def test_a_folder_with_another_stores_content_is_damage(recipe: Load) -> None:
    extract(recipe())
    extract(recipe("vision.layer=-3"))
    here, there = folder(recipe()), folder(recipe("vision.layer=-3"))
    for path in there.iterdir():
        (here / path.name).write_bytes(path.read_bytes())
    with pytest.raises(StoreError, match="holds features of another fingerprint"):
        FeatureStore.open(stage_fingerprint(recipe(), 1))
    found = verify(recipe())
    assert all(there.name in each.reason for each in found.damaged)
    assert found.damaged


@pytest.mark.parametrize("text", ["no JSON", '{"image": "another"}'])
def test_a_damaged_fingerprint_file_costs_no_shard_and_is_written_again(recipe: Load, text: str) -> None:
    extract(recipe())
    file = folder(recipe()) / "fingerprint.json"
    whole = file.read_text()
    file.write_text(text)
    assert verify(recipe()).sound
    assert len(FeatureStore.open(stage_fingerprint(recipe(), 1))) > 0
    assert extract(recipe()).encoded == 0
    (file.parent / "shard-00001.h5").unlink()
    with pytest.raises(StoreError, match=r"shard-00001\.h5 is damaged"):
        extract(recipe())
    verify(recipe())
    extract(recipe())
    assert file.read_text() == whole


def test_shards_without_a_manifest_are_not_called_sound(recipe: Load) -> None:
    extract(recipe())
    (folder(recipe()) / "manifest.json").unlink()
    with pytest.raises(StoreError, match=r"no manifest, and so no checksums of its \d+ shards"):
        verify(recipe())
    extract(recipe())
    assert verify(recipe()).sound


def test_a_store_that_nobody_can_write_is_hashed_without_a_lock(recipe: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    extract(recipe())
    flip(folder(recipe()) / "shard-00001.h5", 0.5)

    def read_only(*_: object, **_more: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        patch.setattr(filelock.FileLock, "acquire", read_only)
        patch.setattr(Path, "rename", read_only)
        with pytest.raises(StoreError, match="can't be set aside: Read-only file system") as caught:
            verify(recipe())
    assert "shard-00001.h5" in caught.value.hint
