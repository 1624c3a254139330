"""Files of answers: our own, and those that benchmarks and other programs leave behind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from llavactl.core.errors import DataError
from llavactl.core.protocols import AnswerMatcher
from llavactl.core.schema import Answer, Question
from llavactl.files.records import Record, read_records
from llavactl.files.text import read_text

IDS = ("question_id", "id", "questionId", "image_id")
TEXTS = ("text", "answer", "pred", "caption")
"""What published files call a question's id and the answer to it."""

LISTS = ("resps", "filtered_resps")
"""lmms-eval's keys for a model's answers, which are lists."""

ABOUT = frozenset(
    "question prompt image images image_path image_file file_name category type split subject topic source "  # noqa: SIM905
    "target model model_id model_name answer_id label gt gt_answer gt_ans ground_truth reference hint context".split()
)
"""Keys that never are a model's answer."""

ACCEPTED = (
    f"supported: one object per answer, as a JSON list or JSONL, with the question's id as {', '.join(IDS)} and the "
    f"answer as {', '.join(TEXTS)}; LLaVA's files for ScienceQA; MME's folder of CATEGORY.txt"
)
_SHOWN = 10


def read_answers(file: Path, task: object = None, *, cut: bool = False) -> dict[str, Answer]:
    """Answers by question id; with ``cut`` a last line may be half written and is left out.

    ``task`` may know what others call its questions (``llavactl.core.protocols.AnswerMatcher``).

    One object an answer, as a JSON list or in lines, ``{"question_id" or "id", "text"}``; or LLaVA's files
    for ScienceQA: ``{"correct": […], "incorrect": […]}``, and ``{"results": {id: index}, "outputs": {id: text}}``,
    either of the two alone, too; or MME's folder of ``CATEGORY.txt``: picture, question, what is right, answer.

    Raises:
        DataError: a file or an answer that isn't one, or a question answered twice.
    """
    _refuse_other_kinds(file)
    tables = sorted(file.glob("*.txt")) if file.is_dir() else []
    records = [row for each in tables for row in _rows(each)] or read_records(file, truncated=cut)
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
        if isinstance(task, AnswerMatcher):
            answer = replace(answer, id=task.id_of(answer))
        if answer.id in answers:
            raise DataError(f"{record.where}: question {answer.id!r} is answered twice")
        answers[answer.id] = answer
    return answers


def _answer(record: Record) -> Answer:
    if not isinstance(record.fields, Mapping):
        raise DataError(f"{record.where}: expected an answer, found {record.fields!r:.60}", hint=ACCEPTED)
    name, text = record.get(*IDS), record.get(*TEXTS)
    keys = f"its keys are {_few([str(key) for key in record.fields])}"
    for what, value in (("id", name), ("text", text)):
        if value is None:
            raise DataError(f"{record.where}: an answer without {what}: {keys}", hint=ACCEPTED)
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise DataError(f"{record.where}: an answer with invalid id {name!r:.40}; {keys}", hint=ACCEPTED)
    if not isinstance(text, str):
        raise DataError(f"{record.where}: an answer with invalid text {text!r:.40}; {keys}", hint=ACCEPTED)
    if record.get("text") is None and record.get("answer") is not None and (other := _other(record)):
        raise DataError(
            f"{record.where}: ambiguous: either `answer` or `{other}` may be the model's answer; {keys}",
            hint="rename the model's answer to `text`",
        )
    return Answer(str(name), text, {key: value for key, value in record.fields.items() if key not in TEXTS})


def _other(record: Record) -> str:
    """A key beside ``answer`` that may be the model's answer, and ``answer`` then the ground truth; or ""."""
    for key, value in record.fields.items():
        said = isinstance(value, str) or key in LISTS
        if said and key not in (*IDS, *ABOUT) and value not in ("", record.get("answer")):
            return str(key)
    return ""


def refuse_echoes(file: Path, questions: Iterable[Question], answers: Mapping[str, Answer]) -> None:
    """Raises DataError if every answer is its question: ``file`` is one of questions, or has them as ``text``."""
    answered = [(asked.turns[-1].text, answers[asked.id].text) for asked in questions if asked.id in answers]
    if answered and all(len(said.split()) > 2 and _plain(said) in _plain(asked) for asked, said in answered):
        raise DataError(
            f"{file}: every answer repeats its question: {answered[0][1]!r:.60}",
            hint="`--answers` takes a model's answers, as `text`; is this the file of questions?",
        )


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _few(names: Sequence[str]) -> str:
    return ", ".join([*names[:_SHOWN], *(["…"] if len(names) > _SHOWN else [])]) or "none"


def _refuse_other_kinds(file: Path) -> None:
    """Raises DataError if ``file`` is neither JSON nor MME's folder, saying what it seems to be."""
    if file.is_dir():
        if not any(file.glob("*.txt")):
            names = sorted(path.name for path in file.iterdir())
            raise DataError(f"{file}: a folder without CATEGORY.txt; it contains {_few(names)}", hint=ACCEPTED)
        return
    try:
        with file.open("rb") as opened:
            head = opened.read(4096)
    except OSError:
        return  # reading it raises the error
    if head.startswith((b"PK\3\4", b"\xd0\xcf\x11\xe0", b"\x80\4", b"\x80\5", b"PAR1", b"\x1f\x8b")):
        raise DataError(f"{file}: a binary file (a workbook, an archive, a pickle or a table), not JSON", hint=ACCEPTED)
    line = head.decode("utf-8-sig", "replace").lstrip().partition("\n")[0].rstrip("\r")
    separator = "\t" if "\t" in line else ","
    if line and line[0] not in "[{" and separator in line:
        columns = [each.strip('"') for each in line.split(separator)]
        raise DataError(f"{file}: a table, not JSON: its columns are {_few(columns):.200}", hint=ACCEPTED)


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
            raise DataError(
                f"{file}: `results` of question {name!r} is {index!r:.40}, expected an option's index; "
                f"the file's keys are {_few(list(whole))}",
                hint=ACCEPTED,
            )
        text = outputs[name] if outputs is not None else ascii_uppercase[index] if index >= 0 else ""
        if not isinstance(text, str):
            raise DataError(f"{file}: `outputs` of question {name!r} is {text!r:.40}, not text")
        yield Answer(name, text, {"index": index})
