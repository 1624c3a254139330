"""A tokenizer's chat template (Jinja) as it is run here: with its arguments and its date written into it.

A template may read arguments that a program passes (``enable_thinking``) and write today's date. Both are bound in
front of its text, so that it writes the same on any day, in training, in chats, and in a program that gets the bound
text with an export.
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
from llavactl.core.registry import Options

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]

OUR_OWN = frozenset({"messages", "add_generation_prompt", "tools", "documents", "strftime_now", "date_string"})
"""What a conversation is passed as, and the date: no arguments that a recipe can give."""


class TokenizerTemplateOptions(Options):
    """Every key beside ``date`` is an argument of the chat template, such as ``enable_thinking: false``."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, JsonValue]

    date: dt.date = Field(
        dt.date(2024, 7, 26),
        description="what a chat template that writes today's date writes, on any day; "
        "any other key is an argument of the chat template, such as `enable_thinking: false`",
    )

    @model_validator(mode="after")
    def _names(self) -> TokenizerTemplateOptions:
        for name in self.arguments:
            if not name.isidentifier() or keyword.iskeyword(name) or name in OUR_OWN:
                raise ValueError(f"{name} can't be an argument of a chat template")
        return self

    @property
    def arguments(self) -> Mapping[str, Any]:
        """What is passed to the chat template."""
        return self.__pydantic_extra__ or {}


def bound(chat_template: str, options: TokenizerTemplateOptions) -> str:
    """``chat_template`` with the arguments and the date of ``options`` written in front of it.

    Raises:
        ModelError: it reads no argument of such a name.
    """
    names = set(re.findall(r"[^\W\d]\w*", chat_template))
    for name in options.arguments:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            raise ModelError(
                f"the tokenizer's chat template reads no argument {name!r}",
                hint=f"did you mean {near[0]!r}?" if near else "leave it out of `template`",
            )
    values = {"date_string": options.date.strftime("%d ") + _names(options.date)["b"] + options.date.strftime(" %Y")}
    # What Python writes for a text, a number, a boolean or a list of them, Jinja reads.
    sets = "".join(f"{{%- set {name} = {value!r} -%}}" for name, value in {**values, **options.arguments}.items())
    # The newline ends the line of a block, and is not written: what follows stands at the beginning of one.
    return f"{sets}{_clock(options.date)}\n{chat_template}"


def _clock(date: dt.date) -> str:
    """A macro ``strftime_now`` that formats midnight of ``date``, in the place of the one that programs provide."""
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
    """Names of the day and the month by their codes; in English, whatever the locale."""
    day, month = _DAYS[date.weekday()], _MONTHS[date.month - 1]
    return {"A": day, "a": day[:3], "B": month, "b": month[:3], "h": month[:3]}


@dataclass(frozen=True)
class Jinja:
    """A chat template ready to write: its ``text`` and the tokenizer's special tokens by their names."""

    text: str
    specials: Mapping[str, str]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, options: TokenizerTemplateOptions) -> Jinja:
        """The chat template of ``tokenizer``.

        Raises:
            ModelError: it has none, or one that doesn't read an argument of ``options``.
        """
        if not tokenizer.chat_template:
            raise ModelError(
                "this tokenizer has no chat template", hint="name one, such as `language.template: vicuna-v1`"
            )
        return cls(bound(tokenizer.get_chat_template(), options), tokenizer.special_tokens_map)

    def write(self, messages: Messages, *, generate: bool = False) -> str:
        """``messages`` as text; with ``generate`` up to where an answer begins.

        Raises:
            ConversationError: the chat template refuses them.
        """
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            (written,), _ = render_jinja_template(
                [messages], chat_template=self.text, add_generation_prompt=generate, **self.specials
            )
        # What a template does with a message that it doesn't expect fails as Python would.
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            why = " ".join(str(error).split()) or type(error).__name__
            raise ConversationError(f"the tokenizer's chat template refuses this conversation: {why}") from error
        return str(written)
