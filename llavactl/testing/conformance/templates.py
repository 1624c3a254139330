"""Checks of conversation templates."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.core.errors import ConversationError
from llavactl.core.protocols import ExportableTemplate
from llavactl.core.schema import Segment, Text, Turn
from llavactl.images.references import ImageBytes
from llavactl.testing.conformance.boundary import conformance_check, returned_problem
from llavactl.testing.toys import toy_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llavactl.core.protocols import Template

_IMAGE = ImageBytes("image", "0", b"")
_SYSTEM, _QUESTION, _SECOND = "Be  BRIEF, élève.", "Wh4t  SIGN\nis <\ufdd0/s> «this»?", "And {{ its }}  COLOR?"
_ANSWER, _OTHER = "A stop  SIGN.", "Red,\nof course."
"""Texts that a template must copy: with runs of spaces, capitals, a separated special token, and template syntax."""

_CONVERSATIONS: tuple[tuple[Turn, ...], ...] = (
    (Turn("user", (_IMAGE, "\n", _QUESTION)), Turn("assistant", (_ANSWER,))),
    (
        Turn("user", (_QUESTION,)),
        Turn("assistant", (_ANSWER,)),
        Turn("user", (_SECOND,)),
        Turn("assistant", (_OTHER,)),
    ),
    (Turn("system", (_SYSTEM,)), Turn("user", (_IMAGE, "\n", _QUESTION)), Turn("assistant", (_ANSWER,))),
)

_SLOT = "\ufffc"


@conformance_check("templates")
def check_template(template: Template, tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
    """Checks what ``template`` renders for conversations with one and two questions, an image and a system turn.

    Answers and what ends them must be the only target text, texts must be copied unchanged, and the prompt for an
    answer must be what precedes it in training. A conversation may be refused, but not all. ``tokenizer``: by default
    a toy with a chat template.
    """
    if tokenizer is None:
        with tempfile.TemporaryDirectory() as folder:
            return check_template(template, toy_tokenizer(Path(folder)))
    stop: Any = template.stop(tokenizer)
    if problem := returned_problem("templates", "stop", stop, tokenizer):
        return [problem]
    problems: list[str] = []
    refused: list[str] = []
    for turns in _CONVERSATIONS:
        roles = ", ".join(turn.role for turn in turns)
        try:
            problems += [f"{roles}: {problem}" for problem in _render_problems(template, tokenizer, turns, stop)]
        except ConversationError as error:
            refused.append(error.message)
    if len(refused) == len(_CONVERSATIONS):
        problems.append(f"render() refuses every conversation: {refused[0]}")
    if isinstance(template, ExportableTemplate):
        for method in ("supports_images", "exported_chat_template"):
            value: Any = getattr(template, method)(tokenizer)
            problems += filter(None, [returned_problem("templates", method, value, tokenizer)])
    return problems


def _render_problems(
    template: Template, tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], stop: Sequence[str]
) -> Iterator[str]:
    """Problems of one conversation. Raises ConversationError if the template refuses it."""
    segments: Any = template.render(turns, tokenizer)
    prompt: Any = template.render(turns[:-1], tokenizer, generate=True)
    for rendered, rendered_turns in ((segments, turns), (prompt, turns[:-1])):
        if problem := returned_problem("templates", "render", rendered, rendered_turns, tokenizer):
            yield problem
            return
    if segments != template.render(turns, tokenizer):
        yield "render() differs between calls"
    yield from _text_problems(segments, turns)
    yield from _ending_problems(segments, turns, [*stop, str(tokenizer.eos_token)])
    if not _text(segments).startswith(_text(prompt)):
        yield f"the prompt ends with {_text(prompt)[-40:]!r}, which doesn't precede the answer in training"


def _text(segments: Sequence[Segment]) -> str:
    return "".join(each.text if isinstance(each, Text) else _SLOT for each in segments)


def _target_text(segments: Sequence[Segment], *, trained: bool) -> str:
    """The text that is a target, or the text that isn't; a placeholder for each segment of the other."""
    return "".join(
        each.text if isinstance(each, Text) and each.trained is trained else _SLOT
        for each in segments
        if not isinstance(each, Text) or each.text
    )


def _text_problems(segments: Sequence[Segment], turns: Sequence[Turn]) -> Iterator[str]:
    """Answers that aren't targets, other text that is, and text that isn't copied unchanged."""
    target, other = (_target_text(segments, trained=trained) for trained in (True, False))
    for turn in turns:
        text = turn.text.strip()
        if turn.role == "assistant":
            if text not in target:
                yield f"the answer {text!r} is not target text" + (", or changed" if text not in other else "")
            continue
        if text in target:
            yield f"the {turn.role} text {text!r} is target text"
        elif text not in other and any(word.casefold() in _text(segments).casefold() for word in _words(text)):
            yield f"the {turn.role} text {text!r} is changed"


def _words(text: str) -> list[str]:
    """The words of ``text`` that occur in no other text of the test, nor in a usual system prompt."""
    return [word for word in text.split() if word in ("Wh4t", "BRIEF,", "COLOR?")]


def _ending_problems(segments: Sequence[Segment], turns: Sequence[Turn], ends: Sequence[str]) -> Iterator[str]:
    _, answer, after = _target_text(segments, trained=True).rpartition(turns[-1].text)
    if answer and not any(end in after for end in ends):
        yield f"no target text after the last answer ends generation; expected one of {', '.join(map(repr, ends))}"
