"""Spikes and values that are not finite: their samples are named, and a checkpoint from before them exists."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from llavactl.core.schema import Batch
from llavactl.model.llava import LlavaModel
from llavactl.testing import run_cli
from llavactl.training import checkpoints
from llavactl.training.metrics import read, without_measured
from llavactl.training.spikes import MIN_STEPS, WINDOW, RecentSteps, is_spike
from llavactl.training.step import Gradient, buffers_before
from llavactl.training.throughput import Work

NOISE = [1.0 + 0.1 * random.Random(0).gauss(0, 1) for _ in range(WINDOW)]


def test_a_value_far_above_the_recent_ones_is_a_spike() -> None:
    assert is_spike(3.0, NOISE)
    assert not is_spike(1.4, NOISE), "four standard deviations are noise"
    assert not is_spike(0.0, NOISE), "a low loss is none"


def test_equal_values_make_no_spike_of_a_small_change() -> None:
    assert not is_spike(1.01, [1.0] * WINDOW)
    assert is_spike(1.6, [1.0] * WINDOW)


def test_the_first_steps_and_a_falling_loss_make_no_spike() -> None:
    falling = [10 * 0.97**step for step in range(200)]
    recent = RecentSteps()
    for loss in falling:
        assert not recent.spikes({"loss": loss})
        recent.add({"loss": loss})
    assert not is_spike(100.0, [1.0] * (MIN_STEPS - 1))


def test_earlier_spikes_do_not_hide_later_ones() -> None:
    assert is_spike(5.0, [*NOISE[: WINDOW - 20], *[9.0] * 20])


def test_a_resumed_run_remembers_the_same_steps() -> None:
    lines = [{"step": step, "loss": loss, "grad_norm": 2 * loss} for step, loss in enumerate(NOISE * 2)]
    lines.insert(7, {"step": 7, "val_loss": 9.0})
    whole, resumed = RecentSteps.of(lines), RecentSteps.of(lines[-WINDOW - 20 :])
    assert whole == resumed
    assert whole.spikes({"loss": 4.0, "grad_norm": 2.0}) == ["loss"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_a_spike_at_once(value: float) -> None:
    assert is_spike(value, [])


def command(toy: Path, *settings: str) -> list[str]:
    options = (
        "features.mode=live",
        f"run_dir={toy}/run",
        "stage1.epochs=20",
        "stage1.checkpoint_every=1000",
        *settings,
    )
    return ["train", "--stage", "1", "-r", str(toy / "recipe.yaml"), *(w for each in options for w in ("-o", each))]


def scale_loss(monkeypatch: pytest.MonkeyPatch, sample: str, step: int, factor: float) -> None:
    """The loss of the micro-batch with ``sample`` is multiplied by ``factor`` from its ``step``-th forward pass on."""
    original, seen = LlavaModel.forward, 0

    def forward(self: LlavaModel, batch: Batch) -> torch.Tensor:
        nonlocal seen
        loss = original(self, batch)
        seen += sample in batch.names and torch.is_grad_enabled()
        return loss * factor if sample in batch.names and seen == step else loss

    monkeypatch.setattr(LlavaModel, "forward", forward)


def test_a_spike_names_its_samples_and_training_goes_on(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scale_loss(monkeypatch, "r3", 12, 50.0)
    result = run_cli(*command(toy))
    assert result.exit_code == 0, result.stderr
    spikes = [line for line in read(toy / "run/stage1/metrics.jsonl") if "spike" in line]
    assert len(spikes) == 1
    spike = spikes[0]
    assert spike["spike"]["fields"] == ["loss", "grad_norm"]
    assert "r3" in spike["spike"]["samples"]
    assert len(spike["spike"]["samples"]) == 2, "the micro-batch with the highest loss, not the whole batch"
    (warning,) = [line for line in result.stderr.splitlines() if "spike" in line]
    assert f"step {spike['step']}:" in warning
    assert "r3" in warning


@pytest.mark.parametrize("value", ["nan", pytest.param("inf", marks=pytest.mark.slow)])
def test_what_is_not_finite_stops_with_a_checkpoint(toy: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    scale_loss(monkeypatch, "r3", 12, float(value))
    failed = run_cli(*command(toy))
    assert failed.exit_code == 1
    error, hint = failed.stderr.splitlines()[-2:]
    assert "loss" in error
    assert "r3" in error
    steps = read(toy / "run/stage1/metrics.jsonl")[-1]["step"]
    newest = checkpoints.checkpoint_path(toy / "run/stage1/checkpoints", steps)
    assert newest.is_dir()
    assert str(newest) in hint
    monkeypatch.undo()
    monkeypatch.setenv("LLAVACTL_HOME", str(toy / "home"))
    resumed = run_cli(*command(toy), "--json").json()
    assert resumed["resumed_from"] == steps
    assert run_cli(*command(toy, f"run_dir={toy}/other")).exit_code == 0
    connectors = (toy / f"{name}/stage1/model/connector.safetensors" for name in ("run", "other"))
    assert next(connectors).read_bytes() == next(connectors).read_bytes(), "the checkpoint precedes the step"
    lines = (without_measured(read(toy / f"{name}/stage1/metrics.jsonl")) for name in ("run", "other"))
    assert next(lines) == next(lines)


def test_a_gradient_that_is_not_finite_stops_before_the_update(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llavactl.training.optimizer import Optimizer

    original, calls = Optimizer.grad_norm, 0

    def grad_norm(self: Optimizer) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return original(self) * (float("inf") if calls == 3 else 1)

    monkeypatch.setattr(Optimizer, "grad_norm", grad_norm)
    failed = run_cli(*command(toy))
    assert failed.exit_code == 1
    assert "grad_norm inf" in failed.stderr
    assert read(toy / "run/stage1/metrics.jsonl")[-1]["step"] == 2
    assert checkpoints.checkpoint_path(toy / "run/stage1/checkpoints", 2).is_dir()


def test_a_checkpoint_of_the_previous_step_has_its_buffers() -> None:
    """BatchNorm statistics, for example, change in the forward pass, before a loss turns out not to be finite."""
    norm = nn.BatchNorm1d(2)
    untrained = SimpleNamespace(
        buffers=lambda: dict(norm.named_buffers()), load=lambda state: norm.load_state_dict(state, strict=False)
    )
    run: Any = SimpleNamespace(optimizer=SimpleNamespace(untrained=untrained))
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    norm(torch.randn(4, 2))
    after = norm.running_mean.clone()
    assert not torch.equal(before["running_mean"], after)
    gradient = Gradient(math.nan, 0.0, torch.tensor(0.0), Work(), (), before)
    with buffers_before(run, gradient):
        assert torch.equal(norm.running_mean, before["running_mean"])
    assert torch.equal(norm.running_mean, after)


CODE = """
import os, sys, torch
from llavactl import cli
from llavactl.model.llava import LlavaModel
original, calls = LlavaModel.forward, 0
def forward(self, batch):
    global calls
    calls += 1
    return original(self, batch) * (float("nan") if os.environ["RANK"] == "1" and calls == 5 else 1)
LlavaModel.forward = forward
cli.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_all_processes_stop_in_words_if_the_loss_of_one_is_not_finite(toy: Path, tmp_path: Path, sharding: str) -> None:
    script = tmp_path / "train.py"
    script.write_text(CODE)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    launched: Any = subprocess.run(
        [*launcher, *command(toy, f"sharding={sharding}")],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert launched.returncode != 0
    assert launched.stderr.count("not finite in step ") >= 1, launched.stderr[-3000:]
    steps = read(toy / "run/stage1/metrics.jsonl")[-1]["step"]
    assert checkpoints.checkpoint_path(toy / "run/stage1/checkpoints", steps).is_dir()
