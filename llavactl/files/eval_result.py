"""Reads stored results of evaluations (``eval/TASK.json``), including those of earlier versions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llavactl.core.paths import read_json


def read_eval_result(file: Path) -> dict[str, Any]:
    """The JSON object in ``file`` with the current names of its keys; {} if it can't be read."""
    result = read_json(file)
    baselines = result.pop("beside", None)
    if isinstance(baselines, dict):
        current_names = {"blind twin": "blind baseline"}
        result["baselines"] = {current_names.get(name, name): scores for name, scores in baselines.items()}
    return result
