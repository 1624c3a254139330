"""Checkpoints: whole or absent, and the newest whole one is where a run goes on."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from llavactl.core.paths import write_json
from llavactl.model.folder import replace_folder

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

TENSORS = "optimizer.safetensors"
STATE = "state.json"


def save(folder: Path, step: int, tensors: Mapping[str, torch.Tensor], digest: str, keep_last: int) -> Path:
    """Writes ``folder/step-…`` (after ``step`` updates), then removes all but the newest ``keep_last``."""
    target = folder / f"step-{step:08d}"
    temporary = folder / f".{target.name}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(dict(tensors), temporary / TENSORS)
    write_json(temporary / STATE, {"step": step, "digest": digest, "bytes": (temporary / TENSORS).stat().st_size})
    replace_folder(temporary, target)
    for old in list(_newest_first(folder))[keep_last:]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def restore(folder: Path, digest: str) -> tuple[int, dict[str, torch.Tensor]] | None:
    """The step and tensors of the newest whole checkpoint of the run ``digest``; damaged ones are passed over."""
    for checkpoint in _newest_first(folder):
        try:
            state = json.loads((checkpoint / STATE).read_text())
            if state["digest"] != digest:
                log.info("%s belongs to other settings or data and is not resumed", checkpoint)
                continue
            if (checkpoint / TENSORS).stat().st_size != state["bytes"]:
                raise ValueError("cut short")
            return int(state["step"]), load_file(checkpoint / TENSORS)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            log.warning("checkpoint %s is damaged (%s) and passed over", checkpoint, error)
    return None


def remove(folder: Path) -> None:
    """Removes ``folder`` and all checkpoints in it."""
    shutil.rmtree(folder, ignore_errors=True)


def _newest_first(folder: Path) -> Iterator[Path]:
    return iter(sorted(folder.glob("step-*"), reverse=True))
