"""One of several processes that share the work of an extract: images are dealt out by their content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass

_TOLD = ("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
"""What torchrun and accelerate, and what srun tell a process. (sbatch alone sets only the first of srun's.)"""


@dataclass(frozen=True)
class Part:
    """Part ``index`` of ``count``, from 0."""

    index: int = 0
    count: int = 1

    @property
    def alone(self) -> bool:
        """Whether this is all of it."""
        return self.count == 1

    def owns(self, key: str) -> bool:
        """Whether what is called ``key`` is this part's work: of any other part it isn't, whenever they are asked."""
        number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())
        return number % self.count == self.index


WHOLE = Part()


def part_of_this_process(environment: Mapping[str, str] = os.environ) -> Part:
    """What the launcher says; the whole, where there is none."""
    for index, count in _TOLD:
        if index in environment and count in environment:
            return Part(int(environment[index]), max(1, int(environment[count])))
    return Part()


def device_of(part: Part, device: str, environment: Mapping[str, str] = os.environ) -> str:
    """``device``, or where that is ``cuda`` and there are several parts, the GPU of this one."""
    if part.alone or device != "cuda":
        return device
    import torch

    local = environment.get("LOCAL_RANK") or environment.get("SLURM_LOCALID") or str(part.index)
    return f"cuda:{int(local) % torch.cuda.device_count()}"
