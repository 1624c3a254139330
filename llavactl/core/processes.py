"""Leaving a group of processes in order."""

from __future__ import annotations

import atexit
from functools import cache


@cache
def leave_in_order() -> None:
    """At the end of this process, ends the threads by which it hears from the others.

    Left to themselves they were seen to abort a process that had finished all its work. On GPUs they stay: NCCL
    would wait for the others there, also for those that wait for a process that failed.
    """
    atexit.register(_leave)


def _leave() -> None:
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized() and distributed.get_backend() == "gloo":
        distributed.destroy_process_group()
