"""Requests to a judge that compares two answers, and parsing of its verdicts.

The prompt has the sections of LLaVA's ``eval_gpt_review_bench.py`` (context, question, two answers, instructions). The
instructions are worded differently; the option ``rule`` replaces them with those of LLaVA's ``rule.json``.
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

ScorePair = tuple[float, float]
"""A judge's scores of the two answers."""

# The wording of prompts determines scores and the stored verdicts that are reused: don't edit it.
SYSTEM = "You are a careful and impartial judge of answers."
INSTRUCTIONS = (
    "Two assistants were shown a picture and answered the question above. You can't see the picture: take what stands "
    "under Context for it, and nothing else. Judge how helpful, relevant, accurate and detailed each answer is, and "
    "give each of them 1 to 10 points, more for the better one.\n"
    "Your first line holds two numbers with a space between them and nothing else: the points of Assistant 1, then "
    "those of Assistant 2. Explain them in the lines after that. Neither the order of the answers nor their length "
    "by itself may sway you."
)
SCORE_PAIR = re.compile(r"(\s*)(\d+(?:\.\d+)?)(\s*[,\s/;]\s*)(\d+(?:\.\d+)?)")
_SECTION_HEADING = re.compile(r"\[(?=(?:End of |System|Assistant|Context|Question))")


def _teacher_spec(spec: dict[str, Any]) -> dict[str, Any]:
    """``spec`` with the teacher's options validated and paths made absolute, when the recipe is read."""
    if not isinstance(spec.get("name"), str):
        raise ValueError("missing `name`: the name of a teacher")
    try:
        options = registry().options("teachers", spec)
    except RecipeError as error:
        raise ValueError("; ".join(map(str, error.problems)) or error.with_hint()) from error
    return {"name": spec["name"], **options.model_dump(exclude_unset=True)}


TeacherSpec = Annotated[dict[str, Any], AfterValidator(_teacher_spec)]
"""A teacher as an option of a task: ``{name: …, its options}``."""


class TeacherTaskOptions(Options):
    """Options of tasks that ask a teacher about answers."""

    judge: TeacherSpec | None = Field(None, description="teacher that judges the answers: {name, its options}")
    max_cost: float | None = Field(None, ge=0, description="maximum total cost of all requests about these answers")
    prices: RecipePath | None = Field(None, description="price file; null: llavactl's own")

    @property
    def teacher(self) -> BudgetedTeacher | None:
        return None if self.judge is None else BudgetedTeacher(self.judge, self.max_cost, self.prices)


class JudgeOptions(TeacherTaskOptions):
    """Options of tasks that are scored by a judge."""

    runs: int = Field(1, ge=1, le=100, description="verdicts per answer")
    swap: bool = Field(False, description="also judge with the two answers in the other order")
    rule: RecipePath | None = Field(None, description="LLaVA's rule.json: replaces the instructions for the judge")

    @model_validator(mode="after")
    def _check_judge(self) -> JudgeOptions:
        if self.judge is None and self.model_fields_set & {"runs", "swap", "rule"}:
            raise ValueError("runs, swap and rule require a judge: judge.name=TEACHER")
        return self


def judge_request(
    name: str,
    run: int,
    swapped: bool,
    context: str,
    question: str,
    answers: tuple[str, str],
    rule: tuple[str, str] | None = None,
) -> Request:
    """The request to judge two ``answers`` to a question, in the other order if ``swapped``.

    ``context`` describes the image. ``rule``: LLaVA's name for an assistant, and its instructions.
    """
    name = f"{name}-swapped" if swapped else name
    answers = (answers[1], answers[0]) if swapped else answers
    role, instructions = rule or ("Assistant", INSTRUCTIONS)
    parts = [f"[Context]\n{_without_headings(context)}\n"] if context else []
    parts.append(f"[Question]\n{_without_headings(question)}\n")
    parts += [
        f"[{role} {number}]\n{_without_headings(answer)}\n\n[End of {role} {number}]\n"
        for number, answer in enumerate(answers, 1)
    ]
    parts.append(f"[System]\n{instructions}\n")
    messages = ({"role": "system", "content": SYSTEM}, {"role": "user", "content": "\n".join(parts) + "\n"})
    return Request(name if run == 0 else f"{name}-run{run + 1}", "judge", messages, Sample(name, ()), seed=run)


def ask_verdicts(
    names: Iterable[str], request: Callable[[str, int, bool], Request], options: JudgeOptions, ask: Ask
) -> list[dict[str, str]]:
    """Verdicts by question: one mapping per run, with ``swap`` followed by one for the other order.

    ``request`` makes the request for a question, a run, and whether the answers are swapped. The scores of a verdict on
    swapped answers are swapped back.
    """
    orders = (False, True) if options.swap else (False,)
    passes = [(run, swapped) for run in range(options.runs) for swapped in orders]
    requests = {(run, swapped): {name: request(name, run, swapped) for name in names} for run, swapped in passes}
    replies = ask([item for by_name in requests.values() for item in by_name.values()])
    return [
        {name: swap_scores(replies[item.id]) if swapped else replies[item.id] for name, item in by_name.items()}
        for (_, swapped), by_name in requests.items()
    ]


def _without_headings(text: str) -> str:
    """``text`` with "[" replaced by "(" in section headings of the prompt, which an answer must not imitate."""
    return _SECTION_HEADING.sub("(", text)


def read_rules(path: RecipePath | None) -> Mapping[str, tuple[str, str]]:
    """LLaVA's ``rule.json``: by category, the name of an assistant and the instructions.

    Raises:
        DataError: the file is not such a mapping.
    """
    if path is None:
        return {}
    document = read_document(path)
    if not isinstance(document, dict):
        raise DataError(f"{path}: expected a mapping of rules by category")
    records = {name: Record(f"{path} {name}", rule) for name, rule in document.items() if isinstance(rule, dict)}
    return {name: (record.text("role"), record.text("prompt")) for name, record in records.items()}


def swap_scores(verdict: str) -> str:
    """A verdict with its two scores swapped; the rest is unchanged."""
    first, newline, rest = verdict.partition("\n")
    match = SCORE_PAIR.fullmatch(first.rstrip())
    return f"{match[1]}{match[4]}{match[3]}{match[2]}{newline}{rest}" if match else verdict


def parse_llava(verdict: str) -> ScorePair | None:
    """Parses as ``parse_score`` of LLaVA's ``eval_gpt_review_bench.py``; None if that fails.

    The first line must be two numbers separated by one comma or space.
    """
    words = verdict.split("\n")[0].replace(",", " ").split(" ")
    try:
        pair = [float(word) for word in words]
    except ValueError:
        return None
    return (pair[0], pair[1]) if len(pair) == 2 and all(map(math.isfinite, pair)) else None


def parse_lenient(verdict: str) -> ScorePair | None:
    """Parses the first nonempty line as two numbers with any separator (``8, 9``); None if that fails."""
    first = next((line for line in verdict.splitlines() if line.strip()), "")
    numbers = SCORE_PAIR.fullmatch(first.rstrip())
    return (float(numbers[2]), float(numbers[4])) if numbers else None


def image_description(record: Record) -> str:
    """The image as text, as in LLaVA's scripts: ``caption`` or ``captions``, then boxes from ``instances``."""
    captions = record.get("caption", "captions")
    lines: Sequence[Any] = [captions] if isinstance(captions, str) else captions if isinstance(captions, list) else []
    if not lines or not all(isinstance(line, str) for line in lines):
        raise DataError(f"{record.where}: expected a string in `caption`, or a list of strings in `captions`")
    text = "\n".join(lines)
    instances = record.get("instances")
    if not isinstance(instances, list):
        return text
    boxes = [instance for instance in instances if isinstance(instance, dict)]
    return text + "\n\n" + "\n".join(f"{box.get('category')}: {box.get('bbox')}" for box in boxes)
