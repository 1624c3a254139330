"""Answer files of llavactl and of other programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llavactl.core.errors import DataError
from llavactl.core.schema import Answer, Question, Turn
from llavactl.evaluation.answers import check_not_questions, read_answers


def read(tmp_path: Path, *rows: Any) -> dict[str, str]:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return {name: answer.text for name, answer in read_answers(path).items()}


def test_keys_of_published_files(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "text": "one\u2028two\x85three"},
        {"question_id": 2, "id": 9, "answer": ""},
        {"questionId": 3, "pred": "x"},
        {"image_id": 4, "caption": "y"},
    ]
    assert read(tmp_path, *rows) == {"a": "one\u2028two\x85three", "2": "", "3": "x", "4": "y"}


def test_other_keys_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"id": 1, "text": "x", "prompt": "p"}]')
    assert read_answers(tmp_path / "a.json")["1"].extra == {"id": 1, "prompt": "p"}


@pytest.mark.parametrize(
    "row",
    [
        {"id": 1},
        {"text": "x"},
        {"id": None, "text": "x"},
        {"id": 1, "text": None},
        {"id": True, "text": ""},
        {"id": [1], "text": ""},
    ],
)
def test_an_invalid_answer_is_refused_with_its_line(tmp_path: Path, row: Any) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:1: "):
        read(tmp_path, row)


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"results": {"1": "B"}}, "`results` of question '1' is 'B'"),
        ({"results": {"1": True}}, "is True"),
        ({"results": {"1": 99}}, "is 99"),
        ({"results": {"1": 0}, "outputs": {"2": "A"}}, "`outputs`"),
        ({"results": {"1": 0}, "outputs": {"1": None}}, "`outputs` of question '1' is None"),
        (
            {"correct": [{"question_id": "1", "pred": "A"}], "incorrect": [{"question_id": "1", "pred": "B"}]},
            "incorrect 0: duplicate",
        ),
        ({"correct": [3], "incorrect": []}, "correct 0"),
    ],
)
def test_an_invalid_result_file_is_refused(tmp_path: Path, document: Any, expected: str) -> None:
    for indent in (None, 2):
        (tmp_path / "r.json").write_text(json.dumps(document, indent=indent))
        with pytest.raises(DataError) as caught:
            read_answers(tmp_path / "r.json")
        assert expected in caught.value.message


def test_results_without_outputs(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('{"results": {"1": 2, "7": -1}}')
    answers = read_answers(tmp_path / "r.json")
    assert [(each.text, each.extra["index"]) for each in answers.values()] == [("C", 2), ("", -1)]


def test_outputs_without_results_and_results_as_strings(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('{"outputs": {"1": "The answer is C.", "7": ""}}')
    assert [each.text for each in read_answers(tmp_path / "r.json").values()] == ["The answer is C.", ""]
    (tmp_path / "r.json").write_text('{"results": {"1": "2", "7": "-1"}}')
    assert [each.extra["index"] for each in read_answers(tmp_path / "r.json").values()] == [2, -1]


def test_an_empty_file_has_no_answers(tmp_path: Path) -> None:
    assert read(tmp_path) == {}


LAYOUTS: dict[str, tuple[Any, list[str]]] = {
    "lmms-eval samples": (
        {"doc_id": 0, "doc": {"question": "?"}, "target": "A", "resps": [["A"]], "filtered_resps": ["A"]},
        ["doc_id", "filtered_resps"],
    ),
    "lmms-eval results": ({"results": None, "args": {}, "logs": [{"doc_id": 0}]}, ["args", "logs"]),
    "lmms-eval aggregated": ({"results": {"pope": {"acc": 0.9}}, "configs": {}}, ["results", "configs"]),
    "VLMEvalKit as JSON": ({"index": 1, "question": "?", "answer": "A", "prediction": "B"}, ["index", "prediction"]),
    "SEED": ({"question_id": 1, "prediction": "B"}, ["question_id", "prediction"]),
    "MM-Vet upload": ({"v1_0": "a dog", "v1_1": "a cat"}, ["v1_0", "v1_1"]),
    "reference and prediction": ({"id": 1, "answer": "A", "prediction": "B"}, ["`answer`", "`prediction`"]),
    "reference and pred": ({"id": 1, "answer": "A", "pred": "B"}, ["`answer`", "`pred`"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_unsupported_layout_is_refused_with_its_keys(tmp_path: Path, layout: str) -> None:
    record, keys = LAYOUTS[layout]
    for text in (json.dumps(record), json.dumps(record, indent=1)):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(DataError) as caught:
            read_answers(tmp_path / "a.json")
        assert all(each in caught.value.message for each in keys)
        assert caught.value.message.startswith(str(tmp_path / "a.json"))
        assert "text" in caught.value.hint


def test_an_unsupported_file_type_is_refused_by_name(tmp_path: Path) -> None:
    def refusal(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError) as caught:
            read_answers(tmp_path / name)
        assert "question_id" in caught.value.hint
        return caught.value.message

    assert "workbook" in refusal("a.xlsx", b"PK\x03\x04rest")
    assert "index, question, answer, prediction" in refusal(
        "a.tsv", b"index\tquestion\tanswer\tprediction\n1\t?\tA\tB\n"
    )
    assert "index, prediction" in refusal("a.csv", b'\xef\xbb\xbf"index","prediction"\r\n1,B\r\n')
    assert "pickle" in refusal("a.pkl", b"\x80\x04\x95")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "merge.xlsx").write_bytes(b"")
    with pytest.raises(DataError, match=r"merge\.xlsx"):
        read_answers(folder)


def test_equal_answers_under_two_keys_are_one_answer(tmp_path: Path) -> None:
    assert read(
        tmp_path, {"id": 1, "answer": "A", "pred": "A"}, {"id": 2, "text": "B", "answer": "A", "pred": "C"}
    ) == {
        "1": "A",
        "2": "B",
    }


@pytest.mark.parametrize("key", ["generation", "completion", "my_own_key", "pred"])
def test_two_different_answers_are_ambiguous(tmp_path: Path, key: str) -> None:
    """With text under another key, ``answer`` may be the reference."""
    with pytest.raises(DataError, match=f"ambiguous.*`answer`.*`{key}`"):
        read(tmp_path, {"question_id": 1, "answer": "yes", key: "no"})
    assert read(tmp_path, {"question_id": 1, "answer": "yes", "label": "no", "prompt": "Is it?"}) == {"1": "yes"}


def test_a_question_file_is_not_an_answer_file(tmp_path: Path) -> None:
    questions = [Question(str(at), (Turn("user", (f"Is there a cat {at}?\nAnswer yes or no.",)),)) for at in range(3)]
    file = tmp_path / "a.jsonl"
    with pytest.raises(DataError, match=r"a\.jsonl: .*question"):
        check_not_questions(
            file, questions, {each.id: Answer(each.id, f"Is there a cat {each.id}?") for each in questions}
        )
    check_not_questions(file, questions, {each.id: Answer(each.id, "yes") for each in questions})
