"""The training loop, from a batch plan to trained weights.

Step k depends only on the seed, the data and the weights after step k - 1: the plan determines its samples, the random
state is set from the seed and k, and checkpoints contain master weights and moments. So a resumed run equals an
uninterrupted one, on a CPU bit for bit.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from llavactl.core import progress, stopping
from llavactl.core.errors import ModelError, RecipeError
from llavactl.data.plan import BatchPlan
from llavactl.training import checkpoints
from llavactl.training.box_alignment import align_to_boxes
from llavactl.training.checkpoints import Checkpoint, CheckpointState
from llavactl.training.collective import in_any_process, on_main, sum_over_processes
from llavactl.training.control import Control
from llavactl.training.memory import gc_frozen, release_memory
from llavactl.training.metrics import Metrics, progress_facts
from llavactl.training.milestones import Milestones
from llavactl.training.prefetch import prefetched_steps
from llavactl.training.sample_answers import remove_later_answers
from llavactl.training.sharding import distributed_like, root_gathered
from llavactl.training.spikes import WINDOW, RecentSteps
from llavactl.training.step import accumulate, buffers_before, suspects, update
from llavactl.training.throughput import Peak, Throughput
from llavactl.training.validation import show_preview, training_kernels

if TYPE_CHECKING:
    from llavactl.data.sample_set import SampleSet
    from llavactl.recipe.stages import AnyStage
    from llavactl.training.run import Run

log = logging.getLogger(__name__)

RELEASE_MEMORY_EVERY = 20
"""Steps; releasing memory takes a few hundredths of a second."""

LINES_PER_STEP = 3
"""At most, in metrics.jsonl: of the step, its evaluation and its validation."""

MAX_NAMED = 32
"""Samples that a message names; metrics.jsonl has all."""


@dataclass(frozen=True)
class TrainingResult:
    """The step that training resumed from (0: a new run), the last one, and the step whose weights the model has.

    ``peak``: the FLOP/s that MFU is relative to. ``stopped_by``: the plugins that ended the stage early, if any.
    """

    resumed_from: int
    steps: int
    model_step: int
    peak: Peak
    stopped_by: tuple[str, ...] = ()


def train(run: Run) -> TrainingResult:
    """Trains all planned steps; the model then has the last weights or, with ``restore_best``, the best ones.

    A plugin may end the stage after an earlier step (hook ``control_training``).

    The first Ctrl-C or SIGTERM stops training after the current step and saves a checkpoint. A second one stops it
    immediately.

    Raises:
        ModelError: the loss is not finite; the message names the samples.
        KeyboardInterrupt: after a signal to any process; all processes stop after the same step.
    """
    plan = batch_plan(run.data, run.settings)
    checkpoint = _resume(run)
    start = checkpoint.step if checkpoint else 0
    if not checkpoint:
        _align_to_boxes(run)
    metrics = None
    if run.accelerator.is_main_process:
        metrics = Metrics(run.folder / "metrics.jsonl", start)
        remove_later_answers(run.folder, start)
    earlier_lines = on_main(lambda: metrics.kept[-LINES_PER_STEP * WINDOW :] if metrics else [])
    recent = RecentSteps.of(earlier_lines)
    control = Control(run.hook_arguments, metrics.kept if metrics else [])
    throughput = Throughput.of(run.model, run.settings.precision, run.accelerator)
    if run.accelerator.is_main_process:
        run.notify("train_started", {"folder": run.folder, "steps": plan.steps})
    with (
        ExitStack() as kernels,
        gc_frozen(),
        closing(metrics) if metrics else nullcontext(),
        progress.bar(plan.steps, run.folder.name, "step", start) as bar,
        stopping.deferred_interrupt(lambda: _log_stop(run)) as stop,
    ):
        kernels.enter_context(training_kernels(run))
        milestones = Milestones(run, plan.steps, metrics, control, stop, kernels, start)
        if checkpoint:
            scores = (line["scores"] for line in earlier_lines if "scores" in line and line["step"] == start)
            milestones.finish(start, checkpoint, next(scores, None))
        last = start if milestones.stopped_by else plan.steps
        if run.preview:
            show_preview(run, start, kernels)
        began = shown = time.perf_counter()
        with closing(prefetched_steps(run, plan, start, last, stop)) as steps:
            for step, batches in steps:
                gradient = accumulate(run, batches, step, stop)
                if gradient is None:
                    if step > milestones.saved_step:
                        milestones.save(CheckpointState(step, run.digest))
                    _raise_interrupted(run, step)
                values = gradient.values()
                if spikes := recent.spikes(values):
                    unsaved = step - milestones.saved_step
                    if unsaved and (unsaved >= WINDOW or not _finite(values)):
                        with buffers_before(run, gradient):
                            milestones.save(CheckpointState(step, run.digest))
                    samples = suspects(gradient)
                    _report_spike(run, step, recent.describe(values, spikes), samples, finite=_finite(values))
                rate = update(run, gradient, step, plan.steps)
                completed = step + 1
                if completed % RELEASE_MEMORY_EVERY == 0 and run.accelerator.device.type == "cpu":
                    release_memory()
                recent.add(values)
                line: dict[str, Any] = {"step": completed, "loss": gradient.loss, "tokens": gradient.work.tokens}
                line |= {"learning_rate": rate, **values}
                line |= {"spike": {"fields": spikes, "samples": samples}} if spikes else {}
                line |= throughput.fields(gradient.work, time.perf_counter() - began)
                milestones.write(line)
                bar.advance(1, **progress_facts({**line, **milestones.finish(completed)}))
                if milestones.stopped_by:
                    last = completed
                    break
                if completed < plan.steps and _preview_due(run, time.perf_counter() - shown):
                    show_preview(run, completed, kernels)
                    shown = time.perf_counter()
                began = time.perf_counter()
        if in_any_process(run.accelerator, stop.requested):  # the others must not save the model without this one
            _raise_interrupted(run, last)
    model_step = _load_best(run) if run.settings.restore_best else last
    return TrainingResult(start, last, model_step, throughput.peak, tuple(milestones.stopped_by))


def _preview_due(run: Run, elapsed: float) -> bool:
    """Whether the next preview is due ``elapsed`` seconds after the last one, by the main process's clock."""
    every = run.settings.preview_every
    if run.preview is None or every is None:
        return False
    return in_any_process(run.accelerator, run.accelerator.is_main_process and elapsed >= every)


def _finite(values: Mapping[str, float]) -> bool:
    return all(map(math.isfinite, values.values()))


def _report_spike(run: Run, step: int, what: str, samples: Sequence[str], *, finite: bool) -> None:
    """Logs a spike in step ``step`` (from 0); raises ModelError if a value is not finite."""
    names = ", ".join(samples[:MAX_NAMED]) + (f" and {len(samples) - MAX_NAMED} more" if samples[MAX_NAMED:] else "")
    message = f"step {step + 1}: {what}; the samples with the highest loss: {names}"
    if finite:
        if run.accelerator.is_main_process:
            log.warning("%s: spike in %s", run.folder.name, message)
        return
    path = checkpoints.checkpoint_path(run.folder / "checkpoints", step)
    raise ModelError(
        f"not finite in {message}",
        hint="check these samples, lower the learning rate, or set `precision: float32`"
        + (f"; {path} has the weights before this step" if step else ""),
    )


def batch_plan(data: SampleSet, settings: AnyStage) -> BatchPlan:
    """The global batches of a stage with ``settings`` that trains on ``data``."""
    return BatchPlan(
        data.weights,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        seed=data.seed,
        max_steps=settings.max_steps,
        phases=data.phases,
        groups=data.image_groups() if settings.shuffle == "images" else None,
    )


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
    restore_best = run.settings.restore_best
    checkpoint = checkpoints.load_best(run.folder / "checkpoints", run.digest, restore_best)
    assert checkpoint is not None, "the last step saved one"
    if math.isinf(checkpoint.state.badness(restore_best)):
        log.warning("%s: no checkpoint has a value of restore_best (%s)", run.folder.name, restore_best)
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
    if run.token_grid is None:
        raise RecipeError(
            "stage1.box_alignment_steps: the connector has no method `grid` that returns the cells of its tokens",
            hint="use the connector `linear`, `mlp2x-gelu` or `cell-words`, or `-o stage1.box_alignment_steps=0`",
        )
    with root_gathered(run.model):
        weights = align_to_boxes(
            run.model, run.data, run.shape, run.token_grid, steps, run.seed, getattr(torch, run.settings.precision)
        )
    processes, optimizer = run.accelerator.num_processes, run.optimizer
    weights = {name: sum_over_processes(run.accelerator, weight) / processes for name, weight in weights.items()}
    optimizer.set_weights(
        {f"connector.{name}": w for name, w in weights.items() if f"connector.{name}" in optimizer.masters}
    )
    if optimizer.untrained:
        untrained = optimizer.untrained.state()
        optimizer.untrained.load({name: distributed_like(weights[name], old) for name, old in untrained.items()})


def _log_stop(run: Run) -> None:
    """Called by a signal handler. If the signal interrupts a write to stderr, Python raises RuntimeError."""
    with suppress(RuntimeError):
        log.warning("%s: stopping after this step; interrupt again to stop at once", run.folder.name)


def _raise_interrupted(run: Run, step: int) -> NoReturn:
    if step and run.accelerator.is_main_process:
        path = checkpoints.checkpoint_path(run.folder / "checkpoints", step)
        log.warning("%s: saved %s; run the same command to resume after step %d", run.folder.name, path, step)
    raise KeyboardInterrupt
