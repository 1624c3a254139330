"""`llavactl extract` killed at moments seen from outside, and run again: the store of an uninterrupted run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llavactl.features import FeatureStore, stage_fingerprint
from llavactl.features.manifest import read_manifest
from llavactl.recipe.frame import Recipe
from llavactl.recipe.load import load_recipe
from llavactl.testing import toy_photos, toy_records

IMAGES = 60


@pytest.fixture
def recipe(toy: Path) -> Recipe:
    shutil.rmtree(toy / "images")
    toy_records(toy / "records.json", toy_photos(toy / "images", IMAGES))
    path = toy / "recipe.yaml"
    path.write_text(path.read_text().replace("shard_images: 5, batch_size: 4", "shard_images: 4, batch_size: 2"))
    return load_recipe(path)


def start(toy: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "llavactl", "extract", "-r", str(toy / "recipe.yaml")],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=toy,
    )  # fmt: skip


def kill_when(process: subprocess.Popen[bytes], seen: Callable[[], bool]) -> None:
    while process.poll() is None:
        if seen():
            process.send_signal(signal.SIGKILL)
            process.wait()
            return
        time.sleep(0.001)
    raise AssertionError(f"it ended before it could be killed: {process.communicate()[1].decode()}")


def listed(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and modification time of the shards that the manifest lists; nothing while there is none."""
    manifest = read_manifest(folder)
    paths = [folder / shard.file for shard in manifest.shards] if manifest else []
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".h5", ".json")}


@pytest.mark.parametrize("shards", [pytest.param(0, marks=pytest.mark.slow), 6])
def test_killed_and_run_again_is_uninterrupted(
    toy: Path, recipe: Recipe, home: Path, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    made_with = stage_fingerprint(recipe, 1)
    folder = home / "cache" / "features" / made_with.id
    kill_when(
        start(toy),
        lambda: len(listed(folder)) >= shards and any(folder.glob("*.partial")),
    )
    before = listed(folder)
    assert shards <= len(before) < IMAGES // 4
    again = start(toy)
    assert again.wait() == 0
    after = listed(folder)
    assert {name: after[name] for name in before} == before, "a finished shard was touched"
    assert len(after) == IMAGES // 4
    store = FeatureStore.open(made_with)
    assert len(store) == IMAGES
    monkeypatch.setenv("LLAVACTL_HOME", str(home / "uninterrupted"))
    assert start(toy).wait() == 0
    whole = FeatureStore.open(made_with)
    assert whole.folder != store.folder
    assert content(store.folder) == content(whole.folder), "byte for byte"


def test_two_extracts_at_once(toy: Path, recipe: Recipe, home: Path) -> None:
    """One does the work; the other is refused in words, or comes when it is done."""
    processes = [start(toy) for _ in range(2)]
    ended = [(process.communicate()[1].decode(), process.returncode) for process in processes]
    assert 0 in [code for _, code in ended]
    for message, code in ended:
        assert code in (0, 1)
        assert code == 0 or "another process is writing to the feature store" in message
        assert "Traceback" not in message
    assert len(FeatureStore.open(stage_fingerprint(recipe, 1))) == IMAGES
