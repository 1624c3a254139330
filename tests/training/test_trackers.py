"""Trackers record the metrics offline; without their package the stage doesn't start, and a failing one is dropped."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llavactl.core.errors import RecipeError
from llavactl.recipe.load import load_recipe
from llavactl.testing import run_cli
from llavactl.training import trackers
from llavactl.training.metrics import read

TASK = "{name: scenes, scenes: 1, questions: 2}"
COMMON = ("features.mode=live", "eval.max_new_tokens=2", "stage1.validation=0.2")
EVALUATE = f"stage1.evaluate_every={{steps: 3, tasks: [{TASK}], samples: 0}}"


def command(toy: Path, *settings: str) -> list[str]:
    words = [word for each in (*COMMON, *settings) for word in ("-o", each)]
    return ["train", "--stage", "1", "-r", str(toy / "recipe.yaml"), *words, "--json"]


def numbers(toy: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every number in metrics.jsonl, scores under their names."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in read(toy / "runs/toy/stage1/metrics.jsonl"):
        flat = {**line, **{f"scores/{name}": value for name, value in line.get("scores", {}).items()}}
        for key, value in flat.items():
            if key not in ("step", "scores"):
                found.setdefault(key, []).append((line["step"], value))
    return found


def test_tensorboard_records_all_numbers(toy: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = run_cli(*command(toy, "trackers=[tensorboard]", EVALUATE))
    assert result.exit_code == 0, result.stderr
    events = EventAccumulator(str(toy / "runs/toy/trackers/tensorboard/stage1"))
    events.Reload()
    expected = numbers(toy)
    assert set(events.Tags()["scalars"]) == set(expected) >= {"loss", "val_loss", "grad_norm", "mfu"}
    for name, values in expected.items():
        recorded = [(event.step, event.value) for event in events.Scalars(name)]
        assert recorded == [(step, pytest.approx(value, rel=1e-6)) for step, value in values]


def test_the_digest_is_the_same_with_trackers(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trackers._CREATE, "mlflow", lambda *_: Recorder())
    monkeypatch.setattr(trackers, "find_spec", lambda name: name)
    first = run_cli(*command(toy)).json()
    again = run_cli(*command(toy, "trackers=[mlflow]")).json()
    assert again == {**first, "finished_before": True}


def test_a_missing_package_is_reported_before_training(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    result = run_cli(*command(toy, "trackers=[wandb]"))
    assert result.exit_code == 1
    error, hint = result.stderr.splitlines()[-2:]
    assert "wandb" in error
    assert "pip install wandb" in hint
    assert not (toy / "runs").exists()


def test_an_unknown_tracker_is_a_problem_of_the_recipe(toy: Path) -> None:
    with pytest.raises(RecipeError, match=r"trackers.*'tensorboard', 'wandb'"):
        load_recipe(toy / "recipe.yaml", ["trackers=[tensorbord]"])


class Recorder:
    """A tracker that fails from step ``fails_at`` on."""

    def __init__(self, fails_at: int = 10**6, error: BaseException | None = None) -> None:
        self.fails_at, self.error = fails_at, error or OSError("disk full")
        self.steps: list[int] = []
        self.finished = False

    def start(self) -> None:
        if self.fails_at == 0:
            raise self.error

    def log(self, values: dict[str, Any], step: int) -> None:
        self.steps.append(step)
        print("output of the tracker")
        if step >= self.fails_at:
            raise self.error

    def finish(self) -> None:
        self.finished = True


def use(monkeypatch: pytest.MonkeyPatch, **recorders: Recorder) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: name)
    for name, recorder in recorders.items():
        monkeypatch.setitem(trackers._CREATE, name, lambda *_, recorder=recorder: recorder)


@pytest.mark.parametrize("error", [SystemExit(2), pytest.param(OSError("disk full"), marks=pytest.mark.slow)])
def test_a_failing_tracker_is_dropped(toy: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    failing, other = Recorder(3, error), Recorder()
    use(monkeypatch, wandb=failing, mlflow=other)
    result = run_cli(*command(toy, "trackers=[wandb, mlflow]"))
    assert result.exit_code == 0
    assert result.json()["steps"] == 5, "its output is not mixed with the result"
    (warning,) = [line for line in result.stderr.splitlines() if "tracker" in line and "wandb" in line]
    assert type(error).__name__ in warning
    assert failing.steps[-1] == 3
    assert other.steps[-1] == 5
    assert other.finished


def test_a_tracker_that_cannot_be_started_stops_the_stage(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Recorder()
    use(monkeypatch, mlflow=other, wandb=Recorder(0))
    result = run_cli(*command(toy, "trackers=[mlflow, wandb]"))
    assert result.exit_code == 1
    assert "tracker wandb" in result.stderr
    assert "disk full" in result.stderr
    assert other.finished
    assert not (toy / "runs/toy/stage1/metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_other_trackers_record_offline(toy: Path, name: str) -> None:
    pytest.importorskip(name)
    if name == "mlflow":
        pytest.importorskip("sqlalchemy")
    launched = subprocess.run(
        [sys.executable, "-m", "llavactl", *command(toy, f"trackers=[{name}]", EVALUATE)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert launched.returncode == 0, launched.stderr[-3000:]
    assert json.loads(launched.stdout)["steps"] == 5, "standard output is one JSON document"
    assert "failed" not in launched.stderr
    folder = toy / "runs/toy/trackers" / name
    losses = [value for _, value in numbers(toy)["loss"]]
    if name == "wandb":
        (run,) = folder.glob("wandb/offline-run-*/run-stage1-*.wandb")
        assert b"grad_norm" in run.read_bytes()
    elif name == "mlflow":
        query = "select value from metrics where key = 'loss' order by step"
        assert [row[0] for row in sqlite3.connect(folder / "mlflow.db").execute(query)] == losses
    else:
        rows = sqlite3.connect(folder / "toy.db").execute("select metrics from metrics order by id").fetchall()
        assert [values["loss"] for values in map(json.loads, (row[0] for row in rows)) if "loss" in values] == losses
