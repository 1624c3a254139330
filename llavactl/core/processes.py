"""Processes of `accelerate launch` and torchrun: their settings, their group, what each of them logs, how they exit."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from contextlib import suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import NoReturn

from llavactl.core.errors import RecipeError

GROUP_TIMEOUT = timedelta(days=1)
"""How long processes wait for each other: longer than anything that one of them does while the others wait, such as
hashing a model, verifying an export or asking a judge. If a process dies, the launcher stops the others.
"""

_OFF = ("", "no", "n", "false", "f", "off", "0", "none")
"""Values that accelerate reads as false or as none."""

_UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed; `sharding: full` in the recipe shards the model as ZeRO-3 does, and "
    "`optimizer_state: host` keeps the optimizer state in host memory",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config; `sharding: full` in the recipe shards the model",
    "ACCELERATE_USE_FSDP": "accelerate's FSDP plugin; `sharding: full` in the recipe shards the model with FSDP2",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM; `sharding: full` in the recipe shards the model",
    "ACCELERATE_DYNAMO_BACKEND": "torch.compile",
}
"""Settings that change how a model is trained, with the reason for the message. Ignoring them would train another way
than the configuration says.
"""

_MIXED = {"bf16": "bfloat16", "fp16": "float16"}


def check_launch(precision: str | None = None) -> None:
    """Checks for settings of accelerate that llavactl doesn't support.

    Only the number of processes and their devices are used. ``precision`` is the recipe's.

    Raises:
        RecipeError: several processes without a process group, DeepSpeed, FSDP or another engine, gradient
            accumulation, or a precision that differs from the recipe's. The message names the variable, and the
            recipe's key to use instead.
    """
    if os.environ.get("WORLD_SIZE", "1") not in (*_OFF, "1") and not os.environ.get("MASTER_ADDR"):
        raise RecipeError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set but MASTER_ADDR is not",
            hint="launch with torchrun or `accelerate launch`; for a single process, unset WORLD_SIZE and RANK",
        )
    if int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1 and "WORLD_SIZE" not in os.environ:
        raise RecipeError(
            f"srun started {os.environ['SLURM_STEP_NUM_TASKS']} tasks without a process group",
            hint="start one torchrun per node with srun (docs/tutorials/cluster.md); only `llavactl extract` needs no "
            "launcher",
        )
    for name, what in _UNSUPPORTED.items():
        if os.environ.get(name, "").lower() not in _OFF:
            raise _unsupported(name, f"llavactl doesn't support {what}")
    name = "ACCELERATE_MIXED_PRECISION"
    mixed = os.environ.get(name, "").lower()
    if mixed not in _OFF and (mixed not in _MIXED or precision not in (None, _MIXED[mixed])):
        value = f" ({precision})" if precision else ""
        raise _unsupported(name, f"the precision is set by `precision` in the recipe{value}")
    if os.environ.get(name := "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") not in ("", "1", "auto"):
        raise _unsupported(name, "gradient accumulation is set by `batch_size` and `micro_batch_size` in the recipe")


def _unsupported(name: str, why: str) -> RecipeError:
    folder = os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface")  # noqa: PTH111 - never raises
    file = Path(folder, "accelerate", "default_config.yaml")
    where = f" (`accelerate launch` sets it from its options and {file})" if file.is_file() else ""
    return RecipeError(
        f"{name}={os.environ[name]}{where}: {why}",
        hint=f"unset {name}, or launch with a plain configuration: `accelerate launch --num_processes N`, or torchrun",
    )


def multiprocess_on_cpu() -> bool:
    """Whether several processes run without accelerators.

    accelerate doesn't detect this and would treat each of them as a single process.
    """
    import torch

    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()


def join_process_group() -> None:
    """Joins the process group of this launch, unless there is only one process or it has joined already.

    On CUDA it has NCCL, and gloo for optimizer state in host memory; accelerate alone would use NCCL only. Keys in the
    launcher's store have a prefix for each restart: with its default rendezvous torchrun keeps the store, and processes
    restarted by ``--max-restarts`` would find the addresses of the previous ones.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return
    import torch
    from torch import distributed
    from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

    other_accelerator = not torch.cuda.is_available() and not multiprocess_on_cpu()  # accelerate knows its backend
    if not distributed.is_initialized() and not other_accelerator:
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
            backend = "cuda:nccl,cpu:gloo"
        store, rank, size = next(rendezvous("env://", timeout=GROUP_TIMEOUT))
        store = PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=GROUP_TIMEOUT)
    _destroy_at_exit()


@cache
def _destroy_at_exit() -> None:
    """Destroys a gloo process group when this process exits.

    NCCL groups are kept: destroying them waits for the other processes, which may be waiting for a failed one.
    """

    def destroy() -> None:
        from torch import distributed

        if distributed.is_initialized() and distributed.get_backend() == "gloo":
            distributed.destroy_process_group()

    atexit.register(destroy)


def is_main_process() -> bool:
    """Whether this process has rank 0 in its process group, or has joined none."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return True
    return int(distributed.get_rank()) == 0


PER_PROCESS = {"scope": "process"}
PER_MACHINE = {"scope": "machine"}
"""``extra`` of log records about this process or machine alone, such as its share of the images, or its disk."""


def is_logged(record: logging.LogRecord) -> bool:
    """Whether this process prints ``record``: in a process group, all processes log the same.

    Every process prints errors and records with ``PER_PROCESS``, one process of each machine those with
    ``PER_MACHINE``, and the main process all others.
    """
    scope = "process" if record.levelno >= logging.ERROR else getattr(record, "scope", "")
    return is_main_process() or scope == "process" or (scope == "machine" and os.environ.get("LOCAL_RANK") == "0")


def exit_process(code: int) -> NoReturn:
    """Exits with ``code``; in a process group, without finalizing the interpreter.

    Threads of gloo and NCCL outlive a destroyed group, which caches of torch still refer to. If one waits for the GIL,
    to release a tensor, while Python is finalized, the process is aborted after all its work is done.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
