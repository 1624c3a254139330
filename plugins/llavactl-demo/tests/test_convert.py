"""A folder is converted once, by one process, and is never incomplete."""

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from llavactl_demo import convert
from llavactl_demo.weights import Weights

from llavactl import ModelError

# Runs in a subprocess: writes two files slowly and appends to `log` at each start.
PROCESS = """
    import os, signal, sys, time
    from pathlib import Path
    from llavactl_demo import convert
    from llavactl_demo.weights import Weights

    class Installed(Weights):
        def path(self):
            return Path(os.environ["LLAVACTL_HOME"], "log")

    def write(source, folder):
        with source.open("a") as log:
            log.write("started\\n")
        (folder / "first").write_text("1")
        if "kill" in sys.argv:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.5)
        (folder / "second").write_text("2")

    folder = convert._once("toy", Installed("toy==1", "toy", "", "0" * 64), write)
    print(sorted(file.name for file in folder.iterdir()))
"""


@pytest.fixture
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAVACTL_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def weights(empty_home: Path, monkeypatch: pytest.MonkeyPatch) -> Weights:
    folder = empty_home / "site" / "toy_demo_weights"
    folder.mkdir(parents=True)
    (folder / "weights.bin").write_bytes(b"1")
    monkeypatch.syspath_prepend(folder.parent)
    return Weights("toy==1", folder.name, "weights.bin", hashlib.sha256(b"1").hexdigest())


def copy(source: Path, folder: Path) -> None:
    (folder / "copy").write_bytes(source.read_bytes())


def fail(source: Path, folder: Path) -> None:
    (folder / "half").write_text("…")
    raise OSError("no space left on device")


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(PROCESS), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ.copy())


def leftovers(home: Path) -> list[Path]:
    return list((home / "cache/demo").glob("*.partial"))


def test_the_folder_is_kept_when_the_wheel_is_uninstalled(weights: Weights):
    folder = convert._once("toy", weights, copy)
    assert (folder / "copy").read_bytes() == b"1"
    weights.path().unlink()
    assert convert._once("toy", weights, fail) == folder


def test_without_the_wheel_nothing_is_written(empty_home: Path):
    with pytest.raises(ModelError, match="not installed"):
        convert._once("toy", Weights("toy==1", "no_such_package", "x", "0" * 64), copy)
    assert not leftovers(empty_home)


def test_another_converter_version_uses_another_folder(weights: Weights, monkeypatch: pytest.MonkeyPatch):
    before = convert._once("toy", weights, copy)
    monkeypatch.setattr(convert, "CONVERTER", "next")
    assert convert._once("toy", weights, copy) != before


def test_a_failure_leaves_nothing_behind(weights: Weights, empty_home: Path):
    with pytest.raises(OSError, match="no space"):
        convert._once("toy", weights, fail)
    assert not leftovers(empty_home)
    assert (convert._once("toy", weights, copy) / "copy").exists()


def test_a_killed_conversion_is_repeated(empty_home: Path):
    killed = start("kill")
    assert killed.wait(60) == -signal.SIGKILL
    assert leftovers(empty_home)
    assert start().communicate(timeout=60)[0] == "['first', 'second']\n"
    assert not leftovers(empty_home)


def test_two_processes_convert_once(empty_home: Path):
    both = [start(), start()]
    assert [process.communicate(timeout=60)[0] for process in both] == ["['first', 'second']\n"] * 2
    assert (empty_home / "log").read_text() == "started\n"
