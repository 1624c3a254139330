"""A chat template writes messages as training has them, whatever is in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llavactl.components.formats.chat_template import chat_template, written
from llavactl.components.templates.styles import STYLES
from llavactl.core.registry import registry
from llavactl.core.schema import ImageFile, Turn
from llavactl.data.encode import arrange

PHOTO = ImageFile("/photos", "a.jpg")


def _user(*content: Any) -> Turn:
    return Turn("user", content)


def _answer(text: str) -> Turn:
    return Turn("assistant", (text,))


TALKS: dict[str, tuple[Turn, ...]] = {
    "a question with an image is stripped": (_user(PHOTO, "\n\t What is it? \n"),),
    "one without is not": (_user("  What is it? "), _answer(" So. "), _user(" Why ?\n")),
    "images among text": (_user(" a ", PHOTO, " b ", PHOTO, " c\u3000"), _answer("Yes."), _user("\nAnd ", PHOTO)),
    "no question": (_user(PHOTO), _answer("A cat."), _user(" \n", PHOTO, PHOTO)),
    "an empty question": (_user(""), _answer(""), _user("")),
    "a system turn": (Turn("system", ("Be short. ",)), _user(PHOTO, "What?")),
    "an empty system turn": (Turn("system", ("",)), _user("What?"), _answer("So."), _user("Why?")),
    "quotes and marks": (_user('"\\n" {{ x }} {% y %}', PHOTO), _answer("</s>'\"\\"), _user("é 一")),
}


@pytest.mark.parametrize("parts", [True, False])
@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", STYLES)
def test_messages_are_written_as_training_has_them(toys: Path, name: str, talk: str, parts: bool) -> None:
    """With content as text where it can be (``parts`` false), and as lists of parts in any order."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template = registry().create("templates", {"name": name})
    tokenizer = registry().create("languages", {"name": "hf", "model": str(toys / "language")}).tokenizer()
    turns = TALKS[talk]
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
    assert found == written(template, tokenizer, arrange(turns, "first", ""), True, "<image>")
    if talk == "an empty system turn" and name == "llama-2":
        assert "SYS" not in found


@pytest.mark.parametrize("name", STYLES)
def test_a_finished_conversation(toys: Path, name: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    template = registry().create("templates", {"name": name})
    tokenizer = registry().create("languages", {"name": "hf", "model": str(toys / "language")}).tokenizer()
    turns = (_user("What?"), _answer("So."))
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    (found,), _ = render_jinja_template([messages], chat_template=chat_template(template, tokenizer))
    assert found == written(template, tokenizer, turns, False, "<image>")
