"""File systems that refuse every lock (some NFS, Lustre and FUSE mounts), and files that can't be read just now."""

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
"""The kernel's own, for which the C library has no name: what NFS and Lustre were seen to answer."""

REFUSING = r"""
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
def test_every_command_works_where_the_system_refuses_locks(toy: Path, tmp_path: Path, refused: int) -> None:
    """Also the locks of HDF5 and SQLite, which Python can't patch; 60 s is how long SQLite would wait for one."""
    source, library = tmp_path / "refusing.c", tmp_path / "refusing.so"
    source.write_text(REFUSING)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, toy / "recipe.yaml", toy / "images/photo-000.jpg"],
        env={**os.environ, "LD_PRELOAD": str(library), "REFUSED": str(refused)},
        capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [code for _, code, _ in told] == [0] * 5, told


def refuse(monkeypatch: pytest.MonkeyPatch, number: int = errno.ENOLCK) -> None:
    def refusing(*_: object, **_more: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refusing)
    monkeypatch.setattr(fcntl, "lockf", refusing)


@pytest.fixture(params=[errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, ENOTSUPP])
def lockless(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, request.param)


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    """A lock file that is there already, from a time when the file system had locks."""
    (tmp_path / "x.lock").touch()
    return tmp_path / "x.lock"


@pytest.mark.usefixtures("lockless")
def test_without_locks_one_still_excludes_the_other(lock: Path) -> None:
    with paths.exclusive_lock(lock, StoreError("taken")):
        with pytest.raises(StoreError, match="taken") as caught, paths.exclusive_lock(lock, StoreError("taken")):
            pass
        assert "no locks" in caught.value.hint
    with paths.exclusive_lock(lock, StoreError("taken")):
        pass


HOLD = """
import errno, fcntl, os, sys
from pathlib import Path
from llavactl.core.paths import exclusive_lock
def refuse(*_):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = refuse
with exclusive_lock(Path(sys.argv[1]), ValueError("taken")):
    os._exit(0)
"""


def test_what_a_killed_process_held_is_taken_over(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run([sys.executable, "-c", HOLD, lock], check=True)
    assert lock.with_name("x.lock.owner").exists()
    refuse(monkeypatch)
    with paths.exclusive_lock(lock, StoreError("taken")):
        pass


def test_a_holder_on_another_machine_is_named_with_the_file_to_remove(
    lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch)
    owner = lock.with_name("x.lock.owner")
    owner.write_text(f"1234\nnot-{socket.gethostname()}\n")
    with (
        pytest.raises(StoreError, match="taken") as caught,
        paths.exclusive_lock(lock, StoreError("taken", hint="wait")),
    ):
        pass
    assert str(owner) in caught.value.hint
    owner.unlink()
    with paths.exclusive_lock(lock, StoreError("taken")):
        pass


MADE_WITH, SHAPE = Fingerprint({"backbone": "toy"}), FeatureShape((1, 2), 3)


def test_without_locks_parts_still_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch)
    with StoreWriter(MADE_WITH, SHAPE, 2, Part(0, 2)) as one, StoreWriter(MADE_WITH, SHAPE, 2, Part(1, 2)) as two:
        for number in range(6):
            (one, two)[number % 2].append([content_key(bytes([number]))], np.zeros((1, 2, 3), np.float16))
        with pytest.raises(StoreError, match="another process"), exclusive(one.folder):
            pass
    assert len(FeatureStore.open(MADE_WITH)) == 6
    assert not list(one.folder.parent.glob("*.owner"))


@pytest.fixture
def recipe(toy: Path) -> Recipe:
    return load_recipe(toy / "recipe.yaml")


@pytest.fixture
def victim(recipe: Recipe) -> Path:
    """A shard of an extracted store."""
    extract(recipe)
    return FeatureStore.open(stage_fingerprint(recipe, 1)).folder / "shard-00001.h5"


def failing(real: Callable[..., Any], victim: Path, number: int) -> Callable[..., Any]:
    """``real``, but about ``victim`` it raises the error ``number``."""

    def call(path: Any, *args: Any, **more: Any) -> Any:
        if Path(path) == victim:
            raise OSError(number, os.strerror(number))
        return real(path, *args, **more)

    return call


NUMBERS = [errno.EIO, errno.EACCES, errno.ENOLCK, errno.ESTALE, errno.ETIMEDOUT, ENOTSUPP]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("where", ["llavactl.features.maintenance.checksum", "h5py.File", "pathlib.Path.stat"])
def test_verify_leaves_what_it_could_not_read(
    victim: Path, toy: Path, monkeypatch: pytest.MonkeyPatch, number: int, where: str
) -> None:
    before = victim.read_bytes()
    real = {"h5py.File": h5py.File, "pathlib.Path.stat": Path.stat}.get(where)
    from llavactl.features.shards import checksum

    with monkeypatch.context() as patch:
        patch.setattr(where, failing(real or checksum, victim, number))
        result = run_cli("cache", "verify", "--json", cwd=toy)
        report = result.json()
    assert result.exit_code == 1
    assert victim.name in result.stderr
    assert (report["sound"], report["damaged"]) == (False, [])
    assert [each["file"] for each in report["unchecked"]] == [victim.name]
    assert victim.read_bytes() == before
    assert run_cli("cache", "verify", cwd=toy).exit_code == 0


def test_verify_tells_damage_from_what_it_could_not_read(
    victim: Path, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = victim.with_name("shard-00000.h5")
    data = bytearray(other.read_bytes())
    data[-1] ^= 1
    other.write_bytes(data)
    from llavactl.features import maintenance

    with monkeypatch.context() as patch:
        patch.setattr(maintenance, "checksum", failing(maintenance.checksum, victim, errno.EIO))
        report = run_cli("cache", "verify", "--json", cwd=toy).json()
    found = [[each["file"] for each in report[kind]] for kind in ("damaged", "unchecked")]
    assert found == [[other.name], [victim.name]]
    manifest = read_manifest(victim.parent)
    assert manifest
    assert [entry.file for entry in manifest.shards if entry.file in (other.name, victim.name)] == [victim.name]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("where", ["h5py.File", "pathlib.Path.stat", "numpy.memmap"])
def test_a_shard_that_cannot_be_read_is_not_called_damaged(
    recipe: Recipe, victim: Path, monkeypatch: pytest.MonkeyPatch, number: int, where: str
) -> None:
    real = {"h5py.File": h5py.File, "pathlib.Path.stat": Path.stat, "numpy.memmap": np.memmap}[where]
    with monkeypatch.context() as patch:
        patch.setattr(where, failing(real, victim, number))
        with pytest.raises(StoreError) as caught:
            all_of(recipe)
    assert not isinstance(caught.value, DamagedShardError)
    assert str(victim) in caught.value.message
    assert "cache verify" not in caught.value.hint
    assert all_of(recipe) == 12


def all_of(recipe: Recipe) -> int:
    """How many features were read."""
    store = FeatureStore.open(stage_fingerprint(recipe, 1))
    return len([store.read(key.decode()) for key in store.keys])


@pytest.mark.parametrize("where", ["h5py.File", "llavactl.features.writer.checksum"])
def test_an_unlisted_shard_that_cannot_be_read_is_not_set_aside(
    recipe: Recipe, victim: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    from llavactl.features.shards import checksum

    (victim.parent / "manifest.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(where, failing(h5py.File if where == "h5py.File" else checksum, victim, errno.ENOLCK))
        with pytest.raises(StoreError) as caught:
            extract(recipe)
    assert str(victim) in caught.value.message
    assert not list(victim.parent.glob("*.damaged"))
    extract(recipe)
    manifest = read_manifest(victim.parent)
    assert manifest
    assert manifest.images == 12


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """``unreadable(end)``: nothing whose path ends in it can be read, also by root."""
    refused: set[str] = set()
    text, opened, listed = Path.read_text, Path.open, Path.iterdir

    def guard(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Path, *args: Any, **more: Any) -> Any:
            if any(path.as_posix().endswith(f"/{end}") for end in refused):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real(path, *args, **more)

        return call

    with monkeypatch.context() as patch:
        for name, real in (("read_text", text), ("open", opened), ("iterdir", listed)):
            patch.setattr(Path, name, guard(real))
        yield refused.add


@pytest.mark.parametrize("command", [("extract",), ("cache", "info"), ("cache", "verify"), ("train", "--stage", "1")])
def test_a_manifest_that_cannot_be_read_is_not_to_be_removed(
    victim: Path, toy: Path, unreadable: Callable[[str], None], command: tuple[str, ...]
) -> None:
    unreadable("manifest.json")
    result = run_cli(*command, cwd=toy)
    assert result.exit_code == 1
    assert str(victim.parent / "manifest.json") in result.stderr
    assert "Permission denied" in result.stderr
    assert "remove" not in result.stderr


def test_stores_that_cannot_be_listed_are_not_none(victim: Path, toy: Path, unreadable: Callable[[str], None]) -> None:
    unreadable("features")
    result = run_cli("cache", "info", cwd=toy.parent)
    assert result.exit_code == 1
    assert str(victim.parents[1]) in result.stderr


STOPPED = ["-o", "features.mode=live", "-o", "stage1.max_steps=4", "-o", "stage1.keep_last=3"]


@pytest.mark.parametrize("name", ["state.json", "optimizer.safetensors", "checkpoints", "report.json"])
def test_a_checkpoint_that_cannot_be_read_stops_the_run_and_loses_nothing(
    toy: Path, unreadable: Callable[[str], None], name: str
) -> None:
    command = ["train", "--stage", "1", "-r", str(toy / "recipe.yaml"), *STOPPED, "--json"]
    assert run_cli(*command).exit_code == 0
    folder = toy / "runs/toy/stage1"
    if name != "report.json":
        (folder / "report.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    unreadable(name)
    result = run_cli(*command)
    assert result.exit_code == 1
    assert f"/{name}" in result.stderr
    assert "Permission denied" in result.stderr
    assert "damaged" not in result.stderr
    after = {path: path.stat().st_mtime_ns for path in before}
    assert {path.name for path in before if before[path] != after[path]} <= {"left_out.jsonl"}


def test_an_old_checkpoint_that_cannot_be_read_stops_no_training(
    tmp_path: Path, unreadable: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    for step in (1, 2, 3):
        if step == 3:
            unreadable("step-00000001/state.json")
        checkpoints.save(tmp_path, checkpoints.State(step, "a"), {"x": torch.zeros(1)}, keep_last=2)
    assert "Permission denied" in caplog.text
    assert sorted(each.name[-1] for each in tmp_path.iterdir()) == ["1", "2", "3"], "nothing is removed unseen"
