"""Prompts and options of the harnesses as conversations and sampling of llavactl; no harness is needed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from llavactl_harnesses.command import with_model
from llavactl_harnesses.prompts import Prompt, answers, batch_size_of, likelihoods, load_model, sampling_of
from PIL import Image

from llavactl import Assistant, LlavactlError, ModelError, Sampling, image_in_memory

RED, BLUE = (Image.new("RGB", (30, 20), color) for color in ("red", "blue"))
A, B = image_in_memory(RED), image_in_memory(BLUE)


def turns_of(*texts: str, images: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
    roles = ["user" if index % 2 == 0 else "assistant" for index in range(len(texts))]
    turns = Prompt(list(zip(roles, texts, strict=True)), lambda: images).turns()
    return [(turn.role, *turn.content) for turn in turns]


def test_images_are_placed_at_their_tags() -> None:
    assert turns_of("<image>\nWhat?", images=[RED]) == [("user", A, "\nWhat?")]
    assert turns_of("From <image> to <image>?", images=[RED, BLUE]) == [("user", "From ", A, " to ", B, "?")]
    assert turns_of("<image> 1", "one", "2 <image>", images=[RED, BLUE]) == [
        ("user", A, " 1"),
        ("assistant", "one"),
        ("user", "2 ", B),
    ]


def test_images_without_tags_precede_the_last_question() -> None:
    assert turns_of("What?", images=[RED, BLUE]) == [("user", A, B, "What?")]
    assert turns_of("1", "one", "2", images=[RED]) == [("user", "1"), ("assistant", "one"), ("user", A, "2")]


def test_a_tag_without_images_is_text() -> None:
    assert turns_of("What does <image> mean?") == [("user", "What does <image> mean?")]


@pytest.mark.parametrize(
    ("texts", "images"),
    [
        (["<image><image>"], [RED]),
        (["<image>"], [RED, BLUE]),
        (["What?"], ["video.mp4"]),
        (["What?"], [b"bytes"]),
        (["Question", "The answer is"], []),
        ([], []),
    ],
)
def test_prompts_that_cannot_be_rendered(texts: list[str], images: list[Any]) -> None:
    with pytest.raises(LlavactlError):
        turns_of(*texts, images=images)


def test_options_are_greedy_unless_they_sample() -> None:
    assert sampling_of({}, 7) == (Sampling(7), ())
    assert sampling_of({"until": "\n", "max_gen_toks": 5}, 7) == (Sampling(5), ("\n",))
    assert sampling_of({"until": ["a", "b"], "max_new_tokens": 5}, 7) == (Sampling(5), ("a", "b"))
    assert sampling_of({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, 7) == (Sampling(7), ())
    assert sampling_of({"do_sample": True, "temperature": 0.7, "top_p": 0.9}, 7) == (Sampling(7, 0.7, 0.9), ())
    assert sampling_of({"temperature": 0, "top_p": None, "num_beams": 1}, 7) == (Sampling(7), ())
    with pytest.raises(ModelError):
        sampling_of({"num_beams": 5}, 7)


def test_options_that_llavactl_lacks_are_named(caplog: pytest.LogCaptureFixture) -> None:
    sampling_of({"repetition_penalty": 1.2}, 7)
    assert "repetition_penalty" in caplog.text


@pytest.mark.parametrize("value", ["auto", "auto:4", 0, -1, "1.5"])
def test_batch_sizes(value: Any) -> None:
    assert batch_size_of("8") == batch_size_of(8) == 8
    with pytest.raises(ModelError):
        batch_size_of(value)


def test_a_missing_cuda_device_is_replaced(folder: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("a CUDA device is available")
    assert load_model(str(folder), None, "cuda:0").model.device.type == "cpu"


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_batches_equal_single_requests_in_their_order(model: Assistant, batch_size: int) -> None:
    texts = ["What is it?", "Which color?", "Yes or no?", "Why is it so?", "How many?"]
    prompts = [Prompt([("user", text)], lambda index=index: [RED] * (index % 2)) for index, text in enumerate(texts)]
    short, long = (Sampling(3), ()), (Sampling(6), ())
    options = [short, short, long, short, long]
    expected = [model.answer([p.turns()], s)[0] for p, (s, _) in zip(prompts, options, strict=True)]
    assert list(answers(model, prompts, options, batch_size)) == expected
    found = list(likelihoods(model, prompts, [" red"] * 5, batch_size))
    single = [model.log_likelihoods([prompt.turns()], ["red"])[0] for prompt in prompts]
    assert [each.tokens for each in found] == [each.tokens for each in single]
    numbers = [each.log_probability for each in single]
    assert [each.log_probability for each in found] == pytest.approx(numbers, abs=1e-3)


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        (["--tasks", "a"], ["run", "--model", "llavactl", "--tasks", "a"]),
        (["run", "--tasks", "a"], ["run", "--model", "llavactl", "--tasks", "a"]),
        (["run", "--model", "hf"], ["run", "--model", "hf"]),
        (["--model=hf"], ["--model=hf"]),
        (["-C", "file.yaml"], ["-C", "file.yaml"]),
        (["run", "--help"], ["run", "--help"]),
        (["ls", "tasks"], ["ls", "tasks"]),
        (["validate", "--tasks", "a"], ["validate", "--tasks", "a"]),
        ([], []),
    ],
)
def test_arguments_of_the_command(given: list[str], passed: list[str]) -> None:
    assert with_model(tuple(given)) == passed
