"""Attention and occlusion maps of an answer's words."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import llavactl
from llavactl.chat.assistant import Assistant
from llavactl.chat.conversation import Conversation
from llavactl.chat.explain import Word, explain
from llavactl.core.errors import DataError, RecipeError
from llavactl.core.schema import Turn
from llavactl.data.batches import collate
from llavactl.images.references import image_in_memory
from llavactl.model.attribution import attention, occlusion
from llavactl.model.generate import Sampling
from llavactl.testing import toy_model

PHOTO, OTHER = (image_in_memory(Image.new("RGB", (30, 20), color)) for color in ("red", "blue"))
TURNS = (Turn("user", (PHOTO, "\nWhat is it?")), Turn("assistant", ("It is  red, 一只 dog.",)))


@pytest.fixture(params=["full", "lora"])
def assistant(request: pytest.FixtureRequest, tmp_path: Path) -> Assistant:
    return llavactl.load_model(toy_model(tmp_path, method=request.param), device="cpu")


def test_every_word_has_maps_of_every_image(assistant: Assistant) -> None:
    turns = (TURNS[0], Turn("assistant", ("Red.",)), Turn("user", (OTHER, "\nAnd?")), TURNS[1])
    explanation = explain(assistant, turns)
    assert [word.text for word in explanation.words] == ["It", "is", "red,", "一只", "dog."]
    assert explanation.images == (PHOTO, OTHER)
    for word in explanation.words:
        assert word.attention is not None
        assert [each.shape for each in (*word.attention, *word.occlusion)] == [(2, 2)] * 4
        assert sum(each.sum() for each in word.attention) == pytest.approx(1)
        assert all(np.isfinite(each).all() for each in word.occlusion)
    json.dumps(explanation.document())


def test_attention_is_that_of_eager_transformers(assistant: Assistant) -> None:
    encoded = assistant.encode_answer(TURNS)
    batch = collate([encoded], assistant.features)
    recorded = attention(assistant.model, batch)
    language: Any = assistant.model.language
    language.config._attn_implementation = "eager"
    embeds = assistant.model.embed(batch.ids, batch.features)
    layers = language(inputs_embeds=embeds, output_attentions=True).attentions
    expected = torch.stack(layers).mean((0, 2))[0][-encoded.target_tokens - 1 : -1]
    torch.testing.assert_close(recorded, expected)
    assert recorded.sum(-1) == pytest.approx(torch.ones(len(recorded)))


def test_occlusion_is_the_fall_of_the_log_probability(assistant: Assistant) -> None:
    encoded = assistant.encode_answer(TURNS)
    batch = collate([encoded], assistant.features)
    mask = torch.tensor([False, True, False, False])
    falls = occlusion(assistant.model, batch, 0, [mask, torch.zeros(4, dtype=torch.bool), mask] * 5)

    def log_probability(features: torch.Tensor) -> float:
        embeds = assistant.model.embed(batch.ids, features)
        logits = assistant.model.language(inputs_embeds=embeds).logits[0, :-1].log_softmax(-1)
        targets = batch.labels[0, 1:]
        return float(logits[targets >= 0].gather(1, targets[targets >= 0][:, None]).sum())

    assert batch.features is not None
    occluded = batch.features.clone()
    occluded[0, 1] = batch.features[0].float().mean(0).to(occluded.dtype)
    expected = log_probability(batch.features) - log_probability(occluded)
    assert falls.sum(1).tolist() == pytest.approx([expected, 0, expected] * 5, abs=1e-4)


def test_the_conversation_is_unchanged(assistant: Assistant) -> None:
    conversation = Conversation(assistant)
    first = conversation.ask(PHOTO, "\nWhat is it?", sampling=Sampling(8)).text
    explain(assistant, conversation.turns, conversation)
    assert conversation.retry(Sampling(8)).text == first


@pytest.mark.parametrize(
    "turns", [(), TURNS[:1], (Turn("user", ("Hi",)), TURNS[1]), (TURNS[0], Turn("assistant", ("",)))]
)
def test_without_an_image_or_an_answer(assistant: Assistant, turns: tuple[Turn, ...]) -> None:
    with pytest.raises(DataError):
        explain(assistant, turns)


def test_the_overlay_shows_the_image_as_the_encoder_sees_it(assistant: Assistant) -> None:
    """The toys pad images to a square: a wide image has bars above and below."""
    wide = image_in_memory(Image.new("RGB", (40, 20), "red"))
    explanation = explain(assistant, (Turn("user", (wide, "\nWhat?")), TURNS[1]))
    (seen,) = explanation.seen
    assert seen.size == (28, 28)
    assert seen.getpixel((14, 14)) != seen.getpixel((14, 1))
    values = (np.array([[0.0, 2.0], [-1.0, 0.1]]),)
    drawn = explanation.overlay(Word("red", None, values), "occlusion")
    assert drawn is not None
    difference = np.abs(np.asarray(drawn, dtype=float) - np.asarray(seen, dtype=float)).sum(-1)
    quarters = [difference[rows, columns].mean() for rows in HALVES for columns in HALVES]
    assert quarters.index(max(quarters)) == 1
    assert quarters[0] == quarters[2] == 0 < quarters[3]
    assert explanation.overlay(Word("red", None, values), "attention") is None
    for arguments in (("saliency",), ("occlusion", 1), ("occlusion", -2)):
        with pytest.raises(RecipeError):
            explanation.overlay(Word("red", None, values), *arguments)  # type: ignore[arg-type]


HALVES = slice(0, 14), slice(14, 28)


def test_the_words_that_depend_most_on_the_image(assistant: Assistant) -> None:
    explanation = explain(assistant, TURNS)
    peaks = {word.text: word.occlusion[0].max() for word in explanation.words}
    chosen = [word.text for word in explanation.most_visual(2)]
    assert set(chosen) == set(sorted(peaks, key=lambda word: -peaks[word])[:2])
    assert chosen == [word for word in peaks if word in chosen]
    assert len(explanation.most_visual(99)) == len(peaks)


def test_explanations_in_threads(assistant: Assistant) -> None:
    """Chats share a model, also while one of them is explained."""
    expected = explain(assistant, TURNS)
    conversation = Conversation(assistant)
    with ThreadPoolExecutor() as pool:
        others = [pool.submit(explain, assistant, TURNS) for _ in range(3)]
        conversation.ask(PHOTO, "\nWhat is it?", sampling=Sampling(64)).text  # noqa: B018
        explanations = [other.result() for other in others]
    for each in explanations:
        for word, reference in zip(each.words, expected.words, strict=True):
            np.testing.assert_allclose(word.attention, reference.attention, rtol=1e-4)  # type: ignore[arg-type]
    assert assistant.model.language.config._attn_implementation == "sdpa"


def test_progress_can_end_an_explanation(assistant: Assistant) -> None:
    chat = llavactl.Chat(assistant, turns=TURNS)
    seen: list[llavactl.Progress] = []
    assert chat.explain(progress=seen.append).words
    assert (seen[-1].done, seen[-1].total) == (4, 4)

    def stop(_progress: llavactl.Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.explain(progress=stop)
