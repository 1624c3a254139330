"""JSON lists, JSONL and tables as other programs write them."""

from __future__ import annotations

import json
import re
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
def test_json_lists_equal_jsonl(tmp_path: Path, text: str) -> None:
    path = tmp_path / "any.suffix"
    path.write_text(text, encoding="utf-8", newline="")
    assert [record.fields for record in read_records(path)] == ROWS
    assert read_document(path) == ROWS


@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers()), max_size=4))
def test_jsonl_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, object]]) -> None:
    path = tmp_path_factory.mktemp("records") / "r.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [record.fields for record in read_records(path)] == rows


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"id": 1}\n{"id": 2', "r.jsonl:2: not JSON"),
        (b'{"id": 1}\n3\n', "r.jsonl:2: expected an object, got 3"),
        (b"[1]", "r.jsonl:1 (record 0): expected an object"),
        (b'[\n{"id": 1},\n', "r.jsonl:3: not JSON"),
        (b"[\n\xff{", "r.jsonl:2: not UTF-8: byte 0xff"),
        (b"[" * 100_000, "r.jsonl:1: not valid"),
        (b'{"id":\n{"a": 1, "a": 2}}', "duplicate key 'a'"),
        (b'{"id": 1, "id": 2}', "r.jsonl:1: duplicate key 'id'"),
    ],
)
def test_errors_name_the_line(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_records(path)
    assert message in caught.value.message
    if "expected an object" not in message:
        with pytest.raises(DataError) as caught:
            read_document(path)
        assert caught.value.message.startswith(f"{path}:")


@pytest.mark.parametrize("name", ["none.jsonl", "."])
def test_a_missing_file_or_a_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=re.escape(str(tmp_path / name))):
        read_records(tmp_path / name)


@pytest.mark.parametrize(("text", "kept"), [('{"id": 1}\n{"id"', 1), ('{"id"', 0), ("", 0)])
def test_an_incomplete_last_line_is_ignored_on_request(tmp_path: Path, text: str, kept: int) -> None:
    (tmp_path / "r.jsonl").write_text(text)
    assert len(read_records(tmp_path / "r.jsonl", truncated=True)) == kept


def test_tables(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('\ufeffid,text\r\n1,"a, b"\r\n\r\n2,\r\n', encoding="utf-8", newline="")
    assert [record.fields for record in read_table(path, "id")] == [
        {"id": "1", "text": "a, b"},
        {"id": "2", "text": ""},
    ]
    with pytest.raises(DataError, match="column 'x'"):
        read_table(path, "x")
    path.write_text("id,text\n1\n")
    with pytest.raises(DataError, match=r"t\.csv:2: .*cells"):
        read_table(path, "id", "text")
    path.write_text('id,text\n1,"a')
    with pytest.raises(DataError, match=r"t\.csv:\d: not a table"):
        read_table(path, "id")


def test_fields_are_type_checked() -> None:
    record = Record("r:1", {"id": True, "text": 3, "other": None, "zero": 0})
    for wrong in (lambda: record.name("id"), lambda: record.text("text"), lambda: record.text("other", "none")):
        with pytest.raises(DataError, match=r"^r:1: "):
            wrong()
    assert record.name("zero") == "0"


def test_a_duplicate_id_is_reported_with_both_locations() -> None:
    records = [Record(f"r:{at}", {"id": at % 2}) for at in range(4)]
    with pytest.raises(DataError, match=r"^r:2: duplicate question '0', first at r:0, and 1 more$"):
        unique(records, "id")
