"""Multiple choice: parsing of letters, CircularEval, and images in a table."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from llavactl.components.tasks.multiple_choice import MultipleChoice, MultipleChoiceOptions, parse_letter
from llavactl.testing import check_task

ROWS = [
    {"index": 1, "question": "Which?", "A": "red", "B": "blue", "C": "green", "answer": "B", "category": "colour"},
    {"index": 2, "question": "Who?", "A": "he", "B": "she", "answer": "A", "category": "person", "hint": "Look."},
]


@pytest.fixture
def questions(lines: Any) -> Path:
    return lines("q.jsonl", ROWS)


def test_questions_of_circular_evaluation(questions: Path) -> None:
    rotations = list(MultipleChoice(MultipleChoiceOptions(questions=questions, circular=True)).questions())
    assert [each.id for each in rotations] == ["1", "1+1", "1+2", "2", "2+1"]
    assert [each.reference for each in rotations] == ["B", "A", "C", "A", "B"]
    assert rotations[1].turns[0].text.split("\n")[:4] == ["Which?", "A. blue", "B. green", "C. red"]
    assert rotations[3].turns[0].text.startswith("Look.\nWho?\nA. he\n")


def test_a_constant_answer_fails_circular_evaluation(scored: Any, questions: Path, lines: Any) -> None:
    answers = lines("a.jsonl", ({"id": name, "text": "A"} for name in ("1", "1+1", "1+2", "2", "2+1")))
    once = scored("multiple-choice", "--answers", answers, questions=questions)
    assert once["scores"] == {"accuracy": 50, "colour": 0, "person": 100}
    circle = scored("multiple-choice", "--answers", answers, questions=questions, circular="true")
    assert circle["scores"] == {"accuracy": 0, "once": 50, "colour": 0, "person": 0}
    assert circle["interval"].keys() == {"accuracy", "colour", "person"}


def test_correct_answers_pass_circular_evaluation(scored: Any, questions: Path, lines: Any) -> None:
    texts = {"1": "B. blue", "1+1": "(A)", "1+2": "blue.", "2": "The answer is A.", "2+1": "B"}
    answers = lines("a.jsonl", ({"id": name, "text": text} for name, text in texts.items()))
    report = scored("multiple-choice", "--answers", answers, questions=questions, circular="true")
    assert report["scores"]["accuracy"] == 100
    limited = scored("multiple-choice", "--answers", answers, "--limit", 4, questions=questions, circular="true")
    assert limited["scores"] == {"accuracy": 100, "once": 100, "colour": 100}


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("B", 1),
        ("B. anything", 1),
        ("(C)", 2),
        ("A: red", 0),
        ("Answer: C", 2),
        ("I think the answer is B, as it is", 1),
        ("The answer is A dog", None),
        ("answer is A. answer is B.", None),
        ("A dog", None),
        ("Blue.", 1),
        ("D", None),
        ("same", None),
        ("", None),
    ],
)
def test_parsing(text: str, index: int | None) -> None:
    assert parse_letter(text, ["red", "blue", "green"]) == index


def test_equal_options_are_ambiguous() -> None:
    assert parse_letter("same", ["same", "Same."]) is None


def test_mmbenchs_table(tmp_path: Path) -> None:
    image_bytes = b"\x89PNG" + bytes(range(256))
    head = "index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage"
    row = f'7\t"Two\tlines?"\tnan\tyes\tno\tnan\tnan\tB\tx\t{base64.b64encode(image_bytes).decode()}'
    (tmp_path / "m.tsv").write_text(f"{head}\n{row}\n")
    (question,) = MultipleChoice(MultipleChoiceOptions(questions=tmp_path / "m.tsv")).questions()
    (image,) = question.turns[0].images
    assert image.read() == image_bytes
    assert question.turns[0].text.split("\n")[1:4] == ["Two\tlines?", "A. yes", "B. no"]


@pytest.mark.parametrize("change", [{"answer": "D"}, {"answer": "b"}, {"answer": ""}, {"A": None}, {"answer": "AB"}])
def test_an_invalid_reference(scored: Any, lines: Any, change: dict[str, Any]) -> None:
    error = scored("multiple-choice", "--answers", lines("a.jsonl", []), questions=lines("q.jsonl", [ROWS[0] | change]))
    assert "q.jsonl:1: " in error


def test_the_task_conforms(questions: Path) -> None:
    for circular in (False, True):
        assert check_task(MultipleChoice(MultipleChoiceOptions(questions=questions, circular=circular))) == []


@pytest.fixture
def rotated(tmp_path: Path) -> Path:
    """MMBench's own layout: rotations are rows with indices a million apart."""
    head = "index\tquestion\tA\tB\tC\tanswer\tcategory"
    rows = [
        "7\tWhich?\tred\tblue\tgreen\tB\tcolour",
        "9\tWho?\the\tshe\tnan\tA\tperson",
        "1000007\tWhich?\tgreen\tred\tblue\tC\tcolour",
        "1000009\tWho?\tshe\the\tnan\tB\tperson",
        "2000007\tWhich?\tblue\tgreen\tred\tA\tcolour",
    ]
    (tmp_path / "m.tsv").write_text("\n".join([head, *rows]) + "\n")
    return tmp_path / "m.tsv"


def test_rotations_in_mmbenchs_table_are_used_as_they_are(scored: Any, rotated: Path, lines: Any) -> None:
    texts = {"7": "B", "1000007": "C", "2000007": "A", "9": "A", "1000009": "A"}
    answers = lines("a.jsonl", ({"question_id": int(name), "text": text} for name, text in texts.items()))
    circle = scored("multiple-choice", "--answers", answers, questions=rotated, circular="true")
    assert circle["scores"] == {"accuracy": 50, "once": 100, "colour": 100, "person": 0}
    assert circle["n"] == 5
    assert scored("multiple-choice", "--answers", answers, questions=rotated)["scores"]["accuracy"] == 80


def test_llavas_answers_have_the_rotation_in_round_id(scored: Any, questions: Path, lines: Any) -> None:
    rows = [
        {"question_id": name, "round_id": rotation, "prompt": f"Look.\n{question}\nA. …", "text": "BACAB"[at]}
        for at, (name, rotation, question) in enumerate(
            [(1, 0, "Which?"), (1, 1, "Which?"), (1, 2, "Which?"), (2, 0, "Who?"), (2, 1, "Who?")]
        )
    ]
    report = scored("multiple-choice", "--answers", lines("a.jsonl", rows), questions=questions, circular="true")
    assert report["scores"]["accuracy"] == 100
    rows[3]["prompt"] = "Which?"
    assert "1 of 5 answers" in scored(
        "multiple-choice", "--answers", lines("a.jsonl", rows), questions=questions, circular="true"
    )
