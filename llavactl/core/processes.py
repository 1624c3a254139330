"""Environment variables of `accelerate launch` and torchrun, and leaving a process group cleanly."""

from __future__ import annotations

import atexit
import os
from functools import cache
from pathlib import Path

from llavactl.core.errors import RecipeError

_OFF = ("", "no", "false", "0", "none")
_UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "accelerate's FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
    "ACCELERATE_DYNAMO_BACKEND": "torch.compile",
}
_MIXED = {"bf16": "bfloat16", "fp16": "float16"}


def check_launch(precision: str | None = None) -> None:
    """Refuses settings of accelerate that llavactl doesn't implement.

    The number of processes and their devices are used. ``precision`` is the recipe's.

    Raises:
        RecipeError: DeepSpeed, FSDP and the like, gradient accumulation, or another precision than the recipe's.
    """
    if os.environ.get("WORLD_SIZE", "1") not in (*_OFF, "1") and not os.environ.get("MASTER_ADDR"):
        raise RecipeError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set but MASTER_ADDR is not, so the processes can't meet",
            hint="launch with torchrun or `accelerate launch`; for a single process, unset WORLD_SIZE and RANK",
        )
    for name, what in _UNSUPPORTED.items():
        if os.environ.get(name, "").lower() not in _OFF:
            raise _refused(name, f"llavactl doesn't support {what}")
    name = "ACCELERATE_MIXED_PRECISION"
    wanted = os.environ.get(name, "").lower()
    if wanted not in _OFF and (wanted not in _MIXED or precision not in (None, _MIXED[wanted])):
        value = f" ({precision})" if precision else ""
        raise _refused(name, f"the precision is set by `precision` in the recipe{value}")
    if os.environ.get(name := "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") not in ("", "1", "auto"):
        raise _refused(name, "gradient accumulation is set by `batch_size` and `micro_batch_size` in the recipe")


def _refused(name: str, why: str) -> RecipeError:
    folder = os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface")  # noqa: PTH111 - never raises
    file = Path(folder, "accelerate", "default_config.yaml")
    where = f" (`accelerate launch` sets it from its options and {file})" if file.is_file() else ""
    return RecipeError(
        f"{name}={os.environ[name]}{where}: {why}",
        hint=f"unset {name}, or launch with a plain configuration: `accelerate launch --num_processes N`, or torchrun",
    )


def on_cpu() -> bool:
    """Whether several processes run on a machine without accelerators: accelerate doesn't detect this by itself and
    would treat each as a single process.
    """
    import torch

    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()


@cache
def leave_in_order() -> None:
    """At the end of this process, ends the threads by which it hears from the others.

    Left to themselves they were seen to abort a process that had finished all its work. On GPUs they stay: NCCL
    would wait for the others there, also for those that wait for a process that failed.
    """
    atexit.register(_leave)


def _leave() -> None:
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized() and distributed.get_backend() == "gloo":
        distributed.destroy_process_group()
