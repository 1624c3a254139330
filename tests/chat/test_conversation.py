"""A conversation that keeps its keys and values says what a fresh reading of all turns would say."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AddedToken

from llavactl.chat.assistant import Assistant
from llavactl.chat.common_prefix import common_prefix_length
from llavactl.chat.conversation import Conversation
from llavactl.chat.detokenizer import Detokenizer, Stops
from llavactl.core.errors import DataError
from llavactl.core.registry import registry
from llavactl.core.schema import FeatureShape, Turn
from llavactl.data.encode import Encoding
from llavactl.images.image_file import ImageFile
from llavactl.model.build import build
from llavactl.model.generate import Sampling
from llavactl.model.llava import LlavaModel

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


WINDOWED = ["mistral", "gemma3_text", "qwen2"]


@pytest.mark.parametrize("kind", WINDOWED)
def test_a_batch_equals_single_prompts_where_attention_sees_a_window(toys: Path, kind: str) -> None:
    """Prompts about one image: what they share, padding and window must not mix."""
    from transformers import AutoConfig, AutoModelForCausalLM

    parts = build({"name": "linear"}, {"name": "hf", "model": str(toys / "language")}, SHAPE, dtype="float32")
    torch.manual_seed(0)
    window = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True}
    size = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(kind, **size, **window, num_key_value_heads=2, head_dim=12, vocab_size=400)
    if kind == "mistral":
        config.layer_types = None
    language = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model = LlavaModel(parts.model.connector, language).eval()
    template = registry().create("templates", {"name": "vicuna-v1"})
    assistant = Assistant(model, Encoding(template, parts.tokenizer, parts.image_tokens), Drawn())
    asked = [
        (Turn("user", (PHOTO, "\n", text)),)
        for text in ("What?", "What is in this picture, and which of its colours is the brightest of all?")
    ]
    assert assistant.answer(asked, SHORT) == [assistant.answer([each], SHORT)[0] for each in asked]


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
    assert common_prefix_length(read, [1, (PHOTO, 0), (PHOTO, 1), 2, 3, 4]) == 5
    assert common_prefix_length(read, [1, (OTHER, 0), (OTHER, 1), 2, 3, 4]) == 1
    assert common_prefix_length(read, read) == 4
    assert common_prefix_length(read[:2], [1, (PHOTO, 0), (PHOTO, 1), 2]) == 1


def test_writer_holds_back_half_a_character_and_stops_at_text(assistant: Assistant) -> None:
    tokenizer = assistant.encoding.tokenizer
    output = Detokenizer(tokenizer, Stops(frozenset(), ("\n",)))
    pieces = [output.add(token) for token in tokenizer("é!\nmore", add_special_tokens=False)["input_ids"]]
    assert "".join(pieces) == output.text == "é!"
    assert all("\ufffd" not in piece for piece in pieces)
    assert output.done


def test_writer_holds_back_what_may_become_a_stop(assistant: Assistant) -> None:
    tokenizer = assistant.encoding.tokenizer
    for text, said in (("a # b ## c\n### Human", "a # b ## c\n"), ("ends with ##", "ends with ##")):
        output = Detokenizer(tokenizer, Stops(frozenset(), ("###",)))
        tokens = [*tokenizer(text, add_special_tokens=False)["input_ids"], None]
        pieces = [output.add(token) for token in tokens]
        assert "".join(pieces) == output.text == said


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


def test_half_a_character_at_the_limit_is_no_text(assistant: Assistant) -> None:
    tokenizer = assistant.encoding.tokenizer
    for stops, text in ((("\n",), "ab é"), (("##",), "ab #é")):
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        output = Detokenizer(tokenizer, Stops(frozenset(), stops))
        pieces = [output.add(token) for token in [*tokens[:-1], None]]
        assert "".join(pieces) == output.text == text[:-1]


@pytest.mark.parametrize("limit", range(1, 6))
def test_what_is_streamed_is_the_whole_answer_at_any_limit(assistant: Assistant, limit: int) -> None:
    talk, sampling = Conversation(assistant), Sampling(max_new_tokens=limit)
    said = "".join(talk.ask("Hello?", sampling=sampling))
    assert [said.strip()] == assistant.answer([(Turn("user", ("Hello?",)),)], sampling) == [talk.turns[-1].text]


def test_a_turn_that_fails_is_taken_back(assistant: Assistant) -> None:
    class Torn(Drawn):
        def stored(self, image: Any) -> tuple[np.ndarray]:
            if image == OTHER:
                raise DataError("torn")
            return super().stored(image)

    assistant.features = Torn()
    talk = Conversation(assistant)
    first = "".join(talk.ask(PHOTO, "\nWhat is it?", sampling=SHORT)).strip()
    with pytest.raises(DataError):
        list(talk.ask(OTHER, "\nAnd this?", sampling=SHORT))
    assert [turn.text for turn in talk.turns] == ["\nWhat is it?", first]
    said = "".join(talk.ask("Why?", sampling=SHORT)).strip()
    assert [said] == assistant.answer([talk.turns[:-1]], SHORT)


def test_an_interrupted_answer_stays_as_far_as_it_went(assistant: Assistant) -> None:
    talk = Conversation(assistant)
    pieces = talk.ask("Hello?", sampling=SHORT)
    begun = next(pieces)
    with pytest.raises(KeyboardInterrupt):
        pieces.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    assert [turn.role for turn in talk.turns] == ["user", "assistant"]
    assert talk.turns[-1].text == begun.strip()
    said = "".join(talk.ask("Why?", sampling=SHORT)).strip()
    assert [said] == assistant.answer([talk.turns[:-1]], SHORT)


@pytest.mark.parametrize("first", [True, False], ids=["eos", "none"])
def test_a_question_that_writes_nothing_is_answered(assistant: Assistant, first: bool) -> None:
    """The template `plain` leaves questions out, and this tokenizer puts no BOS before a text."""
    tokenizer = copy.deepcopy(assistant.encoding.tokenizer)
    if not first:
        tokenizer.bos_token = tokenizer.eos_token = None
    plain = registry().create("templates", {"name": "plain"})
    assistant.encoding = Encoding(plain, tokenizer, assistant.encoding.image_tokens)
    talks = [(Turn("user", ("Hello?",)),), (Turn("user", (PHOTO, "\nWhat is it?")),), (Turn("user", ("",)),)]
    answers = assistant.answer(talks, SHORT)
    assert answers == [assistant.answer([talk], SHORT)[0] for talk in talks]
    assert answers[0] == answers[2]
    assert bool(answers[1])
    assert first or not answers[0]
    talk = Conversation(assistant)
    assert "".join(talk.ask("Hello?", sampling=SHORT)).strip() == answers[0]


@pytest.mark.parametrize("own", [7, [7, 9], None])
def test_the_language_models_own_ends_stop_an_answer(assistant: Assistant, own: Any) -> None:
    language: Any = assistant.model.language
    language.generation_config.eos_token_id = own
    assert {7, 9}.intersection(assistant.stops.ids) == ({own} if isinstance(own, int) else set(own or ()))
    assert assistant.encoding.tokenizer.eos_token_id in assistant.stops.ids


@pytest.mark.parametrize("special", [True, False])
def test_a_token_that_ends_an_answer_is_never_shown(assistant: Assistant, special: bool) -> None:
    tokenizer = copy.deepcopy(assistant.encoding.tokenizer)
    tokenizer.add_tokens([AddedToken("<|E|>", special=special, normalized=False)])
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|E|>{% endfor %}assistant: "
    template = registry().create("templates", {"name": "tokenizer"})
    stops = Stops.of(Encoding(template, tokenizer, 1))
    (end,) = tokenizer.encode("<|E|>", add_special_tokens=False)
    assert end in stops.ids
    assert not stops.texts
