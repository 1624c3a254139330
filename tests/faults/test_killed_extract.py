"""`llavactl extract` killed at moments seen from outside, and run again: the store of an uninterrupted run."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llavactl.features import FeatureStore, stage_fingerprint
from llavactl.features.manifest import read_manifest
from llavactl.recipe.frame import Recipe
from llavactl.recipe.load import load_recipe
from llavactl.testing import toy_photos, toy_records

SHARDS = 40
SHARD_IMAGES = 4
LATE = 40
"""So many changes of its store are seen when an extract has finished some shards and is far from its end."""

NURSERY = """
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
        said = os.open(rest.pop(0), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.nice(5)  # whoever watches it must see what it does
        main(rest)
"""


class Nursery:
    """Processes of llavactl, forks of one that has imported everything: each takes 0.2 s to begin, not 5."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin
        assert process.stdout
        self._ask, self._told = process.stdin, process.stdout

    def start(self, home: Path, toy: Path) -> int:
        """The number of a process that extracts the recipe in ``toy``, and says what it has to say in ``toy/said``."""
        return self._call(home, toy / "said", "extract", "-r", toy / "recipe.yaml")

    def ended(self, process: int) -> int:
        """How it ended: its exit code, or minus the signal that killed it."""
        return self._call("wait", process)

    def _call(self, *words: object) -> int:
        self._ask.write("\t".join(map(str, words)) + "\n")
        self._ask.flush()
        return int(self._told.readline())


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with subprocess.Popen(
        [sys.executable, "-c", NURSERY], env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        yield Nursery(process)
        assert process.stdin
        process.stdin.close()


def with_images(toy: Path, count: int) -> Recipe:
    """The toy recipe about ``count`` images, few a shard."""
    shutil.rmtree(toy / "images")
    toy_records(toy / "records.json", toy_photos(toy / "images", count))
    path = toy / "recipe.yaml"
    sizes = f"shard_images: {SHARD_IMAGES}, batch_size: 2"
    path.write_text(path.read_text().replace("shard_images: 5, batch_size: 4", sizes))
    return load_recipe(path)


def seen(folder: Path) -> set[tuple[str, int, int]]:
    """What shows that a writer got on: the files of its store, how large they are, when they were last changed."""
    found = set()
    for entry in os.scandir(folder) if folder.exists() else ():
        try:
            status = entry.stat()
        except FileNotFoundError:
            continue  # it has just been renamed
        found.add((entry.name, status.st_size, status.st_mtime_ns))
    return found


def kill_after(process: int, steps: int, folder: Path) -> None:
    """kill -9 as soon as ``folder`` was seen to change so many times, unless the process ends before."""
    last = seen(folder)
    while steps and Path(f"/proc/{process}/exe").exists():
        time.sleep(0.0002)
        now = seen(folder)
        steps, last = steps - (now != last), now
    if not steps:
        os.kill(process, signal.SIGKILL)


def listed(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and modification time of the shards that the manifest lists; nothing while there is none."""
    manifest = read_manifest(folder)
    paths = [folder / shard.file for shard in manifest.shards] if manifest else []
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".h5", ".json")}


@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")
@pytest.mark.parametrize("kills", [4, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_and_run_again_is_uninterrupted(toy: Path, home: Path, nursery: Nursery, kills: int) -> None:
    """A store that gets finished between two kills is compared, and the next one begun."""
    recipe, chance = with_images(toy, SHARDS * SHARD_IMAGES), random.Random(kills)
    stores = Path("cache", "features", stage_fingerprint(recipe, 1).id)
    assert nursery.ended(nursery.start(home / "uninterrupted", toy)) == 0
    whole, folder = content(home / "uninterrupted" / stores), home / stores
    assert len(whole) == SHARDS + 2
    before: dict[str, tuple[int, int]] = {}
    steps, most = LATE, 0
    while kills or before:
        process = nursery.start(home, toy)
        kill_after(process, steps if kills else -1, folder)
        code, after = nursery.ended(process), listed(folder)
        assert {name: after[name] for name in before} == before, "a finished shard was touched"
        if code == 0:
            assert content(folder) == whole, "byte for byte"
            shutil.rmtree(folder)
            before = {}
            continue
        assert code == -signal.SIGKILL, (toy / "said").read_text()
        assert len(list(folder.glob("shard-*.partial"))) <= 1, "more than a shard was lost"
        before, kills, steps, most = after, kills - 1, chance.randrange(1, LATE), max(most, len(after))
    assert most, "no kill met a store with a finished shard"


def test_two_extracts_at_once(toy: Path, home: Path, nursery: Nursery) -> None:
    """One does the work; the other is refused in words, or comes when it is done."""
    recipe = with_images(toy, 60)
    processes = [nursery.start(home, toy) for _ in range(2)]
    codes = sorted(nursery.ended(process) for process in processes)
    said = (toy / "said").read_text()
    assert codes in ([0, 0], [0, 1])
    assert ("another process is writing to the feature store" in said) is (codes == [0, 1])
    assert "Traceback" not in said
    assert len(FeatureStore.open(stage_fingerprint(recipe, 1))) == 60
