"""Evaluation during training: scores, sample answers, the checkpoint that a score selects, and unchanged weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llavactl.core.errors import RecipeError
from llavactl.recipe.load import load_recipe
from llavactl.testing import run_cli
from llavactl.training import checkpoints
from llavactl.training.checkpoints import CheckpointState
from llavactl.training.metrics import read, without_measured

TASK = "{name: scenes, scenes: 3, questions: 3, limit: 7}"
EVALUATE = f"stage2.evaluate_every={{steps: 3, tasks: [{TASK}], samples: 2}}"
STAGE2 = ("stage2.init=scratch", "stage2.epochs=2", "stage2.validation=0.2", "stage2.checkpoint_every=4")
LORA = ("stage2.method=lora", "stage2.lora.dropout=0.1", "stage2.lora.r=4", "stage2.gradient_checkpointing=true")


def command(toy: Path, folder: str, *settings: str) -> list[str]:
    options = ("features.mode=live", f"run_dir={toy}/{folder}", "eval.max_new_tokens=4", *STAGE2, *settings)
    words = [word for each in options for word in ("-o", each)]
    return ["train", "--stage", "2", "-r", str(toy / "recipe.yaml"), *words, "--json"]


def train(toy: Path, folder: str, *settings: str) -> Any:
    result = run_cli(*command(toy, folder, *settings))
    assert result.exit_code == 0, result.stderr
    return result.json()


def lines(toy: Path, folder: str) -> list[dict[str, Any]]:
    return without_measured(read(toy / folder / "stage2/metrics.jsonl"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{file.name}:{k}": v for file in sorted(folder.rglob("*.safetensors")) for k, v in load_file(file).items()}


def assert_same_weights(left: Path, right: Path) -> None:
    one, two = weights(left / "stage2/model"), weights(right / "stage2/model")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param((), id="full", marks=pytest.mark.slow),
        pytest.param(LORA, id="lora with dropout, recomputed activations"),
    ],
)
def test_evaluating_does_not_change_training(toy: Path, settings: tuple[str, ...]) -> None:
    plain = train(toy, "plain", *settings)
    report = train(toy, "evaluated", EVALUATE, *settings)
    assert report["digest"] == plain["digest"], "a finished stage isn't trained again for it"
    assert_same_weights(toy / "plain", toy / "evaluated")
    evaluated = lines(toy, "evaluated")
    assert [line for line in evaluated if "scores" not in line] == lines(toy, "plain")
    scored = {line["step"]: line["scores"] for line in evaluated if "scores" in line}
    assert list(scored) == [3, plain["steps"]]
    assert all(0 <= scores["scenes.accuracy"] <= 100 for scores in scored.values())
    for step in scored:
        rows = json.loads((toy / f"evaluated/stage2/samples/step-{step:08d}.json").read_text())
        assert len(rows) == 2
        assert all(row["question"] and row["reference"] and Path(row["file"]).is_file() for row in rows)


def test_answers_and_scores_equal_those_of_eval(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same prompts, features and answers as the command after training."""
    from llavactl.verbs import evaluate_every

    answered: list[dict[str, str]] = []
    original = evaluate_every.scores

    def recorded(benchmarks: Any, answers: Any, ask: Any) -> dict[str, float]:
        answered.append({key: answer.text for key, answer in answers["scenes"].items()})
        return original(benchmarks, answers, ask)

    monkeypatch.setattr(evaluate_every, "scores", recorded)
    train(toy, "run", EVALUATE)
    last = [line["scores"] for line in lines(toy, "run") if "scores" in line][-1]
    options = ("-t", "scenes=3", "-t", "questions=3", "--limit", "7", "-o", "eval.max_new_tokens=4")
    folder = toy / "run/stage2/model"
    report = run_cli("eval", "scenes", "--model", str(folder), *options, "--json", cwd=toy).json()
    assert report["n"] == len(answered[-1]) == 7
    stored = [json.loads(line) for line in Path(report["answers"]).read_text().splitlines()]
    assert answered[-1] == {row["id"]: row["text"] for row in stored}
    assert all(answered[-1].values())
    scores = {f"scenes.{name}": value for name, value in report["scores"].items() if isinstance(value, float)}
    assert {name: last[name] for name in scores} == scores


def test_the_best_checkpoint_follows_a_score(tmp_path: Path) -> None:
    """Higher is better; a checkpoint without the score is never the best."""
    scores = [None, {"pope.f1": 20.0}, {"pope.f1": 60.0}, {"pope.f1": 30.0}, {"other.f1": 90.0}, None]
    for step, each in enumerate(scores, 1):
        state = CheckpointState(step, "a", val_loss=1.0 / step, scores=each)
        checkpoints.save(tmp_path, state, {"x": torch.tensor([float(step)])}, 1, "pope.f1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000006"]
    best = checkpoints.load_best(tmp_path, "a", "pope.f1")
    assert best is not None
    assert best.state == CheckpointState(3, "a", 1 / 3, {"pope.f1": 60.0})


def test_restore_best_with_a_score(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores are those of a task whose second evaluation is the best."""
    from llavactl.verbs import evaluate_every

    accuracies = iter([10.0, 40.0, 20.0])
    monkeypatch.setattr(evaluate_every, "scores", lambda *_: {"scenes.accuracy": next(accuracies)})
    evaluate = f"stage2.evaluate_every={{steps: 2, tasks: [{TASK}], samples: 0}}"
    settings = (evaluate, "stage2.max_steps=5", "stage2.restore_best=scenes.accuracy", "stage2.keep_last=1")
    earlier = toy / "run/stage2/samples/step-00000009.json"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("[]")
    report = train(toy, "run", *settings)
    assert (report["model_step"], report["restore_best"], report["steps"]) == (4, "scenes.accuracy", 5)
    names = sorted(path.name for path in (toy / "run/stage2/checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000005"]
    assert train(toy, "run", *settings)["finished_before"] is True
    validated = {line["step"] for line in lines(toy, "run") if "val_loss" in line}
    assert validated == {2, 4, 5}, "every checkpoint has its validation loss"
    assert not earlier.exists(), "answers of an earlier run after later steps are removed"


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["stage2.restore_best=pope.f1"], "expected a task of evaluate_every"),
        (["stage2.restore_best=f1"], "such as `pope.f1`"),
        ([EVALUATE, "stage2.restore_best=scene.accuracy"], "available: scenes"),
        ([f"stage2.evaluate_every={{steps: 1, tasks: [{TASK}, {TASK}]}}"], "listed twice"),
        (["stage2.evaluate_every={steps: 1, tasks: [{name: scenes, scene: 2}]}"], "did you mean 'scenes'"),
        (["stage2.evaluate_every={steps: 1, tasks: [{name: scenes, limit: 0}]}"], "an integer ≥ 1"),
        (["stage2.evaluate_every={tasks: []}"], "missing"),
    ],
)
def test_problems_of_the_recipe(toy: Path, settings: list[str], problem: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(toy / "recipe.yaml", settings)
    assert problem in caught.value.message


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ([EVALUATE, "stage2.restore_best=scenes.acuracy"], "scenes.accuracy"),
        (["stage2.evaluate_every={steps: 1, tasks: [{name: scenes, protocol: exct}]}"], "did you mean 'exact'"),
    ],
)
def test_problems_of_a_task_are_found_before_training(toy: Path, settings: list[str], problem: str) -> None:
    result = run_cli(*command(toy, "run", *settings))
    assert result.exit_code == 1
    assert problem in result.stderr
    assert not (toy / "run/stage2/metrics.jsonl").exists()


@pytest.mark.parametrize("error", [SystemExit(3), pytest.param(MemoryError("no memory"), marks=pytest.mark.slow)])
def test_a_failing_evaluation_costs_a_warning(toy: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    from llavactl.verbs import evaluate_every

    def fail(*_: Any) -> dict[str, float]:
        raise error

    monkeypatch.setattr(evaluate_every, "scores", fail)
    result = run_cli(*command(toy, "run", EVALUATE, "stage2.max_steps=3"))
    assert result.exit_code == 0
    assert type(error).__name__ in result.stderr
    assert lines(toy, "run")[-2] == {"step": 3, "scores": {}}


def stop_in_evaluation(toy: Path, number: int, *settings: str) -> None:
    """Trains in another process, which gets a signal while it evaluates after step 3."""
    code = (
        "import os, sys, llavactl.verbs.evaluate_every as module, llavactl.cli as cli\n"
        "original = module.answer\n"
        "def answer(benchmarks, model, *rest, **options):\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "    return original(benchmarks, model, *rest, **options)\n"
        "module.answer = answer\n"
        "cli.main(sys.argv[1:])\n"
    )
    stopped = subprocess.run(
        [sys.executable, "-c", code, *command(toy, "stopped", EVALUATE, *settings)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert stopped.returncode == (143 if number == signal.SIGTERM else -number), stopped.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_stopped_in_an_evaluation_resumes(toy: Path, number: int) -> None:
    train(toy, "uninterrupted", EVALUATE)
    stop_in_evaluation(toy, number)
    report = train(toy, "stopped", EVALUATE)
    assert report["resumed_from"] == (3 if number == signal.SIGTERM else 0)
    assert lines(toy, "stopped") == lines(toy, "uninterrupted")
    assert_same_weights(toy / "stopped", toy / "uninterrupted")


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "llavactl"]


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_two_processes_evaluate_as_one(toy: Path, sharding: str) -> None:
    settings = (EVALUATE, "stage2.batch_size=4", "stage2.max_steps=4")
    train(toy, "one", *settings)
    began = time.monotonic()
    launched = subprocess.run(
        [*TORCHRUN, *command(toy, "two", *settings), "-o", f"sharding={sharding}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert launched.returncode == 0, launched.stderr[-3000:]
    assert time.monotonic() - began < 400
    one, two = ([line for line in lines(toy, name) if "scores" in line] for name in ("one", "two"))
    assert one == two
    answers = [json.loads((toy / f"{name}/stage2/samples/step-00000004.json").read_text()) for name in ("one", "two")]
    assert [row["answer"] for row in answers[0]] == [row["answer"] for row in answers[1]]


FAIL = """
import os, sys
import llavactl.verbs.evaluate_every as module
from llavactl import cli

def fail(*_, **__):
    raise KeyError("an error of a plugin")

if os.environ["RANK"] == "1" or sys.argv[1] == "scores":
    setattr(module, sys.argv[1], fail)
cli.main(sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sharding", "function", "succeeds"),
    [("none", "answer", True), ("full", "scores", True), ("full", "answer", False)],
)
def test_an_error_in_one_process_makes_no_other_wait(toy: Path, sharding: str, function: str, succeeds: bool) -> None:
    (toy / "fail.py").write_text(FAIL)
    settings = (EVALUATE, "stage2.batch_size=4", "stage2.max_steps=4")
    launched = subprocess.run(
        [*TORCHRUN[:-2], str(toy / "fail.py"), function, *command(toy, "two", *settings), "-o", f"sharding={sharding}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert (launched.returncode == 0) == succeeds, launched.stderr[-3000:]
    assert "an error of a plugin" in launched.stderr
    if succeeds:
        scored = [line for line in lines(toy, "two") if "scores" in line]
        assert scored == [{"step": step, "scores": {}} for step in (3, 4)]
