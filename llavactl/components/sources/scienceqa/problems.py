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
    """One problem; ``options`` is their number, ``right`` the index of the correct one, from 0."""

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
        """The letter of the correct option."""
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
        DataError: a file or problem can't be read, a duplicate id, or a converted file without ``meta``.
    """
    document = read_document(path)
    if isinstance(document, dict) and document and all(isinstance(problem, dict) for problem in document.values()):
        default = path.parent / "images"
        root = ImageRoot(str(images or (default if default.is_dir() else path.parent)), follow_links)
        return list(_original(path, document, _ids(path, document, split, splits), root))
    if not isinstance(document, list):
        raise DataError(f"{path}: neither ScienceQA's problems.json nor LLaVA's list of conversations")
    if meta is None:
        raise DataError(
            f"{path}: LLaVA's file lacks the problems' subjects and grades",
            hint="-t meta=FILE, a CSV of question_id, grade, subject",
        )
    root = ImageRoot(str(images or path.parent), follow_links)
    return list(_converted(unique(read_records(path), "id"), _meta(meta), root))


def _ids(path: Path, problems: Mapping[str, Any], split: str, splits: Path | None) -> list[str]:
    """The ids of ``split`` in ``splits`` (pid_splits.json), else by each problem's ``split``; all if none has one."""
    if splits is None and not any(problem.get("split") for problem in problems.values()):
        return list(problems)
    if splits is None:
        ids = [name for name, problem in problems.items() if problem.get("split") == split]
        known = sorted({str(problem.get("split")) for problem in problems.values()})
    else:
        document = read_document(splits)
        if not isinstance(document, dict):
            raise DataError(f"{splits}: expected an object of splits")
        ids, known = [str(name) for name in document.get(split, [])], sorted(document)
    if not ids:
        raise DataError(f"{splits or path}: unknown split {split!r}", hint=f"available: {', '.join(known)}")
    if missing := [name for name in ids if name not in problems]:
        raise DataError(
            f"{path}: {len(missing)} problems of the split {split!r} are missing, the first is {missing[0]!r}"
        )
    return ids


def _original(
    path: Path, problems: Mapping[str, Any], ids: Sequence[str], root: ImageRoot
) -> Iterator[ScienceqaProblem]:
    for name in ids:
        record = Record(f"{path} problem {name}", problems[name])
        choices, right = record.get("choices"), record.get("answer")
        if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
            raise DataError(f"{record.where}: `choices`: expected a list of strings")
        if isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < len(choices):
            raise DataError(
                f"{record.where}: `answer`: expected the index of one of {len(choices)} choices, got {right!r:.40}"
            )
        hint = str(record.get("hint") or "")
        options = " ".join(f"({letter}) {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False))
        prompt = f"{record.text('question')}\nContext: {hint.strip() or 'N/A'}\nOptions: {options}"
        yield ScienceqaProblem(
            name,
            prompt.replace("  ", " "),
            len(choices),
            right,
            _image(record, root, f"{record.fields.get('split')}/{name}/{record.get('image')}"),
            bool(hint),
            *_subject_and_grade(record),
            str(record.get("lecture") or ""),
            str(record.get("solution") or ""),
        )


def _converted(
    records: Mapping[str, Record], meta: Mapping[str, Record], root: ImageRoot
) -> Iterator[ScienceqaProblem]:
    if missing := [name for name in records if name not in meta]:
        raise DataError(
            f"meta: {len(missing)} of {len(records)} problems are missing, the first is {missing[0]!r}",
            hint="expected this benchmark's CSV of question_id, grade, subject",
        )
    for name, record in records.items():
        question, answer = _question_and_answer(record)
        prompt = question.replace(IMAGE, "").strip()
        count = len(_option_letters(prompt))
        right = _answer_index(answer)
        if right is None or not right < count:
            raise DataError(f"{record.where}: the answer {answer!r:.60} names none of the {count} options")
        image = _image(record, root, str(record.get("image")))
        context = re.search(r"(?:\A|\n)Context: (?!N/A\n)", prompt) is not None
        yield ScienceqaProblem(name, prompt, count, right, image, context, *_subject_and_grade(meta[name]))


def _image(record: Record, root: ImageRoot, path: str) -> ImageRef | None:
    if not record.get("image"):
        return None
    try:
        return image_in(root, path)
    except DataError as error:
        raise DataError(f"{record.where}: {error.message}", hint=error.hint) from error


def _question_and_answer(record: Record) -> tuple[str, str]:
    messages = record.get("conversations")
    values = [each.get("value") for each in messages if isinstance(each, dict)] if isinstance(messages, list) else []
    match values:
        case [str() as question, str() as answer]:
            return question, answer
    raise DataError(f"{record.where}: `conversations`: expected a question and its answer")


def _option_letters(prompt: str) -> list[str]:
    """The letters of the options in a prompt: lines ``A. …``, or ``(A) …`` within the line ``Options:``."""
    _, options, last = prompt.rpartition("\nOptions: ")
    if options:
        return re.findall(r"(?:\A| )\(([A-Z])\) ", last)
    letters: list[str] = []
    for line in reversed(prompt.split("\n")):
        # An option may span several lines, so other lines are skipped up to option A.
        if match := re.match(r"([A-Z])\. ", line):
            letters.insert(0, match[1])
            if match[1] == "A":
                break
    return letters


def _answer_index(answer: str) -> int | None:
    """The index of the letter in ``B``, ``… The answer is B.`` or ``… ANSWER: B.``."""
    match = re.fullmatch(r"(?s)(?:.*(?:The answer is|ANSWER:) )?([A-Z])\.?", answer.strip())
    return ascii_uppercase.index(match[1]) if match else None


def _meta(path: Path) -> dict[str, Record]:
    return unique(read_table(path, "question_id", "grade", "subject"), "question_id", what="problem")


def _subject_and_grade(record: Record) -> tuple[str, int]:
    subject, grade = str(record.get("subject")).strip(), str(record.get("grade")).strip().removeprefix("grade")
    if subject not in SUBJECTS:
        raise DataError(f"{record.where}: `subject`: expected one of {', '.join(SUBJECTS)}, got {subject!r:.40}")
    if not (grade.isascii() and grade.isdecimal() and 1 <= int(grade) <= 12):
        raise DataError(f"{record.where}: `grade`: expected 1 to 12, got {grade!r:.40}")
    return subject, int(grade)
