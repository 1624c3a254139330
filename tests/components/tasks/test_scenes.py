"""The task ``scenes``: questions, parsing of answers, and scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from llavactl.components.sources.scenes import ScenesOptions, scenes
from llavactl.components.sources.scenes.questions import CATEGORIES
from llavactl.components.tasks.scenes import ScenesTask, ScenesTaskOptions, parse_answer
from llavactl.core.protocols import Task
from llavactl.core.schema import Answer, ImageRef, Question

REFERENCES = ("red", "circle", "2", "yes", "no", "left", "above")


def _score(task: ScenesTask, answer: Callable[[Question], str]) -> dict:
    answers = {question.id: Answer(question.id, answer(question)) for question in task.questions()}
    scores = task.score(answers, "exact")
    return {**scores.scores, "failed": scores.failed}


@pytest.fixture(scope="module")
def task() -> ScenesTask:
    return ScenesTask(ScenesTaskOptions())


# Questions


def test_it_implements_the_protocol(task: ScenesTask) -> None:
    assert isinstance(task, Task)
    assert task.protocols == ("exact",)


def test_each_question_has_one_turn_with_its_image(task: ScenesTask) -> None:
    questions = list(task.questions())
    assert len(questions) == 1200
    assert len({question.id for question in questions}) == 1200
    assert questions[-1].id == "test-00199/5"
    for question in questions:
        (turn,) = question.turns
        image, text = turn.content
        assert turn.role == "user"
        assert isinstance(image, ImageRef)
        assert isinstance(text, str)
        assert text.startswith("\n")
        assert text.endswith("?")
        assert question.id.startswith(image.name.removeprefix("scenes/").removesuffix(".png"))
    assert set(Counter(question.category for question in questions)) == set(CATEGORIES)


def test_questions_equal_those_of_the_source() -> None:
    task = ScenesTask(ScenesTaskOptions(split="train", scenes=9, seed=4, questions=3, size=112))
    source = list(scenes(ScenesOptions(split="train", scenes=9, seed=4, questions=3, size=112)))
    texts = [turn.text.strip() for sample in source for turn in sample.turns]
    questions = list(task.questions())
    assert [question.turns[0].text.strip() for question in questions] == texts[::2]
    assert [question.reference for question in questions] == texts[1::2]
    assert {question.turns[0].images for question in questions} == {sample.images for sample in source}


@pytest.mark.parametrize("wrong", [{"scenes": 0}, {"split": "dev"}, {"content": "questions"}])
def test_invalid_options_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ScenesTaskOptions.model_validate(wrong)


# Parsing of answers


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("red", "red", "red"),
        ("Red.", "blue", "red"),
        ("The circle is red.", "red", "red"),
        ("**Red**", "red", "red"),
        ("It is a RED circle\nand there is a blue one", "red", "red"),
        ("Red or blue.", "red", None),
        ("red, red", "red", "red"),
        ("It's not red, it's blue.", "red", "blue"),
        ("not red", "red", None),
        ("reddish", "red", None),
        ("pink", "red", None),
        ("Answer:\nred", "red", "red"),
        ("red or blue\nred", "red", None),
        ("", "red", None),
        ("circle", "square", "circle"),
        ("The red object is a circle.", "circle", "circle"),
        ("They are crosses", "cross", "cross"),
        ("a plus sign", "cross", "cross"),
        ("It is a star, not a circle.", "circle", "star"),
        ("a circle rather than a square", "circle", "circle"),
        ("2", "2", "2"),
        ("two", "2", "2"),
        ("There are Two (2) circles.", "2", "2"),
        ("There are no circles.", "2", "0"),
        ("02", "2", "2"),
        ("12", "2", "12"),
        ("2 or 3", "2", None),
        ("2.5", "2", None),
        ("several", "2", None),
        ("someone", "1", None),
        ("9" * 5000, "2", "9" * 5000),
        ("left", "left", "left"),
        ("It is to the left.", "left", "left"),
        ("No, it is left", "right", "left"),
        ("Left, not right.", "left", "left"),
        ("to the left, not to the right", "left", "left"),
        ("left or right", "left", None),
        ("It is to the right of the square and below it.", "right", "right"),
        ("Above the circle", "below", "above"),
        ("yes", "left", None),
        ("yes", "yes", "yes"),
        ("Yes.", "no", "yes"),
        ("YES!!", "no", "yes"),
        ("Yes, it is not far from it.", "yes", "yes"),
        ("yeah", "yes", "yes"),
        ("No", "no", "no"),
        ("no, it is left", "no", "no"),
        ("No, it isn't.", "no", "no"),
        ("No, there is. Yes", "no", "no"),
        ("It is not.", "no", "no"),
        ("It isn't.", "no", "no"),
        ("It isn’t.", "no", "no"),
        ("There is no red circle.", "no", "no"),
        ("The image does not show a red circle.", "no", "no"),
        ("That is not correct.", "no", "no"),
        ("The answer is yes.", "yes", "yes"),
        ("It is.", "yes", "yes"),
        ("There is.", "no", "yes"),
        ("It is on the right.", "no", None),
        ("yes or no", "yes", None),
        ("Yes and no.", "yes", None),
        ("yes/no", "yes", None),
        ("I am not sure.", "no", None),
        ("Not sure, maybe no", "no", None),
        ("I can't tell.", "no", None),
        ("I don't know", "no", None),
        ("No idea.", "no", None),
        ("Nowhere, I know north", "no", None),
        ("maybe", "no", None),
        (" \n\n ", "no", None),
    ],
)
def test_an_answer_is_parsed(text: str, reference: str, expected: str | None) -> None:
    assert parse_answer(text, reference) == expected


@given(st.text(), st.sampled_from(REFERENCES))
def test_any_text_can_be_parsed(text: str, reference: str) -> None:
    prediction = parse_answer(text, reference)
    assert prediction is None or parse_answer(prediction, reference) == prediction


@given(
    st.sampled_from(REFERENCES), st.sampled_from(["{}", "{}.", " {}\n", "**{}**", "{}\nred blue yes no 3 left right"])
)
def test_the_reference_is_parsed_with_any_surrounding_text(reference: str, wrapped: str) -> None:
    assert parse_answer(wrapped.format(reference.capitalize()), reference) == reference


# Scores


def test_correct_answers_score_100(task: ScenesTask) -> None:
    scores = _score(task, lambda question: question.reference)
    assert {name: scores[name] for name in ("accuracy", *CATEGORIES, "pairs")} == dict.fromkeys(
        ("accuracy", *CATEGORIES, "pairs"), 100.0
    )
    assert scores["failed"] == 0


def test_unparsable_answers_are_wrong_and_failed(task: ScenesTask) -> None:
    scores = _score(task, lambda question: "I cannot say.")
    assert all(scores[name] == 0 for name in ("accuracy", *CATEGORIES, "pairs"))
    assert scores["failed"] == 1200


def test_accuracy_is_reported_by_category(task: ScenesTask) -> None:
    scores = _score(task, lambda question: question.reference if question.category == "count" else "?")
    counted = sum(question.category == "count" for question in task.questions())
    assert scores["count"] == 100
    assert scores["color"] == scores["pairs"] == 0
    assert scores["accuracy"] == pytest.approx(100 * counted / 1200)
    assert scores["failed"] == 1200 - counted


def test_each_question_is_marked_right_or_wrong(task: ScenesTask) -> None:
    questions = list(task.questions())
    scores = task.score({question.id: Answer(question.id, "Yes.") for question in questions}, "exact")
    assert dict(scores.right) == {question.id: question.reference == "yes" for question in questions}
    assert scores.scores["accuracy"] == pytest.approx(100 * sum(scores.right.values()) / len(questions))


def test_pairs_require_both_answers(task: ScenesTask) -> None:
    """A model that ignores the image answers half the questions of pairs correctly, but no pair."""
    lucky = {"yes", "left", "above"}
    blind = _score(
        task,
        lambda question: (
            {"right": "left", "below": "above", "no": "yes"}.get(question.reference, "yes")
            if question.reference not in lucky
            else question.reference
        ),
    )
    assert blind["pair"] == 50
    assert blind["pairs"] == 0
    opposite = {"yes": "no", "no": "yes", "left": "right", "right": "left", "above": "below", "below": "above"}
    pairs = sorted({q.id.split("/")[0] for q in task.questions() if q.category == "pair"})
    half_wrong = set(pairs[:20:2])
    half = _score(
        task,
        lambda question: (
            opposite[question.reference]
            if question.category == "pair" and question.id.split("/")[0] in half_wrong
            else question.reference
        ),
    )
    assert half["pairs"] == pytest.approx(100 * (len(pairs) / 2 - 10) / (len(pairs) / 2))
    assert half["pair"] == pytest.approx(100 * (len(pairs) - 10) / len(pairs))


def test_incomplete_pairs_are_left_out() -> None:
    right = {
        number: _score(ScenesTask(ScenesTaskOptions(scenes=number)), lambda q: q.reference) for number in (2, 3, 4)
    }
    assert "pairs" not in right[2]
    assert "pair" not in right[2]
    assert "pairs" not in right[3]
    assert "pairs" not in right[3]["chance"]
    assert right[3]["pair"] == 100
    assert right[4]["pairs"] == 100


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_score_has_a_chance_level(split: str) -> None:
    task = ScenesTask(ScenesTaskOptions.model_validate({"split": split}))
    scores = _score(task, lambda question: question.reference)
    one_of = 5 if split == "train" else 6
    chance = scores["chance"]
    assert set(chance) == set(scores) - {"chance", "failed"}
    expected = {
        "color": 100 / one_of,
        "shape": 100 / one_of,
        "count": 100 / 3,
        "presence": 50,
        "relation": 50,
        "pair": 50,
    }
    assert {name: chance[name] for name in expected} == pytest.approx(expected)
    assert chance["pairs"] == 25
    counts = Counter(question.category for question in task.questions())
    assert chance["accuracy"] == pytest.approx(sum(expected[name] * n for name, n in counts.items()) / counts.total())
    assert 30 < chance["accuracy"] < 50


def test_only_answered_questions_count(task: ScenesTask) -> None:
    questions = list(task.questions())[:7]
    answers = {each.id: Answer(each.id, each.reference) for each in questions[:-1]}
    answers[questions[-1].id] = Answer("", "?")
    scores = task.score(answers, "exact")
    assert scores.scores["accuracy"] == pytest.approx(100 * 6 / 7)
    assert set(scores.right) == set(answers)
