"""Recipe files as trees: YAML 1.2, line numbers, refused files, merging, setting one value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml as pyyaml
from hypothesis import given, settings
from hypothesis import strategies as st

from llavactl.core.errors import Problem, RecipeError
from llavactl.core.options import Located
from llavactl.recipe import document
from llavactl.recipe.document import Node, merge, parse, put, read, write


def tree(text: str, problems: list[Problem] | None = None) -> Node:
    return parse(text, Path("/base"), lambda line: f"f:{line}", [] if problems is None else problems)


def plain(text: str) -> Any:
    return tree(text).plain()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("2E5", 200000.0),
        (".5", 0.5),
        ("1_000", 1000),
        ("0o17", 15),
        ("017", 17),
        ("0x1F", 31),
        ("-7", -7),
        ("+7", 7),
        (".inf", float("inf")),
        ("-.INF", float("-inf")),
        ("true", True),
        ("FALSE", False),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("no", "no"),
        ("NO", "NO"),
        ("y", "y"),
        ("~", None),
        ("null", None),
        ("", None),
        ("'5'", "5"),
        ("12:30:00", "12:30:00"),
        ("2024-01-01", "2024-01-01"),
        ("!!str 5", "5"),
        ("[no, 1, {a: ~}]", ["no", 1, {"a": None}]),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    parsed = plain(f"key: {text}")["key"]
    assert parsed == value
    assert type(parsed) is type(value) or (isinstance(parsed, Located) and isinstance(value, str))


def test_a_yaml_1_1_directive_does_not_enable_yaml_1_1_scalars() -> None:
    assert plain("%YAML 1.1\n---\ncountry: no\nat: 12:30") == {"country": "no", "at": "12:30"}


def test_merge_keys_are_ordinary_keys() -> None:
    assert plain("a: &x {k: 1}\nb: {<<: *x}")["b"] == {"<<": {"k": 1}}


def test_strings_have_the_folder_of_the_file() -> None:
    value = plain("a: {b: [x]}")["a"]["b"][0]
    assert isinstance(value, Located)
    assert value.base == Path("/base")


def test_every_value_has_its_line() -> None:
    root = tree("a: 1\nb:\n  c:\n    - x\n    - {d: 2,\n       e: 3}\n")
    assert root.origin(["a"]) == "f:1"
    assert root.origin(["b"]) == "f:2"
    assert root.origin(["b", "c", 1, "e"]) == "f:6"
    assert root.origin(["b", "c", 7]) == "f:3", "the innermost existing value"
    assert root.origin(["z"]) == "f:1"


def test_duplicate_keys_and_unknown_tags_are_problems() -> None:
    problems: list[Problem] = []
    assert tree("a: 1\na: 2\nb: {c: 1, c: 2}\nd: !thing 3\n? [x]\n: 1\n", problems).plain() == {
        "a": 1,
        "b": {"c": 1},
        "d": "3",
    }
    expected = [
        ("f:2", "a", "f:1"),
        ("f:3", "b.c", "f:3"),
        ("f:4", "d", "!thing"),
        ("f:5", "", "key"),
    ]
    assert [(problem.where, problem.key) for problem in problems] == [(where, key) for where, key, _ in expected]
    assert all(term in problem.why for problem, (_, _, term) in zip(problems, expected, strict=True))


@pytest.mark.parametrize(
    ("text", "line", "term"),
    [
        ("a: [1\nb: 2", 2, "expected ',' or ']'"),
        ("a: 1\n\tb: 2", 2, "tab"),
        ("a: b: c", 1, "mapping values are not allowed here"),
        ("a: *x", 1, "undefined alias"),
        ("--- {a: 1}\n--- {b: 1}", 2, "another document"),
        ("a: 'x", 1, "unexpected end"),
        ("a: &x [*x]", 1, "alias"),
        ("a: " + "[" * 1200, 1, "nested"),
        ("a: \x00", 1, "text"),
    ],
)
def test_invalid_yaml_has_its_line(text: str, line: int, term: str) -> None:
    with pytest.raises(RecipeError) as caught:
        tree(text)
    (problem,) = caught.value.problems
    assert problem.where == f"f:{line}"
    assert term in problem.why
    assert "\n" not in problem.why


def test_nested_aliases_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document, "MAX_VALUES", 1000)
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 8)}]" for n in range(1, 9)]
    with pytest.raises(RecipeError, match="1000"):
        tree("\n".join(lines))


class TestFiles:
    def refusal(self, file: Path) -> str:
        with pytest.raises(RecipeError) as caught:
            read(file, file.parent, [])
        assert len(caught.value.problems) == 1
        assert "\n" not in str(caught.value)
        return str(caught.value)

    @pytest.mark.parametrize(
        ("content", "term"),
        [
            (b"", "empty"),
            (b"# only a comment\n", "empty"),
            (b"- a\n- b\n", "mapping"),
            (b"plain text", "mapping"),
            (b"\x89PNG\r\n\x1a\n\x00\xff", "UTF-8"),
            (b"name: \x07", "text"),
            (b"#" * (document.MAX_BYTES + 1), "1000001 bytes"),
        ],
    )
    def test_content(self, tmp_path: Path, content: bytes, term: str) -> None:
        file = tmp_path / "recipe.yaml"
        file.write_bytes(content)
        assert term in self.refusal(file)

    def test_missing(self, tmp_path: Path) -> None:
        assert "none.yaml" in self.refusal(tmp_path / "none.yaml")

    def test_folder(self, tmp_path: Path) -> None:
        (tmp_path / "mine.yaml").touch()
        with pytest.raises(RecipeError, match="folder") as caught:
            read(tmp_path, tmp_path, [])
        assert "mine.yaml" in caught.value.hint

    def test_a_byte_order_mark_is_ignored(self, tmp_path: Path) -> None:
        (tmp_path / "recipe.yaml").write_bytes(b"\xef\xbb\xbfname: x\n")
        assert read(tmp_path / "recipe.yaml", tmp_path, []).plain() == {"name": "x"}


# ruamel.yaml writes NEL (U+0085) unescaped, but reads it as a line break.
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x85"))
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT
DATA = st.dictionaries(
    TEXT,
    st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4)),
    max_size=6,
)


@settings(max_examples=50)
@given(DATA)
def test_written_data_is_read_back_equal(data: dict[str, Any]) -> None:
    assert plain(write(data)) == data


@settings(max_examples=50)
@given(st.floats(allow_nan=False))
def test_written_numbers_are_numbers_in_yaml_1_1(number: float) -> None:
    assert pyyaml.safe_load(write({"x": number})) == {"x": number}


def node(value: Any, where: str = "p") -> Node:
    if isinstance(value, dict):
        return Node({key: node(inner, where) for key, inner in value.items()}, where)
    if isinstance(value, list):
        return Node([node(inner, where) for inner in value], where)
    return Node(value, where)


@settings(max_examples=50)
@given(DATA)
def test_merging_with_nothing_or_itself_changes_nothing(data: dict[str, Any]) -> None:
    assert merge(node(data), node({})).plain() == data
    assert merge(node({}), node(data)).plain() == data
    assert merge(node(data), node(data)).plain() == data


@pytest.mark.parametrize(
    ("parent", "child", "merged"),
    [
        ({"a": 1, "b": {"c": 1, "d": 2}}, {"b": {"d": 3}}, {"a": 1, "b": {"c": 1, "d": 3}}),
        ({"l": [1, 2]}, {"l": [3]}, {"l": [3]}),
        ({"a": {"b": 1}}, {"a": 2}, {"a": 2}),
        ({"a": 2}, {"a": {"b": 1}}, {"a": {"b": 1}}),
        ({"v": {"name": "x", "o": 1}}, {"v": {"name": "x", "p": 2}}, {"v": {"name": "x", "o": 1, "p": 2}}),
        ({"v": {"name": "x", "o": 1}}, {"v": {"p": 2}}, {"v": {"name": "x", "o": 1, "p": 2}}),
        ({"v": {"name": "x", "o": 1}}, {"v": {"name": "y", "p": 2}}, {"v": {"name": "y", "p": 2}}),
        ({"name": "x", "run_dir": "r", "s": 1}, {"name": "y"}, {"name": "y", "s": 1}),
        ({"name": "x", "run_dir": "r"}, {"name": "x"}, {"name": "x", "run_dir": "r"}),
    ],
)
def test_merge(parent: dict[str, Any], child: dict[str, Any], merged: dict[str, Any]) -> None:
    assert merge(node(parent), node(child)).plain() == merged


def test_merged_values_keep_their_origin() -> None:
    merged = merge(node({"a": 1, "b": {"c": 1, "d": 1}}, "parent"), node({"b": {"d": 2}}, "child"))
    assert merged.origin(["a"]) == "parent"
    assert merged.origin(["b", "c"]) == "parent"
    assert merged.origin(["b", "d"]) == "child"


@pytest.mark.parametrize(
    ("before", "path", "after"),
    [
        ({}, "a", {"a": 9}),
        ({}, "a.b.c", {"a": {"b": {"c": 9}}}),
        ({"a": None}, "a.b", {"a": {"b": 9}}),
        ({"a": [{"b": 1}]}, "a.0.b", {"a": [{"b": 9}]}),
        ({"a": [1]}, "a.1", {"a": [1, 9]}),
        ({}, "a.0.b", {"a": [{"b": 9}]}),
        ({"a": {"b": 1}}, "a", {"a": 9}),
    ],
)
def test_put(before: dict[str, Any], path: str, after: dict[str, Any]) -> None:
    root = node(before)
    assert put(root, path.split("."), Node(9, "-o")) == ""
    assert root.plain() == after


@pytest.mark.parametrize(
    ("before", "path", "term"),
    [
        ({"a": 1}, "a.b", "a is 1"),
        ({"a": [1]}, "a.x", "'x'"),
        ({"a": [1]}, "a.2", "'2'"),
        ({"a": {"b": [1]}}, "a.b.-1", "a.b is a list"),
    ],
)
def test_put_refuses_paths_that_do_not_exist(before: dict[str, Any], path: str, term: str) -> None:
    assert term in put(node(before), path.split("."), Node(9, "-o"))
