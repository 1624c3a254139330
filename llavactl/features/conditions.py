"""The conditions of an encoding: what may change the last bits of features whose fingerprint is the same."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from llavactl.core.plugin_code import distributions_of, root_package

if TYPE_CHECKING:
    from llavactl.core.protocols import Json

_LIBRARIES = "torch", "transformers", "pillow", "numpy"


def conditions(device: str, batch_size: int, backbone: object) -> dict[str, Json]:
    """The conditions of an encoding in this process on ``device`` with ``features.batch_size``.

    The device and its name, the number of threads (CPU only), and the versions of the libraries and of the package
    that defines the encoder ``backbone``, if it is a plugin's.
    """
    import torch

    kind = device.partition(":")[0]
    if kind == "cpu":
        name = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    else:
        name = torch.cuda.get_device_name(device) if kind == "cuda" else platform.machine()
    threads = {"threads": torch.get_num_threads()} if kind == "cpu" else {}
    package = root_package(type(backbone).__module__)
    plugin = distributions_of(package) if package != root_package(__name__) else []
    versions = {library: known for library in (*_LIBRARIES, *sorted(set(plugin))) if (known := _version(library))}
    return {"device": kind, "device_name": name, **threads, "batch_size": batch_size, **versions}


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:  # replaced by a fork under another name, such as pillow-simd
        return None


@contextmanager
def threads_of(recorded: Mapping[str, Json]) -> Iterator[None]:
    """Computes with the ``recorded`` number of threads within the context, if there is one."""
    import torch

    before, threads = torch.get_num_threads(), recorded.get("threads")
    if isinstance(threads, int):
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
