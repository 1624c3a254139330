"""Arrays cached by key in the user cache folder, and memory-mapped when they are read.

An entry is one safetensors file, written atomically. Its metadata has a hash of its arrays: a damaged entry is computed
again. Entries are optional: without a writable cache folder, everything is computed every time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import numpy as np

from llavactl.core.errors import LlavactlError
from llavactl.core.hashes import cache_is_read_only
from llavactl.core.paths import cache_dir, exclusive_lock, open_atomic
from llavactl.core.processes import PER_MACHINE

log = logging.getLogger(__name__)

Arrays = Mapping[str, np.ndarray]

UNUSED_DAYS = 90
"""Entries that no run has read for this long are removed when another one is written."""

_DTYPES: Mapping[str, np.dtype] = {"U8": np.dtype("u1"), "I32": np.dtype("<i4"), "I64": np.dtype("<i8")}
_LOCK_TIMEOUT_S = 3600.0


def hash_arrays(arrays: Arrays) -> str:
    """The sha256 of the names, types, shapes and values of ``arrays``."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def load(kind: str, key: str) -> Arrays | None:
    """The read-only arrays cached for ``key``; None if there are none, or they are damaged."""
    path = _path(kind, key)
    try:
        arrays, expected = _mapped(path)
        if hash_arrays(arrays) != expected:
            raise ValueError("the checksum differs")
        with contextlib.suppress(OSError):
            os.utime(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged and computed again: %s", path, error, extra=PER_MACHINE)
        return None
    log.debug("read %s", path)
    return arrays


def save(kind: str, key: str, arrays: Arrays) -> None:
    """Caches ``arrays`` (uint8, int32, int64) for ``key``, unless the cache is read-only."""
    if cache_is_read_only():
        return
    path = _path(kind, key)
    try:
        _remove_unused(path.parent)
        with open_atomic(path) as file:
            names = {dtype: name for name, dtype in _DTYPES.items()}
            header: dict[str, object] = {"__metadata__": {"sha256": hash_arrays(arrays)}}
            offset = 0
            for name, array in arrays.items():
                header[name] = {
                    "dtype": names[array.dtype],
                    "shape": array.shape,
                    "data_offsets": [offset, offset := offset + array.nbytes],
                }
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)
            file.write(len(text).to_bytes(8, "little") + text)
            for array in arrays.values():
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    except OSError as error:
        _warn(str(path.parent), error.strerror or str(error))


@contextlib.contextmanager
def computing(kind: str, key: str) -> Iterator[None]:
    """In this context only one process of a run (``WORLD_SIZE``) computes ``key``; the others wait."""
    with contextlib.ExitStack() as stack:
        if os.environ.get("WORLD_SIZE", "1") != "1" and not cache_is_read_only():
            busy = LlavactlError(f"another process has been computing {kind} for an hour")
            # Without a lock several processes compute the same arrays, and either may write them.
            with contextlib.suppress(OSError, LlavactlError):
                lock = _path(kind, key).with_suffix(".lock")
                stack.enter_context(exclusive_lock(lock, busy, _LOCK_TIMEOUT_S))
        yield


def _mapped(path: Path) -> tuple[dict[str, np.ndarray], str]:
    """The memory-mapped arrays of a safetensors file, and the hash in its metadata."""
    data = np.memmap(path, np.uint8, mode="r")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes())
    expected = str(header.pop("__metadata__")["sha256"])
    arrays: dict[str, np.ndarray] = {}
    for name, entry in header.items():
        # A plain array over the map: NumPy's memmap class adds microseconds to every index operation.
        arrays[name] = np.ndarray(entry["shape"], _DTYPES[entry["dtype"]], data, start + entry["data_offsets"][0])
    return arrays, expected


def _path(kind: str, key: str) -> Path:
    return cache_dir() / kind / f"{key}.safetensors"


def _remove_unused(folder: Path) -> None:
    oldest = time.time() - UNUSED_DAYS * 86_400
    for path in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):  # another process removed it
            if path.stat().st_mtime < oldest:
                path.unlink()


@cache
def _warn(folder: str, reason: str) -> None:
    """Logs a warning once per folder."""
    message = "%s can't be written (%s): records are read and tokenized again at every start"
    log.warning(message, folder, reason, extra=PER_MACHINE)
