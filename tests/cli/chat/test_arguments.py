"""Names of files in a command, as in a shell."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavactl.cli.chat.arguments import completions, dropped_images, files, missing_images, quoted, words
from llavactl.core.errors import LlavactlError


@given(st.lists(st.text("ab '\"\\\n\tä", min_size=1)))
def test_quoted_names_are_read_back(names: list[str]) -> None:
    assert [word.text for word in words(" ".join(map(quoted, names)))] == names


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", []),
        (" a  b ", ["a", "b"]),
        ("a\\ b", ["a b"]),
        ('\'a "b\'"c d"', ['a "bc d']),
        ("'a", ["a"]),
        ("a\\", ["a\\"]),
    ],
)
def test_words(line: str, expected: list[str]) -> None:
    assert [word.text for word in words(line)] == expected


def test_a_name_is_completed_with_its_quotes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my dir").mkdir()
    for name in ("my dir/it's.png", "my.png", ".hidden", "other\x1b.png"):
        (tmp_path / name).touch()

    def completed(text: str) -> list[str]:
        return [text[:start] + replacement for start, replacement, _ in completions(text)]

    assert completed("m") == ["'my dir/", "my.png"]
    assert completed("x my\\ d") == ["x 'my dir/"]
    assert completed("'my dir/") == ["'my dir/it'\\''s.png'"]
    assert completed("'my dir/it'\\''") == ["'my dir/it'\\''s.png'"]
    assert completed(f"{tmp_path}/my.") == [f"{tmp_path}/my.png"]
    assert completed("my.png ") == ["my.png 'my dir/", "my.png my.png", "my.png other\x1b.png"]
    assert completed("nosuch/") == completed("a\0/") == []
    assert completed(".h") == [".hidden"]


def test_long_lines_are_questions() -> None:
    line = "/a.png " * (1 << 20)
    assert dropped_images(line) == missing_images(line) == []
    with pytest.raises(LlavactlError):
        files(line)


def test_the_tilde_of_an_unknown_user_is_part_of_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~nobody.png").touch()
    for begin in ("", "~no"):
        assert [name for _, name, _ in completions(begin)] == ["./~nobody.png"]
    for line in ("~nobody.png", "\\~nobody.png", "./~nobody.png"):
        assert [Path(name).resolve() for name in files(line)] == [tmp_path / "~nobody.png"]
