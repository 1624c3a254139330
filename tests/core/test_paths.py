"""Where things are kept, and files written whole or not at all."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from llavactl.core import paths


def test_one_variable_moves_everything(home: Path) -> None:
    assert paths.cache_dir() == home / "cache"
    assert paths.data_dir() == home / "data"


def test_without_it_the_users_own_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAVACTL_HOME")
    assert paths.cache_dir().name == "llavactl"
    assert paths.cache_dir() != paths.data_dir()


def test_a_file_is_written_with_its_folders(tmp_path: Path) -> None:
    file = tmp_path / "a/b/c.json"
    paths.write_json(file, {"ä": 1})
    assert json.loads(file.read_text(encoding="utf-8")) == {"ä": 1}
    assert [path.name for path in file.parent.iterdir()] == ["c.json"]
    assert stat.S_IMODE(file.stat().st_mode) & stat.S_IRUSR


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.txt"
    paths.write_atomic(file, "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(paths.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        paths.write_atomic(file, "new")
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["a.txt"]
