"""Files of answers: our own, and those that benchmarks and other programs leave behind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from llavactl.core.errors import DataError
from llavactl.core.protocols import Finds
from llavactl.core.records import Record, read_records, read_text
from llavactl.core.schema import Answer

IDS = ("question_id", "id", "questionId", "image_id")
TEXTS = ("text", "answer", "pred", "caption")
"""What published files call a question's id and the answer to it."""


def read_answers(file: Path, task: object = None, *, cut: bool = False) -> dict[str, Answer]:
    """Answers by question id; with ``cut`` a last line may be half written and is left out.

    ``task`` may know what others call its questions (``llavactl.core.protocols.Finds``).

    One object an answer, as a JSON list or in lines, ``{"question_id" or "id", "text"}``; or LLaVA's files
    for ScienceQA: ``{"correct": […], "incorrect": […]}``, and ``{"results": {id: index}, "outputs": {id: text}}``,
    either of the two alone, too; or MME's folder of ``CATEGORY.txt``: picture, question, what is right, answer.

    Raises:
        DataError: a file or an answer that isn't one, or a question answered twice.
    """
    tables = sorted(file.glob("*.txt")) if file.is_dir() else []
    records = [row for each in tables for row in _rows(each)] or read_records(file, cut=cut)
    whole = records[0].fields if len(records) == 1 else {}
    answers: dict[str, Answer] = {}
    if isinstance(whole.get("results"), dict):
        return {answer.id: answer for answer in _by_index(file, whole)}
    if isinstance(whole.get("outputs"), dict):
        records = [Record(f"{file} outputs", {"id": name, "text": text}) for name, text in whole["outputs"].items()]
    if isinstance(whole.get("correct"), list) and isinstance(whole.get("incorrect"), list):
        records = [
            Record(f"{file} {key} {at}", each) for key in ("correct", "incorrect") for at, each in enumerate(whole[key])
        ]
    for record in records:
        answer = _answer(record)
        if isinstance(task, Finds):
            answer = replace(answer, id=task.id_of(answer))
        if answer.id in answers:
            raise DataError(f"{record.where}: question {answer.id!r} is answered twice")
        answers[answer.id] = answer
    return answers


def _answer(record: Record) -> Answer:
    if isinstance(record.fields, Mapping):
        name, text = record.get(*IDS), record.get(*TEXTS)
        if isinstance(name, str | int) and not isinstance(name, bool) and isinstance(text, str):
            return Answer(str(name), text, {key: value for key, value in record.fields.items() if key not in TEXTS})
    raise DataError(f'{record.where}: an answer is {{"id": …, "text": …}}, not {record.fields!r:.80}')


def _rows(file: Path) -> Iterator[Record]:
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        cells = line.rstrip("\r").split("\t")
        if len(cells) != 4:
            raise DataError(
                f"{file}:{number}: not picture, question, what is right and the answer with tabs between",
                hint="is the file cut?",
            )
        yield Record(f"{file}:{number}", {"id": f"{file.stem}/{cells[0]}", "prompt": cells[1], "text": cells[3]})


def _by_index(file: Path, whole: Mapping[str, Any]) -> Iterator[Answer]:
    """Chosen options by their place from 0, -1 for none; the text is the output, where it is there."""
    outputs = whole.get("outputs")
    if outputs is not None and (not isinstance(outputs, dict) or outputs.keys() != whole["results"].keys()):
        raise DataError(f"{file}: `outputs` are not those of the questions in `results`")
    for name, index in whole["results"].items():
        if isinstance(index, str) and index.isascii() and index.removeprefix("-").isdecimal():
            index = int(index)
        if isinstance(index, bool) or not isinstance(index, int) or not -1 <= index < len(ascii_uppercase):
            raise DataError(f"{file}: `results` of question {name!r} is {index!r:.40}, not an option's place")
        text = outputs[name] if outputs is not None else ascii_uppercase[index] if index >= 0 else ""
        if not isinstance(text, str):
            raise DataError(f"{file}: `outputs` of question {name!r} is {text!r:.40}, not text")
        yield Answer(name, text, {"index": index})
