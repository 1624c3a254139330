"""Samples of a recipe's sources, and ``split_turns``."""

from __future__ import annotations

import json
from pathlib import Path

from llavactl.core.schema import Sample, Turn
from llavactl.data.records import samples, split_turns
from llavactl.images.image_file import ImageFile
from llavactl.recipe.specs import SourceSpec


def test_split_turns_keeps_earlier_images_and_drops_earlier_answers() -> None:
    one, two = ImageFile("/photos", "1.jpg"), ImageFile("/photos", "2.jpg")
    turns = (
        Turn("system", ("Be brief.",)),
        Turn("user", (one, "\n", "What is it?")), Turn("assistant", ("A dog.",)),
        Turn("user", ("And this? ", two)), Turn("assistant", ("A cat.",)),
        Turn("user", ("Which is larger?",)), Turn("assistant", ("The dog.",)),
    )  # fmt: skip
    parts = list(split_turns(Sample("a", turns, "record 3", captions=("A dog and a cat.",))))
    assert [part.id for part in parts] == ["a#1", "a#2", "a#3"]
    assert {(part.where, part.captions) for part in parts} == {("record 3", ("A dog and a cat.",))}
    assert [part.turns[0] for part in parts] == [turns[0]] * 3
    assert [part.turns[2] for part in parts] == [turns[2], turns[4], turns[6]]
    assert [part.turns[1].content for part in parts] == [
        (one, "\n", "What is it?"),
        (one, "\n", "And this? ", two),
        (one, "\n", two, "\n", "Which is larger?"),
    ]


def test_split_turns_is_an_option_of_a_source(tmp_path: Path) -> None:
    turns = [("human", "A?"), ("gpt", "a"), ("human", "B?"), ("gpt", "b")]
    conversations = [{"from": role, "value": text} for role, text in turns]
    (tmp_path / "records.json").write_text(json.dumps([{"id": "x", "image": "x.jpg", "conversations": conversations}]))
    spec = {"name": "llava-json", "path": str(tmp_path / "records.json")}
    assert [sample.id for sample in samples([SourceSpec.model_validate(spec)])] == ["x"]
    split = SourceSpec.model_validate({**spec, "split_turns": True})
    assert [sample.turns[0].text.strip() for sample in samples([split])] == ["A?", "B?"]
