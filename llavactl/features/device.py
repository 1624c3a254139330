"""The device that encodes images: the best one available, and one GPU per process."""

from __future__ import annotations

import os
from collections.abc import Mapping

from llavactl.features.parts import Part


def default_device() -> str:
    """``cuda`` if available, else Apple's ``mps`` if available, else ``cpu``."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def device_of(part: Part, device: str, environment: Mapping[str, str] = os.environ) -> str:
    """``device``; for ``cuda`` and several parts, the GPU of this part."""
    if part.whole or device != "cuda":
        return device
    import torch

    local_rank = environment.get("LOCAL_RANK") or environment.get("SLURM_LOCALID") or str(part.index)
    return f"cuda:{int(local_rank) % torch.cuda.device_count()}"
