"""The training loop, from a plan to trained weights.

Step k of a run is a function of the seed, the data and the weights after step k - 1 alone: the plan
gives its samples, the random state is set from (seed, k), and the checkpoint holds masters and moments.
So a resumed run equals an uninterrupted one, to the bit on a CPU.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llavactl.core import progress
from llavactl.core.errors import ModelError
from llavactl.core.memory import give_back, settled
from llavactl.core.schema import IGNORE, Batch
from llavactl.data import micro
from llavactl.data.plan import Plan
from llavactl.data.rows import Limits
from llavactl.model.packed import packed_attention
from llavactl.model.rms_norm import lean_norms
from llavactl.training import checkpoints
from llavactl.training.grounding import ground
from llavactl.training.metrics import Metrics
from llavactl.training.optimizer import schedule

if TYPE_CHECKING:
    from accelerate import Accelerator

    from llavactl.core.schema import FeatureShape
    from llavactl.data.training_set import TrainingSet
    from llavactl.model.llava import LlavaModel
    from llavactl.recipe.frame import Stage
    from llavactl.training.optimizer import Optimizer

log = logging.getLogger(__name__)

TIDY_EVERY = 20
"""Steps after which unused memory goes back to the system; it takes a few hundredths of a second."""

Observer = Callable[[str, Mapping[str, Any]], None]


@dataclass
class Work:
    """What this process computed: ``positions`` in all, ``padding`` among them; ``tokens`` of its conversations."""

    positions: int = 0
    padding: int = 0
    tokens: int = 0

    def add(self, batch: Batch) -> None:
        """Counts ``batch``."""
        self.positions += batch.mask.numel()
        self.padding += batch.mask.numel() - int(batch.mask.sum())
        self.tokens += batch.tokens


@dataclass(frozen=True)
class Run:
    """All that a stage's training takes. ``digest`` names settings and data: only its own checkpoints are resumed.

    ``unpacked``: why every sample has a row of its own; "" where rows hold many, as ``model.packed.refusal`` allows.
    """

    model: LlavaModel
    optimizer: Optimizer
    stage: Stage
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
    work: Work = field(default_factory=Work)


@dataclass(frozen=True)
class Trained:
    """The step that a run went on behind (0: from the start), and the one whose weights the model now has."""

    first: int
    step: int


def train(run: Run) -> Trained:
    """Trains to the end of the plan; then the model has its last weights or its best, as the stage's ``final`` says.

    Raises:
        ModelError: the loss is no longer finite; the message names the samples.
    """
    stage, accelerator = run.stage, run.accelerator
    plan = Plan(
        run.data.weights,
        epochs=stage.epochs,
        batch_size=stage.batch_size,
        seed=run.seed,
        max_steps=stage.max_steps,
        phases=run.data.phases,
        groups=run.data.images() if stage.shuffle == "images" else None,
    )
    start = _restore(run)
    if not start:
        _ground(run)
    metrics = Metrics(run.folder / "metrics.jsonl", start) if accelerator.is_main_process else None
    run.observe("train_started", {"steps": plan.steps})
    language = run.model.language
    attention = nullcontext() if run.unpacked else packed_attention(language)
    with attention, lean_norms(language), settled(), progress.bar(plan.steps, run.folder.name, "step", start) as bar:
        for step, batches in _prepared(run, plan, start):
            line = _step(run, batches, step, plan.steps)
            done = step + 1
            if done % TIDY_EVERY == 0 and accelerator.device.type == "cpu":
                give_back()
            lines = [{"step": done, **line}]
            due = done == plan.steps or done % stage.checkpoint_every == 0
            if due and len(run.validation):
                lines.append({"step": done, "val_loss": validate(run)})
            for each in lines if metrics else []:
                assert metrics is not None
                metrics.write(each)
                run.observe("train_logged", {"line": each})
            if due:
                _save(run, checkpoints.State(done, run.digest, lines[-1].get("val_loss")), metrics)
            facts = {name: f"{value:.4f}" for each in lines for name, value in each.items() if name.endswith("loss")}
            bar.show(1, **facts)
    if metrics:
        metrics.close()
    return Trained(start, _take_best(run) if stage.final == "best" else plan.steps)


def _prepared(run: Run, plan: Plan, start: int) -> Iterator[tuple[int, list[Batch]]]:
    """Each step with its batches, the next one made ready while this one computes."""
    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(_micro_batches, run, run.data, plan.batch(start))
        for step in range(start, plan.steps):
            batches = coming.result()
            if step + 1 < plan.steps:
                coming = ahead.submit(_micro_batches, run, run.data, plan.batch(step + 1))
            yield step, batches


def _step(run: Run, batches: Sequence[Batch], step: int, steps: int) -> dict[str, Any]:
    """One optimiser step: every process takes its share of the batch, and the sum is the whole batch's gradient."""
    accelerator, model, optimizer = run.accelerator, run.model, run.optimizer
    counts = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        counts += torch.tensor([int((batch.labels != IGNORE).sum()), batch.tokens])
        run.work.add(batch)
    counts = _sum(accelerator, counts)
    torch.manual_seed(hash_seed(run.seed, step, accelerator.process_index))
    model.train()
    loss = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        part = model(batch.to(accelerator.device)) / counts[0].item()
        if part.requires_grad:  # of a frozen language model, text alone asks nothing of the connector
            part.backward()
        optimizer.accumulate()
        loss += part.detach().double().cpu()
        _check_finite(part, batch, step)
    if accelerator.num_processes > 1:
        for gradient in optimizer.gradients():
            gradient.copy_(_sum(accelerator, gradient))
    rate = optimizer.step(schedule(step, steps, run.stage.warmup, run.stage.cooldown))
    return {"loss": float(_sum(accelerator, loss)), "tokens": int(counts[1]), "learning_rate": rate}


def _micro_batches(run: Run, data: TrainingSet, members: micro.Members) -> list[Batch]:
    """This process's share of a global batch."""
    stage, process, processes = run.stage, run.accelerator.process_index, run.accelerator.num_processes
    samples = max(1, min(stage.micro_batch_size, stage.batch_size // processes))
    share = micro.Share(Limits(samples, stage.micro_tokens), process, processes)
    return (micro.padded if run.unpacked else micro.packed)(data, members, share)


@torch.no_grad()
def validate(run: Run) -> float:
    """The mean loss of a trained token over the held-out samples."""
    run.model.eval()
    total = torch.zeros(2, dtype=torch.float64)
    size = run.stage.batch_size
    for at in range(0, len(run.validation), size):
        members = [(0, index) for index in range(at, min(at + size, len(run.validation)))]
        for batch in _micro_batches(run, run.validation, members):
            loss = run.model(batch.to(run.accelerator.device))
            total += torch.tensor([loss.item(), int((batch.labels != IGNORE).sum())], dtype=torch.float64)
    total = _sum(run.accelerator, total)
    return float(total[0] / total[1])


def _restore(run: Run) -> int:
    folder = run.folder / "checkpoints"
    if not run.resume:
        if run.accelerator.is_main_process:
            checkpoints.remove(folder)
        return 0
    found = checkpoints.restore(folder, run.digest)
    if found is None:
        return 0
    state, tensors = found
    run.optimizer.load(tensors)
    log.info("%s: going on behind step %d", run.folder.name, state.step)
    return state.step


def _ground(run: Run) -> None:
    """Fits the connector to boxes, where the stage says so: the same on all processes."""
    steps = getattr(run.stage, "grounding_steps", 0)
    if not steps:
        return
    weights = ground(run.model, run.data, run.shape, steps, run.seed)
    processes = run.accelerator.num_processes
    run.optimizer.take({f"connector.{name}": _sum(run.accelerator, w) / processes for name, w in weights.items()})


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
