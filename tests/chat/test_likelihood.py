"""The likelihood of a given answer equals that of a full forward pass of transformers' model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llavactl.chat.assistant import Assistant
from llavactl.core.registry import registry
from llavactl.core.schema import IMAGE_TOKEN, Encoded, FeatureShape, Turn
from llavactl.data.encode import Encoding
from llavactl.images.image_file import ImageFile
from llavactl.model.build import build
from llavactl.model.generate import Sampling

PHOTO, OTHER = ImageFile("/photos", "a.jpg"), ImageFile("/photos", "b.jpg")
TEMPLATES = ["vicuna-v1", "vicuna-v0", "llama-2", "chatml", "plain", "tokenizer"]
QUESTIONS = [
    [Turn("user", (PHOTO, "\nWhat colour is it?"))],
    [Turn("user", (PHOTO, "\nWhat colour is it?")), Turn("assistant", ("Red.",)), Turn("user", ("And now?",))],
    [Turn("system", ("Be brief.",)), Turn("user", ("No image: </s> is plain text.",))],
    [Turn("user", (PHOTO, "\n", OTHER, "\nDo they differ?"))],
]
ANSWERS = ["The picture is red.", "yes", "a </s> b", "two words\nand a line"]


class FeaturesFromName:
    """Random features, seeded by the image's name."""

    def arrays(self, image: Any) -> tuple[np.ndarray]:
        seed = int.from_bytes(hashlib.sha256(image.name.encode()).digest()[:4], "big")
        return (np.random.default_rng(seed).standard_normal((4, 32), dtype=np.float32),)


@pytest.fixture(params=TEMPLATES)
def assistant(request: pytest.FixtureRequest, toys: Path) -> Assistant:
    shape = FeatureShape((2, 2), 32)
    parts = build({"name": "linear"}, {"name": "hf", "model": str(toys / "language")}, shape, dtype="float32")
    parts.model.eval()
    with torch.no_grad():
        parts.model.language.get_output_embeddings().weight.mul_(20)  # otherwise all tokens are equally likely
    template = registry().create("templates", {"name": request.param})
    return Assistant(parts.model, Encoding(template, parts.tokenizer, parts.image_tokens), FeaturesFromName())


def reference(assistant: Assistant, ids: Sequence[int], images: Sequence[Any], first: int) -> tuple[float, bool]:
    """The likelihood of ``ids`` from ``first``, from the logits of the language model in transformers."""
    model = assistant.model
    text = model.language.get_input_embeddings()
    vectors, features = [], iter(images)
    remaining: list[torch.Tensor] = []
    for token in ids:
        if token == IMAGE_TOKEN:
            if not remaining:
                array = assistant.features.arrays(next(features))[0]
                remaining = list(model.connector(torch.from_numpy(array)[None])[0])
            vectors.append(remaining.pop(0))
        else:
            vectors.append(text(torch.tensor(token)))
    with torch.no_grad():
        log_probabilities = model.language(inputs_embeds=torch.stack(vectors)[None]).logits[0].log_softmax(-1)
    pairs = [(log_probabilities[index - 1], ids[index]) for index in range(first, len(ids))]
    return sum(float(row[token]) for row, token in pairs), all(int(row.argmax()) == token for row, token in pairs)


def answered(assistant: Assistant, turns: Sequence[Turn], answer: str) -> Encoded:
    """The conversation as in training, up to the last token of ``answer``."""
    conversation = [*turns, Turn("assistant", (answer,))]
    encoded, characters = assistant.encoding.encode(conversation), assistant.encoding.texts(conversation)
    end = len(encoded)
    while not "".join(characters[:end]).endswith(answer):
        end -= 1
    return Encoded(encoded.ids[:end], encoded.labels[:end], encoded.images)


def test_likelihoods_equal_a_full_forward_pass(assistant: Assistant) -> None:
    likelihoods = assistant.log_likelihoods(QUESTIONS, ANSWERS)
    for turns, answer, likelihood in zip(QUESTIONS, ANSWERS, likelihoods, strict=True):
        encoded, prompt = answered(assistant, turns, answer), assistant.prompt(turns)
        # The prompt of `plain` without an image is BOS.
        ids = encoded.ids if assistant.encode(turns).ids else prompt.ids + encoded.ids
        assert ids[: len(prompt)] == prompt.ids
        expected, greedy = reference(assistant, ids, encoded.images, len(prompt))
        assert likelihood.log_probability == pytest.approx(expected, abs=1e-3)
        assert likelihood.greedy == greedy
        assert likelihood.tokens == len(ids) - len(prompt)


def test_an_answer_without_tokens(assistant: Assistant) -> None:
    """Some templates write a space before an answer."""
    tokens = assistant.encoding.encode_answer([*QUESTIONS[0], Turn("assistant", ("",))]).target_tokens
    (likelihood,) = assistant.log_likelihoods([QUESTIONS[0]], [""])
    assert likelihood.tokens == tokens
    assert (likelihood == (0.0, True, 0)) == (tokens == 0)


def test_choices_with_a_shared_prompt_equal_single_ones(assistant: Assistant) -> None:
    """They begin with the same tokens, which must not be taken for a part of the prompt."""
    choices = ["The picture is red.", "The picture is green, blue or yellow.", "The", "The picture is"]
    for turns in QUESTIONS:
        batch = assistant.log_likelihoods([turns] * len(choices), choices)
        single = [assistant.log_likelihoods([turns], [choice])[0] for choice in choices]
        assert [each.greedy for each in batch] == [each.greedy for each in single]
        numbers = [each.log_probability for each in single]
        assert [each.log_probability for each in batch] == pytest.approx(numbers, abs=1e-3)
        assert len(set(numbers)) == len(choices)


def test_the_most_probable_answer_is_greedy(assistant: Assistant) -> None:
    turns = QUESTIONS[0]
    assert assistant.encoding.encode_answer([*turns, Turn("assistant", ("a",))]).target_tokens == 1
    head = assistant.model.language.get_output_embeddings()
    hidden: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0][0, 0]))
    before = assistant.log_likelihoods([turns], ["a"])[0]
    hook.remove()
    token = answered(assistant, turns, "a").ids[-1]
    with torch.no_grad():
        head.weight[token] = 100 * hidden[0]
    after, longer = assistant.log_likelihoods([turns, turns], ["a", "a picture"])
    assert not before.greedy
    assert after.greedy
    assert after.log_probability == pytest.approx(0, abs=1e-3)
    assert not longer.greedy


def test_no_conversations(assistant: Assistant) -> None:
    assert assistant.log_likelihoods([], []) == []


def test_a_prompt_that_continues_another_one(assistant: Assistant) -> None:
    short, long = QUESTIONS[0], [*QUESTIONS[0], Turn("assistant", ("Red.",)), Turn("user", ("Why?",))]
    sampling = Sampling(max_new_tokens=6)
    single = [assistant.answer([turns], sampling)[0] for turns in (short, long)]
    assert assistant.answer([short, long], sampling) == single
    assert assistant.answer([long, short], sampling) == single[::-1]


def test_answers_end_before_a_given_string(assistant: Assistant) -> None:
    sampling = Sampling(max_new_tokens=12)
    complete = assistant.answer(QUESTIONS, sampling)
    until = [complete[0][2:4], complete[3][3:5], ""]
    for answer, text in zip(assistant.answer(QUESTIONS, sampling, until=until), complete, strict=True):
        positions = [text.find(stop) for stop in until if stop and stop in text]
        assert answer == text[: min(positions, default=len(text))].strip()
