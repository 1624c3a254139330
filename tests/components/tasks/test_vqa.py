"""VQA and TextVQA: the official grade by its definition, its forms of words, and files that don't fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavactl.components.tasks.vqa import soft, text_vqa_grade, vqa_grade
from llavactl.components.tasks.vqa_words import _CONTRACTIONS, normal, text_vqa


@given(st.lists(st.sampled_from("abc"), min_size=10, max_size=10), st.sampled_from("abc"))
def test_the_grade_by_its_definition(people: list[str], answer: str) -> None:
    """min(agreeing / 3, 1), averaged over every nine of the ten people."""
    nines = [people[:at] + people[at + 1 :] for at in range(10)]
    by_definition = sum(min(1, nine.count(answer) / 3) for nine in nines) / 10
    assert soft(people.count(answer), 10) == pytest.approx(by_definition)


@pytest.mark.parametrize(("agree", "grade"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_the_known_grades(agree: int, grade: float) -> None:
    assert soft(agree, 10) == pytest.approx(grade)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("Two dogs, a cat.", "2 dogs cat"),
        ("The  End", "end"),
        ("none", "0"),
        ("10,000", "10000"),
        ("10,000 x/y", "10000 xy"),
        ("x/y", "x y"),
        ("x /y", "x y"),
        ("1.5 m.", "1.5 m"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldntve", "couldntve"),
        ("somebody'd", "somebodyd"),
        ("yall'd've", "y'all'd've"),
        ("lets", "lets"),
        ("a", ""),
        ("", ""),
        ("Café", "café"),
    ],
)
def test_forms(text: str, form: str) -> None:
    assert normal(text) == form


def test_contractions_are_those_of_the_original() -> None:
    """Its table has 120 entries; two of them change nothing, four are in capitals and so never found."""
    assert len(_CONTRACTIONS) == 120 - 2 - 4
    assert {_CONTRACTIONS[key] for key in ("hed've", "he'dve")} == {"he'd've"}
    assert {_CONTRACTIONS[key] for key in ("ow's'at", "'ows'at", "'ow'sat")} == {"'ow's'at"}
    assert "shes" not in _CONTRACTIONS


def test_text_vqa_has_a_form_of_its_own() -> None:
    assert text_vqa("Macy's, NY?") == "macy 's ny"
    assert normal("Macy's, NY?") == "macy's ny"
    assert text_vqa_grade("STOP", ["stop"] * 4 + ["go"] * 6) == 1


def test_where_all_people_agree_the_answer_is_compared_as_it_stands() -> None:
    assert vqa_grade("Yes", ["yes"] * 10) == 0
    assert vqa_grade(" yes\n", ["yes"] * 10) == 1
    assert vqa_grade("Yes.", ["yes"] * 9 + ["no"]) == 1


ANSWERS = ["yes"] * 6 + ["no"] * 3 + ["maybe"]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    kinds = ("yes/no", "number", "other")
    questions = [{"question_id": at, "image_id": 42, "question": "Is it?"} for at in range(3)]
    notes = [
        {"question_id": at, "answer_type": kinds[at], "answers": [{"answer": each} for each in ANSWERS]}
        for at in range(3)
    ]
    (tmp_path / "q.json").write_text(json.dumps({"info": {}, "questions": questions}))
    (tmp_path / "n.json").write_text(json.dumps({"annotations": notes[::-1]}, indent=1))
    return {"questions": tmp_path / "q.json", "annotations": tmp_path / "n.json"}


def test_vqa(scored: Any, files: dict[str, Path], lines: Any) -> None:
    said = [{"question_id": at, "answer": text} for at, text in enumerate(("Yes", "no", ""))]
    (files["questions"].parent / "a.json").write_text(json.dumps(said))
    report = scored("vqa", "--answers", files["questions"].parent / "a.json", **files)
    assert report["scores"]["yes/no"] == 100
    assert report["scores"]["number"] == pytest.approx(90)
    assert report["scores"]["accuracy"] == pytest.approx(190 / 3)
    assert (report["failed"], report["n"], report["protocol"]) == (1, 3, "official")


def test_vqa_asks_with_coco_s_names(files: dict[str, Path]) -> None:
    from llavactl.components.tasks.vqa import Vqa, VqaOptions

    first = next(Vqa(VqaOptions(**files)).questions())
    assert [image.name for image in first.turns[0].images] == ["COCO_val2014_000000000042.jpg"]
    assert first.turns[0].text == "\nIs it?\nAnswer the question using a single word or phrase."
    assert first.reference == "yes"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"image": "{:012d}"}, None),
        ({"image": "{1}.jpg"}, "makes no file of its image_id"),
        ({"image": "../{}.jpg"}, "outside its root"),
        ({"annotations": "q.json"}, "there is no list 'annotations'"),
    ],
)
def test_options_that_do_not_fit(
    scored: Any, files: dict[str, Path], lines: Any, options: dict[str, Any], why: str | None
) -> None:
    answers = lines("a.jsonl", ({"question_id": at, "answer": "no"} for at in range(3)))
    said = scored("vqa", "--answers", answers, **{**files, **options})
    assert (why or "") in str(said)
    assert (why is None) == isinstance(said, dict)


def test_not_ten_people(scored: Any, files: dict[str, Path], lines: Any) -> None:
    document = json.loads(files["annotations"].read_text())
    answers = lines("a.jsonl", ({"question_id": at, "answer": "no"} for at in range(3)))
    for broken in ([], None, [{"answer": 3}] * 10, [{"answer": "x"}] * 9):
        document["annotations"][0]["answers"] = broken
        files["annotations"].write_text(json.dumps(document))
        assert "not those of 10 people" in scored("vqa", "--answers", answers, **files)
    document["annotations"] = document["annotations"][1:]
    files["annotations"].write_text(json.dumps(document))
    assert "no answers to 1 of 3 questions" in scored("vqa", "--answers", answers, **files)


def test_textvqa(scored: Any, tmp_path: Path, lines: Any) -> None:
    data = [{"question_id": 7, "image_id": "00a", "question": "What does it say?", "answers": ["Coca-Cola"] * 10}]
    (tmp_path / "t.json").write_text(json.dumps({"data": data}))
    answers = lines("a.jsonl", [{"question_id": 7, "text": "coca cola"}])
    assert scored("textvqa", "--answers", answers, questions=tmp_path / "t.json")["scores"] == {"accuracy": 100}


def test_llava_s_answers_to_textvqa_name_the_picture(scored: Any, tmp_path: Path, lines: Any) -> None:
    data = [
        {"question_id": at, "image_id": "00a", "question": question, "answers": [gold] * 10}
        for at, (question, gold) in enumerate((("What does it say?", "stop"), ("Which colour?", "red")))
    ]
    (tmp_path / "t.json").write_text(json.dumps({"data": data}))
    rows = [
        {"question_id": "00a", "prompt": "which colour?\nReference OCR token: STOP\nAnswer …", "text": "red"},
        {"question_id": "00a", "prompt": "What does it say?\nAnswer the question …", "text": "go"},
    ]
    report = scored("textvqa", "--answers", lines("a.jsonl", rows), questions=tmp_path / "t.json")
    assert report["scores"] == {"accuracy": 50}
    error = scored("textvqa", "--answers", lines("a.jsonl", [*rows, rows[0]]), questions=tmp_path / "t.json")
    assert "a.jsonl:3: duplicate answer" in error


def test_an_old_prompt_of_textvqa_and_answers_beyond(scored: Any, tmp_path: Path, lines: Any) -> None:
    data = [{"question_id": 3, "image_id": "00a", "question": "What does it say?", "answers": ["stop"] * 10}]
    (tmp_path / "t.json").write_text(json.dumps({"data": data}))
    rows = [
        {"question_id": "00a", "prompt": "OCR tokens: STOP. Question: What does it say? Short answer:", "text": "stop"},
        {"question_id": "00a", "prompt": "Who made it?\nAnswer …", "text": "x"},
        {"question_id": "00a", "prompt": "Where is it?\nAnswer …", "text": "y"},
    ]
    report = scored("textvqa", "--answers", lines("a.jsonl", rows), questions=tmp_path / "t.json")
    assert (report["scores"], report["ignored"]) == ({"accuracy": 100}, 2)


def test_answers_to_other_questions(scored: Any, files: dict[str, Path], lines: Any) -> None:
    rows = [{"question_id": at, "prompt": "is  it?\nAnswer …", "text": "yes"} for at in range(3)]
    assert scored("vqa", "--answers", lines("a.jsonl", rows), **files)["n"] == 3
    rows[1]["prompt"] = "Was it?"
    assert "1 of 3 answers are to other questions" in scored("vqa", "--answers", lines("a.jsonl", rows), **files)
