"""Replies that were recorded: from JSONL, what a run kept beside its ``out``, or a file of results of ScienceQA."""

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
    """The teacher ``replay``: by the request's id, its kind ending it (``000000001-detail``).

    Raises:
        DataError: its file can't be read; at once, for else each request would be refused for it.
    """

    def __init__(self, options: ReplayOptions) -> None:
        self.options = options
        self._recorded = _recorded(options.path)

    def reply(self, request: Request) -> Reply:
        """Raises DataError when there is none for the request."""
        if request.id not in self._recorded:
            raise DataError(f"{self.options.path} has no reply for {request.id}")
        return self._recorded[request.id]


def _recorded(path: Path) -> dict[str, Reply]:
    if not path.is_file():
        raise DataError(f"{path}: no such file", hint='`path` names JSONL of {"id", "reply"}')
    if path.suffix == ".json" and (outputs := _outputs(path)) is not None:
        return outputs
    return dict(_kept(path) if path.suffix == ".sqlite" else _lines(path))


def _outputs(path: Path) -> dict[str, Reply] | None:
    """What a file of results of ScienceQA's scripts has been told; None where it isn't one."""
    document = read_document(path)
    outputs = document.get("outputs") if isinstance(document, dict) else None
    if not isinstance(outputs, dict):
        return None
    if wrong := [name for name, text in outputs.items() if not isinstance(text, str)]:
        raise DataError(f"{path}: `outputs` of {wrong[0]!r} is not text")
    return {name: Reply(text) for name, text in outputs.items()}


def _lines(path: Path) -> Iterator[tuple[str, Reply]]:
    for entry in read_stream(path):
        record = entry.value
        name = given_id(record) if isinstance(record, dict) else None
        if name is None or not isinstance(record.get("reply"), str):
            why = entry.problem or 'it needs {"id", "reply"}'
            raise DataError(f"{path}:{entry.location}: not a recorded reply: {why}")
        yield name, Reply(record["reply"])


def _kept(path: Path) -> Iterator[tuple[str, Reply]]:
    """Later replies to one request come later, and are the ones that count."""
    try:
        database: Any = sqlite3.connect(path)
        try:
            rows = database.execute("select id, text, finish from attempts where state = 'reply' order by number")
            yield from ((name, Reply(text, finish=finish)) for name, text, finish in rows)
        finally:
            database.close()
    except sqlite3.Error as error:
        raise DataError(
            f"{path}: not what a run keeps: {error}", hint="a run's replies end in .replies.sqlite"
        ) from error
