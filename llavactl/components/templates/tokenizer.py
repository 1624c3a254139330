"""The template that uses the tokenizer's own chat template.

Many chat templates render a turn differently once later turns follow: they drop the thinking of earlier answers, add
an empty thinking block to the newest answer, or end the conversation with another token. Therefore the prompt for an
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
from llavactl.components.templates.stop_criteria import added_tokens, any_of_pattern, fallback_template
from llavactl.core.errors import ConversationError
from llavactl.core.schema import ImageSlot, Segment, Text, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_NONCHARACTERS = tuple(chr(0xFDD0 + index) for index in range(32))
"""Unicode noncharacters, which hardly ever occur in text, to mark positions."""

_NONCHARACTER = re.compile(f"[{_NONCHARACTERS[0]}-{_NONCHARACTERS[-1]}]")

_PROBE = {role: Turn(role, (role,)) for role in ("system", "user", "assistant")}


class _Markers(NamedTuple):
    """Characters that mark an image, the begin and end of an answer, and an image tag that is plain text."""

    image: str
    begin: str
    end: str
    tag: str

    @classmethod
    def not_in(cls, turns: Sequence[Turn]) -> _Markers:
        """Markers that don't occur in ``turns``."""
        used = {character for turn in turns for character in _NONCHARACTER.findall(turn.text)}
        free = [character for character in _NONCHARACTERS if character not in used]
        if len(free) < len(cls._fields):
            raise ConversationError("the conversation has too many Unicode noncharacters (U+FDD0 to U+FDEF)")
        return cls(*free[: len(cls._fields)])


_MARKERS = _Markers.not_in([])


class _PromptRule(NamedTuple):
    """The prompt of an answer: the text before the answer without its last ``removed`` characters, then ``added``.

    ``lead``: spaces between prompt and answer, which are target tokens.
    """

    removed: int
    added: str
    lead: str


@dataclass(frozen=True)
class _Plan:
    """How conversations with the same roles are rendered: one rule per answer, and the ``tail`` after the last answer.

    ``followed``: the last answer is rendered like an earlier one, before another question.
    """

    followed: bool
    rules: Sequence[_PromptRule]
    tail: str


@dataclass(frozen=True)
class _ProbedTemplate:
    """A tokenizer's chat template, and its properties as determined by rendering probes."""

    jinja: JinjaTemplate
    tokenizer: PreTrainedTokenizerBase
    plans: dict[tuple[str, ...], _Plan] = field(default_factory=dict)

    @cached_property
    def tag(self) -> str | None:
        """The image tag of a template that accepts only lists of content parts; None if it accepts text."""
        if _MARKERS.image in self.jinja.render([{"role": "user", "content": _MARKERS.image}]):
            return None
        return str(getattr(self.tokenizer, "image_token", None) or "<image>")

    @cached_property
    def ending(self) -> str:
        """The text that ends an answer: up to the last added token that the newest and earlier answers have in common.

        If they have none, up to the first added token after an earlier answer; otherwise up to the next question.
        """
        question = _NONCHARACTERS[-1]
        turns = [_PROBE["user"], _PROBE["assistant"], Turn("user", (question,))]
        newest = self._text_after_answer(turns[:2])
        between = self._text_after_answer(turns).partition(question)[0] or newest
        pattern = any_of_pattern(added_tokens(self.tokenizer))
        token_ends = [] if pattern is None else [match.end() for match in pattern.finditer(between)]
        common = [end for end in token_ends if newest.startswith(between[:end])]
        ends = common or token_ends[:1] or [len(between.rstrip()) or len(between)]
        return between[: ends[-1]]

    def _text_after_answer(self, turns: Sequence[Turn]) -> str:
        """The text after the last answer in ``turns``; empty if the chat template refuses them."""
        try:
            return self.render(turns, _MARKERS).rpartition(_MARKERS.end)[2]
        except ConversationError:
            return ""

    def render(self, turns: Sequence[Turn], markers: _Markers, *, generate: bool = False) -> str:
        """The chat template's text for ``turns``, with ``markers``."""
        text = self.jinja.render([self._message(turn, markers) for turn in turns], generate=generate)
        if self.tag is not None:
            # Only tags that the template writes are images; a marker splits the same tag in a turn's text.
            text = text.replace(self.tag, markers.image).replace(markers.tag, "")
        return text

    def _message(self, turn: Turn, markers: _Markers) -> Mapping[str, Any]:
        if turn.role == "assistant":
            text = f"{markers.begin}{turn.text}{markers.end}"
        elif self.tag is None:
            text = "".join(part if isinstance(part, str) else markers.image for part in turn.content)
        else:
            text = turn.text.strip()
        if self.tag is None:
            return {"role": turn.role, "content": text}
        item = {"type": "text", "text": text.replace(self.tag, self.tag[0] + markers.tag + self.tag[1:])}
        return {"role": turn.role, "content": [*({"type": "image"} for _ in turn.images), item]}

    def plan(self, turns: Sequence[Turn]) -> _Plan:
        """How ``turns``, which end with an answer, are rendered; determined once per sequence of roles.

        Raises:
            ConversationError: the prompt for an answer doesn't match the text before it in the conversation.
        """
        roles = tuple(turn.role for turn in turns)
        if roles not in self.plans:
            probes = [_PROBE[role] for role in roles]
            try:
                followed, rules = True, list(self._prompt_rules(probes, followed=True))
            except ConversationError:
                followed, rules = False, list(self._prompt_rules(probes, followed=False))
            after = self._text_after_answer(probes)
            tail = after.removeprefix(self.ending) if after.startswith(self.ending) else ""
            self.plans[roles] = _Plan(followed, rules, tail)
        return self.plans[roles]

    def _prompt_rules(self, turns: Sequence[Turn], *, followed: bool) -> Iterator[_PromptRule]:
        text = self.render([*turns, _PROBE["user"]] if followed else turns, _MARKERS)
        at = 0
        for index in _answer_indices(turns):
            before, begin, rest = text[at:].partition(_MARKERS.begin)
            prompt = self.render(turns[:index], _MARKERS, generate=True)
            if not begin or prompt[:at] != text[:at]:
                raise self.refusal("renders earlier turns differently once later ones follow")
            yield self._prompt_rule(turns[: index + 1], at, prompt[at:], before)
            after = rest.partition(_MARKERS.end)[2]
            if not after.startswith(self.ending) and (followed or index + 1 < len(turns)):
                raise self.refusal("doesn't end all answers in the same way")
            at = len(text) - len(after) + len(self.ending)

    def _prompt_rule(self, turns: Sequence[Turn], at: int, prompt: str, before: str) -> _PromptRule:
        """The rule for the last answer of ``turns``, from its ``prompt`` and the text ``before`` it, after ``at``."""
        if before.startswith(prompt):
            extra = before[len(prompt) :]
            # Text before every answer becomes part of the prompt; spaces are target tokens.
            prompt, lead = (before, "") if extra.strip() else (prompt, extra)
        elif prompt.startswith(before):
            # A thinking block that the prompt opens is closed as in the newest answer.
            newest = self.render(turns, _MARKERS)[at:].partition(_MARKERS.begin)[0]
            extra = newest[len(prompt) :] if newest.startswith(prompt) else ""
            prompt, lead = (newest, "") if extra.strip() else (prompt, extra)
        else:
            raise self.refusal("renders earlier turns differently once later ones follow")
        # A space is one token with the following word.
        prompt, lead = prompt.rstrip(" "), prompt[len(prompt.rstrip(" ")) :] + lead
        return _PromptRule(max(len(before) - len(prompt), 0), prompt[len(before) :], lead)

    def prompts_and_answers(
        self, turns: Sequence[Turn], plan: _Plan, markers: _Markers, *, generate: bool
    ) -> Iterator[tuple[str, str]]:
        """For each answer in ``turns``, the prompt (all text since the previous answer) and the answer with its end.

        With ``generate`` nothing is a target token, so the chat template may drop parts of the answers.
        """
        text = self.render([*turns, _PROBE["user"]] if plan.followed else turns, markers)
        at = 0
        for rule, index in zip(plan.rules, _answer_indices(turns), strict=True):
            answer = turns[index].text
            begin, end = text.find(markers.begin, at), text.find(markers.end, at)
            if text[begin : end + 1] == f"{markers.begin}{answer}{markers.end}":
                yield text[at : begin - rule.removed] + rule.added, rule.lead + answer + self.ending
            elif generate and end >= at:
                yield text[at:end].replace(markers.begin, ""), self.ending
            elif index + 1 == len(turns):
                yield self._newest_prompt_and_answer(turns, markers, text[:at])
                return
            else:
                raise self.refusal("drops part of an answer once later turns follow")
            at = end + 1
            if index + 1 < len(turns) and not text.startswith(self.ending, at):
                raise self.refusal("doesn't end all answers in the same way")
            at += len(self.ending)

    def _newest_prompt_and_answer(self, turns: Sequence[Turn], markers: _Markers, before: str) -> tuple[str, str]:
        """Prompt and answer if the last answer is complete only while it is the newest (with thinking, for example)."""
        probes = [*turns[:-1], _PROBE["assistant"]]
        *_, (prompt, _) = self.prompts_and_answers(probes, self.plan(probes), markers, generate=True)
        newest = self.render(turns, markers)
        answer, end, _ = newest.removeprefix(before + prompt).replace(markers.begin, "").partition(markers.end)
        complete = "".join(turns[-1].text.split()) in "".join(answer.split())
        if not newest.startswith(before + prompt) or not end or not complete:
            raise self.refusal("drops or rewrites part of an answer")
        return prompt, answer + self.ending

    def refusal(self, reason: str) -> ConversationError:
        """The error for a conversation that the chat template can't be used for, with alternatives."""
        return ConversationError(
            f"the tokenizer's chat template {reason}, so training would not match inference",
            hint=f"use `template: {fallback_template(self.tokenizer)}`, which renders any conversation, or pass an "
            "argument to the chat template, such as `template: {name: tokenizer, enable_thinking: false}`",
        )


class TokenizerTemplate:
    """Renders each answer after the chat template's generation prompt, at any position in a conversation."""

    def __init__(self, options: TokenizerTemplateOptions) -> None:
        self.options = options
        self._templates: dict[Any, _ProbedTemplate] = {}

    def render(
        self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, *, generate: bool = False
    ) -> list[Segment]:
        """Raises ConversationError if the chat template refuses ``turns``, ModelError if it can't be used at all."""
        template, answers = self._template(tokenizer), _answer_indices(turns)
        if not generate and not answers:
            return []
        conversation = [*turns, _PROBE["assistant"]] if generate else turns[: answers[-1] + 1]
        plan, markers = template.plan(conversation), _Markers.not_in(conversation)
        segments: list[Segment] = []
        for prompt, answer in template.prompts_and_answers(conversation, plan, markers, generate=generate):
            segments += [*_segments(prompt, markers.image), Text(answer, trained=True)]
        return segments[:-1] if generate else [*segments, Text(plan.tail)]

    def stop(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
        """The text with which the chat template ends an answer."""
        return (self._template(tokenizer).ending,)

    def exported_chat_template(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The chat template for other programs, with its arguments and date, if any, fixed in its text."""
        jinja = self._template(tokenizer).jinja
        return jinja.text if self.options.arguments or self._is_dated(tokenizer) else tokenizer.get_chat_template()

    def supports_images(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether the chat template accepts lists of content parts and renders images."""
        return self._template(tokenizer).tag is not None

    def _template(self, tokenizer: PreTrainedTokenizerBase) -> _ProbedTemplate:
        specials = tuple(tokenizer.special_tokens_map.items())
        key = (str(tokenizer.chat_template), specials, len(tokenizer), getattr(tokenizer, "image_token", None))
        if key not in self._templates:
            self._templates[key] = _ProbedTemplate(JinjaTemplate.of(tokenizer, self.options), tokenizer)
            if self._is_dated(tokenizer):
                log.info("the tokenizer's chat template writes a date: %s (`template.date`)", self.options.date)
        return self._templates[key]

    def _is_dated(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether the chat template writes the date."""
        dates = (self.options.date, self.options.date + timedelta(days=400))
        options = [self.options.model_copy(update={"date": date}) for date in dates]
        messages = [{"role": "user", "content": "a"}]
        try:
            first, second = (JinjaTemplate.of(tokenizer, option).render(messages) for option in options)
        except ConversationError:
            return False
        return first != second


def _answer_indices(turns: Sequence[Turn]) -> list[int]:
    return [index for index, turn in enumerate(turns) if turn.role == "assistant"]


def _segments(text: str, image: str) -> Iterator[Segment]:
    """``text`` with an image slot at every marker ``image``."""
    for index, part in enumerate(text.split(image)):
        if index:
            yield ImageSlot()
        if part:
            yield Text(part)
