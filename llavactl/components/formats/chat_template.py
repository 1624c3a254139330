"""Derives a Jinja chat template from a conversation template, for other programs.

It is derived from the text that the template renders for a conversation of placeholders, and then compared with the
template on several test conversations. A second, hand-written version of each template could diverge from it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, get_args

from llavactl.core.errors import ConversationError, ModelError
from llavactl.core.protocols import ExportableTemplate
from llavactl.core.schema import Role, Text, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llavactl.core.protocols import Template

# Unicode noncharacters, which don't occur in text.
_SYSTEM, _IMAGE, *_MARKERS = (chr(0xFDD8 + index) for index in range(6))
_ROLES: tuple[Role, ...] = ("user", "assistant", "user", "assistant")

Separator = Callable[[str], str]
"""Returns the text to insert between an image and the given text after it."""


def chat_template(
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    *,
    image: str = "<image>",
    separator: Separator = lambda _: "",
) -> str:
    """A chat template that renders ``messages`` like ``template``; content is text or a list of ``image`` and ``text``.

    The tokenizer's own chat template is returned if it supports images and is equivalent. Otherwise a user's images
    come first, each followed by a newline, and the question is stripped, as in LLaVA v1.5.

    Raises:
        ModelError: ``template`` doesn't render turn by turn, so no chat template is equivalent.
    """
    matches = partial(_renders_equally, template, tokenizer, image=image, separator=separator)
    if isinstance(template, ExportableTemplate) and template.supports_images(tokenizer):
        own = template.exported_chat_template(tokenizer)
        # Only prompts are compared: in training, a finished conversation may end as if another turn followed.
        prompts = [[_strip(message) for message in messages] for messages, generate in _TESTS if generate]
        if all(matches(own, messages, True, lists=True) for messages in prompts):
            return own
    text = _jinja(_constant_texts(template, tokenizer), _trim_filters(template, tokenizer), image, separator)
    if not all(matches(text, messages, generate) for messages, generate in _TESTS):
        raise ModelError("no equivalent chat template exists for this conversation template")
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

    turns = [_turn(*message) for message in messages]
    try:
        expected = render_text(template, tokenizer, turns, generate, image, separator)
    except ConversationError:
        expected = None
    try:
        return render_jinja(jinja, messages, generate, tokenizer, lists=lists) == expected
    except TemplateError:
        return expected is None


def render_text(
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Turn],
    generate: bool,
    image: str,
    separator: Separator = lambda _: "",
) -> str:
    """The text that ``template`` renders, with ``image`` for each image and ``separator`` before the text after it."""
    segments = template.render(turns, tokenizer, generate=generate)
    parts = (segment.text if isinstance(segment, Text) else _IMAGE for segment in segments)
    first, *rest = "".join(parts).split(_IMAGE)
    return first + "".join(f"{image}{separator(text)}{text}" for text in rest)


class _Message(NamedTuple):
    """A message as other programs pass it: ``images`` images, then text."""

    role: Role
    text: str
    images: int = 0


def _strip(message: _Message) -> _Message:
    return message if message.role == "assistant" else message._replace(text=message.text.strip())


def render_jinja(
    jinja: str, messages: Sequence[_Message], generate: bool, tokenizer: PreTrainedTokenizerBase, *, lists: bool = False
) -> str:
    """The text that ``jinja`` renders; with ``lists``, the content of messages without images is a list as well."""
    from transformers.utils.chat_template_utils import render_jinja_template

    conversation = [
        {"role": message.role, "content": _content_parts(message) if lists or message.images else message.text}
        for message in messages
    ]
    texts, _ = render_jinja_template(
        [conversation], chat_template=jinja, add_generation_prompt=generate, **tokenizer.special_tokens_map
    )
    return str(texts[0])


def _content_parts(message: _Message) -> list[dict[str, str]]:
    return [*({"type": "image"} for _ in range(message.images)), {"type": "text", "text": message.text}]


class _Placeholder:
    """An image that is never read."""

    name = "image"

    def read(self) -> bytes:
        raise OSError

    def stamp(self) -> str | None:
        return None


_PLACEHOLDER = _Placeholder()


def _turn(role: Role, text: str, images: int = 0) -> Turn:
    """A turn as in training: images first, each followed by a newline, then the stripped question, if any."""
    if not images:
        return Turn(role, (text,))
    front = [part for _ in range(images) for part in (_PLACEHOLDER, "\n")]
    return Turn(role, (*front, text.strip()) if text.strip() else tuple(front[:-1]))


_TESTS: tuple[tuple[tuple[_Message, ...], bool], ...] = (
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
    one, two, three, four = _MARKERS
    turns = [_turn(role, text) for role, text in zip(_ROLES, (one, two, three, four), strict=True)]

    def render(turns: Sequence[Turn], generate: bool = False) -> str:
        return render_text(template, tokenizer, turns, generate, _IMAGE)

    text, prompt = render(turns), render(turns[:3], generate=True)
    if not all(marker in text for marker in (one, two, three, four)):
        raise ModelError(_OMITS_MESSAGES)
    first, rest = text.split(one)
    middle, rest = rest.split(two)
    between, rest = rest.split(three)
    _, end = rest.split(four)
    # The end of an answer also precedes the next question; the rest of ``between`` belongs to that question.
    end_length = len(end) if between.startswith(end) else _common_prefix_length(end, between)
    return {
        "first": first,
        **_system_texts(render, turns, one),
        "middle": middle,
        "next": between[end_length:],
        "end": end[:end_length],
        "close": end[end_length:],
        "generate": prompt.split(three)[1],
    }


_OMITS_MESSAGES = "this conversation template omits messages, so no chat template is equivalent"


def _trim_filters(template: Template, tokenizer: PreTrainedTokenizerBase) -> dict[Role, str]:
    """Jinja's ``| trim`` for each role whose text the template strips, else ""."""
    filters: dict[Role, str] = {}
    for role in get_args(Role):
        roles: tuple[Role, ...] = (*([role] if role == "system" else []), "user", "assistant")
        turns = [Turn(name, (_MARKERS[0],)) for name in roles]
        spaced = [Turn(turn.role, (f" {turn.text} ",)) if turn.role == role else turn for turn in turns]
        try:
            text, spaced_text = (
                render_text(template, tokenizer, conversation, False, _IMAGE) for conversation in (turns, spaced)
            )
            filters[role] = " | trim" if text == spaced_text else ""
        except ConversationError:
            filters[role] = ""
    return filters


def _system_texts(render: Callable[[Sequence[Turn]], str], turns: Sequence[Turn], question: str) -> dict[str, str]:
    """The constant texts around a system prompt, and with an empty one; {} if the template refuses system turns."""
    try:
        text, empty = (render([Turn("system", (system,)), *turns]) for system in (_SYSTEM, ""))
    except ConversationError:
        return {}
    if _SYSTEM not in text:
        raise ModelError(_OMITS_MESSAGES)
    before, after = text.split(question)[0].split(_SYSTEM)
    return {"before": before, "after": after, "empty_system": empty.split(question)[0]}


def _common_prefix_length(one: str, other: str) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _jinja(parts: Mapping[str, str], trim: Mapping[Role, str], image: str, separator: Separator) -> str:
    # JSON string literals are valid in Jinja, except for the escape \/, which json.dumps doesn't write.
    quoted = {key: json.dumps(text, ensure_ascii=False) for key, text in parts.items()}
    # An image is followed by a newline and the question or next image; without a question, by constant text.
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
    # The space before an answer may belong to the generation prompt or to the answer; ``middle`` contains it.
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
