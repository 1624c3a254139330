"""A tokenizer's chat template (Jinja) with fixed arguments and a fixed date.

A chat template may read arguments (``enable_thinking``) and write today's date. Both are set at the start of its text,
so that it writes the same on any day, in training, in chats, and in programs that load an export.
"""

from __future__ import annotations

import datetime as dt
import difflib
import keyword
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, Field, JsonValue, model_validator

from llavactl.core.errors import ConversationError, ModelError
from llavactl.core.library_errors import reason
from llavactl.core.registry import Options

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]

OUR_OWN = frozenset({"messages", "add_generation_prompt", "tools", "documents", "strftime_now", "date_string"})
"""Reserved names, which can't be arguments in a recipe: how a conversation is passed, and the date."""


class TokenizerTemplateOptions(Options):
    """Every key other than ``date`` is an argument of the chat template, such as ``enable_thinking: false``."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, JsonValue]

    date: dt.date = Field(
        dt.date(2024, 7, 26),
        description="the fixed date for a chat template that writes today's date; "
        "any other key is an argument of the chat template, such as `enable_thinking: false`",
    )

    @model_validator(mode="after")
    def _names(self) -> TokenizerTemplateOptions:
        for name in self.arguments:
            if not name.isidentifier() or keyword.iskeyword(name) or name in OUR_OWN:
                raise ValueError(f"{name} is not a valid argument of a chat template")
        return self

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The chat template's arguments."""
        return self.__pydantic_extra__ or {}


def bound(chat_template: str, options: TokenizerTemplateOptions) -> str:
    """``chat_template`` with the arguments and the date of ``options`` set at its start.

    Raises:
        ModelError: it doesn't read an argument.
    """
    names = set(re.findall(r"[^\W\d]\w*", chat_template))
    for name in options.arguments:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            raise ModelError(
                f"the tokenizer's chat template doesn't read argument {name!r}",
                hint=f"did you mean {near[0]!r}?" if near else "remove it from `template`",
            )
    values = {"date_string": options.date.strftime("%d ") + _names(options.date)["b"] + options.date.strftime(" %Y")}
    # Jinja reads Python's repr of strings, numbers, booleans and lists of them.
    sets = "".join(f"{{%- set {name} = {value!r} -%}}" for name, value in {**values, **options.arguments}.items())
    # Jinja drops the newline after a block, so that the template starts at the beginning of a line.
    return f"{sets}{_clock(options.date)}\n{chat_template}"


def _clock(date: dt.date) -> str:
    """A macro that replaces the ``strftime_now`` of other programs and formats midnight of ``date``."""
    time = dt.datetime.combine(date, dt.time())
    written = {code: time.strftime(f"%{code}") for code in "CdDeFgGHIjmMRSTuUVwWyY"} | _names(date) | {"p": "AM"}
    short = {f"-{code}": str(int(written[code])) for code in "dHIjmMSy"}
    change = "".join(f" | replace({'%' + code!r}, {text!r})" for code, text in {**short, **written}.items())
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{change} }}}}{{%- endmacro %}}"


_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)


def _names(date: dt.date) -> dict[str, str]:
    """Names of day and month by format code; in English in any locale."""
    day, month = _DAYS[date.weekday()], _MONTHS[date.month - 1]
    return {"A": day, "a": day[:3], "B": month, "b": month[:3], "h": month[:3]}


@dataclass(frozen=True)
class JinjaTemplate:
    """A chat template ready to render: its ``text``, and the tokenizer's special tokens by name."""

    text: str
    specials: Mapping[str, str]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, options: TokenizerTemplateOptions) -> JinjaTemplate:
        """The chat template of ``tokenizer``.

        Raises:
            ModelError: it has none, or it doesn't read an argument of ``options``.
        """
        if not tokenizer.chat_template:
            raise ModelError(
                "this tokenizer has no chat template", hint="set a template, such as `language.template: vicuna-v1`"
            )
        return cls(bound(tokenizer.get_chat_template(), options), tokenizer.special_tokens_map)

    def write(self, messages: Messages, *, generate: bool = False) -> str:
        """``messages`` as text; with ``generate``, up to where an answer begins.

        Raises:
            ConversationError: the chat template raises an error for them.
        """
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            (written,), _ = render_jinja_template(
                [messages], chat_template=self.text, add_generation_prompt=generate, **self.specials
            )
        # A template that doesn't expect a message may raise any of Python's errors.
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            why = reason(error)
            raise ConversationError(f"the tokenizer's chat template refuses this conversation: {why}") from error
        return str(written)
