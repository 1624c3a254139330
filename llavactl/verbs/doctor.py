"""``llavactl doctor``: what will work on this machine and what will not, before hours go into finding out."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from llavactl import __version__
from llavactl.core import plugins
from llavactl.core.errors import LlavactlError
from llavactl.core.network import proxy_fault
from llavactl.core.paths import cache_dir

LOW_DISK_GB = 20
SEVEN_B_GB = 20  # 14 of weights, and room for a connector, LoRA and activations


@dataclass(frozen=True)
class Device:
    """Something to compute on; ``dtypes`` are those it computes at full speed."""

    name: str
    memory_gb: float
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class Disk:
    """A folder that will be written to."""

    what: str
    folder: str
    free_gb: float
    writable: bool


@dataclass(frozen=True)
class Diagnosis:
    """One thing that works here or doesn't, and why."""

    what: str
    works: bool
    why: str = ""


@dataclass(frozen=True)
class DoctorReport:
    """All that was looked at; ``findings`` are the conclusions."""

    llavactl: str
    python: str
    platform: str
    packages: dict[str, str]
    devices: tuple[Device, ...]
    disks: tuple[Disk, ...]
    plugins: tuple[plugins.Plugin, ...]
    findings: tuple[Diagnosis, ...]


def doctor() -> DoctorReport:
    """Looks at versions, devices, disk and plugins; writes nothing, asks no network."""
    packages, unmet = _packages()
    devices, broken = _devices()
    disks, homeless = [_disk("run folders", Path.cwd())], []
    try:
        disks.insert(0, _disk("feature stores", cache_dir()))
    except LlavactlError as error:
        homeless.append(Diagnosis("feature stores", False, f"{error.message}; {error.hint}"))
    found = tuple(plugins.installed())
    findings = [
        *unmet,
        *broken,
        *_computing(devices),
        *homeless,
        *map(_room, disks),
        _pixels(packages),
        _hub(),
        *_network(),
        *(Diagnosis(f"plugin {plugin.name}", False, plugin.error) for plugin in found if plugin.error),
    ]
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    return DoctorReport(
        __version__, platform.python_version(), system, packages, devices, tuple(disks), found, tuple(findings)
    )


def _packages() -> tuple[dict[str, str], list[Diagnosis]]:
    """The versions of what llavactl requires, and what doesn't meet the requirement."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(text) for text in metadata.requires("llavactl") or ()]
    except metadata.PackageNotFoundError:
        return {}, [Diagnosis("installation", False, "llavactl is not installed, only imported: plugins can't find it")]
    versions, unmet = {}, []
    for one in wanted:
        if one.marker and not one.marker.evaluate({"extra": ""}):
            continue
        try:
            versions[one.name] = metadata.version(one.name)
        except metadata.PackageNotFoundError:
            unmet.append(Diagnosis(f"package {one.name}", False, f"not installed; `pip install '{one}'`"))
            continue
        if not one.specifier.contains(versions[one.name], prereleases=True):
            unmet.append(Diagnosis(f"package {one.name}", False, f"{versions[one.name]} does not meet {one.specifier}"))
    with contextlib.suppress(metadata.PackageNotFoundError):
        versions["torchvision"] = metadata.version("torchvision")
    return versions, unmet


def _devices() -> tuple[tuple[Device, ...], list[Diagnosis]]:
    """The CPU, then every accelerator."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return (), [Diagnosis("torch", False, f"can't be imported: {error}")]
    found = [_cpu(torch)]
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        halves = ("float16", "bfloat16") if about.major >= 8 else ("float16",)
        found.append(Device(f"cuda:{index} {about.name}", _gb(about.total_memory), ("float32", *halves)))
    if torch.backends.mps.is_available():
        found.append(Device("mps", _memory_gb(), ("float32", "float16", "bfloat16")))
    return tuple(found), []


def _cpu(torch: Any) -> Device:
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    fast = any(flags.get(flag) for flag in ("avx512_bf16", "amx_bf16", "bf16"))
    name = f"cpu {flags.get('cpu_name', platform.processor())}, {torch.get_num_threads()} threads"
    return Device(name, _memory_gb(), ("float32", "bfloat16") if fast else ("float32",))


def _memory_gb() -> float:
    try:
        return _gb(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):
        return 0.0


def _gb(size: float) -> float:
    return round(size / 1e9, 1)


def _computing(devices: tuple[Device, ...]) -> Iterator[Diagnosis]:
    accelerators = [device for device in devices if not device.name.startswith("cpu")]
    if not devices:
        return
    best = max(accelerators or devices, key=lambda device: device.memory_gb)
    yield Diagnosis(
        "bfloat16, as recipes train by default",
        "bfloat16" in best.dtypes,
        "" if "bfloat16" in best.dtypes else f"{best.name} has it in software: right, but slow; `precision: float32`",
    )
    short = "" if accelerators else ", and training on a CPU takes weeks"
    yield Diagnosis(
        "a 7B language model",
        bool(accelerators) and best.memory_gb > SEVEN_B_GB,
        f"{best.name}, {best.memory_gb:.0f} GB; its weights alone take 14 GB in bfloat16{short}",
    )


def _disk(what: str, folder: Path) -> Disk:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return Disk(what, str(folder), _gb(shutil.disk_usage(there).free), os.access(there, os.W_OK))


def _room(disk: Disk) -> Diagnosis:
    if not disk.writable:
        return Diagnosis(disk.what, False, f"{disk.folder} can't be written; LLAVACTL_HOME or `run_dir` name another")
    return Diagnosis(disk.what, disk.free_gb >= LOW_DISK_GB, f"{disk.free_gb:.0f} GB free in {disk.folder}")


def _pixels(packages: dict[str, str]) -> Diagnosis:
    if "torchvision" in packages:
        return Diagnosis("image preprocessing", True, "torchvision's")
    why = "Pillow's, as torchvision is missing: features differ in the last digits, and are kept apart by fingerprint"
    return Diagnosis("image preprocessing", True, why)


def _network() -> Iterator[Diagnosis]:
    if fault := proxy_fault():
        yield Diagnosis("network", False, f"{fault.message}; {fault.hint}")


def _hub() -> Diagnosis:
    what = "downloads from the model hub"
    if proxy_fault():
        return Diagnosis(what, False, "no network: only models in local folders or in the hub's cache can be used")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "0") not in ("", "0"):
            return Diagnosis(what, False, f"{name} is set: only models in folders or in the hub's cache")
    return Diagnosis(what, True, "allowed; not tried by this command")
