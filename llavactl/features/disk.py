"""Free disk space for feature stores."""

from __future__ import annotations

import shutil
from pathlib import Path

from llavactl.core.errors import StoreError
from llavactl.features.manifest import stores_dir


def free_bytes(folder: Path | None = None) -> int:
    """Free disk space in ``folder`` (default: that of the stores), whether or not it exists."""
    folder = folder or stores_dir()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def check_free_space(needed: int, free: int, folder: Path | None = None) -> None:
    """Compares the bytes ``needed`` by features with those ``free`` in ``folder`` (default: that of the stores).

    Raises:
        StoreError: the disk is too small.
    """
    if needed > free:
        raise StoreError(
            f"{folder or stores_dir()}: the features need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
            hint=f"free disk space, or {'write to' if folder else 'set LLAVACTL_HOME to'} a folder on a larger disk",
        )
