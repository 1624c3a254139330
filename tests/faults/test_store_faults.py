"""`llavactl extract` with full and read-only disks, wrong clocks and damaged shards, on real file systems if possible.

Injected errors (EIO, a full disk where nothing can be mounted) are in tests/features/test_store.py.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llavactl import StoreError
from llavactl.features import FeatureStore, stage_fingerprint
from llavactl.features.manifest import read_manifest
from llavactl.recipe.frame import Recipe
from llavactl.recipe.load import load_recipe
from llavactl.testing import run_cli, toy_photos, toy_records
from llavactl.verbs import extract as verb
from llavactl.verbs.cache import verify
from llavactl.verbs.extract import extract

IMAGES = 12


@pytest.fixture
def recipe(toy: Path) -> Recipe:
    """The toy recipe with one image per shard: 12 shards of 7 kB."""
    path = toy / "recipe.yaml"
    path.write_text(path.read_text().replace("shard_images: 5, batch_size: 4", "shard_images: 1, batch_size: 2"))
    return load_recipe(path)


@pytest.fixture
def remount(home: Path, small_disk: Callable[[Path, str], None]) -> Callable[[str], None]:
    """LLAVACTL_HOME on a separate tmpfs, which ``remount("size=64k")`` changes."""
    small_disk(home, "size=256k")
    return lambda options: small_disk(home, f"remount,{options}")


def store(recipe: Recipe) -> FeatureStore:
    return FeatureStore.open(stage_fingerprint(recipe, 1))


def features(recipe: Recipe) -> dict[bytes, bytes]:
    opened = store(recipe)
    return {key: opened.read(key.decode()).tobytes() for key in opened.keys}


def shards(recipe: Recipe) -> dict[str, tuple[int, int]]:
    """Inode and modification time of every listed shard."""
    folder = store(recipe).folder
    manifest = read_manifest(folder)
    assert manifest
    stats = {entry.file: (folder / entry.file).stat() for entry in manifest.shards}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def unchanged(before: dict[str, tuple[int, int]], recipe: Recipe) -> bool:
    """Whether all shards in ``before`` are still listed and untouched."""
    after = shards(recipe)
    return {name: after.get(name) for name in before} == before


@pytest.fixture
def expected(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[bytes, bytes]:
    """The features of an undisturbed extraction, by key."""
    with monkeypatch.context() as patch:
        patch.setenv("LLAVACTL_HOME", str(tmp_path / "expected"))
        extract(recipe)
        return features(recipe)


def test_full_disk(
    recipe: Recipe, expected: dict[bytes, bytes], remount: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    remount("size=80k")
    with pytest.raises(StoreError, match="GB"):
        extract(recipe)
    with monkeypatch.context() as patch:
        patch.setattr(verb, "free_bytes", lambda: 1 << 40)  # the check passed before other programs filled the disk
        with pytest.raises(StoreError, match="No space left on device") as caught:
            extract(recipe)
    assert "disk space" in caught.value.hint
    before = shards(recipe)
    assert 1 < len(before) < IMAGES
    assert not list(store(recipe).folder.glob("*.partial"))
    assert verify().sound
    remount("size=1m")
    # A shard may have been renamed when there was no space left to list it: it is complete and gets listed now.
    assert extract(recipe).encoded in (IMAGES - len(before), IMAGES - len(before) - 1)
    assert unchanged(before, recipe)
    assert features(recipe) == expected


def test_read_only_disk_is_still_read(
    recipe: Recipe, expected: dict[bytes, bytes], toy: Path, remount: Callable[[str], None]
) -> None:
    extract(recipe)
    remount("ro")
    assert features(recipe) == expected
    assert extract(recipe).encoded == 0
    toy_records(toy / "records.json", toy_photos(toy / "images", IMAGES + 3))
    result = run_cli("extract", cwd=toy)
    assert result.exit_code == 1
    assert "Read-only file system" in result.stderr
    assert "LLAVACTL_HOME" in result.stderr
    remount("rw")
    before = shards(recipe)
    assert extract(recipe).encoded == 3
    assert unchanged(before, recipe)


@pytest.mark.parametrize("mtime_s", [0, 4_000_000_000])
def test_jumping_clock_changes_nothing(
    recipe: Recipe, expected: dict[bytes, bytes], toy: Path, monkeypatch: pytest.MonkeyPatch, mtime_s: int
) -> None:
    rng = random.Random(mtime_s)
    monkeypatch.setattr(time, "time", lambda: rng.uniform(0, 4e9))
    monkeypatch.setattr(time, "time_ns", lambda: rng.randrange(4 * 10**18))
    photos = sorted((toy / "images").iterdir())
    toy_records(toy / "records.json", photos[:7])
    extract(recipe)
    for path in [store(recipe).folder, *store(recipe).folder.iterdir(), *photos]:
        os.utime(path, (mtime_s, mtime_s))
    before = shards(recipe)
    toy_records(toy / "records.json", photos)
    report = extract(recipe)
    assert (report.stored_before, report.encoded) == (7, IMAGES - 7)
    assert unchanged(before, recipe)
    assert features(recipe) == expected
    assert verify().sound


@pytest.mark.parametrize("damage", ["flipped bit", "truncated"])
def test_damaged_shard_is_named_set_aside_and_recomputed(
    recipe: Recipe, expected: dict[bytes, bytes], toy: Path, damage: str
) -> None:
    """With the commands that users run; damage at any position: tests/features/test_maintenance.py."""
    extract(recipe)
    rng, before = random.Random(damage), shards(recipe)
    shard_file = store(recipe).folder / rng.choice(sorted(before))
    data = bytearray(shard_file.read_bytes())
    if damage == "flipped bit":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    else:
        del data[rng.randrange(len(data)) :]
    shard_file.write_bytes(data)
    result = run_cli("cache", "verify", "--json", cwd=toy)
    assert (result.exit_code, [shard["file"] for shard in result.json()["damaged"]]) == (1, [shard_file.name])
    assert "llavactl extract" in result.stderr
    assert shard_file.with_name(f"{shard_file.name}.damaged").read_bytes() == data
    assert run_cli("cache", "verify", cwd=toy).exit_code == 0
    assert extract(recipe).encoded == 1
    del before[shard_file.name]
    assert unchanged(before, recipe)
    assert features(recipe) == expected
