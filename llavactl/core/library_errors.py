"""Converts exceptions of libraries to llavactl's errors, and to one-line messages."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from llavactl.core import progress
from llavactl.core.errors import LlavactlError, ModelError
from llavactl.core.model_files import INCOMPLETE, SMALL_FILES, check_files, file_error, local_folder, weight_files
from llavactl.core.network import hub_error


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """Converts any exception raised while reading ``file`` to an error that names the file.

    Raises:
        ModelError: for any exception except MemoryError.
    """
    try:
        yield
    except (LlavactlError, MemoryError):
        raise
    except Exception as error:
        raise file_error(file) or ModelError(f"{file}: {reason(error)}", hint=INCOMPLETE) from error


@contextlib.contextmanager
def loading(what: str, model: str | Path, hint: str = "", *, weights: bool = False) -> Iterator[None]:
    """Converts any exception raised while loading ``model`` to an error that names the model or its broken file.

    ``model`` is a folder or an id, ``what`` its role in messages. With ``weights``, weight files are checked as well,
    and transformers prints no table of missing and unused weights, and progress bars only where llavactl does.

    Raises:
        ModelError: for any exception except out-of-memory errors, which propagate.
    """
    try:
        with _quiet_loading() if weights else contextlib.nullcontext():
            yield
    except (LlavactlError, MemoryError):
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        if "trust_remote_code" in str(error):
            raise needs_custom_code(what, model) from error
        raise _broken_file_error(model, weights) or _loading_error(what, model, error, hint) from error


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Raises the log level of transformers to ``error``: callers check missing weights, and unused ones are expected
    where a part of a LLaVA checkpoint is loaded. Its progress bars follow those of llavactl from here on.
    """
    from transformers.utils import logging

    progress.quiet_transformers()

    level = logging.get_verbosity()
    logging.set_verbosity(max(level, logging.ERROR))
    try:
        yield
    finally:
        logging.set_verbosity(level)


def needs_custom_code(what: str, model: str | Path) -> ModelError:
    """The error for a model whose repository contains its own code."""
    return ModelError(
        f"{what} {model}: needs custom code (trust_remote_code), which llavactl never runs",
        hint="use a model whose class is part of transformers, or write a plugin for this one",
    )


def _broken_file_error(model: str | Path, weights: bool) -> ModelError | None:
    """The error for the first broken file in the model's folder."""
    folder = local_folder(model)
    if folder is None or not folder.is_dir():
        return None
    try:
        check_files([folder / name for name in SMALL_FILES if os.path.lexists(folder / name)])
        check_files(weight_files(folder) if weights else ())
    except ModelError as error:
        return error
    return None


def _loading_error(what: str, model: str | Path, error: Exception, hint: str) -> ModelError:
    if isinstance(error, pickle.UnpicklingError | EOFError) or "file might be corrupted" in str(error):
        return ModelError(
            f"{what} {model}: its *.bin files are truncated or contain objects other than tensors", hint=INCOMPLETE
        )
    if not Path(model).is_absolute() and (unavailable := hub_error(error, str(model))):
        return ModelError(f"{what} {model}: {unavailable.message}", hint=unavailable.hint)
    return ModelError(f"{what} {model}: {reason(error)}", hint=hint)


_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: ",  # only allocations fail in it: "can't allocate memory", on Windows "not enough memory"
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""Parts of the messages of a RuntimeError that torch raises if there is no memory left."""


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` means that a device or the host is out of memory."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _OUT_OF_MEMORY)


_NEED_NAME = (KeyError, IndexError, TypeError, AttributeError, AssertionError, SystemExit)
"""Exceptions whose messages are unclear without the type: that of a KeyError is only the key."""


_SOURCE_FILE = re.compile(r"(?: in(?=: )| at )?(: )?\[?[^\s\[\]]+\.(?:cc|cpp|cu|h|hpp):\d+\]?,?\s*")
"""The place in a library's source code that messages of gloo, NCCL and torch contain."""


def reason(error: BaseException) -> str:
    """The message of ``error`` in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, UnicodeEncodeError) and not error.object.isascii():  # only file names are encoded this way
        name = json.dumps(error.object)
        return f"a file name can't be encoded in this locale ({error.encoding}): {name}"
    lines = [line.strip() for line in _SOURCE_FILE.sub(r"\1", str(error)).splitlines() if line.strip()]
    last = next((at for at, line in enumerate(lines) if not line.endswith((":", ","))), 0)
    message = " ".join(lines[: last + 1])
    named = isinstance(error, _NEED_NAME) or not message
    return printable(f"{type(error).__name__}: {message}".removesuffix(": ") if named else message)


def printable(text: str) -> str:
    """``text`` with lone surrogates escaped."""
    return text.encode(errors="backslashreplace").decode()
