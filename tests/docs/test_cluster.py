"""Commands for several GPUs and machines run on CPUs: two processes instead of eight, two launchers as two hosts."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llavactl.training.metrics import read, without_measured

DOCS = Path(__file__).parents[2] / "docs"


def code(page: str, language: str) -> list[str]:
    """The code blocks in ``language`` of a page."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.+?)^```$", text, re.MULTILINE | re.DOTALL)


COMMANDS = [block.strip() for block in code("how-to/several-machines.md", "sh")]
(SCRIPT,) = code("tutorials/cluster.md", "bash")
TIMEOUT_S = 500

SRUN = r"""#!/bin/bash
# Starts the command once per machine and forwards SIGTERM, as srun does.
while [[ "$1" == --* ]]; do shift; done
pids=()
for node in $(seq "$SLURM_NNODES"); do "$@" & pids+=($!); done
trap 'kill -TERM "${pids[@]}"' TERM
code=0
for pid in "${pids[@]}"; do
    wait "$pid" || code=$?
    while kill -0 "$pid" 2>/dev/null; do wait "$pid" || code=$?; done
done
exit "$code"
"""
SCONTROL = r"""#!/bin/bash
if [ "$1" = requeue ]; then echo "$2" >> requeued; else echo localhost; fi
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def environment(toy: Path, tmp_path: Path) -> dict[str, str]:
    """Programs of Slurm and of this environment, in a folder with the toy recipe."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    slurm = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost"}
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "HEAD": "localhost", **slurm}


def local(text: str) -> str:
    """``text`` with two processes per machine instead of eight, and a free port."""
    text = re.sub(r"(--nproc-per-node|--num_processes) 8", r"\1 2", text).replace("29500", str(free_port()))
    return text.replace("torchrun ", f"torchrun --master-port {free_port()} ") if "--rdzv" not in text else text


def run(text: str, toy: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", text], cwd=toy, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def finished(toy: Path, stage: int) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((toy / f"runs/toy/stage{stage}/report.json").read_text())
    return report


def test_the_script_is_bash() -> None:
    checked = subprocess.run(["bash", "-n"], input=SCRIPT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    assert all(line.startswith("#SBATCH --") for line in SCRIPT.splitlines() if line.startswith("#SBATCH"))


def test_every_command_of_the_page_is_run_by_a_test() -> None:
    assert [command.split()[0] for command in COMMANDS] == ["torchrun", "accelerate", "torchrun", "torchrun"]
    assert ["--rdzv-endpoint" in command for command in COMMANDS] == [False, False, True, False]
    assert "--max-restarts" in COMMANDS[3]


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS[:2], ids=["torchrun", "accelerate"])
def test_a_whole_run_on_one_machine(toy: Path, environment: dict[str, str], command: str) -> None:
    recipe = toy / "recipe.yaml"
    tasks = "eval: {tasks: [{name: scenes, scenes: 1, questions: 2}], max_new_tokens: 2}\n"
    recipe.write_text(f"{recipe.read_text()}{tasks}export: [{{format: hf, to: out/}}]\n")
    done = run(local(command), toy, environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert finished(toy, 2)["steps"] == 6
    assert json.loads((toy / "runs/toy/eval/scenes.json").read_text())["n"] == 2
    assert (toy / "out/config.json").is_file()


@pytest.mark.slow
def test_two_machines(toy: Path, environment: dict[str, str]) -> None:
    assert run("llavactl extract && llavactl train --stage 1", toy, environment).returncode == 0
    command = local(COMMANDS[2]).replace("--nproc-per-node 2", "--nproc-per-node 1")
    done = run(f"{command} & {command}; code=$?; wait $! && exit $code", toy, environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert finished(toy, 2)["steps"] == 6


def script(toy: Path) -> None:
    (toy / "job.sh").write_text(local(SCRIPT))


@pytest.mark.slow
def test_the_slurm_script(toy: Path, environment: dict[str, str]) -> None:
    script(toy)
    done = run("bash job.sh", toy, environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [finished(toy, stage)["steps"] for stage in (1, 2)] == [6, 6]
    parts = [json.loads(line) for line in (toy / "runs/toy/stage1/metrics.jsonl").read_text().splitlines()]
    assert parts


@pytest.mark.slow
def test_the_slurm_script_is_requeued_before_its_time_limit(toy: Path, environment: dict[str, str]) -> None:
    script(toy)
    recipe = toy / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("stage1: {epochs: 2", "stage1: {epochs: 400"))
    job = subprocess.Popen(["bash", "job.sh"], cwd=toy, env=environment, stderr=subprocess.PIPE, text=True)
    metrics = toy / "runs/toy/stage1/metrics.jsonl"
    until = time.monotonic() + TIMEOUT_S
    while not (metrics.exists() and len(read(metrics)) > 5):
        assert job.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    _, errors = job.communicate(timeout=TIMEOUT_S)
    assert job.returncode == 0, errors[-3000:]
    assert (toy / "requeued").read_text() == "7\n"
    steps = read(metrics)[-1]["step"]
    assert (toy / f"runs/toy/stage1/checkpoints/step-{steps:08d}").is_dir(), errors[-3000:]


KILL = """
import os, signal, sys
from pathlib import Path
from llavactl.training import loop
original = loop.update
def update(run, gradient, step, steps):
    marker = Path("killed")
    if step == 4 and os.environ["RANK"] == "1" and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return original(run, gradient, step, steps)
loop.update = update
"""


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_a_killed_process_is_restarted_and_the_run_resumes(
    toy: Path, tmp_path: Path, environment: dict[str, str], sharding: str
) -> None:
    prepared = run("llavactl extract && llavactl train --stage 1", toy, environment)
    assert prepared.returncode == 0, prepared.stderr
    other = tmp_path / "uninterrupted"
    shutil.copytree(toy, other)
    (tmp_path / "sitecustomize").mkdir()
    (tmp_path / "sitecustomize/killing.py").write_text(KILL)
    (tmp_path / "sitecustomize/sitecustomize.py").write_text(
        "import os\nif 'RANK' in os.environ:\n    import killing\n"
    )
    paths = [str(tmp_path / "sitecustomize"), environment.get("PYTHONPATH", "")]
    command = local(COMMANDS[3]) + f" -o sharding={sharding}"
    killed = run(command, toy, {**environment, "PYTHONPATH": os.pathsep.join(paths)})
    assert killed.returncode == 0, killed.stderr[-3000:]
    assert (toy / "killed").exists()
    assert finished(toy, 2)["resumed_from"] == 4
    assert run(command, other, environment).returncode == 0
    lines = (without_measured(read(folder / "runs/toy/stage2/metrics.jsonl")) for folder in (toy, other))
    assert next(lines) == next(lines)
