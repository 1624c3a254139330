"""Cached sha256 hashes of files, so that unchanged files are not read again.

One SQLite file, shared by all processes, maps a stamp (path, size, times) to the hash. The cache is optional: if it is
broken, read-only or on a full disk, files are hashed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from llavactl.core.paths import cache_dir, file_stamp, has_locks
from llavactl.core.processes import PER_MACHINE

log = logging.getLogger(__name__)

T = TypeVar("T")

STAMP_BYTES = 16
_TABLE = "CREATE TABLE IF NOT EXISTS keys (stamp BLOB PRIMARY KEY, key BLOB NOT NULL) WITHOUT ROWID"
_VARIABLES = 500
_SETTLED_S = 2.0
"""Younger files are not cached: they may change within the resolution of the file system's clock."""

_BLOB = re.compile("[0-9a-f]{64}")
"""Large files in the hub's cache have their sha256 as the name."""

_OTHER_FOLDERS = re.compile(
    r"\..*|checkpoint-.*|global_step.*|eval|runs|wandb|logs|__pycache__|onnx|openvino|coreml|original"
)
"""Folders that are not part of a model: outputs of trainers and evaluations, conversions for other programs."""

_OTHER_FILES = re.compile(
    r"\..*|.*\.(md|png|jpe?g|gif|svg|pdf|lock|log|py|ipynb|gguf|onnx|msgpack|h5|ot|tflite|mlmodel)"
    r"|(licen[cs]e|notice|use_policy|modelfile|makefile|events\.|rng_state|optimizer\.|scheduler\.).*"
    r"|trainer_state\.json|training_args\.(bin|json)|all_results\.json|(train|eval)_results\.json|latest",
    re.IGNORECASE,
)
"""Files that are never read to load a model: documents, trainer states, conversions for other programs."""


_read_only: ContextVar[bool] = ContextVar("_read_only", default=False)


@contextlib.contextmanager
def read_only_cache() -> Iterator[None]:
    """Within the context, cached hashes are used but none are added (for dry runs)."""
    token = _read_only.set(True)
    try:
        yield
    finally:
        _read_only.reset(token)


def cache_is_read_only() -> bool:
    """Whether the caller is within ``read_only_cache``."""
    return _read_only.get()


class HashCache:
    """sha256 hashes by stamp, cached in ``file``; read-only with ``remember=False``. Thread- and fork-safe."""

    def __init__(self, file: Path, *, remember: bool = True) -> None:
        self.file = file
        self.remember = remember
        self._broken = False

    def find(self, stamps: Iterable[bytes]) -> dict[bytes, str]:
        """The hashes (64 hex digits) cached for ``stamps``."""
        keys = list(stamps)

        def select(database: sqlite3.Connection) -> dict[bytes, str]:
            hashes: dict[bytes, str] = {}
            for start in range(0, len(keys), _VARIABLES):
                chunk = keys[start : start + _VARIABLES]
                marks = ",".join("?" * len(chunk))
                rows = database.execute(f"SELECT stamp, key FROM keys WHERE stamp IN ({marks})", chunk)  # noqa: S608
                hashes |= {stamp: key.hex() for stamp, key in rows}
            return hashes

        return self._query(select) or {}

    def keep(self, rows: Sequence[tuple[bytes, bytes]]) -> None:
        """Caches (stamp, digest) pairs."""

        def insert(database: sqlite3.Connection) -> None:
            with database:
                database.executemany("INSERT OR REPLACE INTO keys VALUES (?, ?)", rows)

        if rows and self.remember:
            self._query(insert)

    def _query(self, work: Callable[[sqlite3.Connection], T]) -> T | None:
        """The result of ``work`` on the database; None if the file can't be used, which is final after one error.

        Opens a new connection each time (0.1 ms): SQLite connections must not be shared across forks or threads.
        """
        if self._broken or not (self.remember or self.file.exists()):
            return None
        try:
            with contextlib.closing(self._connect()) as database:
                return work(database)
        except (sqlite3.Error, OSError) as error:
            self._broken = True
            _warn(self.file, str(error))
            corrupt = isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError)
            if corrupt and self.remember:
                with contextlib.suppress(OSError):
                    self.file.unlink()
            return None

    def _connect(self) -> sqlite3.Connection:
        mode = "rwc" if self.remember else "ro"
        if self.remember:
            self.file.parent.mkdir(parents=True, exist_ok=True)
        if not _has_locks(self.file.parent):
            raise OSError("this file system has no locks")  # SQLite would wait for its timeout in every statement
        connection = sqlite3.connect(f"{self.file.absolute().as_uri()}?mode={mode}", uri=True, timeout=60)
        try:
            if self.remember:
                connection.execute(_TABLE)
        except sqlite3.Error:
            connection.close()
            raise
        return connection


@cache
def _has_locks(folder: Path) -> bool:
    return has_locks(folder, posix=True)


@cache
def _warn(file: Path, reason: str) -> None:
    """Logs a warning once per file."""
    log.warning("hash cache %s can't be used (%s): files are hashed every time", file, reason, extra=PER_MACHINE)


def stamp_bytes(text: str) -> bytes:
    """``text`` as a stamp of STAMP_BYTES bytes."""
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=STAMP_BYTES).digest()


def hash_file(file: Path) -> str:
    """The sha256 of ``file``, 64 hex digits; the file is read only if its stamp is not cached.

    Raises:
        OSError: the file can't be read.
    """
    if _BLOB.fullmatch(name := file.resolve().name):
        return name
    cache = HashCache(cache_dir() / "files.sqlite", remember=not _read_only.get())
    status = file.stat()
    stamp = stamp_bytes(f"{file.resolve()}\0{file_stamp(status)}")
    if known := cache.find([stamp]).get(stamp):
        return known
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
    changed = max(status.st_mtime, status.st_ctime)
    if time.time() - changed > _SETTLED_S and file_stamp(file.stat()) == file_stamp(status):
        cache.keep([(stamp, digest.digest())])
    return digest.hexdigest()


def model_files(folder: Path) -> Iterator[Path]:
    """The files that are read to load the model in ``folder``, sorted."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            if not _OTHER_FOLDERS.fullmatch(path.name):
                yield from model_files(path)
        elif not _OTHER_FILES.fullmatch(path.name):
            yield path


def hash_folder(folder: Path, exclude: Sequence[str] = ()) -> str:
    """A hash of the names and contents of all files of the model in ``folder`` except ``exclude``.

    Raises:
        OSError: a file can't be read.
    """
    files = {file.relative_to(folder).as_posix(): file for file in model_files(folder)}
    return hash_json([[name, hash_file(file)] for name, file in files.items() if name not in exclude])


def hash_json(value: Any) -> str:
    """The sha256 of a JSON value, independent of key order; other values are hashed as ``str(value)``."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
