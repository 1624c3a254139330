"""A single file as a plugin: ``--plugin FILE``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llavactl.core import plugin_files
from llavactl.testing import run_cli

CODE = """
import click
from llavactl import Options, hookimpl

@hookimpl
def register_connectors(register):
    register("tiny", "my:Tiny", options="my:TinyOptions", summary="from a file")

@hookimpl
def register_commands(register):
    register("hello", "my:hello", summary="says hello")

class TinyOptions(Options):
    size: int = 3

class Tiny:
    def __init__(self, options):
        self.options = options

@click.command()
def hello():
    click.echo("hello")
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "code" / "my.py"
    path.parent.mkdir()
    path.write_text(CODE)
    return path


def names(result: Any) -> set[str]:
    return {each["name"] for each in json.loads(result.stdout)}


def test_its_components_and_commands_are_registered(site: Any, file: Path) -> None:
    done = site.run("--plugin", str(file), "components", "connectors", "--json", LLAVACTL_PLUGINS="my")
    (tiny,) = [each for each in json.loads(done.stdout) if each["name"] == "tiny"]
    assert (tiny["plugin"], tiny["summary"]) == ("my", "from a file")
    assert site.run("--plugin", str(file), "hello", LLAVACTL_PLUGINS="my").stdout == "hello\n"
    assert "says hello" in site.run("--plugin", str(file), "--help", LLAVACTL_PLUGINS="my").stdout
    assert "hello" not in site.run("--help").stdout


def test_a_relative_path_and_several_files(site: Any, file: Path) -> None:
    other = file.with_name("other.py")
    other.write_text(CODE.replace("my:", "other:").replace('"tiny"', '"other"').replace('"hello"', '"bye"'))
    program = "import os; os.environ.pop('LLAVACTL_PLUGINS')\nfrom llavactl.cli import main; main()"
    paths = [os.path.relpath(path, site.folder) for path in (file, other)]
    arguments = [word for path in paths for word in ("--plugin", path)]
    assert {"tiny", "other"} <= names(site.python(program, *arguments, "components", "--json"))


def test_child_processes_load_it(site: Any, file: Path) -> None:
    """Such as processes that a launcher restarts: they inherit the environment."""
    done = site.run("components", "--json", LLAVACTL_PLUGINS="my", LLAVACTL_PLUGIN_FILES=str(file))
    assert "tiny" in names(done)
    spawned = f"""
import multiprocessing, os, pickle, subprocess, sys
from llavactl.cli import run_command
if __name__ == "__main__":
    run_command(["--plugin", {str(file)!r}, "components"])
    from my import Tiny
    with multiprocessing.get_context("fork").Pool(1) as pool:
        print("forked", pool.apply(pickle.loads, [pickle.dumps(Tiny(3))]).options)
    child = "from llavactl.core.registry import registry; print('child', registry().get('connectors', 'tiny').plugin)"
    print(subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True).stdout)
"""
    shown = site.python(spawned, LLAVACTL_PLUGINS="my").stdout
    assert "forked 3" in shown
    assert "child my" in shown


def test_every_rank_of_a_launch_loads_it(site: Any, file: Path) -> None:
    file.with_name("ranks.py").write_text(
        f"import os\nopen(os.path.join({str(file.parent)!r}, 'rank' + os.environ.get('RANK', '?')), 'w').close()\n"
    )
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "llavactl"),
            *("--plugin", str(file.with_name("ranks.py")), "components"),
        ],
        env={**os.environ, "LLAVACTL_HOME": str(site.home)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in file.parent.glob("rank?")) == ["rank0", "rank1"]


def test_its_version_is_a_hash_of_its_contents(file: Path) -> None:
    before = plugin_files.version(file)
    assert plugin_files.version(file) == before
    file.write_text(CODE + "# changed\n")
    assert plugin_files.version(file) != before


def test_it_is_loaded_in_this_process_for_one_command(file: Path) -> None:
    assert "tiny" in names(run_cli("--plugin", str(file), "components", "--json"))
    assert "tiny" not in names(run_cli("components", "--json"))


def test_a_broken_file_is_one_line(site: Any, file: Path) -> None:
    file.write_text("1 / 0\n")
    done = site.run("--plugin", str(file), "recipes", "list", LLAVACTL_PLUGINS="my")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"llavactl: plugin my can't be loaded: {file}:1: ZeroDivisionError: division by zero; ")
    assert line.endswith(f"--plugin {file}")


def test_a_missing_file_is_a_usage_error(site: Any, file: Path) -> None:
    assert site.run("--plugin", "gone.py", "components", code=2).stdout == ""
    done = site.run("components", LLAVACTL_PLUGIN_FILES=str(file.with_name("gone.py")))
    assert f"{file.with_name('gone.py')} not found" in done.stderr


@pytest.mark.parametrize("name", ["json.py", "torch.py", "a.b.py", "text.txt", "llavactl.py"])
def test_a_name_that_cannot_be_imported_is_refused(site: Any, file: Path, name: str) -> None:
    path = file.with_name(name)
    path.write_text(CODE)
    done = site.run("--plugin", str(path), "components", LLAVACTL_PLUGINS=path.stem)
    assert any(str(path) in line for line in done.stderr.splitlines())
    assert "tiny" not in done.stdout


@pytest.mark.parametrize("name", ["my-plugin.py", "2nd.py", "class.py"])
def test_a_name_need_not_be_an_identifier(site: Any, file: Path, name: str) -> None:
    path = file.with_name(name)
    path.write_text(CODE.replace("my:", f"{path.stem}:"))
    done = site.run("--plugin", str(path), "components", "connectors", "--json", LLAVACTL_PLUGINS=path.stem)
    assert (done.stderr, "tiny" in names(done)) == ("", True)
    assert site.run("--plugin", str(path), "hello", LLAVACTL_PLUGINS=path.stem).stdout == "hello\n"
    checked = site.run("plugins", "check", str(path), "--json", code=1, LLAVACTL_PLUGINS=path.stem)
    checks = {each["check"]: each["ok"] for each in json.loads(checked.stdout)["checks"]}
    assert checks["registration"]


def test_other_files_of_its_folder_are_not_importable(site: Any, file: Path) -> None:
    """Folders such as wandb/ beside it would otherwise be taken for packages."""
    (file.parent / "wandb").mkdir()
    (file.parent / "neighbor.py").write_text("")
    file.write_text("import neighbor\n")
    done = site.run("--plugin", str(file), "components", LLAVACTL_PLUGINS="my")
    assert "No module named 'neighbor'" in done.stderr


def test_an_empty_selection_turns_it_off(site: Any, file: Path) -> None:
    done = site.run("--plugin", str(file), "components", "--json", LLAVACTL_PLUGINS="")
    assert "tiny" not in names(done)
    (line,) = done.stderr.splitlines()
    assert "plugin my" in line
    assert "LLAVACTL_PLUGINS" in line
