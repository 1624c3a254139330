"""What disks, clocks and rotten bits do to `llavactl extract`, by the real thing where the system lets us.

Injected errors of every kind (EIO, a full disk where nothing can be mounted): tests/features/test_store.py.
"""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
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
    """12 images, one a shard: 7 kB each."""
    path = toy / "recipe.yaml"
    path.write_text(path.read_text().replace("shard_images: 5, batch_size: 4", "shard_images: 1, batch_size: 2"))
    return load_recipe(path)


@pytest.fixture
def remount(home: Path) -> Iterator[Callable[[str], None]]:
    """LLAVACTL_HOME is a file system of its own, which ``remount("size=64k")`` changes."""
    home.mkdir()

    def mount(*arguments: str) -> None:
        subprocess.run(["mount", *arguments, str(home)], check=True, capture_output=True)

    try:
        mount("-t", "tmpfs", "-o", "size=256k", "tmpfs")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"nothing can be mounted here: {error}")
    yield lambda options: mount("-o", f"remount,{options}")
    subprocess.run(["umount", "--lazy", str(home)], check=True)


def store(recipe: Recipe) -> FeatureStore:
    return FeatureStore.open(stage_fingerprint(recipe, 1))


def features(recipe: Recipe) -> dict[bytes, bytes]:
    found = store(recipe)
    return {key: found.read(key.decode()).tobytes() for key in found.keys}


def shards(recipe: Recipe) -> dict[str, tuple[int, int]]:
    """Inode and modification time of every shard that is listed."""
    folder = store(recipe).folder
    manifest = read_manifest(folder)
    assert manifest
    status = {entry.file: (folder / entry.file).stat() for entry in manifest.shards}
    return {name: (each.st_ino, each.st_mtime_ns) for name, each in status.items()}


def kept(before: dict[str, tuple[int, int]], recipe: Recipe) -> bool:
    after = shards(recipe)
    return {name: after.get(name) for name in before} == before


@pytest.fixture
def sound(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[bytes, bytes]:
    """The features that nothing happened to, by key."""
    with monkeypatch.context() as patch:
        patch.setenv("LLAVACTL_HOME", str(tmp_path / "sound"))
        extract(recipe)
        return features(recipe)


def test_a_disk_that_fills_up(
    recipe: Recipe, sound: dict[bytes, bytes], remount: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    remount("size=80k")
    with pytest.raises(StoreError, match="are free"):
        extract(recipe)
    with monkeypatch.context() as patch:
        patch.setattr(verb, "free_bytes", lambda: 1 << 40)  # as before others filled it
        with pytest.raises(StoreError, match="No space left on device") as caught:
            extract(recipe)
    assert "free disk space" in caught.value.hint
    before = shards(recipe)
    assert 1 < len(before) < IMAGES
    assert not list(store(recipe).folder.glob("*.partial"))
    assert verify().sound
    remount("size=1m")
    # One may have been renamed when there was no room left to list it: it is whole, and listed now.
    assert extract(recipe).encoded in (IMAGES - len(before), IMAGES - len(before) - 1)
    assert kept(before, recipe)
    assert features(recipe) == sound


def test_a_disk_that_becomes_read_only_is_still_read(
    recipe: Recipe, sound: dict[bytes, bytes], toy: Path, remount: Callable[[str], None]
) -> None:
    extract(recipe)
    remount("ro")
    assert features(recipe) == sound
    assert extract(recipe).encoded == 0
    toy_records(toy / "records.json", toy_photos(toy / "images", IMAGES + 3))
    result = run_cli("extract", cwd=toy)
    assert result.exit_code == 1
    assert "Read-only file system" in result.stderr
    assert "hint: set LLAVACTL_HOME" in result.stderr
    remount("rw")
    before = shards(recipe)
    assert extract(recipe).encoded == 3
    assert kept(before, recipe)


@pytest.mark.parametrize("then_s", [0, 4_000_000_000])
def test_a_clock_that_jumps_changes_nothing(
    recipe: Recipe, sound: dict[bytes, bytes], toy: Path, monkeypatch: pytest.MonkeyPatch, then_s: int
) -> None:
    chance = random.Random(then_s)
    monkeypatch.setattr(time, "time", lambda: chance.uniform(0, 4e9))
    monkeypatch.setattr(time, "time_ns", lambda: chance.randrange(4 * 10**18))
    photos = sorted((toy / "images").iterdir())
    toy_records(toy / "records.json", photos[:7])
    extract(recipe)
    for path in [store(recipe).folder, *store(recipe).folder.iterdir(), *photos]:
        os.utime(path, (then_s, then_s))
    before = shards(recipe)
    toy_records(toy / "records.json", photos)
    report = extract(recipe)
    assert (report.stored_before, report.encoded) == (7, IMAGES - 7)
    assert kept(before, recipe)
    assert features(recipe) == sound
    assert verify().sound


@pytest.mark.parametrize("harm", ["one bit", "cut short"])
def test_what_rots_is_named_set_aside_and_made_again(
    recipe: Recipe, sound: dict[bytes, bytes], toy: Path, harm: str
) -> None:
    """As users meet it; any place in a shard: tests/features/test_maintenance.py."""
    extract(recipe)
    chance, before = random.Random(harm), shards(recipe)
    victim = store(recipe).folder / chance.choice(sorted(before))
    data = bytearray(victim.read_bytes())
    if harm == "one bit":
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    else:
        del data[chance.randrange(len(data)) :]
    victim.write_bytes(data)
    result = run_cli("cache", "verify", "--json", cwd=toy)
    assert (result.exit_code, [each["file"] for each in result.json()["damaged"]]) == (1, [victim.name])
    assert "hint: `llavactl extract`" in result.stderr
    assert victim.with_name(f"{victim.name}.damaged").read_bytes() == data
    assert run_cli("cache", "verify", cwd=toy).exit_code == 0
    assert extract(recipe).encoded == 1
    del before[victim.name]
    assert kept(before, recipe)
    assert features(recipe) == sound
