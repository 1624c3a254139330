"""ScienceQA's problems (Lu et al. 2022, arXiv 2209.09513): its ``problems.json``, or LLaVA's conversion of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from llavactl.core.errors import DataError
from llavactl.core.schema import ImageRef
from llavactl.files.records import Record, read_document, read_records, read_table, unique
from llavactl.images.references import ImageRoot, image_in

SUBJECTS = ("natural science", "social science", "language science")
IMAGE = "<image>"


@dataclass(frozen=True)
class ScienceqaProblem:
    """One problem: what is asked in words, its options' number, and which one is right, from 0."""

    id: str
    prompt: str
    options: int
    right: int
    image: ImageRef | None
    context: bool
    subject: str
    grade: int
    lecture: str = ""
    solution: str = ""

    @property
    def letter(self) -> str:
        """The right option's letter."""
        return ascii_uppercase[self.right]


def read_problems(
    path: Path,
    split: str,
    splits: Path | None,
    meta: Path | None,
    images: Path | str | None,
    *,
    follow_links: bool = False,
) -> list[ScienceqaProblem]:
    """The problems of ``split`` of a ``problems.json``, or all of LLaVA's converted file, in the file's order.

    Raises:
        DataError: what can't be read, an id twice, or a converted file without ``meta``.
    """
    document = read_document(path)
    if isinstance(document, dict) and document and all(isinstance(each, dict) for each in document.values()):
        beside = path.parent / "images"
        place = ImageRoot(str(images or (beside if beside.is_dir() else path.parent)), follow_links)
        return list(_original(path, document, _ids(path, document, split, splits), place))
    if not isinstance(document, list):
        raise DataError(f"{path}: neither ScienceQA's problems.json nor LLaVA's list of conversations")
    if meta is None:
        raise DataError(
            f"{path}: LLaVA's file does not say subject and grade of a problem",
            hint="-t meta=FILE, a CSV of question_id, grade, subject",
        )
    place = ImageRoot(str(images or path.parent), follow_links)
    return list(_converted(unique(read_records(path), "id"), _meta(meta), place))


def _ids(path: Path, problems: Mapping[str, Any], split: str, splits: Path | None) -> list[str]:
    """The ids of ``split``: as ``pid_splits.json`` has them, else those whose ``split`` it is, all if none has any."""
    if splits is None and not any(each.get("split") for each in problems.values()):
        return list(problems)
    if splits is None:
        ids = [name for name, each in problems.items() if each.get("split") == split]
        known = sorted({str(each.get("split")) for each in problems.values()})
    else:
        document = read_document(splits)
        if not isinstance(document, dict):
            raise DataError(f"{splits}: not an object of splits")
        ids, known = [str(each) for each in document.get(split, [])], sorted(document)
    if not ids:
        raise DataError(f"{splits or path}: there is no split {split!r}", hint=f"available: {', '.join(known)}")
    if missing := [name for name in ids if name not in problems]:
        raise DataError(
            f"{path}: {len(missing)} problems of the split {split!r} are missing, the first is {missing[0]!r}"
        )
    return ids


def _original(
    path: Path, problems: Mapping[str, Any], ids: Sequence[str], place: ImageRoot
) -> Iterator[ScienceqaProblem]:
    for name in ids:
        record = Record(f"{path} problem {name}", problems[name])
        choices, right = record.get("choices"), record.get("answer")
        if not isinstance(choices, list) or not all(isinstance(each, str) for each in choices):
            raise DataError(f"{record.where}: `choices` is not a list of texts")
        if isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < len(choices):
            raise DataError(
                f"{record.where}: `answer` is {right!r:.40}, not the place of one of {len(choices)} choices"
            )
        hint = str(record.get("hint") or "")
        options = " ".join(f"({letter}) {each}" for letter, each in zip(ascii_uppercase, choices, strict=False))
        prompt = f"{record.text('question')}\nContext: {hint.strip() or 'N/A'}\nOptions: {options}"
        yield ScienceqaProblem(
            name,
            prompt.replace("  ", " "),
            len(choices),
            right,
            _image(record, place, f"{record.fields.get('split')}/{name}/{record.get('image')}"),
            bool(hint),
            *_subject_and_grade(record),
            str(record.get("lecture") or ""),
            str(record.get("solution") or ""),
        )


def _converted(
    records: Mapping[str, Record], meta: Mapping[str, Record], place: ImageRoot
) -> Iterator[ScienceqaProblem]:
    if missing := [name for name in records if name not in meta]:
        raise DataError(
            f"meta: {len(missing)} of {len(records)} problems are not in it, the first is {missing[0]!r}",
            hint="is it the CSV of this benchmark's question_id, grade, subject?",
        )
    for name, record in records.items():
        question, answer = _talk(record)
        prompt = question.replace(IMAGE, "").strip()
        count = len(_lettered(prompt))
        right = _gold(answer)
        if right is None or not right < count:
            raise DataError(f"{record.where}: no option of {count} is told right by {answer!r:.60}")
        image = _image(record, place, str(record.get("image")))
        context = re.search(r"(?:\A|\n)Context: (?!N/A\n)", prompt) is not None
        yield ScienceqaProblem(name, prompt, count, right, image, context, *_subject_and_grade(meta[name]))


def _image(record: Record, place: ImageRoot, path: str) -> ImageRef | None:
    if not record.get("image"):
        return None
    try:
        return image_in(place, path)
    except DataError as error:
        raise DataError(f"{record.where}: {error.message}", hint=error.hint) from error


def _talk(record: Record) -> tuple[str, str]:
    """The question and the answer."""
    said = record.get("conversations")
    told = [each.get("value") for each in said if isinstance(each, dict)] if isinstance(said, list) else []
    values = [value for value in told if isinstance(value, str)]
    if len(values) != 2 or len(told) != 2:
        raise DataError(f"{record.where}: not a question with its answer in `conversations`")
    return values[0], values[1]


def _lettered(prompt: str) -> list[str]:
    """The letters of the options in a prompt: ``A. …`` in lines of their own, or ``(A) …`` in one of ``Options:``."""
    _, options, last = prompt.rpartition("\nOptions: ")
    if options:
        return re.findall(r"(?:\A| )\(([A-Z])\) ", last)
    letters: list[str] = []
    for line in reversed(prompt.split("\n")):
        # An option may run over several lines, so what is no option is passed until the first one.
        if match := re.match(r"([A-Z])\. ", line):
            letters.insert(0, match[1])
            if match[1] == "A":
                break
    return letters


def _gold(answer: str) -> int | None:
    """``B``, ``… The answer is B.`` or ``… ANSWER: B.``."""
    match = re.fullmatch(r"(?s)(?:.*(?:The answer is|ANSWER:) )?([A-Z])\.?", answer.strip())
    return ascii_uppercase.index(match[1]) if match else None


def _meta(path: Path) -> dict[str, Record]:
    return unique(read_table(path, "question_id", "grade", "subject"), "question_id", what="problem")


def _subject_and_grade(record: Record) -> tuple[str, int]:
    subject, grade = str(record.get("subject")).strip(), str(record.get("grade")).strip().removeprefix("grade")
    if subject not in SUBJECTS:
        raise DataError(f"{record.where}: `subject` is {subject!r:.40}, not one of {', '.join(SUBJECTS)}")
    if not (grade.isascii() and grade.isdecimal() and 1 <= int(grade) <= 12):
        raise DataError(f"{record.where}: `grade` is {grade!r:.40}, not 1 to 12")
    return subject, int(grade)
