"""Streams of JSON values: equal to json.load, with lines, and continued after errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavactl.core.errors import DataError
from llavactl.files import json_stream
from llavactl.files.json_stream import JsonEntry, read_stream, write_stream

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


def read(path: Path, text: str | bytes) -> list[JsonEntry]:
    path.write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
    return list(read_stream(path))


@settings(max_examples=150)
@given(st.lists(VALUES, max_size=6), st.sampled_from([None, 0, 1]), st.integers(1, 40), st.booleans())
def test_an_array_equals_json_load_for_any_chunk_size(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], indent: int | None, chunk: int, ascii_only: bool
) -> None:
    path = tmp_path_factory.mktemp("array") / "a.json"
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "CHUNK", chunk)
        if not any("\ud800" <= sign <= "\udfff" for sign in text):
            entries = read(path, text)
            assert [(entry.value, entry.problem) for entry in entries] == [(value, "") for value in values]
            assert [entry.index for entry in entries] == list(range(len(values)))


@settings(max_examples=100)
@given(st.lists(st.integers(), min_size=1, max_size=12), st.data())
def test_an_invalid_record_loses_no_other(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[int], data: st.DataObject
) -> None:
    """One record of a list is truncated: all others are read, and the problem has its line."""
    path = tmp_path_factory.mktemp("broken") / "a.json"
    at = data.draw(st.integers(0, len(numbers) - 1))
    lines = [json.dumps({"id": number, "conversations": [{"from": "human", "value": "{[hi"}]}) for number in numbers]
    lines[at] = lines[at][: data.draw(st.integers(2, len(lines[at]) - 1))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "CHUNK", data.draw(st.integers(1, 200)))
        entries = read(path, "[\n" + ",\n".join(lines) + "\n]")
    good = [entry.value["id"] for entry in entries if not entry.problem]
    assert good == numbers[:at] + numbers[at + 1 :]
    first = next(entry for entry in entries if entry.problem)
    assert first.line == at + 2 or f"the record begins at line {at + 2})" in first.problem
    jsonl = read(path.with_suffix(".jsonl"), "\n".join(lines))
    assert [entry.line for entry in jsonl if entry.problem] == [at + 1]
    assert [entry.value["id"] for entry in jsonl if not entry.problem] == good


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ('[{"id": 1},\n{"id": 2},\n]', 3, "comma before the end"),
        ('[{"id": 1}\n{"id": 2}]', 2, "missing comma (column 1)"),
        ('[{"id": 1},\n{"id": 2}\n', 3, "ends inside the list"),
        ('[{"id": 1}, {"id": 2}]\nmore', 2, "text after the end of the list"),
        ('[{"id": 1},\n {"id": 2, "x": nul},{"id": 2}]', 2, "Expecting value (column 17)"),
        (b'[{"id": 1},\n{"id": "\xe9"}, {"id": 2}]', 2, "not UTF-8: byte 0xe9"),
        (b'{"id": 1}\n{"id": "\xff"}\n{"id": 2}', 2, "not UTF-8: byte 0xff"),
        ('{"id": 1}\n\n{"id": 2\n{"id": 2}', 3, "Expecting ',' delimiter"),
        ('[{"id": 1}, ' + "[" * 100_000 + ', {"id": 2}]', 1, "nested too deeply"),
        ('{"id": 1}\n{"id": ' + "9" * 6000 + '}\n{"id": 2}', 2, "thousands of digits"),
        ('[{"id": 1},\n{"id": ' + "9" * 6000 + '},\n{"id": 2}]', 2, "thousands of digits"),
        ('{"id": 1}\n{"image": "\\ud83d.jpg"}\n{"id": 2}', 2, "lone surrogate \\ud83d"),
        ('[{"id": 1},\n{"image": "\\uDE00"},\n{"id": 2}]', 2, "lone surrogate \\ude00"),
    ],
)
def test_an_error_has_its_line_and_reading_goes_on(tmp_path: Path, text: str | bytes, line: int, problem: str) -> None:
    entries = read(tmp_path / "a.json", text)
    (invalid,) = [entry for entry in entries if entry.problem]
    assert invalid.line == line
    assert problem in invalid.problem
    assert [entry.value["id"] for entry in entries if not entry.problem][:1] == [1]
    if "ends inside" not in problem:
        assert entries[-1].value == {"id": 2} or "end" in problem


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json"):
        list(read_stream(tmp_path / "none.json"))


@settings(max_examples=50)
@given(
    st.lists(st.dictionaries(st.text(max_size=3), VALUES, max_size=3), max_size=5), st.sampled_from(["json", "jsonl"])
)
def test_written_records_are_read_back(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, Any]], suffix: str
) -> None:
    path = tmp_path_factory.mktemp("write") / f"a.{suffix}"
    with write_stream(path) as write:
        for record in records:
            write(record)
    if suffix == "json":
        assert json.loads(path.read_bytes().decode("utf-8", "surrogatepass")) == records
    if "\\ud" not in json.dumps(records):
        assert [entry.value for entry in read_stream(path)] == records


def test_surrogate_pairs_are_decoded_and_lone_surrogates_are_escaped(tmp_path: Path) -> None:
    (entry,) = read(tmp_path / "a.jsonl", '{"id": "\\ud83d\\ude00"}')
    assert (entry.value, entry.problem) == ({"id": "😀"}, "")
    with write_stream(tmp_path / "b.jsonl") as write:
        write({"id": "\ud83d"})
        write({"id": "é"})
    assert (tmp_path / "b.jsonl").read_text("utf-8") == '{"id": "\\ud83d"}\n{"id": "é"}\n'


def interrupted(path: Path) -> None:
    with write_stream(path) as write:
        write({"id": 1})
        raise KeyboardInterrupt


def test_an_interrupted_write_leaves_the_file_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt):
        interrupted(path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(DataError, match=r"\.json or \.jsonl"), write_stream(tmp_path / "a.csv"):
        pass
