"""Prefetching: a thread prepares the micro-batches of the next step during the current one."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llavactl.data.micro_batches import Partition, packed_micro_batches, padded_micro_batches
from llavactl.data.packing import MicroBatchLimits

if TYPE_CHECKING:
    import numpy as np

    from llavactl.core.schema import Batch, ImageRef
    from llavactl.core.stopping import Stop
    from llavactl.data.batches import FeatureLookup
    from llavactl.data.micro_batches import BatchIndices
    from llavactl.data.plan import BatchPlan
    from llavactl.data.sample_set import SampleSet
    from llavactl.training.run import Run


def prefetched_steps(run: Run, plan: BatchPlan, start: int, end: int, stop: Stop) -> Generator[tuple[int, list[Batch]]]:
    """Yields each step from ``start`` up to ``end`` with this process's micro-batches.

    They are incomplete once ``stop`` is set. Close it if not all steps are used.
    """
    if start >= end:
        return
    with ThreadPoolExecutor(1) as thread:
        pending = thread.submit(micro_batches, run, run.data, plan.batch(start), stop)
        for step in range(start, end):
            try:
                batches = pending.result()
            except CancelledError:
                batches = []
            if step + 1 < end:
                pending = thread.submit(micro_batches, run, run.data, plan.batch(step + 1), stop)
            yield step, batches


def micro_batches(run: Run, data: SampleSet, indices: BatchIndices, stop: Stop) -> list[Batch]:
    """This process's micro-batches of a global batch; raises CancelledError once ``stop`` is set."""
    settings, process, processes = run.settings, run.accelerator.process_index, run.accelerator.num_processes
    samples = max(1, min(settings.micro_batch_size, settings.batch_size // processes))
    assert settings.micro_batch_tokens != "auto", "chosen before training"
    partition = Partition(MicroBatchLimits(samples, settings.micro_batch_tokens), process, processes)
    data = replace(data, features=_CancellableLookup(data.features, stop))
    return (padded_micro_batches if run.padding_reason else packed_micro_batches)(data, indices, partition)


@dataclass(frozen=True)
class _CancellableLookup:
    """Features that raise CancelledError once ``stop`` is set, as encoding a whole batch live can take minutes."""

    features: FeatureLookup
    stop: Stop

    def arrays(self, image: ImageRef) -> tuple[np.ndarray, ...]:
        if self.stop.requested:
            raise CancelledError
        return self.features.arrays(image)
