"""Files of records as others write them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavactl.core.errors import DataError
from llavactl.files.records import Record, read_document, read_records, read_table, unique

ROWS = [{"id": 1, "text": "é\u2028\x85 line"}, {"id": 2, "text": ""}]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2, ensure_ascii=False),
        "\n".join(map(json.dumps, ROWS)),
        "\ufeff" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\r\n\r\n",
    ],
)
def test_lists_and_lines_are_the_same(tmp_path: Path, text: str) -> None:
    path = tmp_path / "any.suffix"
    path.write_text(text, encoding="utf-8", newline="")
    assert [record.fields for record in read_records(path)] == ROWS
    assert read_document(path) == ROWS


@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers()), max_size=4))
def test_lines_with_any_text_come_back(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, object]]) -> None:
    path = tmp_path_factory.mktemp("records") / "r.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [record.fields for record in read_records(path)] == rows


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b'{"id": 1}\n{"id": 2', "r.jsonl:2: not JSON"),
        (b'{"id": 1}\n3\n', "r.jsonl:2: not an object but 3"),
        (b"[1]", "r.jsonl record 0: not an object"),
        (b'[\n{"id": 1},\n', "r.jsonl:3: not JSON"),
        (b"\xff\xfe{", "r.jsonl: not UTF-8 text"),
        (b'{"id": 1, "id": 2}', "r.jsonl:1: duplicate key 'id'"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, data: bytes, why: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_records(path)
    assert why in caught.value.message


@pytest.mark.parametrize("name", ["none.jsonl", "."])
def test_no_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="directory"):
        read_records(tmp_path / name)


@pytest.mark.parametrize(("text", "kept"), [('{"id": 1}\n{"id"', 1), ('{"id"', 0), ("", 0)])
def test_a_line_may_be_cut_where_that_is_said(tmp_path: Path, text: str, kept: int) -> None:
    (tmp_path / "r.jsonl").write_text(text)
    assert len(read_records(tmp_path / "r.jsonl", cut=True)) == kept


def test_a_table(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('\ufeffid,text\r\n1,"a, b"\r\n\r\n2,\r\n', encoding="utf-8", newline="")
    assert [record.fields for record in read_table(path, "id")] == [
        {"id": "1", "text": "a, b"},
        {"id": "2", "text": ""},
    ]
    with pytest.raises(DataError, match="no column 'x'"):
        read_table(path, "x")
    path.write_text("id,text\n1\n")
    with pytest.raises(DataError, match=r"t\.csv:2: not as many cells"):
        read_table(path, "id", "text")
    path.write_text('id,text\n1,"a')
    with pytest.raises(DataError, match="not a table"):
        read_table(path, "id")


def test_a_field_is_what_it_has_to_be() -> None:
    record = Record("r:1", {"id": True, "text": 3, "other": None, "zero": 0})
    for wrong in (lambda: record.name("id"), lambda: record.text("text"), lambda: record.text("other", "none")):
        with pytest.raises(DataError, match=r"^r:1: "):
            wrong()
    assert record.name("zero") == "0"


def test_twice_is_said_with_both_places() -> None:
    records = [Record(f"r:{at}", {"id": at % 2}) for at in range(4)]
    with pytest.raises(DataError, match=r"^r:2: question '0' is there twice, first at r:0, and 1 more$"):
        unique(records, "id")
