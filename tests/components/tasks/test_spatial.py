"""Minimal pairs: differences, references, and scores."""

from __future__ import annotations

from collections import Counter

import pytest

from llavactl.components.tasks.spatial import KINDS, Spatial, SpatialOptions
from llavactl.core.schema import Answer


def task(pairs: int = 12, **options: object) -> Spatial:
    return Spatial(SpatialOptions.model_validate({"pairs": pairs, **options}))


@pytest.mark.parametrize("split", ["test", "train"])
def test_a_pair_has_two_images_one_question_and_two_answers(split: str) -> None:
    halves = task(split=split)._halves
    assert Counter(half.kind for half in halves) == dict.fromkeys(KINDS, 24)
    assert len({half.id for half in halves}) == len(halves)
    for one, other in zip(halves[::2], halves[1::2], strict=True):
        assert one.pair == other.pair
        assert one.text == other.text
        assert one.answer != other.answer
        first, second = (half.staged.scene.things for half in (one, other))
        changed = set(first) ^ set(second)
        assert len(changed) == (1 if one.kind in ("count", "absence") else 4)


def test_references_are_correct() -> None:
    for half in task(30)._halves:
        things = half.staged.scene.things
        names = {thing.name for thing in things}
        if half.kind in ("absence", "binding"):
            present = any(name in half.text for name in names)
            assert half.answer == ("yes" if present else "no")
        elif half.kind == "count":
            word = half.text.removeprefix("How many ").removesuffix(" are there?").removesuffix(" objects")
            singular = "cross" if word == "crosses" else word.removesuffix("s")
            assert half.answer == str(sum(word in thing.pair or singular in thing.pair for thing in things))


def test_the_order_within_a_pair_does_not_reveal_the_answer() -> None:
    halves = [half for half in task(200)._halves if half.kind == "absence"]
    first = [half.answer for half in halves[::2]]
    assert 70 < first.count("yes") < 130


def test_a_pair_requires_both_answers() -> None:
    component = task(4)
    questions = list(component.questions())
    right = {each.id: Answer(each.id, each.reference) for each in questions}
    assert component.score(right, "exact").scores["pairs"] == 100
    for text in ("yes", "no", "2", "left", "above"):
        always = {each.id: Answer(each.id, text) for each in questions}
        assert component.score(always, "exact").scores["pairs"] == 0
    half = {each.id: Answer(each.id, each.reference if each.id.endswith("a") else "?") for each in questions}
    scores = component.score(half, "exact")
    assert (scores.scores["pairs"], scores.scores["accuracy"], scores.failed) == (0, 50, 16)
    assert scores.scores["count"] == {"pairs": 0, "accuracy": 50, "n": 4}


def test_incomplete_pairs_are_left_out() -> None:
    component = task(2)
    answers = {each.id: Answer(each.id, each.reference) for each in list(component.questions())[:3]}
    assert component.score(answers, "exact").scores == {
        "pairs": 100, "accuracy": 100, "n": 1, "relation": {"pairs": 100, "accuracy": 100, "n": 1},
    }  # fmt: skip


def test_the_blind_baseline_never_shows_the_other_image_of_a_pair() -> None:
    from llavactl.evaluation.models import image_replacements

    questions = list(task(5).questions())
    replacements = image_replacements(questions)
    ids = {each.turns[0].images[0]: each.id for each in questions}
    assert len(ids) == len(questions)
    assert all(ids[image].rstrip("ab") != ids[other].rstrip("ab") for image, other in replacements.items())
