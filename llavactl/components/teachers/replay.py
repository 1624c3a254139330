"""The teacher ``replay``: recorded replies from JSONL, a run's journal, or ScienceQA's result files."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from llavactl.core.errors import DataError
from llavactl.core.options import RecipePath
from llavactl.core.protocols import Reply, Request
from llavactl.core.registry import Options
from llavactl.files.json_stream import read_stream
from llavactl.files.records import given_id, read_document


class ReplayOptions(Options):
    """Options of the teacher ``replay``."""

    path: RecipePath = Field(
        description='JSONL of {"id", "reply"}, the .replies.sqlite of a run, or JSON of {"outputs": {id: reply}}'
    )


class Replay:
    """The teacher ``replay``: finds replies by request id (``000000001-detail``).

    Raises:
        DataError: the file is unreadable.
    """

    def __init__(self, options: ReplayOptions) -> None:
        self.options = options
        self._replies = _read_replies(options.path)

    def reply(self, request: Request) -> Reply:
        """Raises DataError if the file has no reply to the request."""
        if request.id not in self._replies:
            raise DataError(f"{self.options.path}: no reply for {request.id}")
        return self._replies[request.id]


def _read_replies(path: Path) -> dict[str, Reply]:
    if not path.is_file():
        raise DataError(f"{path}: no such file", hint='expected a JSONL file of {"id", "reply"}')
    if path.suffix == ".json" and (outputs := _read_outputs(path)) is not None:
        return outputs
    return dict(_read_journal(path) if path.suffix == ".sqlite" else _read_jsonl(path))


def _read_outputs(path: Path) -> dict[str, Reply] | None:
    """The replies in a result file of ScienceQA's scripts; None if it isn't one."""
    document = read_document(path)
    outputs = document.get("outputs") if isinstance(document, dict) else None
    if not isinstance(outputs, dict):
        return None
    if invalid := [name for name, text in outputs.items() if not isinstance(text, str)]:
        raise DataError(f"{path}: outputs.{invalid[0]}: expected a string")
    return {name: Reply(text) for name, text in outputs.items()}


def _read_jsonl(path: Path) -> Iterator[tuple[str, Reply]]:
    for entry in read_stream(path):
        record = entry.value
        name = given_id(record) if isinstance(record, dict) else None
        if name is None or not isinstance(record.get("reply"), str):
            why = entry.problem or 'expected {"id", "reply"}'
            raise DataError(f"{path}:{entry.location}: not a recorded reply: {why}")
        yield name, Reply(record["reply"])


def _read_journal(path: Path) -> Iterator[tuple[str, Reply]]:
    """In the order they were stored: the last reply to a request counts."""
    try:
        database: Any = sqlite3.connect(path)
        try:
            rows = database.execute("select id, text, finish from attempts where state = 'reply' order by number")
            yield from ((name, Reply(text, finish=finish)) for name, text, finish in rows)
        finally:
            database.close()
    except sqlite3.Error as error:
        raise DataError(
            f"{path}: not a journal of replies: {error}", hint="expected the .replies.sqlite of a run"
        ) from error
