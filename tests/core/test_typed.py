"""Dataclasses that plugins create check the types of their fields."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import llavactl
from llavactl.core.schema import Box, FeatureShape, Question, Sample, Text, Turn
from llavactl.images.image_file import ImageFile

PHOTO = ImageFile("/photos", "a.jpg")
TURN = Turn("user", (PHOTO, "What?"))
VALID: list[Any] = [
    PHOTO,
    TURN,
    Box("cat", (0, 0.5, 1, 1.0)),
    Sample("a", (TURN,), captions=("a cat",), boxes=(Box("cat", (0, 0, 1, 1)),)),
    Text("a", trained=True),
    FeatureShape((2, 3), 8, 1),
    Question("q", (TURN,)),
    llavactl.Answer("q", "yes"),
    llavactl.Scores({"accuracy": 1.0}, right={"q": True}),
    llavactl.Weight("language.model.layers.0.mlp.up_proj.weight", (8, 6), "language"),
    llavactl.Reply("yes", 1, None),
    llavactl.Request("r", "detail", ({"role": "user", "content": "?"},), Sample("a", (TURN,))),
    llavactl.Limits(),
    llavactl.Finding("no-answer", "answer 1 of 2"),
    llavactl.RawRecord("a.jsonl:1", {"id": 1}, 0, "", 12),
    llavactl.BudgetedTeacher({"name": "replay"}, 1.5, Path("prices.yaml")),
    llavactl.ImageBytes("a", "ca978112ca1bbdca", b"a"),
    llavactl.ImageRoot("/photos", follow_links=True),
    llavactl.SavedModel(Path("runs/demo/stage2/model")),
    llavactl.Progress("stage1", 1, 2, "step", 0, {"loss": "1.0"}),
]
FIELDS = [(instance, field.name) for instance in VALID for field in dataclasses.fields(instance) if field.type != "Any"]


class Unexpected:
    """A value of a type that no field has."""


def name_of(value: Any) -> str:
    return value if isinstance(value, str) else type(value).__name__


@pytest.mark.parametrize(("instance", "field"), FIELDS, ids=name_of)
def test_fields_of_public_dataclasses_are_checked(instance: Any, field: str) -> None:
    assert dataclasses.replace(instance) == instance
    wrongs = (Unexpected(), [Unexpected()], (Unexpected(),), {1, 2}, *(() if field == "data" else (b"bytes",)))
    for wrong in wrongs:
        with pytest.raises(TypeError, match=field):
            dataclasses.replace(instance, **{field: wrong})


def test_every_public_dataclass_is_tested() -> None:
    public = {each for name in llavactl.__all__ if dataclasses.is_dataclass(each := getattr(llavactl, name))}
    not_from_plugins = {
        *(llavactl.Assistant, llavactl.ImageSlot, llavactl.Problem, llavactl.Progress, llavactl.Sampling),
        *(llavactl.SentencePieceVocabulary, llavactl.Explanation),
    }
    assert public - {type(instance) for instance in VALID} <= not_from_plugins


class Unhashable:
    name = "u"
    __hash__ = None  # type: ignore[assignment]

    def read(self) -> bytes:
        return b""

    def stamp(self) -> None:
        return None


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (Turn, ("user", "hi")),
        (Turn, ("user", ["hi"])),
        (Turn, ("user", ("hi", 3))),
        (Turn, ("user", (Unhashable(),))),
        (Turn, ("human", ("hi",))),
        (Turn, (["user"], ("hi",))),
        (Sample, (1, (TURN,))),
        (Sample, ("a", TURN)),
        (Sample, ("a", [TURN])),
        (Sample, ("a", (TURN,), "", "a caption")),
        (FeatureShape, ((2.0, 2), 8)),
        (FeatureShape, ([2, 2], 8)),
        (FeatureShape, ((2, 2, 2), 8)),
        (FeatureShape, ((2, True), 8)),
        (Box, ("cat", (0, 0, 1))),
        (Text, ("a", 1)),
        (ImageFile, ("/photos", b"a.jpg")),
    ],
)
def test_similar_types_are_rejected(make: Any, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError):
        make(*arguments)


@pytest.mark.parametrize("numbers", [((0, 2), 8), ((2, -2), 8), ((2, 2), 0), ((2, 2), 8, -1)])
def test_an_empty_feature_shape_is_rejected(numbers: Any) -> None:
    with pytest.raises(ValueError, match="FeatureShape"):
        FeatureShape(*numbers)
