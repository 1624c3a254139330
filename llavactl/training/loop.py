"""The training loop, from a batch plan to trained weights.

Step k depends only on the seed, the data and the weights after step k - 1: the plan determines its samples, the random
state is set from the seed and k, and checkpoints contain master weights and moments. So a resumed run equals an
uninterrupted one, on a CPU bit for bit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from llavactl.core import progress, stopping
from llavactl.core.errors import ModelError
from llavactl.core.schema import IGNORE, Batch
from llavactl.data.plan import BatchPlan
from llavactl.model.cpu.rms_norm import fused_rms_norms
from llavactl.model.inputs import to_device, token_count
from llavactl.model.packed import packed_attention
from llavactl.training import checkpoints
from llavactl.training.box_alignment import align_to_boxes
from llavactl.training.checkpoints import Checkpoint, CheckpointState
from llavactl.training.collective import on_main, sum_in_buckets, sum_over_processes
from llavactl.training.memory import gc_frozen, release_memory
from llavactl.training.metrics import Metrics
from llavactl.training.optimizer import schedule
from llavactl.training.out_of_memory import out_of_memory_named
from llavactl.training.prefetch import micro_batches, prefetched_steps
from llavactl.training.sharding import distributed_like, reshard, root_gathered

if TYPE_CHECKING:
    from llavactl.core.stopping import Stop
    from llavactl.training.run import Run

log = logging.getLogger(__name__)

RELEASE_MEMORY_EVERY = 20
"""Steps; releasing memory takes a few hundredths of a second."""


@dataclass(frozen=True)
class TrainingResult:
    """The step that training resumed from (0: a new run), and the step whose weights the model has."""

    resumed_from: int
    model_step: int


def train(run: Run) -> TrainingResult:
    """Trains all planned steps; the model then has the last weights or, with ``restore_best``, the best ones.

    The first Ctrl-C or SIGTERM stops training after the current step and saves a checkpoint. A second one stops it
    immediately.

    Raises:
        ModelError: the loss is not finite; the message names the samples.
        KeyboardInterrupt: after a signal to any process; all processes stop after the same step.
    """
    settings, accelerator = run.settings, run.accelerator
    plan = _batch_plan(run)
    checkpoint = _resume(run)
    start = checkpoint.step if checkpoint else 0
    if not checkpoint:
        _align_to_boxes(run)
    metrics = Metrics(run.folder / "metrics.jsonl", start) if accelerator.is_main_process else None
    run.notify("train_started", {"steps": plan.steps})

    def checkpoint_due(step: int) -> bool:
        return step == plan.steps or step % settings.checkpoint_every == 0

    language = run.model.language
    attention = nullcontext() if run.padding_reason else packed_attention(language)
    with (
        attention,
        fused_rms_norms(language),
        gc_frozen(),
        closing(metrics) if metrics else nullcontext(),
        progress.bar(plan.steps, run.folder.name, "step", start) as bar,
        stopping.deferred_interrupt(lambda: _log_stop(run)) as stop,
    ):
        saved_step = start
        if checkpoint and checkpoint_due(start) and checkpoint.val_loss is None and len(run.validation):
            _validate_and_save(run, start, metrics, stop)  # the earlier run was stopped before validation
        for step, batches in prefetched_steps(run, plan, start, stop):
            line = _step(run, batches, step, plan.steps, stop)
            if line is None:
                if step > saved_step:
                    _save_checkpoint(run, CheckpointState(step, run.digest), metrics)
                _raise_interrupted(run, step)
            completed = step + 1
            if completed % RELEASE_MEMORY_EVERY == 0 and accelerator.device.type == "cpu":
                release_memory()
            _write_metrics(run, {"step": completed, **line}, metrics)
            bar_values = {"loss": line["loss"]}
            if checkpoint_due(completed):
                bar_values |= _validate_and_save(run, completed, metrics, stop)
                saved_step = completed
            bar.advance(1, **{name: f"{value:.4f}" for name, value in bar_values.items()})
        if stop.requested:
            _raise_interrupted(run, plan.steps)
    return TrainingResult(start, _load_best(run) if settings.restore_best else plan.steps)


def _batch_plan(run: Run) -> BatchPlan:
    settings = run.settings
    return BatchPlan(
        run.data.weights,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        seed=run.seed,
        max_steps=settings.max_steps,
        phases=run.data.phases,
        groups=run.data.image_groups() if settings.shuffle == "images" else None,
    )


def _step(run: Run, batches: Sequence[Batch], step: int, steps: int, stop: Stop) -> dict[str, Any] | None:
    """One optimizer step on the global batch, whose gradient is accumulated over micro-batches and processes.

    Returns None, without an update, if any process received a stop signal.
    """
    accelerator, model, optimizer = run.accelerator, run.model, run.optimizer
    # Target tokens and tokens of the global batch, and the number of processes that received a stop signal.
    counts = torch.zeros(3, dtype=torch.float64)
    nonempty = [batch for batch in batches if batch.names]
    for batch in nonempty:
        counts += torch.tensor([int((batch.labels != IGNORE).sum()), token_count(batch), 0])
    counts[2] = stop.requested
    counts = sum_over_processes(accelerator, counts)
    if counts[2]:
        return None
    for batch in nonempty:
        run.token_counts.add(batch)
    model.train()
    loss = torch.zeros((), dtype=torch.float64)
    section, settings = run.folder.name, run.settings
    for index, batch in enumerate(batches):
        # By the index in the global batch: dropout is the same on any number of processes with the same micro-batches.
        torch.manual_seed(combined_seed(run.seed, step, index * accelerator.num_processes + accelerator.process_index))
        with out_of_memory_named(section, settings, f"step {step + 1}", batch):
            micro_loss = model(to_device(batch, accelerator.device)) / counts[0].item()
            if micro_loss.requires_grad:  # False for text-only samples with a frozen language model
                micro_loss.backward()
            optimizer.accumulate()
            loss += micro_loss.detach().double().cpu()
        _check_finite(micro_loss, batch, step)
    if accelerator.num_processes > 1:
        if not run.placement.sharded:  # FSDP2 has summed them in the backward pass
            sum_in_buckets(accelerator, optimizer.gradients())
        _broadcast_buffers(run)
    fraction = schedule(step, steps, run.settings.warmup, run.settings.cooldown)
    with out_of_memory_named(section, settings, f"update of the weights in step {step + 1}"):
        update = optimizer.step(fraction, run.settings.max_grad_norm)
    loss = sum_over_processes(accelerator, loss)
    return {"loss": float(loss), "tokens": int(counts[1]), "learning_rate": update.learning_rate}


def _check_finite(loss: torch.Tensor, batch: Batch, step: int) -> None:
    if not math.isfinite(loss.item()):
        raise ModelError(
            f"the loss of step {step + 1} is {loss.item()}; its samples: {', '.join(batch.names)}",
            hint="lower the learning rate, or set `precision: float32`; the last checkpoint precedes this step",
        )


def _broadcast_buffers(run: Run) -> None:
    """Broadcasts the connector's buffers from the first process, which saves them."""
    from accelerate.utils import broadcast

    if run.optimizer.untrained:
        device, buffers = run.accelerator.device, run.optimizer.untrained.buffers()
        run.optimizer.untrained.load({name: broadcast(buffer.to(device)) for name, buffer in buffers.items()})


def _validate_and_save(run: Run, step: int, metrics: Metrics | None, stop: Stop) -> dict[str, float]:
    """Validates, unless interrupted, and saves a checkpoint; returns the validation loss, if any."""
    loss = validate(run, stop) if len(run.validation) else None
    validated = {} if loss is None else {"val_loss": loss}
    if validated:
        _write_metrics(run, {"step": step, **validated}, metrics)
    _save_checkpoint(run, CheckpointState(step, run.digest, loss), metrics)
    return validated


@torch.no_grad()
def validate(run: Run, stop: Stop) -> float | None:
    """The mean loss per target token over the validation samples; None if any process received a stop signal."""
    run.model.eval()
    # The loss and target tokens.
    total = torch.zeros(2, dtype=torch.float64)
    size = run.settings.batch_size
    for begin in range(0, len(run.validation), size):
        indices = [(0, index) for index in range(begin, min(begin + size, len(run.validation)))]
        batches: list[Batch] = []
        with suppress(CancelledError):
            batches = micro_batches(run, run.validation, indices, stop)
        if _stop_requested(run, stop):  # in any process: all of them must run the same forward passes
            reshard(run.model)
            return None
        for batch in batches:
            with out_of_memory_named(run.folder.name, run.settings, "validation", batch):
                loss = run.model(to_device(batch, run.accelerator.device)).item()
            total += torch.tensor([loss, int((batch.labels != IGNORE).sum())], dtype=torch.float64)
    reshard(run.model)
    total = sum_over_processes(run.accelerator, total)
    return None if _stop_requested(run, stop) else float(total[0] / total[1])


def _stop_requested(run: Run, stop: Stop) -> bool:
    """Whether any process received a stop signal."""
    return bool(sum_over_processes(run.accelerator, torch.tensor(float(stop.requested))))


def _save_checkpoint(run: Run, state: CheckpointState, metrics: Metrics | None) -> None:
    """Saves a checkpoint; the main process has ``metrics``."""
    if metrics:
        metrics.sync()
    folder = checkpoints.save(run.folder / "checkpoints", state, run.optimizer.state(), run.settings.keep_last)
    if run.accelerator.is_main_process:
        run.notify("checkpoint_saved", {"folder": folder, "step": state.step})
    run.accelerator.wait_for_everyone()


def _resume(run: Run) -> CheckpointState | None:
    """Loads the newest checkpoint of this run; returns None without one. If the run isn't resumed, removes them all."""
    folder = run.folder / "checkpoints"
    if not run.resume:
        on_main(lambda: checkpoints.remove(folder))
        return None
    checkpoint = checkpoints.load_newest(folder, run.digest)
    if checkpoint is None:
        return None
    _load(run, checkpoint)
    log.info("%s: resuming after step %d", run.folder.name, checkpoint.state.step)
    return checkpoint.state


def _load_best(run: Run) -> int:
    """Loads the weights of the best checkpoint; returns its step."""
    checkpoint = checkpoints.load_best(run.folder / "checkpoints", run.digest)
    assert checkpoint is not None, "the last step saved one"
    _load(run, checkpoint)
    log.info("%s: restored the best checkpoint, step %d", run.folder.name, checkpoint.state.step)
    return checkpoint.state.step


def _load(run: Run, checkpoint: Checkpoint) -> None:
    run.optimizer.load(checkpoint.names(), checkpoint.read)


def _align_to_boxes(run: Run) -> None:
    """Aligns the connector with boxes if the recipe requests it, with the same result on all processes."""
    steps = run.settings.box_alignment_steps
    if not steps:
        return
    with root_gathered(run.model):
        weights = align_to_boxes(run.model, run.data, run.shape, steps, run.seed)
    processes, optimizer = run.accelerator.num_processes, run.optimizer
    weights = {name: sum_over_processes(run.accelerator, weight) / processes for name, weight in weights.items()}
    optimizer.set_weights(
        {f"connector.{name}": w for name, w in weights.items() if f"connector.{name}" in optimizer.masters}
    )
    if optimizer.untrained:
        untrained = optimizer.untrained.state()
        optimizer.untrained.load({name: distributed_like(weights[name], old) for name, old in untrained.items()})


def _write_metrics(run: Run, line: Mapping[str, Any], metrics: Metrics | None) -> None:
    if metrics:
        metrics.write(line)
        run.notify("train_logged", {"line": line})


def _log_stop(run: Run) -> None:
    """Called by a signal handler. If the signal interrupts a write to stderr, Python raises RuntimeError."""
    with suppress(RuntimeError):
        log.warning("%s: stopping after this step; interrupt again to stop at once", run.folder.name)


def _raise_interrupted(run: Run, step: int) -> NoReturn:
    if step and run.accelerator.is_main_process:
        path = checkpoints.checkpoint_path(run.folder / "checkpoints", step)
        log.warning("%s: saved %s; run the same command to resume after step %d", run.folder.name, path, step)
    raise KeyboardInterrupt


def combined_seed(*parts: int) -> int:
    """A seed that depends on each of ``parts``."""
    seed = 0
    for part in parts:
        seed = (seed * 1_000_003 + part + 1) % 2**63
    return seed
