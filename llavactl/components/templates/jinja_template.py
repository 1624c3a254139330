"""A tokenizer's chat template (Jinja) with fixed arguments and a fixed date.

A chat template may read arguments (``enable_thinking``) and write today's date. Both are set at the start of its text:
it then renders the same text on any day, in training, in chats, and in programs that load an export.
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

RESERVED_NAMES = frozenset({"messages", "add_generation_prompt", "tools", "documents", "strftime_now", "date_string"})
"""Names that can't be arguments in a recipe: those that pass the conversation, and the date."""


class TokenizerTemplateOptions(Options):
    """Every key other than ``date`` is an argument of the chat template, such as ``enable_thinking: false``."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, JsonValue]

    date: dt.date = Field(
        dt.date(2024, 7, 26),
        description="fixed date for chat templates that write today's date; "
        "any other key is an argument of the chat template, such as `enable_thinking: false`",
    )

    @model_validator(mode="after")
    def _valid_names(self) -> TokenizerTemplateOptions:
        for name in self.arguments:
            if not name.isidentifier() or keyword.iskeyword(name) or name in RESERVED_NAMES:
                raise ValueError(f"{name} is not a valid argument of a chat template")
        return self

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The chat template's arguments."""
        return self.__pydantic_extra__ or {}


def with_arguments(chat_template: str, options: TokenizerTemplateOptions) -> str:
    """``chat_template`` with the arguments and the date of ``options`` set at its start.

    Raises:
        ModelError: ``chat_template`` doesn't read an argument.
    """
    names = set(re.findall(r"[^\W\d]\w*", chat_template))
    for name in options.arguments:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            raise ModelError(
                f"the tokenizer's chat template doesn't read argument {name!r}",
                hint=f"did you mean {close[0]!r}?" if close else "remove it from `template`",
            )
    month = _day_and_month_names(options.date)["b"]
    values = {"date_string": options.date.strftime("%d ") + month + options.date.strftime(" %Y")}
    # Python's repr of strings, numbers, booleans and lists is valid in Jinja.
    sets = "".join(f"{{%- set {name} = {value!r} -%}}" for name, value in {**values, **options.arguments}.items())
    # Jinja drops the newline after a block: the template starts at the beginning of a line.
    return f"{sets}{_strftime_macro(options.date)}\n{chat_template}"


def _strftime_macro(date: dt.date) -> str:
    """A macro that replaces the ``strftime_now`` of other programs and formats midnight of ``date``."""
    time = dt.datetime.combine(date, dt.time())
    values = {code: time.strftime(f"%{code}") for code in "CdDeFgGHIjmMRSTuUVwWyY"}
    values |= {**_day_and_month_names(date), "p": "AM"}
    unpadded = {f"-{code}": str(int(values[code])) for code in "dHIjmMSy"}
    filters = "".join(f" | replace({'%' + code!r}, {text!r})" for code, text in {**unpadded, **values}.items())
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{filters} }}}}{{%- endmacro %}}"


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


def _day_and_month_names(date: dt.date) -> dict[str, str]:
    """English names of day and month by format code, in any locale."""
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
            ModelError: ``tokenizer`` has no chat template, or it doesn't read an argument of ``options``.
        """
        if not tokenizer.chat_template:
            raise ModelError(
                "the tokenizer has no chat template", hint="set a template, such as `language.template: vicuna-v1`"
            )
        return cls(with_arguments(tokenizer.get_chat_template(), options), tokenizer.special_tokens_map)

    def render(self, messages: Messages, *, generate: bool = False) -> str:
        """The text of ``messages``; with ``generate``, including the generation prompt.

        Raises:
            ConversationError: the chat template raises an error for them.
        """
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            (text,), _ = render_jinja_template(
                [messages], chat_template=self.text, add_generation_prompt=generate, **self.specials
            )
        # A template may raise any of these for a message that it doesn't expect.
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            message = f"the tokenizer's chat template refuses this conversation: {reason(error)}"
            raise ConversationError(message) from error
        return str(text)
