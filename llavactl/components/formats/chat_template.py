"""A template's Jinja text, so that other programs write conversations as ours were trained.

It is not kept beside each template, where the two could come apart: it is read off what the template writes
about a conversation of placeholders, and then held against the template on other conversations.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, get_args

from llavactl.components.templates.tokenizer import TokenizerTemplate
from llavactl.core.errors import ConversationError, ModelError
from llavactl.core.schema import Role, Text, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llavactl.core.protocols import Template

# Unicode noncharacters: never in a text.
_SYSTEM, _IMAGE, *_MARKS = (chr(0xFDD8 + index) for index in range(6))
_ROLES: tuple[Role, ...] = ("user", "assistant", "user", "assistant")


Separator = Callable[[str], str]
"""The text to insert between an image and a given text after it."""


def chat_template(
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    *,
    image: str = "<image>",
    separator: Separator = lambda _: "",
) -> str:
    """Jinja that writes ``messages`` (content: text, or a list of ``image`` and ``text`` items) as ``template`` does.

    A tokenizer's own chat template is returned if it writes images and is equivalent. Otherwise a user's images come
    first, each with a newline, and their question is stripped, as in LLaVA v1.5.

    Raises:
        ModelError: the template doesn't write turn after turn, so no chat template is equivalent.
    """
    matches = partial(_renders_equally, template, tokenizer, image=image, separator=separator)
    if isinstance(template, TokenizerTemplate) and template.writes_images(tokenizer):
        own = template.exported(tokenizer)
        # Only prompts are compared: training may end a finished conversation as if another turn followed.
        prompts = [[_strip(each) for each in messages] for messages, generate in _PROBES if generate]
        if all(matches(own, messages, True, lists=True) for messages in prompts):
            return own
    text = _jinja(_constant_texts(template, tokenizer), _trim_filters(template, tokenizer), image, separator)
    if not all(matches(text, messages, generate) for messages, generate in _PROBES):
        raise ModelError("this conversation template can't be written as a chat template of the tokenizer")
    return text


def _renders_equally(
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    jinja: str,
    messages: Sequence[_Message],
    generate: bool,
    *,
    image: str,
    separator: Separator,
    lists: bool = False,
) -> bool:
    """Whether ``jinja`` and ``template`` render the same text, or both refuse."""
    from jinja2 import TemplateError

    turns = [_turn(*each) for each in messages]
    try:
        expected = rendered(template, tokenizer, turns, generate, image, separator)
    except ConversationError:
        expected = None
    try:
        return render_jinja(jinja, messages, generate, tokenizer, lists=lists) == expected
    except TemplateError:
        return expected is None


def rendered(
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Turn],
    generate: bool,
    image: str,
    separator: Separator = lambda _: "",
) -> str:
    """The text that ``template`` renders: ``image`` for each image, with ``separator`` before the text after it."""
    segments = template.render(turns, tokenizer, generate=generate)
    first, *rest = "".join(each.text if isinstance(each, Text) else _IMAGE for each in segments).split(_IMAGE)
    return first + "".join(f"{image}{separator(text)}{text}" for text in rest)


class _Message(NamedTuple):
    """A message as other programs pass it: a number of images, then text."""

    role: Role
    text: str
    images: int = 0


def _strip(message: _Message) -> _Message:
    return message if message.role == "assistant" else message._replace(text=message.text.strip())


def render_jinja(
    jinja: str, messages: Sequence[_Message], generate: bool, tokenizer: PreTrainedTokenizerBase, *, lists: bool = False
) -> str:
    """The text that ``jinja`` renders; with ``lists``, messages without images are passed as lists of items, too."""
    from transformers.utils.chat_template_utils import render_jinja_template

    given = [{"role": each.role, "content": _items(each) if lists or each.images else each.text} for each in messages]
    found, _ = render_jinja_template(
        [given], chat_template=jinja, add_generation_prompt=generate, **tokenizer.special_tokens_map
    )
    return str(found[0])


def _items(message: _Message) -> list[dict[str, str]]:
    return [*({"type": "image"} for _ in range(message.images)), {"type": "text", "text": message.text}]


class _Placeholder:
    """An image of a conversation that nobody looks at."""

    name = "image"

    def read(self) -> bytes:
        raise OSError

    def stamp(self) -> str | None:
        return None


_PHOTO = _Placeholder()


def _turn(role: Role, text: str, images: int = 0) -> Turn:
    """A turn as in training: images first, each with a newline, then the stripped question, if any."""
    if not images:
        return Turn(role, (text,))
    front = [part for _ in range(images) for part in (_PHOTO, "\n")]
    return Turn(role, (*front, text.strip()) if text.strip() else tuple(front[:-1]))


_PROBES: tuple[tuple[tuple[_Message, ...], bool], ...] = (
    ((_Message("user", "What?", 1),), True),
    ((_Message("user", "What is it?", 1), _Message("assistant", "A cat.")), False),
    (
        (
            _Message("user", "\n One?  \n", 1),
            _Message("assistant", " 1 "),
            _Message("user", " Two? "),
            _Message("assistant", "2"),
            _Message("user", "Three?"),
        ),
        True,
    ),
    ((_Message("user", "Which?", 2), _Message("assistant", "Both."), _Message("user", "And here?", 1)), True),
    ((_Message("user", " ", 1), _Message("assistant", "A cat."), _Message("user", "", 2)), True),
    (
        (
            _Message("system", "Be short."),
            _Message("user", "Why?"),
            _Message("assistant", "So."),
            _Message("user", "What?", 1),
        ),
        True,
    ),
    ((_Message("system", ""), _Message("user", "Why?"), _Message("assistant", "So.")), False),
)


def _constant_texts(template: Template, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The template's constant texts before, between and after messages."""
    one, two, three, four = _MARKS
    turns = [_turn(role, text) for role, text in zip(_ROLES, (one, two, three, four), strict=True)]

    def write(turns: Sequence[Turn], generate: bool = False) -> str:
        return rendered(template, tokenizer, turns, generate, _IMAGE)

    whole, asked = write(turns), write(turns[:3], generate=True)
    if not all(mark in whole for mark in (one, two, three, four)):
        raise ModelError("this conversation template omits messages, so it can't be written as a chat template")
    first, rest = whole.split(one)
    middle, rest = rest.split(two)
    between, rest = rest.split(three)
    _, end = rest.split(four)
    # What ends an answer also stands before the next question; what is left of it opens that question.
    ends = len(end) if between.startswith(end) else _common(end, between)
    return {
        "first": first,
        **_system_parts(write, turns, one),
        "middle": middle,
        "next": between[ends:],
        "end": end[:ends],
        "close": end[ends:],
        "generate": asked.split(three)[1],
    }


def _trim_filters(template: Template, tokenizer: PreTrainedTokenizerBase) -> dict[Role, str]:
    """Jinja's ``| trim`` for each role whose text the template strips, else ""."""
    found: dict[Role, str] = {}
    for role in get_args(Role):
        turns = [Turn(each, (_MARKS[0],)) for each in (*([role] if role == "system" else []), "user", "assistant")]
        spaced = [Turn(turn.role, (f" {turn.text} ",)) if turn.role == role else turn for turn in turns]
        try:
            one, other = (rendered(template, tokenizer, each, False, _IMAGE) for each in (turns, spaced))
            found[role] = " | trim" if one == other else ""
        except ConversationError:
            found[role] = ""
    return found


def _system_parts(write: Callable[[Sequence[Turn]], str], turns: Sequence[Turn], question: str) -> dict[str, str]:
    """The constant texts around a system prompt, and that of an empty one; {} if the template refuses system turns."""
    try:
        given, empty = (write([Turn("system", (text,)), *turns]) for text in (_SYSTEM, ""))
    except ConversationError:
        return {}
    if _SYSTEM not in given:
        raise ModelError("this conversation template omits messages, so it can't be written as a chat template")
    before, after = given.split(question)[0].split(_SYSTEM)
    return {"before": before, "after": after, "empty_system": empty.split(question)[0]}


def _common(one: str, other: str) -> int:
    """How many characters both begin with."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _jinja(parts: Mapping[str, str], trim: Mapping[Role, str], image: str, separator: Separator) -> str:
    # JSON's strings are Jinja's, but Jinja knows no \/ and needs none.
    quoted = {key: json.dumps(text, ensure_ascii=False) for key, text in parts.items()}
    # After an image: a newline and the question or next image; without a question, the constant text that follows.
    after = {
        key: separator(text)
        for key, text in (("line", "\nWhat"), ("middle", parts["middle"]), ("generate", parts["generate"]))
    }
    texts = {**after, "image": image, "line": after["line"] + "\n"}
    image_texts = {key: json.dumps(text, ensure_ascii=False) for key, text in texts.items()}
    system = "raise_exception('this model has no system prompt')"
    if "before" in quoted:
        system = f"{quoted['before']} + text + {quoted['after']}"
        if parts["empty_system"] != parts["before"] + parts["after"]:
            system = f"({system}) if text else {quoted['empty_system']}"
    # An answer's first space may be the generation prompt's or the answer's own: middle has it either way.
    last = "loop.last and message['role'] == 'assistant' and not add_generation_prompt"
    return (
        "{%- macro text_of(content) -%}"
        "{%- if content is string -%}{{ content }}"
        "{%- else -%}{%- for item in content if item['type'] == 'text' -%}{{ item['text'] }}{%- endfor -%}{%- endif -%}"
        "{%- endmacro -%}"
        "{%- for message in messages -%}"
        "{%- set text = text_of(message['content']) -%}"
        "{%- if message['role'] == 'system' -%}"
        f"{{%- set text = text{trim['system']} -%}}"
        f"{{{{ {system} }}}}"
        "{%- elif message['role'] == 'user' -%}"
        f"{{%- if loop.first -%}}{{{{ {quoted['first']} }}}}"
        f"{{%- elif messages[loop.index0 - 1]['role'] == 'assistant' -%}}{{{{ {quoted['next']} }}}}{{%- endif -%}}"
        f"{{%- set text = text{trim['user']} -%}}"
        "{%- if message['content'] is not string -%}"
        "{%- set images = message['content'] | selectattr('type', 'equalto', 'image') | list -%}"
        "{%- if images -%}{%- set text = text | trim -%}{%- endif -%}"
        f"{{%- for image in images -%}}{{{{ {image_texts['image']} }}}}"
        f"{{%- if text or not loop.last -%}}{{{{ {image_texts['line']} }}}}{{%- endif -%}}{{%- endfor -%}}"
        "{%- if images and not text -%}"
        f"{{{{ {image_texts['generate']} if loop.last else {image_texts['middle']} }}}}"
        "{%- endif -%}"
        "{%- endif -%}"
        "{{ text }}"
        f"{{%- if not loop.last -%}}{{{{ {quoted['middle']} }}}}"
        f"{{%- elif add_generation_prompt -%}}{{{{ {quoted['generate']} }}}}{{%- endif -%}}"
        "{%- elif message['role'] == 'assistant' -%}"
        f"{{{{ text{trim['assistant']} }}}}{{{{ {quoted['end']} }}}}"
        f"{{%- if {last} -%}}{{{{ {quoted['close']} }}}}{{%- endif -%}}"
        "{%- endif -%}"
        "{%- endfor -%}"
    )
