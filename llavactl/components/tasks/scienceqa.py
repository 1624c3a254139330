"""ScienceQA: multiple choice about science, with and without pictures (Lu et al. 2022, arXiv 2209.09513).

Its nine columns are shares of the right answers: by subject (NAT, SOC, LAN), by what a problem comes with (TXT a
text, IMG a picture, NO neither), by grade, and over all.
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
from llavactl.components.tasks.image_questions import asked, refuse_others, same_words
from llavactl.components.tasks.judging import ConsultOptions
from llavactl.core.options import FollowLinks, RecipePath, RecipePlace
from llavactl.core.protocols import Ask, Json, Request, Scores
from llavactl.core.schema import Answer, Question, Sample

COLUMNS: Mapping[str, Callable[[ScienceqaProblem], bool]] = {
    "NAT": lambda each: each.subject == "natural science",
    "SOC": lambda each: each.subject == "social science",
    "LAN": lambda each: each.subject == "language science",
    "TXT": lambda each: each.context,
    "IMG": lambda each: each.image is not None,
    "NO": lambda each: not each.context and each.image is None,
    "G1-6": lambda each: each.grade <= 6,
    "G7-12": lambda each: each.grade > 6,
    "Avg": lambda each: True,  # noqa: ARG005 - every problem
}
LETTERS = tuple("ABCDE")
_FRAME = re.compile(r"(?m)^Context: (?:N/A$)?|^Options: ")
"""What stands around the words of a problem in one of its forms and not in others."""
DIRECTLY = "Answer with the option's letter from the given choices directly."


class ScienceqaTaskOptions(ConsultOptions):
    """Options of the task ``scienceqa``."""

    questions: RecipePath = Field(description="problems.json, or LLaVA's converted JSON (then `meta`, too)")
    meta: RecipePath | None = Field(None, description="CSV of question_id, grade, subject")
    splits: RecipePath | None = Field(None, description="pid_splits.json; null: each problem's own `split`")
    split: str = Field("test", description="of problems.json")
    images: RecipePlace | None = Field(
        None, description="folder, .zip, .tar or URL of the pictures; null: images/ or beside `questions`"
    )
    follow_links: FollowLinks = False
    pictures: bool = Field(True, description="false: the model is asked without them")
    prompt: Literal["qcm-a", "qcm-lea"] = Field(
        "qcm-a", description="qcm-a asks for a letter; qcm-lea leaves room for reasons (give it eval.max_new_tokens)"
    )
    joint: Literal["complement", "judge"] | None = Field(
        None, description="with the answers of a teacher (`judge`), who sees no picture: complement or judge"
    )

    @model_validator(mode="after")
    def _together(self) -> ScienceqaTaskOptions:
        if (self.joint is None) != (self.judge is None):
            raise ValueError("joint=complement|judge and judge.name=TEACHER go together")
        return self


class Scienceqa:
    """The task ``scienceqa``; see ``llavactl.core.protocols.Task``."""

    protocols = ("llava", "official", "strict")

    def __init__(self, options: ScienceqaTaskOptions) -> None:
        self.options = options
        self.teacher = options.teacher

    def questions(self) -> Iterator[Question]:
        for problem in self._problems:
            prompt = f"{problem.prompt}\n{DIRECTLY}" if self.options.prompt == "qcm-a" else problem.prompt
            turns = asked(problem.image if self.options.pictures else None, prompt)
            yield Question(problem.id, turns, problem.letter, problem.subject)

    def score(self, answers: Mapping[str, Answer], protocol: str) -> Scores:
        """The nine columns in percent, None for one that nothing was asked of; an unreadable answer is wrong."""
        here = self._here(answers)
        return _columns(here, {each.id: PROTOCOLS[protocol](answers[each.id], each.options) for each in here})

    def score_with_teacher(self, answers: Mapping[str, Answer], ask: Ask, protocol: str) -> Scores:
        """The nine columns of a model and a teacher who sees no picture (LLaVA's paper, section 5.2).

        ``complement``: the teacher's option, and the model's where it gives none. ``judge``: where the two differ
        the teacher is told both answers and asked again; if it then gives none, as under ``complement``.
        ``model`` and ``teacher`` are the columns of each alone.
        """
        here, read = self._here(answers), PROTOCOLS[protocol]
        told = ask([_request(each.id, f"{each.prompt}\n{REASONS}") for each in here])
        ours = {each.id: read(answers[each.id], each.options) for each in here}
        theirs = {each.id: read(Answer(each.id, told[each.id].strip()), each.options) for each in here}
        final = {name: ours[name] if option is None else option for name, option in theirs.items()}
        if self.options.joint == "judge":
            apart = [each for each in here if ours[each.id] != theirs[each.id]]
            again = ask([_request(f"{each.id}-judge", _both(each, answers[each.id].text, told)) for each in apart])
            for each in apart:
                said = read(Answer(each.id, again[f"{each.id}-judge"].strip()), each.options)
                final[each.id] = final[each.id] if said is None else said
        joint = _columns(here, final)
        alone: dict[str, Json] = {
            "model": dict(_columns(here, ours).scores),
            "teacher": dict(_columns(here, theirs).scores),
        }
        return replace(joint, scores={**joint.scores, **alone})

    def _here(self, answers: Mapping[str, Answer]) -> list[ScienceqaProblem]:
        # The words alone: what was asked may have had the context behind the question, or other marks for the options.
        refuse_others({each.id: _FRAME.sub(" ", each.prompt) for each in self._problems}, answers, same_words)
        return [problem for problem in self._problems if problem.id in answers]

    @cached_property
    def _problems(self) -> list[ScienceqaProblem]:
        given = self.options
        return read_problems(
            given.questions, given.split, given.splits, given.meta, given.images, follow_links=given.follow_links
        )


REASONS = "Think it over in a few sentences, then end with a line of its own: The answer is X. X is an option's letter."
UNDECIDED = (
    "Two answers to this question were given, and they differ. The second one comes from somebody who saw the picture, "
    "if there is one. Decide yourself which option is right; it need not be one of theirs."
)


def _request(name: str, text: str) -> Request:
    return Request(name, "scienceqa", ({"role": "user", "content": text},), Sample(name, ()))


def _both(problem: ScienceqaProblem, ours: str, told: Mapping[str, str]) -> str:
    """What the teacher is asked where its answer and the model's differ; the words are our own."""
    answers = f"First answer:\n{told[problem.id].strip()}\n\nSecond answer:\n{ours.strip()}"
    return f"{problem.prompt}\n\n{UNDECIDED}\n\n{answers}\n\n{REASONS}"


def _columns(here: Sequence[ScienceqaProblem], chosen: Mapping[str, int | None]) -> Scores:
    right = {each.id: chosen[each.id] == each.right for each in here}
    about = {name: [each.id for each in here if holds(each)] for name, holds in COLUMNS.items()}
    scores: dict[str, Json] = {
        name: 100 * sum(right[each] for each in ids) / len(ids) if ids else None for name, ids in about.items()
    }
    return Scores(scores, sum(each is None for each in chosen.values()), right, about)


def as_llava(answer: Answer, options: int) -> int | None:  # noqa: ARG001 - beyond the options is wrong, not unread
    """The place of the option that LLaVA's ``eval_science_qa.py`` reads, None where it reads none.

    The text is a letter, or begins with one as ``B. ``, or says ``The answer is B.`` once.
    """
    text = answer.text
    if text in LETTERS:
        return LETTERS.index(text)
    if text[:1] in LETTERS and text[1:3] == ". ":
        return LETTERS.index(text[0])
    # The last sign stands for any: so it is in the original, too.
    found = re.findall(r"The answer is ([A-Z]).", text)
    return ascii_uppercase.index(found[0]) if len(found) == 1 else None


def as_stored(answer: Answer, options: int) -> int | None:
    """The option that a file of results holds, whoever read or guessed it; a plain text is read as LLaVA does."""
    if "index" not in answer.extra:
        return as_llava(answer, options)
    index = answer.extra["index"]
    return index if isinstance(index, int) and index >= 0 else None


def strictly(answer: Answer, options: int) -> int | None:
    """The option where nothing is left to interpret: a letter alone, or one sentence that names one, of those asked."""
    text = answer.text.strip()
    alone = re.fullmatch(r"\(?([A-Z])\)?\.?", text)
    named = set(re.findall(r"\b[Tt]he answer is:? \(?([A-Z])\)?(?:\.|$)", text, re.MULTILINE))
    letter = alone[1] if alone else named.pop() if len(named) == 1 else None
    place = ascii_uppercase.index(letter) if letter else options
    return place if place < options else None


PROTOCOLS: Mapping[str, Callable[[Answer, int], int | None]] = {
    "llava": as_llava,
    "official": as_stored,
    "strict": strictly,
}
