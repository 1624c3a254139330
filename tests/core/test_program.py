"""The command in messages runs this installation, not another one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from llavactl.core.program import command_line


def test_the_command_belongs_to_this_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other, own = tmp_path / "other", tmp_path / "environment" / "bin"
    for folder in (other, own):
        folder.mkdir(parents=True)
        (folder / "llavactl").touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(own / "python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(other))
    assert command_line("chat", "a b") == "environment/bin/llavactl chat 'a b'"
    monkeypatch.setenv("PATH", os.pathsep.join([str(own), str(other)]))
    assert command_line("chat") == "llavactl chat"
    (own / "llavactl").unlink()
    assert command_line("chat") == "environment/bin/python -m llavactl chat"
    monkeypatch.chdir(own)
    assert command_line("run") == "python -m llavactl run"
