"""POPE: is this object in the picture? Yes or no, half of each (Li et al. 2023, arXiv 2305.10355).

A label belongs to the question with its picture and its words. Files are never paired line by line: POPE's random
split has 2,910 questions in the version that LLaVA-1.5 was measured on and 3,000 today, in another order.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath

from pydantic import Field

from llavactl.components.tasks.image_questions import asked, picture, refuse_others
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

    questions: RecipePath = Field(description="JSONL or JSON list: question_id, image, text and category, the split")
    labels: RecipePaths = Field(
        (), description="POPE's files coco_pope_SPLIT.json, or their folder; without them the questions have a label"
    )
    images: RecipePlace | None = Field(
        None, description="folder, .zip, .tar or URL of the pictures; null: that of the questions"
    )
    follow_links: FollowLinks = False


class Pope:
    """The task ``pope``; see ``llavactl.core.protocols.Task``."""

    protocols = ("llava",)

    def __init__(self, options: PopeOptions) -> None:
        self.options = options

    def questions(self) -> Iterator[Question]:
        root = ImageRoot(str(self.options.images or self.options.questions.parent), self.options.follow_links)
        for name, (record, label, split) in self._labelled.items():
            yield Question(name, asked(picture(record, root), record.text("text")), label, split)

    def score(self, answers: Mapping[str, Answer], protocol: str) -> Scores:  # noqa: ARG002 - there is one
        """Scores over all, and by split where there are several, with the mean of the splits.

        ``failed`` counts answers without a word, which the protocol takes for yes.
        """
        refuse_others({name: stem(each[0].text("text")) for name, each in self._labelled.items()}, answers)
        pairs: dict[str, list[tuple[bool, bool]]] = {}
        right: dict[str, bool] = {}
        for name, (_, label, split) in self._labelled.items():
            if name in answers:
                yes = says_yes(answers[name].text)
                right[name] = yes == (label == "yes")
                pairs.setdefault(split, []).append((yes, label == "yes"))
        scores = rates([pair for each in pairs.values() for pair in each])
        groups = {split: rates(each) for split, each in pairs.items()} if len(pairs) > 1 else {}
        mean = {"mean": _mean(list(groups.values()))} if groups else {}
        failed = sum(not answers[name].text.strip() for name in right)
        return Scores({**scores, **groups, **mean}, failed, right)

    @cached_property
    def _labelled(self) -> Mapping[str, tuple[Record, str, str]]:
        """By question id: the question, ``yes`` or ``no``, and its split."""
        questions = unique(read_records(self.options.questions), "question_id", "id")
        if not self.options.labels:
            return {name: (each, _label(each), str(each.get("category") or "")) for name, each in questions.items()}
        labels = [(split_of(file), file, read_records(file)) for file in _files(self.options.labels)]
        twice = [split for split, count in Counter(split for split, _, _ in labels).items() if count > 1]
        if twice:
            raise DataError(f"labels: the split {twice[0]!r} is there twice", hint="name each file once")
        asked_of = _by_split(questions, [split for split, _, _ in labels])
        found = {}
        for split, file, records in labels:
            found.update(_join(asked_of[split], records, file, split))
        return found


def stem(text: str) -> str:
    """The question alone: LLaVA's files have how to answer it in a second line."""
    return " ".join(text.split("\n")[0].split())


def says_yes(text: str) -> bool:
    """LLaVA's reading (``eval_pope.py``): no if the first sentence has one of No, no, not as a word, else yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def rates(pairs: Sequence[tuple[bool, bool]]) -> dict[str, Json]:
    """Scores of (said yes, is yes) pairs, in percent; None for a share of nothing."""
    count = Counter(pairs)
    tp, fp, tn, fn = count[True, True], count[True, False], count[False, False], count[False, True]
    return {
        "accuracy": _share(tp + tn, len(pairs)),
        "precision": _share(tp, tp + fp),
        "recall": _share(tp, tp + fn),
        "f1": _share(2 * tp, 2 * tp + fp + fn),
        "yes_ratio": _share(tp + fp, len(pairs)),
        "tp": tp,
        "fp": fp,
        "tn": tn,
        "fn": fn,
    }


def split_of(file: Path) -> str:
    """``coco_pope_random.json`` → ``random``; the file's name without its suffix where it names no split."""
    return next((split for split in SPLITS if re.search(rf"(?<![a-z]){split}", file.stem)), file.stem)


def _files(given: Sequence[Path]) -> list[Path]:
    files = [file for path in given for file in (_inside(path) if path.is_dir() else [path])]
    if not files:
        raise DataError(f"{given[0]}: there are no labels in this folder", hint="POPE's are coco_pope_random.json, …")
    return files


def _inside(folder: Path) -> list[Path]:
    """A folder's files of labels: those with POPE's names, else all."""
    return sorted(folder.glob("coco_pope_*.json*")) or sorted(folder.glob("*.json*"))


def _by_split(questions: Mapping[str, Record], splits: Sequence[str]) -> dict[str, dict[str, Record]]:
    """The questions of each split; those of a split without labels are left out."""
    categories = {name: each.get("category") for name, each in questions.items()}
    if len(splits) == 1 and splits[0] not in categories.values():
        return {splits[0]: dict(questions)}
    if missing := [split for split in splits if split not in categories.values()]:
        known = sorted({str(category) for category in categories.values()})
        raise DataError(
            f"labels: no question has the category {missing[0]!r}", hint=f"the questions' are: {', '.join(known)}"
        )
    return {split: {name: questions[name] for name in questions if categories[name] == split} for split in splits}


def _join(
    questions: Mapping[str, Record], labels: Sequence[Record], file: Path, split: str
) -> dict[str, tuple[Record, str, str]]:
    """Each question with its label; every label has to have its question, too."""
    by_id = not all(label.get("image") and label.get("text") for label in labels)
    key = _id if by_id else _picture_and_words
    known: dict[tuple[str, str], Record] = {}
    for label in labels:
        # POPE's files for A-OKVQA and GQA ask one question twice, under two ids and with one label.
        if (first := known.setdefault(key(label), label)) is not label and not _another(label, first):
            raise DataError(f"{label.where}: the question of {first.where} again")
    wanted = {name: key(record) for name, record in questions.items()}
    alone = [name for name, at in wanted.items() if at not in known]
    beyond = len(known.keys() - set(wanted.values()))
    if alone or beyond:
        raise DataError(
            f"{file}: these labels are not those of the questions: {len(alone)} of {len(questions)} questions have "
            f"none, {beyond} of {len(labels)} labels have no question"
            + (f"; the first is {alone[0]!r}" if alone else ""),
            hint="the random split has 2,910 questions in LLaVA-1.5's version and 3,000 today, and popular and "
            "adversarial have changed, too: take the version that was asked",
        )
    return {name: (questions[name], _label(known[at]), split) for name, at in wanted.items()}


def _picture_and_words(record: Record) -> tuple[str, str]:
    return PurePosixPath(record.text("image")).name, stem(record.text("text"))


def _id(record: Record) -> tuple[str, str]:
    return "", record.name("question_id", "id")


def _another(label: Record, first: Record) -> bool:
    """Whether a question that is there again has an id of its own and the label that it had before."""
    ids = label.get("question_id", "id"), first.get("question_id", "id")
    return None not in ids and ids[0] != ids[1] and _label(label) == _label(first)


def _label(record: Record) -> str:
    label = record.text("label").strip().lower()
    if label not in ("yes", "no"):
        raise DataError(f"{record.where}: `label` is {label!r:.40}, not yes or no")
    return label


def _share(part: int, whole: int) -> float | None:
    return 100 * part / whole if whole else None


def _mean(groups: Sequence[Mapping[str, Json]]) -> dict[str, Json]:
    means: dict[str, Json] = {}
    for rate in RATES:
        known = [value for group in groups if isinstance(value := group[rate], float)]
        means[rate] = sum(known) / len(known) if len(known) == len(groups) else None
    return means
