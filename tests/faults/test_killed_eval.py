"""`llavactl eval` killed and run again: no answer is generated twice, and the scores are unchanged."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llavactl.testing import run_cli

SHORT = ("-o", "eval.max_new_tokens=3", "-o", "eval.batch_size=2", "-o", "eval.blind_baseline=false")
OPTIONS = ("-t", "scenes=15", *SHORT, "--json")


def start(toy: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "llavactl", "eval", "scenes", *OPTIONS],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=toy,
    )  # fmt: skip


def answers(toy: Path) -> list[bytes]:
    return [line for file in (toy / "runs/toy/eval/answers").glob("*.jsonl") for line in file.read_bytes().splitlines()]


@pytest.mark.slow
def test_resumed_eval_equals_uninterrupted_eval(toy: Path) -> None:
    short = ("-o", "features.mode=live", "-o", "stage1.max_steps=1")
    assert run_cli("train", "--stage", "1", *short, cwd=toy).exit_code == 0
    process = start(toy)
    while len(answers(toy)) < 10:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = answers(toy)
    assert 10 <= len(before) < 90
    complete = [line for line in before if line.endswith(b"}")]
    resumed = run_cli("eval", "scenes", *OPTIONS, cwd=toy)
    assert resumed.exit_code == 0, resumed.stderr
    assert answers(toy)[: len(complete)] == complete
    assert len(answers(toy)) == 90
    for file in (toy / "runs/toy/eval/answers").glob("*.jsonl"):
        file.unlink()
    (toy / "runs/toy/eval/scenes.json").unlink()
    uninterrupted = run_cli("eval", "scenes", *OPTIONS, cwd=toy).json()
    assert uninterrupted["finished_before"] is False
    assert uninterrupted["scores"] == resumed.json()["scores"]
