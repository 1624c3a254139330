"""Validation and evaluation of the model during training."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING

import torch

from llavactl.core.plugin_faults import described
from llavactl.core.schema import IGNORE
from llavactl.model.cpu.rms_norm import fused_rms_norms
from llavactl.model.cuda.liger import liger_layers
from llavactl.model.inputs import to_device
from llavactl.model.packed import packed_attention
from llavactl.training.collective import in_any_process, sum_over_processes
from llavactl.training.out_of_memory import out_of_memory_named
from llavactl.training.prefetch import micro_batches
from llavactl.training.sharding import reshard

if TYPE_CHECKING:
    from llavactl.core.schema import Batch
    from llavactl.core.stopping import Stop
    from llavactl.training.run import Run

log = logging.getLogger(__name__)


@contextmanager
def training_kernels(run: Run) -> Iterator[None]:
    """In this context the language model uses the kernels for training."""
    language = run.model.language
    with (
        nullcontext() if run.padding_reason else packed_attention(language),
        fused_rms_norms(language),
        nullcontext() if run.liger_fault else liger_layers(language),
    ):
        yield


def evaluate(run: Run, step: int, stop: Stop, kernels: ExitStack) -> Mapping[str, float] | None:
    """The scores of ``evaluate_every``; {} if the evaluation failed, None if any process received a stop signal.

    Generation needs the language model's own kernels: ``kernels`` is closed for it. The weights, and the random state
    that each micro-batch sets, don't change. If the model is sharded, an error while it answers is raised: it may
    concern this process only, and the others wait for it in the next layer until it ends.
    """
    assert run.evaluation is not None
    kernels.close()
    run.model.eval()
    sharded = run.placement.sharded

    def stopped() -> bool:
        # Processes that share a forward pass must stop after the same one.
        return in_any_process(run.accelerator, stop.requested) if sharded else stop.requested

    scores: Mapping[str, float] | None = {}
    with nullcontext() if sharded else _failure_logged(run, step):
        answers = run.evaluation.answers(run, stopped)
        if answers is None:
            scores = None
        else:
            with _failure_logged(run, step):
                scores = run.evaluation.scores(run, step, answers)
    kernels.enter_context(training_kernels(run))
    return scores


def show_preview(run: Run, step: int, kernels: ExitStack) -> None:
    """Shows the preview of the model after ``step``; a failure is logged. ``kernels`` as in ``evaluate``."""
    assert run.preview is not None
    kernels.close()
    run.model.eval()
    with nullcontext() if run.placement.sharded else _failure_logged(run, step, "preview"):
        answers = run.preview.answers(run)
        with _failure_logged(run, step, "preview"):
            run.preview.publish(run, step, answers)
    kernels.enter_context(training_kernels(run))


@contextmanager
def _failure_logged(run: Run, step: int, what: str = "evaluation") -> Iterator[None]:
    """Logs an error in this context, which all processes raise together, as a warning."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - plugins may raise anything
        if run.accelerator.is_main_process:
            log.warning("%s: the %s after step %d failed (%s)", run.folder.name, what, step, described(error))


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
        if in_any_process(run.accelerator, stop.requested):  # all of them must run the same forward passes
            reshard(run.model)
            return None
        for batch in batches:
            with out_of_memory_named(run.folder.name, run.settings, run.placement, "validation", batch):
                loss = run.model(to_device(batch, run.accelerator.device)).item()
            total += torch.tensor([loss, int((batch.labels != IGNORE).sum())], dtype=torch.float64)
    reshard(run.model)
    total = sum_over_processes(run.accelerator, total)
    return None if in_any_process(run.accelerator, stop.requested) else float(total[0] / total[1])
