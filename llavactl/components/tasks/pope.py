"""POPE: yes/no questions about objects in an image (Li et al. 2023, arXiv 2305.10355), half with the answer yes.

Labels and questions are joined by image and question text, never line by line: POPE's random split had 2,910 questions
when LLaVA-1.5 was evaluated, and has 3,000 in another order today.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath

from pydantic import Field

from llavactl.components.tasks.image_questions import IMAGES_HELP, check_prompts, image_of, user_turn
from llavactl.core.errors import DataError
from llavactl.core.options import FollowLinks, RecipePath, RecipePaths, RecipePlace
from llavactl.core.protocols import Json, Scores
from llavactl.core.registry import Options
from llavactl.core.schema import Answer, Question
from llavactl.files.records import Record, read_records, unique
from llavactl.images.references import ImageRoot

SPLITS = ("random", "popular", "adversarial")
RATES = ("accuracy", "precision", "recall", "f1", "yes_ratio")


class PopeOptions(Options):
    """Options of the task ``pope``."""

    questions: RecipePath = Field(description="JSONL or JSON list: question_id, image, text, category (the split)")
    labels: RecipePaths = Field(
        (), description="POPE's files coco_pope_SPLIT.json, or their folder; default: `label` of the questions"
    )
    images: RecipePlace | None = Field(None, description=IMAGES_HELP)
    follow_links: FollowLinks = False


class Pope:
    """The task ``pope``; see ``llavactl.core.protocols.Task``."""

    protocols = ("llava",)

    def __init__(self, options: PopeOptions) -> None:
        self.options = options

    def questions(self) -> Iterator[Question]:
        root = ImageRoot(str(self.options.images or self.options.questions.parent), self.options.follow_links)
        for question_id, (record, label, split) in self._labeled.items():
            yield Question(question_id, user_turn(image_of(record, root), record.text("text")), label, split)

    def score(self, answers: Mapping[str, Answer], protocol: str) -> Scores:  # noqa: ARG002 - the only protocol
        """Scores over all questions; with several splits also per split, and the mean of the splits.

        ``failed`` counts empty answers, which the protocol reads as yes.
        """
        check_prompts(
            {question_id: first_line(record.text("text")) for question_id, (record, _, _) in self._labeled.items()},
            answers,
        )
        pairs_by_split: dict[str, list[tuple[bool, bool]]] = {}
        right: dict[str, bool] = {}
        for question_id, (_, label, split) in self._labeled.items():
            if question_id in answers:
                predicted, actual = is_yes(answers[question_id].text), label == "yes"
                right[question_id] = predicted == actual
                pairs_by_split.setdefault(split, []).append((predicted, actual))
        scores = rates([pair for pairs in pairs_by_split.values() for pair in pairs])
        splits = {split: rates(pairs) for split, pairs in pairs_by_split.items()} if len(pairs_by_split) > 1 else {}
        mean = {"mean": _mean(list(splits.values()))} if splits else {}
        failed = sum(not answers[question_id].text.strip() for question_id in right)
        return Scores({**scores, **splits, **mean}, failed, right)

    @cached_property
    def _labeled(self) -> Mapping[str, tuple[Record, str, str]]:
        """By question id: the question, its label (``yes`` or ``no``) and its split."""
        questions = unique(read_records(self.options.questions), "question_id", "id")
        if not self.options.labels:
            if unlabeled := [record for record in questions.values() if record.get("label") is None]:
                raise DataError(
                    f"{unlabeled[0].where}: missing `label`", hint="pass POPE's label files: -t labels=FILE|FOLDER"
                )
            return {
                question_id: (record, _label(record), str(record.get("category") or ""))
                for question_id, record in questions.items()
            }
        labels = [(split_of(file), file, read_records(file)) for file in _files(self.options.labels)]
        duplicates = [split for split, count in Counter(split for split, _, _ in labels).items() if count > 1]
        if duplicates:
            raise DataError(f"labels: duplicate split {duplicates[0]!r}", hint="list each file once")
        questions_by_split = _by_split(questions, [split for split, _, _ in labels])
        labeled = {}
        for split, file, records in labels:
            labeled.update(_join(questions_by_split[split], records, file, split))
        return labeled


def first_line(text: str) -> str:
    """The question without the instruction that LLaVA's files have in a second line."""
    return " ".join(text.split("\n")[0].split())


def is_yes(text: str) -> bool:
    """Parses as LLaVA's ``eval_pope.py``: no if the first sentence has the word No, no or not, else yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def rates(pairs: Sequence[tuple[bool, bool]]) -> dict[str, Json]:
    """Scores of (predicted, actual) pairs, True for yes; rates in percent, None if the denominator is 0."""
    count = Counter(pairs)
    tp, fp, tn, fn = count[True, True], count[True, False], count[False, False], count[False, True]
    return {
        "accuracy": _percent(tp + tn, len(pairs)),
        "precision": _percent(tp, tp + fp),
        "recall": _percent(tp, tp + fn),
        "f1": _percent(2 * tp, 2 * tp + fp + fn),
        "yes_ratio": _percent(tp + fp, len(pairs)),
        "tp": tp,
        "fp": fp,
        "tn": tn,
        "fn": fn,
    }


def split_of(file: Path) -> str:
    """``coco_pope_random.json`` → ``random``; the file's stem if it contains no split."""
    return next((split for split in SPLITS if re.search(rf"(?<![a-z]){split}", file.stem)), file.stem)


def _files(paths: Sequence[Path]) -> list[Path]:
    files = [file for path in paths for file in (_label_files(path) if path.is_dir() else [path])]
    if not files:
        raise DataError(
            f"{paths[0]}: no label files in this folder",
            hint=f"expected POPE's files: {', '.join(f'coco_pope_{split}.json' for split in SPLITS)}",
        )
    return files


def _label_files(folder: Path) -> list[Path]:
    """The label files of a folder: those with POPE's names, else all JSON files."""
    return sorted(folder.glob("coco_pope_*.json*")) or sorted(folder.glob("*.json*"))


def _by_split(questions: Mapping[str, Record], splits: Sequence[str]) -> dict[str, dict[str, Record]]:
    """The questions of each of ``splits``; other questions are left out."""
    categories = {question_id: record.get("category") for question_id, record in questions.items()}
    if len(splits) == 1 and splits[0] not in categories.values():
        return {splits[0]: dict(questions)}
    if missing := [split for split in splits if split not in categories.values()]:
        available = sorted({str(category) for category in categories.values()})
        raise DataError(
            f"labels: no question has the category {missing[0]!r}, the split of a label file",
            hint=f"categories of the questions: {', '.join(available)}",
        )
    return {
        split: {question_id: questions[question_id] for question_id in questions if categories[question_id] == split}
        for split in splits
    }


def _join(
    questions: Mapping[str, Record], labels: Sequence[Record], file: Path, split: str
) -> dict[str, tuple[Record, str, str]]:
    """Each question with its label; questions and labels must match one to one."""
    by_id = not all(label.get("image") and label.get("text") for label in labels)
    key = _id_key if by_id else _image_and_text_key
    labels_by_key: dict[tuple[str, str], Record] = {}
    for label in labels:
        # POPE's files for A-OKVQA and GQA contain some questions twice, with two ids and the same label.
        first = labels_by_key.setdefault(key(label), label)
        if first is not label and not _is_consistent_repetition(label, first):
            raise DataError(f"{label.where}: duplicate question, first at {first.where}")
    question_keys = {question_id: key(record) for question_id, record in questions.items()}
    unlabeled = [
        question_id for question_id, question_key in question_keys.items() if question_key not in labels_by_key
    ]
    unmatched = len(labels_by_key.keys() - set(question_keys.values()))
    if unlabeled or unmatched:
        raise DataError(
            f"{file}: labels and questions don't match: {len(unlabeled)} of {len(questions)} questions have no label, "
            f"{unmatched} of {len(labels)} labels have no question"
            + (f"; the first question without label is {unlabeled[0]!r}" if unlabeled else ""),
            hint="the random split has 2,910 questions in LLaVA-1.5's version and 3,000 today, and popular and "
            "adversarial have changed as well: use the labels of the same version as the questions",
        )
    return {
        question_id: (questions[question_id], _label(labels_by_key[question_keys[question_id]]), split)
        for question_id in questions
    }


def _image_and_text_key(record: Record) -> tuple[str, str]:
    return PurePosixPath(record.text("image")).name, first_line(record.text("text"))


def _id_key(record: Record) -> tuple[str, str]:
    return "", record.name("question_id", "id")


def _is_consistent_repetition(label: Record, first: Record) -> bool:
    """Whether a repeated question has another id and the same label."""
    ids = label.get("question_id", "id"), first.get("question_id", "id")
    return None not in ids and ids[0] != ids[1] and _label(label) == _label(first)


def _label(record: Record) -> str:
    label = record.text("label").strip().lower()
    if label not in ("yes", "no"):
        raise DataError(f"{record.where}: `label` is {label!r:.40}, expected yes or no")
    return label


def _percent(part: int, whole: int) -> float | None:
    return 100 * part / whole if whole else None


def _mean(splits: Sequence[Mapping[str, Json]]) -> dict[str, Json]:
    means: dict[str, Json] = {}
    for rate in RATES:
        values = [value for scores in splits if isinstance(value := scores[rate], float)]
        means[rate] = sum(values) / len(values) if len(values) == len(splits) else None
    return means
