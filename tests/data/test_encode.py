"""Ids and labels come from one tokenisation: what is trained is exactly the answers and what ends them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavactl.core.errors import ConversationError, ModelError
from llavactl.core.registry import registry
from llavactl.core.schema import IGNORE, IMAGE_TOKEN, Turn
from llavactl.data.encode import Encoding
from llavactl.data.image_order import arrange, arrangements
from llavactl.images.image_file import ImageFile

PHOTO, OTHER = ImageFile("/photos", "a.jpg"), ImageFile("/photos", "b.jpg")
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@pytest.fixture(scope="module")
def tokenizer(toys: Path) -> Any:
    return registry().create("languages", {"name": "hf", "model": str(toys / "language")}).tokenizer()


def encoding(template: str, tokenizer: Any, image_tokens: int = 3, max_length: int | None = None) -> Encoding:
    return Encoding(registry().create("templates", {"name": template}), tokenizer, image_tokens, max_length)


def read(tokenizer: Any, ids: Any) -> str:
    """Tokens as text, image tokens as ▣."""
    runs: list[list[int]] = [[]]
    text = ""
    for token in ids:
        if token == IMAGE_TOKEN:
            text += tokenizer.decode(runs[-1]) + "▣"
            runs.append([])
        else:
            runs[-1].append(token)
    return str(text + tokenizer.decode(runs[-1]))


def trained(tokenizer: Any, labels: Any) -> str:
    return str(tokenizer.decode([label for label in labels if label != IGNORE]))


TALK = (
    Turn("user", (PHOTO, "\nWhat is it?")),
    Turn("assistant", ("A dog.",)),
    Turn("user", ("Which colour?",)),
    Turn("assistant", ("Red.",)),
)


def test_vicuna_v1_is_written_as_llava_writes_it(tokenizer: Any) -> None:
    made = encoding("vicuna-v1", tokenizer).encode(TALK)
    assert read(tokenizer, made.ids) == (
        f"{SYSTEM} USER: ▣▣▣\nWhat is it? ASSISTANT: A dog.</s>USER: Which colour? ASSISTANT: Red.</s>"
    )
    assert trained(tokenizer, made.labels) == " A dog.</s> Red.</s>"
    assert made.images == (PHOTO,)


def test_plain_trains_caption_and_newline_and_no_end(tokenizer: Any) -> None:
    made = encoding("plain", tokenizer).encode(TALK[:2])
    assert read(tokenizer, made.ids) == "▣▣▣A dog.\n"
    assert trained(tokenizer, made.labels) == "A dog.\n"


def test_the_tokenizers_own_template(tokenizer: Any) -> None:
    made = encoding("tokenizer", tokenizer).encode(TALK)
    assert read(tokenizer, made.ids).startswith(
        "<|im_start|>user\n▣▣▣\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA dog."
    )
    assert trained(tokenizer, made.labels) == "A dog.<|im_end|>Red.<|im_end|>"


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer: Any) -> None:
    import copy

    fickle = copy.deepcopy(tokenizer)
    fickle.chat_template = "{{ messages | length }}: {% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ModelError, match="earlier turns differently"):
        encoding("tokenizer", fickle).encode(TALK)
    fickle.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        encoding("tokenizer", fickle).encode(TALK)


@pytest.mark.parametrize("template", ["vicuna-v1", "vicuna-v0", "llama-2", "chatml", "tokenizer", "plain"])
def test_a_prompt_is_what_training_saw_before_the_answer(tokenizer: Any, template: str) -> None:
    made = encoding(template, tokenizer)
    whole, prompt = made.encode(TALK), made.encode(TALK[:3], generate=True)
    assert whole.ids[: len(prompt)] == prompt.ids
    assert whole.labels[len(prompt)] != IGNORE


def test_a_bos_is_put_before_everything_once(tokenizer: Any) -> None:
    import copy

    from tokenizers.processors import TemplateProcessing

    begins = copy.deepcopy(tokenizer)
    begins.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = encoding("plain", begins).encode(TALK[:2])
    assert made.ids[:2] == (0, IMAGE_TOKEN)
    assert made.labels[0] == IGNORE


def test_a_special_tokens_name_that_no_break_can_hide_is_refused(tokenizer: Any) -> None:
    """A conversation with every noncharacter would else end its turn by itself."""
    every = "".join(chr(0xFDD0 + index) for index in range(32))
    made = encoding("vicuna-v1", tokenizer)
    assert made.encode([Turn("user", (every,)), Turn("assistant", ("A dog.",))]).target_tokens
    with pytest.raises(ConversationError, match="noncharacters"):
        made.encode([Turn("user", (every,)), Turn("assistant", ("A dog.</s>",))])


# Cn: noncharacters, which are no text; the encoding uses two of them.
words = st.text(alphabet=st.characters(exclude_categories=["Cs", "Cn"]), min_size=1, max_size=30).filter(str.strip)


@settings(max_examples=60)
@given(
    turns=st.lists(st.tuples(words, words), min_size=1, max_size=4),
    template=st.sampled_from(["vicuna-v1", "llama-2", "chatml", "tokenizer"]),
)
def test_exactly_the_answers_are_trained(tokenizer: Any, turns: list[tuple[str, str]], template: str) -> None:
    talk = [turn for q, a in turns for turn in (Turn("user", (q,)), Turn("assistant", (a,)))]
    made = encoding(template, tokenizer).encode(talk)
    assert len(made.ids) == len(made.labels)
    assert all(label in (IGNORE, token) for token, label in zip(made.ids, made.labels, strict=True))
    space, end = {"vicuna-v1": (" ", "</s>"), "llama-2": (" ", " </s>")}.get(template, ("", "<|im_end|>"))
    assert trained(tokenizer, made.labels) == "".join(f"{space}{a}{end}" for _, a in turns)


@settings(max_examples=80)
@given(length=st.integers(1, 120))
def test_truncation_never_cuts_an_image(tokenizer: Any, length: int) -> None:
    talk = [
        Turn("user", (PHOTO, "\nWhat?")),
        Turn("assistant", ("A dog.",)),
        Turn("user", ("And ", OTHER, "?")),
        Turn("assistant", ("No.",)),
    ]
    made = encoding("vicuna-v1", tokenizer, 7, length).encode(talk)
    assert len(made) <= length
    assert sum(token == IMAGE_TOKEN for token in made.ids) == 7 * len(made.images)
    assert made.ids[-1] != IMAGE_TOKEN


def test_arranging_images() -> None:
    after = Turn("user", ("What is it?\n", PHOTO))
    assert arrange([after], "first", "")[0].content == (PHOTO, "\n", "What is it?")
    assert arrange([after], "as-data", "") == (after,)
    sides = {arrange([after], "random", str(seed))[0].content[0] == PHOTO for seed in range(20)}
    assert sides == {True, False}
    assert arrange([after], "random", "7") == arrange([after], "random", "7")


def test_only_the_first_turn_is_random() -> None:
    first, second = Turn("user", ("What is it?\n", PHOTO)), Turn("user", ("And this?", OTHER))
    for seed in range(20):
        assert arrange([first, TALK[1], second], "random", str(seed))[2].content == (OTHER, "\n", "And this?")
        words = Turn("user", ("Hello.",))
        assert arrange([words, TALK[1], second], "random", str(seed))[2].content == (OTHER, "\n", "And this?")


@pytest.mark.parametrize("order", ["first", "random", "as-data"])
def test_arrangements_are_all_that_a_seed_can_make(order: Any) -> None:
    turns = [Turn("user", ("What is it?\n", PHOTO)), TALK[1], Turn("user", ("And this?", OTHER))]
    made = {arrange(turns, order, str(seed)) for seed in range(40)}
    assert made == set(arrangements(turns, order))


@settings(max_examples=80)
@given(
    question=st.text(alphabet=st.characters(exclude_categories=["Cs", "Cn"]), max_size=60),
    answer=words,
    length=st.integers(1, 260),
    name=st.sampled_from(["plain", "vicuna-v1", "vicuna-v0", "llama-2", "chatml", "tokenizer"]),
    images=st.integers(0, 2),
)
def test_what_trains_is_known_before_it_is_tokenised(
    tokenizer: Any, question: str, answer: str, length: int, name: str, images: int
) -> None:
    turns = [Turn("user", (question, *[PHOTO, OTHER][:images])), Turn("assistant", (answer,)), *TALK[2:]]
    made = encoding(name, tokenizer, 5, length)
    assert made.has_targets(turns) == (made.encode(turns).target_tokens > 0)


def test_texts_are_what_the_tokens_stand_for(tokenizer: Any) -> None:
    made = encoding("chatml", tokenizer)
    talk = [Turn("user", (PHOTO, "\n狗 </s>?")), Turn("assistant", ("<|im_end|> 🐕‍🦺",))]
    texts = made.texts(talk)
    assert len(texts) == len(made.encode(talk).ids)
    assert "".join(texts) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "\n狗 </s>?<|im_end|>\n<|im_start|>assistant\n<|im_end|> 🐕‍🦺<|im_end|>\n"
    )
