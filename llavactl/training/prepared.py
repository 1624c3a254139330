"""Prefetching: the batches of each step are prepared in a thread during the previous step."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llavactl.data import micro
from llavactl.data.rows import RowLimits

if TYPE_CHECKING:
    import numpy as np

    from llavactl.core.schema import Batch, ImageRef
    from llavactl.core.stopping import Stop
    from llavactl.data.batches import Loads
    from llavactl.data.plan import BatchPlan
    from llavactl.data.training_set import TrainingSet
    from llavactl.training.loop import Run


def prepared(run: Run, plan: BatchPlan, start: int, stop: Stop) -> Iterator[tuple[int, list[Batch]]]:
    """Yields each step from ``start`` on with its batches; may end early once ``stop`` is asked."""
    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(micro_batches, run, run.data, plan.batch(start), stop)
        for step in range(start, plan.steps):
            try:
                batches = coming.result()
            except CancelledError:
                batches = []
            if step + 1 < plan.steps:
                coming = ahead.submit(micro_batches, run, run.data, plan.batch(step + 1), stop)
            yield step, batches


def micro_batches(run: Run, data: TrainingSet, members: micro.Members, stop: Stop) -> list[Batch]:
    """This process's micro-batches of a global batch; raises CancelledError once ``stop`` is asked."""
    stage, process, processes = run.stage, run.accelerator.process_index, run.accelerator.num_processes
    samples = max(1, min(stage.micro_batch_size, stage.batch_size // processes))
    share = micro.Share(RowLimits(samples, stage.micro_batch_tokens), process, processes)
    data = replace(data, features=_UntilStopped(data.features, stop))
    return (micro.padded if run.unpacked else micro.packed)(data, members, share)


@dataclass(frozen=True)
class _UntilStopped:
    """Features that raise once ``stop`` is asked, since encoding a whole batch live can take minutes."""

    features: Loads
    stop: Stop

    def stored(self, image: ImageRef) -> tuple[np.ndarray, ...]:
        if self.stop.requested:
            raise CancelledError
        return self.features.stored(image)
