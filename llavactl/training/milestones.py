"""After an optimizer step: its line in metrics.jsonl, and evaluation, validation and checkpoint if they are due."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llavactl.training import checkpoints
from llavactl.training.checkpoints import CheckpointState
from llavactl.training.validation import evaluate, validate

if TYPE_CHECKING:
    from llavactl.core.hookspecs import TrainingRequest
    from llavactl.core.stopping import Stop
    from llavactl.training.control import Control
    from llavactl.training.metrics import Metrics
    from llavactl.training.run import Run

log = logging.getLogger(__name__)


@dataclass
class Milestones:
    """Evaluations, validations and checkpoints of a ``run`` of ``steps`` steps, due by its settings or by plugins.

    ``metrics`` is None except in the main process. ``kernels`` are those for training, closed during evaluations.
    ``saved_step`` is the step of the newest checkpoint. ``stopped_by``: the plugins that ended the stage early.
    """

    run: Run
    steps: int
    metrics: Metrics | None
    control: Control
    stop: Stop
    kernels: ExitStack
    saved_step: int
    stopped_by: Sequence[str] = ()

    def write(self, line: Mapping[str, Any]) -> None:
        """Writes ``line`` to metrics.jsonl and passes it to the plugins, in the main process."""
        if self.metrics:
            self.metrics.write(line)
            self.run.notify("train_logged", {"line": line})
            self.control.line_written(line)

    def finish(
        self, step: int, saved: CheckpointState | None = None, scores: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        """Evaluates, validates and saves after ``step`` if due; returns the validation loss, if any.

        After a resume, ``saved`` is the state of the checkpoint and ``scores`` are those in metrics.jsonl: the earlier
        run may have been stopped between its last update and the end of its step. A request that follows from a result,
        such as to stop, is served in the same step.
        """
        requests, val_loss = dict(self.control.requests()), saved.val_loss if saved else None
        while True:
            if scores is None and self._evaluation_due(step, requests):
                scores = evaluate(self.run, step, self.stop, self.kernels)
                if scores is not None:
                    self.write({"step": step, "scores": scores})
            saving = self._checkpoint_due(step, requests)
            if val_loss is None and (saving or "evaluate" in requests) and len(self.run.validation):
                val_loss = validate(self.run, self.stop)
                if val_loss is not None:
                    self.write({"step": step, "val_loss": val_loss})
            if not (new_requests := self.control.requests()):
                break
            requests |= new_requests
        state = CheckpointState(step, self.run.digest, val_loss, scores)
        if saving and state != saved:
            self.save(state)
        if step < self.steps and (stopped_by := requests.get("stop")):
            self.stopped_by = stopped_by
            if self.run.accelerator.is_main_process:
                names, section = ", ".join(dict.fromkeys(stopped_by)), self.run.folder.name
                log.info("%s: ended by plugin %s after step %d of %d", section, names, step, self.steps)
        return {} if val_loss is None else {"val_loss": val_loss}

    def save(self, state: CheckpointState) -> None:
        """Saves a checkpoint."""
        run, metrics = self.run, self.metrics
        if metrics:
            metrics.sync()
        folder, settings = run.folder / "checkpoints", run.settings
        saved = checkpoints.save(folder, state, run.optimizer.state(), settings.keep_last, settings.restore_best)
        if run.accelerator.is_main_process:
            run.notify("checkpoint_saved", {"folder": saved, "step": state.step})
        run.accelerator.wait_for_everyone()
        self.saved_step = state.step

    def _checkpoint_due(self, step: int, requests: Collection[TrainingRequest]) -> bool:
        """Also at each evaluation if the best checkpoint is chosen by its scores."""
        settings = self.run.settings
        if step == self.steps or "stop" in requests or "checkpoint" in requests:
            return True
        follows_score = isinstance(settings.restore_best, str) and self._evaluation_due(step, requests)
        return step % settings.checkpoint_every == 0 or follows_score

    def _evaluation_due(self, step: int, requests: Collection[TrainingRequest]) -> bool:
        every = self.run.settings.evaluate_every
        requested = "evaluate" in requests or "stop" in requests
        return every is not None and (step == self.steps or requested or step % every.steps == 0)
