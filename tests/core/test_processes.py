"""Settings of accelerate, and how processes of a group start and end."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from llavactl.core.errors import RecipeError
from llavactl.core.processes import PER_MACHINE, PER_PROCESS, check_launch, is_logged
from llavactl.testing import run_cli

PLAIN = {
    "ACCELERATE_USE_CPU": "True",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
}
"""Variables that `accelerate launch` sets without a configuration."""

UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_MEGATRON_LM": "true",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
}


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_process_group_logs_once(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """Rank 2 is the first process of another machine."""
    from torch import distributed

    def printed(level: int = logging.WARNING, extra: dict[str, str] | None = None) -> bool:
        return is_logged(logging.makeLogRecord({"levelno": level, **(extra or {})}))

    monkeypatch.setenv("LOCAL_RANK", str(rank % 2))
    assert printed(), "without a group"
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_rank", lambda: rank)
    assert printed() == printed(logging.INFO) == (rank == 0)
    assert printed(extra=PER_MACHINE) == (rank != 1)
    assert printed(extra=PER_PROCESS)
    assert printed(logging.ERROR)


def test_default_settings_are_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PLAIN.items():
        monkeypatch.setenv(name, value)
    check_launch("bfloat16")
    check_launch()


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_settings_are_rejected(monkeypatch: pytest.MonkeyPatch, toy: Path, name: str) -> None:
    monkeypatch.setenv(name, UNSUPPORTED[name])
    for command in (["run"], ["train", "--stage", "1"]):
        result = run_cli(*command, cwd=toy)
        assert result.exit_code == 1
        (error, hint) = result.stderr.splitlines()
        assert name in error
        assert name in hint
    assert not (toy / "runs").exists()


@pytest.mark.parametrize(
    ("mixed", "precision", "supported"),
    [
        *(("no", precision, True) for precision in ("float32", "bfloat16")),
        *(("bf16", "bfloat16", True), ("bf16", "float32", False), ("bf16", None, True)),
        *(("fp16", "bfloat16", False), ("fp8", "bfloat16", False), ("fp8", None, False)),
    ],
)
def test_the_precision_must_match_the_recipe(
    monkeypatch: pytest.MonkeyPatch, mixed: str, precision: str | None, supported: bool
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", mixed)
    if supported:
        check_launch(precision)
        return
    with pytest.raises(RecipeError, match=f"ACCELERATE_MIXED_PRECISION={mixed}"):
        check_launch(precision)


def test_the_configuration_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "accelerate" / "default_config.yaml"
    file.parent.mkdir()
    file.write_text("distributed_type: DEEPSPEED\n", encoding="utf-8")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    check_launch()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(RecipeError) as caught:
        check_launch()
    assert str(file) in caught.value.message


def test_world_size_without_master_addr(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such variables may be left over in a shell or a job script."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(RecipeError, match=r"WORLD_SIZE=2 .*MASTER_ADDR"):
        check_launch()


def test_tasks_of_srun_without_a_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would train the whole stage into the same folder."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(RecipeError, match="srun started 8 tasks"):
        check_launch()
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("MASTER_ADDR", "node0")
    check_launch()


@pytest.mark.parametrize("value", ["no", "False", "off", "0", "n"])
def test_what_accelerate_reads_as_false_is_supported(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    from accelerate.utils.environment import str_to_bool

    assert not str_to_bool(value)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", value)
    check_launch()


LAUNCHED = {
    "ACCELERATE_USE_FSDP": {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 1}},
    "ACCELERATE_USE_FSDP=true": {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}},
    "ACCELERATE_USE_PARALLELISM_CONFIG": {
        "distributed_type": "FSDP",
        "fsdp_config": {"fsdp_version": 2},
        "parallelism_config": {"parallelism_config_dp_shard_size": 2},
    },
    "ACCELERATE_USE_MEGATRON_LM": {
        "distributed_type": "MEGATRON_LM",
        "megatron_lm_config": {"megatron_lm_tp_degree": 2},
    },
    "ACCELERATE_MIXED_PRECISION=fp16": {"distributed_type": "MULTI_GPU", "mixed_precision": "fp16"},
    "ACCELERATE_MIXED_PRECISION=bf16": {"distributed_type": "MULTI_GPU", "mixed_precision": "bf16"},
    "ACCELERATE_DYNAMO_BACKEND": {"distributed_type": "MULTI_GPU", "dynamo_config": {"dynamo_backend": "INDUCTOR"}},
}
"""Configurations of `accelerate config`, and the variable that their refusal names; the recipe is in float32.

DeepSpeed, FP8 and TPUs need packages that `accelerate launch` looks for itself.
"""


@pytest.mark.slow
@pytest.mark.parametrize("variable", LAUNCHED)
def test_accelerate_launch_with_an_unsupported_configuration_is_refused(
    toy: Path, tmp_path: Path, variable: str
) -> None:
    config = {"compute_environment": "LOCAL_MACHINE", "mixed_precision": "no", "num_machines": 1, "num_processes": 2}
    file = tmp_path / "accelerate.yaml"
    file.write_text(json.dumps({**config, **LAUNCHED[variable]}))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), "-m", "llavactl"]
    launched = subprocess.run(
        [*launcher, "train", "--stage", "1", "-r", str(toy / "recipe.yaml")],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert launched.returncode != 0
    errors = [line for line in launched.stderr.splitlines() if line.startswith("llavactl:") or "error:" in line]
    assert any(variable in line for line in errors), launched.stderr[-2000:]
    assert not (toy / "runs").exists()


GROUP = """
import os, signal, sys
from accelerate import Accelerator
from llavactl.core.processes import join_process_group, multiprocess_on_cpu
join_process_group()
accelerator = Accelerator(cpu=multiprocess_on_cpu())
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    os.kill(os.getpid(), signal.SIGKILL)
accelerator.wait_for_everyone()
print(f"{accelerator.process_index} of {accelerator.num_processes}", flush=True)
"""


@pytest.mark.slow  # another test may take its port
def test_restarted_processes_join_a_new_group(tmp_path: Path) -> None:
    """With torchrun's default rendezvous, they would connect to the addresses of the processes before."""
    script = tmp_path / "group.py"
    script.write_text(GROUP)
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
    launched = subprocess.run(
        [*launcher, "--max-restarts", "1", str(script)], capture_output=True, text=True, check=False, timeout=300
    )
    assert launched.returncode == 0, launched.stderr[-3000:]
    assert sorted(launched.stdout.split("\n"))[-2:] == ["0 of 2", "1 of 2"]


EXIT = """
import atexit, sys
from torch import distributed
from llavactl.core.processes import exit_process

class Finalized:
    def __del__(self, write=sys.__stderr__.write):
        write("finalized")

sys.left = Finalized()
atexit.register(print, "atexit")
if sys.argv[1:] == ["group"]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
print("done")
exit_process(3)
"""


@pytest.mark.parametrize("arguments", [[], ["group"]])
def test_a_process_of_a_group_exits_without_finalizing_the_interpreter(arguments: list[str]) -> None:
    """A thread of gloo that releases a tensor while Python is finalized aborts the process."""
    ended = subprocess.run([sys.executable, "-c", EXIT, *arguments], capture_output=True, text=True, check=False)
    assert ended.returncode == 3, ended.stderr
    assert ended.stdout.split() == ["done", "atexit"]
    assert ("finalized" in ended.stderr) == (not arguments)
