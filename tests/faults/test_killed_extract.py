"""`llavactl extract` killed at arbitrary moments and run again gives the store of an uninterrupted run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llavactl.features import FeatureStore, stage_fingerprint
from llavactl.features.manifest import read_manifest
from llavactl.recipe.frame import Recipe
from llavactl.recipe.load import load_recipe
from llavactl.testing import toy_photos, toy_records

from ..preloaded import Interpreters, Process

SHARDS = 40
SHARD_IMAGES = 4
MAX_CHANGES = 40
"""After so many observed changes of its store, an extract has finished some shards and still has many to do."""

PROGRAM = """
import os
import torch
from llavactl.cli import main
torch.set_num_threads(1)
os.nice(5)  # so that the observing process can keep up
main()
"""

Extracts = Callable[[Path], Process]


@pytest.fixture
def extracts(toy: Path, interpreters: Interpreters) -> Extracts:
    """Starts an extraction of the recipe in ``toy`` with the given user folder; its output goes to ``toy/output``."""

    def extracts(home: Path) -> Process:
        env = {**os.environ, "LLAVACTL_HOME": str(home), "OMP_NUM_THREADS": "1"}
        recipe = str(toy / "recipe.yaml")
        return interpreters.start(PROGRAM, "extract", "-r", recipe, cwd=toy, env=env, output=toy / "output")

    return extracts


def recipe_with_images(toy: Path, count: int) -> Recipe:
    """The toy recipe with ``count`` images and SHARD_IMAGES images per shard."""
    shutil.rmtree(toy / "images")
    toy_records(toy / "records.json", toy_photos(toy / "images", count))
    path = toy / "recipe.yaml"
    sizes = f"shard_images: {SHARD_IMAGES}, batch_size: 2"
    path.write_text(path.read_text().replace("shard_images: 5, batch_size: 4", sizes))
    return load_recipe(path)


def file_states(folder: Path) -> set[tuple[str, int, int]]:
    """Name, size and modification time of every file in ``folder``."""
    states = set()
    for entry in os.scandir(folder) if folder.exists() else ():
        try:
            stat = entry.stat()
        except FileNotFoundError:
            continue  # it was renamed in between
        states.add((entry.name, stat.st_size, stat.st_mtime_ns))
    return states


def kill_after(process: Process, changes: int, folder: Path) -> None:
    """Send SIGKILL after ``changes`` observed changes of ``folder``, unless the process ends before."""
    last = file_states(folder)
    while changes and process.poll() is None:
        time.sleep(0.0002)
        now = file_states(folder)
        changes, last = changes - (now != last), now
    if not changes:
        process.send_signal(signal.SIGKILL)


def listed_shards(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and modification time of the shards listed in the manifest; empty without a manifest."""
    manifest = read_manifest(folder)
    paths = [folder / shard.file for shard in manifest.shards] if manifest else []
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def content(folder: Path) -> dict[str, Any]:
    """The shards and the manifest, without conditions: a shard that was finished but not yet listed has none."""
    files: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".h5"}
    for path in folder.glob("*.json"):
        files[path.name] = {key: value for key, value in json.loads(path.read_text()).items() if key != "conditions"}
    return files


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kills", [2, pytest.param(200, marks=pytest.mark.slow)])
def test_resumed_extract_equals_uninterrupted_extract(toy: Path, home: Path, extracts: Extracts, kills: int) -> None:
    """A store that is completed between two kills is compared and removed, and a new one is started."""
    recipe, rng = recipe_with_images(toy, SHARDS * SHARD_IMAGES), random.Random(kills)
    stores = Path("cache", "features", stage_fingerprint(recipe, 1).id)
    assert extracts(home / "uninterrupted").wait() == 0
    expected, folder = content(home / "uninterrupted" / stores), home / stores
    assert len(expected) == SHARDS + 2
    before: dict[str, tuple[int, int]] = {}
    changes, most_shards = MAX_CHANGES, 0
    while kills or before:
        process = extracts(home)
        kill_after(process, changes if kills else -1, folder)
        code, after = process.wait(), listed_shards(folder)
        assert {name: after[name] for name in before} == before, "a finished shard was touched"
        if code == 0:
            assert content(folder) == expected, "the files differ"
            shutil.rmtree(folder)
            before = {}
            continue
        assert code == -signal.SIGKILL, (toy / "output").read_text()
        assert len(list(folder.glob("shard-*.partial"))) <= 1, "more than a shard was lost"
        before, kills = after, kills - 1
        changes, most_shards = rng.randrange(1, MAX_CHANGES), max(most_shards, len(after))
    assert most_shards, "no kill happened after the first finished shard"


def test_concurrent_extracts(toy: Path, home: Path, extracts: Extracts) -> None:
    """One does the work; the other is refused, or starts after the first has finished."""
    recipe = recipe_with_images(toy, 60)
    processes = [extracts(home) for _ in range(2)]
    codes = sorted(process.wait() for process in processes)
    output = (toy / "output").read_text()
    assert codes in ([0, 0], [0, 1])
    assert ("another process" in output) is (codes == [0, 1])
    assert "Traceback" not in output
    assert len(FeatureStore.open(stage_fingerprint(recipe, 1))) == 60
