"""Files are UTF-8 in any locale, and file names may be arbitrary bytes."""

from __future__ import annotations

import ast
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llavactl.testing import run_cli

ROOT = Path(__file__).parents[2]
CODE = sorted(
    file
    for folder in ("llavactl", "plugins", "benchmarks", "docs")
    for file in (ROOT / folder).rglob("*.py")
    if "tests" not in file.parts
)
BINARY = ("Image", "tarfile", "zipfile", "gzip", "fsspec", "fsspec_module", "os", "FeatureStore", "Shard", "view")
"""Modules and classes whose ``open`` is not for text files."""
CHILDREN, TEXT = ("run", "Popen", "check_output", "check_call", "call"), {"text", "universal_newlines"}


def _calls_without_encoding(code: str) -> Iterator[str]:
    """Calls that read or write text without ``encoding``."""
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call) or {"encoding", None} & {each.arg for each in node.keywords}:
            continue
        method = isinstance(node.func, ast.Attribute)
        name = node.func.attr if method else getattr(node.func, "id", "")  # type: ignore[attr-defined]
        owner = ast.unparse(node.func.value).rpartition(".")[2].strip("_()") if method else ""  # type: ignore[attr-defined]
        words = {each.arg: each.value for each in node.keywords}
        if name in ("open", "fdopen", "NamedTemporaryFile") and not (name == "open" and owner in BINARY):
            places = node.args[1:] if name == "fdopen" or not method else node.args
            mode = words.get("mode") or (places[0] if places else ast.Constant("r"))
            if not (isinstance(mode, ast.Constant) and "b" in str(mode.value)):
                yield ast.unparse(node)
        elif (method and name in ("read_text", "write_text")) or (name in CHILDREN and TEXT & words.keys()):
            yield ast.unparse(node)


def test_text_files_are_opened_with_an_encoding() -> None:
    calls = {file: list(_calls_without_encoding(file.read_text(encoding="utf-8"))) for file in CODE}
    assert {str(file): found for file, found in calls.items() if found} == {}
    assert len(calls) > 400


@pytest.mark.parametrize(
    "code",
    ["p.read_text()", "p.write_text(x)", "open(p)", "p.open('w')", "os.fdopen(1, 'w')", "run(c, text=True)"],
)
def test_calls_without_encoding_are_detected(code: str) -> None:
    assert list(_calls_without_encoding(code)) == [code]


@pytest.mark.parametrize(
    "code", ["p.read_text('utf-8', encoding='utf-8')", "p.open('rb')", "Image.open(f)", "open(p, 'wb')", "read_text(p)"]
)
def test_other_calls_are_not_reported(code: str) -> None:
    assert list(_calls_without_encoding(code)) == []


IN_ASCII = """
import locale
locale.setlocale(locale.LC_ALL, "C")
assert locale.getencoding().lower().replace("-", "") != "utf8"
from llavactl.cli import main
main()
"""
"""As on Windows: Unicode file names with a locale encoding of few characters."""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="the locale can't be set")
def test_file_names_outside_the_locale_encoding(toy: Path) -> None:
    folder = toy.rename(toy.with_name("数据集"))
    environment = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C.UTF-8"}
    small = ("-o", "stage1.max_steps=1", "-o", "stage2.max_steps=1", "-o", "stage2.method=lora")
    for command in (["run", *small], ["run", *small], ["chat", "--prompt", "hi"], ["cache", "info"]):
        done = subprocess.run(
            [sys.executable, "-c", IN_ASCII, *command, "--json"],
            cwd=folder, env=environment, capture_output=True, encoding="utf-8",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)


EXTRACT = ["extract"]
TRAIN = ["train", "--stage", "1", "-o", "features.mode=live", "-o", "stage1.max_steps=1"]


@pytest.mark.skipif(sys.platform != "linux", reason="file names are Unicode on other systems")
class TestUndecodableFileNames:
    @pytest.fixture(autouse=True)
    def quiet(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """pytest-xdist would encode captured log lines as UTF-8."""
        monkeypatch.setattr(logging.getLogger("llavactl"), "propagate", False)

    @pytest.fixture
    def undecodable(self, toy: Path) -> Path:
        """The toy recipe in a folder with an image; both names are not UTF-8."""
        folder = toy.rename(toy.with_name(os.fsdecode(b"na\xffme")))
        records = json.loads((folder / "records.json").read_text(encoding="utf-8"))
        (folder / "images" / records[0]["image"]).rename(folder / "images" / os.fsdecode(b"p\xfe.jpg"))
        return folder

    @pytest.mark.parametrize(
        "command", [["extract"], ["data", "stats"], ["cache", "info"], ["extract", "--dry-run"], TRAIN]
    )
    def test_json_output_is_utf_8(self, undecodable: Path, toys: Path, command: list[str]) -> None:
        models = ["-o", f"vision.model={toys / 'clip'}", "-o", f"language.model={toys / 'language'}"]
        result = run_cli(*command, *([] if command[0] == "cache" else models), "--json", cwd=undecodable)
        assert result.exit_code == 0, result.stderr
        result.stdout.encode()
        assert result.json() is not None

    def test_a_model_in_such_a_folder_is_rejected(self, undecodable: Path) -> None:
        result = run_cli("run", cwd=undecodable)
        assert result.exit_code == 1
        assert "Traceback" not in result.stderr
        assert "rename" in result.stderr.splitlines()[-1]
        assert not (undecodable / "runs").exists(), "before any work"
