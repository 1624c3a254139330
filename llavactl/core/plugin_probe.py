"""Imports a plugin's module in another process, with a time limit: this one couldn't stop an import that hangs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, NoReturn

from llavactl.core import plugin_points, plugins
from llavactl.core.plugin_code import root_package, running_at
from llavactl.core.plugin_points import package_of
from llavactl.core.quantities import duration
from llavactl.core.streams import result_stream, stdout_to_stderr

IMPORT_TIMEOUT_S = 10.0
_WAIT = "wait longer with --timeout SECONDS"

HEAVY = (
    *("accelerate", "datasets", "h5py", "jax", "matplotlib", "numpy", "pandas", "peft", "PIL", "scipy", "sklearn"),
    *("tensorflow", "tokenizers", "torch", "torchvision", "transformers"),
)
"""Packages that a plugin's module must not import: every command imports the module, even ``--help``."""

_PROGRAM = "import sys; from llavactl.core.plugin_probe import print_import; print_import(*sys.argv[1:])"

_KILL_AFTER_S = 5.0
"""After the time limit, in which the process starts and reports where it hangs. An extension that never releases the
interpreter lock can't be reported.
"""


@dataclass(frozen=True)
class Import:
    """The import of a plugin's module: its time in seconds, the ``HEAVY`` packages that it imported, and what failed.

    ``seconds`` is None if the import didn't end (``hangs``), or if it ended the process; ``remedy``: what to do about
    ``error``, or to import less.
    """

    seconds: float | None
    heavy: tuple[str, ...] = ()
    error: str = ""
    remedy: str = ""
    hangs: bool = False


def import_in_process(point: metadata.EntryPoint, timeout_s: float = IMPORT_TIMEOUT_S) -> Import:
    """Imports ``point`` alone in a new process, which is killed after ``timeout_s`` seconds."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-P", "-c", _PROGRAM, point.name, point.value, str(timeout_s)]
    hangs = f"the import doesn't end within {duration(timeout_s)}"
    try:
        done = subprocess.run(  # noqa: S603 - this program
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=timeout_s + _KILL_AFTER_S,
        )
    except subprocess.TimeoutExpired:
        return Import(None, error=hangs, remedy=_WAIT, hangs=True)
    try:
        result: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        error = f"the import ends the process with status {done.returncode}"
        return Import(None, error=error, remedy=f"report this to the authors of {package_of(point)[0]}")
    if (where := result.get("hangs_at")) is not None:
        return Import(None, error=f"{where}: {hangs}" if where else hangs, remedy=_WAIT, hangs=True)
    return Import(result["seconds"], tuple(result["heavy"]), result["error"], result["remedy"])


def print_import(name: str, value: str, timeout_s: str) -> None:
    """Imports the plugin ``name`` from ``value`` and prints the result as JSON: the program of the new process."""
    timer = threading.Timer(float(timeout_s), _print_place, ([root_package(value)],))
    timer.daemon = True
    timer.start()
    point = next(each for each in plugins.entry_points() if (each.name, each.value) == (name, value))
    before, started, error, remedy = set(sys.modules), time.perf_counter(), "", ""
    with stdout_to_stderr():
        try:
            module = plugin_points.loaded(point)
        except BaseException as raised:  # noqa: BLE001 - a plugin may call sys.exit at import
            error, remedy = plugin_points.load_fault(point, raised)
        seconds = time.perf_counter() - started
    timer.cancel()
    heavy = [package for package in HEAVY if package in set(sys.modules) - before]
    if heavy and not error:
        remedy = plugins.lighter(module)
    _print_and_exit({"seconds": seconds, "heavy": heavy, "error": error, "remedy": remedy})


def _print_place(packages: Sequence[str]) -> None:
    place = running_at(packages)
    _print_and_exit({"hangs_at": place.where if place else ""})


def _print_and_exit(result: Mapping[str, Any]) -> NoReturn:
    print(json.dumps(result), file=result_stream(), flush=True)
    os._exit(0)  # threads of the plugin may never end
