"""metrics.jsonl: one line per step, flushed immediately."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from llavactl.core.paths import write_atomic
from llavactl.files.json_stream import read_stream

MEASURED = frozenset({"seconds", "tokens_per_s", "samples_per_s", "mfu", "memory_bytes"})
"""Fields of a step that are measured; all others are equal in equal runs."""


class Metrics:
    """Appends lines to ``path``. When a run resumes after ``step``, lines of later steps are removed.

    ``kept`` are the lines of the steps before.
    """

    def __init__(self, path: Path, step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.kept = [line for line in read(path) if step and line["step"] <= step]
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in self.kept))
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


def progress_facts(line: Mapping[str, Any]) -> dict[str, str]:
    """The values of a step for the progress line, formatted: losses, gradient norm, speed, memory."""
    formats: dict[str, tuple[str, Callable[[Any], str]]] = {
        "loss": ("loss", "{:.4f}".format),
        "val_loss": ("val_loss", "{:.4f}".format),
        "grad_norm": ("grad_norm", "{:.3g}".format),
        "tokens_per_s": ("tokens/s", "{:,.0f}".format),
        "samples_per_s": ("samples/s", "{:,.3g}".format),
        "mfu": ("MFU", "{:.1%}".format),
        "memory_bytes": ("memory", lambda value: f"{value / 1e9:.1f} GB"),
    }
    return {name: shown(line[key]) for key, (name, shown) in formats.items() if key in line}


def without_measured(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """``lines`` without measured fields: equal for equal runs."""
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]
