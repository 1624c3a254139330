"""``llavactl sweep``: equal steps are carried out once, runs resume, failures are rows, and the numbers are right."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from asyncio import CancelledError
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from math import comb
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from llavactl import Options, hookimpl
from llavactl.core import plugins
from llavactl.core.registry import registry
from llavactl.recipe.load import load_recipe
from llavactl.testing import Result, run_cli
from llavactl.verbs import run as run_verb
from llavactl.verbs.sweep.report import Comparison, Spread, SweepReport, SweepVariant
from llavactl.verbs.sweep.results import SweepRun

SHORT = """
eval: {tasks: [{name: scenes, scenes: 4}], max_new_tokens: 2, blind_baseline: false}
"""
AXES = ("--axis", "connector.name=linear,mlp2x-gelu", "--axis", "stage2.learning_rate=1e-2,1e-3")
RATES = ("--axis", "stage2.learning_rate=1e-2,1e-3")


def prepare(folder: Path) -> Path:
    """Makes the toy recipe in ``folder`` train one step per stage, with a task."""
    recipe = folder / "recipe.yaml"
    text = recipe.read_text()
    for stage in ("stage1", "stage2"):
        text = text.replace(f"{stage}: {{epochs: 2,", f"{stage}: {{max_steps: 1,")
    recipe.write_text(text + SHORT)
    return folder


@dataclass
class Observer:
    """Counts the stages that are really trained, and the images that are encoded."""

    trained: list[int] = field(default_factory=list)
    encoded: list[int] = field(default_factory=list)

    @hookimpl
    def train_finished(self, report: dict[str, Any]) -> None:
        self.trained.append(report["stage"])

    @hookimpl
    def extract_finished(self, report: dict[str, Any]) -> None:
        self.encoded.append(report["encoded"])


@pytest.fixture
def observer() -> Iterator[Observer]:
    plugin = Observer()
    plugins.manager().register(plugin, "sweep-observer")
    yield plugin
    plugins.manager().unregister(plugin)


def sweep(folder: Path, *arguments: str, code: int = 0) -> Result:
    result = run_cli("sweep", *arguments, "--json", cwd=folder)
    assert result.exit_code == code, result.stderr
    return result


def runs(report: Any) -> list[Any]:
    return [run for variant in report["variants"] for run in variant["runs"]]


def folder_of(run: Any) -> str:
    return Path(run["run_dir"]).name


@pytest.fixture(scope="module")
def swept(toys: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A finished sweep: its folder, its report, and what was computed; don't write into it."""
    base = tmp_path_factory.mktemp("swept")
    shutil.copytree(toys, base / "toy")
    plugin = Observer()
    plugins.manager().register(plugin, "swept-observer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAVACTL_HOME", str(base / "home"))
        report = sweep(prepare(base / "toy"), *AXES).json()
    plugins.manager().unregister(plugin)
    return SimpleNamespace(folder=base / "toy", home=base / "home", report=report, observer=plugin)


def test_equal_steps_are_carried_out_once(swept: SimpleNamespace) -> None:
    assert sorted(swept.observer.trained) == [1, 1, 2, 2, 2, 2]
    assert sum(swept.observer.encoded) == 12
    assert swept.report["computed"] == {"extract": 1, "stage1": 2, "stage2": 4, "eval scenes": 4}
    assert [(run["state"], list(run["shared"].items())) for run in runs(swept.report)] == [
        ("finished", []),
        ("finished", [("stage1", "connector=linear,learning_rate=0.01,seed=0")]),
        ("finished", []),
        ("finished", [("stage1", "connector=mlp2x-gelu,learning_rate=0.01,seed=0")]),
    ]
    for run in runs(swept.report):
        assert (Path(run["run_dir"]) / "stage1").is_symlink() == bool(run["shared"])


def test_a_dry_run_predicts_the_shared_steps(swept: SimpleNamespace, home: Path) -> None:
    planned = sweep(swept.folder, *AXES, "--dry-run").json()
    assert planned["computed"] == {step: swept.report["computed"][step] for step in ("extract", "stage1", "stage2")}
    stages = [{step: owner for step, owner in run["shared"].items() if step != "extract"} for run in runs(planned)]
    assert stages == [run["shared"] for run in runs(swept.report)]
    assert {run["state"] for run in runs(planned)} == {"pending"}
    assert not (home / "cache" / "features").exists()


def test_the_report_has_the_costs_of_each_run(swept: SimpleNamespace) -> None:
    for variant in swept.report["variants"]:
        (run,) = variant["runs"]
        folder = Path(run["run_dir"])
        reports = {stage: json.loads((folder / stage / "report.json").read_text()) for stage in ("stage1", "stage2")}
        assert run["tokens"] == {stage: report["tokens"] for stage, report in reports.items()}
        assert run["trainable_parameters"] == {stage: each["trainable_parameters"] for stage, each in reports.items()}
        assert run["image_tokens"] == 4  # 28 pixels, patches of 14
        assert run["feature_bytes"] >= 12 * 4 * 32 * 2
        assert set(run["seconds"]) == {"extract", "stage1", "stage2", "eval scenes"}
        assert all(seconds > 0 for seconds in run["seconds"].values())
        assert variant["seconds"] == pytest.approx(sum(run["seconds"].values()))
        assert run["scores"]["scenes"]["accuracy"] == variant["scores"]["scenes"]["accuracy"]["mean"]
        assert variant["scores"]["scenes"]["accuracy"]["interval"] == run["intervals"]["scenes"]["accuracy"]
    total, alone = swept.report["seconds"]["computed"], swept.report["seconds"]["without_sharing"]
    assert alone == pytest.approx(sum(variant["seconds"] for variant in swept.report["variants"]), abs=0.2)
    assert 0 < total < alone


def test_the_documents_keys_are_those_of_the_report(swept: SimpleNamespace) -> None:
    report = swept.report
    assert list(report) == [each.name for each in fields(SweepReport)]
    assert list(report["variants"][0]) == [each.name for each in fields(SweepVariant)]
    assert list(runs(report)[0]) == [each.name for each in fields(SweepRun)]
    assert list(report["comparisons"][0]) == [each.name for each in fields(Comparison)]
    assert list(report["variants"][0]["scores"]["scenes"]["accuracy"]) == [each.name for each in fields(Spread)]


def test_the_paired_tests_are_those_of_the_stored_answers(swept: SimpleNamespace) -> None:
    """McNemar's test of the right answers, computed from the files, and Holm's correction over the six pairs."""
    right = {}
    for variant in swept.report["variants"]:
        (file,) = Path(variant["runs"][0]["run_dir"]).glob("eval/answers/*.jsonl")
        answers = [json.loads(line) for line in file.read_text().splitlines()]
        scored = run_cli("eval", "scenes", "-t", "scenes=4", "--answers", str(file), "--json", cwd=swept.folder).json()
        assert scored["scores"]["accuracy"] == variant["scores"]["scenes"]["accuracy"]["mean"]
        right[variant["name"]] = scored["scores"]["accuracy"] * len(answers) / 100
    for pair in swept.report["comparisons"]:
        assert pair["only_b"] - pair["only_a"] == pytest.approx(right[pair["b"]] - right[pair["a"]])
        n = pair["only_a"] + pair["only_b"]
        tail = sum(comb(n, k) for k in range(min(pair["only_a"], pair["only_b"]) + 1))
        assert pair["p"] == pytest.approx(min(1, 2 * tail / 2**n))
    pairs = sorted(swept.report["comparisons"], key=lambda pair: pair["p"])
    assert len(pairs) == 6
    largest = 0.0
    for rank, pair in enumerate(pairs):
        largest = max(largest, min(1.0, (6 - rank) * pair["p"]))
        assert pair["p_holm"] == pytest.approx(largest)


def test_each_run_is_a_run_of_its_own_recipe(swept: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVACTL_HOME", str(swept.home))
    run = runs(swept.report)[1]
    recipe = load_recipe(Path(run["run_dir"]) / "recipe.yaml")
    assert (str(recipe.run_dir), recipe.connector.name) == (run["run_dir"], "linear")
    again = run_cli("run", "-r", f"{run['run_dir']}/recipe.yaml", "--json")
    assert again.exit_code == 0, again.stderr
    assert [again.json()[stage]["finished_before"] for stage in ("stage1", "stage2")] == [True, True]


@pytest.fixture
def copied(swept: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished sweep to write into."""
    shutil.copytree(swept.folder, tmp_path / "swept", symlinks=True)
    shutil.copytree(swept.home, tmp_path / "store")
    monkeypatch.setenv("LLAVACTL_HOME", str(tmp_path / "store"))
    return tmp_path / "swept"


def test_a_finished_sweep_computes_nothing_and_has_the_same_report(
    swept: SimpleNamespace, observer: Observer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAVACTL_HOME", str(swept.home))
    again = sweep(swept.folder, *AXES).json()
    assert observer.trained == []
    assert again == swept.report


@pytest.mark.slow
def test_another_value_reuses_what_is_finished(copied: Path, observer: Observer) -> None:
    report = sweep(copied, "--axis", "stage2.learning_rate=1e-2,1e-4", "-o", "connector.name=linear").json()
    assert observer.trained == [2]  # stage 1, and stage 2 with 1e-2, from the folders of the other axes
    assert [run["state"] for run in runs(report)] == ["finished", "finished"]


def test_training_a_shared_stage_again_leaves_the_other_run_unchanged(copied: Path) -> None:
    first, second = sorted((copied / "runs/toy/sweep").glob("connector=linear,*"), reverse=True)
    (shared,) = [run for run in (first, second) if (run / "stage1").is_symlink()]
    owner = (shared / "stage1").resolve()
    before = {path: path.read_bytes() for path in owner.rglob("*") if path.is_file()}
    changed = ("-o", "stage1.learning_rate=0.5", "-o", f"run_dir={shared}", "--json")
    done = run_cli("train", "--stage", "1", "-r", f"{shared}/recipe.yaml", *changed)
    assert done.exit_code == 0, done.stderr
    assert done.json()["finished_before"] is False
    assert not (shared / "stage1").is_symlink()
    assert {path: path.read_bytes() for path in owner.rglob("*") if path.is_file()} == before


def test_equal_models_are_trained_and_evaluated_once(toy: Path, observer: Observer) -> None:
    report = sweep(prepare(toy), "--axis", "eval.batch_size=1,3").json()
    assert observer.trained == [1, 2]
    assert report["computed"] == {"extract": 1, "stage1": 1, "stage2": 1, "eval scenes": 1}
    first, second = runs(report)
    assert second["shared"] == dict.fromkeys(("stage1", "stage2", "eval scenes"), folder_of(first))
    assert second["seconds"] == first["seconds"]
    (pair,) = report["comparisons"]
    assert (pair["difference"], pair["p"], pair["p_holm"]) == (0, 1, 1)


@pytest.mark.slow
def test_seeds_are_averaged(toy: Path, observer: Observer) -> None:
    report = sweep(prepare(toy), *RATES, "--seeds", "2").json()
    assert sorted(observer.trained) == [1, 1, 2, 2, 2, 2]  # stage 1 of each seed
    for variant in report["variants"]:
        values = [run["scores"]["scenes"]["accuracy"] for run in variant["runs"]]
        spread = variant["scores"]["scenes"]["accuracy"]
        assert [run["seed"] for run in variant["runs"]] == [0, 1]
        assert spread["mean"] == pytest.approx(sum(values) / 2)
        assert spread["sd"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
        assert spread["n"] == 2
        assert spread["interval"][0] <= spread["mean"] <= spread["interval"][1]
    (pair,) = report["comparisons"]
    means = [variant["scores"]["scenes"]["accuracy"]["mean"] for variant in report["variants"]]
    assert pair["difference"] == pytest.approx(means[1] - means[0])
    assert pair["seeds"] == [0, 1]


@pytest.mark.slow
def test_data_is_generated_once(toy: Path) -> None:
    generate = (
        "generate={source: {name: scenes, scenes: 4}, teacher: {name: rules}, kinds: {detail: 1}, out: data.jsonl}"
    )
    data = (
        "-o",
        "data.stage2=[{name: llava-json, path: data.jsonl}]",
        "-o",
        "data.stage1=[]",
        "-o",
        "stage2.init=scratch",
    )
    report = sweep(prepare(toy), "--seeds", "2", "-o", generate, *data).json()
    assert [run["state"] for run in runs(report)] == ["finished", "finished"]
    assert json.loads((toy / "runs/toy/times.json").read_text()).keys() == {"generate"}
    assert len((toy / "data.jsonl").read_text().splitlines()) == 4


class Doubled:
    """A connector of a plugin: a linear layer, and twice as many tokens."""

    def __init__(self, options: Options) -> None:
        pass

    def build(self, shape: Any, width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(shape.width, 2 * width), nn.Unflatten(2, (2, width)), nn.Flatten(1, 2))

    def tokens(self, shape: Any) -> int:
        return 2 * int(shape.patches)


class Refusing(Doubled):
    """A connector that refuses the shape of the features."""

    def build(self, shape: Any, width: int) -> nn.Module:
        raise ValueError(f"needs 24 rows, got {shape.grid[0]}")


@pytest.fixture
def connectors() -> Iterator[None]:
    """A plugin with the connectors ``doubled`` and ``refusing``."""

    class Plugin:
        @hookimpl
        def register_connectors(self, register: Any) -> None:
            for name, target in (("doubled", Doubled), ("refusing", Refusing)):
                register(name, f"{__name__}:{target.__name__}", summary="a test")

    module = sys.modules[__name__]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, __name__, module)
        plugins.manager().register(plugin := Plugin(), "connectors-of-a-test")
        registry.cache_clear()
        yield
        plugins.manager().unregister(plugin)
        registry.cache_clear()


def test_a_failing_variant_is_a_row_and_a_plugins_connector_a_variant(toy: Path, connectors: None) -> None:
    axis = ("--axis", "connector=linear,refusing,doubled")
    result = sweep(prepare(toy), *axis, code=1)
    first, failed, doubled = runs(result.json())
    assert [run["state"] for run in (first, failed, doubled)] == ["finished", "failed", "finished"]
    assert "needs 24 rows" in failed["error"]
    assert result.json()["failed"] == 1
    assert doubled["image_tokens"] == 2 * first["image_tokens"]
    assert len(result.json()["comparisons"]) == 1
    assert "1 of 3 runs failed" in result.stderr
    page = Path(result.json()["report"]).read_text()
    assert "needs 24 rows" in page
    planned = sweep(toy, *axis, "--dry-run", code=1).json()
    assert [run["state"] for run in runs(planned)] == ["pending", "failed", "pending"]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("broken kernel"),
        pytest.param(CancelledError(), marks=pytest.mark.slow),
        pytest.param(SystemExit(3), marks=pytest.mark.slow),
        pytest.param(MemoryError(), marks=pytest.mark.slow),
    ],
)
def test_an_unexpected_error_is_a_row_with_its_traceback(
    toy: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    original = run_verb.train

    def failing(recipe: Any, number: int, **options: Any) -> Any:
        if number == 2 and recipe.stage2.learning_rate == 1e-2:
            raise error
        return original(recipe, number, **options)

    monkeypatch.setattr(run_verb, "train", failing)
    result = sweep(prepare(toy), *RATES, code=1)
    failed, finished = runs(result.json())
    assert (failed["state"], finished["state"]) == ("failed", "finished")
    assert type(error).__name__ in failed["error"]
    assert re.search(r"\w+\.py:\d+: ", failed["error"])
    traceback = Path(failed["run_dir"]) / "error.txt"
    assert type(error).__name__ in traceback.read_text()
    monkeypatch.undo()
    monkeypatch.setenv("LLAVACTL_HOME", str(toy.parent / "home"))
    assert {run["state"] for run in runs(sweep(toy, *RATES).json())} == {"finished"}
    assert not traceback.exists()


def test_an_interrupt_stops_the_sweep_and_the_same_command_resumes(
    toy: Path, monkeypatch: pytest.MonkeyPatch, observer: Observer
) -> None:
    original = run_verb.train
    calls = []

    def interrupted(recipe: Any, number: int, **options: Any) -> Any:
        calls.append(number)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(recipe, number, **options)

    monkeypatch.setattr(run_verb, "train", interrupted)
    assert run_cli("sweep", *RATES, cwd=prepare(toy)).exit_code == 130
    assert observer.trained == [1, 2]
    monkeypatch.setattr(run_verb, "train", original)
    assert {run["state"] for run in runs(sweep(toy, *RATES).json())} == {"finished"}
    assert observer.trained == [1, 2, 2]


def test_a_sweep_runs_once_at_a_time(toy: Path) -> None:
    from llavactl.core.paths import exclusive_lock

    with exclusive_lock(toy / "runs/toy/sweep/.lock", RuntimeError("busy")):
        result = run_cli("sweep", *RATES, cwd=prepare(toy))
    assert result.exit_code == 1
    assert "another process" in result.stderr


@pytest.mark.slow
def test_the_table_on_the_terminal_has_all_variants(copied: Path) -> None:
    shown = run_cli("sweep", *AXES, cwd=copied)
    assert shown.exit_code == 0, shown.stderr
    head, *rows = shown.stdout.splitlines()
    assert head.split()[:3] == ["connector", "learning_rate", "scenes"]
    assert sorted(row.split()[0] for row in rows[:4]) == ["linear", "linear", "mlp2x-gelu", "mlp2x-gelu"]
    assert str(copied / "runs/toy/sweep/report.html") in shown.stdout
    planned = run_cli("sweep", *AXES, "--dry-run", cwd=copied).stdout.splitlines()
    assert planned[2].split()[0] == "2"
    assert "stage 1 of run 1" in planned[2]


@pytest.mark.slow
def test_a_killed_sweep_resumes(toy: Path, home: Path) -> None:
    """Killed while the second variant trains: the first is not computed again, and the results are the same."""
    command = [sys.executable, "-m", "llavactl", "sweep", *RATES, "-o", "stage2.max_steps=6"]
    process = subprocess.Popen(command, cwd=prepare(toy), env={**os.environ, "OMP_NUM_THREADS": "1"})
    first, second = (toy / f"runs/toy/sweep/learning_rate={rate},seed=0" for rate in ("0.01", "0.001"))
    while not (second / "stage2/metrics.jsonl").exists() or not (second / "stage2/metrics.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    model = first / "stage2/model/connector.safetensors"
    before = model.stat().st_mtime_ns
    resumed = sweep(toy, *RATES, "-o", "stage2.max_steps=6").json()
    assert model.stat().st_mtime_ns == before
    assert {run["state"] for run in runs(resumed)} == {"finished"}
    shutil.rmtree(toy / "runs")
    uninterrupted = sweep(toy, *RATES, "-o", "stage2.max_steps=6").json()
    for one, other in zip(runs(resumed), runs(uninterrupted), strict=True):
        assert {key: one[key] for key in ("scores", "tokens", "val_loss")} == {
            key: other[key] for key in ("scores", "tokens", "val_loss")
        }
    del home
