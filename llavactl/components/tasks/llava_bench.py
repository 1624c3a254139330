"""LLaVA-Bench: open questions, judged against a reference answer (Liu et al. 2023, arXiv 2304.08485, section 5).

A judge scores the reference answer and the model's answer from 1 to 10. The benchmark score is the model's mean score
in percent of the reference's. In-the-Wild has 60 questions about 24 images; COCO has 30 images with one question of
each category. Other questions with reference answers work as well, with any categories or none.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    parse_llava,
    read_rules,
)
from llavactl.components.tasks.llava_bench_files import (
    CATEGORY_PREFIX,
    LlavaBenchFiles,
    category_of,
    stored_scores,
    verdict_text,
)
from llavactl.core.errors import DataError
from llavactl.core.options import FollowLinks, RecipePath, RecipePaths, RecipePlace
from llavactl.core.protocols import Ask, Json, Request, Scores
from llavactl.core.schema import Answer, Question
from llavactl.files.records import Record
from llavactl.images.references import ImageRoot

log = logging.getLogger(__name__)

CATEGORIES = ("conv", "detail", "complex")
"""Categories of both benchmarks, in the order of the papers' tables."""
FAILED = (-1.0, -1.0)
"""The scores that LLaVA's script stores for an unparsable verdict."""


class LlavaBenchOptions(JudgeOptions):
    """Options of the tasks ``llava-bench`` and ``llava-bench-coco``."""

    questions: RecipePath | None = Field(
        None, description="JSONL of question_id and text; optionally image and category"
    )
    context: RecipePath | None = Field(None, description="JSONL of image and caption(s): descriptions for the judge")
    reference: RecipePath | None = Field(None, description="JSONL of question_id and text: the reference answers")
    reviews: RecipePaths = Field(
        (), description="stored verdicts, one file per run: JSONL of question_id and content, text, tuple or score"
    )
    images: RecipePlace | None = Field(None, description=IMAGES_HELP)
    follow_links: FollowLinks = False

    @model_validator(mode="after")
    def _check_combination(self) -> LlavaBenchOptions:
        if self.questions is None and not self.reviews:
            raise ValueError("questions=FILE or reviews=FILE is required")
        if self.judge is not None and self.reviews:
            raise ValueError("judge and reviews=FILE can't be combined")
        if self.judge is not None and self.reference is None:
            raise ValueError("a judge requires reference answers: reference=FILE")
        return self


class LlavaBench:
    """The tasks ``llava-bench`` and ``llava-bench-coco``; see ``llavactl.core.protocols.Judged``."""

    protocols = ("llava", "excluding-failed", "stored")

    def __init__(self, options: LlavaBenchOptions) -> None:
        self.options = options
        self.teacher = options.teacher
        self._files = LlavaBenchFiles(
            options.questions, options.context, options.reference, options.reviews, options.judge is not None
        )

    def questions(self) -> Iterator[Question]:
        references = self._files.references
        for name, record in self._files.questions.items():
            assert self.options.questions is not None
            root = ImageRoot(str(self.options.images or self.options.questions.parent), self.options.follow_links)
            image = image_of(record, root) if record.get("image") else None
            reference = references[name].text("text") if references else ""
            yield Question(name, user_turn(image, record.text("text")), reference, category_of(record))

    def reviews(self) -> Sequence[Mapping[str, str]]:
        runs = [{name: verdict_text(run[name]) for name in self._files.categories} for run in self._files.reviews]
        for file, run, verdicts in zip(self.options.reviews, self._files.reviews, runs, strict=True):
            is_parsable = any(parse_lenient(text) or stored_scores(run[name]) for name, text in verdicts.items())
            if any(verdicts.values()) and not is_parsable:
                raise DataError(
                    f"{file}: none of {len(verdicts)} lines has a verdict: {next(iter(verdicts.values()))!r:.60}",
                    hint="reviews=FILE takes a judge's reviews with two scores each; is this an answer file?",
                )
            different = [
                name
                for name, text in verdicts.items()
                if stored_scores(run[name]) not in (None, parse_llava(text) or FAILED)
            ]
            if different:
                log.warning(
                    "%s: the stored scores of %d verdicts differ from their texts, first for question %r; the protocol "
                    "`stored` uses the stored scores", file, len(different), different[0],
                )  # fmt: skip
        return runs

    def judge(self, reviews: Sequence[Mapping[str, str]], protocol: str) -> Scores:
        """``all`` and each category: ``relative``, and the mean scores of both answers in percent of 10.

        Unparsable verdicts count as -1 for both answers under ``llava``, as in LLaVA's summary, and are left out under
        ``excluding-failed``. ``stored`` uses the scores that are stored with a verdict, as LLaVA's summary does. With
        several runs, scores are means; ``runs`` lists each run, ``spread`` is their sample standard deviation.
        """
        parsed = self._parsed(reviews, protocol)
        failed = sum(pair is None for run in parsed for pair in run.values())
        judged = {name for run in parsed for name in run}
        counted = [
            {
                name: FAILED if pair is None else pair
                for name, pair in run.items()
                if pair or protocol != "excluding-failed"
            }
            for run in parsed
        ]
        categories = self._files.categories
        scores: dict[str, Json] = {}
        for group in ("all", *sorted({category for category in categories.values() if category}, key=_category_order)):
            names = [name for name, category in categories.items() if name in judged and group in ("all", category)]
            if names:
                runs = [_relative_score([run[name] for name in names if name in run]) for run in counted]
                scores[group] = _mean_of_runs(runs)
        candidate = {name: [run[name][1] for run in counted if name in run] for name in categories}
        grades = {name: max(0.0, fmean(values) / 10) for name, values in candidate.items() if values}
        return Scores(scores, failed, grades=grades)

    def _parsed(self, reviews: Sequence[Mapping[str, str]], protocol: str) -> list[dict[str, ScorePair | None]]:
        """The scores of both answers by question, one mapping per run; None for an unparsable verdict."""
        parse = PARSERS[protocol]
        runs = [{name: parse(text) for name, text in run.items()} for run in reviews]
        if protocol != "stored":
            return runs
        records: Sequence[Mapping[str, Record]] = self._files.reviews or [{}] * len(runs)
        return [
            {name: _stored_or_parsed(by_name.get(name), pair) for name, pair in run.items()}
            for by_name, run in zip(records, runs, strict=True)
        ]

    def score_with_teacher(self, answers: Mapping[str, Answer], ask: Ask, protocol: str) -> Scores:
        """Scores of ``answers`` after asking the judge about each, paired with its reference answer (first)."""
        files = self._files
        check_prompts({name: record.text("text") for name, record in files.questions.items()}, answers)

        def request(name: str, run: int, swapped: bool) -> Request:
            record = files.questions[name]
            category = category_of(record)
            context = image_description(files.contexts[record.text("image")]) if record.get("image") else ""
            rule_names = (f"{CATEGORY_PREFIX}{category}", category, "default")
            rule = next((self._rules[key] for key in rule_names if key in self._rules), None)
            pair = files.references[name].text("text"), answers[name].text
            return judge_request(name, run, swapped, context, record.text("text"), pair, rule)

        return self.judge(ask_verdicts(answers, request, self.options, ask), protocol)

    def check_answers(self, answers: Mapping[str, Answer]) -> None:
        """Raises DataError if the stored reviews are about other answers."""
        names = self._files.categories
        for file, run in zip(self.options.reviews, self._files.reviews, strict=True):
            if missing := [name for name in names if name not in answers]:
                raise DataError(f"{file}: {len(missing)} reviewed answers are missing, the first is to {missing[0]!r}")
            ids = {name: (run[name].get("answer2_id"), answers[name].extra.get("answer_id")) for name in names}
            if different := [name for name, pair in ids.items() if None not in pair and pair[0] != pair[1]]:
                raise DataError(
                    f"{run[different[0]].where}: a review of another answer; {len(different)} of {len(ids)} reviews "
                    "don't belong to these answers",
                    hint="omit --answers, or use the answers that were reviewed",
                )

    @cached_property
    def _rules(self) -> Mapping[str, tuple[str, str]]:
        return read_rules(self.options.rule)


PARSERS: Mapping[str, Callable[[str], ScorePair | None]] = {
    "llava": parse_llava,
    "excluding-failed": parse_lenient,
    "stored": parse_llava,
}
"""By protocol; ``stored`` parses verdicts without stored scores."""


def _category_order(category: str) -> tuple[int, str]:
    return (CATEGORIES.index(category) if category in CATEGORIES else len(CATEGORIES), category)


def _stored_or_parsed(review: Record | None, parsed: ScorePair | None) -> ScorePair | None:
    """The scores stored with a verdict, else those parsed from its text."""
    pair = stored_scores(review) if review else None
    return parsed if pair is None else None if min(pair) < 0 else pair


def _relative_score(pairs: Sequence[ScorePair]) -> dict[str, float | int | None]:
    """``relative`` is a ratio of means, not a mean of ratios."""
    reference, candidate = (fmean(scores) if pairs else None for scores in zip(*pairs or [FAILED], strict=True))
    relative = 100 * candidate / reference if candidate is not None and reference else None
    means = {"reference": reference, "candidate": candidate}
    percent = {key: None if mean is None else 10 * mean for key, mean in means.items()}
    return {"relative": relative, **percent, "n": len(pairs)}


def _mean_of_runs(runs: Sequence[Mapping[str, float | int | None]]) -> Json:
    if len(runs) == 1:
        return dict(runs[0])
    means = {key: _mean([run[key] for run in runs]) for key in ("relative", "reference", "candidate")}
    relative = [run["relative"] for run in runs]
    known = [value for value in relative if value is not None]
    n = round(fmean(run["n"] or 0 for run in runs))
    return {**means, "n": n, "spread": stdev(known) if len(known) > 1 else None, "runs": relative}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
