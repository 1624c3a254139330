"""File systems without locks (some NFS, Lustre and FUSE mounts), and files that are temporarily unreadable."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from llavactl import FeatureShape, StoreError
from llavactl.core import paths
from llavactl.features import FeatureStore, Fingerprint, StoreWriter, content_key, stage_fingerprint
from llavactl.features.manifest import read_manifest
from llavactl.features.parts import Part
from llavactl.features.shards import DamagedShardError
from llavactl.features.writer import exclusive
from llavactl.recipe.frame import Recipe
from llavactl.recipe.load import load_recipe
from llavactl.testing import run_cli
from llavactl.training import checkpoints
from llavactl.verbs.extract import extract

ENOTSUPP = 524
"""A kernel-internal error without a name in the C library, returned by NFS and Lustre."""

NO_LOCKS_SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/file.h>
int flock(int fd, int how) { errno = atoi(getenv("REFUSED")); return -1; }
static int call(const char *name, int fd, int what, void *argument) {
    if (what == F_SETLK || what == F_SETLKW || what == F_GETLK) { errno = atoi(getenv("REFUSED")); return -1; }
    int (*real)(int, int, ...) = dlsym(RTLD_NEXT, name);
    return (real ? real : (int (*)(int, int, ...))dlsym(RTLD_NEXT, "fcntl"))(fd, what, argument);
}
#define WRAP(name) int name(int fd, int what, ...) { \
    va_list rest; va_start(rest, what); return call(#name, fd, what, va_arg(rest, void *)); }
WRAP(fcntl)
WRAP(fcntl64)
"""

COMMANDS = """
import json, sys
from pathlib import Path
from llavactl.teaching.journal import Journal
from llavactl.testing import run_cli
recipe, photo = sys.argv[1:]
for command in (["extract"], ["cache", "verify"], ["cache", "info"], ["train", "--stage", "1"],
                ["chat", "--image", photo, "--prompt", "hi", "--max-new-tokens", "2"]):
    result = run_cli(*command, "-r", recipe, "--json")
    print(json.dumps([command[0], result.exit_code, result.stderr]), flush=True)
    report = result.json()
    assert report.get("sound", True), report
for _ in range(2):
    with Journal(Path(recipe).with_name("journal.sqlite")) as journal:
        journal.start("key", "name", "kind", None)
"""


@pytest.mark.skipif(shutil.which("cc") is None or sys.platform != "linux", reason="needs a C compiler on Linux")
@pytest.mark.parametrize("refused", [errno.ENOLCK, pytest.param(ENOTSUPP, marks=pytest.mark.slow)])
def test_commands_work_on_a_file_system_without_locks(toy: Path, tmp_path: Path, refused: int) -> None:
    """Includes the locks of HDF5 and SQLite, which Python can't patch; SQLite would wait 60 s for one."""
    source, library = tmp_path / "no_locks.c", tmp_path / "no_locks.so"
    source.write_text(NO_LOCKS_SOURCE)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, toy / "recipe.yaml", toy / "images/photo-000.jpg"],
        env={**os.environ, "LD_PRELOAD": str(library), "REFUSED": str(refused)},
        capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [code for _, code, _ in results] == [0] * 5, results


def disable_locks(monkeypatch: pytest.MonkeyPatch, number: int = errno.ENOLCK) -> None:
    def fail(*_: object, **_options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    monkeypatch.setattr(fcntl, "lockf", fail)


@pytest.fixture(params=[errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, ENOTSUPP])
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    disable_locks(monkeypatch, request.param)


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    """A lock file that already exists, created when the file system had locks."""
    (tmp_path / "x.lock").touch()
    return tmp_path / "x.lock"


@pytest.mark.usefixtures("no_locks")
def test_exclusion_without_locks(lock: Path) -> None:
    with paths.exclusive_lock(lock, StoreError("locked")):
        with pytest.raises(StoreError, match="locked") as caught, paths.exclusive_lock(lock, StoreError("locked")):
            pass
        assert "no locks" in caught.value.hint
    with paths.exclusive_lock(lock, StoreError("locked")):
        pass


HOLDER = """
import errno, fcntl, os, sys
from pathlib import Path
from llavactl.core.paths import exclusive_lock
def refuse(*_):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = refuse
with exclusive_lock(Path(sys.argv[1]), ValueError("locked")):
    os._exit(0)
"""


def test_lock_of_a_killed_process_is_taken_over(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run([sys.executable, "-c", HOLDER, lock], check=True)
    assert lock.with_name("x.lock.owner").exists()
    disable_locks(monkeypatch)
    with paths.exclusive_lock(lock, StoreError("locked")):
        pass


def test_error_names_the_owner_file_of_another_machine(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disable_locks(monkeypatch)
    owner = lock.with_name("x.lock.owner")
    owner.write_text(f"1234\nnot-{socket.gethostname()}\n")
    with (
        pytest.raises(StoreError, match="locked") as caught,
        paths.exclusive_lock(lock, StoreError("locked", hint="wait")),
    ):
        pass
    assert str(owner) in caught.value.hint
    owner.unlink()
    with paths.exclusive_lock(lock, StoreError("locked")):
        pass


FINGERPRINT, SHAPE = Fingerprint({"backbone": "toy"}), FeatureShape((1, 2), 3)


def test_parts_write_concurrently_without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    disable_locks(monkeypatch)
    with (
        StoreWriter(FINGERPRINT, SHAPE, 2, Part(0, 2)) as first,
        StoreWriter(FINGERPRINT, SHAPE, 2, Part(1, 2)) as second,
    ):
        for number in range(6):
            (first, second)[number % 2].append([content_key(bytes([number]))], np.zeros((1, 2, 3), np.float16))
        with pytest.raises(StoreError, match="another process"), exclusive(first.folder):
            pass
    assert len(FeatureStore.open(FINGERPRINT)) == 6
    assert not list(first.folder.parent.glob("*.owner"))


@pytest.fixture
def recipe(toy: Path) -> Recipe:
    return load_recipe(toy / "recipe.yaml")


@pytest.fixture
def shard_file(recipe: Recipe) -> Path:
    """A shard of an extracted store."""
    extract(recipe)
    return FeatureStore.open(stage_fingerprint(recipe, 1)).folder / "shard-00001.h5"


def failing(real: Callable[..., Any], failing_path: Path, number: int) -> Callable[..., Any]:
    """``real``, raising OSError ``number`` for the path ``failing_path``."""

    def call(path: Any, *args: Any, **options: Any) -> Any:
        if Path(path) == failing_path:
            raise OSError(number, os.strerror(number))
        return real(path, *args, **options)

    return call


ERRNOS = [
    *(errno.EIO, ENOTSUPP),
    *(
        pytest.param(each, marks=pytest.mark.slow)
        for each in (errno.EACCES, errno.ENOLCK, errno.ESTALE, errno.ETIMEDOUT)
    ),
]


@pytest.mark.parametrize("number", ERRNOS)
@pytest.mark.parametrize("target", ["llavactl.features.maintenance.checksum", "h5py.File", "pathlib.Path.stat"])
def test_verify_leaves_unreadable_shards_unchanged(
    shard_file: Path, toy: Path, monkeypatch: pytest.MonkeyPatch, number: int, target: str
) -> None:
    before = shard_file.read_bytes()
    real = {"h5py.File": h5py.File, "pathlib.Path.stat": Path.stat}.get(target)
    from llavactl.features.shards import checksum

    with monkeypatch.context() as patch:
        patch.setattr(target, failing(real or checksum, shard_file, number))
        result = run_cli("cache", "verify", "--json", cwd=toy)
        report = result.json()
    assert result.exit_code == 1
    assert shard_file.name in result.stderr
    assert (report["sound"], report["damaged"]) == (False, [])
    assert [shard["file"] for shard in report["unchecked"]] == [shard_file.name]
    assert shard_file.read_bytes() == before
    assert run_cli("cache", "verify", cwd=toy).exit_code == 0


def test_verify_distinguishes_damaged_and_unreadable_shards(
    shard_file: Path, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shard_file.with_name("shard-00000.h5")
    data = bytearray(other.read_bytes())
    data[-1] ^= 1
    other.write_bytes(data)
    from llavactl.features import maintenance

    with monkeypatch.context() as patch:
        patch.setattr(maintenance, "checksum", failing(maintenance.checksum, shard_file, errno.EIO))
        report = run_cli("cache", "verify", "--json", cwd=toy).json()
    files = [[shard["file"] for shard in report[kind]] for kind in ("damaged", "unchecked")]
    assert files == [[other.name], [shard_file.name]]
    manifest = read_manifest(shard_file.parent)
    assert manifest
    assert [entry.file for entry in manifest.shards if entry.file in (other.name, shard_file.name)] == [shard_file.name]


@pytest.mark.parametrize("number", ERRNOS)
@pytest.mark.parametrize("target", ["h5py.File", "pathlib.Path.stat", "numpy.memmap"])
def test_unreadable_shard_is_not_reported_as_damaged(
    recipe: Recipe, shard_file: Path, monkeypatch: pytest.MonkeyPatch, number: int, target: str
) -> None:
    real = {"h5py.File": h5py.File, "pathlib.Path.stat": Path.stat, "numpy.memmap": np.memmap}[target]
    with monkeypatch.context() as patch:
        patch.setattr(target, failing(real, shard_file, number))
        with pytest.raises(StoreError) as caught:
            read_all(recipe)
    assert not isinstance(caught.value, DamagedShardError)
    assert str(shard_file) in caught.value.message
    assert "cache verify" not in caught.value.hint
    assert read_all(recipe) == 12


def read_all(recipe: Recipe) -> int:
    """Read all features and return their number."""
    store = FeatureStore.open(stage_fingerprint(recipe, 1))
    return len([store.read(key.decode()) for key in store.keys])


@pytest.mark.parametrize("target", ["h5py.File", "llavactl.features.writer.checksum"])
def test_unlisted_unreadable_shard_is_not_set_aside(
    recipe: Recipe, shard_file: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    from llavactl.features.shards import checksum

    (shard_file.parent / "manifest.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(target, failing(h5py.File if target == "h5py.File" else checksum, shard_file, errno.ENOLCK))
        with pytest.raises(StoreError) as caught:
            extract(recipe)
    assert str(shard_file) in caught.value.message
    assert not list(shard_file.parent.glob("*.damaged"))
    extract(recipe)
    manifest = read_manifest(shard_file.parent)
    assert manifest
    assert manifest.images == 12


@pytest.fixture
def make_unreadable(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """A function that makes paths with the given suffix unreadable, even for root."""
    suffixes: set[str] = set()
    read_text, open_file, iterdir = Path.read_text, Path.open, Path.iterdir

    def guard(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Path, *args: Any, **options: Any) -> Any:
            if any(path.as_posix().endswith(f"/{suffix}") for suffix in suffixes):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real(path, *args, **options)

        return call

    with monkeypatch.context() as patch:
        for name, real in (("read_text", read_text), ("open", open_file), ("iterdir", iterdir)):
            patch.setattr(Path, name, guard(real))
        yield suffixes.add


@pytest.mark.parametrize("command", [("extract",), ("cache", "info"), ("cache", "verify"), ("train", "--stage", "1")])
def test_error_of_an_unreadable_manifest_does_not_suggest_removing_it(
    shard_file: Path, toy: Path, make_unreadable: Callable[[str], None], command: tuple[str, ...]
) -> None:
    make_unreadable("manifest.json")
    result = run_cli(*command, cwd=toy)
    assert result.exit_code == 1
    assert str(shard_file.parent / "manifest.json") in result.stderr
    assert "Permission denied" in result.stderr
    assert "remove" not in result.stderr


def test_unlistable_stores_are_an_error(shard_file: Path, toy: Path, make_unreadable: Callable[[str], None]) -> None:
    make_unreadable("features")
    result = run_cli("cache", "info", cwd=toy.parent)
    assert result.exit_code == 1
    assert str(shard_file.parents[1]) in result.stderr


TRAIN_OPTIONS = ["-o", "features.mode=live", "-o", "stage1.max_steps=4", "-o", "stage1.keep_last=3"]


@pytest.mark.parametrize(
    "name",
    [
        *("state.json", "checkpoints"),
        pytest.param("shard-00001-model-00001-of-00001.safetensors", marks=pytest.mark.slow),
        pytest.param("report.json", marks=pytest.mark.slow),
    ],
)
def test_unreadable_checkpoint_stops_the_run_and_loses_nothing(
    toy: Path, make_unreadable: Callable[[str], None], name: str
) -> None:
    command = ["train", "--stage", "1", "-r", str(toy / "recipe.yaml"), *TRAIN_OPTIONS, "--json"]
    assert run_cli(*command).exit_code == 0
    folder = toy / "runs/toy/stage1"
    if name != "report.json":
        (folder / "report.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    make_unreadable(name)
    result = run_cli(*command)
    assert result.exit_code == 1
    assert f"/{name}" in result.stderr
    assert "Permission denied" in result.stderr
    assert "damaged" not in result.stderr
    after = {path: path.stat().st_mtime_ns for path in before}
    assert {path.name for path in before if before[path] != after[path]} <= {"left_out.jsonl"}


def test_unreadable_old_checkpoint_does_not_stop_training(
    tmp_path: Path, make_unreadable: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    for step in (1, 2, 3):
        if step == 3:
            make_unreadable("step-00000001/state.json")
        checkpoints.save(tmp_path, checkpoints.CheckpointState(step, "a"), {"x": torch.zeros(1)}, keep_last=2)
    assert "Permission denied" in caplog.text
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["1", "2", "3"], (
        "an unreadable checkpoint was removed"
    )
