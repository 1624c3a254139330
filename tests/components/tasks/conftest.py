"""Fixtures for tasks: published files of benchmarks, if available, and scoring through the command line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from llavactl.testing import run_cli

DATA = Path(__file__).parents[4] / "shared" / "data"

Lines = Callable[[str, Iterable[Any]], Path]


@pytest.fixture
def real() -> Path:
    if not DATA.is_dir():
        pytest.skip("requires the folder of published data beside the checkout")
    return DATA


@pytest.fixture
def lines(tmp_path: Path) -> Lines:
    """Writes a JSONL file to the test's folder."""

    def write(name: str, records: Iterable[Any]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return path

    return write


@pytest.fixture
def scored(tmp_path: Path) -> Callable[..., Any]:
    """Runs ``llavactl eval --json``: its document, or stderr with one error and its hint."""

    def run(task: str, *arguments: object, **options: Any) -> Any:
        task_options = [
            word for key, values in options.items() for value in _list(values) for word in ("-t", f"{key}={value}")
        ]
        result = run_cli("eval", task, *map(str, arguments), *task_options, "--json", cwd=tmp_path)
        assert result.exit_code in (0, 1), result.stderr
        if result.exit_code:
            assert "Traceback" not in result.stderr
            errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
            assert len(errors) == 1, result.stderr
            return result.stderr
        return result.json()

    return run


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
