"""ScienceQA: multiple-choice science questions, with and without images (Lu et al. 2022, arXiv 2209.09513).

The nine published columns are accuracies by subject (NAT, SOC, LAN), by context (TXT text, IMG image, NO neither), by
grade, and over all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from string import ascii_uppercase
from typing import Literal

from pydantic import Field, model_validator

from llavactl.components.sources.scienceqa.problems import ScienceqaProblem, read_problems
from llavactl.components.tasks.image_questions import check_prompts, contains_words, user_turn
from llavactl.components.tasks.judging import TeacherTaskOptions
from llavactl.core.options import FollowLinks, RecipePath, RecipePlace
from llavactl.core.protocols import Ask, Json, Request, Scores
from llavactl.core.schema import Answer, Question, Sample

COLUMNS: Mapping[str, Callable[[ScienceqaProblem], bool]] = {
    "NAT": lambda problem: problem.subject == "natural science",
    "SOC": lambda problem: problem.subject == "social science",
    "LAN": lambda problem: problem.subject == "language science",
    "TXT": lambda problem: problem.context,
    "IMG": lambda problem: problem.image is not None,
    "NO": lambda problem: not problem.context and problem.image is None,
    "G1-6": lambda problem: problem.grade <= 6,
    "G7-12": lambda problem: problem.grade > 6,
    "Avg": lambda problem: True,  # noqa: ARG005
}
LETTERS = tuple("ABCDE")
_FRAME = re.compile(r"(?m)^Context: (?:N/A$)?|^Options: ")
"""Labels in prompts, ignored when prompts are compared: some prompt formats omit them."""
ANSWER_WITH_LETTER = "Answer with the option's letter from the given choices directly."


class ScienceqaTaskOptions(TeacherTaskOptions):
    """Options of the task ``scienceqa``."""

    questions: RecipePath = Field(description="problems.json, or LLaVA's converted JSON (requires `meta`)")
    meta: RecipePath | None = Field(None, description="CSV of question_id, grade, subject")
    splits: RecipePath | None = Field(None, description="pid_splits.json; null: each problem's own `split`")
    split: str = Field("test", description="split of problems.json")
    images: RecipePlace | None = Field(
        None, description="folder, .zip, .tar or URL of the images; null: images/ or the folder of `questions`"
    )
    follow_links: FollowLinks = False
    pictures: bool = Field(True, description="false: omit the images from the prompts")
    prompt: Literal["qcm-a", "qcm-lea"] = Field(
        "qcm-a",
        description="qcm-a: answer with a letter; qcm-lea: with lecture and explanation (raise eval.max_new_tokens)",
    )
    joint: Literal["complement", "judge"] | None = Field(
        None, description="combine with the answers of a text-only teacher (`judge`)"
    )

    @model_validator(mode="after")
    def _check_joint(self) -> ScienceqaTaskOptions:
        if (self.joint is None) != (self.judge is None):
            raise ValueError("joint=complement|judge and judge.name=TEACHER require each other")
        return self


class Scienceqa:
    """The task ``scienceqa``; see ``llavactl.core.protocols.Task``."""

    protocols = ("llava", "official", "strict")

    def __init__(self, options: ScienceqaTaskOptions) -> None:
        self.options = options
        self.teacher = options.teacher

    def questions(self) -> Iterator[Question]:
        for problem in self._problems:
            prompt = f"{problem.prompt}\n{ANSWER_WITH_LETTER}" if self.options.prompt == "qcm-a" else problem.prompt
            turns = user_turn(problem.image if self.options.pictures else None, prompt)
            yield Question(problem.id, turns, problem.letter, problem.subject)

    def score(self, answers: Mapping[str, Answer], protocol: str) -> Scores:
        """The nine columns in percent, None for a column without questions; unparsable answers are wrong."""
        problems, parse = self._answered(answers), PARSERS[protocol]
        return _columns(problems, {problem.id: parse(answers[problem.id], problem.options) for problem in problems})

    def score_with_teacher(self, answers: Mapping[str, Answer], ask: Ask, protocol: str) -> Scores:
        """The nine columns of a model combined with a text-only teacher (LLaVA's paper, section 5.2).

        ``complement``: the teacher's option, or the model's if the teacher gives none. ``judge``: if the two differ,
        the teacher gets both answers and decides; if it gives no option, as ``complement``. ``model`` and ``teacher``
        are the columns of each of them.
        """
        problems, parse = self._answered(answers), PARSERS[protocol]
        replies = ask([_request(problem.id, f"{problem.prompt}\n{REASONS}") for problem in problems])
        by_model = {problem.id: parse(answers[problem.id], problem.options) for problem in problems}
        by_teacher = {problem.id: _parsed_reply(problem, replies[problem.id], parse) for problem in problems}
        final = {name: by_model[name] if option is None else option for name, option in by_teacher.items()}
        if self.options.joint == "judge":
            disputed = [problem for problem in problems if by_model[problem.id] != by_teacher[problem.id]]
            verdicts = ask(
                [
                    _request(
                        f"{problem.id}-judge",
                        _verdict_prompt(problem, replies[problem.id], answers[problem.id].text),
                    )
                    for problem in disputed
                ]
            )
            for problem in disputed:
                option = _parsed_reply(problem, verdicts[f"{problem.id}-judge"], parse)
                final[problem.id] = final[problem.id] if option is None else option
        joint = _columns(problems, final)
        separate: dict[str, Json] = {
            "model": dict(_columns(problems, by_model).scores),
            "teacher": dict(_columns(problems, by_teacher).scores),
        }
        return replace(joint, scores={**joint.scores, **separate})

    def _answered(self, answers: Mapping[str, Answer]) -> list[ScienceqaProblem]:
        """The problems with an answer; checks stored prompts, which may order context and options differently."""
        texts = {problem.id: _FRAME.sub(" ", problem.prompt) for problem in self._problems}
        check_prompts(texts, answers, contains_words)
        return [problem for problem in self._problems if problem.id in answers]

    @cached_property
    def _problems(self) -> list[ScienceqaProblem]:
        options = self.options
        return read_problems(
            options.questions,
            options.split,
            options.splits,
            options.meta,
            options.images,
            follow_links=options.follow_links,
        )


# The wording of prompts determines scores and the stored replies that are reused: don't edit it.
REASONS = "Think it over in a few sentences, then end with a line of its own: The answer is X. X is an option's letter."
UNDECIDED = (
    "Two answers to this question were given, and they differ. The second one comes from somebody who saw the picture, "
    "if there is one. Decide yourself which option is right; it need not be one of theirs."
)


def _request(name: str, text: str) -> Request:
    return Request(name, "scienceqa", ({"role": "user", "content": text},), Sample(name, ()))


def _verdict_prompt(problem: ScienceqaProblem, teacher_answer: str, model_answer: str) -> str:
    """The prompt for a decision between two answers; its wording is not that of LLaVA's paper."""
    answers = f"First answer:\n{teacher_answer.strip()}\n\nSecond answer:\n{model_answer.strip()}"
    return f"{problem.prompt}\n\n{UNDECIDED}\n\n{answers}\n\n{REASONS}"


Parser = Callable[[Answer, int], int | None]
"""From an answer and the number of options to the index of the chosen option; None if it can't be parsed."""


def _parsed_reply(problem: ScienceqaProblem, reply: str, parse: Parser) -> int | None:
    return parse(Answer(problem.id, reply.strip()), problem.options)


def _columns(problems: Sequence[ScienceqaProblem], predictions: Mapping[str, int | None]) -> Scores:
    right = {problem.id: predictions[problem.id] == problem.right for problem in problems}
    columns = {name: [problem.id for problem in problems if applies(problem)] for name, applies in COLUMNS.items()}
    scores: dict[str, Json] = {
        name: 100 * sum(right[problem_id] for problem_id in ids) / len(ids) if ids else None
        for name, ids in columns.items()
    }
    return Scores(scores, sum(prediction is None for prediction in predictions.values()), right, columns)


def parse_llava(answer: Answer, options: int) -> int | None:  # noqa: ARG001 - a letter beyond the options is wrong
    """Parses as LLaVA's ``eval_science_qa.py``: the index of the chosen option, or None.

    Accepted: a letter; a text that starts with one, as ``B. ``; or ``The answer is B.`` exactly once.
    """
    text = answer.text
    if text in LETTERS:
        return LETTERS.index(text)
    if text[:1] in LETTERS and text[1:3] == ". ":
        return LETTERS.index(text[0])
    # The final "." matches any character, as in the original.
    letters = re.findall(r"The answer is ([A-Z]).", text)
    return ascii_uppercase.index(letters[0]) if len(letters) == 1 else None


def parse_official(answer: Answer, options: int) -> int | None:
    """The option index stored in a result file, even if it was guessed; other answers as ``parse_llava``."""
    if "index" not in answer.extra:
        return parse_llava(answer, options)
    index = answer.extra["index"]
    return index if isinstance(index, int) and index >= 0 else None


def parse_strict(answer: Answer, options: int) -> int | None:
    """The index of the option if the text is only a letter, or has one ``The answer is B``; None beyond ``options``."""
    text = answer.text.strip()
    letter_only = re.fullmatch(r"\(?([A-Z])\)?\.?", text)
    stated = set(re.findall(r"\b[Tt]he answer is:? \(?([A-Z])\)?(?:\.|$)", text, re.MULTILINE))
    letter = letter_only[1] if letter_only else stated.pop() if len(stated) == 1 else None
    index = ascii_uppercase.index(letter) if letter else options
    return index if index < options else None


PARSERS: Mapping[str, Parser] = {
    "llava": parse_llava,
    "official": parse_official,
    "strict": parse_strict,
}
"""By protocol."""
