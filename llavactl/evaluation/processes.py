"""Evaluation in several processes (torchrun, accelerate): each answers part of the questions, the main one scores."""

from __future__ import annotations

import os
from dataclasses import dataclass

from llavactl.core.processes import check_launch, join_process_group


@dataclass(frozen=True)
class Processes:
    """The rank of this process and the number of processes."""

    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Waits until all processes have reached this point."""
        if self.count > 1:
            from torch import distributed

            distributed.barrier()


SINGLE_PROCESS = Processes()


def launched_processes() -> Processes:
    """The processes of this launch, initialized with one device each.

    Raises:
        RecipeError: accelerate's configuration requires a feature that llavactl doesn't support.
    """
    check_launch()
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return SINGLE_PROCESS
    join_process_group()
    from torch import distributed

    return Processes(distributed.get_rank(), distributed.get_world_size())
