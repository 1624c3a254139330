"""Objects made up: phrases found, and real captions against real boxes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llavactl.components.tasks.coco_words import CATEGORIES, objects_in, singular


@pytest.mark.parametrize(
    ("text", "objects"),
    [
        ("A baby bird and two hot dogs on a dining table.", ["bird", "hot dog", "dining table"]),
        ("Children with teddy bears; the toilet seat of a bus", ["person", "teddy bear", "toilet", "bus"]),
        ("Tennis players with rackets", ["person", "tennis racket"]),
        ("mice, geese and knives", ["mouse", "bird", "knife"]),
        ("a train station by the home plate", []),
        ("A passenger train and a passenger", ["train", "person"]),
        ("glasses, grass, a carpet, catalogue, cupboard", []),
        ("a bow tie and a tie", ["tie", "tie"]),
        ("", []),
        ("犬 und Hunde ☃", []),
    ],
)
def test_phrases(text: str, objects: list[str]) -> None:
    assert objects_in(text) == objects


def test_every_category_finds_itself() -> None:
    assert len(set(CATEGORIES)) == 80
    for category in CATEGORIES:
        assert objects_in(f"There is a {category}.") == [category]


@pytest.mark.parametrize(
    ("many", "one"),
    [("buses", "bus"), ("puppies", "puppy"), ("benches", "bench"), ("toothbrushes", "toothbrush"), ("glass", "glass")],
)
def test_singular(many: str, one: str) -> None:
    assert singular(many) == one


@pytest.fixture
def coco(real: Path) -> Path:
    return real / "coco-mini/annotations"


def test_the_names_are_coco_s(coco: Path) -> None:
    document = json.loads((coco / "instances_val2017.json").read_text())
    assert [each["name"] for each in document["categories"]] == list(CATEGORIES)


def test_people_make_up_little(scored: Any, coco: Path, tmp_path: Path) -> None:
    """One caption a picture as the answer: with all captions counted as the truth nothing is made up."""
    notes = json.loads((coco / "captions_val2017.json").read_text())["annotations"]
    first = {each["image_id"]: each["caption"] for each in reversed(notes)}
    answers = tmp_path / "a.json"
    answers.write_text(json.dumps([{"image_id": name, "caption": text} for name, text in first.items()]))
    files = {"instances": coco / "instances_val2017.json"}
    boxes = scored("chair", "--answers", answers, **files)["scores"]
    assert 0 < boxes["chair_i"] < 12
    assert 0 < boxes["chair_s"] < 25
    both = scored("chair", "--answers", answers, **files, captions=coco / "captions_val2017.json")
    assert both["scores"]["chair_i"] == both["scores"]["chair_s"] == 0
    assert 30 < both["scores"]["recall"] < 90
    assert both["n"] == len(first)


def test_what_is_made_up_counts_by_mention_and_by_description(scored: Any, tmp_path: Path, lines: Any) -> None:
    document = {
        "images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}, {"id": 3, "file_name": "3.jpg"}],
        "categories": [{"id": 18, "name": "dog"}, {"id": 17, "name": "cat"}],
        "annotations": [{"image_id": 1, "category_id": 18}, {"image_id": 2, "category_id": 17}],
    }
    (tmp_path / "i.json").write_text(json.dumps(document))
    said = {1: "A dog, another dog and a cat.", 2: "Nothing.", 3: ""}
    answers = lines("a.jsonl", ({"image_id": name, "caption": text} for name, text in said.items()))
    report = scored("chair", "--answers", answers, instances=tmp_path / "i.json")
    assert report["scores"] == pytest.approx({"chair_s": 100 / 3, "chair_i": 100 / 3, "recall": 50, "named": 3})
    assert report["failed"] == 1
    only = lines("o.jsonl", [{"image_id": 2}])
    assert scored("chair", "--answers", answers, instances=tmp_path / "i.json", only=only)["scores"]["chair_s"] == 0
    assert "is not in" in scored(
        "chair", "--answers", answers, instances=tmp_path / "i.json", only=lines("o.jsonl", [{"image_id": 9}])
    )
    document["annotations"][0]["category_id"] = 1
    (tmp_path / "i.json").write_text(json.dumps(document))
    assert "there is no category '1'" in scored("chair", "--answers", answers, instances=tmp_path / "i.json")
