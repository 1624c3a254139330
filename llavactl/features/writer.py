"""Writes a feature store atomically: a shard is either complete and listed, or absent.

A shard is written as ``*.partial``, fsynced, renamed (followed by an fsync of the folder), and then listed with its
checksum in the manifest, which is replaced atomically. One process at a time writes to a store, so every ``*.partial``
that a new writer sees belongs to a dead process, and a renamed but unlisted shard is complete and gets listed.

The parts of one extraction write concurrently: each writes its own ``part-N.h5.partial`` under its own lock, and takes
the store's lock only to rename and list a shard.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from llavactl.core.errors import StoreError
from llavactl.core.paths import exclusive_lock, sync_folder
from llavactl.core.schema import FeatureShape
from llavactl.features.fingerprint import Fingerprint
from llavactl.features.manifest import (
    Manifest,
    ShardEntry,
    read_fingerprint,
    read_manifest,
    store_dir,
    write_fingerprint,
)
from llavactl.features.parts import WHOLE, Part
from llavactl.features.shard_copy import copy_shard
from llavactl.features.shards import DamagedShardError, PartialShard, Shard, checksum, damaged_error, open_error

log = logging.getLogger(__name__)

_SHARD_NUMBER = re.compile(r"shard-(\d+)\.")
_PART_NUMBER = re.compile(r"part-(\d+)\.h5\.partial$")
_STORE_LOCK_TIMEOUT_S = 60.0
"""Maximum wait of a part for the store's lock, which is held for one rename and one small write."""

_PART_LOCK_TIMEOUT_S = 2.0
"""Maximum wait of a part for its own lock, which other parts acquire briefly to check whether its owner is alive."""


class StoreWriter:
    """A context manager that appends features to the store of ``fingerprint``, ``shard_images`` images per shard.

    On exit, the shard being filled is finished with the images it has, even after an exception or Ctrl-C. If writing
    itself failed, that shard is discarded instead. Every method raises StoreError if the store can't be written;
    shards finished before stay valid. The manifest records the ``conditions`` and the ``recipe`` of the extraction.
    """

    def __init__(
        self,
        fingerprint: Fingerprint,
        shape: FeatureShape,
        shard_images: int,
        part: Part = WHOLE,
        *,
        conditions: Mapping[str, Any] | None = None,
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        self.part = part
        self.conditions = conditions
        self.recipe = recipe
        self.folder = store_dir(fingerprint)
        self.fingerprint = fingerprint
        self.shard_images = shard_images
        self.bytes_written = 0
        self._manifest = Manifest(shape)
        self._skipped: dict[str, str] = {}
        self._partial: PartialShard | None = None
        self._failed = False
        self._lock = contextlib.ExitStack()

    def __enter__(self) -> StoreWriter:
        if self.part.whole:
            self._lock.enter_context(exclusive(self.folder))
        else:
            lock_file = _part_lock(self.folder, self.part.index)
            self._lock.enter_context(_locked(lock_file, self.folder, _PART_LOCK_TIMEOUT_S))
        try:
            with self._write_errors(), self._store_lock():
                self._recover()
        except BaseException:
            self._lock.close()
            raise
        return self

    def append(self, keys: Sequence[str], features: np.ndarray) -> None:
        """Stores finite ``features`` [n, P, Dv] float16 of the images with these content ``keys``."""
        with self._write_errors():
            while len(keys):
                partial = self._partial = self._partial or self._new_partial()
                count = min(partial.remaining, len(keys))
                partial.append(keys[:count], features[:count])
                keys, features = keys[count:], features[count:]
                if not partial.remaining:
                    self._finish()

    def skip(self, key: str, reason: str) -> None:
        """Records why the content ``key`` has no features; written with the next finished shard."""
        self._skipped[key] = reason

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        try:
            if not self._failed:
                with self._write_errors():
                    self._finish()
        finally:
            if self._partial is not None:
                self._partial.discard()
            self._lock.close()

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        """Converts OSError to StoreError and refuses further writes."""
        if self._failed:
            raise StoreError(f"features can't be written to {self.folder}: an earlier write failed")
        try:
            yield
        except OSError as error:
            self._failed = True
            raise StoreError(
                f"features can't be written to {self.folder}: {error.strerror or error}",
                hint="free disk space or set LLAVACTL_HOME, then run extract again: finished shards are kept",
            ) from error

    def _store_lock(self) -> contextlib.AbstractContextManager[None]:
        """The lock needed to change files that all parts share."""
        if self.part.whole:
            return contextlib.nullcontext()
        return _locked(_lock_of(self.folder), self.folder, _STORE_LOCK_TIMEOUT_S)

    def _new_partial(self) -> PartialShard:
        name = self._next_shard_name() if self.part.whole else f"part-{self.part.index}.h5"
        return PartialShard(self.folder / f"{name}.partial", self.fingerprint, self._manifest.shape, self.shard_images)

    def _next_shard_name(self) -> str:
        numbers = [int(match[1]) for path in self.folder.iterdir() if (match := _SHARD_NUMBER.match(path.name))]
        return f"shard-{max(numbers, default=-1) + 1:05}.h5"

    def _finish(self) -> None:
        """Finishes and lists the partial shard, if any, and writes the manifest."""
        finished = None
        if (partial := self._partial) is not None:
            partial.finish()
            size, digest = partial.path.stat().st_size, checksum(partial.path)
            finished = ShardEntry(partial.path.name, len(partial.keys), size, digest)
        self._list(finished, self.conditions)

    def add_shard(
        self,
        source: Path,
        entry: ShardEntry,
        rows: np.ndarray | None,
        conditions: Mapping[str, Any] | None,
        advance: Callable[[int], object],
    ) -> None:
        """Adds a copy of the shard ``source``, only of ``rows`` if given; see ``copy_shard``.

        Raises:
            DamagedShardError, StoreError: see ``copy_shard``.
        """
        with self._write_errors():
            partial = self.folder / f"{self._next_shard_name()}.partial"
            self._list(copy_shard(source, entry, partial, rows, advance), conditions)

    def _list(self, partial: ShardEntry | None, conditions: Mapping[str, Any] | None) -> None:
        """Renames and lists the finished ``partial``, if any, and writes the manifest."""
        with self._store_lock():
            if not self.part.whole:
                self._manifest = read_manifest(self.folder) or self._manifest
            if partial is not None:
                path = self.folder / partial.file
                finished = path.with_suffix("") if self.part.whole else self.folder / self._next_shard_name()
                path.rename(finished)
                self._partial = None
                sync_folder(self.folder)
                self._manifest = self._manifest.with_shard(replace(partial, file=finished.name), conditions)
                self.bytes_written += partial.bytes
                if self.recipe is not None:
                    self._manifest = self._manifest.with_recipe(self.recipe)
            self._manifest = replace(self._manifest, skipped={**self._manifest.skipped, **self._skipped})
            self._manifest.write(self.folder)

    def _recover(self) -> None:
        """Makes the folder and its manifest consistent after an interrupted writer."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # This file is for people. The folder's name and the fingerprint in every shard are authoritative.
        stored_fingerprint = None
        with contextlib.suppress(StoreError):
            stored_fingerprint = read_fingerprint(self.folder)
        if stored_fingerprint != self.fingerprint:
            write_fingerprint(self.folder, self.fingerprint)
        for path in unfinished_files(self.folder):
            if self._is_active(path):
                continue
            log.info("removing %s, left by an interrupted extract", path)
            path.unlink()
        manifest = read_manifest(self.folder)
        if manifest is not None and manifest.shape != self._manifest.shape:
            raise StoreError(
                f"{self.folder} has features of {manifest.shape}, but the backbone makes {self._manifest.shape}",
                hint="the backbone's identity() lacks an option that changes the shape; "
                "remove the folder and run `llavactl extract` again",
            )
        self._manifest = manifest or self._manifest
        self._skipped = dict(self._manifest.skipped)
        listed = {entry.file for entry in self._manifest.shards}
        for path in sorted(self.folder.glob("*.h5")):
            if path.name not in listed:
                self._list_shard(path)
        self._manifest.write(self.folder)

    def _is_active(self, partial: Path) -> bool:
        """Whether another part is writing ``partial``."""
        match = _PART_NUMBER.search(partial.name)
        if match is None or int(match[1]) == self.part.index:
            return False
        return _is_locked(_part_lock(self.folder, int(match[1])))

    def _list_shard(self, path: Path) -> None:
        """Lists a shard that was renamed but not yet listed; a damaged one is set aside.

        Raises:
            StoreError: the shard can't be read and may be intact.
        """
        try:
            shard = Shard.open(path)
            if differences := self.fingerprint.differences(shard.fingerprint):
                raise damaged_error(path, f"different fingerprint: {'; '.join(differences)}")
            entry = ShardEntry(path.name, len(shard.keys), path.stat().st_size, checksum(path))
        except DamagedShardError as error:
            log.warning("%s; set aside", error)
            path.rename(path.with_name(f"{path.name}.damaged"))
        except OSError as error:
            raise open_error(path, error) from error
        else:
            self._manifest = self._manifest.with_shard(entry)


def is_writable(folder: Path) -> bool:
    """Whether this user may write to the store in ``folder``."""
    return all(os.access(path, os.W_OK) for path in (folder, folder.parent, _lock_of(folder)) if path.exists())


def unfinished_files(folder: Path) -> list[Path]:
    """Files that dead writers left in ``folder``: partial shards and temporary manifests."""
    return sorted([*folder.glob("*.partial"), *folder.glob(".*.json.*")])


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """An exclusive lock on the store in ``folder``; the system releases it if the process dies.

    Raises:
        StoreError: another process holds it or is writing a part, or the lock file can't be created.
    """
    with _locked(_lock_of(folder), folder):
        part_locks = {path.name.removesuffix(".owner") for path in folder.parent.glob(f"{folder.name}.part-*.lock*")}
        if any(_is_locked(folder.with_name(name)) for name in part_locks):
            raise _busy_error(folder)
        yield


@contextlib.contextmanager
def _locked(lock_file: Path, folder: Path, timeout_s: float = 0) -> Iterator[None]:
    with contextlib.ExitStack() as lock:
        try:
            lock.enter_context(exclusive_lock(lock_file, _busy_error(folder), timeout_s))
        except OSError as error:
            raise StoreError(
                f"the feature store {folder} can't be written: {error.strerror or error}",
                hint="set LLAVACTL_HOME to a writable folder",
            ) from error
        yield


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _part_lock(folder: Path, index: int) -> Path:
    return folder.with_name(f"{folder.name}.part-{index}.lock")


def _is_locked(lock_file: Path) -> bool:
    """Whether a running process holds ``lock_file``."""
    try:
        with exclusive_lock(lock_file, StoreError("locked")):
            return False
    except StoreError:
        return True


def _busy_error(folder: Path) -> StoreError:
    return StoreError(
        f"another process is writing to the feature store {folder}",
        hint="wait until it has finished, then run the same command",
    )
