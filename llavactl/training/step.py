"""One optimizer step: the gradient of a global batch, over micro-batches and processes, and the update."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

import torch

from llavactl.core.schema import IGNORE, Batch
from llavactl.model.inputs import to_device
from llavactl.training.collective import sum_in_buckets, sum_over_processes, together
from llavactl.training.out_of_memory import out_of_memory_named
from llavactl.training.sharding import gathered
from llavactl.training.throughput import Work

if TYPE_CHECKING:
    from llavactl.core.stopping import Stop
    from llavactl.training.run import Run


@dataclass(frozen=True)
class MicroLoss:
    """The loss per target token of a micro-batch of this process, and the names of its samples."""

    loss: float
    samples: tuple[str, ...]


@dataclass(frozen=True)
class Gradient:
    """The accumulated gradient of a global batch, before the update.

    ``loss`` per target token, ``grad_norm`` and ``work`` are those of all processes, ``micro_losses`` those of this
    one. ``norm`` is ``grad_norm`` as a tensor on the device, for clipping. ``buffers`` are the connector's buffers
    before the step.
    """

    loss: float
    grad_norm: float
    norm: torch.Tensor
    work: Work
    micro_losses: tuple[MicroLoss, ...]
    buffers: Mapping[str, torch.Tensor]

    def values(self) -> dict[str, float]:
        """The fields of metrics.jsonl."""
        return {"loss": self.loss, "grad_norm": self.grad_norm}


def accumulate(run: Run, batches: Sequence[Batch], step: int, stop: Stop) -> Gradient | None:
    """Accumulates the gradient of step ``step`` (from 0) over micro-batches and processes.

    None, without a gradient, if any process received a stop signal.
    """
    accelerator, model, optimizer = run.accelerator, run.model, run.optimizer
    # The work of the global batch, and the number of processes that received a stop signal.
    counts = torch.tensor([*astuple(Work.of(batches)), stop.requested], dtype=torch.float64)
    *numbers, stopped = map(int, sum_over_processes(accelerator, counts).tolist())
    if stopped:
        return None
    work = Work(*numbers)
    for batch in batches:
        if batch.names:
            run.token_counts.add(batch)
    buffers = _buffers(run)
    model.train()
    total = torch.zeros((), dtype=torch.float64)
    micro_losses = []
    for index, batch in enumerate(batches):
        # By the index in the global batch: dropout is the same on any number of processes with the same micro-batches.
        torch.manual_seed(combined_seed(run.seed, step, index * accelerator.num_processes + accelerator.process_index))
        with out_of_memory_named(run.folder.name, run.settings, run.placement, f"step {step + 1}", batch):
            loss = model(to_device(batch, accelerator.device)) / work.target_tokens
            if loss.requires_grad:  # False for text-only samples with a frozen language model
                loss.backward()
            optimizer.accumulate()
            value = loss.detach().double().cpu()
        total += value
        targets = int((batch.labels != IGNORE).sum())
        if batch.names:
            micro_losses.append(MicroLoss(value.item() * work.target_tokens / max(1, targets), batch.names))
    if accelerator.num_processes > 1:
        if not run.placement.sharded:  # FSDP2 has summed them in the backward pass
            sum_in_buckets(accelerator, optimizer.gradients())
        _broadcast_buffers(run)
    norm = optimizer.grad_norm()
    reported_norm = gathered(norm).double().cpu()
    if not accelerator.is_main_process:  # decisions that depend on it must not differ by rounding
        reported_norm = torch.zeros_like(reported_norm)
    loss, grad_norm = sum_over_processes(accelerator, torch.stack([total, reported_norm])).tolist()
    return Gradient(loss, grad_norm, norm, work, tuple(micro_losses), buffers)


def update(run: Run, gradient: Gradient, step: int, steps: int) -> float:
    """Updates the weights in step ``step`` (from 0) of ``steps``; returns the learning rate."""
    fraction = run.schedule(step, steps)
    with out_of_memory_named(run.folder.name, run.settings, run.placement, f"update of the weights in step {step + 1}"):
        return run.optimizer.step(fraction, run.settings.max_grad_norm, gradient.norm)


def suspects(gradient: Gradient) -> list[str]:
    """The samples of all micro-batches whose loss is not finite; if there are none, of the one with the highest loss.

    Of all processes, which must call this together.
    """
    losses = [each for part in together(lambda: gradient.micro_losses) for each in part]
    broken = [each for each in losses if not math.isfinite(each.loss)]
    worst = broken or [max(losses, key=lambda each: each.loss)]
    return [name for each in worst for name in each.samples]


@contextmanager
def buffers_before(run: Run, gradient: Gradient) -> Iterator[None]:
    """In this context the connector has the buffers from before the step, as in a checkpoint of the previous one."""
    untrained = run.optimizer.untrained
    if untrained is None or not gradient.buffers:
        yield
        return
    current = _buffers(run)
    untrained.load(gradient.buffers)
    try:
        yield
    finally:
        untrained.load(current)


def _buffers(run: Run) -> dict[str, torch.Tensor]:
    """A copy of the connector's buffers."""
    untrained = run.optimizer.untrained
    return {name: buffer.clone() for name, buffer in untrained.buffers().items()} if untrained else {}


def _broadcast_buffers(run: Run) -> None:
    """Broadcasts the connector's buffers from the first process, which saves them."""
    from accelerate.utils import broadcast

    if run.optimizer.untrained:
        device, buffers = run.accelerator.device, run.optimizer.untrained.buffers()
        run.optimizer.untrained.load({name: broadcast(buffer.to(device)) for name, buffer in buffers.items()})


def combined_seed(*parts: int) -> int:
    """A seed that depends on each of ``parts``."""
    seed = 0
    for part in parts:
        seed = (seed * 1_000_003 + part + 1) % 2**63
    return seed
