"""Quality gates: inexpensive rules that a generated record must pass; each can be switched off.

They check the text only: no gate can detect an answer that is wrong about the image.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from llavactl.teaching.generate import GeneratedRecord
from llavactl.teaching.near_duplicates import WORD, NearDuplicates

if TYPE_CHECKING:
    from llavactl.recipe.sections import Gates

_INPUT = "descriptions?|annotations?|sentences?|captions?|labels?|boxes"
LEAKS = (
    (re.compile(r"\bcaptions?\b", re.I), "mentions a caption"),
    (re.compile(r"\bbounding[ -]box(es)?\b|\bbbox(es)?\b", re.I), "mentions a bounding box"),
    (re.compile(r"\bcoordinates?\b", re.I), "mentions coordinates"),
    (
        re.compile(
            r"[\[(]\s*\d?\.\d+\s*,\s*\d?\.\d+|[\[(]\s*\d+(\.\d+)?(\s*,\s*\d+(\.\d+)?){3}\s*[\])]"
            r"|(?<![\d.])0\.\d{3}(?!\d)|\b[xy][12]?\s*[=:]\s*\d",
            re.I,
        ),
        "contains coordinates",
    ),
    (re.compile(r"\b(the|this|your) (prompt|instructions?|system message)\b", re.I), "mentions the prompt"),
    (
        re.compile(
            rf"\b((provided|given|supplied) (context|information|text|list|{_INPUT})"
            rf"|(context|{_INPUT}) (provided|given|supplied)"
            rf"|(based on|according to|from|(mentioned|stated|described|noted|given) in) the ({_INPUT})"
            rf"|the (image )?descriptions? (says?|states?|mentions?))\b|\bannotat(ions?|ed)\b",
            re.I,
        ),
        "mentions its input",
    ),
    (
        re.compile(
            r"\bas an? (ai|language model)\b|\bi('m| am) (sorry|unable)\b|\bi can(no|')t (see|view|help)\b"
            r"|\bi (don't|do not) have access\b",
            re.I,
        ),
        "is about the assistant, not the image",
    ),
)
"""Phrases that reveal the teacher's input; the built-in prompts format boxes with three decimals."""

LEFTOVER = re.compile(
    r"^[ \t]*(={3,}|(#{2,}[ \t]*|\**)(question|answer|user|assistant|human|gpt)[ \t]*\d*\**[ \t]*:)"
    r"|<\|[a-z_]{1,30}\|>|</?s>|\[/?inst\]",
    re.I | re.MULTILINE,
)
MARKUP = re.compile(
    r"<(!doctype|!--|/?(html|head|body|title|meta|script|style|div|span|p|br|h[1-6]|ul|ol|li|table|tr|td|a|img|b|i|em|"
    r"strong|pre|code|form|input|iframe|svg)(\s[^<>]{0,300})?/?>)",
    re.I,
)
COMMON = frozenset(
    "the a an of in on at to and or is are was were it its this that there with for from by as be has have not no yes "  # noqa: SIM905
    "they he she his her their which who what".split()
)
"""The most common English words."""

MIN_ASCII_LETTERS, MIN_COMMON_WORDS, MIN_ENGLISH_WORDS = 0.8, 0.1, 12


class GateChecker:
    """Checks records one after the other; duplicates are found among the records that passed."""

    def __init__(self, gates: Gates) -> None:
        self.gates = gates
        self._questions: dict[str, set[str]] = {}
        self._near_duplicates = NearDuplicates(gates.similarity) if gates.similarity is not None else None

    def check(self, generated: GeneratedRecord) -> GeneratedRecord:
        """``generated`` unchanged, or without its record and with the reason of its refusal."""
        if generated.record is None:
            return generated
        texts = [turn["value"] for turn in generated.record["conversations"]]
        texts[0] = texts[0].replace("<image>\n", "")
        category, reason = next(self._failures(generated, texts[::2], texts[1::2]), ("", ""))
        if reason:
            return replace(generated, record=None, reason=reason, category=category)
        self._questions.setdefault(_image_key(generated), set()).update(map(_normalized, texts[::2]))
        return generated

    def _failures(
        self, generated: GeneratedRecord, questions: Sequence[str], answers: Sequence[str]
    ) -> Iterator[tuple[str, str]]:
        """(category, reason) of each failed gate; length first, so that the regexes never search a huge reply."""
        gates = self.gates
        texts = (*questions, *answers)
        if gates.max_words is not None:
            words, characters = max(len(text.split()) for text in texts), max(len(text) for text in texts)
            if words > gates.max_words or characters > 20 * gates.max_words:
                yield "too long", f"a turn has {words} words, {characters} characters; max_words is {gates.max_words}"
        if gates.structure:
            yield from _structure(generated.request.kind, questions, answers)
        if gates.leaks:
            for text in texts:
                yield from (("leak", f"{why}: {_context(text, m)}") for rule, why in LEAKS if (m := rule.search(text)))
        if gates.language is not None:
            yield from (("language", reason) for text in texts if (reason := _not_english(text)))
        if gates.duplicates:
            yield from self._repeated_questions(generated, questions)
        if self._near_duplicates is not None:
            compared = answers if generated.request.kind == "detail" else texts
            if similar := self._near_duplicates.find_or_add(generated.request.id, " ".join(compared)):
                name, similarity = similar
                yield "near-duplicate", f"{similarity:.0%} similar to {name}"

    def _repeated_questions(self, generated: GeneratedRecord, questions: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Questions that occur twice for one image; details are exempt, as their questions come from a list."""
        known = set(self._questions.get(_image_key(generated), ())) if generated.request.kind != "detail" else set()
        for question in map(_normalized, questions):
            if question in known:
                yield "duplicate", f"repeats a question about the image: {question[:80]}"
            known.add(question)


def _structure(kind: str, questions: Sequence[str], answers: Sequence[str]) -> Iterator[tuple[str, str]]:
    if kind == "reasoning" and len(questions) != 1:
        yield "structure", f"expected one question, got {len(questions)}"
    for text in (*questions, *answers):
        if match := LEFTOVER.search(text):
            yield "structure", f"a turn contains a turn marker: {_context(text, match)}"
        if match := MARKUP.search(text):
            yield "structure", f"a turn contains HTML: {_context(text, match)}"
        if text.strip()[:1] + text.strip()[-1:] in ("{}", "[]"):
            yield "structure", f"a turn is JSON: {text.strip()[:60]!r}"
    if kind != "detail" and any(answer.rstrip().endswith("?") for answer in answers):
        yield "structure", "an answer ends with a question"


def _not_english(text: str) -> str:
    """Why ``text`` seems not to be English, or "".

    At least 80 % of the letters must be ASCII, and in texts of 12 words or more, at least 10 % of the words must be
    common English ones. Short texts in other languages with Latin letters pass.
    """
    letters = [char for char in text if char.isalpha()]
    if letters and sum(char.isascii() for char in letters) < MIN_ASCII_LETTERS * len(letters):
        return "most letters are not English ones"
    words = WORD.findall(text.lower())
    if len(words) >= MIN_ENGLISH_WORDS and sum(word in COMMON for word in words) < MIN_COMMON_WORDS * len(words):
        return "has too few common English words"
    return ""


def _image_key(generated: GeneratedRecord) -> str:
    return "\0".join(image.name for image in generated.request.sample.images) or generated.request.sample.id


def _normalized(text: str) -> str:
    return " ".join(WORD.findall(text.lower()))


def _context(text: str, match: re.Match[str]) -> str:
    return repr(" ".join(text[max(0, match.start() - 30) : match.end() + 30].split()))
