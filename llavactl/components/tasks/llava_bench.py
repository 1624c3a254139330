"""LLaVA-Bench: open questions, judged against a reference answer (Liu et al. 2023, arXiv 2304.08485, section 5).

A judge gives the reference answer and the candidate 1 to 10 points each; the score is relative, the candidate's
mean as a percentage of the reference's. In the wild: 60 questions about 24 pictures; COCO: 30 pictures, each with
a question of every kind. Other questions with a reference answer will do, too, of any kinds or of none.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from statistics import fmean, stdev

from pydantic import Field, model_validator

from llavactl.components.tasks.image_questions import asked, picture, refuse_others
from llavactl.components.tasks.judging import (
    JudgeOptions,
    Pair,
    as_llava,
    described,
    leniently,
    request,
    rules,
    verdicts,
)
from llavactl.core.errors import DataError
from llavactl.core.options import FollowLinks, RecipePath, RecipePaths, RecipePlace
from llavactl.core.protocols import Ask, Json, Request, Scores
from llavactl.core.schema import Answer, Question
from llavactl.files.records import Record, read_records, unique
from llavactl.images.references import ImageRoot

log = logging.getLogger(__name__)

KINDS = ("conv", "detail", "complex")
"""Those of both benchmarks, in the order in which papers print them."""
PREFIX = "llava_bench_"
FAILED = (-1.0, -1.0)
"""What LLaVA's script notes where it can't read a verdict."""


class LlavaBenchOptions(JudgeOptions):
    """Options of the tasks ``llava-bench`` and ``llava-bench-coco``."""

    questions: RecipePath | None = Field(
        None, description="JSONL of question_id and text; image and category, where there are any"
    )
    context: RecipePath | None = Field(None, description="JSONL of image and caption(s), what the judge is told")
    reference: RecipePath | None = Field(None, description="JSONL of question_id and text, the reference answers")
    reviews: RecipePaths = Field(
        (), description="stored verdicts, JSONL of question_id and content, text, tuple or score; a file a run"
    )
    images: RecipePlace | None = Field(
        None, description="folder, .zip, .tar or URL of the pictures; null: that of the questions"
    )
    follow_links: FollowLinks = False

    @model_validator(mode="after")
    def _something(self) -> LlavaBenchOptions:
        if self.questions is None and not self.reviews:
            raise ValueError("questions=FILE or reviews=FILE is needed")
        if self.judge is not None and self.reviews:
            raise ValueError("either a judge is asked, or reviews=FILE has verdicts: not both")
        if self.judge is not None and self.reference is None:
            raise ValueError("a judge is told a reference answer: reference=FILE")
        return self


class LlavaBench:
    """The tasks ``llava-bench`` and ``llava-bench-coco``; see ``llavactl.core.protocols.Judged``."""

    protocols = ("llava", "excluding-failed", "stored")

    def __init__(self, options: LlavaBenchOptions) -> None:
        self.options = options
        self.teacher = options.teacher

    def questions(self) -> Iterator[Question]:
        for name, record in self._questions.items():
            assert self.options.questions is not None
            root = ImageRoot(str(self.options.images or self.options.questions.parent), self.options.follow_links)
            image = picture(record, root) if record.get("image") else None
            reference = self._references[name].text("text") if self._references else ""
            yield Question(name, asked(image, record.text("text")), reference, kind_of(record))

    def reviews(self) -> Sequence[Mapping[str, str]]:
        runs = [{name: _verdict(run[name]) for name in self._kinds} for run in self._reviews]
        for file, run, said in zip(self.options.reviews, self._reviews, runs, strict=True):
            if any(said.values()) and not any(leniently(text) or _stored(run[name]) for name, text in said.items()):
                raise DataError(
                    f"{file}: none of its {len(said)} lines has a verdict: {next(iter(said.values()))!r:.60}",
                    hint="reviews=FILE takes a judge's reviews, each with two scores; is this a file of answers?",
                )
            other = [name for name, text in said.items() if _stored(run[name]) not in (None, as_llava(text) or FAILED)]
            if other:
                log.warning(
                    "%s: %d verdicts say something else than the points beside them, the first is of %r; "
                    "under the protocol `stored` those points count", file, len(other), other[0],
                )  # fmt: skip
        return runs

    def judge(self, reviews: Sequence[Mapping[str, str]], protocol: str) -> Scores:
        """``all`` and each kind: ``relative``, and the mean points of both in percent of 10.

        Under ``llava`` a verdict that can't be read counts as −1 for both, as in LLaVA's summary. Under ``stored`` the
        points count that a file has beside a verdict, whoever read or corrected them: LLaVA's summary takes those. With
        several runs a score is the mean of theirs; ``runs`` has each, ``spread`` their sample standard deviation.
        """
        read = READERS[protocol]
        runs = [{name: read(text) for name, text in run.items()} for run in reviews]
        if protocol == "stored":
            runs = [
                {name: _points(said.get(name), pair) for name, pair in run.items()}
                for said, run in zip(self._reviews or [{}] * len(runs), runs, strict=True)
            ]
        judged = {name for run in runs for name in run}
        failed = sum(pair is None for run in runs for pair in run.values())
        counted = [
            {
                name: FAILED if pair is None else pair
                for name, pair in run.items()
                if pair or protocol != "excluding-failed"
            }
            for run in runs
        ]
        scores: dict[str, Json] = {}
        for group in ("all", *sorted({kind for kind in self._kinds.values() if kind}, key=_place)):
            names = [name for name, kind in self._kinds.items() if name in judged and group in ("all", kind)]
            if names:
                scores[group] = _together([_group([run[name] for name in names if name in run]) for run in counted])
        told = {name: [run[name][1] for run in counted if name in run] for name in self._kinds}
        return Scores(scores, failed, grades={name: max(0.0, fmean(each) / 10) for name, each in told.items() if each})

    def score_with_teacher(self, answers: Mapping[str, Answer], ask: Ask, protocol: str) -> Scores:
        """Scores of ``answers`` after asking a judge about each; the reference answer is the first of the two."""
        refuse_others({name: record.text("text") for name, record in self._questions.items()}, answers)

        def about(name: str, run: int, swapped: bool) -> Request:
            record = self._questions[name]
            kind = kind_of(record)
            context = described(self._contexts[record.text("image")]) if record.get("image") else ""
            known = (f"{PREFIX}{kind}", kind, "default")
            rule = next((self._rules[each] for each in known if each in self._rules), None)
            both = self._references[name].text("text"), answers[name].text
            return request(name, (run, swapped), context, record.text("text"), both, rule)

        return self.judge(verdicts(answers, about, self.options, ask), protocol)

    def check_answers(self, answers: Mapping[str, Answer]) -> None:
        """Raises DataError where the stored verdicts say that they are about other answers."""
        for file, run in zip(self.options.reviews, self._reviews, strict=True):
            if missing := [name for name in self._kinds if name not in answers]:
                raise DataError(f"{file}: reviews of answers that aren't given, the first is to {missing[0]!r}")
            pairs = {name: (run[name].get("answer2_id"), answers[name].extra.get("answer_id")) for name in self._kinds}
            if wrong := [name for name, pair in pairs.items() if None not in pair and pair[0] != pair[1]]:
                raise DataError(
                    f"{run[wrong[0]].where}: about another answer than the one that is given; {len(wrong)} of "
                    f"{len(pairs)} are",
                    hint="leave --answers out, or take the answers that these reviews are about",
                )

    @cached_property
    def _rules(self) -> Mapping[str, tuple[str, str]]:
        return rules(self.options.rule)

    @cached_property
    def _contexts(self) -> Mapping[str, Record]:
        assert self.options.context is not None
        return unique(read_records(self.options.context), "image", what="picture")

    @cached_property
    def _questions(self) -> Mapping[str, Record]:
        if self.options.questions is None:
            return {}
        found = unique(read_records(self.options.questions), "question_id")
        about = {name: each.text("image") for name, each in found.items() if each.get("image")}
        if self.options.context is not None:
            if missing := [name for name, image in about.items() if image not in self._contexts]:
                raise DataError(f"{self.options.context}: nothing about the picture of question {missing[0]!r}")
        elif about and self.options.judge is not None:
            raise DataError(
                f"{self.options.questions}: a judge who can't see the pictures has to be told what is on them",
                hint="-t context=FILE, JSONL of image and caption(s)",
            )
        return found

    @cached_property
    def _references(self) -> Mapping[str, Record]:
        if self.options.reference is None:
            return {}
        found = unique(read_records(self.options.reference), "question_id", what="answer")
        if missing := [name for name in self._questions if name not in found]:
            raise DataError(
                f"{self.options.reference}: no answer to {len(missing)} questions, the first is {missing[0]!r}"
            )
        return found

    @cached_property
    def _reviews(self) -> list[dict[str, Record]]:
        files = self.options.reviews
        if twice := [file for at, file in enumerate(files) if file in files[:at]]:
            raise DataError(f"{twice[0]}: given twice as reviews", hint="a run counts once")
        return [unique(read_records(file), "question_id", what="review") for file in files]

    @cached_property
    def _kinds(self) -> Mapping[str, str]:
        """The kind of every question, as its file says, else as the first run does; the other runs have to agree."""
        source = self._questions or self._reviews[0]
        kinds = {name: kind_of(record) for name, record in source.items()}
        for file, run in zip(self.options.reviews, self._reviews, strict=True):
            if missing := [name for name in kinds if name not in run]:
                raise DataError(
                    f"{file}: {len(missing)} of {len(kinds)} questions have no review, the first is {missing[0]!r}",
                    hint="are these the reviews of answers to this task's questions? is the file cut?",
                )
            self._check(run, kinds)
        return kinds

    def _check(self, run: Mapping[str, Record], kinds: Mapping[str, str]) -> None:
        """Reviews name the kind of their question and the answers they are about: both have to be the given ones."""
        for name, kind in kinds.items():
            record = run[name]
            if kind and kind_of(record) not in ("", kind):
                raise DataError(
                    f"{record.where}: a review of kind {kind_of(record)!r}, question {name!r} is of {kind!r}"
                )
            known = self._references.get(name)
            about, answer = record.get("answer1_id"), known.get("answer_id") if known else None
            if about is not None and answer is not None and about != answer:
                raise DataError(
                    f"{record.where}: about another reference answer than the one of {self.options.reference}"
                )


def kind_of(record: Record) -> str:
    """The question's kind, nothing where it has none; LLaVA's reviews put the benchmark's name before it."""
    return record.text("category").removeprefix(PREFIX) if record.get("category") is not None else ""


def _place(kind: str) -> tuple[int, str]:
    return (KINDS.index(kind) if kind in KINDS else len(KINDS), kind)


def _verdict(record: Record) -> str:
    """What the judge said; a judge who said nothing has failed, and is counted so.

    ``content`` in LLaVA's files and ``text`` in Vicuna's; a file without them has what was read of it, ``tuple`` or
    ``score``, where -1 stands for nothing.
    """
    if record.get("content", "text") is not None:
        return record.text("content", "text")
    if record.fields.get("content", 0) is None:
        return ""
    if (pair := _stored(record)) is None:
        raise DataError(f"{record.where}: there is no `content`")
    return f"{pair[0]} {pair[1]}" if min(pair) >= 0 else ""


def _stored(record: Record) -> Pair | None:
    """The points that the file itself has for the verdict."""
    pair = record.get("tuple", "score")
    if isinstance(pair, list) and len(pair) == 2 and all(type(each) in (int, float) for each in pair):
        return float(pair[0]), float(pair[1])
    return None


def _points(record: Record | None, read: Pair | None) -> Pair | None:
    """The points beside a verdict, what was ``read`` of it where there are none."""
    pair = _stored(record) if record else None
    return read if pair is None else None if min(pair) < 0 else pair


READERS: Mapping[str, Callable[[str], Pair | None]] = {
    "llava": as_llava,
    "excluding-failed": leniently,
    "stored": as_llava,
}


def _group(pairs: Sequence[Pair]) -> dict[str, float | int | None]:
    """A ratio of means, not a mean of ratios."""
    reference, candidate = (fmean(each) if pairs else None for each in zip(*pairs or [FAILED], strict=True))
    relative = 100 * candidate / reference if candidate is not None and reference else None
    both = {"reference": reference, "candidate": candidate}
    return {"relative": relative, **{key: None if x is None else 10 * x for key, x in both.items()}, "n": len(pairs)}


def _together(runs: Sequence[Mapping[str, float | int | None]]) -> Json:
    if len(runs) == 1:
        return dict(runs[0])
    means = {key: _mean([run[key] for run in runs]) for key in ("relative", "reference", "candidate")}
    each = [run["relative"] for run in runs]
    known = [value for value in each if value is not None]
    n = round(fmean(run["n"] or 0 for run in runs))
    return {**means, "n": n, "spread": stdev(known) if len(known) > 1 else None, "runs": each}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
