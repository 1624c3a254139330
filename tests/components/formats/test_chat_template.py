"""Exported chat templates render messages as in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llavactl.components.formats.chat_template import chat_template, render_text
from llavactl.components.templates.styles import STYLES
from llavactl.core.registry import registry
from llavactl.core.schema import Turn
from llavactl.data.image_order import arrange
from llavactl.images.image_file import ImageFile

from .conftest import Make
from .test_export import exported

IMAGE = ImageFile("/photos", "a.jpg")


def _user(*content: Any) -> Turn:
    return Turn("user", content)


def _answer(text: str) -> Turn:
    return Turn("assistant", (text,))


CONVERSATIONS: dict[str, tuple[Turn, ...]] = {
    "a question with an image is stripped": (_user(IMAGE, "\n\t What is it? \n"),),
    "a question without an image is not": (_user("  What is it? "), _answer(" So. "), _user(" Why ?\n")),
    "images among text": (_user(" a ", IMAGE, " b ", IMAGE, " c\u3000"), _answer("Yes."), _user("\nAnd ", IMAGE)),
    "no question": (_user(IMAGE), _answer("A cat."), _user(" \n", IMAGE, IMAGE)),
    "an empty question": (_user(""), _answer(""), _user("")),
    "a system turn": (Turn("system", ("Be short. ",)), _user(IMAGE, "What?")),
    "an empty system turn": (Turn("system", ("",)), _user("What?"), _answer("So."), _user("Why?")),
    "quotes and Jinja syntax": (_user('"\\n" {{ x }} {% y %}', IMAGE), _answer("</s>'\"\\"), _user("é 一")),
}


@pytest.mark.parametrize("parts", [True, False])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", STYLES)
def test_messages_are_rendered_as_in_training(toys: Path, name: str, conversation: str, parts: bool) -> None:
    """Content is passed as lists of parts, and without ``parts`` as text if there is no image."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template = registry().create("templates", {"name": name})
    tokenizer = registry().create("languages", {"name": "hf", "model": str(toys / "language")}).tokenizer()
    turns = CONVERSATIONS[conversation]
    messages = [
        {
            "role": turn.role,
            "content": [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in turn.content
            ]
            if parts or turn.images
            else turn.text,
        }
        for turn in turns
    ]
    jinja = chat_template(template, tokenizer)
    (found,), _ = render_jinja_template([messages], chat_template=jinja, add_generation_prompt=True)
    assert found == render_text(template, tokenizer, arrange(turns, "first", ""), True, "<image>")
    if conversation == "an empty system turn" and name == "llama-2":
        assert "SYS" not in found


@pytest.mark.parametrize("name", STYLES)
def test_finished_conversations_are_rendered_as_in_training(toys: Path, name: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    template = registry().create("templates", {"name": name})
    tokenizer = registry().create("languages", {"name": "hf", "model": str(toys / "language")}).tokenizer()
    turns = (_user("What?"), _answer("So."))
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    (found,), _ = render_jinja_template([messages], chat_template=chat_template(template, tokenizer))
    assert found == render_text(template, tokenizer, turns, False, "<image>")


WITH_IMAGES = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision|><|image_pad|><|/vision|>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Like Qwen-VL's: an image token between two other tokens."""
NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Like Gemma 2's: no images, and system turns are refused."""


@pytest.mark.parametrize(("text", "own"), [pytest.param(WITH_IMAGES, True, marks=pytest.mark.slow), (NO_SYSTEM, False)])
def test_tokenizers_chat_template_is_exported_unchanged_if_it_supports_images(
    native: Make, toys: Path, tmp_path: Path, text: str, own: bool
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(toys / "language")
    model = AutoModelForCausalLM.from_pretrained(toys / "language")
    if own:
        tokenizer.add_tokens(["<|vision|>", "<|/vision|>", "<|image_pad|>"], special_tokens=True)
        tokenizer.init_kwargs["image_token"] = "<|image_pad|>"
        model.resize_token_embeddings(len(tokenizer))
    tokenizer.chat_template = text
    model.save_pretrained(tmp_path / "language")
    tokenizer.save_pretrained(tmp_path / "language")
    made = native("ours", language=tmp_path / "language", template="tokenizer")
    verified = exported(made, "hf", tmp_path / "out")["verified"]
    assert (verified["verdict"], verified["prompts"]) == ("exact", (8 if own else 7))
    assert ((tmp_path / "out" / "chat_template.jinja").read_text() == text) == own
