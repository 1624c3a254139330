"""The processes that train together, as torchrun or accelerate started them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llavactl.core.processes import check_launch, leave_in_order, on_cpu

if TYPE_CHECKING:
    from accelerate import Accelerator


def accelerator(precision: str) -> Accelerator:
    """This process among the others; the recipe's ``precision`` is the model's own, so nothing is autocast.

    Raises:
        RecipeError: accelerate's configuration asks for what llavactl does not do.
    """
    check_launch(precision)
    from accelerate import Accelerator

    made = Accelerator(mixed_precision="no", cpu=on_cpu())
    if made.num_processes > 1:
        leave_in_order()
    return made
