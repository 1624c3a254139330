"""A judge of answers: what it is told, what it may cost, and how its two numbers are read.

The frame of what it is told is that of LLaVA's ``eval_gpt_review_bench.py`` (context, question, two answers, then
what to do), so that a judge who knows it is at home; the words of the last part are our own. ``rule`` takes LLaVA's
``rule.json`` in their place.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from llavactl.core.errors import DataError, RecipeError
from llavactl.core.options import RecipePath
from llavactl.core.protocols import Ask, BudgetedTeacher, Request
from llavactl.core.registry import Options, registry
from llavactl.core.schema import Sample
from llavactl.files.records import Record, read_document

Pair = tuple[float, float]

SYSTEM = "You are a careful and impartial judge of answers."
TASK = (
    "Two assistants were shown a picture and answered the question above. You can't see the picture: take what stands "
    "under Context for it, and nothing else. Judge how helpful, relevant, accurate and detailed each answer is, and "
    "give each of them 1 to 10 points, more for the better one.\n"
    "Your first line holds two numbers with a space between them and nothing else: the points of Assistant 1, then "
    "those of Assistant 2. Explain them in the lines after that. Neither the order of the answers nor their length "
    "by itself may sway you."
)
TWO_NUMBERS = re.compile(r"(\s*)(\d+(?:\.\d+)?)(\s*[,\s/;]\s*)(\d+(?:\.\d+)?)")
_INSIDE = re.compile(r"\[(?=(?:End of |System|Assistant|Context|Question))")


def _teacher(given: dict[str, Any]) -> dict[str, Any]:
    """The teacher's own options, checked and with whole paths, while the recipe that names them is read."""
    if not isinstance(given.get("name"), str):
        raise ValueError("needs a `name`, that of a teacher")
    try:
        options = registry().options("teachers", given)
    except RecipeError as error:
        raise ValueError("; ".join(map(str, error.problems)) or f"{error.message}; {error.hint}") from error
    return {"name": given["name"], **options.model_dump(exclude_unset=True)}


Teacher = Annotated[dict[str, Any], AfterValidator(_teacher)]
"""A teacher as a task's option: ``{name: …, its own options}``."""


class ConsultOptions(Options):
    """Options of tasks that ask a teacher about answers."""

    judge: Teacher | None = Field(None, description="the teacher that is asked: {name, its options}")
    max_cost: float | None = Field(None, ge=0, description="of all that is ever asked about these answers")
    prices: RecipePath | None = Field(None, description="file of prices; null: llavactl's own")

    @property
    def teacher(self) -> BudgetedTeacher | None:
        return None if self.judge is None else BudgetedTeacher(self.judge, self.max_cost, self.prices)


class JudgeOptions(ConsultOptions):
    """Options of tasks that a judge scores."""

    runs: int = Field(1, ge=1, le=100, description="how often everything is judged")
    swap: bool = Field(False, description="judge everything in the other order of the two answers, too")
    rule: RecipePath | None = Field(None, description="LLaVA's rule.json: its words in place of ours")

    @model_validator(mode="after")
    def _judged(self) -> JudgeOptions:
        if self.judge is None and self.model_fields_set & {"runs", "swap", "rule"}:
            raise ValueError("runs, swap and rule are for a judge who is asked: judge.name=TEACHER")
        return self


def request(
    name: str,
    turn: tuple[int, bool],
    context: str,
    question: str,
    answers: tuple[str, str],
    rule: tuple[str, str] | None = None,
) -> Request:
    """What a judge is told about two ``answers`` in ``turn`` (run, whether they change places).

    ``rule`` is (what an answerer is called, what to do).
    """
    run, swapped = turn
    name = f"{name}-swapped" if swapped else name
    answers = (answers[1], answers[0]) if swapped else answers
    role, task = rule or ("Assistant", TASK)
    parts = [f"[Context]\n{_plain(context)}\n"] if context else []
    parts.append(f"[Question]\n{_plain(question)}\n")
    parts += [
        f"[{role} {number}]\n{_plain(answer)}\n\n[End of {role} {number}]\n" for number, answer in enumerate(answers, 1)
    ]
    parts.append(f"[System]\n{task}\n")
    messages = ({"role": "system", "content": SYSTEM}, {"role": "user", "content": "\n".join(parts) + "\n"})
    return Request(name if run == 0 else f"{name}-run{run + 1}", "judge", messages, Sample(name, ()), seed=run)


def verdicts(
    names: Iterable[str], about: Callable[[str, int, bool], Request], options: JudgeOptions, ask: Ask
) -> list[dict[str, str]]:
    """Verdicts by question, a mapping for each run, and with ``swap`` one more for it in the other order.

    ``about`` makes the request about a question from its run and whether its answers change places. All are asked at
    once. Of a verdict in the other order the numbers are exchanged, so that all are read alike.
    """
    orders = (False, True) if options.swap else (False,)
    turns = [(run, swapped) for run in range(options.runs) for swapped in orders]
    asked = {turn: {name: about(name, *turn) for name in names} for turn in turns}
    said = ask([each for requests in asked.values() for each in requests.values()])
    return [
        {name: exchanged(said[each.id]) if swapped else said[each.id] for name, each in requests.items()}
        for (_, swapped), requests in asked.items()
    ]


def _plain(text: str) -> str:
    """What is judged may not write the judge's own headings: a bracket that begins one is made a round one."""
    return _INSIDE.sub("(", text)


def rules(path: RecipePath | None) -> Mapping[str, tuple[str, str]]:
    """LLaVA's ``rule.json``: for each category the role's name and what to do.

    Raises:
        DataError: it isn't one.
    """
    if path is None:
        return {}
    document = read_document(path)
    if not isinstance(document, dict):
        raise DataError(f"{path}: not an object of rules by category")
    records = {name: Record(f"{path} {name}", each) for name, each in document.items() if isinstance(each, dict)}
    return {name: (each.text("role"), each.text("prompt")) for name, each in records.items()}


def exchanged(verdict: str) -> str:
    """A verdict about two answers in the other order: its two numbers change places; the rest is left as it is."""
    first, newline, rest = verdict.partition("\n")
    found = TWO_NUMBERS.fullmatch(first.rstrip())
    return f"{found[1]}{found[4]}{found[3]}{found[2]}{newline}{rest}" if found else verdict


def as_llava(verdict: str) -> Pair | None:
    """The points as ``parse_score`` of LLaVA's ``eval_gpt_review_bench.py`` reads them; None where it gives up.

    The first line is two numbers with one comma or space between them, and nothing else.
    """
    found = verdict.split("\n")[0].replace(",", " ").split(" ")
    try:
        pair = [float(each) for each in found]
    except ValueError:
        return None
    return (pair[0], pair[1]) if len(pair) == 2 and all(map(math.isfinite, pair)) else None


def leniently(verdict: str) -> Pair | None:
    """The two numbers of the first line that isn't empty, however they are set apart: ``8, 9``."""
    first = next((line for line in verdict.splitlines() if line.strip()), "")
    numbers = TWO_NUMBERS.fullmatch(first.rstrip())
    return (float(numbers[2]), float(numbers[4])) if numbers else None


def described(record: Record) -> str:
    """A picture in words, as LLaVA's scripts tell a judge: ``caption`` or ``captions``, then ``instances`` if any."""
    told = record.get("caption", "captions")
    lines: Sequence[Any] = [told] if isinstance(told, str) else told if isinstance(told, list) else []
    if not lines or not all(isinstance(each, str) for each in lines):
        raise DataError(f"{record.where}: neither `caption` nor `captions` with texts")
    text = "\n".join(lines)
    boxes = record.get("instances")
    if not isinstance(boxes, list):
        return text
    known = [each for each in boxes if isinstance(each, dict)]
    return text + "\n\n" + "\n".join(f"{each.get('category')}: {each.get('bbox')}" for each in known)
