"""Once the model is saved, the stage is finished: sample answers, plots, pages and plugins can only cost a warning."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llavactl import hookimpl
from llavactl.core import plugins
from llavactl.testing import run_cli
from llavactl.verbs import train as verb

ERRORS = [OSError(28, "No space left on device"), MemoryError(), SystemExit(3), RuntimeError("broken")]
OUTPUTS = {
    "example": "samples.json",
    "answer_samples": "samples.json",
    "plot_loss": "loss.png",
    "write_report": "report.html",
}


def command(toy: Path, *settings: str) -> list[str]:
    words = [word for each in ("features.mode=live", "stage1.max_steps=2", *settings) for word in ("-o", each)]
    return ["train", "--stage", "1", "-r", str(toy / "recipe.yaml"), *words, "--json"]


@pytest.mark.parametrize(
    ("function", "error"),
    [
        pytest.param(function, error, marks=[pytest.mark.slow] if index % 2 else [])
        for index, (function, error) in enumerate(zip(OUTPUTS, ERRORS, strict=True))
    ],
)
def test_a_failing_output_costs_a_warning(
    toy: Path, monkeypatch: pytest.MonkeyPatch, function: str, error: BaseException
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(verb, function, fail)
    result = run_cli(*command(toy))
    assert result.exit_code == 0, result.stderr
    (warning,) = [line for line in result.stderr.splitlines() if "could not be written" in line]
    assert OUTPUTS[function] in warning
    assert type(error).__name__ in warning
    monkeypatch.undo()
    monkeypatch.setenv("LLAVACTL_HOME", str(toy / "home"))
    assert run_cli(*command(toy)).json() == {**result.json(), "finished_before": True}


@pytest.fixture
def observers() -> Iterator[SimpleNamespace]:
    """A plugin all of whose observers fail, with what ``raised`` says."""
    plugin = SimpleNamespace(raised=RuntimeError("broken"), called=[])

    def failing(name: str, *arguments: str) -> Any:
        code = f"def {name}({', '.join(arguments)}):\n    plugin.called.append('{name}')\n    raise plugin.raised\n"
        namespace: dict[str, Any] = {"plugin": plugin}
        exec(code, namespace)
        return hookimpl(namespace[name])

    for name, arguments in {
        "train_started": ("stage", "folder", "steps"),
        "train_logged": ("stage", "line"),
        "checkpoint_saved": ("stage", "folder", "step"),
        "train_finished": ("report",),
    }.items():
        setattr(plugin, name, failing(name, *arguments))
    manager = plugins.manager()
    manager.register(plugin, "failing-observers")
    yield plugin
    manager.unregister(plugin)


@pytest.mark.parametrize("error", [SystemExit(1), pytest.param(RuntimeError("broken"), marks=pytest.mark.slow)])
def test_failing_observers_cost_warnings(toy: Path, observers: SimpleNamespace, error: BaseException) -> None:
    observers.raised = error
    result = run_cli(*command(toy))
    assert result.exit_code == 0, result.stderr
    assert set(observers.called) == {"train_started", "train_logged", "checkpoint_saved", "train_finished"}
    assert json.loads((toy / "runs/toy/stage1/report.json").read_text())["steps"] == 2


def test_a_run_without_its_metrics_is_finished(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Someone may have removed or moved the file during training."""
    original = verb.save_model

    def save_and_remove(run: Any, *rest: Any) -> None:
        original(run, *rest)
        (run.folder / "metrics.jsonl").unlink()

    monkeypatch.setattr(verb, "save_model", save_and_remove)
    report = run_cli(*command(toy)).json()
    assert (report["steps"], report["loss"]) == (2, None)
    assert run_cli(*command(toy)).json()["finished_before"] is True


@pytest.mark.slow
def test_a_stage_killed_in_its_sample_answers_is_finished(toy: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from llavactl import cli\n"
        "from llavactl.verbs import train\n"
        "train.answer_samples = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "cli.main(sys.argv[1:])\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code, *command(toy)],
        capture_output=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert killed.returncode == -signal.SIGKILL
    assert run_cli(*command(toy)).json()["finished_before"] is True
