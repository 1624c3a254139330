"""Evaluation in several processes, as torchrun or accelerate start them: each asks its share, the first one scores."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

from llavactl.core.processes import check_launch, destroy_process_group_at_exit

PATIENCE = timedelta(days=7)
"""How long a process waits for the others: a judge may take long, and who dies takes the others along anyhow."""


@dataclass(frozen=True)
class Processes:
    """This one of ``count`` processes."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def meet(self) -> None:
        """Waits until all are here."""
        if self.count > 1:
            from torch import distributed

            distributed.barrier()


ALONE = Processes()


def processes() -> Processes:
    """Those that were started together; each then computes on its own device."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return ALONE
    check_launch()
    import torch
    from accelerate import PartialState

    # It has to be told of a CPU: else several processes without a GPU are strangers to it.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    destroy_process_group_at_exit()
    return Processes(state.process_index, state.num_processes)
