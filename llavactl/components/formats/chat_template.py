"""A template's Jinja text, so that other programs write conversations as ours were trained.

It is not kept beside each template, where the two could come apart: it is read off what the template writes
about a conversation of placeholders, and then held against the template on other conversations.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llavactl.core.errors import ModelError
from llavactl.core.schema import Text, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llavactl.core.protocols import Template

# Unicode noncharacters: never in a text.
_SYSTEM, _IMAGE, *_SAID = (chr(0xFDD8 + index) for index in range(8))


def chat_template(
    template: Template, tokenizer: PreTrainedTokenizerBase, *, image: str = "<image>", glue: str = ""
) -> str:
    """Jinja that writes ``messages`` (content: text, or a list of ``image`` and ``text`` items) as ``template`` does.

    A user's images come first, each with a newline, as LLaVA v1.5 has them. ``glue`` is written between an image
    and what follows it.

    Raises:
        ModelError: the template doesn't write turn after turn, so no such text is equal to it.
    """
    text = _jinja(_parts(template, tokenizer), image, glue)
    for turns, generate in _PROBES:
        wanted = written(template, tokenizer, turns, generate, image + glue)
        if render(text, turns, generate) != wanted:
            raise ModelError("this conversation template can't be written as a chat template of the tokenizer")
    return text


def written(
    template: Template, tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], generate: bool, image: str
) -> str:
    """What ``template`` writes, with ``image`` where an image goes."""
    segments = template.render(turns, tokenizer, generate=generate)
    return "".join(segment.text if isinstance(segment, Text) else image for segment in segments)


def render(jinja: str, turns: Sequence[Turn], generate: bool) -> str:
    """What ``jinja`` writes."""
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": turn.role, "content": _items(turn)} for turn in turns]
    found, _ = render_jinja_template([messages], chat_template=jinja, add_generation_prompt=generate)
    return str(found[0])


def _items(turn: Turn) -> Any:
    if not turn.images:
        return turn.text
    items = [{"type": "image"} for _ in turn.images]
    return [*items, {"type": "text", "text": turn.text.strip()}]


class _Placeholder:
    """An image of a conversation that nobody looks at."""

    name = "image"

    def read(self) -> bytes:
        raise OSError

    def stamp(self) -> str | None:
        return None


_PHOTO = _Placeholder()


def _user(text: str, images: int = 0) -> Turn:
    return Turn("user", (*(part for _ in range(images) for part in (_PHOTO, "\n")), text))


def _assistant(text: str) -> Turn:
    return Turn("assistant", (text,))


_PROBES: tuple[tuple[tuple[Turn, ...], bool], ...] = (
    ((_user("What?", 1),), True),
    ((_user("What is it?", 1), _assistant("A cat.")), False),
    ((_user("One?", 1), _assistant("1"), _user("Two?"), _assistant("2"), _user("Three?")), True),
    ((_user("Which?", 2), _assistant("Both."), _user("And here?", 1)), True),
    ((Turn("system", ("Be short.",)), _user("Why?"), _assistant("So."), _user("What?", 1)), True),
)


def _parts(template: Template, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """What stands before, between and after what is said."""
    one, two, three, four = _SAID[:4]
    turns = [_user(one), _assistant(two), _user(three), _assistant(four)]

    def write(turns: Sequence[Turn], generate: bool = False) -> str:
        return written(template, tokenizer, turns, generate, _IMAGE)

    whole, asked = write(turns), write(turns[:3], generate=True)
    own = write([Turn("system", (_SYSTEM,)), *turns])
    if not all(mark in whole for mark in (one, two, three, four)) or _SYSTEM not in own:
        raise ModelError("this conversation template leaves out what is said: it has no chat template")
    first, rest = whole.split(one)
    middle, rest = rest.split(two)
    between, rest = rest.split(three)
    _, end = rest.split(four)
    before, after = own.split(one)[0].split(_SYSTEM)
    # What ends an answer also stands before the next question; what is left of it opens that question.
    ends = len(end) if between.startswith(end) else _common(end, between)
    return {
        "first": first,
        "before": before,
        "after": after,
        "middle": middle,
        "next": between[ends:],
        "end": end[:ends],
        "close": end[ends:],
        "generate": asked.split(three)[1],
    }


def _common(one: str, other: str) -> int:
    """How many characters both begin with."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _jinja(parts: dict[str, str], image: str, glue: str) -> str:
    # JSON's strings are Jinja's, but Jinja knows no \/ and needs none.
    said = {key: json.dumps(text, ensure_ascii=False) for key, text in parts.items()}
    # An answer's first space may be the generation prompt's or the answer's own: middle has it either way.
    picture = json.dumps(image + glue + "\n", ensure_ascii=False)
    last = "loop.last and message['role'] == 'assistant' and not add_generation_prompt"
    return (
        "{%- macro said(content) -%}"
        "{%- if content is string -%}{{ content }}"
        "{%- else -%}"
        f"{{%- for item in content if item['type'] == 'image' -%}}{{{{ {picture} }}}}{{%- endfor -%}}"
        "{%- for item in content if item['type'] == 'text' -%}{{ item['text'] }}{%- endfor -%}"
        "{%- endif -%}"
        "{%- endmacro -%}"
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'system' -%}"
        f"{{{{ {said['before']} + said(message['content']) + {said['after']} }}}}"
        "{%- elif message['role'] == 'user' -%}"
        f"{{%- if loop.first -%}}{{{{ {said['first']} }}}}"
        f"{{%- elif messages[loop.index0 - 1]['role'] == 'assistant' -%}}{{{{ {said['next']} }}}}{{%- endif -%}}"
        "{{ said(message['content']) }}"
        f"{{%- if not loop.last -%}}{{{{ {said['middle']} }}}}"
        f"{{%- elif add_generation_prompt -%}}{{{{ {said['generate']} }}}}{{%- endif -%}}"
        "{%- elif message['role'] == 'assistant' -%}"
        f"{{{{ said(message['content']) + {said['end']} }}}}"
        f"{{%- if {last} -%}}{{{{ {said['close']} }}}}{{%- endif -%}}"
        "{%- endif -%}"
        "{%- endfor -%}"
    )
