"""``llavactl doctor``: checks packages, devices, disk space, network and plugins."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llavactl import __version__
from llavactl.core import plugins
from llavactl.core.devices import Device, available_devices
from llavactl.core.errors import LlavactlError
from llavactl.core.network import offline_variable, proxy_error
from llavactl.core.paths import cache_dir
from llavactl.core.registry import registry
from llavactl.report.plots import PLOTS_MISSING, plots_available
from llavactl.training.prediction.published import MODELS, PublishedPeak, fastest_fit, lowest_peak
from llavactl.training.prediction.target import Target, gpus

MIN_FREE_DISK_GB = 20
METHODS = ("connector", "full", "lora", "qlora")
"""Stage 1, and the methods of stage 2."""

MIN_7B_MEMORY_GB = 20  # 14 GB of bfloat16 weights, plus a connector, LoRA adapters and activations


@dataclass(frozen=True)
class Disk:
    """The disk of an output folder."""

    what: str
    folder: str
    free_gb: float
    writable: bool


@dataclass(frozen=True)
class Diagnosis:
    """One check: whether ``what`` works, and why or why not."""

    what: str
    works: bool
    why: str = ""


@dataclass(frozen=True)
class TrainingMemory:
    """Whether ``model`` can be trained with ``method`` on ``devices``, by stored predictions.

    ``method``: ``connector`` is stage 1, the others are stage 2. ``peak_bytes``: the predicted peak of a device (on a
    CPU: of the process) with the fastest settings that fit; ``settings`` are those that cost time. Without any that
    fit, the lowest peak; None if nothing was predicted, such as for ``qlora`` on a CPU. ``assumes``: the lengths that
    it is predicted for, micro-batches of ``samples`` samples of ``tokens`` tokens.
    """

    model: str
    method: str
    devices: int
    fits: bool
    peak_bytes: int | None
    settings: tuple[str, ...]
    assumes: dict[str, int] | None


@dataclass(frozen=True)
class OptionalFeature:
    """A feature that needs the package ``package``; ``install``: the command that installs it."""

    what: str
    package: str
    installed: bool
    install: str


@dataclass(frozen=True)
class DoctorReport:
    """The environment, and the ``findings`` of all checks; ``problems`` are those that need attention.

    ``training``: the models and methods that fit on ``training_device``, one as for a run without torchrun, and on all
    GPUs.
    """

    llavactl: str
    python: str
    platform: str
    packages: dict[str, str]
    devices: tuple[Device, ...]
    disks: tuple[Disk, ...]
    plugins: tuple[plugins.Plugin, ...]
    findings: tuple[Diagnosis, ...]
    training_device: str = ""
    training: tuple[TrainingMemory, ...] = ()
    features: tuple[OptionalFeature, ...] = ()
    problems: tuple[Diagnosis, ...] = ()


def doctor() -> DoctorReport:
    """Checks packages, devices, disk space, settings and plugins. Writes nothing and doesn't use the network."""
    packages, package_findings = _packages()
    devices, import_failure = _available_devices()
    disks, disk_findings = _disks()
    installed = tuple(plugins.installed())
    broken = [Diagnosis(f"plugin {plugin.name}", False, plugin.error) for plugin in installed if plugin.error]
    necessary = [
        *package_findings,
        *import_failure,
        *_precision(devices),
        *disk_findings,
        _downloads(),
        *_proxy(),
        *broken,
    ]
    informative = [*_language_model(devices), *_recipes(devices), _preprocessing(packages), _plots()]
    targets = _targets(devices)
    return DoctorReport(
        llavactl=__version__,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.release()} {platform.machine()}",
        packages=packages,
        devices=devices,
        disks=disks,
        plugins=installed,
        findings=(*necessary, *informative),
        training_device=_target_text(devices, targets[0]) if targets else "",
        training=tuple(each for target in targets for each in _training(target)),
        features=tuple(_features(cuda=any(target.cuda for target in targets))),
        problems=tuple(finding for finding in necessary if not finding.works),
    )


def _packages() -> tuple[dict[str, str], list[Diagnosis]]:
    """The versions of required packages, and a finding for each unmet requirement."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(text) for text in metadata.requires("llavactl") or ()]
    except metadata.PackageNotFoundError:
        return {}, [Diagnosis("installation", False, "llavactl is imported but not installed: plugins can't be found")]
    versions, unmet = {}, []
    for requirement in requirements:
        name = requirement.name
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            unmet.append(Diagnosis(f"package {name}", False, f"not installed; run `pip install '{requirement}'`"))
            continue
        if not requirement.specifier.contains(versions[name], prereleases=True):
            why = f"version {versions[name]} does not meet {requirement.specifier}"
            unmet.append(Diagnosis(f"package {name}", False, why))
    with contextlib.suppress(metadata.PackageNotFoundError):
        versions["torchvision"] = metadata.version("torchvision")
    return versions, unmet


def _available_devices() -> tuple[tuple[Device, ...], list[Diagnosis]]:
    """The CPU and all accelerators, and a finding if torch can't be imported."""
    try:
        return available_devices(), []
    except (ImportError, OSError) as error:
        return (), [Diagnosis("torch", False, f"can't be imported: {error}")]


def _gb(size: float) -> float:
    return round(size / 1e9, 1)


def _precision(devices: Sequence[Device]) -> Iterator[Diagnosis]:
    """Whether the largest device is fit for the default precision."""
    if devices:
        largest = _largest(devices)
        works = "bfloat16" in largest.dtypes
        why = "" if works else f"{largest.name} has no hardware support: correct, but slow; set `precision: float32`"
        yield Diagnosis("bfloat16, the default precision of training", works, why)


def _language_model(devices: Sequence[Device]) -> Iterator[Diagnosis]:
    """Whether the largest device is fit for a 7B language model."""
    if devices:
        largest = _largest(devices)
        is_cpu = largest.name.startswith("cpu")
        slow = "; training on a CPU takes weeks" if is_cpu else ""
        yield Diagnosis(
            "a 7B language model",
            not is_cpu and largest.memory_gb > MIN_7B_MEMORY_GB,
            f"{largest.name}, {largest.memory_gb:.0f} GB; the weights take 14 GB in bfloat16{slow}",
        )


def _largest(devices: Sequence[Device]) -> Device:
    """The accelerator with most memory, otherwise the CPU."""
    accelerators = [device for device in devices if not device.name.startswith("cpu")]
    return max(accelerators or devices, key=lambda device: device.memory_gb)


def _recipes(devices: Sequence[Device]) -> Iterator[Diagnosis]:
    """Whether each recipe fits on one and on all GPUs, as predicted for GPUs that are not larger and not more."""
    file = registry().get("recipes", "llava-v1.5-7b").path().with_name("memory.json")
    predictions: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    for target in _targets(devices):
        possible = [
            row
            for row in predictions
            if target.cuda and row["devices"] <= target.count and row["gigabytes"] * 1e9 <= target.memory_bytes
        ]
        size = max(((row["devices"], row["gigabytes"]) for row in possible), default=(0, 0))
        if target.count > 1 and size[0] == 1:
            continue  # nothing was predicted for so few GPUs
        rows = [row for row in possible if (row["devices"], row["gigabytes"]) == size]
        for name in dict.fromkeys(row["recipe"] for row in rows):
            stages = [row for row in rows if row["recipe"] == name]
            peaks = [
                f"stage {row['stage']}: {row['device_bytes'] / 1e9:.0f} GB" + ("" if row["fits"] else ", too much")
                for row in stages
            ]
            why = f"predicted for {size[0]} × {size[1]} GB: {'; '.join(peaks)}"
            where = f" on {target.count} GPUs" if target.count > 1 else ""
            yield Diagnosis(f"recipe {name}{where}", all(row["fits"] for row in stages), why)


def _targets(devices: Sequence[Device]) -> list[Target]:
    """What training uses: one GPU, and with torchrun all of them, or else the CPU."""
    memory = [round(device.memory_gb * 1e9) for device in devices if device.name.startswith("cuda")]
    if memory:
        return [gpus(memory, count) for count in dict.fromkeys((1, len(memory)))]
    return [Target(False, round(devices[0].memory_gb * 1e9))] if devices else []


def _target_text(devices: Sequence[Device], target: Target) -> str:
    used = next(device.name for device in devices if device.name.startswith("cuda") or not target.cuda)
    name = f"1 × {used.partition(' ')[2]}" if target.cuda else "CPU"
    return f"{name}, {target.memory_bytes / 1e9:.0f} GB"


def _training(target: Target) -> Iterator[TrainingMemory]:
    """Every model and method with stored predictions."""
    for model in MODELS.values():
        for method in METHODS:
            fit = fastest_fit(model, method, target)
            shown = fit or lowest_peak(model, method, target)
            yield TrainingMemory(
                model=model,
                method=method,
                devices=target.count,
                fits=fit is not None,
                peak_bytes=None if shown is None else shown.bytes,
                settings=() if fit is None else tuple(_settings(fit)),
                assumes=None if shown is None else shown.assumes._asdict(),
            )


def _settings(peak: PublishedPeak) -> Iterator[str]:
    if peak.sharded:
        yield "sharding"
    if peak.optimizer_state == "host":
        yield "optimizer_state"
    if peak.gradient_checkpointing:
        yield "gradient_checkpointing"


def _features(*, cuda: bool) -> Iterator[OptionalFeature]:
    """The optional packages that are useful on this machine."""
    for what, package, module, install, needs_cuda in (
        ("training in 4 bits (method qlora)", "bitsandbytes", "bitsandbytes", "'llavactl[qlora]'", True),
        ("RMSNorm and SwiGLU kernels", "liger-kernel", "liger_kernel", "'llavactl[liger]'", True),
        ("image preprocessing with torchvision", "torchvision", "torchvision", "torchvision", False),
        ("plots", "matplotlib", "matplotlib", "'llavactl[plots]'", False),
        ("balancing captions (data filter)", "textblob", "textblob", "'llavactl[captions]'", False),
        ("HEIC images", "pillow-heif", "pillow_heif", "pillow-heif", False),
    ):
        if cuda or not needs_cuda:
            yield OptionalFeature(what, package, find_spec(module) is not None, f"pip install {install}")


def _disks() -> tuple[tuple[Disk, ...], list[Diagnosis]]:
    """The disks of the feature stores and run folders, and a finding for each."""
    runs = _disk("run folders", Path.cwd())
    try:
        disks = (_disk("feature stores", cache_dir()), runs)
    except LlavactlError as error:
        no_folder = Diagnosis("feature stores", False, error.with_hint())
        return (runs,), [no_folder, _disk_space(runs)]
    return disks, [_disk_space(disk) for disk in disks]


def _disk(what: str, folder: Path) -> Disk:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return Disk(what, str(folder), _gb(shutil.disk_usage(existing).free), os.access(existing, os.W_OK))


def _disk_space(disk: Disk) -> Diagnosis:
    if not disk.writable:
        return Diagnosis(disk.what, False, f"{disk.folder} is not writable; set LLAVACTL_HOME or `run_dir`")
    return Diagnosis(disk.what, disk.free_gb >= MIN_FREE_DISK_GB, f"{disk.free_gb:.0f} GB free in {disk.folder}")


def _preprocessing(packages: dict[str, str]) -> Diagnosis:
    if "torchvision" in packages:
        return Diagnosis("image preprocessing", True, "with torchvision")
    why = "with Pillow (torchvision is not installed): features differ in the last digits and get another fingerprint"
    return Diagnosis("image preprocessing", True, why)


def _plots() -> Diagnosis:
    return Diagnosis("plots", plots_available(), "" if plots_available() else PLOTS_MISSING)


def _downloads() -> Diagnosis:
    what = "downloads from the model hub"
    if proxy_error():
        return Diagnosis(what, False, "no network: only models in local folders or in the hub's cache can be used")
    if name := offline_variable():
        return Diagnosis(what, False, f"{name} is set: only models in local folders or in the hub's cache")
    return Diagnosis(what, True, "allowed; not tested by this command")


def _proxy() -> Iterator[Diagnosis]:
    if invalid_proxy := proxy_error():
        yield Diagnosis("network", False, invalid_proxy.with_hint())
