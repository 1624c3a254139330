"""A writer killed at any step leaves finished shards untouched, and the next writer continues."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llavactl import FeatureShape
from llavactl.features import FeatureStore, Fingerprint, StoreWriter, content_key
from llavactl.features.manifest import read_manifest, store_dir

FINGERPRINT = Fingerprint({"backbone": "toy"})
SHAPE = FeatureShape((2, 3), 4)
IMAGES = 11
SHARD_IMAGES = 3

WRITER_SCRIPT = '''
import os, signal, sys
from pathlib import Path

def die_at(owner, name, call, after):
    """Kill this process before or ``after`` the ``call``-th call of ``owner.name``."""
    real, calls = getattr(owner, name), 0
    def wrapper(*args, **options):
        nonlocal calls
        calls += 1
        if calls == call and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **options)
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, wrapper)

step, call, after, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "after", sys.argv[4]
sys.path.insert(0, folder)
import test_killed_writer as test
from llavactl.features import manifest, shards, writer
owners = {"_create_layout": shards, "_write": shards, "fsync": os, "rename": Path, "replace": Path,
          "sync_folder": writer, "checksum": writer, "unlink": Path}
die_at(owners[step], step, call, after)
test.write_all()
print("survived")
'''


def rows(start: int, count: int) -> np.ndarray:
    return (
        np.random.default_rng(0)
        .standard_normal((IMAGES, SHAPE.patches, SHAPE.width))
        .astype(np.float16)[start:][:count]
    )


def keys() -> list[str]:
    return [content_key(b"%d" % index) for index in range(IMAGES)]


def write_all() -> None:
    """Store the missing images, two at a time."""
    with StoreWriter(FINGERPRINT, SHAPE, SHARD_IMAGES) as writer:
        store = FeatureStore.open(FINGERPRINT)
        missing = [index for index, key in enumerate(keys()) if key not in store]
        for start in range(0, len(missing), 2):
            batch = missing[start : start + 2]
            writer.append([keys()[index] for index in batch], np.concatenate([rows(index, 1) for index in batch]))


def finished_shards() -> dict[str, tuple[int, int]]:
    """Inode and modification time of every shard listed in the manifest."""
    manifest = read_manifest(store_dir(FINGERPRINT))
    paths = [store_dir(FINGERPRINT) / shard.file for shard in manifest.shards] if manifest else []
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


STEPS = [
    ("_write", 5, "after"), ("fsync", 5, "after"), ("rename", 1, "after"), ("rename", 3, "before"),
    ("sync_folder", 2, "after"), ("replace", 3, "before"), ("rename", 4, "after"),
]  # fmt: skip
SLOW_STEPS = [
    ("_create_layout", 1, "before"), ("_create_layout", 2, "after"), ("_write", 2, "before"), ("fsync", 5, "before"),
    ("checksum", 2, "after"), ("rename", 2, "before"), ("rename", 3, "after"), ("replace", 1, "after"),
    ("replace", 3, "after"), ("rename", 4, "before"), ("_create_layout", 5, "before"), ("replace", 2, "before"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("step", "call", "when"), [*STEPS, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW_STEPS)]
)
def test_store_of_a_killed_writer_is_completed(step: str, call: int, when: str) -> None:
    command = [sys.executable, "-c", WRITER_SCRIPT, step, str(call), when, str(Path(__file__).parent)]
    killed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    before = finished_shards()
    complete = {path.name for path in store_dir(FINGERPRINT).glob("*.h5")}
    assert set(before) <= complete
    write_all()
    after = finished_shards()
    assert {name: after[name] for name in before} == before, "a finished shard was touched"
    assert complete <= set(after), "a complete shard was lost"
    store = FeatureStore.open(FINGERPRINT)
    assert list(store.keys) == sorted(key.encode() for key in keys())
    for index, key in enumerate(keys()):
        assert np.array_equal(store.read(key), rows(index, 1)[0])
    assert {path.name for path in store.folder.iterdir()} == {*after, "manifest.json", "fingerprint.json"}


@pytest.mark.parametrize("stale", ["shard-00001.h5.partial", "short.shard-00001.h5.partial"])
def test_unfinished_files_are_removed(stale: str) -> None:
    write_all()
    path = store_dir(FINGERPRINT) / stale
    path.write_bytes(b"incomplete")
    write_all()
    assert not path.exists()


def test_unlisted_damaged_shard_is_set_aside() -> None:
    write_all()
    path = store_dir(FINGERPRINT) / "shard-00099.h5"
    path.write_bytes(b"not HDF5")
    write_all()
    assert not path.exists()
    assert path.with_name("shard-00099.h5.damaged").exists()
    assert len(FeatureStore.open(FINGERPRINT)) == IMAGES


LIMITED = """
import resource, signal, sys
sys.path.insert(0, sys.argv[1])
import test_killed_writer as test
from llavactl import StoreError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    test.write_all()
except StoreError as error:
    print(error)
"""


@pytest.mark.parametrize("limit", [100, 3000, 6300])
def test_file_size_limit_of_the_system_is_a_store_error(limit: int) -> None:
    """The kernel limits files to ``limit`` bytes, so HDF5 and plain writes really fail."""
    command = [sys.executable, "-c", LIMITED, str(Path(__file__).parent), str(limit)]
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert FINGERPRINT.id in failed.stdout, failed.stderr
    assert not finished_shards()
    write_all()
    assert len(FeatureStore.open(FINGERPRINT)) == IMAGES
