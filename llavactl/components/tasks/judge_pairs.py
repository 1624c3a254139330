"""Pairwise comparison of two models' answers by a judge.

Judges favor one position regardless of the answers. Each pair is therefore judged in both orders, and an answer wins
only if it is better in both, as in Zheng et al. 2023 (arXiv 2306.05685, section 3.4); otherwise it is a tie.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from statistics import fmean, stdev

from pydantic import Field, model_validator

from llavactl.components.tasks.image_questions import IMAGES_HELP, check_prompts, image_of, user_turn
from llavactl.components.tasks.judging import (
    JudgeOptions,
    ScorePair,
    ask_verdicts,
    image_description,
    judge_request,
    parse_lenient,
    read_rules,
)
from llavactl.core.errors import DataError
from llavactl.core.options import FollowLinks, RecipePath, RecipePlace
from llavactl.core.protocols import Ask, Json, Request, Scores
from llavactl.core.schema import Answer, Question
from llavactl.files.records import Record, read_records, unique
from llavactl.images.references import ImageRoot

GRADES = {"win": 1.0, "tie": 0.5, "loss": 0.0}
_RATES = (*GRADES, "win_rate")


class JudgePairsOptions(JudgeOptions):
    """Options of the task ``judge-pairs``."""

    questions: RecipePath = Field(description="JSONL of question_id and text; optionally image and category")
    against: RecipePath = Field(description="JSONL of question_id and text: the answers to compare with")
    context: RecipePath | None = Field(None, description="JSONL of image and caption(s): descriptions for the judge")
    images: RecipePlace | None = Field(None, description=IMAGES_HELP)
    follow_links: FollowLinks = False
    swap: bool = Field(True, description="judge both orders of the two answers; a win requires winning in both")

    @model_validator(mode="after")
    def _require_judge(self) -> JudgePairsOptions:
        if self.judge is None:
            raise ValueError("a judge is required: judge.name=TEACHER and its options")
        return self


class JudgePairs:
    """The task ``judge-pairs``; see ``llavactl.core.protocols.Judged`` and ``TeacherScored``.

    In pairs of answers or scores, the first is that of ``against``, the second that of the candidate.
    """

    protocols = ("points",)

    def __init__(self, options: JudgePairsOptions) -> None:
        self.options = options
        self.teacher = options.teacher

    def questions(self) -> Iterator[Question]:
        root = ImageRoot(str(self.options.images or self.options.questions.parent), self.options.follow_links)
        for name, record in self._questions.items():
            image = image_of(record, root) if record.get("image") else None
            turns = user_turn(image, record.text("text"))
            yield Question(name, turns, self._references[name].text("text"), str(record.get("category") or ""))

    def reviews(self) -> Sequence[Mapping[str, str]]:
        return ()

    def score_with_teacher(self, answers: Mapping[str, Answer], ask: Ask, protocol: str) -> Scores:
        """Scores of ``answers`` after asking the judge about each pair.

        ``length``: ``longer_wins``, how often the longer answer won, in percent of the ``decided`` questions (no tie,
        answers of different length); the mean number of words of an answer (``words``), and of ``against``.
        """
        check_prompts({name: record.text("text") for name, record in self._questions.items()}, answers)

        def request(name: str, run: int, swapped: bool) -> Request:
            record = self._questions[name]
            context = image_description(self._contexts[record.text("image")]) if self.options.context else ""
            pair = self._references[name].text("text"), answers[name].text
            rule = read_rules(self.options.rule).get(str(record.get("category") or ""))
            return judge_request(name, run, swapped, context, record.text("text"), pair, rule)

        scores = self.judge(ask_verdicts(answers, request, self.options, ask), protocol)
        words = {
            name: (len(self._references[name].text("text").split()), len(answers[name].text.split()))
            for name in answers
        }
        return replace(scores, scores={**scores.scores, "length": _length_bias(words, scores.grades)})

    def judge(self, reviews: Sequence[Mapping[str, str]], protocol: str) -> Scores:  # noqa: ARG002 - the only protocol
        """``win``, ``tie`` and ``loss`` in percent, and ``win_rate``: wins plus half of the ties.

        A question with an unparsable verdict is left out of its run. ``agreement``: how often both orders have the same
        outcome. With several runs, scores are means, and ``spread`` is the standard deviation of ``win_rate``.
        """
        orders = 2 if self.options.swap else 1
        runs = [reviews[start : start + orders] for start in range(0, len(reviews), orders)]
        failed = sum(parse_lenient(verdict) is None for review in reviews for verdict in review.values())
        parsed = [_complete_pairs(run) for run in runs]
        outcomes = [{name: _outcome(pairs) for name, pairs in run.items()} for run in parsed]
        rates = [_rates(list(run.values())) for run in outcomes if run]
        scores: dict[str, Json] = {key: fmean(run[key] for run in rates) if rates else None for key in _RATES}
        if self.options.swap:
            same = [len({_order_outcome(pair) for pair in pairs}) == 1 for run in parsed for pairs in run.values()]
            scores["agreement"] = 100 * fmean(same) if same else None
        if len(runs) > 1:
            win_rates = [run["win_rate"] for run in rates]
            scores |= {"runs": win_rates, "spread": stdev(win_rates) if len(win_rates) > 1 else None}
        names = dict.fromkeys(name for run in outcomes for name in run)
        grades = {name: fmean(GRADES[run[name]] for run in outcomes if name in run) for name in names}
        return Scores(scores, failed, grades=grades)

    @cached_property
    def _questions(self) -> Mapping[str, Record]:
        questions = unique(read_records(self.options.questions), "question_id", "id")
        if self.options.context is not None:
            missing = [name for name, record in questions.items() if record.text("image") not in self._contexts]
            if missing:
                raise DataError(f"{self.options.context}: no entry for the image of question {missing[0]!r}")
        return questions

    @cached_property
    def _references(self) -> Mapping[str, Record]:
        references = unique(read_records(self.options.against), "question_id", "id", what="answer")
        if missing := [name for name in self._questions if name not in references]:
            raise DataError(
                f"{self.options.against}: no answer to {len(missing)} questions, the first is {missing[0]!r}"
            )
        return references

    @cached_property
    def _contexts(self) -> Mapping[str, Record]:
        assert self.options.context is not None
        return unique(read_records(self.options.context), "image", what="image")


def _length_bias(words: Mapping[str, ScorePair], grades: Mapping[str, float]) -> Json:
    """How often the longer answer won; ``words`` are the numbers of words of both answers."""
    tie = GRADES["tie"]
    longer_won = [
        (candidate > other) == (grades[name] > tie)
        for name, (other, candidate) in words.items()
        if candidate != other and grades.get(name, tie) != tie
    ]
    others, candidates = zip(*words.values(), strict=True)
    return {
        "longer_wins": 100 * fmean(longer_won) if longer_won else None,
        "decided": len(longer_won),
        "words": fmean(candidates),
        "against": fmean(others),
    }


def _complete_pairs(run: Sequence[Mapping[str, str]]) -> dict[str, list[ScorePair]]:
    """The scores of each question in all orders of a run, without questions that have an unparsable verdict."""
    parsed = {name: [parse_lenient(review[name]) for review in run] for name in run[0]}
    return {name: [pair for pair in pairs if pair] for name, pairs in parsed.items() if all(pairs)}


def _order_outcome(pair: ScorePair) -> str:
    """The candidate's outcome in one order."""
    other, candidate = pair
    return "tie" if candidate == other else "win" if candidate > other else "loss"


def _outcome(pairs: Sequence[ScorePair]) -> str:
    """The candidate's outcome in all orders: a tie unless they agree."""
    outcomes = {_order_outcome(pair) for pair in pairs}
    return outcomes.pop() if len(outcomes) == 1 else "tie"


def _rates(outcomes: Sequence[str]) -> dict[str, float]:
    count = Counter(outcomes)
    rates = {outcome: 100 * count[outcome] / len(outcomes) for outcome in GRADES}
    return rates | {"win_rate": rates["win"] + rates["tie"] / 2}
