"""The one error boundary: what a command raised, as a line and a hint, or as a bug with its traceback."""

from __future__ import annotations

import errno
import sqlite3
import sys
import traceback
import zipfile

import click

from llavactl.core import plugins
from llavactl.core.errors import LlavactlError, RecipeError
from llavactl.core.faults import out_of_memory, reason
from llavactl.core.network import proxy_fault


def report(error: Exception) -> None:
    """Prints ``error`` to stderr."""
    if (known := explained(error)) is not None:
        _lines(known)
        return
    traceback.print_exception(error)
    plugin = _plugin(error)
    whose = f"plugin {plugin}, please report this traceback to its authors" if plugin else ""
    click.echo(f"bug in {whose or 'llavactl, please report this traceback'}", err=True)


def explained(error: Exception) -> LlavactlError | None:
    """What of ``error`` its user can act on; None where it is a bug.

    Typed errors pass as they are. Of the others these are about the machine and not about the program: the operating
    system's, packages that are missing, memory, devices, the model hub, and files that a library can't read.
    """
    if isinstance(error, LlavactlError):
        return error
    if out_of_memory(error):
        return LlavactlError(f"out of memory: {reason(error)}", hint="less at a time: a smaller micro_batch_size, say")
    if isinstance(error, ImportError):
        return _import(error)
    if (_from(error, "huggingface_hub") and isinstance(error, OSError)) or _from(error, "httpx2"):
        return _network(error)
    if isinstance(error, OSError):
        return LlavactlError(reason(error), hint=_hint(error))
    if isinstance(error, UnicodeEncodeError) and "utf-8" not in (error.encoding, sys.getfilesystemencoding()):
        return LlavactlError(reason(error), hint="set PYTHONUTF8=1, or a UTF-8 locale")
    if isinstance(error, sqlite3.Error):
        return LlavactlError(f"an SQLite file can't be used: {reason(error)}", hint="free some disk, or its lock")
    if isinstance(error, zipfile.BadZipFile) or _from(error, "safetensors"):
        return LlavactlError(f"a file can't be read: {reason(error)}", hint="is every download whole?")
    if _device(error):
        return LlavactlError(f"the device failed: {reason(error)}", hint="`llavactl doctor` lists what works here")
    return None


def _hint(error: OSError) -> str:
    match errno.errorcode.get(error.errno or 0):
        case "ENOSPC" | "EDQUOT":
            return "free some disk; LLAVACTL_HOME and `run_dir` name other places"
        case "EACCES" | "EPERM" | "EROFS":
            return "change its permissions, or set LLAVACTL_HOME or `run_dir` to a folder that can be written"
        case "EMFILE" | "ENFILE":
            return "allow more open files: `ulimit -n`"
    return ""


def _import(error: ImportError) -> LlavactlError | None:
    """A package that is missing or broken here; None where the missing module is one of ours."""
    package = (error.name or "").partition(".")[0]
    if package == "llavactl":
        return None
    if fault := proxy_fault() if "socks" in str(error).lower() else None:
        return fault
    hint = "`llavactl doctor` shows more"
    if isinstance(error, ModuleNotFoundError) and package:
        hint = f"`pip install {package}`, for the Python at {sys.executable}"
    return LlavactlError(f"a package is missing or broken: {reason(error)}", hint=hint)


def _network(error: Exception) -> LlavactlError:
    said = reason(error)
    if fault := proxy_fault():
        return fault
    kinds = {kind.__name__ for kind in type(error).__mro__}
    status = getattr(getattr(error, "response", None), "status_code", None)
    if kinds & {"GatedRepoError", "RepositoryNotFoundError"} or status in (401, 403):
        hint = "accept the model's terms on its page, then `hf auth login`, or give a local folder"
    else:
        hint = "a model in a local folder, or in the hub's cache, needs no network"
    return LlavactlError(f"the model hub: {said}", hint=hint)


def _device(error: Exception) -> bool:
    """Whether an accelerator, or the talk between several, failed."""
    torch = sys.modules.get("torch")
    kinds = [getattr(torch, "AcceleratorError", None), getattr(getattr(torch, "distributed", None), "DistError", None)]
    named = isinstance(error, RuntimeError) and str(error).startswith(("CUDA error", "CUDA driver", "No CUDA GPUs"))
    return named or isinstance(error, tuple(kind for kind in kinds if isinstance(kind, type)))


def _from(error: Exception, package: str) -> bool:
    return any(kind.__module__.partition(".")[0] in (package, f"{package}_rust") for kind in type(error).__mro__)


def _plugin(error: Exception) -> str | None:
    """The plugin whose code was the last to run of all plugins', if one was."""
    modules = {point.value.partition(":")[0].partition(".")[0]: point.name for point in plugins.entry_points()}
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    ran = [str(frame.f_globals.get("__name__")).partition(".")[0] for frame in reversed(frames)]
    return next((modules[name] for name in ran if name in modules), None)


def _lines(error: LlavactlError) -> None:
    """One line a problem, and one with the way out."""
    problems = [str(problem) for problem in error.problems] if isinstance(error, RecipeError) else []
    for problem in problems or [error.message]:
        click.echo(f"error: {line(problem)}", err=True)
    if error.hint:
        click.echo(f"hint: {line(error.hint)}", err=True)


def line(text: str) -> str:
    """``text`` in one line."""
    return " ".join(text.split())
