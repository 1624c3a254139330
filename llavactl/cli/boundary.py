"""The error boundary of the command line: prints an exception as an error with a hint, or as a bug with a traceback."""

from __future__ import annotations

import errno
import sqlite3
import sys
import traceback
import zipfile

import click

from llavactl.core import plugins
from llavactl.core.errors import LlavactlError, RecipeError
from llavactl.core.library_errors import out_of_memory, reason
from llavactl.core.network import proxy_fault


def report(error: BaseException) -> None:
    """Prints ``error`` to stderr."""
    if (known := explained(error)) is not None:
        _lines(known)
        return
    traceback.print_exception(error)
    plugin = _plugin(error)
    whose = f"plugin {plugin}, please report this traceback to its authors" if plugin else ""
    click.echo(f"bug in {whose or 'llavactl, please report this traceback'}", err=True)


def explained(error: BaseException) -> LlavactlError | None:
    """``error`` as one that the user can act on; None if it is a bug.

    Typed errors are returned unchanged. Other exceptions are converted if they concern the machine rather than the
    program: the operating system, missing packages, memory, devices, the model hub, files that a library can't read.
    """
    if isinstance(error, LlavactlError):
        return error
    if out_of_memory(error):
        return LlavactlError(f"out of memory: {reason(error)}", hint="reduce micro_batch_size, for example")
    if isinstance(error, ImportError):
        return _import(error)
    if (_from(error, "huggingface_hub") and isinstance(error, OSError)) or _from(error, "httpx2"):
        return _network(error)
    if isinstance(error, OSError):
        return LlavactlError(reason(error), hint=_hint(error))
    if isinstance(error, UnicodeEncodeError) and "utf-8" not in (error.encoding, sys.getfilesystemencoding()):
        return LlavactlError(reason(error), hint="set PYTHONUTF8=1, or a UTF-8 locale")
    if isinstance(error, sqlite3.Error):
        hint = "free disk space, or stop the process that has locked the file"
        return LlavactlError(f"an SQLite file can't be used: {reason(error)}", hint=hint)
    if isinstance(error, zipfile.BadZipFile) or _from(error, "safetensors"):
        return LlavactlError(f"a file can't be read: {reason(error)}", hint="check that every download is complete")
    if _device(error):
        return LlavactlError(f"device error: {reason(error)}", hint="`llavactl doctor` shows which devices work")
    return None


def _hint(error: OSError) -> str:
    match errno.errorcode.get(error.errno or 0):
        case "ENOSPC" | "EDQUOT":
            return "free disk space, or set LLAVACTL_HOME or `run_dir` to a folder on another disk"
        case "EACCES" | "EPERM" | "EROFS":
            return "change its permissions, or set LLAVACTL_HOME or `run_dir` to a writable folder"
        case "EMFILE" | "ENFILE":
            return "allow more open files: `ulimit -n`"
    return ""


def _import(error: ImportError) -> LlavactlError | None:
    """The error for a missing or broken package; None if the missing module is llavactl's own (a bug)."""
    package = (error.name or "").partition(".")[0]
    if package == "llavactl":
        return None
    if fault := proxy_fault() if "socks" in str(error).lower() else None:
        return fault
    hint = "run `llavactl doctor` for details"
    if isinstance(error, ModuleNotFoundError) and package:
        hint = f"`pip install {package}` for {sys.executable}"
    return LlavactlError(f"a package is missing or broken: {reason(error)}", hint=hint)


def _network(error: BaseException) -> LlavactlError:
    said = reason(error)
    if fault := proxy_fault():
        return fault
    kinds = {kind.__name__ for kind in type(error).__mro__}
    status = getattr(getattr(error, "response", None), "status_code", None)
    if kinds & {"GatedRepoError", "RepositoryNotFoundError"} or status in (401, 403):
        hint = "accept the model's terms on its page, then `hf auth login`, or give a local folder"
    else:
        hint = "check the network, or use a model in a local folder or in the hub's cache"
    return LlavactlError(f"the model hub: {said}", hint=hint)


def _device(error: BaseException) -> bool:
    """Whether an accelerator, or the communication between several, failed."""
    torch = sys.modules.get("torch")
    kinds = [getattr(torch, "AcceleratorError", None), getattr(getattr(torch, "distributed", None), "DistError", None)]
    named = isinstance(error, RuntimeError) and str(error).startswith(("CUDA error", "CUDA driver", "No CUDA GPUs"))
    return named or isinstance(error, tuple(kind for kind in kinds if isinstance(kind, type)))


def _from(error: BaseException, package: str) -> bool:
    return any(kind.__module__.partition(".")[0] in (package, f"{package}_rust") for kind in type(error).__mro__)


def _plugin(error: BaseException) -> str | None:
    """The plugin whose code is innermost in the traceback of ``error`` or of its cause, if any."""
    modules = {point.value.partition(":")[0].partition(".")[0]: point.name for point in plugins.entry_points()}
    from llavactl.core.registry import registry  # --help needs none of it

    # A component may lie in another package than the module of its plugin's entry point.
    components = {entry.target.partition(":")[0].partition(".")[0]: entry.plugin for entry in registry()}
    modules |= {module: plugin for module, plugin in components.items() if module != "llavactl"}
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if error.__cause__ is not None:  # a generator turns StopIteration into another error
        frames += [frame for frame, _ in traceback.walk_tb(error.__cause__.__traceback__)]
    ran = [str(frame.f_globals.get("__name__")).partition(".")[0] for frame in reversed(frames)]
    return next((modules[name] for name in ran if name in modules), None)


def raised_in(error: BaseException, package: str) -> bool:
    """Whether code of ``package`` itself raised ``error``."""
    *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
    return str(innermost.f_globals.get("__name__")).partition(".")[0] == package


def _lines(error: LlavactlError) -> None:
    """Prints one line per problem and one with the hint."""
    problems = [str(problem) for problem in error.problems] if isinstance(error, RecipeError) else []
    for problem in problems or [error.message]:
        click.echo(f"error: {line(problem)}", err=True)
    if error.hint:
        click.echo(f"hint: {line(error.hint)}", err=True)


def line(text: str) -> str:
    """``text`` in one line."""
    return " ".join(text.split())
