"""Exit codes and output streams of the command line."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import click
import pytest

from llavactl import __version__, cli
from llavactl.cli.root import LazyGroup
from llavactl.core.errors import DataError, LlavactlError, ModelError, PluginError, RecipeError, StoreError
from llavactl.testing import run_cli


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replaces ``llavactl doctor`` by an action."""

    def install(action: Any) -> None:
        command = click.Command("doctor", callback=action)
        monkeypatch.setattr(LazyGroup, "get_command", lambda self, ctx, name: command)

    return install


def raising(error: BaseException) -> Any:
    def action() -> None:
        raise error

    return action


@pytest.mark.parametrize("kind", [RecipeError, DataError, StoreError, ModelError, PluginError, LlavactlError])
def test_a_typed_error_is_one_line_and_a_hint(fails: Any, kind: type[LlavactlError]) -> None:
    fails(raising(kind("no\n  disk", hint="free space")))
    result = run_cli("doctor")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: no disk\nhint: free space\n"


def test_an_error_without_a_hint_is_one_line(fails: Any) -> None:
    fails(raising(DataError("no disk")))
    assert run_cli("doctor").stderr == "error: no disk\n"


def test_a_recipes_problems_are_one_line_each(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: x\nseed: y\nfoo: 1\n")
    result = run_cli("train", "--stage", "1", cwd=tmp_path)
    assert (result.exit_code, result.stdout) == (1, "")
    lines = result.stderr.splitlines()
    assert len(lines) == 5
    assert all(line.startswith("error: recipe.yaml:") for line in lines)


@pytest.mark.parametrize("arguments", [["--nope"], ["recipes", "show", "--nope"], ["nope"], [], ["train"]])
def test_usage_errors_exit_with_2(arguments: list[str]) -> None:
    result = run_cli(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage: llavactl" in result.stderr


def test_a_misspelled_command_gets_a_suggestion() -> None:
    assert "'recipes'" in run_cli("recpes").stderr


def test_success_exits_with_0() -> None:
    result = run_cli("--version")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"llavactl, version {__version__}\n"


def test_an_exit_code_of_a_command_is_kept(fails: Any) -> None:
    fails(lambda: click.get_current_context().exit(7))
    assert run_cli("doctor").exit_code == 7


def test_an_interrupt_exits_with_130_and_one_line(fails: Any) -> None:
    fails(raising(KeyboardInterrupt()))
    result = run_cli("doctor")
    assert result.exit_code == 130
    assert len(result.stderr.strip().splitlines()) == 1
    assert "interrupted" in result.stderr


@pytest.mark.parametrize(
    "kind", [ValueError, KeyError, TypeError, AssertionError, IndexError, AttributeError, RuntimeError]
)
def test_a_bug_has_a_traceback_and_one_line(fails: Any, kind: type[Exception]) -> None:
    fails(raising(kind("oops")))
    result = run_cli("doctor")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "Traceback (most recent call last)" in result.stderr
    assert f"{kind.__name__}: " in result.stderr
    assert result.stderr.splitlines()[-1].startswith("bug in llavactl")


def _import_error(name: str) -> ImportError:
    try:
        __import__(name)
    except ImportError as error:
        return error
    raise AssertionError


def _machine_errors() -> dict[str, tuple[BaseException, str]]:
    import torch
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
    from safetensors import SafetensorError

    return {
        "no filename": (OSError("no space"), "no space"),
        "no strerror": (OSError(errno.EIO, "input/output error"), "input/output error"),
        "a full disk": (OSError(errno.ENOSPC, "no space", "/there/x"), "/there/x"),
        "a missing file": (FileNotFoundError(errno.ENOENT, "no such file", "/there/x"), "/there/x"),
        "a missing package": (_import_error("no_such_package_anywhere.part"), "no_such_package_anywhere"),
        "a broken library": (ImportError("libcudart.so.12: cannot open shared object file"), "libcudart.so.12"),
        "a missing backend": (ImportError("\nX requires the timm library but it was not found.\nmore"), "timm"),
        "memory": (MemoryError(), "memory"),
        "memory of a device": (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), "Tried 2 GiB"),
        "memory of a CPU": (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."), "8 bytes",
        ),
        "a device": (RuntimeError("CUDA error: device-side assert triggered\nmore"), "device-side assert"),
        "the hub": (LocalEntryNotFoundError("no entry"), "model hub"),
        "the hub, offline": (OfflineModeIsEnabled("offline"), "model hub"),
        "a weight file": (SafetensorError("header too small"), "header too small"),
        "an archive": (zipfile.BadZipFile("File is not a zip file"), "zip file"),
        "a database": (sqlite3.OperationalError("disk I/O error"), "disk I/O error"),
    }  # fmt: skip


@pytest.mark.parametrize("what", list(_machine_errors()))
def test_errors_of_the_machine_are_one_line(fails: Any, what: str) -> None:
    error, term = _machine_errors()[what]
    fails(raising(error))
    result = run_cli("doctor")
    assert (result.exit_code, result.stdout) == (1, "")
    first, *hint = result.stderr.splitlines()
    assert first.startswith("error: ")
    assert term in first
    assert len(hint) <= 1


def test_a_missing_module_of_llavactl_is_a_bug(fails: Any) -> None:
    fails(raising(_import_error("llavactl.core.no_such_module")))
    assert "Traceback" in run_cli("doctor").stderr


def test_output_of_libraries_goes_to_stderr(fails: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from llavactl.core import plugins

    def installed() -> list[plugins.Plugin]:
        print("printed by a library")
        return [plugins.Plugin("llavactl", "llavactl", "1", "llavactl")]

    monkeypatch.setattr(plugins, "installed", installed)
    result = run_cli("plugins", "list", "--json")
    assert [each["name"] for each in result.json()][:1] == ["llavactl"]
    assert result.stderr == "printed by a library\n"


def test_log_records_are_single_lines_on_stderr(fails: Any) -> None:
    def action() -> None:
        logging.getLogger("llavactl.some.module").warning("one\ntwo %d", 3)
        click.echo(json.dumps({"a": 1}))

    fails(action)
    result = run_cli("doctor")
    assert result.json() == {"a": 1}
    assert result.stderr == "llavactl: one two 3\n"


def test_the_log_handler_is_added_once(fails: Any) -> None:
    fails(lambda: logging.getLogger("llavactl").warning("hello"))
    run_cli("doctor")
    assert run_cli("doctor").stderr == "llavactl: hello\n"


def test_only_the_main_process_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run_cli("recipes", "list").stdout == ""
    monkeypatch.setenv("RANK", "0")
    assert "llava-v1-7b" in run_cli("recipes", "list").stdout


def test_main_takes_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert "llavactl" in capsys.readouterr().out


def program(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    code = [sys.executable, "-m", "llavactl.cli", *arguments]
    return subprocess.Popen(code, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_output_is_utf_8_in_any_locale(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: ä\nseed: x\nstage1: {epochs: 0, batch_size: 0}\n")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    process = program("recipes", "check", cwd=tmp_path, env=environment, encoding="utf-8")
    out, err = process.communicate()
    assert "stage1.batch_size" in out
    assert "≥" in out
    assert "'ä'" in out
    assert err == ""


def test_a_closed_pipe_is_silent() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    code = [sys.executable, "-m", "llavactl.cli", "recipes", "list"]
    ended = subprocess.run(code, text=True, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert ended.stderr == ""
    assert ended.returncode != 0


SLEEPER = """
import time
import click
from llavactl import __version__, cli
from llavactl.cli.root import LazyGroup

def sleep():
    click.echo("ready")
    exec("time.sleep(60)")  # Python remembers a KeyboardInterrupt from such code and would exit with 130

LazyGroup.get_command = lambda *_: click.Command("doctor", callback=sleep)
cli.main(["doctor"])
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows can't send this signal to one process")
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_signals_exit_with_128_plus_their_number(end: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPER], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(end)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 128 + end
    assert len(err.strip().splitlines()) == 1
    assert "interrupted" in err


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["train"], "--stage"),
        (["trian"], "did you mean 'train'?"),
        (["run", "--nope"], "--nope"),
        (["train", "--stage", "3"], "'3' is not one of '1', '2'"),
    ],
)
def test_a_usage_error_has_the_form_of_other_errors(arguments: list[str], cause: str) -> None:
    result = run_cli(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    usage, error, hint = result.stderr.splitlines()
    assert usage.startswith("Usage: llavactl ")
    assert error.startswith("error: ")
    assert cause in error
    assert hint.startswith("hint: `llavactl ")
    assert "--help`" in hint


def test_without_a_command_the_help_is_shown() -> None:
    result = run_cli()
    assert result.exit_code == 2
    assert "Examples:" in result.stderr
    assert "error:" not in result.stderr


@pytest.mark.parametrize(("given", "used"), [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")])
def test_waiting_threads_sleep_unless_requested_otherwise(given: dict[str, str], used: str) -> None:
    code = "import os, llavactl.cli as cli; cli.run_command(['--version']); print(os.environ['OMP_WAIT_POLICY'])"
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"} | given
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert output.stdout.splitlines()[-1] == used
