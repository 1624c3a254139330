"""Answer files: llavactl's own, and those of published benchmarks and other programs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from llavactl.core.errors import DataError
from llavactl.core.protocols import AnswerMatcher
from llavactl.core.schema import Answer, Question
from llavactl.files.json_parse import TRUNCATED_HINT
from llavactl.files.records import Record, read_records
from llavactl.files.text import read_text

ID_KEYS = ("question_id", "id", "questionId", "image_id")
TEXT_KEYS = ("text", "answer", "pred", "caption")
"""Keys of a question's id and of the model's answer in published files, in order of precedence."""

LIST_KEYS = ("resps", "filtered_resps")
"""lmms-eval's keys for a model's answers, which are lists."""

METADATA_KEYS = frozenset(
    "question prompt image images image_path image_file file_name category type split subject topic source "  # noqa: SIM905
    "target model model_id model_name answer_id label gt gt_answer gt_ans ground_truth reference hint context".split()
)
"""Keys that never hold a model's answer."""

SUPPORTED = (
    f"supported: a JSON list or JSONL with one object per answer (key of the question's id: {', '.join(ID_KEYS)}; "
    f"key of the answer: {', '.join(TEXT_KEYS)}); LLaVA's files for ScienceQA; MME's folder of CATEGORY.txt"
)
_MAX_NAMES = 10


def read_answers(file: Path, task: object = None, *, truncated: bool = False) -> dict[str, Answer]:
    """Answers by question id. With ``truncated``, an incomplete last line is ignored.

    ``task`` may map ids of published answer files to its own (``llavactl.core.protocols.AnswerMatcher``).

    Supported layouts:

    - one object per answer, as a JSON list or JSONL: ``{"question_id" or "id", "text"}``
    - LLaVA's files for ScienceQA: ``{"correct": […], "incorrect": […]}``, and ``{"results": {id: option index},
      "outputs": {id: text}}`` or one of the two
    - MME's folder of ``CATEGORY.txt``: image, question, reference and answer, separated by tabs

    Raises:
        DataError: an unsupported file, an invalid answer, or a duplicate answer to a question.
    """
    _check_file_type(file)
    tables = sorted(file.glob("*.txt")) if file.is_dir() else []
    records = [row for table in tables for row in _mme_rows(table)] or read_records(file, truncated=truncated)
    document = records[0].fields if len(records) == 1 else {}
    if isinstance(document.get("results"), dict):
        return {answer.id: answer for answer in _answers_by_index(file, document)}
    if isinstance(document.get("outputs"), dict):
        records = [Record(f"{file} outputs", {"id": name, "text": text}) for name, text in document["outputs"].items()]
    if isinstance(document.get("correct"), list) and isinstance(document.get("incorrect"), list):
        records = [
            Record(f"{file} {key} {index}", fields)
            for key in ("correct", "incorrect")
            for index, fields in enumerate(document[key])
        ]
    answers: dict[str, Answer] = {}
    for record in records:
        answer = _answer(record)
        if isinstance(task, AnswerMatcher):
            answer = replace(answer, id=task.id_of(answer))
        if answer.id in answers:
            raise DataError(
                f"{record.where}: duplicate answer to question {answer.id!r}", hint="keep one answer per question"
            )
        answers[answer.id] = answer
    return answers


def _answer(record: Record) -> Answer:
    if not isinstance(record.fields, Mapping):
        raise DataError(f"{record.where}: expected an object, got {record.fields!r:.60}", hint=SUPPORTED)
    question_id, text = record.get(*ID_KEYS), record.get(*TEXT_KEYS)
    keys = f"keys: {_listing([str(key) for key in record.fields])}"
    for name, value in (("question id", question_id), ("answer text", text)):
        if value is None:
            raise DataError(f"{record.where}: missing {name}; {keys}", hint=SUPPORTED)
    if isinstance(question_id, bool) or not isinstance(question_id, str | int):
        raise DataError(
            f"{record.where}: the question id is {question_id!r:.40}, expected a string or an integer; {keys}",
            hint=SUPPORTED,
        )
    if not isinstance(text, str):
        raise DataError(f"{record.where}: the answer is {text!r:.40}, expected a string; {keys}", hint=SUPPORTED)
    if record.get("text") is None and record.get("answer") is not None and (other := _ambiguous_key(record)):
        raise DataError(
            f"{record.where}: ambiguous: either `answer` or `{other}` may be the model's answer; {keys}",
            hint="rename the key of the model's answer to `text`",
        )
    return Answer(str(question_id), text, {key: value for key, value in record.fields.items() if key not in TEXT_KEYS})


def _ambiguous_key(record: Record) -> str:
    """A key that may hold the model's answer while ``answer`` holds the reference; or ""."""
    for key, value in record.fields.items():
        may_be_answer = isinstance(value, str) or key in LIST_KEYS
        if may_be_answer and key not in (*ID_KEYS, *METADATA_KEYS) and value not in ("", record.get("answer")):
            return str(key)
    return ""


def check_not_questions(file: Path, questions: Iterable[Question], answers: Mapping[str, Answer]) -> None:
    """Raises DataError if every answer repeats its question: ``file`` is then a question file, not an answer file."""
    pairs = [(question.turns[-1].text, answers[question.id].text) for question in questions if question.id in answers]
    if pairs and all(len(answer.split()) > 2 and _normalized(answer) in _normalized(text) for text, answer in pairs):
        raise DataError(
            f"{file}: every answer repeats its question: {pairs[0][1]!r:.60}",
            hint="expected a model's answers, with `text`; is this the question file?",
        )


def _normalized(text: str) -> str:
    return " ".join(text.casefold().split())


def _listing(names: Sequence[str]) -> str:
    return ", ".join([*names[:_MAX_NAMES], *(["…"] if len(names) > _MAX_NAMES else [])]) or "none"


def _check_file_type(file: Path) -> None:
    """Raises DataError if ``file`` is neither JSON nor MME's folder; the message names the detected type."""
    if file.is_dir():
        if not any(file.glob("*.txt")):
            names = sorted(path.name for path in file.iterdir())
            raise DataError(f"{file}: no CATEGORY.txt in this folder; files: {_listing(names)}", hint=SUPPORTED)
        return
    try:
        with file.open("rb") as opened:
            head = opened.read(4096)
    except OSError:
        return  # read_records raises the error
    if head.startswith((b"PK\3\4", b"\xd0\xcf\x11\xe0", b"\x80\4", b"\x80\5", b"PAR1", b"\x1f\x8b")):
        raise DataError(
            f"{file}: expected JSON, got a binary file (workbook, archive, pickle or Parquet table)", hint=SUPPORTED
        )
    line = head.decode("utf-8-sig", "replace").lstrip().partition("\n")[0].rstrip("\r")
    separator = "\t" if "\t" in line else ","
    if line and line[0] not in "[{" and separator in line:
        columns = [cell.strip('"') for cell in line.split(separator)]
        raise DataError(f"{file}: expected JSON, got a table; columns: {_listing(columns):.200}", hint=SUPPORTED)


def _mme_rows(file: Path) -> Iterator[Record]:
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        cells = line.rstrip("\r").split("\t")
        if len(cells) != 4:
            raise DataError(
                f"{file}:{number}: expected image, question, reference and answer separated by tabs, "
                f"got {len(cells)} columns",
                hint=TRUNCATED_HINT,
            )
        yield Record(f"{file}:{number}", {"id": f"{file.stem}/{cells[0]}", "prompt": cells[1], "text": cells[3]})


def _answers_by_index(file: Path, document: Mapping[str, Any]) -> Iterator[Answer]:
    """Answers of LLaVA's ``results``: the index of the chosen option from 0, or -1 for none.

    The text is that of ``outputs``, or the option's letter without ``outputs``.
    """
    outputs = document.get("outputs")
    if outputs is not None and (not isinstance(outputs, dict) or outputs.keys() != document["results"].keys()):
        raise DataError(f"{file}: `outputs` and `results` have different questions")
    for question_id, index in document["results"].items():
        if isinstance(index, str) and index.isascii() and index.removeprefix("-").isdecimal():
            index = int(index)
        if isinstance(index, bool) or not isinstance(index, int) or not -1 <= index < len(ascii_uppercase):
            raise DataError(
                f"{file}: `results` of question {question_id!r} is {index!r:.40}, expected the index of an option; "
                f"keys of the file: {_listing(list(document))}",
                hint=SUPPORTED,
            )
        text = outputs[question_id] if outputs is not None else ascii_uppercase[index] if index >= 0 else ""
        if not isinstance(text, str):
            raise DataError(f"{file}: `outputs` of question {question_id!r} is {text!r:.40}, expected a string")
        yield Answer(question_id, text, {"index": index})
