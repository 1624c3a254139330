"""Ids and labels come from one tokenization; the targets are exactly the answers and their end tokens."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavactl.core.errors import ConversationError, ModelError
from llavactl.core.registry import registry
from llavactl.core.schema import IGNORE, IMAGE_TOKEN, Turn
from llavactl.data.encode import Encoding
from llavactl.images.image_file import ImageFile

PHOTO, OTHER = ImageFile("/photos", "a.jpg"), ImageFile("/photos", "b.jpg")
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@pytest.fixture(scope="module")
def tokenizer(toys: Path) -> Any:
    return registry().create("languages", {"name": "hf", "model": str(toys / "language")}).tokenizer()


def encoding_of(template: str, tokenizer: Any, image_tokens: int = 3, max_length: int | None = None) -> Encoding:
    return Encoding(registry().create("templates", {"name": template}), tokenizer, image_tokens, max_length)


def decoded(tokenizer: Any, ids: Any) -> str:
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


def target_text(tokenizer: Any, labels: Any) -> str:
    return str(tokenizer.decode([label for label in labels if label != IGNORE]))


CONVERSATION = (
    Turn("user", (PHOTO, "\nWhat is it?")),
    Turn("assistant", ("A dog.",)),
    Turn("user", ("Which color?",)),
    Turn("assistant", ("Red.",)),
)


def test_vicuna_v1_equals_llava(tokenizer: Any) -> None:
    encoded = encoding_of("vicuna-v1", tokenizer).encode(CONVERSATION)
    assert decoded(tokenizer, encoded.ids) == (
        f"{SYSTEM} USER: ▣▣▣\nWhat is it? ASSISTANT: A dog.</s>USER: Which color? ASSISTANT: Red.</s>"
    )
    assert target_text(tokenizer, encoded.labels) == " A dog.</s> Red.</s>"
    assert encoded.images == (PHOTO,)


def test_targets_of_plain_are_caption_and_newline(tokenizer: Any) -> None:
    encoded = encoding_of("plain", tokenizer).encode(CONVERSATION[:2])
    assert decoded(tokenizer, encoded.ids) == "▣▣▣A dog.\n"
    assert target_text(tokenizer, encoded.labels) == "A dog.\n"


def test_the_tokenizers_chat_template(tokenizer: Any) -> None:
    encoded = encoding_of("tokenizer", tokenizer).encode(CONVERSATION)
    assert decoded(tokenizer, encoded.ids).startswith(
        "<|im_start|>user\n▣▣▣\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA dog."
    )
    assert target_text(tokenizer, encoded.labels) == "A dog.<|im_end|>Red.<|im_end|>"


def test_a_chat_template_that_changes_earlier_turns_is_refused(tokenizer: Any) -> None:
    modified = copy.deepcopy(tokenizer)
    modified.chat_template = "{{ messages | length }}: {% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ModelError, match="earlier turns"):
        encoding_of("tokenizer", modified).encode(CONVERSATION)
    modified.chat_template = None
    with pytest.raises(ModelError, match="chat template"):
        encoding_of("tokenizer", modified).encode(CONVERSATION)


@pytest.mark.parametrize("template", ["vicuna-v1", "vicuna-v0", "llama-2", "chatml", "tokenizer", "plain"])
def test_a_prompt_equals_the_tokens_before_the_answer_in_training(tokenizer: Any, template: str) -> None:
    encoding = encoding_of(template, tokenizer)
    complete, prompt = encoding.encode(CONVERSATION), encoding.encode(CONVERSATION[:3], generate=True)
    assert complete.ids[: len(prompt)] == prompt.ids
    assert complete.labels[len(prompt)] != IGNORE


def test_bos_is_added_once_before_everything(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    with_bos = copy.deepcopy(tokenizer)
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    encoded = encoding_of("plain", with_bos).encode(CONVERSATION[:2])
    assert encoded.ids[:2] == (0, IMAGE_TOKEN)
    assert encoded.labels[0] == IGNORE


def test_a_special_tokens_name_is_refused_if_no_separator_is_left(tokenizer: Any) -> None:
    """In a conversation with all noncharacters, a special token's name would otherwise end the turn."""
    noncharacters = "".join(chr(0xFDD0 + index) for index in range(32))
    encoding = encoding_of("vicuna-v1", tokenizer)
    assert encoding.encode([Turn("user", (noncharacters,)), Turn("assistant", ("A dog.",))]).target_tokens
    with pytest.raises(ConversationError, match="noncharacters"):
        encoding.encode([Turn("user", (noncharacters,)), Turn("assistant", ("A dog.</s>",))])


# Cn: noncharacters, which the encoding uses as separators.
texts = st.text(alphabet=st.characters(exclude_categories=["Cs", "Cn"]), min_size=1, max_size=30).filter(str.strip)


@settings(max_examples=60)
@given(
    pairs=st.lists(st.tuples(texts, texts), min_size=1, max_size=4),
    template=st.sampled_from(["vicuna-v1", "llama-2", "chatml", "tokenizer"]),
)
def test_targets_are_exactly_the_answers(tokenizer: Any, pairs: list[tuple[str, str]], template: str) -> None:
    turns = [turn for q, a in pairs for turn in (Turn("user", (q,)), Turn("assistant", (a,)))]
    encoded = encoding_of(template, tokenizer).encode(turns)
    assert len(encoded.ids) == len(encoded.labels)
    assert all(label in (IGNORE, token) for token, label in zip(encoded.ids, encoded.labels, strict=True))
    space, end = {"vicuna-v1": (" ", "</s>"), "llama-2": (" ", " </s>")}.get(template, ("", "<|im_end|>"))
    assert target_text(tokenizer, encoded.labels) == "".join(f"{space}{a}{end}" for _, a in pairs)


@settings(max_examples=80)
@given(length=st.integers(1, 120))
def test_truncation_never_cuts_an_image(tokenizer: Any, length: int) -> None:
    turns = [
        Turn("user", (PHOTO, "\nWhat?")),
        Turn("assistant", ("A dog.",)),
        Turn("user", ("And ", OTHER, "?")),
        Turn("assistant", ("No.",)),
    ]
    encoded = encoding_of("vicuna-v1", tokenizer, 7, length).encode(turns)
    assert len(encoded) <= length
    assert sum(token == IMAGE_TOKEN for token in encoded.ids) == 7 * len(encoded.images)
    assert encoded.ids[-1] != IMAGE_TOKEN


@settings(max_examples=80)
@given(
    question=st.text(alphabet=st.characters(exclude_categories=["Cs", "Cn"]), max_size=60),
    answer=texts,
    length=st.integers(1, 260),
    name=st.sampled_from(["plain", "vicuna-v1", "vicuna-v0", "llama-2", "chatml", "tokenizer"]),
    images=st.integers(0, 2),
)
def test_has_targets_agrees_with_encode(
    tokenizer: Any, question: str, answer: str, length: int, name: str, images: int
) -> None:
    turns = [Turn("user", (question, *[PHOTO, OTHER][:images])), Turn("assistant", (answer,)), *CONVERSATION[2:]]
    encoding = encoding_of(name, tokenizer, 5, length)
    assert encoding.has_targets(turns) == (encoding.encode(turns).target_tokens > 0)


def test_texts_are_the_characters_of_the_tokens(tokenizer: Any) -> None:
    encoding = encoding_of("chatml", tokenizer)
    turns = [Turn("user", (PHOTO, "\n狗 </s>?")), Turn("assistant", ("<|im_end|> 🐕‍🦺",))]
    token_texts = encoding.texts(turns)
    assert len(token_texts) == len(encoding.encode(turns).ids)
    assert "".join(token_texts) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "\n狗 </s>?<|im_end|>\n<|im_start|>assistant\n<|im_end|> 🐕‍🦺<|im_end|>\n"
    )
