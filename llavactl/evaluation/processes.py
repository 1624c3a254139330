"""Evaluation in several processes (torchrun, accelerate): each answers part of the questions, the main one scores."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

from llavactl.core.processes import check_launch, destroy_process_group_at_exit

BARRIER_TIMEOUT = timedelta(days=7)
"""Long, since the other processes wait for a judge; if a process dies, the launcher stops them."""


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
    import torch
    from accelerate import PartialState

    # Without ``cpu=True``, accelerate treats several processes without a GPU as separate single processes.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=BARRIER_TIMEOUT)
    destroy_process_group_at_exit()
    return Processes(state.process_index, state.num_processes)
