"""The tokenizer's own chat template.

Many chat templates render a turn differently once later turns follow: they drop the thinking of earlier answers, add
an empty thinking block to the newest answer, or end the whole conversation with its own token. So the prompt for an
answer (``add_generation_prompt``) is compared with the text before that answer in a longer conversation. If the two
differ only directly before the answer, every answer is rendered after its prompt, in the same way in training, chats
and evaluations. Otherwise the conversation is refused.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from llavactl.components.templates.jinja_template import JinjaTemplate, TokenizerTemplateOptions
from llavactl.components.templates.stop_criteria import added_tokens, any_of, fallback_template
from llavactl.core.errors import ConversationError
from llavactl.core.schema import ImageSlot, Segment, Text, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_NONCHARACTERS = tuple(chr(0xFDD0 + index) for index in range(32))
"""Unicode noncharacters, which hardly ever occur in text, to mark positions."""

_ANY_OF_THEM = re.compile(f"[{_NONCHARACTERS[0]}-{_NONCHARACTERS[-1]}]")

_PROBE = {role: Turn(role, (role,)) for role in ("system", "user", "assistant")}


class _Marks(NamedTuple):
    """Characters not in a conversation, to mark an image, begin and end of an answer, and the break in a tag."""

    image: str
    begin: str
    end: str
    tag: str

    @classmethod
    def beside(cls, turns: Sequence[Turn]) -> _Marks:
        """Marks that don't occur in ``turns``."""
        used = {each for turn in turns for each in _ANY_OF_THEM.findall(turn.text)}
        free = [each for each in _NONCHARACTERS if each not in used]
        if len(free) < len(cls._fields):
            raise ConversationError("the conversation has too many Unicode noncharacters (U+FDD0 to U+FDEF)")
        return cls(*free[: len(cls._fields)])


_MARKS = _Marks.beside([])


class _Way(NamedTuple):
    """The prompt of an answer: the text before the answer without its last ``back`` characters, then ``more``.

    ``lead``: spaces between prompt and answer, which are trained.
    """

    back: int
    more: str
    lead: str


@dataclass(frozen=True)
class _Plan:
    """How conversations with the same roles are rendered: the way of each answer, and the ``tail`` after the last.

    ``followed``: the last answer is rendered like an earlier one, which a question follows.
    """

    followed: bool
    ways: Sequence[_Way]
    tail: str


@dataclass(frozen=True)
class _Chat:
    """A tokenizer's chat template, and what was found out by probing it."""

    jinja: JinjaTemplate
    tokenizer: PreTrainedTokenizerBase
    plans: dict[tuple[str, ...], _Plan] = field(default_factory=dict)

    @cached_property
    def tag(self) -> str | None:
        """The image tag of a template that takes only lists of content parts; None if it takes text."""
        if _MARKS.image in self.jinja.write([{"role": "user", "content": _MARKS.image}]):
            return None
        return str(getattr(self.tokenizer, "image_token", None) or "<image>")

    @cached_property
    def ending(self) -> str:
        """The text that ends an answer: up to the last added token that the newest and earlier answers have in common.

        If there is none, up to the first added token after an earlier answer; else all up to the next question.
        """
        question = _NONCHARACTERS[-1]
        talk = [_PROBE["user"], _PROBE["assistant"], Turn("user", (question,))]
        newest = self._behind(talk[:2])
        between = self._behind(talk).partition(question)[0] or newest
        pattern = any_of(added_tokens(self.tokenizer))
        tokens = [] if pattern is None else [found.end() for found in pattern.finditer(between)]
        alike = [at for at in tokens if newest.startswith(between[:at])]
        ends = alike or tokens[:1] or [len(between.rstrip()) or len(between)]
        return between[: ends[-1]]

    def _behind(self, talk: Sequence[Turn]) -> str:
        """The text after the answer in ``talk``; empty if the chat template refuses it."""
        try:
            return self.write(talk, _MARKS).rpartition(_MARKS.end)[2]
        except ConversationError:
            return ""

    def write(self, turns: Sequence[Turn], marks: _Marks, *, generate: bool = False) -> str:
        """``turns`` as the chat template renders them, with ``marks``."""
        written = self.jinja.write([self._message(turn, marks) for turn in turns], generate=generate)
        if self.tag is not None:
            # Only the template's own tag is an image; the same tag in a turn's text is broken up by a mark.
            written = written.replace(self.tag, marks.image).replace(marks.tag, "")
        return written

    def _message(self, turn: Turn, marks: _Marks) -> Mapping[str, Any]:
        if turn.role == "assistant":
            said = f"{marks.begin}{turn.text}{marks.end}"
        elif self.tag is None:
            said = "".join(part if isinstance(part, str) else marks.image for part in turn.content)
        else:
            said = turn.text.strip()
        if self.tag is None:
            return {"role": turn.role, "content": said}
        text = {"type": "text", "text": said.replace(self.tag, self.tag[0] + marks.tag + self.tag[1:])}
        return {"role": turn.role, "content": [*({"type": "image"} for _ in turn.images), text]}

    def plan(self, turns: Sequence[Turn]) -> _Plan:
        """How ``turns``, which end with an answer, are rendered; found once per sequence of roles.

        Raises:
            ConversationError: the prompt for an answer doesn't match the text before it in the conversation.
        """
        roles = tuple(turn.role for turn in turns)
        if roles not in self.plans:
            talk = [_PROBE[role] for role in roles]
            try:
                followed, ways = True, list(self._ways(talk, followed=True))
            except ConversationError:
                followed, ways = False, list(self._ways(talk, followed=False))
            behind = self._behind(talk)
            tail = behind.removeprefix(self.ending) if behind.startswith(self.ending) else ""
            self.plans[roles] = _Plan(followed, ways, tail)
        return self.plans[roles]

    def _ways(self, talk: Sequence[Turn], *, followed: bool) -> Iterator[_Way]:
        whole = self.write([*talk, _PROBE["user"]] if followed else talk, _MARKS)
        at = 0
        for index in _answers(talk):
            before, begun, rest = whole[at:].partition(_MARKS.begin)
            asked = self.write(talk[:index], _MARKS, generate=True)
            if not begun or asked[:at] != whole[:at]:
                raise self.refusal("renders earlier turns differently once later ones follow")
            yield self._way(talk[: index + 1], at, asked[at:], before)
            behind = rest.partition(_MARKS.end)[2]
            if not behind.startswith(self.ending) and (followed or index + 1 < len(talk)):
                raise self.refusal("doesn't end all answers in the same way")
            at = len(whole) - len(behind) + len(self.ending)

    def _way(self, talk: Sequence[Turn], at: int, asked: str, before: str) -> _Way:
        """The way of the last answer of ``talk``; ``asked`` is its prompt, ``before`` the text before it."""
        if before.startswith(asked):
            more = before[len(asked) :]
            # Words before every answer are part of the prompt; spaces are trained with the answer.
            prompt, lead = (before, "") if more.strip() else (asked, more)
        elif asked.startswith(before):
            # A thinking block that the prompt opens is closed as in the newest answer.
            newest = self.write(talk, _MARKS)[at:].partition(_MARKS.begin)[0]
            more = newest[len(asked) :] if newest.startswith(asked) else ""
            prompt, lead = (newest, "") if more.strip() else (asked, more)
        else:
            raise self.refusal("renders earlier turns differently once later ones follow")
        # A space is one token with the word after it.
        prompt, lead = prompt.rstrip(" "), prompt[len(prompt.rstrip(" ")) :] + lead
        return _Way(max(len(before) - len(prompt), 0), prompt[len(before) :], lead)

    def written(self, talk: Sequence[Turn], plan: _Plan, marks: _Marks, *, asks: bool) -> Iterator[tuple[str, str]]:
        """For each answer of ``talk``, the prompt (all text since the previous answer) and the answer with its end.

        ``asks``: nothing of ``talk`` is trained, so the chat template may drop parts of its answers.
        """
        whole = self.write([*talk, _PROBE["user"]] if plan.followed else talk, marks)
        at = 0
        for way, index in zip(plan.ways, _answers(talk), strict=True):
            said = talk[index].text
            begin, end = whole.find(marks.begin, at), whole.find(marks.end, at)
            if whole[begin : end + 1] == f"{marks.begin}{said}{marks.end}":
                yield whole[at : begin - way.back] + way.more, way.lead + said + self.ending
            elif asks and end >= at:
                yield whole[at:end].replace(marks.begin, ""), self.ending
            elif index + 1 == len(talk):
                yield self._rewritten(talk, marks, whole[:at])
                return
            else:
                raise self.refusal("drops part of an answer once later turns follow")
            at = end + 1
            if index + 1 < len(talk) and not whole.startswith(self.ending, at):
                raise self.refusal("doesn't end all answers in the same way")
            at += len(self.ending)

    def _rewritten(self, talk: Sequence[Turn], marks: _Marks, before: str) -> tuple[str, str]:
        """Prompt and answer if the last answer is complete only while it is the newest (one with thinking)."""
        asking = [*talk[:-1], _PROBE["assistant"]]
        *_, (prompt, _) = self.written(asking, self.plan(asking), marks, asks=True)
        newest = self.write(talk, marks)
        answer, ends, _ = newest.removeprefix(before + prompt).replace(marks.begin, "").partition(marks.end)
        whole = "".join(talk[-1].text.split()) in "".join(answer.split())
        if not newest.startswith(before + prompt) or not ends or not whole:
            raise self.refusal("drops or rewrites part of an answer")
        return prompt, answer + self.ending

    def refusal(self, why: str) -> ConversationError:
        """The error for a conversation that the chat template can't be used for, with alternatives."""
        return ConversationError(
            f"the tokenizer's chat template {why}, so training would not match inference",
            hint=f"use `template: {fallback_template(self.tokenizer)}`, which renders any conversation, or pass an "
            "argument to the chat template, such as `template: {name: tokenizer, enable_thinking: false}`",
        )


class TokenizerTemplate:
    """Renders each answer after the chat template's generation prompt, at any position in a conversation."""

    def __init__(self, options: TokenizerTemplateOptions) -> None:
        self.options = options
        self._chats: dict[Any, _Chat] = {}

    def render(
        self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, *, generate: bool = False
    ) -> list[Segment]:
        """Raises ConversationError if the chat template refuses ``turns``, ModelError if it can't be used at all."""
        chat, answers = self._chat(tokenizer), _answers(turns)
        if not generate and not answers:
            return []
        talk = [*turns, _PROBE["assistant"]] if generate else turns[: answers[-1] + 1]
        plan, marks = chat.plan(talk), _Marks.beside(talk)
        segments: list[Segment] = []
        for prompt, answer in chat.written(talk, plan, marks, asks=generate):
            segments += [*_segments(prompt, marks.image), Text(answer, trained=True)]
        return segments[:-1] if generate else [*segments, Text(plan.tail)]

    def stop(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
        """The text with which the chat template ends an answer."""
        return (self._chat(tokenizer).ending,)

    def exported(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The chat template for other programs, with its arguments and its date, if any, fixed in the text."""
        jinja = self._chat(tokenizer).jinja
        return jinja.text if self.options.arguments or self._dated(tokenizer) else tokenizer.get_chat_template()

    def writes_images(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether the chat template accepts lists of content parts and writes images."""
        return self._chat(tokenizer).tag is not None

    def _chat(self, tokenizer: PreTrainedTokenizerBase) -> _Chat:
        specials = tuple(tokenizer.special_tokens_map.items())
        key = (str(tokenizer.chat_template), specials, len(tokenizer), getattr(tokenizer, "image_token", None))
        if key not in self._chats:
            self._chats[key] = _Chat(JinjaTemplate.of(tokenizer, self.options), tokenizer)
            if self._dated(tokenizer):
                log.info("the tokenizer's chat template writes a date: %s (`template.date`)", self.options.date)
        return self._chats[key]

    def _dated(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether the output depends on the date."""
        days = (self.options.date, self.options.date + timedelta(days=400))
        options = [self.options.model_copy(update={"date": day}) for day in days]
        try:
            one, other = (
                JinjaTemplate.of(tokenizer, each).write([{"role": "user", "content": "a"}]) for each in options
            )
        except ConversationError:
            return False
        return one != other


def _answers(turns: Sequence[Turn]) -> list[int]:
    return [index for index, turn in enumerate(turns) if turn.role == "assistant"]


def _segments(text: str, image: str) -> Iterator[Segment]:
    """``text``, with an image slot at every mark ``image``."""
    for number, part in enumerate(text.split(image)):
        if number:
            yield ImageSlot()
        if part:
            yield Text(part)
