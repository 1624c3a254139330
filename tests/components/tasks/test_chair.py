"""CHAIR: detection of mentioned objects, and scores of real captions against real boxes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llavactl.components.tasks.coco_synonyms import CATEGORIES, mentioned_objects, singular


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
def test_mentioned_objects(text: str, objects: list[str]) -> None:
    assert mentioned_objects(text) == objects


def test_every_category_is_mentioned_by_its_name() -> None:
    assert len(set(CATEGORIES)) == 80
    for category in CATEGORIES:
        assert mentioned_objects(f"There is a {category}.") == [category]


@pytest.mark.parametrize(
    ("plural", "expected"),
    [("buses", "bus"), ("puppies", "puppy"), ("benches", "bench"), ("toothbrushes", "toothbrush"), ("glass", "glass")],
)
def test_singular(plural: str, expected: str) -> None:
    assert singular(plural) == expected


@pytest.fixture
def coco(real: Path) -> Path:
    return real / "coco-mini/annotations"


def test_categories_have_the_names_of_coco(coco: Path) -> None:
    document = json.loads((coco / "instances_val2017.json").read_text())
    assert [each["name"] for each in document["categories"]] == list(CATEGORIES)


def test_human_captions_have_few_hallucinations(scored: Any, coco: Path, tmp_path: Path) -> None:
    """One caption per image is the answer. If all captions count as true, nothing is hallucinated."""
    captions = json.loads((coco / "captions_val2017.json").read_text())["annotations"]
    first = {each["image_id"]: each["caption"] for each in reversed(captions)}
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


def test_hallucinations_are_counted_per_mention_and_per_description(scored: Any, tmp_path: Path, lines: Any) -> None:
    document = {
        "images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}, {"id": 3, "file_name": "3.jpg"}],
        "categories": [{"id": 18, "name": "dog"}, {"id": 17, "name": "cat"}],
        "annotations": [{"image_id": 1, "category_id": 18}, {"image_id": 2, "category_id": 17}],
    }
    (tmp_path / "i.json").write_text(json.dumps(document))
    descriptions = {1: "A dog, another dog and a cat.", 2: "Nothing.", 3: ""}
    answers = lines("a.jsonl", ({"image_id": name, "caption": text} for name, text in descriptions.items()))
    report = scored("chair", "--answers", answers, instances=tmp_path / "i.json")
    assert report["scores"] == pytest.approx({"chair_s": 100 / 3, "chair_i": 100 / 3, "recall": 50, "named": 3})
    assert report["failed"] == 1
    only = lines("o.jsonl", [{"image_id": 2}])
    assert scored("chair", "--answers", answers, instances=tmp_path / "i.json", only=only)["scores"]["chair_s"] == 0
    unknown = lines("o.jsonl", [{"image_id": 9}])
    assert "o.jsonl:1: image '9'" in scored("chair", "--answers", answers, instances=tmp_path / "i.json", only=unknown)
    document["annotations"][0]["category_id"] = 1
    (tmp_path / "i.json").write_text(json.dumps(document))
    assert "annotations 0: unknown category '1'" in scored("chair", "--answers", answers, instances=tmp_path / "i.json")
