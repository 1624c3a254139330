"""The memory of this process."""

from __future__ import annotations

import sys


def memory_bytes() -> int:
    """The peak of allocated memory on the current CUDA device, if one is used, otherwise the resident memory."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    import psutil

    return int(psutil.Process().memory_info().rss)
