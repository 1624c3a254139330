"""Sets up distributed training under torchrun or accelerate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llavactl.core.errors import RecipeError
from llavactl.core.processes import check_launch, join_process_group, multiprocess_on_cpu

if TYPE_CHECKING:
    from accelerate import Accelerator

_ENGINES = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "XLA")
"""Engines that accelerate's environment may select, and that llavactl doesn't support."""


def accelerator(precision: str) -> Accelerator:
    """This process's accelerator, without autocast: the model's weights already have the recipe's ``precision``.

    Raises:
        RecipeError: accelerate's configuration requires a feature that llavactl doesn't support.
    """
    check_launch(precision)
    from accelerate import Accelerator

    join_process_group()
    created = Accelerator(mixed_precision="no", cpu=multiprocess_on_cpu())
    if (engine := created.distributed_type.value) in _ENGINES:
        raise RecipeError(
            f"accelerate's environment selects {engine}, which llavactl doesn't support",
            hint="launch with torchrun, or with `accelerate launch` and a configuration of type MULTI_GPU",
        )
    return created
