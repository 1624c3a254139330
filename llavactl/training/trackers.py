"""Experiment trackers: TensorBoard, Weights & Biases, trackio and MLflow, through accelerate's tracker classes.

They record the lines of metrics.jsonl and write to ``<run_dir>/trackers/``. None of them uses the network, unless the
tracker's own environment variables (``WANDB_MODE``, ``MLFLOW_TRACKING_URI``) request it. A tracker that fails during
training is dropped with a warning.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llavactl.core.errors import RecipeError
from llavactl.core.streams import stdout_to_stderr

log = logging.getLogger(__name__)

Recorder = Callable[[Mapping[str, Any]], None]
"""A function that records a line of metrics.jsonl."""


def check_trackers(names: Sequence[str]) -> None:
    """Raises RecipeError if the package of a tracker isn't installed."""
    if missing := [name for name in names if find_spec(name) is None]:
        raise RecipeError(
            f"trackers: {missing[0]} is not installed",
            hint=f"pip install {' '.join(missing)}, or remove it from `trackers`",
        )


@contextmanager
def recording(names: Sequence[str], project: str, stage: str, folder: Path, digest: str) -> Iterator[Recorder]:
    """Yields a function that records lines with the trackers ``names``, under ``project`` and its run ``stage``.

    ``folder`` is for their files. ``digest`` identifies the run, so that a resumed run continues where the service
    supports this.

    Raises:
        RecipeError: a tracker can't be started.
    """
    active: dict[str, Any] = {}

    def record(line: Mapping[str, Any]) -> None:
        values = dict(_numbers({key: value for key, value in line.items() if key != "step"}))
        for name in list(active):
            with _dropped_on_error(active, name):
                active[name].log(values, step=line["step"])

    try:
        for name in names:
            active[name] = _started(name, project, stage, folder / name, digest)
        yield record
    finally:
        for name in list(active):
            with _dropped_on_error(active, name):
                active[name].finish()


def _started(name: str, project: str, stage: str, folder: Path, digest: str) -> Any:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with stdout_to_stderr():
            tracker = _CREATE[name](project, stage, folder, digest)
            tracker.start()
    except Exception as error:
        raise RecipeError(
            f"tracker {name} can't be started ({type(error).__name__}: {error})",
            hint=f"check its settings, or remove {name} from `trackers`",
        ) from error
    return tracker


def _tensorboard(_project: str, stage: str, folder: Path, _digest: str) -> Any:
    from accelerate.tracking import TensorBoardTracker

    return TensorBoardTracker(stage, str(folder))


def _wandb(project: str, stage: str, folder: Path, digest: str) -> Any:
    from accelerate.tracking import WandBTracker

    mode = os.environ.get("WANDB_MODE", "offline")
    return WandBTracker(project, name=stage, id=f"{stage}-{digest[:12]}", resume="allow", dir=str(folder), mode=mode)


def _trackio(project: str, stage: str, folder: Path, _digest: str) -> Any:
    os.environ.setdefault("TRACKIO_DIR", str(folder))  # read when trackio is imported
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import trackio
    from accelerate.tracking import TrackioTracker

    class Tracker(TrackioTracker):
        def finish(self) -> None:
            # accelerate finishes the run but leaves it registered: at exit it would print to standard output.
            trackio.finish()

    return Tracker(project, name=stage, resume="allow")


def _mlflow(project: str, stage: str, folder: Path, _digest: str) -> Any:
    if "MLFLOW_TRACKING_URI" not in os.environ:
        import mlflow

        mlflow.set_tracking_uri(f"sqlite:///{folder.absolute() / 'mlflow.db'}")
    from accelerate.tracking import MLflowTracker

    return MLflowTracker(project, run_name=stage, logging_dir=(folder / "artifacts").absolute().as_uri())


_CREATE: Mapping[str, Callable[[str, str, Path, str], Any]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
    "mlflow": _mlflow,
}
"""Functions of project, stage, folder and digest that return accelerate's tracker, by the name in the recipe."""


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in ``values``; nested ones are named ``outer/inner``."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + key, value


@contextmanager
def _dropped_on_error(active: dict[str, Any], name: str) -> Iterator[None]:
    """Removes the tracker ``name`` from ``active`` if the block fails, with a warning."""
    try:
        with stdout_to_stderr():
            yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - a service must not stop hours of training
        active.pop(name, None)
        log.warning("tracker %s failed and is no longer used (%s: %s)", name, type(error).__name__, error)
