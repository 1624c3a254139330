"""Reading a feature store: one folder a fingerprint, HDF5 shards read as memory maps by content key."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llavactl.core.errors import StoreError
from llavactl.core.schema import FeatureShape
from llavactl.features.fingerprint import Fingerprint
from llavactl.features.manifest import (
    Manifest,
    ShardEntry,
    check_fingerprint,
    read_fingerprint,
    read_manifest,
    store_dir,
    store_dirs,
)
from llavactl.features.quantize import dequantize
from llavactl.features.shards import KEY_BYTES, Shard, damaged, fault

_KEY = np.dtype(f"S{KEY_BYTES}")
_MAX_MAPS = 256


class FeatureStore:
    """The finished features of one fingerprint, as they were when the store was opened.

    Any number of processes and threads may read; there are no locks. Maps are opened on first use and by
    each process for itself: what was open before a fork is left alone, and pickling takes no map along.
    """

    def __init__(self, folder: Path, fingerprint: Fingerprint, manifest: Manifest) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self.shape: FeatureShape = manifest.shape
        self.skipped: Mapping[str, str] = manifest.skipped
        self._shards = [_open(folder / entry.file, entry, fingerprint, manifest.shape) for entry in manifest.shards]
        counts = [len(shard.keys) for shard in self._shards]
        keys = np.concatenate([np.empty(0, _KEY), *(shard.keys for shard in self._shards)])
        # Arrays, not a dict: 600,000 keys are 43 MB, and workers share them after a fork.
        order = np.argsort(keys, kind="stable")
        self.keys: np.ndarray = keys[order]
        self._shard = np.repeat(np.arange(len(counts), dtype=np.int32), counts)[order]
        self._row = np.concatenate([np.empty(0, np.int32), *(np.arange(n, dtype=np.int32) for n in counts)])[order]
        self._maps: dict[int, tuple[np.ndarray, ...]] = {}
        self._pid = os.getpid()

    @classmethod
    def open(cls, fingerprint: Fingerprint) -> FeatureStore:
        """The store for ``fingerprint``.

        Raises:
            StoreError: there is none (the message lists the fields in which the closest store differs), it has
                another fingerprint, or one of its shards is damaged or can't be read.
        """
        found = cls.find(fingerprint)
        if found is None:
            raise StoreError(
                f"there are no features for this recipe yet{_nearest(fingerprint)}", hint="run `llavactl extract`"
            )
        return found

    @classmethod
    def find(cls, fingerprint: Fingerprint) -> FeatureStore | None:
        """Like ``open``, but None where there is no store."""
        folder = store_dir(fingerprint)
        manifest = read_manifest(folder)
        if manifest is None:
            return None
        return cls(folder, fingerprint, manifest)

    def __len__(self) -> int:
        return len(self.keys)

    def __contains__(self, key: str) -> bool:
        return bool(self.holds([key])[0])

    def holds(self, keys: Sequence[str]) -> np.ndarray:
        """Which of ``keys`` [N] are stored, bool [N]."""
        wanted = np.array(keys, _KEY)
        if not len(self.keys):
            return np.zeros(len(wanted), bool)
        at = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return np.asarray(self.keys[at] == wanted)

    def read(self, key: str) -> np.ndarray:
        """The features [P, Dv] float16 of the image with content ``key``, a copy of its own; raises as ``stored``."""
        features, *scales = self._rows(key)
        return dequantize(features, scales[0]) if scales else features.copy()

    def stored(self, key: str) -> tuple[np.ndarray, ...]:
        """What ``read`` would be made of, copies: features [P, Dv]; where these are int8 also scales [P + Dv].

        Raises:
            StoreError: they are not stored.
        """
        return tuple(row.copy() for row in self._rows(key))

    def _rows(self, key: str) -> list[np.ndarray]:
        wanted = key.encode()
        at = int(self.keys.searchsorted(wanted))
        # ``item``: NumPy's own scalars would take half of the time that finding features takes.
        if at == len(self.keys) or self.keys.item(at) != wanted:
            raise StoreError(f"{self.folder} has no features of image {key}", hint="run `llavactl extract`")
        row = self._row.item(at)
        return [column[row] for column in self._map(self._shard.item(at))]

    def _map(self, shard: int) -> tuple[np.ndarray, ...]:
        if self._pid != os.getpid():
            self._maps, self._pid = {}, os.getpid()
        found = self._maps.get(shard)
        if found is None:
            # Each map holds a file descriptor, of which a process has 1,024 or so.
            if len(self._maps) >= _MAX_MAPS:
                self._maps = {}
            try:
                found = self._maps[shard] = self._shards[shard].map()
            except OSError as error:
                raise fault(self._shards[shard].path, error) from error
            except ValueError as error:
                raise damaged(self._shards[shard].path, str(error)) from error
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}


def _open(path: Path, entry: ShardEntry, fingerprint: Fingerprint, shape: FeatureShape) -> Shard:
    """A listed shard, checked as far as that is cheap: size, layout, fingerprint, shape, number of images."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise fault(path, error) from error
    if size != entry.bytes:
        raise damaged(path, f"{size} bytes, not {entry.bytes}")
    shard = Shard.open(path)
    check_fingerprint(path, shard.fingerprint, fingerprint)
    if len(shard.keys) != entry.images or shard.shape != shape:
        raise damaged(path, f"{len(shard.keys)} images of {shard.shape}, not {entry.images} of {shape}")
    return shard


def _nearest(fingerprint: Fingerprint) -> str:
    """In which fields the most alike of the other stores differs, if there is one."""
    found: list[tuple[list[str], Path]] = []
    for folder in store_dirs():
        try:
            other = read_fingerprint(folder)
        except StoreError:
            continue
        if other is not None and read_manifest_quietly(folder):
            found.append((fingerprint.differences(other), folder))
    if not found:
        return ""
    differences, folder = min(found, key=lambda each: (len(each[0]), each[1]))
    return f"; the nearest store {folder.name} differs: {'; '.join(differences)}"


def read_manifest_quietly(folder: Path) -> Manifest | None:
    """The manifest of ``folder``, or None where it is missing or broken."""
    try:
        return read_manifest(folder)
    except StoreError:
        return None
