"""What published benchmarks look like: the real files where they are, else none."""

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
        pytest.skip("needs the real data folder beside the checkout")
    return DATA


@pytest.fixture
def lines(tmp_path: Path) -> Lines:
    """Writes a JSONL file into the test's folder."""

    def write(name: str, records: Iterable[Any]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return path

    return write


@pytest.fixture
def scored(tmp_path: Path) -> Callable[..., Any]:
    """``llavactl eval`` with ``--json``: its document, or its one line of error and its hint."""

    def run(task: str, *arguments: object, **options: Any) -> Any:
        given = [word for key, each in options.items() for one in _list(each) for word in ("-t", f"{key}={one}")]
        result = run_cli("eval", task, *map(str, arguments), *given, "--json", cwd=tmp_path)
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
