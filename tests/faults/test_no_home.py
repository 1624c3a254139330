"""A user without a home folder, as in a container started with ``--user 12345``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

NOBODY = """
import pwd
def getpwuid(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = getpwuid
from llavactl.cli import main
main()
"""
KEPT = ("PATH", "PYTHONPATH", "VIRTUAL_ENV", "OMP_NUM_THREADS", "TMPDIR")


def nobody(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """``llavactl ARGUMENTS`` as a user whom the system doesn't know, without HOME."""
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    return subprocess.run(
        [sys.executable, "-c", NOBODY, *arguments],
        cwd=cwd, env={**kept, "LLAVACTL_PLUGINS": "", **environment}, capture_output=True, encoding="utf-8",
    )  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="there are no such users there")
class TestNoHome:
    @pytest.mark.slow
    def test_a_run_works_with_a_place_to_write(self, toy: Path, tmp_path: Path) -> None:
        place = str(tmp_path / "place")
        done = nobody("run", "-o", "stage1.max_steps=1", "-o", "stage2.max_steps=1", cwd=toy, LLAVACTL_HOME=place)
        assert done.returncode == 0, done.stderr
        assert "home" not in done.stderr
        assert not (toy / "~").exists()

    @pytest.mark.parametrize("arguments", [["extract"], ["cache", "info"]])
    def test_without_one_it_is_asked_for(self, toy: Path, arguments: list[str]) -> None:
        done = nobody(*arguments, cwd=toy)
        assert (done.returncode, done.stdout) == (1, "")
        (error, hint) = done.stderr.splitlines()
        assert error.startswith("error: ")
        assert "LLAVACTL_HOME" in hint

    def test_what_needs_none_works(self, toy: Path) -> None:
        for arguments in (["--help"], ["recipes", "check"], ["components"]):
            assert nobody(*arguments, cwd=toy).returncode == 0
        shown = nobody("doctor", cwd=toy)
        assert shown.returncode == 0, shown.stderr
        assert "LLAVACTL_HOME" in shown.stdout

    def test_a_path_below_a_home_that_is_none(self, toy: Path) -> None:
        done = nobody("extract", "-r", "~/recipe.yaml", cwd=toy)
        assert done.returncode == 1
        assert "~/recipe.yaml" in done.stderr.splitlines()[0]
        assert "Traceback" not in done.stderr
