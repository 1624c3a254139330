"""A conversation with a key/value cache gives the same answers as one pass over all turns."""

from __future__ import annotations

import copy
import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AddedToken

from llavactl.chat.assistant import Assistant, default_sampling
from llavactl.chat.common_prefix import common_prefix_length
from llavactl.chat.context import without_oldest
from llavactl.chat.conversation import Conversation
from llavactl.chat.detokenizer import Detokenizer, Stops
from llavactl.core.errors import DataError, LlavactlError
from llavactl.core.registry import registry
from llavactl.core.schema import FeatureShape, Turn
from llavactl.data.encode import Encoding
from llavactl.images.image_file import ImageFile
from llavactl.model.build import build
from llavactl.model.compiled import CompiledDecoder
from llavactl.model.generate import Sampling
from llavactl.model.llava import LlavaModel

PHOTO, OTHER = ImageFile("/photos", "a.jpg"), ImageFile("/photos", "b.jpg")
SHAPE = FeatureShape((2, 2), 32)
SHORT = Sampling(max_new_tokens=10)


class FeaturesFromName:
    """Random features, seeded by the image's name."""

    def __init__(self) -> None:
        self.loaded: list[str] = []

    def arrays(self, image: Any) -> tuple[np.ndarray]:
        self.loaded.append(image.name)
        seed = int.from_bytes(hashlib.sha256(image.name.encode()).digest()[:4], "big")
        return (np.random.default_rng(seed).standard_normal((4, 32), dtype=np.float32),)


@pytest.fixture
def assistant(toys: Path) -> Assistant:
    parts = build({"name": "linear"}, {"name": "hf", "model": str(toys / "language")}, SHAPE, dtype="float32")
    parts.model.eval()
    template = registry().create("templates", {"name": "vicuna-v1"})
    return Assistant(parts.model, Encoding(template, parts.tokenizer, parts.image_tokens), FeaturesFromName())


def test_turns_equal_answers_without_a_cache(assistant: Assistant) -> None:
    conversation = Conversation(assistant)
    for content in ((PHOTO, "\nWhat is it?"), ("Why?",), (OTHER, "\nAnd this?"), ("Are they alike?",)):
        answer = "".join(conversation.ask(*content, sampling=SHORT)).strip()
        assert [answer] == assistant.answer([conversation.turns[:-1]], SHORT)


WINDOWED = ["mistral", "gemma3_text", "qwen2"]


@pytest.mark.parametrize("kind", WINDOWED)
def test_a_batch_equals_single_prompts_with_sliding_window_attention(toys: Path, kind: str) -> None:
    """With prompts about one image: the common prefix, padding and the window must not interfere."""
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
    assistant = Assistant(model, Encoding(template, parts.tokenizer, parts.image_tokens), FeaturesFromName())
    conversations = [
        (Turn("user", (PHOTO, "\n", text)),)
        for text in ("What?", "What does this image show, and which of its colors is the brightest of all?")
    ]
    assert assistant.answer(conversations, SHORT) == [assistant.answer([each], SHORT)[0] for each in conversations]


def test_an_image_is_encoded_once_per_conversation(assistant: Assistant) -> None:
    conversation = Conversation(assistant)
    for text in ("What is it?", "Why?", "Where?"):
        list(conversation.ask(*([PHOTO, "\n"] if text == "What is it?" else []), text, sampling=SHORT))
    assert assistant.features.loaded == ["a.jpg"]  # type: ignore[attr-defined]


def test_a_closed_stream_does_not_affect_the_next_turn(assistant: Assistant) -> None:
    conversation = Conversation(assistant)
    pieces = conversation.ask(PHOTO, "\nWhat is it?", sampling=SHORT)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    answer = "".join(conversation.ask("Why?", sampling=SHORT)).strip()
    assert [answer] == assistant.answer([conversation.turns[:-1]], SHORT)


def test_the_common_prefix_ends_before_a_different_image(assistant: Assistant) -> None:
    cached: list[Any] = [1, (PHOTO, 0), (PHOTO, 1), 2, 3]
    assert common_prefix_length(cached, [1, (PHOTO, 0), (PHOTO, 1), 2, 3, 4]) == 5
    assert common_prefix_length(cached, [1, (OTHER, 0), (OTHER, 1), 2, 3, 4]) == 1
    assert common_prefix_length(cached, cached) == 4
    assert common_prefix_length(cached[:2], [1, (PHOTO, 0), (PHOTO, 1), 2]) == 1


def test_incomplete_characters_are_held_back_and_a_stop_string_ends_the_text(assistant: Assistant) -> None:
    tokenizer = assistant.encoding.tokenizer
    output = Detokenizer(tokenizer, Stops(frozenset(), ("\n",)))
    pieces = [output.add(token) for token in tokenizer("é!\nmore", add_special_tokens=False)["input_ids"]]
    assert "".join(pieces) == output.text == "é!"
    assert all("\ufffd" not in piece for piece in pieces)
    assert output.done


def test_a_partial_stop_string_is_held_back(assistant: Assistant) -> None:
    tokenizer = assistant.encoding.tokenizer
    for text, expected in (("a # b ## c\n### Human", "a # b ## c\n"), ("ends with ##", "ends with ##")):
        output = Detokenizer(tokenizer, Stops(frozenset(), ("###",)))
        tokens = [*tokenizer(text, add_special_tokens=False)["input_ids"], None]
        pieces = [output.add(token) for token in tokens]
        assert "".join(pieces) == output.text == expected


def test_a_batch_equals_single_prompts(assistant: Assistant) -> None:
    torch.manual_seed(0)
    conversations = [(Turn("user", (PHOTO, "\nWhat is it?")),), (Turn("user", ("Hello, who are you, and why?",)),)]
    assert assistant.answer(conversations, SHORT) == [assistant.answer([each], SHORT)[0] for each in conversations]


def test_questions_about_one_image_encode_it_once_with_the_same_answers(assistant: Assistant) -> None:
    conversations = [
        (Turn("user", (PHOTO, f"\n{text}")),) for text in ("What is it?", "Who are you, and why?", "Is it a dog?")
    ]
    alone = [assistant.answer([each], SHORT)[0] for each in conversations]
    assistant.features.loaded.clear()  # type: ignore[attr-defined]
    assert assistant.answer(conversations, SHORT) == alone
    assert assistant.features.loaded == ["a.jpg"]  # type: ignore[attr-defined]


def test_an_incomplete_character_at_the_token_limit_is_dropped(assistant: Assistant) -> None:
    tokenizer = assistant.encoding.tokenizer
    for stops, text in ((("\n",), "ab é"), (("##",), "ab #é")):
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        output = Detokenizer(tokenizer, Stops(frozenset(), stops))
        pieces = [output.add(token) for token in [*tokens[:-1], None]]
        assert "".join(pieces) == output.text == text[:-1]


@pytest.mark.parametrize("limit", range(1, 6))
def test_streamed_pieces_form_the_complete_answer_at_any_token_limit(assistant: Assistant, limit: int) -> None:
    conversation, sampling = Conversation(assistant), Sampling(max_new_tokens=limit)
    answer = "".join(conversation.ask("Hello?", sampling=sampling))
    assert (
        [answer.strip()] == assistant.answer([(Turn("user", ("Hello?",)),)], sampling) == [conversation.turns[-1].text]
    )


def test_a_failed_turn_is_removed(assistant: Assistant) -> None:
    class Unreadable(FeaturesFromName):
        def arrays(self, image: Any) -> tuple[np.ndarray]:
            if image == OTHER:
                raise DataError("unreadable")
            return super().arrays(image)

    assistant.features = Unreadable()
    conversation = Conversation(assistant)
    first = "".join(conversation.ask(PHOTO, "\nWhat is it?", sampling=SHORT)).strip()
    with pytest.raises(DataError):
        list(conversation.ask(OTHER, "\nAnd this?", sampling=SHORT))
    assert [turn.text for turn in conversation.turns] == ["\nWhat is it?", first]
    answer = "".join(conversation.ask("Why?", sampling=SHORT)).strip()
    assert [answer] == assistant.answer([conversation.turns[:-1]], SHORT)


class InterruptedForward:
    """Raises ``error`` in the second layer of the language model, in its forward pass number ``at``."""

    def __init__(self, assistant: Assistant, error: BaseException, at: int) -> None:
        self.error, self.remaining = error, at
        self.hook = assistant.model.language.model.layers[1].register_forward_pre_hook(self)

    def __call__(self, *_: object) -> None:
        self.remaining -= 1
        if not self.remaining:
            self.hook.remove()
            raise self.error


@pytest.mark.parametrize("at", [1, 2, 5])
def test_an_interrupted_answer_is_kept_and_the_cache_stays_valid(assistant: Assistant, at: int) -> None:
    conversation = Conversation(assistant)
    list(conversation.ask(PHOTO, "\nHello?", sampling=SHORT))
    InterruptedForward(assistant, KeyboardInterrupt(), at)
    received: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        received.extend(conversation.ask("And you?", sampling=SHORT))
    partial = conversation.turns[-1].text
    assert partial.startswith("".join(received).strip())
    assert len(conversation.turns) == (2 if at == 1 else 4)
    answer = "".join(conversation.ask("Why?", sampling=SHORT)).strip()
    assert [answer] == assistant.answer([conversation.turns[:-1]], SHORT)


def test_a_failed_answer_removes_its_question(assistant: Assistant) -> None:
    conversation = Conversation(assistant)
    list(conversation.ask("Hello?", sampling=SHORT))
    before = list(conversation.turns)
    for ask in (lambda: conversation.ask("And you?", sampling=SHORT), lambda: conversation.retry(SHORT)):
        InterruptedForward(assistant, ValueError("broken"), 3)
        with pytest.raises(ValueError, match="broken"):
            list(ask())
        assert conversation.turns == before
    answer = "".join(conversation.ask("Why?", sampling=SHORT)).strip()
    assert [answer] == assistant.answer([conversation.turns[:-1]], SHORT)


class Processed:
    """Counts the tokens that the language model processes."""

    def __init__(self, assistant: Assistant) -> None:
        self.tokens = 0
        assistant.model.language.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, _: object, arguments: object, named: dict[str, Any]) -> None:
        self.tokens += named["inputs_embeds"].shape[1]

    def during(self, answer: Iterator[str]) -> int:
        before = self.tokens
        for _ in answer:
            pass
        return self.tokens - before


ONE = Sampling(max_new_tokens=1)


def test_earlier_tokens_are_not_processed_again(assistant: Assistant) -> None:
    processed = Processed(assistant)
    conversation = Conversation(assistant)
    first = processed.during(conversation.ask(PHOTO, "\nWhat is it?", sampling=ONE))
    prompt = len(assistant.prompt(conversation.turns[:-1]))
    assert first == prompt
    second = processed.during(conversation.ask("Why?", sampling=ONE))
    # The last token of the first answer was never processed; a few tokens at the border may be tokenized differently.
    assert second <= len(assistant.prompt(conversation.turns[:-1])) - prompt + 2
    assert processed.during(conversation.retry(ONE)) == 1
    conversation.undo()
    assert processed.during(conversation.ask("Who?", sampling=ONE)) <= second
    assert assistant.features.loaded == ["a.jpg"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("change", ["retry", "undo", "system", "edit"])
def test_answers_after_a_change_equal_those_of_a_new_conversation(assistant: Assistant, change: str) -> None:
    conversation = Conversation(assistant)
    for content in ((PHOTO, "\nWhat is it?"), (OTHER, "\nAnd this?"), ("Why?",)):
        list(conversation.ask(*content, sampling=SHORT))
    if change == "retry":
        answer = conversation.retry(SHORT).text
    elif change == "system":
        conversation.system = "Answer in rhymes."
        assert conversation.system == "Answer in rhymes."
        answer = conversation.ask("Who?", sampling=SHORT).text
    else:
        assert conversation.undo() == ("Why?",)
        if change == "edit":
            conversation.undo()
        answer = conversation.ask(PHOTO, "\nWhere?", sampling=SHORT).text
    assert [answer] == assistant.answer([conversation.turns[:-1]], SHORT)


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_compiled_step_gives_the_same_answers(assistant: Assistant, interrupted: bool) -> None:
    """Over several turns, which continue its keys and values; also after an interrupt."""
    expected, conversation = Conversation(assistant), Conversation(copy.copy(assistant))
    conversation.assistant.decoder = CompiledDecoder(assistant.model.language, lambda step: step)
    processed = Processed(assistant)
    if interrupted:
        InterruptedForward(assistant, KeyboardInterrupt(), 4)
        with pytest.raises(KeyboardInterrupt):
            list(conversation.ask(PHOTO, "\nHello?", sampling=SHORT))
        conversation.undo()
    for content in ((PHOTO, "\nWhat is it?"), ("Why?",), (OTHER, "\nAnd this?")):
        for sampling in (SHORT, Sampling(10, temperature=1.0, seed=3)):
            answer = expected.ask(*content, sampling=sampling).text
            positions = processed.tokens
            assert conversation.ask(*content, sampling=sampling).text == answer
            new = processed.tokens - positions
            assert conversation.retry(sampling).text == answer
            assert processed.tokens - positions - new <= min(new, 10)


def test_undo_and_retry_without_a_question(assistant: Assistant) -> None:
    conversation = Conversation(assistant, "Answer in rhymes.")
    assert conversation.undo() == ()
    with pytest.raises(LlavactlError):
        conversation.retry()
    assert conversation.system == "Answer in rhymes."


def test_a_second_question_ends_the_first_answer(assistant: Assistant) -> None:
    conversation = Conversation(assistant)
    first = conversation.ask("Hello?", sampling=SHORT)
    piece = next(first)
    answer = conversation.ask("Why?", sampling=SHORT).text
    assert [turn.text for turn in conversation.turns] == ["Hello?", piece.strip(), "Why?", answer]
    assert list(first) == []


def test_two_threads_share_a_model_but_not_a_conversation(assistant: Assistant) -> None:
    questions = [(PHOTO, "\nWhat is it?"), (OTHER, "\nWhy?"), ("Hello?",), ("Who?",)]
    alone = [Conversation(assistant).ask(*content, sampling=SHORT).text for content in questions]
    with ThreadPoolExecutor(4) as pool:
        together = pool.map(lambda content: Conversation(assistant).ask(*content, sampling=SHORT).text, questions)
        assert list(together) == alone
    conversation = Conversation(assistant)
    started, release = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        started.set()
        release.wait(60)

    hook = assistant.model.language.register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(lambda: conversation.ask("Hello?", sampling=SHORT).text)
        assert started.wait(60)
        with pytest.raises(LlavactlError, match="another thread"):
            conversation.ask("Why?")
        release.set()
        assert running.result() == alone[2]
    hook.remove()


def test_the_oldest_turns_are_left_out_and_their_images_kept(
    assistant: Assistant, caplog: pytest.LogCaptureFixture
) -> None:
    assistant.model.language.config.max_position_embeddings = 400
    processed = Processed(assistant)
    conversation = Conversation(assistant, "Be brief.")
    counts = []
    for number in range(12):
        content = (PHOTO, "\nWhat is it?") if not number else (f"What about number {number}, and what else is there?",)
        before = processed.tokens
        answer = conversation.ask(*content, sampling=SHORT).text
        counts.append(processed.tokens - before)
        prompt = assistant.prompt(without_oldest(conversation.turns[:-1], conversation.left_out))
        assert len(prompt) + 10 <= 400
        assert prompt.images == (PHOTO,)
        shown = without_oldest(conversation.turns[:-1], conversation.left_out)
        assert shown[0].text == "Be brief."
        assert [answer] == assistant.answer([shown], SHORT)
    assert len(conversation.turns) == 25
    warnings = [record for record in caplog.records if "context" in record.message]
    assert 1 <= len(warnings) <= 6
    # Between the turns at which others are left out, only new tokens are processed.
    assert sum(count < 120 for count in counts) >= len(counts) - len(warnings) - 1
    while conversation.undo():
        assert conversation.left_out <= len(conversation.turns)
    assert conversation.ask("Hello?", sampling=SHORT).text


def test_a_question_beyond_the_context_is_refused(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    assistant.model.language.config.max_position_embeddings = 200
    conversation = Conversation(assistant)
    with pytest.raises(DataError, match="context"):
        list(conversation.ask("What? " * 200, sampling=SHORT))
    assert conversation.turns == []
    monkeypatch.setattr(type(assistant), "encode", lambda *_: pytest.fail("a huge question is tokenized"))
    with pytest.raises(DataError, match="context"):
        list(conversation.ask("What? " * 100_000))
    monkeypatch.undo()
    processed = Processed(assistant)
    processed.during(conversation.ask("Hello?", sampling=Sampling(max_new_tokens=500)))
    assert 100 < processed.tokens < 200


def test_a_question_that_the_template_omits_may_have_any_length(assistant: Assistant) -> None:
    """The template ``plain``, of models after stage 1."""
    assistant.model.language.config.max_position_embeddings = 200
    encoding = replace(assistant.encoding, template=registry().create("templates", {"name": "plain"}))
    untrained = replace(assistant, encoding=encoding)
    long, short = (
        Conversation(untrained).ask(PHOTO, "What? " * count, sampling=SHORT).text for count in (1_000_000, 1)
    )
    assert long == short


def test_sampling_of_the_generation_config(assistant: Assistant) -> None:
    config = assistant.model.language.generation_config
    config.temperature, config.top_p = 0.4, 0.8
    assert default_sampling(assistant.model.language) == Sampling()
    config.do_sample = True
    assert default_sampling(assistant.model.language) == Sampling(temperature=0.4, top_p=0.8)
    config.temperature = config.top_p = None
    assert default_sampling(assistant.model.language) == Sampling(temperature=1.0)


@pytest.mark.parametrize("first", [True, False], ids=["eos", "none"])
def test_an_empty_prompt_is_answered(assistant: Assistant, first: bool) -> None:
    """The template `plain` omits questions, and this tokenizer adds no BOS token."""
    tokenizer = copy.deepcopy(assistant.encoding.tokenizer)
    if not first:
        tokenizer.bos_token = tokenizer.eos_token = None
    plain = registry().create("templates", {"name": "plain"})
    assistant.encoding = Encoding(plain, tokenizer, assistant.encoding.image_tokens)
    conversations = [(Turn("user", ("Hello?",)),), (Turn("user", (PHOTO, "\nWhat is it?")),), (Turn("user", ("",)),)]
    answers = assistant.answer(conversations, SHORT)
    assert answers == [assistant.answer([each], SHORT)[0] for each in conversations]
    assert answers[0] == answers[2]
    assert bool(answers[1])
    assert first or not answers[0]
    conversation = Conversation(assistant)
    assert "".join(conversation.ask("Hello?", sampling=SHORT)).strip() == answers[0]


@pytest.mark.parametrize("own", [7, [7, 9], None])
def test_eos_tokens_of_the_generation_config_are_stop_tokens(assistant: Assistant, own: Any) -> None:
    language: Any = assistant.model.language
    language.generation_config.eos_token_id = own
    assert {7, 9}.intersection(assistant.stops.ids) == ({own} if isinstance(own, int) else set(own or ()))
    assert assistant.encoding.tokenizer.eos_token_id in assistant.stops.ids


@pytest.mark.parametrize("special", [True, False])
def test_an_added_token_that_ends_an_answer_is_a_stop_token(assistant: Assistant, special: bool) -> None:
    tokenizer = copy.deepcopy(assistant.encoding.tokenizer)
    tokenizer.add_tokens([AddedToken("<|E|>", special=special, normalized=False)])
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|E|>{% endfor %}assistant: "
    template = registry().create("templates", {"name": "tokenizer"})
    stops = Stops.of(Encoding(template, tokenizer, 1))
    (end,) = tokenizer.encode("<|E|>", add_special_tokens=False)
    assert end in stops.ids
    assert not stops.texts
