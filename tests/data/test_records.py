"""Samples of a recipe's sources, and ``split_turns``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llavactl.core.errors import PluginError
from llavactl.core.registry import Options, Registration, registry
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


class Turns:
    """A source of one sample; its option is the roles of the turns by their first letters."""

    class Options(Options):
        roles: str

    def __init__(self, options: Any) -> None:
        roles = {"s": "system", "u": "user", "a": "assistant"}
        self.turns: Any = tuple(Turn(roles[letter], ("text",)) for letter in options.roles)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Sample]:
        yield Sample("one", self.turns, "file.csv:3")


@pytest.mark.parametrize(
    ("roles", "valid"),
    [
        *((roles, True) for roles in ("", "s", "ua", "sua", "uaua", "uau")),
        *((roles, False) for roles in ("a", "sa", "au", "uu", "uaa", "uas", "ssua")),
    ],
)
def test_turns_that_do_not_alternate_are_refused(monkeypatch: pytest.MonkeyPatch, roles: str, valid: bool) -> None:
    entry = Registration("sources", "turns", f"{__name__}:Turns", None, "", "strange")
    monkeypatch.setitem(registry().entries["sources"], "turns", entry)
    spec = SourceSpec.model_validate({"name": "turns", "roles": roles})
    if valid:
        assert len(list(samples([spec]))) == 1
        return
    with pytest.raises(PluginError) as caught:
        list(samples([spec]))
    assert all(part in str(caught.value) for part in ("turns", "strange", "file.csv:3", "'one'", "assistant"))


def test_split_turns_is_an_option_of_a_source(tmp_path: Path) -> None:
    turns = [("human", "A?"), ("gpt", "a"), ("human", "B?"), ("gpt", "b")]
    conversations = [{"from": role, "value": text} for role, text in turns]
    (tmp_path / "records.json").write_text(json.dumps([{"id": "x", "image": "x.jpg", "conversations": conversations}]))
    spec = {"name": "llava-json", "path": str(tmp_path / "records.json")}
    assert [sample.id for sample in samples([SourceSpec.model_validate(spec)])] == ["x"]
    split = SourceSpec.model_validate({**spec, "split_turns": True})
    assert [sample.turns[0].text.strip() for sample in samples([split])] == ["A?", "B?"]
