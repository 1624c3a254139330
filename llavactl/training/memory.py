"""Memory that nobody uses goes back to the system, and what is used for long isn't looked through again and again."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any


def release_memory() -> None:
    """Frees what is unreachable and, with glibc, returns what its allocator keeps.

    Batches of ever other lengths leave it with gigabytes in pieces that fit nothing: a training run of the demo grew
    from 3 to 6 GB.
    """
    gc.collect()
    if (trim := _malloc_trim()) is not None:
        trim(0)


@contextmanager
def gc_frozen() -> Iterator[None]:
    """While this lasts, Python's garbage collector passes over all that there is at its begin.

    Modules, models and samples are there to stay: to look through them was 4 % of a step of the demo.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@cache
def _malloc_trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None  # macOS, Windows, musl: their allocators return it by themselves
