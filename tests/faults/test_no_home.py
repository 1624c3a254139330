"""Users without a home folder, as in a container started with ``--user 12345``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..preloaded import Interpreters

UNKNOWN_USER = """
import pwd
def getpwuid(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = getpwuid
from llavactl.cli import main
main()
"""
KEPT_VARIABLES = ("PATH", "PYTHONPATH", "VIRTUAL_ENV", "OMP_NUM_THREADS", "TMPDIR")


def variables() -> dict[str, str]:
    return {"LLAVACTL_PLUGINS": "", **{name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}}


def run_as_unknown_user(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``llavactl ARGUMENTS`` without HOME, as a user that has no entry in the user database."""
    return subprocess.run(
        [sys.executable, "-c", UNKNOWN_USER, *arguments],
        cwd=cwd, env={**variables(), **environment}, capture_output=True, encoding="utf-8",
    )  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pwd module")
class TestNoHome:
    @pytest.mark.slow
    def test_run_works_with_llavactl_home(self, toy: Path, tmp_path: Path) -> None:
        home = str(tmp_path / "home")
        done = run_as_unknown_user(
            "run", "-o", "stage1.max_steps=1", "-o", "stage2.max_steps=1", cwd=toy, LLAVACTL_HOME=home
        )
        assert done.returncode == 0, done.stderr
        assert "home" not in done.stderr
        assert not (toy / "~").exists()

    @pytest.mark.parametrize("arguments", [["extract"], ["cache", "info"]])
    def test_commands_that_write_ask_for_llavactl_home(self, toy: Path, arguments: list[str]) -> None:
        done = run_as_unknown_user(*arguments, cwd=toy)
        assert (done.returncode, done.stdout) == (1, "")
        (error, hint) = done.stderr.splitlines()
        assert error.startswith("error: ")
        assert "LLAVACTL_HOME" in hint

    def test_commands_without_caches_work(self, toy: Path, interpreters: Interpreters) -> None:
        """The last one imports all libraries as this user."""
        for arguments in (["--help"], ["recipes", "check"], ["components"]):
            done = interpreters.run(UNKNOWN_USER, *arguments, cwd=toy, env=variables())
            assert done.returncode == 0, done.stderr
        result = run_as_unknown_user("doctor", cwd=toy)
        assert result.returncode == 0, result.stderr
        assert "LLAVACTL_HOME" in result.stdout

    def test_path_below_a_missing_home_is_an_error(self, toy: Path) -> None:
        done = run_as_unknown_user("extract", "-r", "~/recipe.yaml", cwd=toy)
        assert done.returncode == 1
        assert "~/recipe.yaml" in done.stderr.splitlines()[0]
        assert "Traceback" not in done.stderr
