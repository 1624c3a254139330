"""Checkpoints, written atomically; a run resumes from the newest intact one, and the best one is kept, too."""

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
from llavactl.model.folder import whole_folder

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

TENSORS = "optimizer.safetensors"
STATE = "state.json"


@dataclass(frozen=True)
class State:
    """After how many updates (``step``) of which run (``digest``), and what the held-out samples lost there."""

    step: int
    digest: str
    val_loss: float | None = None

    @property
    def rank(self) -> float:
        """The lowest is the best: its validation loss, infinite where that is none."""
        return self.val_loss if self.val_loss is not None and math.isfinite(self.val_loss) else math.inf


def place(folder: Path, step: int) -> Path:
    """The path of the checkpoint of ``step`` in ``folder``."""
    return folder / f"step-{step:08d}"


def save(folder: Path, state: State, tensors: Mapping[str, torch.Tensor], keep_last: int) -> Path:
    """Writes ``folder/step-…``, then removes what is no longer of use.

    Of its own run the newest ``keep_last`` stay and the best one. What another run left, or this one beyond
    ``state.step`` before it began anew, goes.

    Raises:
        StoreError: it can't be written.
    """
    target = place(folder, state.step)
    with whole_folder(target) as temporary:
        save_file(dict(tensors), temporary / TENSORS)
        write_json(temporary / STATE, {**asdict(state), "sha256": _sha256(temporary / TENSORS)})
    try:
        found = _newest_first(folder)
    except StoreError as error:
        log.warning("%s; older checkpoints are kept", error)
        return target
    mine = [(each, at) for each, at in found if each.digest == state.digest and each.step <= state.step]
    kept = {at for _, at in mine[:keep_last]} | {_best(mine)}
    for other in [*folder.glob("step-*"), *folder.glob(".step-*")]:
        if other not in kept:
            shutil.rmtree(other, ignore_errors=True)
    return target


def restore(folder: Path, digest: str) -> tuple[State, dict[str, torch.Tensor]] | None:
    """The newest intact checkpoint of the run ``digest``; damaged ones are skipped.

    Raises:
        StoreError: one can't be read; it may be intact, and skipping it would lose its steps.
    """
    for state, checkpoint in _newest_first(folder):
        if state.digest != digest:
            log.info("%s belongs to other settings or data and is not resumed", checkpoint)
        elif (tensors := _whole(checkpoint)) is not None:
            return state, tensors
    return None


def best(folder: Path, digest: str) -> tuple[State, dict[str, torch.Tensor]] | None:
    """The intact checkpoint of the run ``digest`` with the lowest validation loss; raises as ``restore``."""
    mine = [(state, at) for state, at in _newest_first(folder) if state.digest == digest]
    for state, checkpoint in sorted(mine, key=lambda each: each[0].rank):
        if (tensors := _whole(checkpoint)) is not None:
            return state, tensors
    return None


def remove(folder: Path) -> None:
    """Removes ``folder`` and all checkpoints in it."""
    shutil.rmtree(folder, ignore_errors=True)


def _best(checkpoints: list[tuple[State, Path]]) -> Path:
    """Of several equally good ones the newest."""
    return min(checkpoints, key=lambda each: each[0].rank)[1]


def _newest_first(folder: Path) -> list[tuple[State, Path]]:
    found = []
    for checkpoint in sorted(_checkpoints(folder), reverse=True):
        with _skipped_if_damaged(checkpoint):
            written = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
            found.append((State(written["step"], written["digest"], written["val_loss"]), checkpoint))
    return found


def _checkpoints(folder: Path) -> list[Path]:
    try:
        return [each for each in folder.iterdir() if each.name.startswith("step-")]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unreadable(folder, error) from error


def _whole(checkpoint: Path) -> dict[str, torch.Tensor] | None:
    """The tensors of ``checkpoint``; None where a byte of them isn't what was written."""
    with _skipped_if_damaged(checkpoint):
        if _sha256(checkpoint / TENSORS) != json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["sha256"]:
            raise ValueError(f"{TENSORS} isn't what was written")
        tensors: dict[str, torch.Tensor] = load_file(checkpoint / TENSORS)
        return tensors
    return None


@contextmanager
def _skipped_if_damaged(checkpoint: Path) -> Iterator[None]:
    """Logs damage as a warning and ends the block; a checkpoint that can't be read raises an error."""
    try:
        yield
    except (FileNotFoundError, ValueError, KeyError, TypeError, SafetensorError) as error:
        log.warning("skipping damaged checkpoint %s (%s)", checkpoint, error)
    except OSError as error:
        raise _unreadable(checkpoint, error) from error


def _unreadable(path: Path, error: OSError) -> StoreError:
    """The error for ``path``, a checkpoint or the checkpoints' folder."""
    return StoreError(
        f"{error.filename or path} can't be read: {error.strerror or error}",
        hint="check permissions, disk and mount, then run the same command to resume; "
        f"if you remove {path.name}, its steps are trained again",
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
