"""Cache and data folders, atomic writes, locks and JSON."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from llavactl.core import paths


def test_llavactl_home_sets_both_folders(home: Path) -> None:
    assert paths.cache_dir() == home / "cache"
    assert paths.data_dir() == home / "data"


def test_default_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAVACTL_HOME")
    assert paths.cache_dir().name == "llavactl"
    assert paths.cache_dir() != paths.data_dir()


def test_writing_creates_parent_folders(tmp_path: Path) -> None:
    file = tmp_path / "a/b/c.json"
    paths.write_json(file, {"ä": 1})
    assert json.loads(file.read_text(encoding="utf-8")) == {"ä": 1}
    assert [path.name for path in file.parent.iterdir()] == ["c.json"]
    assert stat.S_IMODE(file.stat().st_mode) & stat.S_IRUSR


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.txt"
    paths.write_atomic(file, "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(paths.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        paths.write_atomic(file, "new")
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["a.txt"]


def test_a_lock_is_exclusive_and_released_when_its_owner_dies(tmp_path: Path) -> None:
    lock = tmp_path / "new/.lock"
    code = "import sys, pathlib\nfrom llavactl.core.paths import exclusive_lock\n"
    code += "with exclusive_lock(pathlib.Path(sys.argv[1]), ValueError('taken')):\n"
    code += "    print('locked', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match="taken"), paths.exclusive_lock(lock, ValueError("taken")):
            pytest.fail("two owners")
        process.kill()
    with paths.exclusive_lock(lock, ValueError("taken")):
        pass


def test_nan_and_infinity_become_null() -> None:
    assert paths.json_text({"a": [float("nan"), 1.5], "b": (float("inf"),)}) == '{"a": [null, 1.5], "b": [null]}'
