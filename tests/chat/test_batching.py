"""Answers in a batch that conversations join and leave at any time."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
import torch

from llavactl.chat.assistant import Assistant
from llavactl.chat.batching import Batcher, Event, Finish, Generation
from llavactl.chat.detokenizer import Stops
from llavactl.core.errors import DataError, ModelError
from llavactl.core.registry import registry
from llavactl.core.schema import Encoded, FeatureShape, Turn
from llavactl.data.encode import Encoding
from llavactl.images.image_file import ImageFile
from llavactl.model.build import build
from llavactl.model.exactness import Exact
from llavactl.model.generate import Sampling
from llavactl.model.llava import LlavaModel

PHOTO, OTHER, BROKEN = (ImageFile("/photos", f"{name}.jpg") for name in ("a", "b", "broken"))
SIZE = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 400}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 96, "num_key_value_heads": 2},
    "gpt2": {},
    "gemma3_text": {
        "intermediate_size": 96,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 48},
    "mamba": {"state_size": 8},  # its states can't be joined
}


class FeaturesFromName:
    """Random features, seeded by the image's name."""

    def arrays(self, image: Any) -> tuple[np.ndarray]:
        if image == BROKEN:
            raise DataError("unreadable")
        seed = int.from_bytes(hashlib.sha256(image.name.encode()).digest()[:4], "big")
        return (np.random.default_rng(seed).standard_normal((4, 32), dtype=np.float32),)


def assistant_of(toys: Path, family: str) -> Assistant:
    from transformers import AutoConfig, AutoModelForCausalLM

    parts = build(
        {"name": "linear"}, {"name": "hf", "model": str(toys / "language")}, FeatureShape((2, 2), 32), dtype="float32"
    )
    torch.manual_seed(0)
    language = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZE, **FAMILIES[family])).eval()
    for weight in language.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    template = registry().create("templates", {"name": "vicuna-v1"})
    model = LlavaModel(parts.model.connector, language).eval()
    return Assistant(model, Encoding(template, parts.tokenizer, parts.image_tokens), FeaturesFromName())


@pytest.fixture
def assistant(toys: Path) -> Assistant:
    return assistant_of(toys, "llama")


@pytest.fixture
def endless(assistant: Assistant) -> None:
    """Answers end at their token limit only."""
    assistant.__dict__["stops"] = Stops(frozenset(), ())


@pytest.fixture
def batcher(assistant: Assistant) -> Iterator[Batcher]:
    batcher = Batcher(assistant, max_batch=3)
    yield batcher
    batcher.close()


class Listener:
    """Collects the events of one answer."""

    def __init__(self) -> None:
        self.events: SimpleQueue[Event] = SimpleQueue()

    def answer(self) -> tuple[str, Finish]:
        text = ""
        while isinstance(event := self.events.get(timeout=60), str):
            text += event
        if isinstance(event, Exception):
            raise event
        return text, event


def ask(batcher: Batcher, turn: Turn, sampling: Sampling, **options: Any) -> tuple[Listener, Generation]:
    listener = Listener()
    return listener, batcher.submit(batcher.assistant.prompt([turn]), sampling, listener.events.put, **options)


TURNS = [
    Turn("user", (PHOTO, "\nWhat is it?")),
    Turn("user", ("Hello, who are you, and why do you answer questions about images at all?",)),
    Turn("user", ("Why?",)),
    Turn("user", (OTHER, "\nWhat is it, and what is this: ", PHOTO)),
    Turn("user", (PHOTO, "\nWhat is it?")),
    Turn("user", ("Count to ten.",)),
]
GREEDY = [Sampling(max_new_tokens=limit) for limit in (9, 30, 4, 17, 1, 12)]
SAMPLED = [replace(each, temperature=1.0 + seed / 5, top_p=0.9, seed=seed) for seed, each in enumerate(GREEDY)]


@pytest.mark.parametrize(
    "samplings",
    [
        pytest.param(GREEDY, id="greedy", marks=pytest.mark.slow),
        pytest.param(SAMPLED, id="sampled", marks=pytest.mark.slow),
        pytest.param([*GREEDY[:3], *SAMPLED[3:]], id="both"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_equal_those_of_the_same_conversation_alone(toys: Path, family: str, samplings: list[Sampling]) -> None:
    assistant = assistant_of(toys, family)
    assert assistant.exact.joined is (family != "mamba")
    alone = [assistant.answer([[turn]], sampling)[0] for turn, sampling in zip(TURNS, samplings, strict=True)]
    batcher = Batcher(assistant, max_batch=4)
    listeners = []
    for turn, sampling in zip(TURNS, samplings, strict=True):
        listeners.append(ask(batcher, turn, sampling)[0])
        time.sleep(0.01)
    answers = [listener.answer() for listener in listeners]
    batcher.close()
    assert [text.strip() for text, _ in answers] == alone
    assert len(set(alone)) > 3
    for (_, finish), sampling in zip(answers, samplings, strict=True):
        assert finish.tokens == sampling.max_new_tokens or finish.reason == "stop"


@pytest.mark.usefixtures("endless")
def test_conversations_are_answered_in_one_batch(batcher: Batcher, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    language: Any = batcher.assistant.model.language
    forward = language.forward

    def counted(*arguments: Any, **options: Any) -> Any:
        sizes.append(len(options["inputs_embeds"]))
        return forward(*arguments, **options)

    monkeypatch.setattr(language, "forward", counted)
    listeners = [ask(batcher, turn, Sampling(max_new_tokens=40))[0] for turn in TURNS]
    for listener in listeners:
        listener.answer()
    assert max(sizes) == batcher.max_batch == 3
    assert sum(sizes) < 1.2 * sum(40 for _ in TURNS)


def test_one_after_another_if_a_batch_would_change_the_answers(assistant: Assistant) -> None:
    assistant.__dict__["exact"] = Exact(padded=False, shared=False, joined=False)
    alone = assistant.answer([[turn] for turn in TURNS], GREEDY[1])
    batcher = Batcher(assistant, max_batch=8)
    assert batcher.max_batch == 1
    listeners = [ask(batcher, turn, GREEDY[1])[0] for turn in TURNS]
    assert [listener.answer()[0].strip() for listener in listeners] == alone
    batcher.close()


def test_stop_strings_end_one_answer_only(batcher: Batcher) -> None:
    sampling = Sampling(max_new_tokens=30)
    whole = ask(batcher, TURNS[0], sampling)[0].answer()[0]
    stop = whole[4:6]
    stopped, other = ask(batcher, TURNS[0], sampling, until=[stop]), ask(batcher, TURNS[0], sampling)
    text, finish = stopped[0].answer()
    assert text == whole[: whole.index(stop)]
    assert finish.reason == "stop"
    assert other[0].answer() == (whole, Finish("length", 30))


def test_a_stop_token_ends_an_answer(batcher: Batcher) -> None:
    whole, finish = ask(batcher, TURNS[0], Sampling(max_new_tokens=6))[0].answer()
    assert finish == Finish("length", 6)
    tokens = batcher.assistant.encoding.tokenizer.encode(whole, add_special_tokens=False)
    language: Any = batcher.assistant.model.language
    language.generation_config.eos_token_id = tokens[-1]
    again = Batcher(Assistant(batcher.assistant.model, batcher.assistant.encoding, batcher.assistant.features))
    text, finish = ask(again, TURNS[0], Sampling(max_new_tokens=6))[0].answer()
    again.close()
    assert finish.reason == "stop"
    assert whole.startswith(text)
    assert finish.tokens < 6


@pytest.mark.usefixtures("endless")
def test_an_unreadable_image_ends_its_answer_alone(batcher: Batcher) -> None:
    running = ask(batcher, TURNS[1], Sampling(max_new_tokens=60))[0]
    failing = ask(batcher, Turn("user", (BROKEN, "\nWhat?")), Sampling())[0]
    with pytest.raises(DataError):
        failing.answer()
    assert running.answer()[1].tokens == 60


@pytest.mark.usefixtures("endless")
def test_logits_that_are_not_finite_end_their_answer_alone(batcher: Batcher, monkeypatch: pytest.MonkeyPatch) -> None:
    embed = batcher.assistant.model.embed
    monkeypatch.setattr(
        batcher.assistant.model, "embed", lambda ids, images: embed(ids, images) * (1 if images is None else torch.nan)
    )
    running = ask(batcher, TURNS[1], Sampling(max_new_tokens=60))[0]
    with pytest.raises(ModelError, match="not finite"):
        ask(batcher, TURNS[0], Sampling())[0].answer()
    assert running.answer()[1].tokens == 60


@pytest.mark.usefixtures("endless")
def test_after_a_failed_step_the_next_conversations_are_answered(
    batcher: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    language: Any = batcher.assistant.model.language
    forward, fail = language.forward, threading.Event()

    def failing(*arguments: Any, **options: Any) -> Any:
        if fail.is_set():
            fail.clear()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*arguments, **options)

    monkeypatch.setattr(language, "forward", failing)
    expected = ask(batcher, TURNS[0], Sampling(max_new_tokens=8))[0].answer()
    listeners = [ask(batcher, turn, Sampling(max_new_tokens=2000))[0] for turn in TURNS[:2]]
    assert all(isinstance(listener.events.get(timeout=60), str) for listener in listeners)
    fail.set()
    for listener in listeners:
        with pytest.raises(ModelError, match="out of memory"):
            listener.answer()
    assert ask(batcher, TURNS[0], Sampling(max_new_tokens=8))[0].answer() == expected


@pytest.mark.usefixtures("endless")
def test_a_cancelled_answer_leaves_its_place(batcher: Batcher) -> None:
    sampling = Sampling(max_new_tokens=2000)
    asked = [ask(batcher, turn, sampling) for turn in TURNS[:3]]
    waiting = [ask(batcher, TURNS[0], Sampling(max_new_tokens=5)) for _ in range(2)]
    for listener, _ in asked:
        listener.events.get(timeout=60)
    assert (batcher.running, batcher.waiting) == (3, 2)
    waiting[0][1].cancel()
    assert batcher.waiting == 1
    asked[1][1].cancel()
    assert waiting[1][0].answer()[1].tokens == 5
    assert waiting[0][0].events.empty()
    for _, generation in asked:
        generation.cancel()
    assert batcher.running == 0


@pytest.mark.usefixtures("endless")
def test_closing_ends_all_answers(assistant: Assistant) -> None:
    batcher = Batcher(assistant, max_batch=1)
    running, waiting = (ask(batcher, turn, Sampling(max_new_tokens=2000))[0] for turn in TURNS[:2])
    assert isinstance(running.events.get(timeout=60), str)
    batcher.close()
    for listener in (running, waiting, ask(batcher, TURNS[2], Sampling())[0]):
        with pytest.raises(ModelError, match="closed"):
            listener.answer()
    assert not batcher._thread.is_alive()


def test_an_empty_prompt_has_an_empty_answer(batcher: Batcher) -> None:
    listener = Listener()
    batcher.submit(Encoded((), ()), Sampling(), listener.events.put)
    assert listener.answer() == ("", Finish("stop", 0))


def test_the_context_length_is_the_models(batcher: Batcher, toys: Path) -> None:
    language: Any = batcher.assistant.model.language
    assert batcher.context_length == language.config.max_position_embeddings
    unlimited = Batcher(assistant_of(toys, "mamba"))
    assert unlimited.context_length is None
    unlimited.close()
