"""The result of an evaluation (``eval/TASK.json``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llavactl.core.paths import write_json
from llavactl.files.eval_result import read_eval_result


@dataclass(frozen=True)
class EvalReport:
    """The scores of a task; ``failed``: number of unparsable answers, scored as the protocol defines.

    ``interval``: 95 % confidence intervals of scores that are proportions. ``baselines``: scores of the ``blind
    baseline`` (shuffled images) and of ``stage 1``. ``ignored``: number of answers to questions that the task doesn't
    have. ``judge``: the teacher that judged the answers. ``prompt``: the prompt format of a transformers model.
    ``answers``: the answer file, and ``copied_from`` that of an equal model in another run, if they were copied.
    ``file``: the file of this report.
    """

    task: str
    protocol: str
    model: str
    n: int
    scores: Mapping[str, Any]
    failed: int
    interval: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    baselines: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    ignored: int = 0
    judge: str | None = None
    prompt: str | None = None
    answers: str | None = None
    copied_from: str | None = None
    file: str | None = None
    finished_before: bool = False


def write_result(file: Path, report: EvalReport, digest: str) -> None:
    write_json(file, {**asdict(report), "digest": digest})


def stored_result(file: Path, digest: str, protocol: str) -> EvalReport | None:
    """The result in ``file`` if it has this digest and protocol; else None."""
    result = read_eval_result(file)
    if result.get("digest") != digest or result.get("protocol") != protocol:
        return None
    fields = {key: value for key, value in result.items() if key in EvalReport.__dataclass_fields__}
    try:
        return EvalReport(**fields | {"finished_before": True})
    except TypeError:  # a required field is missing
        return None
