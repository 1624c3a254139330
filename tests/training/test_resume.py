"""A killed and resumed run equals an uninterrupted one bit for bit, in all losses and weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llavactl.recipe.load import load_recipe
from llavactl.testing import run_cli
from llavactl.training.metrics import read, without_measured

RANDOM = ["-o", "stage1.template=vicuna-v1", "-o", "stage1.image_order=random", "-o", "stage2.image_order=random"]
SHUFFLED_IMAGES = [
    option
    for stage in (1, 2)
    for setting in ("shuffle=images", "batch_size=8", "micro_batch_size=8", "precision=bfloat16")
    for option in ("-o", f"stage{stage}.{setting}")
]
LORA = ["-o", "stage2.method=lora", "-o", "stage2.lora.r=4", "-o", "stage2.lora.dropout=0.1"]
MUON = ["-o", "stage2.optimizer=muon", "-o", "stage2.precision=bfloat16"]
COMMON = ["-o", "stage1.epochs=8", "-o", "stage2.epochs=8", "-o", "features.mode=live"]


def command(toy: Path, stage: int, *options: str) -> list[str]:
    return ["train", "--stage", str(stage), "-r", str(toy / "recipe.yaml"), *COMMON, *options, "--json"]


def kill_after(
    toy: Path,
    stage: int,
    step: int,
    *options: str,
    signal_number: int = signal.SIGKILL,
    before: Callable[[], None] = lambda: None,
) -> None:
    """Trains in another process and kills it once metrics.jsonl has ``step``, after calling ``before``."""
    metrics = toy / f"runs/toy/stage{stage}/metrics.jsonl"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "llavactl", *command(toy, stage, *options)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment,
    ) as process:  # fmt: skip
        while process.poll() is None:
            if any(line["step"] >= step for line in read(metrics)):
                before()
                process.send_signal(signal_number)
                return
            time.sleep(0.005)
        assert process.stderr
        raise AssertionError(f"the run ended before step {step}: {process.stderr.read().decode()}")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{file.name}:{k}": v for file in sorted(folder.rglob("*.safetensors")) for k, v in load_file(file).items()}


def assert_equal(left: Path, right: Path) -> None:
    assert without_measured(read(left / "metrics.jsonl")) == without_measured(read(right / "metrics.jsonl"))
    left_weights, right_weights = weights(left / "model"), weights(right / "model")
    assert left_weights.keys() == right_weights.keys()
    assert all(torch.equal(left_weights[name], right_weights[name]) for name in left_weights)


def add_records(toy: Path) -> None:
    """Three records per image, of different lengths."""
    records = json.loads((toy / "records.json").read_text())
    for record in records * 2:
        turns = record["conversations"][: 2 + len(records) % 2 * 2]
        records.append({**record, "id": f"r{len(records)}", "conversations": turns})
    (toy / "records.json").write_text(json.dumps(records))


@pytest.mark.parametrize(
    ("options", "signal_number", "stages"),
    [
        pytest.param(SHUFFLED_IMAGES, signal.SIGKILL, (2,), id="prefix-sharing-bfloat16-stage-2"),
        pytest.param(SHUFFLED_IMAGES, signal.SIGKILL, (1, 2), id="prefix-sharing-bfloat16", marks=pytest.mark.slow),
        pytest.param(RANDOM, signal.SIGKILL, (1, 2), id="full-random", marks=pytest.mark.slow),
        pytest.param(LORA, signal.SIGINT, (1, 2), id="lora", marks=pytest.mark.slow),
        pytest.param(MUON, signal.SIGKILL, (1, 2), id="muon", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_equals_an_uninterrupted_one(
    toy: Path, options: list[str], signal_number: int, stages: tuple[int, ...]
) -> None:
    """A killed stage 1 is also resumed in the next test."""
    prefix_sharing = options is SHUFFLED_IMAGES
    if prefix_sharing:
        add_records(toy)
    if 1 not in stages:
        options = [*options, "-o", "stage2.init=scratch"]
    uninterrupted = ["-o", f"run_dir={toy}/uninterrupted"]
    for stage in stages:
        assert run_cli(*command(toy, stage, *options, *uninterrupted)).exit_code == 0
    for stage in stages:
        kill_after(toy, stage, 11, *options, signal_number=signal_number)
        result = run_cli(*command(toy, stage, *options))
        assert result.exit_code == 0, result.stderr
        assert result.json()["resumed_from"] >= 11 - 3, "at most one checkpoint interval is repeated"
        assert prefix_sharing == (result.json()["prefix_sharing"] > 0.1)
        assert_equal(toy / f"runs/toy/stage{stage}", toy / f"uninterrupted/stage{stage}")


def test_a_damaged_newest_checkpoint_is_skipped(toy: Path) -> None:
    uninterrupted = ["-o", f"run_dir={toy}/uninterrupted"]
    assert run_cli(*command(toy, 1, *uninterrupted)).exit_code == 0
    kill_after(toy, 1, 9)
    newest = max((toy / "runs/toy/stage1/checkpoints").glob("step-*"))
    (tensors,) = newest.glob("*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-100] + bytes(100))
    result = run_cli(*command(toy, 1))
    assert newest.name in result.stderr
    assert 0 < result.json()["resumed_from"] < int(newest.name.partition("-")[2])
    assert_equal(toy / "runs/toy/stage1", toy / "uninterrupted/stage1")


@pytest.mark.slow
def test_a_second_process_on_the_same_run_is_refused(toy: Path) -> None:
    def train_again() -> None:
        refused = run_cli(*command(toy, 1))
        assert refused.exit_code == 1
        assert str(toy / "runs/toy/stage1") in refused.stderr
        assert "`name`" in refused.stderr

    kill_after(toy, 1, 1, "-o", "stage1.epochs=1000", before=train_again)
    assert run_cli(*command(toy, 1)).exit_code == 0


def test_resume_never_and_changed_settings_or_data_train_again(toy: Path) -> None:
    assert run_cli(*command(toy, 1)).json()["finished_before"] is False
    assert run_cli(*command(toy, 1)).json()["finished_before"] is True
    assert run_cli(*command(toy, 1, "--resume", "never")).json()["finished_before"] is False
    assert run_cli(*command(toy, 1, "-o", "stage1.micro_batch_size=4")).json()["finished_before"] is True
    assert run_cli(*command(toy, 1, "-o", "stage1.learning_rate=2e-3")).json()["finished_before"] is False
    records = toy / "records.json"
    changed = json.loads(records.read_text())
    changed[0]["conversations"][1]["value"] = "Something else."
    records.write_text(json.dumps(changed))
    report = run_cli(*command(toy, 1, "-o", "stage1.learning_rate=2e-3")).json()
    assert (report["finished_before"], report["resumed_from"]) == (False, 0)


def test_gradient_accumulation_does_not_change_the_loss(toy: Path) -> None:
    recipe = load_recipe(toy / "recipe.yaml")
    assert recipe.stage1.batch_size == 4
    runs = {}
    for micro in (1, 4):
        args = ["-o", f"stage1.micro_batch_size={micro}", "-o", f"run_dir={toy}/m{micro}", "-o", "stage1.max_steps=5"]
        assert run_cli(*command(toy, 1, *args)).exit_code == 0
        runs[micro] = [line["loss"] for line in read(toy / f"m{micro}/stage1/metrics.jsonl") if "loss" in line]
    assert runs[1] == pytest.approx(runs[4], rel=1e-4)
