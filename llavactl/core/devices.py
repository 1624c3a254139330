"""The CPU and accelerators of this machine."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Any

from llavactl.core.quantities import quantity


@dataclass(frozen=True)
class Device:
    """A CPU or an accelerator; ``dtypes``: dtypes with hardware support."""

    name: str
    memory_gb: float
    dtypes: tuple[str, ...]


def available_devices() -> tuple[Device, ...]:
    """The CPU, then all accelerators.

    Raises:
        ImportError, OSError: torch can't be imported.
    """
    import torch

    devices = [_cpu(torch)]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        half = ("float16", "bfloat16") if properties.major >= 8 else ("float16",)
        devices.append(Device(f"cuda:{index} {properties.name}", _gb(properties.total_memory), ("float32", *half)))
    if torch.backends.mps.is_available():
        devices.append(Device("mps", _memory_gb(), ("float32", "float16", "bfloat16")))
    return tuple(devices)


def _cpu(torch: Any) -> Device:
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    bfloat16 = any(flags.get(flag) for flag in ("avx512_bf16", "amx_bf16", "bf16"))
    name = f"cpu {flags.get('cpu_name', platform.processor())}, {quantity(torch.get_num_threads(), 'thread')}"
    return Device(name, _memory_gb(), ("float32", "bfloat16") if bfloat16 else ("float32",))


def _memory_gb() -> float:
    import psutil

    return _gb(psutil.virtual_memory().total)


def _gb(size: float) -> float:
    return round(size / 1e9, 1)
