"""`llavactl extract` killed at arbitrary moments and run again gives the store of an uninterrupted run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llavactl.features import FeatureStore, stage_fingerprint
from llavactl.features.manifest import read_manifest
from llavactl.recipe.frame import Recipe
from llavactl.recipe.load import load_recipe
from llavactl.testing import toy_photos, toy_records

SHARDS = 40
SHARD_IMAGES = 4
MAX_CHANGES = 40
"""After so many observed changes of its store, an extract has finished some shards and still has many to do."""

FORK_SERVER = """
import os, sys
import h5py, torch
from transformers import CLIPImageProcessor, CLIPVisionModel
from llavactl.cli import main
from llavactl.verbs import extract
torch.set_num_threads(1)
for line in sys.stdin:
    first, *rest = line.rstrip("\\n").split("\\t")
    if first == "wait":
        print(os.waitstatus_to_exitcode(os.waitpid(int(rest[0]), 0)[1]), flush=True)
    elif child := os.fork():
        print(child, flush=True)
    else:
        os.environ["LLAVACTL_HOME"] = first
        output = os.open(rest.pop(0), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.nice(5)  # so that the observing process can keep up
        main(rest)
"""


class ForkServer:
    """Starts llavactl by forking a process that has imported everything, in 0.2 s instead of 5."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin
        assert process.stdout
        self._requests, self._replies = process.stdin, process.stdout

    def start(self, home: Path, toy: Path) -> int:
        """The id of a process that extracts the recipe in ``toy`` and writes its output to ``toy/output``."""
        return self._call(home, toy / "output", "extract", "-r", toy / "recipe.yaml")

    def wait(self, process: int) -> int:
        """The exit code of ``process``, or minus the signal that killed it."""
        return self._call("wait", process)

    def _call(self, *words: object) -> int:
        self._requests.write("\t".join(map(str, words)) + "\n")
        self._requests.flush()
        return int(self._replies.readline())


@pytest.fixture(scope="module")
def fork_server() -> Iterator[ForkServer]:
    with subprocess.Popen(
        [sys.executable, "-c", FORK_SERVER], env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        yield ForkServer(process)
        assert process.stdin
        process.stdin.close()


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


def kill_after(process: int, changes: int, folder: Path) -> None:
    """Send SIGKILL after ``changes`` observed changes of ``folder``, unless the process ends before."""
    last = file_states(folder)
    while changes and Path(f"/proc/{process}/exe").exists():
        time.sleep(0.0002)
        now = file_states(folder)
        changes, last = changes - (now != last), now
    if not changes:
        os.kill(process, signal.SIGKILL)


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
def test_resumed_extract_equals_uninterrupted_extract(
    toy: Path, home: Path, fork_server: ForkServer, kills: int
) -> None:
    """A store that is completed between two kills is compared and removed, and a new one is started."""
    recipe, rng = recipe_with_images(toy, SHARDS * SHARD_IMAGES), random.Random(kills)
    stores = Path("cache", "features", stage_fingerprint(recipe, 1).id)
    assert fork_server.wait(fork_server.start(home / "uninterrupted", toy)) == 0
    expected, folder = content(home / "uninterrupted" / stores), home / stores
    assert len(expected) == SHARDS + 2
    before: dict[str, tuple[int, int]] = {}
    changes, most_shards = MAX_CHANGES, 0
    while kills or before:
        process = fork_server.start(home, toy)
        kill_after(process, changes if kills else -1, folder)
        code, after = fork_server.wait(process), listed_shards(folder)
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


def test_concurrent_extracts(toy: Path, home: Path, fork_server: ForkServer) -> None:
    """One does the work; the other is refused, or starts after the first has finished."""
    recipe = recipe_with_images(toy, 60)
    processes = [fork_server.start(home, toy) for _ in range(2)]
    codes = sorted(fork_server.wait(process) for process in processes)
    output = (toy / "output").read_text()
    assert codes in ([0, 0], [0, 1])
    assert ("another process" in output) is (codes == [0, 1])
    assert "Traceback" not in output
    assert len(FeatureStore.open(stage_fingerprint(recipe, 1))) == 60
