"""The error boundary of the command line: prints an error with its hint, or a bug with its traceback, to stderr."""

from __future__ import annotations

import errno
import logging
import sqlite3
import sys
import traceback
import zipfile

import click
from click.exceptions import NoArgsIsHelpError

from llavactl.cli import terminal
from llavactl.core import progress
from llavactl.core.control_characters import visible
from llavactl.core.errors import LlavactlError, RecipeError
from llavactl.core.library_errors import out_of_memory, reason
from llavactl.core.network import hub_error, proxy_error
from llavactl.core.plugin_code import fault_text

log = logging.getLogger(__name__)

_MEMORY_HINT = "reduce `micro_batch_size` in training; chat with `--quantize 4` or `--dtype bfloat16`"


def report(error: BaseException) -> None:
    """Prints ``error`` to stderr; with ``--verbose``, its traceback as well."""
    known = explained(error)
    if known is None or log.isEnabledFor(logging.DEBUG):
        print_traceback(error)
    if known is not None:
        _lines(known)
        return
    message("bug", "in llavactl, please report this traceback", "bold red")


def explained(error: BaseException) -> LlavactlError | None:
    """``error`` in one line for somebody who can act on it; None if it is a bug in llavactl.

    Typed errors are returned unchanged. Other exceptions are converted if the machine or a file caused them, or if
    they were raised in the code of a plugin, whose component and line they then name.
    """
    if isinstance(error, LlavactlError):
        return error
    from llavactl.core.plugin_faults import plugin_fault  # not needed for --help

    known, fault = _machine_error(error), plugin_fault(error)
    if fault is None:
        return known
    if known is None:
        return fault.error(fault_text(error))
    name = type(error).__name__
    return fault.error(known.message if name in known.message else f"{name}: {known.message}", known.hint)


def _machine_error(error: BaseException) -> LlavactlError | None:
    """The error of the operating system, a package, memory, a device, the model hub or an unreadable file, or None."""
    if out_of_memory(error):
        return LlavactlError(f"out of memory: {reason(error)}", hint=_MEMORY_HINT)
    if isinstance(error, ImportError):
        return _import(error)
    if (_from(error, "huggingface_hub") and isinstance(error, OSError)) or _from(error, "httpx2"):
        return _network(error)
    if isinstance(error, OSError):
        return LlavactlError(reason(error), hint=_hint(error))
    if isinstance(error, UnicodeEncodeError) and "utf-8" not in (error.encoding, sys.getfilesystemencoding()):
        return LlavactlError(reason(error), hint="set PYTHONUTF8=1 or a UTF-8 locale")
    if isinstance(error, sqlite3.Error):
        hint = "free disk space, or stop the process that locks the file"
        return LlavactlError(f"an SQLite file can't be used: {reason(error)}", hint=hint)
    if isinstance(error, zipfile.BadZipFile) or _from(error, "safetensors"):
        return LlavactlError(f"a file can't be read: {reason(error)}", hint="check that all downloads are complete")
    if _device(error):
        return LlavactlError(f"device error: {reason(error)}", hint="`llavactl doctor` shows which devices work")
    return None


def _hint(error: OSError) -> str:
    match errno.errorcode.get(error.errno or 0):
        case "ENOSPC" | "EDQUOT":
            return "free disk space, or write to another disk (`run_dir`, LLAVACTL_HOME)"
        case "EACCES" | "EPERM" | "EROFS":
            return "change the permissions, or write to another folder (`run_dir`, LLAVACTL_HOME)"
        case "EMFILE" | "ENFILE":
            return "raise the limit of open files: `ulimit -n`"
    return ""


def _import(error: ImportError) -> LlavactlError | None:
    """The error for a missing or broken package; None if the module is part of llavactl (a bug)."""
    package = (error.name or "").partition(".")[0]
    if package == "llavactl":
        return None
    if invalid_proxy := proxy_error() if "socks" in str(error).lower() else None:
        return invalid_proxy
    hint = "run `llavactl doctor`"
    if isinstance(error, ModuleNotFoundError) and package:
        hint = f"run `{sys.executable} -m pip install {package}`"
    return LlavactlError(f"a package is missing or broken: {reason(error)}", hint=hint)


def _network(error: BaseException) -> LlavactlError:
    if invalid_proxy := proxy_error():
        return invalid_proxy
    if unavailable := hub_error(error):
        return LlavactlError(f"model hub: a file is {unavailable.message}", hint=unavailable.hint)
    class_names = {cls.__name__ for cls in type(error).__mro__}
    status = getattr(getattr(error, "response", None), "status_code", None)
    if class_names & {"GatedRepoError", "RepositoryNotFoundError"} or status in (401, 403):
        hint = "accept the model's terms on its page and run `hf auth login`, or use a local folder"
    else:
        hint = "check the network, or use a model from a local folder or the hub's cache"
    return LlavactlError(f"model hub: {reason(error)}", hint=hint)


def _device(error: BaseException) -> bool:
    """Whether ``error`` is from an accelerator or from communication between accelerators."""
    torch = sys.modules.get("torch")
    classes = [
        getattr(torch, "AcceleratorError", None),
        getattr(getattr(torch, "distributed", None), "DistError", None),
    ]
    if isinstance(error, tuple(cls for cls in classes if isinstance(cls, type))):
        return True
    return isinstance(error, RuntimeError) and str(error).startswith(("CUDA error", "CUDA driver", "No CUDA GPUs"))


def _from(error: BaseException, package: str) -> bool:
    """Whether ``package`` defines the class of ``error``."""
    return any(cls.__module__.partition(".")[0] in (package, f"{package}_rust") for cls in type(error).__mro__)


def raised_in(error: BaseException, package: str) -> bool:
    """Whether the innermost frame of ``error`` is in ``package``."""
    *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
    return str(innermost.f_globals.get("__name__")).partition(".")[0] == package


def _lines(error: LlavactlError) -> None:
    """Prints one line per problem and one with the hint."""
    problems = [str(problem) for problem in error.problems] if isinstance(error, RecipeError) else []
    for problem in problems or [error.message]:
        message("error:", problem, "bold red")
    if error.hint:
        message("hint:", error.hint, "bold yellow")


def report_usage(error: click.ClickException) -> None:
    """Prints an error of click to stderr in the same form, with the usage of the command if that is the cause."""
    if isinstance(error, NoArgsIsHelpError):
        error.show()
        return
    context = error.ctx if isinstance(error, click.UsageError) else None
    if context is not None:
        click.echo(context.get_usage(), err=True)
    text = str(error.format_message())  # a plugin may raise it with anything
    message("error:", text[:1].lower() + text[1:].removesuffix("."), "bold red")
    if context is not None:
        message("hint:", f"`{context.command_path} --help` shows the options", "bold yellow")


def message(label: str, text: str, style: str) -> None:
    """Prints one line to stderr; on terminals the label has the rich style ``style``, and words are wrapped."""
    console, text = terminal.console(sys.stderr), visible(single_line(text))
    with progress.bars_hidden():
        if console is None:
            click.echo(f"{label} {text}", err=True)
        else:
            terminal.print_labeled(console, f"{label} ", text, style)


def print_traceback(error: BaseException) -> None:
    """Prints the traceback of ``error`` to stderr."""
    click.echo(visible("".join(traceback.format_exception(error))), err=True, nl=False)


def single_line(text: str) -> str:
    """``text`` with all whitespace, line breaks included, replaced by single spaces."""
    return " ".join(text.split())
