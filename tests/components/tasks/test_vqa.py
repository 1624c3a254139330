"""VQA and TextVQA: the official grade and normalization, and mismatched files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavactl.components.tasks.vqa import soft_accuracy, textvqa_grade, vqa_grade
from llavactl.components.tasks.vqa_normalization import _CONTRACTIONS, normalize_textvqa, normalize_vqa


@given(st.lists(st.sampled_from("abc"), min_size=10, max_size=10), st.sampled_from("abc"))
def test_the_grade_equals_its_definition(people: list[str], answer: str) -> None:
    """min(agreeing / 3, 1), averaged over all subsets of nine of the ten people."""
    nines = [people[:at] + people[at + 1 :] for at in range(10)]
    by_definition = sum(min(1, nine.count(answer) / 3) for nine in nines) / 10
    assert soft_accuracy(people.count(answer), 10) == pytest.approx(by_definition)


@pytest.mark.parametrize(("agree", "grade"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_the_known_grades(agree: int, grade: float) -> None:
    assert soft_accuracy(agree, 10) == pytest.approx(grade)


@pytest.mark.parametrize(
    ("text", "expected"),
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
def test_normalization(text: str, expected: str) -> None:
    assert normalize_vqa(text) == expected


def test_contractions_are_those_of_the_original() -> None:
    """The original table has 120 entries; 2 change nothing, and 4 are capitalized and never match."""
    assert len(_CONTRACTIONS) == 120 - 2 - 4
    assert {_CONTRACTIONS[key] for key in ("hed've", "he'dve")} == {"he'd've"}
    assert {_CONTRACTIONS[key] for key in ("ow's'at", "'ows'at", "'ow'sat")} == {"'ow's'at"}
    assert "shes" not in _CONTRACTIONS


def test_textvqa_has_its_own_normalization() -> None:
    assert normalize_textvqa("Macy's, NY?") == "macy 's ny"
    assert normalize_vqa("Macy's, NY?") == "macy's ny"
    assert textvqa_grade("STOP", ["stop"] * 4 + ["go"] * 6) == 1


def test_unanimous_answers_are_compared_without_normalization() -> None:
    assert vqa_grade("Yes", ["yes"] * 10) == 0
    assert vqa_grade(" yes\n", ["yes"] * 10) == 1
    assert vqa_grade("Yes.", ["yes"] * 9 + ["no"]) == 1


ANSWERS = ["yes"] * 6 + ["no"] * 3 + ["maybe"]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    kinds = ("yes/no", "number", "other")
    questions = [{"question_id": at, "image_id": 42, "question": "Is it?"} for at in range(3)]
    annotations = [
        {"question_id": at, "answer_type": kinds[at], "answers": [{"answer": each} for each in ANSWERS]}
        for at in range(3)
    ]
    (tmp_path / "q.json").write_text(json.dumps({"info": {}, "questions": questions}))
    (tmp_path / "n.json").write_text(json.dumps({"annotations": annotations[::-1]}, indent=1))
    return {"questions": tmp_path / "q.json", "annotations": tmp_path / "n.json"}


def test_vqa(scored: Any, files: dict[str, Path], lines: Any) -> None:
    answers = [{"question_id": at, "answer": text} for at, text in enumerate(("Yes", "no", ""))]
    (files["questions"].parent / "a.json").write_text(json.dumps(answers))
    report = scored("vqa", "--answers", files["questions"].parent / "a.json", **files)
    assert report["scores"]["yes/no"] == 100
    assert report["scores"]["number"] == pytest.approx(90)
    assert report["scores"]["accuracy"] == pytest.approx(190 / 3)
    assert (report["failed"], report["n"], report["protocol"]) == (1, 3, "official")


def test_vqa_uses_cocos_image_names(files: dict[str, Path]) -> None:
    from llavactl.components.tasks.vqa import Vqa, VqaOptions

    first = next(Vqa(VqaOptions(**files)).questions())
    assert [image.name for image in first.turns[0].images] == ["COCO_val2014_000000000042.jpg"]
    assert first.turns[0].text == "\nIs it?\nAnswer the question using a single word or phrase."
    assert first.reference == "yes"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"image": "{:012d}"}, None),
        ({"image": "{1}.jpg"}, "image='{1}.jpg'"),
        ({"image": "../{}.jpg"}, "outside its root"),
        ({"annotations": "q.json"}, "q.json: expected a list of objects in 'annotations'"),
    ],
)
def test_mismatched_options(
    scored: Any, files: dict[str, Path], lines: Any, options: dict[str, Any], expected: str | None
) -> None:
    answers = lines("a.jsonl", ({"question_id": at, "answer": "no"} for at in range(3)))
    result = scored("vqa", "--answers", answers, **{**files, **options})
    assert (expected or "") in str(result)
    assert (expected is None) == isinstance(result, dict)


def test_fewer_than_ten_human_answers(scored: Any, files: dict[str, Path], lines: Any) -> None:
    document = json.loads(files["annotations"].read_text())
    answers = lines("a.jsonl", ({"question_id": at, "answer": "no"} for at in range(3)))
    for broken in ([], None, [{"answer": 3}] * 10, [{"answer": "x"}] * 9):
        document["annotations"][0]["answers"] = broken
        files["annotations"].write_text(json.dumps(document))
        assert "n.json annotations 0: `answers`: expected 10" in scored("vqa", "--answers", answers, **files)
    document["annotations"] = document["annotations"][1:]
    files["annotations"].write_text(json.dumps(document))
    assert "n.json: 1 of 3 questions have no annotation" in scored("vqa", "--answers", answers, **files)


def test_textvqa(scored: Any, tmp_path: Path, lines: Any) -> None:
    data = [{"question_id": 7, "image_id": "00a", "question": "What does it say?", "answers": ["Coca-Cola"] * 10}]
    (tmp_path / "t.json").write_text(json.dumps({"data": data}))
    answers = lines("a.jsonl", [{"question_id": 7, "text": "coca cola"}])
    assert scored("textvqa", "--answers", answers, questions=tmp_path / "t.json")["scores"] == {"accuracy": 100}


def test_llavas_answers_to_textvqa_are_joined_by_image_and_prompt(scored: Any, tmp_path: Path, lines: Any) -> None:
    data = [
        {"question_id": at, "image_id": "00a", "question": question, "answers": [reference] * 10}
        for at, (question, reference) in enumerate((("What does it say?", "stop"), ("Which colour?", "red")))
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


def test_an_old_prompt_of_textvqa_and_unmatched_answers(scored: Any, tmp_path: Path, lines: Any) -> None:
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
    assert "1 of 3 answers" in scored("vqa", "--answers", lines("a.jsonl", rows), **files)
