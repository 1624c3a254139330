"""A run that was killed and goes on equals one that was not: every loss and every weight, to the bit."""

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
from llavactl.training.metrics import read

RANDOM = ["-o", "stage1.template=vicuna-v1", "-o", "stage1.image_order=random", "-o", "stage2.image_order=random"]
IMAGES = [
    option
    for stage in (1, 2)
    for given in ("shuffle=images", "batch_size=8", "micro_batch_size=8", "precision=bfloat16")
    for option in ("-o", f"stage{stage}.{given}")
]
LORA = ["-o", "stage2.method=lora", "-o", "stage2.lora.r=4", "-o", "stage2.lora.dropout=0.1"]
MUON = ["-o", "stage2.optimizer=muon", "-o", "stage2.precision=bfloat16"]
STEADY = ["-o", "stage1.epochs=8", "-o", "stage2.epochs=8", "-o", "features.mode=live"]


def command(toy: Path, stage: int, *more: str) -> list[str]:
    return ["train", "--stage", str(stage), "-r", str(toy / "recipe.yaml"), *STEADY, *more, "--json"]


def kill_after(
    toy: Path,
    stage: int,
    step: int,
    *more: str,
    how: int = signal.SIGKILL,
    before: Callable[[], None] = lambda: None,
) -> None:
    """Trains in a process of its own and ends it as soon as metrics.jsonl shows ``step``, ``before`` done first."""
    metrics = toy / f"runs/toy/stage{stage}/metrics.jsonl"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "llavactl", *command(toy, stage, *more)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment,
    )  # fmt: skip
    while process.poll() is None:
        if any(line["step"] >= step for line in read(metrics)):
            before()
            process.send_signal(how)
            process.wait()
            return
        time.sleep(0.005)
    raise AssertionError(
        f"the run ended before step {step}: {process.stderr.read().decode() if process.stderr else ''}"
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{file.name}:{k}": v for file in sorted(folder.rglob("*.safetensors")) for k, v in load_file(file).items()}


def same(left: Path, right: Path) -> None:
    assert read(left / "metrics.jsonl") == read(right / "metrics.jsonl")
    ours, theirs = weights(left / "model"), weights(right / "model")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def with_more_captions(toy: Path) -> None:
    """Three records an image, of different lengths."""
    records = json.loads((toy / "records.json").read_text())
    for record in records * 2:
        said = record["conversations"][: 2 + len(records) % 2 * 2]
        records.append({**record, "id": f"r{len(records)}", "conversations": said})
    (toy / "records.json").write_text(json.dumps(records))


@pytest.mark.parametrize(
    ("more", "how"),
    [(RANDOM, signal.SIGKILL), (LORA, signal.SIGINT), (IMAGES, signal.SIGKILL), (MUON, signal.SIGKILL)],
    ids=["full-random", "lora", "packed-shared-bfloat16", "muon"],
)
def test_ended_and_resumed_is_uninterrupted(toy: Path, more: list[str], how: int) -> None:
    if more is IMAGES:
        with_more_captions(toy)
    whole = ["-o", f"run_dir={toy}/whole"]
    for stage in (1, 2):
        assert run_cli(*command(toy, stage, *more, *whole)).exit_code == 0
    for stage in (1, 2):
        kill_after(toy, stage, 11, *more, how=how)
        result = run_cli(*command(toy, stage, *more))
        assert result.exit_code == 0, result.stderr
        first = result.json()["resumed_from"]
        assert first >= 11 - 3, "at most one checkpoint interval is repeated"
        assert (more is IMAGES) == (result.json()["prefix_sharing"] > 0.1)
        same(toy / f"runs/toy/stage{stage}", toy / f"whole/stage{stage}")


def test_a_damaged_newest_checkpoint_is_passed_over(toy: Path) -> None:
    whole = ["-o", f"run_dir={toy}/whole"]
    assert run_cli(*command(toy, 1, *whole)).exit_code == 0
    kill_after(toy, 1, 9)
    newest = max((toy / "runs/toy/stage1/checkpoints").glob("step-*"))
    tensors = newest / "optimizer.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100] + bytes(100))
    result = run_cli(*command(toy, 1))
    assert newest.name in result.stderr
    assert 0 < result.json()["resumed_from"] < int(newest.name.partition("-")[2])
    same(toy / "runs/toy/stage1", toy / "whole/stage1")


def test_two_at_once_are_refused_in_words(toy: Path) -> None:
    def second() -> None:
        refused = run_cli(*command(toy, 1))
        assert refused.exit_code == 1
        assert "another process is training" in refused.stderr
        assert "another `name`" in refused.stderr

    kill_after(toy, 1, 1, "-o", "stage1.epochs=1000", before=second)
    assert run_cli(*command(toy, 1)).exit_code == 0


def test_never_starts_anew_and_other_settings_do_too(toy: Path) -> None:
    assert run_cli(*command(toy, 1)).json()["finished_before"] is False
    assert run_cli(*command(toy, 1)).json()["finished_before"] is True
    assert run_cli(*command(toy, 1, "--resume", "never")).json()["finished_before"] is False
    assert run_cli(*command(toy, 1, "-o", "stage1.micro_batch_size=4")).json()["finished_before"] is True
    assert run_cli(*command(toy, 1, "-o", "stage1.learning_rate=2e-3")).json()["finished_before"] is False
    records = toy / "records.json"
    changed = json.loads(records.read_text())
    changed[0]["conversations"][1]["value"] = "Something else."
    records.write_text(json.dumps(changed))
    again = run_cli(*command(toy, 1, "-o", "stage1.learning_rate=2e-3")).json()
    assert (again["finished_before"], again["resumed_from"]) == (False, 0)


def test_accumulation_does_not_change_the_loss(toy: Path) -> None:
    recipe = load_recipe(toy / "recipe.yaml")
    assert recipe.stage1.batch_size == 4
    runs = {}
    for micro in (1, 4):
        args = ["-o", f"stage1.micro_batch_size={micro}", "-o", f"run_dir={toy}/m{micro}", "-o", "stage1.max_steps=5"]
        assert run_cli(*command(toy, 1, *args)).exit_code == 0
        runs[micro] = [line["loss"] for line in read(toy / f"m{micro}/stage1/metrics.jsonl") if "loss" in line]
    assert runs[1] == pytest.approx(runs[4], rel=1e-4)
