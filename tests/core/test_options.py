"""Paths and model ids of a recipe: relative to whoever says them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from llavactl.core.options import Located, ModelId, RecipePath
from llavactl.core.registry import Options


class Some(Options):
    path: RecipePath | None = None
    model: ModelId = "x"


def test_a_path_is_relative_to_the_text_that_says_it(tmp_path: Path) -> None:
    assert Some(path=Located("a/b", tmp_path)).path == tmp_path / "a/b"
    assert Some(path=Located("/a/b", tmp_path)).path == Path("/a/b")


def test_plain_text_is_relative_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Some.model_validate({"path": "a"}).path == tmp_path / "a"


def test_a_path_object_stays() -> None:
    assert Some(path=Path("a")).path == Path("a")


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Some.model_validate({"path": "~/a"}).path == tmp_path / "a"
    assert Some.model_validate({"model": "~/a"}).model == str(tmp_path / "a")


@pytest.mark.parametrize("text", ["", "a\0b", "~nobody-has-this-name/a"])
def test_what_is_no_path_is_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        Some.model_validate({"path": text})


def test_a_model_is_an_id_unless_a_folder_is_there(tmp_path: Path) -> None:
    assert Some(model=Located("a/b", tmp_path)).model == "a/b"
    (tmp_path / "a/b").mkdir(parents=True)
    assert Some(model=Located("a/b", tmp_path)).model == str(tmp_path / "a/b")
    assert Some(model=Located("./c", tmp_path)).model == str(tmp_path / "c"), "written like a path"


def test_resolving_again_changes_nothing(tmp_path: Path) -> None:
    once = Some(path=Located("a", tmp_path), model=Located("./m", tmp_path))
    assert Some.model_validate(once.model_dump(mode="json")) == once


@given(st.text(min_size=1).filter(lambda text: "\0" not in text and not text.startswith("~")))
def test_every_path_becomes_absolute_and_plain(text: str) -> None:
    path = Some(path=Located(text, Path("/base"))).path
    assert path is not None
    assert path.is_absolute()


def test_what_a_model_holds_is_plain_text(tmp_path: Path) -> None:
    assert type(Some(model=Located("x/y", tmp_path)).model) is str
