"""Input files of LLaVA-Bench: questions, image descriptions, reference answers and stored reviews, and their checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from llavactl.components.tasks.judging import ScorePair
from llavactl.core.errors import DataError
from llavactl.files.records import Record, read_records, unique

CATEGORY_PREFIX = "llava_bench_"
"""LLaVA's review files prefix a question's category with this."""


@dataclass(frozen=True)
class LlavaBenchFiles:
    """The files of the task's options, read on first use; ``asks_judge``: descriptions of images are required."""

    question_file: Path | None
    context_file: Path | None
    reference_file: Path | None
    review_files: Sequence[Path]
    asks_judge: bool

    @cached_property
    def contexts(self) -> Mapping[str, Record]:
        """Descriptions by image."""
        assert self.context_file is not None
        return unique(read_records(self.context_file), "image", what="image")

    @cached_property
    def questions(self) -> Mapping[str, Record]:
        """Questions by id; {} without a question file."""
        if self.question_file is None:
            return {}
        questions = unique(read_records(self.question_file), "question_id")
        images = {name: record.text("image") for name, record in questions.items() if record.get("image")}
        if self.context_file is not None:
            if missing := [name for name, image in images.items() if image not in self.contexts]:
                raise DataError(f"{self.context_file}: no entry for the image of question {missing[0]!r}")
        elif images and self.asks_judge:
            raise DataError(
                f"{self.question_file}: the judge requires descriptions of the images",
                hint="-t context=FILE, JSONL of image and caption(s)",
            )
        return questions

    @cached_property
    def references(self) -> Mapping[str, Record]:
        """Reference answers by question id; {} without a file."""
        if self.reference_file is None:
            return {}
        references = unique(read_records(self.reference_file), "question_id", what="answer")
        if missing := [name for name in self.questions if name not in references]:
            raise DataError(
                f"{self.reference_file}: no answer to {len(missing)} questions, the first is {missing[0]!r}"
            )
        return references

    @cached_property
    def reviews(self) -> list[dict[str, Record]]:
        """Stored reviews by question id, one mapping per file."""
        files = list(self.review_files)
        if duplicates := [file for index, file in enumerate(files) if file in files[:index]]:
            raise DataError(f"{duplicates[0]}: duplicate review file", hint="list each run once")
        return [unique(read_records(file), "question_id", what="review") for file in files]

    @cached_property
    def categories(self) -> Mapping[str, str]:
        """The category of every question, from the question file or the first review file; the others must agree."""
        source = self.questions or self.reviews[0]
        categories = {name: category_of(record) for name, record in source.items()}
        for file, run in zip(self.review_files, self.reviews, strict=True):
            if missing := [name for name in categories if name not in run]:
                raise DataError(
                    f"{file}: {len(missing)} of {len(categories)} questions have no review, the first is "
                    f"{missing[0]!r}",
                    hint="check that these are reviews for this task's questions, and that the file is complete",
                )
            self._check_reviews(run, categories)
        return categories

    def _check_reviews(self, run: Mapping[str, Record], categories: Mapping[str, str]) -> None:
        """Raises DataError if a review has another category, or is about another reference answer."""
        for name, category in categories.items():
            review = run[name]
            if category and category_of(review) not in ("", category):
                raise DataError(
                    f"{review.where}: a review of category {category_of(review)!r}, but question {name!r} has category "
                    f"{category!r}"
                )
            reference = self.references.get(name)
            reviewed_id, reference_id = review.get("answer1_id"), reference.get("answer_id") if reference else None
            if reviewed_id is not None and reference_id is not None and reviewed_id != reference_id:
                raise DataError(f"{review.where}: a review of another reference answer than in {self.reference_file}")


def category_of(record: Record) -> str:
    """The question's category without LLaVA's prefix; "" if there is none."""
    return record.text("category").removeprefix(CATEGORY_PREFIX) if record.get("category") is not None else ""


def verdict_text(review: Record) -> str:
    """The judge's text: ``content`` in LLaVA's files, ``text`` in Vicuna's; "" for a judge that failed to reply.

    A file without texts has scores in ``tuple`` or ``score``, where -1 means an unparsable verdict.
    """
    if review.get("content", "text") is not None:
        return review.text("content", "text")
    if review.fields.get("content", 0) is None:
        return ""
    if (pair := stored_scores(review)) is None:
        raise DataError(f"{review.where}: missing `content`")
    return f"{pair[0]} {pair[1]}" if min(pair) >= 0 else ""


def stored_scores(review: Record) -> ScorePair | None:
    """The scores stored in ``tuple`` or ``score``, if any."""
    pair = review.get("tuple", "score")
    if isinstance(pair, list) and len(pair) == 2 and all(type(score) in (int, float) for score in pair):
        return float(pair[0]), float(pair[1])
    return None
