"""Adds maps of what the model looked at to the sample answers of a run's report (``eval.explain``)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llavactl.core.paths import json_text, write_atomic
from llavactl.report.inputs import read_objects
from llavactl.report.thumbnails import jpeg_uri

if TYPE_CHECKING:
    from llavactl.chat.assistant import Assistant
    from llavactl.chat.explain import Word
    from llavactl.core.schema import Question

log = logging.getLogger(__name__)

WORDS = 4
"""Words of an answer whose maps are shown."""


def add_maps(file: Path, questions: Sequence[Question], model: Path, count: int) -> bool:
    """Adds maps to the first ``count`` rows of ``file``, the stored examples of ``questions``, that have an image.

    Returns whether a row was changed: rows that have maps are left as they are.
    """
    rows = read_objects(file)
    pairs = [(row, question) for row, question in zip(rows, questions, strict=False) if question.turns[-1].images]
    missing = [(row, question) for row, question in pairs[:count] if "maps" not in row and row.get("answer")]
    if not missing:
        return False
    from llavactl.chat.loading import load_assistant

    log.info("eval.explain: maps of %d answers", len(missing))
    assistant = load_assistant(model)
    for row, question in missing:
        row["maps"] = _maps(assistant, question, str(row["answer"]))
    write_atomic(file, json_text(rows, indent=2))
    return True


def _maps(assistant: Assistant, question: Question, answer: str) -> list[dict[str, Any]]:
    """The words of ``answer`` that depend most on the last image, with its overlays."""
    from llavactl.chat.explain import explain
    from llavactl.core.schema import Turn

    explanation = explain(assistant, (*question.turns, Turn("assistant", (answer,))))

    def overlay(word: Word, kind: Literal["attention", "occlusion"]) -> str:
        image = explanation.overlay(word, kind)
        return "" if image is None else jpeg_uri(image, subsampling=0)

    return [
        {"word": word.text, "attention": overlay(word, "attention"), "occlusion": overlay(word, "occlusion")}
        for word in explanation.most_visual(WORDS)
    ]
