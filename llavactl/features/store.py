"""Reads a feature store: HDF5 shards, accessed as memory maps and indexed by content key."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from llavactl.features.shards import KEY_BYTES, Shard, damaged_error, open_error
from llavactl.images.known import known_key

if TYPE_CHECKING:
    from llavactl.core.schema import ImageRef

_KEY = np.dtype(f"S{KEY_BYTES}")
_MAX_MAPS = 256


class FeatureStore:
    """The features of one fingerprint that were finished when the store was opened.

    Any number of processes and threads can read without locks. Each process opens memory maps on first use; they are
    neither inherited across a fork nor pickled.
    """

    def __init__(self, folder: Path, fingerprint: Fingerprint, manifest: Manifest) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self.shape: FeatureShape = manifest.shape
        self.skipped: Mapping[str, str] = manifest.skipped
        self._shards = [
            _checked_shard(folder / entry.file, entry, fingerprint, manifest.shape) for entry in manifest.shards
        ]
        counts = [len(shard.keys) for shard in self._shards]
        keys = np.concatenate([np.empty(0, _KEY), *(shard.keys for shard in self._shards)])
        # Arrays instead of a dict: 600,000 keys take 43 MB, which worker processes share after a fork.
        order = np.argsort(keys, kind="stable")
        self.keys: np.ndarray = keys[order]
        self._shard_index = np.repeat(np.arange(len(counts), dtype=np.int32), counts)[order]
        self._row = np.concatenate([np.empty(0, np.int32), *(np.arange(n, dtype=np.int32) for n in counts)])[order]
        self._maps: dict[int, tuple[np.ndarray, ...]] = {}
        self._pid = os.getpid()

    @classmethod
    def open(cls, fingerprint: Fingerprint) -> FeatureStore:
        """The store for ``fingerprint``.

        Raises:
            StoreError: the store doesn't exist (the message lists the fields in which the closest store differs), has
                another fingerprint, or has a shard that is damaged or can't be read.
        """
        store = cls.find(fingerprint)
        if store is None:
            raise StoreError(
                f"no features have been extracted for this recipe{_closest_store(fingerprint)}",
                hint="run `llavactl extract`",
            )
        return store

    @classmethod
    def find(cls, fingerprint: Fingerprint) -> FeatureStore | None:
        """Like ``open``, but None if the store doesn't exist."""
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
        queries = np.array(keys, _KEY)
        if not len(self.keys):
            return np.zeros(len(queries), bool)
        positions = np.minimum(np.searchsorted(self.keys, queries), len(self.keys) - 1)
        return np.asarray(self.keys[positions] == queries)

    def has_any(self, keys: Sequence[str]) -> bool:
        """Whether one of ``keys`` has features, or a reason why it has none."""
        return bool(self.holds(keys).any()) or any(key in self.skipped for key in keys)

    def known_keys(self, images: Sequence[ImageRef], keys: Sequence[str | OSError]) -> list[str | OSError]:
        """``keys``, with the known ones of images that can't be read, if the store can do without these images.

        It can if it has their features, or a reason why they have none.
        """
        known = {
            index: key
            for index, error in enumerate(keys)
            if isinstance(error, OSError) and (key := known_key(images[index])) is not None
        }
        stored = dict(zip(known, self.holds(list(known.values())), strict=True))
        usable = {index: key for index, key in known.items() if stored[index] or key in self.skipped}
        return [usable.get(index, key) for index, key in enumerate(keys)]

    def shard_of(self, key: str) -> str:
        """The name of the shard with the features of ``key``, which must be stored."""
        return self._shards[self._shard_index.item(int(self.keys.searchsorted(key.encode())))].path.name

    def read(self, key: str) -> np.ndarray:
        """The features [P, Dv] float16 of the image with content ``key``, as a copy.

        Raises:
            StoreError: see ``stored``.
        """
        features, *scales = self._rows(key)
        return dequantize(features, scales[0]) if scales else features.copy()

    def stored(self, key: str) -> tuple[np.ndarray, ...]:
        """Copies of the stored arrays: features [P, Dv] float16, or features int8 and their scales [P + Dv].

        Raises:
            StoreError: ``key`` is not stored, or its shard can't be read.
        """
        return tuple(row.copy() for row in self._rows(key))

    def _rows(self, key: str) -> list[np.ndarray]:
        """Views of the stored arrays of ``key``."""
        query = key.encode()
        position = int(self.keys.searchsorted(query))
        # ``item`` because NumPy scalars would take half of the lookup time.
        if position == len(self.keys) or self.keys.item(position) != query:
            raise StoreError(f"{self.folder} has no features of image {key}", hint="run `llavactl extract`")
        row = self._row.item(position)
        return [column[row] for column in self._map(self._shard_index.item(position))]

    def _map(self, index: int) -> tuple[np.ndarray, ...]:
        """The memory-mapped columns of shard ``index``."""
        if self._pid != os.getpid():
            self._maps, self._pid = {}, os.getpid()
        columns = self._maps.get(index)
        if columns is None:
            # Every map keeps a file descriptor open; processes are often limited to 1,024.
            if len(self._maps) >= _MAX_MAPS:
                self._maps = {}
            try:
                columns = self._maps[index] = self._shards[index].map()
            except OSError as error:
                raise open_error(self._shards[index].path, error) from error
            except ValueError as error:
                raise damaged_error(self._shards[index].path, str(error)) from error
        return columns

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}


def _checked_shard(path: Path, entry: ShardEntry, fingerprint: Fingerprint, shape: FeatureShape) -> Shard:
    """The shard of ``entry``, after cheap checks: size, layout, fingerprint, shape, number of images."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise open_error(path, error) from error
    if size != entry.bytes:
        raise damaged_error(path, f"expected {entry.bytes} bytes, got {size}")
    shard = Shard.open(path)
    check_fingerprint(path, shard.fingerprint, fingerprint)
    if len(shard.keys) != entry.images or shard.shape != shape:
        raise damaged_error(
            path, f"expected {entry.images} images of {shape}, got {len(shard.keys)} images of {shard.shape}"
        )
    return shard


def _closest_store(fingerprint: Fingerprint) -> str:
    """The fields in which the most similar store differs, as part of a message; empty if there are no stores."""
    candidates: list[tuple[list[str], Path]] = []
    for folder in store_dirs():
        try:
            other = read_fingerprint(folder)
            usable = read_manifest(folder) is not None
        except StoreError:
            continue
        if other is not None and usable:
            candidates.append((fingerprint.differences(other), folder))
    if not candidates:
        return ""
    differences, folder = min(candidates, key=lambda candidate: (len(candidate[0]), candidate[1]))
    return f"; the closest store {folder.name} differs: {'; '.join(differences)}"
