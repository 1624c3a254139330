"""Writing a feature store: shards appear whole or not at all, whatever kills the writer.

A shard is written as ``*.partial``, fsynced, renamed, its folder fsynced, and then listed with its checksum in
the manifest, which is itself replaced in one step. One process writes to a store at a time, so every
``*.partial`` found by a new writer belongs to a dead one, and a shard that was renamed and not yet listed is
whole and is listed now. The parts of one extract write side by side: each to its own ``part-N.h5.partial`` under a
lock of its own, and they take turns, under the store's lock, to rename and to list.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

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
from llavactl.features.parts import Part
from llavactl.features.shards import DamagedShardError, Partial, Shard, checksum, damaged, fault

log = logging.getLogger(__name__)

_NUMBERED = re.compile(r"shard-(\d+)\.")
_OF_PART = re.compile(r"part-(\d+)\.h5\.partial$")
_TURN_S = 60.0
"""How long a part waits for its turn; a turn is a rename and a small file."""

_LOOK_S = 2.0
"""How long a part waits for its own lock, which others take for a moment to see whether it lives."""


class StoreWriter:
    """Appends features to the store of ``fingerprint``, ``shard_images`` a shard; a context manager.

    On the way out the shard being filled is finished as it is, also when an exception (or Ctrl-C) leads out,
    unless writing itself had failed: then it is dropped. Every method raises StoreError when the store
    can't be written; what was finished before stays.
    """

    def __init__(
        self, fingerprint: Fingerprint, shape: FeatureShape, shard_images: int, part: Part | None = None
    ) -> None:
        self.part = part or Part()
        self.folder = store_dir(fingerprint)
        self.fingerprint = fingerprint
        self.shard_images = shard_images
        self.bytes_written = 0
        self._manifest = Manifest(shape)
        self._skipped: dict[str, str] = {}
        self._partial: Partial | None = None
        self._failed = False
        self._lock = contextlib.ExitStack()

    def __enter__(self) -> StoreWriter:
        if self.part.alone:
            self._lock.enter_context(exclusive(self.folder))
        else:
            self._lock.enter_context(_locked(_part_lock(self.folder, self.part.index), self.folder, _LOOK_S))
        try:
            with self._writing(), self._turn():
                self._recover()
        except BaseException:
            self._lock.close()
            raise
        return self

    def append(self, keys: Sequence[str], features: np.ndarray) -> None:
        """Stores ``features`` [n, P, Dv] float16, all finite, of the images with these content ``keys``."""
        with self._writing():
            while len(keys):
                partial = self._partial = self._partial or self._begin()
                now = min(partial.room, len(keys))
                partial.append(keys[:now], features[:now])
                keys, features = keys[now:], features[now:]
                if not partial.room:
                    self._finish()

    def skip(self, key: str, reason: str) -> None:
        """Remembers that the content ``key`` has no features and why; listed with the next finished shard."""
        self._skipped[key] = reason

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        try:
            if not self._failed:
                with self._writing():
                    self._finish()
        finally:
            if self._partial is not None:
                self._partial.discard()
            self._lock.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
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

    def _turn(self) -> contextlib.AbstractContextManager[None]:
        """The right to change what all parts share."""
        if self.part.alone:
            return contextlib.nullcontext()
        return _locked(_lock_of(self.folder), self.folder, _TURN_S)

    def _begin(self) -> Partial:
        name = self._next() if self.part.alone else f"part-{self.part.index}.h5"
        return Partial(self.folder / f"{name}.partial", self.fingerprint, self._manifest.shape, self.shard_images)

    def _next(self) -> str:
        """The name of a new shard."""
        taken = [int(number[1]) for path in self.folder.iterdir() if (number := _NUMBERED.match(path.name))]
        return f"shard-{max(taken, default=-1) + 1:05}.h5"

    def _finish(self) -> None:
        """Makes the partial a finished, listed shard; without one only the manifest is brought up to date."""
        if (partial := self._partial) is not None:
            partial.finish()
            size, digest = partial.path.stat().st_size, checksum(partial.path)
        with self._turn():
            if not self.part.alone:
                self._manifest = read_manifest(self.folder) or self._manifest
            if partial is not None:
                finished = partial.path.with_suffix("") if self.part.alone else self.folder / self._next()
                entry = ShardEntry(finished.name, len(partial.keys), size, digest)
                partial.path.rename(finished)
                self._partial = None
                sync_folder(self.folder)
                self._manifest = self._manifest.listing(entry)
                self.bytes_written += entry.bytes
            self._manifest = replace(self._manifest, skipped={**self._manifest.skipped, **self._skipped})
            self._manifest.write(self.folder)

    def _recover(self) -> None:
        """Makes the folder what its manifest says, after whatever ended the last writer."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # For people to read. What decides is the folder's name, and what every shard says it was made with.
        found = None
        with contextlib.suppress(StoreError):
            found = read_fingerprint(self.folder)
        if found != self.fingerprint:
            write_fingerprint(self.folder, self.fingerprint)
        for stale in unfinished(self.folder):
            if self._alive(stale):
                continue
            log.info("removing %s, left by an extract that was interrupted", stale)
            stale.unlink()
        manifest = read_manifest(self.folder)
        if manifest is not None and manifest.shape != self._manifest.shape:
            raise StoreError(
                f"{self.folder} holds features of {manifest.shape}, the backbone makes {self._manifest.shape}",
                hint="the backbone's identity() misses what changed; remove the folder and extract again",
            )
        self._manifest = manifest or self._manifest
        self._skipped = dict(self._manifest.skipped)
        listed = {entry.file for entry in self._manifest.shards}
        for path in sorted(self.folder.glob("*.h5")):
            if path.name not in listed:
                self._adopt(path)
        self._manifest.write(self.folder)

    def _alive(self, partial: Path) -> bool:
        """Whether another part is writing ``partial``."""
        found = _OF_PART.search(partial.name)
        return found is not None and int(found[1]) != self.part.index and _held(_part_lock(self.folder, int(found[1])))

    def _adopt(self, path: Path) -> None:
        """Lists a shard that was renamed but not yet listed; a damaged one is set aside.

        Raises:
            StoreError: it can't be read, and may be intact.
        """
        try:
            shard = Shard.open(path)
            if differences := self.fingerprint.differences(shard.fingerprint):
                raise damaged(path, f"it has features of another fingerprint: {'; '.join(differences)}")
            entry = ShardEntry(path.name, len(shard.keys), path.stat().st_size, checksum(path))
        except DamagedShardError as error:
            log.warning("%s; set aside", error)
            path.rename(path.with_name(f"{path.name}.damaged"))
        except OSError as error:
            raise fault(path, error) from error
        else:
            self._manifest = self._manifest.listing(entry)


def may_write(folder: Path) -> bool:
    """Whether this user may write to the store in ``folder``."""
    return all(os.access(each, os.W_OK) for each in (folder, folder.parent, _lock_of(folder)) if each.exists())


def unfinished(folder: Path) -> list[Path]:
    """What writers that died have left in ``folder``: partial shards and unnamed manifests."""
    return sorted([*folder.glob("*.partial"), *folder.glob(".*.json.*")])


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """The right to change the store in ``folder``, alone; the system gives it back if the process dies.

    Raises:
        StoreError: another process has it, or writes a part, or the lock can't be made.
    """
    with _locked(_lock_of(folder), folder):
        parts = {each.name.removesuffix(".owner") for each in folder.parent.glob(f"{folder.name}.part-*.lock*")}
        if any(_held(folder.with_name(part)) for part in parts):
            raise _busy(folder)
        yield


@contextlib.contextmanager
def _locked(lock_file: Path, folder: Path, timeout_s: float = 0) -> Iterator[None]:
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(exclusive_lock(lock_file, _busy(folder), timeout_s))
        except OSError as error:
            raise StoreError(
                f"the feature store {folder} can't be written: {error.strerror or error}",
                hint="set LLAVACTL_HOME to a folder that can be written",
            ) from error
        yield


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _part_lock(folder: Path, index: int) -> Path:
    return folder.with_name(f"{folder.name}.part-{index}.lock")


def _held(lock_file: Path) -> bool:
    """Whether a living process has ``lock_file``."""
    try:
        with exclusive_lock(lock_file, StoreError("held")):
            return False
    except StoreError:
        return True


def _busy(folder: Path) -> StoreError:
    return StoreError(
        f"another process is writing to the feature store {folder}",
        hint="wait until it has finished, then run the same command",
    )
