"""Shares a finished stage between runs, instead of training it again."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from llavactl.model.folder import atomic_folder
from llavactl.training.report import finished_report


def finished_stage(run_dirs: Iterable[Path], section: str, digest: str, restore_best: bool | str) -> Path | None:
    """The folder of the stage ``section`` in the first of ``run_dirs`` that finished it with this ``digest``."""
    for run_dir in run_dirs:
        folder = (run_dir / section).resolve()
        with contextlib.suppress(OSError):
            if finished_report(folder, digest, restore_best) is not None:
                return folder
    return None


def share_stage(stage: Path, folder: Path) -> None:
    """Replaces ``folder`` by a link to the finished ``stage`` of another run.

    On a file system without links, it becomes a copy without checkpoints.
    """
    remove_link(folder)
    if folder.exists():
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.symlink_to(os.path.relpath(stage, folder.parent.resolve()), target_is_directory=True)
    except OSError:
        with atomic_folder(folder) as temporary:
            shutil.copytree(stage, temporary, ignore=shutil.ignore_patterns("checkpoints"), dirs_exist_ok=True)


def remove_link(folder: Path) -> None:
    """Removes ``folder`` if it is a link to the stage of another run: what is trained next must not replace that."""
    if folder.is_symlink():
        folder.unlink()
