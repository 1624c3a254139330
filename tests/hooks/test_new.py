"""``plugins new`` writes packages that work as generated."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llavactl.core import hookspecs, plugins
from llavactl.core.protocols import KINDS as COMPONENTS
from llavactl.testing import check_plugin, run_cli
from llavactl.verbs.new_plugin import KINDS, TEMPLATES, plugin_files

from ..preloaded import Interpreters


def generate(folder: Path, name: str, *kinds: str) -> Path:
    arguments = [word for kind in kinds for word in ("--kind", kind)]
    result = run_cli("plugins", "new", name, *arguments, "--to", str(folder), "--json")
    assert result.exit_code == 0, result.stderr
    package = Path(result.json()["folder"])
    written = sorted(str(path.relative_to(package)) for path in package.rglob("*") if path.is_file())
    assert written == sorted(result.json()["files"])
    return package


@pytest.fixture
def generated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Generates a package that is importable and has an entry point, in this process and its children."""

    def add(name: str, *kinds: str) -> Path:
        package = generate(tmp_path, name, *kinds)
        project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
        info = package / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        )
        points = "".join(f"{key} = {value}\n" for key, value in project["entry-points"]["llavactl"].items())
        (info / "entry_points.txt").write_text(f"[llavactl]\n{points}")
        monkeypatch.syspath_prepend(package)
        monkeypatch.setenv("LLAVACTL_PLUGINS", name)
        plugins.reload()
        return package

    yield add
    monkeypatch.undo()
    plugins.reload()


def test_every_kind_of_component_has_a_template() -> None:
    assert {*COMPONENTS, "commands", "observers"} == set(KINDS.values())
    for kind in KINDS:
        hook = (TEMPLATES / kind / "hook.py.tmpl").read_text()
        assert set(re.findall(r"^def (\w+)", hook, re.MULTILINE)) <= set(vars(hookspecs))


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_plugin_passes_the_check(generated: Any, kind: str) -> None:
    """Nothing is skipped: components with required options have examples."""
    generated(f"new-{kind}", kind)
    assert check_plugin(f"new-{kind}") == []
    result = run_cli("plugins", "check", f"new-{kind}", "--json")
    checks = result.json()["checks"]
    assert [each for each in checks if each["ok"] is not True] == []
    assert {each["kind"] for each in checks} >= {KINDS[kind] if kind != "observer" else "recipes"}


def test_the_tests_of_a_plugin_of_all_kinds_pass(generated: Any, interpreters: Interpreters) -> None:
    package = generated("everything", *KINDS)
    program = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = interpreters.run(program, "-q", "-p", "no:cacheprovider", str(package), cwd=package, env=env)
    assert done.returncode == 0, done.stdout
    assert check_plugin("everything") == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_of_files_has_one_line_per_file(kind: str) -> None:
    files = plugin_files("birds", [kind])
    table = [line for line in files["README.md"].splitlines() if "`llavactl_birds/" in line]
    assert len(table) == len([path for path in files if path.startswith("llavactl_birds/")]) - 1  # without py.typed
    assert all(line.count("|") == 3 and line.endswith(" |") for line in table)


@pytest.mark.parametrize("name", ["a", "some-longer-plugin-name"])
@pytest.mark.parametrize("kind", [*KINDS, "all"])
def test_the_code_is_formatted(tmp_path: Path, kind: str, name: str) -> None:
    for path, text in plugin_files(name, list(KINDS) if kind == "all" else [kind]).items():
        file = tmp_path / path
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    ruff = [sys.executable, "-m", "ruff"]
    for command in ([*ruff, "check", "."], [*ruff, "format", "--check", "."]):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (["Birds", "--kind", "source"], 1, ["'Birds'", "lower-case"]),
        (["3d", "--kind", "source"], 1, ["'3d'"]),
        (["a_b", "--kind", "source"], 1, ["'a_b'"]),
        (["../up", "--kind", "source"], 1, ["'../up'"]),
        (["llavactl-birds", "--kind", "source"], 1, ["pass birds"]),
        (["llavactl", "--kind", "source"], 1, ["llavactl"]),
        (["linear", "--kind", "connectors"], 1, ["connector 'linear'", "plugin llavactl"]),
        (["train", "--kind", "command"], 1, ["command 'train'"]),
        (["birds", "--kind", "sauce"], 2, ["'sauce'", "'source'"]),
        (["birds"], 2, ["--kind"]),
        (["--kind", "source"], 2, ["NAME"]),
    ],
)
def test_invalid_arguments(tmp_path: Path, arguments: list[str], code: int, parts: list[str]) -> None:
    result = run_cli("plugins", "new", *arguments, cwd=tmp_path)
    assert result.exit_code == code
    assert all(part in result.stderr for part in parts), result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_name_is_free_for_another_kind(tmp_path: Path) -> None:
    assert generate(tmp_path, "linear", "sources").name == "llavactl-linear"


def test_an_existing_folder_is_not_changed(tmp_path: Path) -> None:
    file = tmp_path / "llavactl-birds" / "pyproject.toml"
    file.parent.mkdir()
    file.write_text("mine")
    result = run_cli("plugins", "new", "birds", "--kind", "source", cwd=tmp_path)
    assert (result.exit_code, result.stdout) == (1, "")
    assert [path.read_text() for path in file.parent.iterdir()] == ["mine"]


def test_an_installed_name_is_refused(generated: Any, tmp_path: Path) -> None:
    generated("taken", "observer")
    result = run_cli("plugins", "new", "taken", "--kind", "source", "--to", str(tmp_path / "other"))
    assert result.exit_code == 1
    assert "'taken'" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_plugin_is_installed_from_a_wheel(tmp_path: Path, kind: str) -> None:
    """As a user would: pip, the plugin's tests, the check; offline."""
    package, target = generate(tmp_path, f"new-{kind}", kind), tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(target), *filter(None, sys.path)]),
        "LLAVACTL_PLUGINS": f"new-{kind}",
    }
    for command in (
        [*pip, "--target", str(target), str(package)],
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(package / "tests")],
        [sys.executable, "-m", "llavactl", "plugins", "check", f"new-{kind}"],
        [
            *(sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "mypy")),
            *("--config-file", str(package / "pyproject.toml"), str(package / f"llavactl_new_{kind}")),
        ],
    ):
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
