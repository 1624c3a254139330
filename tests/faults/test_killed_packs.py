"""`cache export` and `import` killed at any step: the same command completes them, and keeps finished shards."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llavactl import FeatureShape
from llavactl.core.paths import write_json
from llavactl.features import FeatureStore, Fingerprint, StoreWriter, content_key, shard_copy
from llavactl.features.maintenance import verify_store
from llavactl.features.manifest import Manifest, read_manifest, store_dir
from llavactl.features.pack_export import export_pack
from llavactl.features.pack_import import import_pack
from llavactl.features.pack_selection import Selected, StoreSelection

FINGERPRINT = Fingerprint({"backbone": "toy", "dtype": "float16", "format": 1})
SHAPE = FeatureShape((2, 3), 40)
IMAGES = 9
STORED = 2
"""Images that the second machine has before the import, so that one shard is imported in part."""


def keys() -> list[str]:
    return [content_key(b"%d" % index) for index in range(IMAGES)]


def features() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((IMAGES, SHAPE.patches, SHAPE.width)).astype(np.float16)


def write_store(images: slice) -> None:
    with StoreWriter(FINGERPRINT, SHAPE, 3) as writer:
        writer.append(keys()[images], features()[images])


def export(folder: Path) -> None:
    """Exports all images but one, so that one shard is exported in part."""
    source = store_dir(FINGERPRINT)
    manifest = read_manifest(source)
    assert manifest
    wanted = frozenset(key.encode() for key in keys()[1:])
    names = {("/data/images", f"{index}.jpg"): key for index, key in enumerate(keys())}
    selection = StoreSelection(source, FINGERPRINT, manifest, wanted, "toy")
    export_pack(folder, Selected([selection], names), Path("/data"), ["CC0"])


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def finished(folder: Path, manifest: Manifest | None) -> dict[str, tuple[int, int]]:
    """Inode and modification time of every listed shard."""
    paths = [folder / entry.file for entry in manifest.shards] if manifest else []
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


STEPS = (os, "fsync"), (Path, "replace"), (Path, "rename"), (Path, "unlink"), (shard_copy, "_read")


def killed_at(step: int, work: Callable[[], None]) -> bool:
    """Whether a process that does ``work`` was killed before its ``step``-th step; otherwise it has done all of it."""
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL), status
        return status != 0
    calls = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return wrapper

    try:
        shard_copy.COPY_BYTES = 700
        for owner, name in STEPS:
            setattr(owner, name, counted(getattr(owner, name)))
        work()
        os._exit(0)
    finally:
        os._exit(1)


def exports(folder: Path, stride: int) -> int:
    """Kills an export before each of its steps, or some of them, and repeats it; returns the number of steps."""
    write_store(slice(0, IMAGES))
    export(folder / "expected")
    expected = content(folder / "expected")
    for step in count(1, stride):
        pack = folder / "pack" / "expected"  # the name is part of README.md
        pack.parent.mkdir()
        killed = killed_at(step, lambda: export(folder / "pack" / "expected"))
        before = {path: path.stat().st_mtime_ns for path in listed(pack)}
        export(pack)
        assert content(pack) == expected, step
        assert {path: path.stat().st_mtime_ns for path in before} == before, step
        shutil.rmtree(pack.parent)
        if not killed:
            return step
    raise AssertionError


def listed(pack: Path) -> list[Path]:
    """The shards that an interrupted export listed as finished."""
    journal = pack / "pack.json.partial"
    files = json.loads(journal.read_text())["files"] if journal.exists() else {}
    return [pack / name for name in files if name.endswith(".h5")]


def imports(folder: Path, stride: int) -> int:
    """Kills an import before each of its steps, or some of them, and repeats it; returns the number of steps."""
    write_store(slice(0, IMAGES))
    export(folder / "pack")
    for step in count(1, stride):
        os.environ["LLAVACTL_HOME"] = str(folder / f"home-{step}")
        write_store(slice(IMAGES - STORED, IMAGES))
        store = store_dir(FINGERPRINT)
        killed = killed_at(step, lambda: void(import_pack(folder / "pack", Path("/data"))))
        before = finished(store, read_manifest(store))
        import_pack(folder / "pack", Path("/data"))
        opened = FeatureStore.open(FINGERPRINT)
        assert opened.keys.tolist() == sorted(key.encode() for key in keys()[1:]), step
        for key, expected in zip(keys()[1:], features()[1:], strict=True):
            assert np.array_equal(opened.read(key), expected), step
        assert not verify_store(store), step
        after = finished(store, read_manifest(store))
        assert {name: after[name] for name in before} == before, step
        assert {path.name for path in store.iterdir()} == {*after, "manifest.json", "fingerprint.json"}, step
        known = [path.suffix for path in (folder / f"home-{step}/cache/images").iterdir()]
        assert sorted(known) == [".lock", ".npy"], step
        if not killed:
            return step
    raise AssertionError


def void(_: object) -> None:
    pass


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("work", [exports, imports])
def test_a_killed_command_is_completed(work: Callable[[Path, int], int], stride: int, tmp_path: Path) -> None:
    # In a process without other threads, which may fork.
    script = "import sys; sys.path.insert(0, sys.argv[1]); import test_killed_packs as test; test.main(*sys.argv[2:])"
    command = [sys.executable, "-c", script, str(Path(__file__).parent), work.__name__, str(tmp_path), str(stride)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    steps = json.loads((tmp_path / "steps.json").read_text())["steps"]
    assert steps > 20


def main(work: str, folder: str, stride: str) -> None:
    """Runs ``work`` and writes the number of steps at which it was killed."""
    steps = globals()[work](Path(folder), int(stride))
    write_json(Path(folder) / "steps.json", {"steps": steps})
