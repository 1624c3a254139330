"""Multiple choice: letters read, options turned in a circle, pictures inside a table."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from llavactl.components.tasks.multiple_choice import MultipleChoice, MultipleChoiceOptions, read_letter
from llavactl.testing import check_task

ROWS = [
    {"index": 1, "question": "Which?", "A": "red", "B": "blue", "C": "green", "answer": "B", "category": "colour"},
    {"index": 2, "question": "Who?", "A": "he", "B": "she", "answer": "A", "category": "person", "hint": "Look."},
]


@pytest.fixture
def questions(lines: Any) -> Path:
    return lines("q.jsonl", ROWS)


def test_asked_in_a_circle(questions: Path) -> None:
    asked = list(MultipleChoice(MultipleChoiceOptions(questions=questions, circular=True)).questions())
    assert [each.id for each in asked] == ["1", "1+1", "1+2", "2", "2+1"]
    assert [each.reference for each in asked] == ["B", "A", "C", "A", "B"]
    assert asked[1].turns[0].text.split("\n")[:4] == ["Which?", "A. blue", "B. green", "C. red"]
    assert asked[3].turns[0].text.startswith("Look.\nWho?\nA. he\n")


def test_who_always_says_the_same_gets_nothing_in_a_circle(scored: Any, questions: Path, lines: Any) -> None:
    answers = lines("a.jsonl", ({"id": name, "text": "A"} for name in ("1", "1+1", "1+2", "2", "2+1")))
    once = scored("multiple-choice", "--answers", answers, questions=questions)
    assert once["scores"] == {"accuracy": 50, "colour": 0, "person": 100}
    circle = scored("multiple-choice", "--answers", answers, questions=questions, circular="true")
    assert circle["scores"] == {"accuracy": 0, "once": 50, "colour": 0, "person": 0}
    assert circle["interval"].keys() == {"accuracy", "colour", "person"}


def test_who_knows_gets_all(scored: Any, questions: Path, lines: Any) -> None:
    said = {"1": "B. blue", "1+1": "(A)", "1+2": "blue.", "2": "The answer is A.", "2+1": "B"}
    answers = lines("a.jsonl", ({"id": name, "text": text} for name, text in said.items()))
    report = scored("multiple-choice", "--answers", answers, questions=questions, circular="true")
    assert report["scores"]["accuracy"] == 100
    some = scored("multiple-choice", "--answers", answers, "--limit", 4, questions=questions, circular="true")
    assert some["scores"] == {"accuracy": 100, "once": 100, "colour": 100}


@pytest.mark.parametrize(
    ("text", "place"),
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
def test_reading(text: str, place: int | None) -> None:
    assert read_letter(text, ["red", "blue", "green"]) == place


def test_two_options_alike_are_no_choice() -> None:
    assert read_letter("same", ["same", "Same."]) is None


def test_mmbench_s_table(tmp_path: Path) -> None:
    picture = b"\x89PNG" + bytes(range(256))
    head = "index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage"
    row = f'7\t"Two\tlines?"\tnan\tyes\tno\tnan\tnan\tB\tx\t{base64.b64encode(picture).decode()}'
    (tmp_path / "m.tsv").write_text(f"{head}\n{row}\n")
    (question,) = MultipleChoice(MultipleChoiceOptions(questions=tmp_path / "m.tsv")).questions()
    (image,) = question.turns[0].images
    assert image.read() == picture
    assert question.turns[0].text.split("\n")[1:4] == ["Two\tlines?", "A. yes", "B. no"]


@pytest.mark.parametrize("change", [{"answer": "D"}, {"answer": "b"}, {"answer": ""}, {"A": None}, {"answer": "AB"}])
def test_no_right_option(scored: Any, lines: Any, change: dict[str, Any]) -> None:
    said = scored("multiple-choice", "--answers", lines("a.jsonl", []), questions=lines("q.jsonl", [ROWS[0] | change]))
    assert "q.jsonl:1: " in said


def test_it_conforms(questions: Path) -> None:
    for circular in (False, True):
        assert check_task(MultipleChoice(MultipleChoiceOptions(questions=questions, circular=circular))) == []


@pytest.fixture
def turned(tmp_path: Path) -> Path:
    """As MMBench's own table has it: the turns are rows, a million apart."""
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


def test_the_turns_of_mmbench_s_own_table_are_taken_as_they_are(scored: Any, turned: Path, lines: Any) -> None:
    said = {"7": "B", "1000007": "C", "2000007": "A", "9": "A", "1000009": "A"}
    answers = lines("a.jsonl", ({"question_id": int(name), "text": text} for name, text in said.items()))
    circle = scored("multiple-choice", "--answers", answers, questions=turned, circular="true")
    assert circle["scores"] == {"accuracy": 50, "once": 100, "colour": 100, "person": 0}
    assert circle["n"] == 5
    assert scored("multiple-choice", "--answers", answers, questions=turned)["scores"]["accuracy"] == 80


def test_llava_s_answers_name_the_round(scored: Any, questions: Path, lines: Any) -> None:
    rows = [
        {"question_id": name, "round_id": turn, "prompt": f"Look.\n{asked}\nA. …", "text": "BACAB"[at]}
        for at, (name, turn, asked) in enumerate(
            [(1, 0, "Which?"), (1, 1, "Which?"), (1, 2, "Which?"), (2, 0, "Who?"), (2, 1, "Who?")]
        )
    ]
    report = scored("multiple-choice", "--answers", lines("a.jsonl", rows), questions=questions, circular="true")
    assert report["scores"]["accuracy"] == 100
    rows[3]["prompt"] = "Which?"
    assert "1 of 5 answers are to other questions" in scored(
        "multiple-choice", "--answers", lines("a.jsonl", rows), questions=questions, circular="true"
    )
