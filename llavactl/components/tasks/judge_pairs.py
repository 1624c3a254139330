"""Two models' answers to the same questions, side by side before a judge: which one is better?

A judge likes the first answer of two, or the second, whatever they say. So each two are judged in both orders, and one
has won where it is better in both, as in Zheng et al. 2023 (arXiv 2306.05685, section 3.4); else it is a tie.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from statistics import fmean, stdev

from pydantic import Field, model_validator

from llavactl.components.tasks.image_questions import asked, picture, refuse_others
from llavactl.components.tasks.judging import JudgeOptions, Pair, described, leniently, request, rules, verdicts
from llavactl.core.errors import DataError
from llavactl.core.options import FollowLinks, RecipePath, RecipePlace
from llavactl.core.protocols import Ask, Json, Request, Scores
from llavactl.core.schema import Answer, Question
from llavactl.files.records import Record, read_records, unique
from llavactl.images.references import ImageRoot

WON = {"win": 1.0, "tie": 0.5, "loss": 0.0}


class JudgePairsOptions(JudgeOptions):
    """Options of the task ``judge-pairs``."""

    questions: RecipePath = Field(description="JSONL of question_id and text; image and category, where there are any")
    against: RecipePath = Field(description="JSONL of question_id and text: the answers to compare with")
    context: RecipePath | None = Field(None, description="JSONL of image and caption(s), what the judge is told")
    images: RecipePlace | None = Field(
        None, description="folder, .zip, .tar or URL of the pictures; null: that of the questions"
    )
    follow_links: FollowLinks = False
    swap: bool = Field(True, description="judge both orders of the two answers; one has won who wins in both")

    @model_validator(mode="after")
    def _asks(self) -> JudgePairsOptions:
        if self.judge is None:
            raise ValueError("a judge is needed: judge.name=TEACHER and its options")
        return self


class JudgePairs:
    """The task ``judge-pairs``; see ``llavactl.core.protocols.Judged`` and ``TeacherScored``."""

    protocols = ("points",)

    def __init__(self, options: JudgePairsOptions) -> None:
        self.options = options
        self.teacher = options.teacher

    def questions(self) -> Iterator[Question]:
        for name, record in self._questions.items():
            root = ImageRoot(str(self.options.images or self.options.questions.parent), self.options.follow_links)
            image = picture(record, root) if record.get("image") else None
            turns = asked(image, record.text("text"))
            yield Question(name, turns, self._others[name].text("text"), str(record.get("category") or ""))

    def reviews(self) -> Sequence[Mapping[str, str]]:
        return ()

    def score_with_teacher(self, answers: Mapping[str, Answer], ask: Ask, protocol: str) -> Scores:
        """Scores of ``answers`` after asking a judge about each; the other's answer is the first of the two.

        ``length`` says whether longer answers won: ``longer_wins`` in percent of the ``decided`` questions (a win or a
        loss, answers of different length), and the mean words of an answer here (``words``) and ``against``.
        """
        refuse_others({name: record.text("text") for name, record in self._questions.items()}, answers)

        def about(name: str, run: int, swapped: bool) -> Request:
            record = self._questions[name]
            context = described(self._contexts[record.text("image")]) if self.options.context else ""
            both = self._others[name].text("text"), answers[name].text
            rule = rules(self.options.rule).get(str(record.get("category") or ""))
            return request(name, (run, swapped), context, record.text("text"), both, rule)

        scored = self.judge(verdicts(answers, about, self.options, ask), protocol)
        words = {
            name: (len(answers[name].text.split()), len(self._others[name].text("text").split())) for name in answers
        }
        return replace(scored, scores={**scored.scores, "length": _length(words, scored.grades)})

    def judge(self, reviews: Sequence[Mapping[str, str]], protocol: str) -> Scores:  # noqa: ARG002 - there is one
        """Percentages ``win``, ``tie``, ``loss``, and ``win_rate``: wins and half of the ties.

        A question with a verdict that can't be read is left out of its run. ``agreement``: how often both orders
        say the same. With several runs scores are means, and ``spread`` is the standard deviation of ``win_rate``.
        """
        step = 2 if self.options.swap else 1
        runs = [reviews[at : at + step] for at in range(0, len(reviews), step)]
        failed = sum(leniently(text) is None for review in reviews for text in review.values())
        read = [
            {name: pairs for name in run[0] if (pairs := [leniently(each[name]) for each in run]) and all(pairs)}
            for run in runs
        ]
        told = [{name: _told([pair for pair in pairs if pair]) for name, pairs in run.items()} for run in read]
        shares = [_shares(list(run.values())) for run in told if run]
        scores: dict[str, Json] = {key: fmean(run[key] for run in shares) if shares else None for key in _KEYS}
        if self.options.swap:
            same = [len({_better(pair) for pair in pairs if pair}) == 1 for run in read for pairs in run.values()]
            scores["agreement"] = 100 * fmean(same) if same else None
        if len(runs) > 1:
            rates = [run["win_rate"] for run in shares]
            scores |= {"runs": rates, "spread": stdev(rates) if len(rates) > 1 else None}
        names = dict.fromkeys(name for run in told for name in run)
        grades = {name: fmean(WON[run[name]] for run in told if name in run) for name in names}
        return Scores(scores, failed, grades=grades)

    @cached_property
    def _questions(self) -> Mapping[str, Record]:
        found = unique(read_records(self.options.questions), "question_id", "id")
        contexts = self._contexts if self.options.context is not None else None
        if contexts is not None and (missing := [n for n, each in found.items() if each.text("image") not in contexts]):
            raise DataError(f"{self.options.context}: nothing about the picture of question {missing[0]!r}")
        return found

    @cached_property
    def _others(self) -> Mapping[str, Record]:
        found = unique(read_records(self.options.against), "question_id", "id", what="answer")
        if missing := [name for name in self._questions if name not in found]:
            raise DataError(
                f"{self.options.against}: no answer to {len(missing)} questions, the first is {missing[0]!r}"
            )
        return found

    @cached_property
    def _contexts(self) -> Mapping[str, Record]:
        assert self.options.context is not None
        return unique(read_records(self.options.context), "image", what="picture")


_KEYS = ("win", "tie", "loss", "win_rate")


def _length(words: Mapping[str, tuple[int, int]], grades: Mapping[str, float]) -> Json:
    """Whether the longer of two answers won; ``words`` are those of ours and of the other's."""
    decided = [
        (ours > theirs) == (grades[name] > WON["tie"])
        for name, (ours, theirs) in words.items()
        if ours != theirs and grades.get(name, WON["tie"]) != WON["tie"]
    ]
    ours, theirs = zip(*words.values(), strict=True)
    return {
        "longer_wins": 100 * fmean(decided) if decided else None,
        "decided": len(decided),
        "words": fmean(ours),
        "against": fmean(theirs),
    }


def _better(pair: Pair) -> str:
    """For the second of two, the candidate."""
    other, candidate = pair
    return "tie" if candidate == other else "win" if candidate > other else "loss"


def _told(pairs: Sequence[Pair]) -> str:
    """What both orders together say."""
    said = {_better(pair) for pair in pairs}
    return said.pop() if len(said) == 1 else "tie"


def _shares(told: Sequence[str]) -> dict[str, float]:
    count = Counter(told)
    shares = {key: 100 * count[key] / len(told) for key in WON}
    return shares | {"win_rate": shares["win"] + shares["tie"] / 2}
