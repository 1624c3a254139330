"""Checkpoints, written atomically. A run resumes from the newest intact one; the best one is kept as well."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from llavactl.core.errors import StoreError
from llavactl.core.paths import write_json
from llavactl.model.folder import atomic_folder

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

TENSORS = "optimizer.safetensors"
STATE = "state.json"


@dataclass(frozen=True)
class CheckpointState:
    """The number of completed steps, the digest of the run, and the validation loss at this step, if any."""

    step: int
    digest: str
    val_loss: float | None = None

    @property
    def val_loss_or_inf(self) -> float:
        """The validation loss, or infinity if it is missing or not finite; the lowest is the best."""
        return self.val_loss if self.val_loss is not None and math.isfinite(self.val_loss) else math.inf


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def save(folder: Path, state: CheckpointState, tensors: Mapping[str, torch.Tensor], keep_last: int) -> Path:
    """Writes ``folder/step-…``, then removes obsolete checkpoints.

    The newest ``keep_last`` checkpoints of the same run are kept, and the best one. Those of other runs, and those of
    this run beyond ``state.step`` (from before it was restarted), are removed.

    Raises:
        StoreError: it can't be written.
    """
    target = checkpoint_path(folder, state.step)
    with atomic_folder(target) as temporary:
        save_file(dict(tensors), temporary / TENSORS)
        write_json(temporary / STATE, {**asdict(state), "sha256": _sha256(temporary / TENSORS)})
    try:
        existing = _newest_first(folder)
    except StoreError as error:
        log.warning("%s; older checkpoints are kept", error)
        return target
    own = [(other, path) for other, path in existing if other.digest == state.digest and other.step <= state.step]
    kept = {path for _, path in own[:keep_last]} | {_best_path(own)}
    for path in [*folder.glob("step-*"), *folder.glob(".step-*")]:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)
    return target


def load_newest(folder: Path, digest: str) -> tuple[CheckpointState, dict[str, torch.Tensor]] | None:
    """The newest intact checkpoint of the run ``digest``; damaged ones are skipped.

    Raises:
        StoreError: a checkpoint can't be read. It may be intact, and skipping it would lose its steps.
    """
    for state, checkpoint in _newest_first(folder):
        if state.digest != digest:
            log.info("%s belongs to other settings or data and is not resumed", checkpoint)
        elif (tensors := _load_tensors(checkpoint)) is not None:
            return state, tensors
    return None


def load_best(folder: Path, digest: str) -> tuple[CheckpointState, dict[str, torch.Tensor]] | None:
    """The intact checkpoint of the run ``digest`` with the lowest validation loss; raises like ``load_newest``."""
    own = [(state, path) for state, path in _newest_first(folder) if state.digest == digest]
    for state, checkpoint in sorted(own, key=lambda item: item[0].val_loss_or_inf):
        if (tensors := _load_tensors(checkpoint)) is not None:
            return state, tensors
    return None


def remove(folder: Path) -> None:
    """Removes ``folder`` and all checkpoints in it."""
    shutil.rmtree(folder, ignore_errors=True)


def _best_path(checkpoints: list[tuple[CheckpointState, Path]]) -> Path:
    """The best of ``checkpoints``, sorted newest first; the newest among equals."""
    return min(checkpoints, key=lambda item: item[0].val_loss_or_inf)[1]


def _newest_first(folder: Path) -> list[tuple[CheckpointState, Path]]:
    checkpoints = []
    for path in sorted(_checkpoint_folders(folder), reverse=True):
        with _skip_if_damaged(path):
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            checkpoints.append((CheckpointState(state["step"], state["digest"], state["val_loss"]), path))
    return checkpoints


def _checkpoint_folders(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.name.startswith("step-")]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _read_error(folder, error) from error


def _load_tensors(checkpoint: Path) -> dict[str, torch.Tensor] | None:
    """The tensors of ``checkpoint``; None if the checksum doesn't match."""
    with _skip_if_damaged(checkpoint):
        if _sha256(checkpoint / TENSORS) != json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["sha256"]:
            raise ValueError(f"checksum mismatch of {TENSORS}")
        tensors: dict[str, torch.Tensor] = load_file(checkpoint / TENSORS)
        return tensors
    return None


@contextmanager
def _skip_if_damaged(checkpoint: Path) -> Iterator[None]:
    """Logs damage as a warning and ends the block; a checkpoint that can't be read raises StoreError."""
    try:
        yield
    except (FileNotFoundError, ValueError, KeyError, TypeError, SafetensorError) as error:
        log.warning("skipping damaged checkpoint %s (%s)", checkpoint, error)
    except OSError as error:
        raise _read_error(checkpoint, error) from error


def _read_error(path: Path, error: OSError) -> StoreError:
    """The error for ``path``, a checkpoint or the checkpoints' folder."""
    return StoreError(
        f"{error.filename or path} can't be read: {error.strerror or error}",
        hint="check permissions, disk and mount, then run the same command to resume; "
        f"if you remove {path.name}, its steps are trained again",
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
