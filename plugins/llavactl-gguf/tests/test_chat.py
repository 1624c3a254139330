"""The chat template renders what llama.cpp passes as the conversation template does."""

from pathlib import Path

import pytest
from gguf import GGUFReader
from llavactl_gguf.chat import chat_template
from transformers.utils.chat_template_utils import render_jinja_template

from llavactl import ImageFile, SavedModel, Turn, open_model

from .conftest import Toys

MARKER = "<__media_Ab3__>"
IMAGE = ImageFile("/images", "a.png")


def render(saved: SavedModel, messages: list[dict[str, object]]) -> str:
    tokenizer = saved.tokenizer()
    (text,), _ = render_jinja_template(
        [messages],
        chat_template=chat_template(saved, tokenizer),
        add_generation_prompt=True,
        **tokenizer.special_tokens_map,
    )
    return str(text)


CONVERSATIONS = [
    ([("user", f"{MARKER}What is it?")], [Turn("user", (IMAGE, "\n", "What is it?"))]),
    ([("user", f" What is it? {MARKER}")], [Turn("user", (IMAGE, "\n", "What is it?"))]),
    ([("user", f"{MARKER}{MARKER}Which?")], [Turn("user", (IMAGE, "\n", IMAGE, "\n", "Which?"))]),
    ([("user", MARKER)], [Turn("user", (IMAGE,))]),
    ([("user", "Is 1 <__media 2__> 3?")], [Turn("user", ("Is 1 <__media 2__> 3?",))]),
    (
        [("system", "Be short."), ("user", f"{MARKER}\nWhy?"), ("assistant", "So."), ("user", "And?")],
        [Turn("system", ("Be short.",)), Turn("user", (IMAGE, "\n", "Why?")), Turn("assistant", ("So.",)),
         Turn("user", ("And?",))],
    ),
]  # fmt: skip


@pytest.mark.parametrize("template", ["vicuna-v1", "chatml", "llama-2"])
def test_text_with_markers(toys: Toys, template: str) -> None:
    """llama.cpp's server passes images as markers in the text."""
    saved = open_model(toys.model(template=template))
    for messages, turns in CONVERSATIONS:
        if "2__>" in str(messages):  # the only text that looks like a marker is not one of llama.cpp
            continue
        rendered = render(saved, [{"role": role, "content": text} for role, text in messages])
        assert rendered == saved.prompt(turns, image=MARKER)


def test_lists_of_content(toys: Toys) -> None:
    saved = open_model(toys.model())
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    expected = saved.prompt([Turn("user", (IMAGE, "\n", "What is it?"))], image="<__media__>")
    assert render(saved, [{"role": "user", "content": content}]) == expected


def test_a_template_without_conversations_is_left_out(toys: Toys, caplog: pytest.LogCaptureFixture) -> None:
    export: Path = toys.export(toys.model(template="plain"))
    assert "tokenizer.chat_template" not in GGUFReader(export / "model-f32.gguf").fields
    assert "chat template" in caplog.text
