"""sha256 hashes of files, cached: a file that has not changed is not read again.

One SQLite file, shared by all processes, maps a stamp (path, size, times) to the hash. The cache is optional: if the
file is broken, read-only or on a full disk, files are hashed again.
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

log = logging.getLogger(__name__)

T = TypeVar("T")

STAMP_BYTES = 16
_TABLE = "CREATE TABLE IF NOT EXISTS keys (stamp BLOB PRIMARY KEY, key BLOB NOT NULL) WITHOUT ROWID"
_VARIABLES = 500
_SETTLED_S = 2.0
"""A file younger than this may still be rewritten within the same tick of the file system's clock."""

_BLOB = re.compile("[0-9a-f]{64}")
"""A large file in the hub's cache is named by its sha256."""

_OTHER_FOLDERS = re.compile(
    r"\..*|checkpoint-.*|global_step.*|eval|runs|wandb|logs|__pycache__|onnx|openvino|coreml|original"
)
"""Folders beside a model that are not part of it: outputs of trainers and evaluations, other programs' conversions."""

_OTHER_FILES = re.compile(
    r"\..*|.*\.(md|png|jpe?g|gif|svg|pdf|lock|log|py|ipynb|gguf|onnx|msgpack|h5|ot|tflite|mlmodel)"
    r"|(licen[cs]e|notice|use_policy|modelfile|makefile|events\.|rng_state|optimizer\.|scheduler\.).*"
    r"|trainer_state\.json|training_args\.(bin|json)|all_results\.json|(train|eval)_results\.json|latest",
    re.IGNORECASE,
)
"""Files beside a model that loading it never reads: documents, states of trainers, other programs' conversions."""


_forgetful: ContextVar[bool] = ContextVar("_forgetful", default=False)


@contextlib.contextmanager
def read_only_cache() -> Iterator[None]:
    """In this context, cached file hashes are read but none is written (for dry runs)."""
    before = _forgetful.set(True)
    try:
        yield
    finally:
        _forgetful.reset(before)


class HashCache:
    """sha256 hashes by stamp, cached in ``file``; ``remember=False`` only reads. Safe for threads and after forks."""

    def __init__(self, file: Path, *, remember: bool = True) -> None:
        self.file = file
        self.remember = remember
        self._broken = False

    def find(self, stamps: Iterable[bytes]) -> dict[bytes, str]:
        """The hashes (64 hex digits) cached for ``stamps``."""
        wanted = list(stamps)

        def look(database: sqlite3.Connection) -> dict[bytes, str]:
            found: dict[bytes, str] = {}
            for start in range(0, len(wanted), _VARIABLES):
                some = wanted[start : start + _VARIABLES]
                marks = ",".join("?" * len(some))
                rows = database.execute(f"SELECT stamp, key FROM keys WHERE stamp IN ({marks})", some)  # noqa: S608
                found |= {stamp: key.hex() for stamp, key in rows}
            return found

        return self._ask(look) or {}

    def keep(self, rows: Sequence[tuple[bytes, bytes]]) -> None:
        """Caches (stamp, digest) pairs."""

        def insert(database: sqlite3.Connection) -> None:
            with database:
                database.executemany("INSERT OR REPLACE INTO keys VALUES (?, ?)", rows)

        if rows and self.remember:
            self._ask(insert)

    def _ask(self, work: Callable[[sqlite3.Connection], T]) -> T | None:
        """The result of ``work`` on the database; None if the file is unusable, as it is after its first error.

        Opens a new connection each time (0.1 ms), since SQLite connections must not be shared across forks or threads.
        """
        if self._broken or not (self.remember or self.file.exists()):
            return None
        try:
            with contextlib.closing(self._connect()) as database:
                return work(database)
        except (sqlite3.Error, OSError) as error:
            self._broken = True
            _warn(self.file, str(error))
            garbage = isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError)
            if garbage and self.remember:
                with contextlib.suppress(OSError):
                    self.file.unlink()
            return None

    def _connect(self) -> sqlite3.Connection:
        mode = "rwc" if self.remember else "ro"
        if self.remember:
            self.file.parent.mkdir(parents=True, exist_ok=True)
        if not _has_locks(self.file.parent):
            raise OSError("this file system has no locks")  # SQLite would wait for its timeout at every statement
        made = sqlite3.connect(f"{self.file.absolute().as_uri()}?mode={mode}", uri=True, timeout=60)
        try:
            if self.remember:
                made.execute(_TABLE)
        except sqlite3.Error:
            made.close()
            raise
        return made


@cache
def _has_locks(folder: Path) -> bool:
    return has_locks(folder, posix=True)


@cache
def _warn(file: Path, reason: str) -> None:
    """Warns once per file, however often it fails."""
    log.warning("%s can't be used (%s): files are hashed again each time", file, reason)


def stamp_bytes(text: str) -> bytes:
    """``text`` as a stamp of STAMP_BYTES bytes."""
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=STAMP_BYTES).digest()


def hash_file(file: Path) -> str:
    """The sha256 of ``file``, 64 hex digits; the file is read only if its stamp is not cached.

    Raises:
        OSError: it can't be read.
    """
    if _BLOB.fullmatch(name := file.resolve().name):
        return name
    memory = HashCache(cache_dir() / "files.sqlite", remember=not _forgetful.get())
    status = file.stat()
    stamp = stamp_bytes(f"{file.resolve()}\0{file_stamp(status)}")
    if known := memory.find([stamp]).get(stamp):
        return known
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
    changed = max(status.st_mtime, status.st_ctime)
    if time.time() - changed > _SETTLED_S and file_stamp(file.stat()) == file_stamp(status):
        memory.keep([(stamp, digest.digest())])
    return digest.hexdigest()


def model_files(folder: Path) -> Iterator[Path]:
    """The files of the model in ``folder``, sorted; without those that loading it never reads."""
    for each in sorted(folder.iterdir()):
        if each.is_dir():
            if not _OTHER_FOLDERS.fullmatch(each.name):
                yield from model_files(each)
        elif not _OTHER_FILES.fullmatch(each.name):
            yield each


def hash_folder(folder: Path, but: Sequence[str] = ()) -> str:
    """A hash of the names and contents of all files of the model in ``folder``, ``but`` those left out.

    Raises:
        OSError: a file can't be read.
    """
    files = {file.relative_to(folder).as_posix(): file for file in model_files(folder)}
    return hash_json([[name, hash_file(file)] for name, file in files.items() if name not in but])


def hash_json(value: Any) -> str:
    """The sha256 of a JSON value, independent of key order; other values are hashed as ``str(value)``."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
