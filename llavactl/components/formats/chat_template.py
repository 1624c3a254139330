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
_SYSTEM, _IMAGE, *_SAID = (chr(0xFDD8 + index) for index in range(6))
_ROLES: tuple[Role, ...] = ("user", "assistant", "user", "assistant")


Glue = Callable[[str], str]
"""What to write between an image and the text after it."""


def chat_template(
    template: Template, tokenizer: PreTrainedTokenizerBase, *, image: str = "<image>", glue: Glue = lambda _: ""
) -> str:
    """Jinja that writes ``messages`` (content: text, or a list of ``image`` and ``text`` items) as ``template`` does.

    A tokenizer's own chat template that writes images is taken as it is, if it does so. Otherwise a user's images come
    first, each with a newline, and their question is stripped, as LLaVA v1.5 has them.

    Raises:
        ModelError: the template doesn't write turn after turn, so no such text is equal to it.
    """
    probed = partial(_equal, template, tokenizer, image=image, glue=glue)
    if isinstance(template, TokenizerTemplate) and template.writes_images(tokenizer):
        own = template.exported(tokenizer)
        # A finished conversation is its own affair: training may end it as if another turn followed.
        asked = [[_stripped(each) for each in said] for said, generate in _PROBES if generate]
        if all(probed(own, said, True, lists=True) for said in asked):
            return own
    text = _jinja(_parts(template, tokenizer), _trimmed(template, tokenizer), image, glue)
    if not all(probed(text, said, generate) for said, generate in _PROBES):
        raise ModelError("this conversation template can't be written as a chat template of the tokenizer")
    return text


def _equal(
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    jinja: str,
    said: Sequence[_Said],
    generate: bool,
    *,
    image: str,
    glue: Glue,
    lists: bool = False,
) -> bool:
    """Whether ``jinja`` writes what ``template`` does, or both refuse."""
    from jinja2 import TemplateError

    turns = [_arranged(*each) for each in said]
    try:
        wanted = written(template, tokenizer, turns, generate, image, glue)
    except ConversationError:
        wanted = None
    try:
        return render(jinja, said, generate, tokenizer, lists=lists) == wanted
    except TemplateError:
        return wanted is None


def written(
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Turn],
    generate: bool,
    image: str,
    glue: Glue = lambda _: "",
) -> str:
    """What ``template`` writes, with ``image`` where an image goes, and ``glue`` between it and the text after it."""
    segments = template.render(turns, tokenizer, generate=generate)
    first, *rest = "".join(each.text if isinstance(each, Text) else _IMAGE for each in segments).split(_IMAGE)
    return first + "".join(f"{image}{glue(text)}{text}" for text in rest)


class _Said(NamedTuple):
    """What is said in a turn, not yet arranged: its text after its images."""

    role: Role
    text: str
    images: int = 0


def _stripped(said: _Said) -> _Said:
    return said if said.role == "assistant" else said._replace(text=said.text.strip())


def render(
    jinja: str, said: Sequence[_Said], generate: bool, tokenizer: PreTrainedTokenizerBase, *, lists: bool = False
) -> str:
    """What ``jinja`` writes about messages; with ``lists``, also those without an image are lists of items."""
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": each.role, "content": _items(each) if lists or each.images else each.text} for each in said]
    found, _ = render_jinja_template(
        [messages], chat_template=jinja, add_generation_prompt=generate, **tokenizer.special_tokens_map
    )
    return str(found[0])


def _items(said: _Said) -> list[dict[str, str]]:
    return [*({"type": "image"} for _ in range(said.images)), {"type": "text", "text": said.text}]


class _Placeholder:
    """An image of a conversation that nobody looks at."""

    name = "image"

    def read(self) -> bytes:
        raise OSError

    def stamp(self) -> str | None:
        return None


_PHOTO = _Placeholder()


def _arranged(role: Role, text: str, images: int = 0) -> Turn:
    """The turn as training has it: images first, each with a newline, then the stripped question, if there is one."""
    if not images:
        return Turn(role, (text,))
    front = [part for _ in range(images) for part in (_PHOTO, "\n")]
    return Turn(role, (*front, text.strip()) if text.strip() else tuple(front[:-1]))


_PROBES: tuple[tuple[tuple[_Said, ...], bool], ...] = (
    ((_Said("user", "What?", 1),), True),
    ((_Said("user", "What is it?", 1), _Said("assistant", "A cat.")), False),
    (
        (
            _Said("user", "\n One?  \n", 1),
            _Said("assistant", " 1 "),
            _Said("user", " Two? "),
            _Said("assistant", "2"),
            _Said("user", "Three?"),
        ),
        True,
    ),
    ((_Said("user", "Which?", 2), _Said("assistant", "Both."), _Said("user", "And here?", 1)), True),
    ((_Said("user", " ", 1), _Said("assistant", "A cat."), _Said("user", "", 2)), True),
    ((_Said("system", "Be short."), _Said("user", "Why?"), _Said("assistant", "So."), _Said("user", "What?", 1)), True),
    ((_Said("system", ""), _Said("user", "Why?"), _Said("assistant", "So.")), False),
)


def _parts(template: Template, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """What stands before, between and after what is said."""
    one, two, three, four = _SAID
    turns = [_arranged(role, text) for role, text in zip(_ROLES, (one, two, three, four), strict=True)]

    def write(turns: Sequence[Turn], generate: bool = False) -> str:
        return written(template, tokenizer, turns, generate, _IMAGE)

    whole, asked = write(turns), write(turns[:3], generate=True)
    if not all(mark in whole for mark in (one, two, three, four)):
        raise ModelError("this conversation template leaves out what is said: it has no chat template")
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


def _trimmed(template: Template, tokenizer: PreTrainedTokenizerBase) -> dict[Role, str]:
    """Jinja's ``| trim`` for each role whose text the template strips, else ""."""
    found: dict[Role, str] = {}
    for role in get_args(Role):
        talk = [Turn(each, (_SAID[0],)) for each in (*([role] if role == "system" else []), "user", "assistant")]
        spaced = [Turn(turn.role, (f" {turn.text} ",)) if turn.role == role else turn for turn in talk]
        try:
            one, other = (written(template, tokenizer, turns, False, _IMAGE) for turns in (talk, spaced))
            found[role] = " | trim" if one == other else ""
        except ConversationError:
            found[role] = ""
    return found


def _system_parts(write: Callable[[Sequence[Turn]], str], turns: Sequence[Turn], question: str) -> dict[str, str]:
    """What stands before and after a system prompt, and where it is empty; nothing if the template refuses one."""
    try:
        own, bare = (write([Turn("system", (text,)), *turns]) for text in (_SYSTEM, ""))
    except ConversationError:
        return {}
    if _SYSTEM not in own:
        raise ModelError("this conversation template leaves out what is said: it has no chat template")
    before, after = own.split(question)[0].split(_SYSTEM)
    return {"before": before, "after": after, "bare": bare.split(question)[0]}


def _common(one: str, other: str) -> int:
    """How many characters both begin with."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _jinja(parts: Mapping[str, str], trim: Mapping[Role, str], image: str, glue: Glue) -> str:
    # JSON's strings are Jinja's, but Jinja knows no \/ and needs none.
    said = {key: json.dumps(text, ensure_ascii=False) for key, text in parts.items()}
    # What stands after an image: a newline and the question or the next image; or, with no question, what is next.
    after = {
        key: glue(text)
        for key, text in (("line", "\nWhat"), ("middle", parts["middle"]), ("generate", parts["generate"]))
    }
    texts = {**after, "image": image, "line": after["line"] + "\n"}
    shown = {key: json.dumps(text, ensure_ascii=False) for key, text in texts.items()}
    system = "raise_exception('this model has no system prompt')"
    if "before" in said:
        system = f"{said['before']} + text + {said['after']}"
        if parts["bare"] != parts["before"] + parts["after"]:
            system = f"({system}) if text else {said['bare']}"
    # An answer's first space may be the generation prompt's or the answer's own: middle has it either way.
    last = "loop.last and message['role'] == 'assistant' and not add_generation_prompt"
    return (
        "{%- macro said(content) -%}"
        "{%- if content is string -%}{{ content }}"
        "{%- else -%}{%- for item in content if item['type'] == 'text' -%}{{ item['text'] }}{%- endfor -%}{%- endif -%}"
        "{%- endmacro -%}"
        "{%- for message in messages -%}"
        "{%- set text = said(message['content']) -%}"
        "{%- if message['role'] == 'system' -%}"
        f"{{%- set text = text{trim['system']} -%}}"
        f"{{{{ {system} }}}}"
        "{%- elif message['role'] == 'user' -%}"
        f"{{%- if loop.first -%}}{{{{ {said['first']} }}}}"
        f"{{%- elif messages[loop.index0 - 1]['role'] == 'assistant' -%}}{{{{ {said['next']} }}}}{{%- endif -%}}"
        f"{{%- set text = text{trim['user']} -%}}"
        "{%- if message['content'] is not string -%}"
        "{%- set images = message['content'] | selectattr('type', 'equalto', 'image') | list -%}"
        "{%- if images -%}{%- set text = text | trim -%}{%- endif -%}"
        f"{{%- for image in images -%}}{{{{ {shown['image']} }}}}"
        f"{{%- if text or not loop.last -%}}{{{{ {shown['line']} }}}}{{%- endif -%}}{{%- endfor -%}}"
        "{%- if images and not text -%}"
        f"{{{{ {shown['generate']} if loop.last else {shown['middle']} }}}}"
        "{%- endif -%}"
        "{%- endif -%}"
        "{{ text }}"
        f"{{%- if not loop.last -%}}{{{{ {said['middle']} }}}}"
        f"{{%- elif add_generation_prompt -%}}{{{{ {said['generate']} }}}}{{%- endif -%}}"
        "{%- elif message['role'] == 'assistant' -%}"
        f"{{{{ text{trim['assistant']} }}}}{{{{ {said['end']} }}}}"
        f"{{%- if {last} -%}}{{{{ {said['close']} }}}}{{%- endif -%}}"
        "{%- endif -%}"
        "{%- endfor -%}"
    )
