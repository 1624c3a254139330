"""Paths and model ids in options are relative to their recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from llavactl.core.options import Located, ModelId, RecipePath
from llavactl.core.registry import Options


class PathOptions(Options):
    path: RecipePath | None = None
    model: ModelId = "x"


def test_a_located_path_is_relative_to_its_base(tmp_path: Path) -> None:
    assert PathOptions(path=Located("a/b", tmp_path)).path == tmp_path / "a/b"
    assert PathOptions(path=Located("/a/b", tmp_path)).path == Path("/a/b")


def test_a_plain_string_is_relative_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert PathOptions.model_validate({"path": "a"}).path == tmp_path / "a"


def test_a_path_object_is_unchanged() -> None:
    assert PathOptions(path=Path("a")).path == Path("a")


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert PathOptions.model_validate({"path": "~/a"}).path == tmp_path / "a"
    assert PathOptions.model_validate({"model": "~/a"}).model == str(tmp_path / "a")
    assert PathOptions(path=Located("./~", tmp_path)).path == tmp_path / "~", "a folder of this name"


@pytest.mark.parametrize("text", ["", "a\0b", "~nobody-has-this-name/a"])
def test_an_invalid_path_is_rejected(text: str) -> None:
    with pytest.raises(ValidationError):
        PathOptions.model_validate({"path": text})


def test_a_model_is_an_id_unless_the_folder_exists(tmp_path: Path) -> None:
    assert PathOptions(model=Located("a/b", tmp_path)).model == "a/b"
    (tmp_path / "a/b").mkdir(parents=True)
    assert PathOptions(model=Located("a/b", tmp_path)).model == str(tmp_path / "a/b")
    assert PathOptions(model=Located("./c", tmp_path)).model == str(tmp_path / "c"), "written like a path"


def test_resolving_is_idempotent(tmp_path: Path) -> None:
    once = PathOptions(path=Located("a", tmp_path), model=Located("./m", tmp_path))
    assert PathOptions.model_validate(once.model_dump(mode="json")) == once


@given(st.text(min_size=1).filter(lambda text: "\0" not in text and not text.startswith("~")))
def test_every_path_becomes_absolute(text: str) -> None:
    path = PathOptions(path=Located(text, Path("/base"))).path
    assert path is not None
    assert path.is_absolute()


def test_a_model_id_becomes_a_plain_string(tmp_path: Path) -> None:
    assert type(PathOptions(model=Located("x/y", tmp_path)).model) is str
