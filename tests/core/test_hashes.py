"""Hashes of files and model folders depend on contents only, are never stale and are cached when this is safe."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from llavactl.core import hashes
from llavactl.core.hashes import hash_file, hash_folder


def _aged(file: Path) -> Path:
    """``file`` with a modification time of one hour ago."""
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns - 3_600_000_000_000))
    return file


def test_changed_content_of_equal_size_and_time_changes_the_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "_SETTLED_S", -1.0)  # cache immediately
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    original, time = hash_file(file), file.stat().st_mtime_ns
    (tmp_path / "other").write_bytes(b"two")
    os.utime(tmp_path / "other", ns=(time, time))
    shutil.copy2(tmp_path / "other", file)
    assert file.stat().st_mtime_ns == time
    assert hash_file(file) != original


def test_hashes_are_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "_SETTLED_S", -1.0)
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    first = hash_file(file)

    def read(*_: object) -> None:
        raise AssertionError("the file was read again")

    monkeypatch.setattr(hashes.hashlib, "file_digest", read)
    assert hash_file(file) == first


def test_the_hash_of_a_new_file_is_not_cached(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    first = hash_file(file)
    stamp = hashes.stamp_bytes(f"{file}\0{hashes.file_stamp(file.stat())}")
    assert hashes.HashCache(hashes.cache_dir() / "files.sqlite").find([stamp]) == {}
    assert hash_file(_aged(file)) == first


def test_the_hash_of_a_folder_ignores_its_name_and_unrelated_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "adapter").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "adapter" / "weights").write_text("1")
    (tmp_path / "b" / "README.md").write_text("about")
    (tmp_path / "b" / "checkpoint-500").mkdir()
    (tmp_path / "b" / "checkpoint-500" / "optimizer.pt").write_text("2")
    for name in (
        "LICENSE",
        "NOTICE.txt",
        "trainer_state.json",
        "rng_state_0.pth",
        "m.gguf",
        "modeling_x.py",
        "run.log",
    ):
        (tmp_path / "b" / name).write_text("unrelated")
    assert hash_folder(tmp_path / "a") == hash_folder(tmp_path / "b")
    (tmp_path / "b" / "adapter" / "weights").write_text("3")
    assert hash_folder(tmp_path / "a") != hash_folder(tmp_path / "b")
