"""The split of an extraction across processes: each image belongs to one part, chosen by its content hash."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass

_RANK_VARIABLES = ("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
"""Set by torchrun and accelerate, and by srun. (sbatch sets only the first variable of srun.)"""


@dataclass(frozen=True)
class Part:
    """Part ``index`` (from 0) of ``count``."""

    index: int = 0
    count: int = 1

    @property
    def whole(self) -> bool:
        """Whether this is the only part."""
        return self.count == 1

    def owns(self, key: str) -> bool:
        """Whether the content ``key`` belongs to this part; exactly one of ``count`` parts owns it, in every run."""
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        return int.from_bytes(digest) % self.count == self.index


WHOLE = Part()


def part_of_this_process(environment: Mapping[str, str] = os.environ) -> Part:
    """The part assigned by the launcher; ``WHOLE`` without a launcher."""
    for index, count in _RANK_VARIABLES:
        if index in environment and count in environment:
            return Part(int(environment[index]), max(1, int(environment[count])))
    return WHOLE
