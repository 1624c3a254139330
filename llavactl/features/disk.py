"""Free disk space for feature stores."""

from __future__ import annotations

import shutil

from llavactl.core.errors import StoreError
from llavactl.features.manifest import stores_dir


def free_bytes() -> int:
    """Free disk space at the location of the stores, whether or not it exists."""
    folder = stores_dir()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def check_free_space(needed: int, free: int) -> None:
    """Compares the bytes ``needed`` by features with those ``free``.

    Raises:
        StoreError: the disk is too small.
    """
    if needed > free:
        raise StoreError(
            f"{stores_dir()}: the features need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
            hint="free disk space, or set LLAVACTL_HOME to a folder on a larger disk",
        )
