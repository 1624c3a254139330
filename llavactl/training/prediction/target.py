"""The devices that a stage must fit on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llavactl.training.prediction.predict import Prediction

RESERVE = 0.06
"""The fraction of a device's memory that is left free. On CUDA: for the CUDA context, kernels' work space, and memory
that torch's allocator can't use because of fragmentation. On a CPU: for the system. An estimate: it was not measured.
"""


@dataclass(frozen=True)
class Target:
    """The devices to plan for: ``count`` CUDA devices, or CPU processes, with ``memory_bytes`` each."""

    cuda: bool
    memory_bytes: int
    count: int = 1

    @property
    def kind(self) -> str:
        return "cuda" if self.cuda else "cpu"

    def holds(self, prediction: Prediction) -> bool:
        """Whether the peak memory of ``prediction`` fits."""
        return self.peak_bytes(prediction) <= self.usable_bytes

    def peak_bytes(self, prediction: Prediction) -> int:
        """The peak that must fit: of one CUDA device, or of all processes on a CPU, which share its memory."""
        return self.process_bytes(prediction) * (1 if self.cuda else self.count)

    def process_bytes(self, prediction: Prediction) -> int:
        """The peak of one process in this kind of memory."""
        return prediction.device_bytes if self.cuda else prediction.host_bytes

    @property
    def usable_bytes(self) -> int:
        return round(self.memory_bytes * (1 - RESERVE))


def target_device(memory: int | None, count: int | None) -> Target:
    """``count`` CUDA devices of ``memory`` bytes, or those of this machine, or CPU processes.

    Default for ``count``: the processes of this launch, so 1 without torchrun.
    """
    import torch

    from llavactl.features.device import default_device

    count = count or int(os.environ.get("WORLD_SIZE", "1") or 1)
    if memory is not None:
        return Target(True, memory, count)
    if default_device().startswith("cuda"):
        indices = range(torch.cuda.device_count())
        return gpus([torch.cuda.get_device_properties(index).total_memory for index in indices], count)
    import psutil

    return Target(False, int(psutil.virtual_memory().total), count)


def gpus(memory: Sequence[int], count: int) -> Target:
    """``count`` GPUs with the ``memory`` of those of this machine: the first ones, which must all hold the largest."""
    return Target(True, min(memory[:count]), count)
