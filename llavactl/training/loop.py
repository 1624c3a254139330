"""The training loop, from a plan to trained weights.

Step k of a run is a function of the seed, the data and the weights after step k - 1 alone: the plan
gives its samples, the random state is set from (seed, k), and the checkpoint holds masters and moments.
So a resumed run equals an uninterrupted one, to the bit on a CPU.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from llavactl.core import progress, stopping
from llavactl.core.errors import ModelError
from llavactl.core.schema import IGNORE, Batch
from llavactl.data.plan import BatchPlan
from llavactl.model.cpu.rms_norm import lean_norms
from llavactl.model.inputs import to_device, token_count
from llavactl.model.packed import packed_attention
from llavactl.training import checkpoints
from llavactl.training.box_alignment import ground
from llavactl.training.memory import gc_frozen, release_memory
from llavactl.training.metrics import Metrics
from llavactl.training.optimizer import schedule
from llavactl.training.prepared import micro_batches, prepared

if TYPE_CHECKING:
    from accelerate import Accelerator

    from llavactl.core.schema import FeatureShape
    from llavactl.core.stopping import Stop
    from llavactl.data.training_set import TrainingSet
    from llavactl.model.llava import LlavaModel
    from llavactl.recipe.stages import AnyStage
    from llavactl.training.optimizer import Optimizer

log = logging.getLogger(__name__)

TIDY_EVERY = 20
"""Steps after which unused memory goes back to the system; it takes a few hundredths of a second."""

Observer = Callable[[str, Mapping[str, Any]], None]


@dataclass
class TokenCounts:
    """What this process computed: ``positions`` in all, ``padding`` among them; ``tokens`` of its conversations."""

    positions: int = 0
    padding: int = 0
    tokens: int = 0

    def add(self, batch: Batch) -> None:
        """Counts ``batch``."""
        self.positions += batch.mask.numel()
        self.padding += batch.mask.numel() - int(batch.mask.sum())
        self.tokens += token_count(batch)


@dataclass(frozen=True)
class Run:
    """All that a stage's training takes. ``digest`` names settings and data: only its own checkpoints are resumed.

    ``unpacked``: why every sample has a row of its own; "" where rows hold many, as ``model.packed.refusal`` allows.
    """

    model: LlavaModel
    optimizer: Optimizer
    stage: AnyStage
    data: TrainingSet
    validation: TrainingSet
    shape: FeatureShape
    folder: Path
    seed: int
    digest: str
    resume: bool
    unpacked: str
    accelerator: Accelerator
    observe: Observer
    work: TokenCounts = field(default_factory=TokenCounts)


@dataclass(frozen=True)
class Trained:
    """The step after which the run resumed (0: from the start), and the step whose weights the model now has."""

    first: int
    step: int


def train(run: Run) -> Trained:
    """Trains to the end of the plan; the model then has its last or its best weights, according to ``restore_best``.

    The first Ctrl-C or SIGTERM stops training after the current step and saves a checkpoint; a second one stops it at
    once.

    Raises:
        ModelError: the loss is not finite; the message names the samples.
        KeyboardInterrupt: after a signal to any process; all processes stop after the same step.
    """
    stage, accelerator = run.stage, run.accelerator
    plan = BatchPlan(
        run.data.weights,
        epochs=stage.epochs,
        batch_size=stage.batch_size,
        seed=run.seed,
        max_steps=stage.max_steps,
        phases=run.data.phases,
        groups=run.data.images() if stage.shuffle == "images" else None,
    )
    found = _restore(run)
    start = found.step if found else 0
    if not found:
        _ground(run)
    metrics = Metrics(run.folder / "metrics.jsonl", start) if accelerator.is_main_process else None
    run.observe("train_started", {"steps": plan.steps})

    def due(step: int) -> bool:
        return step == plan.steps or step % stage.checkpoint_every == 0

    language = run.model.language
    attention = nullcontext() if run.unpacked else packed_attention(language)
    with (
        attention,
        lean_norms(language),
        gc_frozen(),
        closing(metrics) if metrics else nullcontext(),
        progress.bar(plan.steps, run.folder.name, "step", start) as bar,
        stopping.deferred_interrupt(lambda: _announce(run)) as stop,
    ):
        saved = start
        if found and due(start) and found.val_loss is None and len(run.validation):
            _checkpoint(run, start, metrics, stop)  # training was stopped before validation
        for step, batches in prepared(run, plan, start, stop):
            line = _step(run, batches, step, plan.steps, stop)
            if line is None:
                if step > saved:
                    _save(run, checkpoints.State(step, run.digest), metrics)
                _stopped(run, step)
            done = step + 1
            if done % TIDY_EVERY == 0 and accelerator.device.type == "cpu":
                release_memory()
            _write(run, {"step": done, **line}, metrics)
            facts = {"loss": line["loss"]}
            if due(done):
                facts |= _checkpoint(run, done, metrics, stop)
                saved = done
            bar.advance(1, **{name: f"{value:.4f}" for name, value in facts.items()})
        if stop.requested:
            _stopped(run, plan.steps)
    return Trained(start, _take_best(run) if stage.restore_best else plan.steps)


def _announce(run: Run) -> None:
    """Logs the stop. Called by a signal handler: if it interrupts a write to stderr, Python raises RuntimeError."""
    with suppress(RuntimeError):
        log.warning("%s: stopping after this step; interrupt again to stop at once", run.folder.name)


def _stopped(run: Run, step: int) -> NoReturn:
    if step and run.accelerator.is_main_process:
        where = checkpoints.place(run.folder / "checkpoints", step)
        log.warning("%s: saved %s; run the same command to resume after step %d", run.folder.name, where, step)
    raise KeyboardInterrupt


def _write(run: Run, line: Mapping[str, Any], metrics: Metrics | None) -> None:
    if metrics:
        metrics.write(line)
        run.observe("train_logged", {"line": line})


def _checkpoint(run: Run, step: int, metrics: Metrics | None, stop: Stop) -> dict[str, float]:
    """Validates, unless asked to stop, and saves a checkpoint; returns the validation loss, if any."""
    loss = validate(run, stop) if len(run.validation) else None
    validated = {} if loss is None else {"val_loss": loss}
    if validated:
        _write(run, {"step": step, **validated}, metrics)
    _save(run, checkpoints.State(step, run.digest, loss), metrics)
    return validated


def _step(run: Run, batches: Sequence[Batch], step: int, steps: int, stop: Stop) -> dict[str, Any] | None:
    """One optimiser step on the global batch, split over all processes; the summed gradient is that of the batch.

    Returns None, without an update, if any process was asked to stop.
    """
    accelerator, model, optimizer = run.accelerator, run.model, run.optimizer
    counts = torch.zeros(3, dtype=torch.float64)
    for batch in batches:
        counts += torch.tensor([int((batch.labels != IGNORE).sum()), token_count(batch), 0])
    counts[2] = stop.requested
    counts = _sum(accelerator, counts)
    if counts[2]:
        return None
    for batch in batches:
        run.work.add(batch)
    torch.manual_seed(hash_seed(run.seed, step, accelerator.process_index))
    model.train()
    loss = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        part = model(to_device(batch, accelerator.device)) / counts[0].item()
        if part.requires_grad:  # text alone with a frozen language model gives the connector no gradient
            part.backward()
        optimizer.accumulate()
        loss += part.detach().double().cpu()
        _check_finite(part, batch, step)
    if accelerator.num_processes > 1:
        for gradient in optimizer.gradients():
            gradient.copy_(_sum(accelerator, gradient))
        _broadcast_buffers(run)
    share = schedule(step, steps, run.stage.warmup, run.stage.cooldown)
    rate = optimizer.step(share, run.stage.max_grad_norm)
    return {"loss": float(_sum(accelerator, loss)), "tokens": int(counts[1]), "learning_rate": rate}


def _broadcast_buffers(run: Run) -> None:
    """Broadcasts the connector's buffers from the first process, which saves them."""
    from accelerate.utils import broadcast

    if run.optimizer.untrained:
        device, buffers = run.accelerator.device, run.optimizer.untrained.buffers()
        run.optimizer.untrained.load({name: broadcast(each.to(device)) for name, each in buffers.items()})


@torch.no_grad()
def validate(run: Run, stop: Stop) -> float | None:
    """The mean loss per target token over the held-out samples; None if any process was asked to stop."""
    run.model.eval()
    total = torch.zeros(3, dtype=torch.float64)
    size = run.stage.batch_size
    with suppress(CancelledError):
        for at in range(0, len(run.validation), size):
            members = [(0, index) for index in range(at, min(at + size, len(run.validation)))]
            for batch in micro_batches(run, run.validation, members, stop):
                if stop.requested:
                    raise CancelledError
                loss = run.model(to_device(batch, run.accelerator.device))
                total += torch.tensor([loss.item(), int((batch.labels != IGNORE).sum()), 0], dtype=torch.float64)
    total[2] = stop.requested
    total = _sum(run.accelerator, total)
    return None if total[2] else float(total[0] / total[1])


def _restore(run: Run) -> checkpoints.State | None:
    folder = run.folder / "checkpoints"
    if not run.resume:
        if run.accelerator.is_main_process:
            checkpoints.remove(folder)
        return None
    found = checkpoints.restore(folder, run.digest)
    if found is None:
        return None
    state, tensors = found
    run.optimizer.load(tensors)
    log.info("%s: resuming after step %d", run.folder.name, state.step)
    return state


def _ground(run: Run) -> None:
    """Fits the connector to boxes, where the stage says so: the same on all processes."""
    steps = run.stage.box_alignment_steps
    if not steps:
        return
    weights = ground(run.model, run.data, run.shape, steps, run.seed)
    processes, optimizer = run.accelerator.num_processes, run.optimizer
    weights = {name: _sum(run.accelerator, weight) / processes for name, weight in weights.items()}
    optimizer.take({f"connector.{name}": w for name, w in weights.items() if f"connector.{name}" in optimizer.masters})
    if optimizer.untrained:
        optimizer.untrained.load({name: weights[name] for name in optimizer.untrained.state()})


def _take_best(run: Run) -> int:
    found = checkpoints.best(run.folder / "checkpoints", run.digest)
    assert found is not None, "the last step wrote one"
    state, tensors = found
    run.optimizer.load(tensors)
    log.info("%s: step %d was the best", run.folder.name, state.step)
    return state.step


def _save(run: Run, state: checkpoints.State, metrics: Metrics | None) -> None:
    if metrics:
        metrics.sync()
        tensors = run.optimizer.state()
        folder = checkpoints.save(run.folder / "checkpoints", state, tensors, run.stage.keep_last)
        run.observe("checkpoint_saved", {"folder": folder, "step": state.step})
    run.accelerator.wait_for_everyone()


def _check_finite(loss: torch.Tensor, batch: Batch, step: int) -> None:
    if not math.isfinite(loss.item()):
        raise ModelError(
            f"the loss of step {step + 1} is {loss.item()}; its samples: {', '.join(batch.names)}",
            hint="a lower learning rate or precision: float32; the last checkpoint is from before",
        )


def _sum(accelerator: Accelerator, tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` added up over all processes."""
    if accelerator.num_processes == 1:
        return tensor
    return accelerator.reduce(tensor.to(accelerator.device), reduction="sum").to(tensor.device)


def hash_seed(*parts: int) -> int:
    """One seed out of several numbers, different whenever one of them is."""
    seed = 0
    for part in parts:
        seed = (seed * 1_000_003 + part + 1) % 2**63
    return seed
