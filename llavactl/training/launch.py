"""Sets up distributed training under torchrun or accelerate."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from llavactl.core.errors import RecipeError
from llavactl.core.processes import check_launch, destroy_process_group_at_exit, multiprocess_on_cpu

if TYPE_CHECKING:
    from accelerate import Accelerator

_ENGINES = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "XLA")
"""What accelerate may select, whatever the cause, and what llavactl's training loop doesn't use."""


def accelerator(precision: str) -> Accelerator:
    """This process's accelerator, without autocast: the model's weights already have the recipe's ``precision``.

    Raises:
        RecipeError: accelerate's configuration requires a feature that llavactl doesn't support.
    """
    check_launch(precision)
    from accelerate import Accelerator

    _init_process_group()
    created = Accelerator(mixed_precision="no", cpu=multiprocess_on_cpu())
    if (engine := created.distributed_type.value) in _ENGINES:
        raise RecipeError(
            f"accelerate's environment selects {engine}, which llavactl doesn't support",
            hint="launch with torchrun, or with `accelerate launch` and a configuration of type MULTI_GPU",
        )
    if created.num_processes > 1:
        destroy_process_group_at_exit()
    return created


def _init_process_group() -> None:
    """On CUDA with several processes: NCCL, and gloo for optimizer state in host memory. accelerate uses NCCL only."""
    import torch
    from torch import distributed

    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and torch.cuda.is_available() and not distributed.is_initialized():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        distributed.init_process_group("cuda:nccl,cpu:gloo")
