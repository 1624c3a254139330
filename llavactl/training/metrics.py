"""metrics.jsonl: one line per step, flushed immediately."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llavactl.core.paths import write_atomic
from llavactl.files.json_stream import read_stream


class Metrics:
    """Appends lines to ``path``. When a run resumes after ``step``, lines of later steps are removed."""

    def __init__(self, path: Path, step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read(path) if step and line["step"] <= step]
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Flushes to disk; called before a checkpoint, so that a power failure can't lose lines before it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without a last line that is incomplete after a kill."""
    lines: list[dict[str, Any]] = []
    for entry in read_stream(path) if path.exists() else ():
        if entry.problem:
            break
        lines.append(entry.value)
    return lines
