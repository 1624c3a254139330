"""Images, and a folder for llavactl's files."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from llavactl import registry
from llavactl.testing import toy_photos


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAVACTL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    return tmp_path / "home"


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Sequence[Path]:
    return toy_photos(tmp_path_factory.mktemp("photos"), 4)


@pytest.fixture(scope="session")
def create() -> Callable[..., Any]:
    """A function that creates the source ``name`` with options."""

    def create_source(name: str, **options: Any) -> Any:
        return registry().create("sources", {"name": name, **{key: _plain(each) for key, each in options.items()}})

    return create_source


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


@pytest.fixture(scope="session")
def kinds() -> Callable[[Any], list[list[str]]]:
    """A function that lists the kinds of problems of each record: ``json`` if it can't be parsed."""

    def kinds_of(source: Any) -> list[list[str]]:
        return [
            ["json"] if record.problem else [finding.kind for finding in source.examine(record)[0]]
            for record in source.records()
        ]

    return kinds_of
