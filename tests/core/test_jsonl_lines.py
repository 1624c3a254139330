"""JSONL lines end only at ``\n``: strings may contain other Unicode line separators unescaped."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llavactl.chat.inputs import read_batch
from llavactl.components.sources.llava_json import LlavaJson, LlavaJsonOptions
from llavactl.components.teachers.replay import Replay, ReplayOptions
from llavactl.core.protocols import Request
from llavactl.core.schema import Sample
from llavactl.curation.captions import read_captions
from llavactl.curation.inputs import file_source
from llavactl.evaluation.answers import read_answers
from llavactl.files.json_stream import read_stream
from llavactl.files.records import read_records
from llavactl.report.inputs import read_objects
from llavactl.training.metrics import read as read_metrics

ROOT = Path(__file__).parents[2]

SPLITLINES_ALLOWED = {
    "llavactl/core/library_errors.py": "an exception's message",
    "llavactl/evaluation/verification/script.py": "stderr of a process",
    "llavactl/components/tasks/coco_synonyms.py": "a table in the module",
    "llavactl/components/tasks/judging.py": "the first line of a judge's verdict",
    "llavactl/components/tasks/scenes.py": "lines of one answer",
    "llavactl/report/cases.py": "lines of one answer, indented for Markdown",
    "llavactl/report/card.py": "YAML",
    "benchmarks/train.py": "stdout of a process, /proc, a docstring",
}
"""Modules that may use ``splitlines``, and on what: never on JSONL, where it would split inside strings."""


def test_jsonl_is_never_read_with_splitlines() -> None:
    files = [path for folder in ("llavactl", "plugins", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    users = {
        str(path.relative_to(ROOT))
        for path in files
        if "tests" not in path.parts and {"splitlines(", "readlines("} & set(_calls(path))
    }
    assert users <= set(SPLITLINES_ALLOWED)


def _calls(path: Path) -> Iterator[str]:
    """Calls that split at other separators, except for the first line of an exception's message."""
    text = path.read_text(encoding="utf-8").replace("str(error).strip().splitlines()", "")
    yield from (call for call in ("splitlines(", "readlines(") if call in text)


SEPARATORS = "a\u2028b\u2029c\x85d\x7fe"
ESCAPED = "\x0b\x0c\x1c\x1d\x1e"
"""Control characters that JSON requires to be escaped."""


def _turns(text: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": text}]


READERS: dict[str, tuple[Callable[[str], dict[str, Any]], Callable[[Path], list[str]]]] = {
    "read_stream": (lambda text: {"x": text}, lambda file: [each.value["x"] for each in read_stream(file)]),
    "read_records": (lambda text: {"x": text}, lambda file: [each.fields["x"] for each in read_records(file)]),
    "llava-json": (
        lambda text: {"conversations": _turns(text)},
        lambda file: [each.turns[1].text for each in LlavaJson(LlavaJsonOptions(path=file))],
    ),
    "captions": (lambda text: {"caption": text}, lambda file: [each.text for each in read_captions(file_source(file))]),
    "answers": (
        lambda text: {"id": text.count("z"), "text": text},
        lambda file: [each.text for each in read_answers(file).values()],
    ),
    "chat --batch": (lambda text: {"prompt": text}, lambda file: [record["prompt"] for record, _ in read_batch(file)]),
    "replay": (lambda text: {"id": text.count("z"), "reply": text}, lambda file: [_reply(file, n) for n in range(3)]),
    "metrics": (lambda text: {"step": 1, "x": text}, lambda file: [each["x"] for each in read_metrics(file)]),
    "report": (lambda text: {"x": text}, lambda file: [each["x"] for each in read_objects(file)]),
}


def _reply(file: Path, number: int) -> str:
    return Replay(ReplayOptions(path=file)).reply(Request(str(number), "detail", (), Sample("", ()))).text


@pytest.mark.parametrize("reader", READERS)
def test_readers_of_jsonl_keep_line_separators_in_strings(reader: str, tmp_path: Path) -> None:
    record, read = READERS[reader]
    texts = [f"{SEPARATORS}{ESCAPED}e{'z' * number}" for number in range(3)]
    file = tmp_path / "lines.jsonl"
    lines = [json.dumps(record(text), ensure_ascii=False) for text in texts]
    assert all("\u2028" in line for line in lines)
    for end in ("\n", "\r\n"):
        file.write_text("".join(line + end for line in lines), encoding="utf-8", newline="")
        assert read(file) == texts
