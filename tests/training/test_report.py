"""The report of a finished stage is read again, also if an earlier version wrote it."""

from __future__ import annotations

import json
from pathlib import Path

from llavactl.testing import run_cli

FORMER_NAMES = {
    "resumed_from": "first_step",
    "skipped_samples": "left_out",
    "packing": "rows",
    "prefix_sharing": "shared",
}


def test_a_report_with_former_field_names_is_read(toy: Path) -> None:
    command = ["train", "--stage", "1", "-r", str(toy / "recipe.yaml"), "--json"]
    command += ["-o", "features.mode=live", "-o", "stage1.max_steps=1"]
    report = run_cli(*command).json()
    file = toy / "runs/toy/stage1/report.json"
    stored = json.loads(file.read_text())
    former = {FORMER_NAMES.get(key, key): value for key, value in stored.items()}
    file.write_text(json.dumps({**former, "a_removed_field": 1}))
    assert run_cli(*command).json() == {**report, "finished_before": True}


def test_a_report_of_other_data_is_not_used(toy: Path) -> None:
    command = ["train", "--stage", "1", "-r", str(toy / "recipe.yaml"), "--json"]
    command += ["-o", "features.mode=live", "-o", "stage1.max_steps=1"]
    run_cli(*command)
    file = toy / "runs/toy/stage1/report.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "digest": "other"}))
    assert run_cli(*command).json()["finished_before"] is False
