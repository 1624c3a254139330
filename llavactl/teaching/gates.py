"""What a record must pass before it is written: rules that are cheap, named in words, and each to be switched off.

They look at the text alone. None of them knows whether an answer is true of the picture.
"""

from __future__ import annotations

import re
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from operator import eq
from typing import TYPE_CHECKING

from llavactl.teaching.generate import GeneratedRecord

if TYPE_CHECKING:
    from llavactl.recipe.sections import Gates

_TOLD = "descriptions?|annotations?|sentences?|captions?|labels?|boxes"
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
        "holds numbers of a place",
    ),
    (re.compile(r"\b(the|this|your) (prompt|instructions?|system message)\b", re.I), "mentions the prompt"),
    (
        re.compile(
            rf"\b((provided|given|supplied) (context|information|text|list|{_TOLD})"
            rf"|(context|{_TOLD}) (provided|given|supplied)"
            rf"|(based on|according to|from|(mentioned|stated|described|noted|given) in) the ({_TOLD})"
            rf"|the (image )?descriptions? (says?|states?|mentions?))\b|\bannotat(ions?|ed)\b",
            re.I,
        ),
        "mentions what it was told",
    ),
    (
        re.compile(
            r"\bas an? (ai|language model)\b|\bi('m| am) (sorry|unable)\b|\bi can(no|')t (see|view|help)\b"
            r"|\bi (don't|do not) have access\b",
            re.I,
        ),
        "speaks of itself instead of the picture",
    ),
)
"""What an answer about a picture never says: numbers with three decimals are those that our prompts give to boxes."""

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
"""Words that no English text of some length is without."""

ENGLISH_LETTERS, ENGLISH_COMMON, ENGLISH_WORDS = 0.8, 0.1, 12
BINS, SHINGLE, SHORT = 64, 3, 8
ROWS, CROWD = 4, 20
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?|\d+")


class Gatekeeper:
    """Checks records one after the other: near-duplicates are found among those it has let pass."""

    def __init__(self, gates: Gates) -> None:
        self.gates = gates
        self._asked: dict[str, set[str]] = {}
        self._sketches: list[tuple[array[int], str]] = []
        self._like: dict[int, list[int]] = {}  # which of the sketches have this band

    def check(self, made: GeneratedRecord) -> GeneratedRecord:
        """``made`` as it is, or without its record and with the reason."""
        if made.record is None:
            return made
        said = [message["value"] for message in made.record["conversations"]]
        said[0] = said[0].replace("<image>\n", "")
        sort, why = next(self._faults(made, said[::2], said[1::2]), ("", ""))
        if why:
            return replace(made, record=None, reason=why, sort=sort)
        self._asked.setdefault(_picture(made), set()).update(map(_bare, said[::2]))
        return made

    def _faults(
        self, made: GeneratedRecord, questions: Sequence[str], answers: Sequence[str]
    ) -> Iterator[tuple[str, str]]:
        """(sort, reason) of all that is wrong, the cheapest first: a hostile reply is out before it is searched."""
        gates = self.gates
        if gates.max_words is not None:
            longest = max(len(text.split()) for text in (*questions, *answers))
            most = max(len(text) for text in (*questions, *answers))
            if longest > gates.max_words or most > 20 * gates.max_words:
                yield "too long", f"{longest} words, {most} characters in one turn; at most {gates.max_words} words"
        if gates.structure:
            yield from _structure(made.request.kind, questions, answers)
        if gates.leaks:
            for text in (*questions, *answers):
                yield from (("leak", f"{what}: {_around(text, m)}") for rule, what in LEAKS if (m := rule.search(text)))
        if gates.language is not None:
            yield from (("language", why) for text in (*questions, *answers) if (why := _not_english(text)))
        if gates.duplicates:
            yield from self._duplicates(made, questions)
        if gates.similarity is not None:
            told = answers if made.request.kind == "detail" else [*questions, *answers]
            yield from self._near(made.request.id, " ".join(told), gates.similarity)

    def _duplicates(self, made: GeneratedRecord, questions: Sequence[str]) -> Iterator[tuple[str, str]]:
        """A question asked twice about one picture; details share theirs, which we draw."""
        known = set(self._asked.get(_picture(made), ())) if made.request.kind != "detail" else set()
        for question in map(_bare, questions):
            if question in known:
                yield "duplicate", f"asks twice about one picture: {question[:80]}"
            known.add(question)

    def _near(self, name: str, text: str, least: float) -> Iterator[tuple[str, str]]:
        """A text whose runs of three words are mostly those of an earlier one (MinHash of one permutation)."""
        sketch = _sketch(text)
        if sketch is None:
            return
        bands = [hash((start, *sketch[start : start + ROWS])) for start in range(0, BINS, ROWS)]
        shared = Counter(other for band in bands for other in self._like.get(band, ()))
        # Two texts that are alike to that degree share so many bands on average; half of that is nearly always there.
        enough = max(1, round(BINS / ROWS * least**ROWS / 2))
        for other, hits in shared.items():
            if hits < enough:
                continue
            theirs, theirs_name = self._sketches[other]
            alike = sum(map(eq, sketch, theirs)) / BINS
            if alike >= least:
                yield "near-duplicate", f"{alike:.0%} like {theirs_name}"
                return
        for band in bands:
            bucket = self._like.setdefault(band, [])
            if len(bucket) < CROWD:  # a phrase that everybody writes must not make this quadratic
                bucket.append(len(self._sketches))
        self._sketches.append((sketch, name))


def _structure(kind: str, questions: Sequence[str], answers: Sequence[str]) -> Iterator[tuple[str, str]]:
    if kind == "reasoning" and len(questions) != 1:
        yield "structure", f"{len(questions)} questions where one was asked for"
    for text in (*questions, *answers):
        if found := LEFTOVER.search(text):
            yield "structure", f"a turn holds marks of turns: {_around(text, found)}"
        if found := MARKUP.search(text):
            yield "structure", f"a turn holds markup: {_around(text, found)}"
        if text.strip()[:1] + text.strip()[-1:] in ("{}", "[]"):
            yield "structure", f"a turn is no sentence but data: {text.strip()[:60]!r}"
    if kind != "detail" and any(answer.rstrip().endswith("?") for answer in answers):
        yield "structure", "an answer ends with a question"


def _not_english(text: str) -> str:
    """Why ``text`` seems not to be English: its letters are of another script, or the commonest words are missing.

    Of the letters at least 80 % are ASCII's, of 12 words or more at least 10 % are common ones. It tells other scripts
    and most other languages apart; a short answer in a language with Latin letters passes.
    """
    letters = [sign for sign in text if sign.isalpha()]
    if letters and sum(sign.isascii() for sign in letters) < ENGLISH_LETTERS * len(letters):
        return "most letters are not those of English"
    words = _WORD.findall(text.lower())
    if len(words) >= ENGLISH_WORDS and sum(word in COMMON for word in words) < ENGLISH_COMMON * len(words):
        return "English text of this length has more of the commonest words"
    return ""


def _sketch(text: str) -> array[int] | None:
    """The least hash of its three-word runs in each of 64 bins; equal shares estimate how many runs two texts share.

    None for less than 8 words. An empty bin takes its left neighbour's value (Shrivastava and Li 2014, rotation).
    """
    words = _WORD.findall(text.lower())
    if len(words) < SHORT:
        return None
    bins: list[int | None] = [None] * BINS
    for start in range(len(words) - SHINGLE + 1):
        value = zlib.crc32(" ".join(words[start : start + SHINGLE]).encode())
        place = value % BINS
        if (least := bins[place]) is None or value < least:
            bins[place] = value
    full = [value for value in bins if value is not None]
    last = full[-1]
    sketch = []
    for each in bins:
        last = last if each is None else each
        sketch.append(last)
    return array("L", sketch)


def _picture(made: GeneratedRecord) -> str:
    return "\0".join(image.name for image in made.request.sample.images) or made.request.sample.id


def _bare(text: str) -> str:
    return " ".join(_WORD.findall(text.lower()))


def _around(text: str, found: re.Match[str]) -> str:
    return repr(" ".join(text[max(0, found.start() - 30) : found.end() + 30].split()))
