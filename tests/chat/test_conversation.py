"""A conversation that keeps its keys and values says what a fresh reading of all turns would say."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llavactl.chat.assistant import Assistant, Stops, Writer
from llavactl.chat.conversation import Conversation
from llavactl.chat.prefix import shared
from llavactl.core.registry import registry
from llavactl.core.schema import FeatureShape, ImageFile, Turn
from llavactl.data.encode import Encoding
from llavactl.model.build import build
from llavactl.model.generate import Sampling

PHOTO, OTHER = ImageFile("/photos", "a.jpg"), ImageFile("/photos", "b.jpg")
SHAPE = FeatureShape((2, 2), 32)
SHORT = Sampling(max_new_tokens=10)


class Drawn:
    """Features out of an image's name."""

    def __init__(self) -> None:
        self.loaded: list[str] = []

    def stored(self, image: Any) -> tuple[np.ndarray]:
        self.loaded.append(image.name)
        seed = int.from_bytes(hashlib.sha256(image.name.encode()).digest()[:4], "big")
        return (np.random.default_rng(seed).standard_normal((4, 32), dtype=np.float32),)


@pytest.fixture
def assistant(toys: Path) -> Assistant:
    parts = build({"name": "linear"}, {"name": "hf", "model": str(toys / "language")}, SHAPE, dtype="float32")
    parts.model.eval()
    template = registry().create("templates", {"name": "vicuna-v1"})
    return Assistant(parts.model, Encoding(template, parts.tokenizer, parts.image_tokens), Drawn())


def test_turns_equal_a_fresh_reading(assistant: Assistant) -> None:
    talk = Conversation(assistant)
    for content in ((PHOTO, "\nWhat is it?"), ("Why?",), (OTHER, "\nAnd this?"), ("Are they alike?",)):
        said = "".join(talk.ask(*content, sampling=SHORT)).strip()
        assert [said] == assistant.answer([talk.turns[:-1]], SHORT)


def test_an_image_is_read_once(assistant: Assistant) -> None:
    talk = Conversation(assistant)
    for text in ("What is it?", "Why?", "Where?"):
        list(talk.ask(*([PHOTO, "\n"] if text == "What is it?" else []), text, sampling=SHORT))
    assert assistant.features.loaded == ["a.jpg"]  # type: ignore[attr-defined]


def test_leaving_early_does_not_spoil_the_next_turn(assistant: Assistant) -> None:
    talk = Conversation(assistant)
    pieces = talk.ask(PHOTO, "\nWhat is it?", sampling=SHORT)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    said = "".join(talk.ask("Why?", sampling=SHORT)).strip()
    assert [said] == assistant.answer([talk.turns[:-1]], SHORT)


def test_another_image_in_the_same_place_is_read_anew(assistant: Assistant) -> None:
    read: list[Any] = [1, (PHOTO, 0), (PHOTO, 1), 2, 3]
    assert shared(read, [1, (PHOTO, 0), (PHOTO, 1), 2, 3, 4]) == 5
    assert shared(read, [1, (OTHER, 0), (OTHER, 1), 2, 3, 4]) == 1
    assert shared(read, read) == 4
    assert shared(read[:2], [1, (PHOTO, 0), (PHOTO, 1), 2]) == 1


def test_writer_holds_back_half_a_character_and_stops_at_text(assistant: Assistant) -> None:
    tokenizer = assistant.encoding.tokenizer
    writer = Writer(tokenizer, Stops(frozenset(), ("\n",)))
    pieces = [writer.take(token) for token in tokenizer("é!\nmore", add_special_tokens=False)["input_ids"]]
    assert "".join(pieces) == writer.text == "é!"
    assert all("\ufffd" not in piece for piece in pieces)
    assert writer.done


def test_writer_holds_back_what_may_become_a_stop(assistant: Assistant) -> None:
    tokenizer = assistant.encoding.tokenizer
    for text, said in (("a # b ## c\n### Human", "a # b ## c\n"), ("ends with ##", "ends with ##")):
        writer = Writer(tokenizer, Stops(frozenset(), ("###",)))
        tokens = [*tokenizer(text, add_special_tokens=False)["input_ids"], None]
        pieces = [writer.take(token) for token in tokens]
        assert "".join(pieces) == writer.text == said


def test_a_batch_answers_as_single_questions_do(assistant: Assistant) -> None:
    torch.manual_seed(0)
    talks = [(Turn("user", (PHOTO, "\nWhat is it?")),), (Turn("user", ("Hello, who are you, and why?",)),)]
    assert assistant.answer(talks, SHORT) == [assistant.answer([talk], SHORT)[0] for talk in talks]


def test_questions_about_one_picture_read_it_once_and_answer_alike(assistant: Assistant) -> None:
    talks = [(Turn("user", (PHOTO, f"\n{text}")),) for text in ("What is it?", "Who are you, and why?", "Is it a dog?")]
    alone = [assistant.answer([talk], SHORT)[0] for talk in talks]
    assistant.features.loaded.clear()  # type: ignore[attr-defined]
    assert assistant.answer(talks, SHORT) == alone
    assert assistant.features.loaded == ["a.jpg"]  # type: ignore[attr-defined]
